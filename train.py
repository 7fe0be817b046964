"""Fine-tune a multilingual encoder on English with the paper's four methods, then score every language.

    python train.py --task pawsx --method rs_r --eps 0.1
    python train.py --task sample --method rs_r --eps 0.1       the same without any download
    python train.py --task pawsx --method plain adv rs_r rs_a --eps 0.001 0.01 0.1 1.0 --seed 1 2 3    Table 1

A run folder holds, in the order in which it is written: args.json, how the run began; a Hugging Face
checkpoint, the best by English dev accuracy; state.pt, what a stopped run needs to go on, gone at the end;
predictions/; and results.json, one line, never changed after: with it the run is finished. The same command
given again skips what is finished and goes on with what was stopped. Several GPUs:
torchrun --nproc_per_node N train.py ...
"""

import argparse
import contextlib
import copy
import datetime
import functools
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

try:
    import resource
except ImportError:         # Windows: the peak memory is not known there
    resource = None

import tokenizers
import torch
import torch.distributed as dist
import transformers
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

import evaluate
import robust
import synonyms
from data import (NEIGHBOURS, TASKS, InputError, copy_permissions, describe, digest, fetch_neighbours,
                  in_range, languages_of, path_of, prepare, progress, read_pairs, replacing, run_script)

# XTREME: its published scripts; authors: uclanlp/Robust-XLT, which has RS-A alone. The sample's are ours.
DEFAULTS = {
    #                     pawsx   xnli    sample      source of the first two
    'lr':                (2e-5,   2e-5,   1e-3),    # XTREME, authors
    'epochs':            (5,      2,      4),       # pawsx: XTREME's script; xnli: its paper
    'batch':             (32,     32,     64),      # XTREME, authors: 8 x 4 accumulated
    'warmup':            (0.0,    0.0,    0.05),    # XTREME, authors
    'eval_steps':        (200,    1000,   250),     # XTREME, authors
    'plain_steps':       (0,      0,      750),     # ours: delta from the first step, as 3.1 reads
    'freeze_embeddings': (False,  False,  True),    # XTREME, authors
    'float32':           (False,  False,  True),    # ours
}
EPOCHS_RS_A = (3, 1, 0.4)               # authors: over the augmented data; the sample's is ours
EPS = {'adv': [0.001], 'rs_r': [0.1]}               # ours; the paper searches 0.001, 0.01, 0.1 and 1.0
# The arguments that decide a run (the files do too: refuse_other). What its method does not use is null.
DECIDE = ('task', 'method', 'seed', 'eps', 'layer', 'adv_steps', 'plain_steps', 'm', 'p', 'replace',
          'english_only', 'epochs', 'lr', 'warmup', 'batch', 'max_length', 'eval_steps', 'max_steps',
          'max_train', 'max_eval', 'freeze_embeddings')
PATHS = ('model', 'data', 'synonyms', 'out')

POOL = 64               # batches that are sorted by length together (ours)
LOOK = 100              # steps between two looks at the loss: each waits for the GPU (ours)
# A dev evaluation saves the state if it is the best, the last, or this long after the state before (ours).
STATE_SECONDS = 300
SOURCE = ('robust.py', 'synonyms.py', 'data.py', 'train.py', 'evaluate.py', 'distance.py')


# ---------------------------------------------------------------- the command line

def parse_args(words=None):
    """The command line (or these words of one); what is not given takes the task's default."""
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n')[0],
        usage='%(prog)s --task TASK --method METHOD [METHOD ...] [options]      (all of them: --help)')
    whole, count = in_range(int, 0), in_range(int, 1)
    positive = in_range(float, sys.float_info.min, said='more than 0')

    def by_task(add, name, text, **options):
        """A flag whose default depends on the task; None where it is not given."""
        defaults = ', '.join(f'{task} {value}' for task, value in zip(TASKS, DEFAULTS[name]))
        if name == 'epochs':
            defaults += '; rs_a, over its copies: {}, {}, {}'.format(*EPOCHS_RS_A)
        add('--' + name.replace('_', '-'), help=f'{text} (default: {defaults})', **options)

    add = parser.add_argument_group('what to run').add_argument
    add('--task', choices=TASKS, required=True, help='sample: a small made-up world that needs no download')
    add('--method', choices=robust.METHODS, required=True, nargs='+',
        help='plain training; adv: adversarial training (3.1); rs_r: random perturbation, rs_a: synonyms '
        '(3.2); one run for each method, eps and seed')
    add('--eps', type=in_range(float, 0), nargs='+',
        help='adv, rs_r: radius of the L-inf ball (default: adv 0.001, rs_r 0.1; paper: 0.001 0.01 0.1 1.0)')
    add('--seed', type=in_range(int, 0, 2 ** 63, said='0 to 2^63 - 1'), nargs='+', default=[42],
        help='of every random draw (default: 42)')
    add('--model', help=f'any Hugging Face encoder, a name or a folder (default: {evaluate.MBERT}; '
        'sample: its own)')
    add('--dry-run', action='store_true', help='fetch and look at all that the runs read, list them, stop')

    add = parser.add_argument_group('the method').add_argument
    add('--layer', type=int, default=0,
        help='adv, rs_r: where Enc(x) ends: 0 word embeddings, k the k-th layer, -1 the last (default: 0); '
        'with any but 0 all runs of the command are float32')
    add('--adv-steps', type=count, default=1, help='adv: sign steps of the inner maximisation (default: 1)')
    by_task(add, 'plain_steps', 'adv: begin with N steps of plain training', type=whole, metavar='N')
    add('--m', type=count, default=10, help='rs_a: augmented copies of each pair (default: 10, the paper\'s)')
    add('--p', type=in_range(float, 0, 1 + 1e-9, said='0 to 1'), default=0.1,
        help='rs_a: probability that a word is replaced (default: 0.1, the paper\'s)')
    add('--replace', choices=('paper', 'authors'), default='paper',
        help='rs_a: each word with probability p; or every word, uniform over itself and its synonyms '
        '(default: paper)')
    add('--english-only', action='store_true',
        help='rs_a: only synonyms that occur in the English training pairs')
    add('--synonyms', metavar='FILE', help='rs_a: neighbour file (default: the authors\', fetched into DATA)')

    add = parser.add_argument_group('training').add_argument
    by_task(add, 'epochs', 'passes over the training set', type=positive)
    by_task(add, 'lr', 'peak learning rate, linear decay to 0', type=positive)
    by_task(add, 'warmup', 'share of the steps in which the learning rate rises', type=in_range(float, 0, 1))
    by_task(add, 'batch', 'pairs a step, over all GPUs', type=count)
    add('--max-length', type=in_range(int, 8), default=128, help='tokens a pair, at most (default: 128)')
    by_task(add, 'eval_steps', 'English dev accuracy every N steps', type=count, metavar='N')
    add('--max-steps', type=count, metavar='N', help='stop after N steps, the schedule shortened to them')
    by_task(add, 'freeze_embeddings', 'keep the word embeddings as pre-trained',
            action=argparse.BooleanOptionalAction)
    by_task(add, 'float32', 'no bfloat16, whatever the hardware', action=argparse.BooleanOptionalAction)

    add = parser.add_argument_group('data and output').add_argument
    add('--data', default='download', help='folder in XTREME\'s layout (default: download)')
    add('--langs', nargs='+', metavar='LANG',
        help='languages to score, any with a test file (default: the task\'s)')
    add('--max-train', type=count, metavar='N', help='train on the first N pairs only')
    add('--max-eval', type=count, metavar='N', help='score the first N pairs of each dev and test file only')
    add('--out',
        help='run folder; of several runs the folder above them (default: runs/TASK-METHOD-EPS-seedSEED)')
    return parser.parse_args(words)


def runs_of(args):
    """One set of arguments for each run that the command line asks for."""
    runs = []
    for method in dict.fromkeys(args.method):
        sizes = dict.fromkeys(args.eps or EPS[method]) if method in EPS else [None]
        for eps in sizes:
            for seed in dict.fromkeys(args.seed):
                runs.append(run_of(args, method, eps, seed))
    for run in runs:
        if not args.out or len(runs) > 1:
            size = '' if run.eps is None else f'-{run.eps:g}'
            run.out = f'{args.out or "runs"}/{run.task}-{run.method}{size}-seed{run.seed}'
    folders = [run.out for run in runs]
    for out in folders:
        if folders.count(out) > 1:
            raise InputError(f'{out}: the folder of two runs; expected --eps that differ in six digits')
    return runs


def run_of(args, method, eps, seed):
    """The arguments of one run: its task's and method's defaults filled in, what it does not use None."""
    run = copy.copy(args)
    run.method, run.eps, run.seed = method, eps, seed
    for name, by_task in DEFAULTS.items():
        if name == 'epochs' and method == 'rs_a':
            by_task = EPOCHS_RS_A
        if getattr(run, name) is None:
            setattr(run, name, dict(zip(TASKS, by_task))[run.task])
    run.model = run.model or evaluate.default_model(run.task, run.data)
    if method != 'rs_a':
        run.synonyms = None
    elif run.synonyms is None:
        own = 'sample/synonyms.json' if run.task == 'sample' else NEIGHBOURS
        run.synonyms = f'{run.data}/{own}'
    for names in robust.METHODS.values():
        for name in names:
            if name not in robust.METHODS[method]:
                setattr(run, name, None)
    if run.replace == 'authors':
        run.p = None
    return run


def note_unused(args):
    """Say which flags of a method were given without effect, as no method of the command takes them."""
    taken, every = set(), {'synonyms'}
    for method, names in robust.METHODS.items():
        every.update(names)
        if method in args.method:
            taken.update(names)
    if 'rs_a' in args.method:
        taken.add('synonyms')
    if args.replace == 'authors':
        taken.discard('p')
    defaults = parse_args(['--task', args.task, '--method', *args.method])
    for name in sorted(every - taken):
        if getattr(args, name) != getattr(defaults, name):
            evaluate.say(f'--{name.replace("_", "-")}: without effect on {" ".join(args.method)}')


def name_of(args):
    """A run in words, such as 'rs_r 0.1 seed 42'."""
    size = '' if args.eps is None else f' {args.eps:g}'
    return f'{args.method}{size} seed {args.seed}'


# ---------------------------------------------------------------- batches

def steps_of(args, pairs):
    """The number of steps: epochs x rows / batch, rounded up once, or max_steps if that is less."""
    rows = pairs * (args.m or 1)
    steps = math.ceil(Fraction(str(args.epochs)) * rows / args.batch)
    return min(steps, args.max_steps or steps)


def plan(pairs, tokenizer, args):
    """The batch of every step, before the first one: a list of lists of row numbers, from the seed.

    Each epoch has all rows (RS-A's: m copies of each pair) in an order of its own, and the next one follows
    without a break. Pairs of like length share a batch, which is padded to its longest (ours): pools of 64
    batches are sorted by token count, a copy by that of the original pair, and come in random order.
    """
    steps = steps_of(args, len(pairs))
    rows = len(pairs) * (args.m or 1)
    pool_rows = POOL * args.batch
    wanted = math.ceil(Fraction(str(args.epochs)) * rows)
    wanted = min(wanted, math.ceil(steps / POOL) * pool_rows)       # only the pools of the steps that run
    generator = torch.Generator().manual_seed(args.seed)
    order = []
    while len(order) < wanted:
        order += torch.randperm(rows, generator=generator).tolist()
    order = order[:wanted]

    # row = copy * len(pairs) + pair, as in synonyms.Copies.
    tokens = count_tokens(pairs, tokenizer, sorted({row % len(pairs) for row in order}))
    batches = []
    for start in range(0, wanted, pool_rows):
        pool = sorted(order[start:start + pool_rows], key=lambda row: tokens[row % len(pairs)])
        pool = [pool[at:at + args.batch] for at in range(0, len(pool), args.batch)]
        for i in torch.randperm(len(pool), generator=generator).tolist():
            batches.append(pool[i])
    return batches[:steps]


def count_tokens(pairs, tokenizer, rows):
    """How many tokens the pairs of these rows have -> {row: tokens}."""
    tokens = {}
    for start in progress(range(0, len(rows), 5000), desc='counting tokens', unit='block'):
        block = rows[start:start + 5000]
        features, _ = evaluate.encode(tokenizer, [pairs[row] for row in block], None)
        for row, feature in zip(block, features):
            tokens[row] = len(feature['input_ids'])
    return tokens


def collate(pairs, tokenizer, max_length):
    """A list of Pair -> the batch that the objectives take: tensors (B, T) and `labels` (B,)."""
    features, _ = evaluate.encode(tokenizer, pairs, max_length)
    batch = dict(tokenizer.pad(features, return_tensors='pt'))
    batch['labels'] = torch.tensor([pair.label for pair in pairs])
    return batch


def shares_of(batches, rank, world):
    """This process's rows of each batch, and the weights that make the processes' mean the batch's."""
    shares, weights = [], []
    for batch in batches:
        part = batch[rank::world]
        weights.append(len(part) * world / len(batch))
        shares.append(part or batch[:1])        # a process without rows runs all the same, with weight 0
    return shares, weights


# ---------------------------------------------------------------- the loop

def learning_rate(step, steps, args):
    """Of a step, counted from 1: rises over warmup * steps, then falls to 0, linearly (XTREME, authors)."""
    done = step - 1
    rising = round(args.warmup * steps)
    if done < rising:
        return args.lr * done / rising
    return args.lr * (steps - done) / (steps - rising)


def train(model, tokenizer, pairs, dev, args, copies=None, dtype=torch.float32, title='training'):
    """min_f of the objective over X_src (section 3): the one training loop, whatever the method.

    `pairs` is X_src, `copies` RS-A's m copies of it. Gradient norm clipped at 1.0 (XTREME, authors). Writes
    the checkpoint best by English dev accuracy and the state to args.out; returns that part of the record.
    The loss in its history is of that step's batch alone (the first process's share), by the method's own
    objective.
    """
    rank, world = rank_and_world()
    batches = plan(pairs, tokenizer, args)
    shares, weights = shares_of(batches, rank, world)
    steps = len(batches)
    max_length = evaluate.longest(model, tokenizer, args.max_length)
    optimizer = adamw(model, args)
    state = load_state(model, optimizer, args)
    at = state['step']
    rows = pairs if copies is None else copies
    loader = loader_of(rows, shares[at:], tokenizer, max_length, model.device)
    objective = robust.Objective(model, args, rank)
    if world > 1:
        objective = torch.nn.parallel.DistributedDataParallel(objective)
    dropout = CheapDropout.fitting(model)
    losses = []
    bar = progress(desc=title, unit='pair', total=count(batches), initial=count(batches[:at]))
    started = time.perf_counter()

    for step, batch in enumerate(loader, at + 1):
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step, steps, args)
        batch = {name: value.to(model.device, non_blocking=True) for name, value in batch.items()}
        objective.train()
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32), dropout:
            loss = objective(batch, step)
        (loss * weights[step - 1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.update(len(batches[step - 1]))

        losses.append(loss.detach())
        due = step % args.eval_steps == 0 or step == steps
        if due or step % LOOK == 0:
            check_losses(losses, step, batches, len(pairs), state, args)
            best = f', best dev {state["best_dev"]:.1f}' if state['best_step'] else ''
            bar.set_postfix_str(f'loss {losses[-1]:.3f}{best}', refresh=False)
            losses.clear()
        if not due:
            continue

        state['step'] = step
        state['seconds'] += time.perf_counter() - started
        if rank == 0:
            accuracy = dev_accuracy(model, tokenizer, dev, dtype, max_length)
            state['history'].append({'step': step, 'loss': loss.item(), 'dev': accuracy})
            # A checkpoint is a method's only if the method made it: adv's plain steps do not count.
            counts = args.method != 'adv' or step > args.plain_steps
            best = counts and accuracy > state['best_dev']      # strictly greater, as XTREME
            if best:
                state['best_dev'], state['best_step'] = accuracy, step
                # Before the state: a run killed between the two makes the same checkpoint again.
                save_checkpoint(model, tokenizer, args.out)
            if best or step == steps or state['seconds'] - state['saved_at'] > STATE_SECONDS:
                state['saved_at'] = state['seconds']
                save_state(model, optimizer, state, args)
        started = time.perf_counter()
    bar.close()
    return {'dev': state['best_dev'], 'step': state['best_step'], 'steps': steps, 'history': state['history'],
            'pairs_per_second': count(batches) / state['seconds']}


def count(batches):
    """How many rows some batches have."""
    return sum(len(batch) for batch in batches)


def loader_of(rows, batches, tokenizer, max_length, device):
    """The batches as tensors; on a GPU made ahead, by a process of their own."""
    ahead = {}
    if device.type == 'cuda':
        ahead = {'num_workers': 1, 'prefetch_factor': 16, 'pin_memory': True}
        os.environ['TOKENIZERS_PARALLELISM'] = 'false'      # else a forked tokenizer warns
    padded = functools.partial(collate, tokenizer=tokenizer, max_length=max_length)
    return DataLoader(rows, batch_sampler=batches, collate_fn=padded, **ahead)


def dev_accuracy(model, tokenizer, dev, dtype, max_length):
    """English dev accuracy in percent."""
    predicted, _ = evaluate.predict(model, tokenizer, dev, dtype=dtype, max_length=max_length, desc='dev-en')
    return evaluate.accuracy(evaluate.marks(predicted, dev))


def adamw(model, args):
    """AdamW over what is trained, eps 1e-8, no weight decay (XTREME, authors)."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.optim.AdamW(trained, lr=args.lr, eps=1e-8, weight_decay=0.0, fused=True)


def check_losses(losses, step, batches, pairs, state, args):
    """Raise InputError if one of the last losses, up to that of `step`, is not finite; pairs: how many."""
    for number, loss in enumerate(torch.stack(losses).tolist(), step - len(losses) + 1):
        if math.isfinite(loss):
            continue
        lines = ' '.join(str(row % pairs + 1) for row in batches[number - 1])
        kept = 'there is no checkpoint yet'
        if state['best_step']:
            kept = f'the best checkpoint so far, of step {state["best_step"]}, stays in {args.out}'
        raise InputError(f'step {number}: the loss is {loss}; try a smaller --lr or --eps, or --float32. '
                         f'Its batch: lines {lines} of train-en.tsv; {kept}')


def rank_and_world():
    """This process's number and how many there are, as torchrun says. (0, 1) without it."""
    return int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))


# ---------------------------------------------------------------- the run folder

def save_checkpoint(model, tokenizer, out):
    """Write the checkpoint beside, then move it in, file by file: `out` never holds half a file."""
    part = Path(out) / 'checkpoint.part'
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        copy_permissions(part)
        for file in part.iterdir():
            os.replace(file, Path(out) / file.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def save_state(model, optimizer, state, args):
    """Write state.pt: how far the run is, its trained weights, AdamW's moments."""
    weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    with replacing(Path(args.out) / 'state.pt') as part:
        torch.save({**state, 'weights': weights, 'optimizer': optimizer.state_dict()}, part)


def load_state(model, optimizer, args):
    """How far a stopped run is, its weights and moments put back; of a new run the beginning."""
    path = Path(args.out) / 'state.pt'
    if not path.exists():
        return {'step': 0, 'best_dev': -1.0, 'best_step': 0, 'history': [], 'seconds': 0.0, 'saved_at': 0.0}
    try:
        state = torch.load(path, map_location=model.device, weights_only=True)
        weights = dict(model.named_parameters())
        with torch.no_grad():
            for name, weight in state.pop('weights').items():
                weights[name].copy_(weight)
        optimizer.load_state_dict(state.pop('optimizer'))
    except Exception as error:      # whatever a file that is none makes torch raise
        raise InputError(f'{path}: not a state that train.py wrote ({evaluate.first_line(error)}); '
                         'remove it to begin anew') from None
    evaluate.say(f'{args.out}: goes on after step {state["step"]}')
    return state


def beginning_of(args, files, dtype):
    """What is known of a run before it begins: the first part of its record, and all of args.json."""
    source = hashlib.sha256()
    for name in SOURCE:
        source.update(Path(__file__).with_name(name).read_bytes())
    device = f'{platform.machine()}, {torch.get_num_threads()} threads'
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    versions = {'python': platform.python_version()}
    for package in (torch, transformers, tokenizers):
        versions[package.__name__] = package.__version__
    beginning = {'args': {name: getattr(args, name) for name in DECIDE}}
    beginning['paths'] = {name: getattr(args, name) for name in PATHS}
    beginning |= {'files': files, 'dtype': str(dtype), 'processes': rank_and_world()[1]}
    return beginning | {'versions': versions, 'source': source.hexdigest()[:16], 'device': device}


def status_of(out, beginning):
    """'finished', 'to be resumed' or 'new'. InputError for another run's result or state, or other files."""
    folder = Path(out)
    another = 'name another folder with --out'
    if (folder / 'results.json').exists():
        held = evaluate.read_records([out])[0]
        refuse_other(out, held, beginning, ())
        if held['dtype'] != beginning['dtype']:
            evaluate.say(f'{out}: finished in {held["dtype"]}, not {beginning["dtype"]}')
        more = [name for name in beginning['files'] if name.startswith('test-') and name not in held['files']]
        if more:
            command = f'`python evaluate.py {out} --langs`'
            evaluate.say(f'{out}: finished without {", ".join(more)}, which {command} scores')
        return 'finished'
    if (folder / 'state.pt').exists():
        try:
            held = json.loads((folder / 'args.json').read_text(encoding='utf-8'))
            refuse_other(out, held, beginning, ('dtype', 'processes'))
        except (OSError, ValueError, LookupError, TypeError):
            raise InputError(f'{folder / "args.json"}: not what train.py wrote; {another}') from None
        for name in evaluate.MADE_BY:
            if held.get(name) != beginning[name]:
                evaluate.say(f'{out}: began with other {name}: {held.get(name)}, now {beginning[name]}')
        return 'to be resumed'
    ours = (folder / 'args.json').exists()      # of a run that was stopped before its first state
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f'{out}: holds something else than a run of train.py; {another}')
    return 'new'


def refuse_other(out, held, beginning, more):
    """Raise InputError where two runs differ in what decides them: arguments, files both read, `more`."""
    both = [(name, held['args'].get(name), beginning['args'][name]) for name in DECIDE]
    both += [(name, held['files'].get(name, value), value) for name, value in beginning['files'].items()]
    both += [(name, held.get(name), beginning[name]) for name in more]
    differ = [f'{name} {theirs}, not {ours}' for name, theirs, ours in both if theirs != ours]
    if differ:
        raise InputError(f'{out}: holds another run ({"; ".join(differ)}); name another folder with --out')


def peak_memory(device):
    """Peak memory in GiB: the GPU's allocations, or this process's resident set since it began, or None."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if resource is None:
        return None
    unit = 2 ** 20 if sys.platform == 'linux' else 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# ---------------------------------------------------------------- the runs

class Inputs(NamedTuple):
    """All that the runs of a command read, and what they run on."""
    pairs: list         # X_src
    dev: list           # English dev
    langs: list         # to score
    files: dict         # name -> digest; of the encoder also its dropout
    copies: dict        # run folder of an rs_a -> its synonyms.Copies
    device: torch.device
    dtype: torch.dtype


def read_inputs(args, runs, device, dtype):
    """Everything that the runs will read, looked at before the first of them begins. Raises InputError."""
    prepare(args.data, args.task, langs=args.langs)
    langs = languages_of(args.data, args.task, args.langs)
    files = {}
    both = []
    for split in ('train', 'dev'):
        path = path_of(args.data, args.task, split, 'en')
        both.append(read_labelled(path, args.task))
        files[path.name] = digest(path)
    for lang in langs:
        for split in ('test', 'dev'):
            path = path_of(args.data, args.task, split, lang)
            if split == 'test' or path.exists():
                read_pairs(path, args.task)
                files[path.name] = digest(path)
    pairs, dev = both[0][:args.max_train], both[1][:args.max_eval]
    layer = args.layer if any(run.layer for run in runs) else 0
    model, tokenizer = evaluate.load_encoder(runs[0].model, args.task, layer=layer)
    files['model'] = evaluate.fingerprint(model, tokenizer)
    drops = {name: value for name, value in model.config.to_dict().items() if 'drop' in name}
    files['dropout'] = json.dumps(drops, sort_keys=True)        # no part of the weights, but of the training
    copies = {}
    for run in runs:
        steps = steps_of(run, len(pairs))
        if run.method == 'rs_a':
            copies[run.out] = copies_of(run, pairs, fetch=not args.synonyms and args.task != 'sample')
        if run.method == 'adv' and run.plain_steps >= steps:
            raise InputError(f'--plain-steps {run.plain_steps}: the run has {steps} steps, so that adv would '
                             f'never begin; expected --plain-steps below {steps}')
    return Inputs(pairs, dev, langs, files, copies, device, dtype)


def read_labelled(path, task):
    """The pairs of a file that training needs labels of."""
    pairs = read_pairs(path, task)
    if pairs[0].label is None:
        raise InputError(f'{path}: no labels; training needs them')
    evaluate.say(describe(path, pairs))
    return pairs


def copies_of(run, pairs, fetch):
    """RS-A's training set, m copies of the pairs. `fetch` the authors' neighbour file if it is not there."""
    if fetch:
        fetch_neighbours(run.synonyms)
    neighbours = synonyms.read_synonyms(run.synonyms)
    if run.english_only:
        neighbours = synonyms.english_only(neighbours, pairs)
    return synonyms.Copies(pairs, neighbours, m=run.m, p=run.p, seed=run.seed, name=run.synonyms)


def train_and_score(args, beginning, inputs, title):
    """One run, from its beginning to results.json."""
    began = time.perf_counter()
    out, copies = Path(args.out), inputs.copies.get(args.out)
    torch.manual_seed(args.seed)
    if inputs.device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    peak_before = peak_memory(inputs.device)
    model, tokenizer = evaluate.load_encoder(args.model, args.task, args.freeze_embeddings, args.layer or 0)
    if rank_and_world()[0] == 0:
        out.mkdir(parents=True, exist_ok=True)
        for left in out.glob('*.part*'):        # by a process that was killed as it wrote
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if (out / 'state.pt').exists():         # what began the run stays, what goes on with it is added
            began_with = json.loads((out / 'args.json').read_text(encoding='utf-8'))
            more = {'resumed_with': {name: beginning[name] for name in evaluate.MADE_BY}}
            more['paths'] = beginning['paths']
            more['files'] = began_with['files'] | beginning['files']
            beginning = began_with | more
        else:
            write_json(out / 'args.json', beginning)
    model.to(inputs.device)
    record = beginning | train(model, tokenizer, inputs.pairs, inputs.dev, args, copies, inputs.dtype, title)
    if rank_and_world()[0] > 0:
        return

    model, tokenizer = evaluate.load(args.out)
    model.to(inputs.device)
    max_length = evaluate.longest(model, tokenizer, args.max_length)
    options = {'max_eval': args.max_eval, 'predictions': out / 'predictions' / args.task,
               'dtype': inputs.dtype, 'max_length': max_length}
    test = evaluate.score(model, tokenizer, args.task, args.data, inputs.langs, **options)
    dev = evaluate.score(model, tokenizer, args.task, args.data, inputs.langs, split='dev', **options)
    record['train_pairs'] = len(inputs.pairs)
    record['changed'] = synonyms.changed_share(copies) if copies else None
    for name, found in (('test', test), ('dev', dev)):
        record[f'{name}_marks'] = {lang: row['marks'] for lang, row in found.items()}
    record['test'] = {lang: evaluate.accuracy(row['marks']) for lang, row in test.items()}
    record['dev_all'] = {lang: evaluate.accuracy(row['marks']) for lang, row in dev.items()}
    record['answers'] = {lang: row['answers'] for lang, row in test.items()}
    record['cut'] = {lang: row['cut'] for lang, row in test.items()}
    record['longest'] = max_length
    for note in evaluate.cut_note(record['cut'], max_length):
        evaluate.say(note)
    peak = peak_memory(inputs.device)
    record['peak_memory_gib'] = peak if peak != peak_before else None       # None: an earlier run set it
    record['wall_seconds'] = time.perf_counter() - began        # since it was last begun or resumed
    write_json(out / 'results.json', record)
    (out / 'state.pt').unlink(missing_ok=True)
    scores = [score for score in record['test'].values() if score is not None]
    average = f'test average {sum(scores) / len(scores):.1f}, ' if scores else ''
    evaluate.say(f'{title}: {average}English dev {record["dev"]:.1f}; saved in {out}')


def write_json(path, content):
    """Write one line of JSON, whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, allow_nan=False) + '\n', encoding='utf-8')


def start_processes():
    """Where torchrun started this process: join the others."""
    if rank_and_world()[1] == 1:
        return
    backend = 'gloo'
    if torch.cuda.is_available():
        backend = 'nccl'
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    hours = datetime.timedelta(hours=6)         # the others wait while the first scores
    dist.init_process_group(backend, timeout=hours)


def main():
    """Train the runs that are not finished, one after another, and print the tables of all."""
    args = parse_args()
    runs = runs_of(args)
    note_unused(args)
    start_processes()
    # Above layer 0 no LayerNorm comes first: the noise would be rounded to bfloat16 as it enters a product.
    float32 = runs[0].float32 or any(run.layer for run in runs)
    inputs = read_inputs(args, runs, *evaluate.choose_device(float32))
    beginnings, states = {}, {}
    for run in runs:
        files = inputs.files | {'synonyms': digest(run.synonyms) if run.synonyms else None}
        beginnings[run.out] = beginning_of(run, files, inputs.dtype)
        states[run.out] = status_of(run.out, beginnings[run.out])
        evaluate.say(f'{run.out}: {states[run.out]}')
    if args.dry_run:
        return
    again = 'the same command goes on from its last saved state'
    for number, run in enumerate(runs, 1):
        if states[run.out] == 'finished':
            continue
        title = name_of(run)
        if len(runs) > 1:
            title = f'run {number} of {len(runs)}: {title}'
        try:
            train_and_score(run, beginnings[run.out], inputs, title)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f'{run.out}: stopped; {again}') from None
        except torch.OutOfMemoryError as error:
            raise InputError(f'{run.out}: out of GPU memory ({evaluate.first_line(error)}); try '
                             f'--freeze-embeddings, or a smaller --batch or --max-length; {again}') from None
        except OSError as error:
            raise InputError(f'{run.out}: {error}; {again}') from None
    if rank_and_world()[0] == 0:
        evaluate.report(evaluate.read_records([run.out for run in runs]))
    if dist.is_initialized():
        dist.destroy_process_group()


# ---------------------------------------------------------------- cheap dropout

class CheapDropout(TorchFunctionMode):
    """Within it, dropout takes 16 random bits an element (ours): a third less time a forward pass on the CPU.

    There torch draws a 64-bit number for each element, on one thread. Four elements share one here, so that
    the probability is p rounded to 1/65536. It cannot look into fused attention, which has to be 'eager'.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Called by torch in place of each of its functions."""
        if func is functional.dropout:
            func = self.dropout
        return func(*args, **(kwargs or {}))

    @staticmethod
    def dropout(input, p=0.5, training=True, inplace=False):
        """As torch.nn.functional.dropout, but never in place."""
        if not training or not 0 < p < 1:
            return functional.dropout(input, p, training, inplace)
        draws = torch.empty(math.ceil(input.numel() / 4), dtype=torch.int64).random_(-2 ** 63, None)
        bits = draws.view(torch.int16)[:input.numel()].view(input.shape)    # uniform over -32768 ... 32767
        kept = bits >= round(65536 * p) - 32768
        return input * kept.to(input.dtype).mul_(1 / (1 - p))

    @classmethod
    def fitting(cls, model):
        """A context for the model's forward passes: this one where it pays, on the CPU and with dropout.

        Sets the model's attention.
        """
        drops = any(isinstance(module, torch.nn.Dropout) and module.p for module in model.modules())
        if model.device.type != 'cpu' or not drops:
            return contextlib.nullcontext()
        model.set_attn_implementation('eager')
        return cls()


if __name__ == '__main__':
    run_script(main)
