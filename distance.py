"""How far each language lies from English in the encoder's space (section 4.2), and Figure 2.

    python distance.py --task pawsx                                 two tables: distances, coverage
    python distance.py --task pawsx --runs RUN ... -o figure2.png   beside them what robust training gains

The distance of a language is the mean Euclidean distance of aligned words in parallel sentences, a word being
the vector of its last subword (Cao et al. 2020). The words are aligned by the reparameterised IBM Model 2 of
Dyer, Chahuneau, Smith (2013), "Dyer" below; its equations stand above the lines that compute them. Coverage
asks whether the regions of robust training hold the translations (Figure 1b): of the aligned words that are
not one token in both languages, the share whose difference lies in the L-inf ball of each eps.

What is measured is printed, and written to --out FOLDER/distances.json where that is given.
"""

import functools
import json
import math
import unicodedata
from pathlib import Path
from typing import NamedTuple

import torch

import evaluate
import robust
from data import (TASKS, InputError, Parser, in_range, path_of, prepare, progress,
                  read_lines, read_pairs, run_script, write_json)

P_0, MU, ITERATIONS = 0.08, 0.01, 5             # Dyer, and the defaults of fast_align
TENSION, TENSIONS = 4.0, (0.1, 14.0)            # lambda's start and bounds (fast_align)
EPS = (0.001, 0.01, 0.1, 1.0)                   # the sizes of the regions (paper, section 4)
BATCH, LONGEST = 64, 512                        # sentences at once, and their tokens (ours)
UNSEGMENTED = ('ja', 'th', 'zh')                # no blanks between words: each token is a word (ours)


# ---------------------------------------------------------------- aligner

# A pair has n source words f and m target words e. What is said of it is a matrix (m, n + 1), column 0 the
# null word. theta has an entry for each two words that some pair has together, E in all.

def entries_of(pairs):
    """Where theta(e_i | f_j) stands in theta, for each pair (m, n + 1); the source word of each entry (E,).

    `pairs`: a list of (source words, target words).
    """
    places, numbers, entries = {}, {}, []
    for source, target in pairs:
        entry = []
        for e in target:
            entry += [places.setdefault((f, e), len(places)) for f in [None, *source]]
        entries.append(torch.tensor(entry, dtype=torch.long).view(len(target), len(source) + 1))
    source = [numbers.setdefault(f, len(numbers)) for f, _ in places]
    return entries, torch.tensor(source, dtype=torch.long)


@functools.lru_cache(1024)        # many pairs share a shape
def apart(m, n):
    """-h(i, j, m, n): (m, n)."""
    i = torch.arange(1, m + 1, dtype=torch.double)[:, None]
    j = torch.arange(1, n + 1, dtype=torch.double)
    # h(i, j, m, n) = -|i/m - j/n|
    return (i / m - j / n).abs()


@functools.lru_cache(1024)
def prior(m, n, tension):
    """delta(a_i = j | i, m, n): (m, n + 1)."""
    # delta(a_i = 0 | i, m, n) = p_0
    # delta(a_i = j | i, m, n) = (1 - p_0) exp(lambda h(i, j, m, n)) / Z_lambda(i, m, n)
    near = torch.softmax(-tension * apart(m, n), 1)
    return torch.nn.functional.pad((1 - P_0) * near, (1, 0), value=P_0)


def posterior(entry, theta, tension):
    """The E step: p(a_i = j | e_i, f, m, n), (m, n + 1)."""
    m, columns = entry.shape
    # p(e_i, a_i = j | f, m, n) = delta(a_i = j | i, m, n) theta(e_i | f_j)
    joint = theta[entry] * prior(m, columns - 1, tension)
    return joint / joint.sum(1, keepdim=True)


def maximise(counts, source):
    """The M step: theta from the expected counts c(e, f) of its entries, (E,)."""
    mass = torch.zeros(int(source.max()) + 1, dtype=torch.double).index_add_(0, source, counts + MU)
    # Variational Bayes with theta_f ~ Dirichlet(mu):
    # theta(e | f) = exp(digamma(c(e, f) + mu)) / exp(digamma(sum over e' of (c(e', f) + mu)))
    return torch.exp(torch.digamma(counts + MU) - torch.digamma(mass)[source])


def tension_slope(sums, tension):
    """The derivative in lambda of the expected log prior, a target word on average. A float.

    `sums`: the posteriors of all pairs of a shape, summed -> {(m, n + 1): (m, n + 1)}.
    """
    slope = words = 0
    for (m, columns), total in sums.items():
        linked, distance = total[:, 1:], apart(m, columns - 1)
        # sum over i and j of p(a_i = j | e_i, f, m, n) (h(i, j, m, n) - E_delta[h(i, j', m, n)])
        mean = (torch.softmax(-tension * distance, 1) * distance).sum(1)
        slope += (linked.sum(1) * mean).sum().item() - (linked * distance).sum().item()
        words += total.sum().item()
    return slope / words


def fit(entries, source):
    """Expectation maximisation -> theta (E,), lambda.

    One iteration less than ITERATIONS: fast_align's last one only decodes.
    """
    theta = torch.full(source.shape, 1 / len(source), dtype=torch.double)
    tension = TENSION
    for iteration in progress(range(ITERATIONS - 1), desc='aligning', unit='iteration'):
        counts, sums = torch.zeros_like(theta), {}
        for entry in entries:
            expected = posterior(entry, theta, tension)
            counts.index_add_(0, entry.flatten(), expected.flatten())
            sums[entry.shape] = sums.get(entry.shape, 0) + expected
        theta = maximise(counts, source)
        if iteration > 0:           # from the second on, by gradient ascent: 8 steps of 20 (fast_align)
            for _ in range(8):
                tension += 20 * tension_slope(sums, tension)
                tension = min(max(tension, TENSIONS[0]), TENSIONS[1])
    return theta, tension


def best_links(pairs):
    """The most probable source word of each target word, if not null -> for each pair a set of (j, i)."""
    entries, source = entries_of(pairs)
    if len(source) == 0:        # no target words at all
        return [set() for _ in pairs]
    theta, tension = fit(entries, source)
    links = []
    for entry in entries:
        best = posterior(entry, theta, tension).argmax(1)      # of equals the first
        links.append({(column - 1, i) for i, column in enumerate(best.tolist()) if column > 0})
    return links


def align(pairs):
    """Align a list of (source words, target words) -> for each pair its links (j, i), sorted, from 0.

    Those that both directions find (Cao et al. 2020). The model is learned from these pairs alone.
    """
    forward = best_links(pairs)
    reverse = best_links([(target, source) for source, target in pairs])
    links = []
    for there, back in zip(forward, reverse):
        links.append(sorted(there & {(j, i) for i, j in back}))
    return links


# ---------------------------------------------------------------- words

def parallel(args, lang):
    """The parallel sentences (sentence, English) of a language, each once, all premises first -> list.

    From its test file and the row-aligned English one, or from XTREME's translate-test file (paper). Left
    out: empty ones and PAWS-X's placeholder NS ('no sentence'), of which no word has a translation. Raises
    InputError if there is nothing else, or the rows differ.
    """
    path, english = [path_of(args.data, args.task, 'test', code) for code in (lang, 'en')]
    if args.translations:
        path = Path(args.translations) / f'test-{lang}-en-translated.tsv'
        expected = 'five columns: premise, hypothesis, their English translations, label'
        rows = [line.split('\t') for line in read_lines(path, expected)]
        if {len(row) for row in rows} != {5}:
            raise InputError(f'{path}: expected {expected}')
    else:
        theirs, english = read_pairs(path, args.task), read_pairs(english, args.task)
        if len(theirs) != len(english):
            raise InputError(f'{path}: {len(theirs)} rows; expected {len(english)}, translations of '
                             'test-en.tsv row by row')
        rows = [one[:2] + other[:2] for one, other in zip(theirs, english)]
    pairs = {}
    for side in (0, 1):
        for row in rows:
            pair = row[side], row[side + 2]
            if not {'', 'NS'}.intersection(map(str.strip, pair)):
                pairs[pair] = path
    if not pairs:
        raise InputError(f'{path}: empty or NS in every row; expected sentences and their translations')
    return list(pairs)


def words_in(sentence, encoding, whole):
    """The words of a tokenised sentence: their text in lower case, and the position of each one's last token.

    A word is what the encoder's tokenizer takes as one, or, if not `whole`, a token. Punctuation stands
    alone, as BERT's tokenizer has it and SentencePiece's does not.
    """
    words, last = [], []
    before, begin, reached = None, 0, 0
    tokens = zip(encoding.word_ids, encoding.tokens, encoding.offsets)
    for at, (word, token, (start, end)) in enumerate(tokens):
        text = sentence[start:end].strip()      # empty for [CLS], [SEP] and padding
        if not text or token == '▁':            # SentencePiece's lone blank, which may lie on a character
            continue
        mark = all(unicodedata.category(character)[0] in 'PS' for character in text)
        # Where a tokenizer splits a character into bytes, they are of one word.
        if start < reached or (whole and word == before and not mark):
            words.pop()
            last.pop()
            start = begin
        words.append(sentence[start:end].strip().lower())
        last.append(at)
        before, begin, reached = None if mark else word, start, end
    return words, last


class Sentence(NamedTuple):
    """The words of a sentence."""
    words: list             # their text in lower case
    tokens: torch.Tensor    # the last token of each (words,)
    vectors: torch.Tensor   # Enc(x) there: float32 (words, H)


@torch.inference_mode()
def embed(model, tokenizer, sentences, lang, layer):
    """Run the encoder, in eval mode, on sentences -> a Sentence of each, Enc(x) taken to end at `layer`.

    Raises InputError for a tokenizer from which words cannot be had.
    """
    longest = evaluate.longest(model, tokenizer, LONGEST)
    # The longest first: little of a batch is padding, and memory that does not suffice shows at once.
    order = sorted(range(len(sentences)), key=lambda row: -len(sentences[row]))
    embedded = [None] * len(sentences)
    for start in progress(range(0, len(order), BATCH), desc=f'measuring {lang}', unit='batch'):
        rows = order[start:start + BATCH]
        texts = [sentences[row] for row in rows]
        # Padding on the right whatever the tokenizer's own side: encoders count positions from the left.
        inputs = tokenizer(texts, truncation=True, max_length=longest, padding=True, padding_side='right',
                           return_tensors='pt').to(model.device)
        with robust.hidden(model, layer) as states:
            model.base_model(**inputs)
        tokens, vectors = inputs['input_ids'].cpu(), states[0].cpu()
        for number, row in enumerate(rows):
            words, last = words_in(sentences[row], inputs.encodings[number], lang not in UNSEGMENTED)
            for word in words:
                if ' ' in word:
                    raise InputError(f'{tokenizer.name_or_path}: its tokenizer takes {word!r:.40} as one '
                                     'word; expected one that splits at blanks')
            embedded[row] = Sentence(words, tokens[number, last], vectors[number, last])
    return embedded


# ---------------------------------------------------------------- distances

def compare(lang, theirs, english):
    """Align the Sentences of a language and of English, and measure -> {column of the tables: figure}.

    Raises InputError where no words are aligned.
    """
    links = align([(one.words, other.words) for one, other in zip(theirs, english)])
    first, second, identical = [], [], []
    for one, other, line in zip(theirs, english, links):
        if line:
            j, i = map(list, zip(*line))
            first.append(one.vectors[j])
            second.append(other.vectors[i])
            identical.append(one.tokens[j] == other.tokens[i])
    if not first:
        raise InputError(f'{lang}: no aligned words in {len(links)} sentence pairs; expected translations')
    return figures(first, second, torch.cat(identical)) | {'sentences': len(links)}


def figures(theirs, english, identical):
    """Distance and coverage of L aligned words -> {column of the tables: figure}; nan of nothing.

    `theirs`, `english`: their vectors, for each sentence (words, H); `identical`: whether both end in the
    same token (L,). Their random counterpart is any of the L English words.
    """
    sizes = [len(part) for part in theirs]
    theirs, english = torch.cat(theirs), torch.cat(english)
    words = len(theirs)
    anyone = torch.randint(words, (words,), generator=torch.Generator().manual_seed(42))
    difference, other = theirs - english, theirs - english[anyone]
    distance, largest = difference.norm(dim=1).double(), difference.abs().amax(1).double()
    # The words of a sentence were not drawn apart: what varies is a sentence's sum.
    sums = torch.stack([part.sum() for part in (distance - distance.mean()).split(sizes)])
    found = {'distance': distance.mean(), 'standard error': evaluate.error_of_sum(sums) / words}
    found['random'] = other.norm(dim=1).mean()
    found['identical'] = identical.double().mean()
    for eps in EPS:
        found[f'eps {eps:g}'] = (largest[~identical] <= eps).double().mean()
    found['largest'], found['random largest'] = largest.quantile(0.5), other.abs().amax(1).quantile(0.5)
    found['deviation'] = torch.cat([theirs, english]).std(correction=0)
    return {column: float(figure) for column, figure in found.items()} | {'words': words}


def distances(args):
    """Measure what the command line names, print it, and write it to --out -> what is written there."""
    langs = [lang for lang in args.langs or TASKS[args.task].languages if lang != 'en']
    if not args.translations and not path_of(args.data, args.task, 'test', 'en').exists():
        prepare(args.data, args.task, langs=args.langs)
    texts = {lang: parallel(args, lang)[:args.max_sentences] for lang in langs}
    if not texts:
        raise InputError('--langs en: distances are from English; name other languages')
    device, _ = evaluate.choose_device(float32=True)
    args.model = args.model or evaluate.default_model(args.task, args.data)
    model, tokenizer = evaluate.load_encoder(args.model, args.task, layer=args.layer)
    model.to(device).eval()
    results = {'args': vars(args), 'model': evaluate.fingerprint(model, tokenizer), 'languages': {}}
    if args.out:
        path = Path(args.out) / 'distances.json'
        path.parent.mkdir(parents=True, exist_ok=True)
        # All but the languages, with which it ends.
        if path.exists() and not path.read_bytes().startswith(json.dumps(results)[:-2].encode()):
            raise InputError(f'{path}: measured otherwise, as its "args" say; name another --out')
    try:
        for lang, pairs in texts.items():
            theirs, english = zip(*pairs)
            theirs = embed(model, tokenizer, theirs, lang, args.layer)
            english = embed(model, tokenizer, english, 'en', args.layer)
            results['languages'][lang] = compare(lang, theirs, english)
            if args.out:
                write_json(path, results)
    finally:        # what was measured is printed also where a later language fails
        if results['languages']:
            report(f'{args.task}, layer {args.layer} of {args.model}; English: '
                   f'{args.translations or "test-en.tsv"}; sentence pairs: {args.max_sentences or "all"}',
                   results['languages'])
    return results


TABLES = {      # title -> the columns with the form of their figures, the legend
    'Distance from English': (
        {'distance': '{:.3f}', 'standard error': '{:.3f}', 'random': '{:.3f}', 'words': '{:,}',
         'sentences': '{:,}'},
        ['distance: Euclidean, mean over aligned words; random: of words paired at random',
         'standard error: over sentences',
         'sentences: pairs, each once; left out are those of an empty one or NS (no sentence)']),
    'Coverage of the translations by the regions': (
        {'identical': '{:.1%}', **{f'eps {eps:g}': '{:.1%}' for eps in EPS}, 'largest': '{:.3f}',
         'random largest': '{:.3f}', 'deviation': '{:.3f}'},
        ['identical: aligned words that end in the same token',
         'eps: of all others those whose difference lies in the L-inf ball of this size',
         'largest: coordinate of the difference, median; random largest: of words paired at random',
         'deviation: standard deviation of the coordinates',
         'train.py puts its noise at layer 0 unless told otherwise: see --layer 0']),
}


def report(caption, languages):
    """Print both tables of {language: its figures}."""
    for title, (forms, legend) in TABLES.items():
        rows = []
        for lang, found in languages.items():
            rows.append((lang, {column: form.format(found[column]) for column, form in forms.items()}))
        print(evaluate.render([f'{title}: {caption}'], list(forms), rows, legend))


# ---------------------------------------------------------------- Figure 2

def comparable(names, task):
    """The runs of these names -> the Row of plain, and a Row of each robust method, its eps by English dev.

    Raises InputError unless all are runs of this task that belong in one table, plain among them.
    """
    group = evaluate.one_table(evaluate.read_records(names))
    plain, *others = map(evaluate.chosen, evaluate.families(group))
    common = [evaluate.paired(row.records, plain.records) for row in others]
    found = group[0]['setting']['task'], plain.variant['method']
    if found != (task, 'plain') or not common or [] in common:
        raise InputError(f'{" ".join(names)}: expected runs of {task}, of plain and of robust methods, each '
                         'with a seed that plain has too')
    return plain, others


def gains_of(plain, others, far):
    """What each Row gains over plain's, in the languages of `far`, {language: distance}.

    -> the table's rows {name: cells}, the languages and what is said of all of them; and the curves of Figure
    2, {label: (points, half)}, as evaluate.gain has them. A † marks where a run gives one answer alone.
    """
    rows = {lang: {'distance': f'{distance:.3f}'} for lang, distance in far.items()}
    curves = {}
    for row in others:
        points, half = torch.stack(evaluate.gain(row.records, plain.records, list(far)))[:, :-1].tolist()
        name = row.name + ' †' * any(map(evaluate.one_answer, row.records + plain.records))
        for lang, gained, width in zip(far, points, half):
            if math.isfinite(gained):
                rows[lang][name] = f'{gained:+.1f} ±{width:.1f}'.removesuffix(' ±nan')
        rho, p = rank_correlation(list(far.values()), points)
        n = len(evaluate.paired(row.records, plain.records))
        label = name
        for what, cell in (('n', str(n)), ('rank correlation', f'{rho:+.2f}'), ('p', f'{p:.2g}')):
            rows.setdefault(what, {})[name] = cell
            label += f', {what} = {cell}'
        curves[label] = points, half
    return rows, curves


def rank_correlation(x, y):
    """Spearman's rho and its two-sided p by permutation -> (rho, p); nan where x or y is constant.

    Of 100,000 permutations at random, the given order counted among them. A pair that is not finite does not
    count.
    """
    values = torch.tensor([x, y], dtype=torch.double)
    # Rounded: means of accuracies that are equal may differ in the last bit.
    values = values[:, values.isfinite().all(0)].round(decimals=9)
    # How many a value exceeds less how many exceed it: twice its rank about the mean, ties sharing theirs.
    a, b = (values[:, :, None] - values[:, None]).sign().sum(2)
    scale = a.norm() * b.norm()
    if scale == 0:
        return math.nan, math.nan
    rho = (a @ b / scale).item()
    orders = torch.rand(100_000, len(a), generator=torch.Generator().manual_seed(42)).argsort(1)
    others = b[orders] @ a / scale
    return rho, (1 + (others.abs() >= abs(rho) - 1e-9).sum().item()) / (1 + len(others))


GAIN_LEGEND = [
    'each method at the eps that English dev chooses of those named (paper); n: the seeds that plain has too',
    '±: half the 95% interval over items and seeds, none from one seed',
    'rank correlation of gain and distance: Spearman; p: by permutation, two-sided',
    '†: a run of it or of plain gives one answer alone; it loses most where plain is best, however far']


def figure_2(caption, far, curves):
    """Draw Figure 2: gains over distances, a colour and marker a method -> matplotlib figure."""
    figure = evaluate.new_figure(10, 6)
    axes = figure.subplots()
    axes.axhline(0, color='black', linewidth=0.8)
    x = torch.tensor(list(far.values()))
    # A language has the same distance in every method: side by side its points do not hide one another.
    step = 0.007 * (x.max() - x.min())
    for number, (label, (points, half)) in enumerate(curves.items()):
        beside = step * (number - len(curves) / 2 + 0.5)
        axes.errorbar(x + beside, points, half, fmt='os^Dv<>P'[number % 8], color=f'C{number}', label=label,
                      elinewidth=1)
    # The codes stand above, in two lines: neighbours may be near.
    codes = [lang + '\n' * (number % 2) for number, lang in enumerate(far)]
    axes.secondary_xaxis('top').set_xticks(x, codes)
    for distance in x:
        axes.axvline(distance, color='0.9', zorder=0)
    axes.set(title=caption, xlabel='distance from English (Euclidean)',
             ylabel='accuracy gained over plain (points), 95% interval')
    figure.legend(loc='outside lower center')
    return figure


def report_gains(args, results, plain, others):
    """Print what the Rows `others` gain over plain's, languages from near to far, and draw Figure 2."""
    far = {lang: found['distance'] for lang, found in results['languages'].items()}
    far = dict(sorted(far.items(), key=lambda item: item[1]))
    rows, curves = gains_of(plain, others, far)
    caption = f'{args.task}: accuracy gained over plain; distance at layer {args.layer}'
    if plain.records[0]['setting']['model'] != results['model']:
        caption += f' of {args.model}, another encoder than these runs began with'
    print(evaluate.render([caption], ['distance', *rows['n']], rows.items(), GAIN_LEGEND))
    if args.output:
        evaluate.save_picture(figure_2(caption, far, curves), args.output)


# ---------------------------------------------------------------- command line

def parse_args(words=None):
    """The command line, or these words of one."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add('--task', choices=TASKS, required=True, help='whose languages to measure')
    add('--runs', nargs='+', metavar='RUN', help='Figure 2: runs of plain and robust methods, or a .jsonl')
    add('-o', '--output', metavar='FILE', help='the picture of --runs, .png or .svg')
    add('--out', metavar='FOLDER', help='write distances.json here')
    add('--data', default='download', help="folder in XTREME's layout (default: %(default)s)")
    add('--translations', metavar='DIR', help="XTREME's translate-test files in place of test-en.tsv (paper)")
    add('--langs', nargs='+', metavar='LANG', help="any with a test-LANG.tsv; else the task's")
    add('--model', help='pre-trained encoder, not fine-tuned: folder, or name of the hub; else as train.py')
    add('--layer', type=int, default=-1,
        help='0 word embeddings, k the k-th layer, -1 the last (default: %(default)s, Cao et al.)')
    add('--max-sentences', type=in_range(int, 1), metavar='N', help='the first N sentence pairs a language')
    args = parser.parse_args(words)
    if args.output and not args.runs:
        parser.error('-o is the picture of --runs')
    return args


def main(words=None):
    """Measure the distances of a task and set what robust training gains against them."""
    args = parse_args(words)
    # All that can be read or tried comes before the first hour of measuring.
    if args.output:
        evaluate.check_picture(args.output)
    compared = comparable(args.runs, args.task) if args.runs else None
    results = distances(args)
    if compared:
        report_gains(args, results, *compared)


if __name__ == '__main__':
    run_script(main)
