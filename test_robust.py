"""Tests of what the code claims, against hand computation, closed forms and the library it rests on."""

import contextlib
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import runpy
import shutil
import socket
import statistics
import subprocess
import sys
import tarfile
import textwrap
import types
import zipfile
from pathlib import Path
from subprocess import PIPE
from unittest import mock

import pytest
import tokenizers
import torch
import transformers
from filelock import FileLock
from transformers import AutoModel, BertConfig, BertForSequenceClassification, XLMRobertaConfig
from transformers import XLMRobertaForSequenceClassification

import data
import distance
import evaluate
import robust
import synonyms
import train

HERE = Path(__file__).parent
SHARED = HERE.parent / 'shared'
real = pytest.mark.skipif(not (SHARED / 'data').exists(),
                          reason='needs real data and a real encoder in ../shared')
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'PYTHONPATH': str(HERE)}
torch.set_num_threads(1)        # as the processes that tests start: another number sums in another order

SIZE = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=20, pad_token_id=1, num_labels=3)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
FAST = '--max-steps 8 --eval-steps 4 --batch 16 --no-freeze-embeddings'
DIGEST = re.compile(r'\b[0-9a-f]{16}\b')


@pytest.fixture(scope='session')
def world(tmp_path_factory):
    """DATA with the sample world in it."""
    path = tmp_path_factory.mktemp('data')
    data.prepare(path, 'sample')
    return path


@pytest.fixture(scope='session', autouse=True)
def begun(request, tmp_path_factory):
    """The runs of `trained`, if a test needs them: they begin first, and have what the other tests leave."""
    processes = {}
    methods = {}
    if any('trained' in item.fixturenames for item in request.session.items):
        world = request.getfixturevalue('world')
        methods = {'plain': 'plain', 'rs_r': 'rs_r --eps 0.1', 'adv': 'adv --eps 0.01 --plain-steps 500'}
    for name, method in methods.items():
        folder = tmp_path_factory.mktemp(name)
        flags = f'--task sample --data {world} --out {folder / "run"} --seed 1 --method {method}'
        flags += ' --max-steps 1000 --eval-steps 500 --max-eval 1000'
        with open(folder / 'log', 'w') as log:
            process = subprocess.Popen([sys.executable, str(HERE / 'train.py'), *flags.split()],
                                       env=ENVIRONMENT, stdout=log, stderr=log,
                                       preexec_fn=lambda: os.nice(19))
        processes[name] = process, folder
    yield processes
    for process, _ in processes.values():
        process.kill()
        process.wait()


@pytest.fixture(scope='session')
def small(world, tmp_path_factory):
    """DATA with the sample world cut to 300 rows of training and 30 of every other file."""
    folder = tmp_path_factory.mktemp('small')
    shutil.copytree(world / 'sample', folder / 'sample')
    for path in (folder / 'sample').glob('*.tsv'):
        rows = 300 if path.name == 'train-en.tsv' else 30
        path.write_bytes(b'\r\n'.join(path.read_bytes().split(b'\r\n')[:rows]) + b'\r\n')
    return folder


@pytest.fixture(scope='session')
def dropping(world, tmp_path_factory):
    """The sample world's encoder, with dropout."""
    folder = tmp_path_factory.mktemp('dropping')
    model = transformers.BertModel.from_pretrained(world / 'sample/model', hidden_dropout_prob=0.1,
                                                   attention_probs_dropout_prob=0.1)
    model.save_pretrained(folder)
    evaluate.AutoTokenizer.from_pretrained(world / 'sample/model').save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(world):
    return evaluate.AutoTokenizer.from_pretrained(world / 'sample/model')


@pytest.fixture
def call(capsys):
    """call('train --task sample ...') runs a script's main in this process -> what it printed (out, err)."""
    def call(command, *more):
        script, *words = command.split()
        evaluate.say.cache_clear()
        globals()[script].main([*words, *map(str, more)])
        return capsys.readouterr()
    return call


@pytest.fixture
def run(small, tmp_path, call):
    """run(name, flags): train.py on the small world -> (run folder, its record)."""
    def run(name, flags, folder=small):
        call(f'train --task sample {flags}', '--data', folder, '--out', tmp_path / name)
        return tmp_path / name, record_of(tmp_path / name)
    return run


def processes(*jobs):
    """(code, words, environment), ...: run at once -> [(exit status, stdout, stderr)]."""
    started = []
    for code, words, *env in jobs:
        started.append(subprocess.Popen([sys.executable, '-c', code, *map(str, words)], text=True,
                                        env=ENVIRONMENT | dict(*env), stdout=PIPE, stderr=PIPE))
    ended = [process.communicate() for process in started]
    return [(process.returncode, *said) for process, said in zip(started, ended)]


def two(code, *words):
    """The jobs of two processes that torch.distributed joins; of their environment, what torchrun sets."""
    with socket.socket() as listener:
        listener.bind(('localhost', 0))
        port = str(listener.getsockname()[1])
    common = {'WORLD_SIZE': '2', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': port}
    return [(code, words, common | {'RANK': rank, 'LOCAL_RANK': rank}) for rank in '01']


def record_of(folder):
    return json.loads((folder / 'results.json').read_text())


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob('*') if path.is_file()}


def change(path, old, new):
    """Replace bytes of a file, once; `old` None: the whole file."""
    if old is None:
        Path(path).write_bytes(new)
        return
    content = Path(path).read_bytes()
    assert old in content
    Path(path).write_bytes(content.replace(old, new, 1))


@pytest.fixture(params=[(BertConfig, BertForSequenceClassification),
                        (XLMRobertaConfig, XLMRobertaForSequenceClassification)], ids=['bert', 'xlm-r'])
def model(request):
    """A tiny random classifier in training mode, dropout on."""
    config, architecture = request.param
    torch.manual_seed(0)
    return architecture(config(**SIZE, initializer_range=0.3)).train()


@pytest.fixture
def bert():
    """The same of BERT alone, without dropout."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZE, **NO_DROPOUT, initializer_range=0.3))


@pytest.fixture
def batch():
    ids = torch.tensor([[2, 5, 6, 7, 8, 3], [2, 9, 10, 3, 1, 1]])
    return {'input_ids': ids, 'attention_mask': (ids != 1).long(), 'labels': torch.tensor([0, 2])}


def generator():
    return torch.Generator().manual_seed(7)


# ---------------------------------------------------------------- robust.py

def loss_and_gradients(objective, model, batch, **options):
    torch.manual_seed(1)
    model.zero_grad()
    loss = objective(model, batch, **options)
    loss.backward()
    return [loss.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize('objective', [robust.adv, robust.rs_r])
@pytest.mark.parametrize('layer', [0, 1, -1])
def test_eps_0_is_plain_to_the_last_bit(objective, layer, model, batch):
    plain = loss_and_gradients(robust.plain, model, batch)
    noisy = loss_and_gradients(objective, model, batch, eps=0.0, layer=layer, generator=generator())
    assert len(plain) == len(noisy) and all(torch.equal(a, b) for a, b in zip(plain, noisy))
    other = loss_and_gradients(objective, model, batch, eps=0.1, layer=layer, generator=generator())
    assert not torch.equal(plain[0], other[0])


def test_delta_stays_in_the_ball_and_off_the_padding_and_is_uniform_and_fresh(model, batch):
    for eps in (0.001, 0.1, 1.0):
        deltas = [robust.uniform_delta(model, batch, eps, generator=generator())]
        for layer in (0, 1):
            deltas.append(robust.worst_delta(model, batch, eps=eps, steps=3, layer=layer,
                                             generator=generator()))
        for delta in deltas:
            assert delta.dtype == torch.float32 and delta.shape == (2, 6, 16)
            assert 0.9 * eps < delta.abs().max() <= torch.tensor(eps)
            assert not delta[1, 4:].any() and delta[1, :4].all(-1).any()
    g = generator()
    many = torch.stack([robust.uniform_delta(model, batch, 0.5, generator=g)[0] for _ in range(300)])
    assert abs(many.mean()) < 0.01 and many.std().item() == pytest.approx(0.5 / 3 ** 0.5, rel=0.01)
    assert not torch.equal(many[0], many[1])


def test_inner_loop_leaves_no_gradient_and_raises_the_loss(model, batch):
    model.zero_grad()
    losses = []
    for steps in (0, 1, 3):     # the same start: what the steps change is all that differs
        delta = robust.worst_delta(model, batch, eps=0.02, steps=steps, generator=generator())
        assert all(p.grad is None for p in model.parameters())
        torch.manual_seed(1)
        with torch.no_grad(), robust.perturbed(model, delta):
            losses.append(robust.plain(model.eval(), batch).item())
    assert losses[0] < losses[1] and losses[0] < losses[2]


def test_dropout_masks_are_the_same_in_inner_and_outer_pass(model, batch):
    masks = []
    layer = next(m for m in model.modules() if isinstance(m, torch.nn.Dropout))
    layer.register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    robust.adv(model, batch, eps=0.1, steps=2, generator=generator())
    once = len(masks) // 3      # two inner passes and the outer one; XLM-R's head drops out twice a pass
    assert once and len(masks) == 3 * once and any(mask.any() for mask in masks)
    for mask, second, outer in zip(masks[:once], masks[once:2 * once], masks[2 * once:]):
        assert torch.equal(mask, second) and torch.equal(mask, outer)


class Linear(torch.nn.Module):
    """logits = W mean(embedding), enough of a Hugging Face model for the objectives."""

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(hidden_size=2)
        self.embedding = torch.nn.Embedding(3, 2)
        self.embedding.weight.data = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, -1.0]])
        self.weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0], [0.0, 1.0]]))

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask, labels):
        logits = self.embedding(input_ids).mean(1) @ self.weight.T
        return types.SimpleNamespace(loss=torch.nn.functional.cross_entropy(logits, labels), logits=logits)


def test_sign_steps_by_hand():
    """Gold class 0: the loss grows along w1 - w0 = (-1, 3), so that each step goes eps * size * (-1, +1)."""
    batch = {'input_ids': torch.tensor([[1, 2] * 50]), 'attention_mask': torch.ones(1, 100, dtype=torch.long),
             'labels': torch.tensor([0])}
    start = robust.uniform_delta(Linear(), batch, 0.5, generator=generator())
    direction = torch.tensor([-1.0, 1.0])
    for steps, size in ((1, 1.25), (2, 2.5 / 3), (3, 0.625)):
        by_hand = start
        for _ in range(steps):
            by_hand = (by_hand + 0.5 * size * direction).clamp(-0.5, 0.5)
        delta = robust.worst_delta(Linear(), batch, eps=0.5, steps=steps, generator=generator())
        assert torch.allclose(delta, by_hand, atol=1e-7), steps
    # Four steps reach the corner (-0.5, 0.5) from anywhere. Logits there: the mean embedding (2, 0.5) + delta
    # = (1.5, 1): (1.5 - 2, 1) -> loss log(1 + e^1.5).
    loss = robust.adv(Linear(), batch, eps=0.5, steps=4, generator=generator())
    assert loss.item() == pytest.approx(torch.tensor(1.5).exp().log1p().item(), abs=1e-6)
    # Linear takes the mean over padding too; it carries no delta all the same.
    padded = {'input_ids': torch.tensor([[1, 2, 0]]), 'attention_mask': torch.tensor([[1, 1, 0]]),
              'labels': torch.tensor([0])}
    delta = robust.worst_delta(Linear(), padded, eps=0.5, steps=4, generator=generator())
    assert torch.equal(delta, torch.tensor([[[-0.5, 0.5], [-0.5, 0.5], [0.0, 0.0]]]))


def test_bfloat16_keeps_a_perturbation_of_0_001(model, batch):
    model.eval().get_input_embeddings().weight.data.fill_(0.75)      # where bfloat16's spacing is 0.0039
    with torch.autocast('cpu', torch.bfloat16):
        delta = robust.uniform_delta(model, batch, 0.001, generator=generator())
        # the hook that comes later sees more
        with robust.perturbed(model, delta), robust.hidden(model, 0) as states:
            model(**batch)
    assert states[0].dtype == torch.float32
    assert torch.allclose(states[0] - 0.75, delta, atol=1e-7) and delta.any()


def test_a_layer_is_the_output_of_that_layer(model, batch):
    model.eval()
    expected = model(**batch, output_hidden_states=True).hidden_states
    for layer, state in ((1, expected[1]), (2, expected[2]), (-1, expected[2]), (-2, expected[1])):
        with robust.hidden(model, layer) as states:
            model(**batch)
        assert len(states) == 1 and torch.equal(states[0], state)


def loss_of_tagger(model, batch):
    """By tokens that are no padding, in reverse: not what the model itself would say."""
    inputs = {name: value for name, value in batch.items() if name != 'labels'}
    logits = model(**inputs).logits[batch['attention_mask'] == 1]
    return torch.nn.functional.cross_entropy(-logits, torch.arange(10) % 3)


def test_another_head_has_its_own_loss_at_enc_x_plus_delta(batch):
    """Enc(x) + delta given as `inputs_embeds`, without any hook; the sign steps by hand."""
    torch.manual_seed(0)
    config = BertConfig(**SIZE, **NO_DROPOUT, initializer_range=0.3)
    model = transformers.BertForTokenClassification(config)
    table = model.get_input_embeddings()

    def at(delta):
        given = {'inputs_embeds': table(batch['input_ids']) + delta, **batch}
        del given['input_ids']
        return loss_of_tagger(model, given)

    mask = batch['attention_mask'].unsqueeze(-1)
    worst = start = robust.uniform_delta(model, batch, 0.1, generator=generator())
    for _ in range(2):
        worst = worst.detach().requires_grad_()
        gradient, = torch.autograd.grad(at(worst), worst)
        worst = (worst + 0.1 * 2.5 / 3 * gradient.sign()).clamp(-0.1, 0.1) * mask
    for delta, objective, options in ((worst, robust.adv, {'eps': 0.1, 'steps': 2}),
                                      (start, robust.rs_r, {'eps': 0.1}),
                                      (0 * start, robust.rs_r, {'eps': 0.0, 'layer': 1})):
        expected = loss_and_gradients(lambda model, batch: at(delta.detach()), model, batch)
        found = loss_and_gradients(objective, model, batch, generator=generator(), loss=loss_of_tagger,
                                   **options)
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, atol=1e-5), options


def passes(count, start=0):
    """Within `perturbed` so many forward passes, with a delta that begins at that position."""
    def wrong(model, batch):
        with robust.perturbed(model, robust.uniform_delta(model, batch, 0.1)[:, start:]):
            for _ in range(count):
                model(**batch)
    return wrong


def call_of(objective, change=lambda model: model, without='', **options):
    """An objective of the changed model, and of a batch that lacks something."""
    def wrong(model, batch):
        batch = {name: value for name, value in batch.items() if name != without}
        objective(change(model), batch, **options)
    return wrong


@pytest.mark.parametrize('wrong, line', [
    (call_of(robust.rs_r, eps=0.1, layer=99), 'layers 1 to 2'),
    (call_of(robust.adv, eps=0.1, layer=-3), 'layers 1 to 2'),
    (call_of(robust.plain, without='labels'), 'batch without labels: it holds input_ids, attention_mask'),
    (call_of(robust.adv, without='labels', eps=0.1), 'without labels'),
    (passes(0), 'its word embeddings were run 0 times in place of 1'),
    (passes(2), 'its word embeddings were run 2 times in place of 1'),
    (passes(1, start=1), r'delta is \(2, 5, 16\), but the output .* is \(2, 6, 16\)'),
    (call_of(robust.rs_r, torch.nn.Module.bfloat16, eps=0.1), 'is in torch.bfloat16, .*float32 .*autocast'),
    (call_of(robust.rs_r, torch.nn.Module.half, eps=0.1), 'is in torch.float16, .*float32 .*autocast'),
    (call_of(robust.rs_r, torch.nn.DataParallel, eps=0.1), 'expected DistributedDataParallel, .*torchrun'),
    (call_of(robust.adv, torch.nn.DataParallel, eps=0.1), 'expected DistributedDataParallel, .*torchrun'),
])
def test_what_cannot_work_is_one_line(wrong, line, model, batch):
    with pytest.raises(ValueError, match=line) as error:
        wrong(model, batch)
    assert '--' not in str(error.value) and '\n' not in str(error.value)
    assert not any(module._forward_hooks for module in model.modules())     # none is left behind


ALONE = """
import sys, torch
before = set(sys.modules)
import robust
new = {name.split('.')[0] for name in set(sys.modules) - before}
assert new <= {'robust', 'torch', *sys.stdlib_module_names}, new
class Small(torch.nn.Embedding):
    def get_input_embeddings(self):
        return self
    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids)
ids = torch.tensor([[1, 2, 3]])
loss = lambda model, batch: model(**batch).sum()
print(robust.rs_r(Small(9, 4), {'input_ids': ids, 'attention_mask': ids}, eps=0.1, loss=loss).requires_grad)
"""


def test_robust_stands_alone_beside_modules_of_the_same_names_as_ours(tmp_path):
    shutil.copy(HERE / 'robust.py', tmp_path)
    for name in ('data', 'evaluate', 'synonyms', 'train'):
        (tmp_path / f'{name}.py').write_text('raise ImportError("of another project")')
    environment = {**ENVIRONMENT, 'PYTHONPATH': ''}
    ended = subprocess.run([sys.executable, '-c', ALONE], cwd=tmp_path, env=environment, capture_output=True,
                           text=True)
    assert (ended.returncode, ended.stdout) == (0, 'True\n'), ended.stderr


OBJECTIVES = {'adv 1': ('adv', {'eps': 0.1}), 'adv 3': ('adv', {'eps': 0.1, 'steps': 3}),
              'rs_r': ('rs_r', {'eps': 0.1}), 'rs_r layer': ('rs_r', {'eps': 0.1, 'layer': 1})}
# Two processes of a batch of four, two steps: delta is that of the whole batch, their rows of it.
REPLICAS = """
import sys, robust, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group('gloo')
rank, folder = dist.get_rank(), sys.argv[1]
given = torch.load(f'{folder}/given', weights_only=False)
batch = {name: value[rank::2] for name, value in given['batch'].items()}
robust.uniform_delta = lambda *args: given['delta'][rank::2].clone()
found = {}
for name, (objective, options) in given['objectives'].items():
    model = given['bert'](given['config'])
    model.load_state_dict(given['weights'])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    wrapped = DistributedDataParallel(model)
    getattr(robust, objective)(wrapped, batch, **options).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    found[name] = gradients, [p.detach() for p in model.parameters()]
torch.save(found, f'{folder}/{rank}')
"""


def test_replicas_stay_equal_and_have_the_gradients_of_one_process(bert, tmp_path, monkeypatch):
    ids = torch.randint(2, 40, (4, 6), generator=generator())
    batch = {'input_ids': ids, 'attention_mask': torch.ones_like(ids), 'labels': torch.tensor([0, 1, 2, 1])}
    delta = robust.uniform_delta(bert, batch, 0.1, generator=generator())
    given = {'batch': batch, 'delta': delta, 'bert': BertForSequenceClassification, 'config': bert.config,
             'weights': bert.state_dict(), 'objectives': OBJECTIVES}
    torch.save(given, tmp_path / 'given')
    for status, _, err in processes(*two(REPLICAS, tmp_path)):
        assert status == 0, err
    one, other = (torch.load(tmp_path / rank, weights_only=True) for rank in '01')
    monkeypatch.setattr(robust, 'uniform_delta', lambda *args: delta.clone())
    for name, (objective, options) in OBJECTIVES.items():
        whole = loss_and_gradients(getattr(robust, objective), bert, batch, **options)[1:]
        gradients, weights = one[name]
        assert all(map(torch.equal, weights, other[name][1])), name
        assert len(gradients) == len(whole) and all(map(close, gradients, whole)), name


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-6)


# README's lines, and around them one step of SGD over all of eight pairs, in whatever shares they come.
TRAINER = """
import os, sys, torch, transformers, robust
from transformers import Trainer, TrainingArguments
folder, encoder = sys.argv[1:]
class RobustTrainer(Trainer):
    eps = 0.5
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        return robust.rs_r(model, inputs, eps=self.eps)
class Exact(RobustTrainer):
    eps = 0.0
ids = torch.randint(5, 90, (8, 12), generator=torch.Generator().manual_seed(1))
whole = {'input_ids': ids, 'attention_mask': torch.ones_like(ids), 'labels': torch.arange(8) % 2}
rows = [{name: value[row] for name, value in whole.items()} for row in range(8)]
found, world = {}, int(os.environ.get('WORLD_SIZE', 1))
for kind in (Trainer, Exact, RobustTrainer):
    transformers.set_seed(1)
    model = transformers.BertForSequenceClassification.from_pretrained(encoder)
    model.accepts_loss_kwargs = False
    args = TrainingArguments(
        folder, max_steps=1, per_device_train_batch_size=4 // world, gradient_accumulation_steps=2,
        optim='sgd', learning_rate=0.5, max_grad_norm=0.0, use_cpu=True, seed=1, report_to=[],
        lr_scheduler_type='constant', save_strategy='no', disable_tqdm=True)
    trainer = kind(model=model, args=args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    with torch.no_grad():
        expected = model.eval()(**whole).loss.item()
    assert abs(trainer.evaluate()['eval_loss'] - expected) < 1e-5, 'noise where it only scores'
    found[kind.__name__] = torch.cat([p.detach().flatten() for p in model.parameters()])
torch.save(found, f'{folder}/{args.process_index}.{world}')
"""


def test_inside_transformers_trainer(world, tmp_path):
    """One process and two, two batches a step: eps 0 is Trainer itself, and noise arrives."""
    pytest.importorskip('accelerate', reason="transformers' Trainer needs accelerate")
    words = (tmp_path, world / 'sample/model')
    for status, _, err in processes((TRAINER, words), *two(TRAINER, *words)):
        assert status == 0, err
    one, first, second = (torch.load(tmp_path / which, weights_only=True) for which in ('0.1', '0.2', '1.2'))
    for found in (one, first, second):
        assert torch.equal(found['Trainer'], found['Exact'])
        assert not torch.allclose(found['Trainer'], found['RobustTrainer'], atol=1e-3)
        # the mean over all eight pairs, in whatever shares they come
        assert torch.allclose(found['Trainer'], one['Trainer'], atol=1e-5)
    for name in first:
        assert torch.equal(first[name], second[name]), name


# ---------------------------------------------------------------- synonyms.py

NEIGHBOURS = {'good': ['fine'], 'cat': ['kitten', 'puss']}
ONE = {'good': ['fine'], 'cat': ['puss']}
EVERYTHING = types.SimpleNamespace(get=lambda word: ['X'])      # every word has a synonym


def test_replacement_keeps_case_punctuation_and_spacing():
    text = '  Good  cats, "CAT" (cat)--good!\u00a0x\u3000cat\u2028cat'
    expected = '  Fine  cats, "PUSS" (puss)--fine!\u00a0x\u3000puss\u2028puss'
    assert synonyms.replace(text, ONE, 1.0, random.Random(0)) == expected
    assert synonyms.replace(text, ONE, 0.0, random.Random(0)) == text
    assert synonyms.find_words("'good' rock 'n' roll, the 's' of O'Neil's 'sat' '90s don") == [
        'good', 'rock', 'n', 'roll', 'the', 's', 'of', "O'Neil", 'sat', '90s', 'don']     # no clitics
    assert synonyms.replace("Won 't won't", {"won't": ['shall']}, 1.0, random.Random(0)) == 'Shall shall'


def test_both_ways_draw_as_often_as_they_say_and_uniformly():
    paper = synonyms.replace('cat ' * 20000, NEIGHBOURS, 0.1, random.Random(0)).split()
    authors = synonyms.replace_as_authors('cat dog ' * 20000, NEIGHBOURS, random.Random(0)).split(' ')
    assert len(paper) == authors.count('dog') == 20000
    for words, shares in ((paper, (0.9, 0.05, 0.05)), (authors, (1 / 3, 1 / 3, 1 / 3))):
        for word, share in zip(('cat', 'kitten', 'puss'), shares):
            assert words.count(word) / 20000 == pytest.approx(share, abs=0.008)
    text = ' Cat  CAT cat. (cat) cat\u3000good good-cat good, ' * 50        # no key of theirs
    assert synonyms.replace_as_authors(text, NEIGHBOURS, random.Random(0)) == text


@pytest.mark.parametrize('together, apart', [
    ("You won't get a chance.", "You won 't get a chance ."),
    ("I've said: he's won't-free, isn't it?", "I 've said : he 's won't-free , is n't it ?"),
    ("The cat's 'good' day; they'll don, we're done, I'd, I'm",
     "The cat 's ' good ' day ; they 'll don , we 're done , I 'd , I 'm"),
    ("Ain’t it? It’s. CAN'T DON'T", "Ai n’t it ? It ’s . CAN 'T DO N'T"),
    ("can't don't couldn't", "ca n't do n't could n't"),
])
def test_clitics_written_apart_offer_the_same_words(together, apart):
    words = synonyms.find_words(together)
    assert words == synonyms.find_words(apart)
    clitics = {'t', 's', 've', 'e', 'll', 'l', 're', 'd', 'm', 'n', 'won', 'ca', 'ai'}
    assert not clitics & {word.lower() for word in words}
    left = {synonyms.replace(text, EVERYTHING, 1.0, random.Random(0)).replace(' ', '')
            for text in (together, apart)}
    assert len(left) == 1 and left.pop().count('X') == len(words)
    neighbours = {'a': ['t', 's', 've', 'll', 'n', 'won', 'don']}
    kept = [synonyms.english_only(neighbours, [data.Pair(text, '', 0)]) for text in (together, apart)]
    assert kept[0] == kept[1]


@real
@pytest.mark.parametrize('task, authors, paper', [('pawsx', 0.207, 0.040), ('xnli', 0.330, 0.057)])
def test_the_share_of_words_changed_on_the_real_files(task, authors, paper):
    """authors: measured with the authors' look-up by others. paper: p times the words that have synonyms."""
    neighbours = synonyms.read_synonyms(SHARED / 'data' / data.NEIGHBOURS)
    pairs = data.read_pairs(data.path_of(SHARED / 'data', task, 'dev', 'en'), task)
    for how, share in (('authors', authors), ('paper', paper)):
        changed = words = 0
        for pair, copy in zip(pairs, synonyms.Copies(pairs, neighbours, how=how, m=1, seed=1)):
            for old, new in zip(pair[:2], copy[:2]):
                old, new = old.split(' '), new.split(' ')
                words += len(old)
                changed += sum(map(str.__ne__, old, new))
        assert changed / words == pytest.approx(share, abs=0.004)


def test_english_only_leaves_out_what_the_english_file_does_not_have():
    neighbours = {'cat': ['gato', 'kitten'], 'good': ['buena'], 'nice': ['Fine']}
    kept = synonyms.english_only(neighbours, [data.Pair('A Kitten, and', 'fine', 0)])
    assert kept == {'cat': ['kitten'], 'nice': ['Fine']}


@pytest.mark.parametrize('how', ['paper', 'authors'])
def test_the_copies_are_a_sequence_in_which_no_two_are_drawn_alike(how):
    pairs = [data.Pair(f'a good cat {i} ' * 5, f'cat good {i} ' * 5, i % 2) for i in range(20)]
    copies = synonyms.Copies(pairs, NEIGHBOURS, m=10, p=0.5, how=how, seed=1)
    rows = list(copies)
    assert len(rows) == len(copies) == 200 and rows[-1] == copies[-1] == copies[199] and rows == list(copies)
    with pytest.raises(IndexError):
        copies[200]
    draws = set()           # which words changed, and to what, whatever the pair's number
    for row, copy in enumerate(rows):
        pair = pairs[row % 20]
        rng = random.Random(f'1 {row // 20} {pair.premise} {pair.hypothesis}')
        if how == 'paper':
            by_hand = [synonyms.replace(text, NEIGHBOURS, 0.5, rng) for text in pair[:2]]
        else:
            by_hand = [synonyms.replace_as_authors(text, NEIGHBOURS, rng) for text in pair[:2]]
        assert copy == (*by_hand, pair.label) != pair
        draws.add(re.sub(r' \d+', '', f'{copy.premise}|{copy.hypothesis}'))
    assert len(draws) == 200
    assert rows != list(synonyms.Copies(pairs, NEIGHBOURS, m=10, p=0.5, how=how, seed=2))
    assert list(pickle.loads(pickle.dumps(copies))) == rows         # loaders of other platforms do so


@pytest.mark.parametrize('how, neighbours', [('paper', {'dog': ['hound']}), ('authors', {'cat': ['puss']}),
                                             ('paper', {'cat': []}), ('authors', {'a': []})])
def test_rs_a_that_would_be_plain_training_is_refused(how, neighbours):
    pairs = [data.Pair('a Cat.', 'x', 0)]
    line = '^F.json: no word of the training pairs has a synonym .*; expected English words$'
    with pytest.raises(data.InputError, match=line):
        synonyms.Copies(pairs, neighbours, how=how, name='F.json')
    assert len(synonyms.Copies(pairs, ONE)) == len(synonyms.Copies(pairs, {'a': ['b']}, how='authors')) == 10
    with pytest.raises(KeyError):           # an unknown way is none of the two
        synonyms.Copies(pairs, ONE, how='author')


def test_files_of_words_are_read_by_one_rule_however_they_end(tmp_path):
    plain = ' "a\u3000b c"\t\u2028d\u0085\n\ne\t'
    for start, end in itertools.product((b'', b'\xef\xbb\xbf'), ('\n', '\r\n')):
        for last in ('', end, end * 3):
            path = write(tmp_path / 'F', start + (plain.replace('\n', end) + last).encode())
            assert data.read_lines(path, 'words') == plain.split('\n')
    path = write(tmp_path / 'F', '\ufeff\u3000a \tb\u2028c\u3000\t1\r\n\r\n'.encode())
    assert data.read_pairs(path, 'pawsx') == [('\u3000a ', 'b\u2028c\u3000', 1)]
    path = write(tmp_path / 'F', b'\xef\xbb\xbf{"a\xe3\x80\x80b":\r\n["c"]}\r\n\r\n')
    assert synonyms.read_synonyms(path) == {'a\u3000b': ['c']}


@pytest.mark.parametrize('content, line', [
    (b'{"cat": ', 'not JSON .*; expected {"word"'), (b'["cat"]', 'a JSON list; expected {"word"'),
    (b'{"cat": "puss"}', "'cat' has puss; expected a list of words"),
    (b'{"cat": ["puss", ""]}', "'cat' has .*; expected a list"), (b'{"cat": [1]}', "'cat' has .1.; expected"),
    (b'{"fine": ["good"], "cat": ["\\ud83d"]}', "'cat' or a neighbour of it has half a surrogate pair"),
    (b'{"fine": ["good"], "\\ude00": ["x"]}', r"'.ude00' or a neighbour of it has half a surrogate pair")])
def test_a_broken_neighbour_file_gives_one_line(tmp_path, content, line):
    with pytest.raises(data.InputError, match=f'^{tmp_path}/F: {line}.*$'):
        synonyms.read_synonyms(write(tmp_path / 'F', content))
    path = write(tmp_path / 'F', b'{"cat": ["\\ud83d\\ude00"]}')        # a whole pair is a character
    assert synonyms.read_synonyms(path) == {'cat': ['\U0001f600']}


# ---------------------------------------------------------------- data.py

def write(path, content):
    path.write_bytes(content)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refuse(*arguments, **options):
    raise PermissionError(1, 'Operation not permitted', 'x.part')


def raised(error):
    raise error


def ended(capsys, main, *arguments):
    """What a script ends with when main is run as from the command line -> (exit status, stdout, stderr)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['script.py', *map(str, arguments)])
        try:
            status = data.run_script(main)
        except SystemExit as error:
            status = error.code
    out, err = capsys.readouterr()
    if isinstance(status, str):         # as the interpreter does with it
        status, err = 1, f'{err}{status}\n'
    return status, out, err


def test_reads_quotes_as_csv_writer_wrote_them_lone_quotes_as_they_are_and_labels(tmp_path):
    rows = [('He said "hi"', '"quoted"', '1'), ('plain', 'a "lone', '0'), ('"', '""', '1'), ('', "it's", '0'),
            (' \u3000outer and inner\u3000blanks ', '\u2028', '1')]
    data.write_pairs(tmp_path / 'F', rows)
    assert [(a, b, str(label)) for a, b, label in data.read_pairs(tmp_path / 'F', 'pawsx')] == rows
    for task, content, pairs in (
            ('pawsx', b'a "lone quote\tand " another\t0\r\n"wrapped"\t"one" and "two"\t1\n\n\n',
             [('a "lone quote', 'and " another', 0), ('"wrapped"', '"one" and "two"', 1)]),
            ('xnli', b'a\tb\tcontradictory\na\tb\tentailment\na\tNS\tneutral\n',
             [('a', 'b', 0), ('a', 'b', 1), ('a', 'NS', 2)]),
            ('pawsx', b'a\tb\nc\td\n', [('a', 'b', None), ('c', 'd', None)])):
        assert data.read_pairs(write(tmp_path / 'F', content), task) == pairs


@pytest.mark.parametrize('content, line', [
    (b'', 'empty'), (b'\n\n', 'empty'), (b'a\tb\t1\na\tb\n', '2: 2 columns'), (b'a\n', '1: 1 columns'),
    (b'a\tb\na\tb\t1\n', '2: 3 columns'), (b'1\ta\tb\t0\n', '1: 4 columns, .*premise .* raw release'),
    (b'a\tb\t1\n\na\tb\t1\n', '2: 1 columns'),
    (b'a\tb\t2\n', "1: label '2'; expected one of 0, 1"), (b'a\tb\tcontradictory\n', '1: label'),
    (b'a\tb\t1\n\xff\tb\t1\n', '2: not UTF-8'), (b'\xef\xbb\xbfa\tb\t1\r\na\tb\xff', '2: not UTF-8'),
    (b'Sentence1\tsentence2\na\tb\n', '1: a header'), (b'premise\thypothesis\tlabel\n', '1: a header'),
    (None, ' No such file or directory; expected premise')])
def test_a_broken_file_gives_one_line(tmp_path, content, line):
    if content is not None:
        write(tmp_path / 'F', content)
    with pytest.raises(data.InputError, match=rf'^{tmp_path}/F: ?{line}.*$'):
        data.read_pairs(tmp_path / 'F', 'pawsx')


def pawsx_archive(path, rows=2):
    """A small x-final.tar.gz, with a member that tries to escape."""
    with tarfile.open(path, 'w:gz') as tar:
        for lang, name in [('en', 'train'), *itertools.product(('en', 'de'), ('dev_2k', 'test_2k'))]:
            lines = [f'{i}\t{lang} "a" {i}\t\u3000"lone {name}\u3000x \t{i % 2}\r\n' for i in range(rows)]
            content = ''.join(['id\tsentence1\tsentence2\tlabel\r\n', *lines]).encode()
            member = tarfile.TarInfo(f'x-final/{lang}/{name}.tsv')
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        tar.addfile(tarfile.TarInfo('x-final/../../escaped'), io.BytesIO())
    return path


def xnli_archives(folder):
    """A small XNLI-1.0.zip and XNLI-MT-1.0.zip."""
    with zipfile.ZipFile(folder / 'XNLI-1.0.zip', 'w') as archive:
        for split in ('dev', 'test'):
            rows = ['language\tgold_label' + '\tx' * 7 + '\n']
            for label, lang in itertools.product(('neutral', 'entailment'), ('de', 'en', 'xx')):
                rows.append(f'{lang}\t{label}\t.\t.\t.\t.\t{lang} {split}\tsays "so"\t.\n')
            archive.writestr(f'XNLI-1.0/xnli.{split}.tsv', ''.join(rows))
    with zipfile.ZipFile(folder / 'XNLI-MT-1.0.zip', 'w') as archive:
        archive.writestr('XNLI-MT-1.0/multinli/multinli.train.en.tsv',
                         'premise\thypo\tlabel\na\tb\tcontradictory\nc\td\tneutral\n')
    return folder / 'XNLI-1.0.zip', folder / 'XNLI-MT-1.0.zip'


@pytest.fixture
def host(monkeypatch, tmp_path):
    """As if the releases had two rows a file and two languages, and lay in tmp_path/host: empty as yet."""
    (tmp_path / 'host').mkdir()
    for task in ('pawsx', 'xnli'):
        monkeypatch.setitem(data.TASKS, task, data.TASKS[task]._replace(languages=('en', 'de')))
    for name, release in data.RELEASES.items():
        small = release._replace(url=(tmp_path / 'host' / name).as_uri(), rows=dict.fromkeys(release.rows, 2))
        monkeypatch.setitem(data.RELEASES, name, small)
    monkeypatch.setattr(data, 'NEIGHBOURS_URL', (tmp_path / 'host' / 'neighbours.json').as_uri())
    return tmp_path / 'host'


@pytest.fixture
def short(monkeypatch):
    """As if the sample world had nine rows a file."""
    monkeypatch.setattr(data, 'SAMPLE_ROWS', dict.fromkeys(data.SAMPLE_ROWS, 9))


ALL = ['dev-de.tsv', 'dev-en.tsv', 'test-de.tsv', 'test-en.tsv', 'train-en.tsv']


def test_converts_the_public_release_of_pawsx_and_keeps_what_is_there(tmp_path, host):
    archive = pawsx_archive(tmp_path / 'x-final.tar.gz')
    folder = tmp_path / 'D' / 'pawsx'
    folder.mkdir(parents=True)
    write(folder / 'test-de.tsv', b'as XTREME\tstrips it\n')
    write(folder / 'test-en.tsv', b'mine\tkept\t1\n')
    data.prepare(tmp_path / 'D', 'pawsx', [archive], complete=True)
    rows = [('de "a" 0', '"lone test_2k\u3000x', 0), ('de "a" 1', '"lone test_2k\u3000x', 1)]
    assert data.read_pairs(folder / 'test-de.tsv', 'pawsx') == rows
    assert data.read_pairs(folder / 'test-en.tsv', 'pawsx') == [('mine', 'kept', 1)]
    assert data.read_pairs(folder / 'dev-en.tsv', 'pawsx')[1] == ('en "a" 1', '"lone dev_2k\u3000x', 1)
    assert names(folder) == ALL and names(tmp_path / 'D') == ['pawsx']
    assert not list(tmp_path.rglob('escaped*'))


@pytest.mark.parametrize('break_it, line', [
    (lambda path: path.write_bytes(path.read_bytes()[:-40]), 'not the archive of .*fetch it again$'),
    (lambda path: path.write_bytes(b'<html>'), 'not the archive of .*fetch it again$'),
    (lambda path: path.unlink(), 'not the archive of .*No such file.*$'),
    (lambda path: pawsx_archive(path, rows=3), '3 rows for dev-en.tsv, expected 2; fetch it again$')])
def test_a_broken_archive_gives_one_line_and_leaves_nothing(tmp_path, host, break_it, line):
    break_it(pawsx_archive(tmp_path / 'x-final.tar.gz'))
    for complete in (False, True):
        with pytest.raises(data.InputError, match=f'^{tmp_path}/x-final.tar.gz: {line}'):
            data.prepare(tmp_path / 'D', 'pawsx', [tmp_path / 'x-final.tar.gz'], complete)
        assert names(tmp_path / 'D') == ['pawsx'] and names(tmp_path / 'D/pawsx') == []


def test_a_run_fetches_into_a_folder_without_any_tsv_and_nowhere_else(tmp_path, host):
    folder = tmp_path / 'D/pawsx'

    def refused(line, complete=False):
        with pytest.raises(data.InputError, match=line):
            data.prepare(tmp_path / 'D', 'pawsx', (), complete)
    refused('Fetch it by hand and give it to `python data.py pawsx .*--task sample')
    archive = pawsx_archive(host / 'x-final.tar.gz')
    data.prepare(tmp_path / 'D', 'pawsx')
    assert names(folder) == ALL and names(tmp_path / 'D') == ['pawsx']
    (folder / 'dev-de.tsv').unlink()
    data.prepare(tmp_path / 'D', 'pawsx')           # no run needs it
    assert not (folder / 'dev-de.tsv').exists()
    data.prepare(tmp_path / 'D', 'pawsx', complete=True)
    assert names(folder) == ALL
    (folder / 'test-de.tsv').unlink()
    refused('test-de.tsv: no such file.*langs.*`python data.py pawsx --data')
    data.prepare(tmp_path / 'D', 'pawsx', langs=['en'])
    assert not (folder / 'test-de.tsv').exists()
    archive.unlink()
    refused('x-final.tar.gz: cannot be fetched', complete=True)


def test_converts_the_public_release_of_xnli_all_of_it_or_nothing(tmp_path, host, capsys):
    """Its second archive cannot be had, then the neighbour file: the pairs stay."""
    dev_and_test, train = xnli_archives(tmp_path)
    dev_and_test.rename(host / dev_and_test.name)
    for complete in (False, True):
        with pytest.raises(data.InputError, match='XNLI-MT-1.0.zip: cannot be fetched'):
            data.prepare(tmp_path / 'D', 'xnli', complete=complete)
        assert names(tmp_path / 'D/xnli') == []
    line = f'neighbours.json: cannot be fetched.*keep it as {tmp_path}/D/{data.NEIGHBOURS}'
    with pytest.raises(data.InputError, match=line):
        data.main(['xnli', str(train), '--data', str(tmp_path / 'D')])
    assert names(tmp_path / 'D/xnli') == ALL and capsys.readouterr().out.count(': 2 pairs\n') == 5
    for split, lang in itertools.product(('dev', 'test'), ('de', 'en')):
        rows = [(f'{lang} {split}', 'says "so"', 2), (f'{lang} {split}', 'says "so"', 1)]
        assert data.read_pairs(data.path_of(tmp_path / 'D', 'xnli', split, lang), 'xnli') == rows
    assert data.read_pairs(tmp_path / 'D/xnli/train-en.tsv', 'xnli') == [('a', 'b', 0), ('c', 'd', 2)]


def test_the_neighbour_file_is_fetched_checked_and_kept(tmp_path, host, monkeypatch):
    path = tmp_path / 'D' / data.NEIGHBOURS
    content = write(host / 'neighbours.json', b'{"cat": ["puss"]}').read_bytes()
    line = f'neighbours.json: cannot be fetched .invalid hash value.*keep it as {path}$'
    with pytest.raises(data.InputError, match=line):
        data.fetch_neighbours(path)
    assert names(path.parent) == []
    monkeypatch.setattr(data, 'NEIGHBOURS_SHA256', hashlib.sha256(content).hexdigest())
    data.fetch_neighbours(path)
    assert path.read_bytes() == content and names(path.parent) == [path.name]
    (host / 'neighbours.json').unlink()
    data.fetch_neighbours(path)         # it is there
    assert socket.getdefaulttimeout() is None


@real
def test_the_digest_is_that_of_the_public_file():
    assert data.digest(SHARED / 'data' / data.NEIGHBOURS) == data.NEIGHBOURS_SHA256[:16]
    assert 'uclanlp/Robust-XLT/' in data.NEIGHBOURS_URL


def test_own_languages_stand_after_the_papers(tmp_path):
    assert data.languages_of('pawsx') == list(data.TASKS['pawsx'].languages)
    assert data.languages_of('pawsx', ['yo', 'de', 'aa', 'en', 'yo']) == ['en', 'de', 'yo', 'aa']
    (tmp_path / 'pawsx').mkdir()
    write(tmp_path / 'pawsx/test-yo.tsv', b'a\tb\t1\n')
    for name in ('dev-en.tsv', 'test-ha.tsv', 'train-en.tsv'):
        with pytest.raises(data.InputError, match=f'^{tmp_path}/pawsx/{name}: no such file'):
            data.prepare(tmp_path, 'pawsx', langs=['yo', 'ha'])
        write(tmp_path / 'pawsx' / name, b'a\tb\t1\n')
    data.prepare(tmp_path, 'pawsx', langs=['yo', 'ha'])
    assert len(names(tmp_path / 'pawsx')) == 4


def test_several_processes_on_an_empty_folder_find_one_world(tmp_path, world):
    """One prepares and the others wait; all see the whole of it."""
    code = """
        import data, os, pathlib
        children = [os.fork(), os.fork()]       # four processes in all
        write = data.write_sample
        data.write_sample = lambda folder: (os.write(1, b'written\\n'), write(folder))
        data.prepare('.', 'sample')
        seen = [data.digest(path) for path in pathlib.Path('sample').rglob('*.*') if path.is_file()]
        os.write(1, (' '.join(sorted(seen)) + '\\n').encode())
        for child in filter(None, children):
            os.waitpid(child, 0)
    """
    said = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], cwd=tmp_path, capture_output=True,
                          env=ENVIRONMENT, text=True)
    digests = sorted(data.digest(path) for path in (world / 'sample').rglob('*.*') if path.is_file())
    assert said.stdout.splitlines() == ['written'] + [' '.join(digests)] * 4, said.stderr


def test_what_is_there_is_not_written_again_and_takes_no_lock(world, monkeypatch):
    for target, name in ((data, 'FileLock'), (os, 'replace'), (Path, 'mkdir')):
        monkeypatch.setattr(target, name, refuse)
    data.prepare(world, 'sample')
    data.prepare(world, 'sample', complete=True)
    data.fetch_neighbours(world / 'sample/synonyms.json')


def test_an_interrupted_preparation_leaves_nothing_that_looks_complete(tmp_path, short, capsys, monkeypatch):
    for target, name, error in ((data, '_write_sample_encoder', KeyboardInterrupt), (os, 'replace', OSError)):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, lambda *_: (_ for _ in ()).throw(error('no')))
            with pytest.raises(error):
                data.prepare(tmp_path, 'sample')
        assert names(tmp_path) == ['sample'] and names(tmp_path / 'sample') == []
    data.prepare(tmp_path, 'sample')
    assert len(names(tmp_path / 'sample')) == 17
    (tmp_path / 'sample/test-x3.tsv').unlink()
    shutil.rmtree(tmp_path / 'sample/model')
    data.main(['sample', '--data', str(tmp_path)])          # what is missing comes back
    assert len(names(tmp_path / 'sample')) == 17 and capsys.readouterr().out.count(': 9 pairs\n') == 15


def test_the_sample_world_is_what_its_docstring_says(world):
    """Known sizes; row-aligned tests; a language's words at their known distance; the same bits as ever."""
    folder = world / 'sample'
    english = data.read_pairs(folder / 'test-en.tsv', 'sample')
    for number, ending in enumerate('drstlk', 1):
        other = data.read_pairs(folder / f'test-x{number}.tsv', 'sample')
        texts = [[re.sub(r'n\b', ending, text) for text in pair[:2]] for pair in english]
        assert other == [(*text, pair.label) for text, pair in zip(texts, english)]
    neighbours = synonyms.read_synonyms(folder / 'synonyms.json')
    assert len(neighbours) == 90 and {len(near) for near in neighbours.values()} == {2}
    for pair in english:
        exchanged = 0
        for first, second in zip(pair.premise.split(), pair.hypothesis.split(), strict=True):
            exchanged += second not in [first, *neighbours[first]]
        assert exchanged == 1 - pair.label
    table = AutoModel.from_pretrained(folder / 'model').get_input_embeddings().weight.detach()
    assert table.shape == (4 + 7 * 90, 64)
    words = table[4:].view(7, 90, 64)
    lengths = torch.arange(7)[:, None].expand(7, 90) * 0.05 * 8
    assert torch.allclose((words - words[0]).norm(dim=-1), lengths, atol=1e-5)
    concepts = words[0].view(30, 3, 64)
    spread = (concepts - concepts.mean(1, keepdim=True)).square().sum(1).mean() / 2
    assert spread.sqrt().item() == pytest.approx(0.05, rel=0.05)
    digests = {'train-en.tsv': '38f7fcb03d6274c2', 'test-x6.tsv': '8e0f2a9173338e57'}
    assert {name: data.digest(folder / name) for name in digests} == digests


@real
def test_real_files_hold_what_was_counted_in_them(tmp_path):
    """Rows, placeholders NS (dev, test) and doubled quotes, counted in the files by other means."""
    placeholders = {'en': (0, 0), 'de': (68, 32), 'es': (38, 1), 'fr': (8, 14), 'ja': (20, 54),
                    'ko': (35, 28), 'zh': (16, 25)}
    doubled = {'en': 0, 'ja': 0, 'zh': 14, 'de': 134, 'es': 244, 'fr': 260, 'ko': 246}
    for lang, counts in placeholders.items():
        for split, count in zip(('dev', 'test'), counts):
            path = data.path_of(SHARED / 'data', 'pawsx', split, lang)
            pairs = data.read_pairs(path, 'pawsx')
            assert len(pairs) == 2000 and pairs[0].label is not None
            assert sum('NS' in pair for pair in pairs) == count
            assert not any('""' in pair.premise + pair.hypothesis for pair in pairs)
        # As XTREME strips it: the label column gone, the text as it was.
        stripped = [line.rpartition(b'\t')[0] + b'\r\n' for line in path.read_bytes().rstrip().split(b'\n')]
        bare = write(tmp_path / f'{lang}.tsv', b''.join(stripped))
        assert bare.read_text().count('""') >= doubled[lang]
        assert data.read_pairs(bare, 'pawsx') == [pair._replace(label=None) for pair in pairs]
    for lang in data.TASKS['xnli'].languages:
        pairs = data.read_pairs(data.path_of(SHARED / 'data', 'xnli', 'test', lang), 'xnli')
        assert len(pairs) == 5010 and pairs[0].premise == pairs[1].premise == pairs[2].premise
        assert {pair.label for pair in pairs} == {0, 1, 2}


def test_a_script_ends_in_one_line(tmp_path, capsys):
    """Status, output and line of what run_script handles."""
    expected = '{"word": ["neighbour", ...], ...}; the public one lies at ' + data.NEIGHBOURS_URL
    assert ended(capsys, synonyms.main, tmp_path / 'nowhere', '--show', 'cat') == (
        1, '', f'{tmp_path}/nowhere: No such file or directory; expected the neighbour file of RS-A, '
               f'{expected}\n')
    file = write(tmp_path / 'F.json', b'{"a": ["b"], "b": ["a"], "c": []}')
    copies = ''.join(f'{copy:4}  B isn\'t a c\n' for copy in range(1, 11))
    shown = f"A: b\nisn't: -\nb: a\nc: -\n{copies}"
    assert ended(capsys, synonyms.main, file, '--show', "A isn't b c", '--p', '1') == (None, shown, '')
    status, out, said = ended(capsys, data.main, 'sample', '--data', file)
    assert (status, out) == (1, '') and re.fullmatch(f'{file}.*: (File exists|Not a directory)\n', said)
    for error, end in ((KeyboardInterrupt(), (130, '', 'stopped\n')),
                       (MemoryError(), (1, '', 'out of memory (MemoryError); use a machine with more\n'))):
        assert ended(capsys, lambda: raised(error)) == end
    for error in (ZeroDivisionError(), OSError('nameless')):        # faults of the program
        with pytest.raises(type(error)):
            data.run_script(lambda: raised(error))


def test_the_writer_keeps_links_and_no_two_write_the_same_part(tmp_path, monkeypatch):
    target, link = write(tmp_path / 'target.json', b'old'), tmp_path / 'link.json'
    link.symlink_to(target)
    with data.replacing(link) as one, data.replacing(link) as other:
        assert one != other
        one.write_text('one')
        other.write_text('other')
    assert link.is_symlink() and target.read_text() == 'one'
    with pytest.raises(ZeroDivisionError), data.replacing(link) as part:
        part.write_text(str(1 / 0))
    monkeypatch.setattr(os, 'replace', refuse)
    with pytest.raises(OSError) as error, data.replacing(link) as part:
        part.write_text('new')
    assert error.value.filename == str(link) and target.read_text() == 'one'
    assert names(tmp_path) == ['link.json', 'target.json']
    os.mkfifo(tmp_path / 'pipe')        # never try it on /dev/null: as root a broken writer replaces it
    reader = os.open(tmp_path / 'pipe', os.O_RDONLY | os.O_NONBLOCK)
    with data.replacing(tmp_path / 'pipe') as part:
        part.write_text('through')
    assert os.read(reader, 99) == b'through' and (tmp_path / 'pipe').is_fifo()


CPU = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
FAULT = 'CUDA error: an illegal memory access was encountered'


@pytest.mark.parametrize('error, expected', [
    (torch.OutOfMemoryError('CUDA out of memory.'), 'out of memory (CUDA out of memory.); try less'),
    (RuntimeError(f'{CPU}\nmore'), f'out of memory ({CPU}); try less'),
    (RuntimeError('CUBLAS_STATUS_ALLOC_FAILED'), 'out of memory (CUBLAS_STATUS_ALLOC_FAILED); try less'),
    (MemoryError(), 'out of memory (MemoryError); try less'),
    (RuntimeError('shapes'), 'shapes'), (RuntimeError(FAULT), FAULT)])
def test_memory_that_does_not_suffice_is_one_line(error, expected):
    with pytest.raises(data.InputError if 'try less' in expected else RuntimeError) as raised:
        with data.enough_memory('try less'):
            raise error
    assert str(raised.value) == expected


def test_one_level_too_deep_is_said(tmp_path):
    write(tmp_path / 'train-en.tsv', b'a\tb\t1\n')
    with pytest.raises(data.InputError, match=f'^{tmp_path}: holds train-en.tsv itself; .* a pawsx/$'):
        data.main(['pawsx', '--data', str(tmp_path)])
    assert names(tmp_path) == ['train-en.tsv']


def test_only_torchruns_full_set_makes_several_processes(monkeypatch):
    monkeypatch.delenv('MASTER_ADDR', raising=False)
    for name, value in {'RANK': '1', 'WORLD_SIZE': '2', 'LOCAL_RANK': '1', 'MASTER_PORT': '1'}.items():
        monkeypatch.setenv(name, value)
    for expected in ((0, 1), (1, 2)):
        found = runpy.run_path(str(HERE / 'data.py'))
        assert (found['RANK'], found['WORLD']) == expected
        monkeypatch.setenv('MASTER_ADDR', 'here')


def test_progress_in_a_file_speaks_every_30_seconds_and_the_first_process_alone(monkeypatch):
    bar = data.progress(range(3), desc='runs')
    assert (bar.disable, bar.delay, bar.mininterval, bar.miniters) == (False, 30, 30, 1)
    assert (list(bar), bar.leave) == ([0, 1, 2], False)
    monkeypatch.setattr(data, 'RANK', 1)
    assert data.progress(range(3)).disable


# ---------------------------------------------------------------- train.py: batches and the loop

def arguments(own=(), **changes):
    """What the parts of train.py read of a run's arguments."""
    args = dict(seed=1, batch=16, epochs=2, max_steps=None, max_length=64, method='plain', lr=1e-3,
                warmup=0.0, eval_steps=100, own=dict(own))
    return types.SimpleNamespace(**(args | changes))


def pairs_of_all_lengths(count):
    return [data.Pair('bokin ' * (i % 7 + 1), 'bokin', i % 2) for i in range(count)]


def of_like_length(batch, pairs):
    lengths = [row % pairs % 7 for row in batch]
    return max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize('epochs, rows, batch, steps', [
    (0.55, 3200, 32, 55), (0.1, 9600, 32, 30), (1, 100, 16, 7), (3, 13941, 32, 1307), (4, 13941, 32, 1743),
    (1e-9, 100, 16, 1)])
def test_epochs_times_rows_over_batch_is_rounded_up_once(epochs, rows, batch, steps):
    assert train.steps_of(arguments(epochs=epochs, batch=batch), rows) == steps
    assert train.steps_of(arguments(epochs=epochs, batch=batch, max_steps=20), rows) == min(20, steps)
    # RS-A's ten copies of a tenth of the pairs: as many steps
    if rows % 10 == 0:
        assert train.steps_of(arguments({'m': 10}, epochs=epochs, batch=batch), rows // 10) == steps


@pytest.mark.parametrize('own', [{}, {'m': 8}])
def test_the_plan_has_every_row_once_an_epoch_and_pairs_of_like_length_in_a_batch(tokenizer, own):
    """Two epochs of 2,048 rows, each of two pools."""
    pairs = pairs_of_all_lengths(2048 // own.get('m', 1))
    batches = train.plan(pairs, tokenizer, arguments(own))
    assert len(batches) == 256 and {len(batch) for batch in batches} == {16}
    assert all(of_like_length(batch, len(pairs)) for batch in batches)
    for epoch in (batches[:128], batches[128:]):
        assert sorted(itertools.chain(*epoch)) == list(range(2048))
    assert len({frozenset(batch) for batch in batches}) > 250           # each epoch has an order of its own
    assert set(itertools.chain(*batches[:64])) != set(range(1024))      # rows come in random order
    firsts = [batch[0] % len(pairs) % 7 for batch in batches[:64]]
    assert firsts != sorted(firsts)                                     # and batches do
    assert train.plan(pairs, tokenizer, arguments(own)) == batches
    assert train.plan(pairs, tokenizer, arguments(own, seed=2)) != batches
    assert train.plan(pairs, tokenizer, arguments(own, max_steps=140)) == batches[:140]


def test_only_the_pairs_of_the_steps_that_will_run_are_tokenised_first(tokenizer, monkeypatch):
    """Six pools of 1,024, in blocks of 5,000."""
    encode, asked = evaluate.encode, []
    monkeypatch.setattr(evaluate, 'encode', lambda *args: asked.append(len(args[1])) or encode(*args))
    batches = train.plan(pairs_of_all_lengths(9000), tokenizer, arguments(max_steps=330))
    assert asked == [5000, 6 * 1024 - 5000] and all(of_like_length(batch, 9000) for batch in batches)


@pytest.mark.parametrize('warmup', [0.0, 0.1, 0.25, 1.0])
def test_the_learning_rate_is_that_of_transformers(warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, round(warmup * 40), 40)
    for step in range(1, 41):
        rate = train.learning_rate(step, 40, arguments(lr=0.5, warmup=warmup))
        assert rate == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_every_seed_step_process_and_purpose_has_a_draw_of_its_own(monkeypatch):
    draws = []
    for rank, *asked in itertools.product((0, 1), (1, 2), (1, 2, 12), ('dropout', 'delta')):
        monkeypatch.setattr(train, 'RANK', rank)
        draws.append(train.draw(*asked))
        assert train.draw(*asked) == draws[-1] and 0 <= draws[-1] < 2 ** 32
    assert len(set(draws)) == len(draws) == 24


class Biased(torch.nn.Module):
    """A classifier whose logits are one trained bias: enough of a Hugging Face model for the loop."""
    device, base_model = torch.device('cpu'), torch.nn.Module()

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.tensor([0.3, -0.2]))

    def forward(self, input_ids, attention_mask, labels=None, **inputs):
        logits = self.bias.expand(len(input_ids), 2)
        loss = None if labels is None else 100 * torch.nn.functional.cross_entropy(logits, labels)
        return types.SimpleNamespace(logits=logits, loss=loss)


@pytest.fixture
def loop(tokenizer, tmp_path, monkeypatch):
    """loop(what dev evaluations find, **changes): train.train on Biased -> (its part of the record, the bias,
    the steps of its states)."""
    def loop(accuracies=None, **changes):
        pairs = pairs_of_all_lengths(48)
        model, saved = Biased(), []
        monkeypatch.setattr(train, 'save_checkpoint', lambda *args: None)
        monkeypatch.setattr(train, 'save_state', lambda *args: saved.append(args[2]['step']))
        if accuracies:
            monkeypatch.setattr(evaluate, 'accuracy', lambda marks, found=iter(accuracies): next(found))
        found = train.train(model, tokenizer, pairs, pairs[:10], arguments(out=tmp_path, **changes))
        return found, model.bias.detach(), saved
    return loop


def test_three_steps_by_hand(loop, tokenizer):
    """AdamW without weight decay, eps 1e-8, the gradient clipped from far above 1 to 1, the rate falling."""
    result, bias, _ = loop(max_steps=3, lr=0.01)
    expected, mean, square = torch.tensor([0.3, -0.2]), torch.zeros(2), torch.zeros(2)
    batches = train.plan(pairs_of_all_lengths(48), tokenizer, arguments(max_steps=3))
    for step, batch in enumerate(batches, 1):
        ones = sum(row % 2 for row in batch) / 16
        shares = torch.tensor([1 - ones, ones])
        loss = -100 * shares @ expected.log_softmax(0)
        gradient = 100 * (expected.softmax(0) - shares)
        gradient = gradient / max(gradient.norm(), 1)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient ** 2
        change = (mean / (1 - 0.9 ** step)) / ((square / (1 - 0.999 ** step)).sqrt() + 1e-8)
        expected = expected - 0.01 * (3 - step + 1) / 3 * change
    assert torch.allclose(bias, expected, atol=1e-6)
    assert result['history'][-1]['loss'] == pytest.approx(loss.item())


@pytest.mark.parametrize('seconds, every, steps, plain, scored, accuracies, best, saved', [
    # the first of equal ones is kept; the last step is always scored; the state: the best, the last, long ago
    (math.inf, 2, 5, 0, [2, 4, 5], [50, 70, 70], (70, 4), [2, 4, 5]),
    (math.inf, 1, 4, 0, [1, 2, 3, 4], [70, 70, 60, 50], (70, 1), [1, 4]),
    (-1, 1, 4, 0, [1, 2, 3, 4], [50, 40, 30, 20], (50, 1), [1, 2, 3, 4]),
    # no checkpoint of the plain steps is the method's
    (math.inf, 1, 5, 2, [1, 2, 3, 4, 5], [90, 95, 60, 65, 65], (65, 4), [3, 4, 5]),
    (math.inf, 2, 4, 2, [2, 4], [90, 60], (60, 4), [4])])
def test_what_is_scored_and_kept(seconds, every, steps, plain, scored, accuracies, best, saved, loop,
                                 monkeypatch):
    seen, own = [], {'plain_steps': plain}

    def method(model, batch, own, generator):
        seen.append(own)
        return robust.plain(model, batch)
    monkeypatch.setitem(robust.METHODS, 'adv', robust.Method(method, own))
    monkeypatch.setattr(train, 'STATE_SECONDS', seconds)
    result, _, states = loop(accuracies, method='adv', own=own, max_steps=steps, eval_steps=every)
    assert [(h['step'], h['dev']) for h in result['history']] == list(zip(scored, accuracies, strict=True))
    assert (result['dev'], result['step']) == best and result['steps'] == steps and states == saved
    assert seen == [own] * (steps - plain)


def test_cheap_dropout_drops_each_element_with_probability_p_and_scales_the_rest():
    torch.manual_seed(0)
    x = torch.ones(4003, 1001, requires_grad=True)
    with train.CheapDropout():
        y = torch.nn.Dropout(0.1)(x)
        assert torch.equal(torch.nn.functional.dropout(x, 0.1, training=False), x)
        assert not torch.nn.functional.dropout(x, 1.0).any()
    y.sum().backward()
    assert torch.equal(x.grad, y) and set(y.unique().tolist()) == {0, torch.ones(()).mul(1 / 0.9).item()}
    kept = (y.detach() > 0).double().flatten()
    for share in (kept, kept[0::4], kept[1::4], kept[2::4], kept[3::4]):
        assert abs(share.mean() - 0.9) < 5 * 0.3 / len(share) ** 0.5
    for apart in (1, 2, 3, 4):      # elements that share a random number are independent
        assert abs((kept[apart:] * kept[:-apart]).mean() - 0.81) < 5 * 0.4 / len(kept) ** 0.5


def test_cheap_dropout_reaches_attention_and_leaves_a_model_without_dropout_alone(model, batch, monkeypatch):
    seen, cheap = [], train.CheapDropout.dropout

    def counting(input, *args, **kwargs):
        seen.append(input.shape)
        return cheap(input, *args, **kwargs)
    monkeypatch.setattr(train.CheapDropout, 'dropout', staticmethod(counting))
    with train.CheapDropout.fitting(model):
        model(**batch)
    # Both layers' attention; the embeddings, and 2 a layer.
    assert seen.count((2, 2, 6, 6)) == 2 and seen.count((2, 6, 16)) >= 5
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.set_attn_implementation('sdpa')
    assert not isinstance(train.CheapDropout.fitting(model), train.CheapDropout)
    assert model.config._attn_implementation == 'sdpa'


# ---------------------------------------------------------------- train.py: identity

LANDS = [       # method, flag -> what of the setting it changes, what the variant then has, the name
    ('plain', '--lr 0.01 --warmup 0.5 --eval-steps 7 --max-length 32 --max-eval 5 --no-freeze-embeddings',
     'eval_steps freeze_embeddings lr max_eval max_length warmup', {}, 'plain'),
    ('plain', '--batch 32', 'batch steps', {}, 'plain'),
    ('plain', '--no-float32 --layer 1', 'dtype', {}, 'plain'),
    # with a layer above 0 all runs of the command are float32
    ('plain rs_r', '--no-float32 --layer 1', '', {}, 'plain'),
    ('rs_r', '--no-float32 --layer 0', 'dtype', {'eps': 0.1}, 'rs_r-0.1'),
    ('plain', '--max-train 99 --langs en x1 x2 x3 x4', 'dev-x5.tsv dev-x6.tsv steps test-x5.tsv test-x6.tsv '
     'train_pairs', {}, 'plain'),
    ('plain', '--max-steps 5', 'steps', {}, 'plain'), ('plain', '--epochs 1', 'steps', {}, 'plain'),
    ('plain', '--model DROPPING', 'dropout', {}, 'plain'),
    ('plain', '--model OTHER/sample/model', 'model', {}, 'plain'),
    ('plain', '--data OTHER --model SAME', 'dev-en.tsv test-x3.tsv train-en.tsv', {}, 'plain'),
    ('plain', '--eps 5 --m 3 --p 0.3 --adv-steps 3 --plain-steps 9 --layer 1', '', {}, 'plain'),
    ('rs_r', '--eps 0.2 --layer -1', '', {'eps': 0.2, 'layer': -1}, 'rs_r-0.2-layer-1'),
    ('adv --plain-steps 5', '--layer 2 --adv-steps 3', '',
     {'eps': 0.001, 'layer': 2, 'adv_steps': 3, 'plain_steps': 5},
     'adv-0.001-layer2-adv_steps3-plain_steps5'),
    ('rs_a', '--p 0.5 --m 20', '', {'p': 0.5, 'm': 20}, 'rs_a-m20-p0.5'),
    ('rs_a', '--replace authors --english-only --synonyms OTHER/sample/synonyms.json', '',
     {'replace': 'authors', 'english_only': True, 'synonyms': 'DIGEST'},
     'rs_a-replaceauthors-english_only-synonymsDIGEST'),
    ('rs_a', '--max-steps 12', '', {'steps': 12}, 'rs_a-steps12'),
    ('rs_a', '--epochs 0.2', '', {'steps': 10}, 'rs_a-steps10'),
    ('rs_a', '--max-train 99', 'train_pairs', {}, 'rs_a'),
]


@pytest.fixture(scope='session')
def other(small, tmp_path_factory):
    """The small world with another pair in three of its files, another word, other neighbours."""
    folder = Path(shutil.copytree(small, tmp_path_factory.mktemp('other'), dirs_exist_ok=True))
    for name in ('train-en', 'dev-en', 'test-x3'):
        change(folder / f'sample/{name}.tsv', b'\tdifferent', b'\tparaphrase')
    change(folder / 'sample/model/tokenizer.json', b'"dodak"', b'"dodax"')
    change(folder / 'sample/synonyms.json', b'{', b'{ ')
    return folder


@pytest.mark.parametrize('method, flag, setting, variant, name', LANDS)
def test_where_a_flag_lands(method, flag, setting, variant, name, small, other, dropping, monkeypatch):
    for word, place in (('OTHER', other), ('DROPPING', dropping), ('SAME', small / 'sample/model')):
        flag = flag.replace(word, str(place))
    cpu, dtypes = torch.device('cpu'), (torch.bfloat16, torch.float32)      # as where bfloat16 is fast
    monkeypatch.setattr(evaluate, 'choose_device', lambda float32: (cpu, dtypes[float32]))

    def identity(flags):
        args = train.parse_args(['--task', 'sample', '--data', str(small), '--method', *flags.split()])
        runs = train.runs_of(args)
        return train.identity_of(runs[0], train.read_inputs(args, runs))

    usual, found = identity(method), identity(f'{method} {flag}')
    digest = data.digest(other / 'sample/synonyms.json')
    differs = {key for key, _ in usual['setting'].items() ^ found['setting'].items()}
    assert sorted(differs) == setting.split()
    expected = {key: digest if value == 'DIGEST' else value for key, value in variant.items()}
    assert found['variant'] == {'method': method.split()[0]} | expected
    assert found['name'] == name.replace('DIGEST', digest) + '-seed42' and found['seed'] == 42
    assert identity(f'{method} {flag} --seed 3') == found | {'seed': 3, 'name': found['name'][:-2] + '3'}


def test_the_defaults_are_the_tasks_and_the_methods():
    def runs_of(flags):
        return train.runs_of(train.parse_args(flags.split()))
    runs = runs_of('--task pawsx --method plain adv rs_r rs_a --seed 1 2')
    assert [(run.method, run.seed) for run in runs] == list(itertools.product(robust.METHODS, (1, 2)))
    neighbours = 'download/synonyms/counterfitted_neighbors.json'
    for run in runs:
        assert (run.epochs, run.synonyms) == ((3, neighbours) if run.method == 'rs_a' else (5, None))
        assert (run.lr, run.batch, run.eval_steps) == (2e-5, 32, 200)
        assert run.own == robust.METHODS[run.method].own and run.model == 'bert-base-multilingual-cased'
    grid = runs_of('--task xnli --method plain rs_r --eps 0.01 0.1')
    assert [run.own.get('eps') for run in grid] == [None, 0.01, 0.1]
    sample, = runs_of('--task sample --method adv')
    assert (sample.own['plain_steps'], sample.model) == (750, 'download/sample/model')


# ---------------------------------------------------------------- train.py: the command line

FLAGS = {       # flags of train.py -> what the line says
    'adv --eps -1': 'expected 0 or above|expected at least one', 'adv --eps nan': 'nan: expected 0',
    'plain --batch 0': 'expected 1', 'plain --batch 1.5': 'invalid int', 'rs_a --replace both': 'choice',
    'rs_a --p 1.1': 'expected 0 to 1', 'rs_a --m 0': 'expected 1', 'plain --lr 0': 'expected 1e-09',
    'plain --epochs 0': 'expected 1e-09', 'plain --warmup 1.1': 'expected 0 to 1',
    'plain --seed -1': 'expected', 'plain --max-length 7': 'expected 8',
    'adv --adv-steps 0': 'expected 1', 'plain --lr inf': 'expected', 'plain --eval-steps 0': 'expected 1',
    'plain --task mnli': 'invalid choice', 'plain --plain-steps -1': 'expected',
    'plane': 'plane.*choose from .*plain.*adv.*rs_r.*rs_a',
    'plain --nonsense 1': 'unrecognized arguments: --nonsense', '': 'method: expected at least one'}


@pytest.mark.parametrize('flags', FLAGS)
def test_a_wrong_command_line_is_one_line_and_nothing_exits(flags, capsys):
    with pytest.raises(data.InputError) as error:
        train.main(['--task', 'sample', '--method', *flags.split()])
    line, flag = str(error.value), re.findall('--[a-z-]+', f'--method {flags}')[-1]
    assert re.search(FLAGS[flags], line) and flag in line and '\n' not in line
    assert capsys.readouterr() == ('', '')


def test_the_help_has_every_flag_and_the_defaults(capsys):
    with pytest.raises(SystemExit):
        train.main(['--help'])
    shown = capsys.readouterr().out
    owns = {method: own for method, (_, own) in robust.METHODS.items()}
    for of, defaults in {'all': train.COMMON, **train.DEFAULTS, **owns}.items():
        assert f'defaults of {of}: {defaults}\n' in shown
    assert all(f'--{flag.replace("_", "-")}' in shown for flag in train.FLAGS)


def test_a_fifth_method_is_one_function_and_one_entry(small, tmp_path, call, monkeypatch):
    """Its flag, folder, row and record come of themselves."""
    def noisy(model, batch, own, generator):
        return robust.rs_r(model, batch, eps=own['sigma'], generator=generator)
    monkeypatch.setitem(robust.METHODS, 'noisy', robust.Method(noisy, {'sigma': 0.05}))
    monkeypatch.chdir(tmp_path)
    common = f'train --task sample {FAST} --data {small} --method'
    out = call(f'{common} plain noisy --sigma 0.5').out
    call(f'{common} noisy plain')
    folders = sorted(Path('runs').iterdir())
    names = ['noisy-seed42', 'noisy-sigma0.5-seed42', 'plain-seed42']
    assert [path.name for path in folders] == [f'sample-{name}' for name in names]
    records = list(map(record_of, folders))
    assert [record['args'].get('sigma') for record in records] == [0.05, 0.5, None]
    assert len({record['history'][0]['loss'] for record in records}) == 3
    assert re.search(r'\| plain .*\n(\| .*\n)*\| noisy-sigma0\.5 ', out)
    with pytest.raises(data.InputError, match='sigma'):
        call(f'{common} noisy --sigma wide')


def test_a_dry_run_lists_each_run_with_its_steps_and_writes_nothing(small, tmp_path, call, monkeypatch):
    monkeypatch.setenv('RANK', '1')         # as job systems do
    before = contents(small)
    flags = '--method plain rs_r rs_a --eps 0.1 1 --seed 1 2 --m 4 --dry-run'
    said = call(f'train --task sample {flags} --data {small} --out {tmp_path}/new')
    listed = [line for line in said.err.splitlines() if line.startswith(f'{tmp_path}/new')]
    assert listed == [f'{tmp_path}/new/sample-{name}: new, {steps} steps' for name, steps in (
        ('plain-seed1', 19), ('plain-seed2', 19), ('rs_r-0.1-seed1', 19), ('rs_r-1.0-seed1', 19),
        ('rs_r-0.1-seed2', 19), ('rs_r-1.0-seed2', 19), ('rs_a-m4-seed1', 8), ('rs_a-m4-seed2', 8))]
    assert not said.out and not (tmp_path / 'new').exists() and contents(small) == before
    assert 'RANK is set, but torchrun did not set it: one process\n' in said.err


def test_everything_is_looked_at_before_the_first_run(small, tmp_path, call):
    """A grid whose last method lacks its neighbour file, or whose last language is missing, never begins."""
    flags = f'train --task sample --max-steps 1 --data {small} --out {tmp_path / "new"} --method'
    (tmp_path / 's.json').write_text('{"cat": ["dog"]}')
    for more, line in (('plain rs_a --synonyms nowhere.json --dry-run', 'nowhere.json'),
                       (f'plain rs_a --synonyms {tmp_path}/s.json', 's.json: no word of the training pairs'),
                       ('rs_r plain --layer 7', 'layers 1 to 2'), ('plain --langs en yo', 'test-yo.tsv'),
                       ('plain adv', '--plain-steps 750: adv would never begin; .* than the 1 steps'),
                       ('adv --plain-steps 2 --max-steps 2', '--plain-steps 2: adv would never begin'),
                       ('plain --model ./modle', r'^\./modle: no such folder')):
        with pytest.raises(data.InputError, match=line) as error:
            call(f'{flags} {more}')
        assert '\n' not in str(error.value) and not (tmp_path / 'new').exists()
    ok = call(f'{flags} adv --plain-steps 1 --max-steps 2')
    assert record_of(tmp_path / 'new')['step'] == 2 and '| adv-0.001-plain_steps1 ' in ok.out


@pytest.mark.parametrize('city, rows, settings, line', [
    ('paris', 14, '{}', None), ('Paris', 14, '{"do_lower_case": false}', None),
    ('Paris', 14, '{}', 'its tokenizer lower-cases, .* Paris, .*"do_lower_case": false.*tokenizer_config'),
    ('paris', 13, '{}', 'its tokenizer has ids up to 13, its embeddings 13 rows; expected the tokenizer')])
def test_a_tokenizer_that_is_not_the_encoders_is_one_line(city, rows, settings, line, world, tmp_path):
    """Of wordpieces, with vocab.txt, as old checkpoints have it."""
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', city, *'pars', '##a', '##r', '##i', '##s']
    config = BertConfig.from_pretrained(world / 'sample/model', vocab_size=rows)
    transformers.BertModel(config).save_pretrained(tmp_path)
    (tmp_path / 'vocab.txt').write_text('\n'.join(words))
    (tmp_path / 'tokenizer_config.json').write_text(settings)
    with pytest.raises(data.InputError, match=f'^{tmp_path}: {line}') if line else contextlib.nullcontext():
        evaluate.load_encoder(str(tmp_path), 'sample')


# ---------------------------------------------------------------- train.py: runs and their records

TRAINED = {     # name: flags; of those after the first four each has one argument that another has not
    'plain': 'plain', 'rs_r 0': 'rs_r --eps 0', 'adv 0': 'adv --eps 0 --plain-steps 0',
    'rs_a 0': 'rs_a --p 0 --m 1 --epochs 4',
    'rs_r': 'rs_r', 'rs_r 43': 'rs_r --seed 43', 'rs_r eps': 'rs_r --eps 0.2', 'rs_r layer': 'rs_r --layer 1',
    'adv': 'adv --eps 0.1 --plain-steps 0', 'adv eps': 'adv --eps 0.2 --plain-steps 0',
    'adv steps': 'adv --eps 0.1 --plain-steps 0 --adv-steps 3',
    'adv layer': 'adv --eps 0.1 --plain-steps 0 --layer 1', 'adv plain': 'adv --eps 0.1 --plain-steps 3',
    'rs_a': 'rs_a', 'rs_a m': 'rs_a --m 20', 'rs_a p': 'rs_a --p 0.5', 'rs_a all': 'rs_a --replace authors',
    'rs_a english': 'rs_a --english-only --synonyms OTHER', 'rs_a other': 'rs_a --synonyms OTHER',
    'warm': 'plain --warmup 0.5', 'lr': 'plain --lr 0.01', 'batch': 'plain --batch 15',
    'frozen': 'plain --freeze-embeddings', 'train': 'plain --max-train 100', 'short': 'plain --max-length 8',
    'plain 43': 'plain --seed 43', 'no dropout': 'plain'}


def test_every_argument_reaches_the_training_and_eps_0_is_plain_itself(run, small, dropping, tmp_path,
                                                                       monkeypatch):
    words = sorted(json.loads((small / 'sample/synonyms.json').read_text()))
    # Half of them are not English: another file, of which --english-only has less.
    neighbours = {word: [before, word[:-1] + 'd'] for before, word in zip(words[-1:] + words, words)}
    (tmp_path / 'other.json').write_text(json.dumps(neighbours))
    weights = {}
    for name, flags in [*TRAINED.items(), ('again', 'rs_r')]:
        with monkeypatch.context() as patch:
            if name == 'no dropout':        # on the CPU that of the model is the cheap one
                patch.setattr(train.CheapDropout, 'dropout', staticmethod(lambda input, *args, **kw: input))
            flags = flags.replace('OTHER', f'{tmp_path}/other.json')
            folder, _ = run(name, f'{FAST} --model {dropping} --langs en --method {flags}')
        weights[name] = (folder / 'model.safetensors').read_bytes()
    assert weights['rs_r'] == weights['again']
    assert weights['plain'] == weights['rs_r 0'] == weights['adv 0'] == weights['rs_a 0']
    for one, other in itertools.combinations(list(TRAINED)[3:], 2):
        assert weights[one] != weights[other], (one, other)
    args = train.parse_args(f'--task sample --data {small} --method rs_a --seed 1 2'.split())
    pairs = data.read_pairs(small / 'sample/train-en.tsv', 'sample')
    first, second = (list(train.copies_of(run, pairs)) for run in train.runs_of(args))
    assert len(first) == len(second) == 3000 and first != second


def test_a_run_folder_and_its_record_are_what_their_users_expect(run, small, tmp_path):
    """Predictions are in XTREME's form, and transformers' pipeline takes the checkpoint. Of the languages one
    is one's own, and others are not there."""
    own = Path(shutil.copytree(small, tmp_path / 'own')) / 'sample'
    (own / 'test-x6.tsv').rename(own / 'test-yo.tsv')
    before, flags = contents(own), f'{FAST} --max-train 200 --max-eval 20 --langs yo x1 en'
    folder, record = run('a', f'--method rs_a {flags}', own.parent)
    assert contents(own) == before and sorted(path.name for path in folder.iterdir()) == [
        '.lock', 'args.json', 'config.json', 'model.safetensors', 'predictions', 'results.json',
        'tokenizer.json', 'tokenizer_config.json']
    assert not {'local_files_only', 'trust_remote_code', 'is_local'} & set(
        json.loads((folder / 'tokenizer_config.json').read_text()))
    text = (folder / 'results.json').read_text()
    assert text.endswith('}\n') and text.count('\n') == 1 and 'NaN' not in text
    assert json.loads((folder / 'args.json').read_text()).items() <= record.items()

    args, made_by, setting = record['args'], record['made_by'], record['setting']
    assert args.items() >= {
        'method': 'rs_a', 'm': 10, 'p': 0.1, 'replace': 'paper', 'seed': 42, 'epochs': 0.4,
        'model': f'{own}/model', 'data': str(own.parent), 'out': str(folder),
        'synonyms': f'{own}/synonyms.json'}.items()     # and of other methods' arguments nothing
    assert not {'eps', 'layer', 'adv_steps', 'plain_steps', 'own', 'epochs_rs_a'} & set(args)
    read = ['train-en', 'dev-en', 'dev-x1', 'test-en', 'test-x1', 'test-yo']
    assert setting == {f'{name}.tsv': data.digest(own / f'{name}.tsv') for name in read} | {
        'task': 'sample', 'lr': 0.001, 'batch': 16, 'warmup': 0.05, 'eval_steps': 4, 'max_length': 128,
        'max_eval': 20, 'freeze_embeddings': False, 'dtype': 'float32', 'train_pairs': 200,
        'model': setting['model'], 'dropout': setting['dropout']}
    assert record['name'] == 'rs_a-steps8-seed42' and re.fullmatch(DIGEST, setting['model'])
    assert (made_by['processes'], len(made_by['source'])) == (1, 16) and 'thread' in made_by['device']
    assert set(made_by['versions']) == {'python', 'torch', 'transformers', 'tokenizers'}
    assert record['steps'] == 8 and record['longest'] == 64 and record['pairs_per_second'] > 0
    assert [h['step'] for h in record['history']] == [4, 8] and record['dev'] == record['dev_all']['en']
    assert list(record['test']) == ['en', 'x1', 'yo'] and list(record['dev_all']) == ['en', 'x1']
    assert record['cut'] == {'en': 0, 'x1': 0, 'yo': 0}
    labels = data.TASKS['sample'].labels
    for name in read[1:]:
        predicted = (folder / f'predictions/sample/{name}.tsv').read_text().splitlines()
        pairs, (split, lang) = data.read_pairs(own / f'{name}.tsv', 'sample')[:20], name.split('-')
        marks = ['01'[p == labels[pair.label]] for p, pair in zip(predicted, pairs, strict=True)]
        assert record[f'{split}_marks'][lang] == ''.join(marks)
        assert record['dev_all' if split == 'dev' else 'test'][lang] == 5 * marks.count('1')
    assert [predicted.count(label) for label in labels] == record['answers']['yo']
    classify = transformers.pipeline('text-classification', str(folder))
    given = [classify({'text': pair.premise, 'text_pair': pair.hypothesis})['label'] for pair in pairs]
    assert given == predicted


# ---------------------------------------------------------------- train.py: runs that are stopped

# As `python train.py FLAGS`, but killed at a step's evaluation: between checkpoint and state, or after both.
KILLED = """
import os, signal, sys, train
where, at = sys.argv.pop(1), int(sys.argv.pop(1))
train.STATE_SECONDS, save_state = -1, train.save_state
def killing(model, optimizer, state, run):
    if where == 'after' or state['step'] < at:
        save_state(model, optimizer, state, run)
    if state['step'] == at:
        os.kill(os.getpid(), signal.SIGKILL)
train.save_state = killing
train.main()
"""


def test_a_killed_run_ends_as_one_that_was_never_stopped(small, dropping, tmp_path, call):
    """Its lock does not outlive it. Resumed where it was moved to, with a language more."""
    flags = (f'--task sample --data {small} --model {dropping} --max-steps 60 --eval-steps 10 --lr 3e-3 '
             '--no-freeze-embeddings --batch 16 --langs en x1')
    runs = {'rs_r': '--eps 0.1', 'adv': '--eps 0.01 --plain-steps 15', 'rs_a': ''}
    for where, at in (('between', 20), ('after', 30)):
        jobs = [(KILLED, f'{where} {at} {flags} --out {tmp_path}/{method} --method {method} {own}'.split())
                for method, own in runs.items()]
        assert [status for status, *_ in processes(*jobs)] == [-9] * 3
    for method, own in runs.items():
        whole, moved = tmp_path / f'{method}-whole', tmp_path / f'{method}-moved'
        call(f'train {flags} --out {whole} --method {method} {own}')
        shutil.move(tmp_path / method, moved)
        said = call(f'train {flags} x2 --out {moved}/ --method {method} {own}').err
        assert 'goes on after step 30' in said and not list(moved.glob('*.p*t*'))
        expected, found = record_of(whole), record_of(moved)
        assert expected['history'] == found['history'] and len({h['dev'] for h in found['history']}) > 1
        assert expected['test_marks'].items() < found['test_marks'].items()
        assert expected['setting'].items() < found['setting'].items()
        assert (whole / 'model.safetensors').read_bytes() == (moved / 'model.safetensors').read_bytes()


OTHERS = [      # what is asked of the folder of `rs_r --seed 42` -> what its line says
    ('rs_r --eps 0.2', 'rs_r-0.1-seed42, not rs_r-0.2-seed42'),
    ('rs_r --seed 3 --lr 0.1', 'rs_r-0.1-seed42, not rs_r-0.1-seed3; lr 0.001, not 0.1'),
    ('plain --max-steps 7', 'rs_r-0.1-seed42, not plain-seed42; steps 8, not 7'),
    ('rs_r --data OTHER --model SAME', 'another train-en.tsv; another dev-en.tsv; another test-x3.tsv')]


@pytest.mark.parametrize('error, raised, line', [
    (None, None, None), (KeyboardInterrupt(), KeyboardInterrupt, '^$'),
    (OSError(28, 'No space left on device'), OSError, "No space left on device: 'a/state.pt'"),
    (RuntimeError('mat1 and mat2 shapes'), RuntimeError, '^mat1 and mat2 shapes$'),
    (torch.OutOfMemoryError('CUDA out of memory.'), data.InputError,
     r'^a: out of memory \(CUDA out of memory\.\); try --freeze-embeddings, or a smaller --batch or')])
def test_a_folder_is_of_one_run_though_that_is_cut_short(error, raised, line, small, other, tmp_path, call,
                                                         monkeypatch):
    """Of its second state half is written; the first stays, and the same command goes on from there."""
    monkeypatch.chdir(tmp_path)
    common = f'train --task sample {FAST} --eval-steps 2 --data {small}'
    save, calls = torch.save, itertools.count(1)

    def failing(state, path):
        save(state, path)
        if error and next(calls) == 2:
            Path(path).write_bytes(b'half')
            raise error
    expected = pytest.raises(raised, match=line) if error else contextlib.nullcontext()
    with monkeypatch.context() as patch, expected:
        patch.setattr(train, 'STATE_SECONDS', -1)
        patch.setattr(torch, 'save', failing)
        call(f'{common} --method rs_r --out a')
    if error:
        held = json.loads(Path('a/args.json').read_text())
        held['made_by'] |= {'source': 'another', 'processes': 2}
        Path('a/args.json').write_text(json.dumps(held))
    before = contents('a')
    assert evaluate.load('a') and not list(Path('a').glob('*part*'))
    assert Path('a/state.pt').exists() == bool(error) != Path('a/results.json').exists()
    for flags, line in OTHERS:
        flags = flags.replace('OTHER', str(other)).replace('SAME', f'{small}/sample/model')
        with pytest.raises(data.InputError) as refused:
            call(f'{common} --out a --method {flags}')
        assert str(refused.value) == f'a: holds another run ({line}); name another folder with --out'
    # Paths, flags of other methods and languages fewer are the same run.
    for more in ('--adv-steps 3 --m 2', '--langs en x1', '--eps 0.1 --seed 42'):
        said = call(f'{common}/ --out a/ --method rs_r {more} --dry-run').err
        assert f'a/: {"to be resumed" if error else "finished"}, 8 steps' in said
    assert contents('a') == before
    Path('a').rename('b')
    said = call(f'{common} --out b --method rs_r')
    found = record_of(Path('b'))
    assert f'{evaluate.accuracies([found], ["en"]).item():.1f}' in said.out and '| rs_r-0.1 ' in said.out
    if error:
        assert 'goes on after step 2' in said.err and not Path('b/state.pt').exists()
        assert re.search(r'^b: began with source another, not \w+; processes 2, not 1$', said.err, re.M)
        assert (found['began_with'], found['made_by']['processes']) == (held['made_by'], 1)
        call(f'{common} --out c --method rs_r')
        assert found['history'] == record_of(Path('c'))['history']
    else:
        assert sorted(contents('b').values()) == sorted(before.values())


def test_a_run_that_fails_does_not_end_the_grid(small, tmp_path, call, capsys):
    """One that diverges is stopped at its next dev evaluation."""
    grid = f'train --task sample --method rs_r plain --eps 1e38 {FAST} --data {small} --out {tmp_path}/runs'
    with pytest.raises(data.InputError) as error:
        call(grid)
    line, said = str(error.value), capsys.readouterr().err
    assert re.fullmatch(rf'{tmp_path}/runs/sample-rs_r-1e\+38-seed42: .* logits that are not finite;.*', line)
    assert said.index(line) < said.index('plain-seed42: finished')
    with pytest.raises(data.InputError):        # what is finished is shown again
        call(grid)
    assert re.findall(r'^\| (\w+)', capsys.readouterr().out, re.M) == ['plain']


# ---------------------------------------------------------------- train.py: jobs that meet

def test_what_an_out_may_hold(small, tmp_path, call):
    """A log that the shell opened is no obstacle; a checkpoint that train.py did not write is one."""
    flags = f'train --task sample --method plain --data {small} --max-steps 1 --langs en --out {tmp_path}'
    (tmp_path / 'log.txt').touch()
    assert '| plain ' in call(flags).out
    for name in ('config.json', 'model.safetensors', 'tokenizer.json', 'results.json', 'state.pt'):
        folder = tmp_path / name.replace('.', '-')
        folder.mkdir()
        (folder / name).write_text('{}')
        with pytest.raises(data.InputError, match=f'{folder}: holds {name}, but no .* of this train.py'):
            call(f'{flags}/{folder.name}')
        assert contents(folder) == {folder / name: b'{}'}


def test_a_folder_has_one_writer(small, tmp_path, call, monkeypatch):
    """While another process holds it: the same run is left to that one, another is refused."""
    common, done = f'train --task sample --data {small} {FAST} --langs en', tmp_path / 'done'
    plain, make = tmp_path / 'runs/sample-plain-seed42', train.train_and_score
    call(f'{common} --method plain --out {done}')
    plain.mkdir(parents=True)
    shutil.copy(done / 'args.json', plain)      # all that there is before the first evaluation

    def meanwhile(*args):       # the other process ends while this one makes its run
        make(*args)
        shutil.copy(done / 'results.json', plain)
    with FileLock(plain / '.lock'):
        with pytest.raises(data.InputError, match=r'seed42: holds another run \(plain-seed42, not rs_r-0.1-'):
            call(f'{common} --method rs_r --out {plain}')
        assert not call(f'{common} --method plain --out {plain}').out       # none to show, and no failure
        assert not call(f'{common} --method plain rs_r --eps 1 --out {tmp_path}/runs').out      # not the last
        monkeypatch.setattr(train, 'train_and_score', meanwhile)
        said = call(f'{common} --method plain rs_r --out {tmp_path}/runs')
    monkeypatch.setattr(train, 'train_and_score', make)
    assert f'{plain}: being made by another process\n' in said.err and not (plain / 'config.json').exists()
    assert '| plain ' in said.out and '| rs_r-0.1 ' in said.out
    # Of a process that was killed before it saved anything the folder is free again, for whatever run.
    (plain / 'results.json').unlink()
    assert '| rs_r-0.1 ' in call(f'{common} --method rs_r --out {plain}').out


# As `python train.py`; a run says late what it is, and takes longer than a process waits for another's lock.
SLOW = """
import data, time, train
make, write_json = train.train, train.write_json
train.train = lambda *args: time.sleep(3) or make(*args)
train.write_json = lambda *args: time.sleep(1) or write_json(*args)
data.run_script(train.main)
"""


def test_of_two_runs_that_meet_in_a_folder_one_is_refused(small, tmp_path):
    flags = f'--task sample --data {small} --max-steps 2 --langs en x1 --method plain --out {tmp_path}/a --lr'
    found = processes(*((SLOW, [*flags.split(), lr]) for lr in ('0.001', '0.002')))
    (_, out, _), (status, nothing, said) = sorted(found)
    assert '| plain ' in out and (status, nothing) == (1, '')
    assert re.search(r'^\S+/a: holds another run \(lr \S+, not \S+\); name another .* --out\n$', said, re.M)
    assert record_of(tmp_path / 'a')['setting']['lr'] == (0.002 if found[0][0] else 0.001)


# As `python train.py`; the first process keeps each step's gradients, and each says when it writes.
GRADIENTS = """
import sys, torch, data, train
path, clip, steps = sys.argv.pop(1), torch.nn.utils.clip_grad_norm_, []
def keeping(parameters, norm):
    parameters = list(parameters)
    if train.RANK == 0:
        torch.save([p.grad for p in parameters if p.grad is not None], f'{path}.{len(steps)}')
    steps.append(clip(parameters, norm))
torch.nn.utils.clip_grad_norm_ = keeping
train.save_state = lambda *args: print('state')
data.run_script(train.main)
"""


def test_two_processes_have_the_gradients_of_one(small, tmp_path):
    """Batches of 15 of 20 pairs: shares of 8 and 7, then of 3 and 2."""
    flags = (f'--task sample --method plain --data {small} --epochs 1 --max-train 20 --batch 15 --warmup 0 '
             '--lr 1e-6 --langs en --out').split()
    one, two_ = ([tmp_path / name, *flags, tmp_path / f'run {name}'] for name in ('one', 'two'))
    alone, first, second = processes((GRADIENTS, one), *two(GRADIENTS, *two_))
    for status, out, err in (alone, first):
        assert status == 0 and out.startswith('state\n') and out.count('| plain') == 1, err
        assert ': finished, English dev ' in err
    assert second == (0, '', '')        # one process writes
    for step in (0, 1):
        one, two_ = (torch.load(tmp_path / f'{name}.{step}', weights_only=True) for name in ('one', 'two'))
        assert len(one) == len(two_) and max(g.abs().max() for g in one) > 1e-3
        assert all(map(close, one, two_))
    assert record_of(tmp_path / 'run two')['made_by']['processes'] == 2


# ---------------------------------------------------------------- evaluate.py: models

def fake(logits):
    """A classifier whose logits are a function of the attention mask."""
    return mock.Mock(device=torch.device('cpu'), config=types.SimpleNamespace(name_or_path='fake'),
                     side_effect=lambda attention_mask, **inputs: types.SimpleNamespace(
                         logits=logits(attention_mask)))


@pytest.mark.parametrize('passes', [
    3 * [[[0, 0, 1.], [0, .1, 0]]] + 2 * [[[1., 0, 0], [9., 0, 0]]],
    [[[1., 0, 0], [0, 2., 0]], [[0, 0, 2.], [1., 0, 0]]]])      # one vote each; the second surer, the first
def test_of_several_passes_the_majority_counts_and_of_tied_classes_the_more_probable(passes, tokenizer):
    model = fake(lambda mask, left=iter(passes): torch.tensor(next(left)))
    pairs = [data.Pair('bokin', 'bokin', 0)] * 2
    assert evaluate.predict(model, tokenizer, pairs, passes=len(passes))[0].tolist() == [2, 1]


def test_predictions_have_the_order_of_the_pairs_a_cut_is_said_and_nan_stops_them(tokenizer, capsys):
    lengths, broken = [3, 1, 4, 2, 7, 5, 6], 0
    pairs = [data.Pair('a ' * length, 'b', 0) for length in lengths]        # [CLS], a ..., [SEP], b, [SEP]

    def logits(mask):
        tokens = mask.sum(1)
        found = torch.nn.functional.one_hot(tokens % 3, 3).float()
        return found.where(tokens[:, None] != broken, math.nan)
    predicted, cut = evaluate.predict(fake(logits), tokenizer, pairs, batch=2)
    assert predicted.tolist() == [(length + 4) % 3 for length in lengths] and cut == 0
    evaluate.say.cache_clear()
    predicted, cut = evaluate.predict(fake(logits), tokenizer, pairs, max_length=9, desc='test-en')
    assert predicted.tolist() == [min(length + 4, 9) % 3 for length in lengths] and cut == 2
    assert capsys.readouterr().err == 'test-en: 2 pairs of more than 9 tokens, cut there\n'
    for length in lengths:
        broken = length + 4
        with pytest.raises(data.InputError, match='fake: gives logits that are not finite'):
            evaluate.predict(fake(logits), tokenizer, pairs, batch=2)


def test_more_tokens_than_positions_are_capped(model, tokenizer, capsys):
    evaluate.say.cache_clear()
    tokenizer.model_max_length = 10 ** 30
    positions = 20 if model.config.model_type == 'bert' else 18         # XLM-R's begin behind the padding's
    assert evaluate.longest(model, tokenizer, 128) == evaluate.longest(model, tokenizer, 128) == positions
    assert capsys.readouterr().err.count(f'{positions} tokens') == 1
    assert evaluate.longest(model, tokenizer, 12) == 12
    tokenizer.model_max_length = 10
    assert evaluate.longest(model, tokenizer, 12) == 10


def edited(name, **changes):
    """A function that changes entries of a folder's JSON file."""
    def edit(folder):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))
    return edit


@pytest.fixture
def encoder(world, tmp_path):
    """A copy of the sample's encoder, to be changed; its tokenizer is what tokenizer.json says."""
    folder = Path(shutil.copytree(world / 'sample/model', tmp_path / 'encoder'))
    edited('tokenizer_config.json', tokenizer_class='PreTrainedTokenizerFast')(folder)
    return folder


def of_config(kind, **sizes):
    """A function that puts a random encoder in a folder."""
    config = getattr(transformers, kind)(vocab_size=634, **sizes)
    return lambda folder: transformers.AutoModel.from_config(config).save_pretrained(folder)


@pytest.mark.parametrize('break_it, layer, message', [
    (lambda folder: list(map(Path.unlink, folder.glob('tokenizer*'))), 0, 'a tokenizer without a vocabulary'),
    (edited('config.json', num_hidden_layers=3), 0, r'16 of its weights are missing \(bert.encoder.layer.2'),
    (edited('tokenizer.json', post_processor=None), 0, 'puts nothing between the two sentences'),
    (edited('tokenizer_config.json', pad_token=None), 0, 'a trial .* failed: .*does not have a padding'),
    (of_config('MT5Config', d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8), 0,
     'a trial .* failed: .*word embeddings were run 0 times'),
    (of_config('XLMConfig', emb_dim=16, n_layers=2, n_heads=2), -1,
     'a trial .* failed: .*keeps its layers in 4 lists'),
    (of_config('CanineConfig', hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
               intermediate_size=32), 0, 'a trial .* failed: .*get_input_embeddings')], ids=range(7))
def test_encoders_that_do_not_fit_are_refused_in_one_line(break_it, layer, message, encoder):
    break_it(encoder)
    with pytest.raises(data.InputError, match=f'encoder: .*{message}') as error:
        evaluate.load_encoder(str(encoder), 'sample', layer=layer)
    assert '\n' not in str(error.value)


def test_an_encoder_of_any_precision_gets_a_head_in_float32_and_is_no_classifier(encoder):
    """Nor is a classifier an encoder. What ends a text may pad it."""
    with pytest.raises(data.InputError, match=r'missing \(classifier\..*expected a fine-tuned classifier'):
        evaluate.load(str(encoder))
    edited('tokenizer_config.json', pad_token=None, eos_token='[SEP]')(encoder)
    transformers.BertModel.from_pretrained(encoder, dtype=torch.float16).save_pretrained(encoder)
    for frozen in (False, True):
        model, tokenizer = evaluate.load_encoder(str(encoder), 'xnli', freeze_embeddings=frozen)
        for name, weight in model.named_parameters():
            assert weight.requires_grad != (frozen and 'word_embeddings' in name)
            assert weight.dtype == torch.float32
    assert tokenizer.pad_token == '[SEP]' and model.config.pad_token_id == 3
    assert tuple(model.config.id2label.values()) == data.TASKS['xnli'].labels
    assert model.classifier.out_features == 3
    model.save_pretrained(encoder)
    for task, line in (('xnli', 'a classifier, whose head'), ('sample', 'cannot be loaded')):
        with pytest.raises(data.InputError, match=f'encoder: {line}'):
            evaluate.load_encoder(str(encoder), task)


def test_the_hub_is_asked_for_what_is_not_at_hand_alone(encoder, monkeypatch):
    asked, at_hand = [], evaluate.AutoTokenizer.from_pretrained

    def from_pretrained(name, local_files_only, trust_remote_code):
        asked.append((name, local_files_only, trust_remote_code))
        if name == 'far':
            raise OSError(f'not there: {local_files_only}\nof several lines')
        return at_hand(name)
    monkeypatch.setattr(evaluate.AutoTokenizer, 'from_pretrained', from_pretrained)
    evaluate.load_encoder(str(encoder), 'sample')
    with pytest.raises(data.InputError, match=r'^far: cannot be loaded \(not there: False\); expected'):
        evaluate.load_encoder('far', 'sample')
    assert asked == [(str(encoder), True, False), ('far', True, False), ('far', False, False)]


def test_the_fingerprint_is_of_all_that_was_pre_trained_and_of_nothing_random(model, tokenizer):
    before = evaluate.fingerprint(model, tokenizer)
    for name, weight in model.named_parameters():
        random = 'pooler' in name or not name.startswith(model.base_model_prefix)
        old = weight.detach().clone()
        weight.data.view(-1)[0] += 1
        assert (evaluate.fingerprint(model, tokenizer) == before) == random, name
        weight.data.copy_(old)
    tokenizer.add_tokens(['word'])
    assert evaluate.fingerprint(model, tokenizer) != before


SMALL = dict(vocab_size=634, num_labels=2, pad_token_id=0)
WIDE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **SMALL)
SHAPES = [      # tiny encoders whose layers or embeddings differ from BERT's; how wide the embeddings are
    (transformers.DistilBertConfig(**SMALL, dim=16, n_layers=2, n_heads=2, hidden_dim=32), 16),
    (transformers.ElectraConfig(**WIDE, embedding_size=8), 8),
    (transformers.RemBertConfig(**WIDE, input_embedding_size=8, output_embedding_size=8), 8),
    (transformers.DebertaV2Config(**WIDE, relative_attention=True, position_buckets=8,
                                  pos_att_type=['p2c', 'c2p']), 16),
    (transformers.AlbertConfig(**WIDE, embedding_size=8), 8),
    (transformers.MPNetConfig(**WIDE), 16),
    (transformers.XLMRobertaXLConfig(**WIDE), 16),
    (transformers.ModernBertConfig(**WIDE, cls_token_id=2, sep_token_id=3, bos_token_id=2,
                                   eos_token_id=3), 16)]


@pytest.mark.parametrize('config, width', SHAPES, ids=[config.model_type for config, _ in SHAPES])
def test_delta_reaches_every_layer_of_encoders_of_other_shapes(config, width, tokenizer):
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    pairs = [data.Pair('bokin bokin', 'bokin', 0), data.Pair('bokin', 'bokin', 1)]
    batch = train.collate(pairs, tokenizer, 32)
    plain = model(**batch).logits
    for layer in (0, 1, 2, -1):
        delta = robust.uniform_delta(model, batch, 0.3, layer, generator())
        assert delta.shape[-1] == (16 if layer else width)
        with robust.perturbed(model, delta, layer):
            assert not torch.equal(model(**batch).logits, plain)
        with robust.perturbed(model, 0 * delta, layer):
            assert torch.equal(model(**batch).logits, plain)


@real
def test_the_real_encoder_on_real_pairs():
    """delta as a change of the embedding table is delta from the hook, dropped in at the same token."""
    model, tokenizer = evaluate.load_encoder(str(SHARED / 'models/me5-small'), 'pawsx')
    pairs = data.read_pairs(data.path_of(SHARED / 'data', 'pawsx', 'dev', 'de'), 'pawsx')[:4]
    batch = train.collate(pairs, tokenizer, 128)
    del batch['labels']
    delta = robust.uniform_delta(model.eval(), batch, 0.1, generator=generator())
    embedded = model.get_input_embeddings()(batch['input_ids']) + delta
    with robust.perturbed(model, delta):
        hooked = model(**batch).logits
    given = model(inputs_embeds=embedded, attention_mask=batch['attention_mask']).logits
    assert torch.equal(hooked, given) and not torch.equal(hooked, model(**batch).logits)


@real
@pytest.mark.parametrize('shape, lang, cut', [('mbert-shape', 'th', 939), ('mbert-shape', 'el', 213),
                                              ('mbert-shape', 'hi', 24), ('xlmr-shape', 'th', 0)])
def test_pairs_cut_at_128_tokens_by_the_real_tokenizers(shape, lang, cut):
    tokenizer = evaluate.AutoTokenizer.from_pretrained(SHARED / 'models' / shape)
    pairs = data.read_pairs(data.path_of(SHARED / 'data', 'xnli', 'test', lang), 'xnli')
    assert evaluate.encode(tokenizer, pairs, 128)[1] == cut


# ---------------------------------------------------------------- evaluate.py: the table

LANGS = data.TASKS['sample'].languages
SETTING = {'task': 'sample', 'train-en.tsv': 'd1', 'dev-en.tsv': 'd2', 'model': 'd3', 'dropout': '{}',
           'train_pairs': 5000, 'lr': 2, 'batch': 32, 'warmup': 0.0, 'eval_steps': 200, 'max_length': 128,
           'max_eval': None, 'freeze_embeddings': True, 'dtype': 'float32'}


def record(method, eps, seed, marks, dev=50.0, steps=200, own=(), changes=(), **setting):
    """A record as train.py writes it; marks: of all languages of the sample world, or {language: marks}."""
    marked = marks if isinstance(marks, dict) else dict.fromkeys(LANGS, marks)
    variant = {'method': method} | ({} if eps is None else {'eps': eps}) | dict(own)
    words = [str(value) if name in ('method', 'eps') else f'{name}{value}' for name, value in variant.items()]
    name = '-'.join([*words, f'seed{seed}'])
    args = {'model': 'D/encoder', 'data': 'D', 'batch': 64, 'max_length': 128, 'max_eval': None, 'layer': 0}
    setting = SETTING | ({} if method == 'rs_a' else {'steps': steps}) | setting
    return {'where': f'runs/{name}', 'setting': setting, 'variant': variant, 'seed': seed, 'name': name,
            'args': args | variant, 'made_by': {'source': 's'}, 'dev': dev, 'steps': steps,
            'test_marks': marked, 'dev_marks': dict.fromkeys(marked, '1'),
            'answers': dict.fromkeys(marked, [10, 10]), **dict(changes)}


def tables(printed):
    """What evaluate.py prints -> [(the text above, {row: {column: cell}}), ...]."""
    found = []
    for above, text in re.findall(r'((?:^(?!\|).*\n)*)((?:^\|.*\n)+)', printed, re.M):
        (_, *columns), _, *rows = [re.split(r' *\| *', line)[1:-1] for line in text.splitlines()]
        found.append((above, {name: dict(zip(columns, cells, strict=True)) for name, *cells in rows}))
        assert len(found[-1][1]) == len(rows)       # no name twice
    return found


def table(*records):
    """Their one table as evaluate.py prints it -> {row: {column: cell}}."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluate.report(records)
    (_, rows), = tables(printed.getvalue())
    return rows


@pytest.mark.parametrize('method', ['plain', 'rs_a'])
def test_a_record_of_these_tests_is_one_of_train(method, run):
    made, (_, found) = record(method, None, 1, '1'), run('a', f'--method {method} {FAST} --max-length 8')
    assert set(made) - {'where'} <= set(found) and set(made['args']) - set(found['args']) <= {'layer'}
    test_files = {name for name in found['setting'] if re.match('(test|dev)-x|test-en', name)}
    assert set(found['setting']) - test_files == set(made['setting'])
    assert found['cut'] == dict.fromkeys(LANGS, 30)


def test_the_table_by_hand(capsys):
    """Rows in the paper's order; adv's gain is that of seed 2 alone, and rs_a shares no seed with plain.

    rs_r gains 25 and 50 points on average over languages: half its interval is 12.706 (t) times 12.5, the
    seeds' standard error, and 1.96 times 16.1, that of the items, whose gains are 0 3/4 1/2 1/4.
    """
    evaluate.report([
        record('rs_a', None, 7, {'en': '0000', 'x1': '1110'}, 80.0, 6170),
        record('rs_r', 0.1, 2, {'en': '1111', 'x1': '1100'}, 91.0, 1234),
        record('plain', None, 2, {'en': '1000', 'x1': '1000'}, 61.0, 1234),
        record('adv', 0.01, 2, {'en': '1000', 'x1': '1111'}, 70.0, 1234),
        record('rs_r', 0.1, 1, {'en': '1110', 'x1': '1100'}, 90.0, 1234),
        record('plain', None, 1, {'en': '1100', 'x1': '1000'}, 50.0, 1234)])
    assert capsys.readouterr().out.startswith("""\
sample, test accuracy in percent; model D/encoder; 5,000 training pairs; 4 test items a language; float32

|          |  n | steps |  dev |   en |    x1 | avg. |         gain |
| -------- | -: | ----: | ---: | ---: | ----: | ---: | -----------: |
| plain    |  2 | 1,234 | 55.5 | 37.5 |  25.0 | 31.2 |              |
| adv-0.01 |  1 | 1,234 | 70.0 | 25.0 | 100.0 | 62.5 |        +37.5 |
| rs_r-0.1 |  2 | 1,234 | 90.5 | 87.5 |  50.0 | 68.8 | +37.5 ±161.9 |
| rs_a     |  1 | 6,170 | 80.0 |  0.0 |  75.0 | 37.5 |              |

- n: seeds""")


@pytest.mark.parametrize('devs, names', [
    ({0.01: [70, 60], 0.1: [69, 59]}, ['adv-0.01 *', 'adv-0.1 °']),             # within one point
    ({0.01: [70, 60], 0.1: [68.9, 58.9]}, ['adv-0.01 * °', 'adv-0.1']),
    ({0.01: [70, 60], 0.1: [90, 37]}, ['adv-0.01 * °', 'adv-0.1']),             # their mean
    ({0.01: [70, 60], 0.1: [70, 60]}, ['adv-0.01 *', 'adv-0.1 °']),             # of equals the smallest
    ({0.01: [70, 70], 0.1: [60, 60], 1.0: [69.5, 69.5]}, ['adv-0.01 *', 'adv-0.1', 'adv-1.0 °']),
    ({0.01: [60, 60], 0.1: [65, 65], 1.0: [90]}, ['adv-0.01', 'adv-0.1 * °', 'adv-1.0']),
    ({0.01: [60, 60], 1.0: [90]}, ['adv-0.01', 'adv-1.0'])])                    # nothing to choose from
def test_english_dev_chooses_among_the_eps_of_most_seeds(devs, names):
    runs = []
    for eps, seeds in devs.items():
        runs += [record('adv', eps, seed, '10', dev=dev) for seed, dev in enumerate(seeds)]
    choice = ['adv oracle'] if '*' in ''.join(names) else []
    assert list(table(*reversed(runs))) == names + choice


def test_each_language_of_the_oracle_takes_the_eps_best_on_its_own_dev_file():
    """Of two equal ones the smaller, of those with the most seeds: 0.1 has too few."""
    runs = []
    for eps, seeds, test, dev in ((0.01, (1, 2), '1110', '10'), (0.1, (1,), '1111', '11'),
                                  (1.0, (1, 2), '0001', '00')):
        for seed in seeds:
            marks = dict.fromkeys(LANGS, dev) | ({'x1': '11', 'x2': '10'} if eps == 1.0 else {})
            runs.append(record('rs_r', eps, seed, test, changes={'dev_marks': marks}))
    cells = table(*runs)['rs_r oracle']
    expected = dict.fromkeys(LANGS, '75.0') | {'x1': '25.0', 'avg.': f'{(6 * 75 + 25) / 7:.1f}'}
    assert cells == expected | dict.fromkeys(('n', 'steps', 'dev', 'gain'), '')
    del runs[0]['dev_marks']['x3']      # over some of the runs it would compare unlike things
    assert table(*runs)['rs_r oracle'] == cells | {'x3': '', 'avg.': ''}
    del runs[0]['dev_marks']
    assert 'rs_r oracle' not in table(*runs)


@pytest.mark.parametrize('counts, mark', [([94, 6], ''), ([95, 5], ' †'), ([4, 96], ' †')])
def test_one_answer_for_nearly_every_item_is_marked(counts, mark):
    answers = {'answers': {'x1': [50, 0], 'en': counts}}
    rows = table(record('rs_r', 1.0, 1, '10'), record('rs_r', 1.0, 2, '10', changes=answers))
    assert list(rows) == [f'rs_r-1.0{mark}']


def test_variants_have_rows_of_their_own_and_the_papers_follow():
    """With the paper's average, that of its row, where the languages are its own."""
    marks, better = (dict.fromkeys(data.TASKS['pawsx'].languages, row) for row in ('10', '11'))
    rows = table(record('rs_a', None, 1, better, steps=46314, task='pawsx'),
                 record('plain', None, 1, marks, task='pawsx'),
                 record('rs_a', None, 1, better, steps=200, own={'steps': 200}, task='pawsx'),
                 record('adv', 0.01, 1, better, own={'adv_steps': 3}, task='pawsx'),
                 record('adv', 0.1, 1, better, task='pawsx'),
                 record('adv', 0.1, 1, marks, own={'adv_steps': 3}, task='pawsx'))
    assert list(rows) == ['plain', 'adv-0.1', 'adv-0.01-adv_steps3 *', 'adv-0.1-adv_steps3 °', 'adv oracle',
                          'rs_a', 'rs_a-steps200', 'paper (mBERT), Hu et al.', 'paper (mBERT), plain',
                          'paper (mBERT), adv', 'paper (mBERT), rs_a']
    assert rows['rs_a']['steps'] == '46,314' and rows['rs_a-steps200']['steps'] == '200'
    assert rows['rs_a-steps200']['gain'] == '+50.0'
    empty = dict.fromkeys(('n', 'steps', 'dev', 'gain'), '')
    scores = dict(zip(marks, ['93.6', '88.1', '88.4', '88.6', '79.5', '77.8', '82.2']))
    assert rows['paper (mBERT), rs_a'] == empty | scores | {'avg.': '85.5'}
    rows = table(record('plain', None, 1, {'yo': '10', 'de': '11', 'en': '10', 'ja': None}, task='pawsx'))
    assert list(rows['plain']) == ['n', 'steps', 'dev', 'en', 'de', 'ja', 'yo', 'avg.', 'gain']
    assert rows['plain']['avg.'] == '66.7' and rows['plain']['ja'] == ''
    assert rows['paper (mBERT), plain'] == empty | {'en': '93.8', 'de': '85.8', 'ja': '74.4', 'yo': '',
                                                    'avg.': ''}
    for task, of_paper in evaluate.PAPER.items():
        for row in of_paper.values():
            *scores, average = map(float, row.split())
            assert len(of_paper) == 5 and len(scores) == len(data.TASKS[task].languages)
            assert statistics.mean(scores) == pytest.approx(average, abs=0.051)


@pytest.mark.parametrize('changes, words', [
    ({'model': 'd9'}, 'another model'), ({'train-en.tsv': 'd9'}, 'another train-en.tsv'),
    ({'dtype': 'bfloat16'}, 'dtype bfloat16, not float32'), ({'max_eval': 2}, 'max_eval 2, not None'),
    ({'lr': 1, 'steps': 9}, 'lr 1, not 2; steps 9, not 200'), ({'dropout': '{"p": 1}'}, 'dropout'),
    ({'test-x1.tsv': 'd9'}, 'another test-x1.tsv'), ({'test-yo.tsv': 'd9'}, 'another test-yo.tsv'),
    ({'test-ha.tsv': 'd9'}, '')])
def test_other_settings_stand_in_tables_of_their_own_headed_in_words(changes, words, capsys):
    """rs_a, whose steps are its own, comes first and parts nothing; a file that plain did not score does."""
    files, marks = {'test-x1.tsv': 'd4'}, dict.fromkeys(LANGS, '11')
    runs = [record('rs_a', None, 1, marks, 600, **files), record('plain', None, 1, marks, **files),
            record('adv', 0.1, 1, marks | {'yo': '101'}, **files, **{'test-yo.tsv': 'd5'}),
            record('rs_r', 0.1, 1, marks, **files | changes)]
    evaluate.report(runs)
    printed = capsys.readouterr().out
    (above, first), *others = tables(printed)
    assert list(first) == ['plain', 'adv-0.1', *([] if words else ['rs_r-0.1']), 'rs_a']
    assert '; 2 or 3 test items a language;' in above and len(others) == bool(words)
    assert printed.count(''.join(f'- {line}\n' for line in evaluate.LEGEND)) == 1 + len(others)
    for above, rows in others:
        assert list(rows) == ['rs_r-0.1'] and 'd9' not in above
        assert f'\nOther runs of sample: {words}' in above
        with pytest.raises(data.InputError, match=f'rs_r-0.1-.* not belong with runs/plain-seed1: {words}'):
            evaluate.one_table(runs)
    assert others or len(evaluate.one_table(runs)) == 4


def test_a_language_without_labels_or_of_some_runs_alone_is_shown_and_not_averaged():
    marks = [{**dict.fromkeys(LANGS, row), 'x1': '1111', 'x2': None} for row in ('1100', '1110')]
    runs = [record('plain', None, 1, marks[0]), record('rs_r', 0.1, 1, marks[1])]
    cells = table(*runs)['plain']
    assert cells['x1'] == '100.0' and cells['x2'] == '' and cells['avg.'] == f'{(100 + 5 * 50) / 6:.1f}'
    assert table(*runs)['rs_r-0.1']['gain'] == f'{5 * 25 / 6:+.1f}'
    del marks[0]['x3']              # trained with fewer --langs: averages stay of the same languages
    rows = table(*runs)
    assert rows['plain']['x3'] == '' and rows['plain']['avg.'] == f'{(100 + 4 * 50) / 5:.1f}'
    assert rows['rs_r-0.1']['avg.'] == f'{(100 + 4 * 75) / 5:.1f}'
    runs = [record(method, eps, seed, dict.fromkeys(LANGS))         # no labels at all
            for method, eps in (('plain', None), ('rs_r', 0.1)) for seed in (1, 2)]
    for cells in table(*runs).values():
        assert cells['en'] == cells['avg.'] == cells['gain'] == '' and cells['n'] == '2'


def test_what_is_no_finished_run_is_passed_over_and_the_same_run_counts_once(tmp_path, call):
    """Folders and lines may stand side by side; the tables need neither model nor data."""
    plain, other, noisy = (json.dumps(record(*run)) + '\n' for run in (
        ('plain', None, 1, '1100'), ('plain', None, 1, '0000'), ('rs_r', 0.1, 1, '1100')))
    for name, text in (('a/results.json', plain), ('b/args.json', '{}'), ('c/distances.json', '{}'),
                       ('d.txt', 'a log'), ('e.jsonl', plain + noisy), ('f.jsonl', other)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    printed = call('evaluate', *sorted(tmp_path.iterdir()))
    (_, rows), = tables(printed.out)
    assert list(rows) == ['plain', 'rs_r-0.1'] and rows['plain']['n'] == '1' and rows['plain']['en'] == '50.0'
    passed = [f'{tmp_path}/{name}: no finished run of train.py; passed over' for name in ('b', 'c', 'd.txt')]
    left_out = f'{tmp_path}/f.jsonl:1: the same run as {tmp_path}/a, with other results; left out'
    assert printed.err.splitlines() == [*passed, left_out]
    assert len(evaluate.read_records([f'{tmp_path}/a/', f'{tmp_path}/a'])) == 1     # measured once
    with pytest.raises(data.InputError, match='d.txt .*/b: no finished run of train.py$'):
        call('evaluate', tmp_path / 'd.txt', tmp_path / 'b')


def test_the_interval_by_hand():
    """Three seeds, four items, two languages; over items, over seeds, and of the average over languages."""
    plain = [record('plain', None, seed, {'en': a, 'x1': b}) for seed, a, b in (
        (1, '0000', '0001'), (2, '0010', '0000'), (3, '0000', '0000'), (9, '1111', '1111'))]
    ours = [record('rs_r', 0.1, seed, {'en': a, 'x1': b}) for seed, a, b in (
        (2, '1110', '1000'), (1, '1000', '1001'), (3, '0001', '1000'), (7, '0000', '0000'))]
    points, half = evaluate.gain(ours, plain, ['en', 'x1'])
    # Of each item, mean over the seeds 1, 2, 3; then of each seed.
    en, x1, both = [2 / 3, 1 / 3, 0, 1 / 3], [1, 0, 0, 0], [5 / 6, 1 / 6, 0, 1 / 6]
    assert points.tolist() == pytest.approx([100 * statistics.mean(gains) for gains in (en, x1, both)])
    seeds = [statistics.stdev(gains) for gains in ([25, 50, 25], [25, 25, 25], [25, 37.5, 25])]
    for found, gains, spread in zip(half, (en, x1, both), seeds):
        items = 100 * statistics.stdev(gains) / math.sqrt(4)
        assert found.item() == pytest.approx(math.hypot(1.96 * items, 4.303 * spread / math.sqrt(3)))
    del ours[0]['test_marks']['x1']                                     # a language that one run lacks
    points, half = evaluate.gain(ours, plain, ['en', 'x1'])
    assert points.isnan().tolist() == half.isnan().tolist() == [False, True, False]
    plain, ours = ([record(method, 0.1, seed, '1') for seed in (1, 2)] for method in ('plain', 'rs_r'))
    assert evaluate.gain(ours, plain, LANGS)[1].isnan().all()           # a single item has no spread


def test_the_three_rows_of_a_premise_are_one_item():
    """Each row three times: XNLI's interval is that of the distinct ones. A last premise may be short."""
    single, triple = [], []
    for method, seed, row in (('plain', 1, '1001100101'), ('plain', 2, '0001100101'),
                              ('rs_r', 1, '1011101101'), ('rs_r', 2, '1011101100')):
        single.append(record(method, 0.1, seed, {'en': row}))
        triple.append(record(method, 0.1, seed, {'en': re.sub('(.)', r'\1\1\1', row)}, task='xnli'))
    (points, half), expected = (evaluate.gain(runs[2:], runs[:2], ['en']) for runs in (triple, single))
    assert points.tolist() == expected[0].tolist() and half.tolist() == pytest.approx(expected[1].tolist())
    pair = record('rs_r', 0.1, 1, {'en': '1101111'}), record('plain', 0.1, 1, {'en': '1000101'})
    shares = [1 - 9 / 7, 2 - 9 / 7, 0 - 3 / 7]          # of the gains 010 101 0, the mean of 3 / 7 taken off
    error = 100 / 7 * math.sqrt(3 / 2 * sum(share ** 2 for share in shares))
    assert evaluate.item_errors([pair], ['en'], 3)[0] == pytest.approx(error)


def test_the_quantiles_are_students():
    """P(|t| < q) = 0.95 by numerical integration of the density."""
    for freedom, quantile in enumerate(evaluate.T975, 1):
        x = torch.linspace(0, quantile, 20001, dtype=torch.double)
        density = torch.distributions.StudentT(torch.tensor(freedom, dtype=torch.double)).log_prob(x).exp()
        assert torch.trapezoid(density, x).item() == pytest.approx(0.475, abs=3e-5), freedom
    assert freedom == 30


# ---------------------------------------------------------------- evaluate.py: beyond the table

def test_generalized_pairs_two_languages_and_leaves_out_rows_that_mean_nothing(tmp_path, monkeypatch):
    seen, files = {}, {'en': [('a', 'b', '1'), ('c', 'd', '0'), ('e', 'f', '0')],
                       'de': [('A', 'B', '1'), ('C', 'D', '1'), ('E', 'NS', '0')],
                       'ja': [('x', 'y'), ('z', 'w'), ('NS', 'v')], 'ko': [('x', 'y', '0'), ('NS', 'v', '0')]}
    (tmp_path / 'pawsx').mkdir()
    for lang, pairs in files.items():
        data.write_pairs(data.path_of(tmp_path, 'pawsx', 'test', lang), pairs)

    def predict(model, tokenizer, pairs, desc):
        seen[desc] = pairs
        return torch.tensor([pair.premise.islower() for pair in pairs]), 0

    def scored(*langs, **options):
        found = evaluate.generalized(None, None, 'pawsx', tmp_path, langs, **options)
        return {(first, second): scored['marks'] for first, second, scored in found}
    monkeypatch.setattr(evaluate, 'predict', predict)
    assert scored('en', 'de', 'ja') == {('en', 'en'): '100', ('en', 'de'): '1', ('de', 'en'): '0',
                                        ('de', 'de'): '00', ('ja', 'ja'): None}
    assert seen['en-de'] == [('a', 'B', 1)] and seen['de-en'] == [('A', 'b', 1)] and len(seen['ja-ja']) == 2
    with pytest.raises(data.InputError, match="pawsx: test files of {'en': 3, 'ko': 2} rows"):
        scored('en', 'ko')
    assert ('en', 'ko') not in scored('en', 'ko', max_eval=2)       # no row is left


@pytest.fixture(scope='session')
def finished(small, tmp_path_factory):
    """finished(name, method, eps): an untrained classifier's run folder in the small world, with a record."""
    folder = tmp_path_factory.mktemp('finished')
    torch.manual_seed(3)
    model, tokenizer = evaluate.load_encoder(str(small / 'sample/model'), 'sample')
    model.classifier.weight.data.mul_(50)
    found = evaluate.score(model, tokenizer, 'sample', small, LANGS)
    marks = {lang: scored['marks'] for lang, scored in found}

    def finished(name, method='rs_r', eps=0.1, seed=1, dtype='float32', **args):
        path = folder / name
        if not path.exists():
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
            line = record(method, eps, seed, marks, dtype=dtype)
            line['args'] |= {'data': str(small)} | args
            (path / 'results.json').write_text(json.dumps(line) + '\n')
        return path
    return finished


REGIONS = {f'{kind} {eps}': {'eps': eps, **steps} for eps in (0, 0.01, 0.03, 0.1, 0.3, 1)
           for kind, steps in (('noise', {}), ('attack', {'steps': 10}))}


@pytest.mark.parametrize('flags, rows', [       # the rows that are printed: what is asked of predict for each
    ('', {'test': {}}), ('--max-eval 5', {'test': {}}), ('--generalized', {'en': {}}),
    ('--smooth 3', {'g 0.1': {'eps': 0.1, 'passes': 3}}), ('--regions', REGIONS),
    ('--smooth 1 --eps 7 0', {'g 7': {'eps': 7, 'passes': 1}, 'g 0': {'eps': 0, 'passes': 1}}),
    ('--regions --eps 2', {'noise 2': {'eps': 2}, 'attack 2': {'eps': 2, 'steps': 10}})])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_run_is_measured_as_it_was_trained_under_the_noise_that_is_asked_for(
        dtype, flags, rows, finished, small, call, monkeypatch):
    """It is not changed, and above every figure stands what it is of."""
    asked = []

    def predict(model, tokenizer, pairs, *, desc, **options):
        asked.append((len(pairs), options))
        return torch.zeros(len(pairs), dtype=torch.long), 0
    monkeypatch.setattr(evaluate, 'predict', predict)
    monkeypatch.setattr(evaluate, 'choose_device', lambda float32: (torch.device('cpu'), f'dtype {float32}'))
    monkeypatch.setattr(evaluate, 'longest', lambda model, tokenizer, most: most - 1)
    folder = finished(f'run-{dtype}', dtype=dtype, max_length=100, max_eval=20, batch=7, layer=2)
    before = contents(folder) | contents(small)
    printed = call(f'evaluate {folder} --langs en {flags}').out
    usual = {'dtype': f'dtype {dtype == "float32"}', 'max_length': 99, 'batch': 7, 'layer': 2}
    assert asked == [(5 if '--max-eval' in flags else 20, usual | noise) for noise in rows.values()]
    assert printed.startswith(f'{folder}, sample, accuracy in percent; {folder} --langs en {flags}'.strip())
    (_, found), = tables(printed)
    assert list(found) == list(rows) and contents(folder) | contents(small) == before


@pytest.mark.parametrize('labelled', [True, False])
def test_a_language_that_comes_later_gets_its_predictions(labelled, finished, small, tmp_path, call):
    """In XTREME's form; the model's labels are right where its marks are 1. Else the run's languages have."""
    folder = finished('rs_r')
    held = record_of(folder)['test_marks']['x3']
    shutil.copytree(small, tmp_path / 'D')
    rows = data.read_pairs(small / 'sample/test-x3.tsv', 'sample')
    labels = data.TASKS['sample'].labels
    data.write_pairs(tmp_path / 'D/sample/test-yo.tsv',
                     [(a, b, labels[label])[:3 if labelled else 2] for a, b, label in rows])
    call(f'evaluate {folder} --predictions', tmp_path / 'P')
    assert len(contents(tmp_path / 'P/sample')) == 7
    printed = call(f'evaluate {folder} --langs yo x3 --data {tmp_path}/D --predictions', tmp_path / 'Q').out
    score, (_, found) = f'{evaluate.accuracy(held):.1f}', *tables(printed)
    assert found['test'] == {'yo': score if labelled else '', 'x3': score, 'avg.': score}
    expected = [labels[row.label if mark == '1' else 1 - row.label] for row, mark in zip(rows, held)]
    text = '\n'.join([*expected, '']).encode()
    assert contents(tmp_path / 'Q') == {tmp_path / f'Q/sample/test-{lang}.tsv': text for lang in ('yo', 'x3')}


def test_noise_is_fresh_for_each_pass_and_an_attack_is_worse_and_in_float32(finished, small, monkeypatch):
    model, tokenizer = evaluate.load(str(finished('rs_r')))
    pairs = data.read_pairs(small / 'sample/test-en.tsv', 'sample')

    def right(**options):
        return evaluate.marks(evaluate.predict(model, tokenizer, pairs, **options)[0], pairs).count('1')
    assert right() == right(eps=0, passes=3) == right(eps=0, steps=2) > right(eps=0.3, steps=10) + 1
    assert right(eps=0.3, steps=10) < right(eps=0.3) and right(eps=30, passes=3) != right()
    seen, perturbed = [], robust.perturbed

    def spied(model, delta, layer):
        seen.append((layer, delta.sum().item()))
        return perturbed(model, delta, layer)
    monkeypatch.setattr(robust, 'perturbed', spied)
    model.register_forward_hook(with_kwargs=True, hook=lambda model, args, inputs, output: seen.append(
        (output.logits.dtype, 'labels' in inputs)))
    right(eps=0.1, steps=1, layer=2, passes=2, dtype=torch.bfloat16)
    assert seen[1::4] == [(torch.float32, True)] * 2 and seen[3::4] == [(torch.bfloat16, False)] * 2
    batch, draws = train.collate(pairs, tokenizer, 128), torch.Generator().manual_seed(42)
    first, second = (robust.uniform_delta(model, batch, 0.1, 2, draws).sum().item() for _ in range(2))
    assert {layer for layer, _ in seen[::2]} == {2} and (seen[0][1], seen[4][1]) == (first, second)


def test_the_picture_of_the_regions_has_a_curve_a_variant_under_attack(finished, tmp_path, call, monkeypatch):
    """The mean over languages and seeds of what is printed."""
    pytest.importorskip('matplotlib', reason='the picture alone needs matplotlib')
    saved, save = [], evaluate.save_picture
    monkeypatch.setattr(evaluate, 'save_picture', lambda *words: saved.append(words[0]) or save(*words))
    runs = [finished('plain', 'plain', None), finished('rs_r'), finished('rs_r-2', seed=2, max_eval=10)]
    printed = call(f'evaluate --regions --langs en x1 x6 -o {tmp_path}/p.svg --eps 0 0.3 --', *runs).out
    first, *others = [[float(rows[f'attack {radius}']['avg.']) for radius in ('0', '0.3')]
                      for _, rows in tables(printed)]
    mean = [(a + b) / 2 for a, b in zip(*others)]
    expected = {'chance (50%)': [50, 50], 'plain': first, 'rs_r-0.1': mean}
    axes, = saved[0].axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert list(drawn) == list(expected) and others[0] != others[1]
    for name, curve in expected.items():
        assert drawn[name] == pytest.approx(curve, abs=0.051)
    assert list(axes.get_lines()[1].get_xdata()) == ['0', '0.3'] and 'L-inf' in axes.get_xlabel()
    assert 'sample' in axes.get_title() and 'PGD of 10 steps' in axes.get_title()
    assert '<svg' in (tmp_path / 'p.svg').read_text() and 'attack (%)' in axes.get_ylabel()


def test_what_was_measured_is_printed_where_a_later_language_fails(finished, capsys, monkeypatch):
    seen, predict = [], evaluate.predict
    monkeypatch.setattr(evaluate, 'predict', lambda *args, **options: (
        raised(KeyboardInterrupt()) if seen else seen.append(1) or predict(*args, **options)))
    with pytest.raises(KeyboardInterrupt):
        evaluate.main([str(finished('rs_r')), '--langs', 'x1', 'x2'])
    (_, rows), = tables(capsys.readouterr().out)
    score = f'{evaluate.accuracy(record_of(finished("rs_r"))["test_marks"]["x1"]):.1f}'
    assert rows == {'test': {'x1': score, 'x2': '', 'avg.': score}}


# ---------------------------------------------------------------- results/speed.py

@pytest.fixture
def speed(monkeypatch):
    """results/speed.py as a module."""
    monkeypatch.syspath_prepend(HERE / 'results')
    return importlib.import_module('speed')


def test_the_work_of_a_step_by_hand(world, speed):
    """Of a BERT of 2 layers of 64, on batches that all have T tokens; whatever the run's own method is."""
    model, tokenizer = evaluate.load_encoder(str(world / 'sample/model'), 'sample')
    pairs = data.read_pairs(world / 'sample/train-en.tsv', 'sample')[:20]
    tokens, = {len(tokenizer(pair.premise, pair.hypothesis)['input_ids']) for pair in pairs}
    wide = model.config.hidden_size
    # Q, K, V, output, the feed-forward two of 4; scores, mean.
    layer = 2 * tokens * 12 * wide ** 2 + 2 * 2 * tokens ** 2 * wide
    size = sum(weight.numel() for weight in model.parameters())
    work = 2 * layer + 2 * wide ** 2 + 2 * wide * 2
    run, = train.runs_of(train.parse_args('--task sample --method rs_a --batch 8 --max-steps 1'.split()))
    assert speed.work_of(model, tokenizer, pairs, run) == (work, 32 * size)
    words = model.get_input_embeddings().weight.requires_grad_(False)
    assert speed.work_of(model, tokenizer, pairs, run)[1] == 32 * (size - words.numel())


def test_each_method_is_set_beside_its_baselines(small, speed, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speed, 'rates_of', lambda device, dtype: (1e9, 2e9))
    monkeypatch.setattr(speed, 'ROUNDS', 1)
    trained, train_loop = [], train.train
    monkeypatch.setattr(train, 'train', lambda *words: trained.append(words) or train_loop(*words))
    speed.main(['--task', 'sample', '--data', str(small), '--method', 'plain', 'rs_a'])
    floor, *rows = capsys.readouterr().out.splitlines()
    work, moved = map(float, re.fullmatch(
        r'floor: 3 x (\S+) GFLOP a pair at 1 GFLOP/s, (\S+) GB a step at 2 GB/s', floor).groups())
    table = {row[:20].strip(): row[20:] for row in rows}
    rate = {name: float(row.split()[0]) for name, row in table.items()}
    plain, times, floors = rate['training, plain'], r'pairs/s, +(\S+) times XTREME', r'of the floor \((\d+)\)'
    for name, pattern, expected in (
            ('evaluation', times, rate['evaluation'] / rate['evaluation, XTREME']),
            ('training, rs_a', times, rate['training, rs_a'] / rate['training, XTREME']),
            ('training, rs_a', r'(\S+) times the step of plain', plain / rate['training, rs_a']),
            ('training, plain', floors, 1 / (3 * work + moved / 64 / 2)), ('evaluation', floors, 1 / work)):
        assert float(re.search(pattern, table[name])[1]) == pytest.approx(expected, rel=0.02)
    assert not list(tmp_path.iterdir())
    for (*_, run, copies, _, title), method in zip(trained, ('plain', 'rs_a'), strict=True):
        assert run.method == title == method and run.max_steps == 16 and not Path(run.out).exists()
        assert (copies is not None) == (method == 'rs_a')


# ---------------------------------------------------------------- the claim of the paper, in the sample world

@pytest.fixture(scope='session')
def trained(begun):
    """Runs on the sample world cut down to 1,000 of 2,500 steps -> their folders by name."""
    folders = {}
    for name, (process, folder) in begun.items():
        assert process.wait() == 0, (folder / 'log').read_text()
        folders[name] = folder / 'run'
    return folders


def test_the_claim_of_the_paper_in_the_sample_world(trained, call):
    """plain falls with a language's distance; rs_r and adv fall less, adv by a checkpoint of its own.

    At radius 0.01 those that were trained for it hold out under attack, plain does not.
    """
    targets, records = {}, {name: record_of(folder) for name, folder in trained.items()}
    near = [records['plain']['test'][lang] for lang in ('en', 'x1', 'x2', 'x3')]
    assert near[0] > 95 and near == sorted(near, reverse=True) and near[3] < 80
    for name, record in records.items():
        english, *others = record['test'].values()
        targets[name] = statistics.mean(others)
        assert english > 90 and len(others) == 6
    assert targets['rs_r'] > targets['plain'] + 5 and targets['adv'] > targets['plain'] + 2
    assert records['adv']['step'] == 1000
    printed = call('evaluate --regions --langs en x1 --eps 0 0.01 --max-eval 200', *trained.values()).out
    found = {name: rows for name, (_, rows) in zip(trained, tables(printed), strict=True)}
    for lang in ('en', 'x1'):
        attacked = {name: float(rows['attack 0.01'][lang]) for name, rows in found.items()}
        assert attacked['adv'] > attacked['plain'] + 10 and attacked['rs_r'] > attacked['plain'] + 10
        for name, record in records.items():
            clean = record['test_marks'][lang][:200].count('1') / 2
            assert float(found[name]['noise 0'][lang]) == float(found[name]['attack 0'][lang]) == clean
            assert clean > attacked[name]


# ---------------------------------------------------------------- what a user does wrong

TRAIN = 'train --task sample --data D --max-steps 1 --out new --method '
ASTRAY, UNWRITTEN = '--eps goes with --smooth or --regions, -o with', '--predictions does not go with'
BAD = [     # the command, what is broken before it (file, old, new), what its one line says
    (TRAIN + 'plain --model run', [('run/model.safetensors', None, b'half')], 'run: cannot be loaded'),
    (TRAIN + 'plain --model run', [], 'run: a classifier, whose head would be kept'),
    (TRAIN + 'plain', [('D/sample/train-en.tsv', None, b'a\tb\n')], 'has no labels; both need them'),
    (TRAIN + 'plain', [('D/sample/dev-en.tsv', None, b'a\tb\n')], 'has no labels; both need them'),
    (TRAIN + 'plain', [('D/sample/test-x3.tsv', b'\t', b' ')], 'test-x3.tsv:[12]: [23] columns'),
    (TRAIN + 'plain', [('D/sample/test-x6.tsv', None, None)], 'test-x6.tsv: no such file'),
    (TRAIN.replace('new', 'run/config.json') + 'plain', [], 'config.json: .*(Not a directory|File exists)'),
    ('evaluate nowhere D', [], '^nowhere D: no finished run of train.py'),
    ('evaluate run', [('run/results.json', None, b'[]')], '^run: .*; expected a record of this train.py'),
    ('evaluate run', [('run/results.json', b'"test_marks"', b'"mark"')], "^run: KeyError.'test_marks'"),
    ('evaluate run', [('run/results.json', b'"method": "rs_r"', b'"method": "fgsm"')], "KeyError.'fgsm'"),
    ('evaluate lines.jsonl', [('lines.jsonl', None, b'{"args": {}}\n')], '^lines.jsonl:1: .*; expected a'),
    ('evaluate plain run --langs en', [('run/config.json', None, b'{')], 'run: cannot be loaded'),
    ('evaluate run other --regions -o p.png', [('other/results.json', b'"lr": 2', b'"lr": 9')],
     'other does not belong with run: lr 9, not 2')]
BAD += [(f'evaluate {words}', [], message) for words, message in (
    ('run --langs en de', 'test-de.tsv'), ('run --data nowhere', 'nowhere'),
    ('lines.jsonl --max-eval 3', 'lines.jsonl:1: a result without its model; .* name run folders'),
    ('run plain --smooth 3', 'plain: plain has no eps of its own; say --eps'),
    ('run --regions -o p.txt', 'p.txt: not the name of a picture'),
    ('run --regions -o no/p.png', 'no/p.png: no such folder'),
    ('run plain --langs en --predictions P', '--predictions P: of 2 runs; name one'),
    ('run --eps 3', ASTRAY), ('run --generalized --eps 1', ASTRAY), ('run --smooth 3 -o p.png', ASTRAY),
    ('run -o p.png', ASTRAY), ('run --max-eval 0', 'expected 1'), ('', 'required'),
    ('run --generalized --predictions P', UNWRITTEN), ('run --regions --predictions P', UNWRITTEN),
    ('run --smooth 3 --regions', 'not allowed with'), ('run --generalized --smooth 2', 'not allowed with'),
    ('run --regions --eps 1 nan', 'nan: expected 0'), ('run --batch 3', 'unrecognized arguments: --batch'))]


@pytest.mark.parametrize('command, broken, message', BAD, ids=range(len(BAD)))
def test_bad_input_gives_one_line_and_leaves_nothing(command, broken, message, small, finished, tmp_path,
                                                     monkeypatch, call):
    """Before anything is measured; a notebook gets an InputError, for argparse's errors too."""
    shutil.copytree(small, tmp_path / 'D')
    for name, source in (('run', finished('rs_r')), ('other', finished('rs_r')),
                         ('plain', finished('plain', 'plain', None))):
        shutil.copytree(source, tmp_path / name)
    shutil.copy(tmp_path / 'run/results.json', tmp_path / 'lines.jsonl')
    for path, old, new in broken:
        (tmp_path / path).unlink() if new is None else change(tmp_path / path, old, new)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, 'predict', None)
    before = contents(tmp_path)
    with pytest.raises((data.InputError, OSError)) as error:
        call(command)
    line = str(error.value)
    if isinstance(error.value, OSError):        # run_script makes its line of it
        line = f'{error.value.filename}: {error.value.strerror}'
    assert '\n' not in line and re.search(message, line), line
    assert contents(tmp_path) == before


# ---------------------------------------------------------------- distance.py

def test_one_iteration_of_the_aligner_by_hand(monkeypatch):
    """Columns: null, a (, b); with two words |i/m - j/n| is 0 or 1/2, lambda 4."""
    (one, two), source = distance.entries_of([(['a'], ['x']), (['a', 'b'], ['x', 'y'])])
    near, far = 0.92 / (1 + math.exp(-2)), 0.92 / (1 + math.exp(2))
    theta = torch.full((6,), 0.25, dtype=torch.double)
    assert distance.posterior(one, theta, 4.0).tolist() == [pytest.approx([0.08, 0.92])]
    second = distance.posterior(two, theta, 4.0)
    assert second.flatten().tolist() == pytest.approx([0.08, near, far, 0.08, far, near])
    # x and y with null, a, b
    counts = torch.tensor([0.16, 0.92 + near, far, 0.08, far, near], dtype=torch.double)
    totals = torch.tensor([0.24, 1.84, 0.92] * 2, dtype=torch.double)
    bayes = (counts + 0.01).digamma().exp() / (totals + 0.02).digamma().exp()
    monkeypatch.setattr(distance, 'ITERATIONS', 2)      # of which the last only decodes
    theta, tension = distance.fit([one, two], source)
    assert theta.tolist() == pytest.approx(bayes.tolist()) and tension == 4
    # The pull of the prior less that of an even posterior, over three words; the first has no choice.
    sums = {(1, 2): torch.tensor([[0.08, 0.92]]), (2, 3): torch.tensor([[0.08, 0.46, 0.46]] * 2)}
    assert distance.tension_slope(sums, 4.0) == pytest.approx((far - 0.46) / 3)
    # Z for i = 2 of m = 3 and n = 7
    weights = [math.exp(-14 * abs(2 / 3 - j / 7)) for j in range(1, 8)]
    assert distance.prior(3, 7, 14.0)[1].tolist() == pytest.approx(
        [0.08, *(0.92 * weight / sum(weights) for weight in weights)])


def random_corpus(sentences, shuffled=True):
    """Sentences of distinct words and their translations, in any order or in the same one; the true links."""
    rng, pairs, truth = random.Random(0), [], []
    for _ in range(sentences):
        source = rng.sample(range(30), rng.randint(2, 7))
        order = rng.sample(range(len(source)), len(source)) if shuffled else range(len(source))
        pairs.append(([f'e{word}' for word in source], [f'f{source[j]}' for j in order]))
        truth.append({(j, i) for i, j in enumerate(order)})
    return pairs, truth


def test_four_m_steps_and_three_tension_updates(monkeypatch):
    """As fast_align's five iterations, whose last only decodes; the tension follows the corpus."""
    calls = []
    for name in ('maximise', 'tension_slope'):
        monkeypatch.setattr(distance, name, lambda *args, name=name, function=getattr(distance, name): (
            calls.append(name) or function(*args)))
    straight, shuffled = random_corpus(100, shuffled=False)[0], random_corpus(100)[0]
    assert distance.fit(*distance.entries_of(straight))[1] > 8
    assert calls.count('maximise') == 4 and calls.count('tension_slope') == 24
    assert distance.fit(*distance.entries_of(shuffled))[1] < 2
    assert distance.fit(*distance.entries_of([(f, e[::-1]) for f, e in straight]))[1] == 0.1     # the bound


def test_a_known_dictionary_is_found_and_words_without_a_counterpart_go_to_the_null_word():
    """Z, which no word explains, mostly has no link; never one that both directions find."""
    pairs, truth = random_corpus(300)
    pairs = [(source, [*target, 'Z']) for source, target in pairs]
    links = distance.best_links(pairs)
    assert all(true <= line and all(j >= 0 for j, _ in line) for true, line in zip(truth, links))
    assert 150 < sum(line == true for true, line in zip(truth, links)) < 300
    assert distance.align(pairs) == list(map(sorted, truth))


def test_empty_sides_and_long_sentences_do_no_harm():
    links = distance.align([([], ['x']), (['a'], []), ([], []), (['.'] * 200, ['.'] * 200), (['a'], ['x'])])
    assert links[:3] == [[], [], []] and (0, 0) in links[4]
    assert distance.align([([], [])]) == distance.align([([], ['x'])]) == [[]] and distance.align([]) == []


@real
@pytest.mark.parametrize('name, aer', [('roen', 0.498), ('zhen', 0.497), ('jaen', 0.728)])
def test_alignment_error_rate_is_that_of_fast_align(name, aer):
    """AER (Och and Ney 2003) on gold; fast_align's: same text, -d -o -v both ways, intersection."""
    lines = data.read_lines(SHARED / f'data/alignment/{name}.src-tgt', 'sentences')
    links = distance.align([[re.findall('[^ ]+', side) for side in line.split('|||')] for line in lines])
    hits = size = 0
    for found, line in zip(links, open(SHARED / f'data/alignment/{name}.gold'), strict=True):
        gold = {(int(j) - 1, int(i) - 1): mark for j, mark, i in re.findall('([0-9]+)([-p])([0-9]+)', line)}
        sure = {link for link, mark in gold.items() if mark == '-'}
        hits += len(sure & set(found)) + len(gold.keys() & set(found))
        size += len(found) + len(sure)
    assert 1 - hits / size == pytest.approx(aer, abs=0.0015)


def fast(*vocabulary):
    """A tokenizer like XLM-R's of these pieces; <s> alone is special."""
    pieces = [('<unk>', -9.0), ('<s>', 0.0), *((piece, -1.0) for piece in vocabulary)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = tokenizers.normalizers.Replace('\u200b', ' ')     # as XLM-R's
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single='<s> $A <s>', special_tokens=[('<s>', 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token='<s>')


def byte_level():
    """A tokenizer like GPT-2's: an ö is one token, a Chinese character three."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)} | {'Ã¶': 256}
    level = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [('Ã', '¶')]))
    level.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=level)


CATS, BYTES = fast('▁', '▁cat', 's', 'S', ',', '▁Dog', '▁Ca', 't'), byte_level()
LETTERS = fast('▁', *'abcdefghijklmnopqrstuvwxyz', *('▁' + letter for letter in 'efghijkl'))     # 37 in all


@pytest.mark.parametrize('tokenizer, sentence, whole, words, last', [
    (CATS, 'cats, Dog', True, ['cats', ',', 'dog'], [2, 3, 4]),     # <s> stands at 0; the last of ▁cat s
    (CATS, ', ,', True, [',', ','], [2, 4]),                        # not the lone blank before each
    (CATS, 's\u200bs', True, ['s', 's'], [2, 4]),                   # nor one that lies on a character
    (CATS, 'CatS,s', True, ['cats', ',', 's'], [3, 4, 5]),          # punctuation ends a word
    (CATS, 'cats Dog', False, ['cat', 's', 'dog'], [1, 2, 3]),
    (BYTES, 'wie schön', True, ['wie', 'schön'], [2, 8]),
    (BYTES, '語ab““', False, ['語', 'a', 'b', '“', '“'], [2, 3, 4, 7, 10]),       # no word of bytes alone
    (BYTES, '語ab““', True, ['語ab', '“', '“'], [4, 7, 10])])
def test_a_word_is_what_the_tokenizer_takes_as_one(tokenizer, sentence, whole, words, last):
    assert distance.words_in(sentence, tokenizer([sentence]).encodings[0], whole) == (words, last)


@pytest.mark.parametrize('padding_side', ['right', 'left'])
@pytest.mark.parametrize('layer', [0, 1, -1])
def test_the_vectors_of_words_against_one_sentence_at_a_time(layer, padding_side, model, monkeypatch):
    """Batches of unlike lengths, whatever side the tokenizer pads on; the last one is cut."""
    monkeypatch.setattr(distance, 'BATCH', 4)
    LETTERS.padding_side, model = padding_side, model.eval()
    sentences = ['ea gb, h', 'e', 'fabc hxyz i jk', '', 'gg h', 'k l e f', 'e ' * 30]
    found = distance.embed(model, LETTERS, sentences, 'de', layer)
    longest = evaluate.longest(model, LETTERS, 512)
    assert len(found[-1].words) == longest - 2 < 20
    for sentence, one in zip(sentences, found, strict=True):
        inputs = LETTERS(sentence, return_tensors='pt', truncation=True, max_length=longest)
        words, last = distance.words_in(sentence, inputs.encodings[0], True)
        with torch.no_grad():
            _, *above = model.base_model(**inputs, output_hidden_states=True).hidden_states
            states = [model.get_input_embeddings()(inputs['input_ids']), *above][layer][0]
        assert one.words == words and one.tokens.tolist() == inputs['input_ids'][0, last].tolist()
        assert one.vectors.dtype == torch.float32 and torch.allclose(one.vectors, states[last], atol=1e-5)
    assert distance.embed(model, LETTERS, sentences[:1], 'zh', 0)[0].words == list('eagb,h')


def test_a_tokenizer_that_does_not_split_at_blanks_is_refused(bert):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({'a b': 0}, unk_token='a b'))
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token='a b', name_or_path='W')
    with pytest.raises(data.InputError, match="^W: its tokenizer takes 'a b' as one word; expected one that"):
        distance.embed(bert.eval(), whole, ['a b'], 'de', 0)


def test_aligned_words_are_compared(monkeypatch):
    """Links in both orders, a sentence without any; the same token on both sides is identical."""
    def sentence(words, tokens, *vectors):
        return distance.Sentence(words.split(), torch.tensor(tokens), torch.tensor(vectors))
    theirs = [sentence('a b', [1, 2], [0.0, 0.0], [3.0, 4.0]), sentence('c', [3], [9.0, 9.0]),
              sentence('d', [4], [0.3, 0.5])]
    english = [sentence('x y', [2, 5], [3.0, 4.5], [0.06, 0.08]), sentence('z', [6], [1.0, 1.0]),
               sentence('v w', [7, 4], [7.0, 7.0], [0.3, 0.5])]
    links, seen = [[(0, 1), (1, 0)], [], [(0, 1)]], []
    monkeypatch.setattr(distance, 'align', lambda pairs: seen.extend(pairs) or links)
    found = distance.compare('de', theirs, english)
    assert seen[0] == (['a', 'b'], ['x', 'y']) and found['words'] == found['sentences'] == 3
    assert found['distance'] == pytest.approx(0.6 / 3) and found['identical'] == pytest.approx(2 / 3)
    # Sums of the two sentences about their mean: 0.6 - 2 x 0.2 and 0 - 0.2
    assert found['standard error'] == pytest.approx(math.sqrt(2 * (0.2 ** 2 + 0.2 ** 2)) / 3)
    assert found['largest'] == pytest.approx(0.08)
    # Of the one pair whose tokens are not identical.
    assert [found[f'eps {eps}'] for eps in ('0.001', '0.01', '0.1', '1')] == [0, 0, 1, 1]
    assert found['deviation'] == pytest.approx(
        statistics.pstdev([0, 0, 3, 4, 0.3, 0.5, 0.06, 0.08, 3, 4.5, 0.3, 0.5]))


def test_error_is_of_the_mean_over_sentences_and_random_words_are_any_english_ones():
    values = torch.randn(400, 1, generator=torch.Generator().manual_seed(0)) + 5
    for times in (1, 3):        # every word three times: the same sentences, and no more certain
        sentences = list(values.repeat_interleave(times, 0).split(times))
        no = torch.zeros(400 * times, dtype=torch.bool)
        found = distance.figures(sentences, [torch.zeros(times, 1)] * 400, no)
        assert found['standard error'] == pytest.approx(values.std().item() / 20)
        assert found['random'] == pytest.approx(values.mean().item())       # all of them stand at 0
    # Where aligned words are equal, a random one is as far as any two are: |x - y| has the mean 2 / sqrt(pi).
    equal = distance.figures(sentences, sentences, ~no)
    assert equal['distance'] == 0 == equal['largest'] and equal['random'] == pytest.approx(1.128, rel=0.1)
    assert equal['random'] == distance.figures(sentences, sentences, no)['random']
    assert equal['identical'] == 1 and math.isnan(equal['eps 0.1'])     # there are no others
    assert equal['random largest'] == pytest.approx(0.954, rel=0.1)


def test_parallel_sentences_count_once_and_placeholders_not_at_all(tmp_path):
    """From the row-aligned English file, or from XTREME's translate-test file."""
    rows = [('p', 'h1', 'P', 'H1'), ('p', 'h2', 'P', 'H2'), ('NS', 'h3', 'R', 'H3'), ('q', ' ', 'Q', 'H4'),
            ('r', '"h', 'S\u2028', 'NS')]
    (tmp_path / 'sample').mkdir()
    for name, columns in (('sample/test-x1.tsv', (0, 1)), ('sample/test-en.tsv', (2, 3)),
                          ('test-x1-en-translated.tsv', (0, 1, 2, 3, 0))):
        lines = ['\t'.join(row[column] for column in columns) for row in rows]
        (tmp_path / name).write_bytes('\r\n'.join(lines).encode('utf-8-sig'))
    for translations in (None, tmp_path):
        asked = types.SimpleNamespace(data=tmp_path, task='sample', translations=translations)
        assert distance.parallel(asked, 'x1') == [('p', 'P'), ('q', 'Q'), ('r', 'S\u2028'), ('h1', 'H1'),
                                                  ('h2', 'H2'), ('h3', 'H3')]


def test_the_sample_worlds_shifts_are_recovered(world, tmp_path, call):
    """Distances 0.05 k sqrt(64); what they are of stands in the file and above both tables."""
    printed = call('distance --task sample --layer 0 --max-sentences 300 --langs x6 en x1 --data', world,
                   '--out', tmp_path / 'new/er')
    written = json.loads((tmp_path / 'new/er/distances.json').read_text())
    assert list(written['languages']) == ['x6', 'x1'] and written['args']['max_sentences'] == 300
    far, near = written['languages'].values()
    assert [far['distance'], near['distance']] == pytest.approx([2.4, 0.4], rel=0.02)
    assert near['random'] > near['distance'] and near['words'] > 850 and near['sentences'] == 300
    assert 0 < near['eps 0.1'] < 0.2 and 0.5 < far['eps 1'] < 1 and near['identical'] == 0
    for row, one, two in zip((far, near), *(rows.values() for _, rows in tables(printed.out)), strict=True):
        assert one['distance'] == f'{row["distance"]:.3f}' and two['eps 1'] == f'{row["eps 1"]:.1%}'
    caption = f': sample, layer 0 of {world}/sample/model; English: test-en.tsv; sentence pairs: 300\n'
    assert printed.out.count(caption) == 2


@pytest.fixture
def measure(small, tmp_path, call, monkeypatch):
    """measure(flags): distance.py on a copy of the small world, D in a folder of one's own."""
    shutil.copytree(small, tmp_path / 'D')
    monkeypatch.chdir(tmp_path)
    return lambda flags: call('distance --task sample --data D ' + flags)


def test_the_command_line_reaches_the_encoder(measure, monkeypatch):
    """Nothing is written unless --out says where; --translations need no English file."""
    seen, before, embed = [], contents('.'), distance.embed
    monkeypatch.setattr(distance, 'embed', lambda *args: seen.append(args) or embed(*args))
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'avx512_bf16': True}, raising=False)
    said = measure('--langs x1 x2 --max-sentences 20 --layer 1').err
    assert contents('.') == before and re.search('device: .*; float32', said)
    assert [(lang, len(sentences), layer, model.training) for model, _, sentences, lang, layer in seen] == [
        (lang, 20, 1, False) for lang in ('x1', 'en', 'x2', 'en')]
    Path('D/sample/test-en.tsv').unlink()
    with pytest.raises(data.InputError, match='test-en.tsv: no such file, and nothing is fetched'):
        measure('')
    Path('test-x1-en-translated.tsv').write_text('p\th\tP\tH\tparaphrase')
    (above, rows), _ = tables(measure('--langs x1 --translations .').out)
    assert 'layer -1 of D/sample/model; English: .; sentence pairs: all' in above and list(rows) == ['x1']


def test_what_was_measured_stays_when_a_later_one_fails(measure, capsys):
    """Here as the sentences of x2 hold no words."""
    change('D/sample/test-x2.tsv', None, '\u200b\t\u200b\tparaphrase\n'.encode() * 30)
    with pytest.raises(data.InputError, match='^x2: no aligned words in 20 sentence pairs'):
        measure('--langs x1 x2 --max-sentences 20 --out new')
    assert [list(rows) for _, rows in tables(capsys.readouterr().out)] == [['x1'], ['x1']]
    assert list(json.loads(Path('new/distances.json').read_text())['languages']) == ['x1']
    for more, line in (('', '^x2: no aligned'), (' --layer 0', 'new/distances.json: measured otherwise')):
        with pytest.raises(data.InputError, match=line):        # the same may be measured again
            measure(f'--langs x1 x2 --max-sentences 20 --out new{more}')


@pytest.mark.parametrize('flags, broken, said', [       # broken before: file, old, new
    ('', [('D/sample/test-x6.tsv', b'\r\n', b'\r\n\t\tdifferent\r\n')], 'test-x6.tsv: 31 rows; expected 30'),
    ('--langs x1 yo', [('D/sample/test-yo.tsv', None, b'NS\t \tparaphrase\n' * 30)], 'yo.tsv: empty or NS'),
    ('--translations .', [('test-x1-en-translated.tsv', None, b'p\th\tP\tH\t0\np\th\tP\tH')],
     'test-x1-en-translated.tsv: expected five columns: premise, hypothesis, their English'),
    ('--layer 9', [], 'layer 9'), ('--model D/sample', [], '^D/sample: cannot be loaded'),
    ('--out D/sample/test-en.tsv/new', [], 'Not a directory.*D/sample/test-en.tsv'),
    ('--out .', [('distances.json', None, b'')], "^distances.json: measured otherwise"),
    ('--langs en', [], 'distances are from English'), ('-o f.png', [], '-o is the picture'),
    ('--runs D -o f.gif', [], 'expected FILE.png or FILE.svg'),
    ('--runs D', [], '^D: no finished run'), ('--max-sentences 0', [], 'expected 1')])
def test_what_can_be_tried_is_tried_before_anything_is_measured(flags, broken, said, measure, monkeypatch):
    """As a notebook calls it: one line comes out, nothing exits, and nothing is left behind."""
    monkeypatch.setattr(distance, 'embed', None)
    for path, old, new in broken:
        change(path, old, new)
    before = contents('.')
    with pytest.raises((data.InputError, OSError)) as error:        # run_script makes its line of an OSError
        measure(flags)
    line = str(error.value)
    assert '\n' not in line and re.search(said, line), line
    assert contents('.') == before


def test_rank_correlation_by_hand():
    """p is the share of 100,000 orders, and of the given one, that are as extreme."""
    nan = math.nan
    for x, y, rho, p in (
            ([1, 2, 3], [10, 20, 40], 1, 2 / 6), ([1, 2, 3, 4], [4, 3, 2, 1], -1, 2 / 24),
            ([1, 2, 3, 4], [1, 3, 2, 4], 1 - 6 * 2 / (4 * 15), 8 / 24),
            # Ties, also but for the last bit, share the mean of their ranks: 1.5, 1.5, 3, 4.
            ([1, 2, 3, 4], [0.1 + 0.2, 0.3, 0.5, 0.7], 4.5 / math.sqrt(4.5 * 5), 4 / 24),
            ([9, 1, 2, 3], [nan, 10, 20, 40], 1, 2 / 6),        # what has no gain has no rank
            ([1, 2, 3], [3, 3, 3], nan, nan), ([], [], nan, nan), ([1], [7], nan, nan)):
        found = distance.rank_correlation(x, y)
        assert found == (pytest.approx(rho, nan_ok=True), pytest.approx(p, abs=0.004, nan_ok=True))
    assert distance.rank_correlation(range(12), range(12)) == pytest.approx((1, 1 / 100_001))     # never 0


def run_of(method, seed, right, eps=None, dev=80.0, **setting):
    """A record: of 100 test items a language, so many are right; x4 has no labels."""
    marks = {lang: '1' * n + '0' * (100 - n) for lang, n in zip(('en', 'x1', 'x2', 'x3'), right)}
    return record(method, eps, seed, marks | {'x4': None}, dev, **setting)


def jsonl(folder, records):
    (folder / 'runs.jsonl').write_text('\n'.join(map(json.dumps, records)))
    return f'{folder}/runs.jsonl'


PLAIN = [run_of('plain', seed, [90, 70, 60, 50 + seed]) for seed in (1, 2)]
ROBUST = [run_of('rs_r', seed, [90, 71, 64, 56 + seed], eps=0.1) for seed in (1, 2)]
WORSE = [run_of('rs_r', seed, [90, 90, 60, 50], eps=1.0, dev=70.0) for seed in (1, 2)]
FLAT = [run_of('rs_a', seed, [91, 71, 61, 51 + seed]) for seed in (1, 2)]
STUCK = {'answers': {'en': [2, 98]}}
WANTED = 'runs.jsonl: expected runs of sample, of plain and of robust methods, each with a seed'


@pytest.mark.parametrize('records, seeds, points, names', [
    ([*ROBUST, *WORSE, *PLAIN], 2, [4, 6, 1], ['rs_r-0.1', 'rs_a']),        # the eps that English dev chooses
    ([*PLAIN, *WORSE], 2, [0, -1.5, 20], ['rs_r-1.0', 'rs_a']),             # the one eps that is named
    ([PLAIN[1], *ROBUST], 1, [4, 6, 1], ['rs_r-0.1', 'rs_a']),              # of seeds in common, no interval
    ([*PLAIN, ROBUST[0] | STUCK, ROBUST[1]], 2, [4, 6, 1], ['rs_r-0.1 †', 'rs_a']),
    ([PLAIN[0], PLAIN[1] | STUCK, *ROBUST], 2, [4, 6, 1], ['rs_r-0.1 †', 'rs_a †'])])
def test_gains_stand_in_the_order_of_the_distances(records, seeds, points, names, tmp_path):
    plain, others = distance.comparable([jsonl(tmp_path, [*records, *FLAT])], 'sample')
    far = {'x4': 0.5, 'x2': 1.0, 'x3': 2.0, 'x1': 3.0}
    rows, curves = distance.gains_of(plain, others, far)
    (label, (found, half)), _ = curves.items()
    assert found == pytest.approx([math.nan, *points], nan_ok=True)
    rho = '+0.50' if points[2] == 20 else '-0.50'
    assert label == f'{names[0]}, n = {seeds}, rank correlation = {rho}, p = 1'
    assert list(rows) == [*far, 'n', 'rank correlation', 'p'] and list(rows['n']) == names
    interval = f' ±{half[1]:.1f}' if seeds > 1 else ''
    assert rows['x2'][names[0]] == f'{points[0]:+.1f}{interval}' and rows['x4'] == {'distance': '0.500'}


@pytest.mark.parametrize('records, message', [
    ([*PLAIN, run_of('rs_r', 1, [90] * 4, 0.1, lr=9)], 'does not belong with'),
    ([run_of(method, 1, [90] * 4, task='pawsx') for method in ('plain', 'rs_a')], WANTED),
    (PLAIN, WANTED), (ROBUST + FLAT, WANTED), ([PLAIN[0], ROBUST[1]], WANTED)])
def test_runs_that_cannot_be_compared_are_refused(records, message, tmp_path):
    with pytest.raises(data.InputError, match=message):
        distance.comparable([jsonl(tmp_path, records)], 'sample')


def test_gains_are_printed_beside_the_distances_and_drawn(world, tmp_path, call, monkeypatch):
    """From near to far. Gains of 1, 4, 6 rise with the distance: 2 of 6 orders are as extreme."""
    pictures = []
    monkeypatch.setattr(evaluate, 'check_picture', pictures.append)
    monkeypatch.setattr(distance, 'figure_2', lambda *drawn: drawn)
    monkeypatch.setattr(evaluate, 'save_picture', lambda *saved: pictures.append(saved))
    command = f'distance --task sample --data {world} --layer 0 --max-sentences 50 --langs x3 x1 x2 x4 --runs'
    runs = jsonl(tmp_path, [*PLAIN, *ROBUST, *WORSE, *FLAT])
    *_, (above, rows) = tables(call(command, runs, '-o', tmp_path / 'f.png').out)
    assert rows['x3']['distance'][:3] == '1.2' and rows['x2']['rs_r-0.1'][:6] == '+4.0 ±'
    assert list(rows) == ['x1', 'x2', 'x3', 'x4', 'n', 'rank correlation', 'p']
    assert [list(rows[name].values()) for name in list(rows)[4:]] == [
        ['', '2', '2'], ['', '+1.00', '+nan'], ['', '0.33', 'nan']]
    path, ((caption, far, curves), saved) = pictures
    assert path == saved == f'{tmp_path}/f.png' and caption in above and 'layer 0' in caption
    assert list(far) == ['x1', 'x2', 'x3', 'x4'] and len(curves) == 2 and 'another encoder than' in above
    own = evaluate.fingerprint(*evaluate.load_encoder(f'{world}/sample/model', 'sample'))
    runs = [run_of(method, 1, [90] * 4, model=own) for method in ('plain', 'rs_a')]
    assert 'another encoder' not in call(command, jsonl(tmp_path, runs)).out and len(pictures) == 2


def test_figure_2_by_hand():
    pytest.importorskip('matplotlib', reason='the figure alone needs matplotlib')
    far, flat = {'x1': 0.4, 'x2': 0.8, 'x3': 1.2}, ([1, 1, 1], [math.nan] * 3)
    figure = distance.figure_2('layer 0', far, {'rs_r, n = 2': ([1, 4, 6], [0.5, 2, 3]), 'rs_a, n = 1': flat})
    axes, = figure.axes
    points, others = [container.lines[0] for container in axes.containers]
    assert list(points.get_ydata()) == [1, 4, 6] and list(others.get_ydata()) == [1, 1, 1]
    assert points.get_xdata() == pytest.approx(list(far.values()), abs=0.01)
    assert (points.get_xdata() < others.get_xdata()).all()          # side by side
    assert [y for _, y in axes.containers[0].lines[2][0].get_segments()[1]] == [2, 6]       # 4 ±2
    assert points.get_color() != others.get_color() and points.get_marker() != others.get_marker()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['rs_r, n = 2', 'rs_a, n = 1']
    codes = {text.get_text().strip(): text.get_position()[0] for text in axes.child_axes[0].get_xticklabels()}
    assert codes == pytest.approx(far) and axes.get_title() == 'layer 0'
    assert any(list(line.get_ydata()) == [0, 0] for line in axes.lines)         # the zero line
