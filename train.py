"""Fine-tune a multilingual encoder on English with the paper's four methods, then score every language.

    python train.py --task pawsx --method rs_r --eps 0.1
    python train.py --task sample --method rs_r --eps 0.1       the same without any download
    python train.py --task pawsx --method plain adv rs_r rs_a --eps 0.001 0.01 0.1 1.0 --seed 1 2 3     all of Table 1

A run folder holds a Hugging Face checkpoint, the best by English dev accuracy, and results.json. The same
command given again skips the runs that are finished and goes on with one that was stopped. Several GPUs:
torchrun --nproc_per_node N train.py ...
"""

import argparse
import contextlib
import copy
import datetime
import itertools
import json
import math
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from data import TASKS, InputError, describe, digests, number, path_of, prepare, read_pairs, written

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


def parse_args():
    """The command line; what is not given takes the task's default."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     usage='%(prog)s --task TASK --method METHOD [options]      (all of them: --help)')
    add = parser.add_argument
    count, positive = number(int, 1), number(float, sys.float_info.min)

    def by_task(name, text, **options):
        """An option whose default depends on the task; absent from the result where not given."""
        shown = ', '.join(f'{task} {value}' for task, value in zip(TASKS, DEFAULTS[name]))
        if name == 'epochs':
            shown += '; rs_a, over the augmented set: {}, {}, {}'.format(*DEFAULTS['epochs_rs_a'])
        add('--' + name.replace('_', '-'), default=argparse.SUPPRESS, help=f'{text} (default: {shown})'.format(data='DATA'), **options)

    add('--task', choices=TASKS, required=True)
    add('--method', choices=METHODS, required=True, nargs='+', help='one run for each method, eps (adv, rs_r) and seed')
    add('--eps', type=number(float, 0), nargs='+', default=[0.1], help='adv, rs_r: radius of the L-inf ball (paper: 0.001 0.01 0.1 1.0)')
    add('--seed', type=number(int, 0, 2 ** 63), nargs='+', default=[42])
    add('--layer', type=int, default=0, help='adv, rs_r: where Enc(x) ends: 0 word embeddings, k the k-th layer, -1 the last')
    add('--adv-steps', type=count, default=1, help='adv: sign steps K of the inner maximisation')
    add('--adv-step-size', type=positive, help='adv: their size in units of eps; None: 2.5 / (K + 1)')
    by_task('plain_steps', 'adv: begin with N steps of plain training', type=number(int, 0), metavar='N')
    add('--m', type=count, default=10, help='rs_a: augmented copies of each pair (paper: 10)')
    add('--p', type=number(float, 0, 1 + 1e-9), default=0.1, help='rs_a: probability that a word is replaced (paper: 0.1)')
    add('--replace', choices=('paper', 'authors'), default='paper',
        help='rs_a: paper: each word with probability p; authors: every word, uniform over itself and its neighbours')
    add('--english-only', action='store_true', help='rs_a: only neighbours that occur in the English training file')
    by_task('synonyms', 'rs_a: neighbour file')
    by_task('model', 'any Hugging Face encoder, by name or folder')
    add('--data', default='download', help='folder in XTREME\'s layout')
    add('--out', help='run folder, of several runs the folder above them; None: runs/TASK-METHOD-EPS-SEED')
    by_task('epochs', 'passes over the training set', type=positive)
    by_task('lr', 'peak learning rate, linear decay to 0', type=positive)
    by_task('warmup', 'fraction of the steps in which the learning rate rises', type=number(float, 0, 1))
    by_task('batch', 'pairs per step, over all GPUs', type=count)
    add('--max-length', type=count, default=128, help='tokens per pair, at most')
    by_task('eval_steps', 'English dev accuracy every N steps', type=count, metavar='N')
    add('--max-steps', type=count, help='stop after N steps, the schedule shortened to them')
    add('--max-train', type=count, help='train on the first N pairs only')
    add('--max-eval', type=count, help='score the first N pairs of each dev and test file only')
    by_task('freeze_embeddings', 'keep the word embeddings as pre-trained', action=argparse.BooleanOptionalAction)
    by_task('float32', 'no bfloat16 autocast, whatever the hardware', action=argparse.BooleanOptionalAction)
    add('--dry-run', action='store_true', help='say what would be run, and stop')
    add('--benchmark', action='store_true', help='time XTREME\'s way of training against this one and each method against plain, and stop')
    return parser.parse_args()


def runs_of(args):
    """One set of arguments for each run that the command line asks for, its task's and method's defaults filled in."""
    runs = []
    defaults = {name: by_task[list(TASKS).index(args.task)] for name, by_task in DEFAULTS.items()}
    epochs_rs_a = defaults.pop('epochs_rs_a')
    for method in dict.fromkeys(args.method):
        for eps in dict.fromkeys(args.eps) if method in ('adv', 'rs_r') else [None]:
            for seed in dict.fromkeys(args.seed):
                run = copy.copy(args)
                run.method, run.eps, run.seed = method, eps, seed
                for name, value in (defaults | {'epochs': epochs_rs_a if method == 'rs_a' else defaults['epochs']}).items():
                    if name not in run:
                        setattr(run, name, value.format(data=args.data) if isinstance(value, str) else value)
                runs.append(run)
                del run.dry_run, run.benchmark
    for run in runs:
        if not args.out or len(runs) > 1:
            size = '' if run.eps is None else f'-{run.eps:g}'
            run.out = f'{args.out or "runs"}/{run.task}-{run.method}{size}-seed{run.seed}'
    return runs


command = parse_args() if __name__ == '__main__' else None      # before torch is loaded: --help and a typo answer at once

import safetensors.torch    # noqa: E402
import tokenizers       # noqa: E402
import torch            # noqa: E402
import torch.distributed as dist    # noqa: E402
import transformers     # noqa: E402
from torch.nn import functional     # noqa: E402
from torch.overrides import TorchFunctionMode   # noqa: E402
from torch.utils.benchmark import Timer     # noqa: E402
from torch.utils.data import DataLoader, IterableDataset    # noqa: E402
from torch.utils.flop_counter import FlopCounterMode    # noqa: E402
from tqdm import tqdm   # noqa: E402

import evaluate         # noqa: E402
import robust           # noqa: E402
import synonyms         # noqa: E402

POOL = 64           # batches that are tokenised together and sorted by length (ours)
STATE = 'state.safetensors'     # in the run folder while the run goes on: all that a stopped run needs
STATE_SECONDS = 300             # of training that a stopped run loses at most, beyond its last dev evaluation (ours)


def rank_and_world():
    """This process's number and how many there are, as torchrun says. (0, 1) without it."""
    return int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))


class Batches(IterableDataset):
    """The training set as tokenised batches, epoch after epoch: each epoch in an order of its own, from the seed.

    Pairs of like length share a batch, padded to its longest and not to `max_length`: within pools of
    64 batches, which come in random order. RS-A's copies are made here, as they are needed. On a GPU it runs
    in a worker process, ahead of the training step. Of several GPUs each takes its share of every batch.
    `start`: how many batches a resumed run has had already.
    """

    def __init__(self, pairs, tokenizer, args, neighbours=None, start=0):
        self.pairs, self.tokenizer, self.args, self.neighbours, self.start = pairs, tokenizer, args, neighbours, start
        self.rows = len(pairs) * (args.m if neighbours else 1)
        self.rank, self.world = rank_and_world()

    def __iter__(self):
        """Yield, without end, dicts of tensors (B, T) with `labels` (B,); the share's weight in the mean; its rows, counted from 0."""
        passed = 0
        for epoch in range(sys.maxsize):
            generator = torch.Generator().manual_seed(self.args.seed + 1_000_003 * epoch)
            for pool in torch.randperm(self.rows, generator=generator).split(POOL * self.args.batch):
                count = math.ceil(len(pool) / self.args.batch)
                order = torch.randperm(count, generator=generator).tolist()
                if passed + count > self.start:
                    batches = self.tokenise(pool.tolist())
                    for i in order[max(self.start - passed, 0):]:
                        yield self.share(batches[i])
                passed += count

    def tokenise(self, rows):
        """A pool's rows -> batches of its features, sorted by length."""
        chosen = [self.row(row) for row in rows]
        features = evaluate.collate(self.tokenizer, chosen, self.args.max_length)
        for row, feature, pair in zip(rows, features, chosen):
            feature.update(labels=pair.label, row=row % len(self.pairs))
        features.sort(key=lambda feature: len(feature['input_ids']))
        return [features[i:i + self.args.batch] for i in range(0, len(features), self.args.batch)]

    def share(self, batch):
        """This process's part of a batch, padded. Weighted so that the mean over processes is the mean over the batch."""
        part = batch[self.rank::self.world]
        weight = len(part) * self.world / len(batch)
        inputs = [{name: value for name, value in feature.items() if name != 'row'} for feature in part or batch[:1]]
        return dict(self.tokenizer.pad(inputs, return_tensors='pt')), weight, [feature['row'] for feature in part]

    def row(self, row):
        """The row-th pair of the training set, for RS-A of the m times larger augmented one."""
        pair = self.pairs[row % len(self.pairs)]
        if not self.neighbours:
            return pair
        p = None if self.args.replace == 'authors' else self.args.p
        return synonyms.augment(pair, self.neighbours, p, self.args.seed, row // len(self.pairs))


class CheapDropout(TorchFunctionMode):
    """Within it, dropout takes 16 random bits an element (ours): a third less time a forward pass on the CPU.

    There torch draws a 64-bit number for each element, on one thread. Four elements share one here, so that the
    probability is p rounded to 1/65536. As it cannot look into fused attention, attention has to be 'eager'.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Called by torch in place of each of its functions."""
        return (self.dropout if func is functional.dropout else func)(*args, **(kwargs or {}))

    @staticmethod
    def dropout(input, p=0.5, training=True, inplace=False):
        """As torch.nn.functional.dropout."""
        if not training or not 0 < p < 1:
            return functional.dropout(input, p, training, inplace)
        bits = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None).view(torch.int16)
        kept = bits[:input.numel()].view(input.shape) >= round(65536 * p) - 32768
        return input * kept.to(input.dtype).mul_(1 / (1 - p))

    @classmethod
    def fitting(cls, model):
        """A context for the model's forward passes: this one where it pays, on the CPU and with dropout. Sets the model's attention."""
        if model.device.type != 'cpu' or not any(isinstance(module, torch.nn.Dropout) and module.p for module in model.modules()):
            return contextlib.nullcontext()
        model.set_attn_implementation('eager')
        return cls()


def optimizer_of(model, args):
    """AdamW, eps 1e-8, no weight decay (XTREME and authors)."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, eps=1e-8, weight_decay=0.0, fused=True)


def train(model, tokenizer, pairs, dev, args, dtype, neighbours=None):
    """min_f of the objective over X_src: the one training loop, whatever the method.

    Linear decay, gradient norm clipped at 1.0 (XTREME and authors). Writes the checkpoint with the best
    English dev accuracy to args.out, and there the state to resume from. Returns the results so far.
    """
    rank, world = rank_and_world()
    objective, optimizer = robust.Objective(model, args, rank), optimizer_of(model, args)
    progress = load_state(model, tokenizer, optimizer, args)
    batches = Batches(pairs, tokenizer, args, neighbours, start=progress['at'])
    steps = min(args.max_steps or math.inf, math.ceil(args.epochs * math.ceil(batches.rows / args.batch)))
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, round(args.warmup * steps), steps, last_epoch=progress['at'] - 1)
    # On the CPU no worker: what it would do is half a percent of the time, and forking makes the first steps copy all memory.
    ahead = dict(num_workers=1, prefetch_factor=16, pin_memory=True) if model.device.type == 'cuda' else {}
    loader, dropout = iter(DataLoader(batches, batch_size=None, **ahead)), CheapDropout.fitting(model)
    if world > 1:
        objective = torch.nn.parallel.DistributedDataParallel(objective)
    quiet, recent = not sys.stderr.isatty(), []         # in a log file, a line every half minute
    with tqdm(total=steps * args.batch, initial=progress['at'] * args.batch, unit='pair', desc=args.method, dynamic_ncols=True,
              mininterval=30 if quiet else 0.1, disable=rank > 0) as bar:
        started = time.perf_counter()
        for step in range(progress['at'] + 1, steps + 1):
            batch, weight, rows = next(loader)
            batch = {name: value.to(model.device, non_blocking=True) for name, value in batch.items()}
            objective.train()
            with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32), dropout:
                loss = objective(batch, step) * weight
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress['seen'] += len(rows) * world
            recent.append((step, loss.detach(), rows))
            due = step % args.eval_steps == 0 or step == steps
            if due or len(recent) == 10:        # not each step: reading the loss waits for the GPU
                bar.set_postfix(loss=f'{finite(recent, progress, args):.3f}', dev=f'{max(progress["dev"], 0):.1f}', refresh=False)
                recent.clear()
            bar.update(args.batch)
            if due:
                progress['spent'] += time.perf_counter() - started
                progress['at'] = step
                if rank == 0:
                    keep(model, tokenizer, optimizer, dev, loss.item(), progress, args, dtype, step == steps)
                started = time.perf_counter()
    return {name: progress[name] for name in ('dev', 'step', 'history')} | {
        'steps': steps, 'pairs_per_second': progress['seen'] / progress['spent']}


def finite(recent, progress, args):
    """The last loss. Raises InputError where one of the recent (step, loss, rows) is not finite."""
    for (step, _, rows), loss in zip(recent, torch.stack([loss for _, loss, _ in recent]).tolist()):
        if not math.isfinite(loss):
            lines = ' '.join(str(row + 1) for row in rows)
            raise InputError(f'step {step}: the loss is {loss}; try a smaller --lr or --eps, or --float32. Its batch: lines {lines} of '
                             f'train-en.tsv. ' + (f'The best checkpoint so far, of step {progress["step"]}, stays in {args.out}'
                                                  if progress['step'] else 'There is no checkpoint yet'))
    return loss


def keep(model, tokenizer, optimizer, dev, loss, progress, args, dtype, last):
    """Score English dev; keep the model if it is the best so far, and the state if it is due."""
    correct = evaluate.marks(evaluate.predict(model, tokenizer, dev, dtype=dtype, max_length=args.max_length), dev)
    progress['history'].append({'step': progress['at'], 'loss': loss, 'dev': evaluate.accuracy(correct)})
    best = progress['history'][-1]['dev'] > progress['dev']         # strictly greater, as XTREME
    if best:
        progress.update(dev=progress['history'][-1]['dev'], step=progress['at'])
    if best or last or progress['spent'] - progress['written'] > STATE_SECONDS:
        progress['written'] = progress['spent']
        save_state(model, optimizer, progress, args)
    if best:        # after the state: a run that is killed between the two finds the weights of this checkpoint there
        save(model, tokenizer, args.out)


def save_state(model, optimizer, progress, args):
    """Write trained weights, AdamW's moments and the progress as one file."""
    tensors = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            tensors |= {f'weight {name}': p.detach()} | {f'{key} {name}': value for key, value in optimizer.state[p].items()}
    with written(Path(args.out) / STATE) as part:
        safetensors.torch.save_file(tensors, part, {'progress': json.dumps(progress), 'args': json.dumps(vars(args))})


def load_state(model, tokenizer, optimizer, args):
    """The progress of a run that was stopped, its weights and moments put back; of a new run the beginning."""
    path = Path(args.out) / STATE
    if not path.exists():
        return {'at': 0, 'dev': -1.0, 'step': 0, 'history': [], 'seen': 0, 'spent': 0.0, 'written': 0.0}
    with safetensors.safe_open(path, 'pt') as file:
        progress = json.loads(file.metadata()['progress'])
        state, trained = optimizer.state_dict(), [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        state['state'] = {i: {key: file.get_tensor(f'{key} {name}') for key in ('step', 'exp_avg', 'exp_avg_sq')}
                          for i, (name, _) in enumerate(trained)}
        with torch.no_grad():
            for name, p in trained:
                p.copy_(file.get_tensor(f'weight {name}'))
    optimizer.load_state_dict(state)
    optimizer.param_groups[0]['initial_lr'] = args.lr       # where the schedule begins
    if rank_and_world()[0] == 0:
        print(f'{args.out}: goes on after step {progress["at"]}', file=sys.stderr)
        if progress['at'] == progress['step']:
            save(model, tokenizer, args.out)
    return progress


def save(model, tokenizer, out):
    """Write the checkpoint beside, then move it in, file by file: `out` never holds half a file."""
    part = Path(out) / 'checkpoint.part'
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        for file in part.iterdir():
            os.replace(file, Path(out) / file.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def peak_memory(device):
    """Peak memory in GiB: the GPU's allocations, or on the CPU this process's resident set."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == 'linux' else 30)


def state_of(args):
    """'finished', 'to be resumed' or 'new'. Raises InputError if the run folder holds a run with other arguments."""
    state, results = Path(args.out) / STATE, Path(args.out) / 'results.json'
    if results.exists():
        held, answer = evaluate.read_results(args.out)['args'], 'finished'
    elif state.exists():
        try:
            with safetensors.safe_open(state, 'pt') as file:
                held, answer = json.loads(file.metadata()['args']), 'to be resumed'
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise InputError(f'{state}: not a state that train.py wrote ({error}); remove it to begin anew') from None
    else:
        return 'new'
    differing = sorted(name for name in vars(args) if name not in ('out', 'data') and held.get(name) != getattr(args, name))
    if differing:
        raise InputError(f'{args.out}: holds a run with other arguments ({", ".join(differing)}); name another folder with --out')
    return answer


def read_training(args):
    """English train and dev, and for RS-A the synonyms. Every other file that will be needed is read too: a broken one shows now."""
    prepare(args.data, args.task)
    train_path, dev_path = (path_of(args.data, args.task, split, 'en') for split in ('train', 'dev'))
    pairs, dev = (read_pairs(path, args.task) for path in (train_path, dev_path))
    for path, rows in ((train_path, pairs), (dev_path, dev)):
        if rows[0].label is None:
            raise InputError(f'{path}: no labels; training needs them')
        if rank_and_world()[0] == 0:
            print(describe(path, rows), file=sys.stderr)
    neighbours = None
    if args.method == 'rs_a':
        neighbours = synonyms.read_synonyms(args.synonyms)
        if args.english_only:
            neighbours = synonyms.english_only(neighbours, pairs)
    for lang in TASKS[args.task].languages:
        read_pairs(path_of(args.data, args.task, 'test', lang), args.task)
    return pairs[:args.max_train], dev[:args.max_eval], neighbours


def run(args):
    """Train one run, score every language, write results.json."""
    began = time.perf_counter()
    pairs, dev, neighbours = read_training(args)
    device, dtype = evaluate.device_and_dtype(args.float32 or args.layer != 0)     # above layer 0 noise would be rounded
    torch.manual_seed(args.seed)
    model, tokenizer = evaluate.load_encoder(args.model, args.task, args.freeze_embeddings, args.layer)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if rank_and_world()[0] == 0:
        for left in [*Path(args.out).glob('*.part.*'), *Path(args.out).glob('.tmp*')]:      # by a process that was killed as it wrote
            left.unlink()
    results = train(model.to(device), tokenizer, pairs, dev, args, dtype, neighbours)
    if rank_and_world()[0] > 0:
        return
    model, tokenizer = evaluate.load(args.out)
    marks = evaluate.score(model.to(device), tokenizer, args.task, args.data, Path(args.out) / 'predictions',
                           dtype=dtype, max_length=args.max_length, max_eval=args.max_eval)
    results |= {'test': {lang: evaluate.accuracy(row) for lang, row in marks.items()}, 'test_marks': marks,
                'args': vars(args), 'seed': args.seed, 'files': digests(args.data, args.task), 'dtype': str(dtype),
                'peak_memory_gib': peak_memory(device), 'wall_seconds': time.perf_counter() - began, 'processes': rank_and_world()[1],
                'device': torch.cuda.get_device_name() if device.type == 'cuda' else f'{platform.machine()}, {torch.get_num_threads()} threads',
                'versions': {'python': platform.python_version(), 'torch': torch.__version__,
                             'transformers': transformers.__version__, 'tokenizers': tokenizers.__version__}}
    evaluate.write_results(args.out, results)
    (Path(args.out) / STATE).unlink()


def xtreme_way(args, pairs, steps):
    """XTREME's and the authors' way, timed: float32, all padded to `max_length`, tokenised ahead, batches of 8 accumulated to 32.

    Returns pairs per second of training and of evaluation.
    """
    device = evaluate.device_and_dtype()[0]
    model, tokenizer = evaluate.load_encoder(args.model, args.task)
    model.to(device).train()
    optimizer, rates = optimizer_of(model, args), []
    encoded = tokenizer([pair.premise for pair in pairs], [pair.hypothesis for pair in pairs], truncation=True,
                        max_length=min(args.max_length, tokenizer.model_max_length), padding='max_length', return_tensors='pt')
    encoded['labels'] = torch.tensor([pair.label for pair in pairs])
    for training in (True, False):
        started = time.perf_counter()
        for micro in range(4 * steps):
            batch = {name: value[8 * micro:8 * micro + 8].to(device) for name, value in encoded.items()}
            with torch.set_grad_enabled(training):
                loss = model.train(training)(**batch).loss / 4
            if training:
                loss.backward()
                if micro % 4 == 3:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
        loss.item()         # waits for the GPU
        rates.append(32 * steps / (time.perf_counter() - started))
    return rates


def work_of(model, tokenizer, pairs, args):
    """What plain training cannot do without: floating-point operations a pair in the forward pass (back: twice as many), bytes a step.

    Operations: those of matrix products, as torch counts them, in batches padded as in training. Bytes: AdamW's (32 a
    trained float32: its gradient is written and read, its value and both moments are read and written).
    """
    shapes = copy.deepcopy(model).to('meta')        # counting needs no numbers; the mask, whose numbers transformers reads, is left out
    shapes.set_attn_implementation('eager')
    batches = itertools.islice(Batches(pairs, tokenizer, args), math.ceil(len(pairs) / args.batch))
    with FlopCounterMode(display=False) as counter:
        for batch, _, _ in batches:
            robust.plain(shapes, {name: value.to('meta') for name, value in batch.items() if name != 'attention_mask'})
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return counter.get_total_flops() / len(pairs), 32 * trained


def rates_of(device, dtype):
    """The machine's own rates: floating-point operations a second in a large matrix product, bytes a second in a large copy."""
    size, rates = 8192 if device.type == 'cuda' else 2048, []
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    c, d = torch.randn(2, 2 ** 26, device=device)
    for work, amount in (('a @ b', 2 * size ** 3), ('c.copy_(d)', 2 * 4 * len(c))):
        timer = Timer(work, globals=dict(a=a, b=b, c=c, d=d), num_threads=torch.get_num_threads())
        rates.append(amount / timer.blocked_autorange(min_run_time=1).median)
    return rates


def timed(runs, folder, rounds=3):
    """Each method, XTREME's way and the machine's own rates in turn, on the same pairs -> name -> pairs per second (or rate), medians."""
    steps, rates = (300 if torch.cuda.is_available() else 16), {}
    for run in runs * rounds:
        pairs, _, neighbours = read_training(run)
        pairs = random.Random(0).sample(pairs, min(len(pairs), 32 * steps))
        found, first, run = {}, run is runs[0], copy.copy(run)
        run.max_steps, run.eval_steps, run.out = steps, steps, str(folder / run.method)
        Path(run.out).mkdir()
        device, dtype = evaluate.device_and_dtype(run.float32)
        if first:
            found['training, XTREME'], found['evaluation, XTREME'] = xtreme_way(run, pairs, steps // 4)
            found['products'], found['copies'] = rates_of(device, dtype)
        model, tokenizer = evaluate.load_encoder(run.model, run.task, run.freeze_embeddings, run.layer)
        model.to(device)
        if first:
            found['forward'], found['moved'] = work_of(model, tokenizer, pairs, run)
            started = time.perf_counter()
            evaluate.predict(model, tokenizer, pairs, dtype=dtype, max_length=run.max_length)
            found['evaluation'] = len(pairs) / (time.perf_counter() - started)
        found[f'training, {run.method}'] = train(model, tokenizer, pairs, pairs[:1], run, dtype, neighbours)['pairs_per_second']
        shutil.rmtree(run.out)
        for name, value in found.items():
            rates.setdefault(name, []).append(value)
    return {name: sorted(values)[len(values) // 2] for name, values in rates.items()}


def benchmark(runs):
    """Print pairs per second beside XTREME's and the floor: the time of plain's work at the machine's own rates."""
    with tempfile.TemporaryDirectory() as folder:
        rates = timed(runs, Path(folder))
    forward, moved, products, copies = (rates.pop(name) for name in ('forward', 'moved', 'products', 'copies'))
    print(f'floor: 3 x {forward / 1e9:.3g} GFLOP a pair at {products / 1e9:.3g} GFLOP/s, {moved / 1e9:.3g} GB a step at {copies / 1e9:.3g} GB/s')
    floor = {'training, plain': 1 / (3 * forward / products + moved / copies / runs[0].batch), 'evaluation': products / forward}
    for name, rate in rates.items():
        base = rates['evaluation, XTREME' if name.startswith('evaluation') else 'training, XTREME']
        line = f'{name:20} {rate:8.1f} pairs/s, {rate / base:5.2f} times XTREME\'s'
        if name in floor:
            line += f', {rate / floor[name]:4.0%} of the floor ({floor[name]:.0f})'
        elif name.startswith('training') and 'training, plain' in rates and name != 'training, XTREME':
            line += f', {rates["training, plain"] / rate:5.2f} times the step of plain'
        print(line)


def main(args):
    """Train the runs that are not finished, one after another, and print the tables of all."""
    runs, (rank, world) = runs_of(args), rank_and_world()
    states = {run.out: state_of(run) for run in runs}
    if rank == 0:
        print(*(f'{out}: {state}' for out, state in states.items()), sep='\n', file=sys.stderr)
    if args.dry_run:
        return
    if args.benchmark:
        return benchmark(runs)
    if world > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
        # Hours: the others wait while the first scores a run.
        dist.init_process_group('nccl' if torch.cuda.is_available() else 'gloo', timeout=datetime.timedelta(hours=6))
    for args in runs:
        if states[args.out] != 'finished':
            try:
                run(args)
            except torch.OutOfMemoryError as error:
                raise InputError(f'{args.out}: out of GPU memory ({str(error).split(".")[0]}); try --freeze-embeddings, or a smaller '
                                 '--batch or --max-length. The same command goes on from the last dev evaluation') from None
            except (OSError, safetensors.SafetensorError) as error:
                raise InputError(f'{args.out}: cannot be written ({error}); the same command goes on from the last dev evaluation') from None
            finally:
                if rank == 0:
                    with contextlib.suppress(OSError):
                        Path(args.out).rmdir()      # where nothing came of it
    if rank == 0:
        evaluate.report([evaluate.Run(run.out) for run in runs])
    if world > 1:
        dist.destroy_process_group()


if __name__ == '__main__':
    main(command)
