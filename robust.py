"""The training objectives of Huang, Ahmad, Peng, Chang (2021), section 3. This file needs torch alone.

Each takes a model and a batch and returns the loss to call `backward()` on:

    paper                                        here
    f(Enc(x))                                    `model(**batch)`, a Hugging Face sequence classifier
    L(f(Enc(x)), y)                              `plain`   (3.1, the normal training)
    max over |delta_i| <= eps of L(., y)         `adv`     (3.1; the max by sign steps, one by default)
    P_delta(L(g(Enc(x) + delta), y))             `rs_r`    (3.2; the mean over delta by one draw a call)
    x' = x with words replaced by synonyms       `rs_a`    (3.2, data augmentation)
    f(Enc(x) + delta), Eq. 1                     `with perturbed(model, delta, layer): model(**batch)`

What the paper leaves open, and what is done here:

- Where Enc(x) ends: the abstract has 'noise in input embeddings', section 3 calls Enc(.) 'the multilingual
  encoder'. The default, `layer` 0 (ours, as FreeLB), is the first reading: the output of the word embeddings,
  before position, type and LayerNorm. `layer` k is the output of the k-th transformer layer, and -1, that of
  the last, the second reading. A norm that an encoder puts after its last layer (XLM-R-XL, ModernBERT) comes
  later, so that there -1 is not transformers' `hidden_states[-1]`.
- Which positions carry noise (ours, as FreeLB): all but padding. [CLS] and [SEP] carry it too:
  under the usual [CLS] head, noise on the last layer has no effect anywhere else.
- The norm is L-inf per coordinate (paper, section 4): each of a word's H coordinates moves by at
  most eps. eps is in the units of that layer's activations.
- How g is evaluated (ours): dev and test scores, and so the choice of the checkpoint, take one pass without
  delta, whatever the method; `evaluate.py --smooth N` takes the vote of g.
- The sign of delta is Eq. 1's, E_tgt = E_src + delta; the line of the paper that defines it has the other.

A batch is a dict of tensors: `input_ids` and `attention_mask` (B, T), `labels` (B,). delta is float32
(B, T, H). A model wrapped in DistributedDataParallel is passed as it is. Noise drawn from a `generator` of
its own leaves dropout the same random stream whatever the method: with eps = 0, `adv` and `rs_r` are then
`plain` to the last bit. Without one it takes torch's own stream. What cannot work raises ValueError.

torch.compile skips the hooks that add delta, unless `torch._dynamo.config.skip_nnmodule_hook_guards = False`.
"""

import contextlib
from typing import Callable, NamedTuple

import torch


# ---------------------------------------------------------------- the objectives

def plain(model, batch):
    """L(f(Enc(x)), y), the cross-entropy averaged over the batch (3.1, the normal training). A scalar."""
    loss = model(**batch).loss
    if loss is None:
        raise ValueError(f'no loss of a batch without labels: it holds {", ".join(batch)}')
    return loss


def adv(model, batch, *, eps, steps=1, layer=0, generator=None, loss=plain):
    """max over |delta_i| <= eps of L(f(Enc(x) + delta), y): the loss at `worst_delta` only (3.1).

    `loss`, here and below: a function (model, batch) -> scalar, for any head but a classifier's own.
    """
    delta = worst_delta(model, batch, eps=eps, steps=steps, layer=layer, generator=generator, loss=loss)
    with perturbed(model, delta, layer):
        return loss(model, batch)


def rs_r(model, batch, *, eps, layer=0, generator=None, loss=plain):
    """L(g(Enc(x) + delta), y) at one delta, uniform in the L-inf ball and fresh for each call (3.2)."""
    delta = uniform_delta(model, batch, eps, layer, generator)
    with perturbed(model, delta, layer):
        return loss(model, batch)


def rs_a(model, batch):
    """L(g(Enc(x')), y) (3.2): the batch is x', made before by `synonyms.augment`; then it is plain's loss."""
    return plain(model, batch)


# ---------------------------------------------------------------- delta

def uniform_delta(model, batch, eps, layer=0, generator=None):
    """delta uniform over the L-inf ball of radius eps (paper, section 4), 0 on padding: float32 (B, T, H)."""
    mask = batch['attention_mask']
    delta = torch.empty(*mask.shape, width(model, layer), device=mask.device)
    return delta.uniform_(-eps, eps, generator=generator) * mask.unsqueeze(-1)


def worst_delta(model, batch, *, eps, steps=1, layer=0, generator=None, loss=plain):
    """Ascend the loss inside the ball and return delta: float32 (B, T, H), |delta| <= eps, 0 on padding.

    Uniform random start, `steps` sign steps, projection after each (3.1 names only the maximisation;
    this is Madry et al.'s PGD, and with one step Wong et al.'s fast adversarial training). A step is of
    2.5 / (steps + 1) eps (ours): Wong et al.'s 1.25 at one step, Madry et al.'s 2.5 / steps at many.
    Its precision is the caller's: train.py ascends within autocast, evaluate.py outside of it.
    """
    step = eps * 2.5 / (steps + 1)
    delta = uniform_delta(model, batch, eps, layer, generator)
    mask = batch['attention_mask'].unsqueeze(-1)
    # Not through DistributedDataParallel: its passes prepare an exchange of gradients, and these have none.
    model = unwrapped(model)
    for _ in range(steps):
        delta.requires_grad_()
        # The random state is put back after each pass: the inner passes and the outer one see the same
        # dropout masks, so that they maximise and minimise the same function.
        with torch.random.fork_rng(devices=[delta.device] if delta.is_cuda else []):
            with perturbed(model, delta, layer):
                value = loss(model, batch)
        # autograd.grad, not backward(): the parameters' gradients stay as they are, and are not computed.
        gradient, = torch.autograd.grad(value, delta)
        with torch.no_grad():
            delta = (delta + step * gradient.sign()).clamp(-eps, eps)
            delta = delta * mask        # the gradient is zero on padding only for some heads
    return delta


# ---------------------------------------------------------------- Enc(x) and f(Enc(x) + delta)

@contextlib.contextmanager
def perturbed(model, delta, layer=0):
    """Within it, one forward pass computes f(Enc(x) + delta) (Eq. 1). `delta`: float32 (B, T, H).

    Whatever follows Enc(x) (position, type and LayerNorm for layer 0) is applied once, as in the plain pass.
    Raises ValueError if delta has another shape than Enc(x), or was not added exactly once.
    """
    def add(output):
        """Enc(x) + delta."""
        if output.shape != delta.shape:
            raise ValueError(f'delta is {tuple(delta.shape)}, but the output of layer {layer} of '
                             f'{type(model).__name__} is {tuple(output.shape)}; expected the same (B, T, H)')
        # float32 even if the layer's output is bfloat16, whose spacing between 0.5 and 1 is 0.0039:
        # eps = 0.001 would be rounded away.
        return output + delta

    with at_end_of_enc(model, layer, add):
        yield


@contextlib.contextmanager
def hidden(model, layer):
    """Within it, one forward pass puts Enc(x), float32 (B, T, H), into the list that this yields."""
    states = []
    with at_end_of_enc(model, layer, lambda output: states.append(output.float())):
        yield states


@contextlib.contextmanager
def at_end_of_enc(model, layer, function):
    """Within it, one forward pass calls function(Enc(x)); what that returns, unless None, takes its place.

    Raises ValueError where the forward pass does not call the layers as often as `end_of_enc` expects.
    """
    modules, expected, wanted = end_of_enc(model, layer)
    calls = 0

    def hook(module, inputs, output):
        """Count the calls; at the wanted one, put function's result in place of the output."""
        nonlocal calls
        calls += 1
        if calls != wanted:
            return None
        first = output[0] if isinstance(output, tuple) else output
        if not torch.is_tensor(first) or first.dim() != 3:
            raise ValueError(f'layer {layer} of {type(model).__name__} does not give (B, T, H); try layer 0, '
                             'or another encoder')
        changed = function(first)
        if changed is None or torch.is_tensor(output):
            return changed
        return (changed, *output[1:])

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if calls != expected:
        what = 'word embeddings' if layer == 0 else 'layers'
        raise ValueError(f'{type(model).__name__}: its {what} were run {calls} times in place of {expected}, '
                         'so that delta does not reach Enc(x) once; expected one forward pass of an encoder')


def end_of_enc(model, layer):
    """Where Enc(x) ends -> modules, how often a forward pass calls them, which of the calls is the layer's.

    An encoder that shares its layers (ALBERT) calls one module many times. Raises ValueError if there is
    no such layer, or if the encoder does not keep its layers in a single list.
    """
    model = unwrapped(model)
    embeddings = model.get_input_embeddings()
    if embeddings.weight.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f'{type(model).__name__} is in {embeddings.weight.dtype}, too coarse for delta; '
                         'load it in torch.float32 and use torch.autocast')
    if layer == 0:
        return [embeddings], 1, 1
    stacks = []
    inside = set()
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.ModuleList) and module not in inside:
            stacks.append(module)
            inside.update(module.modules())
    if len(stacks) != 1:
        raise ValueError(f'{type(model).__name__} keeps its layers in {len(stacks)} lists; expected one. '
                         'Layer 0, the word embeddings, may work')
    depth = model.config.num_hidden_layers
    if not 1 <= abs(layer) <= depth:
        raise ValueError(f'layer {layer}: the encoder has layers 1 to {depth}, or -1 to -{depth} from the '
                         'end; 0 is the word embeddings')
    return list(stacks[0]), depth, layer if layer > 0 else depth + 1 + layer


def width(model, layer=0):
    """H, the last dimension of Enc(x): RemBERT's word embeddings are narrower than its layers."""
    model = unwrapped(model)
    if layer == 0:
        return model.get_input_embeddings().weight.shape[-1]
    return model.config.hidden_size


def unwrapped(model):
    """The model itself, where DistributedDataParallel wraps it. Raises ValueError for DataParallel."""
    if isinstance(model, torch.nn.DataParallel):
        raise ValueError('DataParallel gives each GPU a part of the batch, but delta is of all of it; '
                         'expected DistributedDataParallel, one process a GPU (torchrun)')
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return model.module
    return model


# ---------------------------------------------------------------- METHODS

class Method(NamedTuple):
    """A method: all that train.py, its command line and the tables know of it."""
    objective: Callable     # (model, batch, own, generator) -> loss
    own: dict               # its own arguments with their defaults; each is a flag of train.py


def _adv(model, batch, own, generator):
    return adv(model, batch, eps=own['eps'], steps=own['adv_steps'], layer=own['layer'], generator=generator)


def _rs_r(model, batch, own, generator):
    return rs_r(model, batch, eps=own['eps'], layer=own['layer'], generator=generator)


# Defaults: m and p are the paper's, the others ours (the paper searches eps in 0.001, 0.01, 0.1 and 1.0).
# plain_steps: so many steps without delta come first. What those of rs_a mean, synonyms.py says.
METHODS = {
    'plain': Method(lambda model, batch, own, generator: plain(model, batch), {}),
    'adv': Method(_adv, {'eps': 0.001, 'layer': 0, 'adv_steps': 1, 'plain_steps': 0}),
    'rs_r': Method(_rs_r, {'eps': 0.1, 'layer': 0}),
    'rs_a': Method(lambda model, batch, own, generator: rs_a(model, batch),
                   {'m': 10, 'p': 0.1, 'replace': 'paper', 'english_only': False}),
}
