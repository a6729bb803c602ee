"""The one place where matrices are merged into weights, `fold`, a pure function.

    reading linear   W <- W D^T        writing linear   W <- E^T W, b <- b E
    embedding        T <- T E          norm             gamma <- gamma E   (E diagonal)

A norm's gamma is its weight, or one more than that.

Called on float64 weights it merges for good (the caller casts back, once a transform and once for
the norms); called on differentiable weights inside `torch.func.functional_call` it is part of the
graph. Each parameter is merged by itself, so a caller may hand them over one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from harness.codecs.placement import Placement, Role


def fold(
    weights: Mapping[str, Tensor], placement: Placement, roles: Mapping[str, Role]
) -> dict[str, Tensor]:
    """Parameters with every codec merged in.

    weights: {"module.weight" | "module.bias": tensor}, any float dtype; roles: {"module": Role}.
    What no codec touches is returned as it is, not copied. Nothing is changed in place.
    """
    folded = {}
    for name, tensor in weights.items():
        module, _, part = name.rpartition(".")
        role = roles.get(module)
        folded[name] = tensor if role is None else merge(tensor, placement, role, part)
    return folded


def merge(tensor: Tensor, placement: Placement, role: Role, part: str = "weight") -> Tensor:
    """One parameter, `part` weight or bias, of the module in that role."""
    writing = placement.writing(role)
    if writing is not None and role.kind == "norm" and part == "weight" and role.gain == "1+w":
        return writing.encode(tensor + 1) - 1
    if role.kind == "norm" and part == "bias" and role.reads_residual and placement.residual:
        tensor = placement.residual.encode(tensor)
    if role.kind != "linear" or part == "bias":  # reads nothing; its last axis is what it writes
        return tensor if writing is None else writing.encode(tensor)
    reading = placement.reading(role)
    if reading is not None:
        tensor = reading.absorb(tensor)
    return tensor if writing is None else writing.emit(tensor)
