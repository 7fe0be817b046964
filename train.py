"""Fine-tune a multilingual encoder on English with the paper's four methods, then score every language.

    python train.py --task pawsx --method rs_r --eps 0.1
    python train.py --task sample --method rs_r --eps 0.1       a made-up task, no download
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
import itertools
import json
import math
import os
import platform
import shutil
import sys
import time
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
# All arguments but these decide a run (the files do too: refuse_other).
PATHS = ('model', 'data', 'synonyms', 'out')
ASIDE = ('langs', 'float32', 'dry_run')     # the record tells the languages and the dtype that came of it

POOL = 64               # batches that are sorted by length together (ours)
LOOK = 100              # steps between two looks at the loss: each waits for the GPU (ours)
# A dev evaluation saves the state if it is the best, the last, or this long after the state before (ours).
STATE_SECONDS = 300
RANK, WORLD = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))      # as torchrun says
SOURCE = ('robust.py', 'synonyms.py', 'data.py', 'train.py', 'evaluate.py', 'distance.py')


# ---------------------------------------------------------------- the command line

def parse_args(words=None):
    """The command line (or these words of one); what is not given takes the task's default."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage='%(prog)s --task TASK --method METHOD [METHOD ...] [options]      (all of them: --help)')
    whole, count = in_range(int, 0), in_range(int, 1)
    positive, share = in_range(float, 1e-9), in_range(float, 0, 1)

    def each(values):
        """A value for each task, in words."""
        return ', '.join(f'{task} {value}' for task, value in zip(TASKS, values))

    def by_task(name, text, **options):
        """Add a flag whose default depends on the task; None where it is not given."""
        add('--' + name.replace('_', '-'), help=f'{text} (default: {each(DEFAULTS[name])})', **options)

    add = parser.add_argument_group('what to run').add_argument
    add('--task', choices=TASKS, required=True, help='sample: a small made-up world that needs no download')
    add('--method', choices=robust.METHODS, required=True, nargs='+',
        help='plain training; adv: adversarial training (3.1); rs_r: random perturbation, rs_a: synonyms '
        '(3.2); one run for each method, eps and seed')
    add('--eps', type=in_range(float, 0), nargs='+',
        help='adv, rs_r: radius of the L-inf ball (default: adv 0.001, rs_r 0.1; paper: 0.001 0.01 0.1 1.0)')
    add('--seed', type=in_range(int, 0, 2 ** 63 - 1), nargs='+', default=[42],
        help='of every random draw (default: 42)')
    add('--model', help=f'any Hugging Face encoder, a name or a folder (default: {evaluate.MBERT}; '
        'sample: its own)')
    add('--dry-run', action='store_true', help='fetch and look at all that the runs read, list them, stop')

    add = parser.add_argument_group('the method').add_argument
    add('--layer', type=int, default=0,
        help='adv, rs_r: where Enc(x) ends: 0 word embeddings, k the k-th layer, -1 the last (default: 0); '
        'with any but 0 all runs of the command are float32')
    add('--adv-steps', type=count, default=1, help='adv: sign steps of the inner maximisation (default: 1)')
    by_task('plain_steps', 'adv: begin with N steps of plain training', type=whole, metavar='N')
    add('--m', type=count, default=10, help='rs_a: augmented copies of each pair (default: 10, the paper\'s)')
    add('--p', type=share, default=0.1,
        help='rs_a: probability that a word is replaced (default: 0.1, the paper\'s)')
    add('--replace', choices=('paper', 'authors'), default='paper',
        help='rs_a: each word with probability p; or every word, uniform over itself and its synonyms '
        '(default: paper)')
    add('--english-only', action='store_true',
        help='rs_a: only synonyms that occur in the English training pairs')
    add('--synonyms', metavar='FILE', help='rs_a: neighbour file (default: the authors\', fetched into DATA)')

    add = parser.add_argument_group('training').add_argument
    by_task('epochs', f'passes over the training set, of rs_a over its copies ({each(EPOCHS_RS_A)})',
            type=positive)
    by_task('lr', 'peak learning rate, linear decay to 0', type=positive)
    by_task('warmup', 'share of the steps in which the learning rate rises', type=share)
    by_task('batch', 'pairs a step, over all GPUs', type=count)
    add('--max-length', type=in_range(int, 8), default=128, help='tokens a pair, at most (default: 128)')
    by_task('eval_steps', 'English dev accuracy every N steps', type=count, metavar='N')
    add('--max-steps', type=count, metavar='N', help='stop after N steps, the schedule shortened to them')
    by_task('freeze_embeddings', 'keep the word embeddings as pre-trained',
            action=argparse.BooleanOptionalAction)
    by_task('float32', 'no bfloat16, whatever the hardware', action=argparse.BooleanOptionalAction)

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
    runs = {}       # by name: what is asked for twice, such as plain for two eps, is one run
    for method in args.method:
        for eps in args.eps or EPS.get(method, [None]):
            for seed in args.seed:
                run = run_of(args, method, eps, seed)
                if runs.setdefault(name_of(run), run).eps != run.eps:
                    raise InputError(f'{name_of(run)}: two runs; expected --eps that differ in six digits')
    for name, run in runs.items():
        if not args.out or len(runs) > 1:
            run.out = f'{args.out or "runs"}/{args.task}-{name}'
    return list(runs.values())


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


def note_unused(args, runs):
    """Say which flags were given without effect: those that no run has a use for."""
    defaults = parse_args(['--task', args.task, '--method', *args.method])
    for name, value in vars(args).items():
        given = value != getattr(defaults, name)
        if given and all(getattr(run, name) is None for run in runs):
            evaluate.say(f'--{name.replace("_", "-")}: without effect on {" ".join(args.method)}')


def name_of(run):
    """What tells a run from the others of its task, such as 'rs_r-0.1-seed42'."""
    size = '' if run.eps is None else f'-{run.eps:g}'
    return f'{run.method}{size}-seed{run.seed}'


# ---------------------------------------------------------------- batches

def rows_of(args, pairs):
    """The number of rows that training takes: epochs x pairs x RS-A's copies, rounded up."""
    rows = round(args.epochs * pairs * (args.m or 1), 6)        # in floats 0.55 * 3200 is above 1760
    return max(1, math.ceil(rows))


def steps_of(args, pairs):
    """The number of steps, the last of them perhaps with fewer rows; or max_steps if that is less."""
    steps = math.ceil(rows_of(args, pairs) / args.batch)
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
    # Only the pools of the steps that run: what max_steps cuts off is not drawn.
    wanted = min(rows_of(args, len(pairs)), math.ceil(steps / POOL) * pool_rows)
    generator = torch.Generator().manual_seed(args.seed)
    epochs = [torch.randperm(rows, generator=generator) for _ in range(math.ceil(wanted / rows))]
    order = torch.cat(epochs)[:wanted]

    # row = copy * len(pairs) + pair, as in synonyms.Copies.
    tokens = count_tokens(pairs, tokenizer, (order % len(pairs)).unique().tolist())
    batches = []
    for pool in order.split(pool_rows):
        by_length = pool[tokens[pool % len(pairs)].argsort(stable=True)]
        of_a_pool = by_length.split(args.batch)
        for i in torch.randperm(len(of_a_pool), generator=generator).tolist():
            batches.append(of_a_pool[i].tolist())
    return batches[:steps]


def count_tokens(pairs, tokenizer, rows):
    """How many tokens the pairs of these rows have: int64 (pairs,), 0 for the others."""
    tokens = torch.zeros(len(pairs), dtype=torch.long)
    for start in progress(range(0, len(rows), 5000), desc='counting tokens', unit='block'):
        block = rows[start:start + 5000]
        features, _ = evaluate.encode(tokenizer, [pairs[row] for row in block], None)
        tokens[block] = torch.tensor([len(feature['input_ids']) for feature in features])
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
    batches = plan(pairs, tokenizer, args)
    shares, weights = shares_of(batches, RANK, WORLD)
    steps = len(batches)
    max_length = evaluate.longest(model, tokenizer, args.max_length)
    optimizer = adamw(model, args)
    state = load_state(model, optimizer, args)
    at = state['step']
    loader = loader_of(copies or pairs, shares[at:], tokenizer, max_length, model.device)
    objective = robust.Objective(model, args, RANK)
    if WORLD > 1:
        objective = torch.nn.parallel.DistributedDataParallel(objective)
    dropout = CheapDropout.fitting(model)
    losses = []
    bar = progress(loader, desc=title, unit='step', total=steps, initial=at)
    started = saved = time.perf_counter()

    for step, batch in enumerate(bar, at + 1):
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

        losses.append(loss.detach())
        due = step % args.eval_steps == 0 or step == steps
        if due or step % LOOK == 0:
            check_losses(losses, batches[:step], len(pairs))
            shown = f', best dev {state["best_dev"]:.1f}' if state['best_step'] else ''
            bar.set_postfix_str(f'loss {losses[-1]:.3f}{shown}', refresh=False)
            losses.clear()
        if not due:
            continue

        state['step'] = step
        state['seconds'] += time.perf_counter() - started
        if RANK == 0:
            options = {'dtype': dtype, 'max_length': max_length, 'desc': 'dev-en'}
            predicted, _ = evaluate.predict(model, tokenizer, dev, **options)
            accuracy = evaluate.accuracy(evaluate.marks(predicted, dev))        # of English dev, in percent
            state['history'].append({'step': step, 'loss': loss.item(), 'dev': accuracy})
            # A checkpoint is a method's only if the method made it: adv's plain steps do not count.
            counts = args.method != 'adv' or step > args.plain_steps
            best = counts and accuracy > state['best_dev']      # strictly greater, as XTREME
            if best:
                state['best_dev'], state['best_step'] = accuracy, step
                # Before the state: a run killed between the two makes the same checkpoint again.
                save_checkpoint(model, tokenizer, args.out)
            if best or step == steps or time.perf_counter() - saved > STATE_SECONDS:
                save_state(model, optimizer, state, args)
                saved = time.perf_counter()
        started = time.perf_counter()
    rate = sum(map(len, batches)) / state['seconds']
    return {'dev': state['best_dev'], 'step': state['best_step'], 'steps': steps, 'history': state['history'],
            'pairs_per_second': rate}


def loader_of(rows, batches, tokenizer, max_length, device):
    """The batches as tensors; on a GPU made ahead, by a process of their own."""
    ahead = {}
    if device.type == 'cuda':
        ahead = {'num_workers': 1, 'prefetch_factor': 16, 'pin_memory': True}
        os.environ['TOKENIZERS_PARALLELISM'] = 'false'      # else a forked tokenizer warns
    padded = functools.partial(collate, tokenizer=tokenizer, max_length=max_length)
    return DataLoader(rows, batch_sampler=batches, collate_fn=padded, **ahead)


def adamw(model, args):
    """AdamW, eps 1e-8, no weight decay (XTREME, authors). What is frozen has no gradient and is skipped."""
    return torch.optim.AdamW(model.parameters(), lr=args.lr, eps=1e-8, weight_decay=0.0, fused=True)


def check_losses(losses, batches, pairs):
    """Raise InputError if a loss is not finite: `losses` of the last of the batches; pairs: how many."""
    for number, loss in enumerate(torch.stack(losses).tolist(), len(batches) - len(losses)):
        if not math.isfinite(loss):
            lines = ' '.join(str(row % pairs + 1) for row in batches[number])
            raise InputError(f'step {number + 1}: the loss is {loss}; try a smaller --lr or --eps, or '
                             f'--float32. Its batch: lines {lines} of train-en.tsv')


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
    """Write state.pt: how far the run is, its weights, AdamW's moments."""
    with replacing(Path(args.out) / 'state.pt') as part:
        torch.save({**state, 'weights': model.state_dict(), 'optimizer': optimizer.state_dict()}, part)


def load_state(model, optimizer, args):
    """How far a stopped run is, its weights and moments put back; of a new run the beginning."""
    path = Path(args.out) / 'state.pt'
    if not path.exists():
        return {'step': 0, 'best_dev': -1.0, 'best_step': 0, 'history': [], 'seconds': 0.0}
    try:
        state = torch.load(path, map_location=model.device, weights_only=True)
        model.load_state_dict(state.pop('weights'))
        optimizer.load_state_dict(state.pop('optimizer'))
    except Exception as error:      # whatever a file that is none makes torch raise
        raise InputError(f'{path}: not a state that train.py wrote ({evaluate.first_line(error)}); '
                         'remove it to begin anew') from None
    evaluate.say(f'{args.out}: goes on after step {state["step"]}')
    return state


def beginning_of(run, inputs):
    """What is known of a run before it begins: the first part of its record, and all of args.json."""
    args = {name: value for name, value in vars(run).items() if name not in PATHS + ASIDE}
    paths = {name: getattr(run, name) for name in PATHS}
    files = inputs.files | {'synonyms': digest(run.synonyms) if run.synonyms else None}
    about = {'args': args, 'paths': paths, 'files': files, 'dtype': str(inputs.dtype), 'processes': WORLD}

    versions = {'python': platform.python_version(), 'torch': torch.__version__,
                'transformers': transformers.__version__, 'tokenizers': tokenizers.__version__}
    modules = b''.join(Path(__file__).with_name(name).read_bytes() for name in SOURCE)
    source = hashlib.sha256(modules).hexdigest()[:16]
    device = f'{platform.machine()}, {torch.get_num_threads()} threads'
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return about | {'versions': versions, 'source': source, 'device': device}


def status_of(out, beginning):
    """'finished', 'to be resumed' or 'new', and the beginning to record: of a stopped run its own, the paths
    and files of now, and what it is resumed with.

    Raises InputError for another run's result or state, or other files.
    """
    folder = Path(out)
    if (folder / 'results.json').exists():
        held = evaluate.read_records([out])[0]
        refuse_other(out, held, beginning)
        if held['dtype'] != beginning['dtype']:
            evaluate.say(f'{out}: finished in {held["dtype"]}, not {beginning["dtype"]}')
        more = [name for name in beginning['files'] if name.startswith('test-') and name not in held['files']]
        if more:
            evaluate.say(f'{out}: finished without {", ".join(more)}, which '
                         f'`python evaluate.py {out} --langs` scores')
        return 'finished', held
    if (folder / 'state.pt').exists():
        try:
            held = json.loads((folder / 'args.json').read_text())
            refuse_other(out, held, beginning, 'dtype', 'processes')
            for name in evaluate.MADE_BY:
                if held[name] != beginning[name]:
                    evaluate.say(f'{out}: began with other {name}: {held[name]}, now {beginning[name]}')
        except (OSError, ValueError, LookupError, TypeError):
            raise InputError(f'{folder / "args.json"}: not what train.py wrote; name another folder with '
                             '--out') from None
        resumed_with = {name: beginning[name] for name in evaluate.MADE_BY}
        now = {'paths': beginning['paths'], 'files': beginning['files'], 'resumed_with': resumed_with}
        return 'to be resumed', held | now
    # One with args.json alone is of a run that was stopped before its first state.
    if folder.exists() and any(folder.iterdir()) and not (folder / 'args.json').exists():
        raise InputError(f'{out}: holds something else than a run; name another folder with --out')
    return 'new', beginning


def refuse_other(out, held, beginning, *more):
    """Raise InputError where two runs differ in what decides them: arguments, files both read, `more`."""
    theirs = held | held['args'] | held['files']
    ours = beginning | beginning['args'] | beginning['files']
    differ = []
    both = [name for name in beginning['files'] if name in held['files']]
    for name in [*beginning['args'], *both, *more]:
        if theirs.get(name) != ours[name]:
            differ.append(f'{name} {theirs.get(name)}, not {ours[name]}')
    if differ:
        raise InputError(f'{out}: holds another run ({"; ".join(differ)}); name another folder with --out')


def write_json(path, content):
    """Write one line of JSON, whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, allow_nan=False) + '\n')


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
    english, files = [], {}
    for split in ('train', 'dev'):
        path = path_of(args.data, args.task, split, 'en')
        pairs, files[path.name] = read_pairs(path, args.task), digest(path)
        if pairs[0].label is None:
            raise InputError(f'{path}: no labels; training needs them')
        evaluate.say(describe(path, pairs))
        english.append(pairs)
    for split, lang in itertools.product(('test', 'dev'), langs):
        path = path_of(args.data, args.task, split, lang)
        if split == 'test' or path.exists():
            read_pairs(path, args.task)
            files[path.name] = digest(path)
    pairs, dev = english[0][:args.max_train], english[1][:args.max_eval]

    layer = args.layer if any(run.layer for run in runs) else 0
    model, tokenizer = evaluate.load_encoder(runs[0].model, args.task, layer=layer)
    files['model'] = evaluate.fingerprint(model, tokenizer)
    drops = {name: value for name, value in model.config.to_dict().items() if 'drop' in name}
    files['dropout'] = json.dumps(drops, sort_keys=True)        # no part of the weights, but of the training
    copies = {}
    for run in runs:
        steps = steps_of(run, len(pairs))
        if run.method == 'adv' and run.plain_steps >= steps:
            raise InputError(f'--plain-steps {run.plain_steps}: the run has {steps} steps, so that adv would '
                             f'never begin; expected --plain-steps below {steps}')
        if run.method == 'rs_a':
            if not args.synonyms:
                fetch_neighbours(run.synonyms)      # the sample world has its own by now
            copies[run.out] = copies_of(run, pairs)
    return Inputs(pairs, dev, langs, files, copies, device, dtype)


def copies_of(run, pairs):
    """RS-A's training set, m copies of the pairs."""
    neighbours = synonyms.read_synonyms(run.synonyms)
    if run.english_only:
        neighbours = synonyms.english_only(neighbours, pairs)
    return synonyms.Copies(pairs, neighbours, m=run.m, p=run.p, seed=run.seed, name=run.synonyms)


def train_and_score(run, beginning, inputs, title):
    """One run, from its beginning to results.json."""
    began = time.perf_counter()
    out, copies = Path(run.out), inputs.copies.get(run.out)
    torch.manual_seed(run.seed)
    if inputs.device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    peak_before = peak_memory(inputs.device)
    model, tokenizer = evaluate.load_encoder(run.model, run.task, run.freeze_embeddings, run.layer or 0)
    model.to(inputs.device)
    if RANK == 0 and not (out / 'state.pt').exists():
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / 'args.json', beginning)
    trained = train(model, tokenizer, inputs.pairs, inputs.dev, run, copies, inputs.dtype, title)
    if RANK > 0:
        return

    record = beginning | trained | scores_of(run, inputs)
    record['train_pairs'] = len(inputs.pairs)
    record['changed'] = synonyms.changed_share(copies) if copies else None
    peak = peak_memory(inputs.device)
    record['peak_memory_gib'] = peak if peak != peak_before else None       # None: an earlier run set it
    record['wall_seconds'] = time.perf_counter() - began        # since it was last begun or resumed
    write_json(out / 'results.json', record)
    (out / 'state.pt').unlink(missing_ok=True)
    average = evaluate.accuracies([record], inputs.langs).nanmean()     # nan if no test file has labels
    evaluate.say(f'{title}: test average {average:.1f}, English dev {record["dev"]:.1f}; saved in {out}')


def scores_of(run, inputs):
    """Score the checkpoint in every language, its predictions written -> that part of the record."""
    model, tokenizer = evaluate.load(run.out)
    model.to(inputs.device)
    max_length = evaluate.longest(model, tokenizer, run.max_length)
    options = {'max_eval': run.max_eval, 'predictions': Path(run.out) / 'predictions' / run.task,
               'dtype': inputs.dtype, 'max_length': max_length}
    score = functools.partial(evaluate.score, model, tokenizer, run.task, run.data, inputs.langs, **options)
    test, dev = score(split='test'), score(split='dev')
    for note in evaluate.cut_note(column(test, 'cut'), max_length):
        evaluate.say(note)
    record = {'test_marks': column(test, 'marks'), 'dev_marks': column(dev, 'marks')}
    for name, marked in (('test', record['test_marks']), ('dev_all', record['dev_marks'])):
        record[name] = {lang: evaluate.accuracy(marks) for lang, marks in marked.items()}
    return record | {'answers': column(test, 'answers'), 'cut': column(test, 'cut'), 'longest': max_length}


def column(found, name):
    """One of the things that `evaluate.score` found -> {language: that}."""
    return {lang: row[name] for lang, row in found.items()}


def start_processes():
    """Where torchrun started this process: join the others."""
    if WORLD == 1:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    hours = datetime.timedelta(hours=6)         # the others wait while the first scores
    dist.init_process_group('nccl' if torch.cuda.is_available() else 'gloo', timeout=hours)


def main():
    """Train the runs that are not finished, one after another, and print the tables of all."""
    args = parse_args()
    runs = runs_of(args)
    note_unused(args, runs)
    start_processes()
    # After layer 0 comes a LayerNorm, which autocast leaves in float32; after any other a matrix product,
    # whose input it rounds to bfloat16, delta and all.
    float32 = runs[0].float32 or any(run.layer for run in runs)
    inputs = read_inputs(args, runs, *evaluate.choose_device(float32))
    unfinished = []
    for run in runs:
        status, beginning = status_of(run.out, beginning_of(run, inputs))
        evaluate.say(f'{run.out}: {status}')
        if status != 'finished':
            unfinished.append((run, beginning))
    if args.dry_run:
        return
    again = 'the same command goes on from its last saved state'
    for number, (run, beginning) in enumerate(unfinished, 1):
        title = name_of(run)
        if len(unfinished) > 1:
            title = f'run {number} of {len(unfinished)}: {title}'
        try:
            train_and_score(run, beginning, inputs, title)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f'{run.out}: stopped; {again}') from None
        except torch.OutOfMemoryError as error:
            raise InputError(f'{run.out}: out of GPU memory ({evaluate.first_line(error)}); try '
                             f'--freeze-embeddings, or a smaller --batch or --max-length; {again}') from None
        except OSError as error:
            raise InputError(f'{run.out}: {error}; {again}') from None
    if RANK == 0:
        evaluate.report(evaluate.read_records([run.out for run in runs]))
    if WORLD > 1:
        dist.destroy_process_group()


# ---------------------------------------------------------------- cheap dropout

class CheapDropout(TorchFunctionMode):
    """Within it, dropout takes 16 random bits an element (ours): a third less time a forward pass on the CPU.

    There torch draws a 64-bit number for each element, on one thread. Four elements share one here, so that
    the probability is p rounded to 1/65536. Fused attention drops inside its kernel, out of reach: it has to
    be 'eager'.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Called by torch in place of each of its functions."""
        if func is functional.dropout:
            func = self.dropout
        return func(*args, **(kwargs or {}))

    @staticmethod
    def dropout(input, p=0.5, training=True, inplace=False):
        """As torch.nn.functional.dropout; what it drops, not in place."""
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
