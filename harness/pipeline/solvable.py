"""Whether a solver can do what a run asks of it: with its formats, transforms and budget of bits.

Refusals and warnings are as in combinations.py, which checks how the other parts go together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from harness.config.checks import nearest
from harness.config.errors import ConfigError
from harness.formats import Format, Scheme
from harness.quantize.allocation import Auto
from harness.solvers import Solver
from harness.structure.structure import Structure
from harness.transforms import ModelShape, Transform
from harness.transforms.smoothquant import SmoothQuant


def check_budget(auto: Auto, scheme: Scheme, structure: Structure) -> None:
    """Refuse a budget below every candidate, and an allocation of nothing."""
    least = min(format.bits for format in auto.candidates.values())
    if least > auto.bits_per_weight:
        raise ConfigError(
            f"format.auto.bits_per_weight={auto.bits_per_weight}: the smallest candidate has "
            f"{least} bits; raise it, or add a smaller candidate."
        )
    linears = sum(
        len(site.linears) for layer in range(structure.layers) for site in structure.expanded(layer)
    )
    # Those outside the blocks are never allocated.
    decided = sum(
        layer is not None and "weight" in parts for (layer, _), parts in scheme.overrides.items()
    )
    if decided == linears:
        raise ConfigError(
            "format.auto with format.overrides of every linear: nothing is left to allocate; "
            "drop one of them."
        )


def check_solver(
    solver: Solver,
    name: str | None,
    scheme: Scheme,
    auto: Auto | None,
    transforms: Sequence[Transform],
    context: ModelShape,
) -> list[str]:
    """Refuse what the solver cannot do with these formats and transforms; returns warnings.

    name: what the option of solver is called.
    """
    # Each once: linears that share a format would repeat its warnings.
    formats = list(dict.fromkeys(_weight_formats(scheme, auto)))
    for format in formats:
        if format.under_hessian and not solver.curvature([format], format.group_size or 1):
            raise ConfigError(
                f"format.weight.observer={format.observer} with solver={name}: it finds scales "
                "without a Hessian; use format.weight.observer=minmax, or solver=rtn, gptq or awq."
            )
        if solver.refit and (
            solver.scope == "block" or not solver.curvature([format], format.group_size or 1)
        ):
            raise ConfigError(
                f"solver.refit=true with solver={name}: scales are chosen anew under a Hessian, of "
                "which it has none; set solver.refit=false, or use solver=rtn, gptq or awq."
            )
        if solver.refit and format.spans_rows:
            raise ConfigError(
                f"solver.refit=true with format.weight.granularity={format.granularity}: a scale "
                "spans rows; set granularity=channel or group, or solver.refit=false."
            )
    doubts = [warning for format in formats for warning in solver.check(format)]
    warnings = list(dict.fromkeys(doubts))
    warnings += solver.check_together(formats, _scalable(scheme, transforms, context))
    if solver.prepares and any(isinstance(transform, SmoothQuant) for transform in transforms):
        raise ConfigError(
            f"solver={name} with smoothquant (transform or transform.smooth): both scale the same "
            "channels; use one of them."
        )
    if solver.hessian_input == "quantized" and not _reads_quantized(solver, scheme, auto):
        bits = 16 if scheme.act is None else scheme.act.bits
        raise ConfigError(
            f"solver.hessian_input=quantized with solver={name} and format.act.bits={bits}: "
            "there is no Hessian of quantized activations; set solver.hessian_input=fp."
        )
    _check_propagation(solver, transforms, context)
    return warnings


def _check_propagation(
    solver: Solver, transforms: Sequence[Transform], context: ModelShape
) -> None:
    """Refuse propagated errors where there is nothing to compare with, and unknown sites."""
    if solver.propagate == "none":
        return
    free = any(transform.free_decoder for transform in transforms)
    if free and solver.propagate == "gptaq":
        raise ConfigError(
            "solver.propagate=gptaq with a transform whose decoder is free: its loop makes up for "
            "what is read, and not for what weights are for; use solver.propagate=qep."
        )
    if free and solver.prepares:
        raise ConfigError(
            f"solver.propagate={solver.propagate} with a transform whose decoder is free, and "
            "channel scales: the untouched model has none; use solver=gptq, or "
            "solver.propagate=none."
        )
    if tuple(solver.propagate_skip) == Solver().propagate_skip:
        return
    for site in solver.propagate_skip:
        if site not in context.widths:
            raise ConfigError(
                f"solver.propagate_skip={list(solver.propagate_skip)}: there is no site {site}."
                f"{nearest(site, context.widths)} Legal: {', '.join(context.widths)}."
            )


def hessian_input(
    solver: Solver, scheme: Scheme, auto: Auto | None, transforms: Sequence[Transform]
) -> str:
    """What solver.hessian_input=auto means here."""
    wanted = solver.stream == "both" or any(transform.free_decoder for transform in transforms)
    return "quantized" if wanted and _reads_quantized(solver, scheme, auto) else "fp"


def reads_hessian(solver: Solver, scheme: Scheme, auto: Auto | None) -> bool:
    """Whether the solver, or the observer of a format, reads any of a Hessian."""
    formats = _weight_formats(scheme, auto)
    return any(solver.curvature([format], format.group_size or 1) for format in formats)


def _reads_quantized(solver: Solver, scheme: Scheme, auto: Auto | None) -> bool:
    """Whether there is a Hessian of quantized activations."""
    return scheme.any("act") and reads_hessian(solver, scheme, auto)


def _weight_formats(scheme: Scheme, auto: Auto | None) -> Iterator[Format]:
    """The formats that a weight may take."""
    formats = [scheme.weight]
    if auto is not None:
        formats += auto.candidates.values()
    formats += [parts.get("weight") for parts in scheme.overrides.values()]
    yield from (format for format in formats if format is not None)


def _scalable(
    scheme: Scheme, transforms: Sequence[Transform], context: ModelShape
) -> dict[str, str]:
    """{site: free | shared | fixed} of the sites whose linears are quantized
    (solvers.Block.scalable)."""
    encoded = {site for transform in transforms for site in transform.encodes(context)}
    kinds = {}
    for site, linears in context.readers.items():
        if not any(scheme.weights(layer, linears) for layer in range(context.layers)):
            continue
        kinds[site] = "free"
        # Several query heads read one value head, and so share its scales.
        if site == "o_in" and context.turns and context.heads > context.kv_heads:
            kinds[site] = "shared"
        # An encoder stands between the site and what would take its scale, or nothing takes it.
        if site in encoded or not context.merges(site):
            kinds[site] = "fixed"
    return kinds
