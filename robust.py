"""The three training objectives of Huang, Ahmad, Peng, Chang (2021), section 3.

Every objective takes a model and a batch and returns the loss to call `backward()` on; `Objective`, at the
end, picks the one that the command line names and seeds its draws:

    paper                                        here
    f(Enc(x))                                    `model(**batch)`, a Hugging Face sequence classifier
    L(f(Enc(x)), y)                              `plain`
    max over |delta_i| <= eps of L(., y)         `adv`     (3.1, adversarial training)
    E over delta of L(g(Enc(x) + delta), y)      `rs_r`    (3.2, random perturbation)
    x' = x with words replaced by synonyms       `rs_a`    (3.2, data augmentation)
    f(Enc(x) + delta)                            `with perturbed(model, delta, layer): model(**batch)`

What the paper leaves open, and what is done here:

- Where Enc(x) ends (ours): `layer` 0 is the output of the word embeddings, before position, type
  and LayerNorm, as in FreeLB; `layer` k is the output of the k-th transformer layer, -1 the last.
- Which positions carry noise (ours, as FreeLB): all but padding. [CLS] and [SEP] carry it too:
  under the usual [CLS] head, noise on the last layer has no effect anywhere else.
- The norm is L-inf per coordinate (paper, section 4): each of a word's H coordinates moves by at
  most eps. eps is in the units of that layer's activations.

A batch is a dict of tensors: `input_ids` and `attention_mask` (B, T), `labels` (B,). delta is
float32 (B, T, H). It is drawn from a generator of its own, so that dropout sees the same random
stream whatever the method: with eps = 0, `adv` and `rs_r` are `plain` to the last bit.
"""

import contextlib
import functools
import random

import torch


def plain(model, batch):
    """L(f(Enc(x)), y), the cross-entropy averaged over the batch (3.1, the normal training). A scalar."""
    return model(**batch).loss


def adv(model, batch, *, eps, steps=1, step_size=None, layer=0, generator=None):
    """max over |delta_i| <= eps of L(f(Enc(x) + delta), y): the loss at the worst point only (3.1)."""
    delta = worst_delta(model, batch, eps=eps, steps=steps, step_size=step_size, layer=layer, generator=generator)
    with perturbed(model, delta, layer):
        return plain(model, batch)


def rs_r(model, batch, *, eps, layer=0, generator=None):
    """L(g(Enc(x) + delta), y) at one delta, uniform in the L-inf ball and fresh for each call (3.2)."""
    with perturbed(model, uniform_delta(model, batch, eps, generator), layer):
        return plain(model, batch)


def rs_a(model, batch):
    """L(g(Enc(x')), y), x' a copy of x with some words replaced by synonyms (3.2).

    The perturbation is in the words: `synonyms.augment` makes x' before the batch is tokenised,
    so on the batch itself the loss is the plain one.
    """
    return plain(model, batch)


def uniform_delta(model, batch, eps, generator=None):
    """delta uniform over the L-inf ball of radius eps (paper, section 4), zero on padding: float32 (B, T, H)."""
    mask = batch['attention_mask']
    delta = torch.empty(*mask.shape, model.config.hidden_size, device=mask.device)
    return delta.uniform_(-eps, eps, generator=generator) * mask.unsqueeze(-1)


def worst_delta(model, batch, *, eps, steps=1, step_size=None, layer=0, generator=None):
    """Ascend the loss inside the ball and return delta: float32 (B, T, H), |delta| <= eps, 0 on padding.

    Uniform random start, `steps` sign steps, projection after each (3.1 names only the maximisation;
    this is Madry et al.'s PGD, and with one step Wong et al.'s fast adversarial training).
    `step_size` is in units of eps; by default 2.5 / (steps + 1) (ours): Wong et al.'s 1.25 at one
    step, Madry et al.'s 2.5 / steps at many.
    """
    step = eps * (2.5 / (steps + 1) if step_size is None else step_size)
    delta = uniform_delta(model, batch, eps, generator)
    for _ in range(steps):
        delta.requires_grad_()
        # Rewound after each pass: the inner passes and the outer one see the same dropout masks,
        # so that they maximise and minimise the same function.
        with torch.random.fork_rng(devices=[delta.device] if delta.is_cuda else []), perturbed(model, delta, layer):
            loss = plain(model, batch)
        # autograd.grad, not backward(): the parameters' gradients stay as they are, and are not computed.
        gradient, = torch.autograd.grad(loss, delta)
        with torch.no_grad():
            # The gradient is zero on padding only for some heads; the mask is what keeps delta zero there.
            delta = (delta + step * gradient.sign()).clamp(-eps, eps) * batch['attention_mask'].unsqueeze(-1)
    return delta


@contextlib.contextmanager
def perturbed(model, delta, layer=0):
    """Within it, `model(**batch)` computes f(Enc(x) + delta) (Eq. 1). `delta`: float32 (B, T, H).

    A hook on the module whose output is Enc(x), so that whatever follows (position, type, LayerNorm
    for layer 0) is applied once, as in the plain pass, for any encoder.
    """
    def add(module, inputs, output):
        """Enc(x) + delta."""
        # float32 even if the layer's output is bfloat16, whose spacing between 0.5 and 1 is 0.0039:
        # eps = 0.001 would be rounded away.
        return output + delta

    handle = end_of_enc(model, layer).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def end_of_enc(model, layer):
    """The module whose output is Enc(x): the word embeddings (0), or a transformer layer (k, or -1 from the end).

    Raises ValueError if the encoder has no such layer.
    """
    if layer == 0:
        return model.get_input_embeddings()
    layers = model.base_model.encoder.layer
    if not -len(layers) <= layer <= len(layers):
        raise ValueError(f'--layer {layer}: the encoder has layers 1 to {len(layers)} (or -1 to -{len(layers)}); '
                         '0 is the word embeddings')
    return layers[layer - 1] if layer > 0 else layers[layer]


class Objective(torch.nn.Module):
    """The loss of a method as a module, (batch, step) -> scalar: it may run the model more than once a call.

    `args` is train.py's command line. `rank` tells the processes of one run apart.
    """

    def __init__(self, model, args, rank=0):
        super().__init__()
        self.model, self.args, self.rank = model, args, rank
        self.noise = torch.Generator(model.device)
        noise = dict(eps=args.eps, layer=args.layer, generator=self.noise)
        self.loss = {
            'plain': plain,
            'adv': functools.partial(adv, steps=args.adv_steps, step_size=args.adv_step_size, **noise),
            'rs_r': functools.partial(rs_r, **noise),
            'rs_a': rs_a,
        }[args.method]

    def forward(self, batch, step):
        """The loss of a step. Its draws follow from (seed, step, rank) alone: a resumed run needs no generator's state."""
        for name, manual_seed in (('dropout', torch.manual_seed), ('delta', self.noise.manual_seed)):
            manual_seed(random.Random(f'{self.args.seed} {step} {self.rank} {name}').getrandbits(32))
        begin = self.args.method == 'adv' and step <= self.args.plain_steps
        return (plain if begin else self.loss)(self.model, batch)
