"""Tests of what the code claims, against hand computation, closed forms and the library it rests on.

In the order of the rooms: robust, synonyms, data, train, evaluate, distance; then what a user does wrong.
"""

import argparse
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
import stat
import statistics
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
import types
import zipfile
from pathlib import Path

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


# Reads a list of jobs a line, and makes a process of each, all at once: the imports are paid for once.
FORKER = """
import json, os, sys, torch, transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers import BertForSequenceClassification, BertTokenizer, PreTrainedTokenizerFast, Trainer
torch.set_num_threads(1)
for line in sys.stdin:
    children = []
    for job in json.loads(line):
        children.append(os.fork())
        if children[-1] == 0:
            for number, name in enumerate((os.devnull, job['out'], job['err'])):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o644), number)
            os.environ.update(job['env'])
            sys.argv = job['argv']
            exec(job['code'], {'__name__': '__main__'})
            sys.exit()
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(ended), flush=True)
"""
TRAIN_PY = 'import data, train; data.run_script(train.main)'       # as `python train.py`


@pytest.fixture(scope='session')
def forker():
    process = subprocess.Popen([sys.executable, '-c', FORKER], env=ENVIRONMENT, cwd=HERE, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    yield process
    process.stdin.close()
    process.wait()


@pytest.fixture
def processes(forker, tmp_path):
    """processes((code, words, environment), ...): run at once -> [(exit status, stdout, stderr)]."""
    count = itertools.count()

    def processes(*jobs):
        asked, results = [], []
        for code, words, *env in jobs:
            files = {name: str(tmp_path / f'{name}{next(count)}') for name in ('out', 'err')}
            argv = ['train.py', *map(str, words)]
            asked.append({'code': code, 'argv': argv, 'env': env[0] if env else {}} | files)
        print(json.dumps(asked), file=forker.stdin, flush=True)
        for job, status in zip(asked, json.loads(forker.stdout.readline()), strict=True):
            results.append((status, Path(job['out']).read_text(), Path(job['err']).read_text()))
        return results
    return processes


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


def test_delta_stays_in_the_ball_and_off_the_padding(model, batch):
    for eps in (0.001, 0.1, 1.0):
        deltas = [robust.uniform_delta(model, batch, eps, generator=generator())]
        for layer in (0, 1):
            deltas.append(robust.worst_delta(model, batch, eps=eps, steps=3, layer=layer,
                                             generator=generator()))
        for delta in deltas:
            assert delta.dtype == torch.float32 and delta.shape == (2, 6, 16)
            assert 0.9 * eps < delta.abs().max() <= torch.tensor(eps)
            assert not delta[1, 4:].any() and delta[1, :4].all(-1).any()


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


def test_position_type_and_layernorm_are_applied_once(model, batch):
    """delta as a change of the embedding table gives the same logits as delta from the hook."""
    model.eval()
    delta = torch.zeros(2, 6, 16)
    delta[0, 2] = torch.linspace(-1, 1, 16)
    with robust.perturbed(model, delta):
        hooked = model(**batch).logits
    with torch.no_grad():
        model.get_input_embeddings().weight[6] += delta[0, 2]       # token 6 stands at [0, 2] alone
    assert torch.equal(hooked, model(**batch).logits)


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


def test_random_perturbation_is_uniform_and_fresh(model, batch):
    g = generator()
    first, second = (robust.uniform_delta(model, batch, 0.5, generator=g) for _ in range(2))
    assert not torch.equal(first, second)
    many = torch.cat([robust.uniform_delta(model, batch, 0.5, generator=g)[0].flatten() for _ in range(300)])
    assert abs(many.mean()) < 0.01 and many.std().item() == pytest.approx(0.5 / 3 ** 0.5, rel=0.01)


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


class TwoHeads(torch.nn.Module):
    """An encoder with two heads of its own: no classifier of transformers', and no loss."""

    def __init__(self, encoder):
        super().__init__()
        self.base_model, self.config = encoder, encoder.config
        self.one, self.other = torch.nn.Linear(16, 3), torch.nn.Linear(16, 2)

    def get_input_embeddings(self):
        return self.base_model.get_input_embeddings()

    def forward(self, **inputs):
        states = self.base_model(**inputs).last_hidden_state
        return self.one(states[:, 0]), self.other(states)


def inputs_of(batch):
    return {name: value for name, value in batch.items() if name != 'labels'}


def loss_of_tagger(model, batch):
    """By tokens that are no padding, in reverse: not what the model itself would say."""
    logits = model(**inputs_of(batch)).logits[batch['attention_mask'] == 1]
    return torch.nn.functional.cross_entropy(-logits, torch.arange(10) % 3)


def loss_of_two_heads(model, batch):
    one, other = model(**inputs_of(batch))
    tokens = torch.nn.functional.cross_entropy(other.flatten(0, 1), torch.arange(12) % 2)
    return torch.nn.functional.cross_entropy(one, batch['labels']) + 3 * tokens


@pytest.mark.parametrize('head, loss', [('tagger', loss_of_tagger), ('two heads', loss_of_two_heads)])
def test_another_head_has_its_own_loss_at_enc_x_plus_delta(head, loss, batch):
    """Enc(x) + delta given as `inputs_embeds`, without any hook; the sign steps by hand."""
    torch.manual_seed(0)
    config = BertConfig(**SIZE, **NO_DROPOUT, initializer_range=0.3)
    model = transformers.BertForTokenClassification(config)
    if head == 'two heads':
        model = TwoHeads(transformers.BertModel(config, add_pooling_layer=False))
    table = model.get_input_embeddings()

    def at(delta):
        embedded = table(batch['input_ids']) + delta
        given = {'inputs_embeds': embedded, **batch}
        del given['input_ids']
        return loss(model, given)

    mask = batch['attention_mask'].unsqueeze(-1)
    worst = start = robust.uniform_delta(model, batch, 0.1, generator=generator())
    for _ in range(2):
        worst = worst.detach().requires_grad_()
        gradient, = torch.autograd.grad(at(worst), worst)
        worst = (worst + 0.1 * 2.5 / 3 * gradient.sign()).clamp(-0.1, 0.1) * mask
    for delta, objective, options in ((worst, robust.adv, {'eps': 0.1, 'steps': 2}),
                                      (start, robust.rs_r, {'eps': 0.1}),
                                      (0 * start, robust.adv, {'eps': 0.0}),
                                      (0 * start, robust.rs_r, {'eps': 0.0, 'layer': 1})):
        expected = loss_and_gradients(lambda model, batch: at(delta.detach()), model, batch)
        found = loss_and_gradients(objective, model, batch, generator=generator(), loss=loss, **options)
        assert len(found) == len(expected)
        for a, b in zip(found, expected):
            assert torch.allclose(a, b, atol=1e-5), options
    itself = loss_and_gradients(loss, model, batch)
    assert all(torch.equal(a, b) for a, b in zip(itself, found))


def half(dtype):
    return lambda model, batch: robust.rs_r(model.to(dtype), batch, eps=0.1)


def without(name, objective):
    """The objective of a batch that lacks something."""
    def lacking(model, batch):
        return objective(model, {key: value for key, value in batch.items() if key != name})
    return lacking


def ended_early(model, batch):
    with robust.perturbed(model, robust.uniform_delta(model, batch, 0.1)):
        pass


def twice(model, batch):
    with robust.perturbed(model, robust.uniform_delta(model, batch, 0.1)):
        model(**batch)
        model(**batch)


def shorter(model, batch):
    with robust.perturbed(model, robust.uniform_delta(model, batch, 0.1)[:, 1:]):
        model(**batch)


@pytest.mark.parametrize('wrong, line', [
    (lambda model, batch: robust.rs_r(model, batch, eps=0.1, layer=99), 'layers 1 to 2'),
    (lambda model, batch: robust.adv(model, batch, eps=0.1, layer=-3), 'layers 1 to 2'),
    (without('labels', robust.plain), 'batch without labels: it holds input_ids, attention_mask'),
    (without('labels', lambda model, batch: robust.adv(model, batch, eps=0.1)), 'without labels'),
    (ended_early, 'its word embeddings were run 0 times in place of 1'),
    (twice, 'its word embeddings were run 2 times in place of 1'),
    (shorter, r'delta is \(2, 5, 16\), but the output .* is \(2, 6, 16\)'),
    (half(torch.bfloat16), r'is in torch.bfloat16, .*torch.float32 .*autocast'),
    (half(torch.float16), r'is in torch.float16, .*torch.float32 .*autocast'),
    (lambda model, batch: robust.rs_r(torch.nn.DataParallel(model), batch, eps=0.1),
     r'expected DistributedDataParallel, .*torchrun'),
    (lambda model, batch: robust.adv(torch.nn.DataParallel(model), batch, eps=0.1),
     r'expected DistributedDataParallel, .*torchrun'),
])
def test_what_cannot_work_is_one_line(wrong, line, model, batch):
    with pytest.raises(ValueError, match=line) as error:
        wrong(model, batch)
    assert '--' not in str(error.value) and '\n' not in str(error.value)
    assert not any(module._forward_hooks for module in model.modules())     # none is left behind


def test_torch_compile_sees_delta_where_it_looks_at_hooks(bert, batch, monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, 'skip_nnmodule_hook_guards', True)
    compiled = torch.compile(bert.eval(), backend='eager')
    with torch.no_grad():
        compiled(**batch)
        compiled(**batch)       # the first call settles what transformers keeps
        delta = robust.uniform_delta(bert, batch, 0.5, generator=generator())
        with pytest.raises(ValueError, match='run 0 times'):
            with robust.perturbed(compiled, delta):
                compiled(**batch)
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, 'skip_nnmodule_hook_guards', False)
    compiled(**batch)
    expected = robust.rs_r(bert, batch, eps=0.5, generator=generator())
    assert torch.equal(robust.rs_r(compiled, batch, eps=0.5, generator=generator()), expected)
    torch._dynamo.reset()


ALONE = """
import sys, torch
before = set(sys.modules)
import robust
new = {name.split('.')[0] for name in set(sys.modules) - before}
assert new <= {'robust', 'torch', *sys.stdlib_module_names}, new
class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 2)
    def get_input_embeddings(self):
        return self.words
    def forward(self, input_ids, attention_mask, labels):
        loss = torch.nn.functional.cross_entropy(self.head(self.words(input_ids).mean(1)), labels)
        return type('Output', (), {'loss': loss})
ids = torch.tensor([[1, 2, 3]])
batch = {'input_ids': ids, 'attention_mask': torch.ones_like(ids), 'labels': torch.tensor([1])}
print(robust.adv(Small(), batch, eps=0.1).item() > robust.adv(Small(), batch, eps=0.0).item() - 9)
"""


def test_robust_stands_alone_beside_modules_of_the_same_names_as_ours(tmp_path):
    shutil.copy(HERE / 'robust.py', tmp_path)
    for name in ('data', 'evaluate', 'synonyms', 'train'):
        (tmp_path / f'{name}.py').write_text('raise ImportError("of another project")')
    environment = {**ENVIRONMENT, 'PYTHONPATH': ''}
    ended = subprocess.run([sys.executable, '-c', ALONE], cwd=tmp_path, env=environment, capture_output=True,
                           text=True)
    assert (ended.returncode, ended.stdout) == (0, 'True\n'), ended.stderr


OBJECTIVES = {'adv 1': (robust.adv, {'eps': 0.1}), 'adv 3': (robust.adv, {'eps': 0.1, 'steps': 3}),
              'rs_r': (robust.rs_r, {'eps': 0.1}), 'rs_r layer': (robust.rs_r, {'eps': 0.1, 'layer': 1})}
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
for by_hand in (False, True):
    for name, (objective, options) in given['objectives'].items():
        model = given['bert'](given['config'])
        model.load_state_dict(given['weights'])
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        passed = wrapped.module if by_hand else wrapped
        getattr(robust, objective)(passed, batch, **options).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        found[name, by_hand] = gradients, [p.detach() for p in model.parameters()]
torch.save(found, f'{folder}/{rank}')
"""


def test_replicas_stay_equal_and_have_the_gradients_of_one_process(bert, tmp_path, processes, monkeypatch):
    ids = torch.randint(2, 40, (4, 6), generator=generator())
    batch = {'input_ids': ids, 'attention_mask': torch.ones_like(ids), 'labels': torch.tensor([0, 1, 2, 1])}
    delta = robust.uniform_delta(bert, batch, 0.1, generator=generator())
    objectives = {}
    for name, (objective, options) in OBJECTIVES.items():
        objectives[name] = objective.__name__, options
    given = {'batch': batch, 'delta': delta, 'bert': BertForSequenceClassification, 'config': bert.config,
             'weights': bert.state_dict(), 'objectives': objectives}
    torch.save(given, tmp_path / 'given')
    for status, _, err in processes(*two(REPLICAS, tmp_path)):
        assert status == 0, err
    one, other = (torch.load(tmp_path / rank, weights_only=True) for rank in '01')
    monkeypatch.setattr(robust, 'uniform_delta', lambda *args: delta.clone())
    for name, (objective, options) in OBJECTIVES.items():
        whole = loss_and_gradients(objective, bert, batch, **options)[1:]
        gradients, weights = one[name, False]
        assert all(map(torch.equal, weights, other[name, False][1])), name
        assert len(gradients) == len(whole) and all(map(close, gradients, whole)), name
        assert not all(map(torch.equal, one[name, True][1], other[name, True][1]))     # unwrapped by hand


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-6)


# README's lines, and around them one step of SGD over all of eight pairs, in whatever shares they come.
TRAINER = """
import json, sys, torch, transformers, robust
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

ids = torch.randint(5, 90, (8, 12), generator=torch.Generator().manual_seed(1)).tolist()
rows = [{'input_ids': row, 'attention_mask': [1] * 12, 'labels': n % 2} for n, row in enumerate(ids)]
found = {}
for parts in (1, 2):
    for kind in (Trainer, Exact, RobustTrainer):
        transformers.set_seed(1)
        model = transformers.BertForSequenceClassification.from_pretrained(encoder)
        model.accepts_loss_kwargs = False
        world = int(__import__('os').environ.get('WORLD_SIZE', 1))
        args = TrainingArguments(
            folder, max_steps=1, per_device_train_batch_size=8 // parts // world, optim='sgd', report_to=[],
            gradient_accumulation_steps=parts, learning_rate=0.5, max_grad_norm=0.0, use_cpu=True, seed=1,
            lr_scheduler_type='constant', save_strategy='no', disable_tqdm=True)
        trainer = kind(model=model, args=args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        with torch.no_grad():
            expected = model.eval()(**{name: torch.tensor([row[name] for row in rows]) for name in rows[0]})
        scored = trainer.evaluate()['eval_loss']
        assert abs(scored - expected.loss.item()) < 1e-5, 'noise where it only scores'
        found[f'{kind.__name__} {parts}'] = weights
torch.save(found, f'{folder}/{len(sys.argv)}.{args.process_index}.{world}')
"""


def test_inside_transformers_trainer(world, tmp_path, processes):
    """One process and two, one and two batches a step: eps 0 is Trainer itself, and noise arrives."""
    pytest.importorskip('accelerate', reason="transformers' Trainer needs accelerate")
    words = (tmp_path, world / 'sample/model')
    for status, _, err in processes((TRAINER, words), *two(TRAINER, *words)):
        assert status == 0, err
    one, first, second = (torch.load(tmp_path / f'3.{which}', weights_only=True)
                          for which in ('0.1', '0.2', '1.2'))
    for found in (one, first, second):
        for parts in (1, 2):
            plain, exact, noisy = (found[f'{kind} {parts}'] for kind in ('Trainer', 'Exact', 'RobustTrainer'))
            assert torch.equal(plain, exact) and not torch.allclose(plain, noisy, atol=1e-3)
            # the mean over all eight pairs, in whatever shares they come
            assert torch.allclose(plain, one['Trainer 1'], atol=1e-5)
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


def test_apostrophes_that_are_no_clitics_hide_no_word():
    assert synonyms.find_words("'good' rock 'n' roll, the 's' of O'Neil's 'sat' '90s don") == [
        'good', 'rock', 'n', 'roll', 'the', 's', 'of', "O'Neil", 'sat', '90s', 'don']
    assert synonyms.replace("Won 't won't", {"won't": ['shall']}, 1.0, random.Random(0)) == 'Shall shall'


@real
@pytest.mark.parametrize('task, authors, paper', [('pawsx', 0.207, 0.040), ('xnli', 0.330, 0.057)])
def test_the_share_of_words_changed_on_the_real_files(task, authors, paper):
    """authors: measured with the authors' look-up by others. paper: p times the words that have synonyms."""
    neighbours = synonyms.read_synonyms(SHARED / 'data' / data.NEIGHBOURS)
    pairs = data.read_pairs(data.path_of(SHARED / 'data', task, 'dev', 'en'), task)
    for how, share in (('authors', authors), ('paper', paper)):
        copies = synonyms.Copies(pairs, neighbours, how=how, m=1, seed=1)
        assert synonyms.changed_share(copies, sample=len(copies)) == pytest.approx(share, abs=0.004)
        assert synonyms.changed_share(copies) == pytest.approx(share, rel=0.1)      # a sample will do


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


def test_the_share_of_words_changed_by_hand():
    pairs = [data.Pair('cat x, y', 'cat', 0), data.Pair('x', 'x\u3000x', 0)]
    copies = synonyms.Copies(pairs, ONE, m=2, p=1.0)
    assert copies[2].premise == 'puss x, y'
    assert synonyms.changed_share(copies) == 2 / 6
    # Of 4,000 pairs every 40th alone cannot change: rows taken at a fixed stride would be of these.
    pairs = [data.Pair('x' if number % 40 == 0 else 'cat', '', 0) for number in range(4000)]
    copies = synonyms.Copies(pairs, ONE, m=10, p=1.0)
    assert synonyms.changed_share(copies) == pytest.approx(0.975, abs=0.02)


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
    assert data.split_words(' a\u3000b  c\t\u2028d\u0085 ') == ['a\u3000b', 'c', '\u2028d\u0085']
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


def test_reads_quotes_as_csv_writer_wrote_them_and_lone_quotes_as_they_are(tmp_path):
    rows = [('He said "hi"', '"quoted"', '1'), ('plain', 'a "lone', '0'), ('"', '""', '1'), ('', "it's", '0'),
            (' \u3000outer and inner\u3000blanks ', '\u2028', '1')]
    data.write_pairs(tmp_path / 'F', rows)
    assert [(a, b, str(label)) for a, b, label in data.read_pairs(tmp_path / 'F', 'pawsx')] == rows
    raw = write(tmp_path / 'F', b'a "lone quote\tand " another\t0\r\n"wrapped"\t"one" and "two"\t1\n\n\n')
    assert data.read_pairs(raw, 'pawsx') == [('a "lone quote', 'and " another', 0),
                                             ('"wrapped"', '"one" and "two"', 1)]


@pytest.mark.parametrize('task, content, labels, line', [
    ('xnli', b'a\tb\tcontradictory\na\tb\tentailment\na\tNS\tneutral\n', [0, 1, 2],
     'F: 3 pairs; 1 rows with a placeholder NS, kept'),
    ('pawsx', b'a\tb\nc\td\n', [None, None], 'F: 2 pairs; no labels: cannot be scored')])
def test_labels(tmp_path, task, content, labels, line):
    pairs = data.read_pairs(write(tmp_path / 'F', content), task)
    assert [pair.label for pair in pairs] == labels and data.describe('F', pairs) == line


@pytest.mark.parametrize('content, line', [
    (b'', 'empty'), (b'\n\n', 'empty'), (b'a\tb\t1\na\tb\n', '2: 2 columns'), (b'a\n', '1: 1 columns'),
    (b'a\tb\na\tb\t1\n', '2: 3 columns'), (b'1\ta\tb\t0\n', '1: 4 columns'),
    (b'a\tb\t1\n\na\tb\t1\n', '2: 1 columns'),
    (b'a\tb\t2\n', "1: label '2'; expected one of 0, 1"),
    (b'a\tb\tcontradictory\n', '1: label'),
    (b'a\tb\t1\n\xff\tb\t1\n', '2: not UTF-8'), (b'\xef\xbb\xbfa\tb\t1\r\na\tb\xff', '2: not UTF-8'),
    (b'id\tsentence1\tsentence2\tlabel\n1\ta\tb\t0\n', '1: a header; expected premise .* raw release'),
    (b'Sentence1\tsentence2\na\tb\n', '1: a header'), (b'premise\thypothesis\tlabel\n', '1: a header'),
    (b'a\tgold_label\tc\n', '1: a header'), (b'a\thypo\n', '1: a header'), (None, ' No such file or directory; expected premise')])
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


def test_converts_the_public_release_of_xnli(tmp_path, host):
    data.prepare(tmp_path, 'xnli', xnli_archives(tmp_path), complete=True)
    for split, lang in itertools.product(('dev', 'test'), ('de', 'en')):
        rows = [(f'{lang} {split}', 'says "so"', 2), (f'{lang} {split}', 'says "so"', 1)]
        assert data.read_pairs(data.path_of(tmp_path, 'xnli', split, lang), 'xnli') == rows
    assert data.read_pairs(tmp_path / 'xnli/train-en.tsv', 'xnli') == [('a', 'b', 0), ('c', 'd', 2)]


@pytest.mark.parametrize('break_it, line', [
    (lambda path: path.write_bytes(path.read_bytes()[:-40]), 'not the archive of .*fetch it again$'),
    (lambda path: path.write_bytes(b'<html>'), 'not the archive of .*fetch it again$'),
    (lambda path: path.unlink(), 'not the archive of .*No such file.*$'),
    (lambda path: pawsx_archive(path, rows=3), '3 rows for train-en.tsv, expected 2; fetch it again$')])
def test_a_broken_archive_gives_one_line_and_leaves_nothing(tmp_path, host, break_it, line):
    break_it(pawsx_archive(tmp_path / 'x-final.tar.gz'))
    for complete in (False, True):
        with pytest.raises(data.InputError, match=f'^{tmp_path}/x-final.tar.gz: {line}'):
            data.prepare(tmp_path / 'D', 'pawsx', [tmp_path / 'x-final.tar.gz'], complete)
        assert names(tmp_path / 'D') == ['pawsx'] and names(tmp_path / 'D/pawsx') == []


def test_a_run_fetches_into_a_folder_without_any_tsv_and_nowhere_else(tmp_path, host):
    folder = tmp_path / 'D/pawsx'

    def refused(line, *archives, complete=False):
        with pytest.raises(data.InputError, match=line):
            data.prepare(tmp_path / 'D', 'pawsx', archives, complete)
    refused('Fetch it by hand and give it to `python data.py pawsx .*--task sample')
    refused('paws.zip: expected an archive of pawsx: x-final.tar.gz', 'paws.zip')
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


def test_what_was_fetched_stays_when_the_next_cannot_be_had(tmp_path, host, capsys):
    """The first archive of XNLI when the second fails; the pairs when the neighbour file fails."""
    dev_and_test, train = xnli_archives(tmp_path)
    dev_and_test.rename(host / dev_and_test.name)
    for complete, left in ((False, []), (True, ALL[:4])):       # of a run: all or nothing
        with pytest.raises(data.InputError, match='XNLI-MT-1.0.zip: cannot be fetched'):
            data.prepare(tmp_path / f'D{complete}', 'xnli', complete=complete)
        assert names(tmp_path / f'D{complete}/xnli') == left
    line = f'neighbours.json: cannot be fetched.*keep it as {tmp_path}/DTrue/{data.NEIGHBOURS}'
    with pytest.raises(data.InputError, match=line):
        data.main(['xnli', str(train), '--data', str(tmp_path / 'DTrue')])
    assert names(tmp_path / 'DTrue/xnli') == ALL and capsys.readouterr().out.count(': 2 pairs\n') == 5


def test_a_broken_file_among_good_ones_is_named_and_nothing_is_written(tmp_path, host):
    folder, archives = tmp_path / 'D/pawsx', [pawsx_archive(tmp_path / 'x-final.tar.gz')]
    data.prepare(tmp_path / 'D', 'pawsx', archives, complete=True)
    write(folder / 'test-de.tsv', b'a\tb\tmaybe\n')
    write(folder / 'test-en.tsv', b'no\tlabels\n')
    (folder / 'dev-de.tsv').unlink()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(data.InputError, match="test-de.tsv:1: label 'maybe'"):
        data.prepare(tmp_path / 'D', 'pawsx', archives, complete=True)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


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
    folder = tmp_path / 'pawsx'
    folder.mkdir()
    for lang in ('en', 'yo', 'de', 'aa'):
        write(folder / f'test-{lang}.tsv', b'a\tb\t1\n')
    assert data.languages_of(tmp_path, 'pawsx') == list(data.TASKS['pawsx'].languages)
    assert data.languages_of(tmp_path, 'pawsx', ['yo', 'de', 'aa', 'en', 'yo']) == ['en', 'de', 'yo', 'aa']
    for name in ('train-en.tsv', 'dev-en.tsv', 'test-ha.tsv'):
        with pytest.raises(data.InputError, match=f'^{folder}/{name}: no such file'):
            data.prepare(tmp_path, 'pawsx', langs=['yo', 'ha'])
        write(folder / name, b'a\tb\t1\n')
    data.prepare(tmp_path, 'pawsx', langs=['yo', 'ha'])
    assert len(names(folder)) == 7 and names(tmp_path) == ['pawsx']


def test_a_number_lies_within_its_limits_and_is_finite():
    share, count = data.in_range(float, 0, 1), data.in_range(int, 1)
    assert (share('0'), share('1'), count('1'), count('99')) == (0, 1, 1, 99)
    for kind, wrong in ((share, '-0.1'), (share, '1.1'), (share, 'nan'), (count, '0'),
                        (data.in_range(float, 0), 'inf')):
        with pytest.raises(argparse.ArgumentTypeError, match='expected'):
            kind(wrong)


def test_several_processes_on_an_empty_folder_find_one_world(tmp_path, world):
    """One prepares and the others wait; all see the whole of it. A killed one's leftovers do no harm."""
    (tmp_path / 'sample.part').mkdir()
    write(tmp_path / 'sample.part' / 'train-en.tsv', b'half')
    write(tmp_path / 'sample.part.lock', b'')
    code = """
        import data, os, pathlib
        children = [os.fork(), os.fork()]       # four processes in all
        write = data.write_sample
        data.write_sample = lambda folder: (os.write(1, b'written\\n'), write(folder))
        data.prepare('.', 'sample')
        seen = [data.digest(path) for path in pathlib.Path('sample').rglob('*.*')]
        os.write(1, (' '.join(sorted(seen)) + '\\n').encode())
        for child in filter(None, children):
            os.waitpid(child, 0)
    """
    said = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], cwd=tmp_path, capture_output=True,
                          env=ENVIRONMENT | {'PYTHONPATH': str(HERE)}, text=True)
    digests = sorted(data.digest(path) for path in (world / 'sample').rglob('*.*'))
    assert said.stdout.splitlines() == ['written'] + [' '.join(digests)] * 4, said.stderr
    assert names(tmp_path) == ['sample']


@pytest.mark.parametrize('mask', [0o022, 0o027])
def test_files_have_the_permissions_that_the_umask_says(tmp_path, short, mask):
    before = os.umask(mask)
    try:
        data.prepare(tmp_path, 'sample')
        with data.replacing(tmp_path / 'sample/new.json') as part:
            part.write_text('{}')
    finally:
        os.umask(before)
    for path in [tmp_path / 'sample', *(tmp_path / 'sample').rglob('*')]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask, path
    written = json.loads((tmp_path / 'sample/model/tokenizer_config.json').read_text())
    assert not {'local_files_only', 'is_local', 'name_or_path'} & written.keys()


def test_what_is_there_is_not_written_again_and_takes_no_lock(world, tmp_path, monkeypatch):
    shutil.copytree(world, tmp_path / 'D')
    write(tmp_path / 'D/sample/test-x1.tsv', b'a\tb\n')        # without labels, as XTREME's script leaves it
    for target, name in ((data, 'FileLock'), (os, 'replace'), (Path, 'mkdir')):
        monkeypatch.setattr(target, name, refuse)
    data.prepare(world, 'sample')
    data.prepare(tmp_path / 'D', 'sample')
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
            assert (f'{count} rows' in data.describe(path, pairs)) == (count > 0)
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
    assert len(data.read_pairs(data.path_of(SHARED / 'data', 'xnli', 'train', 'en'), 'xnli')) == 57194


def test_a_script_ends_in_one_line(tmp_path, capsys):
    """Status, output and line of what run_script handles."""
    expected = '{"word": ["neighbour", ...], ...}; the public one lies at ' + data.NEIGHBOURS_URL
    assert ended(capsys, synonyms.main, tmp_path / 'nowhere', '--show', 'cat') == (
        1, '', f'{tmp_path}/nowhere: No such file or directory; expected the neighbour file of RS-A, '
               f'{expected}\n')
    file = write(tmp_path / 'F.json', b'{"a": ["b"], "b": ["a"], "c": []}')
    words = [file, '--show', "A isn't b c", '--p', '1', '--m', '2']
    shown = "A: b\nisn't: -\nb: a\nc: -\n   1  B isn't a c\n   2  B isn't a c\n"
    assert ended(capsys, synonyms.main, *words) == (None, shown, '')
    status, out, said = ended(capsys, data.main, 'sample', '--data', file)
    assert (status, out) == (1, '') and re.fullmatch(f'{file}.*: (File exists|Not a directory)\n', said)

    def stopped():
        raise KeyboardInterrupt('run a: stopped; the same command goes on')
    assert ended(capsys, stopped) == (130, '', 'run a: stopped; the same command goes on\n')
    with pytest.raises(ZeroDivisionError):      # a fault of the program keeps its traceback
        data.run_script(lambda: 1 / 0)


def test_the_flags_of_show_reach_the_copies(tmp_path):
    file = write(tmp_path / 'F.json', b'{"cat": ["puss", "kitten", "tom"]}')
    shown = {}
    for flags in ('', '--p 0.9', '--seed 1', '--m 3'):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            synonyms.main([str(file), '--show', 'cat ' * 30, *flags.split()])
        shown[flags] = said.getvalue().splitlines()[30:]
    assert shown['--m 3'] == shown[''][:3] and len(shown['']) == 10
    assert len(set(map(tuple, shown.values()))) == 4


def test_head_is_quiet():
    """What is left in the buffer when the reader has gone is not complained of at the end either."""
    code = 'import data; data.run_script(lambda: print(1))'
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONUNBUFFERED'}
    heard = subprocess.run(['bash', '-c', 'set -o pipefail; "$0" -c "$1" | true', sys.executable, code],
                           cwd=HERE, env=environment, capture_output=True, text=True)
    assert (heard.stdout, heard.stderr, heard.returncode) == ('', '', 1)


def test_the_writer_keeps_links_and_no_two_write_the_same_part(tmp_path, monkeypatch):
    target, link = write(tmp_path / 'target.json', b'old'), tmp_path / 'link.json'
    link.symlink_to(target)
    with data.replacing(link) as one, data.replacing(link) as other:
        assert one != other and one.suffix == '.json' and '.part' in one.name
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


def test_the_writer_writes_to_pipes(tmp_path):
    """What is no plain file is written to. Never try it on /dev/null: as root a broken writer replaces it."""
    os.mkfifo(tmp_path / 'pipe')
    reader, writer = os.pipe()
    named = os.open(tmp_path / 'pipe', os.O_RDONLY | os.O_NONBLOCK)
    for path, end in ((tmp_path / 'pipe', named), (f'/dev/fd/{writer}', reader)):    # a link, as /dev/stdout
        with data.replacing(path) as part:
            part.write_text('through')
        assert os.read(end, 99) == b'through'
    with pytest.raises(OSError) as error, data.replacing(tmp_path / 'pipe'):
        raise OSError(28, 'No space left on device')        # as a write says it, without a name
    assert error.value.filename == str(tmp_path / 'pipe') and (tmp_path / 'pipe').is_fifo()
    for end in (named, reader, writer):
        os.close(end)


CPU = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
FAULT = 'CUDA error: an illegal memory access was encountered'


@pytest.mark.parametrize('error, expected', [
    (torch.OutOfMemoryError('CUDA out of memory.'), 'out of memory (CUDA out of memory.); try less'),
    (RuntimeError(f'{CPU}\nmore'), f'out of memory ({CPU}); try less'),
    (RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED'),
     'out of memory (CUDA error: CUBLAS_STATUS_ALLOC_FAILED); try less'),
    (MemoryError(), 'out of memory (MemoryError); try less'),
    (RuntimeError('shapes'), 'shapes'), (RuntimeError(FAULT), FAULT)])
def test_memory_that_does_not_suffice_is_one_line(error, expected):
    with pytest.raises(data.InputError if 'try less' in expected else RuntimeError) as raised:
        with data.enough_memory('try less'):
            raise error
    assert str(raised.value) == expected


def test_permissions_are_a_courtesy(tmp_path, monkeypatch):
    for name, mode in (('a.safetensors', 0o600), ('config.json', 0o640)):
        write(tmp_path / name, b'').chmod(mode)
    with monkeypatch.context() as patch:
        patch.setattr(os, 'chmod', refuse)
        data.copy_permissions(tmp_path)
    data.copy_permissions(tmp_path)
    assert stat.S_IMODE((tmp_path / 'a.safetensors').stat().st_mode) == 0o640


@pytest.mark.parametrize('beside', [False, True])
def test_one_level_too_deep_is_said_whichever_script(tmp_path, beside):
    write(tmp_path / 'train-en.tsv', b'a\tb\t1\n')
    if beside:          # as an earlier mistake left it
        (tmp_path / 'pawsx').mkdir()
    before = names(tmp_path)
    calls = [lambda: data.prepare(tmp_path, 'pawsx'), lambda: data.path_of(tmp_path, 'pawsx', 'test', 'de'),
             lambda: data.main(['pawsx', '--data', str(tmp_path)])]
    for call in calls:
        with pytest.raises(data.InputError, match=f'^{tmp_path}: holds train-en.tsv itself; .* a pawsx/$'):
            call()
    assert names(tmp_path) == before


@pytest.mark.parametrize('main, words, line', [
    (data.main, ['nothing'], "argument task: invalid choice: 'nothing'.*--help"),
    (synonyms.main, ['F'], 'the following arguments are required: --show'),
    (synonyms.main, ['F', '--show', 'x', '--p', '2'], 'argument --p: 2: expected 0 to 1'),
    (synonyms.main, ['F', '--show', 'x', '--p', 'nan'], 'argument --p: nan: expected 0 to 1'),
    (synonyms.main, ['F', '--show', 'x', '--m', '0'], 'argument --m: 0: expected 1 or above'),
    (synonyms.main, ['F', '--show', 'x', '--m', 'x'], "argument --m: invalid int value: 'x'")])
def test_a_notebook_gets_an_error_and_no_exit(main, words, line):
    with pytest.raises(data.InputError, match=line):
        main(words)


def test_help_keeps_the_lines_of_the_description(capsys):
    status, out, _ = ended(capsys, data.main, '--help')
    assert status == 0 and data.__doc__.strip() in out


def test_only_torchruns_full_set_makes_several_processes(monkeypatch):
    monkeypatch.delenv('MASTER_ADDR', raising=False)
    for name, value in {'RANK': '1', 'WORLD_SIZE': '2', 'LOCAL_RANK': '1', 'MASTER_PORT': '1'}.items():
        monkeypatch.setenv(name, value)
    for expected in ((0, 1), (1, 2)):
        found = runpy.run_path(str(HERE / 'data.py'))
        assert (found['RANK'], found['WORLD']) == expected
        monkeypatch.setenv('MASTER_ADDR', 'here')


def test_progress_in_a_file_is_a_plain_line_now_and_then(monkeypatch, capsys):
    """A step takes 10 s by a false clock: a line every 30 s or so, and no control characters."""
    now = [time.time()]
    monkeypatch.setattr(time, 'time', lambda: now[0])
    monkeypatch.setattr(data._Lines, 'monitor_interval', 0)
    bar = data.progress(range(30), desc='runs', unit='run')
    bar._time = time.time       # tqdm took the true one when it was imported
    now[0] = bar.start_t
    for _ in bar:
        now[0] += 10
        bar.set_postfix(dev=1, refresh=False)
    said = capsys.readouterr().err
    assert '\r' not in said and '\x1b' not in said
    lines = said.splitlines()
    assert 8 <= len(lines) <= 10 and all(line.startswith('runs: ') for line in lines)
    for _ in data.progress(range(3), desc='short', unit='run'):
        pass
    assert capsys.readouterr().err == ''


# ---------------------------------------------------------------- train.py: batches and the loop

def arguments(own=(), **changes):
    """What the parts of train.py read of a run's arguments."""
    args = dict(seed=1, batch=16, epochs=2, max_steps=None, max_length=64, method='plain', lr=1e-3,
                warmup=0.0, eval_steps=100, max_eval=None, own=dict(own))
    return types.SimpleNamespace(**(args | changes))


def pairs_of_all_lengths(count):
    return [data.Pair('bokin ' * (i % 7 + 1), 'bokin', i % 2) for i in range(count)]


@pytest.mark.parametrize('epochs, rows, batch, steps', [
    (0.55, 3200, 32, 55), (0.1, 9600, 32, 30), (1, 100, 16, 7), (3, 13941, 32, 1307), (4, 13941, 32, 1743),
    (1e-9, 100, 16, 1)])
def test_epochs_times_rows_over_batch_is_rounded_up_once(epochs, rows, batch, steps):
    assert train.steps_of(arguments(epochs=epochs, batch=batch), rows) == steps
    assert train.steps_of(arguments(epochs=epochs, batch=batch, max_steps=20), rows) == min(20, steps)
    # RS-A's ten copies of a tenth of the pairs: as many steps
    if rows % 10 == 0:
        assert train.steps_of(arguments({'m': 10}, epochs=epochs, batch=batch), rows // 10) == steps


@pytest.mark.parametrize('own', [{}, {'m': 10}])
def test_the_plan_has_every_row_once_an_epoch_and_pairs_of_like_length_in_a_batch(tokenizer, own):
    pairs = pairs_of_all_lengths(200 if own else 2000)
    batches = train.plan(pairs, tokenizer, arguments(own))
    rows = [row for batch in batches for row in batch]
    assert len(batches) == 250 and {len(batch) for batch in batches} == {16}
    assert sorted(rows) == sorted(list(range(2000)) * 2)
    for batch in batches:
        lengths = [row % len(pairs) % 7 for row in batch]
        assert max(lengths) - min(lengths) <= 1
    lengths = [batch[0] % len(pairs) % 7 for batch in batches[:64]]
    assert lengths != sorted(lengths)                                   # batches come in random order
    pools = [rows[start:start + 1024] for start in range(0, 4000, 1024)]
    assert len(set(pools[0])) == 1024 and set(pools[0]) != set(range(1024))     # and rows do
    assert rows[:2000] != rows[2000:]
    assert train.plan(pairs, tokenizer, arguments(own)) == batches
    assert train.plan(pairs, tokenizer, arguments(own, seed=2)) != batches
    assert train.plan(pairs, tokenizer, arguments(own, max_steps=70)) == batches[:70]


def test_every_epoch_has_an_order_of_its_own(tokenizer):
    """1,024 pairs are a pool: the batches of the second epoch are others than those of the first."""
    batches = train.plan(pairs_of_all_lengths(1024), tokenizer, arguments())
    first, second = ({frozenset(batch) for batch in part} for part in (batches[:64], batches[64:]))
    assert len(first) == len(second) == 64 and len(first & second) < 5


def test_only_the_steps_that_will_run_are_tokenised_first(tokenizer, monkeypatch):
    pairs = pairs_of_all_lengths(5)
    tokens = train.count_tokens(pairs, tokenizer, [1, 4])
    lengths = [len(tokenizer(*pair[:2])['input_ids']) for pair in pairs]
    assert tokens.tolist() == [0, lengths[1], 0, 0, lengths[4]]
    counted = []
    monkeypatch.setattr(train, 'count_tokens',
                        lambda pairs, tokenizer, rows: counted.append(len(rows)) or torch.ones(len(pairs)))
    train.plan(pairs_of_all_lengths(5000), tokenizer, arguments(max_steps=3))
    assert counted == [64 * 16]


def test_the_processes_share_a_batch_and_their_mean_is_its_mean():
    batches = [list(range(15)), [20, 21, 22], [30]]
    shares, weights = zip(*(train.shares_of(batches, rank, 2) for rank in (0, 1)))
    assert shares[0] == [list(range(0, 15, 2)), [20, 22], [30]]
    assert shares[1] == [list(range(1, 15, 2)), [21], [30]]
    # a process without a row counts nothing
    assert weights == ([16 / 15, 4 / 3, 2], [14 / 15, 2 / 3, 0])
    assert train.shares_of(batches, 0, 1) == (batches, [1, 1, 1])


@pytest.mark.parametrize('warmup', [0.0, 0.1, 0.25, 1.0])
def test_the_learning_rate_is_that_of_transformers(warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, round(warmup * 40), 40)
    for step in range(1, 41):
        expected = pytest.approx(schedule.get_last_lr()[0])
        assert train.learning_rate(step, 40, arguments(lr=0.5, warmup=warmup)) == expected
        optimizer.step()
        schedule.step()


def test_every_seed_step_process_and_purpose_has_a_draw_of_its_own(monkeypatch):
    draws = []
    for rank in (0, 1):
        monkeypatch.setattr(train, 'RANK', rank)
        for asked in itertools.product((1, 2), (1, 2, 12), ('dropout', 'delta')):
            draws.append(train.draw(*asked))
            assert train.draw(*asked) == draws[-1] and 0 <= draws[-1] < 2 ** 32
    assert len(set(draws)) == len(draws) == 24


class Biased(torch.nn.Module):
    """A classifier whose logits are one trained bias: enough of a Hugging Face model for the loop."""
    device = torch.device('cpu')

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.tensor([0.3, -0.2]))
        self.config = types.SimpleNamespace(name_or_path='biased', id2label={0: 'different', 1: 'paraphrase'})
        self.base_model = torch.nn.Module()

    def forward(self, input_ids, attention_mask, labels=None, **inputs):
        logits = self.bias.expand(len(input_ids), 2)
        loss = None if labels is None else 100 * torch.nn.functional.cross_entropy(logits, labels)
        return types.SimpleNamespace(logits=logits, loss=loss)


@pytest.fixture
def loop(tokenizer, tmp_path, monkeypatch):
    """loop(**changes): train.train on Biased -> (its part of the record, the bias, the steps of its states).

    accuracies: what its dev evaluations find.
    """
    def loop(accuracies=None, **changes):
        pairs = pairs_of_all_lengths(48)
        model, saved = Biased(), []
        with monkeypatch.context() as patch:
            patch.setattr(train, 'save_checkpoint', lambda *args: None)
            patch.setattr(train, 'save_state', lambda *args: saved.append(args[2]['step']))
            if accuracies:
                found = iter(accuracies)
                patch.setattr(evaluate, 'accuracy', lambda marks: next(found))
            args = arguments(out=tmp_path / 'none', **changes)
            result = train.train(model, tokenizer, pairs, pairs[:10], args)
        return result, model.bias.detach(), saved
    return loop


def test_three_steps_by_hand(loop, tokenizer):
    """AdamW without weight decay, eps 1e-8, the gradient clipped from far above 1 to 1, the rate falling."""
    _, bias, _ = loop(max_steps=3, lr=0.01)
    expected, mean, square = torch.tensor([0.3, -0.2]), torch.zeros(2), torch.zeros(2)
    batches = train.plan(pairs_of_all_lengths(48), tokenizer, arguments(max_steps=3))
    for step, batch in enumerate(batches, 1):
        ones = sum(row % 2 for row in batch) / 16
        gradient = 100 * (expected.softmax(0) - torch.tensor([1 - ones, ones]))
        gradient = gradient / max(gradient.norm(), 1)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient ** 2
        change = (mean / (1 - 0.9 ** step)) / ((square / (1 - 0.999 ** step)).sqrt() + 1e-8)
        expected = expected - 0.01 * (3 - step + 1) / 3 * change
    assert torch.allclose(bias, expected, atol=1e-6)
    assert not torch.allclose(bias, loop(max_steps=3, lr=0.01, warmup=0.5)[1], atol=1e-4)


@pytest.mark.parametrize('seconds, every, steps, accuracies, scored, best, saved', [
    # the first of equal ones is kept; the last step is always scored; the state: the best, the last, long ago
    (math.inf, 2, 5, [50, 70, 70, 60], [2, 4, 5], (70, 4), [2, 4, 5]),
    (math.inf, 1, 4, [70, 70, 60, 50], [1, 2, 3, 4], (70, 1), [1, 4]),
    (-1, 1, 4, [50, 40, 30, 20], [1, 2, 3, 4], (50, 1), [1, 2, 3, 4]),
])
def test_what_is_scored_and_kept(seconds, every, steps, accuracies, scored, best, saved, loop, monkeypatch):
    monkeypatch.setattr(train, 'STATE_SECONDS', seconds)
    result, _, states = loop(accuracies, max_steps=steps, eval_steps=every)
    assert [h['step'] for h in result['history']] == scored and result['steps'] == steps
    assert (result['dev'], result['step']) == best and states == saved
    assert all(math.isfinite(h['loss']) for h in result['history'])


def test_plain_steps_are_plain_and_their_checkpoint_is_not_the_methods(loop, monkeypatch):
    seen = []
    plain, own = robust.METHODS['plain'], {'plain_steps': 2}

    def method(model, batch, own, generator):
        seen.append(own)
        return plain.objective(model, batch, own, generator)
    monkeypatch.setitem(robust.METHODS, 'adv', robust.Method(method, own))
    result, _, states = loop([90, 95, 60, 65, 65], method='adv', own=own, max_steps=5, eval_steps=1)
    assert seen == [own] * 3
    assert (result['dev'], result['step']) == (65, 4) and result['history'][1]['dev'] == 95
    assert states == [3, 4, 5]
    assert loop([90, 60], method='adv', own=own, max_steps=4, eval_steps=2)[0]['step'] == 4


def test_a_loss_that_is_not_finite_names_its_step(loop, monkeypatch):
    plain, calls = robust.METHODS['plain'].objective, itertools.count(1)

    def broken(*args):
        return plain(*args) * (math.nan if next(calls) == 3 else 1)
    monkeypatch.setitem(robust.METHODS, 'plain', robust.Method(broken, {}))
    with pytest.raises(data.InputError, match='^step 3: the loss is nan; try a smaller --lr'):
        loop(max_steps=6, eval_steps=6)


def test_cheap_dropout_drops_each_element_with_probability_p_and_scales_the_rest():
    torch.manual_seed(0)
    x = torch.ones(4003, 1001, requires_grad=True)
    with train.CheapDropout():
        y = torch.nn.Dropout(0.1)(x)
    y.sum().backward()
    assert torch.equal(x.grad, y) and set(y.unique().tolist()) == {0, torch.ones(()).mul(1 / 0.9).item()}
    kept = (y.detach() > 0).double().flatten()
    for share in (kept, kept[0::4], kept[1::4], kept[2::4], kept[3::4]):
        assert abs(share.mean() - 0.9) < 5 * 0.3 / len(share) ** 0.5
    for apart in (1, 2, 3, 4):      # elements that share a random number are independent
        assert abs((kept[apart:] * kept[:-apart]).mean() - 0.81) < 5 * 0.4 / len(kept) ** 0.5
    with train.CheapDropout():
        assert torch.equal(torch.nn.functional.dropout(x, 0.1, training=False), x)
        assert not torch.nn.functional.dropout(x, 1.0).any()


def test_cheap_dropout_reaches_attention_and_leaves_a_model_without_dropout_alone(model, batch, monkeypatch):
    seen, cheap = [], train.CheapDropout.dropout

    def counting(input, *args, **kwargs):
        seen.append(input.shape)
        return cheap(input, *args, **kwargs)
    monkeypatch.setattr(train.CheapDropout, 'dropout', staticmethod(counting))
    expected = model.eval()(**batch).logits
    with train.CheapDropout.fitting(model):
        # eager attention is the same function
        assert torch.allclose(model(**batch).logits, expected, atol=1e-5)
        seen.clear()
        model.train()(**batch)
    # Both layers' attention; the embeddings, and 2 a layer.
    assert seen.count((2, 2, 6, 6)) == 2 and seen.count((2, 6, 16)) >= 5
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.set_attn_implementation('sdpa')
    assert not isinstance(train.CheapDropout.fitting(model), train.CheapDropout)
    assert model.config._attn_implementation == 'sdpa'


def test_training_on_the_cpu_uses_cheap_dropout(run, dropping, monkeypatch):
    weights = []
    for name in ('with', 'without'):
        if name == 'without':
            monkeypatch.setattr(train.CheapDropout, 'dropout', staticmethod(lambda input, *args, **kw: input))
        folder, _ = run(name, f'--method plain --model {dropping} --max-steps 2 --langs en')
        weights.append((folder / 'model.safetensors').read_bytes())
    assert weights[0] != weights[1]


# ---------------------------------------------------------------- train.py: identity

def identity(small, flags):
    """The identity of the one run that a command line asks for, as main makes it."""
    args = train.parse_args(['--task', 'sample', '--data', str(small), *flags.split()])
    runs = train.runs_of(args)
    dtype = torch.float32 if runs[0].float32 else torch.bfloat16
    inputs = train.read_inputs(args, runs, torch.device('cpu'), dtype)
    return train.identity_of(runs[0], inputs)


EARLY = 'adv --plain-steps 5'
LANDS = [       # method, flag -> what of the setting it changes, what the variant then has, the name
    ('plain', '--lr 0.01', 'lr', {}, 'plain'),
    ('plain', '--batch 32', 'batch steps', {}, 'plain'),
    ('plain', '--warmup 0.5', 'warmup', {}, 'plain'),
    ('plain', '--eval-steps 7', 'eval_steps', {}, 'plain'),
    ('plain', '--max-length 32', 'max_length', {}, 'plain'),
    ('plain', '--max-eval 5', 'max_eval', {}, 'plain'),
    ('plain', '--no-freeze-embeddings', 'freeze_embeddings', {}, 'plain'),
    ('plain', '--no-float32', 'dtype', {}, 'plain'),
    ('plain', '--max-train 100', 'train_pairs steps', {}, 'plain'),
    ('plain', '--max-steps 5', 'steps', {}, 'plain'),
    ('plain', '--epochs 1', 'steps', {}, 'plain'),
    ('plain', '--langs en', 'dev-x1.tsv dev-x2.tsv dev-x3.tsv dev-x4.tsv dev-x5.tsv dev-x6.tsv test-x1.tsv '
     'test-x2.tsv test-x3.tsv test-x4.tsv test-x5.tsv test-x6.tsv', {}, 'plain'),
    ('plain', '--model OTHER', 'dropout', {}, 'plain'),
    ('plain', '--data MOVED', 'train-en.tsv', {}, 'plain'),
    ('plain', '--eps 5 --m 3 --p 0.3 --adv-steps 3 --plain-steps 9 --layer 1', '', {}, 'plain'),
    ('rs_r', '--eps 0.2', '', {'eps': 0.2}, 'rs_r-0.2'),
    ('rs_r', '--layer -1', '', {'eps': 0.1, 'layer': -1}, 'rs_r-0.1-layer-1'),
    ('rs_r', '--max-steps 5', 'steps', {'eps': 0.1}, 'rs_r-0.1'),
    (EARLY, '--eps 1', '', {'eps': 1.0, 'plain_steps': 5}, 'adv-1.0-plain_steps5'),
    (EARLY, '--adv-steps 3', '', {'eps': 0.001, 'adv_steps': 3, 'plain_steps': 5},
     'adv-0.001-adv_steps3-plain_steps5'),
    (EARLY, '--plain-steps 7', '', {'eps': 0.001, 'plain_steps': 7}, 'adv-0.001-plain_steps7'),
    (EARLY, '--layer 2', '', {'eps': 0.001, 'layer': 2, 'plain_steps': 5}, 'adv-0.001-layer2-plain_steps5'),
    ('rs_a', '--p 0.5', '', {'p': 0.5}, 'rs_a-p0.5'),
    ('rs_a', '--m 20', '', {'m': 20}, 'rs_a-m20'),
    ('rs_a', '--replace authors', '', {'replace': 'authors'}, 'rs_a-replaceauthors'),
    ('rs_a', '--english-only', '', {'english_only': True}, 'rs_a-english_only'),
    ('rs_a', '--synonyms NEIGHBOURS', '', {'synonyms': 'DIGEST'}, 'rs_a-synonymsDIGEST'),
    ('rs_a', '--max-steps 12', '', {'steps': 12}, 'rs_a-steps12'),
    ('rs_a', '--epochs 0.2', '', {'steps': 10}, 'rs_a-steps10'),
    ('rs_a', '--max-train 100', 'train_pairs', {}, 'rs_a'),
]


@pytest.mark.parametrize('method, flag, setting, variant, name', LANDS)
def test_where_a_flag_lands(method, flag, setting, variant, name, small, dropping, tmp_path):
    (tmp_path / 'synonyms.json').write_text((small / 'sample/synonyms.json').read_text() + '\n')
    moved = tmp_path / 'moved'
    if 'MOVED' in flag:
        shutil.copytree(small, moved)
        change(moved / 'sample/train-en.tsv', b'\tdifferent', b'\tparaphrase')
    places = {'OTHER': dropping, 'MOVED': moved, 'NEIGHBOURS': tmp_path / 'synonyms.json'}
    for word, place in places.items():
        flag = flag.replace(word, str(place))
    usual, found = identity(small, f'--method {method}'), identity(small, f'--method {method} {flag}')
    digest = data.digest(tmp_path / 'synonyms.json')
    differs = [key for key in usual['setting'] | found['setting']
               if usual['setting'].get(key) != found['setting'].get(key)]
    assert sorted(differs) == sorted(setting.split())
    expected = {key: digest if value == 'DIGEST' else value for key, value in variant.items()}
    assert found['variant'] == {'method': method.split()[0]} | expected
    assert found['name'] == name.replace('DIGEST', digest) + '-seed42'
    assert (found['seed'], identity(small, f'--method {method} {flag} --seed 3')) == (
        42, found | {'seed': 3, 'name': found['name'].replace('42', '3')})


def test_the_defaults_are_the_tasks_and_the_methods():
    args = train.parse_args('--task pawsx --method plain adv rs_r rs_a --seed 1 2'.split())
    runs = train.runs_of(args)
    assert [(run.method, run.seed) for run in runs] == list(itertools.product(robust.METHODS, (1, 2)))
    assert [run.own for run in runs[::2]] == [robust.METHODS[method].own for method in robust.METHODS]
    assert {run.model for run in runs} == {'bert-base-multilingual-cased'}
    assert [(run.epochs, run.lr, run.batch, run.eval_steps)
            for run in runs[::2]] == [(5, 2e-5, 32, 200)] * 3 + [(3, 2e-5, 32, 200)]
    neighbours = 'download/synonyms/counterfitted_neighbors.json'
    assert [run.synonyms for run in runs[::2]] == [None] * 3 + [neighbours]
    grid = train.runs_of(train.parse_args('--task xnli --method plain rs_r --eps 0.01 0.1'.split()))
    assert [run.own.get('eps') for run in grid] == [None, 0.01, 0.1]
    sample, = train.runs_of(train.parse_args('--task sample --method adv'.split()))
    assert sample.own['plain_steps'] == 750 and sample.freeze_embeddings
    assert sample.model == 'download/sample/model'


def test_two_variants_never_share_a_folder_and_are_two_rows(small, tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for steps in (1, 3):
        out = call(f'train --task sample --method adv --plain-steps 0 {FAST} --adv-steps {steps}', '--data',
                   small).out
    assert [path.name for path in sorted(Path('runs').iterdir())] == [
        'sample-adv-0.001-adv_steps3-plain_steps0-seed42', 'sample-adv-0.001-plain_steps0-seed42']
    assert '| adv-0.001-adv_steps3-plain_steps0 ' in out
    printed = call('evaluate', *Path('runs').iterdir()).out
    for name in ('adv-0.001-plain_steps0', 'adv-0.001-adv_steps3-plain_steps0'):
        assert f'| {name} ' in printed
    assert printed.count('| adv-') == 2
    one, other = (record_of(folder) for folder in Path('runs').iterdir())
    assert one['setting'] == other['setting'] and one['history'] != other['history']


def bfloat16(float32):
    """In place of choose_device: as on hardware that multiplies it."""
    return torch.device('cpu'), torch.bfloat16


REFUSED = [     # what is asked of the folder of `rs_r --seed 42` -> what its line says
    ('rs_r --eps 0.2', 'rs_r-0.1-seed42, not rs_r-0.2-seed42'),
    ('rs_r --seed 3', 'rs_r-0.1-seed42, not rs_r-0.1-seed3'),
    ('plain', 'rs_r-0.1-seed42, not plain-seed42'),
    ('rs_r --lr 0.1', 'lr 0.001, not 0.1'),
    ('rs_r --max-train 100', 'train_pairs 300, not 100'),
    ('rs_r --max-steps 7 --eval-steps 4', 'steps 8, not 7'),
    ('rs_r --max-eval 5', 'max_eval None, not 5'),
    ('rs_r --no-float32', 'dtype float32, not bfloat16'),
    ('rs_r --model OTHER', 'another model'),
    ('rs_r --model DROPPING', r'dropout .*"hidden_dropout_prob": 0.0}, not .*"hidden_dropout_prob": 0.1}'),
    ('rs_r --data train-en', 'another train-en.tsv'),
    ('rs_r --data dev-en', 'another dev-en.tsv'),
    ('rs_r --data test-x3', 'another test-x3.tsv'),
]


def test_what_a_finished_run_is_not_and_what_it_is_all_the_same(run, small, dropping, world, tmp_path, call,
                                                               monkeypatch):
    folder, record = run('a', f'--method rs_r {FAST}')
    before = contents(folder)
    for name in ('train-en', 'dev-en', 'test-x3'):
        shutil.copytree(small, tmp_path / name)
        change(tmp_path / name / f'sample/{name}.tsv', b'\tdifferent', b'\tparaphrase')
    other = transformers.BertModel.from_pretrained(world / 'sample/model')
    other.get_input_embeddings().weight.data[9] += 1
    shutil.copytree(world / 'sample/model', tmp_path / 'OTHER')
    other.save_pretrained(tmp_path / 'OTHER')
    monkeypatch.chdir(tmp_path)
    for flags, line in REFUSED:
        data_flag = '' if '--data' in flags else f'--data {small}'
        flags = f'{FAST} {data_flag} --method ' + flags.replace('DROPPING', str(dropping))
        with monkeypatch.context() as patch:
            if '--no-float32' in flags:
                patch.setattr(evaluate, 'choose_device', bfloat16)
            expected = rf'^a: holds another run \((.*; )?{line}(; .*)?\); name another folder with --out$'
            with pytest.raises(data.InputError, match=expected) as error:
                call(f'train --task sample --out a {flags}')
        assert not DIGEST.search(str(error.value))
    # Paths, flags of other methods and languages fewer are the same run, and so it stays when it is moved.
    for more in ('--adv-steps 3 --m 2', '--langs en x1', '--eps 0.1 --seed 42'):
        assert 'a/: finished, 8 steps' in call(f'train --task sample --method rs_r {FAST} {more} --out a/',
                                               '--data', f'{small}/').err
    folder.rename(tmp_path / 'b')
    printed = call(f'train --task sample --method rs_r {FAST} --data {small} --out b').out
    assert f'{evaluate.accuracies([record], ["en"]).item():.1f}' in printed and '| rs_r-0.1 ' in printed
    assert {path.name: held for path, held in contents(tmp_path / 'b').items()} == {
        path.name: held for path, held in before.items()}


# ---------------------------------------------------------------- train.py: the command line

FLAGS = {       # of train.py -> what its line says
    'adv --eps -1': 'expected 0 or above|expected at least one', 'adv --eps nan': 'nan: expected 0',
    'adv --eps x': 'invalid float', 'plain --batch 0': 'expected 1', 'plain --batch 1.5': 'invalid int',
    'rs_a --p 1.1': 'expected 0 to 1', 'rs_a --m 0': 'expected 1', 'rs_a --replace both': 'invalid choice',
    'plain --lr 0': 'expected 1e-09', 'plain --lr inf': 'expected 1e-09',
    'plain --epochs 0': 'expected 1e-09', 'plain --warmup 1.1': 'expected 0 to 1',
    'plain --seed -1': 'expected', 'plain --max-length 7': 'expected 8',
    'adv --adv-steps 0': 'expected 1', 'plain --eval-steps 0': 'expected 1',
    'plain --task mnli': 'invalid choice', 'plain --plain-steps -1': 'expected',
    'plane --lr 1': 'plane.*choose from .*plain.*adv.*rs_r.*rs_a', '--lr 1': 'method: expected at least one',
    'plain --nonsense 1': 'unrecognized arguments: --nonsense', '': 'method: expected at least one'}

METHODS = tuple(robust.METHODS)


@pytest.mark.parametrize('flags', FLAGS)
def test_a_wrong_command_line_is_one_line_and_nothing_exits(flags, capsys):
    with pytest.raises(data.InputError) as error:
        train.main(['--task', 'sample', '--method', *flags.split()])
    flag = ['--method', *re.findall('--[a-z-]+', flags)][-1 if flags.startswith(METHODS) else 0]
    line = str(error.value)
    assert re.search(FLAGS[flags], line) and flag in line and '\n' not in line
    assert capsys.readouterr() == ('', '')


def test_the_help_names_every_flag_and_its_default(capsys):
    with pytest.raises(SystemExit) as error:
        train.main(['--help'])
    shown = ' '.join(capsys.readouterr().out.split())
    assert error.value.code == 0 and 'default: None' not in shown
    for flag in (name for flags in train.FLAGS.values() for name in flags):
        assert f'--{flag.replace("_", "-")}' in shown
    for part in ('(default: adv 0.001, rs_r 0.1)', '(default: pawsx 5, xnli 2, sample 4)', '(default: 42)',
                 '(default: rs_a 10)', '(default: sample 750, adv 0)'):
        assert part in shown, part


def gaussian(model, batch, own, generator):
    """A fifth method: delta normal, of deviation sigma."""
    mask = batch['attention_mask']
    delta = own['sigma'] * torch.randn(*mask.shape, robust.width(model), generator=generator)
    with robust.perturbed(model, delta * mask.unsqueeze(-1)):
        return robust.plain(model, batch)


def test_a_fifth_method_is_one_function_and_one_entry(small, tmp_path, call, monkeypatch):
    """Its flag, folder, row and record come of themselves."""
    monkeypatch.setitem(robust.METHODS, 'gauss', robust.Method(gaussian, {'sigma': 0.05}))
    common = f'train --task sample {FAST} --data {small} --out {tmp_path}/runs --method'
    out = call(f'{common} plain gauss --sigma 0.5').out
    call(f'{common} gauss plain')
    assert sorted(path.name for path in (tmp_path / 'runs').iterdir()) == [
        'sample-gauss-seed42', 'sample-gauss-sigma0.5-seed42', 'sample-plain-seed42']
    records = [record_of(path) for path in sorted((tmp_path / 'runs').iterdir())]
    assert [record['variant'] for record in records] == [
        {'method': 'gauss'}, {'method': 'gauss', 'sigma': 0.5}, {'method': 'plain'}]
    assert records[0]['args']['sigma'] == 0.05 and records[1]['args']['sigma'] == 0.5
    assert len({record['history'][0]['loss'] for record in records}) == 3
    assert re.search(r'\| plain .*\n(\| .*\n)*\| gauss-sigma0\.5 ', out)
    with pytest.raises(data.InputError, match='sigma'):
        call(f'{common} gauss --sigma wide')


def test_a_dry_run_lists_each_run_with_its_steps_and_writes_nothing(small, tmp_path, call):
    before = contents(small)
    flags = '--method plain rs_r rs_a --eps 0.1 1 --seed 1 2 --m 4 --dry-run'
    said = call(f'train --task sample {flags} --data {small} --out {tmp_path}/new')
    listed = [line for line in said.err.splitlines() if line.startswith(f'{tmp_path}/new')]
    assert listed == [f'{tmp_path}/new/sample-{name}: new, {steps} steps' for name, steps in (
        ('plain-seed1', 19), ('plain-seed2', 19), ('rs_r-0.1-seed1', 19), ('rs_r-1.0-seed1', 19),
        ('rs_r-0.1-seed2', 19), ('rs_r-1.0-seed2', 19), ('rs_a-m4-seed1', 8), ('rs_a-m4-seed2', 8))]
    assert not said.out and not (tmp_path / 'new').exists() and contents(small) == before


def test_everything_is_looked_at_before_the_first_run(small, tmp_path, call):
    """A grid whose fourth method lacks its neighbour file, or whose last language is broken, never begins."""
    flags = f'train --task sample --max-steps 1 --data {small} --out {tmp_path / "new"} --method'
    (tmp_path / 's.json').write_text('{"cat": ["dog"]}')
    for more, line in (('plain rs_a --synonyms nowhere.json', 'nowhere.json'),
                       ('plain rs_a --synonyms nowhere.json --dry-run', 'nowhere.json'),
                       (f'plain rs_a --synonyms {tmp_path}/s.json', 's.json: no word of the training pairs'),
                       ('rs_r plain --layer 7', 'layers 1 to 2'), ('plain --langs en yo', 'test-yo.tsv'),
                       ('plain adv', '--plain-steps 750: the run has 1 steps, .*adv would never begin'),
                       ('plain --model nowhere', 'nowhere: cannot be loaded'),
                       ('plain --model ./modle', r'\./modle: no such folder; expected a checkpoint'),
                       ('plain --model runs/x/modle', 'runs/x/modle: no such folder; expected')):
        with pytest.raises(data.InputError, match=line) as error:
            call(f'{flags} {more}')
        assert '\n' not in str(error.value) and not (tmp_path / 'new').exists()
    ok = call(f'{flags} adv --plain-steps 1 --max-steps 2')
    assert record_of(tmp_path / 'new')['step'] == 2 and '| adv-0.001-plain_steps1 ' in ok.out


def test_a_layer_above_0_is_float32(small, call, monkeypatch):
    asked = []

    def choose_device(float32):
        asked.append(float32)
        return torch.device('cpu'), torch.float32
    monkeypatch.setattr(evaluate, 'choose_device', choose_device)
    for flags in ('plain rs_r --layer 1', 'rs_r --layer 0', 'plain --layer 1', 'plain --float32'):
        call(f'train --task sample --data {small} --max-steps 1 --dry-run --no-float32 --method {flags}')
    assert asked == [True, False, False, True]


def wordpieces(folder, world, cased, rows=None):
    """An encoder of wordpieces with vocab.txt alone, as old checkpoints have it; rows: of its embeddings."""
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'bokin', 'rome', 'Paris' if cased else 'paris']
    words += list('pars') + [f'##{letter}' for letter in 'aris']
    config = BertConfig.from_pretrained(world / 'sample/model', vocab_size=rows or len(words))
    transformers.BertModel(config).save_pretrained(folder)
    (folder / 'vocab.txt').write_text(''.join(f'{word}\n' for word in words))
    return folder


def test_a_tokenizer_that_is_not_the_encoders_is_one_line(world, small, tmp_path, call):
    common = f'train --task sample --method plain --data {small} --max-steps 1 --dry-run --out {tmp_path}/new'
    call(common, '--model', wordpieces(tmp_path / 'lower', world, cased=False))
    cased = wordpieces(tmp_path / 'cased', world, cased=True)
    short = wordpieces(tmp_path / 'short', world, cased=False, rows=15)
    for folder, line in ((cased, 'its tokenizer lower-cases, .*"do_lower_case": false.*tokenizer_config'),
                         (short, 'short: its tokenizer has ids up to 15, its embeddings 15 rows')):
        with pytest.raises(data.InputError, match=line) as error:
            call(common, '--model', folder)
        assert '\n' not in str(error.value)
    (cased / 'tokenizer_config.json').write_text('{"do_lower_case": false}')
    call(common, '--model', cased)


# ---------------------------------------------------------------- train.py: runs and their records

TRAINED = {     # name: flags; of those after the first four each has one argument that another has not
    'plain': 'plain', 'rs_r 0': 'rs_r --eps 0', 'adv 0': 'adv --eps 0 --plain-steps 0',
    'rs_a 0': 'rs_a --p 0 --m 1 --epochs 4',
    'rs_r': 'rs_r', 'rs_r 43': 'rs_r --seed 43', 'rs_r eps': 'rs_r --eps 0.2', 'rs_r layer': 'rs_r --layer 1',
    'adv': 'adv --eps 0.1 --plain-steps 0', 'adv eps': 'adv --eps 0.2 --plain-steps 0',
    'adv steps': 'adv --eps 0.1 --plain-steps 0 --adv-steps 3',
    'adv layer': 'adv --eps 0.1 --plain-steps 0 --layer 1', 'adv plain': 'adv --eps 0.1 --plain-steps 3',
    'rs_a': 'rs_a', 'rs_a m': 'rs_a --m 20', 'rs_a p': 'rs_a --p 0.5', 'rs_a all': 'rs_a --replace authors',
    'rs_a english': 'rs_a --english-only', 'rs_a other': 'rs_a --synonyms OTHER',
    'warm': 'plain --warmup 0.5', 'lr': 'plain --lr 0.01', 'batch': 'plain --batch 15',
    'frozen': 'plain --freeze-embeddings', 'train': 'plain --max-train 100', 'short': 'plain --max-length 8',
    'plain 43': 'plain --seed 43'}


def test_every_argument_reaches_the_training_and_eps_0_is_plain_itself(run, small, dropping, tmp_path):
    neighbours = json.loads((small / 'sample/synonyms.json').read_text())
    words = sorted(neighbours)
    for number, word in enumerate(words):       # no English ones: another file, and --english-only has less
        neighbours[word] = [words[number - 1], word[:-1] + 'd']
    (tmp_path / 'other.json').write_text(json.dumps(neighbours))
    weights = {}
    for name, flags in TRAINED.items():
        flags = flags.replace('OTHER', f'{tmp_path}/other.json')
        if 'english' in name:
            flags += f' --synonyms {tmp_path}/other.json'
        folder, _ = run(name, f'{FAST} --model {dropping} --langs en --method {flags}')
        weights[name] = (folder / 'model.safetensors').read_bytes()
    again, _ = run('again', f'{FAST} --model {dropping} --langs en --method rs_r')
    assert weights['rs_r'] == (again / 'model.safetensors').read_bytes()
    assert weights['plain'] == weights['rs_r 0'] == weights['adv 0'] == weights['rs_a 0']
    pairs = data.read_pairs(small / 'sample/train-en.tsv', 'sample')[:20]
    words = f'--task sample --data {small} --method rs_a --p 0.5 --seed 1 2'.split()
    first, second = (list(train.copies_of(run, pairs)) for run in train.runs_of(train.parse_args(words)))
    assert len(first) == len(second) == 200 and first != second
    others = list(TRAINED)[3:]
    for one, other in itertools.combinations(others, 2):
        assert weights[one] != weights[other], (one, other)


def test_a_record_says_what_it_is_about(run, small):
    folder, record = run('a', f'--method rs_a {FAST} --max-train 200 --max-eval 20')
    text = (folder / 'results.json').read_text()
    assert text.endswith('}\n') and text.count('\n') == 1 and 'NaN' not in text
    args, made_by = record['args'], record['made_by']
    expected = {'method': 'rs_a', 'm': 10, 'p': 0.1, 'replace': 'paper', 'seed': 42, 'epochs': 0.4}
    assert expected.items() <= args.items()
    assert args['eps'] is None      # and of other methods' arguments there is nothing
    assert not {'layer', 'adv_steps', 'plain_steps', 'own', 'name', 'epochs_rs_a'} & set(args)
    digests = {path.name: data.digest(path) for path in (small / 'sample').glob('*.tsv')}
    assert digests.items() <= record['setting'].items() and len(record['setting']['model']) == 16
    assert record['name'] == 'rs_a-steps8-seed42' and 'steps' not in record['setting']
    assert record['setting']['dtype'] == 'float32' and record['setting']['train_pairs'] == 200
    assert (made_by['processes'], len(made_by['source'])) == (1, 16) and 'thread' in made_by['device']
    assert set(made_by['versions']) == {'python', 'torch', 'transformers', 'tokenizers'}
    assert made_by['paths'] == {'model': f'{small}/sample/model', 'data': str(small), 'out': str(folder),
                                'synonyms': f'{small}/sample/synonyms.json'}
    assert record['steps'] == 8 and [h['step'] for h in record['history']] == [4, 8]
    assert 0.05 < record['changed'] < 0.15          # every word of the sample world has synonyms, p = 0.1
    for lang, marks in record['test_marks'].items():
        assert len(marks) == 20 == sum(record['answers'][lang])
        assert record['test'][lang] == 5 * marks.count('1')
        assert record['dev_all'][lang] == 5 * record['dev_marks'][lang].count('1')
    assert record['dev'] == record['dev_all']['en']
    assert record['cut'] == dict.fromkeys(data.TASKS['sample'].languages, 0)
    assert record['longest'] == 64 and record['wall_seconds'] > 0 and record['pairs_per_second'] > 0
    assert json.loads((folder / 'args.json').read_text()).items() <= record.items()


def test_the_run_folder_is_what_its_users_expect(run, small):
    """Predictions in XTREME's form, a checkpoint that transformers' pipeline takes, files as the umask says.
    """
    before = os.umask(0o022)
    try:
        folder, record = run('a', f'--method plain {FAST}')
    finally:
        os.umask(before)
    pairs = data.read_pairs(small / 'sample/test-x1.tsv', 'sample')
    predicted = (folder / 'predictions/sample/test-x1.tsv').read_text().splitlines()
    labels = data.TASKS['sample'].labels
    right = sum(p == labels[pair.label] for p, pair in zip(predicted, pairs, strict=True))
    assert 100 * right / 30 == record['test']['x1']
    assert [predicted.count(label) for label in labels] == record['answers']['x1']
    classify = transformers.pipeline('text-classification', str(folder))
    given = [classify({'text': pair.premise, 'text_pair': pair.hypothesis})['label'] for pair in pairs]
    assert given == predicted
    files = [path for path in folder.rglob('*') if path.is_file() and path.name != '.lock']
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o644}
    assert sorted(path.name for path in folder.iterdir() if path.name != '.lock') == [
        'args.json', 'config.json', 'model.safetensors', 'predictions', 'results.json', 'tokenizer.json',
        'tokenizer_config.json']
    settings = json.loads((folder / 'tokenizer_config.json').read_text())
    assert not {'local_files_only', 'trust_remote_code', 'is_local'} & set(settings)


def test_ones_own_languages_are_trained_on_and_scored(world, small, tmp_path, call):
    """A folder of one's own: train-en, dev-en, and a test file of a language that no table of the paper has.
    """
    own = tmp_path / 'own/pawsx'
    own.mkdir(parents=True)
    for name, source in (('train-en', 'train-en'), ('dev-en', 'dev-en'), ('test-en', 'test-en'),
                         ('test-yo', 'test-x2')):
        pairs = data.read_pairs(small / f'sample/{source}.tsv', 'sample')
        data.write_pairs(own / f'{name}.tsv', pairs)
    before = contents(own)
    flags = f'train --task pawsx --method plain {FAST} --model {world}/sample/model --float32 --lr 1e-3'
    printed = call(f'{flags} --data {tmp_path}/own --langs yo en --out {tmp_path}/run').out
    record = record_of(tmp_path / 'run')
    assert list(record['test']) == ['en', 'yo'] and list(record['dev_all']) == ['en']
    assert f'{record["test"]["yo"]:.1f}' in printed
    model, tokenizer = evaluate.load(str(tmp_path / 'run'))
    pairs = data.read_pairs(own / 'test-yo.tsv', 'pawsx')
    assert record['test_marks']['yo'] == evaluate.marks(evaluate.predict(model, tokenizer, pairs)[0], pairs)
    with pytest.raises(data.InputError, match='test-de.tsv'):
        call(f'{flags} --data {tmp_path}/own --out {tmp_path}/run2')
    assert contents(own) == before
    with pytest.raises(data.InputError, match='train-en.tsv: no labels; training needs them'):
        change(own / 'train-en.tsv', None, b'a\tb\r\n')
        call(f'{flags} --data {tmp_path}/own --langs en --out {tmp_path}/run2')


# ---------------------------------------------------------------- train.py: runs that are stopped

# As `python train.py FLAGS`, but killed at a step's evaluation: between checkpoint and state, or after both.
KILLED = """
import os, signal, sys, train
where, at = sys.argv.pop(1), int(sys.argv.pop(1))
train.STATE_SECONDS, save_state = -1, train.save_state
def killing(model, optimizer, state, run):
    if where == 'between' and state['step'] == at:
        os.kill(os.getpid(), signal.SIGKILL)
    save_state(model, optimizer, state, run)
    if state['step'] == at:
        os.kill(os.getpid(), signal.SIGKILL)
train.save_state = killing
train.main()
"""
KILLS = {'rs_r --eps 0.1': [('between', 20), ('after', 30)],
         'adv --eps 0.01 --plain-steps 15': [('after', 30)], 'rs_a': [('between', 30)]}


def test_a_killed_run_ends_as_one_that_was_never_stopped(small, dropping, tmp_path, processes, call):
    """Its lock does not outlive it. Resumed where it was moved to, with a language more."""
    flags = (f'--task sample --data {small} --model {dropping} --max-steps 60 --eval-steps 10 --lr 3e-3 '
             '--no-freeze-embeddings --batch 16 --langs en x1')
    for number in range(2):
        jobs = []
        for method, kills in KILLS.items():
            for where, at in kills[number:number + 1]:
                jobs.append((KILLED, [where, at, *flags.split(), '--method', *method.split(),
                                      '--out', tmp_path / method.split()[0]]))
        assert [status for status, *_ in processes(*jobs)] == [-9] * len(jobs)
    for method, kills in KILLS.items():
        call(f'train {flags} --method {method}', '--out', tmp_path / 'whole')
        folder = tmp_path / 'moved'
        shutil.move(tmp_path / method.split()[0], folder)
        where, at = kills[-1]
        step = at if where == 'after' else at - 10
        said = call(f'train {flags} x2 --method {method}', '--out', f'{folder}/').err
        assert f'goes on after step {step}' in said
        whole, killed = record_of(tmp_path / 'whole'), record_of(folder)
        assert whole['history'] == killed['history']
        assert whole['test_marks'].items() < killed['test_marks'].items()
        assert 'test-x2.tsv' in killed['setting'] and killed['made_by']['paths']['out'] == f'{folder}/'
        assert len({h['dev'] for h in whole['history']}) > 1
        weights = [(path / 'model.safetensors').read_bytes() for path in (tmp_path / 'whole', folder)]
        assert weights[0] == weights[1], method
        assert not list(folder.glob('*.p*t*'))
        shutil.rmtree(tmp_path / 'whole')
        shutil.rmtree(folder)


@pytest.fixture
def stopped(small, tmp_path, call, monkeypatch):
    """The flags of a run, and its folder, as Ctrl-C left it after the second of its four evaluations."""
    flags = f'--task sample --method plain --data {small} --max-steps 8 --eval-steps 2 --out {tmp_path}/a'
    save_state, calls = train.save_state, itertools.count(1)

    def interrupted(*args):
        save_state(*args)
        if next(calls) == 2:
            raise KeyboardInterrupt
    line = f'^{tmp_path}/a: stopped; the same command goes on from its last saved state$'
    with monkeypatch.context() as patch:
        patch.setattr(train, 'STATE_SECONDS', -1)
        patch.setattr(train, 'save_state', interrupted)
        with pytest.raises(KeyboardInterrupt, match=line):
            call(f'train {flags}')
    return flags, tmp_path / 'a'


def test_a_stopped_run_goes_on_only_as_the_same_run(stopped, small, tmp_path, call):
    flags, folder = stopped
    shutil.copytree(small, tmp_path / 'other')
    change(tmp_path / 'other/sample/train-en.tsv', b'\tdifferent', b'\tparaphrase')
    for more, differs in (('--seed 3', 'plain-seed42, not plain-seed3'), ('--lr 1', 'lr 0.001, not 1.0'),
                          (f'--data {tmp_path}/other', 'another train-en.tsv')):
        with pytest.raises(data.InputError, match=re.escape(f'holds another run ({differs});')):
            call(f'train {flags} {more}')
    before = contents(folder)
    assert f'{folder}: to be resumed, 8 steps' in call(f'train {flags} --dry-run').err
    assert contents(folder) == before
    held = json.loads((folder / 'args.json').read_text())
    held['made_by'] |= {'source': 'another', 'processes': 2}
    (folder / 'args.json').write_text(json.dumps(held))
    said = call(f'train {flags}').err
    assert 'goes on after step 4' in said and f'{folder}: began with other source: another, now ' in said
    assert f'{folder}: began with other processes: 2, now 1' in said and said.count('began with other') == 2
    kept = [value for value in record_of(folder).values() if isinstance(value, dict) and 'source' in value]
    assert sorted(made['source'] == 'another' for made in kept) == [False, True]     # both are recorded


def test_a_state_that_is_none_is_one_line(stopped, call):
    flags, folder = stopped
    (folder / 'state.pt').write_bytes(b'half')
    with pytest.raises(data.InputError, match=r'state\.pt: not a state that train.py wrote .*; remove it to'):
        call(f'train {flags}')
    (folder / 'state.pt').unlink()
    assert f'{folder}: new, 8 steps' in call(f'train {flags}').err and record_of(folder)['steps'] == 8


def failing(error, at=4):
    """The plain objective, which raises at a step."""
    plain, calls = robust.METHODS['plain'].objective, itertools.count(1)

    def objective(*args):
        if next(calls) == at:
            raise error
        return plain(*args)
    return robust.Method(objective, {})


@pytest.mark.parametrize('error, line', [
    (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.'), 'CUDA out of memory. Tried'),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
     "can't allocate memory"),
    (MemoryError(), '')])
def test_out_of_memory_is_one_line_and_keeps_the_last_checkpoint(error, line, run, tmp_path, monkeypatch):
    flags = '--method plain --max-steps 6 --eval-steps 2'
    with monkeypatch.context() as patch:
        patch.setitem(robust.METHODS, 'plain', failing(error))
        with pytest.raises(data.InputError, match=rf'^{tmp_path}/new: out of memory.*{line}.* smaller --batch'
                           r'.*the same command goes on from its last saved state$') as caught:
            run('new', flags)
    assert '\n' not in str(caught.value)
    assert evaluate.load(tmp_path / 'new') and not (tmp_path / 'new/results.json').exists()
    assert run('new', flags)[1]['history'] == run('whole', flags)[1]['history']


def test_an_error_of_the_program_is_no_users_line(run, monkeypatch):
    monkeypatch.setitem(robust.METHODS, 'plain', failing(RuntimeError('mat1 and mat2 shapes')))
    with pytest.raises(RuntimeError, match='mat1'):
        run('a', '--method plain --max-steps 6')


def test_a_full_disk_gives_one_line_and_the_state_before_stays(run, tmp_path, monkeypatch):
    flags = '--method plain --max-steps 6 --eval-steps 2'
    save, calls = torch.save, itertools.count(1)

    def full(state, path):
        if next(calls) > 1:
            Path(path).write_bytes(b'half')
            raise OSError(28, 'No space left on device')
        save(state, path)
    with monkeypatch.context() as patch:
        patch.setattr(train, 'STATE_SECONDS', -1)
        patch.setattr(torch, 'save', full)
        with pytest.raises(data.InputError, match='a: .*No space left on device'):
            run('a', flags)
    assert not list(tmp_path.rglob('*part*'))
    assert run('a', flags)[1]['history'] == run('b', flags)[1]['history']
    assert not (tmp_path / 'a/state.pt').exists()


def test_a_run_that_fails_does_not_end_the_grid(small, tmp_path, call, capsys):
    grid = f'train --task sample --method rs_r plain --eps 1e38 {FAST} --data {small} --out {tmp_path}/runs'
    with pytest.raises(data.InputError) as error:
        call(grid)
    line = f'{tmp_path}/runs/sample-rs_r-1e+38-seed42: step 1: the loss is nan; try a smaller --lr or --eps'
    assert str(error.value).startswith(line) and '\n' not in str(error.value)
    said = capsys.readouterr().err
    assert said.index(line) < said.index('plain-seed42: test average')
    assert record_of(tmp_path / 'runs/sample-plain-seed42')['steps'] == 8
    with pytest.raises(data.InputError):        # what is finished is shown again
        call(grid)
    printed = capsys.readouterr().out
    assert '| plain ' in printed and '| rs_r' not in printed


# ---------------------------------------------------------------- train.py: jobs that meet

def test_what_an_out_may_hold(small, tmp_path, call):
    """A log that the shell opened is no obstacle; a checkpoint that train.py did not write is one."""
    flags = f'train --task sample --method plain --data {small} --max-steps 1 --langs en --out'
    for name in ('log.txt', 'config.json', 'model.safetensors', 'tokenizer.json', 'results.json', 'state.pt'):
        folder = tmp_path / name.replace('.', '-')
        folder.mkdir()
        (folder / name).write_text('{}')
        if name == 'log.txt':
            call(f'{flags} {folder}')
            assert record_of(folder)['steps'] == 1 and (folder / name).read_text() == '{}'
            continue
        with pytest.raises(data.InputError, match=f'{folder}: holds {name}, but no .* of this train.py'):
            call(f'{flags} {folder}')
        assert contents(folder) == {folder / name: b'{}'}


def test_a_folder_has_one_writer(small, tmp_path, call):
    """While another process holds it: the same run is left to that one, another is refused."""
    common = f'train --task sample --data {small} {FAST} --langs en --out {tmp_path}/a --method'
    call(f'{common} plain --max-steps 1')
    written = (tmp_path / 'a/args.json').read_bytes()
    shutil.rmtree(tmp_path / 'a')
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a/args.json').write_bytes(written)     # all that there is before the first evaluation
    with FileLock(tmp_path / 'a/.lock'):
        said = call(f'{common} plain --max-steps 1')
        assert f'being made by another process: {tmp_path}/a\n' in said.err and not said.out
        with pytest.raises(data.InputError, match=r'a: holds another run \(plain-seed42, not rs_r-0.1-'):
            call(f'{common} rs_r --max-steps 1')
        assert not (tmp_path / 'a/results.json').exists()
    # Of a process that was killed before it saved anything the folder is free again, for whatever run.
    assert '| rs_r-0.1 ' in call(f'{common} rs_r --max-steps 1').out


def test_the_last_of_several_processes_prints_the_table(small, tmp_path, call, monkeypatch):
    """The run that another one was making when it was asked for is finished when this process ends."""
    grid = f'train --task sample --method plain rs_r --data {small} {FAST} --langs en --out {tmp_path}/runs'
    call(grid)
    plain = tmp_path / 'runs/sample-plain-seed42'
    finished, make = (plain / 'results.json').read_bytes(), train.train_and_score
    (plain / 'results.json').unlink()
    shutil.rmtree(tmp_path / 'runs/sample-rs_r-0.1-seed42')

    def meanwhile(*args):
        make(*args)
        (plain / 'results.json').write_bytes(finished)
    monkeypatch.setattr(train, 'train_and_score', meanwhile)
    with FileLock(plain / '.lock'):
        said = call(grid)
    assert '| plain ' in said.out and '| rs_r-0.1 ' in said.out and 'another process' not in said.err


# As `python train.py`; a run takes a second more than a process waits for another's lock.
SLOW = """
import data, time, train
make = train.train
train.train = lambda *args: time.sleep(3) or make(*args)
data.run_script(train.main)
"""


def test_processes_that_meet(small, tmp_path, processes):
    """The same grid thrice, two runs in one folder, and a job system's RANK: all at once."""
    flags = f'--task sample --data {small} --max-steps 2 --langs en x1'.split()
    grid = [SLOW, [*flags, '--method', 'plain', 'rs_r', '--out', tmp_path / 'grid']]
    jobs = [grid, grid, grid]
    for lr in ('0.001', '0.002'):
        jobs.append([SLOW, [*flags, '--method', 'plain', '--lr', lr, '--out', tmp_path / 'meet']])
    jobs.append([TRAIN_PY, [*flags, '--method', 'plain', '--out', tmp_path / 'ranked'], {'RANK': '1'}])
    *same, one, other, ranked = processes(*jobs)

    assert [status for status, *_ in same] == [0, 0, 0], same
    printed = ''.join(out for _, out, _ in same)
    said = ''.join(err for *_, err in same)
    for name in ('plain', 'rs_r-0.1'):
        assert said.count(f'{name}-seed42: test average') == 1 and f'| {name} ' in printed
        assert record_of(tmp_path / f'grid/sample-{name}-seed42')['steps'] == 2
    for _, out, err in same:
        assert ('| plain ' in out) != ('being made by another process: ' in err), err
        assert 'Traceback' not in err
    assert not list(tmp_path.rglob('*part*'))

    assert sorted([one[0], other[0]]) == [0, 1]
    for (status, out, err), lr in ((one, 0.001), (other, 0.002)):
        if status == 0:
            assert record_of(tmp_path / 'meet')['setting']['lr'] == lr and '| plain ' in out
            continue
        line = err.strip().splitlines()[-1]
        assert re.search(r'meet: holds another run \(lr \S+, not \S+\); name another', line), err
        assert 'Traceback' not in err and not out

    status, out, err = ranked
    assert status == 0 and '| plain ' in out
    assert 'RANK is set, but torchrun did not set it: one process' in err
    assert record_of(tmp_path / 'ranked')['made_by']['processes'] == 1


# As `python train.py`; the first process keeps each step's gradients, and each tells whether it writes.
GRADIENTS = """
import sys, torch, data, train
path, clip, steps = sys.argv.pop(1), torch.nn.utils.clip_grad_norm_, []
def keeping(parameters, norm):
    parameters = list(parameters)
    if train.RANK == 0:
        torch.save([p.grad for p in parameters if p.grad is not None], f'{path}.{len(steps)}')
    steps.append(clip(parameters, norm))
torch.nn.utils.clip_grad_norm_ = keeping
save_state = train.save_state
def telling(*args):
    open(f'{path}.kept.{train.RANK}', 'w').close()
    save_state(*args)
train.save_state = telling
data.run_script(train.main)
"""


def test_two_processes_have_the_gradients_of_one(small, tmp_path):
    """Batches of 15 of 20 pairs: shares of 8 and 7, then of 3 and 2. By torchrun itself."""
    (tmp_path / 'spy.py').write_text(GRADIENTS)
    flags = (f'--task sample --method plain --data {small} --epochs 1 --max-train 20 --batch 15 --warmup 0 '
             '--lr 1e-6 --langs en')
    with socket.socket() as listener:
        listener.bind(('localhost', 0))
        port = str(listener.getsockname()[1])
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port', port]
    begun = []
    for name, command in (('one', [sys.executable]), ('two', torchrun)):
        command = [*command, tmp_path / 'spy.py', tmp_path / name, *flags.split(), '--out',
                   tmp_path / f'run {name}']
        pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
        begun.append(subprocess.Popen(command, env=ENVIRONMENT, **pipes))
    for name, process in zip(('one', 'two'), begun):
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert out.count('| plain') == 1 and 'test average' in err
        # one process writes
        assert [path.name for path in tmp_path.glob(f'{name}.kept.*')] == [f'{name}.kept.0']
    for step in (0, 1):
        one, two = (torch.load(tmp_path / f'{name}.{step}', weights_only=True) for name in ('one', 'two'))
        assert len(one) == len(two) and max(g.abs().max() for g in one) > 1e-3
        assert all(map(close, one, two))
    assert record_of(tmp_path / 'run two')['made_by']['processes'] == 2


# ---------------------------------------------------------------- evaluate.py: models

def test_a_pair_that_is_cut_is_counted_and_said(tokenizer, run, capsys):
    # + 3 special tokens
    pairs = [data.Pair('bokin ' * length, 'bokin ' * 3, 0) for length in (1, 5, 8, 9, 10, 20)]
    features, cut = evaluate.encode(tokenizer, pairs, 14)
    assert cut == 3 and [len(feature['input_ids']) for feature in features] == [7, 11, 14, 14, 14, 14]
    _, found = run('a', f'--method plain {FAST} --max-length 8 --langs en x2')
    assert found['cut'] == {'en': 30, 'x2': 30}
    evaluate.say.cache_clear()
    evaluate.say_cut({'en': 3000, 'x1': 0, 'x2': 30}, 8)
    assert capsys.readouterr().err == 'pairs of more than 8 tokens, cut there: en 3,000, x2 30\n'


def test_more_tokens_than_positions_are_capped(model, tokenizer, capsys):
    evaluate.say.cache_clear()
    tokenizer.model_max_length = 10 ** 30
    positions = 20 if model.config.model_type == 'bert' else 18         # XLM-R's begin behind the padding's
    for _ in range(2):
        assert evaluate.longest(model, tokenizer, 128) == positions
    assert capsys.readouterr().err.count(f'{positions} tokens') == 1
    assert evaluate.longest(model, tokenizer, 12) == 12
    tokenizer.model_max_length = 10
    assert evaluate.longest(model, tokenizer, 12) == 10


class Votes(torch.nn.Module):
    """Of three passes over two pairs of three classes: the logits given."""
    device, config = torch.device('cpu'), types.SimpleNamespace(name_or_path='votes')

    def __init__(self, passes):
        super().__init__()
        self.passes = iter(passes)

    def forward(self, **inputs):
        return types.SimpleNamespace(logits=torch.tensor(next(self.passes)))


def test_of_several_passes_the_majority_counts_and_of_tied_classes_the_more_probable(tokenizer):
    pairs = [data.Pair('bokin', 'bokin', 0)] * 2
    passes = [[[1., 0, 0], [0, 1., 0]], [[0, 0, 1.], [0, 1., 0]], [[0, 0, 1.], [9., 0, 0]]]
    assert evaluate.predict(Votes(passes), tokenizer, pairs, passes=3)[0].tolist() == [2, 1]
    # one vote each, the second surer, then the first
    passes = [[[1., 0, 0], [0, 2., 0]], [[0, 0, 2.], [1., 0, 0]]]
    assert evaluate.predict(Votes(passes), tokenizer, pairs, passes=2)[0].tolist() == [2, 1]


class Lengths(torch.nn.Module):
    """Classifies pairs by their number of tokens; of `broken` tokens gives nan."""
    device, config, broken = torch.device('cpu'), types.SimpleNamespace(name_or_path='lengths'), None

    def forward(self, attention_mask, **inputs):
        tokens = attention_mask.sum(1)
        logits = torch.nn.functional.one_hot(tokens % 3, 3).float()
        if self.broken:
            logits[tokens == self.broken] = math.nan
        return types.SimpleNamespace(logits=logits)


def test_predictions_come_back_in_the_order_of_the_pairs_and_logits_that_are_not_finite_stop_them(tokenizer):
    model, lengths = Lengths(), [3, 1, 4, 2, 7, 5, 6]
    pairs = [data.Pair('a ' * length, 'b', 0) for length in lengths]        # [CLS], a ..., [SEP], b, [SEP]
    expected = [(length + 4) % 3 for length in lengths]
    assert evaluate.predict(model, tokenizer, pairs, batch=2)[0].tolist() == expected
    for length in lengths:
        model.broken = length + 4
        with pytest.raises(data.InputError, match='lengths: gives logits that are not finite'):
            evaluate.predict(model, tokenizer, pairs, batch=2)


@pytest.fixture
def encoder(world, tmp_path):
    """A copy of the sample's encoder, to be changed."""
    return Path(shutil.copytree(world / 'sample/model', tmp_path / 'encoder'))


def without_a_tokenizer(folder):
    for path in folder.glob('tokenizer*'):
        path.unlink()


def with_foreign_weights(folder):
    from safetensors.torch import save_file
    held = transformers.BertModel.from_pretrained(folder).state_dict()
    save_file({f'other.{name}': tensor for name, tensor in held.items()}, folder / 'model.safetensors',
              {'format': 'pt'})


def with_joined_sentences(folder):
    content = json.loads((folder / 'tokenizer.json').read_text())
    (folder / 'tokenizer.json').write_text(json.dumps(content | {'post_processor': None}))


def without_a_pad_token(folder, **others):
    config = json.loads((folder / 'tokenizer_config.json').read_text())
    del config['pad_token']
    (folder / 'tokenizer_config.json').write_text(json.dumps(config | others))


def of_config(config):
    def change(folder):
        transformers.AutoModel.from_config(config(transformers)).save_pretrained(folder)
    return change


T5 = of_config(lambda t: t.MT5Config(vocab_size=634, d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8))
CANINE = of_config(lambda t: t.CanineConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                            intermediate_size=32))
XLM = of_config(lambda t: t.XLMConfig(vocab_size=634, emb_dim=16, n_layers=2, n_heads=2))


@pytest.mark.parametrize('break_it, message', [
    (without_a_tokenizer, 'tokenizer'),
    (with_foreign_weights, r'\d+ of its weights are missing \(bert\..*; expected the checkpoint of'),
    (with_joined_sentences, 'puts nothing between the two sentences'),
    (T5, 'an encoder-decoder'), (CANINE, 'get_input_embeddings'), (XLM, 'keeps its layers in 4 lists'),
    (without_a_pad_token, 'a trial .* failed: .*does not have a padding token'),
], ids=range(7))
def test_encoders_that_do_not_fit_are_refused_in_one_line(break_it, message, encoder):
    break_it(encoder)
    with pytest.raises(data.InputError, match=f'encoder: .*{message}') as error:
        evaluate.load_encoder(str(encoder), 'sample', layer=-1)
    assert '\n' not in str(error.value)


def test_an_encoder_is_no_classifier_and_the_end_may_be_the_padding(encoder):
    with pytest.raises(data.InputError, match=r'missing \(classifier\..*expected a fine-tuned classifier'):
        evaluate.load(str(encoder))
    without_a_pad_token(encoder, eos_token='[SEP]')
    assert evaluate.load_encoder(str(encoder), 'sample')[1].pad_token == '[SEP]'


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


def test_half_precision_weights_are_trained_in_float32(encoder, run):
    transformers.BertModel.from_pretrained(encoder, dtype=torch.float16).save_pretrained(encoder)
    assert json.loads((encoder / 'config.json').read_text())['dtype'] == 'float16'
    model, _ = evaluate.load_encoder(str(encoder), 'sample')
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    trained, _ = run('a', f'--method plain {FAST} --model {encoder}')
    after = evaluate.load(str(trained))[0]
    assert {p.dtype for p in after.parameters()} == {torch.float32}
    moved = after.bert.encoder.layer[0].output.dense.weight != model.bert.encoder.layer[0].output.dense.weight
    assert moved.float().mean() > 0.99


@pytest.mark.parametrize('task, labels', [('sample', 2), ('pawsx', 2), ('xnli', 3)])
def test_a_classifier_gets_a_new_head(task, labels, finished, capsys):
    folder = finished('rs_r')
    evaluate.say.cache_clear()
    old, _ = evaluate.load(str(folder))
    new, _ = evaluate.load_encoder(str(folder), task, freeze_embeddings=True)
    assert f'a classifier; it gets a new head for {task}' in capsys.readouterr().err
    assert list(new.config.id2label.values()) == list(data.TASKS[task].labels)
    assert new.classifier.out_features == labels
    assert not torch.equal(new.classifier.weight[:2], old.classifier.weight)
    for (name, weight), before in zip(new.bert.named_parameters(), old.bert.parameters(), strict=True):
        assert torch.equal(weight, before)
        assert weight.requires_grad == ('word_embeddings' not in name)


def shapes():
    """Tiny encoders whose layers or embeddings differ from BERT's."""
    size = dict(vocab_size=634, num_labels=2, pad_token_id=0)
    t = transformers
    wide = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return {
        'distilbert': t.DistilBertConfig(**size, dim=16, n_layers=2, n_heads=2, hidden_dim=32),
        'electra': t.ElectraConfig(**size, **wide, embedding_size=8),
        'rembert': t.RemBertConfig(**size, **wide, input_embedding_size=8, output_embedding_size=8),
        'deberta': t.DebertaV2Config(**size, **wide, relative_attention=True, position_buckets=8,
                                     pos_att_type=['p2c', 'c2p']),
        'albert': t.AlbertConfig(**size, **wide, embedding_size=8),
        'mpnet': t.MPNetConfig(**size, **wide),
        'xlm-r-xl': t.XLMRobertaXLConfig(**size, **wide),
        'modernbert': t.ModernBertConfig(**size, **wide, cls_token_id=2, sep_token_id=3, bos_token_id=2,
                                         eos_token_id=3),
    }


@pytest.mark.parametrize('name', shapes())
def test_delta_reaches_every_layer_of_encoders_of_other_shapes(name, tokenizer):
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(shapes()[name]).eval()
    pairs = [data.Pair('bokin bokin', 'bokin', 0), data.Pair('bokin', 'bokin', 1)]
    batch = train.collate(pairs, tokenizer, 32)
    if name in ('distilbert', 'mpnet', 'xlm-r-xl', 'modernbert'):
        batch.pop('token_type_ids', None)
    plain = model(**batch).logits
    for layer in (0, 1, 2, -1):
        delta = robust.uniform_delta(model, batch, 0.3, layer, generator())
        assert delta.shape[-1] == (8 if layer == 0 and name in ('electra', 'rembert', 'albert') else 16)
        with robust.perturbed(model, delta, layer):
            assert not torch.equal(model(**batch).logits, plain)
        with robust.perturbed(model, 0 * delta, layer):
            assert torch.equal(model(**batch).logits, plain)
    with robust.hidden(model, 1) as first, robust.hidden(model, 2) as last:
        model(**batch)
    assert first[0].shape == last[0].shape == (2, batch['input_ids'].shape[1], 16)
    assert not torch.equal(first[0], last[0])


@real
def test_the_real_encoder_on_real_pairs():
    """delta as a change of the embedding table is delta from the hook, dropped in at the same token."""
    model, tokenizer = evaluate.load_encoder(str(SHARED / 'models/me5-small'), 'pawsx')
    pairs = data.read_pairs(data.path_of(SHARED / 'data', 'pawsx', 'dev', 'de'), 'pawsx')[:4]
    batch = train.collate(pairs, tokenizer, 128)
    labels = batch.pop('labels')
    delta = robust.uniform_delta(model, batch, 0.1, generator=generator())
    model.eval()
    with torch.no_grad():
        embedded = model.get_input_embeddings()(batch['input_ids']) + delta
        with robust.perturbed(model, delta):
            hooked = model(**batch).logits
        given = model(inputs_embeds=embedded, attention_mask=batch['attention_mask']).logits
    assert torch.equal(hooked, given) and not torch.equal(hooked, model(**batch).logits) and len(labels) == 4


@real
@pytest.mark.parametrize('shape, cut', [('mbert-shape', {'th': 939, 'el': 213, 'hi': 24}),
                                        ('xlmr-shape', {'th': 0})])
def test_pairs_cut_at_128_tokens_by_the_real_tokenizers(shape, cut):
    tokenizer = evaluate.AutoTokenizer.from_pretrained(SHARED / 'models' / shape)
    for lang, count in cut.items():
        pairs = data.read_pairs(data.path_of(SHARED / 'data', 'xnli', 'test', lang), 'xnli')
        assert evaluate.encode(tokenizer, pairs, 128)[1] == count


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
    args = {'model': 'D/encoder', 'max_length': 128, 'max_eval': None, 'layer': 0} | variant
    setting = SETTING | ({} if method == 'rs_a' else {'steps': steps}) | setting
    return {'where': f'runs/{name}', 'setting': setting, 'variant': variant, 'seed': seed, 'name': name,
            'args': args, 'made_by': {'paths': {'data': 'D'}}, 'dev': dev, 'steps': steps,
            'longest': 64, 'test_marks': marked, 'dev_marks': dict.fromkeys(marked, '1'),
            'answers': dict.fromkeys(marked, [10, 10]), **dict(changes)}


def tables(printed):
    """What evaluate.py prints -> [(the text above, {row: {column: cell}}), ...]."""
    found, above = [], []
    for line in printed.splitlines():
        first, *cells = [cell.strip() for cell in line.split('|')[1:-1]] or [None]
        if first is None:
            above.append(line)
        elif not first:
            columns, rows = cells, {}
            found.append(('\n'.join(above), rows))
            above = []
        elif not first.startswith('--'):
            rows[first] = dict(zip(columns, cells, strict=True))
    return found


@pytest.fixture
def table(capsys):
    """table(records): their one table as printed -> {row: {column: cell}}."""
    def table(*records):
        evaluate.say.cache_clear()
        evaluate.report(list(records))
        (_, rows), = tables(capsys.readouterr().out)
        return rows
    return table


def test_a_record_of_these_tests_is_one_of_train(run):
    for method in ('plain', 'rs_a'):
        made, (_, found) = record(method, None, 1, '1'), run(method, f'--method {method} {FAST} --seed 1')
        del made['where']
        assert set(made) <= set(found) and set(made['args']) - set(found['args']) <= {'layer'}
        test_files = {name for name in found['setting'] if re.match('(test|dev)-x|test-en', name)}
        assert set(found['setting']) - test_files == set(made['setting'])


def test_the_table_by_hand(capsys):
    """Rows in the paper's order; adv's gain is that of seed 2 alone, and rs_a shares no seed with plain.

    rs_r gains 25 and 50 points on average over languages: half its interval has t = 12.706 over two seeds,
    12.5 being their standard error, and 1.96 standard errors of the items, whose gains are 0 3/4 1/2 1/4.
    """
    evaluate.report([
        record('rs_a', None, 7, {'en': '0000', 'x1': '1110'}, 80.0, 6170),
        record('rs_r', 0.1, 2, {'en': '1111', 'x1': '1100'}, 91.0, 1234),
        record('plain', None, 2, {'en': '1000', 'x1': '1000'}, 61.0, 1234),
        record('adv', 0.01, 2, {'en': '1000', 'x1': '1111'}, 70.0, 1234),
        record('rs_r', 0.1, 1, {'en': '1110', 'x1': '1100'}, 90.0, 1234),
        record('plain', None, 1, {'en': '1100', 'x1': '1000'}, 50.0, 1234)])
    (above, rows), = tables(capsys.readouterr().out)
    half = math.hypot(12.706 * 12.5, 1.96 * 100 * math.sqrt(0.3125 / 3 / 4))
    expected = {'plain': ['2', '1,234', '55.5', '37.5', '25.0', '31.2', ''],
                'adv-0.01': ['1', '1,234', '70.0', '25.0', '100.0', '62.5', '+37.5'],
                'rs_r-0.1': ['2', '1,234', '90.5', '87.5', '50.0', '68.8', f'+37.5 ±{half:.1f}'],
                'rs_a': ['1', '6,170', '80.0', '0.0', '75.0', '37.5', '']}
    assert list(rows) == list(expected)
    for name, cells in expected.items():
        assert rows[name] == dict(zip(['n', 'steps', 'dev', 'en', 'x1', 'avg.', 'gain'], cells)), name
    assert above == ('sample, test accuracy in percent; model D/encoder; 5,000 training pairs; '
                     '4 test items a language; float32\n')


@pytest.mark.parametrize('devs, names', [
    ({0.01: [70, 60], 0.1: [69, 59]}, ['adv-0.01 *', 'adv-0.1 °']),             # within one point
    ({0.01: [70, 60], 0.1: [68.9, 58.9]}, ['adv-0.01 * °', 'adv-0.1']),
    ({0.01: [70, 60], 0.1: [90, 37]}, ['adv-0.01 * °', 'adv-0.1']),             # their mean
    ({0.01: [70, 60], 0.1: [70, 60]}, ['adv-0.01 *', 'adv-0.1 °']),             # of equals the smallest
    ({0.01: [60, 60], 1.0: [70, 70]}, ['adv-0.01', 'adv-1.0 * °']),
    ({0.01: [70, 70], 0.1: [60, 60], 1.0: [69.5, 69.5]}, ['adv-0.01 *', 'adv-0.1', 'adv-1.0 °']),
    ({0.01: [60, 60], 0.1: [65, 65], 1.0: [90]}, ['adv-0.01', 'adv-0.1 * °', 'adv-1.0']),
    ({0.01: [60, 60], 1.0: [90]}, ['adv-0.01', 'adv-1.0']),                     # nothing to choose from
])
def test_english_dev_chooses_among_the_eps_of_most_seeds(devs, names, table):
    runs = []
    for eps, seeds in devs.items():
        runs += [record('adv', eps, seed, '10', dev=dev) for seed, dev in enumerate(seeds)]
    choice = ['adv oracle'] if '*' in ''.join(names) else []
    assert list(table(*reversed(runs))) == names + choice


def test_each_language_of_the_oracle_takes_the_eps_best_on_its_own_dev_file(table):
    runs = [record('rs_r', 0.01, seed, '1110', dev=70, changes={'dev_marks': dict.fromkeys(LANGS, '10')})
            for seed in (1, 2)]
    runs += [record('rs_r', 1.0, seed, '0001', dev=60,
                    changes={'dev_marks': dict.fromkeys(LANGS, '00') | {'x1': '11', 'x2': '10'}})
             for seed in (1, 2)]
    runs.append(record('rs_r', 0.1, 1, '1111', changes={'dev_marks': dict.fromkeys(LANGS, '11')}))
    cells = table(*runs)['rs_r oracle']         # of two equal ones the smaller; 0.1 has too few seeds
    expected = dict.fromkeys(LANGS, '75.0') | {'x1': '25.0', 'avg.': f'{(6 * 75 + 25) / 7:.1f}'}
    assert cells == expected | dict.fromkeys(('n', 'steps', 'dev', 'gain'), '')
    # Over some of the runs it would compare unlike things.
    del runs[0]['dev_marks']['x3']
    assert table(*runs)['rs_r oracle'] == cells | {'x3': '-', 'avg.': '-'}
    del runs[0]['dev_marks']
    assert 'rs_r oracle' not in table(*runs)


def test_one_answer_for_nearly_every_item_is_marked(table):
    for counts, name in (([94, 6], 'rs_r-1.0'), ([95, 5], 'rs_r-1.0 †'), ([4, 96], 'rs_r-1.0 †')):
        runs = [record('rs_r', 1.0, 1, '10'),
                record('rs_r', 1.0, 2, '10', changes={'answers': {'x1': [50, 0], 'en': counts}})]
        assert list(table(*runs)) == [name]


MARKS = dict.fromkeys(data.TASKS['pawsx'].languages, '10')


def test_the_papers_own_rows_follow_with_an_average_where_the_languages_are_its_own(table, capsys):
    runs = [record(method, eps, 1, MARKS, task='pawsx')
            for method, eps in (('plain', None), ('rs_r', 0.1), ('rs_r', 1.0))]
    rows = table(*runs)
    assert list(rows) == ['Hu et al. (mBERT)', 'plain', 'rs_r-0.1 *', 'rs_r-1.0 °', 'rs_r oracle',
                          'paper (mBERT), plain', 'paper (mBERT), rs_r']
    empty = dict.fromkeys(('n', 'steps', 'dev', 'gain'), '')
    scores = dict(zip(MARKS, ['94.7', '87.2', '89.8', '89.6', '77.8', '78.4', '81.8']))
    assert rows['paper (mBERT), rs_r'] == empty | scores | {'avg.': '85.6'}
    marks = {'yo': '10', 'de': '11', 'en': '10', 'ja': None}
    rows = table(record('plain', None, 1, marks, task='pawsx'))
    assert list(rows['plain']) == ['n', 'steps', 'dev', 'en', 'de', 'ja', 'yo', 'avg.', 'gain']
    assert rows['plain']['avg.'] == '66.7' and rows['plain']['ja'] == '-'
    assert rows['paper (mBERT), plain'] == empty | {'en': '93.8', 'de': '85.8', 'ja': '74.4', 'yo': '-',
                                                    'avg.': '-'}
    assert not any('paper' in name or 'Hu' in name for name in table(record('plain', None, 1, '10')))


def test_rows_of_the_paper_have_the_averages_that_it_prints():
    for task, rows in evaluate.PAPER.items():
        assert list(rows) == ['mBERT*', 'plain', 'adv', 'rs_r', 'rs_a']
        for row in rows.values():
            *scores, average = map(float, row.split())
            assert len(scores) == len(data.TASKS[task].languages)
            assert sum(scores) / len(scores) == pytest.approx(average, abs=0.051)


def test_xnli_fits_170_columns_and_every_table_has_one_legend(capsys):
    langs = data.TASKS['xnli'].languages
    runs = []
    for seed in (1, 2, 3):
        marks = dict.fromkeys(langs, '1' * (seed * 6) + '0' * (30 - seed * 6))
        for method, eps in (('plain', None), ('adv', 0.001), ('adv', 0.01), ('rs_r', 0.1), ('rs_r', 1.0)):
            runs.append(record(method, eps, seed, marks, steps=24544, task='xnli'))
        runs.append(record('rs_a', None, seed, marks, steps=122720, task='xnli'))
    answers = dict.fromkeys(langs, [100, 0, 0])
    evaluate.report([*runs, record('adv', 0.1, 1, marks, steps=24544, task='xnli',
                                   changes={'answers': answers}), record('plain', None, 1, '10')])
    printed = capsys.readouterr().out
    (_, wide), (_, other) = tables(printed)
    assert 'adv-0.001 *' in wide and 'adv-0.1 †' in wide and 'rs_r-1.0 °' in wide and 'plain' in other
    assert max(map(len, printed.splitlines())) <= 170
    legend = '\n'.join(line for line in printed.splitlines() if line.startswith('- '))
    half = legend[:len(legend) // 2]
    assert legend == f'{half}\n{half}'
    for sign in ('n:', 'steps:', 'dev:', 'gain:', '*:', '°:', 'oracle:', '†:', 'paper:', '95%'):
        assert sign in half, sign


@pytest.mark.parametrize('changes, words', [
    ({'model': 'd9'}, 'another model'), ({'train-en.tsv': 'd9'}, 'another train-en.tsv'),
    ({'dtype': 'bfloat16'}, 'dtype bfloat16, not float32'), ({'max_eval': 2}, 'max_eval 2, not None'),
    ({'lr': 1, 'steps': 9}, 'lr 1, not 2; steps 9, not 200'), ({'dropout': '{"p": 1}'}, 'dropout'),
    ({'test-x1.tsv': 'd9'}, 'another test-x1.tsv'), ({'test-yo.tsv': 'd9'}, '')])
def test_other_settings_stand_in_tables_of_their_own_headed_in_words(changes, words, capsys):
    files = {'test-x1.tsv': 'd4'}
    other = record('rs_r', 0.1, 1, '11', **files | changes)
    # rs_a, whose steps are its own, fits beside either; it comes first and parts nothing.
    runs = [record('rs_a', None, 1, '11', 600, **files), record('plain', None, 1, '10', **files), other]
    evaluate.report(runs)
    (_, first), *others = tables(capsys.readouterr().out)
    assert list(first) == ['plain', *([] if words else ['rs_r-0.1']), 'rs_a']
    assert len(others) == bool(words) == bool(evaluate.differences(other['setting'], runs[1]['setting']))
    if words:
        (above, rows), = others
        assert list(rows) == ['rs_r-0.1'] and 'd9' not in above
        assert f'\nOther runs of sample: {words}' in above
        with pytest.raises(data.InputError, match=f'runs/rs_r-0.1-seed1 does not belong with .*: {words}'):
            evaluate.one_table(runs)
    else:
        assert len(evaluate.one_table(runs)) == 3


def test_a_file_that_two_of_a_table_scored_parts_a_third_from_it(capsys):
    """Though the first has none of that language; and the heading says which file."""
    runs = [record('plain', None, 1, '10'), record('plain', None, 2, '10', **{'test-yo.tsv': 'a'}),
            record('plain', None, 3, '10', **{'test-yo.tsv': 'b'})]
    evaluate.report(runs)
    (_, first), (above, second) = tables(capsys.readouterr().out)
    assert first['plain']['n'] == '2' and second['plain']['n'] == '1'
    assert '\nOther runs of sample: another test-yo.tsv\n' in above
    with pytest.raises(data.InputError, match='plain-seed3 does not belong with .*: another test-yo.tsv;'):
        evaluate.one_table(runs)


def test_rs_a_of_another_number_of_steps_and_other_own_arguments_are_rows_beside_plain(table):
    runs = [record('rs_a', None, 1, '11', steps=46314), record('plain', None, 1, '10'),
            record('rs_a', None, 1, '11', steps=200, own={'steps': 200}),
            record('adv', 0.01, 1, '11', own={'adv_steps': 3}), record('adv', 0.1, 1, '11'),
            record('adv', 0.1, 1, '01', own={'adv_steps': 3})]
    rows = table(*runs)
    assert list(rows) == ['plain', 'adv-0.1', 'adv-0.01-adv_steps3 *', 'adv-0.1-adv_steps3 °', 'adv oracle',
                          'rs_a', 'rs_a-steps200']
    assert rows['rs_a']['steps'] == '46,314' and rows['rs_a-steps200']['steps'] == '200'
    assert rows['rs_a-steps200']['gain'] == '+50.0'


def test_the_same_run_counts_once(capsys):
    runs = [record('plain', None, 1, '1100', changes={'where': where}) for where in ('runs/a', 'a.jsonl:1')]
    for marks, said in (('1100', ''), ('0000', 'a.jsonl:1: the same run as runs/a, with other results; '
                                               'left out\n')):
        runs[1]['test_marks'] = dict.fromkeys(LANGS, marks)
        evaluate.say.cache_clear()
        evaluate.report(runs)
        printed = capsys.readouterr()
        (_, rows), = tables(printed.out)
        assert rows['plain']['n'] == '1' and rows['plain']['avg.'] == '50.0' and printed.err == said
        assert evaluate.one_table(runs) == runs[:1]


def test_a_language_without_labels_or_of_some_runs_alone_is_shown_and_not_averaged(table):
    marks = [{**dict.fromkeys(LANGS, row), 'x1': '1111', 'x2': None} for row in ('1100', '1110')]
    runs = [record('plain', None, 1, marks[0]), record('rs_r', 0.1, 1, marks[1])]
    cells = table(*runs)['plain']
    assert cells['x1'] == '100.0' and cells['x2'] == '-' and cells['avg.'] == f'{(100 + 5 * 50) / 6:.1f}'
    assert table(*runs)['rs_r-0.1']['gain'] == f'{5 * 25 / 6:+.1f}'
    points, half = evaluate.gain(runs[1:], runs[:1], LANGS)
    assert points[2].isnan() and points[7] == pytest.approx(5 * 25 / 6) and half.isnan().all()
    del marks[0]['x3']              # trained with fewer --langs: averages stay of the same languages
    rows = table(*runs)
    assert rows['plain']['x3'] == '-' and rows['plain']['avg.'] == f'{(100 + 4 * 50) / 5:.1f}'
    cells = table(record('plain', None, 1, dict.fromkeys(LANGS)))['plain']
    assert cells['en'] == cells['avg.'] == '-' and cells['gain'] == ''


def test_a_table_reads_as_plain_text():
    rows = [('plain', {'en': '9.5', 'avg.': '10.0'}), ('rs_r', {'en': '+2.0 ±1.2'})]
    assert evaluate.render(['above'], ['en', 'avg.'], rows, ['below']) == '\n'.join([
        'above', '', '|       |        en | avg. |', '| ----- | --------: | ---: |',
        '| plain |       9.5 | 10.0 |', '| rs_r  | +2.0 ±1.2 |    - |', '', '- below', ''])


def test_what_is_no_finished_run_is_passed_over_with_a_line(tmp_path, call):
    lines = [json.dumps(record(*run, '1100')) + '\n' for run in (('plain', None, 1), ('rs_r', 0.1, 1))]
    for name, text in (('plain/results.json', lines[0]), ('unfinished/args.json', '{}'), ('log.txt', 'a log'),
                       ('distances/distances.json', '{}'), ('old.jsonl', ''.join(lines))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    printed = call('evaluate', *sorted(tmp_path.iterdir()))
    (_, rows), = tables(printed.out)
    assert list(rows) == ['plain', 'rs_r-0.1'] and rows['plain']['n'] == '1'
    passed = [f'{tmp_path}/{name}: no finished run of train.py; passed over'
              for name in ('distances', 'log.txt', 'unfinished')]
    assert printed.err.splitlines() == passed
    assert len(evaluate.read_records([f'{tmp_path}/plain/', f'{tmp_path}/plain'])) == 1     # measured once
    with pytest.raises(data.InputError, match='log.txt .*unfinished: no finished run of train.py$'):
        call('evaluate', tmp_path / 'log.txt', tmp_path / 'unfinished')


# ---------------------------------------------------------------- evaluate.py: the interval

def test_the_interval_by_hand():
    """Two seeds, four items, two languages; over items, over seeds, and of the average over languages."""
    plain = [record('plain', None, seed, {'en': a, 'x1': b})
             for seed, a, b in ((1, '0000', '0001'), (2, '0010', '0000'), (9, '1111', '1111'))]
    ours = [record('rs_r', 0.1, seed, {'en': a, 'x1': b})
            for seed, a, b in ((2, '1110', '1000'), (1, '1000', '1001'), (7, '0000', '0000'))]
    points, half = evaluate.gain(ours, plain, ['en', 'x1'])
    # Seeds 1 and 2 alone. en: items 1 .5 0 0 -> 37.5; x1: 1 0 0 0 -> 25; each seed: en 25, 50, x1 25, 25.
    assert points.tolist() == [37.5, 25.0, 31.25]

    def error(gains):
        mean = sum(gains) / len(gains)
        return 100 * math.sqrt(sum((g - mean) ** 2 for g in gains) / (len(gains) - 1) / len(gains))
    seeds = [12.706 * 100 * 0.25 / math.sqrt(2) / math.sqrt(2), 0, 12.706 * 12.5 / 2]
    items = [1.96 * error(gains) for gains in ([1, 0.5, 0, 0], [1, 0, 0, 0], [1, 0.25, 0, 0])]
    assert half.tolist() == pytest.approx([math.hypot(a, b) for a, b in zip(items, seeds)])
    points, half = evaluate.gain(ours[:1], plain, ['en'])               # of one seed, points alone
    assert points.tolist() == [50.0, 50.0] and half.isnan().all()
    points, half = evaluate.gain(ours[2:], plain, ['en'])               # no seed in common
    assert points.isnan().all() and half.isnan().all()
    del ours[0]['test_marks']['x1']                                     # a language that one run lacks
    points, half = evaluate.gain(ours, plain, ['en', 'x1'])
    assert points[0] == 37.5 and points[1].isnan() and half[1].isnan()
    assert evaluate.paired(ours, plain) == [(ours[0], plain[1]), (ours[1], plain[0])]
    plain = [record('plain', None, seed, '1') for seed in (1, 2)]
    ours = [record('rs_r', 0.1, seed, '1') for seed in (1, 2)]
    assert evaluate.gain(ours, plain, LANGS)[1].isnan().all()           # a single item has no spread


def test_the_three_rows_of_a_premise_are_one_item():
    """Each row three times: XNLI's interval is that of the distinct ones. A last premise may be short."""
    marks = {('plain', 1): '1001100101', ('plain', 2): '0001100101',
             ('rs_r', 1): '1011101101', ('rs_r', 2): '1011101100'}
    single, triple = [], []
    for (method, seed), row in marks.items():
        thrice = ''.join(mark * 3 for mark in row)
        single.append(record(method, 0.1, seed, {'en': row}))
        triple.append(record(method, 0.1, seed, {'en': thrice}, task='xnli'))
    expected = evaluate.gain(single[2:], single[:2], ['en'])
    assert torch.allclose(torch.stack(evaluate.gain(triple[2:], triple[:2], ['en'])), torch.stack(expected))
    plain, ours = triple[0], triple[2]
    for run in (plain, ours):
        run['test_marks'] = {'en': run['test_marks']['en'][:10]}        # units of 3, 3, 3, 1
    gains = [int(a) - int(b) for a, b in zip(ours['test_marks']['en'], plain['test_marks']['en'])]
    sums = [sum(gains[at:at + 3]) - len(gains[at:at + 3]) * sum(gains) / 10 for at in range(0, 10, 3)]
    errors = evaluate.item_errors([(ours, plain)], ['en'])
    assert errors[0] == pytest.approx(10 * math.sqrt(4 / 3 * sum(s * s for s in sums)))


def test_the_interval_covers_the_truth_in_95_of_100_trials():
    """Worlds with items and seeds of their own: the gain is 0.1 on average, its spread over seeds 0.03, over
    items 0.3.
    """
    generator, hits = torch.Generator().manual_seed(7), 0
    trials, items, seeds = 400, 200, 4
    for _ in range(trials):
        easy = torch.rand(items, 1, generator=generator)
        runs = []
        for method, shift in (('plain', 0.0), ('rs_r', 0.1)):
            for seed in range(seeds):
                chance = 0.2 + 0.5 * easy + shift + 0.03 * torch.randn(1, generator=generator)
                right = torch.rand(items, 2, generator=generator) < chance
                en, x1 = (''.join(map(str, column)) for column in right.int().T.tolist())
                runs.append(record(method, 0.1, seed, {'en': en, 'x1': x1}))
        points, half = evaluate.gain(runs[seeds:], runs[:seeds], ['en', 'x1'])
        hits += int(abs(points[2] - 10) <= half[2])
    assert 0.93 <= hits / trials <= 0.995, hits / trials


def test_the_quantiles_are_students():
    """P(|t| < q) = 0.95 by numerical integration of the density."""
    for freedom, quantile in enumerate(evaluate.T975, 1):
        x = torch.linspace(0, quantile, 20001, dtype=torch.double)
        scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
        scale /= math.sqrt(freedom * math.pi)
        density = scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
        assert torch.trapezoid(density, x).item() == pytest.approx(0.475, abs=3e-5), freedom
    assert freedom == 30


# ---------------------------------------------------------------- evaluate.py: beyond the table

def test_generalized_pairs_two_languages_and_leaves_out_rows_that_mean_nothing(tmp_path, monkeypatch):
    rows = {'en': [('a', 'b', '1'), ('c', 'd', '0'), ('e', 'f', '0')],
            'de': [('A', 'B', '1'), ('C', 'D', '1'), ('E', 'NS', '0')],
            'ja': [('x', 'y'), ('z', 'w'), ('NS', 'v')]}
    (tmp_path / 'pawsx').mkdir()
    for lang, pairs in rows.items():
        data.write_pairs(data.path_of(tmp_path, 'pawsx', 'test', lang), pairs)
    seen = {}

    def predict(model, tokenizer, pairs, desc):
        seen[desc] = pairs
        return torch.ones(len(pairs)), 1
    monkeypatch.setattr(evaluate, 'predict', predict)

    def scored(*langs, **options):
        found = evaluate.generalized(None, None, 'pawsx', tmp_path, langs, **options)
        return {(first, second): scored['marks'] for first, second, scored in found}
    found = scored('en', 'de', 'ja')
    assert seen['en-de'] == [('a', 'B', 1)] and seen['de-en'] == [('A', 'b', 1)]
    assert seen['en-en'] == [('a', 'b', 1), ('c', 'd', 0), ('e', 'f', 0)]
    assert seen['de-de'] == [('A', 'B', 1), ('C', 'D', 1)]
    assert found['en', 'en'] == '100' and found['de', 'de'] == '11' and found['ja', 'ja'] is None
    assert ('ja', 'en') not in found        # of labels that one of them lacks
    data.write_pairs(data.path_of(tmp_path, 'pawsx', 'test', 'ja'), [('x', 'y', '0'), ('NS', 'v', '0')])
    with pytest.raises(data.InputError, match='pawsx: rows: 3 in test-en.tsv, 2 in test-ja.tsv'):
        scored('en', 'ja')
    assert ('en', 'ja') not in scored('en', 'ja', max_eval=2)       # no row is left


@pytest.fixture(scope='session')
def finished(small, tmp_path_factory):
    """finished(name, method, eps): an untrained classifier's run folder in the small world, with a record."""
    folder = tmp_path_factory.mktemp('finished')
    torch.manual_seed(3)
    model, tokenizer = evaluate.load_encoder(str(small / 'sample/model'), 'sample')
    with torch.no_grad():
        model.classifier.weight.mul_(50)
    scores = evaluate.score(model, tokenizer, 'sample', small, LANGS)
    marks = {lang: scored['marks'] for _, lang, scored in scores}

    def finished(name, method='rs_r', eps=0.1, seed=1, **args):
        path = folder / name
        if not path.exists():
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
            line = record(method, eps, seed, marks)
            line['args'] |= args
            line['made_by']['paths']['data'] = str(small)
            (path / 'results.json').write_text(json.dumps(line) + '\n')
        return path
    return finished


@pytest.fixture
def evaluated(call):
    """evaluated(RUN, flags): evaluate.py -> (what it printed, {row: {column: cell}} of the last table)."""
    def evaluated(*words):
        printed = call('evaluate', *' '.join(map(str, words)).split()).out
        return printed, tables(printed)[-1][1]
    return evaluated


@pytest.mark.parametrize('flags, rows', [
    ('--max-eval 10', ['test']), ('--langs x1 en', ['test']), ('--data DIR --max-eval 1', ['test']),
    ('--generalized --max-eval 5', list(LANGS)), ('--smooth 2 --eps 0.5 --data DIR', ['test']),
    ('--regions --radii 0 1 --steps 2 --langs x1', ['noise 0', 'attack 0', 'noise 1', 'attack 1'])])
def test_nothing_changes_a_run_and_every_figure_says_what_it_is_of(flags, rows, finished, small, tmp_path,
                                                                   evaluated, monkeypatch):
    folder = finished('rs_r')
    shutil.copytree(small, tmp_path / 'DIR')
    monkeypatch.chdir(tmp_path)
    before = contents(folder) | contents(tmp_path)
    printed, found = evaluated(folder, flags)
    assert contents(folder) | contents(tmp_path) == before and list(found) == rows
    assert printed.startswith(f'{folder}, sample, accuracy in percent; {folder} {flags}\n')


def test_what_is_scored_anew_is_what_is_asked_for(finished, small, tmp_path, evaluated):
    folder = finished('rs_r')
    held = record_of(folder)['test_marks']
    scores = [evaluate.accuracy(held[lang][:10]) for lang in ('x2', 'en')]
    expected = {'x2': f'{scores[0]:.1f}', 'en': f'{scores[1]:.1f}', 'avg.': f'{sum(scores) / 2:.1f}'}
    assert evaluated(folder, '--max-eval 10 --langs x2 en')[1]['test'] == expected
    # As many pairs as the run had, where nothing else is said.
    record = record_of(finished('rs_r-ten', max_eval=10))
    assert evaluated(finished('rs_r-ten'), '--langs x2 en --batch 3')[1]['test'] == expected
    assert evaluated(finished('rs_r-ten'), '--max-eval 30 --langs x2 en')[1]['test'] != expected
    assert record['test_marks'] == held
    assert list(evaluated(folder, '--predictions', tmp_path / 'P')[1]['test']) == [*LANGS, 'avg.']
    assert len(list((tmp_path / 'P/sample').iterdir())) == 7
    shutil.copytree(small, tmp_path / 'D')
    rows = data.read_pairs(small / 'sample/test-x3.tsv', 'sample')
    data.write_pairs(tmp_path / 'D/sample/test-yo.tsv', [(a, b) for a, b, _ in rows])
    score = f'{evaluate.accuracy(held["x3"]):.1f}'
    found = evaluated(folder, '--langs yo x3 --data', tmp_path / 'D')[1]['test']
    assert found == {'yo': '-', 'x3': score, 'avg.': score}


@pytest.mark.parametrize('labelled', [True, False])
def test_a_language_that_comes_later_gets_its_predictions(labelled, finished, small, tmp_path, evaluated):
    """In XTREME's form; the model's labels are right where its marks are 1."""
    folder = finished('rs_r')
    held = record_of(folder)['test_marks']['x3']
    shutil.copytree(small, tmp_path / 'D')
    rows = data.read_pairs(small / 'sample/test-x3.tsv', 'sample')
    labels = data.TASKS['sample'].labels
    expected = [labels[row.label if mark == '1' else 1 - row.label] for row, mark in zip(rows, held)]
    data.write_pairs(tmp_path / 'D/sample/test-yo.tsv',
                     [(a, b, labels[label])[:3 if labelled else 2] for a, b, label in rows])
    evaluated(folder, '--langs yo --predictions', tmp_path / 'P', '--data', tmp_path / 'D')
    assert contents(tmp_path / 'P') == {
        tmp_path / 'P/sample/test-yo.tsv': ''.join(f'{label}\n' for label in expected).encode()}


def test_smoothing_and_regions_are_by_noise_of_the_asked_size_at_the_layer_of_the_training(
        finished, evaluated, monkeypatch):
    folder, deep = finished('rs_r'), finished('rs_r-deep', layer=2)
    plain = evaluated(folder, '--max-eval 30')[1]
    assert evaluated(folder, '--smooth 3 --eps 0')[1] == plain
    assert evaluated(folder, '--smooth 3 --eps 30')[1] != plain
    asked, applied = [], []
    perturbed = robust.perturbed

    def worst_delta(model, batch, *, eps, steps, layer, generator):
        asked.append((eps, steps, layer, generator.initial_seed()))
        return robust.uniform_delta(model, batch, eps, layer, generator)

    def spy(model, delta, layer=0):
        applied.append(layer)
        return perturbed(model, delta, layer)
    monkeypatch.setattr(robust, 'worst_delta', worst_delta)
    monkeypatch.setattr(robust, 'perturbed', spy)
    for run, layer in ((folder, 0), (deep, 2)):
        for flags, expected in (('--smooth 3', [(0.1, 0)] * 3), ('--smooth 2 --eps 7', [(7, 0)] * 2),
                                ('--regions --steps 3 --radii 0.5 2', [(0.5, 0), (0.5, 3), (2, 0), (2, 3)])):
            asked.clear(), applied.clear()
            evaluated(run, '--langs en', flags)
            assert asked == [(eps, steps, layer, 42) for eps, steps in expected]
            assert applied == [layer] * len(expected)


def test_attack_is_worse_than_noise_and_its_gradient_is_of_float32_logits(finished, small, evaluated,
                                                                          monkeypatch):
    folder = finished('rs_r')
    _, rows = evaluated(folder, '--regions --langs en --radii 0 0.3')
    score = {name: float(cells['en']) for name, cells in rows.items()}
    assert score['noise 0'] == score['attack 0'] > score['attack 0.3'] + 5
    assert score['attack 0.3'] < score['noise 0.3']
    model, tokenizer = evaluate.load(str(folder))
    dtypes, forward = [], model.forward

    def spy(*args, **inputs):
        output = forward(*args, **inputs)
        dtypes.append((output.logits.dtype, 'labels' in inputs))
        return output
    monkeypatch.setattr(model, 'forward', spy)
    list(evaluate.regions(model, tokenizer, 'sample', small, ['en'], radii=[0.1], steps=2,
                          dtype=torch.bfloat16))
    assert [dtype for dtype, attacked in dtypes if attacked] == [torch.float32] * 2
    assert {dtype for dtype, attacked in dtypes if not attacked} == {torch.bfloat16}


def test_a_run_is_measured_in_the_precision_and_at_the_length_of_its_training(finished, small, call,
                                                                              monkeypatch):
    asked = []

    def choose_device(float32):
        asked.append(float32)
        return torch.device('cpu'), torch.bfloat16

    def predict(model, tokenizer, pairs, *, dtype, batch, max_length, **options):
        asked.append((dtype, batch, max_length))
        return torch.zeros(len(pairs), dtype=torch.long), 3
    monkeypatch.setattr(evaluate, 'choose_device', choose_device)
    monkeypatch.setattr(evaluate, 'longest', lambda model, tokenizer, most: asked.append(most) or 64)
    monkeypatch.setattr(evaluate, 'predict', predict)
    said = call('evaluate --langs en --batch 7', finished('rs_r-long', max_length=100)).err
    assert asked == [True, 100, (torch.bfloat16, 7, 64)]
    assert said == 'pairs of more than 64 tokens, cut there: en 3\n'
    (_, _, scored), = evaluate.score(None, None, 'sample', small, ['en'], dtype=None, batch=1, max_length=1)
    assert scored['answers'] == [30, 0]         # the second never


def test_the_picture_of_the_regions_has_a_curve_a_variant_under_attack(finished, tmp_path, evaluated,
                                                                       monkeypatch):
    """The mean over languages and seeds of what is printed."""
    pytest.importorskip('matplotlib')
    saved, save = [], evaluate.save_picture
    monkeypatch.setattr(evaluate, 'save_picture', lambda figure, path:
                        saved.append(figure) or save(figure, path))
    runs = [finished('plain', 'plain', None), finished('rs_r'), finished('rs_r-2', seed=2, max_eval=10)]
    flags = f'--regions --langs en x1 x6 --radii 0 0.3 --steps 2 -o {tmp_path}/p.svg'
    printed, _ = evaluated(*runs, flags)
    averages = []
    for _, rows in tables(printed):
        averages.append([float(rows[f'attack {radius}']['avg.']) for radius in ('0', '0.3')])
    axes, = saved[0].axes
    chance, plain, noisy = axes.get_lines()
    assert chance.get_label() == 'chance (50%)' and set(chance.get_ydata()) == {50.0}
    assert plain.get_label() == 'plain' and noisy.get_label() == 'rs_r-0.1'
    assert list(plain.get_ydata()) == pytest.approx(averages[0], abs=0.051)
    mean = [(a + b) / 2 for a, b in zip(*averages[1:])]
    assert averages[1] != averages[2] and list(noisy.get_ydata()) == pytest.approx(mean, abs=0.051)
    assert list(noisy.get_xdata()) == ['0', '0.3'] and 'L-inf' in axes.get_xlabel()
    assert 'sample' in axes.get_title() and 'PGD of 2 steps' in axes.get_title()
    assert '<svg' in (tmp_path / 'p.svg').read_text() and 'attack (%)' in axes.get_ylabel()


def test_a_picture_goes_through_a_link(tmp_path):
    pytest.importorskip('matplotlib')
    figure = evaluate.new_figure(1, 1)
    (tmp_path / 'there').mkdir()
    (tmp_path / 'link.png').symlink_to(tmp_path / 'there/p.png')
    for name in ('link.png', 'new.png'):
        evaluate.check_picture(tmp_path / name)
        evaluate.save_picture(figure, tmp_path / name)
    assert (tmp_path / 'link.png').is_symlink()
    assert (tmp_path / 'there/p.png').read_bytes().startswith(b'\x89PNG')
    names = {path.name for path in tmp_path.rglob('*')}
    assert names == {'link.png', 'new.png', 'there', 'p.png'}


# ---------------------------------------------------------------- evaluate.py: command line

NOTHING = 'does not go with what is asked'
# flags after a run folder RUN of rs_r, one PLAIN of plain, one OTHER of another lr, or LINES.jsonl; the line
WRONG = [
    ('LINES.jsonl --max-eval 3', 'LINES.jsonl:1: a result without its model; .* name run folders'),
    ('RUN PLAIN --smooth 3', 'PLAIN: plain has no eps of its own; say --eps'),
    ('RUN OTHER --regions -o p.png', 'OTHER does not belong with RUN: lr 9, not 2'),
    ('RUN --regions -o p.txt', 'p.txt: not the name of a picture'),
    ('RUN --regions -o no/p.png', 'no/p.png: no such folder'),
    ('RUN PLAIN --langs en --predictions P', '--predictions P: of 2 runs; name one'),
    ('RUN --langs en yo', 'test-yo.tsv'), ('RUN --data nowhere', 'nowhere'),
    ('RUN BROKEN --max-eval 3', 'BROKEN: cannot be loaded'),
    ('RUN --batch 3', f'--batch {NOTHING}'), ('RUN --eps 3', f'--eps {NOTHING}'),
    ('RUN --radii 3', f'--radii {NOTHING}'), ('RUN --steps 3', f'--steps {NOTHING}'),
    ('RUN -o p.png', f'--output {NOTHING}'),
    ('RUN --smooth 3 -o p.png', f'--output {NOTHING}'),
    ('RUN --langs en -o p.png', f'--output {NOTHING}'),
    ('RUN --generalized --predictions P', f'--predictions {NOTHING}'),
    ('RUN --langs en --eps 0.5', f'--eps {NOTHING}'), ('RUN --smooth 2 --steps 3', f'--steps {NOTHING}'),
    ('RUN --smooth 3 --regions', 'not allowed with'), ('RUN --generalized --smooth 2', 'not allowed with'),
    ('RUN --smooth 0', 'expected 1'), ('RUN --regions --radii -1', 'expected'), ('', 'required'),
    ('RUN --steps 0 --regions', 'expected 1'), ('RUN --task sample', 'unrecognized arguments: --task'),
    ('RUN --float32', 'unrecognized'), ('RUN --seed 1', 'unrecognized')]


@pytest.fixture(scope='session')
def runs(finished, tmp_path_factory):
    """A folder with the runs that WRONG names."""
    folder = tmp_path_factory.mktemp('runs')
    for name, source in (('RUN', finished('rs_r')), ('PLAIN', finished('plain', 'plain', None)),
                         ('OTHER', finished('rs_r')), ('BROKEN', finished('rs_r'))):
        shutil.copytree(source, folder / name)
    (folder / 'LINES.jsonl').write_text((folder / 'RUN/results.json').read_text())
    change(folder / 'OTHER/results.json', b'"lr": 2', b'"lr": 9')
    change(folder / 'BROKEN/model.safetensors', None, b'half')
    return folder


@pytest.mark.parametrize('words, message', WRONG)
def test_what_cannot_be_done_is_one_line_before_anything_is_measured(words, message, runs, monkeypatch,
                                                                     capsys):
    """An InputError for a notebook too, argparse's errors as well."""
    monkeypatch.chdir(runs)
    monkeypatch.setattr(evaluate, 'predict', None)
    before = contents(runs)
    with pytest.raises(data.InputError, match=message) as error:
        evaluate.main(words.split())
    assert '\n' not in str(error.value) and contents(runs) == before and not capsys.readouterr().out


def test_the_help_has_a_word_for_every_flag(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(['--help'])
    printed = capsys.readouterr().out
    assert 'default: None' not in printed
    for flag in ('--generalized --smooth --regions --radii --steps --eps --langs --data --max-eval --batch '
                 '--predictions --output').split():
        assert flag in printed


def test_what_was_measured_is_printed_where_a_later_language_fails(finished, monkeypatch, capsys):
    """And memory that does not suffice is one line that names --batch; a fault of the code stays one."""
    predict = evaluate.predict
    batch = 'out of memory.*; try a smaller --batch than 64$'
    for error, raised, message in (
            (InterruptedError('stopped'), InterruptedError, 'stopped'),
            (MemoryError(), data.InputError, batch),
            (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate'), data.InputError, batch),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory"), data.InputError, batch),
            (RuntimeError('shape'), RuntimeError, '^shape$')):
        def failing(*args, desc, error=error, **options):
            if desc == 'test-x2':
                raise error
            return predict(*args, desc=desc, **options)
        monkeypatch.setattr(evaluate, 'predict', failing)
        with pytest.raises(raised, match=message) as found:
            evaluate.main([str(finished('rs_r')), '--langs', 'en', 'x1', 'x2', 'x3'])
        (_, rows), = tables(capsys.readouterr().out)
        score = evaluate.accuracy(record_of(finished('rs_r'))['test_marks']['x1'])
        assert rows['test']['x1'] == f'{score:.1f}' and rows['test']['x2'] == '-'
        assert '\n' not in str(found.value)


def test_tables_need_neither_model_nor_data(finished, tmp_path):
    """Folders and lines may stand side by side; a script prints them and ends well, or in one line."""
    lines = [(finished(*run) / 'results.json').read_text() for run in (('rs_r',), ('plain', 'plain', None))]
    (tmp_path / 'runs.jsonl').write_text(''.join(lines))
    for names, code, out, err in (([tmp_path / 'runs.jsonl', finished('rs_r')], 0, '| rs_r-0.1 ', ''),
                                  ([tmp_path, '--batch', '0'], 1, '', '--batch: 0: expected 1 or above')):
        ended = subprocess.run([sys.executable, HERE / 'evaluate.py', *names], capture_output=True, text=True,
                               env=ENVIRONMENT)
        assert ended.returncode == code and 'Traceback' not in ended.stderr
        assert out in ended.stdout and err in (ended.stderr.strip().splitlines() or [''])[-1]
        assert bool(out) == bool(ended.stdout) and bool(err) == bool(ended.stderr), ended.stderr


# ---------------------------------------------------------------- results/speed.py

@pytest.fixture(scope='session')
def speed():
    """results/speed.py as a module."""
    spec = importlib.util.spec_from_file_location('speed', HERE / 'results/speed.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    assert run.own['m'] == 10 and run.max_steps == 1


def test_the_rates_of_a_machine_that_takes_a_second_for_each_piece_of_work(speed, monkeypatch):
    class Timer:
        def __init__(self, work, globals, num_threads):
            exec(work, globals)
            self.moved = '@' in work or torch.equal(globals['c'], globals['d'])

        def blocked_autorange(self, min_run_time):
            return types.SimpleNamespace(median=1.0 if self.moved else math.nan)
    monkeypatch.setattr(speed, 'Timer', Timer)
    # A read and a write a number.
    assert speed.rates_of(torch.device('cpu'), torch.float32) == [2 * 2048 ** 3, 2 * 4 * 2 ** 26]


def test_each_method_is_set_beside_its_baselines(small, speed, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speed, 'rates_of', lambda device, dtype: (1e9, 2e9))
    monkeypatch.setattr(speed, 'ROUNDS', 1)
    trained = []
    train_loop = train.train
    monkeypatch.setattr(train, 'train', lambda *words: trained.append(words) or train_loop(*words))
    speed.main(['--task', 'sample', '--data', str(small), '--method', 'plain', 'rs_a'])
    floor, *rows = capsys.readouterr().out.splitlines()
    work, moved = map(float, re.fullmatch(
        r'floor: 3 x (\S+) GFLOP a pair at 1 GFLOP/s, (\S+) GB a step at 2 GB/s', floor).groups())
    table = {row[:20].strip(): row[20:] for row in rows}
    rate = {name: float(row.split()[0]) for name, row in table.items()}
    assert list(table) == ['training, XTREME', 'evaluation, XTREME', 'evaluation', 'training, plain',
                           'training, rs_a']

    def holds(name, pattern, expected, tolerance):
        assert float(re.search(pattern, table[name])[1]) == pytest.approx(expected, rel=tolerance)
    for name in table:
        holds(name, r'pairs/s, +(\S+) times XTREME', rate[name] / rate[name.split(',')[0] + ', XTREME'], 0.02)
    holds('training, rs_a', r'(\S+) times the step of plain',
          rate['training, plain'] / rate['training, rs_a'], 0.02)
    holds('training, plain', r'of the floor \((\d+)\)', 1 / (3 * work + moved / 64 / 2), 0.02)
    holds('evaluation', r'of the floor \((\d+)\)', 1 / work, 0.02)
    assert not list(tmp_path.iterdir())
    for words, method in zip(trained, ('plain', 'rs_a'), strict=True):
        run, copies = words[4], words[5]
        assert (run.method, run.max_steps, copies is not None) == (method, 16, method == 'rs_a')
        assert not Path(run.out).exists()


# ---------------------------------------------------------------- the claim of the paper, in the sample world

@pytest.fixture(scope='session')
def trained(begun):
    """Runs on the sample world cut down to 1,000 of 2,500 steps -> their folders by name."""
    folders = {}
    for name, (process, folder) in begun.items():
        assert process.wait() == 0, (folder / 'log').read_text()
        folders[name] = folder / 'run'
    return folders


def test_the_claim_of_the_paper_in_the_sample_world(trained):
    """plain falls with a language's distance; rs_r and adv fall less, adv by a checkpoint of its own."""
    records = {name: record_of(folder) for name, folder in trained.items()}
    near = [records['plain']['test'][lang] for lang in ('en', 'x1', 'x2', 'x3')]
    assert near[0] > 95 and near == sorted(near, reverse=True) and near[3] < 80
    targets = {}
    for name, record in records.items():
        assert record['test']['en'] > 90
        targets[name] = sum(score for lang, score in record['test'].items() if lang != 'en') / 6
    assert targets['rs_r'] > targets['plain'] + 5 and targets['adv'] > targets['plain'] + 2
    assert records['adv']['step'] == 1000


def test_the_robust_regions_of_the_sample_world(trained, call):
    """At radius 0.01 those that were trained for it hold out under attack, plain does not."""
    printed = call('evaluate --regions --langs en x1 --radii 0 0.01 --max-eval 200', *trained.values()).out
    found = {name: rows for name, (_, rows) in zip(trained, tables(printed), strict=True)}
    for lang in ('en', 'x1'):
        attacked = {name: float(rows['attack 0.01'][lang]) for name, rows in found.items()}
        assert attacked['adv'] > attacked['plain'] + 10 and attacked['rs_r'] > attacked['plain'] + 10
        for name, folder in trained.items():
            clean = record_of(folder)['test_marks'][lang][:200].count('1') / 2
            assert float(found[name]['noise 0'][lang]) == float(found[name]['attack 0'][lang]) == clean
            assert clean > attacked[name]


# ---------------------------------------------------------------- what a user does wrong

TRAIN = 'train --task sample --data D --max-steps 1 --out new --method '
BAD = [     # the command, what is broken before it (file, old, new), what its one line says
    (TRAIN + 'plain --model run', [('run/model.safetensors', None, b'half')], 'run: cannot be loaded'),
    (TRAIN + 'plain --model run', [('run/config.json', None, b'{')], 'run: cannot be loaded'),
    (TRAIN + 'rs_a --synonyms s.json', [('s.json', None, b'cat dog')], 's.json: not JSON'),
    (TRAIN + 'rs_a --synonyms s.json', [('s.json', None, b'\xff\xfe')], 's.json:1: not UTF-8'),
    (TRAIN + 'rs_a --synonyms s.json', [('s.json', None, b'["cat"]')], 's.json: a JSON list; expected'),
    (TRAIN + 'rs_a --synonyms s.json', [('s.json', None, b'{"cat": [1, 2]}')],
     "s.json: 'cat' has .1, 2.; expected a list of words"),
    (TRAIN + 'plain', [('D/sample/train-en.tsv', None, b'a\tb\n')],
     'train-en.tsv: no labels; training needs them'),
    (TRAIN + 'plain', [('D/sample/train-en.tsv', None, b'')], 'train-en.tsv: empty'),
    (TRAIN + 'plain', [('D/sample/dev-en.tsv', b'paraphrase', b'maybe')],
     r"dev-en.tsv:\d+: label 'maybe'; expected one of different"),
    (TRAIN + 'plain', [('D/sample/test-x3.tsv', b'\t', b' ')],
     'test-x3.tsv:1: 2 columns|test-x3.tsv:2: 3 columns'),
    (TRAIN + 'plain', [('D/sample/test-x6.tsv', b'\n', b'\xff\n')], 'test-x6.tsv:1: not UTF-8'),
    (TRAIN + 'plain', [('D/sample/test-x6.tsv', None, None)], 'test-x6.tsv: no such file'),
    (TRAIN.replace('new', 'run/config.json') + 'plain', [], 'config.json: .*(Not a directory|File exists)'),
    (TRAIN.replace('new', 'D/sample/dev-en.tsv/x') + 'plain', [], 'Not a directory'),
    ('evaluate nowhere D', [], '^nowhere D: no finished run of train.py'),
    ('evaluate run', [('run/results.json', None, b'[]')], '^run: .*; expected a record of this train.py'),
    ('evaluate run', [('run/results.json', b'"test_marks"', b'"mark"')], "^run: KeyError.'test_marks'"),
    ('evaluate run', [('run/results.json', b'"method": "plain"', b'"method": "fgsm"')], "KeyError.'fgsm'"),
    ('evaluate lines.jsonl', [('lines.jsonl', None, b'{"args": {}}\n')], '^lines.jsonl:1: .*; expected a'),
    ('evaluate run --langs de', [], 'test-de.tsv'),
    ('evaluate run --langs en', [('run/config.json', None, b'{')], 'run: cannot be loaded'),
    ('synonyms nowhere --show cat', [], 'nowhere: No such file'),
    ('data pawsx x.zip --data D', [('x.zip', None, b'')], 'x.zip: expected an archive of pawsx'),
    ('data pawsx x-final.tar.gz --data D', [], 'x-final.tar.gz: not the archive of .*No such file'),
    ('data pawsx x-final.tar.gz --data D', [('x-final.tar.gz', None, b'<html>')],
     'not the archive.*fetch it again'),
]


@pytest.fixture(scope='session')
def place(small, tmp_path_factory):
    """A folder with the small world, D, and in it a finished run."""
    folder = tmp_path_factory.mktemp('place')
    shutil.copytree(small, folder / 'D')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main('--task sample --method plain --data D --out run --max-steps 1'.split())
    return folder


@pytest.mark.parametrize('command, broken, message', BAD, ids=range(len(BAD)))
def test_bad_input_gives_one_line_and_leaves_nothing(command, broken, message, place, tmp_path, monkeypatch,
                                                     call):
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    for path, old, new in broken:
        (tmp_path / path).unlink() if new is None else change(tmp_path / path, old, new)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(data.InputError) as error:
        try:
            call(command)
        except OSError as failure:      # run_script makes its line of it
            assert failure.filename
            raise data.InputError(f'{failure.filename}: {failure.strerror}') from None
    line = str(error.value)
    assert '\n' not in line and re.search(message, line), line
    assert contents(tmp_path) == before


# ---------------------------------------------------------------- distance.py

CORPUS = [(['a'], ['x']), (['a', 'b'], ['x', 'y'])]


def test_one_iteration_of_the_aligner_by_hand():
    """Columns: null, a (, b); with two words |i/m - j/n| is 0 or 1/2, lambda 4."""
    (one, two), source = distance.entries_of(CORPUS)
    assert one.shape == (1, 2) and two.shape == (2, 3) and source.tolist() == [0, 1, 2, 0, 1, 2]
    assert distance.apart(2, 2).tolist() == [[0, 0.5], [0.5, 0]]
    near = 0.92 / (1 + math.exp(-2))
    far = 0.92 - near
    theta = torch.full((len(source),), 0.25, dtype=torch.double)
    first, second = distance.posterior(one, theta, 4.0), distance.posterior(two, theta, 4.0)
    assert first.tolist() == [pytest.approx([0.08, 0.92])]
    assert second.tolist() == [pytest.approx([0.08, near, far]), pytest.approx([0.08, far, near])]
    counts = torch.zeros(len(source), dtype=torch.double)
    for entry, found in ((one, first), (two, second)):
        counts.index_add_(0, entry.flatten(), found.flatten())
    theta = distance.maximise(counts, source)

    def bayes(count, total, words):
        values = torch.tensor([count + 0.01, total + 0.01 * words], dtype=torch.double).digamma()
        return pytest.approx((values[0] - values[1]).exp().item())
    assert theta[one][0].tolist() == [bayes(0.16, 0.24, 2), bayes(0.92 + near, 0.92 + 0.92, 2)]
    assert theta[two][1].tolist() == [bayes(0.08, 0.24, 2), bayes(far, 1.84, 2), bayes(near, 0.92, 2)]
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


def test_the_tension_has_the_right_slope():
    """Against the difference quotient of the expected log prior, the null word's part left out."""
    entries, source = distance.entries_of(random_corpus(50)[0])
    theta, sums = torch.rand(len(source), dtype=torch.double), {}
    for posterior in [distance.posterior(entry, theta, 3.0) for entry in entries]:
        sums[posterior.shape] = sums.get(posterior.shape, 0) + posterior
    assert len(sums) < len(entries)

    def expected(tension):
        total = words = 0
        for (m, columns), posterior in sums.items():
            total += (posterior * distance.prior(m, columns - 1, tension).log())[:, 1:].sum().item()
            words += posterior.sum().item()
        return total / words
    quotient = (expected(3.001) - expected(2.999)) / 0.002
    assert distance.tension_slope(sums, 3.0) == pytest.approx(quotient, rel=1e-5)


def test_four_m_steps_and_three_tension_updates(monkeypatch):
    """As fast_align's five iterations, whose last only decodes; the tension follows the corpus."""
    calls = []
    for name in ('maximise', 'tension_slope'):
        def counted(*args, name=name, function=getattr(distance, name)):
            calls.append(name)
            return function(*args)
        monkeypatch.setattr(distance, name, counted)
    straight, shuffled = random_corpus(100, shuffled=False)[0], random_corpus(100)[0]
    assert distance.fit(*distance.entries_of(straight))[1] > 8
    assert calls.count('maximise') == 4 and calls.count('tension_slope') == 24
    assert distance.fit(*distance.entries_of(shuffled))[1] < 2
    assert distance.fit(*distance.entries_of([(f, e[::-1]) for f, e in straight]))[1] == 0.1     # the bound


def test_a_known_dictionary_is_found_and_words_without_a_counterpart_go_to_the_null_word():
    """Six words of 26, their translations, and a Z that no word explains: mostly it has no link."""
    pairs, truth = random_corpus(300)
    assert [set(line) for line in distance.align(pairs)] == truth
    rng, pairs = random.Random(0), []
    for _ in range(200):
        source = rng.sample('abcdefghijklmnopqrstuvwxyz', 6)
        pairs.append((source, [word.upper() + '.' for word in source] + ['Z']))
    links = distance.best_links(pairs)
    assert all({(k, k) for k in range(6)} <= line and all(j >= 0 for j, _ in line) for line in links)
    assert 100 < sum(len(line) == 6 for line in links) < 200


def test_both_directions_are_intersected(monkeypatch):
    # the reverse as (i, j)
    given = {'a': [{(0, 0)}, {(0, 1), (1, 0), (0, 0)}], 'x': [set(), {(1, 0), (0, 0), (1, 1)}]}
    monkeypatch.setattr(distance, 'best_links', lambda pairs: given[pairs[0][0][0]])
    assert distance.align(CORPUS) == [[], [(0, 0), (0, 1)]]


def test_empty_sides_and_long_sentences_do_no_harm_and_sentences_are_no_words():
    links = distance.align([([], ['x']), (['a'], []), ([], []), (['.'] * 200, ['.'] * 200), (['a'], ['x'])])
    assert links[:3] == [[], [], []] and (0, 0) in links[4]
    assert distance.align([([], [])]) == distance.align([([], ['x'])]) == [[]] and distance.align([]) == []
    for pair in (('a b', 'x y'), (['a'], 'x'), ('a', ['x'])):
        with pytest.raises(data.InputError, match='align takes a list of .source words, target words.'):
            distance.align([pair])


def test_align_prints_links_of_a_file(tmp_path, call):
    """BOM, CRLF and blank last lines; U+3000 and U+2028 are part of words, or words."""
    path, text = tmp_path / 'text', 'a\tb ||| x y\r\na ||| x\r\nb \u3000 a ||| y \u2028z x\r\n\r\n'
    path.write_bytes(b'\xef\xbb\xbf' + text.encode())
    assert list(distance.read_source_target(path)[2]) == [['b', '\u3000', 'a'], ['y', '\u2028z', 'x']]
    assert call('distance --align', path).out == '0-0 1-1\n0-0\n0-0 1-1 2-2\n'
    for text, message in (('a b ||| c\na b\n', "text:2: 'a b'; expected `source ||| target`"),
                          ('a ||| b ||| c', "text:1: 'a ||"), ('', 'text: empty')):
        path.write_text(text)
        with pytest.raises(data.InputError, match=re.escape(message)):
            call('distance --align', path)


@real
@pytest.mark.parametrize('name, aer', [('roen', 0.498), ('zhen', 0.497), ('jaen', 0.728)])
def test_alignment_error_rate_is_that_of_fast_align(name, aer):
    """AER (Och and Ney 2003) on gold; fast_align's: same text, -d -o -v both ways, intersection."""
    links = distance.align(distance.read_source_target(SHARED / f'data/alignment/{name}.src-tgt'))
    hits = size = 0
    for found, line in zip(links, open(SHARED / f'data/alignment/{name}.gold'), strict=True):
        sure, possible = set(), set()
        for link in line.split():
            j, i = link.replace('p', '-').split('-')
            (possible if 'p' in link else sure).add((int(j) - 1, int(i) - 1))
        hits += len(set(found) & sure) + len(set(found) & (sure | possible))
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
    (CATS, '', True, [], []),
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
    found = distance.embed(model, LETTERS, sentences, 'de', layer=layer)
    longest = evaluate.longest(model, LETTERS, 512)
    assert len(found[-1].words) == longest - 2 < 20
    for sentence, one in zip(sentences, found, strict=True):
        inputs = LETTERS(sentence, return_tensors='pt', truncation=True, max_length=longest)
        words, last = distance.words_in(sentence, inputs.encodings[0], True)
        with torch.no_grad():
            states = model.base_model(**inputs, output_hidden_states=True).hidden_states[layer][0]
            if layer == 0:
                states = model.get_input_embeddings()(inputs['input_ids'])[0]
        assert one.words == words and one.tokens.tolist() == inputs['input_ids'][0, last].tolist()
        assert one.vectors.dtype == torch.float32 and torch.allclose(one.vectors, states[last], atol=1e-5)
    assert distance.embed(model, LETTERS, sentences[:1], 'zh', layer=0)[0].words == list('eagb,h')
    rounded = distance.embed(model, LETTERS, sentences, 'de', layer=layer, dtype=torch.bfloat16)
    assert torch.equal(rounded[0].vectors, found[0].vectors) == (layer == 0)


def test_tokenizers_from_which_words_cannot_be_had_are_refused(model):
    gemma = tokenizers.Tokenizer(tokenizers.models.Unigram([('<unk>', -9.0), ('ein', -1.0), ('▁', -1.0)], 0))
    gemma.normalizer = tokenizers.normalizers.Replace(' ', '▁')
    gemma = transformers.PreTrainedTokenizerFast(tokenizer_object=gemma, pad_token='<unk>', name_or_path='g')
    slow = types.SimpleNamespace(is_fast=False, name_or_path='slow')
    for tokenizer, message in ((gemma, "g: its tokenizer takes 'ein ein' as one word; expected one that"),
                               (slow, 'slow: its tokenizer does not say where a token is')):
        with pytest.raises(data.InputError, match=message):
            distance.embed(model.eval(), tokenizer, ['ein ein'], 'de', layer=0)


def sentence(words, tokens, *vectors):
    return distance.Sentence(words.split(), torch.tensor(tokens), torch.tensor(vectors))


def test_aligned_words_are_compared(monkeypatch):
    """Links in both orders, a sentence without any; the same token on both sides is identical."""
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
    coordinates = [0, 0, 3, 4, 0.3, 0.5, 0.06, 0.08, 3, 4.5, 0.3, 0.5]
    assert found['deviation'] == pytest.approx(statistics.pstdev(coordinates))
    # A single sentence has no error, words that are all identical no others.
    same = distance.figures([torch.ones(1, 2)], [torch.ones(1, 2)], torch.tensor([True]))
    assert same['distance'] == same['random'] == 0 and math.isnan(same['standard error'])
    assert same['identical'] == 1 and math.isnan(same['eps 0.1'])
    links[:] = [[]] * 3
    with pytest.raises(data.InputError, match='de: no aligned words in 3 sentence pairs'):
        distance.compare('de', theirs, english)


def test_error_is_of_the_mean_over_sentences_and_random_words_are_any_english_ones():
    values = torch.randn(400, 1, generator=torch.Generator().manual_seed(0)) + 5
    for times in (1, 3):        # every word three times: the same sentences, and no more certain
        sentences = list(values.repeat_interleave(times, 0).split(times))
        no = torch.zeros(400 * times, dtype=torch.bool)
        found = distance.figures(sentences, [torch.zeros(times, 1)] * 400, no)
        assert found['standard error'] == pytest.approx(values.std().item() / 20)
    # Where aligned words are equal, a random one is as far as any two are: |x - y| has the mean 2 / sqrt(pi).
    equal = distance.figures(sentences, sentences, no)
    assert equal['distance'] == 0 == equal['largest'] and equal == distance.figures(sentences, sentences, no)
    assert equal['random'] == pytest.approx(1.128, rel=0.1)
    assert equal['random largest'] == pytest.approx(0.954, rel=0.1)


def test_parallel_sentences_count_once_and_placeholders_not_at_all():
    assert distance.parallel([('p', 'h1', 'P', 'H1'), ('p', 'h2', 'P', 'H2'), ('NS', 'h3', 'R', 'H3'),
                              ('q', ' ', 'Q', 'H4'), ('r', 'h4', 'S', 'NS')]) == [
        ('p', 'P'), ('q', 'Q'), ('r', 'S'), ('h1', 'H1'), ('h2', 'H2'), ('h3', 'H3')]


def test_the_sample_worlds_shifts_are_recovered(world, tmp_path, call):
    """Distances 0.05 k sqrt(64); what they are of stands in the file and above both tables."""
    printed = call('distance --task sample --layer 0 --max-sentences 300 --langs x6 en x1 --data', world,
                   '--out', tmp_path / 'out')
    written = json.loads((tmp_path / 'out/distances.json').read_text())
    setting, names = written['setting'], [f'test-{lang}.tsv' for lang in ('en', 'x1', 'x6')]
    far, near = (written['languages'].pop(lang) for lang in ('x6', 'x1'))
    assert not written['languages'] and setting['files'] == {
        name: data.digest(world / 'sample' / name) for name in names}
    assert [row['distance'] for row in (near, far)] == pytest.approx([0.4, 2.4], rel=0.02)
    assert near['random'] > near['distance'] and near['words'] > 850 and near['sentences'] == 300
    assert 0 < near['eps 0.1'] < 0.2 and 0.5 < far['eps 1'] < 1 and near['identical'] == 0
    table = [line for line in printed.out.splitlines() if line.startswith('|')]
    assert len(table) == 8 and re.match(r'\| x1 +\| +0\.4\d\d \|', table[3]) and 'device:' in printed.err
    assert printed.out.count(f'sample, layer 0 of {world}/sample/model, {setting["dtype"]}; English: '
                             'test-en.tsv; sentence pairs: 300') == 2


MEASURE = 'distance --task sample --data D --langs x1 x2 --max-sentences 20 '


@pytest.fixture
def measuring(small, tmp_path, monkeypatch):
    """A folder of one's own with the small world, D, as the current one."""
    shutil.copytree(small, tmp_path / 'D')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files_in(folder):
    return {str(path): path.read_bytes() for path in Path(folder).rglob('*') if path.is_file()}


def translations(*langs):
    """XTREME's translate-test files of the small world, here: the English sentences stand in them."""
    english = data.read_pairs('D/sample/test-en.tsv', 'sample')
    for lang in langs:
        lines = []
        for theirs, other in zip(data.read_pairs(f'D/sample/test-{lang}.tsv', 'sample'), english):
            lines.append('\t'.join([*theirs[:2], *other[:2], 'paraphrase']))
        Path(f'test-{lang}-en-translated.tsv').write_bytes(b'\xef\xbb\xbf' + '\r\n'.join(lines).encode())


def test_translations_in_place_of_the_english_file(measuring, call):
    translations('x3')
    english, folder = 'D/sample/test-en.tsv', Path('D/sample')
    for row in (distance.read_translations('test-x3-en-translated.tsv', 'sample')[7],
                distance.read_aligned(folder / 'test-x3.tsv', english, 'sample')[7]):
        assert list(row) == [*data.read_pairs(folder / 'test-x3.tsv', 'sample')[7][:2],
                             *data.read_pairs(english, 'sample')[7][:2]]
    Path(english).unlink()
    out = call('distance --task sample --layer 0 --langs x3 --data D --translations .').out
    assert 'English: .; sentence pairs: all' in out and re.search(r'\| x3 +\| +1\.[12]\d\d ', out)


def test_nothing_is_written_unless_out_says_where_and_what_to(measuring, call, monkeypatch):
    """The same measurement may replace itself, another may not: its line comes before the hours."""
    before = files_in('.')
    call(MEASURE + '--layer 0')
    assert files_in('.') == before
    call(MEASURE + '--layer 0 --out new/er')
    written = files_in('new')
    assert files_in('.').keys() - before.keys() == written.keys() == {'new/er/distances.json'}
    shutil.copytree('D/sample/model', 'same')
    call(MEASURE + '--layer 0 --out new/er --model same')       # an encoder is its weights
    assert json.loads(Path('new/er/distances.json').read_text())['model'] == 'same'
    call(MEASURE + '--layer 0 --out new/er')
    assert files_in('new') == written
    monkeypatch.setattr(distance, 'embed', None)
    translations('x1', 'x2')
    encoder = evaluate.load_encoder('D/sample/model', 'sample')[0].base_model
    encoder.get_input_embeddings().weight.data[5] += 1
    shutil.copytree('same', 'other')
    encoder.save_pretrained('other')
    for other in ('--layer 1', '--model other', '--max-sentences 21', '--langs x1', '--translations .', ''):
        if not other:
            change('D/sample/test-en.tsv', b'n\t', b'\t')
        with pytest.raises(data.InputError, match='^new/er/distances.json: measured otherwise'):
            call(MEASURE + '--layer 0 --out new/er ' + other)
    assert files_in('new') == written
    monkeypatch.setattr(tempfile, 'TemporaryFile', lambda dir: 1 / 0)      # as in a folder that is read-only
    with pytest.raises(ZeroDivisionError):
        call(MEASURE + '--out new/er')


@pytest.mark.parametrize('held', ['half', '[]', '{"task": "sample"}'])
def test_what_is_no_measurement_of_this_program_is_refused(held, tmp_path):
    (tmp_path / 'distances.json').write_text(held)
    with pytest.raises(data.InputError, match='distances.json: measured otherwise'):
        distance.check_out(tmp_path, {'task': 'sample'})


def test_the_command_line_reaches_the_encoder(measuring, call, monkeypatch):
    seen = []

    def spied(model, *args, embed=distance.embed, **more):
        seen.append(more | {'training': model.training})
        return embed(model, *args, **more)
    monkeypatch.setattr(distance, 'embed', spied)
    types_of = {True: torch.float32, False: torch.bfloat16}
    monkeypatch.setattr(evaluate, 'choose_device', lambda float32: (torch.device('cpu'), types_of[float32]))
    for flag, dtype in (('--float32', torch.float32), ('', torch.bfloat16)):
        with pytest.raises(data.InputError, match='measured otherwise') if seen else contextlib.nullcontext():
            call(MEASURE + f'--langs x1 --layer 1 --out new {flag}')
        call(MEASURE + f'--langs x1 --layer 1 {flag}')
        assert seen[-2:] == [{'layer': 1, 'dtype': dtype, 'training': False}] * 2


@pytest.mark.parametrize('error, raised, message', [
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
     data.InputError, 'out of memory.*can.t allocate memory.*; try fewer --max-sentences'),
    (KeyboardInterrupt('stop'), KeyboardInterrupt, 'stop'), (RuntimeError('ours'), RuntimeError, 'ours')])
def test_what_was_measured_stays_when_a_later_one_fails(error, raised, message, measuring, monkeypatch, capsys):
    def failing(lang, *sides, compare=distance.compare):
        if lang == 'x2':
            raise error
        return compare(lang, *sides)
    monkeypatch.setattr(distance, 'compare', failing)
    for langs in (['x1', 'x2'], ['x2']):        # of nothing there are no tables
        with pytest.raises(raised, match=message):
            distance.main([*MEASURE.split()[1:], '--out', 'new', '--langs', *langs])
        out = capsys.readouterr().out
        assert out.count('| x1 ') == out.count(': sample, ') == 2 * (len(langs) - 1) and '| x2 ' not in out
        if len(langs) == 2:
            assert list(json.loads(Path('new/distances.json').read_text())['languages']) == ['x1']
            shutil.rmtree('new')


DISTANCE_BAD = [     # more of the command, what is broken before it (file, old, new), what its one line says
    ('--langs yo', [], 'test-yo.tsv: No such file'), ('--langs en', [], 'distances are from English'),
    ('', [('D/sample/test-x6.tsv', b'\r\n', b'\r\na\tb\tdifferent\r\n')],
     'test-x6.tsv: 31 rows; expected 30, translations of test-en.tsv'),
    ('--langs x1 yo', [('D/sample/test-yo.tsv', None, b'NS\t \tparaphrase\n' * 30)],
     'test-yo.tsv: empty or NS in every row'),
    ('--translations D', [], 'D/test-x1-en-translated.tsv: No such file'),
    ('--translations . --langs x1',
     [('test-x1-en-translated.tsv', None, b'p\th\tP\tH\tparaphrase\np\th\tP\tH')],
     r"test-x1-en-translated.tsv:2: 'p.*; expected five columns: premise, hypothesis, their English"),
    ('--translations . --langs x1', [('test-x1-en-translated.tsv', None, b'paraphrase\tp\th\tP\tH\n')],
     r"test-x1-en-translated.tsv:1: 'para.*; expected five columns"),
    ('--layer 9', [], 'layer 9'), ('--model nowhere', [], 'nowhere: '),
    ('--model D/sample/model', [('D/sample/model/model.safetensors', None, b'half')], 'cannot be loaded'),
    ('--out D/sample/test-en.tsv/new', [], 'Not a directory.*D/sample/test-en.tsv'),
    ('--out D/sample/test-en.tsv', [], 'File exists.*D/sample/test-en.tsv'),
    ('--out .', [('distances.json', None, b'{"task": "sample"}')], '^distances.json: measured otherwise'),
    ('-o f.png', [], '-o is the picture of --runs'), ('--align D', [], 'not allowed with'),
    ('--runs runs.jsonl -o f.gif', [], 'expected FILE.png or FILE.svg'),
    ('--runs runs.jsonl -o no/f.png', [], 'no such folder'),
    ('--runs D', [], 'D'), ('--runs nowhere', [], 'nowhere'), ('--max-sentences 0', [], 'expected 1')]


@pytest.mark.parametrize('more, broken, said', DISTANCE_BAD, ids=range(len(DISTANCE_BAD)))
def test_what_can_be_tried_is_tried_before_anything_is_measured(more, broken, said, measuring, monkeypatch, call):
    """As a notebook calls it: one line comes out, nothing exits, and nothing is left behind."""
    monkeypatch.setattr(distance, 'embed', None)
    jsonl('runs.jsonl', *PLAIN, *ROBUST)
    for path, old, new in broken:
        change(path, old, new)
    before = files_in('.')
    with pytest.raises((data.InputError, OSError)) as error:        # run_script makes its line of an OSError
        call('distance --task sample --data D ' + more)
    line = str(error.value)
    assert '\n' not in line and re.search(said, line), line
    assert files_in('.') == before


def test_rank_correlation_by_hand():
    """p is the share of 100,000 orders, and of the given one, that are as extreme."""
    for x, y, rho, p in (([1, 2, 3], [10, 20, 40], 1, 2 / 6), ([1, 2, 3, 4], [4, 3, 2, 1], -1, 2 / 24),
                         ([1, 2, 3, 4], [1, 3, 2, 4], 1 - 6 * 2 / (4 * 15), 8 / 24),
                         # Ties share the mean of their ranks: (1.5, 1.5, 3, 4) against (1, 2, 3, 4).
                         ([1, 1, 2, 3], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5), 4 / 24),
                         # What has no gain has no rank.
                         ([9, 1, 2, 3], [math.nan, 10, 20, 40], 1, 2 / 6)):
        found = distance.rank_correlation(x, y)
        assert found[0] == pytest.approx(rho) and found[1] == pytest.approx(p, abs=0.004)
    # Equal but for the last bit is a tie too: 0.1 + 0.2 is not 0.3.
    assert distance.rank_correlation([1, 2, 3, 4], [0.1 + 0.2, 0.3, 0.5, 0.7]) == distance.rank_correlation(
        [1, 2, 3, 4], [0.3, 0.3, 0.5, 0.7])
    assert distance.rank_correlation(range(12), range(12)) == pytest.approx((1, 1 / 100_001))     # never 0
    for constant in ([3, 3, 3], [], [7]):
        assert all(map(math.isnan, distance.rank_correlation(range(len(constant)), constant)))


def run_of(method, seed, right, eps=None, **changes):
    """A record: of 100 test items a language, so many are right; x4 has no labels."""
    variant = {'method': method} | ({} if eps is None else {'eps': eps})
    marks = {lang: '1' * n + '0' * (100 - n) for lang, n in zip(('en', 'x1', 'x2', 'x3'), right)}
    setting = {'task': 'sample', 'model': 'm', 'train-en.tsv': 't', 'steps': 600, 'dtype': 'float32'}
    return {'setting': setting, 'variant': variant, 'seed': seed, 'args': variant | setting | {'seed': seed},
            'name': '-'.join(map(str, [*variant.values(), f'seed{seed}'])), 'made_by': {'device': 'CPU'},
            'dev': 80.0, 'step': 500, 'steps': 600, 'history': [], 'test': dict(zip(marks, right)),
            'test_marks': marks | {'x4': None}, 'dev_marks': {'en': '10'},
            'answers': {'en': [50, 50]}} | changes


def jsonl(path, *records):
    Path(path).write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


def of_setting(records, **changes):
    return [record | {'setting': record['setting'] | changes} for record in records]


PLAIN = [run_of('plain', seed, [90, 70, 60, 50 + seed]) for seed in (1, 2)]
ROBUST = [run_of('rs_r', seed, [90, 71, 64, 56 + seed], eps=0.1) for seed in (1, 2)]
WORSE = [run_of('rs_r', seed, [90, 90, 60, 50], eps=1.0, dev=70.0) for seed in (1, 2)]
FLAT = [run_of('rs_a', seed, [91, 71, 61, 51 + seed]) for seed in (1, 2)]
STUCK = {'answers': {'en': [2, 98]}}


@pytest.mark.parametrize('records, seeds, points, marked', [        # marked: rs_r and rs_a
    ([*ROBUST, *WORSE, *PLAIN], 2, [4, 6, 1], [False, False]),      # the eps that English dev chooses
    ([*PLAIN, *WORSE], 2, [0, -1.5, 20], [False, False]),           # the one eps that is named
    ([PLAIN[1], *ROBUST], 1, [4, 6, 1], [False, False]),            # of seeds in common
    ([*PLAIN, ROBUST[0] | STUCK, ROBUST[1]], 2, [4, 6, 1], [True, False]),
    ([PLAIN[0], PLAIN[1] | STUCK, *ROBUST], 2, [4, 6, 1], [True, True])])
def test_gains_stand_in_the_order_of_the_distances(records, seeds, points, marked, tmp_path):
    compared = distance.comparable([jsonl(tmp_path / 'runs.jsonl', *records, *FLAT)], 'sample')
    gain, other = distance.gains_of(*compared, {'x4': 0.5, 'x2': 1.0, 'x3': 2.0, 'x1': 3.0})
    assert gain.points[1:] == pytest.approx(points) and math.isnan(gain.points[0]) and gain.n == seeds
    assert gain.rho == pytest.approx(0.5 if points[2] == 20 else -0.5) and gain.p == pytest.approx(1)
    assert gain.name.startswith('rs_r') and [row.name.endswith(' †') for row in (gain, other)] == marked


def test_figure_2_from_runs(world, tmp_path, call, monkeypatch):
    pytest.importorskip('matplotlib', reason='the figure alone needs matplotlib')
    drawn = []
    monkeypatch.setattr(evaluate, 'save_picture', lambda figure, path: drawn.append((figure, path)))
    runs = jsonl(tmp_path / 'runs.jsonl', *PLAIN, *ROBUST, *WORSE, *FLAT)
    out = call(f'distance --task sample --data {world} --layer 0 --max-sentences 50 --langs x3 x1 x2 x4 '
               f'--runs {runs} -o {tmp_path}/f.png').out
    table, rows = out[out.index('sample: accuracy gained over plain'):], {}
    for line in table.splitlines():
        if line.startswith('|') and '--' not in line:
            name, *cells = [cell.strip() for cell in line.strip('|').split('|')]
            rows[name] = cells
    assert list(rows) == ['', 'x1', 'x2', 'x3', 'x4', 'n', 'rank correlation', 'p']     # from near to far
    assert rows[''][0] == 'distance' and rows['x4'][1:] == ['-', '-'] and rows['x3'][0][:3] == '1.2'
    points, half = evaluate.gain(ROBUST, PLAIN, ['x2'])
    assert rows['x2'][1] == f'+4.0 ±{half[0]:.1f}' and rows['x2'][2][:6] == '+1.0 ±'
    # The gains 1, 4, 6 rise with the distance: 2 of 6 orders are as extreme; those of rs_a are constant.
    assert rows['n'] == ['-', '2', '2'] and rows['rank correlation'] == ['-', '+1.00', '+nan']
    assert rows['p'] == ['-', '0.33', 'nan'] and 'another encoder than these runs began with' in table
    (figure, path), = drawn
    axes, = figure.axes
    curve, flat = axes.containers
    points, others = curve.lines[0], flat.lines[0]
    assert str(path) == str(tmp_path / 'f.png') and points.get_ydata()[:3] == pytest.approx([1, 4, 6])
    assert points.get_xdata() == pytest.approx([0.4, 0.8, 1.2, 1.6], abs=0.04)
    assert (points.get_xdata() < others.get_xdata()).all()          # side by side
    (_, low), (_, high) = curve.lines[2][0].get_segments()[1]       # the interval of x2
    assert (high - low) / 2 == pytest.approx(half[0].item())
    assert points.get_color() != others.get_color() and points.get_marker() != others.get_marker()
    label = figure.legends[0].get_texts()[0].get_text()
    assert label == f'{rows[""][1]}, n = 2, rank correlation +1.00, p = 0.33'
    codes = {text.get_text().strip(): text.get_position()[0] for text in axes.child_axes[0].get_xticklabels()}
    assert codes == pytest.approx({'x1': 0.4, 'x2': 0.8, 'x3': 1.2, 'x4': 1.6}, abs=0.03)
    assert any(list(line.get_ydata()) == [0, 0] for line in axes.lines)             # the zero line
    assert 'layer 0' in axes.get_title() and 'points' in axes.get_ylabel()


def test_runs_of_this_encoder_and_of_one_seed(world, tmp_path, call):
    """Without an interval there is no ±."""
    pytest.importorskip('matplotlib', reason='the figure alone needs matplotlib')
    own = evaluate.fingerprint(*evaluate.load_encoder(str(world / 'sample/model'), 'sample'))
    runs = jsonl(tmp_path / 'runs.jsonl', *of_setting([PLAIN[0], ROBUST[0]], model=own))
    out = call(f'distance --task sample --data {world} --max-sentences 20 --langs x1 --runs', runs,
               '-o', tmp_path / 'f.png').out
    assert 'another encoder' not in out and '| +1.0 |' in re.sub(' +', ' ', out)
    assert (tmp_path / 'f.png').read_bytes()[:4] == b'\x89PNG'


WANTED = 'expected runs of sample, of plain and of a robust method'


@pytest.mark.parametrize('records, message', [
    ([*PLAIN, *of_setting(ROBUST, steps=9)], 'does not belong with'),
    (of_setting(PLAIN + ROBUST, task='pawsx'), WANTED),
    (PLAIN, WANTED), (ROBUST + FLAT, WANTED), ([PLAIN[0], ROBUST[1]], 'rs_r.*: no seed in common')])
def test_runs_that_cannot_be_compared_are_refused_before_anything_is_measured(records, message, tmp_path,
                                                                              call, monkeypatch):
    monkeypatch.setattr(distance, 'distances', None)
    with pytest.raises(data.InputError, match=message):
        call('distance --task sample --runs', jsonl(tmp_path / 'runs.jsonl', *records))
