"""Score fine-tuned classifiers in every language of their task; Tables 1 and 2 of the paper from any number of runs.

    python evaluate.py RUN [RUN ...]                    the tables; RUN is a folder that train.py wrote
    python evaluate.py RUN ... --split dev              the dev files of all languages: what an oracle would choose eps by
    python evaluate.py RUN ... --generalized            premise in one language, hypothesis in another
    python evaluate.py RUN ... --smooth 10              the smoothed classifier g of 3.2: majority over noisy passes
    python evaluate.py RUN ... --regions -o FILE.png    accuracy against the radius, under noise and under attack
    python evaluate.py FOLDER --task xnli               any Hugging Face classifier with the task's labels

What is measured is kept in RUN/results.json and not measured again; the tables need no model and no data.
Predictions go to RUN/predictions/TASK/SPLIT-LANG.tsv, one label a line: the form XTREME's evaluation takes.
A file without labels is predicted but never scored: its language shows '-' and is not in the average.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

from data import TASKS, InputError, digests, number, path_of, read_pairs, written

# Tables 1 and 2 of the paper, in the order of TASKS' languages; mBERT*: Hu et al. (2020). What follows XTREME's languages is its average.
PAPER = {
    'pawsx': {'mBERT*': '94.0 85.7 87.4 87.0 73.0 69.6 77.0 82.0', 'plain': '93.8 85.8 88.7 89.2 74.4 72.8 79.5 83.5',
              'adv': '93.6 86.6 89.5 87.8 77.2 76.2 80.9 84.5', 'rs_r': '94.7 87.2 89.8 89.6 77.8 78.4 81.8 85.6',
              'rs_a': '93.6 88.1 88.4 88.6 79.5 77.8 82.2 85.5'},
    'xnli': {'mBERT*': '80.8 64.3 68.0 70.0 65.3 73.5 73.4 58.9 67.8 49.7 54.1 60.9 57.2 69.3 67.8 65.4',
             'plain': '81.9 65.0 67.6 70.3 66.4 74.3 73.9 59.8 67.8 51.5 54.3 61.3 57.9 70.7 68.5 66.1',
             'adv': '81.9 64.9 68.3 71.7 66.5 74.4 74.5 59.6 68.8 48.8 50.6 61.7 59.2 70.0 69.4 66.0',
             'rs_r': '82.4 65.9 68.6 71.0 67.4 74.9 74.1 60.1 69.7 49.3 51.9 60.3 59.4 70.3 69.6 66.3',
             'rs_a': '80.0 65.5 69.5 71.7 67.6 74.1 73.8 61.5 69.6 51.3 54.8 63.3 60.3 70.4 70.3 66.9'},
}
RADII = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)        # of --regions (ours)
# What distinguishes two runs of a method beyond eps and seed; all else must agree for runs to be compared.
OWN = {'plain': (), 'adv': ('layer', 'adv_steps', 'adv_step_size', 'plain_steps'), 'rs_r': ('layer',),
       'rs_a': ('m', 'p', 'replace', 'english_only', 'synonyms')}
NEVER_COMPARED = {'method', 'eps', 'seed', 'out', 'data', 'epochs', *(name for names in OWN.values() for name in names)}


def parse_args(words=None):
    """The command line, or these words of one."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], epilog='See the top of evaluate.py for what is written.')
    add = parser.add_argument
    add('runs', nargs='+', metavar='RUN', help='folder that train.py wrote, or with --task any Hugging Face classifier')
    add('--markdown', action='store_true', help='print tables for a README')
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--split', choices=('test', 'dev'), default='test')
    what.add_argument('--generalized', action='store_true', help='premise in one language, hypothesis in another: all pairs of languages')
    what.add_argument('--smooth', type=number(int, 1), metavar='N', help='majority over N noisy passes')
    what.add_argument('--regions', action='store_true', help='accuracy against the radius of random noise and of a PGD attack')
    add('--task', choices=TASKS, help='of a classifier that train.py did not make')
    add('--data', help='folder in XTREME\'s layout; scores anew (default: what the run was trained on, scored once)')
    add('--eps', type=number(float, 0), help='--smooth: radius of the noise (default: the one of the training)')
    add('--radii', type=number(float, 0), nargs='+', default=RADII, help='--regions (default: %(default)s)')
    add('--steps', type=number(int, 0), default=10, help='--regions: sign steps of the attack (default: %(default)s)')
    add('--max-eval', type=number(int, 1), help='the first N pairs of each file only (default: as the run)')
    add('--langs', nargs='+', help='--regions, --generalized: these languages only')
    add('--seed', type=number(int, 0, 2 ** 63), default=42, help='of the noise (default: %(default)s)')
    add('--batch', type=number(int, 1), default=64, help='pairs at once (default: %(default)s)')
    add('--float32', action='store_true', help='no bfloat16 (default: as the run was trained)')
    add('-o', '--output', metavar='FILE', help='--regions: a picture, .png or .svg')
    return parser.parse_args(words)


command = parse_args() if __name__ == '__main__' else None      # before torch is loaded: --help and a typo answer at once

import huggingface_hub  # noqa: E402
import torch            # noqa: E402
from safetensors import SafetensorError     # noqa: E402
from tqdm import tqdm   # noqa: E402
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging     # noqa: E402

import robust           # noqa: E402


# ---------------------------------------------------------------- predicting

def device_and_dtype(float32=False):
    """Where to compute, and in what: (torch.device, autocast dtype). bfloat16 where the hardware multiplies it."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if device.type == 'cuda':
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = getattr(torch.cpu, 'get_capabilities', dict)()
        fast = bool(cpu.get('avx512_bf16') or cpu.get('amx_bf16'))
    return device, torch.bfloat16 if fast and not float32 else torch.float32


def collate(tokenizer, pairs, max_length):
    """Tokenise pairs -> list of dicts of lists, a pair each: what `tokenizer.pad` takes."""
    encoded = tokenizer([pair.premise for pair in pairs], [pair.hypothesis for pair in pairs],
                        truncation=True, max_length=max_length)
    return [{name: encoded[name][i] for name in encoded} for i in range(len(pairs))]


def predict(model, tokenizer, pairs, *, dtype=torch.float32, batch=64, max_length=128, desc=None, delta=None, layer=0, passes=1):
    """argmax_c f(Enc(x))_c for each pair -> tensor of label indices (pairs,). Leaves the model in eval mode.

    `delta`: a function, (inputs, labels) of a batch -> the perturbation of Enc(x), which ends at `layer`.
    Of several passes the majority: with a random delta the smoothed classifier g (3.2).
    """
    model.eval()
    features = collate(tokenizer, pairs, max_length)
    # Neighbours of like length share a batch, so that little of it is padding; the longest come first,
    # so that memory that does not suffice shows at once.
    order = sorted(range(len(pairs)), key=lambda i: -len(features[i]['input_ids']))
    winners, finite = [], []
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        for start in tqdm(range(0, len(order), batch), desc=desc, leave=False, disable=desc is None or not sys.stderr.isatty(), unit='batch'):
            chosen = order[start:start + batch]
            inputs = tokenizer.pad([features[i] for i in chosen], return_tensors='pt').to(model.device)
            votes = 0
            for _ in range(passes):
                noise = contextlib.nullcontext()
                if delta:
                    labels = torch.tensor([pairs[i].label or 0 for i in chosen], device=model.device)
                    noise = robust.perturbed(model, delta(inputs, labels), layer)
                with noise, torch.inference_mode():
                    logits = model(**inputs).logits
                finite.append(logits.isfinite().all())
                votes = votes + torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1])
            winners.append(votes.argmax(-1))
    if not torch.stack(finite).all():       # at the end, as is the copy from the GPU: each would wait for it
        raise InputError(f'{model.config.name_or_path}: gives logits that are not finite; try a smaller --lr or --eps, or --float32')
    predicted = torch.empty(len(pairs), dtype=torch.long)
    predicted[order] = torch.cat(winners).cpu()
    return predicted


def marks(predicted, pairs):
    """'1' for each pair that is right and '0' for each that is wrong, as one string; None where the pairs have no labels."""
    if any(pair.label is None for pair in pairs):
        return None
    return ''.join('01'[p == pair.label] for p, pair in zip(predicted.tolist(), pairs, strict=True))


def accuracy(marks):
    """Accuracy in percent of `marks`, or None."""
    return marks and 100 * marks.count('1') / len(marks)


def read_as(model, task, data, split, lang, max_eval=None):
    """A file's pairs, their labels as the model numbers them. Raises InputError if its labels are not the task's."""
    ids = {str(name).lower(): int(i) for i, name in model.config.id2label.items()}
    if set(ids) != set(TASKS[task].labels):
        raise InputError(f'{model.config.name_or_path}: labels {", ".join(ids)}; {task} has {", ".join(TASKS[task].labels)}')
    order = [ids[label] for label in TASKS[task].labels]
    return [pair if pair.label is None else pair._replace(label=order[pair.label])
            for pair in read_pairs(path_of(data, task, split, lang), task)[:max_eval]]


def score(model, tokenizer, task, data, out, *, split='test', max_eval=None, eps=None, seed=None, **options):
    """Predict every language's SPLIT file, write out/TASK/SPLIT-LANG.tsv -> dict, language -> marks or None.

    With `eps` the smoothed classifier (3.2): uniform noise in each of `passes` passes, drawn from `seed`.
    """
    folder, found = Path(out) / task, {}
    folder.mkdir(parents=True, exist_ok=True)
    if eps is not None:
        noise = torch.Generator(model.device).manual_seed(seed)
        options['delta'] = lambda inputs, labels: robust.uniform_delta(model, inputs, eps, noise)
    for lang in TASKS[task].languages:
        pairs = read_as(model, task, data, split, lang, max_eval)
        predicted = predict(model, tokenizer, pairs, desc=f'{split}-{lang}', **options)
        with written(folder / f'{split}-{lang}.tsv') as part:
            part.write_text(''.join(f'{model.config.id2label[i]}\n'.lower() for i in predicted.tolist()))
        found[lang] = marks(predicted, pairs)
    return found


def generalized(model, tokenizer, task, data, *, langs, max_eval=None, **options):
    """The published version's generalised setting: premise in one language, hypothesis in another -> {a: {b: accuracy or None}}.

    Made from the row-aligned test files. A row whose two labels differ is left out: in PAWS-X a translator's
    'no sentence' is labelled 0. Where one language has no labels the other's serve; where neither has, None.
    """
    files = {lang: read_as(model, task, data, 'test', lang, max_eval) for lang in langs}
    if len({len(pairs) for pairs in files.values()}) > 1:
        raise InputError(f'{Path(data) / task}: test files of different lengths; --generalized needs row-aligned ones')
    found = {first: {} for first in langs}
    for first in langs:
        for second in langs:
            pairs = [a._replace(hypothesis=b.hypothesis, label=b.label if a.label is None else a.label)
                     for a, b in zip(files[first], files[second]) if None in (a.label, b.label) or a.label == b.label]
            found[first][second] = None if not pairs or pairs[0].label is None else accuracy(
                marks(predict(model, tokenizer, pairs, desc=f'{first}-{second}', **options), pairs))
    return found


def regions(model, tokenizer, task, data, *, langs, radii, steps, layer, seed, max_eval=None, **options):
    """Accuracy against the radius of the L-inf ball -> {'noise' or 'attack': {language: [accuracy per radius]}}.

    noise: delta uniform in the ball, one draw a pair; attack: `steps` sign steps from a random start (3.1's maximisation).
    """
    found = {'noise': {}, 'attack': {}}
    for lang in langs:
        pairs = read_as(model, task, data, 'test', lang, max_eval)
        for kind, rows in found.items():
            rows[lang] = []
            for eps in radii:
                ball = dict(eps=eps, generator=torch.Generator(model.device).manual_seed(seed))

                def delta(inputs, labels):
                    """A draw from the ball, or the worst point found in it."""
                    if kind == 'noise':
                        return robust.uniform_delta(model, inputs, **ball)
                    return robust.worst_delta(model, {**inputs, 'labels': labels}, steps=steps, layer=layer, **ball)
                predicted = predict(model, tokenizer, pairs, delta=delta, layer=layer, desc=f'{kind} {lang} {eps:g}', **options)
                rows[lang].append(accuracy(marks(predicted, pairs)))
    return found


# ---------------------------------------------------------------- models and run folders

UNREADABLE = (OSError, ValueError, RuntimeError, SafetensorError)     # what from_pretrained raises on broken files


def load_encoder(name, task, freeze_embeddings=False, layer=0):
    """The pre-trained encoder with a new head, its labels named. Raises InputError if it cannot be had or lacks the layer."""
    labels, reason, local = TASKS[task].labels, None, Path(name).exists()
    quiet()
    if not local:
        try:
            huggingface_hub.model_info(name, timeout=10)
        except Exception as error:      # ask the hub once: without a network from_pretrained would for a minute, the cache may do
            reason, local = error, True
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
        model = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=len(labels), local_files_only=local, id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)})
    except UNREADABLE as error:
        raise InputError(f'--model {name}: cannot be had ({str(reason or error).splitlines()[0]}). Give a folder with config.json, '
                         'model.safetensors and tokenizer.json; `python train.py --task sample --method rs_r` needs none') from None
    try:
        robust.end_of_enc(model, layer)
    except ValueError as error:
        raise InputError(f'{name}: {error}') from None
    model.get_input_embeddings().weight.requires_grad_(not freeze_embeddings)
    return model, tokenizer


def load(folder):
    """A sequence classifier and its tokenizer from a Hugging Face folder or name. Raises InputError."""
    quiet()
    try:
        return AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    except UNREADABLE as error:
        raise InputError(f'{folder}: not a Hugging Face classifier ({str(error).splitlines()[0]})') from None


def quiet():
    """Silence transformers' reports (a new head, tokenizer hints): one progress bar is enough."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'      # else it warns when the data worker is forked


def read_results(run):
    """The results.json of a run folder -> dict. Raises InputError."""
    try:
        results = json.loads((Path(run) / 'results.json').read_text())
        _ = results['args']['task'], results['args']['method'], results['dtype'], results['test'].items(), results['test_marks'].items()
        return results
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f'{run}: no results.json of train.py in it; expected a run folder, or --task for another classifier') from None


def write_results(run, results):
    """Write RUN/results.json."""
    with written(Path(run) / 'results.json') as part:
        part.write_text(json.dumps(results, indent=1))


class Run:
    """A run folder: its results, and its model once something has to be measured."""

    def __init__(self, folder, args=None):
        args = args or parse_args([str(folder)])
        self.folder, self.name, self.foreign = folder, Path(folder).name, bool(args.task) and not (Path(folder) / 'results.json').exists()
        if self.foreign:
            self.results = {'dtype': None, 'args': {'task': args.task, 'method': self.name, 'eps': None, 'seed': None, 'layer': 0, 'epochs': None,
                                                    'data': args.data or 'download', 'max_length': 128, 'max_eval': args.max_eval}}
        else:
            self.results = read_results(folder)
        self.trained = self.results['args']
        self.task, self.data = self.trained['task'], args.data or self.trained['data']
        self.max_eval = args.max_eval or self.trained['max_eval']
        self.device, self.dtype = device_and_dtype(args.float32 or self.results['dtype'] == 'torch.float32')
        self.options = dict(dtype=self.dtype, batch=args.batch, max_length=self.trained['max_length'])

    def measure(self, function, *where, **settings):
        """function(model, tokenizer, task, data, *where, **settings) on this run's model."""
        model, tokenizer = load(self.folder)
        try:
            return function(model.to(self.device), tokenizer, self.task, self.data, *where, **settings, **self.options)
        except torch.OutOfMemoryError as error:
            raise InputError(f'{self.folder}: out of GPU memory ({str(error).split(".")[0]}); try a smaller --batch') from None

    def kept(self, name, function, *where, **settings):
        """`measure`, unless results.json holds it under `name`, made with the same settings."""
        for held in self.results.get(name, ()):
            if held['settings'] == settings:
                return held['found']
        found = self.measure(function, *where, **settings)
        self.results.setdefault(name, []).append({'settings': settings, 'found': found})
        self.write()
        return found

    def smoothed(self, passes, eps, seed):
        """Accuracy of the smoothed classifier g per language."""
        eps = self.trained['eps'] if eps is None else eps
        if eps is None:
            raise InputError(f'{self.folder}: {self.trained["method"]} has no eps of its own; say --eps with --smooth')
        found = self.kept('smoothed', score, Path(self.folder) / 'predictions-smoothed', passes=passes, eps=eps, layer=self.trained['layer'],
                          seed=seed, max_eval=self.max_eval)
        return {lang: accuracy(row) for lang, row in found.items()}

    def score(self):
        """Score the test files anew."""
        found = self.measure(score, Path(self.folder) / 'predictions', max_eval=self.max_eval)
        self.results |= {'test': {lang: accuracy(row) for lang, row in found.items()}, 'test_marks': found, 'files': digests(self.data, self.task)}
        self.write()

    def write(self):
        """Keep the results, in a folder that train.py wrote."""
        if not self.foreign:
            write_results(self.folder, self.results)


# ---------------------------------------------------------------- tables

def render(head, rows, markdown=False):
    """A table as text or for a README: `head` names the columns, a row is (name, cells)."""
    if markdown:
        return '\n'.join(f'| {" | ".join(row)} |' for row in [['', *head], ['---'] * (len(head) + 1), *([name, *cells] for name, cells in rows)])
    first, widths = max(len(name) for name, _ in rows), [max(6, len(column) + 1) for column in head]
    return '\n'.join(f'{name:{first}}' + ''.join(f'{cell:>{width}}' for cell, width in zip(cells, widths)) for name, cells in [('', head), *rows])


def with_average(scores, form='{:.1f}'):
    """Cells of {language: number or None}, and the average over those that are there."""
    known = [score for score in scores.values() if score is not None]
    return ['-' if score is None else form.format(score) for score in [*scores.values(), sum(known) / len(known) if known else None]]


def unlabelled(scores):
    """The note under a table in which languages have no labels, or nothing."""
    missing = [lang for lang, score in scores.items() if score is None]
    return [f'-: no labels in the file ({", ".join(missing)}); not in the average. XTREME\'s script strips them from the '
            'test files; `python data.py TASK` fetches the files with labels'] if missing else []


def groups_of(runs):
    """Runs that may be compared: same task, data, model and budget -> list of lists. RS-A's epochs, over its own data, are no budget."""
    groups = []
    for run in sorted(runs, key=lambda run: run.trained['method'] == 'rs_a'):
        setting = {name: value for name, value in run.trained.items() if name not in NEVER_COMPARED} | {'files': run.results.get('files')}
        epochs = run.trained['epochs'] if run.trained['method'] != 'rs_a' else None
        fitting = [group for group in groups if group[0] == setting and (epochs is None or epochs == group[1])]
        for group in fitting or [(setting, epochs, [])]:
            group[2].append(run)
            groups += [group] * (not fitting)
    return [runs for _, _, runs in groups]


def by_variant(runs):
    """The runs of a group by method and its own arguments, then by eps -> {label: {eps: runs}}, in the order of the paper's tables."""
    found = {}
    for run in runs:
        own = tuple((name, run.trained.get(name)) for name in (*OWN.get(run.trained['method'], ()), *['epochs'] * (run.trained['method'] == 'rs_a')))
        found.setdefault((run.trained['method'], own), {}).setdefault(run.trained['eps'], []).append(run)
    labelled = {}
    for (method, own), by_eps in sorted(found.items(), key=lambda item: [*OWN, item[0][0]].index(item[0][0])):
        others = [other for name, other in found if name == method and other != own]
        label = ' '.join([method, *(f'{name}={value}' for name, value in own if any(dict(other)[name] != value for other in others))])
        labelled[label] = dict(sorted(by_eps.items(), key=lambda item: item[0] or 0))
    return labelled


def correct(runs, known, name='test_marks'):
    """Which test items each run has right: float64 (seeds, items, languages)."""
    rows = [[[int(mark) for mark in run.results[name][lang]] for lang in known] for run in runs]
    if len({len(row) for seed in rows for row in seed}) > 1:
        raise InputError(f'{runs[0].folder}: files of different lengths; a comparison needs row-aligned ones')
    return torch.tensor(rows, dtype=torch.double).transpose(1, 2)


def averaged(scores):
    """Append the average over languages: (..., languages) -> (..., languages + 1)."""
    return torch.cat([scores, scores.mean(-1, keepdim=True)], -1)


def interval(ours, plain, resamples=2000, seed=0):
    """The difference in accuracy, in points, and its 95% interval by a paired bootstrap over test items: three (languages + 1,).

    `ours`, `plain`: as `correct`. The items of a row are translations of one another and are drawn together,
    as are its seeds: what the interval covers is the choice of the test items, not of the seeds.
    """
    difference = 100 * averaged(ours.mean(0) - plain.mean(0))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([difference[torch.randint(len(difference), (len(difference),), generator=generator)].mean(0) for _ in range(resamples)])
    return difference.mean(0), *drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.double), dim=0)


def chosen_eps(by_eps, scores):
    """The eps with the best mean score over its seeds; of equals the smallest."""
    return max(by_eps, key=lambda eps: sum(scores(run) for run in by_eps[eps]) / len(by_eps[eps]))


def oracle(by_eps, known):
    """Test accuracy where each language chooses eps on its own dev file: (languages,). None where that was not scored."""
    if len(by_eps) < 2 or not all('dev_marks' in run.results for runs in by_eps.values() for run in runs):
        return None
    best = [by_eps[chosen_eps(by_eps, lambda run: accuracy(run.results['dev_marks'][-1]['found'][lang]))] for lang in known]
    return torch.stack([100 * correct(runs, [lang]).mean() for runs, lang in zip(best, known)])


def comparison(runs):
    """The rows and notes of one group's table: ours, its deviation over seeds, the difference to plain, the paper's own row."""
    task, variants, rows, notes = runs[0].task, by_variant(runs), [], []
    languages = TASKS[task].languages
    known = [lang for lang in languages if all(run.results['test_marks'][lang] is not None for run in runs)]

    def add(name, values, form='{:.1f}'):
        """Append a row; `values`: of the known languages and their average."""
        cells = dict(zip([*known, 'avg.'], values))
        rows.append((name, [form.format(float(cells[lang])) if lang in cells else '-' for lang in [*languages, 'avg.']]))

    def add_paper(name):
        """Append the paper's own row, averaged over the languages known here."""
        printed = dict(zip(languages, PAPER.get(task, {}).get(name, '').split()))
        if printed:
            add(f'  paper, {name}', averaged(torch.tensor([float(printed[lang]) for lang in known])))
    plain = next((correct(by_eps[None], known) for label, by_eps in variants.items() if label == 'plain' and known), None)
    add_paper('mBERT*')
    for label, by_eps in variants.items():
        eps = chosen_eps(by_eps, lambda run: run.results.get('dev', 0))
        ours = correct(by_eps[eps], known) if known else torch.zeros(len(by_eps[eps]), 1, 0)
        scores = averaged(100 * ours.mean(1))
        add(label + ('' if eps is None else f' {eps:g}'), scores.mean(0))
        if len(scores) > 1:
            add(f'  sd of {len(scores)} seeds', scores.std(0))
        if plain is not None and label != 'plain':
            for name, values in zip(('  minus plain', '    95% from', '    to'), interval(ours, plain)):
                add(name, values, '{:+.1f}')
        best = oracle(by_eps, known)
        if best is not None:
            add('  oracle eps', averaged(best))
        add_paper(label.split()[0])
        if len(by_eps) > 1:
            notes.append(f'{label}: eps by English dev, mean over seeds: ' + ', '.join(
                f'{e:g} {sum(run.results["dev"] for run in found) / len(found):.1f} (n={len(found)})' for e, found in by_eps.items()))
    return rows, notes + unlabelled({lang: lang in known or None for lang in languages})


def report(runs, markdown=False):
    """Print Tables 1 and 2 from runs: one table for each group of runs that belong together."""
    groups = groups_of(runs)
    for group in groups:
        own = {name: value for name, value in group[0].trained.items() if name not in NEVER_COMPARED}
        others = [{**other[0].trained, 'files': other[0].results.get('files')} for other in groups if other is not group]
        differing = [f'{name}={value}' for name, value in own.items() if any(other.get(name) != value for other in others)]
        differing += ['other data files'] * any(other['files'] != group[0].results.get('files') for other in others if other['task'] == own['task'])
        rows, notes = comparison(group)
        print(f'{own["task"]}, test accuracy in percent' + ''.join(f', {part}' for part in differing if not part.startswith('task=')))
        print(render([*TASKS[own['task']].languages, 'avg.'], rows, markdown), *notes, sep='\n', end='\n\n' if group is not groups[-1] else '\n')


# ---------------------------------------------------------------- the command line

def picture(runs, found, radii, path):
    """--regions as a picture: a panel a language, a colour a run, solid under noise, dashed under attack."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError('-o needs matplotlib: pip install matplotlib') from None
    langs = list(found[0]['noise'])
    columns = min(4, len(langs))
    drawing = Figure(figsize=(2.6 * columns + 1, 2.2 * -(-len(langs) // columns) + 0.5), layout='constrained')
    panels = drawing.subplots(-(-len(langs) // columns), columns, sharex=True, sharey=True, squeeze=False).flat
    for lang, axes in zip(langs, panels):
        for number, (run, rows) in enumerate(zip(runs, found)):
            for kind, style in (('noise', '-'), ('attack', '--')):
                axes.plot(range(len(radii)), rows[kind][lang], style, color=f'C{number}', label=f'{run.name}, {kind}')
        axes.set(title=lang, xticks=range(len(radii)), xticklabels=[f'{radius:g}' for radius in radii])
    for axes in list(panels):
        axes.axis('off')
    drawing.supxlabel('radius')
    drawing.supylabel('accuracy (%)')
    drawing.legend(*drawing.axes[0].get_legend_handles_labels(), loc='outside upper center', ncols=2)
    save_picture(drawing, path)


def save_picture(drawing, path):
    """Write a matplotlib figure. Raises InputError where the ending of `path` is no picture's."""
    try:
        with written(path) as part:
            drawing.savefig(part, dpi=150)
    except ValueError as error:
        raise InputError(f'{path}: {error}') from None


def main(args):
    """Measure what is asked for where results.json does not hold it, and print it."""
    runs = [Run(folder, args) for folder in args.runs]
    measuring = args.split == 'dev' or args.generalized or args.smooth or args.regions
    if measuring and len({run.task for run in runs}) > 1:
        raise InputError(f'{" ".join(args.runs)}: runs of several tasks; name those of one')
    found = []
    for run in runs:
        langs = args.langs or list(TASKS[run.task].languages)
        if set(langs) - set(TASKS[run.task].languages):
            raise InputError(f'--langs {" ".join(langs)}: {run.task} has {" ".join(TASKS[run.task].languages)}')
        if args.split == 'dev':
            marked = run.kept('dev_marks', score, Path(run.folder) / 'predictions', split='dev', max_eval=run.max_eval)
            found.append({lang: accuracy(row) for lang, row in marked.items()})
        elif args.generalized:
            found.append(run.kept('generalized', generalized, langs=langs, max_eval=run.max_eval))
        elif args.smooth:
            found.append(run.smoothed(args.smooth, args.eps, args.seed))
        elif args.regions:
            found.append(run.kept('regions', regions, langs=langs, radii=list(args.radii), steps=args.steps, layer=run.trained['layer'],
                                  seed=args.seed, max_eval=run.max_eval))
        elif run.foreign or args.data:
            run.score()
    if args.split == 'dev' or args.smooth:
        print(f'{runs[0].task}, {args.split}, accuracy in percent' + f', majority over {args.smooth} noisy passes' * bool(args.smooth))
        print(render([*found[0], 'avg.'], [(run.name, with_average(scores)) for run, scores in zip(runs, found)], args.markdown))
    elif args.generalized:
        for run, rows in zip(runs, found):
            off = [value for first, row in rows.items() for second, value in row.items() if first != second and value is not None]
            print(f'{run.name}: premise down, hypothesis across; mean off the diagonal {sum(off) / max(len(off), 1):.1f} ({len(off)} pairs)')
            print(render(list(rows), [(first, with_average(row)[:-1]) for first, row in rows.items()], args.markdown))
    elif args.regions:
        for run, rows in zip(runs, found):
            print(f'{run.name}: accuracy in percent against the radius')
            print(render([f'{radius:g}' for radius in args.radii], [(f'{lang} {kind}', with_average(dict(enumerate(row)))[:-1])
                         for kind, by_lang in rows.items() for lang, row in by_lang.items()], args.markdown))
        if args.output:
            picture(runs, found, args.radii, args.output)
    else:
        report(runs, args.markdown)


if __name__ == '__main__':
    main(command)
