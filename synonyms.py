"""Synonym sets for RS-A (section 3.2 of the paper): read them, build them, replace words by them.

    python synonyms.py FILE.json --show "The cat sat." --p 0.5      see what RS-A does to a sentence
    python synonyms.py VECTORS.txt -o FILE.json                     build a neighbour file from word vectors

A neighbour file is JSON, word -> list of words, nearest first (Alzantot et al. 2018): the 8 nearest
words within a squared Euclidean distance of 0.5 in counter-fitted GloVe vectors (Mrksic et al. 2016).
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path

from data import InputError, Pair, written

# A word with its inner apostrophes and hyphens; what surrounds it (blanks, punctuation) is never touched.
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
WHERE = ("the public one is counterfitted_neighbors.json, fetched by download_deps.sh of github.com/robinjia/certified-word-sub; "
         "or build one from the vectors of github.com/nmrksic/counter-fitting: python synonyms.py VECTORS.txt -o FILE.json")


def read_synonyms(path):
    """Read a neighbour file -> dict, word -> list of its synonyms (only words that have any).

    Raises InputError if there is no such file or it is not JSON of that form.
    """
    try:
        neighbours = json.loads(Path(path).read_text(encoding='utf-8'))
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}. RS-A needs a neighbour file: {WHERE}') from None
    except ValueError as error:
        raise InputError(f'{path}: not JSON ({error}); expected {{"word": ["neighbour", ...], ...}}') from None
    if not isinstance(neighbours, dict):
        raise InputError(f'{path}: a JSON {type(neighbours).__name__}; expected an object, word -> list of words')
    for word, synonyms in neighbours.items():
        if not isinstance(synonyms, list) or not all(isinstance(synonym, str) and synonym for synonym in synonyms):
            raise InputError(f'{path}: {word!r} has {str(synonyms)[:60]}; expected a list of words')
    neighbours = {word: synonyms for word, synonyms in neighbours.items() if synonyms}
    if not neighbours:
        raise InputError(f'{path}: no word in it has a neighbour; expected {{"word": ["neighbour", ...], ...}}')
    return neighbours


def replace(sentence, neighbours, p, rng):
    """x -> x': each word that has synonyms becomes one of them, uniformly, with probability p (3.2).

    p None: uniform over itself and its k synonyms, that is with probability k / (k + 1) (authors' code).
    Several words of a sentence may change (paper). Words are found whatever their case and the
    punctuation around them, and the synonym takes on the case (ours; the authors' code splits at
    blanks and compares exactly, which misses 14-15% of the words).
    """
    def substitute(match):
        """The word, or the synonym that the draw puts in its place."""
        word = match.group()
        synonyms = neighbours.get(word) or neighbours.get(word.lower())
        if not synonyms or rng.random() >= (len(synonyms) / (len(synonyms) + 1) if p is None else p):
            return word
        synonym = synonyms[int(rng.random() * len(synonyms))]
        if word.isupper() and len(word) > 1:
            return synonym.upper()
        return synonym[0].upper() + synonym[1:] if word[0].isupper() else synonym
    return WORD.sub(substitute, sentence)


def english_only(neighbours, pairs):
    """Only those neighbours that occur, in any case, in the English pairs (ours): the public file holds Spanish words too."""
    known = {word.lower() for pair in pairs for side in pair[:2] for word in WORD.findall(side)}
    kept = {word: [synonym for synonym in synonyms if synonym.lower() in known] for word, synonyms in neighbours.items()}
    return {word: synonyms for word, synonyms in kept.items() if synonyms}


def augment(pair, neighbours, p, seed, copy):
    """The `copy`-th augmented copy of a pair, both sentences perturbed (3.2; paper: m = 10 copies, p = 0.1).

    It depends on nothing but its arguments: the m copies of a training set need not be kept to be
    the same in every epoch.
    """
    rng = random.Random(f'{seed} {copy} {pair.premise} {pair.hypothesis}')
    return Pair(replace(pair.premise, neighbours, p, rng), replace(pair.hypothesis, neighbours, p, rng), pair.label)


def read_vectors(path):
    """Read word vectors in text form, a word and its floats a line -> list of words, float32 (words, dimensions)."""
    import numpy
    words, rows = [], []
    try:
        with open(path, encoding='utf-8') as lines:
            for number, line in enumerate(lines, 1):
                word, *numbers = line.split()
                if number == 1 and len(numbers) == 1:
                    continue        # word2vec's text form begins with the counts
                words.append(word)
                rows.append(numpy.array(numbers, dtype=numpy.float32))
                if len(rows[-1]) != len(rows[0]) or not len(rows[0]):
                    raise ValueError(f'{len(rows[-1])} numbers, {len(rows[0])} in the first line')
                if not numpy.isfinite(rows[-1]).all():
                    raise ValueError('a number that is not finite')
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}; expected word vectors in text form') from None
    except UnicodeDecodeError:
        raise InputError(f'{path}: not UTF-8; expected word vectors in text form') from None
    except ValueError as error:
        raise InputError(f'{path}:{number}: {error}; expected a word and its vector') from None
    if not words:
        raise InputError(f'{path}: empty; expected a word and its vector a line')
    return words, numpy.stack(rows)


def build(words, vectors, k=8, bound=0.5):
    """The k nearest words of each word within a squared Euclidean distance of `bound` -> dict, nearest first.

    `vectors`: float32 (words, dimensions). Defaults: Alzantot et al. (2018), whom the paper follows.
    """
    import torch
    from tqdm import tqdm
    vectors = torch.as_tensor(vectors)
    squared = vectors.square().sum(1)
    near = [[] for _ in words]
    for start in tqdm(range(0, len(words), 512), desc='nearest words', unit='block'):
        block = slice(start, start + 512)
        # |a - b|^2 = |a|^2 + |b|^2 - 2ab: a matrix product in place of a distance at a time, and each pair once.
        distances = torch.addmm(squared[block, None] + squared[start:], vectors[block], vectors[start:].T, alpha=-2)
        # Few words are within the bound, so finding those and sorting only them beats a top-k of every row.
        row, column = (distances <= bound).nonzero(as_tuple=True)
        for i, j, distance in zip(row.tolist(), column.tolist(), distances[row, column].tolist()):
            if i < j:
                near[start + i].append((distance, start + j))
                near[start + j].append((distance, start + i))
    return {word: [words[j] for _, j in sorted(found)[:k]] for word, found in zip(words, near)}


def main():
    """The command line: build a neighbour file, or look at what one does to a sentence."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], epilog='See the top of synonyms.py for the format.')
    parser.add_argument('file', help='word vectors in text form (with -o), or a neighbour file (with --show)')
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('-o', '--output', help='write the neighbour file here')
    what.add_argument('--show', metavar='SENTENCE', help='print augmented copies of this sentence')
    parser.add_argument('--k', type=int, default=8, help='neighbours of a word, at most (default: %(default)s)')
    parser.add_argument('--bound', type=float, default=0.5, help='squared Euclidean distance, at most (default: %(default)s)')
    parser.add_argument('--p', type=float, default=0.1, help='probability of a replacement (default: %(default)s)')
    parser.add_argument('--m', type=int, default=10, help='augmented copies (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=42)
    args = parser.parse_args()
    if args.show is not None:
        neighbours = read_synonyms(args.file)
        for word in WORD.findall(args.show):
            synonyms = neighbours.get(word) or neighbours.get(word.lower())
            print(f'{word}: {", ".join(synonyms) if synonyms else "-"}')
        for copy in range(args.m):
            print(f'{copy + 1:4}  {augment(Pair(args.show, "", None), neighbours, args.p, args.seed, copy).premise}')
        return
    words, vectors = read_vectors(args.file)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    neighbours = build(words, vectors, args.k, args.bound)
    with written(args.output) as part:
        part.write_text(json.dumps(neighbours, ensure_ascii=False), encoding='utf-8')
    print(f'{args.output}: {len(neighbours):,} words, {sum(map(bool, neighbours.values())):,} with neighbours', file=sys.stderr)


if __name__ == '__main__':
    main()
