"""Score fine-tuned classifiers in every language of their task; Tables 1 and 2 of the paper from any runs.

    python evaluate.py RUN [RUN ...]                 the tables; RUN is a run folder of train.py, or a .jsonl
    python evaluate.py RUN ... --langs yo            score these languages anew; likewise --data, --max-eval
    python evaluate.py RUN ... --generalized         premise in one language, hypothesis in another
    python evaluate.py RUN ... --smooth 10           the smoothed classifier g of 3.2, of 10 noisy passes
    python evaluate.py RUN ... --regions -o P.png    accuracy against the radius, under noise and under attack
    python evaluate.py FOLDER --task xnli            any Hugging Face classifier with the task's labels

The tables need no model and no data: a record holds which items were right. All else is measured when it is
asked for, and printed. A run is never written to; `-o` alone says what is written, and where. A file without
labels has predictions but no score: its language shows '-' and is not in the average.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, logging

import robust
from data import (TASKS, InputError, Pair, in_range, path_of, progress, read_lines, read_pairs, replacing,
                  run_script)

MBERT = 'bert-base-multilingual-cased'      # paper
MADE_BY = ('versions', 'source', 'device')  # decides nothing of a run, but is said where it differs


# ---------------------------------------------------------------- models

@functools.cache
def say(line):
    """A line on stderr, once however often it is said, by the first process alone."""
    if os.environ.get('RANK', '0') == '0':
        print(line, file=sys.stderr)


def choose_device(float32=False):
    """Where to compute and in what: (torch.device, autocast dtype), said on stderr.

    bfloat16 (ours) where the hardware multiplies it.
    """
    if torch.cuda.is_available():
        device, name = torch.device('cuda'), torch.cuda.get_device_name()
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        device, name = torch.device('cpu'), f'CPU, {torch.get_num_threads()} threads, as there is no CUDA GPU'
        capabilities = getattr(torch.cpu, 'get_capabilities', dict)()       # not in older torch
        fast = capabilities.get('avx512_bf16') or capabilities.get('amx_bf16')
        if torch.backends.mps.is_available() or torch.xpu.is_available():
            name += " (this machine's own is not used: nothing here was tested on one)"
    dtype = torch.bfloat16 if fast and not float32 else torch.float32
    say(f'device: {name}; {short(dtype)}')
    return device, dtype


def short(dtype):
    """'float32' of torch.float32 or of its name."""
    return str(dtype).removeprefix('torch.')


def default_model(task, data):
    """mBERT (paper); in the sample world the encoder that lies in its folder."""
    return f'{data}/sample/model' if task == 'sample' else MBERT


def load_encoder(name, task, freeze_embeddings=False, layer=0):
    """The pre-trained encoder with a new head, its labels named -> model in float32, tokenizer.

    The head is drawn from torch's random state. A classifier that has the task's very labels keeps its own.
    Raises InputError.
    """
    labels = dict(enumerate(TASKS[task].labels))
    ids = {label: number for number, label in labels.items()}
    config, model, tokenizer, missing = from_pretrained(
        name, id2label=labels, label2id=ids, ignore_mismatched_sizes=True)
    encoder = f'{model.base_model_prefix}.'
    lost = [key for key in missing if key.startswith(encoder) and 'pooler' not in key]
    if lost:
        raise InputError(f'{name}: {len(lost)} of its weights are missing ({lost[0]}, ...) and would be '
                         'random; expected the checkpoint of a pre-trained encoder')
    if (config.architectures or [''])[0].endswith('ForSequenceClassification'):
        theirs = label_ids(config)
        if theirs == ids:
            say(f'{name}: already a classifier of {task}; its head is kept')
        else:
            say(f'{name}: a classifier of {", ".join(theirs)}; it gets a new head for {task}')
            trained, model = model, AutoModelForSequenceClassification.from_config(model.config)
            setattr(model, model.base_model_prefix, trained.base_model)
    check_encoder(name, model, tokenizer, layer)
    model.get_input_embeddings().weight.requires_grad_(not freeze_embeddings)
    return model, tokenizer


def load(name):
    """A fine-tuned classifier, a folder or a name -> model in float32, tokenizer. Raises InputError."""
    _, model, tokenizer, missing = from_pretrained(name)
    if missing:
        raise InputError(f'{name}: {len(missing)} of its weights are missing ({missing[0]}, ...) and would '
                         'be random; expected a fine-tuned classifier')
    check_encoder(name, model, tokenizer)
    return model, tokenizer


def from_pretrained(name, **options):
    """transformers' loading -> config as stored, model, tokenizer, the names of missing weights."""
    logging.set_verbosity_error()       # what of its reports matters is said here, in a line
    logging.disable_progress_bar()
    where, reason = {'trust_remote_code': False}, None
    if not Path(name).exists():
        try:
            huggingface_hub.model_info(name, timeout=10)
        except Exception as error:      # ask the hub once: without a network transformers would for a minute
            where['local_files_only'], reason = True, error
    try:
        config = AutoConfig.from_pretrained(name, **where)
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, **where, **options)
    except Exception as error:          # whatever broken or foreign files make transformers raise
        raise InputError(f'{name}: cannot be loaded ({first_line(reason or error)}); expected the name of a '
                         'model, or a folder with config.json, model.safetensors, tokenizer.json') from None
    if config.is_encoder_decoder:
        raise InputError(f'{name}: an encoder-decoder; expected an encoder, such as {MBERT}')
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    for setting in ('local_files_only', 'trust_remote_code', 'is_local'):
        tokenizer.init_kwargs.pop(setting, None)        # the loader's own, no part of a checkpoint
    resized = [key for key, *_ in info['mismatched_keys']]
    return config, model, tokenizer, sorted([*info['missing_keys'], *resized])


def check_encoder(name, model, tokenizer, layer=0):
    """Raise InputError where tokenizer and encoder cannot classify pairs, or delta does not reach `layer`."""
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise InputError(f'{name}: a tokenizer without a vocabulary; expected tokenizer.json (or vocab.txt, '
                         'sentencepiece.bpe.model) beside the weights')
    special = tokenizer.num_special_tokens_to_add
    if special(pair=True) <= special(pair=False):
        raise InputError(f'{name}: its tokenizer puts nothing between the two sentences of a pair; '
                         'use another encoder')
    try:    # now, before hours are spent
        pair = tokenizer('one two', 'three', padding=True, return_tensors='pt')
        delta = robust.uniform_delta(model, pair, 0.0, layer)
        with torch.no_grad(), robust.perturbed(model.eval(), delta, layer):
            model(**pair)
    except Exception as error:
        raise InputError(f'{name}: a trial with one pair of sentences failed: {first_line(error)}') from None


def first_line(error):
    """What an exception says, in a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def fingerprint(model, tokenizer):
    """16 hex digits of what was pre-trained: the vocabulary and the encoder's weights.

    Without its pooler, which is random where a checkpoint has none, and without its config.
    """
    found = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    for name, weight in sorted(model.base_model.named_parameters()):
        if 'pooler' not in name:
            found.update(name.encode())
            found.update(weight.detach().cpu().contiguous().numpy())
    return found.hexdigest()[:16]


def longest(model, tokenizer, max_length):
    """How many tokens an input may have: max_length, or what encoder and tokenizer take, then said."""
    most = tokenizer.model_max_length
    for name, module in model.base_model.named_modules():
        if name.endswith('position_embeddings') and isinstance(module, torch.nn.Embedding):
            # XLM-R and its kind count positions from behind the padding's.
            used = 0 if module.padding_idx is None else module.padding_idx + 1
            most = min(most, module.num_embeddings - used)
    if most < max_length:
        say(f'encoder and tokenizer take {most} tokens, not {max_length}; what is longer is cut')
    return min(most, max_length)


# ---------------------------------------------------------------- scoring

def encode(tokenizer, pairs, max_length):
    """Tokenise pairs -> features, a list of dicts that `tokenizer.pad` takes, and how many pairs were cut."""
    encoded = tokenizer([pair[:2] for pair in pairs], truncation=True, max_length=max_length)
    features, cut = [], 0
    for row, pair in enumerate(pairs):
        features.append({name: values[row] for name, values in encoded.items()})
        if len(encoded['input_ids'][row]) == max_length:
            cut += len(tokenizer(pair.premise, pair.hypothesis)['input_ids']) > max_length
    return features, cut


def predict(model, tokenizer, pairs, *, dtype=torch.float32, batch=64, max_length=128, desc='predicting',
            eps=None, steps=0, layer=0, passes=1, seed=42):
    """argmax_c f(Enc(x))_c for each Pair -> label indices (pairs,), and how many pairs were cut.

    With eps, of f(Enc(x) + delta) as robust.py has it: delta uniform in the L-inf ball of that radius, fresh
    for each batch from `seed`, or what PGD finds in `steps` from there. Of several passes the majority, of
    tied classes that with the highest mean probability: the smoothed classifier g (3.2). Leaves the model in
    eval mode. Raises InputError for logits that are not finite.
    """
    if not pairs or not all(isinstance(pair, Pair) for pair in pairs):
        raise InputError(f'{desc}: expected one or more data.Pair(premise, hypothesis, label or None)')
    model.eval()
    features, cut = encode(tokenizer, pairs, max_length)
    # Neighbours of like length share a batch, so that little of it is padding; the longest come first,
    # so that memory that does not suffice shows at once.
    order = sorted(range(len(pairs)), key=lambda i: -len(features[i]['input_ids']))
    # One for each call: a language has the same draws whatever is scored before it.
    generator = torch.Generator(model.device).manual_seed(seed)
    counted = []
    for start in progress(range(0, len(order), batch), desc=desc, unit='batch'):
        chosen = order[start:start + batch]
        inputs = tokenizer.pad([features[i] for i in chosen], return_tensors='pt').to(model.device)
        # For PGD alone; without labels it attacks class 0, and nothing is scored.
        labels = torch.tensor([pairs[i].label or 0 for i in chosen], device=model.device)
        votes = 0
        for _ in range(passes):
            noise = contextlib.nullcontext()
            if eps is not None:     # outside autocast: where f is sure, rounded logits have no gradient
                delta = robust.worst_delta(model, {**inputs, 'labels': labels}, eps=eps, steps=steps,
                                           layer=layer, generator=generator)
                noise = robust.perturbed(model, delta, layer)
            autocast = torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32)
            with noise, autocast, torch.inference_mode():
                logits = model(**inputs).logits.float()
            votes = votes + torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1])
            votes = votes + logits.softmax(-1) / (passes + 1)       # breaks ties: in all less than one vote
        counted.append(votes)
    votes = torch.cat(counted)      # looked at once: for each batch the CPU would wait for the GPU
    if not votes.isfinite().all():
        raise InputError(f'{model.config.name_or_path}: gives logits that are not finite; train it with a '
                         'smaller lr or eps, or in float32')
    predicted = torch.empty(len(pairs), dtype=torch.long)
    predicted[order] = votes.argmax(-1).cpu()
    return predicted, cut


def marks(predicted, pairs):
    """'1' for each pair that is right, '0' for each that is wrong, as one string; None without labels."""
    found = ''
    for prediction, pair in zip(predicted.tolist(), pairs, strict=True):
        if pair.label is None:
            return None
        found += '1' if prediction == pair.label else '0'
    return found


def accuracy(marks):
    """Accuracy in percent of `marks`, or None."""
    return None if marks is None else 100 * marks.count('1') / len(marks)


def label_ids(config):
    """{label in lower case: the number that a classifier gives it}."""
    return {str(label).lower(): int(number) for number, label in config.id2label.items()}


def label_order(model, task):
    """The model's number of each of the task's labels. Raises InputError if it has other labels."""
    labels, ids = TASKS[task].labels, label_ids(model.config)
    if set(ids) != set(labels):
        wanted = json.dumps(dict(enumerate(labels)))
        raise InputError(f'{model.config.name_or_path}: its labels are {", ".join(ids)}; {task} has '
                         f'{", ".join(labels)}. If they mean the same, write the names into its config.json, '
                         f'in its own order: "id2label": {wanted}')
    return [ids[label] for label in labels]


def read_as(model, task, data, split, lang, max_eval=None):
    """A file's first max_eval pairs, their labels as the model numbers them."""
    numbers = dict(enumerate(label_order(model, task)))
    pairs = read_pairs(path_of(data, task, split, lang), task)[:max_eval]
    return [pair._replace(label=numbers.get(pair.label)) for pair in pairs]     # None stays None


def score(model, tokenizer, task, data, langs, *, split='test', max_eval=None, predictions=None, **options):
    """Predict the SPLIT file of each language -> {lang: {'items', 'marks', 'cut', 'answers', 'predicted'}}.

    `items` how many pairs, `marks` as the function, `cut` how many pairs were cut, `answers` how often each
    of the task's labels was given, `predicted` the label of each pair. `predictions`: a folder, to
    `write_predictions` there. Of the dev files English alone has to be there. `options` go to `predict`.
    """
    labels = TASKS[task].labels
    order = label_order(model, task)
    found = {}
    for lang in langs:
        if split == 'dev' and lang != 'en' and not path_of(data, task, split, lang).exists():
            continue
        pairs = read_as(model, task, data, split, lang, max_eval)
        predicted, cut = predict(model, tokenizer, pairs, desc=f'{split}-{lang}', **options)
        names = [labels[order.index(number)] for number in predicted.tolist()]
        answers = [names.count(label) for label in labels]
        found[lang] = {'items': len(pairs), 'marks': marks(predicted, pairs), 'cut': cut, 'answers': answers,
                       'predicted': names}
    if predictions:
        write_predictions(predictions, split, found)
    return found


def write_predictions(folder, split, found):
    """What `score` found as SPLIT-LANG.tsv, one label a line: the form that XTREME's evaluation takes."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for lang, row in found.items():
        with replacing(Path(folder) / f'{split}-{lang}.tsv') as part:
            part.write_text(''.join(f'{name}\n' for name in row['predicted']), encoding='utf-8')


def cut_note(cut, max_length):
    """The notes, one or none, about pairs longer than max_length tokens. cut: {language: how many}."""
    parts = [f'{lang} {count:,}' for lang, count in cut.items() if count]
    return [f'pairs of more than {max_length} tokens, cut there: {", ".join(parts)}'] if parts else []


# ---------------------------------------------------------------- records

def read_records(names):
    """The records of runs -> list of dicts: what train.py wrote as results.json, and `name`.

    A name is a run folder, or a .jsonl file of such lines (`cat runs/*/results.json > FILE.jsonl`).
    Raises InputError.
    """
    expected = ('the folder of a finished run of train.py, or a .jsonl of results.json; '
                '--task TASK scores any other classifier')
    records = []
    for name in names:
        path = Path(name)
        folder = path.is_dir()
        if folder:
            path = path / 'results.json'
        for number, line in enumerate(read_lines(path, expected), 1):
            record = read_record(line, f'{path}:{number}')
            record['name'] = str(path.parent) if folder else f'{path}:{number}'
            records.append(record)
    return records


def read_record(line, where):
    """One record from its line of JSON."""
    needed = ('args', 'files', 'paths', 'dtype', 'train_pairs', 'dev', 'step', 'steps', 'test_marks')
    try:
        record = json.loads(line)
        missing = [key for key in needed if key not in record]
    except (ValueError, TypeError) as error:
        raise InputError(f'{where}: not JSON ({error}); expected a record of train.py') from None
    if missing:
        raise InputError(f'{where}: a record without {", ".join(missing)}; expected one of this train.py')
    return record


# ---------------------------------------------------------------- beyond the tables

def crossed(first, second):
    """Premises of one language with hypotheses of another, row by row -> list of Pair; the label may be None.

    A row whose two labels differ is left out, and so is one with PAWS-X's placeholder NS ('no sentence') on
    any side: its label is not about a sentence. Where one side has no labels the other's serve.
    """
    pairs = []
    for a, b in zip(first, second, strict=True):
        label = b.label if a.label is None else a.label
        if 'NS' not in (*a, *b) and b.label in (None, label):
            pairs.append(Pair(a.premise, b.hypothesis, label))
    return pairs


def generalized(model, tokenizer, task, data, langs, *, max_eval=None, **options):
    """The published version's generalised setting: premise in one language, hypothesis in another.

    -> {'en-de' (premise-hypothesis): {'items', 'marks', 'cut'}}, as `score`. Made from the row-aligned test
    files; raises InputError if they are not of one length. `options`, here and below: of `predict`.
    """
    files = {lang: read_as(model, task, data, 'test', lang, max_eval) for lang in langs}
    if len(set(map(len, files.values()))) > 1:
        rows = ', '.join(f'{len(pairs)} in test-{lang}.tsv' for lang, pairs in files.items())
        raise InputError(f'{Path(data) / task}: rows: {rows}; the generalised setting needs as many in each')
    found = {}
    for first, second in itertools.product(langs, langs):
        pairs, name = crossed(files[first], files[second]), f'{first}-{second}'
        found[name] = {'items': len(pairs), 'marks': None, 'cut': 0}
        if pairs:
            predicted, cut = predict(model, tokenizer, pairs, desc=name, **options)
            found[name] |= {'marks': marks(predicted, pairs), 'cut': cut}
    return found


def smoothed(model, tokenizer, task, data, langs, *, eps, passes, **options):
    """The smoothed classifier g of 3.2, its probability by `passes` draws of noise -> what `score` gives."""
    return score(model, tokenizer, task, data, langs, eps=eps, passes=passes, **options)


def regions(model, tokenizer, task, data, langs, *, radii, steps, **options):
    """Accuracy at each radius of the L-inf ball, under uniform noise (one draw a pair) and under attack.

    -> {language: {'items', 'cut', 'noise', 'attack'}}, the last two the accuracy at each radius. What the
    attack does not find may be there all the same: its accuracy is an upper bound of the robust accuracy.
    """
    found = {lang: {'noise': [], 'attack': []} for lang in langs}
    for lang, eps in itertools.product(langs, radii):
        for kind, pgd in (('noise', 0), ('attack', steps)):
            row = score(model, tokenizer, task, data, [lang], eps=eps, steps=pgd, **options)[lang]
            found[lang][kind].append(accuracy(row['marks']))
            found[lang] |= {'items': row['items'], 'cut': row['cut']}       # each time the same
    return found


def new_figure(width, height):
    """An empty matplotlib figure; inches. Raises InputError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError('a picture needs matplotlib: pip install matplotlib') from None
    return Figure(figsize=(width, height), layout='constrained')


def check_picture(path):
    """Raise InputError where no picture can be made: to be asked before anything is measured for it."""
    if Path(path).suffix not in ('.png', '.svg'):
        raise InputError(f'{path}: not the name of a picture; expected FILE.png or FILE.svg')
    if not Path(path).parent.is_dir():
        raise InputError(f'{path}: no such folder; make it first')
    new_figure(1, 1)


def save_picture(figure, path):
    """Write a matplotlib figure, whole or not at all. Raises as check_picture, or OSError."""
    check_picture(path)
    with replacing(path) as part:
        figure.savefig(part, dpi=150)


def draw_regions(curves, radii, title, chance):
    """The figure of `regions`: a panel a language, a colour a name, solid under noise, dashed under attack.

    curves: {name: [what `regions` found, one a seed]}, drawn as the mean over seeds. chance: in percent.
    """
    runs = sum(curves.values(), [])
    langs = list(runs[0])
    for found in runs:
        langs = [lang for lang in langs if lang in found and None not in found[lang]['noise']]
    if not langs:
        raise InputError('no language has labels in every run: there is nothing to draw')
    ticks = [f'{radius:g}' for radius in radii]
    columns = min(4, len(langs))
    lines = math.ceil(len(langs) / columns)
    figure = new_figure(2.6 * columns + 1, 2.4 * lines + 1.5)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for lang, axes in zip(langs, panels):
        axes.axhline(chance, color='grey', linestyle=':', label=f'chance ({chance:.0f}%)')
        axes.set(title=lang, ylim=(0, 103), ylabel='accuracy (%)', xlabel='eps (L-inf)')
        width = 3
        for number, (name, seeds) in enumerate(curves.items()):
            for kind, style in (('noise', '-'), ('attack', '--')):
                mean = torch.tensor([found[lang][kind] for found in seeds], dtype=torch.double).mean(0)
                marker = 'os^Dv<>P'[number % 8]
                axes.plot(ticks, mean, style, color=f'C{number}', marker=marker, fillstyle='none',
                          linewidth=width, markersize=3 * width, label=f'{name}, {kind}')
                # Thinner and thinner, the markers hollow: where curves coincide each is still seen.
                width -= 1 / len(curves)
    for axes in panels[len(langs):]:
        axes.set_axis_off()
    figure.suptitle(f'{title}\neps: radius of the L-inf ball, in coordinates of Enc(x)', fontsize='medium')
    figure.legend(*panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=2)
    return figure


# ---------------------------------------------------------------- the tables

# Tables 1 and 2 of the paper, in the order of TASKS' languages, then its average, which a test reads against
# the rows. mBERT*: Hu et al. (2020).
PAPER = {
    'pawsx': {
        'mBERT*': '94.0 85.7 87.4 87.0 73.0 69.6 77.0 82.0',
        'plain': '93.8 85.8 88.7 89.2 74.4 72.8 79.5 83.5',
        'adv': '93.6 86.6 89.5 87.8 77.2 76.2 80.9 84.5',
        'rs_r': '94.7 87.2 89.8 89.6 77.8 78.4 81.8 85.6',
        'rs_a': '93.6 88.1 88.4 88.6 79.5 77.8 82.2 85.5',
    },
    'xnli': {
        'mBERT*': '80.8 64.3 68.0 70.0 65.3 73.5 73.4 58.9 67.8 49.7 54.1 60.9 57.2 69.3 67.8 65.4',
        'plain': '81.9 65.0 67.6 70.3 66.4 74.3 73.9 59.8 67.8 51.5 54.3 61.3 57.9 70.7 68.5 66.1',
        'adv': '81.9 64.9 68.3 71.7 66.5 74.4 74.5 59.6 68.8 48.8 50.6 61.7 59.2 70.0 69.4 66.0',
        'rs_r': '82.4 65.9 68.6 71.0 67.4 74.9 74.1 60.1 69.7 49.3 51.9 60.3 59.4 70.3 69.6 66.3',
        'rs_a': '80.0 65.5 69.5 71.7 67.6 74.1 73.8 61.5 69.6 51.3 54.8 63.3 60.3 70.4 70.3 66.9',
    },
}
UNIT = {'xnli': 3}      # items that were not drawn apart: a premise of XNLI has three rows
# Student's t, 97.5%, at 1, 2, ... 30 degrees of freedom; beyond, the last is near enough.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
        2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
        2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
ONE_ANSWER = 0.95       # a run that gives one answer to this share of the English test items is marked (ours)
TRIAL = 100             # fewer steps or items than these are called a trial (ours)
UPPER_BOUND = ('attack: an upper bound of the robust accuracy; what PGD does not find may be there, and '
               'where a classifier is very sure its gradient vanishes')


class Table(NamedTuple):
    """What is printed, all of it text: lines above, columns, rows as (name, {column: cell}), notes below."""
    above: list
    columns: list
    rows: list
    below: list


def render(table):
    """A Markdown table between caption and notes, its columns aligned so that it also reads as plain text."""
    lines = [['', *table.columns]]
    for name, cells in table.rows:
        lines.append([name, *(cells.get(column, '-') for column in table.columns)])
    widths = [max(3, *map(len, column)) for column in zip(*lines)]
    rule = ['-' * (width - 1) + ':' for width in widths[1:]]
    lines.insert(1, ['-' * widths[0], *rule])
    text = [*table.above, '']
    for name, *cells in lines:
        aligned = [name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]
        text.append(f'| {" | ".join(aligned)} |')
    return '\n'.join([*text, '', *(f'- {note}' for note in table.below), ''])


def as_cells(columns, scores):
    """Numbers as a row's cells; nan and None have none."""
    cells = {}
    for column, score in zip(columns, scores):
        if score is not None and not math.isnan(score):
            cells[column] = f'{score:.1f}'
    return cells


# Which records may be compared.

def settings(record):
    """What must agree between two records that both name it -> {name: value}."""
    may_differ = {'method', 'seed', 'synonyms'}.union(*robust.METHODS.values())
    if record['args']['method'] == 'rs_a':
        may_differ.add('epochs')        # they run over more pairs
    found = {**record['args'], **record['files'], 'dtype': record['dtype']}
    for lang, row in record['test_marks'].items():
        if row:
            found[f'test items of {lang}'] = len(row)
    return {name: value for name, value in found.items() if name not in may_differ}


def apart(record, group):
    """Why a record may not stand in one table with others -> 'NAME: lr 1 and 2', empty where it may."""
    ours = settings(record)
    for other in group:
        theirs, why = settings(other), []
        for name in ours:
            if ours[name] != theirs.get(name, ours[name]):
                why.append(f'{name} {ours[name]} and {theirs[name]}')
        if why:
            return f'{other["name"]}: {", ".join(why)}'
    return ''


def already_in(record, group):
    """Whether this run is in the group already, as where a folder and a .jsonl with its line are named."""
    for other in group:
        if record['args'] == other['args'] and own(record) == own(other):
            if record['test_marks'] != other['test_marks']:
                say(f'{record["name"]}: the same run as {other["name"]}, with other results; left out')
            return True
    return False


def groups(records):
    """Records that may stand in one table -> list of lists; the same run counts once.

    Task, data, model, budget and dtype agree in a group; method, its own arguments, eps and seed may differ.
    """
    found = []
    # RS-A's come last: as their epochs are not compared, they may be added to several tables.
    for record in sorted(records, key=lambda record: record['args']['method'] == 'rs_a'):
        fitting = [group for group in found if not apart(record, group)]
        for group in fitting:
            if not already_in(record, group):
                group.append(record)
        if not fitting:
            found.append([record])
    return found


def one_group(records):
    """The group that all records form, the same run once. Raises InputError where they form several."""
    group, *others = groups(records)
    if others:
        stranger = others[0][0]
        raise InputError(f'{stranger["name"]} does not belong with {apart(stranger, group)}; expected runs '
                         'that differ in method, eps and seed alone')
    return group


def own(record):
    """What tells a run from others of its method, eps and seed aside: {name: value}."""
    args = record['args'] | {'synonyms': record['files'].get('synonyms')}
    names = [*robust.METHODS.get(args['method'], ()), 'epochs', 'synonyms']
    return {name: args.get(name) for name in names if name != 'eps'}


def label_of(record, group):
    """The method, what tells the run from others of it, and how adv began: 'adv layer=1 (from the start)'.

    A setting that is off is not named.
    """
    parts = [record['args']['method']]
    others = [own(other) for other in group if other['args']['method'] == parts[0]]
    for name, value in own(record).items():
        if name == 'plain_steps':
            parts.append(f'({value} plain steps first)' if value else '(from the start)')
        elif value is None or value is False:
            continue
        elif any(other[name] != value for other in others):
            parts.append(name if value is True else f'{name}={value}')
    return ' '.join(parts)


def row_name(label, eps):
    """'adv (from the start)' at eps 0.01 -> 'adv 0.01 (from the start)'."""
    if eps is None:
        return label
    method, blank, rest = label.partition(' ')
    return f'{method} {eps:g}{blank}{rest}'


def variants(group):
    """A group's records by method and own arguments, then by rising eps -> {label: {eps: [records]}}.

    In the order of the paper's tables, seeds rising.
    """
    def order(record):
        """Where a record stands."""
        args = record['args']
        return list(robust.METHODS).index(args['method']), args['eps'] or 0, args['seed']

    found = {}
    for record in sorted(group, key=order):
        by_eps = found.setdefault(label_of(record, group), {})
        by_eps.setdefault(record['args']['eps'], []).append(record)
    return found


# Scores and gains.

def mean_dev(records):
    """English dev accuracy, mean over seeds."""
    return sum(record['dev'] for record in records) / len(records)


def rivals(by_eps):
    """The eps that may be chosen, those with the most seeds (ours): a mean over fewer may be luck."""
    most = max(map(len, by_eps.values()))
    return {eps: records for eps, records in by_eps.items() if len(records) == most}


def chosen_eps(by_eps):
    """The eps with the best English dev accuracy, mean over seeds (paper, section 4); of equals the first."""
    return max(rivals(by_eps), key=lambda eps: mean_dev(by_eps[eps]))


def accuracies(records, langs, field='test_marks'):
    """Accuracy in percent: float64 (seeds, languages); nan where there are no labels."""
    rows = []
    for record in records:
        marked = record.get(field) or {}
        scores = [accuracy(marked.get(lang)) for lang in langs]
        rows.append([math.nan if score is None else score for score in scores])
    return torch.tensor(rows, dtype=torch.double)


def averaged(scores):
    """Append the average over languages, those of nan left out: (..., languages) -> (..., languages + 1)."""
    return torch.cat([scores, scores.nanmean(-1, keepdim=True)], -1)


def oracle(by_eps, langs):
    """Test accuracy where each language takes the eps that is best on its own dev file -> (languages + 1,).

    nan where not every run has dev scores of that language; the average is then nan too.
    """
    choice = rivals(by_eps).values()
    dev = torch.stack([accuracies(records, langs, 'dev_marks').mean(0) for records in choice])
    test = torch.stack([accuracies(records, langs).mean(0) for records in choice])
    best = dev.max(0)       # nan where one is nan
    scores = test.gather(0, best.indices[None])[0].where(best.values.isfinite(), math.nan)
    return torch.cat([scores, scores.mean(-1, keepdim=True)])


def paired(records, plain):
    """[(record, plain record)] of the seeds that both have."""
    both = itertools.product(records, plain)
    return [(one, other) for one, other in both if one['args']['seed'] == other['args']['seed']]


def seed_gains(pairs, langs):
    """What each seed gains in accuracy, in points: float64 (seeds, languages + 1), the last the average."""
    records, plain = zip(*pairs)
    return averaged(accuracies(records, langs) - accuracies(plain, langs))


def item_gains(pairs, lang):
    """What each test item gains, mean over seeds, from -1 to 1: float64 (items,).

    (0,) where a run has no marks of that language. All have as many items, as `groups` sees to it.
    """
    rows = []
    for record, plain in pairs:
        ours, theirs = record['test_marks'].get(lang), plain['test_marks'].get(lang)
        if not ours or not theirs:
            return torch.zeros(0, dtype=torch.double)
        rows.append([int(a) - int(b) for a, b in zip(ours, theirs, strict=True)])
    return torch.tensor(rows, dtype=torch.double).mean(0)


def item_errors(pairs, langs):
    """Standard error of the gain, in points, by the choice of the test items: float64 (languages + 1,).

    The items of a unit were drawn together, and those of a row are translations of one another: in the
    average over languages a unit has one share, the mean of theirs. nan from a single unit or without labels.
    """
    unit = UNIT.get(pairs[0][0]['args']['task'], 1)
    errors = torch.full((len(langs) + 1,), math.nan, dtype=torch.double)
    columns = []
    for column, lang in enumerate(langs):
        gains = item_gains(pairs, lang)
        if len(gains) > 0:
            shares = 100 * (gains - gains.mean()) / len(gains)     # each item's part of the mean, centred
            shares = torch.stack([part.sum() for part in shares.split(unit)])
            columns.append(shares)
            errors[column] = error_of_sum(shares)
    if columns:
        # Padded: own languages may have fewer items.
        errors[-1] = error_of_sum(torch.nn.utils.rnn.pad_sequence(columns).mean(1))
    return errors


def error_of_sum(shares):
    """Standard error of the sum of independent shares; nan of a single one."""
    return shares.std() * len(shares) ** 0.5 if len(shares) > 1 else math.nan


def gain(records, plain, langs):
    """What records gain over plain's in accuracy -> (points, half): float64 (languages + 1,), average last.

    points: mean over the seeds that both have. half: half the width of its 95% interval (ours), which covers
    the choice of the items (normal) and, from two seeds on, of the seeds (Student's t). nan without labels or
    a seed in common; half also from a single unit.
    """
    pairs = paired(records, plain)
    if not pairs:
        nothing = torch.full((len(langs) + 1,), math.nan, dtype=torch.double)
        return nothing, nothing
    by_seed, half, seeds = seed_gains(pairs, langs), 1.96 * item_errors(pairs, langs), len(pairs)
    if seeds > 1:
        t = T975[min(seeds - 1, len(T975)) - 1]
        half = torch.hypot(half, t * by_seed.std(0) / seeds ** 0.5)
    return by_seed.mean(0), half


# The table of a group.

def one_answer(record):
    """Whether a run gives nearly one answer alone to the English test."""
    answers = record.get('answers', {}).get('en')
    return bool(answers) and max(answers) >= ONE_ANSWER * sum(answers)


def method_rows(label, by_eps, plain, langs, seeds):
    """A row for each eps; under the chosen one the deviation over seeds, the gain over plain, the oracle.

    plain: the records to compare with, none for plain itself. seeds: how many there are in the table.
    """
    rows = []
    columns, chosen, choice = [*langs, 'avg.'], chosen_eps(by_eps), len(rivals(by_eps))
    for eps, records in by_eps.items():
        scores = averaged(accuracies(records, langs))
        name = row_name(label, eps)
        if eps == chosen and choice > 1:
            name += ', chosen'
        if len(records) < seeds:
            name += f', n={len(records)}'
        if any(map(one_answer, records)):
            name += ' †'
        rows.append((name, as_cells(columns, scores.mean(0))))
        if eps != chosen:
            continue
        if len(records) > 1:
            rows.append((f'  sd of {len(records)} seeds', as_cells(columns, scores.std(0))))
        if plain:
            cells = {}
            for column, points, half in zip(columns, *gain(records, plain, langs)):
                cells[column] = '-' if half.isnan() else f'{points:+.1f} ±{half:.1f}'
            rows.append(('  gain over plain', cells))
        best = as_cells(columns, oracle(by_eps, langs))
        if choice > 1 and best:
            rows.append(('  oracle eps', best))
    return rows


def method_notes(label, by_eps, plain, langs):
    """What is said of a method under its table: English dev of each eps, each seed's gain, oddities."""
    notes, devs = [], []
    for eps, records in by_eps.items():
        at = '' if eps is None else f'{eps:g} '
        devs.append(f'{at}{mean_dev(records):.1f} (n={len(records)})')
        stuck = sum(map(one_answer, records))
        if stuck:
            notes.append(f'†: {row_name(label, eps)}: one answer for {100 * ONE_ANSWER:.0f}% or more of '
                         f'English items in {stuck} of {len(records)} seeds')
    notes.insert(0, f'{label}: English dev, mean over seeds: {", ".join(devs)}')
    records = by_eps[chosen_eps(by_eps)]
    pairs = paired(records, plain)
    if pairs:
        each = ' '.join(f'{points[-1]:+.1f}' for points in seed_gains(pairs, langs))
        notes.append(f'{label}, each seed: {each}')
    elif plain:
        notes.append(f'{label}: no seed in common with plain, so no gain')
    changed = [record['changed'] for record in records if record.get('changed')]
    if changed:
        notes.append(f'{label}: its copies changed {100 * sum(changed) / len(changed):.1f}% of the words')
    return notes


def paper_rows(task, name, langs):
    """The paper's own row, or none. Its average is over these languages, if all are the paper's."""
    if name not in PAPER.get(task, {}):
        return []
    printed = dict(zip(TASKS[task].languages, map(float, PAPER[task][name].split())))
    scores = torch.tensor([printed.get(lang, math.nan) for lang in langs], dtype=torch.double)
    return [(f'  paper, {name}', as_cells([*langs, 'avg.'], [*scores, scores.mean()]))]


def legend(found, missing):
    """The notes that explain the rows of a table, {label: {eps: records}}, and missing languages."""
    notes = []
    if any(len(rivals(by_eps)) > 1 for by_eps in found.values()):
        notes.append('chosen: by English dev, of the eps with the most seeds; oracle eps: of these each '
                     'language takes the best on its own dev file')
    if 'plain' in found and len(found) > 1:
        notes.append('±: 95%, over the choice of items (paired; three rows of an XNLI premise are one) and, '
                     'from two seeds on, of seeds (paired, t)')
    if missing:
        notes.append(f'{" ".join(missing)}: no labels in the test file, or not scored in every run; not in '
                     "avg. XTREME's script strips labels; `python data.py TASK` fetches files that have them")
    return notes


def span(numbers):
    """'2,000', or '1,743 to 1,744'."""
    ends = sorted({min(numbers, default=0), max(numbers, default=0)})
    return ' to '.join(f'{end:,}' for end in ends)


def merged(group, field):
    """What the records of a group say of their languages in a field: {language: value}."""
    found = {}
    for record in group:
        found |= record.get(field, {})
    return found


def caption(group):
    """The lines above a table: what it is of, and whether all of it was made alike."""
    first = group[0]
    items = [len(row) for row in merged(group, 'test_marks').values() if row]
    steps = [record['steps'] for record in group]
    seeds = ' '.join(map(str, sorted({record['args']['seed'] for record in group})))
    lines = [f'{first["args"]["task"]}, test accuracy in percent, mean over seeds {seeds}',
             f'model {Path(first["paths"]["model"]).name}; {span(steps)} steps; '
             f'{span([record["train_pairs"] for record in group])} training pairs; '
             f'{span(items)} test items a language; {short(first["dtype"])}']
    if min([*steps, *items]) < TRIAL:
        lines.append(f'A trial, not a result: {span(steps)} steps, {span(items)} items.')
    for name in MADE_BY:
        values = sorted({json.dumps(record.get(name)) for record in group})
        if len(values) > 1:
            lines.append(f'made with more than one {name}: {", ".join(values)}')
    return lines


def table_of(group):
    """The Table of records that fit together: Table 1 or 2 of the paper."""
    task, marked = group[0]['args']['task'], merged(group, 'test_marks')
    # The task's own languages in the paper's order, then the others.
    ordered = dict.fromkeys([*TASKS[task].languages, *marked])
    langs = [lang for lang in ordered if lang in marked]
    labelled = accuracies(group, langs).isfinite().all(0)
    known = [lang for lang, all_labelled in zip(langs, labelled) if all_labelled]
    seeds = len({record['args']['seed'] for record in group})
    found = variants(group)
    rows, below = paper_rows(task, 'mBERT*', known), []
    for label, by_eps in found.items():
        plain = [] if label == 'plain' else found.get('plain', {}).get(None, [])
        rows += method_rows(label, by_eps, plain, known, seeds)
        rows += paper_rows(task, label.split()[0], known)
        below += method_notes(label, by_eps, plain, known)
    below += legend(found, [lang for lang in langs if lang not in known])
    below += cut_note(merged(group, 'cut'), group[0].get('longest', group[0]['args']['max_length']))
    return Table(caption(group), [*langs, 'avg.'], rows, below)


def report(records):
    """Print Tables 1 and 2 from records, a table for each group that belongs together -> list of Table."""
    tables, before = [], []
    for group in groups(records):
        table, task = table_of(group), group[0]['args']['task']
        why = apart(group[0], [other for other in before if other['args']['task'] == task])
        if why:
            table.above.append(f'In no table with the runs above: {why}')
        print(render(table))
        tables.append(table)
        before += group
    return tables


# ---------------------------------------------------------------- command line

def parse_args(words=None):
    """The command line, or these words of one."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                     epilog='See the top of evaluate.py for examples.')
    count, radius = in_range(int, 1), in_range(float, 0)
    add = parser.add_argument_group('what').add_argument
    add('runs', nargs='+', metavar='RUN', help='run folder, or .jsonl of results: prints their tables')
    add('--task', choices=TASKS, help='RUN is any classifier of this task: a folder, or a name of the hub')
    add('--langs', nargs='+', metavar='LANG', help="score anew any with a test-LANG.tsv; else the run's")
    add('--data', help="score anew the files of this folder in XTREME's layout; else the run's")
    add('--max-eval', type=count, metavar='N', help='score anew the first N pairs a file; else as the run')
    add('-o', '--output', metavar='PATH', help='write what is printed, FILE.json; of --regions a picture, '
        'FILE.png or FILE.svg; of --task alone the predictions, FOLDER')
    group = parser.add_argument_group('beyond the tables: measured each time, and printed')
    add = group.add_mutually_exclusive_group().add_argument
    add('--generalized', action='store_true', help='premise in one language, hypothesis in another')
    add('--smooth', type=count, metavar='N', help='majority over N noisy passes: g of section 3.2')
    add('--regions', action='store_true', help='accuracy against the radius, under noise and attack')
    add = group.add_argument
    add('--eps', type=radius, help="--smooth: radius of the noise; else the training's")
    add('--radii', type=radius, nargs='+', default=(0, 0.01, 0.03, 0.1, 0.3, 1), metavar='EPS',
        help='--regions: its radii (default: %(default)s, ours)')
    add('--steps', type=count, default=10, metavar='N', help='--regions: of PGD (default: %(default)s, ours)')
    add('--seed', type=in_range(int, 0, 2 ** 63 - 1), default=42, help='of the noise (default: %(default)s)')
    add = parser.add_argument_group('how').add_argument
    add('--batch', type=count, default=64, metavar='N', help='pairs at once (default: %(default)s)')
    add('--float32', action='store_true', help='measure without bfloat16; else as the run was trained')
    return parser.parse_args(words)


def named_by_output(args):
    """What -o names: a 'picture' of --regions, a foreign classifier's 'predictions', a 'table'; or None."""
    if not args.output:
        return None
    if args.regions:
        return 'picture'
    return 'predictions' if args.task and not (args.generalized or args.smooth) else 'table'


def check_output(args, records):
    """Raise InputError for an -o that would fail, or mean nothing, after hours of measuring."""
    what, output = named_by_output(args), args.output
    if what == 'picture':
        check_picture(output)
        one_group(records)      # the seeds of a method are drawn as one curve
    elif what == 'predictions' and len(records) > 1:
        raise InputError(f'-o {output}: one folder for predictions of {" ".join(args.runs)}; '
                         'name one classifier')
    elif what == 'table' and Path(output).suffix != '.json':
        raise InputError(f'-o {output}: expected FILE.json')


def find_runs(args):
    """The records of the runs to measure; one made up for a classifier that train.py did not make (--task).

    Raises InputError for what would fail after hours of measuring others.
    """
    # A run named twice, or once with a trailing slash, is no second seed.
    names = {os.path.abspath(name): name for name in args.runs}.values()
    records = []
    for name in names:
        if args.task and not (Path(name) / 'results.json').exists():
            records.append(foreign(name, args.task))
        elif Path(name).is_file():
            raise InputError(f'{name}: results without their models; to measure anew, name run folders')
        else:
            records += read_records([name])
    task = args.task or records[0]['args']['task']
    for record in records:
        name, trained = record['name'], record['args']
        if trained['task'] != task:
            raise InputError(f'{name}: a run of {trained["task"]}, not of {task}')
        if args.smooth and args.eps is None and trained['eps'] is None:
            raise InputError(f'{name}: {trained["method"]} has no eps of its own; say --eps with --smooth')
    return records


def foreign(name, task):
    """The record made up for a classifier that train.py did not make: the settings to measure it with."""
    args = {'task': task, 'method': name, 'eps': None, 'layer': None, 'max_length': 128, 'max_eval': None}
    marks = dict.fromkeys(TASKS[task].languages)
    return {'name': name, 'args': args, 'paths': {'data': 'download'}, 'files': {}, 'dtype': None,
            'test_marks': marks}


def measure(record, args):
    """What the command line asks for, of one run's model -> (Table, what was found)."""
    name, trained, data = record['name'], record['args'], args.data or record['paths']['data']
    model, tokenizer = load(name)
    device, dtype = choose_device(args.float32 or record['dtype'] == 'torch.float32')
    max_length, layer = longest(model, tokenizer, trained['max_length']), trained['layer'] or 0
    langs = list(dict.fromkeys(args.langs or record['test_marks']))
    where = model.to(device), tokenizer, trained['task'], data, langs
    options = {'max_eval': args.max_eval or trained['max_eval'], 'dtype': dtype, 'batch': args.batch,
               'max_length': max_length, 'layer': layer, 'seed': args.seed}
    said = f'layer {layer}, seed {args.seed}'
    columns, rows, notes = [*langs, 'avg.'], [], []
    if args.generalized:
        what = 'premise in the language of the row, hypothesis in that of the column'
        found = generalized(*where, **options)
        columns = langs
        rows, notes = generalized_rows(found, langs)
    elif args.regions:
        what = f'against the radius eps, under uniform noise and under PGD of {args.steps} steps, {said}'
        found = regions(*where, radii=args.radii, steps=args.steps, **options)
        columns, notes = [f'{radius:g}' for radius in args.radii], [UPPER_BOUND]
        for lang, kind in itertools.product(found, ('noise', 'attack')):
            rows.append((f'{lang} {kind}', as_cells(columns, found[lang][kind])))
    else:
        what = 'scored anew'
        if args.smooth:
            eps = trained['eps'] if args.eps is None else args.eps
            what = f'majority over {args.smooth} passes with uniform noise of eps {eps:g}, {said}'
            found = smoothed(*where, eps=eps, passes=args.smooth, **options)
        else:
            found = score(*where, **options)
        scored = {'test_marks': {lang: row['marks'] for lang, row in found.items()}}
        rows = [(Path(name).name, as_cells(columns, averaged(accuracies([scored], langs))[0]))]
    items = span([row['items'] for row in found.values()])
    above = [f'{name}, {trained["task"]}, accuracy in percent: {what}',
             f'test files of {data}, {items} items; languages {" ".join(langs)}; '
             f'{short(dtype)}; {device.type}']
    notes += cut_note({lang: row['cut'] for lang, row in found.items()}, max_length)
    return Table(above, columns, rows, notes), found


def generalized_rows(found, langs):
    """Of `generalized`: a row for each language of the premise, and the note."""
    rows, others = [], []
    for first in langs:
        scores = {second: accuracy(found[f'{first}-{second}']['marks']) for second in langs}
        rows.append((first, as_cells(langs, scores.values())))
        others += [score for second, score in scores.items() if second != first and score is not None]
    mean = sum(others) / max(len(others), 1)
    return rows, [f'mean of {len(others)} pairs of two languages: {mean:.1f}; left out: rows whose two '
                  'labels differ, and those with a placeholder NS']


def picture(args, records):
    """The figure of --regions, from what was `found` of each record."""
    curves = {}
    for record in records:
        curve = row_name(label_of(record, records), record['args']['eps'])
        curves.setdefault(curve, []).append(record['found'])
    task = records[0]['args']['task']
    items = span([row['items'] for row in records[0]['found'].values()])
    seeds = span([len(runs) for runs in curves.values()])
    title = f'{task}, mean over {seeds} seed(s), {items} test items a language, PGD of {args.steps} steps'
    return draw_regions(curves, args.radii, title, 100 / len(TASKS[task].labels))


def measure_all(records, args):
    """Measure and print what the command line asks for, run by run -> tables; each record gets `found`."""
    tables = []
    for record in records:
        try:
            table, record['found'] = measure(record, args)
        except RuntimeError as error:
            if 'memory' not in str(error):
                raise
            raise InputError(f'{record["name"]}: out of memory; try a smaller --batch than '
                             f'{args.batch}') from None
        print(render(table))
        tables.append(table)
    return tables


def main(args=None):
    """Print the tables of runs, or measure something else of them; write where -o says, and nowhere else."""
    args = args or parse_args()
    anew = args.task or args.langs or args.data or args.max_eval
    anew = anew or args.generalized or args.smooth or args.regions
    records = find_runs(args) if anew else read_records(args.runs)
    check_output(args, records)
    tables = measure_all(records, args) if anew else report(records)
    # Last of all: what cannot be written has been printed.
    what = named_by_output(args)
    if what == 'picture':
        save_picture(picture(args, records), args.output)
    elif what == 'predictions':
        write_predictions(Path(args.output) / args.task, 'test', records[0]['found'])
    elif what == 'table':
        content = json.dumps([table._asdict() for table in tables], ensure_ascii=False, indent=1)
        with replacing(args.output) as part:
            part.write_text(content + '\n', encoding='utf-8')


if __name__ == '__main__':
    run_script(main)
