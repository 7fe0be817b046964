"""PAWS-X and XNLI in XTREME's files, and a small made-up world that needs no download.

    python data.py pawsx                    fetch what is missing into download/pawsx, and count what is there
    python data.py xnli XNLI-1.0.zip ...    the same from archives fetched by hand
    python data.py sample                   write the sample world

XTREME's layout (Hu et al. 2020): DATA/{pawsx,xnli}/{train,dev,test}-{lang}.tsv, UTF-8, no header,
premise TAB hypothesis TAB label. XTREME's script strips the test labels; what is fetched here keeps them.
The neighbour file of RS-A lies beside them, DATA/synonyms/counterfitted_neighbors.json.
"""

import argparse
import contextlib
import csv
import hashlib
import itertools
import json
import os
import random
import re
import socket
import sys
import tarfile
import tempfile
import zipfile
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from torch.hub import download_url_to_file
from tqdm import tqdm
from transformers import BertConfig, BertModel, BertTokenizer, logging


# ---------------------------------------------------------------- what every script needs

# Which of the processes of one run this is, and how many there are: as torchrun says, in full or not at all.
RANK, WORLD = 0, 1
if {'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'} <= os.environ.keys():
    RANK, WORLD = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])


class InputError(Exception):
    """Something in the user's hands is wrong. The message is one line: what is there, what was expected."""


class Parser(argparse.ArgumentParser):
    """An argparse that suits notebooks too: a wrong command line is an InputError, it does not exit."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        """What argparse calls."""
        raise InputError(f'{message}; --help lists all')


def run_script(main):
    """Run a script's main. What is the user's to mend ends in one line on stderr, without a traceback."""
    try:
        with enough_memory('use a machine with more'):
            main()
    except InputError as error:
        sys.exit(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(f'{error.filename}: {error.strerror}')
    except KeyboardInterrupt:
        print('stopped', file=sys.stderr)
        sys.exit(130)


def in_range(kind, low, high=None):
    """An argparse type: an int or a finite float, low <= value, and value <= high if that is given."""
    def parse(text):
        """The value, or the ValueError or ArgumentTypeError that argparse turns into its one line."""
        value = kind(text)
        if low <= value <= (high or sys.float_info.max):
            return value
        limit = f'to {high}' if high else 'or above'
        raise argparse.ArgumentTypeError(f'{text}: expected {low} {limit}')
    parse.__name__ = kind.__name__      # argparse names it where kind(text) fails
    return parse


def progress(iterable, **options):
    """A tqdm on stderr, gone at its end; in a file it says every 30 seconds where it stands, no more.

    options: those of tqdm (desc, unit, total, initial).
    """
    if not sys.stderr.isatty():
        # miniters: the clock is looked at each time; else tqdm guesses how many make up the 30 seconds.
        options |= {'delay': 30, 'mininterval': 30, 'miniters': 1, 'ncols': 0}
    # Of torchrun's processes the first one speaks.
    return tqdm(iterable, leave=False, dynamic_ncols=True, disable=RANK > 0, **options)


def digest(path):
    """The first 16 hex digits of a file's SHA-256: they tell whether two runs read the same."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


@contextlib.contextmanager
def replacing(path):
    """Write beside, then rename: yields the path to write to. The file is whole or as it was.

    A link stays, and its target is replaced; a device or a pipe is written to. An OSError (read-only folder,
    full disk) passes through and names `path`.
    """
    part = target = Path(path)
    if target.is_file() or not target.exists():
        target = target.resolve()
        # A name of its own, as another process may write the same file.
        part = target.with_name(f'{target.name}.part{os.urandom(4).hex()}')
    try:
        yield part
        if part != target:
            os.replace(part, target)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        if part != target:
            part.unlink(missing_ok=True)


def write_json(path, content):
    """Write one line of JSON, whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(content) + '\n')


@contextlib.contextmanager
def enough_memory(advice):
    """Within it, memory that does not suffice, on CPU or GPU, is an InputError with this advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # Not any error that speaks of memory: an illegal memory access is a fault of the program.
        if not re.search('MemoryError|(out of|not enough|allocate) memory|ALLOC_FAILED', repr(error)):
            raise
        what = str(error) or 'MemoryError'
        raise InputError(f'out of memory ({what.splitlines()[0]}); {advice}') from None


# ---------------------------------------------------------------- tasks

class Pair(NamedTuple):
    """One row: two sentences and the index of the gold label (None where the file has no labels)."""
    premise: str
    hypothesis: str
    label: int | None


class Task(NamedTuple):
    """What is fixed about a task: languages in the order of the paper's tables, labels in id order."""
    languages: tuple
    labels: tuple


TASKS = {
    'pawsx': Task(('en', 'de', 'es', 'fr', 'ja', 'ko', 'zh'), ('0', '1')),
    'xnli': Task(('en', 'ar', 'bg', 'de', 'el', 'es', 'fr', 'hi', 'ru', 'sw', 'th', 'tr', 'ur', 'vi', 'zh'),
                 ('contradiction', 'entailment', 'neutral')),
    'sample': Task(('en', 'x1', 'x2', 'x3', 'x4', 'x5', 'x6'), ('different', 'paraphrase')),
}


def path_of(data, task, split, lang):
    """DATA/pawsx/test-de.tsv and the like. Raises InputError if DATA is DATA/TASK: one level too deep."""
    if (Path(data) / 'train-en.tsv').exists():
        raise InputError(f'{data}: holds train-en.tsv itself; expected the folder above it, with a {task}/')
    return Path(data) / task / f'{split}-{lang}.tsv'


def languages_of(task, langs=None):
    """The languages to score -> list of codes: the paper's order first, own languages after it as given.

    langs None: the task's own. Else any codes for which DATA/TASK holds test-CODE.tsv.
    """
    languages = TASKS[task].languages
    langs = langs or languages
    return [lang for lang in dict.fromkeys([*languages, *langs]) if lang in langs]


# ---------------------------------------------------------------- reading

def read_lines(path, expected):
    """The lines of a file that holds words -> list of str. The one rule for all of them.

    UTF-8 with or without BOM, LF or CRLF, blank lines at the end dropped. A line ends at '\\n' alone:
    what Unicode takes for an end of line (U+2028, U+0085) stays in the text.
    Raises InputError (file, line, what was `expected`).
    """
    try:
        text = Path(path).read_bytes().decode('utf-8-sig')
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}; expected {expected}') from None
    except UnicodeDecodeError as error:
        number = error.object.count(b'\n', 0, error.start) + 1
        raise InputError(f'{path}:{number}: not UTF-8; expected {expected}') from None
    text = text.rstrip('\r\n')
    if not text:
        raise InputError(f'{path}: empty; expected {expected}')
    return text.replace('\r\n', '\n').split('\n')


def read_pairs(path, task):
    """Read one XTREME file -> list of Pair. Raises InputError (file, line, what was expected).

    Labels may be missing from the whole file (XTREME's test files), never from a part of it.
    """
    labels = TASKS[task].labels
    ids = {name: number for number, name in enumerate(labels)}
    ids[None] = None        # where the file has no labels
    if task == 'xnli':
        ids['contradictory'] = ids['contradiction']     # as XNLI's machine-translated files spell it
    expected = ('premise TAB hypothesis TAB label, a pair a line, no header; '
                f'`python data.py {task}` fetches such files or makes them from the raw release')
    lines = read_lines(path, expected)
    if lines[0].lower().startswith(('sentence1\t', 'premise\t')):
        raise InputError(f'{path}:1: a header; expected {expected}')
    columns = lines[0].count('\t') + 1
    pairs = []
    for number, line in enumerate(lines, 1):
        cells = line.split('\t')
        if len(cells) not in (2, 3) or len(cells) != columns:
            raise InputError(f'{path}:{number}: {len(cells)} columns, {columns} in line 1; expected '
                             f'{expected}')
        premise, hypothesis, label = [*cells, None][:3]
        if label not in ids:
            raise InputError(f'{path}:{number}: label {label!r}; expected one of {", ".join(labels)}')
        pairs.append(Pair(_unquote(premise), _unquote(hypothesis), ids[label]))
    return pairs


def _unquote(cell):
    """Undo csv.writer, cell by cell: it wraps a cell in quotes only if it doubles quotes inside.

    A CSV reader would do it too, but a raw file is not CSV: one lone quote and it swallows lines.
    """
    wrapped = re.fullmatch('"((?:[^"]|"")*)"', cell)
    if wrapped and '"' in wrapped[1]:
        return wrapped[1].replace('""', '"')
    return cell


def write_pairs(path, rows):
    """Write rows (premise, hypothesis[, label]) as XTREME does (csv.writer).

    `read_pairs` is the inverse, but for a CR inside a cell.
    """
    with open(path, 'w', encoding='utf-8', newline='') as file:
        csv.writer(file, delimiter='\t').writerows(rows)


# ---------------------------------------------------------------- the public releases

class Release(NamedTuple):
    """An archive of the public release. Its files have a header, and other columns than XTREME's."""
    task: str
    url: str
    rows: dict          # split -> rows of a language
    files: dict         # split -> its file in the archive, {} for the language
    begins: str         # what a line of a language begins with, where a file holds all of them
    columns: tuple      # those of premise, hypothesis and label


RELEASES = {
    'x-final.tar.gz': Release(
        'pawsx', 'https://storage.googleapis.com/paws/pawsx/x-final.tar.gz',
        {'train': 49401, 'dev': 2000, 'test': 2000},
        {'train': 'x-final/{}/train.tsv', 'dev': 'x-final/{}/dev_2k.tsv', 'test': 'x-final/{}/test_2k.tsv'},
        '', (1, 2, 3)),
    'XNLI-1.0.zip': Release(
        'xnli', 'https://dl.fbaipublicfiles.com/XNLI/XNLI-1.0.zip', {'dev': 2490, 'test': 5010},
        {'dev': 'XNLI-1.0/xnli.dev.tsv', 'test': 'XNLI-1.0/xnli.test.tsv'}, '{}\t', (6, 7, 1)),
    'XNLI-MT-1.0.zip': Release(
        'xnli', 'https://dl.fbaipublicfiles.com/XNLI/XNLI-MT-1.0.zip', {'train': 392702},
        {'train': 'XNLI-MT-1.0/multinli/multinli.train.{}.tsv'}, '', (0, 1, 2)),
}
NEIGHBOURS = 'synonyms/counterfitted_neighbors.json'        # under DATA
NEIGHBOURS_URL = 'https://raw.githubusercontent.com/uclanlp/Robust-XLT/master/counterfitted_neighbors.json'
NEIGHBOURS_SHA256 = '103247143f39bd5dd66850f3a912393392641dbd98093c61e2b24a4cc8a96fb0'


def prepare(data, task, archives=(), complete=False, langs=None):
    """Make sure that the files which a run reads lie under DATA: train-en, dev-en and the tests of `langs`.

    langs None: the task's languages. Files are fetched only where the task's folder holds no .tsv at all: one
    that does is the user's own, and what is missing in it is an InputError. `complete` fills it all the same,
    with the other dev files too, and with labels where the test files have none; nothing else is overwritten.
    Of several processes one prepares, the others wait. If all is there, nothing is written, not even a lock.
    """
    folder = path_of(data, task, 'train', 'en').parent
    if not _missing(folder, complete, langs):
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / '.lock'
    with FileLock(lock):
        try:
            if complete or not any(folder.glob('*.tsv')):   # another process may have prepared it meanwhile
                with tempfile.TemporaryDirectory(dir=folder) as part:
                    _fill(folder, Path(part), archives)
        finally:
            lock.unlink()       # those who wait notice, and lock a new one
    missing = _missing(folder, complete, langs)
    if missing:
        absent = f'{folder / missing[0]}: no such file, and nothing is fetched where others are'
        raise InputError(f'{absent}; name the languages there (langs) or complete it: '
                         f'`python data.py {task} --data {data}`')


def _missing(folder, complete, langs=None):
    """The names of a run's files that are not there. `complete`: the task's, also tests without labels."""
    task = folder.name
    languages = TASKS[task].languages
    names = ['model', 'synonyms.json'] if task == 'sample' else []
    names += [f'dev-{lang}.tsv' for lang in (languages if complete else ['en'])]
    names += [f'test-{lang}.tsv' for lang in langs or languages]
    missing = []
    for name in [*names, 'train-en.tsv']:
        path = folder / name
        stripped = complete and name.startswith('test-') and path.exists()
        if not path.exists() or stripped and read_pairs(path, task)[0].label is None:
            missing.append(name)
    return missing


def _fill(folder, part, archives):
    """Write what a task's folder lacks into the empty folder `part`; move it in once all of it is whole."""
    missing, task = _missing(folder, True), folder.name         # of a run too: it comes in the same archives
    given = {Path(path).name: Path(path) for path in archives}
    if task == 'sample':
        write_sample(part)
    for name, release in RELEASES.items():
        wanted = [file for file in missing if file.split('-')[0] in release.rows]
        if release.task != task or not wanted:
            continue
        archive = given.get(name, part / name)
        if name not in given:
            command = f'`python data.py {task} --data {folder.parent} {name}`'
            _download(release.url, archive, f'give it to {command}; `--task sample` works without a network')
        for file in wanted:
            _convert(archive, release, part / file)
    for name in missing:
        os.replace(part / name, folder / name)


def _convert(archive, release, path):
    """Write one file of an archive in XTREME's layout, cells stripped as XTREME's script does; check it."""
    split, lang = path.stem.split('-')
    name, rows = release.files[split].format(lang), []
    try:        # read and never extracted: no path in an archive can escape
        if archive.suffix == '.zip':
            content = zipfile.ZipFile(archive).read(name)
        else:
            content = tarfile.open(archive, 'r:gz').extractfile(name).read()
        for line in content.decode().split('\n')[1:]:
            if line.strip() and line.startswith(release.begins.format(lang)):
                cells = line.split('\t')
                rows.append([cells[column].strip() for column in release.columns])
    except Exception as error:      # a broken archive raises any of a dozen
        raise InputError(f'{archive}: not the archive of {release.url} ({error}); fetch it again') from None
    expected = release.rows[split]
    if len(rows) != expected:
        raise InputError(f'{archive}: {len(rows)} rows for {path.name}, expected {expected}; fetch it again')
    write_pairs(path, rows)
    read_pairs(path, release.task)


def fetch_neighbours(path):
    """Fetch the public neighbour file (authors' code) to `path`, unless it is there. Raises InputError."""
    path = Path(path)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _download(NEIGHBOURS_URL, path, f'keep it as {path}', NEIGHBOURS_SHA256)


def _download(url, path, by_hand, sha256=None):
    """Fetch url into path, whole or not at all, with a progress bar on a terminal. Raises InputError."""
    socket.setdefaulttimeout(30)
    try:
        download_url_to_file(url, path, hash_prefix=sha256, progress=sys.stderr.isatty())
    except (OSError, HTTPException, RuntimeError) as error:     # RuntimeError: another SHA-256
        raise InputError(f'{url}: cannot be fetched ({error}). Fetch it by hand and {by_hand}') from None
    finally:
        socket.setdefaulttimeout(None)


# ---------------------------------------------------------------- the sample world

SAMPLE_CONCEPTS, SAMPLE_SYNONYMS, SAMPLE_WORDS = 30, 3, 3       # in all, of a concept, of a sentence
SAMPLE_ROWS = {'train': 40000, 'dev': 1000, 'test': 2000}
SAMPLE_ENDINGS = {'en': 'n', 'x1': 'd', 'x2': 'r', 'x3': 's', 'x4': 't', 'x5': 'l', 'x6': 'k'}      # of words
SAMPLE_SCALE, SAMPLE_SPREAD = 0.25, 0.05    # of concepts around 0, of synonyms around them, per coordinate
SAMPLE_SPECIAL = ('[PAD]', '[UNK]', '[CLS]', '[SEP]')
SAMPLE_HIDDEN = 64
SAMPLE_CONFIG = {
    'hidden_size': SAMPLE_HIDDEN, 'intermediate_size': 256, 'num_hidden_layers': 2, 'num_attention_heads': 4,
    'max_position_embeddings': 64, 'pad_token_id': 0, 'initializer_range': 0.07,
    'hidden_dropout_prob': 0.0, 'attention_probs_dropout_prob': 0.0,        # so that delta is the only noise
}


def write_sample(folder, seed=0):
    """Write the sample's files: a world in which Eq. 1 and Figure 1 of the paper are literally true.

    A concept is a random point; its synonyms lie close around it; language xk's word for an English word
    is that word's point plus a random shift of length 0.05 k sqrt(64). A pair is a paraphrase (synonyms
    exchanged) or different (one concept exchanged too). Written as ordinary files: XTREME's TSVs, a neighbour
    file, and a BertModel checkpoint (2 layers, hidden 64) whose word embeddings are these points, whose other
    weights are random, and which has no dropout.
    """
    rng = random.Random(seed)
    concepts = _sample_concepts(rng)
    neighbours = {}
    for concept in concepts:
        for word in concept:
            neighbours[word] = [other for other in concept if other != word]
    (folder / 'synonyms.json').write_text(json.dumps(neighbours, indent=1))
    for split, count in SAMPLE_ROWS.items():
        pairs = [_sample_pair(concepts, rng) for _ in range(count)]
        languages = ['en'] if split == 'train' else SAMPLE_ENDINGS
        for lang in languages:          # row-aligned, as XTREME's tests are
            rows = [(_translate(premise, lang), _translate(hypothesis, lang), label)
                    for premise, hypothesis, label in pairs]
            write_pairs(folder / f'{split}-{lang}.tsv', rows)
    _write_sample_encoder(folder / 'model', list(neighbours), seed)


def _sample_concepts(rng):
    """Each concept as the list of its English words, all of them ending in -n."""
    consonants, vowels = 'bdfgklmnprstvz', 'aeiou'
    possible = [''.join(word) for word in itertools.product(consonants, vowels, consonants, vowels, 'n')]
    words = rng.sample(possible, SAMPLE_CONCEPTS * SAMPLE_SYNONYMS)
    return [words[start:start + SAMPLE_SYNONYMS] for start in range(0, len(words), SAMPLE_SYNONYMS)]


def _sample_pair(concepts, rng):
    """Two English sentences, and the label's name."""
    first = rng.sample(concepts, SAMPLE_WORDS)
    second, label = list(first), rng.choice(TASKS['sample'].labels)
    if label == 'different':
        other = rng.choice([concept for concept in concepts if concept not in first])
        second[rng.randrange(SAMPLE_WORDS)] = other
    premise = ' '.join([rng.choice(concept) for concept in first])
    hypothesis = ' '.join([rng.choice(concept) for concept in second])
    return premise, hypothesis, label


def _translate(text, lang):
    """The sample world's dictionary: a language has an ending of its own in place of English's -n."""
    return re.sub(r'n\b', SAMPLE_ENDINGS[lang], text)


def _sample_points(seed):
    """The word embeddings (words, hidden): special tokens, English words, then the words of each language."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(SAMPLE_CONCEPTS, 1, SAMPLE_HIDDEN, generator=generator)
    around = torch.randn(SAMPLE_CONCEPTS, SAMPLE_SYNONYMS, SAMPLE_HIDDEN, generator=generator)
    english = (centres * SAMPLE_SCALE + around * SAMPLE_SPREAD).flatten(0, 1)
    special = torch.randn(len(SAMPLE_SPECIAL), SAMPLE_HIDDEN, generator=generator) * SAMPLE_SCALE
    points = [special, english]
    for k in range(1, len(SAMPLE_ENDINGS)):
        direction = torch.nn.functional.normalize(torch.randn(english.shape, generator=generator))
        points.append(english + 0.05 * k * SAMPLE_HIDDEN ** 0.5 * direction)
    return torch.cat(points)


def _write_sample_encoder(folder, words, seed):
    """A tiny BertModel checkpoint with a word-level tokenizer, as `from_pretrained` reads them."""
    vocabulary = list(SAMPLE_SPECIAL)
    for lang in SAMPLE_ENDINGS:
        vocabulary += [_translate(word, lang) for word in words]
    ids = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = BertTokenizer(vocab=ids, do_lower_case=False, mask_token=None, model_max_length=64,
                              model_input_names=['input_ids', 'attention_mask'])
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(BertConfig(vocab_size=len(ids), **SAMPLE_CONFIG))
    model.get_input_embeddings().weight.data.copy_(_sample_points(seed))
    logging.disable_progress_bar()
    model.save_pretrained(folder)


# ---------------------------------------------------------------- command line

def main(words=None):
    """Fetch or write a task's files, then say what is there. `words`: a command line, for notebooks."""
    parser = Parser(description=__doc__)
    parser.add_argument('task', choices=TASKS, help='the task whose files to fetch or write')
    parser.add_argument('archives', nargs='*', help='archives of the raw public release, fetched by hand')
    parser.add_argument('--data', default='download', help="folder in XTREME's layout (default: %(default)s)")
    args = parser.parse_args(words)
    prepare(args.data, args.task, args.archives, complete=True)
    for path in sorted((Path(args.data) / args.task).glob('*.tsv')):
        print(f'{path}: {len(read_pairs(path, args.task)):,} pairs')
    if args.task != 'sample':
        fetch_neighbours(Path(args.data) / NEIGHBOURS)


if __name__ == '__main__':
    run_script(main)
