"""How far each language lies from English in the encoder's space (section 4.2), and Figure 2.

    python distance.py --task pawsx                                         the distances: a table and a folder
    python distance.py --task pawsx --plain RUN --robust RUN -o figure2.png
    python distance.py --align FILE                                         align lines of `source ||| target`

The distance of a language is the mean Euclidean distance of aligned words of parallel sentences, as in
Cao et al. (2020). The words are aligned by the reparameterised IBM Model 2 of Dyer, Chahuneau, Smith
(2013), "Dyer" below, written here in torch: for the i-th of m target words and the j-th of n source words

    p(a_i = 0) = P_NULL,  p(a_i = j) = (1 - P_NULL) exp(-lambda |i/m - j/n|) / Z(i, m, n)     (Dyer, section 2)
    p(f_i, a_i = j) = p(a_i = j) t(f_i | e_j)

The folder holds distances.json and, for each language, LANG.src-tgt (the words) and LANG.align (the links).
"""

import argparse
import itertools
import json
import math
import sys
import unicodedata
from pathlib import Path
from typing import NamedTuple

from data import TASKS, InputError, path_of, prepare, read_pairs, written

P_NULL, ALPHA, ITERATIONS = 0.08, 0.01, 5       # Dyer, and the defaults of fast_align
TENSION, TENSIONS = 4.0, (0.1, 14.0)            # lambda's start and bounds (fast_align)
SYMMETRIZE = {'intersection': set.intersection, 'union': set.union, 'forward': lambda forward, reverse: forward,
              'reverse': lambda forward, reverse: reverse}
BATCH, LONGEST = 64, 512                        # sentence pairs at once (ours); tokens, what is beyond is cut off and counted
UNSEGMENTED = ('ja', 'th', 'zh')                # no blanks between words: each token of the encoder is a word (ours)


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], epilog='See the top of distance.py for what is written.',
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--task', choices=TASKS)
    what.add_argument('--align', metavar='FILE', help='align lines of `source ||| target`, print links i-j, counted from 0')
    add('--symmetrize', choices=SYMMETRIZE, default='intersection', help='which links of the two directions to keep')
    add('--model', help='the pre-trained encoder, not fine-tuned; None: as train.py')
    add('--data', default='download', help='folder in XTREME\'s layout')
    add('--langs', nargs='+', metavar='LANG', help='target languages; None: all of the task')
    add('--translations', metavar='DIR', help='XTREME\'s translate-test files in place of the English test file')
    add('--alignments', metavar='FILE', help='links i-j, a line a sentence pair of LANG.src-tgt; {lang} stands for the language')
    add('--layer', type=int, default=-1, help='where to measure: 0 word embeddings, k the k-th layer, -1 the last')
    add('--mean', action='store_true', help='a word is the mean of its subwords, not its last')
    add('--max-sentences', type=int, help='the first N sentence pairs only')
    add('--float32', action='store_true', help='no bfloat16, whatever the hardware')
    add('--seed', type=int, default=42, help='of the random pairs and the bootstrap')
    add('--out', help='folder for the results; None: runs/distance-TASK')
    add('--plain', nargs='+', metavar='RUN', help='Figure 2: run folders of the plain model, one a seed')
    add('--robust', nargs='+', metavar='RUN', help='Figure 2: run folders of the robust model')
    add('-o', '--output', metavar='FILE', help='Figure 2: .png or .svg')
    args = parser.parse_args()
    if bool(args.plain) != bool(args.robust):
        parser.error('--plain and --robust go together')
    return args


args = parse_args() if __name__ == '__main__' else None     # before torch is loaded: --help and a typo answer at once

import torch            # noqa: E402
from tqdm import tqdm   # noqa: E402

import evaluate         # noqa: E402
import robust           # noqa: E402
import train            # noqa: E402


# ---------------------------------------------------------------- word alignment

class Cells(NamedTuple):
    """Every (target word, source word or null) of every sentence pair, flat: C cells, W target words, E table entries."""
    word: torch.Tensor          # (C,) the target word's number in the corpus, ascending
    link: torch.Tensor          # (C, 3) sentence, j, i, counted from 0; j = -1 is the null word
    apart: torch.Tensor         # (C,) |i/m - j/n|, infinite for the null word
    entry: torch.Tensor         # (C,) where t(f_i | e_j) stands in the table
    source: torch.Tensor        # (E,) the source word of an entry


def cells_of(pairs):
    """Lay out a corpus, a list of (source words, target words), as Cells. Empty sides are allowed."""
    def numbered(side):
        """Each sentence's length (sentences,), and the words of all sentences as numbers from 1 (words,)."""
        ids = {}
        lengths = torch.tensor([len(pair[side]) for pair in pairs], dtype=torch.long)
        return lengths, torch.tensor([ids.setdefault(word, len(ids) + 1) for pair in pairs for word in pair[side]], dtype=torch.long)

    (n, e), (m, f) = numbered(0), numbered(1)
    sentence = torch.arange(len(pairs)).repeat_interleave(m)                            # of each target word
    i = torch.arange(len(f)) - (m.cumsum(0) - m)[sentence]
    width = n[sentence] + 1                                                             # cells of each target word
    word = torch.arange(len(f)).repeat_interleave(width)
    j = torch.arange(len(word)) - (width.cumsum(0) - width)[word] - 1
    sentence, i = sentence[word], i[word]
    null = j < 0
    apart = ((i + 1) / m[sentence].double() - (j + 1) / n[sentence].double()).abs().masked_fill(null, math.inf)
    at = ((n.cumsum(0) - n)[sentence] + j).clamp(0, max(len(e) - 1, 0))
    source = torch.where(null, 0, e[at]) if len(e) else torch.zeros_like(j)             # 0 is the null word
    types = int(f.max()) + 1 if len(f) else 1
    entries, entry = torch.unique(source * types + f[word], return_inverse=True)
    return Cells(word, torch.stack([sentence, j, i], 1), apart, entry, entries // types)


def total(values, index, size=None):
    """Sum `values` that share an index: (C,) -> (size,), by default as many as there are indices."""
    return torch.zeros(int(index.max()) + 1 if size is None else size, dtype=torch.double).index_add_(0, index, values)


def prior(cells, tension):
    """p(a_i = j) of each cell (Dyer, section 2): (C,)."""
    near = torch.exp(-tension * cells.apart)            # 0 for the null word
    return torch.where(cells.apart.isinf(), P_NULL, (1 - P_NULL) * near / total(near, cells.word)[cells.word].clamp(min=1e-300))


def expect(cells, table, tension):
    """The E step: p(a_i = j | e, f) of each cell (C,), and the log-likelihood of the corpus."""
    joint = table[cells.entry] * prior(cells, tension)
    likelihood = total(joint, cells.word)
    return joint / likelihood[cells.word], likelihood.log().sum().item()


def maximise(cells, posterior, alpha=ALPHA):
    """The M step: t(f | e) from expected counts, (E,). alpha > 0: variational Bayes with a Dirichlet(alpha) prior (Dyer)."""
    counts = total(posterior, cells.entry)
    if not alpha:
        return counts / total(counts, cells.source)[cells.source].clamp(min=1e-300)
    mass = total(counts + alpha, cells.source)
    return torch.exp(torch.digamma(counts + alpha) - torch.digamma(mass)[cells.source])


def tension_slope(cells, posterior, tension):
    """The derivative in lambda of the expected log prior, a target word on average (Dyer). A float."""
    linked = ~cells.apart.isinf()
    word, apart, posterior = cells.word[linked], cells.apart[linked], posterior[linked]
    if not len(word):
        return 0.0
    near, words = torch.exp(-tension * apart), int(cells.word[-1]) + 1
    mean = total(near * apart, word, words) / total(near, word, words).clamp(min=1e-300)
    return ((total(posterior, word, words) * mean).sum() - (posterior * apart).sum()).item() / words


def fit(cells, iterations=ITERATIONS, alpha=ALPHA):
    """Expectation maximisation of t and lambda -> table (E,), lambda, the log-likelihood before each iteration."""
    table = torch.full(cells.source.shape, 1 / max(len(cells.source), 1), dtype=torch.double)
    tension, likelihoods = TENSION, []
    for iteration in range(iterations if len(cells.word) else 0):
        posterior, likelihood = expect(cells, table, tension)
        likelihoods.append(likelihood)
        table = maximise(cells, posterior, alpha)
        for _ in range(8 if iteration else 0):      # gradient ascent as fast_align does it: 8 steps of 20
            tension = min(max(tension + 20 * tension_slope(cells, posterior, tension), TENSIONS[0]), TENSIONS[1])
    return table, tension, likelihoods


def best_links(pairs):
    """The most probable source word of each target word, where it is not null -> (links, 3): sentence, j, i."""
    cells = cells_of(pairs)
    if not len(cells.word):
        return cells.link
    table, tension, _ = fit(cells)
    joint = table[cells.entry] * prior(cells, tension)
    best = torch.zeros(int(cells.word[-1]) + 1, dtype=torch.double).scatter_reduce_(0, cells.word, joint, 'amax')
    chosen = (joint == best[cells.word]).nonzero()[:, 0]
    first = torch.cat([torch.tensor([True]), cells.word[chosen][1:] != cells.word[chosen][:-1]])
    links = cells.link[chosen[first]]               # of equals the first: the null word, then the leftmost
    return links[links[:, 1] >= 0]


def align(pairs, symmetrize='intersection'):
    """Align a list of (source words, target words) -> for each pair the sorted list of its links (j, i), counted from 0."""
    forward = set(map(tuple, best_links(pairs).tolist()))
    reverse = {(sentence, j, i) for sentence, i, j in best_links([(f, e) for e, f in pairs]).tolist()}
    links = [[] for _ in pairs]
    for sentence, j, i in sorted(SYMMETRIZE[symmetrize](forward, reverse)):
        links[sentence].append((j, i))
    return links


def read_lines(path, expected, pairs=None):
    """The lines of a UTF-8 file, as many as there are pairs. Raises InputError."""
    try:
        lines = Path(path).read_text(encoding='utf-8').removesuffix('\n').split('\n')      # not splitlines(): words may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f'{path}: {getattr(error, "strerror", None) or "not UTF-8"}; expected {expected}') from None
    if pairs is not None and len(lines) != len(pairs):
        raise InputError(f'{path}: {len(lines)} lines; expected {len(pairs)}, one a sentence pair')
    return lines


def read_source_target(path):
    """Read lines of `source ||| target`, words between blanks -> list of (source words, target words)."""
    pairs = []
    for number, line in enumerate(read_lines(path, 'lines of `source ||| target`'), 1):
        sides = line.split('|||')
        if len(sides) != 2:
            raise InputError(f'{path}:{number}: {len(sides) - 1} times `|||`; expected `source ||| target`')
        pairs.append((sides[0].split(), sides[1].split()))
    return pairs


def read_links(path, pairs):
    """Read links i-j (Pharaoh's format, counted from 0), a line a pair -> list of lists of (j, i). They must fit the pairs."""
    links = []
    for number, (line, (source, target)) in enumerate(zip(read_lines(path, 'links i-j', pairs), pairs), 1):
        try:
            links.append([(int(j), int(i)) for j, i in (link.split('-') for link in line.split())])
        except ValueError:
            raise InputError(f'{path}:{number}: expected links i-j, such as 0-0 2-1') from None
        if any(j >= len(source) or i >= len(target) for j, i in links[-1]):
            raise InputError(f'{path}:{number}: a link beyond the {len(source)} source and {len(target)} target words')
    return links


# ---------------------------------------------------------------- distance

def translation_of(args, lang):
    """XTREME's translate-test file: target premise and hypothesis, their English translations, label."""
    return Path(args.translations) / f'test-{lang}-en-translated.tsv'


def parallel(args, lang):
    """Parallel sentences of `lang` and English, each pair once -> list of (sentence, English), and how many were left out."""
    if args.translations:
        path = translation_of(args, lang)
        rows = [line.rstrip('\r').split('\t') for line in read_lines(path, 'XTREME\'s translate-test file')]
        for number, row in enumerate(rows, 1):
            if len(row) != 5:
                raise InputError(f'{path}:{number}: {len(row)} columns; expected 5 (pair, its English translation, label)')
        pairs = [(row[k], row[k + 2]) for k in (0, 1) for row in rows]
    else:
        path = path_of(args.data, args.task, 'test', lang)
        target, english = (read_pairs(file, args.task) for file in (path, path_of(args.data, args.task, 'test', 'en')))
        if len(target) != len(english):
            raise InputError(f'{path}: {len(target)} rows, test-en.tsv has {len(english)}; expected parallel files')
        pairs = [(a[k], b[k]) for k in (0, 1) for a, b in zip(target, english)]
    whole = [pair for pair in dict.fromkeys(pairs) if 'NS' not in pair and all(side.strip() for side in pair)]
    return whole[:args.max_sentences], len(set(pairs)) - len(whole)


def words_of(tokenizer, sentences, lang):
    """Tokenise, and find the words: (inputs, words, spans), each a list over sentences; a span is a word's first and last token.

    A word is what the encoder's tokenizer takes as one; punctuation stands alone, as BERT's tokenizer has it and
    SentencePiece's does not; in ja, th and zh, which have no blanks, each token is a word (ours). Lower case.
    """
    encoded = tokenizer(sentences, truncation=True, max_length=LONGEST, return_offsets_mapping=True)
    words, spans = [], []
    for number, sentence in enumerate(sentences):
        words.append([])
        spans.append([])
        before = None
        for at, (word, token, (start, end)) in enumerate(zip(encoded.word_ids(number), encoded.tokens(number), encoded['offset_mapping'][number])):
            text = sentence[start:end].strip().lower()
            if word is None or not text or token == '▁':        # [CLS], [SEP], SentencePiece's lone blank
                continue
            mark = all(unicodedata.category(character)[0] in 'PS' for character in text)
            if word == before and not mark and lang not in UNSEGMENTED:
                words[-1][-1] += text
                spans[-1][-1] = spans[-1][-1][0], at
            else:
                words[-1].append(text)
                spans[-1].append((at, at))
            before = None if mark else word
    inputs = [{name: encoded[name][i] for name in encoded if name != 'offset_mapping'} for i in range(len(sentences))]
    return inputs, words, spans


def vectors(model, tokenizer, side, chosen, layer, mean):
    """Vectors of all words of the chosen sentences: float32 (words, H), and where each sentence's begin: a list."""
    inputs, _, spans = side
    states = []
    handle = robust.end_of_enc(model, layer).register_forward_hook(lambda module, _, output: states.append(output.float()))
    model.base_model(**tokenizer.pad([inputs[k] for k in chosen], return_tensors='pt').to(model.device))
    handle.remove()
    begins = [0, *itertools.accumulate(len(spans[k]) for k in chosen)]
    tokens = torch.tensor([(b, at, begins[b] + w) for b, k in enumerate(chosen) for w, (first, last) in enumerate(spans[k])
                           for at in (range(first, last + 1) if mean else (last,))], device=model.device)
    summed = torch.zeros(begins[-1], states[0].shape[-1], device=model.device).index_add_(0, tokens[:, 2], states[0][tokens[:, 0], tokens[:, 1]])
    return summed / tokens[:, 2].bincount(minlength=begins[-1])[:, None], begins


@torch.inference_mode()
def measure(model, tokenizer, sides, links, args, dtype, lang):
    """Distances of the linked words, and of as many random pairs -> sums over each sentence: (sentences, 3), the last the count."""
    sums = torch.zeros(len(links), 3, dtype=torch.double)
    generator = torch.Generator().manual_seed(args.seed)
    order = sorted((k for k in range(len(links)) if links[k]), key=lambda k: -len(sides[1][0][k]['input_ids']))
    for start in tqdm(range(0, len(order), BATCH), desc=lang, unit='batch', leave=False, disable=not sys.stderr.isatty()):
        chosen = order[start:start + BATCH]
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            (source, at), (target, to) = (vectors(model, tokenizer, side, chosen, args.layer, args.mean) for side in sides)
        pairs = torch.tensor([(at[b] + j, to[b] + i, k) for b, k in enumerate(chosen) for j, i in links[k]])
        anywhere = [torch.randint(len(side), (len(pairs),), generator=generator) for side in (source, target)]
        found = torch.stack([(source[j] - target[i]).norm(dim=1).double().cpu() for j, i in (pairs.T[:2], anywhere)]
                            + [torch.ones(len(pairs), dtype=torch.double)], 1)
        sums.index_add_(0, pairs[:, 2], found)
    return sums


def summary(sums, seed, resamples=1000):
    """Mean distance, its standard error by bootstrap over sentences, the random pairs' mean, and the ratio of the two."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [sums[torch.randint(len(sums), (len(sums),), generator=generator)].sum(0) for _ in range(resamples)]
    distance, anywhere, count = sums.sum(0).tolist()
    return {'pairs': int(count), 'distance': distance / count, 'random': anywhere / count, 'ratio': distance / anywhere,
            'standard_error': torch.stack([draw[0] / draw[2] for draw in drawn]).std().item()}


def distances(args):
    """The distance of each language from English: align, measure, write the folder -> {language: summary}."""
    folder = Path(args.out or f'runs/distance-{args.task}')
    device, dtype = evaluate.device_and_dtype(args.float32)
    args.model = args.model or train.DEFAULTS['model'][list(TASKS).index(args.task)].format(data=args.data)
    known = [lang for lang in TASKS[args.task].languages if lang != 'en' and (not args.translations or translation_of(args, lang).exists())]
    args.langs = args.langs or known
    if not args.langs or set(args.langs) - set(known):
        raise InputError(f'--langs {" ".join(args.langs)}: expected some of {" ".join(known) or "those with a file in " + args.translations}')
    if not args.translations:
        prepare(args.data, args.task)
    model, tokenizer = evaluate.load_encoder(args.model, args.task, layer=args.layer)
    model.to(device).eval()
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    print(f'{args.task}, layer {args.layer} of {args.model}; English: {"translations" if args.translations else "the row-aligned test file"}\n'
          'lang distance             random  ratio     pairs sentences left out')
    for lang in args.langs:
        pairs, left_out = parallel(args, lang)
        sides = [words_of(tokenizer, [pair[k] for pair in pairs], name) for k, name in enumerate((lang, 'en'))]
        words = list(zip(sides[0][1], sides[1][1]))
        write_lines(folder / f'{lang}.src-tgt', (f'{" ".join(e)} ||| {" ".join(f)}' for e, f in words))
        links = read_links(args.alignments.format(lang=lang), words) if args.alignments else align(words, args.symmetrize)
        write_lines(folder / f'{lang}.align', (' '.join(f'{j}-{i}' for j, i in line) for line in links))
        if not any(links):
            raise InputError(f'{lang}: no aligned words in {len(pairs)} sentence pairs')
        results[lang] = {'sentences': len(pairs), 'left_out': left_out, 'unlinked': sum(not line for line in links),
                         'truncated': sum(len(row['input_ids']) >= LONGEST for side in sides for row in side[0]),
                         **summary(measure(model, tokenizer, sides, links, args, dtype, lang), args.seed)}
        print('{:4} {distance:8.3f} +- {standard_error:.3f} {random:8.3f} {ratio:6.3f} {pairs:9,} {sentences:9,} {left_out:8,}'.format(
            lang, **results[lang]), flush=True)
    write_lines(folder / 'distances.json', [json.dumps({'args': vars(args), 'dtype': str(dtype), 'languages': results}, indent=1)])
    return results


def write_lines(path, lines):
    """Write lines as UTF-8."""
    with written(path) as part:
        part.write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')


# ---------------------------------------------------------------- Figure 2

def gains(plain, robust_runs, results):
    """What robust training gains, in points -> {language: (gain, standard error over seeds or 0)}, by rising distance."""
    accuracies = [[evaluate.read_results(run)['test'] for run in runs] for runs in (plain, robust_runs)]
    found = {}
    for lang in sorted(results, key=lambda lang: results[lang]['distance']):
        before, after = (torch.tensor([scores[lang] for scores in side if scores.get(lang) is not None], dtype=torch.double) for side in accuracies)
        if len(before) == len(plain) and len(after) == len(robust_runs):
            error = sum(side.var() / len(side) for side in (before, after) if len(side) > 1)
            found[lang] = (after.mean() - before.mean()).item(), float(error) ** 0.5
    return found


def rank_correlation(x, y, seed=42):
    """Spearman's rho and its two-sided p-value by permutation: all of them up to n = 8, else 100,000 at random. Two floats."""
    x, y = (torch.tensor(v, dtype=torch.double) for v in (x, y))
    ranks = [(v[:, None] > v).sum(1) + (v[:, None] == v).sum(1) / 2 for v in (x, y)]
    a, b = (rank - rank.mean() for rank in ranks)
    scale = a.norm() * b.norm()
    if len(x) <= 8:
        orders = torch.tensor(list(itertools.permutations(range(len(x)))))
    else:
        orders = torch.rand(100_000, len(x), generator=torch.Generator().manual_seed(seed)).argsort(1)
    rho, others = (a @ b) / scale, (b[orders] @ a) / scale
    return rho.item(), (others.abs() >= rho.abs() - 1e-9).double().mean().item()


def figure(found, results, path, title):
    """Draw Figure 2: the gain of each language, from near (left) to far (right)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError('-o needs matplotlib: pip install matplotlib') from None
    drawing = Figure(figsize=(max(4, 0.5 * len(found) + 2), 3), layout='constrained')
    axes = drawing.add_subplot(ylabel='gain in accuracy (points)', title=title)
    axes.bar(range(len(found)), [gain for gain, _ in found.values()], yerr=[error for _, error in found.values()], capsize=3)
    axes.set_xticks(range(len(found)), [f'{lang}\n{results[lang]["distance"]:.2f}' for lang in found])
    axes.set_xlabel('language and its distance from English')
    axes.axhline(0, color='black', linewidth=0.8)
    evaluate.save_picture(drawing, path)


def main(args):
    """Align a file, or measure the distances of a task and, given runs, set them against what robust training gains."""
    if args.align:
        for links in align(read_source_target(args.align), args.symmetrize):
            print(' '.join(f'{j}-{i}' for j, i in links))
        return
    results = distances(args)
    if args.plain:
        found = gains(args.plain, args.robust, results)
        print('gain of robust training in points, by distance:')
        for lang, (gain, error) in found.items():
            print(f'{lang:4} {results[lang]["distance"]:8.3f} {gain:+6.1f}' + f' +- {error:.1f}' * (error > 0) + '  ' + '#' * max(round(2 * gain), 0))
        rho, p = rank_correlation([results[lang]['distance'] for lang in found], [gain for gain, _ in found.values()])
        print(f'rank correlation of gain and distance: {rho:.2f} (p = {p:.3f}, {len(found)} languages)')
        if args.output:
            figure(found, results, args.output, f'{args.task}: {evaluate.read_results(args.robust[0])["args"].get("method")} against plain')


if __name__ == '__main__':
    main(args)
