"""The gate: a transform that promises to leave the function of the model alone is held to it, on the logits of a probe.

A 30-layer float32 model does not repeat its logits to 1e-4 even for norm fusion alone (7e-4 was seen for |logit| up to 42), so
the bounds are relative; a model in 16 bits moves by its own rounding, which is much more.
"""

from __future__ import annotations

from torch import Tensor

FLOAT_MAX, FLOAT_MEAN = 1e-4, 1e-4  # float32: max |delta| against max |logit|, and mean |delta|
HALF_MAX, HALF_MEAN = 0.25, 0.05  # 16 bits: against max |logit| and the spread of logits


def gate(before: Tensor, after: Tensor, full_precision: bool, name: str) -> dict[str, float]:
    """{max, mean} of |delta| between logits of the same tokens. Raises RuntimeError naming the transform beyond rounding."""
    before, after = before.float(), after.float()
    delta = (after - before).abs()
    worst, mean = float(delta.max()), float(delta.mean())
    most, average = FLOAT_MAX * float(before.abs().max()), FLOAT_MEAN
    if not full_precision:
        most, average = HALF_MAX * float(before.abs().max()), HALF_MEAN * float(before.std())
    if not (worst <= most and mean <= average):
        raise RuntimeError(
            f"transform={name} changed the model: logits moved by up to {worst:.3g} (mean {mean:.3g}), allowed {most:.3g} "
            f"(mean {average:.3g})"
        )
    return {"max": worst, "mean": mean}
