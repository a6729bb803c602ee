"""The gates: what promises to leave the function of a model alone is held to it on a probe, and so
is the walk over its blocks.

    exact transforms   |after - before| of the logits against what the model does not know of them itself
    the stream         hidden states walked block by block against those of the model's own forward

In float32 the model's own noise is a part of its logits: 30 layers do not repeat them to 1e-4 even
for norm fusion alone (7e-4 was seen for |logit| up to 42). In 16 bits it is measured, as |before -
exact| with `exact` the same weights computed in float32: a model whose keys reach hundreds repeats
its logits to a tenth, another one to a thousandth. Exact transforms of random models stay within
1.8 times that noise (greatest) and 1.5 times (mean).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from harness.calibration.stream import Stream, arriving
from harness.models.adapter import Adapter

FLOAT_MAX, FLOAT_MEAN = 1e-4, 1e-4  # float32: max |delta| against max |logit|, and mean |delta|
HALF_MAX, HALF_MEAN = (
    4.0,
    3.0,
)  # 16 bits: max and mean |after - exact| against those of |before - exact|
STREAM = {torch.float32: 1e-4, torch.float64: 1e-8}  # |difference| / |hidden states|, Frobenius
STREAM_HALF = 0.05


def gate(before: Tensor, after: Tensor, name: str, exact: Tensor | None = None) -> dict[str, float]:
    """{max, mean} of |after - before| between logits [N, L, V] of the same tokens. exact: those of
    `exact_logits`, for a model in 16 bits. Raises RuntimeError, naming the transform and a way out,
    for a change beyond the model's own noise."""
    before, after = before.float(), after.float()
    known = before if exact is None else exact
    delta = (after - known).abs()
    worst, mean = float(delta.max()), float(delta.mean())
    if exact is None:
        most, average = FLOAT_MAX * float(before.abs().max()), FLOAT_MEAN
    else:
        noise = (before - exact).abs()
        most, average = HALF_MAX * float(noise.max()), HALF_MEAN * float(noise.mean())
    if not (worst <= most and mean <= average):
        precision = (
            ""
            if exact is None
            else ", or set model.dtype=float32 if 16 bits are too few for these matrices"
        )
        raise RuntimeError(
            f"transform={name} changed the model: logits are off by up to {worst:.3g} (mean {mean:.3g}), allowed {most:.3g} "
            f"(mean {average:.3g}); leave parts of it out (transform.r1, r2, r3, r4) to find which one{precision}. What was "
            "learned is kept."
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
            hidden = copy.deepcopy(block).float()(
                hidden, **{name: _float(value) for name, value in context.items()}
            )
    norm = copy.deepcopy(adapter.model.get_submodule(adapter.family.final_norm)).float()
    return copy.deepcopy(adapter.head).float()(norm(hidden))


@torch.no_grad()
def stream_gate(adapter: Adapter, window: Tensor) -> float:
    """|walked - forward| / |forward| of the last hidden states of a window [1, L]. Raises
    RuntimeError where the walk over the blocks is not the model's forward, so that every statistic
    taken on the way would be of another model."""
    stream = Stream(adapter, window)
    for layer, block in enumerate(adapter.blocks):
        with adapter.open(layer):
            stream.advance(block)
    walked = next(stream.leave()).float()
    wanted = adapter.backbone(
        input_ids=window.to(adapter.device), use_cache=False
    ).last_hidden_state.float()
    off = float((walked - wanted).norm() / wanted.norm())
    if not off <= STREAM.get(adapter.model.dtype, STREAM_HALF):
        raise RuntimeError(
            f"model: the calibration stream is {off:.1%} off the model's forward: a block of a {adapter.family.name} is not "
            "h + module(norm(h)), branch by branch, as its Family in harness/models/adapter.py says; declare another one."
        )
    return off


def _float(value):
    """Floating tensors, alone or in a tuple, in float32."""
    if isinstance(value, tuple):
        return tuple(map(_float, value))
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
