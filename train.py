"""Fine-tune a multilingual encoder on English with one of the paper's four methods, then score every language.

    python train.py --task pawsx --method rs_r --eps 0.1
    python train.py --task sample --method rs_r --eps 0.1       the same without any download

The run folder holds a Hugging Face checkpoint, the best by English dev accuracy, and results.json.
"""

import argparse
import functools
import json
import math
import os
import platform
import shutil
import sys
import time
from pathlib import Path

from data import TASKS, InputError, describe, path_of, prepare, read_pairs

METHODS = ('plain', 'adv', 'rs_r', 'rs_a')
MBERT, NEIGHBOURS = 'bert-base-multilingual-cased', '{data}/synonyms/counterfitted_neighbors.json'
# XTREME: its published scripts; authors: uclanlp/Robust-XLT, which has RS-A alone. The sample world's are ours.
DEFAULTS = {
    #                     pawsx       xnli        sample                         source of the first two
    'model':             (MBERT,      MBERT,      '{data}/sample/model'),        # paper
    'lr':                (2e-5,       2e-5,       1e-3),                         # XTREME, authors
    'epochs':            (5,          2,          4),                            # XTREME's script, XTREME's paper
    'epochs_rs_a':       (3,          1,          0.4),                          # authors: over the augmented data
    'batch':             (32,         32,         64),                           # XTREME, authors: 8 x 4 accumulated
    'warmup':            (0.0,        0.0,        0.05),                         # XTREME, authors
    'eval_steps':        (200,        1000,       250),                          # XTREME, authors
    'freeze_embeddings': (False,      False,      True),                         # XTREME, authors
    'synonyms':          (NEIGHBOURS, NEIGHBOURS, '{data}/sample/synonyms.json'),  # paper: Alzantot et al.
    'plain_steps':       (0,          0,          750),                          # paper
    'float32':           (False,      False,      True),                         # ours
}


def number(kind, low, below=math.inf):
    """An argparse type: an int or a float, low <= value < below."""
    def parse(text):
        value = kind(text)
        if not low <= value < below:
            raise argparse.ArgumentTypeError(f'{text}: expected {low} or above' + f' and below {below:g}' * (below < math.inf))
        return value
    parse.__name__ = kind.__name__      # argparse names it where kind(text) fails
    return parse


def parse_args():
    """The command line; what is not given takes the task's default."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     usage='%(prog)s --task TASK --method METHOD [options]      (all of them: --help)')
    add = parser.add_argument
    count, positive = number(int, 1), number(float, sys.float_info.min)

    def by_task(name, text, **options):
        shown = ', '.join(f'{task} {value}' for task, value in zip(TASKS, DEFAULTS[name]))
        if name == 'epochs':
            shown += '; rs_a, over the augmented set: {}, {}, {}'.format(*DEFAULTS['epochs_rs_a'])
        add('--' + name.replace('_', '-'), default=argparse.SUPPRESS, help=f'{text} (default: {shown})'.format(data='DATA'), **options)

    add('--task', choices=TASKS, required=True)
    add('--method', choices=METHODS, required=True)
    add('--eps', type=number(float, 0), default=0.1, help='adv, rs_r: radius of the L-inf ball (paper: one of 0.001 0.01 0.1 1.0)')
    add('--layer', type=int, default=0, help='adv, rs_r: where Enc(x) ends: 0 word embeddings, k the k-th layer, -1 the last')
    add('--adv-steps', type=count, default=1, help='adv: sign steps K of the inner maximisation')
    add('--adv-step-size', type=positive, help='adv: their size in units of eps; None: 2.5 / (K + 1)')
    by_task('plain_steps', 'adv: begin with N steps of plain training', type=number(int, 0), metavar='N')
    add('--m', type=count, default=10, help='rs_a: augmented copies of each pair (paper: 10)')
    add('--p', type=number(float, 0, 1 + 1e-9), default=0.1, help='rs_a: probability that a word is replaced (paper: 0.1)')
    by_task('synonyms', 'rs_a: neighbour file')
    by_task('model', 'any Hugging Face encoder, by name or folder')
    add('--data', default='download', help='folder in XTREME\'s layout')
    add('--out', default=argparse.SUPPRESS, help='run folder (default: runs/TASK-METHOD-EPS-SEED)')
    by_task('epochs', 'passes over the training set', type=positive)
    by_task('lr', 'peak learning rate, linear decay to 0', type=positive)
    by_task('warmup', 'fraction of the steps in which the learning rate rises', type=number(float, 0, 1))
    by_task('batch', 'pairs per step', type=count)
    add('--max-length', type=count, default=128, help='tokens per pair, at most')
    by_task('eval_steps', 'English dev accuracy every N steps', type=count, metavar='N')
    add('--max-steps', type=count, help='stop after N steps, the schedule shortened to them')
    add('--max-train', type=count, help='train on the first N pairs only')
    by_task('freeze_embeddings', 'keep the word embeddings as pre-trained', action=argparse.BooleanOptionalAction)
    by_task('float32', 'no bfloat16 autocast, whatever the hardware', action=argparse.BooleanOptionalAction)
    add('--seed', type=number(int, 0, 2 ** 63), default=42)
    args = parser.parse_args()
    size = f'-{args.eps:g}' if args.method in ('adv', 'rs_r') else ''
    defaults = {name: by_task[list(TASKS).index(args.task)] for name, by_task in DEFAULTS.items()}
    defaults['out'] = f'runs/{args.task}-{args.method}{size}-seed{args.seed}'
    epochs_rs_a = defaults.pop('epochs_rs_a')
    if args.method == 'rs_a':
        defaults['epochs'] = epochs_rs_a
    for name, value in defaults.items():
        if name not in args:
            setattr(args, name, value.format(data=args.data) if isinstance(value, str) else value)
    return args


args = parse_args() if __name__ == '__main__' else None     # before torch is loaded: --help and a typo answer at once

import huggingface_hub  # noqa: E402
import tokenizers       # noqa: E402
import torch            # noqa: E402
import transformers     # noqa: E402
from torch.utils.data import DataLoader, IterableDataset    # noqa: E402
from tqdm import tqdm   # noqa: E402

import evaluate         # noqa: E402
import robust           # noqa: E402
import synonyms         # noqa: E402

POOL = 64       # batches that are tokenised together and sorted by length (ours)


class Batches(IterableDataset):
    """The training set as tokenised batches, epoch after epoch: each epoch in an order of its own, from the seed.

    Pairs of like length share a batch, padded to its longest and not to `max_length`: within pools of
    64 batches, which come in random order. RS-A's copies are made here, as they are needed. It runs in
    a worker process, ahead of the training step.
    """

    def __init__(self, pairs, tokenizer, args, neighbours=None):
        self.pairs, self.tokenizer, self.args, self.neighbours = pairs, tokenizer, args, neighbours
        self.rows = len(pairs) * (args.m if neighbours else 1)

    def __iter__(self):
        """Yield dicts of tensors (B, T) and `labels` (B,), without end."""
        for epoch in range(sys.maxsize):
            generator = torch.Generator().manual_seed(self.args.seed + 1_000_003 * epoch)
            for pool in torch.randperm(self.rows, generator=generator).split(POOL * self.args.batch):
                chosen = [self.row(row) for row in pool.tolist()]
                features = evaluate.collate(self.tokenizer, chosen, self.args.max_length)
                for feature, pair in zip(features, chosen):
                    feature['labels'] = pair.label
                features.sort(key=lambda feature: len(feature['input_ids']))
                batches = [features[i:i + self.args.batch] for i in range(0, len(features), self.args.batch)]
                for i in torch.randperm(len(batches), generator=generator).tolist():
                    yield dict(self.tokenizer.pad(batches[i], return_tensors='pt'))

    def row(self, row):
        """The row-th pair of the training set, for RS-A of the m times larger augmented one."""
        pair = self.pairs[row % len(self.pairs)]
        if not self.neighbours:
            return pair
        return synonyms.augment(pair, self.neighbours, self.args.p, self.args.seed, row // len(self.pairs))


def objective_of(args, device):
    """The loss to minimise, (model, batch) -> scalar. Its noise has a generator of its own: see robust.py."""
    noise = dict(eps=args.eps, layer=args.layer, generator=torch.Generator(device).manual_seed(args.seed))
    return {
        'plain': robust.plain,
        'adv': functools.partial(robust.adv, steps=args.adv_steps, step_size=args.adv_step_size, **noise),
        'rs_r': functools.partial(robust.rs_r, **noise),
        'rs_a': robust.rs_a,
    }[args.method]


def train(model, tokenizer, objective, pairs, dev, args, dtype, neighbours=None):
    """min_f of the objective over X_src: the one training loop, whatever the method.

    AdamW (eps 1e-8, no weight decay), linear decay, gradient norm clipped at 1.0 (XTREME and authors).
    Writes the checkpoint with the best English dev accuracy to args.out. Returns the results so far.
    """
    batches = Batches(pairs, tokenizer, args, neighbours)
    epoch_steps = math.ceil(batches.rows / args.batch)
    steps = min(args.max_steps or math.inf, math.ceil(args.epochs * epoch_steps))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, eps=1e-8, weight_decay=0.0, fused=True)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, round(args.warmup * steps), steps)
    loader = iter(DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=16, pin_memory=model.device.type == 'cuda'))
    plain_steps = args.plain_steps if args.method == 'adv' else 0
    best, history, seen, spent = {'dev': -1.0, 'step': 0}, [], 0, 0.0
    quiet = not sys.stderr.isatty()     # in a log file, a line every half minute
    with tqdm(total=steps * args.batch, unit='pair', desc=args.method, mininterval=30 if quiet else 0.1, dynamic_ncols=True) as bar:
        started = time.perf_counter()
        for step in range(1, steps + 1):
            batch = {name: value.to(model.device, non_blocking=True) for name, value in next(loader).items()}
            model.train()
            with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
                loss = (robust.plain if step <= plain_steps else objective)(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            seen += len(batch['labels'])
            if step % 10 == 0 or step == steps:     # not each step: reading the loss waits for the GPU
                if not math.isfinite(loss.item()):
                    raise InputError(f'step {step}: the loss is {loss.item()}; try a smaller --lr or --eps, or --float32')
                bar.set_postfix(loss=f'{loss.item():.3f}', dev=f'{max(best["dev"], 0):.1f}', refresh=False)
            bar.update(len(batch['labels']))
            if step % args.eval_steps == 0 or step == steps:
                spent += time.perf_counter() - started
                predicted = evaluate.predict(model, tokenizer, dev, dtype=dtype, max_length=args.max_length)
                history.append({'step': step, 'loss': loss.item(), 'dev': evaluate.accuracy(predicted, dev)})
                if history[-1]['dev'] > best['dev']:        # strictly greater, as XTREME
                    best = {'dev': history[-1]['dev'], 'step': step}
                    save(model, tokenizer, args.out)
                started = time.perf_counter()
    return {**best, 'history': history, 'steps': steps, 'pairs_per_second': seen / spent}


def save(model, tokenizer, out):
    """Write the checkpoint beside, then move it in, file by file: `out` never holds half a file."""
    part = Path(out) / 'checkpoint.part'
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    for file in part.iterdir():
        os.replace(file, Path(out) / file.name)
    shutil.rmtree(part)


def load_encoder(name, task, freeze_embeddings=False, layer=0):
    """The pre-trained encoder with a new head, its labels named. Raises InputError if it cannot be had or lacks the layer."""
    labels, reason, local = TASKS[task].labels, None, Path(name).exists()
    evaluate.quiet()
    if not local:
        try:
            huggingface_hub.model_info(name, timeout=10)
        except Exception as error:      # ask the hub once: without a network from_pretrained would for a minute, the cache may do
            reason, local = error, True
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
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


def peak_memory(device):
    """Peak memory in GiB: the GPU's allocations, or on the CPU this process's resident set."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == 'linux' else 30)


def finished(args):
    """The results that args.out holds already, None if there are none. Raises InputError if other arguments made them."""
    path = Path(args.out) / 'results.json'
    if not path.exists():
        return None
    results = json.loads(path.read_text())
    differing = sorted(name for name in vars(args) if results['args'].get(name) != getattr(args, name))
    if differing:
        raise InputError(f'{args.out}: holds a run with other arguments ({", ".join(differing)}); name another folder with --out')
    print(f'{args.out}: this run is finished', file=sys.stderr)
    return results


def main(args):
    """Train one run, score every language, write results.json, print the table."""
    results = finished(args)
    if results is None:
        began = time.perf_counter()
        prepare(args.data, args.task)
        neighbours = synonyms.read_synonyms(args.synonyms) if args.method == 'rs_a' else None
        paths = [path_of(args.data, args.task, split, 'en') for split in ('train', 'dev')]
        pairs, dev = (read_pairs(path, args.task) for path in paths)
        for path, rows in zip(paths, (pairs, dev)):
            if rows[0].label is None:
                raise InputError(f'{path}: no labels; training needs them')
            print(describe(path, rows), file=sys.stderr)
        for lang in TASKS[args.task].languages:     # a broken test file shows now, not after the training
            read_pairs(path_of(args.data, args.task, 'test', lang), args.task)
        device, dtype = evaluate.device_and_dtype(args.float32 or args.layer != 0)     # above layer 0 noise would be rounded
        torch.manual_seed(args.seed)
        model, tokenizer = load_encoder(args.model, args.task, args.freeze_embeddings, args.layer)
        Path(args.out).mkdir(parents=True, exist_ok=True)
        results = train(model.to(device), tokenizer, objective_of(args, device), pairs[:args.max_train], dev, args, dtype, neighbours)
        model, tokenizer = evaluate.load(args.out)
        results['test'] = evaluate.score(model.to(device), tokenizer, args.task, args.data, Path(args.out) / 'predictions',
                                         dtype=dtype, max_length=args.max_length)
        results |= {'args': vars(args), 'seed': args.seed, 'dtype': str(dtype), 'peak_memory_gib': peak_memory(device),
                    'wall_seconds': time.perf_counter() - began,
                    'device': torch.cuda.get_device_name() if device.type == 'cuda' else f'{platform.machine()}, {torch.get_num_threads()} threads',
                    'versions': {'python': platform.python_version(), 'torch': torch.__version__,
                                 'transformers': transformers.__version__, 'tokenizers': tokenizers.__version__}}
        part = Path(args.out) / 'results.json.part'
        part.write_text(json.dumps(results, indent=1))
        os.replace(part, Path(args.out) / 'results.json')
    print(f'{args.out}: English dev {results["dev"]:.1f} at step {results["step"]}; test accuracy in percent:')
    print(evaluate.table({args.method: results['test']}))


if __name__ == '__main__':
    main(args)
