"""How far each language lies from English in the encoder's space (section 4.2), and Figure 2.

    python distance.py --task pawsx                                 two tables: distances, coverage
    python distance.py --task pawsx --runs RUN ... -o figure2.png   beside them what robust training gains
    python distance.py --align FILE                                 align lines of `source ||| target`

The distance of a language is the mean Euclidean distance of aligned words in parallel sentences, a word being
the vector of its last subword (Cao et al. 2020). The words are aligned by the reparameterised IBM Model 2 of
Dyer, Chahuneau, Smith (2013), "Dyer" below: for the i-th of m target words and the j-th of n source words

    p(a_i = 0) = P_NULL,  p(a_i = j) = (1 - P_NULL) exp(-lambda |i/m - j/n|) / Z(i, m, n)    (Dyer, section 2)
    p(f_i, a_i = j) = p(a_i = j) t(f_i | e_j)

Coverage asks whether the regions of robust training hold the translations (Figure 1b): the share of aligned
words whose difference lies in the L-inf ball of each eps.

The folder gets distances.json and, for each language, LANG.src-tgt (the words) and LANG.align (the links).
"""

import argparse
import functools
import itertools
import json
import math
import unicodedata
from pathlib import Path
from typing import NamedTuple

import torch

import evaluate
import robust
from data import (TASKS, InputError, digest, in_range, languages_of, path_of, prepare, progress, read_lines,
                  read_pairs, replacing, run_script, split_words)

P_NULL, ALPHA, ITERATIONS = 0.08, 0.01, 5       # Dyer, and the defaults of fast_align
TENSION, TENSIONS = 4.0, (0.1, 14.0)            # lambda's start and bounds (fast_align)
EPS = (0.001, 0.01, 0.1, 1.0)                   # the sizes of the regions (paper, section 4)
BATCH, LONGEST = 64, 512                        # sentences at once, and their tokens (ours)
UNSEGMENTED = ('ja', 'th', 'zh')                # no blanks between words: each token is a word (ours)


# ---------------------------------------------------------------- aligner

# What is said of a pair of m target and n source words is a matrix (m, n + 1), column 0 the null word. The
# table holds t of the words that some pair has together, E entries.

def entries_of(pairs):
    """Where t(f_i | e_j) stands in the table, for each pair (m, n + 1); the source word of each entry (E,).

    `pairs`: a list of (source words, target words).
    """
    table, numbers = {}, {}
    entries = []
    for source, target in pairs:
        words = [numbers.setdefault(word, len(numbers)) for word in [None, *source]]
        places = []
        for word in target:
            places += [table.setdefault((number, word), len(table)) for number in words]
        entries.append(torch.tensor(places, dtype=torch.long).view(len(target), len(words)))
    return entries, torch.tensor([number for number, _ in table], dtype=torch.long)


@functools.lru_cache(1024)        # many pairs share a shape
def apart(m, n):
    """|i/m - j/n|: (m, n)."""
    i = torch.arange(1, m + 1, dtype=torch.double)[:, None]
    j = torch.arange(1, n + 1, dtype=torch.double)
    return (i / m - j / n).abs()


@functools.lru_cache(1024)
def prior(m, n, tension):
    """p(a_i = j) (Dyer, section 2): (m, n + 1)."""
    near = torch.softmax(-tension * apart(m, n), 1)
    return torch.nn.functional.pad((1 - P_NULL) * near, (1, 0), value=P_NULL)


def posterior(entry, table, tension):
    """The E step: p(a_i = j | e, f), (m, n + 1)."""
    m, columns = entry.shape
    joint = table[entry] * prior(m, columns - 1, tension)
    return joint / joint.sum(1, keepdim=True)


def maximise(counts, source):
    """The M step: t(f | e) from expected counts, (E,); variational Bayes, a Dirichlet(ALPHA) prior (Dyer)."""
    mass = torch.zeros(int(source.max()) + 1, dtype=torch.double).index_add_(0, source, counts + ALPHA)
    return torch.exp(torch.digamma(counts + ALPHA) - torch.digamma(mass)[source])


def tension_slope(sums, tension):
    """The derivative in lambda of the expected log prior, a target word on average (Dyer). A float.

    `sums`: p(a_i = j | e, f) summed over the pairs of a shape -> {(m, n + 1): (m, n + 1)}.
    """
    slope = words = 0
    for (m, columns), total in sums.items():
        linked, distance = total[:, 1:], apart(m, columns - 1)
        mean = (torch.softmax(-tension * distance, 1) * distance).sum(1)
        slope += (linked.sum(1) * mean).sum().item() - (linked * distance).sum().item()
        words += total.sum().item()
    return slope / max(words, 1)


def fit(entries, source, desc='aligning'):
    """Expectation maximisation of t and lambda -> table (E,), lambda.

    One iteration less than ITERATIONS: fast_align's last one only decodes.
    """
    table = torch.full(source.shape, 1 / max(len(source), 1), dtype=torch.double)
    tension = TENSION
    for iteration in progress(range(ITERATIONS - 1), desc=desc, unit='iteration'):
        counts, sums = torch.zeros_like(table), {}
        for entry in entries:
            expected = posterior(entry, table, tension)
            counts.index_add_(0, entry.flatten(), expected.flatten())
            sums[entry.shape] = sums.get(entry.shape, 0) + expected
        if len(counts):
            table = maximise(counts, source)
        if iteration > 0:           # from the second on, by gradient ascent: 8 steps of 20 (fast_align)
            for _ in range(8):
                tension += 20 * tension_slope(sums, tension)
                tension = min(max(tension, TENSIONS[0]), TENSIONS[1])
    return table, tension


def best_links(pairs, desc='aligning'):
    """The most probable source word of each target word, if not null -> for each pair a set of (j, i)."""
    entries, source = entries_of(pairs)
    table, tension = fit(entries, source, desc)
    links = []
    for entry in entries:
        best = posterior(entry, table, tension).argmax(1)      # of equals the first
        links.append({(column - 1, i) for i, column in enumerate(best.tolist()) if column > 0})
    return links


def align(pairs, desc='aligning'):
    """Align a list of (source words, target words) -> for each pair its links (j, i), sorted, from 0.

    Those that both directions find (Cao et al. 2020). The model is learned from these pairs alone.
    """
    for pair in pairs:
        if len(pair) != 2 or isinstance(pair[0], str) or isinstance(pair[1], str):
            raise InputError('align takes a list of (source words, target words), each a list of str; '
                             f'got {pair!r:.60}')
    if not pairs:
        return []
    forward = best_links(pairs, desc)
    reverse = best_links([(target, source) for source, target in pairs], desc)
    links = []
    for there, back in zip(forward, reverse):
        links.append(sorted(there & {(j, i) for i, j in back}))
    return links


def pharaoh(links):
    """Links (j, i) as text, j-i."""
    return ' '.join(f'{j}-{i}' for j, i in links)


def read_source_target(path):
    """Read lines of `source ||| target`, words between blanks -> list of (source words, target words)."""
    pairs = []
    for number, line in enumerate(read_lines(path, 'lines of `source ||| target`'), 1):
        sides = line.split('|||')
        if len(sides) != 2:
            raise InputError(f'{path}:{number}: {len(sides) - 1} times `|||`; expected `source ||| target`')
        pairs.append((split_words(sides[0]), split_words(sides[1])))
    return pairs


# ---------------------------------------------------------------- words

class Side(NamedTuple):
    """One language's side of the parallel text, a list over its sentences each."""
    features: list      # what tokenizer.pad takes
    words: list         # their words, lower case
    last: list          # the position of each word's last token
    cut: int            # how many had more tokens than the encoder takes


def read_translations(path, task):
    """XTREME's translate-test file -> rows (premise, hypothesis, English premise, English hypothesis)."""
    expected = 'five columns: premise, hypothesis, their English translations, label'
    rows = []
    for number, line in enumerate(read_lines(path, expected), 1):
        cells = line.split('\t')
        if len(cells) != 5:
            raise InputError(f'{path}:{number}: {len(cells)} columns; expected {expected}')
        if cells[4] not in TASKS[task].labels:
            raise InputError(f'{path}:{number}: label {cells[4]!r} in column 5; expected {expected}')
        rows.append(cells[:4])
    return rows


def read_aligned(path, english, task):
    """A language's test file and the row-aligned English one -> rows as `read_translations` gives them."""
    theirs, english = read_pairs(path, task), read_pairs(english, task)
    if len(theirs) != len(english):
        raise InputError(f'{path}: {len(theirs)} rows; expected {len(english)}, translations of '
                         'test-en.tsv row by row')
    return [pair[:2] + other[:2] for pair, other in zip(theirs, english)]


def parallel(rows):
    """Parallel sentences (sentence, English), each pair once, all premises first -> list, counts of the rest.

    Left out: empty ones and PAWS-X's placeholder NS ('no sentence'), of which no word has a translation.
    """
    pairs = [(row[0], row[2]) for row in rows] + [(row[1], row[3]) for row in rows]
    once = dict.fromkeys(pairs)
    whole = []
    for pair in once:
        if all(side.strip() not in ('', 'NS') for side in pair):
            whole.append(pair)
    return whole, {'repeated': len(pairs) - len(once), 'left_out': len(once) - len(whole)}


def words_in(sentence, encoding, whole):
    """The words of a tokenised sentence: their text in lower case, and the position of each one's last token.

    A word is what the encoder's tokenizer takes as one, or, if not `whole`, a token. Punctuation stands
    alone, as BERT's tokenizer has it and SentencePiece's does not.
    """
    words, last = [], []
    before, begin = None, 0
    tokens = zip(encoding.word_ids, encoding.tokens, encoding.offsets)
    for at, (word, token, (start, end)) in enumerate(tokens):
        text = sentence[start:end].strip()      # empty for [CLS] and [SEP]
        if not text or token == '▁':            # SentencePiece's lone blank, which may lie on a character
            continue
        mark = all(unicodedata.category(character)[0] in 'PS' for character in text)
        if whole and word == before and not mark:
            words[-1], last[-1] = sentence[begin:end].strip().lower(), at
        else:
            words.append(text.lower())
            last.append(at)
            begin = start
        before = None if mark else word
    return words, last


def words_of(tokenizer, sentences, lang, longest):
    """Tokenise sentences, at most `longest` tokens each, and find their words -> Side.

    Raises InputError for a tokenizer from which words cannot be had.
    """
    name = f'{tokenizer.name_or_path}: its tokenizer'
    if not tokenizer.is_fast:
        raise InputError(f'{name} is not a fast one, which alone says where a token is; '
                         'expected tokenizer.json')
    encoded = tokenizer(sentences, truncation=True, max_length=longest)
    side = Side([], [], [], sum(bool(encoding.overflowing) for encoding in encoded.encodings))
    for row, (sentence, encoding) in enumerate(zip(sentences, encoded.encodings)):
        words, last = words_in(sentence, encoding, lang not in UNSEGMENTED)
        for word in words:
            if ' ' in word:
                raise InputError(f'{name} takes {word!r:.40} as one word; expected one that splits at blanks')
        side.features.append({key: encoded[key][row] for key in encoded})
        side.words.append(words)
        side.last.append(last)
    for token_id in set().union(*encoded['input_ids']):
        token = tokenizer.convert_ids_to_tokens(token_id)
        if '\ufffd' in tokenizer.decode([token_id]) and '\ufffd' not in token:      # no character by itself
            raise InputError(f'{name} splits a character of {lang} into bytes ({token}); expected one whose '
                             'tokens are text')
    return side


# ---------------------------------------------------------------- distances

class Measured(NamedTuple):
    """Of every aligned pair of words (L,); beside it the same of its word and a random English one.

    The random one is of the same batch: 64 sentences of like length.
    """
    sentence: torch.Tensor          # which sentence pair it is from
    identical: torch.Tensor         # 1 where both words end in the same token of the vocabulary
    distance: torch.Tensor          # Euclidean
    largest: torch.Tensor           # the largest coordinate of the difference, absolute
    random: torch.Tensor            # as distance
    random_largest: torch.Tensor
    mean: torch.Tensor              # of the coordinates of both words
    square: torch.Tensor            # and of their squares


def vectors(model, tokenizer, sides, side, rows, links, layer):
    """The linked words of one side in the sentences `rows`, a link each: vectors (L, H), last tokens (L,)."""
    # Padding on the right whatever the tokenizer's own side: positions are counted from the left.
    features = [sides[side].features[row] for row in rows]
    inputs = tokenizer.pad(features, padding_side='right', return_tensors='pt').to(model.device)
    with robust.hidden(model, layer) as states:
        model.base_model(**inputs)
    sentences, positions = [], []
    for sentence, row in enumerate(rows):
        for link in links[row]:
            sentences.append(sentence)
            positions.append(sides[side].last[row][link[side]])
    return states[0][sentences, positions], inputs['input_ids'][sentences, positions]


@torch.inference_mode()
def measure(model, tokenizer, sides, links, *, layer, dtype=torch.float32, seed=42, desc='measuring'):
    """Compare the linked words of two Sides at `layer` -> Measured. The model must be in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    linked = [row for row in range(len(links)) if links[row]]
    linked.sort(key=lambda row: -len(sides[0].features[row]['input_ids']))      # so that little is padding
    batches = []
    for start in progress(range(0, len(linked), BATCH), desc=desc, unit='batch'):
        rows = linked[start:start + BATCH]
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            theirs, their_ids = vectors(model, tokenizer, sides, 0, rows, links, layer)
            english, english_ids = vectors(model, tokenizer, sides, 1, rows, links, layer)
        anyone = torch.randint(len(english), (len(english),), generator=generator)
        sentence = torch.tensor(rows).repeat_interleave(torch.tensor([len(links[row]) for row in rows]))
        columns = [sentence, their_ids == english_ids]
        for other in (english, english[anyone]):
            difference = theirs - other
            columns += [difference.norm(dim=1), difference.abs().amax(1)]
        both = torch.cat([theirs, english], 1)
        columns += [both.mean(1), both.square().mean(1)]
        batches.append(torch.stack([column.double().cpu() for column in columns]))
    return Measured(*torch.cat(batches, 1))


def distance_of(measured):
    """Mean distance, its standard error over sentences (None of one), that of random words, their ratio."""
    mean, random = measured.distance.mean().item(), measured.random.mean().item()
    # The words of a sentence were not drawn apart: what varies is a sentence's sum.
    _, sentence = measured.sentence.unique(return_inverse=True)
    sums = sentence.bincount(measured.distance - mean)
    error = None
    if len(sums) > 1:
        error = evaluate.error_of_sum(sums).item() / len(sentence)
    return {'distance': mean, 'standard_error': error, 'random': random, 'words': len(sentence),
            'ratio': mean / random if random else None}


def shares_within(largest):
    """By eps, the share (0 to 1) of words whose difference lies in the L-inf ball; None of no words."""
    shares = {}
    for eps in EPS:
        inside = (largest <= eps).double()
        shares[f'{eps:g}'] = inside.mean().item() if len(inside) else None
    return shares


def coverage(measured):
    """Do the regions cover the translations?

    `within`: shares of all aligned words; `within_other`: of those that are not the identical token.
    `largest`, `random_largest`: medians of the difference's largest coordinate. `deviation`: standard
    deviation of the words' coordinates; what counts is eps over it.
    """
    found = {'identical': measured.identical.mean().item(), 'within': shares_within(measured.largest)}
    found['within_other'] = shares_within(measured.largest[measured.identical == 0])
    found['largest'] = measured.largest.quantile(0.5).item()
    found['random_largest'] = measured.random_largest.quantile(0.5).item()
    found['deviation'] = (measured.square.mean() - measured.mean.mean() ** 2).sqrt().item()
    return found


def languages(args):
    """The languages to measure, those asked for or the task's but English -> {code: its file}, English file.

    The second is None where the translations stand in the files themselves.
    """
    if 'en' in (args.langs or []):
        raise InputError('langs: distances are from English; name other languages')
    if not args.translations:
        english = path_of(args.data, args.task, 'test', 'en')
        if not english.exists():
            prepare(args.data, args.task, langs=args.langs)
        langs = languages_of(args.data, args.task, args.langs)
        return {lang: path_of(args.data, args.task, 'test', lang) for lang in langs if lang != 'en'}, english
    files = {}
    for lang in args.langs or TASKS[args.task].languages:
        path = Path(args.translations) / f'test-{lang}-en-translated.tsv'
        if args.langs or path.exists():
            files[lang] = path
    if not files:
        raise InputError(f'{args.translations}: no test-LANG-en-translated.tsv of {args.task} in it; '
                         'expected the files of XTREME\'s translate-test')
    return files, None


def read_text(args, path, english):
    """The parallel text of a language, as `parallel` gives it, but --max-sentences at most."""
    if english:
        rows = read_aligned(path, english, args.task)
    else:
        rows = read_translations(path, args.task)
    pairs, counts = parallel(rows)
    if not pairs:
        raise InputError(f'{path}: empty or NS in every row; expected sentences and their translations')
    return pairs[:args.max_sentences], counts


def one_language(model, tokenizer, args, lang, text, dtype):
    """Align and measure one language -> what distances.json says of it, its words, its links."""
    pairs, counts = text
    longest = evaluate.longest(model, tokenizer, LONGEST)
    theirs = words_of(tokenizer, [pair[0] for pair in pairs], lang, longest)
    english = words_of(tokenizer, [pair[1] for pair in pairs], 'en', longest)
    words = list(zip(theirs.words, english.words))
    links = align(words, desc=f'aligning {lang}')
    if not any(links):
        raise InputError(f'{lang}: no aligned words in {len(pairs)} sentence pairs; expected translations')
    measured = measure(model, tokenizer, (theirs, english), links, layer=args.layer, dtype=dtype,
                       seed=args.seed, desc=f'measuring {lang}')
    found = distance_of(measured) | {'sentences': len(pairs)} | counts
    found['cut'] = theirs.cut + english.cut
    found['coverage'] = coverage(measured)
    return found, words, links


def distances(args, files, english):
    """Measure `languages` -> what distances.json says, and {language: (words, links)}."""
    # Before all else: a broken file shows at once.
    texts = {lang: read_text(args, path, english) for lang, path in files.items()}
    device, dtype = evaluate.choose_device(args.float32)
    name = args.model or evaluate.default_model(args.task, args.data)
    model, tokenizer = evaluate.load_encoder(name, args.task, layer=args.layer)
    results = {'task': args.task, 'model': name, 'layer': args.layer, 'dtype': str(dtype), 'seed': args.seed}
    results['english'] = 'the row-aligned test file' if english else 'translated'
    results['max_sentences'] = args.max_sentences
    results['files'] = {'model': evaluate.fingerprint(model, tokenizer)}
    results['languages'], aligned = {}, {}
    model.to(device).eval()
    for lang, path in files.items():
        found, *aligned[lang] = one_language(model, tokenizer, args, lang, texts[lang], dtype)
        results['languages'][lang] = found
        results['files'][path.name] = digest(path)
    if english:
        results['files'][english.name] = digest(english)
    return results, aligned


def write(folder, results, aligned):
    """Write distances.json, and LANG.src-tgt and LANG.align of each language. Raises InputError."""
    content = {'distances.json': [json.dumps(results, indent=1)]}
    for lang, (words, links) in aligned.items():
        content[f'{lang}.src-tgt'] = [' '.join([*theirs, '|||', *english]) for theirs, english in words]
        content[f'{lang}.align'] = [pharaoh(line) for line in links]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, lines in content.items():
            with replacing(folder / name) as part:
                part.write_text('\n'.join([*lines, '']), encoding='utf-8')
    except OSError as error:
        raise InputError(f'{error.filename}: {error.strerror}; the figures above were not written') from None


# What is printed: a column's form is that of a number in it.
DISTANCE = {'distance': '{:.3f}', 'standard error': '{:.3f}', 'random': '{:.3f}', 'ratio': '{:.3f}',
            'words': '{:,}', 'sentences': '{:,}', 'repeated': '{:,}', 'left out': '{:,}', 'cut': '{:,}'}
COVERAGE = {'identical': '{:.1%}', 'largest': '{:.3f}', 'random largest': '{:.3f}', 'deviation': '{:.3f}'}


def caption(results):
    """What the tables are of, in a line."""
    first = f', the first {results["max_sentences"]:,} sentence pairs' if results['max_sentences'] else ''
    return (f'{results["task"]}, layer {results["layer"]} of {results["model"]}, '
            f'{evaluate.short(results["dtype"])}; English: {results["english"]}{first}')


def as_cells(found, forms):
    """Figures as a row's cells, by the name of their column; None has no cell."""
    cells = {}
    for column, form in forms.items():
        figure = found[column.replace(' ', '_')]
        if figure is not None:
            cells[column] = form.format(figure)
    return cells


def distance_table(results):
    """The Table of the distances."""
    rows = [(lang, as_cells(found, DISTANCE)) for lang, found in results['languages'].items()]
    below = ['distance: Euclidean, mean over aligned words; random: over random words',
             'standard error: over sentences',
             'sentences: repeated ones once; left out: empty ones and NS (no sentence)',
             f'cut: sentences of more than {LONGEST} tokens, or than the encoder takes']
    return evaluate.Table([f'Distance from English: {caption(results)}'], list(DISTANCE), rows, below)


def coverage_table(results):
    """The Table of the coverage."""
    rows = []
    for lang, language in results['languages'].items():
        found = language['coverage']
        cells = as_cells(found, COVERAGE)
        for eps, share in found['within'].items():
            other = found['within_other'][eps]
            cells[f'eps {eps}'] = f'{share:.1%} / ' + ('-' if other is None else f'{other:.1%}')
        rows.append((lang, cells))
    below = ['eps: aligned words whose difference is in this L-inf ball / of those that are not identical',
             'identical: words that end in the same token',
             'largest: coordinate of the difference, median; random largest: of random words',
             'deviation: standard deviation of the coordinates']
    if results['layer'] != 0:
        below.append('train.py puts its noise at layer 0 unless told otherwise: see --layer 0')
    columns = ['identical', *(f'eps {eps:g}' for eps in EPS), 'largest', 'random largest', 'deviation']
    above = [f'Do the regions cover the translations? {caption(results)}']
    return evaluate.Table(above, columns, rows, below)


# ---------------------------------------------------------------- Figure 2

class Gain(NamedTuple):
    """What a method gains over plain in each language, at the eps chosen by English dev."""
    name: str           # method and eps, and a † where a run gives nearly one answer alone
    seeds: int
    points: list        # of accuracy, a language each; nan where there are no labels
    half: list          # half the width of the 95% interval
    rank: tuple | None  # rank correlation with the distances, and its p


def comparable(records, task):
    """The runs of each robust method at the eps chosen by English dev -> {name: (its runs, plain's)}.

    Raises InputError unless all are runs of this task that may stand in one table, plain among them.
    """
    for record in records:
        if record['args']['task'] != task:
            raise InputError(f'{record["name"]}: a run of {record["args"]["task"]}; expected runs of {task}')
    found = evaluate.variants(evaluate.one_group(records))
    if len(found) < 2 or 'plain' not in found:
        raise InputError(f'runs of {", ".join(found) or "no method"}; expected plain and a robust method')
    plain = found.pop('plain')[None]
    methods = {}
    for label, by_eps in found.items():
        eps = evaluate.chosen_eps(by_eps)
        if not evaluate.paired(by_eps[eps], plain):
            raise InputError(f'{label}: no seed in common with plain; expected runs of the same seeds')
        methods[evaluate.row_name(label, eps)] = by_eps[eps], plain
    return methods


def gains(methods, by_lang):
    """What each robust method gains -> languages from near to far, a Gain for each method.

    `methods`: as `comparable` gives them; `by_lang`: {language: its distance}.
    """
    langs = sorted(by_lang, key=by_lang.get)
    rows = []
    for name, (records, plain) in methods.items():
        points, half = [values.tolist()[:-1] for values in evaluate.gain(records, plain, langs)]
        rank = rank_correlation([by_lang[lang] for lang in langs], points)
        pairs = evaluate.paired(records, plain)
        if any(map(evaluate.one_answer, itertools.chain(*pairs))):
            name += ' †'
        rows.append(Gain(name, len(pairs), points, half, rank))
    return langs, rows


def rank_correlation(x, y, seed=42):
    """Spearman's rho and its two-sided p by permutation -> (rho, p); None where x or y is constant.

    Of all permutations up to 8 values, else of 100,000 at random, the given order counted among them. A pair
    that is not finite does not count.
    """
    values = torch.tensor([x, y], dtype=torch.double)
    # Rounded: means of accuracies that are equal may differ in the last bit.
    values = values[:, values.isfinite().all(0)].round(decimals=9)
    # How many a value exceeds less how many exceed it: twice its rank about the mean, ties sharing theirs.
    a, b = (values[:, :, None] - values[:, None]).sign().sum(2)
    scale = a.norm() * b.norm()
    if scale == 0:
        return None
    rho = (a @ b / scale).item()
    if len(a) <= 8:
        orders = torch.tensor(list(itertools.permutations(range(len(a)))))
    else:
        generator = torch.Generator().manual_seed(seed)
        orders = torch.rand(100_000, len(a), generator=generator).argsort(1)
        orders = torch.cat([torch.arange(len(a))[None], orders])
    others = b[orders] @ a / scale
    return rho, (others.abs() >= abs(rho) - 1e-9).double().mean().item()


def gain_table(results, langs, rows, records):
    """The Table of the gains: languages from near to far, a method a column."""
    lines = []
    for number, lang in enumerate(langs):
        cells = {'distance': f'{results["languages"][lang]["distance"]:.3f}'}
        for row in rows:
            if not math.isnan(row.half[number]):
                cells[row.name] = f'{row.points[number]:+.1f} ±{row.half[number]:.1f}'
        lines.append((lang, cells))
    rho, p = {}, {}
    for row in rows:
        if row.rank:
            rho[row.name], p[row.name] = f'{row.rank[0]:+.2f}', f'{row.rank[1]:.2g}'
    lines += [('rank correlation', rho), ('p', p)]
    above = ['Accuracy gained over plain in points, ± half its 95% interval', *evaluate.caption(records)]
    measured = results['files']['model']
    if any(record['files'].get('model', measured) != measured for record in records):
        above.append('The distances are of another encoder than these runs began with.')
    below = [f'{row.name}: {row.seeds} seed{"s" * (row.seeds > 1)}, as plain' for row in rows]
    below.append('rank correlation of gain and distance: Spearman; p: by permutation, two-sided')
    if any(row.name.endswith('†') for row in rows):
        below.append(f'†: a run of it or of plain gives one answer for {evaluate.ONE_ANSWER:.0%} or more of '
                     'the English items: it loses most where plain is best, whatever the distance')
    return evaluate.Table(above, ['distance', *(row.name for row in rows)], lines, below)


def figure_2(results, langs, rows):
    """Draw Figure 2, a panel a method, its bars from near (left) to far (right) -> matplotlib figure."""
    figure = evaluate.new_figure(max(8, 0.62 * len(langs) + 1.5), 2.1 * len(rows) + 1.4)
    panels = figure.subplots(len(rows), 1, sharex=True, sharey=True, squeeze=False).flatten()
    places = range(len(langs))
    for number, (row, axes) in enumerate(zip(rows, panels)):
        axes.bar(places, row.points, yerr=row.half, capsize=3, color=f'C{number}', alpha=0.8)
        axes.axhline(0, color='black', linewidth=0.8)
        title = f'{row.name}, {row.seeds} seed{"s" * (row.seeds > 1)}'
        if row.rank:
            title += '; rank correlation {:+.2f}, p = {:.2g}'.format(*row.rank)
        axes.set_title(title, fontsize='medium')
        axes.set_ylabel('gain (points)')
    far = results['languages']
    # Also of a language without labels, which has no bar.
    panels[-1].set_xticks(places, [f'{lang}\n{far[lang]["distance"]:.3g}' for lang in langs])
    panels[-1].set_xlabel(f'language, and its distance from English (Euclidean, layer {results["layer"]} '
                          f'of {Path(results["model"]).name})')
    figure.suptitle(f'{results["task"]}: accuracy gained over plain, by method and eps (L-inf, coordinates '
                    'of Enc(x))\nbars: mean over seeds; whiskers: 95% interval', fontsize='medium')
    return figure


def report(results, methods, records, picture):
    """Print the tables; with `methods`, compared in `records`, that of the gains too, and draw Figure 2."""
    print(evaluate.render(distance_table(results)))
    print(evaluate.render(coverage_table(results)))
    if methods:
        by_lang = {lang: language['distance'] for lang, language in results['languages'].items()}
        langs, rows = gains(methods, by_lang)
        print(evaluate.render(gain_table(results, langs, rows, records)))
        if picture:
            evaluate.save_picture(figure_2(results, langs, rows), picture)


# ---------------------------------------------------------------- command line

def parse_args(words=None):
    """The command line, or these words of one."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                     epilog='See the top of distance.py for what is written.')
    group = parser.add_argument_group('what')
    add = group.add_mutually_exclusive_group(required=True).add_argument
    add('--task', choices=TASKS, help='measure the distances of its languages')
    add('--align', metavar='FILE', help='align lines of `source ||| target`, print links i-j, from 0')
    group.add_argument('--runs', nargs='+', metavar='RUN',
                       help='Figure 2: runs of plain and robust methods, run folders or .jsonl of results')
    add = parser.add_argument_group('data and model').add_argument
    add('--data', default='download', help="folder in XTREME's layout (default: %(default)s)")
    add('--langs', nargs='+', metavar='LANG', help="any with a test-LANG.tsv; else the task's")
    add('--translations', metavar='DIR', help="XTREME's translate-test files in place of test-en.tsv")
    add('--model', help='pre-trained encoder, not fine-tuned: folder, or name of the hub; else as train.py')
    add = parser.add_argument_group('how').add_argument
    add('--layer', type=int, default=-1,
        help='0 word embeddings, k the k-th layer, -1 the last (default: %(default)s, Cao et al.)')
    add('--max-sentences', type=in_range(int, 1), metavar='N', help='the first N sentence pairs a language')
    add('--seed', type=in_range(int, 0, 2 ** 63 - 1), default=42,
        help='of the random words (default: %(default)s)')
    add('--float32', action='store_true', help='no bfloat16, whatever the hardware')
    add = parser.add_argument_group('output').add_argument
    add('--out', metavar='FOLDER', help='distances, words and links; else runs/distance-TASK')
    add('-o', '--output', metavar='FILE', help='Figure 2 of --runs, .png or .svg')
    args = parser.parse_args(words)
    if args.align and args.runs:
        parser.error('--runs goes with --task')
    if args.output and not args.runs:
        parser.error('-o is the picture of --runs')
    return args


def main(args=None):
    """Align a file; or measure the distances of a task and set what robust training gains against them."""
    args = args or parse_args()
    if args.align:
        for links in align(read_source_target(args.align)):
            print(pharaoh(links))
        return
    if args.output:         # found out now, not after the measuring
        evaluate.check_picture(args.output)
    records = evaluate.read_records(args.runs or [])
    methods = comparable(records, args.task) if records else None
    results, aligned = distances(args, *languages(args))
    try:
        report(results, methods, records, args.output)
    finally:        # written also where a picture fails, or `| head` has seen enough
        write(Path(args.out or f'runs/distance-{args.task}'), results, aligned)


if __name__ == '__main__':
    run_script(main)
