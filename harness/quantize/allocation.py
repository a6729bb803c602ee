"""format=auto: the candidate format of each linear, by the least error within a budget.

    min sum_l e_l(f_l)   s.t.  sum_l bits_l(f_l) <= budget sum_l weights_l
    e_l(f) = sum_o F_o [(W - Q_f(W)) H (W - Q_f(W))^T]_oo,      F_o = sum_t (dL / dy_to)^2

H: the Hessian of what linear l reads in the unquantized (but transformed) model, F: the squared
gradient of the loss L at its outputs y, over the calibration text. e is then the second-order rise
of L under round to nearest, with the diagonal Fisher information in place of the curvature. Bits
count codes, scales, zero points. The integer program has one choice a linear and one budget; HiGHS
solves it. Rejected: the relative output error, which knows nothing of what a linear's output is for
(with it, 4.5 bits were worse than uniform NVFP4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harness.calibration.statistics import Statistics
from harness.calibration.stream import Stream
from harness.config.build import build
from harness.config.checks import number, typed
from harness.config.errors import ConfigError
from harness.config.extras import need
from harness.formats import Format
from harness.models.adapter import Adapter
from harness.models.quant_linear import QuantLinear
from harness.parallel import ALONE, Ranks
from harness.quantize.candidates import weight_of
from harness.quantize.overrides import as_served
from harness.solvers.search import under_hessian


@dataclass(frozen=True)
class Auto:
    """The choice that `format.auto` leaves open.

    bits_per_weight: the budget over the quantized linears of the blocks, scales and zero points
    counted. candidates: {name: weight format}.
    """

    bits_per_weight: float
    candidates: Mapping[str, Format]


SHARED = ("observer", "mse", "compute_dtype", "pad")  # what candidates take from format.weight


def auto_of(section: Mapping | None, weight: Mapping, serves: Mapping | None = None) -> Auto | None:
    """From `format.auto` and `format.weight`; None where it is off.

    candidates.py says what the name of a candidate stands for; the observer and the arithmetic are
    those of format.weight. serves: `export.serves.weight`.
    """
    if section is None:
        return None
    need("scipy", "format.auto", extra="auto")
    hints = {"bits_per_weight": float, "candidates": list[str]}
    typed("format.auto.", section, hints, needed=hints)
    names = section["candidates"]
    if len(names) < 2 or len(set(names)) != len(names):
        raise ConfigError(
            f"format.auto.candidates={names}: needs a list of at least two formats, each once."
        )
    candidates = {}
    for name in names:
        settings = weight_of(name)
        # a part that is off has nothing to share
        if "_target_" in settings:
            shared = {key: weight[key] for key in SHARED if key in weight}
            settings = as_served(settings, serves) | shared
        candidates[name] = build(settings, f"format.auto.candidates.{name}", Format)
        if candidates[name] is None:
            raise ConfigError(f"format.auto.candidates: {name} quantizes no weights; leave it out.")
    budget = number("format.auto.bits_per_weight", section["bits_per_weight"], 1, 16)
    return Auto(budget, candidates)


@torch.no_grad()
def sensitivities(
    adapter: Adapter,
    auto: Auto,
    windows: Tensor,
    advance: Callable[[], None],
    ranks: Ranks = ALONE,
) -> list[dict]:
    """What each candidate would cost every linear of the blocks, block after block.

    [{"layer", "name", "weights", "errors": {candidate: e}, "bits": {candidate: stored bits}}].
    windows: calibration token ids [N, L]; advance: called after each block; ranks: each sees its
    share.
    """
    fisher = importance(adapter, windows, ranks)
    rows = []
    stream = Stream(adapter, windows, ranks=ranks)
    for layer, block in enumerate(adapter.blocks):
        with adapter.open(layer):
            for site, activations in stream.walk(block):
                shared = block.get_submodule(site.linears[0]).site
                width = adapter.width(site, layer)
                statistics = Statistics(width, stream.tokens, adapter.device, width, ranks)
                for x in activations:
                    statistics.add(shared.encode(x))
                statistics.finish()
                assert statistics.hessian is not None
                for name in site.linears:
                    linear = block.get_submodule(name)
                    costs = _candidates(
                        linear, auto.candidates, statistics.hessian, fisher[layer, name]
                    )
                    count = linear.weight.numel()
                    rows.append({"layer": layer, "name": name, "weights": count, **costs})
        advance()
    return rows


def importance(
    adapter: Adapter, windows: Tensor, ranks: Ranks = ALONE
) -> dict[tuple[int, str], Tensor]:
    """{(layer, linear): F [out]}, float32, over token ids [N, L].

    F sums the squared gradients of the next-token loss, itself a sum, at every linear's output.
    """
    squares = {}
    handles = []
    for layer, block in enumerate(adapter.blocks):
        for site in adapter.sites(layer):
            for name in site.linears:
                linear = block.get_submodule(name)
                squares[layer, name] = torch.zeros(linear.out_features, device=adapter.device)

                def keep(gradient: Tensor, where=(layer, name)) -> None:
                    squares[where] += gradient.float().square().flatten(0, -2).sum(0)

                # returns nothing: what a forward hook returns replaces the output
                def hook(_, args, y, keep=keep) -> None:
                    y.register_hook(keep)

                handles.append(linear.register_forward_hook(hook))
    embedding = adapter.model.get_input_embeddings()
    # weights need not ask for a gradient: the graph begins at the embedded tokens
    handles.append(embedding.register_forward_hook(lambda _, args, y: y.requires_grad_()))
    with torch.enable_grad():
        for window in ranks.share(windows):
            ids = window.to(adapter.device)[None]
            logits = adapter.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
    for handle in handles:
        handle.remove()
    ranks.sum_(*squares.values())
    return squares


def _candidates(
    linear: QuantLinear, candidates: Mapping[str, Format], hessian: Tensor, fisher: Tensor
) -> dict[str, dict]:
    """{"errors": {candidate: e}, "bits": {candidate: stored bits}} of one linear's weight."""
    weight = linear.weight
    errors = {}
    bits = {}
    for name, format in candidates.items():
        scales = format.scales(weight)
        if format.under_hessian:
            scales = under_hessian(weight, format, scales, hessian)
        quantized = format.quantize(weight, scales)
        noise = quantized.dequantize().float() - weight.float()
        # the diagonal of noise H noise^T, without the rest of it
        errors[name] = float(((noise @ hessian) * noise).sum(1) @ fisher)
        bits[name] = linear.held(quantized.bits())
    return {"errors": errors, "bits": bits}


def allocate(rows: Sequence[Mapping], bits_per_weight: float) -> list[str]:
    """The candidate each row takes.

    Raises ConfigError where the cheapest of all is beyond the budget.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    names = list(rows[0]["errors"])
    errors = np.array([[row["errors"][name] for name in names] for row in rows])
    bits = np.array([[row["bits"][name] for name in names] for row in rows], dtype=float)
    weights = float(sum(row["weights"] for row in rows))
    least = bits.min(1).sum() / weights
    if least > bits_per_weight:
        raise ConfigError(
            f"format.auto.bits_per_weight={bits_per_weight}: the candidates need at least "
            f"{least:.3f}; raise it, or add a smaller candidate."
        )
    # x [rows * candidates] in {0, 1}: the ones of each row sum to one
    one_each = np.kron(np.eye(len(rows)), np.ones(len(names)))
    # a budget that one format meets exactly must not fail by rounding
    budget = LinearConstraint(bits.reshape(1, -1) / weights, -np.inf, bits_per_weight * (1 + 1e-9))
    solution = milp(
        errors.ravel(),
        constraints=[LinearConstraint(one_each, 1, 1), budget],
        bounds=Bounds(0, 1),
        integrality=np.ones(errors.size),
        options={"mip_rel_gap": 1e-6},
    )
    if solution.x is None:
        raise RuntimeError(f"format=auto: the allocation was not found ({solution.message})")
    return [names[index] for index in solution.x.reshape(errors.shape).argmax(1)]
