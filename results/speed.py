"""Pairs per second beside XTREME's way, and beside the floor: what plain training cannot do without.

    PYTHONPATH=. python results/speed.py --task pawsx --method plain adv rs_r rs_a [options of train.py]

XTREME's and the authors' way: float32, every pair padded to 128 tokens, tokenised ahead, batches of 8
accumulated to 32. The floor: plain's matrix products, as torch counts them, and AdamW's traffic, at the rates
at which this very machine multiplies large matrices and copies memory. All are timed in turn, on the same
pairs, three times; the medians are printed, on a GPU with each method's peak memory. No training result is
kept.
"""

import argparse
import copy
import random
import tempfile
import time

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import train
from data import run_script

ROUNDS = 3
STEPS = 300 if torch.cuda.is_available() else 16


def xtreme_way(run, pairs, device):
    """XTREME's way -> pairs per second of training, of evaluation."""
    model, tokenizer = evaluate.load_encoder(run.model, run.task)
    model.to(device)
    optimizer = train.adamw(model, run)
    max_length = evaluate.longest(model, tokenizer, run.max_length)
    premises, hypotheses, labels = zip(*pairs)
    encoded = tokenizer(list(premises), list(hypotheses), truncation=True, max_length=max_length,
                        padding='max_length', return_tensors='pt')
    encoded['labels'] = torch.tensor(labels)
    rates = []
    for training in (True, False):
        model.train(training)
        started = time.perf_counter()
        for start in range(0, len(pairs), 8):
            batch = {name: value[start:start + 8].to(device) for name, value in encoded.items()}
            with torch.set_grad_enabled(training):
                loss = model(**batch).loss / 4
            if training:
                loss.backward()
                if start % 32 == 24:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
        loss.item()         # waits for the GPU
        rates.append(len(pairs) / (time.perf_counter() - started))
    return rates


def work_of(model, tokenizer, pairs, run):
    """What plain training cannot do without -> operations of a pair's forward pass, bytes a step.

    Operations: floating-point, of matrix products, in batches padded as in training; the way back has twice
    as many. Bytes: AdamW's, 32 a trained float32: its gradient is written and read, its value and both
    moments are read and written.
    """
    shapes = copy.deepcopy(model).to('meta')        # counting needs no numbers
    shapes.set_attn_implementation('eager')
    max_length = evaluate.longest(model, tokenizer, run.max_length)
    epoch = argparse.Namespace(**vars(run) | {'epochs': 1, 'max_steps': None, 'own': {}})
    with FlopCounterMode(display=False) as counter:
        for rows in train.plan(pairs, tokenizer, epoch):
            batch = train.collate([pairs[row] for row in rows], tokenizer, max_length)
            batch = {name: value.to('meta') for name, value in batch.items()}
            del batch['attention_mask']             # transformers reads its numbers
            shapes(**batch)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return counter.get_total_flops() / len(pairs), 32 * trained


def rates_of(device, dtype):
    """The machine's own rates: operations a second of a large matrix product, bytes of a large copy."""
    size = 8192 if device.type == 'cuda' else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    c, d = torch.randn(2, 2 ** 26, device=device)
    rates = []
    for work, amount in (('a @ b', 2 * size ** 3), ('c.copy_(d)', 2 * 4 * len(c))):
        timer = Timer(work, globals={'a': a, 'b': b, 'c': c, 'd': d}, num_threads=torch.get_num_threads())
        rates.append(amount / timer.blocked_autorange(min_run_time=1).median)
    return rates


def ours(run, pairs, inputs):
    """This program's way -> pairs per second of training with the run's method, peak memory in GiB or nan."""
    run = argparse.Namespace(**vars(run) | {'max_steps': STEPS, 'eval_steps': STEPS})
    copies = train.copies_of(run, pairs)
    model, tokenizer = evaluate.load_encoder(run.model, run.task, run.freeze_embeddings)
    model.to(inputs.device)
    on_gpu = inputs.device.type == 'cuda'
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as run.out:
        found = train.train(model, tokenizer, pairs, pairs[:1], run, copies, inputs.dtype, run.method)
    peak = torch.cuda.max_memory_allocated() / 2 ** 30 if on_gpu else float('nan')
    return found['pairs_per_second'], peak


def one_round(runs, inputs):
    """Everything once -> name -> pairs per second, or what its name says."""
    found = {}
    first = runs[0]
    chosen = random.Random(0).sample(inputs.pairs, min(len(inputs.pairs), 32 * STEPS))
    found['training, XTREME'], found['evaluation, XTREME'] = xtreme_way(first, chosen, inputs.device)
    found['products'], found['copies'] = rates_of(inputs.device, inputs.dtype)
    model, tokenizer = evaluate.load_encoder(first.model, first.task, first.freeze_embeddings)
    model.to(inputs.device)
    found['forward'], found['moved'] = work_of(model, tokenizer, chosen, first)
    max_length = evaluate.longest(model, tokenizer, first.max_length)
    started = time.perf_counter()
    evaluate.predict(model, tokenizer, chosen, dtype=inputs.dtype, max_length=max_length)
    found['evaluation'] = len(chosen) / (time.perf_counter() - started)
    del model           # else it would count in the peaks
    for run in runs:
        found[f'training, {run.method}'], found[f'memory, {run.method}'] = ours(run, chosen, inputs)
    return found


def main(words=None):
    """Time everything, and print each rate beside its baseline and, for plain and evaluation, the floor."""
    args = train.parse_args(words)
    runs = train.runs_of(args)
    inputs = train.read_inputs(args, runs)
    rounds = [one_round(runs, inputs) for _ in range(ROUNDS)]
    median = {}
    for name in rounds[0]:
        median[name] = sorted(found[name] for found in rounds)[ROUNDS // 2]
    step = median['moved'] / median['copies'] / runs[0].batch       # seconds a pair
    floor = {'training, plain': 1 / (3 * median['forward'] / median['products'] + step),
             'evaluation': median['products'] / median['forward']}
    print(f'floor: 3 x {median["forward"] / 1e9:.3g} GFLOP a pair at {median["products"] / 1e9:.3g} GFLOP/s, '
          f'{median["moved"] / 1e9:.3g} GB a step at {median["copies"] / 1e9:.3g} GB/s')
    for name, rate in median.items():
        kind, _, of = name.partition(', ')
        if kind not in ('training', 'evaluation'):
            continue
        line = f'{name:20} {rate:8.1f} pairs/s, {rate / median[f"{kind}, XTREME"]:5.2f} times XTREME\'s'
        if name in floor:
            line += f', {rate / floor[name]:4.0%} of the floor ({floor[name]:.0f})'
        elif f'memory, {of}' in median and 'training, plain' in median:
            line += f', {median["training, plain"] / rate:5.2f} times the step of plain'
        if f'memory, {of}' in median and inputs.device.type == 'cuda':
            line += f', {median[f"memory, {of}"]:.1f} GiB at most'
        print(line)


if __name__ == '__main__':
    run_script(main)
