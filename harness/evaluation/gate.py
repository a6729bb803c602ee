"""The gates: what promises to leave a model's function alone is held to it on a probe.

    exact transforms   |after - before| of the logits against what the model itself cannot tell
    the stream         hidden states walked block by block against those of the model's own forward
    the text           logits of a model that sees or hears too against its text decoder's alone

In float32 the model's own noise is a part of its logits: 30 layers do not repeat them to 1e-4 even
for norm fusion alone (7e-4 was seen for |logit| up to 42). In 16 bits it is measured, as |before -
exact| with `exact` the same weights computed in float32: a model whose keys reach hundreds repeats
its logits to a tenth, another one to a thousandth. Exact transforms of random models stay within
1.8 times that noise (greatest) and 1.5 times (mean). Where a router is nearly undecided, last bits
send a token to another expert: of a mixture in 16 bits, the tokens that moved most do not count.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from harness.calibration.stream import Stream, arriving
from harness.models.adapter import Adapter
from harness.structure.tape import tensors_of

FLOAT_MAX = 1e-4  # float32: max |delta| against max |logit|
FLOAT_MEAN = 1e-4  # float32: mean |delta|
HALF_MAX = 4.0  # 16 bits: max |after - exact| against that of |before - exact|
HALF_MEAN = 3.0  # 16 bits: the same of the mean
HALF_ROUTED = 0.95  # 16 bits, routed experts: share of tokens whose greatest counts
STREAM = {torch.float32: 1e-5, torch.float64: 1e-8}  # |difference| / |hidden states|, Frobenius
STREAM_HALF = 0.05


def gate(
    before: Tensor, after: Tensor, name: str, exact: Tensor | None = None, routed: bool = False
) -> dict[str, float]:
    """{max, mean} of |after - before| between logits [N, L, V] of the same tokens. exact: those of
    `exact_logits`, for a model in 16 bits; routed: it has experts. Raises RuntimeError, naming the
    transform and a way out, for a change beyond the model's own noise."""
    before = before.float()
    after = after.float()
    delta = (after - (before if exact is None else exact)).abs()
    share = HALF_ROUTED if routed and exact is not None else 1.0
    worst = _greatest(delta, share)
    mean = float(delta.mean())
    if exact is None:
        most = FLOAT_MAX * float(before.abs().max())
        average = FLOAT_MEAN
    else:
        noise = (before - exact).abs()
        most = HALF_MAX * _greatest(noise, share)
        average = HALF_MEAN * float(noise.mean())
    if not (worst <= most and mean <= average):
        precision = ", or set model.dtype=float32 if 16 bits are too few for these matrices"
        raise RuntimeError(
            f"transform={name} changed the model: logits are off by up to {worst:.3g} "
            f"(mean {mean:.3g}), allowed {most:.3g} (mean {average:.3g}); leave parts of it out "
            f"(transform.r1, r2, r3, r4) to find which one{'' if exact is None else precision}. "
            "What was learned is kept."
        )
    moved = (after - before).abs()
    return {"max": float(moved.max()), "mean": float(moved.mean())}


@torch.no_grad()
def exact_logits(adapter: Adapter, ids: Tensor) -> Tensor:
    """Logits [N, L, V] of token ids [N, L] with the model's weights, every block computed in
    float32; one is held at a time."""
    hidden, contexts = arriving(adapter, ids.to(adapter.device))
    hidden = hidden.float()
    for layer, (block, context) in enumerate(zip(adapter.blocks, contexts)):
        with adapter.open(layer):
            exact = {name: _float(value) for name, value in context.items()}
            hidden = tensors_of(copy.deepcopy(block).float()(hidden, **exact))[0]
    norm = adapter.structure.final_norm
    if norm is not None:
        hidden = copy.deepcopy(adapter.model.get_submodule(norm.module)).float()(hidden)
    return adapter.logits(hidden, copy.deepcopy(adapter.head).float())


@torch.no_grad()
def stream_gate(adapter: Adapter, window: Tensor) -> float:
    """|walked - forward| / |forward| of the last hidden states of a window [1, L]. Raises
    RuntimeError where the walk over the blocks is not the model's forward, so that every statistic
    taken on the way would be of another model."""
    stream = Stream(adapter, window)
    for layer, block in enumerate(adapter.blocks):
        with adapter.open(layer):
            for _ in stream.walk(block):
                pass
    walked = next(stream.leave()).float()
    output = adapter.backbone(input_ids=window.to(adapter.device), use_cache=False)
    forward = output.last_hidden_state.float()
    off = float((walked - forward).norm() / forward.norm())
    if not off <= STREAM.get(adapter.model.dtype, STREAM_HALF):
        raise RuntimeError(
            f"model: the calibration stream is {off:.1%} off the model's forward: blocks of "
            f"{adapter.structure.architecture} get more than their hidden states from one another, "
            "so that they cannot be walked one by one."
        )
    return off


@torch.no_grad()
def text_gate(adapter: Adapter, ids: Tensor, logits: Tensor) -> None:
    """Hold a model with towers to its text decoder, which is what is evaluated and calibrated.

    logits: the model's [N, L, V] of token ids [N, L]. Raises RuntimeError where the decoder alone
    gives others, for then the model gives it more than its tokens.
    """
    hidden = adapter.backbone(input_ids=ids.to(adapter.device), use_cache=False).last_hidden_state
    off = float((adapter.logits(hidden) - logits).float().norm() / logits.float().norm())
    if not off <= STREAM.get(adapter.model.dtype, STREAM_HALF):
        raise RuntimeError(
            f"model: logits of a {adapter.structure.architecture} are {off:.1%} off those of its "
            "text decoder, so that what it makes of a text cannot be measured there."
        )


def _greatest(delta: Tensor, share: float) -> float:
    """The greatest of delta [N, L, V] over a share of its tokens, those with the least."""
    return float(delta.amax(-1).flatten().quantile(share))


def _float(value: object) -> object:
    """Floating tensors, alone or in a tuple, in float32; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(map(_float, value))
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.float()
    return value
