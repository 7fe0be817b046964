"""PAWS-X and XNLI in XTREME's files, and a small made-up world that needs no download.

    python data.py pawsx                        fetch what is missing into download/pawsx, and count what is there
    python data.py xnli XNLI-1.0.zip ...        the same from archives fetched by hand
    python data.py sample                       write the sample world

XTREME's layout (Hu et al. 2020): DATA/{pawsx,xnli}/{train,dev,test}-{lang}.tsv, UTF-8, no header,
premise TAB hypothesis TAB label. XTREME's script strips the test labels; what is fetched here keeps them.
"""

import argparse
import contextlib
import csv
import hashlib
import http.client
import io
import json
import math
import os
import random
import shutil
import socket
import sys
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple


class InputError(SystemExit):
    """Something in the user's hands is wrong: one line on stderr, exit status 1, no traceback."""


class Pair(NamedTuple):
    """One row: two sentences and the index of the gold label (None where the file has no labels)."""
    premise: str
    hypothesis: str
    label: int | None


class Task(NamedTuple):
    """What is fixed about a task: its languages in the order of the paper's tables, and its labels in id order."""
    languages: tuple
    labels: tuple
    archives: dict = {}      # file name of the public release -> (where it lies, the splits it holds)
    rows: dict = {}          # split -> rows a whole release has, per language


TASKS = {
    'pawsx': Task(('en', 'de', 'es', 'fr', 'ja', 'ko', 'zh'), ('0', '1'),
                  {'x-final.tar.gz': ('https://storage.googleapis.com/paws/pawsx/x-final.tar.gz', {'train', 'dev', 'test'})},
                  {'train': 49401, 'dev': 2000, 'test': 2000}),
    'xnli': Task(('en', 'ar', 'bg', 'de', 'el', 'es', 'fr', 'hi', 'ru', 'sw', 'th', 'tr', 'ur', 'vi', 'zh'),
                 ('contradiction', 'entailment', 'neutral'),
                 {'XNLI-1.0.zip': ('https://dl.fbaipublicfiles.com/XNLI/XNLI-1.0.zip', {'dev', 'test'}),
                  'XNLI-MT-1.0.zip': ('https://dl.fbaipublicfiles.com/XNLI/XNLI-MT-1.0.zip', {'train'})},
                 {'train': 392702, 'dev': 2490, 'test': 5010}),
    'sample': Task(('en', 'x1', 'x2', 'x3', 'x4', 'x5', 'x6'), ('different', 'paraphrase')),
}


def number(kind, low, below=math.inf):
    """An argparse type: an int or a float, low <= value < below."""
    def parse(text):
        """The value, or the ValueError or ArgumentTypeError that argparse turns into its one line."""
        value = kind(text)
        if not low <= value < below:
            raise argparse.ArgumentTypeError(f'{text}: expected {low} or above' + f' and below {below:g}' * (below < math.inf))
        return value
    parse.__name__ = kind.__name__      # argparse names it where kind(text) fails
    return parse


@contextlib.contextmanager
def written(path):
    """Write beside, then rename: yields the path to write to. The file is whole or as it was, whatever happens."""
    part = Path(path).with_name(f'{Path(path).stem}.part{Path(path).suffix}')
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------- reading

def path_of(data, task, split, lang):
    """DATA/pawsx/test-de.tsv and the like."""
    return Path(data) / task / f'{split}-{lang}.tsv'


def read_pairs(path, task):
    """Read one XTREME file -> list of Pair. Raises InputError (file, line, what was expected).

    Labels may be missing from the whole file (XTREME's test files), never from a part of it.
    """
    labels = TASKS[task].labels
    try:
        content = Path(path).read_bytes().removeprefix(b'\xef\xbb\xbf').rstrip(b'\r\n')
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}. `python data.py {task}` fetches the task\'s files') from None
    if not content:
        raise InputError(f'{path}: empty; expected premise TAB hypothesis TAB label, a pair a line')
    ids = {name: i for i, name in enumerate(labels)} | ({'contradictory': 0} if task == 'xnli' else {})     # as XNLI's MT files spell it
    pairs, columns = [], None
    for number, line in enumerate(content.split(b'\n'), 1):
        try:
            cells = line.decode('utf-8').rstrip('\r').split('\t')
        except UnicodeDecodeError as error:
            raise InputError(f'{path}:{number}: byte {error.start + 1} of the line is not UTF-8') from None
        if number == 1 and {'sentence1', 'gold_label', 'premise', 'hypo'} & {cell.lower() for cell in cells}:
            raise InputError(f'{path}:1: a file of the raw release (it has a header), not one of XTREME\'s; '
                             f'`python data.py {task} ARCHIVE` converts the archive that it came in')
        columns = columns or len(cells)
        if len(cells) != columns or columns not in (2, 3):
            expected = '2 or 3' if number == 1 else f'{columns}, as in line 1'
            raise InputError(f'{path}:{number}: {len(cells)} columns; expected {expected} (premise, hypothesis, label)')
        if columns == 3 and cells[2] not in ids:
            raise InputError(f'{path}:{number}: label {cells[2]!r}; expected one of {", ".join(labels)}')
        pairs.append(Pair(_unquote(cells[0]), _unquote(cells[1]), ids[cells[2]] if columns == 3 else None))
    return pairs


def _unquote(cell):
    """Undo csv.writer, cell by cell: it wraps a cell in quotes only if it doubles quotes inside.

    A CSV reader would do it too, but a raw file is not CSV: one lone quote and it swallows lines.
    """
    inner = cell[1:-1]
    wrapped = len(cell) > 2 and cell[0] == cell[-1] == '"' and '"' in inner
    return inner.replace('""', '"') if wrapped and '"' not in inner.replace('""', '') else cell


def describe(path, pairs):
    """One line about a file: rows, missing labels, PAWS-X's placeholders NS ('no sentence'), which XTREME keeps."""
    placeholders = sum('NS' in (pair.premise, pair.hypothesis) for pair in pairs)
    return (f'{path}: {len(pairs):,} pairs' + '; no labels: cannot be scored' * (pairs[0].label is None)
            + f'; {placeholders} rows with a placeholder NS, kept' * (placeholders > 0))


def digests(data, task):
    """The files that a run reads, name -> the first 16 digits of its SHA-256: they tell whether two runs saw the same data."""
    paths = [path_of(data, task, split, lang) for split, lang in [('train', 'en'), ('dev', 'en'), *(('test', l) for l in TASKS[task].languages)]]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths if path.exists()}


# ---------------------------------------------------------------- fetching

def prepare(data, task, archives=(), complete=False):
    """Make sure that the task's files are under DATA; fetch, check and write those that are not.

    Training needs train-en, dev-en and every test file. `complete` asks for the other dev files and
    for test labels too: test files without labels are then fetched anew. Nothing else is overwritten.
    """
    if task == 'sample':
        return path_of(data, task, 'train', 'en').exists() or write_sample(data)
    wanted = []
    for split, lang in [('train', 'en')] + [(s, l) for s in ('dev', 'test') for l in TASKS[task].languages]:
        path = path_of(data, task, split, lang)
        if (complete or split != 'dev' or lang == 'en') and (not path.exists() or complete and read_pairs(path, task)[0].label is None):
            wanted.append((split, lang))
    if wanted:
        print(f'{Path(data) / task}: {len(wanted)} files to fetch, {"-".join(wanted[0])} first', file=sys.stderr)
        _convert(data, task, wanted, archives)


def _convert(data, task, wanted, archives):
    """Read the wanted (split, lang) from the raw archives, check them, and write them in XTREME's layout."""
    by_name = {Path(archive).name: archive for archive in archives}
    for name in by_name.keys() - TASKS[task].archives.keys():
        raise InputError(f'{by_name[name]}: not an archive of {task}; expected {" or ".join(TASKS[task].archives)}')
    folder = Path(data) / task
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as part:
        for name, (url, splits) in TASKS[task].archives.items():
            rows = {(split, lang): [] for split, lang in wanted if split in splits}
            if not rows:
                continue
            archive = by_name.get(name) or _download(url, Path(part) / name, task, data)
            try:
                _read_archive(archive, task, rows)
            except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, LookupError, ValueError) as error:
                raise InputError(f'{archive}: not the whole archive that {url} holds ({error}); fetch it again') from None
            for (split, lang), pairs in rows.items():
                if len(pairs) != TASKS[task].rows[split]:
                    raise InputError(f'{archive}: {len(pairs)} rows for {split}-{lang}, expected {TASKS[task].rows[split]}; fetch it again')
                write_pairs(Path(part) / f'{split}-{lang}.tsv', pairs)
                read_pairs(Path(part) / f'{split}-{lang}.tsv', task)
        for split, lang in wanted:      # only once every file is there and was read back
            os.replace(Path(part) / f'{split}-{lang}.tsv', folder / f'{split}-{lang}.tsv')


def _download(url, path, task, data):
    """Fetch url into path with a progress bar. Raises InputError if it cannot be had."""
    import torch.hub
    socket.setdefaulttimeout(30)
    try:
        torch.hub.download_url_to_file(url, path)
    except (OSError, http.client.HTTPException) as error:
        raise InputError(f'{url}: {getattr(error, "reason", error)}. Fetch it by hand and give it to '
                         f'`python data.py {task} --data {data} {" ".join(TASKS[task].archives)}`; '
                         '`python train.py --task sample --method rs_r` works without a network') from None
    return path


def _read_archive(archive, task, rows):
    """Append to rows[split, lang] the [premise, hypothesis, label] of a public release. Each file of it has a header.

    x-final.tar.gz: x-final/LANG/{train,dev_2k,test_2k}.tsv: id, sentence1, sentence2, label.
    XNLI-1.0.zip: XNLI-1.0/xnli.{dev,test}.tsv: language in column 1, gold label in 2, sentences in 7 and 8.
    XNLI-MT-1.0.zip: XNLI-MT-1.0/multinli/multinli.train.en.tsv: premise, hypothesis, label.
    """
    files = {f'x-final/{lang}/{split}{"" if split == "train" else "_2k"}.tsv': (split, lang, (1, 2, 3)) for split, lang in rows}
    if task == 'xnli':
        files = {'XNLI-1.0/xnli.dev.tsv': ('dev', None, (6, 7, 1)), 'XNLI-1.0/xnli.test.tsv': ('test', None, (6, 7, 1)),
                 'XNLI-MT-1.0/multinli/multinli.train.en.tsv': ('train', 'en', (0, 1, 2))}
    with tarfile.open(archive, 'r:gz') if task == 'pawsx' else zipfile.ZipFile(archive) as source:
        # Read one by one and never extracted: no path in an archive can escape.
        members, content = (source, source.extractfile) if task == 'pawsx' else (source.infolist(), source.open)
        for member in members:
            split, lang, columns = files.get(member.name if task == 'pawsx' else member.filename, (None, None, None))
            for line in (content(member) or io.BytesIO()).read().decode('utf-8').split('\n')[1:] if split else ():
                cells = line.rstrip('\r').split('\t')
                if (split, lang or cells[0]) in rows and line.strip():
                    rows[split, lang or cells[0]].append([cells[column] for column in columns])


def write_pairs(path, rows):
    """Write (premise, hypothesis[, label]) rows as XTREME does, with csv.writer; `read_pairs` is its inverse."""
    with open(path, 'w', encoding='utf-8', newline='') as file:
        csv.writer(file, delimiter='\t').writerows([cell.strip() for cell in row] for row in rows)


# ---------------------------------------------------------------- the sample world

SAMPLE_HIDDEN, SAMPLE_CONCEPTS, SAMPLE_SYNONYMS, SAMPLE_WORDS = 64, 30, 3, 3
SAMPLE_ROWS = {'train': 40000, 'dev': 1000, 'test': 2000}
SAMPLE_SCALE, SAMPLE_SPREAD = 0.25, 0.05                        # of concepts around 0, of synonyms around them, per coordinate
SAMPLE_SHIFTS = {f'x{k}': 0.05 * k for k in range(1, 7)}        # of a language's words, root mean square per coordinate


def write_sample(data, seed=0):
    """Write DATA/sample: a world in which Eq. 1 and Figure 1 of the paper are literally true.

    A concept is a random point; its synonyms lie close around it; language xk's word for an English word
    is that word's point plus a random shift of length 0.05 k sqrt(64). A pair is a paraphrase (synonyms
    exchanged) or different (one concept exchanged too). Written as ordinary files: XTREME's TSVs, a neighbour
    file, and a BertModel checkpoint (2 layers, hidden 64) whose word embeddings are these points, whose other
    weights are random, and which has no dropout, so that delta is the only noise.
    """
    rng, languages = random.Random(seed), TASKS['sample'].languages
    syllables = [c + v for c in 'bdfgklmnprstvz' for v in 'aeiou']
    stems = rng.sample([a + b + 'n' for a in syllables for b in syllables], SAMPLE_CONCEPTS * SAMPLE_SYNONYMS)
    concepts = [stems[i:i + SAMPLE_SYNONYMS] for i in range(0, len(stems), SAMPLE_SYNONYMS)]
    Path(data).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data) as part:
        folder = Path(part) / 'sample'
        folder.mkdir()
        neighbours = {word: [w for w in concept if w != word] for concept in concepts for word in concept}
        (folder / 'synonyms.json').write_text(json.dumps(neighbours, indent=1))
        for split, rows in SAMPLE_ROWS.items():
            pairs = [_sample_pair(concepts, rng) for _ in range(rows)]
            for lang in ('en',) if split == 'train' else languages:     # row-aligned, as XTREME's tests are
                write_pairs(folder / f'{split}-{lang}.tsv',
                            [[' '.join(_translate(word, lang) for word in side) for side in sides] + [label] for *sides, label in pairs])
        _write_sample_encoder(folder / 'model', concepts, seed)
        shutil.rmtree(Path(data) / 'sample', ignore_errors=True)
        os.replace(folder, Path(data) / 'sample')


def _sample_pair(concepts, rng):
    """Two sentences as lists of English words, and the label's name."""
    first = rng.sample(range(len(concepts)), SAMPLE_WORDS)
    second, label = list(first), rng.choice(TASKS['sample'].labels)
    if label == 'different':
        second[rng.randrange(SAMPLE_WORDS)] = rng.choice([c for c in range(len(concepts)) if c not in first])
    return [rng.choice(concepts[c]) for c in first], [rng.choice(concepts[c]) for c in second], label


def _translate(word, lang):
    """The sample world's dictionary: language xk has an ending of its own in place of English's -n."""
    return word if lang == 'en' else word[:-1] + 'drstlk'[int(lang[1:]) - 1]


def _write_sample_encoder(folder, concepts, seed):
    """A tiny BertModel checkpoint with a word-level tokenizer, as `from_pretrained` reads them."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, logging

    logging.disable_progress_bar()
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(SAMPLE_CONCEPTS, 1, SAMPLE_HIDDEN, generator=generator) * SAMPLE_SCALE
    around = torch.randn(SAMPLE_CONCEPTS, SAMPLE_SYNONYMS, SAMPLE_HIDDEN, generator=generator) * SAMPLE_SPREAD
    english = (centres + around).flatten(0, 1)
    special, words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]'], [word for concept in concepts for word in concept]
    points = [torch.randn(len(special), SAMPLE_HIDDEN, generator=generator) * SAMPLE_SCALE, english]
    for shift in SAMPLE_SHIFTS.values():
        direction = torch.nn.functional.normalize(torch.randn(english.shape, generator=generator), dim=-1)
        points.append(english + shift * SAMPLE_HIDDEN ** 0.5 * direction)
    vocabulary = special + [_translate(word, lang) for lang in TASKS['sample'].languages for word in words]

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token='[UNK]'))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(('[SEP]', 3), ('[CLS]', 2))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, pad_token='[PAD]', unk_token='[UNK]', cls_token='[CLS]',
                            sep_token='[SEP]').save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=SAMPLE_HIDDEN, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=4 * SAMPLE_HIDDEN, initializer_range=0.07, max_position_embeddings=64, pad_token_id=0,
                                     hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    model.get_input_embeddings().weight.data.copy_(torch.cat(points))
    model.save_pretrained(folder)


def main():
    """The command line: fetch or write a task's files, then say what is there."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], epilog='See the top of data.py for the layout.')
    parser.add_argument('task', choices=TASKS)
    parser.add_argument('archives', nargs='*', help='archives of the raw public release that were fetched by hand')
    parser.add_argument('--data', default='download', help='folder in XTREME\'s layout (default: %(default)s)')
    args = parser.parse_args()
    prepare(args.data, args.task, args.archives, complete=True)
    for path in sorted((Path(args.data) / args.task).glob('*.tsv')):
        print(describe(path, read_pairs(path, args.task)))


if __name__ == '__main__':
    main()
