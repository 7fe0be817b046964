"""Synonym sets for RS-A (section 3.2 of the paper): read them, replace words by them.

    python synonyms.py FILE.json --show "The cat sat." --p 0.5      see what RS-A does to a sentence

A neighbour file is JSON, word -> list of words, nearest first. The authors' (Alzantot et al. 2018) has the 8
nearest words within a squared Euclidean distance of 0.5 in counter-fitted GloVe vectors (Mrksic et al. 2016).
"""

import functools
import json
import random
import re
from collections.abc import Sequence

from data import NEIGHBOURS_URL, InputError, Pair, Parser, in_range, read_lines, run_script


# ---------------------------------------------------------------- read

def read_synonyms(path):
    """Read a neighbour file -> dict, word -> list of its synonyms (only words that have any).

    Raises InputError if there is no such file or it is not JSON of that form.
    """
    form = '{"word": ["neighbour", ...], ...}'
    lines = read_lines(path, f'the neighbour file of RS-A, {form}; the public one lies at {NEIGHBOURS_URL}')
    try:
        entries = json.loads('\n'.join(lines))
    except ValueError as error:
        raise InputError(f'{path}: not JSON ({error}); expected {form}') from None
    if not isinstance(entries, dict):
        raise InputError(f'{path}: a JSON {type(entries).__name__}; expected {form}')
    for word, synonyms in entries.items():
        if not isinstance(synonyms, list) or not all(isinstance(one, str) and one for one in synonyms):
            raise InputError(f'{path}: {word!r} has {str(synonyms)[:60]}; expected a list of words')
        if re.search('[\ud800-\udfff]', ''.join([word, *synonyms])):
            raise InputError(f'{path}: {word!r} or a neighbour of it has half a surrogate pair, which no '
                             'tokenizer takes; expected whole characters')
    return {word: synonyms for word, synonyms in entries.items() if synonyms}


# ---------------------------------------------------------------- replace

# A word is a run of letters and digits, joined by hyphens and apostrophes, whatever surrounds it. Clitics
# may be written apart or not: XNLI's training file has them apart (You won 't, do n't, I 've), its dev and
# test files have not, and both must offer the same words (ours). So a negated verb is one word, looked up
# without its blank, and 's 've 'll are no words, nor part of one.
LETTERS = r'[^\W_]+'
END = r"(?! [^\W_] | ['’] )"        # so that 't in 'tis and 's' in quotes are no clitics
CLITIC = rf"['’] (?: s | d | m | ll | re | ve ) {END}"
NEGATED = rf"{LETTERS} (?: [ ] n? )? ['’] t {END}"
JOINED = rf"{LETTERS} (?: (?: - | (?!{CLITIC}) ['’] ) {LETTERS} )*"
WORD = re.compile(f'{CLITIC} | ({NEGATED} | {JOINED})', re.VERBOSE | re.IGNORECASE)     # a clitic: no group 1


def find_words(sentence):
    """The words of a sentence that may be replaced -> list of str."""
    return [word.replace(' ', '') for word in WORD.findall(sentence) if word]


def synonyms_of(word, neighbours):
    """The synonyms of a word as it stands, or else of its lower case -> list, empty if it has none."""
    return neighbours.get(word) or neighbours.get(word.lower()) or []


def replace(sentence, neighbours, p, rng):
    """x -> x': each word that has synonyms becomes one of them, uniformly, with probability p (3.2).

    Several words of a sentence may change (paper). Words are found whatever their case and the punctuation
    around them, and the synonym takes on the case (ours).
    """
    def substitute(match):
        """The word, or the synonym that the draw puts in its place."""
        word = match[1]
        if not word:
            return match[0]     # a clitic
        synonyms = synonyms_of(word.replace(' ', ''), neighbours)
        if not synonyms or rng.random() >= p:
            return word
        synonym = synonyms[int(rng.random() * len(synonyms))]
        if word.isupper() and len(word) > 1:
            return synonym.upper()
        if word[0].isupper():
            return synonym[0].upper() + synonym[1:]
        return synonym
    return WORD.sub(substitute, sentence)


def replace_as_authors(sentence, neighbours, rng):
    """x -> x': each word becomes one of itself and its k synonyms, uniformly (authors' code).

    Words are what blanks separate, looked up in exact case: `Cat` and `cat.` have no synonyms.
    """
    words = []
    for word in sentence.split(' '):
        choices = [word, *neighbours.get(word, [])]
        words.append(rng.choice(choices))
    return ' '.join(words)


def english_only(neighbours, pairs):
    """Only the neighbours that occur, in any case, in the English pairs (ours), and words that have any left.

    The public file holds Spanish words too (cat: gato), which flatters a cross-lingual claim.
    """
    known = set()
    for pair in pairs:
        known.update(find_words(f'{pair.premise}\n{pair.hypothesis}'.lower()))
    kept = {}
    for word, synonyms in neighbours.items():
        synonyms = [synonym for synonym in synonyms if synonym.lower() in known]
        if synonyms:
            kept[word] = synonyms
    return kept


# ---------------------------------------------------------------- the m copies as a sequence

def augment(pair, perturb, seed, copy):
    """x', the `copy`-th augmented copy of a pair, both sentences perturbed (3.2).

    perturb: `replace` or `replace_as_authors`, all but sentence and rng bound. x' depends on nothing but the
    arguments: the m copies of a training set need not be kept to be the same in every epoch.
    """
    rng = random.Random(f'{seed} {copy} {pair.premise} {pair.hypothesis}')
    return Pair(perturb(pair.premise, rng=rng), perturb(pair.hypothesis, rng=rng), pair.label)


class Copies(Sequence):
    """The m augmented copies of the training pairs, made when asked for: row = copy * len(pairs) + pair.

    how: 'paper', each word with probability p (3.2; m = 10, p = 0.1), or 'authors', as their code. Raises
    InputError (with `name`, that of the neighbour file) if no word of the pairs has a synonym: RS-A would be
    plain training.
    """

    def __init__(self, pairs, neighbours, *, m=10, p=0.1, how='paper', seed=42, name='neighbours'):
        self.pairs, self.m, self.seed = pairs, m, seed
        ways = {'paper': functools.partial(replace, neighbours=neighbours, p=p),
                'authors': functools.partial(replace_as_authors, neighbours=neighbours)}
        self.perturb = ways[how]
        if not any(_has_synonym(pair, neighbours, how) for pair in pairs):
            raise InputError(f'{name}: no word of the training pairs has a synonym in it, or none that '
                             'english_only keeps: RS-A would be plain training; expected English words')

    def __len__(self):
        return self.m * len(self.pairs)

    def __getitem__(self, row):
        copy, number = divmod(range(len(self))[row], len(self.pairs))
        return augment(self.pairs[number], self.perturb, self.seed, copy)


def _has_synonym(pair, neighbours, how):
    """Whether any word of a pair can be replaced: looked up as that way of replacing does it."""
    text = f'{pair.premise} {pair.hypothesis}'
    if how == 'authors':
        return any(map(neighbours.get, text.split(' ')))
    return any(synonyms_of(word, neighbours) for word in find_words(text))


# ---------------------------------------------------------------- show, command line

def main(words=None):
    """Print the synonyms of each word of a sentence, and augmented copies. `words`: a command line."""
    parser = Parser(description=__doc__)
    parser.add_argument('file', help='neighbour file')
    parser.add_argument('--show', metavar='SENTENCE', required=True, help='the sentence')
    parser.add_argument('--p', type=in_range(float, 0, 1), default=0.1,
                        help='probability that a word is replaced (default: %(default)s)')
    args = parser.parse_args(words)
    neighbours, pair = read_synonyms(args.file), Pair(args.show, '', None)
    for word in find_words(args.show):
        print(f'{word}: {", ".join(synonyms_of(word, neighbours)) or "-"}')
    perturb = functools.partial(replace, neighbours=neighbours, p=args.p)
    for copy in range(10):
        print(f'{copy + 1:4}  {augment(pair, perturb, 42, copy).premise}')


if __name__ == '__main__':
    run_script(main)
