"""Tests of what the code claims, against hand computation, closed forms and the library it rests on."""

import io
import json
import random
import re
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, XLMRobertaConfig, XLMRobertaForSequenceClassification, pipeline

import data
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
    assert evaluate.accuracy(torch.tensor([0, 0]), pairs) is None


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


def test_no_network_says_what_to_do(tmp_path, monkeypatch):
    url = (tmp_path / 'x-final.tar.gz').as_uri()        # no such file
    monkeypatch.setitem(data.TASKS, 'pawsx', data.TASKS['pawsx']._replace(archives={'x-final.tar.gz': (url, {'train', 'dev', 'test'})}))
    with pytest.raises(data.InputError, match='Fetch it by hand.*--task sample'):
        data.prepare(tmp_path / 'D', 'pawsx')
    with pytest.raises(data.InputError, match='not an archive of pawsx; expected x-final.tar.gz'):
        data.prepare(tmp_path / 'D', 'pawsx', ['paws.zip'])


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
    evaluate.main()
    return capsys.readouterr().out


def targets(results):
    return sum(score for lang, score in results['test'].items() if lang != 'en') / 6


def test_the_claim_of_the_paper_in_the_sample_world(run, monkeypatch, capsys):
    """Cut down to 1,000 of 2,500 steps: plain falls with a language's distance, rs_r falls less."""
    steps = '--max-steps', '1000', '--eval-steps', '500'
    folder, plain, printed = run('plain', '--method', 'plain', *steps)
    near = [plain['test'][lang] for lang in ('en', 'x1', 'x2', 'x3')]
    assert near[0] > 95 and near == sorted(near, reverse=True) and near[3] < 70
    _, rs_r, _ = run('rs_r', '--method', 'rs_r', '--eps', '0.1', *steps)
    assert targets(rs_r) > targets(plain) + 5 and rs_r['test']['en'] > 90

    assert plain['dev'] == max(h['dev'] for h in plain['history']) and plain['step'] in (500, 1000)
    assert plain['args']['seed'] == plain['seed'] == 42 and plain['args']['eps'] == 0.1 and 'torch' in plain['versions']
    assert plain['pairs_per_second'] > 0 and plain['peak_memory_gib'] > 0 and plain['wall_seconds'] > 0
    row = printed.splitlines()[-1]
    assert row.split() == ['plain'] + [f'{score:.1f}' for score in plain['test'].values()] + [f'{sum(plain["test"].values()) / 7:.1f}']
    assert score(folder, monkeypatch, capsys).splitlines()[-1] == row        # evaluate.py finds the same
    files_hold_what_their_users_expect(folder, plain)


def files_hold_what_their_users_expect(folder, results):
    pairs = data.read_pairs(data.path_of(results['args']['data'], 'sample', 'test', 'x1'), 'sample')
    predicted = (folder / 'predictions/sample/test-x1.tsv').read_text().splitlines()
    labels = data.TASKS['sample'].labels
    assert 100 * sum(p == labels[pair.label] for p, pair in zip(predicted, pairs, strict=True)) / 2000 == results['test']['x1']
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


def test_a_finished_run_is_kept(run):
    folder, results, printed = run('a', '--method', 'plain', '--max-steps', '2')
    written = (folder / 'model.safetensors').stat().st_mtime_ns
    _, again, printed_again = run('a', '--method', 'plain', '--max-steps', '2')
    assert again == results and printed_again == printed and (folder / 'model.safetensors').stat().st_mtime_ns == written
    with pytest.raises(data.InputError, match=r'other arguments \(max_steps, method\)'):
        run('a', '--method', 'adv', '--max-steps', '3')


def test_batches_hold_every_pair_once_an_epoch(world):
    pairs = [data.Pair('bokin ' * (i % 7 + 1), 'bokin', i % 2) for i in range(100)]
    tokenizer = evaluate.AutoTokenizer.from_pretrained(world / 'sample/model')
    args = types.SimpleNamespace(seed=1, batch=16, max_length=128, m=10, p=0.1)
    for neighbours, rows in ((None, 100), ({'bokin': ['x']}, 1000)):
        batches, lengths, labels = iter(train.Batches(pairs, tokenizer, args, neighbours)), [], []
        while len(labels) < rows:
            batch = next(batches)
            lengths += batch['attention_mask'].sum(1).tolist()
            labels += batch['labels'].tolist()
            assert batch['input_ids'].shape[1] == batch['attention_mask'].sum(1).max()      # padded no further
        assert sorted(lengths) == sorted([i % 7 + 1 + 4 for i in range(100)] * (rows // 100)) and sum(labels) == rows // 2


@pytest.mark.parametrize('flags, message', [
    (['--eps', 'nan'], 'argument --eps: nan: expected 0 or above'), (['--eps', '-1'], 'expected one argument|expected 0 or above'),
    (['--batch', '0'], 'argument --batch: 0: expected 1 or above'), (['--p', '1.1'], 'argument --p'), (['--task', 'mnli'], 'invalid choice'),
])
def test_a_wrong_flag_gives_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['train.py', '--task', 'pawsx', '--method', 'adv', *flags])
    with pytest.raises(SystemExit) as error:
        train.parse_args()
    usage, line = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and re.search(message, line)


@pytest.mark.parametrize('flags, message', [
    (['--method', 'rs_a', '--synonyms', 'nowhere.json'], 'nowhere.json: No such file or directory. RS-A needs a neighbour file'),
    (['--method', 'rs_r', '--layer', '3'], '--layer 3: the encoder has layers 1 to 2'),
    (['--method', 'plain', '--model', 'nowhere'], '--model nowhere: cannot be had.*--task sample'),
])
def test_what_is_missing_gives_one_line_and_leaves_nothing(flags, message, run, tmp_path):
    with pytest.raises(data.InputError, match=message) as error:
        run('a', *flags)
    assert '\n' not in str(error.value) and not (tmp_path / 'a').exists()


def test_a_script_ends_with_one_line_and_no_traceback(tmp_path):
    ended = subprocess.run([sys.executable, HERE / 'evaluate.py', tmp_path], capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr == f'{tmp_path}: no results.json of train.py in it; expected a run folder\n'


@real
def test_the_real_encoder_on_real_pairs():
    """delta as a change of the embedding table is delta from the hook, dropped in at the same token."""
    model, tokenizer = train.load_encoder(SHARED / 'models/me5-small', 'pawsx', False)
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
