"""Tests of what the code claims, against hand computation, closed forms and the library it rests on.

In the order of the rooms: robust, synonyms, data, train, evaluate, distance; then what a user does wrong.
"""

import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import socket
import stat
import statistics
import subprocess
import sys
import tarfile
import textwrap
import time
import types
import zipfile
from fractions import Fraction
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
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
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}
torch.set_num_threads(1)        # as the processes that tests start: another number sums in another order

SIZE = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=20, pad_token_id=1, num_labels=3)


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


@pytest.fixture
def call(monkeypatch, capsys):
    """call('train --task sample ...') runs a script's main in this process -> what it printed (out, err)."""
    def call(command, *more):
        script, *words = command.split()
        monkeypatch.setattr(sys, 'argv', [f'{script}.py', *words, *map(str, more)])
        evaluate.say.cache_clear()
        globals()[script].main()
        return capsys.readouterr()
    return call


@pytest.fixture
def run(small, tmp_path, call):
    """run(name, flags): train.py on the small world -> (run folder, its record)."""
    def run(name, flags, folder=small):
        call(f'train --task sample {flags}', '--data', folder, '--out', tmp_path / name)
        return tmp_path / name, record_of(tmp_path / name)
    return run


def record_of(folder):
    return json.loads((folder / 'results.json').read_text())


def change_record(folder, **changes):
    """What an older or another program could have written there."""
    record = record_of(folder)
    (folder / 'results.json').write_text(json.dumps(record | changes) + '\n')


# ---------------------------------------------------------------- robust.py

@pytest.fixture(params=[(BertConfig, BertForSequenceClassification),
                        (XLMRobertaConfig, XLMRobertaForSequenceClassification)], ids=['bert', 'xlm-r'])
def model(request):
    """A tiny random classifier in training mode, dropout on."""
    config, architecture = request.param
    torch.manual_seed(0)
    return architecture(config(**SIZE, initializer_range=0.3)).train()


@pytest.fixture
def batch():
    ids = torch.tensor([[2, 5, 6, 7, 8, 3], [2, 9, 10, 3, 1, 1]])
    return {'input_ids': ids, 'attention_mask': (ids != 1).long(), 'labels': torch.tensor([0, 2])}


def generator():
    return torch.Generator().manual_seed(7)


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


def test_padding_carries_no_delta_whatever_the_head_sees_of_it():
    batch = {'input_ids': torch.tensor([[1, 2, 0]]), 'attention_mask': torch.tensor([[1, 1, 0]]),
             'labels': torch.tensor([0])}       # Linear takes the mean over padding too
    delta = robust.worst_delta(Linear(), batch, eps=0.5, steps=4, generator=generator())
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


def test_noise_that_does_not_arrive_is_refused(model, batch):
    delta = robust.uniform_delta(model, batch, 0.1, generator=generator())
    with pytest.raises(data.InputError, match='its word embeddings were run 0 times in place of 1'):
        with robust.perturbed(model, delta):
            pass
    with pytest.raises(data.InputError, match='its word embeddings were run 2 times'):
        with robust.perturbed(model, delta):
            model(**batch), model(**batch)
    with pytest.raises(data.InputError, match=r'delta is \(2, 5, 16\), but the output .* is \(2, 6, 16\)'):
        with robust.perturbed(model, delta[:, 1:]):
            model(**batch)
    assert not any(module._forward_hooks for module in model.modules())     # none is left behind


def test_what_a_notebook_gets_wrong_is_said_without_naming_a_flag(model, batch):
    calls = [(lambda: robust.adv(model, {'input_ids': batch['input_ids']}, eps=0.1), 'attention_mask'),
             (lambda: robust.rs_r(model, {'input_ids': batch['input_ids']}, eps=0.1), 'attention_mask'),
             (lambda: robust.adv(model, {k: batch[k] for k in ('input_ids', 'attention_mask')}, eps=0.1),
              'labels'),
             (lambda: robust.rs_r(model, batch, eps=0.1, layer=99), 'layers 1 to 2'),
             (lambda: robust.adv(model, batch, eps=0.1, layer=-3), 'layers 1 to 2'),
             (lambda: evaluate.predict(model, None, [('a', 'b')]), 'data.Pair'),
             (lambda: evaluate.predict(model, None, []), 'predicting: expected one or more data.Pair')]
    for wrong, expected in calls:
        with pytest.raises(data.InputError, match=expected) as error:
            wrong()
        assert '--' not in str(error.value) and '\n' not in str(error.value)


def test_every_step_and_process_has_draws_of_its_own_and_the_same_ones_again(model, batch):
    args = types.SimpleNamespace(method='rs_r', seed=1, eps=0.1, layer=0, adv_steps=1, plain_steps=0)
    model.eval()        # without dropout: delta alone is drawn
    objective, second, other = (robust.Objective(model, args, rank) for rank in (0, 1, 0))
    losses = [objective(batch, step).item() for step in (1, 2, 3)] + [second(batch, 1).item()]
    assert len(set(losses)) == 4
    assert other(batch, 2).item() == losses[1]          # a resumed run needs no generator's state
    args.method = 'plain'
    model.train()       # dropout alone
    losses = [objective(batch, step).item() for step in (1, 2, 3)] + [second(batch, 1).item()]
    assert len(set(losses)) == 4 and objective(batch, 2).item() == losses[1]


@pytest.mark.parametrize('method, changes', [('adv', {'eps': 0.2}), ('adv', {'adv_steps': 3}),
                                             ('adv', {'layer': 1}), ('adv', {'plain_steps': 5}),
                                             ('rs_r', {'eps': 0.2}), ('rs_r', {'layer': -1}),
                                             ('rs_r', {'seed': 2})])
def test_the_objective_heeds_its_arguments(method, changes, model, batch):
    args = dict(method=method, seed=1, eps=0.1, layer=0, adv_steps=1, plain_steps=4)
    model.eval()
    first, second = (robust.Objective(model, types.SimpleNamespace(**a))(batch, 5).item()
                     for a in (args, args | changes))
    assert first != second
    plain = robust.plain(model, batch).item()
    assert (second == plain) == ('plain_steps' in changes) and first != plain


# ---------------------------------------------------------------- synonyms.py

NEIGHBOURS = {'good': ['fine'], 'cat': ['kitten', 'puss']}


def test_replacement_keeps_case_punctuation_and_spacing():
    text = '  Good  cats, "CAT" (cat)--good!\u00a0x\u3000cat\u2028cat'
    one = {'good': ['fine'], 'cat': ['puss']}
    expected = '  Fine  cats, "PUSS" (puss)--fine!\u00a0x\u3000puss\u2028puss'
    assert synonyms.replace(text, one, 1.0, random.Random(0)) == expected
    assert synonyms.replace(text, one, 0.0, random.Random(0)) == text


def test_replacement_has_probability_p_and_picks_uniformly():
    words = synonyms.replace('cat ' * 20000, NEIGHBOURS, 0.1, random.Random(0)).split()
    assert len(words) == 20000
    assert words.count('kitten') / 20000 == pytest.approx(0.05, abs=0.006)
    assert words.count('puss') / 20000 == pytest.approx(0.05, abs=0.006)


class Everything(dict):
    """A neighbour file in which every word has a synonym."""
    def get(self, word):
        return ['X']


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
    assert not {'t', 's', 've', 'e', 'll', 'l', 're', 'd', 'm', 'n', 'won', 'ca', 'ai'} & {
        word.lower() for word in words}
    left = {synonyms.replace(text, Everything(), 1.0, random.Random(0)).replace(' ', '')
            for text in (together, apart)}
    assert len(left) == 1 and left.pop().count('X') == len(words)
    neighbours = {'a': ['t', 's', 've', 'll', 'n', 'won', 'don']}
    assert synonyms.replace("Won 't won't", {"won't": ['shall']}, 1.0, random.Random(0)) == 'Shall shall'
    kept = [synonyms.english_only(neighbours, [data.Pair(text, '', 0)]) for text in (together, apart)]
    assert kept[0] == kept[1]


def test_apostrophes_that_are_no_clitics_hide_no_word():
    assert synonyms.find_words("'good' rock 'n' roll, the 's' of O'Neil's 'sat' '90s don") == [
        'good', 'rock', 'n', 'roll', 'the', 's', 'of', "O'Neil", 'sat', '90s', 'don']


def test_the_authors_form_is_uniform_over_the_word_and_its_neighbours_exact_and_between_blanks():
    words = synonyms.replace('cat dog ' * 20000, NEIGHBOURS, None, random.Random(0)).split(' ')
    assert words.count('dog') == 20000
    for word in ('cat', 'kitten', 'puss'):
        assert words.count(word) / 20000 == pytest.approx(1 / 3, abs=0.01)
    text = ' Cat  CAT cat. (cat) cat\u3000good good-cat good, ' * 50        # nothing here is a key
    assert synonyms.replace(text, NEIGHBOURS, None, random.Random(0)) == text


@real
@pytest.mark.parametrize('task, authors, paper', [('pawsx', 0.207, 0.040), ('xnli', 0.330, 0.057)])
def test_the_share_of_words_changed_on_the_real_files(task, authors, paper):
    """authors: measured with the authors' look-up by others. paper: p times the words that have synonyms."""
    neighbours = synonyms.read_synonyms(SHARED / 'data' / data.NEIGHBOURS)
    pairs = data.read_pairs(data.path_of(SHARED / 'data', task, 'dev', 'en'), task)
    for p, share in ((None, authors), (0.1, paper)):
        copies = synonyms.Copies(pairs, neighbours, p=p, m=1, seed=1)
        assert synonyms.changed_share(copies, sample=len(copies)) == pytest.approx(share, abs=0.004)
        assert synonyms.changed_share(copies) == pytest.approx(share, rel=0.1)      # a sample will do


def test_english_only_leaves_out_what_the_english_file_does_not_have():
    pairs = [data.Pair('A Kitten, and', 'fine', 0)]
    neighbours = {'cat': ['gato', 'kitten'], 'good': ['buena'], 'nice': ['Fine']}
    assert synonyms.english_only(neighbours, pairs) == {'cat': ['kitten'], 'nice': ['Fine']}


def test_the_copies_are_a_sequence_in_which_no_two_are_drawn_alike():
    pairs = [data.Pair(f'a good cat {i} ' * 5, f'cat good {i} ' * 5, i % 2) for i in range(20)]
    copies = synonyms.Copies(pairs, NEIGHBOURS, m=10, p=0.5, seed=1)
    rows = list(copies)
    assert len(rows) == len(copies) == 200 and rows[-1] == copies[-1] == copies[199] and rows == list(copies)
    with pytest.raises(IndexError):
        copies[200]
    draws = set()           # which words changed, and to what, whatever the pair's number
    for row, copy in enumerate(rows):
        pair = pairs[row % 20]
        assert copy.label == pair.label and copy == synonyms.augment(pair, NEIGHBOURS, 0.5, 1, row // 20)
        assert copy.premise != pair.premise and copy.hypothesis != pair.hypothesis
        draws.add(re.sub(r' \d+', '', f'{copy.premise}|{copy.hypothesis}'))
    assert len(draws) == 200
    assert rows != list(synonyms.Copies(pairs, NEIGHBOURS, m=10, p=0.5, seed=2))


def test_the_share_of_words_changed_by_hand():
    pairs = [data.Pair('cat x, y', 'cat', 0), data.Pair('x', 'x\u3000x', 0)]
    copies = synonyms.Copies(pairs, {'cat': ['puss']}, m=2, p=1.0)
    assert copies[2].premise == 'puss x, y'
    assert synonyms.changed_share(copies) == 2 / 6
    # Of 4,000 pairs every 40th alone cannot change: rows taken at a fixed stride would be of these.
    pairs = [data.Pair('x' if number % 40 == 0 else 'cat', '', 0) for number in range(4000)]
    copies = synonyms.Copies(pairs, {'cat': ['puss']}, m=10, p=1.0)
    assert synonyms.changed_share(copies) == pytest.approx(0.975, abs=0.02)


@pytest.mark.parametrize('p, neighbours', [(0.1, {'dog': ['hound']}), (None, {'cat': ['puss']}), (0.1, {})])
def test_rs_a_that_would_be_plain_training_is_refused(p, neighbours):
    pairs = [data.Pair('a Cat.', 'x', 0)]
    with pytest.raises(data.InputError,
                       match='^F.json: no word of the training pairs has a synonym') as error:
        synonyms.Copies(pairs, neighbours, p=p, name='F.json')
    assert '\n' not in str(error.value)
    assert len(synonyms.Copies(pairs, {'cat': ['puss']}, p=0.1)) == 10


def test_files_of_words_are_read_by_one_rule_however_they_end(tmp_path):
    plain = ' "a\u3000b c"\t\u2028d\u0085\n\ne\t'
    for start in (b'', b'\xef\xbb\xbf'):
        for end in ('\n', '\r\n'):
            for last in ('', end, end * 3):
                path = write(tmp_path / 'F', start + (plain.replace('\n', end) + last).encode())
                assert data.read_lines(path, 'words') == plain.split('\n')
    assert data.split_words(' a\u3000b  c\t\u2028d\u0085 ') == ['a\u3000b', 'c', '\u2028d\u0085']
    pairs = data.read_pairs(write(tmp_path / 'F', '\ufeff\u3000a \tb\u2028c\u3000\t1\r\n\r\n'.encode()),
                            'pawsx')
    assert pairs == [('\u3000a ', 'b\u2028c\u3000', 1)]
    path = write(tmp_path / 'F', b'\xef\xbb\xbf{"a\xe3\x80\x80b":\r\n["c"]}\r\n\r\n')
    assert synonyms.read_synonyms(path) == {'a\u3000b': ['c']}
    path = write(tmp_path / 'F', '\ufeff\u3000 1 2\r\nb\u0085\t3  4\r\n\r\n'.encode())
    words, vectors = synonyms.read_vectors(path)
    assert words == ['\u3000', 'b\u0085'] and vectors.tolist() == [[1, 2], [3, 4]]
    # word2vec's counts
    words, vectors = synonyms.read_vectors(write(tmp_path / 'F', b'2 2\na 1 2\nb 3 4'))
    assert words == ['a', 'b'] and vectors.tolist() == [[1, 2], [3, 4]]


def test_neighbours_against_every_distance():
    torch.manual_seed(0)
    vectors, words = torch.randn(700, 5), [f'w{i}' for i in range(700)]
    distances = torch.cdist(vectors.double(), vectors.double()).square().fill_diagonal_(9e9)
    found = synonyms.build(words, vectors, k=4, bound=0.8)
    for i, word in enumerate(words):
        nearest = [j for j in distances[i].argsort().tolist()[:4] if distances[i, j] <= 0.8]
        assert found[word] == [words[j] for j in nearest]
    assert {len(near) for near in found.values()} == {0, 1, 2, 3, 4}


# ---------------------------------------------------------------- data.py

def write(path, content):
    path.write_bytes(content)
    return path


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
    data.write_pairs(tmp_path / 'written.tsv', rows)
    assert [(a, b, str(label)) for a, b, label in data.read_pairs(tmp_path / 'written.tsv', 'pawsx')] == rows
    raw = write(tmp_path / 'raw.tsv',
                b'a "lone quote\tand " another\t0\r\n"wrapped"\t"one" and "two"\t1\n\n\n')
    assert data.read_pairs(raw, 'pawsx') == [('a "lone quote', 'and " another', 0),
                                             ('"wrapped"', '"one" and "two"', 1)]


def test_labels(tmp_path):
    xnli = write(tmp_path / 'xnli.tsv', b'a\tb\tcontradictory\na\tb\tentailment\na\tNS\tneutral\n')
    assert [pair.label for pair in data.read_pairs(xnli, 'xnli')] == [0, 1, 2]
    assert data.describe('F', data.read_pairs(xnli, 'xnli')) == (
        'F: 3 pairs; 1 rows with a placeholder NS, kept')
    pairs = data.read_pairs(write(tmp_path / 'bare.tsv', b'a\tb\nc\td\n'), 'pawsx')
    assert [pair.label for pair in pairs] == [None, None]
    assert data.describe('F', pairs) == 'F: 2 pairs; no labels: cannot be scored'


@pytest.mark.parametrize('content, message', [
    (b'', 'empty'), (b'\n\n', 'empty'), (b'a\tb\t1\na\tb\n', ':2: 2 columns; expected 3'),
    (b'a\n', ':1: 1 columns'),
    (b'a\tb\t1\n\na\tb\t1\n', ':2: 1 columns'), (b'a\tb\t2\n', ":1: label '2'; expected one of 0, 1"),
    (b'a\tb\t1\n\xff\tb\t1\n', ':2: not UTF-8'),
    (b'\xef\xbb\xbfa\tb\t1\r\na\tb\xff', ':2: not UTF-8'),
    (b'id\tsentence1\tsentence2\tlabel\n1\ta\tb\t0\n', 'raw release'),
    (b'sentence1\tsentence2\na\tb\n', ':1: a header; expected premise'),
])
def test_a_broken_file_gives_one_line(tmp_path, content, message):
    path = write(tmp_path / 'file.tsv', content)
    with pytest.raises(data.InputError) as error:
        data.read_pairs(path, 'pawsx')
    assert message in str(error.value) and str(path) in str(error.value) and '\n' not in str(error.value)


def pawsx_archive(path, rows=2):
    """A small x-final.tar.gz, with a member that tries to escape."""
    with tarfile.open(path, 'w:gz') as tar:
        for lang, name in [('en', 'train')] + [(lang, f'{split}_2k') for lang in ('en', 'de')
                                               for split in ('dev', 'test')]:
            lines = ''.join(f'{i}\t{lang} "a" {i}\t\u3000"lone {name}\u3000x \t{i % 2}\r\n'
                            for i in range(rows))
            content = f'id\tsentence1\tsentence2\tlabel\r\n{lines}'.encode()
            member = tarfile.TarInfo(f'x-final/{lang}/{name}.tsv')
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        tar.addfile(tarfile.TarInfo('x-final/../../escaped'), io.BytesIO())
    return path


def xnli_archives(folder):
    """A small XNLI-1.0.zip and XNLI-MT-1.0.zip."""
    header = 'language\tgold_label' + '\tx' * 7 + '\n'
    with zipfile.ZipFile(folder / 'XNLI-1.0.zip', 'w') as archive:
        for split in ('dev', 'test'):
            rows = [f'{lang}\t{label}\t.\t.\t.\t.\t{lang} {split}\tsays "so"\t.\n'
                    for label in ('neutral', 'entailment') for lang in ('de', 'en', 'xx')]
            archive.writestr(f'XNLI-1.0/xnli.{split}.tsv', header + ''.join(rows))
    with zipfile.ZipFile(folder / 'XNLI-MT-1.0.zip', 'w') as archive:
        archive.writestr('XNLI-MT-1.0/multinli/multinli.train.en.tsv',
                         'premise\thypo\tlabel\na\tb\tcontradictory\nc\td\tneutral\n')
    return folder / 'XNLI-1.0.zip', folder / 'XNLI-MT-1.0.zip'


@pytest.fixture
def small_release(monkeypatch, tmp_path):
    """As if the releases had two rows a file and two languages, and lay in tmp_path/host (where nothing is
    yet).
    """
    (tmp_path / 'host').mkdir()
    for task in ('pawsx', 'xnli'):
        monkeypatch.setitem(data.TASKS, task, data.TASKS[task]._replace(languages=('en', 'de')))
    for name, release in data.RELEASES.items():
        url = (tmp_path / 'host' / name).as_uri()
        monkeypatch.setitem(data.RELEASES, name,
                            release._replace(url=url, rows=dict.fromkeys(release.rows, 2)))
    monkeypatch.setattr(data, 'NEIGHBOURS_URL', (tmp_path / 'host' / 'neighbours.json').as_uri())
    return tmp_path / 'host'


def names(folder):
    return sorted(path.name for path in folder.iterdir())


ALL = ['dev-de.tsv', 'dev-en.tsv', 'test-de.tsv', 'test-en.tsv', 'train-en.tsv']


def test_converts_the_public_release_of_pawsx_and_keeps_what_is_there(tmp_path, small_release):
    archive = pawsx_archive(tmp_path / 'x-final.tar.gz')
    folder = tmp_path / 'D' / 'pawsx'
    folder.mkdir(parents=True)
    write(folder / 'test-de.tsv', b'as XTREME\tstrips it\n')
    write(folder / 'test-en.tsv', b'mine\tkept\t1\n')
    data.prepare(tmp_path / 'D', 'pawsx', [archive], complete=True)
    rows = [('de "a" 0', '"lone test_2k\u3000x', 0), ('de "a" 1', '"lone test_2k\u3000x', 1)]
    assert data.read_pairs(folder / 'test-de.tsv', 'pawsx') == rows
    assert data.read_pairs(folder / 'test-en.tsv', 'pawsx') == [('mine', 'kept', 1)]
    assert (names(folder) == ALL and names(tmp_path / 'D') == ['pawsx']
            and not list(tmp_path.rglob('escaped*')))


def test_converts_the_public_release_of_xnli(tmp_path, small_release):
    data.prepare(tmp_path, 'xnli', xnli_archives(tmp_path), complete=True)
    assert data.read_pairs(tmp_path / 'xnli/test-de.tsv', 'xnli') == [('de test', 'says "so"', 2),
                                                                      ('de test', 'says "so"', 1)]
    assert data.read_pairs(tmp_path / 'xnli/dev-de.tsv', 'xnli')[0] == ('de dev', 'says "so"', 2)
    assert data.read_pairs(tmp_path / 'xnli/train-en.tsv', 'xnli') == [('a', 'b', 0), ('c', 'd', 2)]


@pytest.mark.parametrize('break_it, message', [
    (lambda path: path.write_bytes(path.read_bytes()[:-40]),
     'x-final.tar.gz: not the archive of .*fetch it again'),
    (lambda path: path.write_bytes(b'<html>'), 'x-final.tar.gz: not the archive of .*fetch it again'),
    (lambda path: path.unlink(), '^[^:]*x-final.tar.gz: not the archive of .*No such file'),
    (lambda path: pawsx_archive(path, rows=3), 'x-final.tar.gz: 3 rows for train-en.tsv, expected 2'),
])
def test_a_broken_archive_gives_one_line_and_leaves_nothing(tmp_path, small_release, break_it, message):
    break_it(pawsx_archive(tmp_path / 'x-final.tar.gz'))
    for complete in (False, True):
        with pytest.raises(data.InputError, match=message) as error:
            data.prepare(tmp_path / 'D', 'pawsx', [tmp_path / 'x-final.tar.gz'], complete)
        assert ('\n' not in str(error.value)
                and not [path for path in tmp_path.glob('D/**/*') if path.name != 'pawsx'])


def test_a_run_fetches_into_a_folder_without_any_tsv_and_nowhere_else(tmp_path, small_release):
    with pytest.raises(data.InputError,
                       match='Fetch it by hand and give it to `python data.py pawsx .*--task sample'):
        data.prepare(tmp_path / 'D', 'pawsx')
    with pytest.raises(data.InputError, match='paws.zip: not an archive of pawsx; expected x-final.tar.gz'):
        data.prepare(tmp_path / 'D', 'pawsx', ['paws.zip'])
    archive = pawsx_archive(small_release / 'x-final.tar.gz')
    data.prepare(tmp_path / 'D', 'pawsx')
    assert names(tmp_path / 'D/pawsx') == ALL and names(tmp_path / 'D') == ['pawsx']

    (tmp_path / 'D/pawsx/dev-de.tsv').unlink()
    data.prepare(tmp_path / 'D', 'pawsx')           # no run needs it
    assert not (tmp_path / 'D/pawsx/dev-de.tsv').exists()
    data.prepare(tmp_path / 'D', 'pawsx', complete=True)
    assert names(tmp_path / 'D/pawsx') == ALL
    (tmp_path / 'D/pawsx/test-de.tsv').unlink()
    with pytest.raises(data.InputError,
                       match='test-de.tsv: no such file.*langs.*`python data.py pawsx --data'):
        data.prepare(tmp_path / 'D', 'pawsx')
    data.prepare(tmp_path / 'D', 'pawsx', langs=['en'])
    assert not (tmp_path / 'D/pawsx/test-de.tsv').exists()
    archive.unlink()
    with pytest.raises(data.InputError, match='x-final.tar.gz: cannot be fetched'):
        data.prepare(tmp_path / 'D', 'pawsx', complete=True)


def test_what_was_fetched_stays_when_the_next_cannot_be_had(tmp_path, small_release, monkeypatch, capsys):
    """The first archive of XNLI when the second fails; the pairs when the neighbour file fails."""
    dev_and_test, train = xnli_archives(tmp_path)
    dev_and_test.rename(small_release / dev_and_test.name)
    with pytest.raises(data.InputError, match='XNLI-MT-1.0.zip: cannot be fetched'):
        data.prepare(tmp_path / 'R', 'xnli')                # of a run: all or nothing
    assert names(tmp_path / 'R/xnli') == []
    with pytest.raises(data.InputError, match='XNLI-MT-1.0.zip: cannot be fetched'):
        data.prepare(tmp_path / 'D', 'xnli', complete=True)
    assert names(tmp_path / 'D/xnli') == ALL[:4]
    monkeypatch.setattr(sys, 'argv', ['data.py', 'xnli', str(train), '--data', str(tmp_path / 'D')])
    with pytest.raises(data.InputError, match='neighbours.json: cannot be fetched.*'
                                              f'keep it as {tmp_path}/D/{data.NEIGHBOURS}'):
        data.main()
    assert names(tmp_path / 'D/xnli') == ALL and capsys.readouterr().out.count(': 2 pairs\n') == 5


def test_a_broken_file_among_good_ones_is_named_and_nothing_is_written(tmp_path, small_release):
    data.prepare(tmp_path / 'D', 'pawsx', [pawsx_archive(tmp_path / 'x-final.tar.gz')], complete=True)
    folder = tmp_path / 'D/pawsx'
    write(folder / 'test-de.tsv', b'a\tb\tmaybe\n')
    write(folder / 'test-en.tsv', b'no\tlabels\n')
    (folder / 'dev-de.tsv').unlink()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(data.InputError, match="test-de.tsv:1: label 'maybe'"):
        data.prepare(tmp_path / 'D', 'pawsx', [tmp_path / 'x-final.tar.gz'], complete=True)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_neighbour_file_is_fetched_checked_and_kept(tmp_path, monkeypatch):
    path, asked = tmp_path / 'D' / data.NEIGHBOURS, []

    def fetch(url, to, hash_prefix, progress):
        asked.append((url, hash_prefix))
        Path(to).write_bytes(b'{}')
        if len(asked) == 1:
            raise RuntimeError('invalid hash value')        # as torch.hub says it

    monkeypatch.setattr(data, 'download_url_to_file', fetch)
    line = (f'{re.escape(data.NEIGHBOURS_URL)}: cannot be fetched .invalid hash value.*'
            f'keep it as {re.escape(str(path))}$')
    with pytest.raises(data.InputError, match=line):
        data.fetch_neighbours(path)
    assert not path.exists()
    data.fetch_neighbours(path)
    data.fetch_neighbours(path)
    assert path.read_bytes() == b'{}' and names(path.parent) == [path.name]
    assert asked == [(data.NEIGHBOURS_URL, data.NEIGHBOURS_SHA256)] * 2
    assert 'uclanlp/Robust-XLT/' in data.NEIGHBOURS_URL and socket.getdefaulttimeout() is None


def test_a_neighbour_file_with_another_digest_is_refused(tmp_path, small_release):
    write(small_release / 'neighbours.json', b'{"cat": ["puss"]}')
    with pytest.raises(data.InputError, match='neighbours.json: cannot be fetched .invalid hash value'):
        data.fetch_neighbours(tmp_path / 'F.json')
    assert names(tmp_path) == ['host']


@real
def test_the_digest_is_that_of_the_public_file():
    path = SHARED / 'data' / data.NEIGHBOURS
    assert data.digest(path) == data.NEIGHBOURS_SHA256[:16]
    data.fetch_neighbours(path)         # it is there: no network


def test_own_languages_stand_after_the_papers(tmp_path, world):
    folder = tmp_path / 'pawsx'
    folder.mkdir()
    for lang in ('en', 'yo', 'de', 'aa'):
        write(folder / f'test-{lang}.tsv', b'a\tb\t1\n')
    assert data.languages_of(tmp_path, 'pawsx') == list(data.TASKS['pawsx'].languages)
    assert data.languages_of(tmp_path, 'pawsx', ['yo', 'de', 'aa', 'en', 'yo']) == ['en', 'de', 'yo', 'aa']
    with pytest.raises(data.InputError, match=f'^{folder}/test-ha.tsv: no such file'):
        data.languages_of(tmp_path, 'pawsx', ['en', 'ha'])
    for name in ('train-en.tsv', 'dev-en.tsv'):
        with pytest.raises(data.InputError, match=f'{name}: no such file'):
            data.prepare(tmp_path, 'pawsx', langs=['yo'])
        write(folder / name, b'a\tb\t1\n')
    data.prepare(tmp_path, 'pawsx', langs=['yo'])
    assert len(list(folder.iterdir())) == 6


def test_several_processes_on_an_empty_folder_find_one_world(tmp_path, world):
    """One prepares and the others wait; all of them see the whole of it. A killed one's leftovers do no harm.
    """
    (tmp_path / 'sample.part').mkdir()
    write(tmp_path / 'sample.part' / 'train-en.tsv', b'half')
    code = """
        import data, os, pathlib
        children = [os.fork(), os.fork()]       # four processes in all
        data.prepare('.', 'sample')
        seen = [data.digest(path) for path in pathlib.Path('sample').rglob('*.*')]
        os.write(1, (' '.join(sorted(seen)) + '\\n').encode())
        for child in filter(None, children):
            os.waitpid(child, 0)
    """
    environment = os.environ | {'PYTHONPATH': str(HERE), 'OMP_NUM_THREADS': '1'}
    ended = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], cwd=tmp_path, env=environment,
                           capture_output=True, text=True)
    digests = sorted(data.digest(path) for path in (world / 'sample').rglob('*.*'))
    assert ended.stdout.splitlines() == [' '.join(digests)] * 4, ended.stderr
    assert names(tmp_path) == ['sample']


@pytest.mark.parametrize('mask', [0o022, 0o027])
def test_files_have_the_permissions_that_the_umask_says(tmp_path, monkeypatch, mask):
    monkeypatch.setattr(data, 'SAMPLE_ROWS', {'train': 9, 'dev': 9, 'test': 9})
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

    def refuse(*arguments, **options):
        raise PermissionError(13, 'Permission denied')
    for target, name in ((data, 'FileLock'), (os, 'replace'), (Path, 'mkdir')):
        monkeypatch.setattr(target, name, refuse)
    data.prepare(world, 'sample')
    data.prepare(tmp_path / 'D', 'sample')
    data.prepare(world, 'sample', complete=True)
    data.fetch_neighbours(world / 'sample/synonyms.json')


def test_a_folder_that_cannot_be_written_gives_one_line(tmp_path, monkeypatch):
    write(tmp_path / 'file', b'')
    for folder, why in (('file', 'File exists'), ('file/D', 'Not a directory')):
        with pytest.raises(data.InputError, match=f'^{tmp_path}/{folder}/sample/train-en.tsv: not there, and '
                                                  f'cannot be written: {why}$'):
            data.prepare(tmp_path / folder, 'sample')
    with pytest.raises(data.InputError,
                       match='F.json: not there, and cannot be written: (Not a directory|File exists)$'):
        data.fetch_neighbours(tmp_path / 'file/F.json')
    monkeypatch.setattr(data, 'SAMPLE_ROWS', {'train': 9, 'dev': 9, 'test': 9})
    monkeypatch.setattr(os, 'replace',
                        lambda *_: (_ for _ in ()).throw(OSError(30, 'Read-only file system', 'x.part')))
    with pytest.raises(data.InputError, match='sample/train-en.tsv: not there, and cannot be written: '
                                              'Read-only file system$'):
        data.prepare(tmp_path / 'D', 'sample')
    assert names(tmp_path / 'D/sample') == [] and names(tmp_path / 'D') == ['sample']
    write(tmp_path / 'old', b'old')
    with pytest.raises(OSError) as error:
        with data.replacing(tmp_path / 'old') as part:
            part.write_text('new')
    assert error.value.filename == str(tmp_path / 'old')
    assert (tmp_path / 'old').read_bytes() == b'old' and names(tmp_path) == ['D', 'file', 'old']


def test_an_interrupted_preparation_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, 'SAMPLE_ROWS', {'train': 9, 'dev': 9, 'test': 9})
    with monkeypatch.context() as patch:
        patch.setattr(data, '_write_sample_encoder', interrupt)
        with pytest.raises(KeyboardInterrupt):
            data.prepare(tmp_path, 'sample')
    assert names(tmp_path) == ['sample'] and names(tmp_path / 'sample') == []
    data.prepare(tmp_path, 'sample')
    assert len(names(tmp_path / 'sample')) == 17


def test_the_sample_world_is_what_its_docstring_says(world):
    """Known sizes; row-aligned tests; a language's words at their known distance; and the same bits ever
    since.
    """
    folder = world / 'sample'
    english = data.read_pairs(folder / 'test-en.tsv', 'sample')
    for number in range(1, 7):
        for one, other in zip(english, data.read_pairs(folder / f'test-x{number}.tsv', 'sample'),
                              strict=True):
            ending = 'drstlk'[number - 1]
            assert other == (re.sub(r'n\b', ending, one.premise), re.sub(r'n\b', ending, one.hypothesis),
                             one.label)
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
    for number in range(1, 7):
        length = (words[number] - words[0]).norm(dim=-1)
        assert torch.allclose(length, torch.full((90,), 0.05 * number * 8), atol=1e-5)
    spread = (words[0].view(30, 3, 64)
              - words[0].view(30, 3, 64).mean(1, keepdim=True)).square().sum(1).mean() / 2
    assert spread.sqrt().item() == pytest.approx(0.05, rel=0.05)
    assert (data.digest(folder / 'train-en.tsv') == '38f7fcb03d6274c2'
            and data.digest(folder / 'test-x6.tsv') == '8e0f2a9173338e57')


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
            assert (sum('NS' in pair for pair in pairs) == count
                    and (f'{count} rows' in data.describe(path, pairs)) == (count > 0))
            assert not any('""' in pair.premise + pair.hypothesis for pair in pairs)
        bare = tmp_path / f'{lang}.tsv'     # as XTREME strips it: the label column gone, the text as it was
        write(bare, b''.join(line.rpartition(b'\t')[0] + b'\r\n'
                             for line in path.read_bytes().rstrip().split(b'\n')))
        assert bare.read_text().count('""') >= doubled[lang]
        assert data.read_pairs(bare, 'pawsx') == [pair._replace(label=None) for pair in pairs]
    for lang in data.TASKS['xnli'].languages:
        pairs = data.read_pairs(data.path_of(SHARED / 'data', 'xnli', 'test', lang), 'xnli')
        assert len(pairs) == 5010 and pairs[0].premise == pairs[1].premise == pairs[2].premise
        assert {pair.label for pair in pairs} == {0, 1, 2}
    assert len(data.read_pairs(data.path_of(SHARED / 'data', 'xnli', 'train', 'en'), 'xnli')) == 57194


def test_a_script_ends_in_one_line(tmp_path, capsys):
    """Status, figures and line of what run_script handles."""
    expected = '{"word": ["neighbour", ...], ...}; the public one lies at ' + data.NEIGHBOURS_URL
    assert ended(capsys, synonyms.main, tmp_path / 'nowhere', '--show', 'cat') == (
        1, '', f'{tmp_path}/nowhere: No such file or directory; expected the neighbour file of RS-A, '
               f'{expected}\n')
    vectors = write(tmp_path / 'v.txt', b'a 1 2\nb 1 2\nc 9 9\n')
    # a file: as if read-only
    status, _, said = ended(capsys, synonyms.main, vectors, '-o', vectors / 'F.json')
    assert (status, said.splitlines()[-2:]) == (1, [f'{vectors}/F.json: 3 words, 2 with neighbours',
                                                    f'{vectors}: File exists'])
    assert ended(capsys, synonyms.main, vectors, '-o', tmp_path / 'new/F.json')[0] is None
    assert json.loads((tmp_path / 'new/F.json').read_text()) == {'a': ['b'], 'b': ['a'], 'c': []}
    status, out, _ = ended(capsys, synonyms.main, tmp_path / 'new/F.json', '--show', "A isn't b",
                           '--p', '1', '--m', '2')
    assert out == "A: b\nisn't: -\nb: a\n   1  B isn't a\n   2  B isn't a\n"
    assert ended(capsys, data.main, 'sample', '--data', vectors) == (
        1, '', f'{vectors}/sample/train-en.tsv: not there, and cannot be written: File exists\n')

    def stopped():
        raise KeyboardInterrupt('run a: stopped; the same command goes on')
    assert ended(capsys, stopped) == (130, '', 'run a: stopped; the same command goes on\n')
    with pytest.raises(ZeroDivisionError):      # a fault of the program keeps its traceback
        data.run_script(lambda: 1 / 0)


def test_head_is_quiet():
    """What is left in the buffer when the reader has gone is not complained of at the interpreter's end
    either.
    """
    code = 'import data; data.run_script(lambda: print(1))'
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONUNBUFFERED'}
    heard = subprocess.run(['bash', '-c', 'set -o pipefail; "$0" -c "$1" | true', sys.executable, code],
                           cwd=HERE, env=environment, capture_output=True, text=True)
    assert (heard.stdout, heard.stderr, heard.returncode) == ('', '', 1)


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

def arguments(**changes):
    """What the parts of train.py read of a run's arguments."""
    args = dict(seed=1, batch=16, epochs=2, m=None, max_steps=None, max_length=64, method='plain', lr=1e-3,
                warmup=0.0, eps=None, layer=None, adv_steps=None, plain_steps=None, eval_steps=100,
                max_eval=None)
    return types.SimpleNamespace(**(args | changes))


@pytest.fixture
def tokenizer(world):
    return evaluate.AutoTokenizer.from_pretrained(world / 'sample/model')


def pairs_of_all_lengths(count):
    return [data.Pair('bokin ' * (i % 7 + 1), 'bokin', i % 2) for i in range(count)]


@pytest.mark.parametrize('epochs, rows, batch, steps', [
    (0.55, 3200, 32, 55), (0.1, 9600, 32, 30), (1, 100, 16, 7), (3, 13941, 32, 1307), (4, 13941, 32, 1743),
    (1e-9, 100, 16, 1)])
def test_epochs_times_rows_over_batch_is_rounded_up_once(epochs, rows, batch, steps):
    assert train.steps_of(arguments(epochs=epochs, batch=batch), rows) == steps
    assert train.steps_of(arguments(epochs=epochs, batch=batch, max_steps=20), rows) == min(20, steps)
    # RS-A's ten copies for a tenth of the epochs: as many steps
    tenth = float(Fraction(str(epochs)) / 10)
    assert train.steps_of(arguments(epochs=tenth, batch=batch, m=10), rows) == steps


@pytest.mark.parametrize('m', [None, 10])
def test_the_plan_has_every_row_once_an_epoch_and_pairs_of_like_length_in_a_batch(tokenizer, m):
    pairs = pairs_of_all_lengths(2000 if m is None else 200)
    batches = train.plan(pairs, tokenizer, arguments(m=m))
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
    first, second = rows[:2000], rows[2000:]
    assert first != second
    assert (train.plan(pairs, tokenizer, arguments(m=m)) == batches
            != train.plan(pairs, tokenizer, arguments(m=m, seed=2)))
    assert train.plan(pairs, tokenizer, arguments(m=m, max_steps=70)) == batches[:70]


def test_every_epoch_has_an_order_of_its_own(tokenizer):
    """1,024 pairs are a pool: the batches of the second epoch are others than those of the first."""
    batches = train.plan(pairs_of_all_lengths(1024), tokenizer, arguments())
    first, second = [{frozenset(batch) for batch in half} for half in (batches[:64], batches[64:])]
    assert len(first) == len(second) == 64 and len(first & second) < 5


def test_only_the_steps_that_will_run_are_tokenised_first(tokenizer, monkeypatch):
    counted = []
    monkeypatch.setattr(train, 'count_tokens',
                        lambda pairs, tokenizer, rows: counted.append(len(rows)) or torch.ones(len(pairs)))
    train.plan(pairs_of_all_lengths(5000), tokenizer, arguments(max_steps=3))
    assert counted == [64 * 16]
    monkeypatch.undo()
    pairs = pairs_of_all_lengths(5)
    tokens = train.count_tokens(pairs, tokenizer, [1, 4])
    lengths = [len(tokenizer(*pair[:2])['input_ids']) for pair in pairs]
    assert tokens.tolist() == [0, lengths[1], 0, 0, lengths[4]]


def test_the_processes_share_a_batch_and_their_mean_is_its_mean():
    batches = [list(range(15)), [20, 21, 22], [30]]
    shares, weights = zip(*(train.shares_of(batches, rank, 2) for rank in (0, 1)))
    assert (shares[0] == [list(range(0, 15, 2)), [20, 22], [30]]
            and shares[1] == [list(range(1, 15, 2)), [21], [30]])
    # a process without a row counts nothing
    assert weights == ([16 / 15, 4 / 3, 2], [14 / 15, 2 / 3, 0])
    assert train.shares_of(batches, 0, 1) == (batches, [1, 1, 1])


@pytest.mark.parametrize('warmup', [0.0, 0.1, 0.25, 1.0])
def test_the_learning_rate_is_that_of_transformers(warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, round(warmup * 40), 40)
    for step in range(1, 41):
        assert train.learning_rate(step, 40, arguments(lr=0.5, warmup=warmup)) == pytest.approx(
            schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


class Biased(torch.nn.Module):
    """A classifier whose logits are one trained bias: enough of a Hugging Face model for the loop."""
    device = torch.device('cpu')

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.tensor([0.3, -0.2]))
        self.config = types.SimpleNamespace(name_or_path='biased', id2label={0: 'different', 1: 'paraphrase'})
        self.base_model, self.rates = torch.nn.Module(), []

    def forward(self, input_ids, attention_mask, labels=None, **inputs):
        logits = self.bias.expand(len(input_ids), 2)
        loss = None if labels is None else 100 * torch.nn.functional.cross_entropy(logits, labels)
        return types.SimpleNamespace(logits=logits, loss=loss)


@pytest.fixture
def loop(tokenizer, tmp_path, monkeypatch):
    """loop(**changes): train.train on Biased -> (its part of the record, the bias after it)."""
    monkeypatch.setattr(train, 'save_checkpoint', lambda model, tokenizer, out: None)
    monkeypatch.setattr(train, 'save_state', lambda *args: None)

    def loop(pairs=pairs_of_all_lengths(48), **changes):
        model = Biased()
        result = train.train(model, tokenizer, pairs, pairs[:10], arguments(out=tmp_path / 'none', **changes))
        return result, model.bias.detach()
    return loop


def test_three_steps_by_hand(loop, tokenizer):
    """AdamW without weight decay, eps 1e-8, the gradient (of norm far above 1) clipped to 1, the rate falling
    linearly.
    """
    _, bias = loop(max_steps=3, lr=0.01)
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


def test_the_first_of_equal_checkpoints_is_kept_and_the_last_step_is_always_scored(loop, monkeypatch):
    accuracies = iter([50.0, 70.0, 70.0, 60.0])
    monkeypatch.setattr(evaluate, 'accuracy', lambda marks: next(accuracies))
    result, _ = loop(max_steps=5, eval_steps=2)
    assert [h['step'] for h in result['history']] == [2, 4, 5] and result['steps'] == 5
    assert (result['dev'], result['step']) == (70.0, 4)
    assert all(math.isfinite(h['loss']) for h in result['history'])


def test_the_state_is_saved_at_the_best_at_the_last_and_when_it_is_long_ago(loop, monkeypatch):
    for seconds, saved in ((math.inf, [1, 4]), (0, [1, 2, 3, 4])):
        steps, accuracies = [], iter([50.0, 40.0, 30.0, 20.0])
        monkeypatch.setattr(evaluate, 'accuracy', lambda marks: next(accuracies))
        monkeypatch.setattr(train, 'save_state',
                            lambda model, optimizer, state, args: steps.append(state['step']))
        monkeypatch.setattr(train, 'STATE_SECONDS', seconds)
        loop(max_steps=4, eval_steps=1)
        assert steps == saved


def test_a_checkpoint_of_advs_plain_steps_is_not_advs(loop, monkeypatch):
    accuracies = iter([90.0, 80.0, 60.0, 65.0])
    monkeypatch.setattr(evaluate, 'accuracy', lambda marks: next(accuracies))
    monkeypatch.setattr(robust, 'adv', lambda model, batch, **options: robust.plain(model, batch))
    result, _ = loop(method='adv', eps=0.1, plain_steps=2, adv_steps=1, layer=0, max_steps=4, eval_steps=1)
    assert (result['dev'], result['step']) == (65.0, 4) and result['history'][0]['dev'] == 90.0


def test_a_loss_that_is_not_finite_names_its_step_and_its_lines(loop, tokenizer, monkeypatch):
    plain, calls = robust.plain, itertools.count(1)
    monkeypatch.setattr(robust, 'plain', lambda model, batch: plain(model, batch) * (
        math.nan if next(calls) == 3 else 1))
    with pytest.raises(data.InputError) as error:
        loop(max_steps=6, eval_steps=6)
    batch = train.plan(pairs_of_all_lengths(48), tokenizer, arguments())[2]
    assert re.match(r'step 3: the loss is nan; try a smaller --lr or --eps, or --float32\.', str(error.value))
    assert str(error.value).endswith(f'lines {" ".join(str(row + 1) for row in batch)} of train-en.tsv')


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
    for p in (0.1, 0.0):
        if not p:
            monkeypatch.setattr(train.CheapDropout, 'dropout',
                                staticmethod(lambda input, *args, **options: input))
        folder, _ = run(f'p {p}', f'--method plain --model {dropping} --max-steps 2 --langs en')
        weights.append((folder / 'model.safetensors').read_bytes())
    assert weights[0] != weights[1]


# ---------------------------------------------------------------- train.py: runs and their records

FAST = '--max-steps 8 --eval-steps 4 --batch 16 --no-freeze-embeddings'


def test_eps_0_trains_to_the_weights_of_plain_and_a_seed_to_the_same_weights(run, dropping):
    weights = {}
    for name, flags in {'plain': 'plain', 'rs_r 0': 'rs_r --eps 0', 'adv 0': 'adv --eps 0 --plain-steps 0',
                        'rs_a 0': 'rs_a --p 0 --m 1 --epochs 4', 'rs_r': 'rs_r', 'rs_r again': 'rs_r',
                        'rs_r 43': 'rs_r --seed 43', 'rs_a': 'rs_a', 'adv': 'adv --eps 0.1 --plain-steps 0',
                        'adv 3': 'adv --eps 0.1 --plain-steps 0 --adv-steps 3', 'layer': 'rs_r --layer 1',
                        'warm': 'plain --warmup 0.5', 'm': 'rs_a --m 2'}.items():
        folder, _ = run(name, f'--method {flags} {FAST} --model {dropping}')
        weights[name] = (folder / 'model.safetensors').read_bytes()
    assert weights['plain'] == weights['rs_r 0'] == weights['adv 0'] == weights['rs_a 0']
    assert weights['rs_r'] == weights['rs_r again']
    assert len(set(weights.values())) == len(weights) - 4


def test_a_record_says_what_it_is_about(run, small):
    folder, record = run('a', f'--method rs_a {FAST} --max-train 200 --max-eval 20')
    text = (folder / 'results.json').read_text()
    assert text.endswith('}\n') and text.count('\n') == 1 and 'NaN' not in text
    args = record['args']
    assert (args['method'], args['m'], args['p'], args['replace'], args['seed']) == (
        'rs_a', 10, 0.1, 'paper', 42)
    assert args['eps'] is args['layer'] is args['adv_steps'] is args['plain_steps'] is None
    assert not {'data', 'model', 'out', 'synonyms', 'langs', 'float32'} & set(args)
    assert record['files']['train-en.tsv'] == data.digest(small / 'sample/train-en.tsv')
    assert (record['files']['synonyms'] == data.digest(small / 'sample/synonyms.json')
            and len(record['files']['model']) == 16)
    assert record['dtype'] == 'torch.float32' and record['processes'] == 1 and len(record['source']) == 16
    assert set(record['versions']) == {'python', 'torch', 'transformers', 'tokenizers'}
    assert record['train_pairs'] == 200 and record['steps'] == 8 and len(record['history']) == 2
    assert 0.05 < record['changed'] < 0.15          # every word of the sample world has synonyms, p = 0.1
    for lang, marks in record['test_marks'].items():
        assert (len(marks) == 20 == sum(record['answers'][lang])
                and record['test'][lang] == 5 * marks.count('1'))
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
    assert (100 * right / 30 == record['test']['x1']
            and [predicted.count(label) for label in labels] == record['answers']['x1'])
    classify = transformers.pipeline('text-classification', str(folder))
    given = [classify({'text': pair.premise, 'text_pair': pair.hypothesis})['label'] for pair in pairs]
    assert given == predicted
    files = [path for path in folder.rglob('*') if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o644}
    assert sorted(path.name for path in folder.iterdir()) == [
        'args.json', 'config.json', 'model.safetensors', 'predictions', 'results.json', 'tokenizer.json',
        'tokenizer_config.json']
    settings = json.loads((folder / 'tokenizer_config.json').read_text())
    assert not {'local_files_only', 'trust_remote_code', 'is_local'} & set(settings)


def test_a_finished_run_is_kept_whatever_its_paths(run, small, tmp_path, call, monkeypatch):
    flags = f'--method plain {FAST}'
    folder, record = run('a', flags)
    before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    moved = tmp_path / 'elsewhere'
    shutil.copytree(small, moved)
    monkeypatch.chdir(tmp_path)
    for again in (f'{flags} --adv-steps 3 --layer 1 --m 2', f'{flags} --langs en x1', f'{flags} --float32'):
        assert 'finished' in call(f'train --task sample {again} --data elsewhere/ --out a/').err
    folder.rename(tmp_path / 'b')
    assert 'finished' in call(f'train --task sample {flags} --data {moved} --out {tmp_path}/b').err
    assert {path.name: path.read_bytes() for path in (tmp_path / 'b').rglob('*') if path.is_file()} == {
        path.name: content for path, content in before.items()}
    # Every argument that decides, and every file that is read, makes another run.
    for other, differs in (('--lr 0.1', 'lr'), ('--seed 3', 'seed'), ('--max-eval 5', 'max_eval'),
                           ('--warmup 0.5', 'warmup'), ('--max-train 100', 'max_train'),
                           ('--batch 15', 'batch'), ('--freeze-embeddings', 'freeze_embeddings')):
        with pytest.raises(data.InputError,
                           match=rf'b: holds another run \({differs} \S+, not \S+\); name another'):
            call(f'train --task sample {flags} {other} --data elsewhere --out b')
    for name in ('train-en', 'dev-en', 'test-x3'):
        path = moved / f'sample/{name}.tsv'
        content = path.read_bytes()
        path.write_bytes(content.split(b'\n', 1)[1])
        with pytest.raises(data.InputError, match=rf'\({name}\.tsv \w{{16}}, not \w{{16}}\)'):
            call(f'train --task sample {flags} --data elsewhere --out b')
        path.write_bytes(content)
    with pytest.raises(data.InputError, match=r'\(model \w{16}, not \w{16}\)'):
        call(f'train --task sample {flags} --data elsewhere --out b --model b')
    config = moved / 'sample/model/config.json'
    config.write_text(config.read_text().replace('"hidden_dropout_prob": 0.0', '"hidden_dropout_prob": 0.5'))
    with pytest.raises(data.InputError,
                       match=r'\(dropout .*"hidden_dropout_prob": 0.0}, not .*"hidden_dropout_prob": 0.5}\)'):
        call(f'train --task sample {flags} --data elsewhere --out b')


# As `python train.py FLAGS`, but the process is killed at a step's evaluation: between checkpoint and state,
# or after both.
KILLED = """
import os, signal, sys, train
where, at = sys.argv.pop(1), int(sys.argv.pop(1))
train.STATE_SECONDS, save_state, save_checkpoint = -1, train.save_state, train.save_checkpoint
def killing(model, optimizer, state, args):
    if where == 'between' and state['step'] == at:
        os.kill(os.getpid(), signal.SIGKILL)
    save_state(model, optimizer, state, args)
    if state['step'] == at:
        os.kill(os.getpid(), signal.SIGKILL)
train.save_state = killing
train.main()
"""


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
def process(tmp_path):
    """process(code, arguments): Python code as a process of one thread -> its CompletedProcess."""
    def process(code, *arguments, **options):
        command = [sys.executable, '-c', code, *map(str, arguments)]
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True, env=ENVIRONMENT, **options)
    return process


@pytest.mark.parametrize('method, kills', [('rs_r --eps 0.1', [('between', 20), ('after', 30)]),
                                           ('adv --eps 0.01 --plain-steps 15', [('after', 30)]),
                                           ('rs_a', [('between', 30)])])
def test_a_killed_run_ends_with_the_weights_of_one_that_was_never_stopped(method, kills, small, dropping,
                                                                          tmp_path, process, call):
    flags = (f'--task sample --method {method} --data {small} --model {dropping} --max-steps 60 '
             '--eval-steps 10 --lr 3e-3')
    flags += ' --no-freeze-embeddings --batch 16 --langs en x1'
    call(f'train {flags}', '--out', tmp_path / 'whole')
    for where, at in kills:
        ended = process(KILLED, where, at, *flags.split(), '--out', tmp_path / 'killed')
        assert ended.returncode == -9, ended.stderr
    # resumed where it was moved to, with a language more
    shutil.move(tmp_path / 'killed', tmp_path / 'moved')
    flags = flags.replace('--langs en x1', '--langs en x1 x2')
    step = at if where == 'after' else at - 10
    assert f'goes on after step {step}' in call(f'train {flags}', '--out', f'{tmp_path}/moved/').err
    whole, killed = record_of(tmp_path / 'whole'), record_of(tmp_path / 'moved')
    assert (whole['history'] == killed['history']
            and whole['test_marks'].items() < killed['test_marks'].items())
    assert 'test-x2.tsv' in killed['files'] and killed['paths']['out'] == f'{tmp_path}/moved/'
    assert len({h['dev'] for h in whole['history']}) > 1
    weights = [(tmp_path / name / 'model.safetensors').read_bytes() for name in ('whole', 'moved')]
    assert weights[0] == weights[1]
    assert not list((tmp_path / 'moved').glob('*.p*t*'))


def test_the_peak_of_an_earlier_run_is_not_this_runs(run, monkeypatch):
    for peaks, said in (([1.5, 2.5], 2.5), ([2.5, 2.5], None)):
        monkeypatch.setattr(train, 'peak_memory', lambda device, peaks=iter(peaks): next(peaks))
        assert run(f'peak {said}',
                   f'--method plain {FAST} --max-train 20 --max-eval 2')[1]['peak_memory_gib'] == said
    monkeypatch.undo()
    assert 0.05 < train.peak_memory(torch.device('cpu')) < 100


def test_a_finished_run_says_which_languages_it_lacks(small, tmp_path, call, monkeypatch):
    flags = f'--task sample --method plain --data {small} --out {tmp_path}/a --max-steps 1'
    call(f'train {flags} --langs en x1')
    assert 'a: finished without test-x2.tsv, which `python evaluate.py' in call(
        f'train {flags} --langs en x2').err
    said = call(f'train {flags} --langs x1').err
    assert 'finished without' not in said and 'finished in' not in said
    monkeypatch.setattr(evaluate, 'choose_device', lambda float32: (torch.device('cpu'), torch.bfloat16))
    assert 'a: finished in torch.float32, not torch.bfloat16' in call(f'train {flags} --langs x1').err


def test_a_flag_that_no_method_takes_is_named(small, call):
    common = f'train --task sample --data {small} --dry-run --method'
    said = call(f'{common} plain rs_a --eps 0.1 --adv-steps 3 --m 5 --layer 9 '
                f'--synonyms {small}/sample/synonyms.json').err
    assert '--eps: without effect on plain rs_a\n' in said and '--adv-steps: without effect' in said
    assert '--layer: without effect' in said and said.count('without effect') == 3
    said = (call(f'{common} plain --synonyms x.json').err
            + call(f'{common} rs_a --replace authors --p 0.5').err)
    assert '--synonyms: without effect on plain\n' in said and '--p: without effect on rs_a\n' in said


def stopped(tmp_path, call, flags, monkeypatch):
    """A run that Ctrl-C stopped after its second evaluation."""
    save_state, calls = train.save_state, itertools.count(1)

    def interrupted(*args):
        save_state(*args)
        if next(calls) == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(train, 'STATE_SECONDS', -1)
    with monkeypatch.context() as patch:
        patch.setattr(train, 'save_state', interrupted)
        with pytest.raises(KeyboardInterrupt,
                           match='stopped; the same command goes on from its last saved state'):
            call(f'train {flags}', '--out', tmp_path / 'a')


def test_a_stopped_run_goes_on_only_as_the_same_run(small, tmp_path, call, monkeypatch):
    flags = f'--task sample --method plain --data {small} --max-steps 8 --eval-steps 2'
    stopped(tmp_path, call, flags, monkeypatch)
    for more, differs in (('--seed 3', 'seed'), ('--no-float32', 'dtype'), ('--lr 1', 'lr')):
        if more == '--no-float32':
            monkeypatch.setattr(evaluate, 'choose_device',
                                lambda float32: (torch.device('cpu'), torch.bfloat16))
        with pytest.raises(data.InputError, match=rf'\({differs} \S+, not \S+\)'):
            call(f'train {flags} {more}', '--out', tmp_path / 'a')
        monkeypatch.undo()
    other = tmp_path / 'other'
    shutil.copytree(small, other)
    (other / 'sample/train-en.tsv').write_bytes(
        (small / 'sample/train-en.tsv').read_bytes().split(b'\n', 1)[1])
    with pytest.raises(data.InputError, match=r'\(train-en\.tsv \w{16}, not \w{16}\)'):
        call(f'train {flags.replace(str(small), str(other))}', '--out', tmp_path / 'a')
    monkeypatch.setattr(train, 'WORLD', 2)
    monkeypatch.setattr(train, 'start_processes', lambda: None)
    with pytest.raises(data.InputError, match=r'\(processes 1, not 2\)'):
        call(f'train {flags}', '--out', tmp_path / 'a')
    monkeypatch.undo()
    held = json.loads((tmp_path / 'a/args.json').read_text())
    (tmp_path / 'a/args.json').write_text(json.dumps(held | {'source': 'another'}))
    said = call(f'train {flags}', '--out', tmp_path / 'a').err
    assert 'goes on after step 4' in said and 'a: began with other source: another, now' in said
    assert json.loads((tmp_path / 'a/args.json').read_text()) == held | {'source': 'another'}
    record = record_of(tmp_path / 'a')
    assert record['source'] == 'another' and record['resumed_with']['source'] == train.beginning_of(
        train.parse_args(flags.split()), train.Inputs([], [], [], {}, {}, None, None))['source']


# As `python train.py FLAGS`; the first process keeps the gradients of each step, and each tells whether it
# writes.
GRADIENTS = """
import os, sys, torch, train
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
train.main()
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(('localhost', 0))
        return str(listener.getsockname()[1])


def test_two_processes_have_the_gradients_of_one(small, tmp_path):
    """Batches of 15 of 20 pairs: shares of 8 and 7, then of 3 and 2; and an empty folder, which one of them
    fills.
    """
    (tmp_path / 'spy.py').write_text(GRADIENTS)
    flags = (f'--task sample --method plain --data {small} --epochs 1 --max-train 20 --batch 15 --warmup 0 '
             '--lr 1e-6 --langs en')
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2',
                '--master_port', free_port()]
    for name, command in (('one', [sys.executable]), ('two', torchrun)):
        command = [*command, tmp_path / 'spy.py', tmp_path / name, *flags.split(),
                   '--out', tmp_path / f'run {name}']
        ended = subprocess.run(command, env=ENVIRONMENT | {'PYTHONPATH': str(HERE)},
                               capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count('| plain') == 1
        # one process writes
        assert [path.name for path in tmp_path.glob(f'{name}.kept.*')] == [f'{name}.kept.0']
    for step in (0, 1):
        one, two = (torch.load(tmp_path / f'{name}.{step}', weights_only=True) for name in ('one', 'two'))
        assert len(one) == len(two) and max(g.abs().max() for g in one) > 1e-3
        for a, b in zip(one, two):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert record_of(tmp_path / 'run two')['processes'] == 2


def test_out_of_memory_gives_one_line_and_keeps_the_last_good_checkpoint(run, tmp_path, monkeypatch):
    flags = '--method plain --max-steps 6 --eval-steps 2'
    plain, calls = robust.plain, itertools.count(1)

    def full(model, batch):
        if next(calls) == 4:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')
        return plain(model, batch)
    with monkeypatch.context() as patch:
        patch.setattr(robust, 'plain', full)
        with pytest.raises(data.InputError,
                           match=r'^\S+: out of GPU memory \(CUDA out of memory.* or --max-length; the same'):
            run('new', flags)
    assert evaluate.load(tmp_path / 'new') and not (tmp_path / 'new/results.json').exists()
    assert run('new', flags)[1]['history'] == run('whole', flags)[1]['history']


def test_a_full_disk_gives_one_line_and_the_state_before_stays(run, tmp_path, monkeypatch):
    flags = '--method plain --max-steps 6 --eval-steps 2'
    save, calls = torch.save, itertools.count(1)
    monkeypatch.setattr(train, 'STATE_SECONDS', -1)

    def full(state, path):
        if next(calls) > 1:
            Path(path).write_bytes(b'half')
            raise OSError(28, 'No space left on device')
        save(state, path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, 'save', full)
        with pytest.raises(data.InputError,
                           match=r'a: .*No space left on device.*; the same command goes on'):
            run('a', flags)
    assert not list(tmp_path.rglob('*part*'))
    assert (run('a', flags)[1]['history'] == run('b', flags)[1]['history']
            and not (tmp_path / 'a/state.pt').exists())


def test_everything_is_looked_at_before_the_first_run(small, tmp_path, call):
    """A grid whose fourth method lacks its neighbour file, or whose last language is broken, never begins."""
    flags = f'train --task sample --method plain rs_a --max-steps 1 --data {small} --out {tmp_path / "new"}'
    for more in ('--synonyms nowhere.json', '--synonyms nowhere.json --dry-run',
                 '--layer 7 --method rs_r plain', '--langs en yo', '--method plain adv --plain-steps 1',
                 '--model nowhere'):
        with pytest.raises(data.InputError):
            call(f'{flags} {more}')
        assert not (tmp_path / 'new').exists()
    said = call(f'{flags} --dry-run --seed 1 2').err
    assert said.count(': new') == 4 and not (tmp_path / 'new').exists()


def test_adv_that_would_never_begin_is_refused(run):
    with pytest.raises(data.InputError,
                       match=r'--plain-steps 8: the run has 8 steps, so that adv would never begin'):
        run('a', f'--method plain adv {FAST} --plain-steps 8')
    assert run('b', f'--method adv {FAST} --plain-steps 7')[1]['step'] == 8


def test_rs_a_in_name_only_is_refused(run, tmp_path):
    (tmp_path / 's.json').write_text('{"cat": ["dog"]}')
    with pytest.raises(data.InputError, match='s.json'):
        run('a', f'--method rs_a {FAST} --synonyms {tmp_path / "s.json"}')
    _, record = run('b', f'--method rs_a {FAST}')
    (tmp_path / 't.json').write_text((json.dumps({word: ['dog'] for word in ('bokin',)})))
    assert not (tmp_path / 'a').exists() and record['changed'] > 0


def test_ones_own_languages_are_trained_on_and_scored(world, small, tmp_path, call):
    """A folder of one's own: train-en, dev-en, and a test file of a language that no table of the paper has.
    """
    own = tmp_path / 'own/pawsx'
    own.mkdir(parents=True)
    for name, source in (('train-en', 'train-en'), ('dev-en', 'dev-en'), ('test-en', 'test-en'),
                         ('test-yo', 'test-x2')):
        pairs = data.read_pairs(small / f'sample/{source}.tsv', 'sample')
        data.write_pairs(own / f'{name}.tsv', pairs)
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
    assert sorted(path.name for path in own.iterdir()) == ['dev-en.tsv', 'test-en.tsv', 'test-yo.tsv',
                                                           'train-en.tsv']


def test_the_default_eps_is_the_methods(small, tmp_path):
    args = train.parse_args('--task pawsx --method plain adv rs_r rs_a --seed 1 2'.split())
    runs = train.runs_of(args)
    assert [run.eps for run in runs] == [None, None, 0.001, 0.001, 0.1, 0.1, None, None]
    assert [run.out for run in runs][::2] == ['runs/pawsx-plain-seed1', 'runs/pawsx-adv-0.001-seed1',
                                              'runs/pawsx-rs_r-0.1-seed1', 'runs/pawsx-rs_a-seed1']
    assert {run.model for run in runs} == {'bert-base-multilingual-cased'}
    assert [(run.epochs, run.lr, run.batch, run.eval_steps)
            for run in runs[::2]] == [(5, 2e-5, 32, 200)] * 3 + [(3, 2e-5, 32, 200)]
    assert [run.synonyms for run in runs[::2]] == [None] * 3 + [
        'download/synonyms/counterfitted_neighbors.json']


def test_a_layer_above_0_is_float32(small, call, monkeypatch):
    asked = []

    def choose_device(float32):
        asked.append(float32)
        return torch.device('cpu'), torch.float32
    monkeypatch.setattr(evaluate, 'choose_device', choose_device)
    for flags in ('plain rs_r --layer 1', 'rs_r --layer 0', 'plain --layer 1'):
        call(f'train --task sample --data {small} --max-steps 1 --dry-run --no-float32 --method {flags}')
    assert asked == [True, False, False]


def test_a_log_file_holds_whole_lines(small, tmp_path):
    flags = (f'--task sample --method plain rs_r --seed 1 --max-steps 2 --data {small} '
             f'--out {tmp_path / "runs"}')
    ended = subprocess.run([sys.executable, HERE / 'train.py', *flags.split()], env=ENVIRONMENT,
                           capture_output=True, text=True)
    assert ended.returncode == 0 and '\r' not in ended.stderr
    lines = ended.stderr.splitlines()
    for method, number in (('plain', 1), ('rs_r-0.1', 2)):
        score = next(line for line in lines
                     if line.startswith(f'run {number} of 2: {method}-seed1: test average'))
        assert f'saved in {tmp_path}/runs/sample-{method}-seed1' in score


# ---------------------------------------------------------------- evaluate.py: models

def test_a_pair_that_is_cut_is_counted_and_said(tokenizer, small, run, call, tmp_path):
    # + 3 special tokens
    pairs = [data.Pair('bokin ' * length, 'bokin ' * 3, 0) for length in (1, 5, 8, 9, 10, 20)]
    features, cut = evaluate.encode(tokenizer, pairs, 14)
    assert cut == 3 and [len(feature['input_ids']) for feature in features] == [7, 11, 14, 14, 14, 14]
    _, record = run('a', f'--method plain {FAST} --max-length 8')
    assert record['cut'] == dict.fromkeys(data.TASKS['sample'].languages, 30)
    said = call('train --task sample --method plain --max-steps 1 --max-length 8 --langs en x2 '
                f'--data {small} --out {tmp_path}/b').err
    assert 'pairs of more than 8 tokens, cut there: en 30, x2 30' in said


def test_more_tokens_than_positions_are_capped(model, tokenizer, capsys):
    evaluate.say.cache_clear()
    tokenizer.model_max_length = 10 ** 30
    positions = 20 if model.config.model_type == 'bert' else 18         # XLM-R's begin behind the padding's
    assert (evaluate.longest(model, tokenizer, 128) == positions
            and evaluate.longest(model, tokenizer, 128) == positions)
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


def test_predictions_come_back_in_the_order_of_the_pairs_and_logits_that_are_not_finite_stop_them(tokenizer):
    """By a made-up classifier of pairs by their length, in batches of two."""
    class Lengths(torch.nn.Module):
        device, config, broken = torch.device('cpu'), types.SimpleNamespace(name_or_path='lengths'), None

        def forward(self, attention_mask, **inputs):
            tokens = attention_mask.sum(1)
            logits = torch.nn.functional.one_hot(tokens % 3, 3).float()
            if self.broken:
                logits[tokens == self.broken] = math.nan
            return types.SimpleNamespace(logits=logits)
    model, lengths = Lengths(), [3, 1, 4, 2, 7, 5, 6]
    pairs = [data.Pair('a ' * length, 'b', 0) for length in lengths]        # [CLS], a ..., [SEP], b, [SEP]
    expected = [(length + 4) % 3 for length in lengths]
    assert evaluate.predict(model, tokenizer, pairs, batch=2)[0].tolist() == expected
    for length in lengths:
        model.broken = length + 4
        with pytest.raises(data.InputError, match='lengths: gives logits that are not finite'):
            evaluate.predict(model, tokenizer, pairs, batch=2)


def test_weights_or_a_tokenizer_that_are_not_there_are_refused(world, tmp_path):
    whole = world / 'sample/model'

    def copy(name, *without):
        shutil.copytree(whole, tmp_path / name, ignore=shutil.ignore_patterns(*without))
        return str(tmp_path / name)
    with pytest.raises(data.InputError, match='bare: .*tokenizer'):
        evaluate.load_encoder(copy('bare', 'tokenizer*'), 'sample')
    weights = torch.nn.ModuleDict()
    foreign = copy('foreign')
    tensors = {f'other.{name}': tensor
               for name, tensor in transformers.BertModel.from_pretrained(whole).state_dict().items()}
    from safetensors.torch import save_file
    save_file(tensors, Path(foreign) / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(data.InputError, match=r'foreign: \d+ of its weights are missing \(bert\.'):
        evaluate.load_encoder(foreign, 'sample')
    with pytest.raises(data.InputError,
                       match=r'weights are missing \(classifier\..*expected a fine-tuned classifier'):
        evaluate.load(str(whole))
    assert not list(weights.parameters())


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


def test_half_precision_weights_are_trained_in_float32(world, tmp_path, run):
    folder = tmp_path / 'half'
    shutil.copytree(world / 'sample/model', folder)
    transformers.BertModel.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    assert json.loads((folder / 'config.json').read_text())['dtype'] == 'float16'
    model, _ = evaluate.load_encoder(str(folder), 'sample')
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    trained, _ = run('a', f'--method plain {FAST} --model {folder}')
    after = evaluate.load(str(trained))[0]
    assert {p.dtype for p in after.parameters()} == {torch.float32}
    moved = after.bert.encoder.layer[0].output.dense.weight != model.bert.encoder.layer[0].output.dense.weight
    assert moved.float().mean() > 0.99


def test_a_classifier_of_another_task_gets_a_new_head(run, tmp_path, capsys):
    folder, _ = run('a', f'--method plain {FAST}')
    capsys.readouterr()
    kept, _ = evaluate.load_encoder(str(folder), 'sample')
    old = evaluate.load(str(folder))[0]
    assert (torch.equal(kept.classifier.weight, old.classifier.weight)
            and 'its head is kept' in capsys.readouterr().err)
    for task, labels in (('xnli', 3), ('pawsx', 2)):
        new, _ = evaluate.load_encoder(str(folder), task)
        assert 'a classifier of different, paraphrase; it gets a new head' in capsys.readouterr().err
        assert (new.classifier.out_features == labels
                and not torch.equal(new.classifier.weight[:2], old.classifier.weight))
        assert torch.equal(new.bert.encoder.layer[0].output.dense.weight,
                           old.bert.encoder.layer[0].output.dense.weight)


def test_no_pad_token_and_nothing_between_the_sentences(world, tmp_path):
    def change(name, **settings):
        folder = tmp_path / name
        shutil.copytree(world / 'sample/model', folder)
        config = json.loads((folder / 'tokenizer_config.json').read_text())
        for key, value in settings.items():
            config.pop(key, None)
            if value:
                config[key] = value
        (folder / 'tokenizer_config.json').write_text(json.dumps(config))
        return folder
    with pytest.raises(data.InputError, match='padless: a trial .* failed: .*does not have a padding token'):
        evaluate.load_encoder(str(change('padless', pad_token=None)), 'sample')
    _, tokenizer = evaluate.load_encoder(str(change('ended', pad_token=None, eos_token='[SEP]')), 'sample')
    assert tokenizer.pad_token == '[SEP]'
    folder = change('joined')
    tokenizer = json.loads((folder / 'tokenizer.json').read_text())
    tokenizer['post_processor'] = None
    (folder / 'tokenizer.json').write_text(json.dumps(tokenizer))
    with pytest.raises(data.InputError, match='puts nothing between the two sentences'):
        evaluate.load_encoder(str(folder), 'sample')


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
    # Noise on the last layer's first token alone, as the head sees it; on an earlier layer it is seen by all.
    with robust.hidden(model, 1) as first, robust.hidden(model, 2) as last:
        model(**batch)
    assert (first[0].shape == last[0].shape == (2, batch['input_ids'].shape[1], 16)
            and not torch.equal(first[0], last[0]))


@pytest.mark.parametrize('config, message', [
    (lambda t: t.MT5Config(vocab_size=634, d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8),
     'an encoder-decoder'),
    (lambda t: t.CanineConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                              intermediate_size=32), 'keeps its layers in 3 lists'),
    (lambda t: t.XLMConfig(vocab_size=634, emb_dim=16, n_layers=2, n_heads=2),
     'keeps its layers in 4 lists')])
def test_encoders_that_do_not_fit_are_refused_in_one_line(config, message, world, tmp_path):
    model = transformers.AutoModel.from_config(config(transformers))
    shutil.copytree(world / 'sample/model', tmp_path / 'm')
    model.save_pretrained(tmp_path / 'm')
    with pytest.raises(data.InputError, match=message) as error:
        evaluate.load_encoder(str(tmp_path / 'm'), 'sample', layer=-1)
    assert '\n' not in str(error.value)


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


# ---------------------------------------------------------------- evaluate.py: the tables

LANGS = data.TASKS['sample'].languages


def record(method, eps, seed, marks, dev=50.0, name='', step=50, files=(), dev_marks=None, extra=(), **args):
    """A record as train.py writes it, with these marks in all languages of the sample world, or {language:
    marks}.
    """
    by_lang = marks if isinstance(marks, dict) else dict.fromkeys(LANGS, marks)
    own = {'layer': None, 'adv_steps': None, 'plain_steps': None, 'm': None, 'p': None, 'replace': None,
           'english_only': None}
    own |= {'adv': {'layer': 0, 'adv_steps': 1, 'plain_steps': 0}, 'rs_r': {'layer': 0}, 'plain': {},
            'rs_a': {'m': 10, 'p': 0.1, 'replace': 'paper', 'english_only': False}}[method]
    found = {'name': name or f'{method}-{eps}-{seed}', 'dev': dev, 'step': step, 'steps': 200,
             'train_pairs': 5000, 'dtype': 'torch.float32',
             'paths': {'model': 'somewhere/encoder', 'data': 'D'}, 'versions': {'torch': '2'}, 'source': 'a',
             'device': 'CPU',
             'files': {'train-en.tsv': '1', 'dev-en.tsv': '2', 'model': '3', 'synonyms': None, **dict(files)},
             'changed': None, 'test_marks': by_lang,
             'test': {lang: evaluate.accuracy(row) for lang, row in by_lang.items()},
             'cut': dict.fromkeys(by_lang, 0), 'answers': dict.fromkeys(by_lang, [10, 10]),
             'args': {'task': 'sample', 'method': method, 'eps': eps, 'seed': seed, 'epochs': 4.0,
                      'max_length': 128, 'max_eval': None, 'max_steps': 200, **own, **args}}
    if dev_marks:
        found['dev_marks'] = dict(dict.fromkeys(by_lang, '1'), **dev_marks)
        found['dev_all'] = {lang: evaluate.accuracy(row) for lang, row in found['dev_marks'].items()}
    return found | dict(extra)


def table_of(*records):
    """The one table of these records -> ({row: cells}, lines above, notes)."""
    group, = evaluate.groups(list(records))
    table = evaluate.table_of(group)
    return {name: [cells.get(column, '-') for column in table.columns]
            for name, cells in table.rows}, table.above, table.below


def test_the_table_of_four_runs_by_hand():
    """Accuracies of two seeds each: plain 50 and 25 -> 37.5, sd 17.7; rs_r 75 and 100 -> 87.5; gains +25 and
    +75.
    """
    runs = [record('rs_r', 0.1, 2, '1111'), record('plain', None, 2, '1000'),
            record('rs_r', 0.1, 1, '1110'), record('plain', None, 1, '1100')]
    rows, above, below = table_of(*runs)
    assert list(rows) == ['plain', '  sd of 2 seeds', 'rs_r 0.1', '  gain over plain']
    assert (rows['plain'] == ['37.5'] * 8 and rows['rs_r 0.1'] == ['87.5'] * 8
            and rows['  sd of 2 seeds'] == ['17.7'] * 8)
    # Items: (0, 1, 1, 1) - (0, 0.5, 0, 0)..: their gains 0 0.5 1 0.5, standard error sqrt(1/6)/2 = 20.4;
    # seeds: 12.706 * 25 = 317.7.
    half = math.hypot(1.96 * 100 * math.sqrt(1 / 6) / 2, 12.706 * 25)
    assert rows['  gain over plain'] == [f'+50.0 ±{half:.1f}'] * 8
    assert any('rs_r, each seed: +25.0 +75.0' in note for note in below)


def test_a_table_says_above_it_what_it_is_of():
    runs = [record('plain', None, 1, '10' * 500),
            record('rs_r', 0.1, 2, '10' * 500, extra={'steps': 201, 'device': 'GPU'}),
            record('rs_a', None, 2, '10' * 500,
                   extra={'source': 'b', 'versions': {'torch': '3'}, 'changed': 0.026})]
    _, above, below = table_of(*runs)
    for part in ('sample', 'seeds 1 2', 'model encoder', '200 to 201 steps', '5,000 training pairs',
                 '1,000 test items', 'float32', 'device: "CPU", "GPU"', 'source: "a", "b"',
                 'versions: {"torch": "2"}, {"torch": "3"}'):
        assert part in '\n'.join(above), part
    assert 'trial' not in '\n'.join(above) and any('changed 2.6% of the words' in note for note in below)
    for trial in (record('plain', None, 1, '1' * 30),
                  record('plain', None, 1, '1' * 1000, extra={'steps': 10})):
        assert 'A trial, not a result' in '\n'.join(table_of(trial)[1])


def test_every_eps_is_a_row_and_english_dev_chooses():
    grid = [(0.01, 1, '1110', 70, 'x6'), (0.01, 2, '1110', 60, 'x6'),
            (1.0, 1, '0011', 69, 'x1'), (1.0, 2, '0011', 59, 'x1')]
    runs = [record('plain', None, 1, '1100')]
    runs += [record('adv', eps, seed, marks, dev=dev, dev_marks={lang: '0'})
             for eps, seed, marks, dev, lang in grid]
    rows, _, below = table_of(*reversed(runs))
    assert list(rows) == ['plain, n=1', 'adv 0.01 (from the start), chosen', '  sd of 2 seeds',
                          '  gain over plain', '  oracle eps', 'adv 1 (from the start)']
    # x6 prefers 1.0; of equals the first
    assert rows['  oracle eps'] == ['75.0'] * 6 + ['50.0', f'{(6 * 75 + 50) / 7:.1f}']
    assert any('English dev, mean over seeds: 0.01 65.0 (n=2), 1 64.0 (n=2)' in note for note in below)
    assert any('adv (from the start), each seed: +25.0' in note for note in below)
    runs[-1]['dev'] = runs[-2]['dev'] = 90.0
    assert 'adv 1 (from the start), chosen' in table_of(*runs)[0]
    del runs[1]['dev_marks']        # an oracle over some of the runs would compare unlike things
    assert '  oracle eps' not in table_of(*runs)[0]


def test_an_eps_of_fewer_seeds_is_shown_but_not_chosen():
    runs = [record('plain', None, seed, '1100') for seed in (1, 2)]
    runs += [record('rs_r', 0.01, seed, '1110', dev=60, dev_marks={'x1': '0'}) for seed in (1, 2)]
    runs.append(record('rs_r', 1.0, 1, '1111', dev=70, dev_marks={'x1': '1'}))
    rows, _, below = table_of(*runs)
    assert list(rows) == ['plain', '  sd of 2 seeds', 'rs_r 0.01', '  gain over plain', 'rs_r 1, n=1']
    assert 'rs_r, each seed: +25.0 +25.0' in below and not any(note.startswith('chosen') for note in below)
    more = [record('rs_r', 0.1, seed, '1000', dev=65, dev_marks={'x1': '0'}) for seed in (1, 2)]
    rows, _, below = table_of(*runs, *more)
    assert ('rs_r 0.1, chosen' in rows and 'rs_r 1, n=1' in rows
            and any(note.startswith('chosen') for note in below))
    # among the two of two seeds; x1 is best with 1.0, of one
    assert rows['  oracle eps'] == ['75.0'] * 8


def test_a_label_names_what_tells_a_run_apart_and_nothing_that_is_off():
    runs = [record('rs_a', None, 1, '10', english_only=False),
            record('rs_a', None, 1, '11', english_only=True),
            record('rs_a', None, 1, '01', english_only=False, replace='authors', p=None)]
    assert list(evaluate.variants(runs)) == [
        'rs_a p=0.1 replace=paper', 'rs_a p=0.1 replace=paper english_only', 'rs_a replace=authors']
    layers = [record('rs_r', 0.1, 1, '10', layer=layer) for layer in (0, 1)]
    assert list(evaluate.variants(layers)) == ['rs_r layer=0', 'rs_r layer=1']


def test_records_that_do_not_belong_together_get_tables_of_their_own_and_are_told_apart(capsys):
    a, b = record('plain', None, 1, '10', name='a'), record('plain', None, 2, '10', name='b', max_steps=9)
    runs = [record('rs_a', None, 1, '11', name='c', epochs=3.0), a, b,
            record('adv', 0.1, 1, '01', name='e', adv_steps=3),
            record('rs_a', None, 1, '01', name='d', replace='authors', epochs=3.0)]
    found = evaluate.groups(runs)
    assert [[run['name'] for run in group] for group in found] == [['a', 'e', 'c', 'd'], ['b']]
    assert list(evaluate.variants(found[0])) == ['plain', 'adv (from the start)', 'rs_a replace=paper',
                                                 'rs_a replace=authors']
    evaluate.report(runs)
    assert 'In no table with the runs above: a: max_steps 9 and 200\n' in capsys.readouterr().out
    for changes in ({'files': {'model': 'other'}}, {'files': {'train-en.tsv': 'other'}},
                    {'extra': {'dtype': 'torch.bfloat16'}}, {'max_eval': 2}, {'lr': 1}):
        one = record('plain', None, 1, '10', lr=changes.get('lr', 2), files={'test-x1.tsv': '1'})
        other = record('rs_r', 0.1, 1, '10', **{'lr': 2, **changes})
        assert len(evaluate.groups([one, other])) == (1 if changes == {'lr': 1} else 2), changes
    one, other = (record('plain', None, seed, '10', files={name: value}) for seed, name, value in
                  ((1, 'test-x1.tsv', 'a'), (2, 'test-x1.tsv', 'b')))
    assert len(evaluate.groups([one, other])) == 2
    other['files'] = {**other['files'], 'test-x1.tsv': 'a', 'test-yo.tsv': 'c', 'synonyms': 's'}
    # a file that one alone names, and the neighbour file
    assert len(evaluate.groups([one, other])) == 1


def test_runs_that_differ_share_no_picture(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, 'check_picture', lambda path: None)
    args = evaluate.parse_args(['a', 'b', '--regions', '-o', 'p.png'])
    a, b = record('rs_r', 0.1, 1, '10', name='a'), record('rs_r', 0.1, 2, '10', name='b')
    evaluate.check_output(args, [a, b])
    with pytest.raises(data.InputError, match='b does not belong with a: max_steps 9 and 200; expected runs'):
        evaluate.check_output(args, [a, record('rs_r', 0.1, 2, '10', name='b', max_steps=9)])
    both = evaluate.find_runs(evaluate.parse_args(['x/c', 'y/c', '--regions', '--task', 'sample']))
    evaluate.check_output(args, both)
    assert evaluate.label_of(both[0], both) == 'x/c' and evaluate.label_of(both[1], both) == 'y/c'


def test_a_language_that_one_run_lacks_has_no_gain():
    one, two = record('plain', None, 1, '10'), record('rs_r', 0.1, 1, '11')
    del two['test_marks']['x2']
    points, half = evaluate.gain([two], [one], ['x1', 'x2'])
    assert points[0] == 50 and points[1].isnan() and half[1].isnan() and points[2] == 50


def test_cut_pairs_are_told_with_the_length_at_which_they_were_cut():
    runs = [record('plain', None, 1, '10', extra={'cut': {'x1': 3}, 'longest': 64})]
    assert 'pairs of more than 64 tokens, cut there: x1 3' in table_of(*runs)[2]


def test_numbers_of_items_never_mix():
    short, long = record('plain', None, 1, '1', name='short'), record('rs_r', 0.1, 1, '10', name='long')
    assert len(evaluate.groups([short, long])) == 2
    rows, *_ = table_of(record('plain', None, 1, '1'), record('rs_r', 0.1, 1, '1'))
    assert rows['  gain over plain'] == ['-'] * 8            # an item has no spread


def test_a_run_counts_once(capsys):
    runs = [record('plain', None, 1, '1100', name='folder'),
            record('plain', None, 1, '1100', name='runs.jsonl:1')]
    assert list(table_of(*runs)[0]) == ['plain'] and not capsys.readouterr().err
    runs[1]['test_marks'] = dict.fromkeys(LANGS, '0000')
    assert table_of(*runs)[0]['plain'] == ['50.0'] * 8
    assert 'runs.jsonl:1: the same run as folder, with other results' in capsys.readouterr().err
    runs = [record('rs_a', None, 1, '1100', files={'synonyms': name}) for name in 'xy']
    assert list(table_of(*runs)[0]) == ['rs_a synonyms=x', 'rs_a synonyms=y']


def test_one_answer_for_nearly_every_item_is_marked():
    counts = [[98, 2], [50, 50], [96, 4]]
    runs = [record('rs_r', 1.0, seed, '10', extra={'answers': {'en': pair}})
            for seed, pair in enumerate(counts)]
    rows, _, below = table_of(*runs)
    assert (list(rows)[0] == 'rs_r 1 †'
            and '†: rs_r 1: one answer for 95% or more of English items in 2 of 3 seeds' in below)
    assert not any('†' in name for name in table_of(
        record('rs_r', 1.0, 1, '10', extra={'answers': {'en': [94, 6]}}))[0])


def test_a_language_without_labels_is_shown_and_not_averaged():
    marks = [{**dict.fromkeys(LANGS, '1100'), 'x1': '1111', 'x2': None},
             {**dict.fromkeys(LANGS, '1110'), 'x1': '1111', 'x2': None}]
    rows, _, below = table_of(record('plain', None, 1, marks[0]), record('rs_r', 0.1, 1, marks[1]))
    assert rows['plain'] == ['50.0', '100.0', '-', '50.0', '50.0', '50.0', '50.0',
                             f'{(100 + 5 * 50) / 6:.1f}']
    assert rows['  gain over plain'][2] == '-' and any(note.startswith('x2: no labels') for note in below)
    points, half = evaluate.gain([record('rs_r', 0.1, 1, marks[1])], [record('plain', None, 1, marks[0])],
                                 LANGS)
    assert (points[2].isnan() and half[2].isnan() and points[7] == pytest.approx(5 * 25 / 6)
            and half[7].isfinite())
    del marks[1]['x3']              # trained with fewer --langs: averages stay of the same languages
    rows, *_ = table_of(record('plain', None, 1, marks[0]), record('rs_r', 0.1, 1, marks[1]))
    assert rows['plain'][3] == '-' and rows['plain'][7] == f'{(100 + 4 * 50) / 5:.1f}'
    rows, *_ = table_of(record('plain', None, 1, dict.fromkeys(LANGS)))
    assert rows['plain'] == ['-'] * 8


def test_ones_own_language_comes_after_the_papers_and_the_paper_has_none():
    marks = {'yo': '10', 'de': '11', 'en': '10', 'ja': None}
    group, = evaluate.groups([record('plain', None, 1, marks, task='pawsx')])
    table = evaluate.table_of(group)
    rows = dict(table.rows)
    assert table.columns == ['en', 'de', 'ja', 'yo', 'avg.']
    assert rows['plain'] == {'en': '50.0', 'de': '100.0', 'yo': '50.0', 'avg.': '66.7'}
    assert rows['  paper, plain'] == {'en': '93.8', 'de': '85.8'}
    del marks['yo']
    group, = evaluate.groups([record('plain', None, 1, marks, task='pawsx')])
    assert dict(evaluate.table_of(group).rows)['  paper, plain'] == {'en': '93.8', 'de': '85.8',
                                                                     'avg.': '89.8'}


def test_rows_of_the_paper_have_the_averages_that_it_prints():
    for task, rows in evaluate.PAPER.items():
        assert list(rows) == ['mBERT*', 'plain', 'adv', 'rs_r', 'rs_a']
        for row in rows.values():
            *scores, average = map(float, row.split())
            assert (len(scores) == len(data.TASKS[task].languages)
                    and sum(scores) / len(scores) == pytest.approx(average, abs=0.051))


def test_a_table_reads_as_plain_text():
    table = evaluate.Table(['above'], ['en', 'avg.'], [('plain', {'en': '9.5', 'avg.': '10.0'}),
                                                       ('  sd', {'en': '+2.0 ±1.2'})], ['below'])
    assert evaluate.render(table) == '\n'.join([
        'above', '', '|       |        en | avg. |', '| ----- | --------: | ---: |',
        '| plain |       9.5 | 10.0 |', '|   sd  | +2.0 ±1.2 |    - |', '', '- below', ''])


# ---------------------------------------------------------------- evaluate.py: the interval

def test_the_interval_by_hand():
    """Two seeds, four items, two languages; the error over items, over seeds, and of the average over
    languages.
    """
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
    one, only = evaluate.gain(ours[:1], plain, ['en'])
    assert one.tolist() == [50.0, 50.0] and only[0] == pytest.approx(1.96 * error([1, 1, 0, 0]))
    points, half = evaluate.gain(ours[2:], plain, ['en'])       # no seed in common
    assert points.isnan().all() and half.isnan().all()


def test_the_three_rows_of_a_premise_are_one_item():
    """Each row three times over: XNLI's interval stays that of the distinct ones. A last premise may be
    short.
    """
    marks = {'plain': '1001100101', 'rs_r': '1011101101'}
    single = [record(method, 0.1, 1, {'en': row}) for method, row in marks.items()]
    triple = [record(method, 0.1, 1, {'en': ''.join(mark * 3 for mark in row)}, task='xnli')
              for method, row in marks.items()]
    expected = evaluate.gain(single[1:], single[:1], ['en'])
    assert torch.allclose(torch.stack(evaluate.gain(triple[1:], triple[:1], ['en'])), torch.stack(expected))
    for run in triple:
        run['test_marks'] = {'en': run['test_marks']['en'][:10]}        # units of 3, 3, 3, 1
    gains = [int(a) - int(b) for a, b in zip(*(run['test_marks']['en'] for run in reversed(triple)))]
    mean = sum(gains) / 10
    sums = [sum(g - mean for g in gains[at:at + 3]) / 10 for at in range(0, 10, 3)]
    assert evaluate.gain(triple[1:], triple[:1], ['en'])[1][0] == pytest.approx(
        196 * math.sqrt(4 / 3 * sum(s * s for s in sums)))


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
                marks = {lang: ''.join('01'[mark] for mark in column)
                         for lang, column in zip(('en', 'x1'), right.int().T.tolist())}
                runs.append(record(method, 0.1, seed, marks))
        points, half = evaluate.gain(runs[seeds:], runs[:seeds], ['en', 'x1'])
        hits += int(abs(points[2] - 10) <= half[2])
    assert 0.93 <= hits / trials <= 0.995, hits / trials


def test_the_quantiles_are_students():
    """P(|t| < q) = 0.95 by numerical integration of the density."""
    for freedom in (1, 2, 4, 9, 30):
        x = torch.linspace(0, evaluate.T975[freedom - 1], 200001, dtype=torch.double)
        scale = (math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
                 / math.sqrt(freedom * math.pi))
        density = scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
        assert torch.trapezoid(density, x).item() == pytest.approx(0.475, abs=2e-5)
    assert len(evaluate.T975) == 30 and list(evaluate.T975) == sorted(evaluate.T975, reverse=True)


# ---------------------------------------------------------------- evaluate.py: beyond the tables

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
    model = types.SimpleNamespace(config=types.SimpleNamespace(id2label={0: '0', 1: '1'}))
    found = evaluate.generalized(model, None, 'pawsx', tmp_path, ['en', 'de', 'ja'])
    assert (seen['en-de'] == [('a', 'B', 1)] and seen['de-en'] == [('A', 'b', 1)]
            and seen['ja-en'] == [('x', 'b', 1), ('z', 'd', 0)])
    assert (seen['en-en'] == [('a', 'b', 1), ('c', 'd', 0), ('e', 'f', 0)]
            and seen['de-de'] == [('A', 'B', 1), ('C', 'D', 1)])
    table = dict(evaluate.generalized_rows(found, ['en', 'de', 'ja'])[0])
    assert (table['en'] == {'en': '33.3', 'de': '100.0', 'ja': '50.0'} and 'ja' not in table['ja']
            and table['de']['de'] == '100.0')
    assert [found[f'en-{lang}']['items'] for lang in ('en', 'de', 'ja')] == [3, 1, 2]
    note, = evaluate.generalized_rows(found, ['en', 'de', 'ja'])[1]
    assert note.startswith('mean of 6 pairs of two languages: 83.3; left out: ')
    without = [('x', 'y', '0'), ('NS', 'v', '0'), ('NS', 'v', '0')]
    data.write_pairs(data.path_of(tmp_path, 'pawsx', 'test', 'ja'), without)
    found = evaluate.generalized(model, None, 'pawsx', tmp_path, ['en', 'ja'])      # no row is left
    assert found['en-ja'] == found['ja-en'] == {'items': 0, 'marks': None, 'cut': 0}
    data.write_pairs(data.path_of(tmp_path, 'pawsx', 'test', 'ja'), rows['ja'][:2])
    with pytest.raises(data.InputError, match='pawsx: rows: 3 in test-en.tsv, 2 in test-ja.tsv'):
        evaluate.generalized(model, None, 'pawsx', tmp_path, ['en', 'ja'])


@pytest.fixture(scope='session')
def finished(small, tmp_path_factory):
    """finished(name, **args): a run folder of an untrained classifier in the small sample world, with a
    record.
    """
    folder = tmp_path_factory.mktemp('finished')
    torch.manual_seed(3)
    model, tokenizer = evaluate.load_encoder(str(small / 'sample/model'), 'sample')
    with torch.no_grad():
        model.classifier.weight.mul_(50)

    def finished(name, method='rs_r', eps=0.1, **args):
        if not (folder / name).exists():
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
            write(method, eps, args, folder / name)
        return folder / name

    def write(method, eps, args, path):
        scores = evaluate.score(model, tokenizer, 'sample', small, LANGS, dtype=torch.float32)
        marks = {lang: row['marks'] for lang, row in scores.items()}
        line = record(method, eps, 1, marks, **args) | {'paths': {'model': 'm', 'data': str(small)}}
        (path / 'results.json').write_text(json.dumps(line) + '\n')
    return finished


def called(capsys, *words):
    """evaluate.py with these words -> what it printed."""
    evaluate.main(evaluate.parse_args([str(word) for word in words]))
    return capsys.readouterr().out


def contents(*folders):
    """Every file below, with what it holds."""
    return {path: path.read_bytes()
            for folder in folders for path in sorted(Path(folder).rglob('*')) if path.is_file()}


def cells_of(printed, row):
    line = next(line for line in printed.splitlines() if line.startswith(f'| {row} '))
    return [cell.strip() for cell in line.split('|')[2:-1]]


@pytest.mark.parametrize('flags', ['', '--max-eval 10', '--langs x1 en', '--data DIR',
                                   '--data DIR --max-eval 1', '--generalized --max-eval 5', '--smooth 3',
                                   '--smooth 2 --eps 0.5 --data DIR',
                                   '--regions --radii 0 1 --steps 2 --langs x1 --data DIR'])
def test_nothing_changes_a_run_and_every_figure_says_what_it_is_of(flags, finished, small, tmp_path, capsys,
                                                                   monkeypatch):
    folder = finished('rs_r')
    shutil.copytree(small, tmp_path / 'DIR')
    monkeypatch.chdir(tmp_path)
    before = contents(folder, tmp_path)
    table = called(capsys, folder)
    printed = called(capsys, folder, *flags.split())
    assert contents(folder, tmp_path) == before and called(capsys, folder) == table
    expected = {'--data DIR': 'test files of DIR', '--max-eval 10': ', 10 items',
                '--langs x1 en': 'languages x1 en', '--smooth 3': '3 passes', '--eps 0.5': 'eps 0.5',
                '--steps 2': 'PGD of 2 steps', '--regions': 'upper bound',
                '--generalized': 'left out: rows whose two labels differ'}
    for flag, text in expected.items():
        assert flag not in flags or text in printed, (flag, printed)
    if flags:
        assert str(folder) in printed and 'float32; cpu' in printed and 'sample' in printed
        assert ('layer 0, seed 42' in printed) == ('--smooth' in flags or '--regions' in flags)


def test_what_is_scored_anew_is_what_is_asked_for(finished, small, tmp_path, capsys):
    folder = finished('rs_r')
    held = json.loads((folder / 'results.json').read_text())['test_marks']
    printed = called(capsys, folder, '--max-eval', '10', '--langs', 'x2', 'en')
    expected = [evaluate.accuracy(held[lang][:10]) for lang in ('x2', 'en')]
    assert cells_of(printed, 'rs_r') == [f'{score:.1f}' for score in [*expected, sum(expected) / 2]]
    shutil.copytree(small, tmp_path / 'D')
    # one's own language
    shutil.copy(tmp_path / 'D/sample/test-x3.tsv', tmp_path / 'D/sample/test-yo.tsv')
    own = called(capsys, folder, '--langs', 'yo', '--data', tmp_path / 'D')
    assert cells_of(own, 'rs_r') == [f'{evaluate.accuracy(held["x3"]):.1f}'] * 2
    rows = data.read_pairs(tmp_path / 'D/sample/test-x1.tsv', 'sample')
    data.write_pairs(tmp_path / 'D/sample/test-x1.tsv', [(a, b) for a, b, _ in rows])
    assert cells_of(called(capsys, folder, '--langs', 'x1', 'x3', '--data', tmp_path / 'D'),
                    'rs_r') == ['-', *cells_of(own, 'rs_r')]


def test_smoothing_is_by_noise_of_the_asked_size_at_the_layer_of_the_training(finished, small, capsys,
                                                                              monkeypatch):
    folder, deep = finished('rs_r'), finished('rs_r-deep', layer=2)
    plain = cells_of(called(capsys, folder, '--max-eval', '30'), 'rs_r')
    assert cells_of(called(capsys, folder, '--smooth', '3', '--eps', '0'), 'rs_r') == plain
    assert cells_of(called(capsys, folder, '--smooth', '3', '--eps', '30'), 'rs_r') != plain
    asked = []
    monkeypatch.setattr(robust, 'worst_delta', lambda model, batch, **options: asked.append(options)
                        or robust.uniform_delta(model, batch, options['eps'], options['layer'],
                                                options['generator']))
    applied = []
    perturbed = robust.perturbed
    monkeypatch.setattr(robust, 'perturbed', lambda model, delta, layer=0: applied.append(layer)
                        or perturbed(model, delta, layer))
    for run, layer in ((folder, 0), (deep, 2)):
        asked.clear(), applied.clear()
        assert f'layer {layer}, seed 5' in called(capsys, run, '--smooth', '3', '--langs', 'en',
                                                  '--seed', '5')
        assert {o['generator'].initial_seed() for o in asked} == {5}
        assert ({(o['eps'], o['layer'], o['steps']) for o in asked} == {(0.1, layer, 0)}
                and applied[-3:] == [layer] * 3)
        asked.clear(), applied.clear()
        called(capsys, run, '--regions', '--steps', '3', '--radii', '0.5', '--langs', 'en')
        assert ([(o['eps'], o['layer'], o['steps']) for o in asked] == [(0.5, layer, 0), (0.5, layer, 3)]
                and applied[-2:] == [layer] * 2)


def test_attack_is_worse_than_noise_and_its_gradient_is_of_float32_logits(finished, small, capsys,
                                                                          monkeypatch):
    folder = finished('rs_r')
    printed = called(capsys, folder, '--regions', '--langs', 'en', '--radii', '0', '0.3')
    noise, attack = cells_of(printed, 'en noise'), cells_of(printed, 'en attack')
    assert (noise[0] == attack[0] and float(attack[1]) < float(attack[0]) - 5
            and float(attack[1]) < float(noise[1]))
    model, tokenizer = evaluate.load(str(folder))
    dtypes, forward = [], model.forward

    def spy(*args, **inputs):
        output = forward(*args, **inputs)
        dtypes.append((output.logits.dtype, 'labels' in inputs))
        return output
    monkeypatch.setattr(model, 'forward', spy)
    evaluate.regions(model, tokenizer, 'sample', small, ['en'], radii=[0.1], steps=2, dtype=torch.bfloat16)
    assert [dtype for dtype, attacked in dtypes if attacked] == [torch.float32] * 2
    assert torch.bfloat16 in [dtype for dtype, attacked in dtypes if not attacked]


def test_a_run_named_twice_is_measured_once(monkeypatch):
    measured = []

    def measure(record, args):
        measured.append(record['name'])
        return evaluate.Table([], [], [], []), {}
    monkeypatch.setattr(evaluate, 'measure', measure)
    args = evaluate.parse_args(['a/', 'b', 'a', './b', '--regions', '--task', 'sample'])
    tables = evaluate.measure_all(evaluate.find_runs(args), args)
    assert measured == ['a', './b'] and len(tables) == 2


def test_the_picture_of_the_regions_hides_nothing(tmp_path):
    pytest.importorskip('matplotlib')
    found = {lang: {'noise': [90.0, 80.0], 'attack': [90.0, 60.0]} for lang in LANGS[:5]}
    other = {lang: {'noise': [90.0, 70.0], 'attack': [90.0, 60.0]} for lang in LANGS[:5]}
    # without labels; not in every run
    found |= {'x5': {'noise': [None, None], 'attack': [None, None]}, 'x6': found['x1']}
    figure = evaluate.draw_regions({'plain': [found], 'rs_r 0.1': [found, other]}, [0, 0.1], 'of what', 50.0)
    panels = [axes for axes in figure.axes if axes.axison]
    assert ([axes.get_title() for axes in panels] == list(LANGS[:5])
            and figure.get_suptitle().startswith('of what')
            and 'in coordinates of Enc(x)' in figure.get_suptitle())
    for axes in panels:
        assert 'L-inf' in axes.get_xlabel() and '%' in axes.get_ylabel()
        assert ([label.get_text() for label in axes.get_xticklabels()] == ['0', '0.1']
                and axes.xaxis.get_tick_params()['labelbottom'])
        chance, *curves = axes.get_lines()
        assert 'chance' in chance.get_label() and set(chance.get_ydata()) == {50.0}
        assert [list(curve.get_ydata()) for curve in curves] == [[90, 80], [90, 60], [90, 75], [90, 60]]
        sizes = [curve.get_linewidth() for curve in curves]
        assert (sizes == sorted(set(sizes), reverse=True)
                and len({curve.get_marker() for curve in curves}) == 2)
        assert all(curve.get_fillstyle() == 'none' for curve in curves)
    for name, begin in (('a.png', b'\x89PNG'), ('a.svg', b'<?xml')):
        evaluate.save_picture(figure, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(begin)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.png', 'a.svg']
    with pytest.raises(data.InputError, match='no language has labels'):
        evaluate.draw_regions({'plain': [{'x5': found['x5']}]}, [0, 0.1], '', 50.0)
    with pytest.raises(data.InputError, match='a.txt: not the name of a picture'):
        evaluate.save_picture(figure, tmp_path / 'a.txt')


# ---------------------------------------------------------------- evaluate.py: command line

def test_minus_o_writes_what_it_names_and_nothing_else(finished, tmp_path, capsys):
    folder = finished('rs_r')
    printed = called(capsys, folder, '-o', tmp_path / 'table.json')
    table, = json.loads((tmp_path / 'table.json').read_text())
    assert table['rows'][0][0] == 'rs_r 0.1' and table['rows'][0][1]['x1'] == cells_of(printed, 'rs_r 0.1')[1]
    called(capsys, folder, '--smooth', '2', '--max-eval', '5', '-o', tmp_path / 'smooth.json')
    assert 'majority over 2 passes' in json.loads((tmp_path / 'smooth.json').read_text())[0]['above'][0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ['smooth.json', 'table.json']
    pytest.importorskip('matplotlib')
    called(capsys, folder, '--regions', '--radii', '0', '1', '--max-eval', '4', '--langs', 'en',
           '-o', tmp_path / 'a.svg')
    assert '<svg' in (tmp_path / 'a.svg').read_text()


@pytest.mark.parametrize('flags', ['--max-eval 4 -o {}/t.json', '-o {}/t.json',
                                   '--task sample --max-eval 4 --langs en -o {}'])
def test_what_cannot_be_written_is_printed_first(flags, finished, small, tmp_path, capsys, monkeypatch):
    folder = finished('rs_r')
    if '--task' in flags:
        shutil.copytree(folder, tmp_path / 'other')
        (tmp_path / 'other/results.json').unlink()
        folder, flags = tmp_path / 'other', f'{flags} --data {small}'
    (tmp_path / 'file').write_text('not a folder')
    with pytest.raises(OSError) as error:
        called(capsys, folder, *flags.format(tmp_path / 'file').split())
    assert str(tmp_path / 'file') in str(error.value.filename)
    assert '| ---' in capsys.readouterr().out and (tmp_path / 'file').read_text() == 'not a folder'


def test_any_classifier_with_the_labels_in_any_order_is_scored_rightly(finished, small, tmp_path, capsys,
                                                                       monkeypatch):
    folder = finished('rs_r')
    held = json.loads((folder / 'results.json').read_text())
    model, tokenizer = evaluate.load(str(folder))
    with torch.no_grad():
        for p in (model.classifier.weight, model.classifier.bias):
            p.copy_(p.flip(0))
    model.config.id2label, model.config.label2id = ({0: 'PARAPHRASE', 1: 'Different'},
                                                    {'PARAPHRASE': 0, 'Different': 1})
    model.save_pretrained(tmp_path / 'team/other')
    tokenizer.save_pretrained(tmp_path / 'team/other')
    monkeypatch.chdir(tmp_path)
    flags = ['--task', 'sample', '--data', small, '--float32']
    before = contents(tmp_path)
    row = cells_of(called(capsys, 'team/other', *flags), 'other')
    assert row[:-1] == [f'{held["test"][lang]:.1f}' for lang in LANGS] and contents(tmp_path) == before
    called(capsys, 'team/other', *flags, '-o', 'out')
    predicted = (tmp_path / 'out/sample/test-x1.tsv').read_text().splitlines()
    pairs = data.read_pairs(small / 'sample/test-x1.tsv', 'sample')
    labels = data.TASKS['sample'].labels
    assert ''.join(str(int(p == labels[pair.label]))
                   for p, pair in zip(predicted, pairs, strict=True)) == held['test_marks']['x1']
    assert len(list((tmp_path / 'out/sample').iterdir())) == 7
    (small_copy := tmp_path / 'D').mkdir()
    shutil.copytree(small / 'sample', small_copy / 'sample')
    # among good ones: nothing is rewritten
    (small_copy / 'sample/test-x6.tsv').write_bytes(b'broken\n')
    before = contents(tmp_path)
    with pytest.raises(data.InputError, match='test-x6.tsv'):
        called(capsys, 'team/other', '--task', 'sample', '--data', small_copy, '--float32',
               '--max-eval', '3', '-o', 'out')
    assert contents(tmp_path) == before
    with pytest.raises(data.InputError,
                       match='paraphrase, different; xnli has contradiction, entailment, neutral'):
        called(capsys, 'team/other', '--task', 'xnli', '--data', small)


def test_labels_without_meaning_are_answered_by_what_to_write(finished, small, tmp_path, capsys):
    shutil.copytree(finished('rs_r'), tmp_path / 'c')
    (tmp_path / 'c/results.json').unlink()
    config = json.loads((tmp_path / 'c/config.json').read_text())
    config |= {'id2label': {'0': 'LABEL_0', '1': 'LABEL_1'}, 'label2id': {'LABEL_0': 0, 'LABEL_1': 1}}
    (tmp_path / 'c/config.json').write_text(json.dumps(config))
    with pytest.raises(data.InputError, match=r'config.json.*id2label.*different.*paraphrase') as error:
        called(capsys, tmp_path / 'c', '--task', 'sample', '--data', small)
    assert '\n' not in str(error.value)


def test_out_of_memory_names_the_batch(finished, capsys, monkeypatch):
    folder = finished('rs_r')       # trained, if it was not, before predict is another
    for error in (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        def full(*args, error=error, **options):
            raise error
        monkeypatch.setattr(evaluate, 'predict', full)
        with pytest.raises(data.InputError, match='rs_r: out of memory; try a smaller --batch than 64'):
            called(capsys, folder, '--max-eval', '3')
    monkeypatch.setattr(evaluate, 'predict', lambda *args, **options: 1 / torch.zeros(2).reshape(3))
    with pytest.raises(RuntimeError, match='shape'):        # a fault of the code stays one
        called(capsys, folder, '--max-eval', '3')


# flags after a run folder RUN of rs_r, one PLAIN, one of pawsx OTHER, or LINES.jsonl; what the line says
WRONG = [
    ('LINES.jsonl --max-eval 3',
     'LINES.jsonl: results without their models; to measure anew, name run folders'),
    ('LINES.jsonl --regions', 'LINES.jsonl: results without their models'),
    ('PLAIN --smooth 3', 'PLAIN: plain has no eps of its own; say --eps'),
    ('RUN OTHER --generalized', 'OTHER: a run of pawsx, not of sample'),
    ('RUN --regions -o picture.txt', 'picture.txt: not the name of a picture'),
    ('RUN --max-eval 3 -o table.txt', '-o table.txt: expected FILE.json'),
    ('RUN -o table.txt', '-o table.txt: expected FILE.json'),
    ('RUN --task pawsx', 'RUN: a run of sample, not of pawsx'),
    ('RUN --langs yo', 'test-yo.tsv'),
    ('RUN --data nowhere', 'nowhere'),
    ('nowhere', 'nowhere: No such file or directory; expected the folder of a finished run'),
]


@pytest.mark.parametrize('words, message', WRONG)
def test_what_cannot_be_done_is_one_line_before_anything_is_measured(words, message, finished, tmp_path,
                                                                     capsys, monkeypatch):
    for name, folder in {'RUN': finished('rs_r'), 'PLAIN': finished('plain', 'plain', None),
                         'OTHER': finished('rs_r')}.items():
        shutil.copytree(folder, tmp_path / name)
    (tmp_path / 'LINES.jsonl').write_text((tmp_path / 'RUN/results.json').read_text())
    held = (tmp_path / 'OTHER/results.json').read_text()
    (tmp_path / 'OTHER/results.json').write_text(held.replace('"task": "sample"', '"task": "pawsx"'))
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(data.InputError, match=message) as error:
        called(capsys, *words.split())
    assert '\n' not in str(error.value) and contents(tmp_path) == before and not capsys.readouterr().out


@pytest.mark.parametrize('words', ['RUN --smooth 3 --regions', 'RUN --generalized --smooth 2',
                                   'RUN --regions --generalized', 'RUN --smooth 0',
                                   'RUN --regions --radii -1', 'RUN --steps 0 --regions', 'RUN --markdown',
                                   'RUN --split dev', ''])
def test_a_wrong_command_line_is_argparses_one_line(words, capsys):
    with pytest.raises(SystemExit) as error:
        evaluate.parse_args(words.split())
    assert error.value.code == 2 and 'error: ' in capsys.readouterr().err


def test_the_help_has_a_word_for_every_flag(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(['--help'])
    printed = capsys.readouterr().out
    assert 'default: None' not in printed and '--split' not in printed and '--markdown' not in printed
    for flag in ('--generalized --smooth --regions --radii --steps --eps --langs --task --data --max-eval '
                 '--batch --seed --float32 --output').split():
        assert flag in printed


def test_tables_need_neither_model_nor_data(finished, tmp_path):
    """Folders and lines may stand side by side; a script prints them and ends well."""
    (tmp_path / 'runs.jsonl').write_text((finished('rs_r') / 'results.json').read_text()
                                         + (finished('plain', 'plain', None) / 'results.json').read_text())
    ended = subprocess.run([sys.executable, HERE / 'evaluate.py', tmp_path / 'runs.jsonl', finished('rs_r')],
                           capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(HERE)})
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    assert (ended.stdout.count('| rs_r 0.1 ') == 1 and '| plain ' in ended.stdout
            and 'A trial, not a result: 200 steps, 30 items.' in ended.stdout)


# ---------------------------------------------------------------- distance.py

TOY = [('a', 'x'), ('a b', 'x y')]


def corpus(pairs):
    return [(e.split(), f.split()) for e, f in pairs]


def test_one_iteration_of_the_aligner_by_hand():
    """Columns: null, a (, b); with two words |i/m - j/n| is 0 or 1/2, lambda 4."""
    (one, two), source = distance.entries_of(corpus(TOY))
    assert one.shape == (1, 2) and two.shape == (2, 3) and source.tolist() == [0, 1, 2, 0, 1, 2]
    assert distance.apart(2, 2).tolist() == [[0, 0.5], [0.5, 0]]
    near = 0.92 / (1 + math.exp(-2))
    far = 0.92 - near
    table = torch.full((len(source),), 0.25, dtype=torch.double)
    first, second = distance.posterior(one, table, 4.0), distance.posterior(two, table, 4.0)
    assert first.tolist() == [pytest.approx([0.08, 0.92])]
    assert second.tolist() == [pytest.approx([0.08, near, far]), pytest.approx([0.08, far, near])]
    counts = torch.zeros(len(source), dtype=torch.double)
    for entry, found in ((one, first), (two, second)):
        counts.index_add_(0, entry.flatten(), found.flatten())
    table = distance.maximise(counts, source)

    def bayes(count, total, words):
        values = torch.tensor([count + 0.01, total + 0.01 * words], dtype=torch.double).digamma()
        return pytest.approx((values[0] - values[1]).exp().item())
    assert table[one][0].tolist() == [bayes(0.16, 0.24, 2), bayes(0.92 + near, 0.92 + 0.92, 2)]
    assert table[two][1].tolist() == [bayes(0.08, 0.24, 2), bayes(far, 1.84, 2), bayes(near, 0.92, 2)]


def test_p_of_the_null_word_and_the_rest_sum_to_one():
    for tension in (0.1, 4.0, 14.0):
        prior = distance.prior(3, 7, tension)
        assert prior[:, 0].tolist() == [0.08] * 3 and prior.sum(1).tolist() == pytest.approx([1] * 3)
        # Z by hand, for i = 2 of m = 3 and n = 7
        weights = [math.exp(-tension * abs(2 / 3 - j / 7)) for j in range(1, 8)]
        assert prior[1, 1:].tolist() == pytest.approx([0.92 * weight / sum(weights) for weight in weights])


def random_corpus(sentences, seed=0, words=30, shuffled=True):
    """Sentences of distinct words and their translations, word for word, in any order or in the same one."""
    rng, pairs = random.Random(seed), []
    for _ in range(sentences):
        source = rng.sample(range(words), rng.randint(2, 7))
        order = rng.sample(range(len(source)), len(source)) if shuffled else range(len(source))
        target = [f'f{source[j]}' for j in order]
        pairs.append(([f'e{w}' for w in source], target, {(j, i) for i, j in enumerate(order)}))
    return pairs


def test_the_tension_has_the_right_slope():
    """Against the difference quotient of the expected log prior, the null word's part left out."""
    entries, source = distance.entries_of([(e, f) for e, f, _ in random_corpus(50)])
    table = torch.rand(len(source), dtype=torch.double)
    posteriors = [distance.posterior(entry, table, 3.0) for entry in entries]
    sums = {}
    for posterior in posteriors:
        sums[posterior.shape] = sums.get(posterior.shape, 0) + posterior
    assert len(sums) < len(posteriors)

    def expected(tension):
        total = 0
        for posterior in posteriors:
            m, columns = posterior.shape
            total += (posterior * distance.prior(m, columns - 1, tension).log())[:, 1:].sum().item()
        return total / sum(map(len, posteriors))
    quotient = (expected(3.001) - expected(2.999)) / 0.002
    assert distance.tension_slope(sums, 3.0) == pytest.approx(quotient, rel=1e-5)


def test_four_m_steps_and_three_tension_updates(monkeypatch):
    """As fast_align's five iterations, whose last only decodes; the tension follows the corpus."""
    calls = {'maximise': 0, 'tension_slope': 0}
    for name in calls:
        function = getattr(distance, name)

        def counted(*args, name=name, function=function):
            calls[name] += 1
            return function(*args)
        monkeypatch.setattr(distance, name, counted)
    straight = [(e, f) for e, f, _ in random_corpus(100, shuffled=False)]
    crossed = [(e, f) for e, f, _ in random_corpus(100)]
    _, high = distance.fit(*distance.entries_of(straight))
    assert calls == {'maximise': 4, 'tension_slope': 24}
    _, low = distance.fit(*distance.entries_of(crossed))
    assert high > 8 and 0.1 <= low < 2
    backwards = [(e, f[::-1]) for e, f in straight]
    assert distance.fit(*distance.entries_of(backwards))[1] == 0.1      # the bound


def test_a_known_dictionary_is_found_whatever_the_order():
    pairs = random_corpus(300)
    links = distance.align([(e, f) for e, f, _ in pairs])
    assert [set(line) for line in links] == [truth for *_, truth in pairs]


def test_words_without_a_counterpart_go_to_the_null_word():
    """Six words of 26 and their translations, and a Z that no word explains: most of the time it has no link.
    """
    rng, pairs = random.Random(0), []
    for _ in range(200):
        source = rng.sample('abcdefghijklmnopqrstuvwxyz', 6)
        pairs.append((source, [word.upper() + '.' for word in source] + ['Z']))
    links = distance.best_links(pairs)
    assert all({(k, k) for k in range(6)} <= line and all(j >= 0 for j, _ in line) for line in links)
    assert 100 < sum(len(line) == 6 for line in links) < 200


def test_both_directions_are_intersected(monkeypatch):
    pairs = corpus([('a b', 'x y'), ('a', 'x')])
    given = {'a': [{(0, 0), (0, 1)}, {(0, 0)}], 'x': [{(0, 0), (1, 1)}, set()]}     # by the first source word
    monkeypatch.setattr(distance, 'best_links', lambda pairs, desc: given[pairs[0][0][0]])
    assert distance.align(pairs) == [[(0, 0)], []]
    given['x'] = [{(1, 0), (0, 1)}, set()]          # in the reverse direction (i, j)
    assert distance.align(pairs) == [[(0, 1)], []]


def test_empty_sides_and_long_sentences_do_no_harm():
    links = distance.align([([], ['x']), (['a'], []), ([], []), (['.'] * 200, ['.'] * 200), (['a'], ['x'])])
    assert links[:3] == [[], [], []] and (0, 0) in links[4]
    assert (distance.align([([], [])]) == [[]] and distance.align([([], ['x'])]) == [[]]
            and distance.align([]) == [])


def test_sentences_in_place_of_words_are_told_what_align_takes():
    for pairs in ([('a b', 'x y')], [(['a'], 'x')], ['a b ||| x y']):
        with pytest.raises(data.InputError, match='align takes a list of .source words, target words.'):
            distance.align(pairs)


def test_align_prints_links_of_a_file(tmp_path, call):
    """BOM, CRLF and blank last lines; U+3000 and U+2028 are part of words, or words."""
    path = tmp_path / 'pairs'
    path.write_bytes(b'\xef\xbb\xbf'
                     + 'a\tb ||| x y\r\na ||| x\r\nb \u3000 a ||| y \u2028z x\r\n\r\n'.encode())
    pairs = distance.read_source_target(path)
    assert pairs[0] == (['a', 'b'], ['x', 'y']) and pairs[2] == (['b', '\u3000', 'a'], ['y', '\u2028z', 'x'])
    assert call('distance --align', path).out == '0-0 1-1\n0-0\n0-0 1-1 2-2\n'
    path.write_text('a ||| x\na b\n')
    with pytest.raises(data.InputError, match=r':2: 0 times `\|\|\|`; expected `source \|\|\| target`'):
        call('distance --align', path)


@real
@pytest.mark.parametrize('name, aer', [('roen', 0.498), ('zhen', 0.497), ('jaen', 0.728)])
def test_alignment_error_rate_is_that_of_fast_align(name, aer):
    """AER (Och and Ney 2003) on gold alignments; fast_align's: same text, -d -o -v both ways, intersection.
    """
    links = distance.align(distance.read_source_target(SHARED / f'data/alignment/{name}.src-tgt'))
    gold = (SHARED / f'data/alignment/{name}.gold').read_text().splitlines()
    hits = size = 0
    for found, line in zip(links, gold, strict=True):
        sure, possible = set(), set()
        for link in line.split():
            j, i = link.replace('p', '-').split('-')
            (possible if 'p' in link else sure).add((int(j) - 1, int(i) - 1))
        hits += len(set(found) & sure) + len(set(found) & (sure | possible))
        size += len(found) + len(sure)
    assert 1 - hits / size == pytest.approx(aer, abs=0.0015)


def fast(vocabulary, **special):
    """A tokenizer like XLM-R's of these pieces; <s> alone is special."""
    pieces = [('<unk>', -9.0), ('<s>', 0.0), *((piece, -1.0) for piece in vocabulary)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single='<s> $A <s>', special_tokens=[('<s>', 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token='<s>', **special)


def test_a_word_is_what_the_tokenizer_takes_as_one():
    tokenizer = fast(['▁', '▁cat', 's', 'S', ',', '▁Dog', '▁Ca', 't'])
    side = distance.words_of(tokenizer, ['cats, Dog', ', ,', '', 'CatS,s'], 'de', 512)
    assert side.words == [['cats', ',', 'dog'], [',', ','], [], ['cats', ',', 's']] and side.cut == 0
    assert side.last[0] == [2, 3, 4] and side.last[2] == []         # <s> stands at 0; the last of ▁cat s
    ids = [side.features[1]['input_ids'][at] for at in side.last[1]]
    assert tokenizer.convert_ids_to_tokens(ids) == [',', ',']        # not the lone blank before each
    assert distance.words_of(tokenizer, ['cats Dog'], 'zh', 512).words == [['cat', 's', 'dog']]
    short = distance.words_of(tokenizer, ['cats, Dog', 'Dog'], 'de', 4)
    assert short.words == [['cats'], ['dog']] and short.cut == 1


def test_tokenizers_from_which_words_cannot_be_had_are_refused():
    gemma = tokenizers.Tokenizer(tokenizers.models.Unigram([('<unk>', -9.0), ('ein', -1.0), ('▁', -1.0)],
                                                           unk_id=0))
    gemma.normalizer = tokenizers.normalizers.Replace(' ', '▁')
    gemma = transformers.PreTrainedTokenizerFast(tokenizer_object=gemma)
    with pytest.raises(data.InputError,
                       match="takes 'ein ein' as one word; expected one that splits at blanks"):
        distance.words_of(gemma, ['ein ein'], 'de', 512)

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)} | {'Ã¶': 256}
    level = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [('Ã', '¶')]))
    level.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    level.decoder = tokenizers.decoders.ByteLevel()
    level = transformers.PreTrainedTokenizerFast(tokenizer_object=level)
    assert distance.words_of(level, ['wie schön'], 'de', 512).words == [['wie', 'schön']]
    with pytest.raises(data.InputError, match='splits a character of zh into bytes'):
        distance.words_of(level, ['語'], 'zh', 512)

    class Slow:
        is_fast, name_or_path = False, 'slow'
    with pytest.raises(data.InputError, match='slow: its tokenizer is not a fast one'):
        distance.words_of(Slow(), ['a'], 'de', 512)


def side_of(*lengths):
    """Sentences of numbered tokens: of each its first id and length; two words, or one where it is short."""
    features, last = [], []
    for start, n in lengths:
        features.append({'input_ids': [2, *range(start, start + n), 3], 'attention_mask': [1] * (n + 2)})
        last.append([2, 3] if n > 2 else [1])
    return distance.Side(features, None, last, 0)


@pytest.mark.parametrize('padding_side', ['right', 'left'])
@pytest.mark.parametrize('layer', [0, 1, -1])
def test_measures_against_one_sentence_and_one_word_at_a_time(layer, padding_side, model):
    """Batches of two sides of unlike lengths, whatever side the tokenizer pads on."""
    model.eval()
    sides = (side_of((5, 4), (9, 2), (30, 2)), side_of((20, 3), (9, 9), (30, 2)))
    links = [[(0, 1), (1, 1)], [(0, 0)], []]
    tokenizer = fast([], padding_side=padding_side)
    expected = {}
    for k, line in enumerate(links):
        hidden = []
        for side in sides:
            ids = torch.tensor([side.features[k]['input_ids']])
            with torch.no_grad():
                states = model.base_model(ids, output_hidden_states=True).hidden_states
                hidden.append(model.get_input_embeddings()(ids)[0] if layer == 0 else states[layer][0])
        for j, i in line:
            difference = hidden[0][sides[0].last[k][j]] - hidden[1][sides[1].last[k][i]]
            expected.setdefault(k, []).append((difference.norm().item(), difference.abs().max().item()))
    found = distance.measure(model, tokenizer, sides, links, layer=layer)
    by_sentence = {}
    for sentence, *row in zip(found.sentence.tolist(), found.distance.tolist(), found.largest.tolist()):
        by_sentence.setdefault(int(sentence), []).append(tuple(row))
    for k, rows in expected.items():
        assert [value for row in by_sentence[k] for value in row] == pytest.approx(
            [value for row in rows for value in row], rel=1e-5)
    assert by_sentence.keys() == expected.keys() and found.identical.sum() == 0


def test_random_words_follow_from_the_seed_and_are_not_the_aligned_ones(model):
    model.eval()
    links = [[(0, 0), (1, 1)]] * 12
    sides = (side_of(*[(4 + k, 4) for k in range(12)]), side_of(*[(20 + k, 4) for k in range(12)]))
    one, same, other = [distance.measure(model, fast([]), sides, links, layer=0, seed=seed)
                        for seed in (1, 1, 2)]
    assert torch.equal(one.random, same.random) and not torch.equal(one.random, other.random)
    assert torch.equal(one.distance, other.distance) and (one.random != one.distance).double().mean() > 0.7
    table = model.get_input_embeddings().weight
    english = {row['input_ids'][at] for row, last in zip(sides[1].features, sides[1].last) for at in last}
    # each is the distance of its word to some English one
    for number, value in enumerate(one.random.tolist()):
        sentence = int(one.sentence[number])
        word = table[sides[0].features[sentence]['input_ids'][sides[0].last[sentence][number % 2]]]
        assert min(abs((word - table[token]).norm().item() - value) for token in english) < 1e-5


def measured(sentence, distances, largest, identical, random=(1.0,)):
    tensors = [torch.tensor(column, dtype=torch.double)
               for column in (sentence, identical, distances, largest)]
    beside = torch.tensor(random, dtype=torch.double).expand(len(sentence))
    return distance.Measured(*tensors, beside, beside, tensors[2], tensors[2].square())


def test_distance_and_coverage_by_hand():
    row = measured([0, 0, 3], [0.0, 0.3, 0.6], [0.0, 0.1, 0.5], [1, 0, 0])
    found = distance.distance_of(row)
    assert (found['distance'] == pytest.approx(0.3) and found['ratio'] == pytest.approx(0.3)
            and found['words'] == 3)
    # Sums of the two sentences about 3 x 0.3: -0.3 and 0.3
    assert found['standard_error'] == pytest.approx(math.sqrt(2 * (0.3 ** 2 + 0.3 ** 2)) / 3)
    covered = distance.coverage(row)
    assert covered['within'] == pytest.approx({'0.001': 1 / 3, '0.01': 1 / 3, '0.1': 2 / 3, '1': 1.0})
    assert covered['within_other'] == {'0.001': 0, '0.01': 0, '0.1': 0.5, '1': 1.0}
    assert covered['identical'] == pytest.approx(1 / 3) and covered['largest'] == pytest.approx(0.1)
    assert covered['deviation'] == pytest.approx(statistics.pstdev([0, 0.3, 0.6]))
    same = measured([0], [0.0], [0.0], [1], random=[0.0])
    assert distance.distance_of(same) == {'distance': 0, 'standard_error': None, 'random': 0, 'words': 1,
                                          'ratio': None}
    assert distance.coverage(same)['within_other']['0.1'] is None


def test_standard_error_is_that_of_the_mean_over_sentences():
    torch.manual_seed(0)
    values = torch.randn(400, dtype=torch.double) + 5
    words = measured(range(400), values.tolist(), values.tolist(), [0] * 400)
    assert distance.distance_of(words)['standard_error'] == pytest.approx(values.std().item() / 20)
    # Every word three times: the same sentences, and no more certain.
    words = measured(torch.arange(400).repeat(3).tolist(), values.repeat(3).tolist(), [0] * 1200, [0] * 1200)
    assert distance.distance_of(words)['standard_error'] == pytest.approx(values.std().item() / 20)


def test_parallel_sentences_count_once_and_placeholders_not_at_all():
    rows = [('p', 'h1', 'P', 'H1'), ('p', 'h2', 'P', 'H2'), ('NS', 'h3', 'R', 'H3'), ('q', ' ', 'Q', 'H4'),
            ('r', 'h4', 'S', 'NS')]
    pairs, counts = distance.parallel(rows)
    assert pairs == [('p', 'P'), ('q', 'Q'), ('r', 'S'), ('h1', 'H1'), ('h2', 'H2'), ('h3', 'H3')]
    assert counts == {'repeated': 1, 'left_out': 3}


@pytest.mark.parametrize('row, message', [
    ('p\th\tP\tH',
     ':2: 4 columns; expected five columns: premise, hypothesis, their English translations, label'),
    ('neutral\tp\th\tP\tH', ":2: label 'H' in column 5; expected five columns"),
])
def test_translate_test_files(row, message, tmp_path):
    path = tmp_path / 'test-sw-en-translated.tsv'
    path.write_bytes(b'\xef\xbb\xbfp\th\tP\x0b q\tH\tneutral\r\n\r\n')
    assert distance.read_translations(path, 'xnli') == [['p', 'h', 'P\x0b q', 'H']]
    path.write_text('p\th\tP\tH\tneutral\n' + row + '\n')
    with pytest.raises(data.InputError, match=message):
        distance.read_translations(path, 'xnli')


@real
@pytest.mark.parametrize('lang', ['sw', 'ur'])
def test_columns_of_the_real_translate_test_files(lang):
    """The first two are the sentences of test-LANG, the next two English, made from them."""
    rows = distance.read_translations(
        SHARED / f'data/translate-test/xnli/test-{lang}-en-translated.tsv', 'xnli')
    test, original = [data.read_pairs(SHARED / f'data/xnli/test-{name}.tsv', 'xnli') for name in (lang, 'en')]
    # the blank before one of them is its own
    stripped = [(row[0].strip(), row[1].strip()) for row in rows]
    assert stripped == [(pair.premise.strip(), pair.hypothesis.strip()) for pair in test]
    for column in (0, 1):       # words shared with the English original: far more than with any other column
        shared = 0
        for row, pair in zip(rows, original):
            ours, gold = set(row[column + 2].lower().split()), set(pair[column].lower().split())
            shared += len(ours & gold) / len(ours | gold)
        assert shared / len(rows) > 0.3


def distances_of(call, world, folder, flags):
    out = call(f'distance --task sample {flags}', '--data', world, '--out', folder)
    return json.loads((folder / 'distances.json').read_text()), out


@pytest.fixture(scope='session')
def embeddings(world):
    """The sample world's points: word -> its embedding."""
    folder = world / 'sample/model'
    table = transformers.AutoModel.from_pretrained(folder).get_input_embeddings().weight.detach()
    return {word: table[number] for word, number
            in transformers.AutoTokenizer.from_pretrained(folder).get_vocab().items()}


def test_the_sample_worlds_shifts_are_recovered(world, tmp_path, call, embeddings):
    """Distances 0.05 k sqrt(64); coverage as counted from the points themselves, word by word."""
    found, printed = distances_of(call, world, tmp_path / 'out',
                                  '--layer 0 --max-sentences 300 --langs x1 x4 x6')
    for lang, shift in (('x1', 0.4), ('x4', 1.6), ('x6', 2.4)):
        row = found['languages'][lang]
        assert row['distance'] == pytest.approx(shift, rel=0.02) and row['distance'] < row['random']
        assert row['sentences'] == 300 and row['words'] > 850
        pairs = distance.read_source_target(tmp_path / f'out/{lang}.src-tgt')
        ending = data.SAMPLE_ENDINGS[lang]
        assert all(word.endswith(ending) for theirs, _ in pairs for word in theirs)
        assert all(word.endswith('n') for _, english in pairs for word in english)
        largest, coordinates = [], []
        for (theirs, english), line in zip(pairs, (tmp_path / f'out/{lang}.align').read_text().split('\n')):
            for link in line.split():
                j, i = map(int, link.split('-'))
                a, b = embeddings[theirs[j]], embeddings[english[i]]
                largest.append(max(abs(x - y) for x, y in zip(a.tolist(), b.tolist())))
                coordinates += a.tolist() + b.tolist()
        covered = row['coverage']
        for eps in (0.001, 0.01, 0.1, 1.0):
            share = sum(value <= eps for value in largest) / len(largest)
            assert (covered['within'][f'{eps:g}'] == covered['within_other'][f'{eps:g}']
                    == pytest.approx(share))
        assert covered['largest'] == pytest.approx(statistics.median(largest), rel=1e-5)
        assert covered['deviation'] == pytest.approx(statistics.pstdev(coordinates), rel=1e-4)
        assert covered['identical'] == 0 and covered['random_largest'] > covered['largest']
    assert 0 < found['languages']['x1']['coverage']['within']['0.1'] < 0.2
    assert 0.5 < found['languages']['x6']['coverage']['within']['1'] < 1
    # What the numbers are of, in the file and above the tables.
    assert found['files'].keys() == {'model', 'test-en.tsv', 'test-x1.tsv', 'test-x4.tsv', 'test-x6.tsv'}
    assert found['files']['test-x1.tsv'] == data.digest(world / 'sample/test-x1.tsv')
    assert (found['task'], found['layer'], found['seed'], found['max_sentences']) == ('sample', 0, 42, 300)
    assert printed.out.count(f'sample, layer 0 of {world}/sample/model, ') == 2 and 'device:' in printed.err
    table = [line for line in printed.out.splitlines() if line.startswith('|')]
    assert len(table) == 10 and len({len(line) for line in table[:5]}) == 1 and '1.6' in table[3]


def test_layer_seed_and_the_last_subword_reach_the_measure(world, tmp_path, call):
    flags = '--langs x2 --max-sentences 40'
    runs = []
    for number, more in enumerate(('', '--seed 1', '--layer 1', '--layer 2')):
        runs.append(distances_of(call, world, tmp_path / f'{number}',
                                 f'{flags} {more}')[0]['languages']['x2'])
    last, seeded, first, second = runs
    assert last['distance'] == seeded['distance'] == second['distance'] != first['distance']
    assert last['random'] != seeded['random'] and last['random'] == second['random']


def test_translations_in_place_of_the_english_file(world, tmp_path, call):
    """The English sentences now stand in the file; without a file for a language it is not measured."""
    rows = [data.read_pairs(world / f'sample/test-{lang}.tsv', 'sample')[:100] for lang in ('x3', 'en')]
    lines = []
    for theirs, english in zip(*rows):
        lines.append('\t'.join([*theirs[:2], *english[:2], 'paraphrase']))
    (tmp_path / 'test-x3-en-translated.tsv').write_text('\n'.join(lines) + '\n')
    found, printed = distances_of(call, world, tmp_path / 'out', f'--layer 0 --translations {tmp_path}')
    assert (list(found['languages']) == ['x3']
            and found['languages']['x3']['distance'] == pytest.approx(1.2, rel=0.02))
    assert 'English: translated' in printed.out and 'test-en.tsv' not in found['files']
    with pytest.raises(data.InputError, match='no test-LANG-en-translated.tsv of sample in it'):
        call('distance --task sample --out new --translations', tmp_path / 'out', '--data', world)
    with pytest.raises(data.InputError, match='test-x1-en-translated.tsv: No such file'):
        call('distance --task sample --langs x1 --out new --translations', tmp_path, '--data', world)


def test_where_nothing_can_be_written_the_figures_are_printed_first(world, tmp_path, call, capsys):
    (tmp_path / 'file').write_text('')
    with pytest.raises(data.InputError, match='the figures above were not written'):
        call('distance --task sample --layer 0 --langs x1 --max-sentences 20', '--data', world,
             '--out', tmp_path / 'file/out')
    assert '| x1 ' in capsys.readouterr().out


def test_a_reader_that_goes_away_does_not_cost_the_results(world, tmp_path, call, monkeypatch):
    def gone(*_):
        raise BrokenPipeError
    monkeypatch.setattr(distance, 'report', gone)
    with pytest.raises(BrokenPipeError):
        call('distance --task sample --layer 0 --langs x1 --max-sentences 20', '--data', world,
             '--out', tmp_path / 'out')
    assert (tmp_path / 'out/distances.json').exists()


def test_every_file_is_read_before_anything_is_measured(world, tmp_path, call, monkeypatch):
    shutil.copytree(world / 'sample', tmp_path / 'sample')
    with open(tmp_path / 'sample/test-x6.tsv', 'a') as file:
        file.write('a row too many\tof two sentences\tparaphrase\n')
    (tmp_path / 'sample/test-yo.tsv').write_text('NS\t \tparaphrase\n' * 2000)
    monkeypatch.setattr(distance, 'align', None)
    with pytest.raises(data.InputError, match='test-yo.tsv: empty or NS in every row'):
        call('distance --task sample --langs x1 yo', '--data', tmp_path)
    with pytest.raises(data.InputError,
                       match='test-x6.tsv: 2001 rows; expected 2000, translations of test-en.tsv'):
        call('distance --task sample', '--data', tmp_path)


def test_english_is_not_measured_against_itself(world, call):
    with pytest.raises(data.InputError, match='distances are from English'):
        call('distance --task sample --langs x1 en', '--data', world)


def test_rank_correlation_by_hand():
    assert distance.rank_correlation([1, 2, 3], [10, 20, 40]) == pytest.approx((1.0, 2 / 6))
    assert distance.rank_correlation([1, 2, 3, 4], [1, 3, 2, 4])[0] == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert distance.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx((-1.0, 2 / 24))
    # Ties share the mean of their ranks: (1.5, 1.5, 3, 4) against (1, 2, 3, 4).
    assert distance.rank_correlation([1, 1, 2, 3], [1, 2, 3, 4])[0] == pytest.approx(
        4.5 / math.sqrt(4.5 * 5), abs=1e-6)
    # Equal but for the last bit is a tie too: 0.1 + 0.2 is not 0.3.
    assert distance.rank_correlation([1, 2, 3, 4], [0.1 + 0.2, 0.3, 0.5, 0.7]) == distance.rank_correlation(
        [1, 2, 3, 4], [0.3, 0.3, 0.5, 0.7])
    x = list(range(12))
    rho, p = distance.rank_correlation(x, [abs(value - 5) for value in x])
    assert 0.3 < p < 1 and abs(rho) < 0.4
    assert distance.rank_correlation(x, x) == pytest.approx((1.0, 1 / 100_001))       # p is never 0
    for constant in ([3, 3, 3], [], [7]):
        assert distance.rank_correlation(list(range(len(constant))), constant) is None
    # What has no gain has no rank.
    assert distance.rank_correlation([9, 1, 2, 3], [math.nan, 10, 20, 40]) == pytest.approx((1.0, 2 / 6))


def run_of(method, seed, right, eps=None, task='sample', langs=('en', 'x1', 'x2', 'x3'), **changes):
    """A record: of 100 test items a language, so many are right."""
    args = {'task': task, 'method': method, 'eps': eps, 'seed': seed, 'layer': 0, 'epochs': 4,
            'max_length': 128}
    test_marks = {lang: '1' * right[k] + '0' * (100 - right[k])
                  for k, lang in enumerate(langs)} | {'x4': None}
    record = {'args': args | changes, 'files': {'model': 'm', 'train-en.tsv': 't'}, 'dtype': 'torch.float32',
              'dev': 80.0, 'step': 500, 'steps': 600, 'test_marks': test_marks, 'paths': {'model': 'base'},
              'train_pairs': 1000}
    return record


def jsonl(path, *records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


PLAIN = [run_of('plain', seed, [90, 70, 60, 50 + seed]) for seed in (1, 2)]
ROBUST = [run_of('rs_r', seed, [90, 71, 64, 56 + seed], eps=0.1) for seed in (1, 2)]
WORSE = [run_of('rs_r', seed, [90, 90, 60, 50], eps=1.0) | {'dev': 70.0} for seed in (1, 2)]
FLAT = [run_of('rs_a', seed, [91, 71, 61, 51 + seed]) for seed in (1, 2)]


def test_gains_of_a_run_that_learned_nothing_are_marked():
    plain, adv, rs_r = (record('plain', None, 1, '1100'), record('adv', 0.1, 1, '1110'),
                        record('rs_r', 0.1, 1, '1010'))
    by_lang = {lang: float(lang[1]) for lang in LANGS if lang != 'en'}
    results = {'languages': {lang: {'distance': far} for lang, far in by_lang.items()},
               'files': {'model': '3'}}

    def table(*runs):
        langs, rows = distance.gains(distance.comparable(runs, 'sample'), by_lang)
        return [row.name for row in rows], '\n'.join(distance.gain_table(results, langs, rows, runs).below)
    names, below = table(plain, adv, rs_r)
    assert names == ['adv 0.1 (from the start)', 'rs_r 0.1'] and '†' not in below
    adv['answers'] = {'en': [19, 1]}
    names, below = table(plain, adv, rs_r)
    assert (names == ['adv 0.1 (from the start) †', 'rs_r 0.1']
            and '†: a run of it or of plain gives one answer' in below)
    adv['answers'], plain['answers'] = rs_r['answers'], {'en': [1, 19]}
    assert table(plain, adv, rs_r)[0] == ['adv 0.1 (from the start) †', 'rs_r 0.1 †']


def test_figure_2_from_runs(world, tmp_path, call, monkeypatch):
    pytest.importorskip('matplotlib', reason='the figure alone needs matplotlib')
    drawn = []
    monkeypatch.setattr(evaluate, 'save_picture', lambda figure, path: drawn.append((figure, path)))
    runs = jsonl(tmp_path / 'runs.jsonl', *PLAIN, *ROBUST, *WORSE, *FLAT)
    found, printed = distances_of(call, world, tmp_path / 'out',
                                  f'--layer 0 --max-sentences 50 --langs x3 x1 x2 x4 '
                                  f'--runs {runs} -o {tmp_path}/f.png')
    table = printed.out[printed.out.index('Accuracy gained over plain'):]
    rows = {}
    for line in table.splitlines():
        if line.startswith('|') and '--' not in line:
            name, *cells = [cell.strip() for cell in line.strip('|').split('|')]
            rows[name] = cells
    assert list(rows) == ['', 'x1', 'x2', 'x3', 'x4', 'rank correlation', 'p']      # from near to far
    assert rows[''] == ['distance', 'rs_r 0.1', 'rs_a'] and rows['x4'][1:] == ['-', '-']
    points, half = evaluate.gain(ROBUST, PLAIN, ['x2'])
    assert rows['x2'][1] == f'+4.0 ±{half[0]:.1f}' and rows['x2'][2].startswith('+1.0 ±')
    assert rows['x1'][1].startswith('+1.0') and rows['x3'][1].startswith('+6.0')
    # The gains 1, 4, 6 rise with the distance: 2 of 6 orders are as extreme; those of rs_a are constant.
    assert rows['rank correlation'] == ['-', '+1.00', '-'] and rows['p'] == ['-', '0.33', '-']
    assert 'another encoder' in table and '1,000 training pairs' in table and 'rs_r 0.1: 2 seeds' in table
    (figure, path), = drawn
    top, bottom = figure.axes
    assert [bar.get_height() for bar in top.patches][:3] == [1, 4, 6] and path == f'{tmp_path}/f.png'
    (_, low), (_, high) = top.collections[0].get_segments()[1]     # the whisker of x2
    assert (high - low) / 2 == pytest.approx(half[0].item())
    assert top.get_title() == 'rs_r 0.1, 2 seeds; rank correlation +1.00, p = 0.33'
    assert bottom.get_title() == 'rs_a, 2 seeds'
    assert all('points' in axes.get_ylabel() for axes in figure.axes)
    assert 'Euclidean, layer 0' in bottom.get_xlabel()
    assert bottom.get_xticklabels()[0].get_text() == 'x1\n0.4'
    assert '95% interval' in figure.get_suptitle() and 'L-inf' in figure.get_suptitle()


def test_languages_stand_in_the_order_of_their_distances():
    low = [run_of('rs_r', seed, [80, 80, 80, 80], eps=0.01) | {'dev': 60.0} for seed in (1, 2)]
    methods = distance.comparable([record | {'name': ''} for record in [*PLAIN, *low, *ROBUST]], 'sample')
    langs, (row,) = distance.gains(methods, {'x1': 3.0, 'x2': 1.0, 'x3': 2.0, 'x4': 0.5})
    assert langs == ['x4', 'x2', 'x3', 'x1'] and row.points[1:] == pytest.approx([4, 6, 1])
    assert math.isnan(row.points[0]) and row.rank[0] == pytest.approx(-0.5) and row.seeds == 2


def test_a_picture_is_written(tmp_path):
    pytest.importorskip('matplotlib', reason='the figure alone needs matplotlib')
    results = {'task': 'sample', 'layer': -1, 'model': 'base', 'languages': {'x1': {'distance': 1.0}}}
    row = distance.Gain('rs_a', 1, [1.0], [math.nan], None)
    evaluate.save_picture(distance.figure_2(results, ['x1'], [row]), tmp_path / 'f.png')
    assert (tmp_path / 'f.png').read_bytes()[:4] == b'\x89PNG'


@pytest.mark.parametrize('records, message', [
    ([*PLAIN, run_of('rs_r', 1, [1, 1, 1, 1], eps=0.1, task='pawsx')],
     'a run of pawsx; expected runs of sample'),
    ([*PLAIN, run_of('rs_r', 1, [1, 1, 1, 1], eps=0.1, epochs=9)],
     r':3 does not belong with .*:1: epochs 9 and 4; expected runs that differ in method'),
    ([*PLAIN, ROBUST[0] | {'dtype': 'torch.bfloat16'}], 'does not belong with .*:1: dtype'),
    (PLAIN, 'runs of plain; expected plain and a robust method'),
    (ROBUST, 'runs of rs_r; expected plain and a robust method'),
    ([PLAIN[0], ROBUST[1]], 'rs_r: no seed in common with plain'),
])
def test_runs_that_cannot_be_compared_are_refused_before_anything_is_measured(records, message, tmp_path,
                                                                              call, monkeypatch):
    monkeypatch.setattr(distance, 'distances', None)
    with pytest.raises(data.InputError, match=message):
        call('distance --task sample --runs', jsonl(tmp_path / 'runs.jsonl', *records))


@pytest.mark.parametrize('path, message', [('f.gif', 'expected FILE.png or FILE.svg'),
                                           ('no/f.png', 'no such folder')])
def test_a_picture_that_cannot_be_is_refused_before_anything_is_measured(path, message, tmp_path, call,
                                                                         monkeypatch):
    monkeypatch.setattr(distance, 'distances', None)
    runs = jsonl(tmp_path / 'runs.jsonl', *PLAIN, *ROBUST)
    with pytest.raises(data.InputError, match=message):
        call('distance --task sample --runs', runs, '-o', tmp_path / path)


# ---------------------------------------------------------------- results/speed.py

@pytest.fixture(scope='session')
def speed():
    """results/speed.py as a module."""
    spec = importlib.util.spec_from_file_location('speed', HERE / 'results/speed.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_work_of_a_step_by_hand(world, speed):
    """Of a BERT of 2 layers of 64, on batches that all have T tokens."""
    model, tokenizer = evaluate.load_encoder(str(world / 'sample/model'), 'sample')
    pairs = data.read_pairs(world / 'sample/train-en.tsv', 'sample')[:20]
    tokens, = {len(tokenizer(pair.premise, pair.hypothesis)['input_ids']) for pair in pairs}
    wide = model.config.hidden_size
    # Q, K, V, output, the feed-forward two of 4; scores, mean.
    layer = 2 * tokens * 12 * wide ** 2 + 2 * 2 * tokens ** 2 * wide
    size = sum(weight.numel() for weight in model.parameters())
    work = 2 * layer + 2 * wide ** 2 + 2 * wide * 2
    assert speed.work_of(model, tokenizer, pairs, arguments(batch=8)) == (work, 32 * size)
    words = model.get_input_embeddings().weight.requires_grad_(False)
    assert speed.work_of(model, tokenizer, pairs, arguments(batch=8))[1] == 32 * (size - words.numel())


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
    monkeypatch.setattr(sys, 'argv', ['speed.py', '--task', 'sample', '--data', str(small),
                                      '--method', 'plain', 'rs_a'])
    speed.main()
    floor, *rows = capsys.readouterr().out.splitlines()
    work, moved = map(float, re.fullmatch(
        r'floor: 3 x (\S+) GFLOP a pair at 1 GFLOP/s, (\S+) GB a step at 2 GB/s', floor).groups())
    table = {row[:20].strip(): row[20:] for row in rows}
    rate = {name: float(row.split()[0]) for name, row in table.items()}
    assert set(table) == {'training, XTREME', 'evaluation, XTREME', 'evaluation', 'training, plain',
                          'training, rs_a'}

    def holds(name, pattern, expected, tolerance):
        assert float(re.search(pattern, table[name])[1]) == pytest.approx(expected, rel=tolerance)
    for name in table:
        holds(name, r'pairs/s, +(\S+) times XTREME', rate[name] / rate[name.split(',')[0] + ', XTREME'], 0.02)
    holds('training, rs_a', r'(\S+) times the step of plain',
          rate['training, plain'] / rate['training, rs_a'], 0.02)
    holds('training, plain', r'of the floor \((\d+)\)', 1 / (3 * work + moved / 64 / 2), 0.02)
    holds('evaluation', r'of the floor \((\d+)\)', 1 / work, 0.02)
    assert not list(tmp_path.iterdir())


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
    lines = call('evaluate --regions --langs en x1 --radii 0 0.01 --max-eval 200',
                 *trained.values()).out.splitlines()
    rows = [line.split('|')[1:-1] for line in lines if re.match(r'\| (en|x1) (noise|attack)', line)]
    for at, lang in ((0, 'en'), (2, 'x1')):
        noise, attack = ({name: list(map(float, rows[4 * run + at + kind][1:]))
                          for run, name in enumerate(trained)} for kind in (0, 1))
        assert attack['adv'][1] > attack['plain'][1] + 10 and attack['rs_r'][1] > attack['plain'][1] + 10
        for name, folder in trained.items():
            clean = record_of(folder)['test_marks'][lang][:200].count('1') / 2
            assert noise[name][0] == attack[name][0] == clean > attack[name][1]


# ---------------------------------------------------------------- what a user does wrong

def change(path, old, new):
    """Replace bytes of a file, once; `old` None: the whole file."""
    if old is None:
        Path(path).write_bytes(new)
        return
    content = Path(path).read_bytes()
    assert old in content
    Path(path).write_bytes(content.replace(old, new, 1))


FLAGS = {       # of train.py -> what argparse says of it
    'adv --eps -1': 'expected 0 or above|expected at least one', 'adv --eps nan': 'nan: expected 0',
    'adv --eps x': 'invalid float', 'plain --batch 0': 'expected 1', 'plain --batch 1.5': 'invalid int',
    'rs_a --p 1.1': 'expected 0 to 1', 'rs_a --m 0': 'expected 1', 'rs_a --replace both': 'invalid choice',
    'plain --lr 0': 'expected 1e-09', 'plain --lr inf': 'expected 1e-09',
    'plain --epochs 0': 'expected 1e-09', 'plain --warmup 1.1': 'expected 0 to 1',
    'plain --seed -1': 'expected', 'plain --max-length 7': 'expected 8',
    'adv --adv-steps 0': 'expected 1', 'plain --eval-steps 0': 'expected 1',
    'plain --task mnli': 'invalid choice', 'plain --plain-steps -1': 'expected'}
GONE = [('train', '--benchmark'), ('train', '--adv-step-size'), ('evaluate', '--markdown'),
        ('evaluate', '--split'), ('distance', '--symmetrize'), ('distance', '--mean'),
        ('distance', '--alignments'), ('distance', '--plain')]


@pytest.mark.parametrize('flags', FLAGS)
def test_a_wrong_flag_of_train_is_argparses_one_line(flags, capsys):
    with pytest.raises(SystemExit) as error:
        train.parse_args(f'--task sample --method {flags}'.split())
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert (error.value.code == 2
            and re.search(f'argument {flags.split()[-2]}: .*({FLAGS[flags]})', line)), line


@pytest.mark.parametrize('script, flag', GONE)
def test_flags_that_are_gone(script, flag, capsys):
    with pytest.raises(SystemExit):
        globals()[script].parse_args(['--help'])
    assert flag not in capsys.readouterr().out


TRAIN = 'train --task sample --data D --max-steps 1 --out new --method '
BAD = [     # the command, what is broken before it (file, old, new), what its one line says
    (TRAIN + 'rs_r --eps 0.1 0.10000001', [], 'rs_r-0.1-seed42: two runs'),
    (TRAIN + 'rs_r --layer 3', [], 'layer 3: the encoder has layers 1 to 2'),
    (TRAIN + 'plain --model nowhere', [],
     'nowhere: cannot be loaded.*expected the name of a model, or a folder'),
    (TRAIN + 'plain --model run', [('run/model.safetensors', None, b'half')], 'run: cannot be loaded'),
    (TRAIN + 'plain --model run', [('run/config.json', None, b'{')], 'run: cannot be loaded'),
    (TRAIN + 'rs_a --synonyms nowhere.json', [],
     'nowhere.json: No such file or directory; expected the neighbour file'),
    (TRAIN + 'rs_a --synonyms s.json', [('s.json', None, b'cat dog')], 's.json: not JSON'),
    (TRAIN + 'rs_a --synonyms s.json', [('s.json', None, b'\xff\xfe')],
     's.json:1: not UTF-8'),
    (TRAIN + 'rs_a --synonyms s.json', [('s.json', None, b'["cat"]')], 's.json: a JSON list; expected'),
    (TRAIN + 'rs_a --synonyms s.json', [('s.json', None, b'{"cat": [1, 2]}')],
     "s.json: 'cat' has .1, 2.; expected a list of words"),
    (TRAIN + 'rs_a --synonyms s.json', [('s.json', None, b'{"cat": []}')],
     's.json: no word of the training pairs'),
    (TRAIN + 'rs_a --synonyms s.json', [('s.json', None, b'{"cat": ["dog"]}')],
     's.json: no word of the training pairs'),
    (TRAIN + 'plain', [('D/sample/train-en.tsv', None, b'a\tb\n')],
     'train-en.tsv: no labels; training needs them'),
    (TRAIN + 'plain', [('D/sample/train-en.tsv', None, b'')], 'train-en.tsv: empty'),
    (TRAIN + 'plain', [('D/sample/dev-en.tsv', b'paraphrase', b'maybe')],
     r"dev-en.tsv:\d+: label 'maybe'; expected one of different"),
    (TRAIN + 'plain', [('D/sample/test-x3.tsv', b'\t', b' ')],
     'test-x3.tsv:1: 2 columns|test-x3.tsv:2: 3 columns'),
    (TRAIN + 'plain', [('D/sample/test-x6.tsv', b'\n', b'\xff\n')],
     'test-x6.tsv:1: not UTF-8'),
    (TRAIN + 'plain', [('D/sample/test-x6.tsv', None, None)], 'test-x6.tsv: no such file'),
    (TRAIN + 'plain --langs en yo', [], 'test-yo.tsv: no such file'),
    (TRAIN.replace('new', 'run') + 'adv --plain-steps 0', [],
     'run: holds another run .method plain, not adv; eps None, not 0.001'),
    (TRAIN.replace('new', 'run') + 'plain', [('run/results.json', None, b'{')], 'results.json:1: not JSON'),
    (TRAIN.replace('new', 'run') + 'plain', [('run/results.json', None, None),
                                             ('run/state.pt', None, b'half')], 'state.pt: not a state'),
    (TRAIN.replace('new', 'run') + 'plain', [('run/results.json', None, None), ('run/args.json', None, b'{}'),
                                             ('run/state.pt', None, b'half')],
     'args.json: not what train.py wrote'),
    (TRAIN.replace('new', 'run') + 'plain', [('run/results.json', b'"lr": ', b'"rl": ')],
     r'run: holds another run \(.*lr None, not 0.001'),
    (TRAIN.replace('new', 'run/config.json') + 'plain', [], 'config.json: Not a directory'),
    (TRAIN.replace('new', 'D') + 'plain', [], 'D: holds something else than a run'),
    (TRAIN.replace('new', 'D/sample/dev-en.tsv/x') + 'plain', [], 'cannot be written|Not a directory'),
    ('evaluate nowhere', [], 'nowhere: No such file'),
    ('evaluate D', [], 'D/results.json: No such file .*; expected the folder of a finished run.*--task TASK'),
    ('evaluate run', [('run/results.json', None, b'[]')], 'results.json:1: a record without args'),
    ('evaluate run', [('run/results.json', b'"dtype"', b'"mode"')], 'results.json:1: a record without dtype'),
    ('evaluate lines.jsonl', [('lines.jsonl', None, b'{"args": {}}\n')],
     'lines.jsonl:1: a record without files'),
    ('evaluate run --smooth 3', [], 'run: plain has no eps of its own; say --eps'),
    ('evaluate run --langs de', [], 'test-de.tsv'),
    ('evaluate run --data nowhere', [], 'nowhere/sample/test-en.tsv: No such file'),
    ('evaluate run --regions -o p.txt', [], 'p.txt: not the name of a picture'),
    ('evaluate run --regions -o no/p.png', [], 'no/p.png: no such folder'),
    ('evaluate D/sample/model --task xnli --data D', [], 'weights are missing'),
    ('evaluate s.json --task sample', [('s.json', None, b'')], 's.json: cannot be loaded'),
    ('evaluate run --data D', [('run/config.json', b'"1": "paraphrase"', b'"1": "other"')],
     'its labels are different, other; sample has'),
    ('synonyms nowhere -o s.json', [], 'nowhere: No such file'),
    ('synonyms v.txt -o s.json', [('v.txt', None, b'a 1 2\nb 1\n')], 'v.txt:2: 1 numbers'),
    ('synonyms v.txt -o s.json', [('v.txt', None, b'a 1 x\n')], 'v.txt:1: '),
    ('synonyms v.txt -o s.json', [('v.txt', None, b'')], 'v.txt: empty'),
    ('synonyms v.txt -o s.json', [('v.txt', None, b'a 1 nan\n')], 'v.txt:1: a number that is not finite'),
    ('synonyms v.txt -o s.json', [('v.txt', None, b'a \xff\n')], 'v.txt:1: not UTF-8'),
    ('synonyms nowhere --show cat', [], 'nowhere: No such file'),
    ('data pawsx x.zip --data D', [('x.zip', None, b'')], 'x.zip: not an archive of pawsx'),
    ('data pawsx x-final.tar.gz --data D', [], 'x-final.tar.gz: not the archive of .*No such file'),
    ('data pawsx x-final.tar.gz --data D', [('x-final.tar.gz', None, b'<html>')],
     'not the archive.*fetch it again'),
    ('distance --task sample --data D --out new --langs de', [], 'test-de.tsv'),
    ('distance --task sample --data D --out new --layer 9', [], 'layer 9'),
    ('distance --task sample --data D --out new --translations D', [], 'no test-LANG-en-translated.tsv'),
    ('distance --task xnli --data D --runs run', [], 'run'),
    ('distance --align nowhere', [], 'nowhere: No such file'),
    ('distance --align text', [('text', None, b'a b ||| c\na b\n')], 'text:2: 0 times'),
    ('distance --task sample --data D --out new --langs x1',
     [('D/sample/test-x1.tsv', b'\r\n', b'\r\na\tb\tdifferent\r\n')], 'test-x1.tsv: 31 rows'),
]


@pytest.fixture(scope='session')
def place(small, tmp_path_factory):
    """A folder with the small world, D, and in it a finished run."""
    folder = tmp_path_factory.mktemp('place')
    shutil.copytree(small, folder / 'D')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, 'argv',
                      'train.py --task sample --method plain --data D --out run --max-steps 1'.split())
        train.main()
    return folder


@pytest.mark.parametrize('command, broken, message', BAD, ids=range(len(BAD)))
def test_bad_input_gives_one_line_and_leaves_nothing(command, broken, message, place, tmp_path, monkeypatch,
                                                     call):
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    for path, old, new in broken:
        (tmp_path / path).unlink() if new is None else change(tmp_path / path, old, new)
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    with pytest.raises(data.InputError) as error:
        try:
            call(command)
        except OSError as failure:      # run_script makes its line of it
            assert failure.filename
            raise data.InputError(f'{failure.filename}: {failure.strerror}') from None
    line = str(error.value)
    assert '\n' not in line and re.search(message, line), line
    assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == before


def test_a_script_ends_with_one_line_and_no_traceback(tmp_path):
    for script, flags, message in (('evaluate', tmp_path, f'{tmp_path}/results.json: No such file'),
                                   ('train', '--task pawsx --method plain --data', 'the following|expected')):
        ended = subprocess.run([sys.executable, HERE / f'{script}.py', *str(flags).split()],
                               capture_output=True, text=True)
        assert (ended.returncode in (1, 2) and re.search(message, ended.stderr.splitlines()[-1])
                and 'Traceback' not in ended.stderr)
