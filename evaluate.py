"""Score fine-tuned classifiers in every language of their task.

    python evaluate.py RUN [RUN ...]                    the test files; RUN is a folder that train.py wrote
    python evaluate.py RUN --split dev --data DIR       the dev files

Prints accuracy in percent per language and the average, English included (as the paper's tables), and
writes RUN/predictions/TASK/SPLIT-LANG.tsv, one label a line: the form XTREME's evaluation takes.
A file without labels is predicted but never scored: its language shows '-' and is not in the average.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import huggingface_hub
import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

import robust
from data import TASKS, InputError, path_of, read_pairs


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


@torch.inference_mode()
def predict(model, tokenizer, pairs, *, dtype=torch.float32, batch=64, max_length=128, desc=None):
    """argmax_c f(Enc(x))_c for each pair -> tensor of label indices (pairs,). Leaves the model in eval mode."""
    model.eval()
    features = collate(tokenizer, pairs, max_length)
    # Neighbours of like length share a batch, so that little of it is padding; the longest come first,
    # so that memory that does not suffice shows at once.
    order = sorted(range(len(pairs)), key=lambda i: -len(features[i]['input_ids']))
    predicted = torch.empty(len(pairs), dtype=torch.long)
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        for start in tqdm(range(0, len(order), batch), desc=desc, leave=False, disable=desc is None or not sys.stderr.isatty(), unit='batch'):
            chosen = order[start:start + batch]
            inputs = tokenizer.pad([features[i] for i in chosen], return_tensors='pt').to(model.device)
            predicted[chosen] = model(**inputs).logits.argmax(-1).cpu()
    return predicted


def marks(predicted, pairs):
    """'1' for each pair that is right and '0' for each that is wrong, as one string; None where the pairs have no labels."""
    if any(pair.label is None for pair in pairs):
        return None
    return ''.join('01'[p == pair.label] for p, pair in zip(predicted.tolist(), pairs, strict=True))


def accuracy(marks):
    """Accuracy in percent of `marks`, or None."""
    return marks and 100 * marks.count('1') / len(marks)


def score(model, tokenizer, task, data, out, *, split='test', max_eval=None, **options):
    """Predict every language's SPLIT file, write out/TASK/SPLIT-LANG.tsv -> dict, language -> marks or None."""
    folder = Path(out) / task
    folder.mkdir(parents=True, exist_ok=True)
    scores = {}
    for lang in TASKS[task].languages:
        pairs = read_pairs(path_of(data, task, split, lang), task)[:max_eval]
        predicted = predict(model, tokenizer, pairs, desc=f'{split}-{lang}', **options)
        part = folder / f'{split}-{lang}.tsv.part'
        part.write_text(''.join(f'{TASKS[task].labels[i]}\n' for i in predicted))
        os.replace(part, folder / f'{split}-{lang}.tsv')
        scores[lang] = marks(predicted, pairs)
    return scores


def table(rows):
    """A text table of {name: {language: accuracy or None}}, with the average over the languages that have labels."""
    languages = list(next(iter(rows.values())))
    width = max(map(len, rows))
    lines = [f'{"":{width}}' + ''.join(f'{lang:>6}' for lang in languages) + '   avg.']
    for name, scores in rows.items():
        known = [score for score in scores.values() if score is not None]
        cells = ''.join('     -' if scores[lang] is None else f'{scores[lang]:6.1f}' for lang in languages)
        lines.append(f'{name:{width}}{cells}' + (f'{sum(known) / len(known):7.1f}' if known else '      -'))
    missing = [lang for lang in languages if any(scores[lang] is None for scores in rows.values())]
    if missing:
        lines.append(f'-: no labels in the file ({", ".join(missing)}); not in the average. XTREME\'s script strips them from the '
                     'test files; `python data.py TASK` fetches the files with labels')
    return '\n'.join(lines)


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
    except (OSError, ValueError) as error:
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
    except (OSError, ValueError) as error:
        raise InputError(f'{folder}: not a Hugging Face classifier ({str(error).splitlines()[0]})') from None


def read_results(run):
    """The results.json of a run folder -> dict. Raises InputError."""
    try:
        results = json.loads((Path(run) / 'results.json').read_text())
        _ = results['args'], results['dtype'], results['test']
        return results
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f'{run}: no results.json of train.py in it; expected a run folder') from None


def write_results(run, results):
    """Write RUN/results.json beside, then move it in."""
    part = Path(run) / 'results.json.part'
    part.write_text(json.dumps(results, indent=1))
    os.replace(part, Path(run) / 'results.json')


def report(runs):
    """Print the tables of runs."""
    print(table({Path(run).name: read_results(run)['test'] for run in runs}))


def quiet():
    """Silence transformers' reports (a new head, tokenizer hints): one progress bar is enough."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'      # else it warns when the data worker is forked


def main():
    """The command line: score runs, print one table a task."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], epilog='See the top of evaluate.py for what is written.')
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder that train.py wrote')
    parser.add_argument('--split', choices=('test', 'dev'), default='test')
    parser.add_argument('--data', help='folder in XTREME\'s layout (default: the one the run was trained on)')
    parser.add_argument('--batch', type=int, default=64, help='pairs at once (default: %(default)s)')
    parser.add_argument('--float32', action='store_true', help='no bfloat16 (default: as the run was trained)')
    args = parser.parse_args()
    tables = {}
    for run in args.runs:
        results = read_results(run)
        trained, float32 = results['args'], results['dtype'] == 'torch.float32'
        model, tokenizer = load(run)
        task = trained['task']
        device, dtype = device_and_dtype(args.float32 or float32)
        if tuple(model.config.id2label[i] for i in range(model.config.num_labels)) != TASKS[task].labels:
            raise InputError(f'{run}: labels {list(model.config.id2label.values())}; {task} has {list(TASKS[task].labels)}')
        tables.setdefault(task, {})[Path(run).name] = score(
            model.to(device), tokenizer, task, args.data or trained['data'], Path(run) / 'predictions', split=args.split,
            dtype=dtype, batch=args.batch, max_length=trained['max_length'])
    for task, rows in tables.items():
        print(f'{task}, {args.split}, accuracy in percent')
        print(table(rows))


if __name__ == '__main__':
    main()
