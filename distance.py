"""How far each language lies from English in the encoder's space (section 4.2), and Figure 2.

    python distance.py --task pawsx                                 distances and coverage: two tables, a folder
    python distance.py --task pawsx --runs RUN ... -o figure2.png   beside them what robust training gains
    python distance.py --align FILE                                 align lines of `source ||| target`

The distance of a language is the mean Euclidean distance of aligned words in parallel sentences, a word being
the vector of its last subword (Cao et al. 2020). The words are aligned by the reparameterised IBM Model 2 of
Dyer, Chahuneau, Smith (2013), "Dyer" below: for the i-th of m target words and the j-th of n source words

    p(a_i = 0) = P_NULL,  p(a_i = j) = (1 - P_NULL) exp(-lambda |i/m - j/n|) / Z(i, m, n)     (Dyer, section 2)
    p(f_i, a_i = j) = p(a_i = j) t(f_i | e_j)

Coverage asks whether the regions of robust training hold the translations (Figure 1b): the share of aligned words
whose difference lies in the L-inf ball of each eps.

The folder gets distances.json and, for each language, LANG.src-tgt (the words) and LANG.align (the links).
"""

import argparse
import itertools
import json
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
UNSEGMENTED = ('ja', 'th', 'zh')                # no blanks between words: each token of the encoder is a word (ours)


# ---------------------------------------------------------------- aligner

class Shape(NamedTuple):
    """The B sentence pairs of m target and n source words. A pair's cells are (m, n + 1), column 0 the null word."""
    rows: list              # B, which pairs of the corpus they are
    apart: torch.Tensor     # (m, n) |i/m - j/n|
    entry: torch.Tensor     # (B, m, n + 1) where t(f_i | e_j) stands in the table


def numbered(sentences):
    """Words as numbers from 1, in place of each sentence a list."""
    ids = {}
    found = []
    for sentence in sentences:
        found.append([ids.setdefault(word, len(ids) + 1) for word in sentence])
    return found


def shapes_of(pairs):
    """A corpus, a list of (source words, target words), as Shapes, and the source word of each entry of the table (E,)."""
    sources, targets = [numbered(side) for side in zip(*pairs)]
    types = max(itertools.chain([0], *targets)) + 1
    rows_of, keys = {}, []
    for row, (source, target) in enumerate(zip(sources, targets)):
        rows_of.setdefault((len(target), len(source)), []).append(row)
    for rows in rows_of.values():
        e = torch.tensor([[0, *sources[row]] for row in rows])
        f = torch.tensor([targets[row] for row in rows], dtype=torch.long)
        keys.append(e[:, None, :] * types + f[:, :, None])
    entries, entry = torch.unique(torch.cat([key.flatten() for key in keys]), return_inverse=True)
    cells = entry.split([key.numel() for key in keys])
    shapes = []
    for ((m, n), rows), key, entry in zip(rows_of.items(), keys, cells):
        i = torch.arange(1, m + 1, dtype=torch.double)[:, None]
        j = torch.arange(1, n + 1, dtype=torch.double)
        shapes.append(Shape(rows, (i / m - j / n).abs(), entry.view(key.shape)))
    return shapes, entries // types


def prior(apart, tension):
    """p(a_i = j) (Dyer, section 2): (m, n + 1)."""
    near = torch.softmax(-tension * apart, 1)
    null = torch.full((len(apart), 1), P_NULL, dtype=torch.double)
    return torch.cat([null, (1 - P_NULL) * near], 1)


def posterior(shape, table, tension):
    """The E step: p(a_i = j | e, f), (B, m, n + 1)."""
    joint = table[shape.entry] * prior(shape.apart, tension)
    return joint / joint.sum(2, keepdim=True)


def maximise(counts, source):
    """The M step: t(f | e) from expected counts (E,), variational Bayes with a Dirichlet(ALPHA) prior (Dyer)."""
    mass = torch.zeros(int(source.max()) + 1, dtype=torch.double).index_add_(0, source, counts + ALPHA)
    return torch.exp(torch.digamma(counts + ALPHA) - torch.digamma(mass)[source])


def tension_slope(shapes, sums, tension):
    """The derivative in lambda of the expected log prior, a target word on average (Dyer). A float.

    `sums`: the posteriors of each shape, summed over its sentence pairs, (m, n + 1).
    """
    slope = words = 0
    for shape, total in zip(shapes, sums):
        linked = total[:, 1:]
        mean = (torch.softmax(-tension * shape.apart, 1) * shape.apart).sum(1)
        slope += (linked.sum(1) * mean).sum().item() - (linked * shape.apart).sum().item()
        words += len(shape.rows) * len(total)
    return slope / max(words, 1)


def fit(shapes, source, desc=None):
    """Expectation maximisation of t and lambda -> table (E,), lambda. As in fast_align the last iteration only decodes."""
    table = torch.full(source.shape, 1 / max(len(source), 1), dtype=torch.double)
    tension = TENSION
    for iteration in progress(range(ITERATIONS - 1), desc=desc, unit='iteration'):
        counts, sums = torch.zeros_like(table), []
        for shape in shapes:
            expected = posterior(shape, table, tension)
            counts.index_add_(0, shape.entry.flatten(), expected.flatten())
            sums.append(expected.sum(0))
        if len(counts):
            table = maximise(counts, source)
        if iteration > 0:           # from the second on, by gradient ascent: 8 steps of 20 (fast_align)
            for _ in range(8):
                tension += 20 * tension_slope(shapes, sums, tension)
                tension = min(max(tension, TENSIONS[0]), TENSIONS[1])
    return table, tension


def best_links(pairs, desc=None):
    """The most probable source word of each target word, where it is not null -> for each pair the set of its (j, i)."""
    links = [set() for _ in pairs]
    shapes, source = shapes_of(pairs)
    table, tension = fit(shapes, source, desc)
    for shape in shapes:
        best = (table[shape.entry] * prior(shape.apart, tension)).argmax(2)     # of equals the first
        for row, columns in zip(shape.rows, best.tolist()):
            for i, column in enumerate(columns):
                if column > 0:
                    links[row].add((column - 1, i))
    return links


def align(pairs, desc=None):
    """Align a list of (source words, target words) -> for each pair the sorted list of its links (j, i), from 0.

    Those that both directions find (Cao et al. 2020). Nothing is learned beforehand: the more pairs, the better.
    """
    for pair in pairs:
        if len(pair) != 2 or isinstance(pair[0], str) or isinstance(pair[1], str):
            raise InputError(f'align takes a list of (source words, target words), each a list of str; got {pair!r:.60}')
    if not pairs:
        return []
    forward = best_links(pairs, desc)
    reverse = best_links([(target, source) for source, target in pairs], desc)
    links = []
    for there, back in zip(forward, reverse):
        links.append(sorted(there & {(j, i) for i, j in back}))
    return links


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
    """XTREME's translate-test file: pair, its English translation, label -> two lists of (premise, hypothesis)."""
    expected = 'five columns: premise, hypothesis, their English translations, label'
    theirs, english = [], []
    for number, line in enumerate(read_lines(path, expected), 1):
        cells = line.split('\t')
        if len(cells) != 5:
            raise InputError(f'{path}:{number}: {len(cells)} columns; expected {expected}')
        if cells[4] not in TASKS[task].labels:
            raise InputError(f'{path}:{number}: label {cells[4]!r} in column 5; expected {expected}')
        theirs.append(cells[:2])
        english.append(cells[2:4])
    return theirs, english


def read_aligned(data, task, lang):
    """The row-aligned test files of a language and of English -> two lists of (premise, hypothesis)."""
    theirs, english = [read_pairs(path_of(data, task, 'test', name), task) for name in (lang, 'en')]
    if len(theirs) != len(english):
        raise InputError(f'{path_of(data, task, "test", lang)}: {len(theirs)} rows; expected {len(english)}, as test-en.tsv '
                         'has, row by row its translation')
    return [pair[:2] for pair in theirs], [pair[:2] for pair in english]


def parallel(theirs, english):
    """Parallel sentences (sentence, English), each pair once, all premises first -> list, repeated, left out.

    Left out: empty ones and PAWS-X's placeholder NS ('no sentence'), of which no word has a translation.
    """
    pairs = list(zip([row[0] for row in theirs], [row[0] for row in english]))
    pairs += zip([row[1] for row in theirs], [row[1] for row in english])
    once = dict.fromkeys(pairs)
    whole = []
    for pair in once:
        if all(side.strip() not in ('', 'NS') for side in pair):
            whole.append(pair)
    return whole, len(pairs) - len(once), len(once) - len(whole)


def words_in(sentence, encoding, whole):
    """The words of a tokenised sentence: their text in lower case, and the position of each one's last token.

    A word is what the encoder's tokenizer takes as one, or, if not `whole`, a token. Punctuation stands alone,
    as BERT's tokenizer has it and SentencePiece's does not.
    """
    words, last = [], []
    before, begin = None, 0
    for at, (word, token, (start, end)) in enumerate(zip(encoding.word_ids, encoding.tokens, encoding.offsets)):
        text = sentence[start:end].strip()
        if word is None or not text or token == '▁':        # [CLS], [SEP], SentencePiece's lone blank
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
        raise InputError(f'{name} is not a fast one, which alone says where a token lies; expected tokenizer.json')
    encoded = tokenizer(sentences, truncation=True, max_length=longest)
    side = Side([], [], [], sum(bool(encoding.overflowing) for encoding in encoded.encodings))
    for row, (sentence, encoding) in enumerate(zip(sentences, encoded.encodings)):
        words, last = words_in(sentence, encoding, lang not in UNSEGMENTED)
        for word in words:
            if ' ' in word:
                raise InputError(f'{name} takes {word!r:.40} as one word; distances need one that splits at blanks')
        side.features.append({key: encoded[key][row] for key in encoded})
        side.words.append(words)
        side.last.append(last)
    for token_id in set(itertools.chain.from_iterable(encoded['input_ids'])):
        token = tokenizer.convert_ids_to_tokens(token_id)
        if '\ufffd' in tokenizer.decode([token_id]) and '\ufffd' not in token:      # no character by itself
            raise InputError(f'{name} splits a character of {lang} into bytes ({token}); distances need one whose '
                             'tokens are text')
    return side


# ---------------------------------------------------------------- distances

class Measured(NamedTuple):
    """Of every aligned pair of words (L,), and of as many random pairs."""
    sentence: torch.Tensor          # which sentence pair it is from
    distance: torch.Tensor          # Euclidean
    largest: torch.Tensor           # the largest coordinate of the difference, absolute
    identical: torch.Tensor         # 1 where both words end in the same token of the vocabulary
    random: torch.Tensor            # Euclidean distance of a random pair of the batch
    random_largest: torch.Tensor
    deviation: float                # standard deviation of the words' coordinates


def vectors(model, tokenizer, side, rows, layer):
    """All words of the sentences `rows`: their vectors, float32 (words, H), their last tokens (words,), and where
    each sentence's words begin, a list."""
    # Padding on the right whatever the tokenizer's own side: positions are counted from the left.
    inputs = tokenizer.pad([side.features[row] for row in rows], padding_side='right', return_tensors='pt')
    inputs = inputs.to(model.device)
    with robust.hidden(model, layer) as states:
        model.base_model(**inputs)
    sentences, positions, begins = [], [], []
    for at, row in enumerate(rows):
        begins.append(len(positions))
        sentences += [at] * len(side.last[row])
        positions += side.last[row]
    return states[0][sentences, positions], inputs['input_ids'][sentences, positions], begins


@torch.inference_mode()
def measure(model, tokenizer, sides, links, *, layer, dtype=torch.float32, seed=42, desc=None):
    """Compare the linked words of two Sides at `layer` -> Measured. The model must be in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    order = sorted([row for row in range(len(links)) if links[row]], key=lambda row: -len(sides[1].last[row]))
    compared, moments = [], torch.zeros(3, dtype=torch.double)
    for start in progress(range(0, len(order), BATCH), desc=desc, unit='batch'):
        rows = order[start:start + BATCH]
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            found = [vectors(model, tokenizer, side, rows, layer) for side in sides]
        (theirs, their_tokens, their_begins), (english, english_tokens, english_begins) = found
        sentence, one, other = [], [], []
        for at, row in enumerate(rows):
            for j, i in links[row]:
                sentence.append(row)
                one.append(their_begins[at] + j)
                other.append(english_begins[at] + i)
        difference = theirs[one] - english[other]
        anyone = torch.randint(len(theirs), (len(one),), generator=generator)
        another = torch.randint(len(english), (len(one),), generator=generator)
        anyhow = theirs[anyone] - english[another]
        compared.append(torch.stack([
            torch.tensor(sentence, device=model.device), difference.norm(dim=1), difference.abs().amax(1),
            their_tokens[one] == english_tokens[other], anyhow.norm(dim=1), anyhow.abs().amax(1)]).double().cpu())
        for side in (theirs.double(), english.double()):
            moments += torch.stack([torch.tensor(side.numel()), side.sum().cpu(), side.square().sum().cpu()])
    count, total, squares = moments.tolist()
    return Measured(*torch.cat(compared, 1), deviation=(squares / count - (total / count) ** 2) ** 0.5)


def distance_of(measured):
    """Mean distance, its standard error over sentences (None of a single one), that of random pairs, their ratio."""
    mean, random = measured.distance.mean(), measured.random.mean().item()
    # The words of a sentence were not drawn apart: what varies is a sentence's sum.
    sums = torch.zeros(int(measured.sentence.max()) + 1, dtype=torch.double)
    sums.index_add_(0, measured.sentence.long(), measured.distance - mean)
    sentences = len(measured.sentence.unique())
    error = None
    if sentences > 1:
        error = (sums.square().sum() * sentences / (sentences - 1)).sqrt().item() / len(measured.distance)
    return {'distance': mean.item(), 'standard_error': error, 'random': random, 'ratio': mean.item() / random}


def coverage(measured):
    """Do the regions cover the translations? Shares (0 to 1) of aligned words whose difference lies in the L-inf ball.

    `within`: by eps, of all; `within_other`: of those that are not the identical token (None if there is none).
    `largest`, `random_largest`: medians of the largest coordinate of the difference. `deviation`: of the coordinates.
    """
    other = measured.identical == 0
    found = {'identical': 1 - other.double().mean().item(), 'within': {}, 'within_other': {}}
    for eps in EPS:
        inside = (measured.largest <= eps).double()
        found['within'][f'{eps:g}'] = inside.mean().item()
        found['within_other'][f'{eps:g}'] = inside[other].mean().item() if other.any() else None
    found['largest'] = measured.largest.quantile(0.5).item()
    found['random_largest'] = measured.random_largest.quantile(0.5).item()
    found['deviation'] = measured.deviation
    return found


def languages(args):
    """The languages to measure: those asked for, or all of the task but English."""
    if args.langs and 'en' in args.langs:
        raise InputError('langs: English is what the distances are from; name other languages')
    if not args.translations:
        prepare(args.data, args.task)
        return [lang for lang in languages_of(args.data, args.task, args.langs) if lang != 'en']
    there = [lang for lang in TASKS[args.task].languages if translation_of(args, lang).exists()]
    langs = args.langs or there
    if not langs:
        raise InputError(f'{args.translations}: no file test-LANG-en-translated.tsv in it; expected those of XTREME\'s '
                         f'translate-test for {args.task}')
    return langs


def translation_of(args, lang):
    """Where XTREME's translate-test file of a language is."""
    return Path(args.translations) / f'test-{lang}-en-translated.tsv'


def one_language(model, tokenizer, args, lang, longest, dtype):
    """Align and measure one language -> what distances.json says of it, and {file name: lines} of words and links."""
    if args.translations:
        rows = read_translations(translation_of(args, lang), args.task)
    else:
        rows = read_aligned(args.data, args.task, lang)
    pairs, repeated, left_out = parallel(*rows)
    pairs = pairs[:args.max_sentences]
    sides = []
    for name, sentences in zip((lang, 'en'), zip(*pairs)):
        sides.append(words_of(tokenizer, list(sentences), name, longest))
    words = list(zip(sides[0].words, sides[1].words)) if pairs else []
    links = align(words, desc=f'aligning {lang}')
    if not any(links):
        raise InputError(f'{lang}: no aligned words in {len(pairs)} sentence pairs; expected sentences and their translations')
    measured = measure(model, tokenizer, sides, links, layer=args.layer, dtype=dtype, seed=args.seed, desc=f'measuring {lang}')
    result = {'sentences': len(pairs), 'repeated': repeated, 'left_out': left_out, 'words': len(measured.distance),
              'unlinked': sum(not line for line in links), 'cut': sides[0].cut + sides[1].cut}
    files = {f'{lang}.src-tgt': [f'{" ".join(theirs)} ||| {" ".join(english)}' for theirs, english in words],
             f'{lang}.align': []}
    for line in links:
        files[f'{lang}.align'].append(' '.join(f'{j}-{i}' for j, i in line))
    return result | distance_of(measured) | {'coverage': coverage(measured)}, files


def distances(args, langs):
    """The distance of each language from English -> what distances.json says, and {file name: lines} of the others."""
    device, dtype = evaluate.choose_device(args.float32)
    name = args.model or evaluate.default_model(args.task, args.data)
    model, tokenizer = evaluate.load_encoder(name, args.task, layer=args.layer)
    model.to(device).eval()
    read = {'model': evaluate.fingerprint(model, tokenizer)}
    if not args.translations:
        read['test-en.tsv'] = digest(path_of(args.data, args.task, 'test', 'en'))
    found, files = {}, {}
    for lang in langs:
        path = translation_of(args, lang) if args.translations else path_of(args.data, args.task, 'test', lang)
        longest = evaluate.longest(model, tokenizer, LONGEST)
        found[lang], lines = one_language(model, tokenizer, args, lang, longest, dtype)
        files |= lines
        read[path.name] = digest(path)
    english = 'XTREME\'s translations' if args.translations else 'the row-aligned test file'
    return {'task': args.task, 'model': name, 'layer': args.layer, 'dtype': str(dtype), 'english': english,
            'max_sentences': args.max_sentences, 'seed': args.seed, 'files': read, 'languages': found}, files


# ---------------------------------------------------------------- what is printed and written

def caption(results):
    """What the tables are of, in a line."""
    first = f', the first {results["max_sentences"]:,} sentence pairs' if results['max_sentences'] else ''
    return (f'{results["task"]}, layer {results["layer"]} of {results["model"]} ({results["files"]["model"]}), '
            f'{results["dtype"]}; English: {results["english"]}{first}')
