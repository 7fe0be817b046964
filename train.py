"""Fine-tune a multilingual encoder on English with the paper's four methods, then score every language.

    python train.py --task pawsx --method rs_r --eps 0.1
    python train.py --task sample --method plain rs_r           a made-up task, no download
    python train.py --task pawsx --method plain adv rs_r rs_a --eps 0.001 0.01 0.1 1.0 --seed 1 2 3    Table 1

A run folder holds, in the order in which it is written: args.json, what the run is; a Hugging Face
checkpoint, the best by English dev accuracy; state.pt, what a stopped run needs to go on, gone at the end;
predictions/; and results.json, one line, never changed after: with it the run is finished. The same command
given again skips what is finished and goes on with what was stopped; started several times at once, it shares
its runs out. Several GPUs for one run: torchrun --nproc_per_node N train.py ...
"""

import argparse
import contextlib
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import random
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
import torch.distributed as dist
import transformers
from filelock import FileLock, Timeout
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

import evaluate
import robust
import synonyms
from data import (NEIGHBOURS, NEIGHBOURS_SHA256, RANK, TASKS, WORLD, InputError, Parser, digest,
                  enough_memory, fetch_neighbours, in_range, languages_of, path_of, prepare, progress,
                  read_pairs, replacing, run_script, write_json)

# Of PAWS-X and XNLI: XTREME's published scripts; the authors' code (uclanlp/Robust-XLT) has the same but for
# epochs. epochs: XTREME's script (PAWS-X) and its paper (XNLI); epochs_rs_a, over the augmented data, and the
# neighbour file, whose digest stands here, are the authors'. float32 is ours, and so is all of sample.
COMMON = {'seed': [42], 'max_length': 128, 'data': 'download', 'dry_run': False}
XTREME = {'lr': 2e-5, 'batch': 32, 'warmup': 0.0, 'freeze_embeddings': False, 'float32': False,
          'synonyms': NEIGHBOURS_SHA256[:16]}
DEFAULTS = {
    'pawsx': {**XTREME, 'epochs': 5, 'epochs_rs_a': 3, 'eval_steps': 200},
    'xnli': {**XTREME, 'epochs': 2, 'epochs_rs_a': 1, 'eval_steps': 1000},
    'sample': {'lr': 1e-3, 'batch': 64, 'warmup': 0.05, 'freeze_embeddings': True, 'float32': True,
               'synonyms': '46401c0147f5a83d', 'epochs': 4, 'epochs_rs_a': 0.4, 'eval_steps': 250,
               'plain_steps': 750},
}
POOL = 64               # batches that are sorted by length together (ours)
# A dev evaluation saves the state if it is the best, the last, or this long after the state before (ours).
STATE_SECONDS = 300
SOURCE = ('robust.py', 'synonyms.py', 'data.py', 'train.py', 'evaluate.py', 'distance.py')


# ---------------------------------------------------------------- the command line

COUNT, SHARE, POSITIVE = in_range(int, 1), in_range(float, 0, 1), in_range(float, 1e-9)
FLAGS = {       # name: type, the choices or bool; what the help says
    'task': (TASKS, 'sample: a small made-up world that needs no download'),
    'method': (robust.METHODS, 'plain training; adv: adversarial training (3.1); rs_r: random perturbation, '
               'rs_a: synonyms (3.2); one run for each method, eps and seed'),
    'eps': (in_range(float, 0), 'radius of the L-inf ball; paper: 0.001 0.01 0.1 1.0'),
    'seed': (in_range(int, 0, 2 ** 63 - 1), 'of every random draw'),
    'model': (str, f'any Hugging Face encoder, a name or a folder; else {evaluate.MBERT}, of sample its own'),
    'dry_run': (bool, 'fetch and look at all that the runs read, list them, stop'),
    'layer': (int, 'where Enc(x) ends: 0 word embeddings, k the k-th layer, -1 the last; with any but 0 all '
              'runs of the command are float32'),
    'adv_steps': (COUNT, 'sign steps of the inner maximisation'),
    'plain_steps': (in_range(int, 0), 'begin with so many steps of plain training'),
    'm': (COUNT, 'augmented copies of each pair'),
    'p': (SHARE, 'probability that a word is replaced'),
    'replace': (('paper', 'authors'), 'each word with probability p; or every word, uniform over itself and '
                'its synonyms'),
    'english_only': (bool, 'only synonyms that occur in the English training pairs'),
    'synonyms': (str, "rs_a: neighbour file; else the authors', fetched into DATA"),
    'epochs': (POSITIVE, 'passes over the training set, of rs_a over its copies'),
    'lr': (POSITIVE, 'peak learning rate, linear decay to 0'),
    'warmup': (SHARE, 'share of the steps in which the learning rate rises'),
    'batch': (COUNT, 'pairs a step, over all GPUs'),
    'max_length': (in_range(int, 8), 'tokens a pair, at most'),
    'eval_steps': (COUNT, 'English dev accuracy every so many steps'),
    'max_steps': (COUNT, 'stop after so many steps, the schedule shortened to them'),
    'freeze_embeddings': (bool, 'keep the word embeddings as pre-trained'),
    'float32': (bool, 'no bfloat16, whatever the hardware'),
    'data': (str, "folder in XTREME's layout"),
    'langs': (str, "languages to score, any with a test file; else the task's"),
    'max_train': (COUNT, 'train on so many pairs only, the first'),
    'max_eval': (COUNT, 'score so many pairs of each dev and test file only, the first'),
    'out': (str, 'run folder; of several runs the folder above them; else runs/TASK-RUN, RUN being such as '
            'rs_r-0.1-seed42'),
}


def parse_args(words=None):
    """The command line, or these words of one; None for what is not given. Raises InputError."""
    flags, defaults = dict(FLAGS), {'all': COMMON, **DEFAULTS}
    for method, (_, own) in robust.METHODS.items():
        defaults[method] = own
        for name, value in own.items():
            flags.setdefault(name, (type(value), ''))       # of a method that is not the paper's
    parser = Parser(
        description=__doc__, epilog='\n'.join(f'defaults of {of}: {them}' for of, them in defaults.items()),
        usage='%(prog)s --task TASK --method METHOD [METHOD ...] [options]      (all of them: --help)')
    for name, (kind, text) in flags.items():
        options = {'type': kind} if callable(kind) else {'choices': kind}
        if kind is bool:
            options = {'action': argparse.BooleanOptionalAction}
        if name in ('method', 'eps', 'seed', 'langs'):
            options['nargs'] = '+'
        parser.add_argument('--' + name.replace('_', '-'), required=name in ('task', 'method'),
                            default=COMMON.get(name), help=text, **options)
    return parser.parse_args(words)


def runs_of(args):
    """One set of arguments for each run that the command line asks for, defaults filled in.

    `own`: the arguments of its method, and of no other.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    defaults = DEFAULTS[args.task]
    runs = []
    for method, seed, eps in itertools.product(args.method, args.seed, args.eps or [None]):
        run = argparse.Namespace(**vars(args) | defaults | given)
        run.method, run.seed, run.own, run.synonyms = method, seed, {}, None
        for name, default in robust.METHODS[method].own.items():
            run.own[name] = given.get(name, defaults.get(name, default))
        if args.eps and 'eps' in run.own:
            run.own['eps'] = eps
        run.model = args.model or evaluate.default_model(args.task, args.data)
        if 'm' in run.own:
            run.epochs = args.epochs or defaults['epochs_rs_a']
            file = 'sample/synonyms.json' if args.task == 'sample' else NEIGHBOURS
            run.synonyms = args.synonyms or f'{args.data}/{file}'
        if run not in runs:         # without an eps of its own it would be there for each
            runs.append(run)
    return runs


# ---------------------------------------------------------------- identity

def identity_of(run, inputs):
    """What a run is, made here and nowhere else -> {'setting', 'variant', 'seed', 'name'}.

    setting: what must agree in one table. variant: method, eps, and those of its own arguments that are not
    its default. name: the variant and the seed, by which folder, row, title and legend go. RS-A's number of
    steps is its own, as it runs over its copies; that of all others is part of the setting.
    """
    setting = {'task': run.task, **inputs.files, 'train_pairs': len(inputs.pairs)}
    for name in ('lr', 'batch', 'warmup', 'eval_steps', 'max_length', 'max_eval', 'freeze_embeddings'):
        setting[name] = getattr(run, name)
    setting['dtype'] = evaluate.short(inputs.dtype)
    own, usual = dict(run.own), robust.METHODS[run.method].own | DEFAULTS[run.task]
    steps = steps_of(run, len(inputs.pairs))
    if 'm' in own:
        own |= {'synonyms': digest(run.synonyms), 'steps': steps}
        usual['steps'] = math.ceil(rows_of(usual['epochs_rs_a'], len(inputs.pairs) * own['m']) / run.batch)
    else:
        setting['steps'] = steps
    variant, words = {'method': run.method}, [run.method]
    for name, value in own.items():
        if name == 'eps' or value != usual[name]:
            variant[name] = value
            words.append(str(value) if name == 'eps' else f'{name}{value}'.removesuffix('True'))
    return {'setting': setting, 'variant': variant, 'seed': run.seed,
            'name': '-'.join([*words, f'seed{run.seed}'])}


def beginning_of(run, inputs):
    """What is known of a run before it begins: args.json, the first part of its record.

    `made_by` decides nothing, but is said where it differs when a run goes on.
    """
    aside = {'own', 'epochs_rs_a'}.union(*(method.own for method in robust.METHODS.values()))
    args = {name: value for name, value in vars(run).items() if name not in aside}
    versions = {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)}
    versions['python'] = platform.python_version()
    modules = b''.join(Path(__file__).with_name(name).read_bytes() for name in SOURCE)
    device = f'{platform.machine()}, {torch.get_num_threads()} threads'
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    made_by = {'versions': versions, 'source': hashlib.sha256(modules).hexdigest()[:16], 'device': device,
               'processes': WORLD}
    return identity_of(run, inputs) | {'args': args | run.own, 'made_by': made_by}


# ---------------------------------------------------------------- batches

def rows_of(epochs, rows):
    """The number of rows that training takes: epochs x rows (pairs x RS-A's copies), rounded up."""
    return max(1, math.ceil(round(epochs * rows, 6)))       # in floats 0.55 * 3200 is above 1760


def steps_of(run, pairs):
    """The number of steps, the last of them perhaps with fewer rows; or max_steps if that is less."""
    steps = math.ceil(rows_of(run.epochs, pairs * run.own.get('m', 1)) / run.batch)
    return min(steps, run.max_steps or steps)


def plan(pairs, tokenizer, run):
    """The batch of every step, before the first one: a list of lists of row numbers, from the seed.

    Each epoch has all rows (RS-A's: m copies of each pair) in an order of its own, and the next one follows
    without a break. Pairs of like length share a batch, which is padded to its longest (ours): pools of 64
    batches are sorted by token count, a copy by that of the original pair, and come in random order.
    """
    steps = steps_of(run, len(pairs))
    rows = len(pairs) * run.own.get('m', 1)
    pool_rows = POOL * run.batch
    # Only the pools of the steps that run: what max_steps cuts off is not drawn.
    wanted = min(rows_of(run.epochs, rows), math.ceil(steps / POOL) * pool_rows)
    generator = torch.Generator().manual_seed(run.seed)
    epochs = [torch.randperm(rows, generator=generator) for _ in range(math.ceil(wanted / rows))]
    order = torch.cat(epochs)[:wanted]

    # How many tokens a pair has; row = copy * len(pairs) + pair, as in synonyms.Copies.
    tokens = torch.zeros(len(pairs), dtype=torch.long)
    for block in progress((order % len(pairs)).unique().split(5000), desc='counting tokens', unit='block'):
        features, _ = evaluate.encode(tokenizer, [pairs[row] for row in block.tolist()], None)
        tokens[block] = torch.tensor([len(feature['input_ids']) for feature in features])
    batches = []
    for pool in order.split(pool_rows):
        by_length = pool[tokens[pool % len(pairs)].argsort(stable=True)]
        of_a_pool = by_length.split(run.batch)
        for i in torch.randperm(len(of_a_pool), generator=generator).tolist():
            batches.append(of_a_pool[i].tolist())
    return batches[:steps]


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

def learning_rate(step, steps, run):
    """Of a step, counted from 1: rises over warmup * steps, then falls to 0, linearly (XTREME, authors)."""
    done = step - 1
    rising = round(run.warmup * steps)
    if done < rising:
        return run.lr * done / rising
    return run.lr * (steps - done) / (steps - rising)


def draw(seed, step, name):
    """A seed of 32 bits for what `name` says: of seed, step and process, so that a stopped run can go on."""
    return random.Random(f'{seed} {step} {RANK} {name}').getrandbits(32)


def train(model, tokenizer, pairs, dev, run, copies=None, dtype=torch.float32, title='training'):
    """min_f of the objective over X_src (section 3): the one training loop, whatever the method.

    `pairs` is X_src, `copies` RS-A's m copies of it. Gradient norm clipped at 1.0 (XTREME, authors). Writes
    the checkpoint best by English dev accuracy and the state to run.out; returns that part of the record.
    The loss in its history is of that step's batch alone (the first process's share), by the method's own
    objective.
    """
    batches = plan(pairs, tokenizer, run)
    shares, weights = shares_of(batches, RANK, WORLD)
    steps = len(batches)
    max_length = evaluate.longest(model, tokenizer, run.max_length)
    optimizer = adamw(model, run)
    state = load_state(model, optimizer, run)
    at = state['step']
    loader = loader_of(copies or pairs, shares[at:], tokenizer, max_length, model.device)
    plain, method = robust.METHODS['plain'].objective, robust.METHODS[run.method].objective
    plain_steps = run.own.get('plain_steps', 0)
    noise = torch.Generator(model.device)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    dropout = CheapDropout.fitting(model)
    bar = progress(loader, desc=title, unit='step', total=steps, initial=at)
    started = saved = time.perf_counter()

    for step, batch in enumerate(bar, at + 1):
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step, steps, run)
        batch = {name: value.to(model.device, non_blocking=True) for name, value in batch.items()}
        torch.manual_seed(draw(run.seed, step, 'dropout'))
        noise.manual_seed(draw(run.seed, step, 'delta'))
        objective = method if step > plain_steps else plain
        wrapped.train()
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32), dropout:
            loss = objective(wrapped, batch, run.own, noise)
        (loss * weights[step - 1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        if step % run.eval_steps > 0 and step < steps:
            continue
        state['step'] = step
        state['seconds'] += time.perf_counter() - started
        if RANK == 0:
            # Stops a run that diverged: logits that are not finite are an InputError.
            predicted, _ = evaluate.predict(model, tokenizer, dev, dtype=dtype, max_length=max_length,
                                            desc='dev-en')
            accuracy = evaluate.accuracy(evaluate.marks(predicted, dev))        # of English dev, in percent
            state['history'].append({'step': step, 'loss': loss.item(), 'dev': accuracy})
            bar.set_postfix_str(f'dev {accuracy:.1f}', refresh=False)
            # A checkpoint is a method's only if the method made it; strictly greater, as XTREME.
            best = step > plain_steps and accuracy > state['best_dev']
            if best:
                state['best_dev'], state['best_step'] = accuracy, step
                # Before the state: a run killed between the two makes the same checkpoint again.
                save_checkpoint(model, tokenizer, run.out)
            if best or step == steps or time.perf_counter() - saved > STATE_SECONDS:
                save_state(model, optimizer, state, run)
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


def adamw(model, run):
    """AdamW, eps 1e-8, no weight decay (XTREME, authors). What is frozen has no gradient and is skipped."""
    return torch.optim.AdamW(model.parameters(), lr=run.lr, eps=1e-8, weight_decay=0.0, fused=True)


# ---------------------------------------------------------------- the run folder

WRITTEN = ('config.json', 'model.safetensors', 'tokenizer.json', 'state.pt', 'predictions', 'args.json',
           'results.json')


def save_checkpoint(model, tokenizer, out):
    """Write the checkpoint beside, then move it in, file by file: `out` never holds half a file."""
    part = Path(out) / 'checkpoint.part'
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        for file in part.iterdir():
            os.replace(file, Path(out) / file.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def save_state(model, optimizer, state, run):
    """Write state.pt: how far the run is, its weights, AdamW's moments."""
    with replacing(Path(run.out) / 'state.pt') as part:
        torch.save({**state, 'weights': model.state_dict(), 'optimizer': optimizer.state_dict()}, part)


def load_state(model, optimizer, run):
    """How far a stopped run is, its weights and moments put back; of a new run the beginning."""
    path = Path(run.out) / 'state.pt'
    if not path.exists():
        return {'step': 0, 'best_dev': -1.0, 'best_step': 0, 'history': [], 'seconds': 0.0}
    state = torch.load(path, map_location=model.device, weights_only=True)
    model.load_state_dict(state.pop('weights'))
    optimizer.load_state_dict(state.pop('optimizer'))
    evaluate.say(f'{run.out}: goes on after step {state["step"]}')
    return state


def status_of(out, beginning, alone=True):
    """'finished', 'to be resumed' or 'new', and the beginning to record. alone: no other process is at it.

    Raises InputError where the folder holds another run: setting, variant and seed decide. One that was
    stopped before it had saved anything makes way.
    """
    folder = Path(out)
    held = [name for name in WRITTEN if (folder / name).exists()]
    if not held:
        return 'new', beginning
    path = folder / ('results.json' if 'results.json' in held else 'args.json')
    try:
        theirs = json.loads(path.read_text())
        differ = evaluate.differences(theirs['setting'], beginning['setting'])
        if theirs['name'] != beginning['name']:
            differ.insert(0, f'{theirs["name"]}, not {beginning["name"]}')
        others = evaluate.differences(theirs['made_by'], beginning['made_by'])
    except (OSError, ValueError, LookupError, TypeError):
        raise InputError(f'{folder}: holds {", ".join(held)}, but no {path.name} of this train.py; name '
                         'another folder with --out') from None
    if differ and not (alone and held == ['args.json']):
        raise InputError(f'{out}: holds another run ({"; ".join(differ)}); name another folder with --out')
    if path.name == 'results.json':
        return 'finished', theirs
    if 'state.pt' not in held:
        return 'new', beginning
    if others:
        evaluate.say(f'{out}: began with {"; ".join(others)}')
    return 'to be resumed', beginning | {'began_with': theirs.get('began_with', theirs['made_by'])}


# ---------------------------------------------------------------- the runs

class Inputs(NamedTuple):
    """All that the runs of a command read, and what they run on."""
    pairs: list         # X_src
    dev: list           # English dev
    langs: list         # to score
    files: dict         # name -> digest; of the encoder also its dropout
    device: torch.device
    dtype: torch.dtype


def read_inputs(args, runs):
    """Everything that the runs will read, looked at before the first of them begins. Raises InputError."""
    layer = next((run.own['layer'] for run in runs if run.own.get('layer')), 0)
    # After layer 0 comes a LayerNorm, which autocast leaves in float32; after any other a matrix product,
    # whose input it rounds to bfloat16, delta and all.
    device, dtype = evaluate.choose_device(runs[0].float32 or layer != 0)
    prepare(args.data, args.task, langs=args.langs)
    langs = languages_of(args.task, args.langs)
    read, files = {}, {}
    for split, lang in [('train', 'en'), ('dev', 'en'), *itertools.product(('test', 'dev'), langs)]:
        path = path_of(args.data, args.task, split, lang)
        if split != 'dev' or lang == 'en' or path.exists():
            read[path.name] = read_pairs(path, args.task)
            files[path.name] = digest(path)
    pairs, dev = read['train-en.tsv'][:args.max_train], read['dev-en.tsv'][:args.max_eval]
    if None in (pairs[0].label, dev[0].label):
        raise InputError(f'{args.data}/{args.task}: train-en.tsv or dev-en.tsv has no labels; both need them')

    model, tokenizer = evaluate.load_encoder(runs[0].model, args.task, layer=layer)
    files['model'] = evaluate.fingerprint(model, tokenizer)
    drops = {name: value for name, value in model.config.to_dict().items() if 'drop' in name}
    files['dropout'] = json.dumps(drops, sort_keys=True)        # no part of the weights, but of the training
    for run in runs:
        if run.own.get('plain_steps', 0) >= steps_of(run, len(pairs)):
            raise InputError(f'--plain-steps {run.own["plain_steps"]}: {run.method} would never begin; '
                             f'expected fewer than the {steps_of(run, len(pairs))} steps of the run')
        if run.synonyms:
            if not args.synonyms:
                fetch_neighbours(run.synonyms)      # the sample world has its own by now
            copies_of(run, pairs)
    return Inputs(pairs, dev, langs, files, device, dtype)


def copies_of(run, pairs):
    """RS-A's training set, m copies of the pairs; None for the other methods."""
    if not run.synonyms:
        return None
    neighbours = synonyms.read_synonyms(run.synonyms)
    if run.own['english_only']:
        neighbours = synonyms.english_only(neighbours, pairs)
    return synonyms.Copies(pairs, neighbours, m=run.own['m'], p=run.own['p'], how=run.own['replace'],
                           seed=run.seed, name=run.synonyms)


def train_and_score(run, beginning, inputs):
    """One run, from its beginning to results.json."""
    out, copies = Path(run.out), copies_of(run, inputs.pairs)
    if RANK == 0:
        write_json(out / 'args.json', beginning)
    torch.manual_seed(run.seed)
    model, tokenizer = evaluate.load_encoder(run.model, run.task, run.freeze_embeddings)
    model.to(inputs.device)
    trained = train(model, tokenizer, inputs.pairs, inputs.dev, run, copies, inputs.dtype, beginning['name'])
    if RANK > 0:
        return
    record = beginning | trained | scores_of(run, inputs)
    write_json(out / 'results.json', record)
    (out / 'state.pt').unlink(missing_ok=True)
    evaluate.say(f'{out}: finished, English dev {record["dev"]:.1f}')


def scores_of(run, inputs):
    """Score the checkpoint in every language, its predictions written -> that part of the record."""
    model, tokenizer = evaluate.load(run.out)
    model.to(inputs.device)
    max_length = evaluate.longest(model, tokenizer, run.max_length)
    options = {'max_eval': run.max_eval, 'dtype': inputs.dtype, 'max_length': max_length}
    record = {'longest': max_length}
    for split, shown in (('dev', 'dev_all'), ('test', 'test')):
        scored = evaluate.score(model, tokenizer, run.task, run.data, inputs.langs, split=split, **options)
        scored = dict(scored)
        evaluate.write_predictions(Path(run.out) / 'predictions' / run.task, split, scored)
        marks = {lang: row['marks'] for lang, row in scored.items()}
        record[f'{split}_marks'] = marks
        record[shown] = {lang: evaluate.accuracy(row) if row else None for lang, row in marks.items()}
    for name in ('answers', 'cut'):
        record[name] = {lang: row[name] for lang, row in scored.items()}       # of the test files
    return record


def start_processes():
    """Where torchrun started this process: join the others."""
    if WORLD == 1:
        if 'RANK' in os.environ:
            evaluate.say('RANK is set, but torchrun did not set it: one process')
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    # The others wait while the first scores.
    dist.init_process_group('nccl' if torch.cuda.is_available() else 'gloo',
                            timeout=datetime.timedelta(hours=6))


def make(run, beginning, inputs):
    """Make a run, unless it is finished or another process is at it. Raises InputError.

    The folder's one writer holds its lock, and asks only then what the folder holds.
    """
    lock, found = FileLock(Path(run.out) / '.lock'), [None]
    if RANK == 0:       # it decides for all
        Path(run.out).mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=2)     # so long that another writer has said in args.json what it makes
        found = [(*status_of(run.out, beginning, lock.is_locked), lock.is_locked)]
    if WORLD > 1:
        dist.broadcast_object_list(found)
    status, beginning, alone = found[0]
    try:
        if status != 'finished' and not alone:
            evaluate.say(f'{run.out}: being made by another process')
        elif status != 'finished':
            with enough_memory('try --freeze-embeddings, or a smaller --batch or --max-length'):
                train_and_score(run, beginning, inputs)
    except InputError as error:
        raise InputError(f'{run.out}: {error}') from None
    finally:
        lock.release()


def main(words=None):
    """Train the runs that are not finished, one after another, and print the tables of all.

    `words`: a command line, for notebooks. A run that fails does not end the others.
    """
    args = parse_args(words)
    runs = runs_of(args)
    start_processes()
    inputs = read_inputs(args, runs)
    beginnings, failed = [], []
    for run in runs:
        name = identity_of(run, inputs)['name']
        run.out = args.out if args.out and len(runs) == 1 else f'{args.out or "runs"}/{args.task}-{name}'
        beginnings.append(beginning_of(run, inputs))
        status, _ = status_of(run.out, beginnings[-1])
        evaluate.say(f'{run.out}: {status}, {steps_of(run, len(inputs.pairs)):,} steps')
    if args.dry_run:
        return
    for run, beginning in zip(runs, beginnings):
        try:
            make(run, beginning, inputs)
        except InputError as error:
            if WORLD > 1 or len(runs) == 1:         # the other processes are where this one is not
                raise
            failed.append(str(error))
            evaluate.say(failed[-1])
    finished = [run.out for run in runs if (Path(run.out) / 'results.json').exists()]
    if RANK == 0 and finished and len(finished) + len(failed) == len(runs):     # the last to end prints them
        evaluate.report(evaluate.read_records(finished))
    if WORLD > 1:
        dist.destroy_process_group()
    if failed:
        raise InputError('\n'.join(failed))


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
