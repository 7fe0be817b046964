"""PAWS-X and XNLI in XTREME's files, and a small made-up world that needs no download.

    python data.py pawsx                        fetch what is missing into download/pawsx, and count what is there
    python data.py xnli XNLI-1.0.zip ...        the same from archives fetched by hand
    python data.py sample                       write the sample world

XTREME's layout (Hu et al. 2020): DATA/{pawsx,xnli}/{train,dev,test}-{lang}.tsv, UTF-8, no header,
premise TAB hypothesis TAB label. XTREME's own script strips the labels of the test files; what this
file fetches keeps them.
"""

import argparse
import csv
import io
import json
import os
import random
import shutil
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm


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
SYNONYMS = {'sample': 'sample/synonyms.json'}   # under DATA; every other task uses the public neighbour file:
PUBLIC_SYNONYMS = 'synonyms/counterfitted_neighbors.json'


# ---------------------------------------------------------------- reading

def path_of(data, task, split, lang):
    """DATA/pawsx/test-de.tsv and the like."""
    return Path(data) / task / f'{split}-{lang}.tsv'


def read_pairs(path, task):
    """Read one XTREME file -> list of Pair. Raises InputError (file, line, what was expected).

    Labels may be missing from the whole file (XTREME's test files), never from a part of it.
    """
    path, labels = Path(path), TASKS[task].labels
    try:
        lines = path.read_bytes().removeprefix(b'\xef\xbb\xbf').split(b'\n')
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}. `python data.py {task}` fetches the task\'s files') from None
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise InputError(f'{path}: empty; expected premise TAB hypothesis TAB label, a pair a line')
    ids = {name: i for i, name in enumerate(labels)}
    if task == 'xnli':
        ids['contradictory'] = ids['contradiction']     # the spelling of XNLI's machine-translated files
    pairs, columns = [], None
    for number, line in enumerate(lines, 1):
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


def placeholders(pairs):
    """How many rows have a PAWS-X placeholder cell 'NS' ('no sentence'). XTREME keeps them, and so does this."""
    return sum('NS' in (pair.premise, pair.hypothesis) for pair in pairs)


def describe(path, pairs):
    """One line about a file: rows, labels, placeholders."""
    notes = ['no labels: cannot be scored'] * (pairs[0].label is None)
    notes += [f'{placeholders(pairs)} rows with a placeholder NS, kept'] * (placeholders(pairs) > 0)
    return f'{path}: {len(pairs):,} pairs' + ''.join(f'; {note}' for note in notes)


# ---------------------------------------------------------------- fetching

def prepare(data, task, archives=(), complete=False):
    """Make sure that the task's files are under DATA; fetch, check and write those that are not.

    Training needs train-en, dev-en and every test file. `complete` asks for the other dev files and
    for test labels too: test files without labels are then fetched anew. Nothing else is overwritten.
    """
    if task == 'sample':
        if not path_of(data, task, 'train', 'en').exists():
            write_sample(data)
        return
    wanted = []
    for split, lang in [('train', 'en')] + [(s, l) for s in ('dev', 'test') for l in TASKS[task].languages]:
        path = path_of(data, task, split, lang)
        needed = complete or split != 'dev' or lang == 'en'
        if needed and (not path.exists() or complete and read_pairs(path, task)[0].label is None):
            wanted.append((split, lang))
    if wanted:
        names = ', '.join(f'{split}-{lang}' for split, lang in wanted[:3]) + ', ...' * (len(wanted) > 3)
        print(f'{Path(data) / task}: {len(wanted)} files to fetch ({names})', file=sys.stderr)
        _convert(data, task, wanted, {Path(archive).name: Path(archive) for archive in archives})


def _convert(data, task, wanted, archives):
    """Read the wanted (split, lang) from the raw archives, check them, and write them in XTREME's layout."""
    folder = Path(data) / task
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as part:
        for name, (url, splits) in TASKS[task].archives.items():
            inside = [(split, lang) for split, lang in wanted if split in splits]
            if not inside:
                continue
            archive = archives.get(name) or _download(url, Path(part) / name, task, data)
            try:
                rows = RAW_READERS[task](archive, inside)
            except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, ValueError) as error:
                raise InputError(f'{archive}: not the whole archive that {url} holds ({error}); fetch it again') from None
            for (split, lang), pairs in rows.items():
                if len(pairs) != TASKS[task].rows[split]:
                    raise InputError(f'{archive}: {len(pairs)} rows for {split}-{lang}, expected {TASKS[task].rows[split]}; '
                                     'fetch it again')
                write_pairs(Path(part) / f'{split}-{lang}.tsv', pairs)
                read_pairs(Path(part) / f'{split}-{lang}.tsv', task)
        for split, lang in wanted:      # only once every file is there and was read back
            os.replace(Path(part) / f'{split}-{lang}.tsv', folder / f'{split}-{lang}.tsv')


def _download(url, path, task, data):
    """Fetch url into path with a progress bar. Raises InputError if it cannot be had whole."""
    try:
        with urllib.request.urlopen(url, timeout=30) as response, open(path, 'wb') as file:
            size = int(response.headers.get('Content-Length') or 0)
            with tqdm(total=size or None, unit='B', unit_scale=True, desc=path.name) as bar:
                while block := response.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
        if size and path.stat().st_size != size:
            raise OSError(f'got {path.stat().st_size} of {size} bytes')
    except OSError as error:
        raise InputError(f'{url}: {getattr(error, "reason", error)}. Fetch it by hand and give it to '
                         f'`python data.py {task} --data {data} {" ".join(TASKS[task].archives)}`; '
                         '`python train.py --task sample` works without a network') from None
    return path


def _pawsx_rows(archive, wanted):
    """x-final.tar.gz: x-final/LANG/{train,dev_2k,test_2k}.tsv, with a header: id, sentence1, sentence2, label."""
    names = {f'x-final/{lang}/{"train" if split == "train" else split + "_2k"}.tsv': (split, lang) for split, lang in wanted}
    rows = {}
    with tarfile.open(archive) as tar:
        for member in tar:      # members are read by name and never extracted: no path can escape
            if member.isfile() and member.name in names:
                lines = tar.extractfile(member).read().decode('utf-8').split('\n')[1:]
                rows[names[member.name]] = [line.rstrip('\r').split('\t')[1:4] for line in lines if line.strip()]
    if len(rows) < len(wanted):
        raise KeyError(f'no {next(name for name, key in names.items() if key not in rows)}')
    return rows


def _xnli_rows(archive, wanted):
    """XNLI-1.0.zip: XNLI-1.0/xnli.{dev,test}.tsv (language in column 1, gold label 2, sentences 7 and 8).

    XNLI-MT-1.0.zip: XNLI-MT-1.0/multinli/multinli.train.en.tsv (premise, hypothesis, label). All with a header.
    """
    names = {'train': 'XNLI-MT-1.0/multinli/multinli.train.en.tsv', 'dev': 'XNLI-1.0/xnli.dev.tsv', 'test': 'XNLI-1.0/xnli.test.tsv'}
    rows = {key: [] for key in wanted}
    with zipfile.ZipFile(archive) as source:
        for split in sorted({split for split, _ in wanted}):
            with io.TextIOWrapper(source.open(names[split]), 'utf-8', newline='\n') as lines:
                next(lines)
                for line in lines:
                    cells = line.rstrip('\r\n').split('\t')
                    lang, row = ('en', cells) if split == 'train' else (cells[0], [cells[6], cells[7], cells[1]])
                    if (split, lang) in rows:
                        rows[split, lang].append(row)
    return rows


RAW_READERS = {'pawsx': _pawsx_rows, 'xnli': _xnli_rows}


def write_pairs(path, rows):
    """Write (premise, hypothesis[, label]) rows as XTREME does, with csv.writer; `read_pairs` is its inverse."""
    with open(path, 'w', encoding='utf-8', newline='') as file:
        csv.writer(file, delimiter='\t').writerows([cell.strip() for cell in row] for row in rows)


# ---------------------------------------------------------------- the sample world

SAMPLE_HIDDEN, SAMPLE_CONCEPTS, SAMPLE_SYNONYMS, SAMPLE_WORDS = 64, 30, 3, 3
SAMPLE_ROWS = {'train': 8000, 'dev': 1000, 'test': 2000}
SAMPLE_SCALE = 0.25                                             # of concepts around the origin, per coordinate
SAMPLE_SPREAD = 0.05                                            # of synonyms around their concept
SAMPLE_SHIFTS = {f'x{k}': 0.05 * k for k in range(1, 7)}        # of a language's words, root mean square per coordinate


def write_sample(data, seed=0):
    """Write DATA/sample: a world in which Eq. 1 and Figure 1 of the paper are literally true.

    A concept is a random point; its synonyms lie close around it; language xk's word for an English
    word is that word's point plus a random shift, of the same length 0.05 k sqrt(64) for every word of
    xk. A pair is a paraphrase (synonyms exchanged) or different (one concept exchanged too). Written as
    ordinary files: XTREME's TSVs, a neighbour file, and a BertModel checkpoint (2 layers, hidden 64)
    whose word embeddings are these points and whose other weights are random. It has no dropout, so that
    delta is the only noise.
    """
    rng = random.Random(seed)
    folder = Path(data) / 'sample'
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix='sample.', dir=folder.parent))
    try:
        syllables = [c + v for c in 'bdfgklmnprstvz' for v in 'aeiou']
        stems = rng.sample([a + b + 'n' for a in syllables for b in syllables], SAMPLE_CONCEPTS * SAMPLE_SYNONYMS)
        concepts = [stems[i:i + SAMPLE_SYNONYMS] for i in range(0, len(stems), SAMPLE_SYNONYMS)]
        neighbours = {word: [w for w in concept if w != word] for concept in concepts for word in concept}
        (part / 'synonyms.json').write_text(json.dumps(neighbours, indent=1))
        for split, languages in {'train': ['en'], 'dev': TASKS['sample'].languages, 'test': TASKS['sample'].languages}.items():
            pairs = [_sample_pair(concepts, rng) for _ in range(SAMPLE_ROWS[split])]
            for lang in languages:      # the same rows in every language: tests are parallel, as XTREME's are
                write_pairs(part / f'{split}-{lang}.tsv',
                            [(' '.join(_translate(w, lang) for w in a), ' '.join(_translate(w, lang) for w in b), label)
                             for a, b, label in pairs])
        _write_sample_encoder(part / 'model', concepts, seed)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


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
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(SAMPLE_CONCEPTS, 1, SAMPLE_HIDDEN, generator=generator) * SAMPLE_SCALE
    english = (centres + SAMPLE_SPREAD * torch.randn(SAMPLE_CONCEPTS, SAMPLE_SYNONYMS, SAMPLE_HIDDEN, generator=generator)).flatten(0, 1)
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
                                     intermediate_size=4 * SAMPLE_HIDDEN, max_position_embeddings=64, pad_token_id=0,
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
