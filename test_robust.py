"""Tests of what the code claims, against hand computation, closed forms and the library it rests on."""

import random
import types

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, XLMRobertaConfig, XLMRobertaForSequenceClassification

import data
import evaluate
import robust
import synonyms

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
    assert data.placeholders(data.read_pairs(xnli, 'xnli')) == 1
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
