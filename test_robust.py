"""Tests of what the code claims, against hand computation, closed forms and the library it rests on."""

import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, XLMRobertaConfig, XLMRobertaForSequenceClassification, pipeline

import data
import distance
import evaluate
import robust
import synonyms
import train

HERE = Path(__file__).parent
SHARED = HERE.parent / 'shared'
real = pytest.mark.skipif(not (SHARED / 'data').exists(), reason='needs real data and a real encoder in ../shared')

SIZE = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=20, pad_token_id=1, num_labels=3)


@pytest.fixture(params=[(BertConfig, BertForSequenceClassification), (XLMRobertaConfig, XLMRobertaForSequenceClassification)],
                ids=['bert', 'xlm-r'])
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
        for delta in (robust.uniform_delta(model, batch, eps, generator()),
                      robust.worst_delta(model, batch, eps=eps, steps=3, generator=generator()),
                      robust.worst_delta(model, batch, eps=eps, steps=2, layer=1, generator=generator())):
            assert delta.dtype == torch.float32 and delta.abs().max() <= torch.tensor(eps)
            assert delta.abs().max() > 0.9 * eps
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


def test_one_sign_step_by_hand():
    """Gold class 0: the loss grows along w1 - w0 = (-1, 3), so the worst delta is eps * (-1, +1), exactly."""
    batch = {'input_ids': torch.tensor([[1, 2]]), 'attention_mask': torch.ones(1, 2, dtype=torch.long), 'labels': torch.tensor([0])}
    delta = robust.worst_delta(Linear(), batch, eps=0.5, step_size=2.0, generator=generator())
    assert torch.equal(delta, torch.tensor([[[-0.5, 0.5], [-0.5, 0.5]]]))
    # logits at it: mean embedding (2, 0.5) + (-0.5, 0.5) = (1.5, 1): (1.5 - 2, 1) -> loss log(1 + e^1.5)
    loss = robust.adv(Linear(), batch, eps=0.5, step_size=2.0, generator=generator())
    assert loss.item() == pytest.approx(torch.tensor(1.5).exp().log1p().item(), abs=1e-6)


def test_random_perturbation_is_uniform_and_fresh(model, batch):
    g = generator()
    first, second = (robust.uniform_delta(model, batch, 0.5, g) for _ in range(2))
    assert not torch.equal(first, second)
    many = torch.cat([robust.uniform_delta(model, batch, 0.5, g)[0].flatten() for _ in range(300)])
    assert abs(many.mean()) < 0.01 and many.std().item() == pytest.approx(0.5 / 3 ** 0.5, rel=0.01)


def test_bfloat16_keeps_a_perturbation_of_0_001(model, batch):
    model.eval()
    hidden = []
    robust.end_of_enc(model, 0).weight.data.fill_(0.75)      # where bfloat16's spacing is 0.0039
    with torch.autocast('cpu', torch.bfloat16):
        delta = robust.uniform_delta(model, batch, 0.001, generator())
        with robust.perturbed(model, delta):
            handle = robust.end_of_enc(model, 0).register_forward_hook(lambda m, i, output: hidden.append(output))
            model(**batch)
            handle.remove()
    assert hidden[0].dtype == torch.float32
    assert torch.allclose(hidden[0] - 0.75, delta, atol=1e-7) and delta.any()


def test_a_layer_that_is_not_there(model):
    with pytest.raises(ValueError, match='--layer 3'):
        robust.end_of_enc(model, 3)


# ---------------------------------------------------------------- data.py

def write(path, content):
    path.write_bytes(content)
    return path


def test_reads_quotes_as_csv_writer_wrote_them_and_lone_quotes_as_they_are(tmp_path):
    rows = [('He said "hi"', '"quoted"', '1'), ('plain', 'a "lone', '0'), ('"', '""', '1'), ('', "it's", '0')]
    data.write_pairs(tmp_path / 'written.tsv', rows)
    assert [(a, b, str(label)) for a, b, label in data.read_pairs(tmp_path / 'written.tsv', 'pawsx')] == rows
    raw = write(tmp_path / 'raw.tsv', b'a "lone quote\tand " another\t0\r\n"wrapped"\tx\t1\n\n\n')
    assert data.read_pairs(raw, 'pawsx') == [('a "lone quote', 'and " another', 0), ('"wrapped"', 'x', 1)]


def test_labels(tmp_path):
    xnli = write(tmp_path / 'xnli.tsv', b'a\tb\tcontradictory\na\tb\tentailment\na\tNS\tneutral\n')
    assert [pair.label for pair in data.read_pairs(xnli, 'xnli')] == [0, 1, 2]
    assert data.describe('F', data.read_pairs(xnli, 'xnli')) == 'F: 3 pairs; 1 rows with a placeholder NS, kept'
    pairs = data.read_pairs(write(tmp_path / 'bare.tsv', b'a\tb\nc\td\n'), 'pawsx')
    assert [pair.label for pair in pairs] == [None, None]
    assert evaluate.marks(torch.tensor([0, 0]), pairs) is None and evaluate.accuracy(None) is None


@pytest.mark.parametrize('content, message', [
    (b'', 'empty'), (b'\n\n', 'empty'), (b'a\tb\t1\na\tb\n', ':2: 2 columns; expected 3'), (b'a\n', ':1: 1 columns'),
    (b'a\tb\t1\n\na\tb\t1\n', ':2: 1 columns'), (b'a\tb\t2\n', ":1: label '2'; expected one of 0, 1"),
    (b'a\tb\t1\n\xff\tb\t1\n', ':2: byte 1 of the line is not UTF-8'),
    (b'id\tsentence1\tsentence2\tlabel\n1\ta\tb\t0\n', 'raw release'),
])
def test_a_broken_file_gives_one_line(tmp_path, content, message):
    path = write(tmp_path / 'file.tsv', content)
    with pytest.raises(data.InputError) as error:
        data.read_pairs(path, 'pawsx')
    assert message in str(error.value) and str(path) in str(error.value) and '\n' not in str(error.value)


PAWSX_HEADER, XNLI_HEADER = 'id\tsentence1\tsentence2\tlabel\n', 'language\tgold_label' + '\tx' * 7 + '\n'


def pawsx_archive(path, rows=2):
    """A small x-final.tar.gz, with a member that tries to escape."""
    with tarfile.open(path, 'w:gz') as tar:
        for lang in ('en', 'de'):
            for name in ('train', 'dev_2k', 'test_2k') if lang == 'en' else ('dev_2k', 'test_2k'):
                lines = ''.join(f'{i}\t{lang} "a" {i}\t"lone {name}\t{i % 2}\n' for i in range(rows))
                content = (PAWSX_HEADER + lines).encode()
                member = tarfile.TarInfo(f'x-final/{lang}/{name}.tsv')
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        tar.addfile(tarfile.TarInfo('x-final/../../escaped'), io.BytesIO())
    return path


@pytest.fixture
def small_release(monkeypatch):
    """As if the releases had two rows a file and two languages."""
    for task in ('pawsx', 'xnli'):
        small = data.TASKS[task]._replace(languages=('en', 'de'), rows={'train': 2, 'dev': 2, 'test': 2})
        monkeypatch.setitem(data.TASKS, task, small)


def test_converts_the_public_release_of_pawsx(tmp_path, small_release):
    archive = pawsx_archive(tmp_path / 'x-final.tar.gz')
    (tmp_path / 'D' / 'pawsx').mkdir(parents=True)
    write(data.path_of(tmp_path / 'D', 'pawsx', 'test', 'de'), b'as XTREME\tstrips it\n')
    write(data.path_of(tmp_path / 'D', 'pawsx', 'test', 'en'), b'mine\tkept\t1\n')
    data.prepare(tmp_path / 'D', 'pawsx', [archive], complete=True)
    assert data.read_pairs(tmp_path / 'D/pawsx/test-de.tsv', 'pawsx') == [('de "a" 0', '"lone test_2k', 0), ('de "a" 1', '"lone test_2k', 1)]
    assert data.read_pairs(tmp_path / 'D/pawsx/test-en.tsv', 'pawsx') == [('mine', 'kept', 1)]
    assert sorted(path.name for path in (tmp_path / 'D/pawsx').iterdir()) == [
        'dev-de.tsv', 'dev-en.tsv', 'test-de.tsv', 'test-en.tsv', 'train-en.tsv']
    assert not list(tmp_path.rglob('escaped*'))


def test_converts_the_public_release_of_xnli(tmp_path, small_release):
    with zipfile.ZipFile(tmp_path / 'XNLI-1.0.zip', 'w') as archive:
        for split in ('dev', 'test'):
            rows = [f'{lang}\t{label}\t.\t.\t.\t.\t{lang} {split}\tsays "so"\t.\n' for label in ('neutral', 'entailment')
                    for lang in ('de', 'en', 'xx')]
            archive.writestr(f'XNLI-1.0/xnli.{split}.tsv', XNLI_HEADER + ''.join(rows))
    with zipfile.ZipFile(tmp_path / 'XNLI-MT-1.0.zip', 'w') as archive:
        archive.writestr('XNLI-MT-1.0/multinli/multinli.train.en.tsv', 'premise\thypo\tlabel\na\tb\tcontradictory\nc\td\tneutral\n')
    data.prepare(tmp_path, 'xnli', [tmp_path / 'XNLI-1.0.zip', tmp_path / 'XNLI-MT-1.0.zip'], complete=True)
    assert data.read_pairs(tmp_path / 'xnli/test-de.tsv', 'xnli') == [('de test', 'says "so"', 2), ('de test', 'says "so"', 1)]
    assert data.read_pairs(tmp_path / 'xnli/dev-de.tsv', 'xnli')[0] == ('de dev', 'says "so"', 2)
    assert data.read_pairs(tmp_path / 'xnli/train-en.tsv', 'xnli') == [('a', 'b', 0), ('c', 'd', 2)]


@pytest.mark.parametrize('break_it, message', [
    (lambda path: path.write_bytes(path.read_bytes()[:-40]), 'fetch it again'), (lambda path: path.write_bytes(b'<html>'), 'fetch it again'),
    (lambda path: path.unlink(), 'No such file'), (lambda path: pawsx_archive(path, rows=3), '3 rows for train-en, expected 2'),
])
def test_a_broken_archive_gives_one_line_and_leaves_nothing(tmp_path, small_release, break_it, message):
    break_it(pawsx_archive(tmp_path / 'x-final.tar.gz'))
    with pytest.raises(data.InputError, match=message) as error:
        data.prepare(tmp_path / 'D', 'pawsx', [tmp_path / 'x-final.tar.gz'])
    assert '\n' not in str(error.value) and not list((tmp_path / 'D' / 'pawsx').iterdir())


def test_fetches_what_is_missing_or_says_what_to_do(tmp_path, monkeypatch, small_release):
    url = (tmp_path / 'x-final.tar.gz').as_uri()        # no such file
    monkeypatch.setitem(data.TASKS, 'pawsx', data.TASKS['pawsx']._replace(archives={'x-final.tar.gz': (url, {'train', 'dev', 'test'})}))
    with pytest.raises(data.InputError, match='Fetch it by hand.*--task sample'):
        data.prepare(tmp_path / 'D', 'pawsx')
    with pytest.raises(data.InputError, match='not an archive of pawsx; expected x-final.tar.gz'):
        data.prepare(tmp_path / 'D', 'pawsx', ['paws.zip'])
    pawsx_archive(tmp_path / 'x-final.tar.gz')
    data.prepare(tmp_path / 'D', 'pawsx')
    assert len(data.read_pairs(tmp_path / 'D/pawsx/train-en.tsv', 'pawsx')) == 2 and not (tmp_path / 'D/pawsx/dev-de.tsv').exists()
    assert not [path for path in (tmp_path / 'D').rglob('*') if path.suffix not in ('.tsv', '')]


@real
def test_real_files_hold_what_was_counted_in_them():
    """Rows, missing labels, placeholders NS (dev, test) and doubled quotes, counted in the files by other means."""
    placeholders = {'en': (0, 0), 'de': (68, 32), 'es': (38, 1), 'fr': (8, 14), 'ja': (20, 54), 'ko': (35, 28), 'zh': (16, 25)}
    for lang, counts in placeholders.items():
        for split, count in zip(('dev', 'test'), counts):
            path = data.path_of(SHARED / 'data', 'pawsx', split, lang)
            pairs = data.read_pairs(path, 'pawsx')
            assert len(pairs) == 2000 and (pairs[0].label is None) == (split == 'test' and lang in ('ja', 'ko'))
            assert sum('NS' in pair for pair in pairs) == count and (f'{count} rows' in data.describe(path, pairs)) == (count > 0)
            assert not any('""' in pair.premise + pair.hypothesis for pair in pairs)
    for lang in data.TASKS['xnli'].languages:
        pairs = data.read_pairs(data.path_of(SHARED / 'data', 'xnli', 'test', lang), 'xnli')
        assert len(pairs) == 5010 and pairs[0].premise == pairs[1].premise == pairs[2].premise
        assert (pairs[0].label is None) == (lang in ('bg', 'el', 'th', 'tr', 'vi'))


# ---------------------------------------------------------------- synonyms.py

NEIGHBOURS = {'good': ['fine'], 'cat': ['kitten', 'puss']}


def test_replacement_keeps_case_punctuation_and_spacing():
    text = '  Good  cats, "CAT" (cat)--good!\u00a0x'
    assert synonyms.replace(text, {'good': ['fine'], 'cat': ['puss']}, 1.0, random.Random(0)) == '  Fine  cats, "PUSS" (puss)--fine!\u00a0x'
    assert synonyms.replace(text, NEIGHBOURS, 0.0, random.Random(0)) == text


def test_replacement_has_probability_p_and_picks_uniformly():
    words = synonyms.replace('cat ' * 20000, NEIGHBOURS, 0.1, random.Random(0)).split()
    assert len(words) == 20000
    assert words.count('kitten') / 20000 == pytest.approx(0.05, abs=0.006) and words.count('puss') / 20000 == pytest.approx(0.05, abs=0.006)


def test_the_authors_form_is_uniform_over_the_word_and_its_neighbours():
    words = synonyms.replace('cat dog ' * 20000, NEIGHBOURS, None, random.Random(0)).split()
    assert words.count('dog') == 20000
    for word in ('cat', 'kitten', 'puss'):
        assert words.count(word) / 20000 == pytest.approx(1 / 3, abs=0.01)


def test_english_only_leaves_out_what_the_english_file_does_not_have():
    pairs = [data.Pair('A Kitten, and', 'fine', 0)]
    assert synonyms.english_only({'cat': ['gato', 'kitten'], 'good': ['buena'], 'nice': ['fine']}, pairs) == {'cat': ['kitten'], 'nice': ['fine']}


def test_augmentation_depends_on_seed_and_copy_alone():
    pair = data.Pair('a good cat ' * 5, 'good cat ' * 5, 1)
    copies = [synonyms.augment(pair, NEIGHBOURS, 0.5, 1, copy) for copy in range(10)]
    assert copies == [synonyms.augment(pair, NEIGHBOURS, 0.5, 1, copy) for copy in range(10)]
    assert len(set(copies)) > 5 and {copy.label for copy in copies} == {1}
    assert copies != [synonyms.augment(pair, NEIGHBOURS, 0.5, 2, copy) for copy in range(10)]


def test_neighbours_against_every_distance():
    torch.manual_seed(0)
    vectors, words = torch.randn(700, 5), [f'w{i}' for i in range(700)]
    distances = torch.cdist(vectors.double(), vectors.double()).square().fill_diagonal_(9e9)
    found = synonyms.build(words, vectors, k=4, bound=0.8)
    for i, word in enumerate(words):
        nearest = [j for j in distances[i].argsort().tolist() if distances[i, j] <= 0.8][:4]
        assert found[word] == [words[j] for j in nearest]
    assert any(len(near) == 4 for near in found.values()) and not all(len(near) == 4 for near in found.values())


# ---------------------------------------------------------------- train.py, evaluate.py

@pytest.fixture(scope='session')
def world(tmp_path_factory):
    """DATA with the sample world in it."""
    path = tmp_path_factory.mktemp('data')
    data.write_sample(path)
    return path


@pytest.fixture
def run(world, tmp_path, monkeypatch, capsys):
    """run(name, *flags): train.py on the sample world -> (run folder, its results, what it printed)."""
    def run(name, *flags):
        monkeypatch.setattr(sys, 'argv', ['train.py', '--task', 'sample', '--data', str(world), '--out', str(tmp_path / name), *flags])
        train.main(train.parse_args())
        return tmp_path / name, json.loads((tmp_path / name / 'results.json').read_text()), capsys.readouterr().out
    return run


def score(run, monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, 'argv', ['evaluate.py', str(run), *flags])
    evaluate.main(evaluate.parse_args())
    return capsys.readouterr().out


def targets(results):
    return sum(score for lang, score in results['test'].items() if lang != 'en') / 6


@pytest.fixture(scope='session')
def trained(world, tmp_path_factory):
    """Runs on the sample world cut down to 1,000 of 2,500 steps -> (folders by name, their results, what was printed)."""
    folders, results, printed, processes = {}, {}, '', {}
    for name, flags in {'plain': ['plain'], 'rs_r': ['rs_r', '--eps', '0.1'], 'rs_r 0.01': ['rs_r', '--eps', '0.01'],
                        'adv 0.01': ['adv', '--eps', '0.01', '--plain-steps', '500']}.items():
        folders[name] = tmp_path_factory.mktemp('trained') / name
        command = [sys.executable, HERE / 'train.py', '--task', 'sample', '--data', world, '--out', folders[name], '--seed', '1', '--max-steps', '1000',
                   '--max-eval', '1000', '--eval-steps', '500', '--method', *flags]
        # One thread: the numbers depend on how many there are. All at once, for the time it takes.
        processes[name] = subprocess.Popen(list(map(str, command)), env={**os.environ, 'OMP_NUM_THREADS': '1'}, stdout=subprocess.PIPE,
                                           stderr=subprocess.PIPE, text=True)
    for name, process in processes.items():
        out, complaints = process.communicate()
        assert process.returncode == 0, complaints
        printed += out
        results[name] = json.loads((folders[name] / 'results.json').read_text())
    return folders, results, printed


def test_the_claim_of_the_paper_in_the_sample_world(trained, monkeypatch, capsys):
    """plain falls with a language's distance, rs_r falls less."""
    folders, results, printed = trained
    plain, rs_r, folder = results['plain'], results['rs_r'], folders['plain']
    near = [plain['test'][lang] for lang in ('en', 'x1', 'x2', 'x3')]
    assert near[0] > 95 and near == sorted(near, reverse=True) and near[3] < 80
    assert targets(rs_r) > targets(plain) + 5 and rs_r['test']['en'] > 90

    assert plain['dev'] == max(h['dev'] for h in plain['history']) and plain['step'] in (500, 1000)
    assert plain['args']['seed'] == plain['seed'] == 1 and plain['args']['eps'] is None and 'torch' in plain['versions']
    assert plain['pairs_per_second'] > 0 and plain['peak_memory_gib'] > 0 and plain['wall_seconds'] > 0
    name, *cells = next(line for line in printed.splitlines() if line.startswith('plain')).split()
    assert [float(cell) for cell in cells] == pytest.approx([*plain['test'].values(), sum(plain['test'].values()) / 7], abs=0.051)
    assert score(folder, monkeypatch, capsys) in printed        # evaluate.py finds the same
    files_hold_what_their_users_expect(folder, plain)


def test_the_robust_regions_of_the_sample_world(trained, monkeypatch, capsys, tmp_path):
    """At radius 0.01 adv holds out best of those trained at 0.01; rs_r needs a larger ball, since its noise averages out."""
    folders, results, _ = trained
    picture = [] if importlib.util.find_spec('matplotlib') is None else ['-o', str(tmp_path / 'regions.png')]
    flags = [str(folder) for folder in folders.values()] + ['--regions', '--langs', 'en', 'x1', '--radii', '0', '0.01', '--max-eval', '200', *picture]
    lines = score(flags[0], monkeypatch, capsys, *flags[1:]).splitlines()
    found = {name: {tuple(line.split()[:2]): [float(cell) for cell in line.split()[2:]] for line in lines[6 * n + 2:6 * n + 6]}
             for n, name in enumerate(folders)}
    for lang in ('en', 'x1'):
        attacked = {name: rows[lang, 'attack'][1] for name, rows in found.items()}
        assert attacked['adv 0.01'] > attacked['rs_r 0.01'] + 10 and attacked['adv 0.01'] > attacked['plain'] + 10
        assert attacked['rs_r'] > attacked['plain'] + 10
        for name, rows in found.items():
            clean = 100 * results[name]['test_marks'][lang][:200].count('1') / 200
            assert rows[lang, 'noise'][0] == rows[lang, 'attack'][0] == clean > rows[lang, 'attack'][1]
    held = json.loads((folders['plain'] / 'results.json').read_text())['regions']
    assert held[0]['settings']['radii'] == [0, 0.01] and held[0]['found']['attack']['x1'] == found['plain']['x1', 'attack']
    shutil.rmtree(folders['adv 0.01'] / 'predictions')
    (folders['adv 0.01'] / 'model.safetensors').unlink()
    assert score(flags[0], monkeypatch, capsys, *flags[1:]).splitlines() == lines      # from what was kept
    assert not picture or (tmp_path / 'regions.png').read_bytes()[:4] == b'\x89PNG'


def files_hold_what_their_users_expect(folder, results):
    pairs = data.read_pairs(data.path_of(results['args']['data'], 'sample', 'test', 'x1'), 'sample')[:1000]
    predicted = (folder / 'predictions/sample/test-x1.tsv').read_text().splitlines()
    labels = data.TASKS['sample'].labels
    assert 100 * sum(p == labels[pair.label] for p, pair in zip(predicted, pairs, strict=True)) / 1000 == results['test']['x1']
    classify = pipeline('text-classification', str(folder))
    assert [classify({'text': pair.premise, 'text_pair': pair.hypothesis})['label'] for pair in pairs[:20]] == predicted[:20]


def test_a_language_without_labels_is_predicted_but_not_scored(run, world, tmp_path, monkeypatch, capsys):
    folder, _, _ = run('plain', '--method', 'plain', '--max-steps', '2')
    for lang in data.TASKS['sample'].languages:
        pairs = data.read_pairs(data.path_of(world, 'sample', 'test', lang), 'sample')[:50]
        rows = [(a, b) if lang == 'x2' else (a, b, data.TASKS['sample'].labels[label]) for a, b, label in pairs]
        (tmp_path / 'D/sample').mkdir(parents=True, exist_ok=True)
        data.write_pairs(data.path_of(tmp_path / 'D', 'sample', 'test', lang), rows)
    lines = score(folder, monkeypatch, capsys, '--data', str(tmp_path / 'D')).splitlines()
    scores = lines[2].split()[1:]
    assert scores[2] == '-' and lines[3].startswith('-: no labels in the file (x2)')
    known = [float(s) for s in scores[:2] + scores[3:7]]
    assert float(scores[7]) == pytest.approx(sum(known) / 6, abs=0.06)
    assert len((folder / 'predictions/sample/test-x2.tsv').read_text().splitlines()) == 50
    assert json.loads((folder / 'results.json').read_text())['test']['x2'] is None
    matrix = score(folder, monkeypatch, capsys, '--generalized', '--data', str(tmp_path / 'D')).splitlines()
    assert '(42 pairs)' in matrix[0] and [row.split()[3] for row in matrix[2:]].count('-') == 1      # x2-x2; with another its labels serve


def test_generalized_pairs_two_languages_and_leaves_out_rows_whose_labels_differ(tmp_path, monkeypatch):
    rows = {'en': [('a', 'b', '1'), ('c', 'd', '0')], 'de': [('A', 'B', '1'), ('C', 'NS', '1')], 'ja': [('x', 'y'), ('z', 'w')]}
    (tmp_path / 'pawsx').mkdir()
    for lang, pairs in rows.items():
        data.write_pairs(data.path_of(tmp_path, 'pawsx', 'test', lang), pairs)
    seen = {}
    monkeypatch.setattr(evaluate, 'predict', lambda model, tokenizer, pairs, desc: seen.setdefault(desc, pairs) and torch.ones(len(pairs)))
    model = types.SimpleNamespace(config=types.SimpleNamespace(id2label={0: '0', 1: '1'}))
    found = evaluate.generalized(model, None, 'pawsx', tmp_path, langs=['en', 'de', 'ja'])
    assert seen['en-de'] == [('a', 'B', 1)] and seen['de-en'] == [('A', 'b', 1)] and seen['ja-en'] == [('x', 'b', 1), ('z', 'd', 0)]
    assert found['en'] == {'en': 50.0, 'de': 100.0, 'ja': 50.0} and found['de']['de'] == 100.0 and found['ja']['ja'] is None


def test_of_several_passes_the_majority_counts(world):
    class Votes:        # of three passes over two pairs
        device, answers = torch.device('cpu'), [[0, 1], [2, 1], [2, 0]]

        def eval(self):
            self.left = [torch.nn.functional.one_hot(torch.tensor(answer), 3).float() for answer in self.answers]

        def __call__(self, **inputs):
            return types.SimpleNamespace(logits=self.left.pop(0))
    tokenizer = evaluate.AutoTokenizer.from_pretrained(world / 'sample/model')
    assert evaluate.predict(Votes(), tokenizer, [data.Pair('bokin', 'bokin', 0)] * 2, passes=3).tolist() == [2, 1]


def test_predictions_come_back_in_the_order_of_the_pairs_and_logits_that_are_not_finite_stop_them(world):
    """By a made-up classifier of pairs by their length, in batches of two."""
    class Lengths(torch.nn.Module):
        device, config = torch.device('cpu'), types.SimpleNamespace(name_or_path='lengths')
        broken = None

        def forward(self, attention_mask, **inputs):
            tokens = attention_mask.sum(1)
            logits = torch.nn.functional.one_hot(tokens % 3, 3).float()
            return types.SimpleNamespace(logits=torch.where(tokens[:, None] == self.broken, math.nan, logits) if self.broken else logits)
    tokenizer, model = evaluate.AutoTokenizer.from_pretrained(world / 'sample/model'), Lengths()
    lengths = [3, 1, 4, 2, 7, 5, 6]
    pairs = [data.Pair('a ' * length, 'b', 0) for length in lengths]        # [CLS], a ..., [SEP], b, [SEP]
    assert evaluate.predict(model, tokenizer, pairs, batch=2).tolist() == [(length + 4) % 3 for length in lengths]
    for length in lengths:
        model.broken = length + 4
        with pytest.raises(data.InputError, match='lengths: gives logits that are not finite'):
            evaluate.predict(model, tokenizer, pairs, batch=2)


def test_smoothing_with_no_noise_changes_nothing_and_with_much_noise_all(run, monkeypatch, capsys):
    folder, results, _ = run('a', '--method', 'rs_r', '--max-steps', '400', '--eval-steps', '400', '--max-eval', '300')
    plain = [f'{value:.1f}' for value in results['test'].values()]
    assert results['test']['en'] > 60
    assert score(folder, monkeypatch, capsys, '--smooth', '3', '--eps', '0').splitlines()[-1].split()[1:-1] == plain
    noisy = score(folder, monkeypatch, capsys, '--smooth', '3', '--eps', '30').splitlines()[-1].split()[1:-1]
    assert noisy != plain and float(noisy[0]) < 60


def test_any_classifier_with_the_labels_in_any_order_is_scored_rightly(run, tmp_path, world, monkeypatch, capsys):
    folder, results, _ = run('a', '--method', 'plain', '--max-steps', '300', '--eval-steps', '300', '--max-eval', '200')
    model, tokenizer = evaluate.load(folder)
    with torch.no_grad():
        for p in (model.classifier.weight, model.classifier.bias):
            p.copy_(p.flip(0))
    model.config.id2label, model.config.label2id = {0: 'PARAPHRASE', 1: 'Different'}, {'PARAPHRASE': 0, 'Different': 1}
    model.save_pretrained(tmp_path / 'other')
    tokenizer.save_pretrained(tmp_path / 'other')
    flags = '--task', 'sample', '--data', str(world), '--max-eval', '200', '--float32'
    row = score(tmp_path / 'other', monkeypatch, capsys, *flags).splitlines()[-1].split()
    assert row[0] == 'other' and row[1:-1] == [f'{value:.1f}' for value in results['test'].values()]
    assert results['test']['en'] > 55
    assert (tmp_path / 'other/predictions/sample/test-x1.tsv').read_text() == (folder / 'predictions/sample/test-x1.tsv').read_text()
    with pytest.raises(data.InputError, match='labels paraphrase, different; xnli has contradiction'):
        score(tmp_path / 'other', monkeypatch, capsys, '--task', 'xnli', '--data', str(world))


def made(folder, method, eps, seed, marks, dev=50.0, dev_marks=None, **args):
    """A run folder as train.py writes it, with these marks in all languages of the sample world (or a dict of them)."""
    langs = data.TASKS['sample'].languages
    by_lang = marks if isinstance(marks, dict) else dict.fromkeys(langs, marks)
    results = {'dev': dev, 'dtype': 'torch.float32', 'files': {}, 'test_marks': by_lang, 'test': {k: evaluate.accuracy(v) for k, v in by_lang.items()},
               'args': {'task': 'sample', 'method': method, 'eps': eps, 'seed': seed, 'layer': 0, 'm': 10, 'p': 0.1, 'epochs': 4.0, 'max_length': 128,
                        'max_eval': None, 'max_steps': 7, 'data': 'D', 'adv_steps': 1, **args}}
    if dev_marks:
        results['dev_marks'] = [{'settings': {}, 'found': dict(dict.fromkeys(langs, '1'), **dev_marks)}]
    folder.mkdir(exist_ok=True)
    evaluate.write_results(folder, results)
    return evaluate.Run(folder)


def rows_of(runs):
    rows, notes = evaluate.comparison(runs)
    return {name.strip(): cells for name, cells in rows}, notes


def test_the_table_of_four_runs_by_hand(tmp_path):
    """Accuracies of two seeds each: plain 50 and 25 -> 37.5, sd 17.7; rs_r 75 and 100 -> 87.5."""
    runs = [made(tmp_path / 'p1', 'plain', None, 1, '1100'), made(tmp_path / 'p2', 'plain', None, 2, '1000'),
            made(tmp_path / 'r1', 'rs_r', 0.1, 1, '1110'), made(tmp_path / 'r2', 'rs_r', 0.1, 2, '1111')]
    rows, notes = rows_of(runs)
    assert list(rows) == ['plain', 'sd of 2 seeds', 'rs_r 0.1', 'minus plain', '95% from', 'to'] and not notes
    assert rows['plain'] == ['37.5'] * 8 and rows['rs_r 0.1'] == ['87.5'] * 8 and rows['sd of 2 seeds'] == ['17.7'] * 8
    assert rows['minus plain'] == ['+50.0'] * 8


def test_eps_is_chosen_by_english_dev_and_by_the_oracle_on_each_languages_dev(tmp_path):
    flip = {'x6': '0'}
    runs = [made(tmp_path / 'p', 'plain', None, 1, '10'),
            made(tmp_path / 'a', 'adv', 0.01, 1, '1110', dev=70, dev_marks={'x6': '0'}), made(tmp_path / 'b', 'adv', 0.01, 2, '1110', dev=60, dev_marks=flip),
            made(tmp_path / 'c', 'adv', 1.0, 1, '0011', dev=69, dev_marks={'x1': '0'}), made(tmp_path / 'd', 'adv', 1.0, 2, '0011', dev=59, dev_marks={'x1': '0'})]
    runs[0] = made(tmp_path / 'p', 'plain', None, 1, '1100')
    rows, notes = rows_of(runs)
    assert 'adv 0.01' in rows and 'adv 1' not in rows and rows['adv 0.01'] == ['75.0'] * 8
    assert rows['oracle eps'] == ['75.0'] * 6 + ['50.0', f'{(6 * 75 + 50) / 7:.1f}']       # x6 prefers 1.0; of equals the smaller
    assert notes == ['adv: eps by English dev, mean over seeds: 0.01 65.0 (n=2), 1 64.0 (n=2)']


def test_runs_that_do_not_belong_together_are_told_apart(tmp_path, capsys):
    runs = [made(tmp_path / 'a', 'plain', None, 1, '10'), made(tmp_path / 'b', 'plain', None, 2, '10', max_steps=9),
            made(tmp_path / 'c', 'rs_a', None, 1, '11', epochs=3.0), made(tmp_path / 'd', 'rs_a', None, 1, '01', replace='authors', epochs=3.0),
            made(tmp_path / 'e', 'adv', 0.1, 1, '01', adv_steps=3)]
    assert [[run.name for run in group] for group in evaluate.groups_of(runs)] == [['a', 'e', 'c', 'd'], ['b']]
    assert list(evaluate.by_variant(runs)) == ['plain', 'adv', 'rs_a replace=None', 'rs_a replace=authors']
    evaluate.report(runs, markdown=True)
    printed = capsys.readouterr().out
    assert 'sample, test accuracy in percent, max_steps=7\n|  | en |' in printed and ', max_steps=9\n' in printed


def test_rows_of_the_paper_have_the_averages_that_it_prints():
    for task, table in evaluate.PAPER.items():
        for row in table.values():
            *scores, average = map(float, row.split())
            assert len(scores) == len(data.TASKS[task].languages) and sum(scores) / len(scores) == pytest.approx(average, abs=0.051)


def test_the_interval_is_that_of_a_mean_over_items_with_seeds_together():
    g = generator()
    plain = (torch.rand(3, 2000, 2, generator=g) < 0.5).double()
    ours = (torch.rand(3, 2000, 2, generator=g) < 0.6).double()
    difference, low, high = evaluate.interval(ours, plain)
    items = 100 * (ours.mean(0) - plain.mean(0))
    items = torch.cat([items, items.mean(1, keepdim=True)], 1)
    assert torch.allclose(difference, items.mean(0))
    half = 1.96 * items.std(0) / 2000 ** 0.5
    assert torch.allclose(high - difference, half, rtol=0.12) and torch.allclose(difference - low, half, rtol=0.12)
    assert high[2] - low[2] < 0.8 * (high[0] - low[0])      # two independent languages: narrower by a root of two


def test_eps_0_trains_to_the_weights_of_plain_and_a_seed_to_the_same_weights(run):
    weights = {}
    for name, flags in {'plain': ['plain'], 'rs_r 0': ['rs_r', '--eps', '0'], 'adv 0': ['adv', '--eps', '0', '--plain-steps', '0'],
                        'rs_a 0': ['rs_a', '--p', '0', '--m', '1'], 'rs_r': ['rs_r'], 'rs_r again': ['rs_r'],
                        'rs_r 43': ['rs_r', '--seed', '43'], 'rs_a': ['rs_a'], 'adv': ['adv', '--plain-steps', '0']}.items():
        folder, _, _ = run(name, '--method', *flags, '--max-steps', '8', '--eval-steps', '4', '--max-train', '300', '--batch', '16')
        weights[name] = (folder / 'model.safetensors').read_bytes()
    assert weights['plain'] == weights['rs_r 0'] == weights['adv 0'] == weights['rs_a 0']
    assert weights['rs_r'] == weights['rs_r again']
    assert len(set(weights.values())) == 5


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
        assert torch.equal(torch.nn.functional.dropout(x, 0.1, training=False), x) and not torch.nn.functional.dropout(x, 1.0).any()


def test_cheap_dropout_reaches_attention_and_leaves_a_model_without_dropout_alone(model, batch, monkeypatch):
    seen, cheap = [], train.CheapDropout.dropout
    monkeypatch.setattr(train.CheapDropout, 'dropout',
                        staticmethod(lambda input, *args, **kwargs: seen.append(input.shape) or cheap(input, *args, **kwargs)))
    expected = model.eval()(**batch).logits
    with train.CheapDropout.fitting(model):
        assert torch.allclose(model(**batch).logits, expected, atol=1e-5)       # eager attention is the same function
        seen.clear()
        model.train()(**batch)
    assert seen.count((2, 2, 6, 6)) == 2 and seen.count((2, 6, 16)) >= 5        # both layers' attention; embeddings, 2 a layer
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.set_attn_implementation('sdpa')
    assert not isinstance(train.CheapDropout.fitting(model), train.CheapDropout) and model.config._attn_implementation == 'sdpa'


def test_training_on_the_cpu_uses_cheap_dropout(run, dropping, monkeypatch):
    weights = []
    for p in (0.1, 0.0):
        if not p:
            monkeypatch.setattr(train.CheapDropout, 'dropout', staticmethod(lambda input, *args, **kwargs: input))
        folder, _, _ = run(f'p {p}', '--method', 'plain', '--model', str(dropping), '--max-steps', '2', '--max-eval', '10')
        weights.append((folder / 'model.safetensors').read_bytes())
    assert weights[0] != weights[1]


def test_the_work_of_a_step_by_hand(world):
    """Of a BERT of 2 layers of 64, on batches that all have T tokens."""
    model, tokenizer = evaluate.load_encoder(str(world / 'sample/model'), 'sample')
    pairs = data.read_pairs(world / 'sample/train-en.tsv', 'sample')[:20]
    tokens, = {len(tokenizer(pair.premise, pair.hypothesis)['input_ids']) for pair in pairs}
    args = types.SimpleNamespace(batch=8, max_length=128, seed=1)
    wide = model.config.hidden_size
    layer = 2 * tokens * 12 * wide ** 2 + 2 * 2 * tokens ** 2 * wide       # Q, K, V, output; the feed-forward two of 4; scores, mean
    size = sum(p.numel() for p in model.parameters())
    assert train.work_of(model, tokenizer, pairs, args) == (2 * layer + 2 * wide ** 2 + 2 * wide * 2, 32 * size)
    words = model.get_input_embeddings().weight.requires_grad_(False)
    assert train.work_of(model, tokenizer, pairs, args)[1] == 32 * (size - words.numel())


def test_the_rates_of_a_machine_that_takes_a_second_for_each_piece_of_work(monkeypatch):
    class Timer:
        def __init__(self, work, globals, num_threads):
            exec(work, globals)
            self.moved = '@' in work or torch.equal(globals['c'], globals['d'])

        def blocked_autorange(self, min_run_time):
            return types.SimpleNamespace(median=1.0 if self.moved else math.nan)
    monkeypatch.setattr(train, 'Timer', Timer)
    assert train.rates_of(torch.device('cpu'), torch.float32) == [2 * 2048 * 2048 * 2048, 2 * 4 * 2 ** 26]     # a read and a write a number


def test_the_benchmark_sets_each_method_beside_its_baselines(world, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(train, 'rates_of', lambda device, dtype: (1e9, 2e9))
    monkeypatch.setattr(sys, 'argv', ['train.py', '--task', 'sample', '--data', str(world), '--out', str(tmp_path / 'runs'), '--benchmark',
                                      '--method', 'plain', 'rs_a'])
    train.main(train.parse_args())
    floor, *rows = capsys.readouterr().out.splitlines()
    work, moved = map(float, re.fullmatch(r'floor: 3 x (\S+) GFLOP a pair at 1 GFLOP/s, (\S+) GB a step at 2 GB/s', floor).groups())
    table = {row[:20].strip(): row[20:] for row in rows}
    rate = {name: float(row.split()[0]) for name, row in table.items()}
    assert set(table) == {'training, XTREME', 'evaluation, XTREME', 'evaluation', 'training, plain', 'training, rs_a'}

    def holds(name, pattern, expected, tolerance):
        assert float(re.search(pattern, table[name])[1]) == pytest.approx(expected, rel=tolerance)
    for name in table:
        holds(name, r'pairs/s, +(\S+) times XTREME', rate[name] / rate[name.split(',')[0] + ', XTREME'], 0.02)
    holds('training, rs_a', r'(\S+) times the step of plain', rate['training, plain'] / rate['training, rs_a'], 0.02)
    holds('training, plain', r'of the floor \((\d+)\)', 1 / (3 * work + moved / 64 / 2), 0.02)
    holds('evaluation', r'of the floor \((\d+)\)', 1 / work, 0.02)
    assert not (tmp_path / 'runs').exists()


def test_a_finished_run_is_kept(run):
    folder, results, printed = run('a', '--method', 'plain', '--max-steps', '2')
    written = (folder / 'model.safetensors').stat().st_mtime_ns
    _, again, printed_again = run('a', '--method', 'plain', '--max-steps', '2')
    assert again == results and printed_again == printed and (folder / 'model.safetensors').stat().st_mtime_ns == written
    with pytest.raises(data.InputError, match=r'other arguments \(eps, max_steps, method\)'):
        run('a', '--method', 'adv', '--max-steps', '3')


def test_batches_hold_every_pair_once_an_epoch(world):
    pairs = [data.Pair('bokin ' * (i % 7 + 1), 'bokin', i % 2) for i in range(100)]
    tokenizer = evaluate.AutoTokenizer.from_pretrained(world / 'sample/model')
    args = types.SimpleNamespace(seed=1, batch=16, max_length=128, m=10, p=0.1, replace='paper')
    for neighbours, rows in ((None, 100), ({'bokin': ['x']}, 1000)):
        batches, lengths, labels, seen = iter(train.Batches(pairs, tokenizer, args, neighbours)), [], [], []
        while len(labels) < rows:
            batch, weight, which = next(batches)
            seen += which
            assert weight == 1 and [i % 2 for i in which] == batch['labels'].tolist()
            lengths += batch['attention_mask'].sum(1).tolist()
            labels += batch['labels'].tolist()
            of_like_length = batch['attention_mask'].sum(1)
            assert batch['input_ids'].shape[1] == of_like_length.max() <= of_like_length.min() + 2      # padded no further
        assert sorted(seen) == sorted(list(range(100)) * (rows // 100))
        assert sorted(lengths) == sorted([i % 7 + 1 + 4 for i in range(100)] * (rows // 100)) and sum(labels) == rows // 2


# ---------------------------------------------------------------- nothing lost

@pytest.fixture(scope='session')
def dropping(world, tmp_path_factory):
    """The sample world's encoder, with dropout."""
    folder = tmp_path_factory.mktemp('dropping')
    model = transformers.BertModel.from_pretrained(world / 'sample/model', hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    model.save_pretrained(folder)
    evaluate.AutoTokenizer.from_pretrained(world / 'sample/model').save_pretrained(folder)
    return folder


# As `python train.py FLAGS`, but the state is written at each dev evaluation, and after it the process may be killed.
KILLED = """
import os, signal, sys, train
train.STATE_SECONDS, kill_at, keep = -1, int(sys.argv.pop(1)), train.keep
def killing(*args):
    if kill_at > 0 and args[5]['at'] == kill_at:
        train.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)        # between the state and the checkpoint, if it is the best
    keep(*args)
    if args[5]['at'] == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
train.keep = killing
train.main(train.parse_args())
"""


def test_a_killed_run_ends_with_the_weights_of_one_that_was_never_stopped(world, dropping, tmp_path):
    def go(name, kill_at=0):
        flags = ['--task', 'sample', '--method', 'rs_r', '--data', world, '--model', dropping, '--out', tmp_path / name, '--max-steps', '60',
                 '--eval-steps', '10', '--max-eval', '60', '--max-train', '700', '--lr', '3e-3', '--no-freeze-embeddings']
        ended = subprocess.run([sys.executable, '-c', KILLED, str(kill_at), *flags], cwd=HERE, capture_output=True, text=True)
        assert ended.returncode == (-9 if kill_at else 0), ended.stderr
        return ended.stderr
    go('whole')
    for kill_at in (10, 30):
        go('killed', kill_at)
        assert train.state_of(json_args(tmp_path / 'killed/state.safetensors')) == 'to be resumed'
    assert 'goes on after step 30' in go('killed')
    whole, killed = ((tmp_path / name / 'model.safetensors').read_bytes() for name in ('whole', 'killed'))
    assert whole == killed
    whole, killed = (json.loads((tmp_path / name / 'results.json').read_text()) for name in ('whole', 'killed'))
    assert whole['history'] == killed['history'] and whole['test_marks'] == killed['test_marks'] and len({h['dev'] for h in whole['history']}) > 1
    assert sorted(path.name for path in (tmp_path / 'killed').iterdir()) == sorted(path.name for path in (tmp_path / 'whole').iterdir())


def json_args(state):
    with train.safetensors.safe_open(state, 'pt') as file:
        return types.SimpleNamespace(**json.loads(file.metadata()['args']))


def test_a_resumed_run_goes_on_with_the_same_batches(world):
    pairs = [data.Pair('bokin ' * (i % 7 + 1), 'bokin', i % 2) for i in range(1100)]
    tokenizer = evaluate.AutoTokenizer.from_pretrained(world / 'sample/model')
    args = types.SimpleNamespace(seed=1, batch=16, max_length=128, m=1, p=0.1, replace='paper')
    whole = itertools.islice(iter(train.Batches(pairs, tokenizer, args)), 150)       # pools of 64 and 5 batches, twice
    rows = [which for _, _, which in whole]
    for start in (0, 1, 63, 64, 65, 69, 70, 140):
        rest = itertools.islice(iter(train.Batches(pairs, tokenizer, args, start=start)), 150 - start)
        assert [which for _, _, which in rest] == rows[start:]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(run, tmp_path, monkeypatch):
    forward = robust.Objective.forward
    monkeypatch.setattr(robust.Objective, 'forward', lambda self, batch, step: forward(self, batch, step) * (math.nan if step >= 4 else 1))
    with pytest.raises(data.InputError, match=r'step 4: the loss is nan; try .* Its batch: lines (\d+ ){64}of train-en.tsv. '
                                              r'The best checkpoint so far, of step 2, stays in ') as error:
        run('a', '--method', 'plain', '--max-steps', '8', '--eval-steps', '2')
    assert '\n' not in str(error.value) and all(p.isfinite().all() for p in evaluate.load(tmp_path / 'a')[0].parameters())
    monkeypatch.undo()


def test_out_of_memory_gives_one_line_that_names_the_flag_and_keeps_the_last_good_checkpoint(run, tmp_path, monkeypatch, capsys):
    flags = ['--method', 'plain', '--max-steps', '6', '--eval-steps', '2', '--max-eval', '20']

    def full(at):
        load_model, calls = evaluate.AutoModelForSequenceClassification.from_pretrained, itertools.count(1)

        def failing(model, inputs, output):
            if next(calls) == at:
                raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has')

        def load(*args, **kwargs):
            model = load_model(*args, **kwargs)
            model.register_forward_hook(failing)
            return model
        return load
    with monkeypatch.context() as patch:
        patch.setattr(evaluate.AutoModelForSequenceClassification, 'from_pretrained', full(5))      # 2 steps, dev, a step, this one
        with pytest.raises(data.InputError, match=r'^\S+: out of GPU memory \(CUDA out of memory\); try .*--batch or --max-length'):
            run('new', *flags)
    assert evaluate.load(tmp_path / 'new') and not (tmp_path / 'new/results.json').exists()
    folder, results, _ = run('new', *flags)
    assert results['history'] == run('whole', *flags)[1]['history']
    with monkeypatch.context() as patch:
        patch.setattr(evaluate.AutoModelForSequenceClassification, 'from_pretrained', full(1))
        with pytest.raises(data.InputError, match='out of GPU memory .* a smaller --batch$'):
            score(folder, monkeypatch, capsys, '--split', 'dev')
    assert json.loads((folder / 'results.json').read_text()) == results


def test_weights_that_explode_are_never_kept(run, tmp_path):
    with pytest.raises(data.InputError, match='not finite'):
        run('a', '--method', 'plain', '--max-steps', '8', '--eval-steps', '1', '--lr', '1e30')
    assert not (tmp_path / 'a').exists()


def test_a_full_disk_gives_one_line_and_the_state_before_stays(run, tmp_path, monkeypatch):
    flags = ['--method', 'plain', '--max-steps', '6', '--eval-steps', '2', '--max-eval', '100']
    save_file, full = train.safetensors.torch.save_file, []
    monkeypatch.setattr(train, 'STATE_SECONDS', -1)

    def save(tensors, path, metadata):
        if full.append(path) or len(full) > 1:
            path.write_bytes(b'half')
            raise train.safetensors.SafetensorError('I/O error: No space left on device')
        save_file(tensors, path, metadata)
    monkeypatch.setattr(train.safetensors.torch, 'save_file', save)
    with pytest.raises(data.InputError, match='cannot be written .*No space left.*the same command goes on'):
        run('a', *flags)
    assert not list(tmp_path.rglob('*part*'))
    monkeypatch.setattr(train.safetensors.torch, 'save_file', save_file)
    _, resumed, _ = run('a', *flags)
    _, whole, _ = run('b', *flags)
    assert resumed['history'] == whole['history'] and not (tmp_path / 'a/state.safetensors').exists()


# As `python train.py FLAGS`, but the gradients of each step are kept, PATH.N, by the first process; PATH.kept.RANK tells who writes.
GRADIENTS = """
import os, sys, safetensors.torch, torch, train
path, clip, steps = sys.argv.pop(1), torch.nn.utils.clip_grad_norm_, []
def keeping(parameters, norm):
    parameters = list(parameters)
    if train.rank_and_world()[0] == 0:
        safetensors.torch.save_file({str(i): p.grad for i, p in enumerate(parameters) if p.grad is not None}, f'{path}.{len(steps)}')
    steps.append(clip(parameters, norm))
torch.nn.utils.clip_grad_norm_ = keeping
keep, train.keep = train.keep, lambda *args: (open(f'{path}.kept.{train.rank_and_world()[0]}', 'w').close(), keep(*args))
train.main(train.parse_args())
"""


def test_two_processes_have_the_gradients_of_one(world, tmp_path):
    """Batches of 15 of 20 pairs: shares of 8 and 7, then of 3 and 2."""
    (tmp_path / 'spy.py').write_text(GRADIENTS)
    flags = ['--task', 'sample', '--method', 'plain', '--data', world, '--max-steps', '2', '--max-train', '20', '--batch', '15', '--max-eval', '30',
             '--warmup', '0', '--lr', '1e-6']
    environment = {**os.environ, 'PYTHONPATH': str(HERE), 'OMP_NUM_THREADS': '1'}
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port', '29517']
    for name, command in (('one', [sys.executable]), ('two', torchrun)):
        ended = subprocess.run([*command, tmp_path / 'spy.py', tmp_path / name, *flags, '--out', tmp_path / f'run {name}'], env=environment,
                               capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count('plain') == 1 and (tmp_path / f'run {name}/model.safetensors').exists()
        assert [path.name for path in tmp_path.glob(f'{name}.kept.*')] == [f'{name}.kept.0']        # one process writes
    for step in (0, 1):
        one, two = (train.safetensors.torch.load_file(tmp_path / f'{name}.{step}') for name in ('one', 'two'))
        assert one.keys() == two.keys() and max(g.abs().max() for g in one.values()) > 1e-3
        for name in one:
            assert torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-6)
    assert json.loads((tmp_path / 'run two/results.json').read_text())['processes'] == 2


# ---------------------------------------------------------------- bad input

@pytest.fixture(scope='session')
def small(world, tmp_path_factory):
    """The sample world cut to 30 rows a file, and in it a finished run."""
    folder = tmp_path_factory.mktemp('small')
    shutil.copytree(world / 'sample', folder / 'D/sample')
    for path in (folder / 'D/sample').glob('*.tsv'):
        path.write_bytes(b'\r\n'.join(path.read_bytes().split(b'\r\n')[:30]) + b'\r\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['train.py', '--task', 'sample', '--method', 'plain', '--data', str(folder / 'D'), '--out', str(folder / 'run'),
                                    '--max-steps', '1'])
        train.main(train.parse_args())
    return folder


def change(path, old, new):
    """Replace bytes of a file, once; `old` None: the whole file."""
    content = Path(path).read_bytes() if old is not None else b''
    assert old is None or old in content
    Path(path).write_bytes(new if old is None else content.replace(old, new, 1))


TRAIN = 'train --task sample --data D --out new --max-steps 1 --method '
BAD = [     # the command, what is broken before it (file, old, new), what its one line says
    *[(f'{TRAIN}{flags}', [], f'argument {flags.split()[-2]}: .*({expected})') for flags, expected in {
        'adv --eps -1': 'expected 0 or above|expected at least one', 'adv --eps nan': 'nan: expected 0', 'adv --eps x': 'invalid float',
        'plain --batch 0': 'expected 1', 'plain --batch 1.5': 'invalid int', 'rs_a --p 1.1': 'below 1', 'rs_a --m 0': 'expected 1',
        'rs_a --replace both': 'invalid choice', 'plain --lr 0': 'or above', 'plain --lr inf': 'or above', 'plain --epochs 0': 'or above',
        'plain --warmup 1': 'below 1', 'plain --seed -1': 'expected', 'plain --max-length 0': 'expected 1', 'adv --adv-steps 0': 'expected 1',
        'adv --adv-step-size 0': 'or above', 'plain --eval-steps 0': 'expected 1', 'plain --task mnli': 'invalid choice'}.items()],
    ('train --task sample', [], 'required: --method'),
    (TRAIN + 'foo', [], 'invalid choice'),
    (TRAIN + 'plain --layer 3', [], '--layer 3: the encoder has layers 1 to 2'),
    (TRAIN + 'plain --model nowhere', [], 'nowhere: cannot be had.*--task sample'),
    (TRAIN + 'plain --model run', [('run/model.safetensors', None, b'half')], '--model run: cannot be had'),
    (TRAIN + 'plain --model run', [('run/config.json', None, b'{')], '--model run: cannot be had'),
    (TRAIN + 'rs_a --synonyms nowhere.json', [], 'nowhere.json: No such file or directory. RS-A needs a neighbour file'),
    (TRAIN + 'rs_a --synonyms s.json', [('s.json', None, b'cat dog')], 's.json: not JSON'),
    (TRAIN + 'rs_a --synonyms s.json', [('s.json', None, b'\xff\xfe')], 's.json: not JSON'),
    (TRAIN + 'rs_a --synonyms s.json', [('s.json', None, b'["cat"]')], 's.json: a JSON list; expected an object'),
    (TRAIN + 'rs_a --synonyms s.json', [('s.json', None, b'{"cat": [1, 2]}')], "s.json: 'cat' has .1, 2.; expected a list of words"),
    (TRAIN + 'rs_a --synonyms s.json', [('s.json', None, b'{"cat": []}')], 's.json: no word in it has a neighbour'),
    (TRAIN + 'plain', [('D/sample/train-en.tsv', None, b'a\tb\n')], 'train-en.tsv: no labels; training needs them'),
    (TRAIN + 'plain', [('D/sample/train-en.tsv', None, b'')], 'train-en.tsv: empty'),
    (TRAIN + 'plain', [('D/sample/dev-en.tsv', b'paraphrase', b'maybe')], r"dev-en.tsv:\d+: label 'maybe'; expected one of different, paraphrase"),
    (TRAIN + 'plain', [('D/sample/test-x3.tsv', b'\t', b' ')], 'test-x3.tsv:1: 2 columns|test-x3.tsv:2: 3 columns'),
    (TRAIN + 'plain', [('D/sample/test-x6.tsv', b'\n', b'\xff\n')], 'test-x6.tsv:1: byte .* is not UTF-8|label'),
    (TRAIN.replace('new', 'run') + 'adv', [], 'run: holds a run with other arguments .eps, method'),
    (TRAIN.replace('new', 'run') + 'plain', [('run/results.json', None, b'{')], 'run: no results.json of train.py'),
    (TRAIN.replace('new', 'run') + 'plain', [('run/results.json', None, None), ('run/state.safetensors', None, b'half')], 'state.safetensors: not a state'),
    (TRAIN.replace('new', 'run/config.json') + 'plain', [], 'config.json: cannot be written|Not a directory|exists'),
    ('evaluate nowhere', [], 'nowhere: no results.json of train.py in it'),
    ('evaluate run', [('run/results.json', None, b'[]')], 'run: no results.json'),
    ('evaluate run', [('run/results.json', b'"method"', b'"mode"')], 'run: no results.json'),
    ('evaluate run --split dev', [('run/model.safetensors', None, b'half')], 'run: not a Hugging Face classifier'),
    ('evaluate run --split dev --data nowhere', [], 'dev-en.tsv: No such file'),
    ('evaluate run --smooth 3', [], 'run: plain has no eps of its own; say --eps'),
    ('evaluate run --smooth 0', [], 'argument --smooth: 0: expected 1'),
    ('evaluate run --regions --radii -1', [], 'argument --radii'),
    ('evaluate run --regions --langs en de', [], 'sample has en x1'),
    ('evaluate D/sample/model --task xnli', [], 'labels .*; xnli has contradiction'),
    ('evaluate s.json --task sample', [('s.json', None, b'')], 's.json: not a Hugging Face classifier'),
    ('evaluate run --data D', [('run/config.json', b'"1": "paraphrase"', b'"1": "other"')], 'run: labels different, other; sample has'),
    ('distance --task sample --data D --out new --langs de', [], '--langs de: expected some of x1'),
    ('distance --task sample --data D --out new --layer 9', [], '--layer 9'),
    ('distance --task sample --data D --out new --layer 0 --langs x1 --alignments links', [('links', None, b'0-0\n')], 'links: 1 lines; expected 59'),
    ('distance --task sample --data D --out new --layer 0 --langs x1 --alignments links', [('links', None, b'0-99\n' * 59)], 'links:1: a link beyond'),
    ('distance --task sample --data D --out new --layer 0 --langs x1 --alignments links', [('links', None, b'0:0\n' * 59)], 'links:1: expected links i-j'),
    ('distance --task sample --data D --out new --translations D', [], '--translations D|expected some of|those with a file'),
    ('distance --task sample --data D --plain run', [], '--plain and --robust go together'),
    ('distance --align nowhere', [], 'nowhere: No such file'),
    ('distance --align text', [('text', None, b'a b ||| c\na b\n')], 'text:2: 0 times'),
    ('distance --task sample --data D --out new --langs x1', [('D/sample/test-x1.tsv', b'\r\n', b'\r\na\tb\tdifferent\r\n')], 'test-x1.tsv: 31 rows'),
    ('synonyms nowhere -o s.json', [], 'nowhere: No such file'),
    ('synonyms v.txt -o s.json', [('v.txt', None, b'a 1 2\nb 1\n')], 'v.txt:2: 1 numbers'),
    ('synonyms v.txt -o s.json', [('v.txt', None, b'a 1 nan\n')], 'v.txt:1: a number that is not finite'),
    ('synonyms v.txt -o s.json', [('v.txt', None, b'a 1 x\n')], 'v.txt:1: '),
    ('synonyms v.txt -o s.json', [('v.txt', None, b'')], 'v.txt: empty'),
    ('synonyms v.txt -o s.json', [('v.txt', None, b'a \xff\n')], 'v.txt: not UTF-8'),
    ('synonyms nowhere --show cat', [], 'nowhere: No such file'),
    ('data pawsx x.zip --data D', [('x.zip', None, b'')], 'x.zip: not an archive of pawsx'),
    ('data pawsx x-final.tar.gz --data D', [('x-final.tar.gz', None, b'<html>')], 'not the whole archive.*fetch it again'),
    ('data mnli', [], 'invalid choice'),
]


@pytest.mark.parametrize('command, broken, message', BAD, ids=range(len(BAD)))
def test_bad_input_gives_one_line_and_leaves_nothing(command, broken, message, small, tmp_path, monkeypatch, capsys):
    for name in ('D', 'run'):
        shutil.copytree(small / name, tmp_path / name)
    for path, old, new in broken:
        (tmp_path / path).unlink() if new is None else change(tmp_path / path, old, new)
    monkeypatch.chdir(tmp_path)
    before = sorted(path for path in tmp_path.rglob('*') if path.is_file())
    script, *flags = command.split()
    monkeypatch.setattr(sys, 'argv', [f'{script}.py', *flags])
    script = {'train': train, 'evaluate': evaluate, 'distance': distance, 'synonyms': synonyms, 'data': data}[script]
    with pytest.raises(SystemExit) as error:
        script.main(script.parse_args()) if hasattr(script, 'parse_args') else script.main()
    if isinstance(error.value, data.InputError):
        line = str(error.value)
    else:       # argparse
        assert error.value.code == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
    assert '\n' not in line and re.search(message, line), line
    left = [path for path in tmp_path.rglob('*') if path.is_file() and path not in before and not path.name.endswith(('.src-tgt', '.align'))]
    assert not left


def test_a_script_ends_with_one_line_and_no_traceback(tmp_path):
    ended = subprocess.run([sys.executable, HERE / 'evaluate.py', tmp_path], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr == f'{tmp_path}: no results.json of train.py in it; expected a run folder, or --task for another classifier\n'


@real
def test_the_real_encoder_on_real_pairs():
    """delta as a change of the embedding table is delta from the hook, dropped in at the same token."""
    model, tokenizer = evaluate.load_encoder(SHARED / 'models/me5-small', 'pawsx')
    pairs = data.read_pairs(data.path_of(SHARED / 'data', 'pawsx', 'dev', 'de'), 'pawsx')[:4]
    batch = dict(tokenizer.pad(evaluate.collate(tokenizer, pairs, 128), return_tensors='pt'))
    delta = robust.uniform_delta(model, batch, 0.1, generator())
    model.eval()
    with torch.no_grad():
        embedded = model.get_input_embeddings()(batch['input_ids']) + delta
        with robust.perturbed(model, delta):
            hooked = model(**batch).logits
        given = model(inputs_embeds=embedded, attention_mask=batch['attention_mask']).logits
    assert torch.equal(hooked, given) and not torch.equal(hooked, model(**batch).logits)


# ---------------------------------------------------------------- distance.py

TOY = [('a', 'x'), ('a b', 'x y')]


def corpus(pairs):
    return [(e.split(), f.split()) for e, f in pairs]


def test_one_iteration_of_the_aligner_by_hand():
    """Cells in order: x: null a | x: null a b | y: null a b; with two words |i/m - j/n| is 0 or 1/2, lambda 4."""
    cells = distance.cells_of(corpus(TOY))
    assert cells.link.tolist() == [[0, -1, 0], [0, 0, 0]] + [[1, j, i] for i in (0, 1) for j in (-1, 0, 1)]
    near = 0.92 / (1 + math.exp(-2))
    far = 0.92 - near
    uniform = torch.full((len(cells.source),), 0.25, dtype=torch.double)
    posterior, likelihood = distance.expect(cells, uniform, 4.0)
    assert posterior.tolist() == pytest.approx([0.08, 0.92, 0.08, near, far, 0.08, far, near])
    assert likelihood == pytest.approx(3 * math.log(0.25))
    table = distance.maximise(cells, posterior, alpha=0)
    x_of_a, y_of_a = 0.92 + near, far       # expected counts of a
    by_cell = table[cells.entry].tolist()
    assert by_cell[1] == by_cell[3] == pytest.approx(x_of_a / (x_of_a + y_of_a))
    assert by_cell[0] == pytest.approx(2 / 3) and by_cell[7] == pytest.approx(near / 0.92)
    bayes = distance.maximise(cells, posterior, alpha=0.01)[cells.entry].tolist()
    digamma = lambda value: torch.digamma(torch.tensor(value, dtype=torch.double)).item()       # noqa: E731
    assert bayes[1] == pytest.approx(math.exp(digamma(x_of_a + 0.01) - digamma(x_of_a + y_of_a + 0.02)))


def random_corpus(sentences, seed=0, words=30):
    """Sentences of distinct words and their translations, word for word, in any order."""
    rng, pairs = random.Random(seed), []
    for _ in range(sentences):
        source = rng.sample(range(words), rng.randint(2, 7))
        order = rng.sample(range(len(source)), len(source))
        pairs.append(([f'e{w}' for w in source], [f'f{source[j]}' for j in order], {(j, i) for i, j in enumerate(order)}))
    return pairs


def test_likelihood_never_falls_and_the_tension_has_the_right_slope():
    cells = distance.cells_of([(e, f) for e, f, _ in random_corpus(50)])
    likelihoods = distance.fit(cells, iterations=15, alpha=0)[2]
    assert len(likelihoods) == 15 and all(a < b + 1e-9 for a, b in zip(likelihoods, likelihoods[1:]))
    posterior, _ = distance.expect(cells, torch.rand(len(cells.source), dtype=torch.double), 3.0)
    linked = ~cells.apart.isinf()

    def expected(tension):
        return (posterior * distance.prior(cells, tension).log())[linked].sum().item()
    words = int(cells.word[-1]) + 1
    assert distance.tension_slope(cells, posterior, 3.0) == pytest.approx((expected(3.001) - expected(2.999)) / 0.002 / words, rel=1e-5)


def test_a_known_dictionary_is_found_whatever_the_order():
    pairs = random_corpus(300)
    links = distance.align([(e, f) for e, f, _ in pairs])
    assert [set(line) for line in links] == [truth for *_, truth in pairs]


def test_both_directions_are_intersected(monkeypatch):
    pairs = corpus([('a b', 'x y'), ('a', 'x')])
    given = {'a': [[0, 0, 0], [0, 0, 1], [1, 0, 0]], 'x': [[0, 0, 0], [0, 1, 1]]}      # by first source word: sentence, j, i
    monkeypatch.setattr(distance, 'best_links', lambda pairs: torch.tensor(given[pairs[0][0][0]]))
    assert distance.align(pairs) == [[(0, 0)], []]
    assert distance.align(pairs, 'union') == [[(0, 0), (0, 1), (1, 1)], [(0, 0)]]
    assert distance.align(pairs, 'forward') == [[(0, 0), (0, 1)], [(0, 0)]] and distance.align(pairs, 'reverse') == [[(0, 0), (1, 1)], []]


def test_empty_sides_and_long_sentences_do_no_harm():
    links = distance.align([([], ['x']), (['a'], []), ([], []), (['.'] * 200, ['.'] * 200), (['a'], ['x'])])
    assert links[:3] == [[], [], []] and (0, 0) in links[4]
    assert distance.align([([], [])]) == [[]] and distance.align([([], ['x'])]) == [[]]


def test_a_word_is_what_the_tokenizer_takes_as_one():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram([('<unk>', 0), ('▁', -2), ('▁cat', -1), ('s', -1), (',', -1), ('▁Dog', -1)], unk_id=0))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token='<unk>')
    _, words, spans = distance.words_of(fast, ['cats, Dog', ', ,', ''], 'de')
    assert words == [['cats', ',', 'dog'], [',', ','], []] and spans[0] == [(0, 1), (2, 2), (3, 3)]
    assert distance.words_of(fast, ['cats Dog'], 'zh')[1] == [['cat', 's', 'dog']]


@pytest.mark.parametrize('mean, layer', [(False, -1), (True, 1), (False, 0)])
def test_distances_against_a_direct_computation(mean, layer, model):
    """Padded batches of two sides against one sentence at a time, one word at a time."""
    model.eval()
    sides = [([{'input_ids': [2, *range(start, start + n), 3], 'attention_mask': [1] * (n + 2)} for start, n in lengths], None,
              [[(1, 2), (3, 3)], [(1, 1)]]) for lengths in ([(5, 4), (9, 2)], [(20, 3), (12, 5)])]
    links, expected = [[(0, 1), (1, 1)], [(0, 0)]], []
    for k, line in enumerate(links):
        vectors = []
        for inputs, _, spans in sides:
            ids = torch.tensor([inputs[k]['input_ids']])
            hidden = model.get_input_embeddings()(ids) if layer == 0 else model.base_model(ids, output_hidden_states=True).hidden_states[layer]
            vectors.append([hidden[0, a:b + 1].mean(0) if mean else hidden[0, b] for a, b in spans[k]])
        expected.append(sum((vectors[0][j] - vectors[1][i]).norm().item() for j, i in line))
    pad = types.SimpleNamespace(pad=lambda rows, return_tensors: transformers.BatchEncoding({
        name: torch.tensor([row[name] + [1 if name == 'input_ids' else 0] * (8 - len(row[name])) for row in rows]) for name in rows[0]}))
    sums = distance.measure(model, pad, sides, links, types.SimpleNamespace(layer=layer, mean=mean, seed=1), torch.float32, 'xx')
    assert sums[:, 0].tolist() == pytest.approx(expected, rel=1e-5) and sums[:, 2].tolist() == [2, 1]


def measured(world, tmp_path, monkeypatch, *flags):
    monkeypatch.setattr(sys, 'argv', ['distance.py', '--task', 'sample', '--data', str(world), '--out', str(tmp_path / 'distance'), *flags])
    distance.main(distance.parse_args())
    return json.loads((tmp_path / 'distance/distances.json').read_text())['languages']


def test_the_known_distances_of_the_sample_world_are_recovered(world, tmp_path, monkeypatch):
    found = measured(world, tmp_path, monkeypatch, '--layer', '0')
    values = [found[f'x{k}']['distance'] for k in range(1, 7)]
    assert values == sorted(values)
    for k, value in enumerate(values, 1):
        assert value == pytest.approx(0.05 * k * 8, rel=0.02)
        assert 0 < found[f'x{k}']['ratio'] < 1 and found[f'x{k}']['random'] > value
    again = measured(world, tmp_path, monkeypatch, '--layer', '0', '--langs', 'x3', '--alignments', str(tmp_path / 'distance/{lang}.align'))
    assert again['x3'] == found['x3']       # its own links, read back


def test_standard_error_is_that_of_the_mean_over_sentences():
    torch.manual_seed(0)
    sums = torch.stack([torch.randn(400).double() + 5, torch.ones(400).double(), torch.ones(400).double()], 1)
    found = distance.summary(sums, seed=0)
    assert found['distance'] == pytest.approx(sums[:, 0].mean().item()) and found['pairs'] == 400
    assert found['standard_error'] == pytest.approx(sums[:, 0].std().item() / 20, rel=0.1)


def test_rank_correlation_by_hand():
    assert distance.rank_correlation([1, 2, 3], [10, 20, 40]) == pytest.approx((1.0, 2 / 6))
    assert distance.rank_correlation([1, 2, 3, 4], [1, 3, 2, 4])[0] == pytest.approx(1 - 6 * 2 / (4 * 15))
    x = torch.arange(12.0)
    rho, p = distance.rank_correlation(x.tolist(), (x - 5).abs().tolist())
    assert 0.3 < p < 1 and abs(rho) < 0.4


def test_figure_2_from_runs(world, tmp_path, monkeypatch, capsys):
    pytest.importorskip('matplotlib', reason='the figure alone needs matplotlib')
    for name, base in (('p1', 50), ('p2', 52), ('r1', 60)):
        (tmp_path / name).mkdir()
        test = {lang: base + k * (name[0] == 'r') for k, lang in enumerate(data.TASKS['sample'].languages)} | {'x6': None}
        (tmp_path / name / 'results.json').write_text(json.dumps({'args': {'task': 'sample', 'method': 'rs_r'}, 'dtype': '', 'test': test, 'test_marks': {}}))
    measured(world, tmp_path, monkeypatch, '--layer', '0', '--max-sentences', '50', '-o', str(tmp_path / 'f.png'),
             '--plain', str(tmp_path / 'p1'), str(tmp_path / 'p2'), '--robust', str(tmp_path / 'r1'))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-6].split()[:1] + lines[-6].split()[2:5] == ['x1', '+10.0', '+-', '1.0'] and lines[-2].split()[2] == '+14.0'
    assert lines[-1].startswith('rank correlation of gain and distance: 1.00 (p = 0.017, 5 languages)')
    assert (tmp_path / 'f.png').read_bytes()[:4] == b'\x89PNG'


@pytest.mark.parametrize('content, message', [
    ('0-0\n', '1 lines; expected 2'), ('0-0\n1-0\n', ':2: a link beyond the 1 source and 1 target'), ('0-0\n0:0\n', ':2: expected links'),
    ('0--1\n\n', ':1: '),
])
def test_broken_links_give_one_line(content, message, tmp_path):
    (tmp_path / 'links').write_text(content)
    with pytest.raises(data.InputError, match=message):
        distance.read_links(tmp_path / 'links', corpus([('a b', 'x'), ('a', 'x')]))
    (tmp_path / 'links').write_text('a b\n')
    with pytest.raises(data.InputError, match=r':1: .*expected `source \|\|\| target`'):
        distance.read_source_target(tmp_path / 'links')


@real
@pytest.mark.parametrize('name, fast_align', [('roen', 0.498), ('zhen', 0.497), ('jaen', 0.728)])
def test_alignment_error_rate_is_that_of_fast_align(name, fast_align):
    """AER (Och and Ney 2003) on gold alignments; fast_align's was measured on the same text with -d -o -v, intersection."""
    links = distance.align(distance.read_source_target(SHARED / f'data/alignment/{name}.src-tgt'))
    hits = size = 0
    for found, line in zip(links, (SHARED / f'data/alignment/{name}.gold').read_text().splitlines(), strict=True):
        sure, possible = ({tuple(int(n) - 1 for n in link.replace('p', '-').split('-')) for link in line.split() if mark in link}
                          for mark in '-p')
        hits += len(set(found) & sure) + len(set(found) & (sure | possible))
        size += len(found) + len(sure)
    assert 0.3 < 1 - hits / size <= fast_align + 0.01
