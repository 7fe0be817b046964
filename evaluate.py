"""Score fine-tuned classifiers in every language of their task; Tables 1 and 2 of the paper from any runs.

    python evaluate.py RUN [RUN ...]                 the tables; RUN is a run folder of train.py, or a .jsonl
    python evaluate.py RUN --langs yo                score these languages anew; likewise --data, --max-eval
    python evaluate.py RUN --predictions FOLDER      the same, and keep the predicted labels
    python evaluate.py RUN ... --generalized         premise in one language, hypothesis in another
    python evaluate.py RUN ... --smooth 10           the smoothed classifier g of 3.2, of 10 noisy passes
    python evaluate.py RUN ... --regions -o P.png    accuracy against the radius, under noise and under attack

The tables need no model and no data: a record holds which items were right. All else is measured when it is
asked for, and printed. A run is never written to. A file without labels has predictions but no score.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

import robust
from data import (RANK, TASKS, InputError, Pair, Parser, in_range, path_of, progress,
                  read_lines, read_pairs, replacing, run_script)

MBERT = 'bert-base-multilingual-cased'      # paper


# ---------------------------------------------------------------- models

@functools.cache
def say(line):
    """A line on stderr, once however often it is said, by the first process alone."""
    if RANK == 0:
        print(line, file=sys.stderr)


def choose_device(float32=False):
    """Where to compute and in what: (torch.device, autocast dtype), said on stderr.

    bfloat16 (ours) where the hardware multiplies it.
    """
    device, name = torch.device('cpu'), f'CPU, {torch.get_num_threads()} threads, as there is no CUDA GPU'
    if torch.cuda.is_available():
        device, name = torch.device('cuda'), torch.cuda.get_device_name()
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = getattr(torch.cpu, 'get_capabilities', dict)()       # not in older torch
        fast = capabilities.get('avx512_bf16') or capabilities.get('amx_bf16')
    dtype = torch.bfloat16 if fast and not float32 else torch.float32
    say(f'device: {name}; {short(dtype)}')
    return device, dtype


def short(dtype):
    """'float32' of torch.float32."""
    return str(dtype).removeprefix('torch.')


def default_model(task, data):
    """mBERT (paper); in the sample world the encoder that lies in its folder."""
    return f'{data}/sample/model' if task == 'sample' else MBERT


def load_encoder(name, task, freeze_embeddings=False, layer=0):
    """The pre-trained encoder with a new head, its labels named -> model in float32, tokenizer.

    The head is drawn from torch's random state. Raises InputError where they cannot classify pairs, or delta
    does not reach `layer`.
    """
    labels = dict(enumerate(TASKS[task].labels))
    ids = {label: number for number, label in labels.items()}
    model, tokenizer, missing = from_pretrained(name, id2label=labels, label2id=ids)
    lost = [key for key in missing if key.startswith(model.base_model_prefix) and 'pooler' not in key]
    if lost:
        raise InputError(f'{name}: {len(lost)} of its weights are missing ({lost[0]}, ...) and would be '
                         'random; expected the checkpoint of a pre-trained encoder')
    if not missing:
        raise InputError(f'{name}: a classifier, whose head would be kept; expected a pre-trained encoder')
    check_encoder(name, model, tokenizer, layer)
    model.get_input_embeddings().weight.requires_grad_(not freeze_embeddings)
    return model, tokenizer


def load(name):
    """A fine-tuned classifier's folder -> model in float32, tokenizer. Raises InputError."""
    model, tokenizer, missing = from_pretrained(name)
    if missing:
        raise InputError(f'{name}: {len(missing)} of its weights are missing ({missing[0]}, ...) and would '
                         'be random; expected a fine-tuned classifier')
    return model, tokenizer


def from_pretrained(name, **options):
    """transformers' loading -> model in float32, tokenizer, the names of missing weights."""
    logging.set_verbosity_error()       # what of its reports matters is said here, in a line
    logging.disable_progress_bar()
    if name.startswith(('.', '/')) and not Path(name).exists():
        raise InputError(f'{name}: no such folder; expected a checkpoint, or a name of the hub')
    for local in (True, False):         # first what is at hand: to ask the hub in vain takes a minute
        where = {'trust_remote_code': False, 'local_files_only': local}
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **where)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True, **where, **options)
            break
        except Exception as error:      # whatever broken or foreign files make transformers raise
            problem = first_line(error)
    else:
        raise InputError(f'{name}: cannot be loaded ({problem}); expected the name of a model, or a folder '
                         'with config.json, model.safetensors, tokenizer.json')
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    for setting in ('local_files_only', 'trust_remote_code', 'is_local'):
        tokenizer.init_kwargs.pop(setting, None)        # the loader's own, no part of a checkpoint
    return model, tokenizer, sorted(info['missing_keys'])


def check_encoder(name, model, tokenizer, layer=0):
    """Raise InputError where tokenizer and encoder cannot classify pairs, or delta does not reach `layer`."""
    special = tokenizer.num_special_tokens_to_add
    if special(pair=True) <= special(pair=False):
        raise InputError(f'{name}: its tokenizer puts nothing between the two sentences of a pair; '
                         'use another encoder')
    try:    # now, before hours are spent
        check_vocabulary(name, model, tokenizer)
        pair = tokenizer('one two', 'three', padding=True, return_tensors='pt')
        delta = robust.uniform_delta(model, pair, 0.0, layer)
        with torch.no_grad(), robust.perturbed(model.eval(), delta, layer):
            model(**pair)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f'{name}: a trial with one pair of sentences failed: {first_line(error)}') from None


def check_vocabulary(name, model, tokenizer):
    """Raise InputError where the tokenizer is not the one that the encoder was trained with."""
    vocabulary = tokenizer.get_vocab()
    words = set(vocabulary) - set(tokenizer.all_special_tokens)
    if not words:
        raise InputError(f'{name}: a tokenizer without a vocabulary; expected tokenizer.json (or vocab.txt, '
                         'sentencepiece.bpe.model) beside the weights')
    highest, rows = max(vocabulary.values()), len(model.get_input_embeddings().weight)
    if highest >= rows:
        raise InputError(f'{name}: its tokenizer has ids up to {highest}, its embeddings {rows} rows; '
                         'expected the tokenizer of this encoder')
    cased = sorted(word for word in words if word.isascii() and word.isalpha() and not word.islower())[:100]
    tokens = set(tokenizer.tokenize(' '.join(cased))) - set(tokenizer.all_special_tokens)
    if cased and all(token == token.lower() for token in tokens):
        raise InputError(f'{name}: its tokenizer lower-cases, but its vocabulary has {cased[0]}, ...; write '
                         '{"do_lower_case": false} into its tokenizer_config.json')


def first_line(error):
    """What an exception says, in a line."""
    return str(error).strip().split('\n')[0]


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
    features = []
    for row in range(len(pairs)):
        features.append({name: values[row] for name, values in encoded.items()})
    return features, sum(bool(one.overflowing) for one in encoded.encodings)


def predict(model, tokenizer, pairs, *, dtype=torch.float32, batch=64, max_length=128, desc='predicting',
            eps=None, steps=0, layer=0, passes=1):
    """argmax_c f(Enc(x))_c for one or more Pair -> label indices (pairs,), and how many were cut, also said.

    With eps, of f(Enc(x) + delta) as robust.py has it: delta uniform in the L-inf ball of that radius, fresh
    for each batch, or what PGD finds in `steps` from there. Of several passes the majority, of tied classes
    that with the highest mean probability: the smoothed classifier g (3.2). Leaves the model in eval mode.
    Raises InputError for logits that are not finite.
    """
    model.eval()
    features, cut = encode(tokenizer, pairs, max_length)
    if cut:
        say(f'{desc}: {cut:,} pairs of more than {max_length} tokens, cut there')
    # Neighbours of like length share a batch, so that little of it is padding; the longest come first,
    # so that memory that does not suffice shows at once.
    order = sorted(range(len(pairs)), key=lambda i: -len(features[i]['input_ids']))
    # One for each call: a language has the same draws whatever is scored before it.
    generator = torch.Generator(model.device).manual_seed(42)
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
    """Accuracy in percent of `marks`; nan without labels."""
    return math.nan if marks is None else 100 * marks.count('1') / len(marks)


def score(model, tokenizer, task, data, langs, *, split='test', max_eval=None, **options):
    """Predict the SPLIT file of each language. Yields (language, scored).

    scored: {`marks` as the function, `cut` how many pairs were cut, `answers` how often each of the task's
    labels was given, `predicted` the label of each pair}. Of the dev files English alone has to be there.
    `options`, here and below: of `predict`.
    """
    labels = TASKS[task].labels
    for lang in langs:
        path = path_of(data, task, split, lang)
        if split == 'dev' and lang != 'en' and not path.exists():
            continue
        pairs = read_pairs(path, task)[:max_eval]
        predicted, cut = predict(model, tokenizer, pairs, desc=f'{split}-{lang}', **options)
        scored = {'marks': marks(predicted, pairs), 'cut': cut}
        scored['answers'] = predicted.bincount(minlength=len(labels)).tolist()
        scored['predicted'] = [labels[number] for number in predicted.tolist()]
        yield lang, scored


def write_predictions(folder, split, found):
    """What `score` found as SPLIT-LANG.tsv, one label a line: the form that XTREME's evaluation takes."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for lang, scored in found.items():
        with replacing(Path(folder) / f'{split}-{lang}.tsv') as part:
            part.write_text('\n'.join([*scored['predicted'], '']), encoding='utf-8')


# ---------------------------------------------------------------- beyond the table

RADII, ATTACK_STEPS = (0, 0.01, 0.03, 0.1, 0.3, 1), 10      # of --regions (ours)


def crossed(first, second):
    """Premises of one language with hypotheses of another, row by row -> list of Pair; the label may be None.

    A row whose two labels differ is left out, and so is one with PAWS-X's placeholder NS ('no sentence') on
    any side: its label is not about a sentence.
    """
    pairs = []
    for a, b in zip(first, second, strict=True):
        if 'NS' not in (*a, *b) and a.label == b.label:
            pairs.append(Pair(a.premise, b.hypothesis, a.label))
    return pairs


def generalized(model, tokenizer, task, data, langs, *, max_eval=None, **options):
    """The published version's generalised setting: premise in one language, hypothesis in another.

    Yields (premise's language, hypothesis's, scored). Made from the row-aligned test files; raises InputError
    if they are not of one length.
    """
    files = {lang: read_pairs(path_of(data, task, 'test', lang), task)[:max_eval] for lang in langs}
    rows = {lang: len(pairs) for lang, pairs in files.items()}
    if len(set(rows.values())) > 1:
        raise InputError(f'{data}/{task}: test files of {rows} rows; expected as many in each')
    for first, second in itertools.product(langs, langs):
        pairs = crossed(files[first], files[second])
        if pairs:
            predicted, _ = predict(model, tokenizer, pairs, desc=f'{first}-{second}', **options)
            yield first, second, {'marks': marks(predicted, pairs)}


def measured(record, langs, args):
    """What the command line asks for, of one run's model: yields (row, language, scored).

    Rows of --regions are 'noise 0.1', uniform, one draw a pair, and 'attack 0.1'. What the attack does not
    find may be there all the same: its accuracy is an upper bound of the robust accuracy.
    """
    trained, setting = record['args'], record['setting']
    model, tokenizer = load(record['where'])
    device, dtype = choose_device(setting['dtype'] == 'float32')
    where = model.to(device), tokenizer, setting['task'], args.data or trained['data'], langs
    # As in training: its batch fitted the memory.
    options = {'layer': trained.get('layer', 0), 'batch': trained['batch'], 'dtype': dtype}
    options['max_eval'] = args.max_eval or trained['max_eval']
    options['max_length'] = longest(model, tokenizer, trained['max_length'])
    if args.generalized:
        yield from generalized(*where, **options)
        return
    rows = {'test': {}}
    if args.smooth:
        rows = {f'g {eps:g}': {'eps': eps, 'passes': args.smooth} for eps in args.eps or [trained['eps']]}
    if args.regions:
        rows = {}
        for eps in args.eps or RADII:
            rows[f'noise {eps:g}'] = {'eps': eps}
            rows[f'attack {eps:g}'] = {'eps': eps, 'steps': ATTACK_STEPS}
    for row, noise in rows.items():
        for lang, scored in score(*where, **options, **noise):
            yield row, lang, scored


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
    """Write a matplotlib figure, whole or not at all. Raises OSError."""
    with replacing(path) as part:
        figure.savefig(part, dpi=150, format=Path(path).suffix[1:])


def draw_regions(curves, radii, task):
    """The figure of --regions: accuracy under attack, in percent, against the radius.

    curves: {name: of each seed the accuracies at the radii, mean over languages}.
    """
    figure = new_figure(6, 4)
    axes = figure.subplots()
    chance = 100 / len(TASKS[task].labels)
    axes.axhline(chance, color='grey', linestyle=':', label=f'chance ({chance:.0f}%)')
    for number, (name, seeds) in enumerate(curves.items()):
        mean = torch.tensor(seeds).mean(0)
        axes.plot([f'{eps:g}' for eps in radii], mean, marker='os^Dv<>P'[number % 8], label=name)
    axes.set(ylim=(0, 103), ylabel='accuracy under attack (%)', xlabel='eps (L-inf, coordinates of Enc(x))')
    axes.set_title(f'{task}: mean over languages and seeds, PGD of {ATTACK_STEPS} steps', fontsize='medium')
    axes.legend()
    return figure


# ---------------------------------------------------------------- the table

# Tables 1 and 2 of the paper, in the order of TASKS' languages, then its average, which a test reads against
# the rows.
PAPER = {
    'pawsx': {
        'Hu et al.': '94.0 85.7 87.4 87.0 73.0 69.6 77.0 82.0',
        'plain': '93.8 85.8 88.7 89.2 74.4 72.8 79.5 83.5',
        'adv': '93.6 86.6 89.5 87.8 77.2 76.2 80.9 84.5',
        'rs_r': '94.7 87.2 89.8 89.6 77.8 78.4 81.8 85.6',
        'rs_a': '93.6 88.1 88.4 88.6 79.5 77.8 82.2 85.5',
    },
    'xnli': {
        'Hu et al.': '80.8 64.3 68.0 70.0 65.3 73.5 73.4 58.9 67.8 49.7 54.1 60.9 57.2 69.3 67.8 65.4',
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
NEAR_BEST = 1.0         # points of English dev that a larger eps may cost (ours; set on the sample world)
LEGEND = (
    'n: seeds, all else is their mean; steps: updates; dev: English dev accuracy; no labels: not in avg.',
    "gain: of avg. over plain's, same seeds, ± its 95% interval over items and seeds (paired); none of one",
    f'*: the eps that English dev chooses (paper); °: the largest within {NEAR_BEST:g} point of that (ours)',
    'oracle: each language takes the eps best on its own dev file; *, °, oracle: of the eps with most seeds',
    f'†: a run gives one answer to {ONE_ANSWER:.0%} of the English items; paper: its Table 1 or 2',
)


class Row(NamedTuple):
    """The runs of one variant."""
    name: str           # 'adv-0.01', that of its runs without their seed
    variant: dict       # method, eps, own arguments
    records: list       # one a seed, rising


def read_records(names):
    """The records of finished runs -> list of dicts, what train.py wrote as results.json, and `where`.

    A name is a run folder, or a .jsonl file of such lines (`cat runs/*/results.json > FILE.jsonl`). What is
    neither is passed over with a line; InputError where nothing is left.
    """
    records = []
    for path in dict.fromkeys(map(Path, names)):
        file = path if path.suffix == '.jsonl' else path / 'results.json'
        if not file.exists():
            say(f'{path}: no finished run of train.py; passed over')
            continue
        for number, line in enumerate(read_lines(file, 'results of train.py, a run a line'), 1):
            where = f'{file}:{number}' if path == file else str(path)
            try:
                record = json.loads(line) | {'where': where}
                for name in ('setting', 'name', 'seed', 'args', 'made_by', 'test_marks', 'dev', 'steps'):
                    record[name]
                robust.METHODS[record['variant']['method']]
            except (ValueError, TypeError, LookupError) as error:
                raise InputError(f'{where}: {error!r}; expected a record of this train.py') from None
            records.append(record)
    if not records:
        raise InputError(f'{" ".join(map(str, names))}: no finished run of train.py')
    return records


def differences(setting, other):
    """What two settings do not agree in, in words -> list of str. What one of them does not name agrees."""
    words = []
    for name in setting:
        ours, theirs = setting[name], other.get(name, setting[name])
        if ours != theirs:
            digests = name == 'model' or name.endswith('.tsv')
            words.append(f'another {name}' if digests else f'{name} {ours}, not {theirs}')
    return words


def agreed(table):
    """What the runs of a table agree in: all that any of their settings names."""
    setting = {}
    for record in table:
        setting |= record['setting']
    return setting


def tables_of(records):
    """Records whose settings agree -> list of lists, a table each; the same run counts once."""
    tables = []
    # Last those whose number of steps is not part of their setting: they fit where the others stand.
    for record in sorted(records, key=lambda record: 'steps' not in record['setting']):
        for table in tables:
            if not differences(record['setting'], agreed(table)):
                break
        else:
            table = []
            tables.append(table)
        same = [other for other in table if other['name'] == record['name']]
        if not same:
            table.append(record)
        elif same[0]['test_marks'] != record['test_marks']:
            say(f'{record["where"]}: the same run as {same[0]["where"]}, with other results; left out')
    return tables


def one_table(records):
    """The table that all records form, the same run once. Raises InputError where they form several."""
    table, *others = tables_of(records)
    if others:
        why = '; '.join(differences(agreed(others[0]), agreed(table)))
        raise InputError(f'{others[0][0]["where"]} does not belong with {table[0]["where"]}: {why}; expected '
                         'runs that differ in method, its arguments and seed alone')
    return table


def families(table):
    """A table's records by variant -> families, each a list of Row that differ in eps alone, rising.

    Methods as in the paper, the more of their arguments are not the default the later.
    """
    def order(record):
        """Where a record stands."""
        variant = record['variant']
        method = list(robust.METHODS).index(variant['method'])
        return method, len(variant), family_of(variant), variant.get('eps'), record['seed']

    found = {}
    for record in sorted(table, key=order):
        rows = found.setdefault(family_of(record['variant']), {})
        name = name_of(record)
        rows.setdefault(name, Row(name, record['variant'], [])).records.append(record)
    return [list(rows.values()) for rows in found.values()]


def name_of(record):
    """The name of a run's variant: 'adv-0.01'."""
    return record['name'].removesuffix(f'-seed{record["seed"]}')


def family_of(variant):
    """What variants that differ in eps alone share."""
    return str(variant | {'eps': None})


def mean_dev(row):
    """English dev accuracy, mean over seeds."""
    return sum(record['dev'] for record in row.records) / len(row.records)


def rivals(family):
    """The rows that may be chosen, those with the most seeds (ours): a mean over fewer may be luck."""
    most = max(len(row.records) for row in family)
    return [row for row in family if len(row.records) == most]


def chosen(family):
    """The Row with the best English dev accuracy (paper, section 4); of equals the smallest eps."""
    return max(rivals(family), key=mean_dev)


def widest(family):
    """The Row of the largest eps whose English dev is within NEAR_BEST of the best (ours)."""
    best = mean_dev(chosen(family))
    return [row for row in rivals(family) if mean_dev(row) >= best - NEAR_BEST][-1]


def accuracies(records, langs, field='test_marks'):
    """Accuracy in percent: float64 (seeds, languages); nan where there are no labels."""
    rows = []
    for record in records:
        marked = record.get(field, {})
        rows.append([accuracy(marked.get(lang)) for lang in langs])
    return torch.tensor(rows, dtype=torch.double)


def averaged(scores):
    """Append the average over languages, those of nan left out: (..., languages) -> (..., languages + 1)."""
    return torch.cat([scores, scores.nanmean(-1, keepdim=True)], -1)


def oracle(family, langs):
    """Test accuracy where each language takes the eps that is best on its own dev file -> (languages + 1,).

    nan where not every run has dev scores of that language; the average is then nan too.
    """
    dev = torch.stack([accuracies(row.records, langs, 'dev_marks').mean(0) for row in rivals(family)])
    test = torch.stack([accuracies(row.records, langs).mean(0) for row in rivals(family)])
    scores = test.gather(0, dev.argmax(0, keepdim=True))[0].where(dev.isfinite().all(0), math.nan)
    return torch.cat([scores, scores.mean(0, keepdim=True)])


def paired(records, plain):
    """[(record, plain record)] of the seeds that both have."""
    by_seed = {record['seed']: record for record in plain}
    return [(record, by_seed[record['seed']]) for record in records if record['seed'] in by_seed]


def item_errors(pairs, langs, unit):
    """Standard error of the gain, in points, by the choice of the test items: float64 (languages + 1,).

    The `unit` items in a row were drawn together, and those of a row are translations of one another: in the
    average over languages a unit has one share, the mean of theirs.
    """
    columns = []
    for lang in langs:
        gains = sum(right(ours, lang) - right(theirs, lang) for ours, theirs in pairs) / len(pairs)
        shares = 100 * (gains - gains.mean()) / len(gains)      # each item's part of the mean, centred
        columns.append(torch.stack([part.sum() for part in shares.split(unit)]))
    sums = torch.nn.utils.rnn.pad_sequence(columns)     # own languages may have fewer items
    return error_of_sum(averaged(sums))


def right(record, lang):
    """1 for each test item that is right, 0 for each that is wrong: float64 (items,); nan without labels."""
    marks = record['test_marks'].get(lang) or [math.nan]
    return torch.tensor(list(map(float, marks)), dtype=torch.double)


def error_of_sum(shares):
    """Standard error of the sum of independent shares (shares, ...); nan of a single one."""
    count = len(shares)
    return shares.std(0, correction=0) * count / (count - 1 or math.nan) ** 0.5


def gain(records, plain, langs):
    """What records gain over plain's in accuracy -> (points, half): float64 (languages + 1,), average last.

    points: mean over the seeds that both have. half: half the width of its 95% interval (ours), which covers
    the choice of the items (normal) and of the seeds (Student's t). nan without labels or a seed in common,
    half also of a single seed. The average is for `langs` that all have labels.
    """
    pairs = paired(records, plain)
    nothing = torch.full((len(langs) + 1,), math.nan, dtype=torch.double)
    if not pairs or not langs:
        return nothing, nothing
    ours, theirs = zip(*pairs)
    by_seed = averaged(accuracies(ours, langs) - accuracies(theirs, langs))
    seeds = len(pairs)
    if seeds == 1:
        return by_seed[0], nothing
    t = T975[min(seeds - 1, len(T975)) - 1]
    items = item_errors(pairs, langs, UNIT.get(ours[0]['setting']['task'], 1))
    return by_seed.mean(0), torch.hypot(1.96 * items, t * by_seed.std(0) / seeds ** 0.5)


def one_answer(record):
    """Whether a run gives nearly one answer alone to the English test."""
    answers = record.get('answers', {}).get('en')
    return bool(answers) and max(answers) >= ONE_ANSWER * sum(answers)


def as_cells(langs, scores):
    """Accuracies of the languages and their average as a row's cells; nan has none."""
    cells = {}
    for column, score in zip([*langs, 'avg.'], scores.tolist()):
        if not math.isnan(score):
            cells[column] = f'{score:.1f}'
    return cells


def family_lines(family, langs, plain):
    """A family's lines of the table, (name, cells) each: its eps, then the oracle's.

    plain: the records to compare with, none for plain itself.
    """
    lines = []
    choice = len(rivals(family)) > 1
    for row in family:
        name = row.name
        if choice and row == chosen(family):
            name += ' *'
        if choice and row == widest(family):
            name += ' °'
        if any(map(one_answer, row.records)):
            name += ' †'
        cells = as_cells(langs, averaged(accuracies(row.records, langs).mean(0)))
        cells['n'], cells['steps'] = str(len(row.records)), f'{row.records[0]["steps"]:,}'
        cells['dev'] = f'{mean_dev(row):.1f}'
        points, half = gain(row.records, plain, langs)
        if points[-1].isfinite():
            cells['gain'] = f'{points[-1]:+.1f} ±{half[-1]:.1f}'.removesuffix(' ±nan')
        lines.append((name, cells))
    best = oracle(family, langs)
    if choice and best.isfinite().any():
        lines.append((f'{family[0].variant["method"]} oracle', as_cells(langs, best)))
    return lines


def paper_lines(task, name, langs):
    """The paper's own line, or none; with its average where these are its languages."""
    if name not in PAPER.get(task, {}):
        return []
    cells = dict(zip([*TASKS[task].languages, 'avg.'], PAPER[task][name].split()))
    if tuple(langs) != TASKS[task].languages:
        del cells['avg.']
    return [(f'paper (mBERT), {name}', cells)]


def render(above, columns, rows, below):
    """A Markdown table that also reads as plain text. above, below: lines; rows: (name, {column: cell})."""
    lines = [['', *columns]]
    for name, cells in rows:
        lines.append([name, *(cells.get(column, '') for column in columns)])
    first, *others = [max(2, *map(len, column)) for column in zip(*lines)]
    lines.insert(1, ['-' * first, *('-' * (width - 1) + ':' for width in others)])
    text = [*above, '']
    for name, *cells in lines:
        aligned = [cell.rjust(width) for cell, width in zip(cells, others)]
        text.append(f'| {" | ".join([name.ljust(first), *aligned])} |')
    return '\n'.join([*text, '', *(f'- {note}' for note in below), ''])


def print_table(table):
    """Print Table 1 or 2 of the paper from records whose settings agree."""
    setting, marked = table[0]['setting'], {}
    task = setting['task']
    for record in table:
        marked |= record['test_marks']
    # The task's own languages in the paper's order, then the others.
    langs = [lang for lang in dict.fromkeys([*TASKS[task].languages, *marked]) if lang in marked]
    labelled = accuracies(table, langs).isfinite().all(0)
    known = [lang for lang, all_labelled in zip(langs, labelled) if all_labelled]
    lines, papers, plain = [], paper_lines(task, 'Hu et al.', known), []
    for family in families(table):
        method = family[0].variant['method']
        lines += family_lines(family, known, plain)
        papers += paper_lines(task, method, known)
        if method == 'plain':
            plain = family[0].records
    lines += dict(papers).items()
    items = sorted({f'{len(marks):,}' for marks in marked.values() if marks})
    above = (f'{task}, test accuracy in percent; model {table[0]["args"]["model"]}; '
             f'{setting["train_pairs"]:,} training pairs; {" or ".join(items)} test items a '
             f'language; {setting["dtype"]}')
    print(render([above], ['n', 'steps', 'dev', *langs, 'avg.', 'gain'], lines, LEGEND))


def report(records):
    """Print Tables 1 and 2 from records, a table for each setting."""
    first = {}      # by task, the setting of its first table
    for table in tables_of(records):
        setting = agreed(table)
        other = first.setdefault(setting['task'], setting)
        if other != setting:
            print(f'Other runs of {setting["task"]}: {"; ".join(differences(setting, other))}\n')
        print_table(table)


# ---------------------------------------------------------------- command line

def parse_args(words=None):
    """The command line, or these words of one. Raises InputError."""
    parser = Parser(description=__doc__)
    add, count = parser.add_argument, in_range(int, 1)
    add('runs', nargs='+', metavar='RUN', help='run folder, or .jsonl of results: prints their tables')
    add('--langs', nargs='+', metavar='LANG', help="score anew any with a test-LANG.tsv; else the run's")
    add('--data', help="score anew the files of this folder in XTREME's layout; else the run's")
    add('--max-eval', type=count, metavar='N', help='score anew the first N pairs a file; else as the run')
    add('--predictions', metavar='FOLDER', help='score anew, and write the predicted labels there')
    beyond = parser.add_mutually_exclusive_group().add_argument
    beyond('--generalized', action='store_true', help='premise in one language, hypothesis in another')
    beyond('--smooth', type=count, metavar='N', help='majority over N noisy passes: g of section 3.2')
    beyond('--regions', action='store_true', help='accuracy against the radius, under noise and attack')
    add('--eps', type=in_range(float, 0), nargs='+',
        help=f"radii of --smooth (else the training's) and of --regions (else {RADII}, ours)")
    add('-o', '--output', metavar='PICTURE', help='--regions: accuracy under attack, FILE.png or FILE.svg')
    args = parser.parse_args(words)
    args.asked = ' '.join(sys.argv[1:] if words is None else words)
    noisy = args.smooth or args.regions
    args.anew = noisy or args.generalized or args.langs or args.data or args.max_eval or args.predictions
    if args.eps and not noisy or args.output and not args.regions:
        parser.error('--eps goes with --smooth or --regions, -o with --regions')
    if args.predictions and (noisy or args.generalized):
        parser.error('--predictions does not go with what is beyond the tables')
    return args


def find_runs(args):
    """The records of the runs to measure. Raises InputError for what would fail after hours of measuring."""
    records = read_records(args.runs)
    if args.predictions:
        if len(records) > 1:
            raise InputError(f'--predictions {args.predictions}: of {len(records)} runs; name one')
        Path(args.predictions).mkdir(parents=True, exist_ok=True)
    if args.output:
        one_table(records)      # the seeds of a variant are drawn as one curve
        check_picture(args.output)
    for record in records:
        where, task = record['where'], record['setting']['task']
        if not Path(where).is_dir():
            raise InputError(f'{where}: a result without its model; to measure anew, name run folders')
        if args.smooth and not args.eps and 'eps' not in record['variant']:
            raise InputError(f'{where}: {record["variant"]["method"]} has no eps of its own; say --eps')
        load(where)
        for lang in args.langs or record['test_marks']:
            read_pairs(path_of(args.data or record['args']['data'], task, 'test', lang), task)
    return records


def measure(record, args):
    """Print what the command line asks for, of one run's model, also where it is cut short.

    -> {row: {language: scored}}, {row: its cells}.
    """
    langs = args.langs or list(record['test_marks'])
    found, lines = {}, {}
    try:
        for row, lang, scored in measured(record, langs, args):
            found.setdefault(row, {})[lang] = scored
    finally:
        for row, scored in found.items():
            marked = {lang: one['marks'] for lang, one in scored.items()}
            lines[row] = as_cells(langs, averaged(accuracies([{'test_marks': marked}], langs))[0])
        above = f'{record["where"]}, {record["setting"]["task"]}, accuracy in percent; {args.asked}'
        if lines:
            print(render([above], [*langs, 'avg.'], lines.items(), []))
    return found, lines


def main(words=None):
    """Print the tables of runs, or measure something else of them. `words`: a command line, for notebooks."""
    args = parse_args(words)
    if not args.anew:
        report(read_records(args.runs))
        return
    radii, curves = args.eps or RADII, {}
    for record in find_runs(args):
        task = record['setting']['task']
        found, lines = measure(record, args)
        if args.predictions:
            write_predictions(Path(args.predictions) / task, 'test', found['test'])
        if args.output:
            curve = [float(lines[f'attack {eps:g}'].get('avg.', 'nan')) for eps in radii]
            curves.setdefault(name_of(record), []).append(curve)
    if args.output:
        save_picture(draw_regions(curves, radii, task), args.output)


if __name__ == '__main__':
    run_script(main)
