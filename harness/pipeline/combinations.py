"""Which parts of a run go together, checked against the model's config before weights are loaded.

Every refusal is a ConfigError that names the fields that do not go together and a way out; what is
doubtful but legal becomes a warning, which stands in the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.config.errors import ConfigError
from harness.formats import Scheme
from harness.pipeline.plan import Plan
from harness.quantize.allocation import Auto
from harness.quantize.named import linears
from harness.solvers import Solver
from harness.store import writable
from harness.structure.structure import Structure
from harness.transforms import ModelShape, Transform, file
from harness.transforms.identity import Identity
from harness.tune import Tuner


def check_parts(
    plan: Plan, scheme: Scheme, solver: Solver | None, transforms: Sequence[Transform]
) -> None:
    """Refuse formats that nothing solves for, a solver without formats, and either of a checkpoint
    that is quantized already."""
    changed = len(transforms) > 1 or not isinstance(transforms[-1], Identity)
    if plan.model.quantized and (plan.quantizes or changed):
        raise ConfigError(
            f"model={plan.choices['model']} with a format or a transform: a checkpoint is measured "
            "as it is; set format=none transform=identity solver=none."
        )
    if solver is None and scheme.any("weight"):
        bits = "format.overrides"
        if scheme.weight is not None:
            bits = f"format.weight.bits={scheme.weight.bits}"
        raise ConfigError(
            f"{bits} with solver=none: nothing would quantize the weights; use solver=rtn or gptq, "
            "or format.weight.bits=16."
        )
    if solver is not None and not scheme.any("weight"):
        name = plan.choices.get("solver", "solver")
        raise ConfigError(
            f"format.weight.bits=16 with solver={name}: no weight is quantized; "
            "set solver=none or a format."
        )


def check_lengths(plan: Plan, facts: Mapping) -> None:
    """Refuse windows that the model's positions cannot hold."""
    longest = facts.get("max_position_embeddings")
    cut = {}
    if plan.calibrates:
        cut["data.calibration"] = plan.calibration
    cut["eval.perplexity"] = plan.evaluation
    for field, windows in cut.items():
        if longest and windows.length > longest:
            raise ConfigError(
                f"{field}.length={windows.length} is more than the model's {longest} positions; "
                "lower it."
            )


def check_blocks(plan: Plan, structure: Structure) -> None:
    """Refuse to take blocks one by one that have more in common than the residual stream."""
    field = "model"
    if plan.settings["model"].get("weights") == "disk":
        field = "model.weights=disk"
    elif not plan.calibrates:  # nothing is done to a block
        return
    if structure.joined:
        raise ConfigError(
            f"{field}: blocks of a {structure.architecture} cannot be taken one by one, for "
            f"{'; '.join(structure.joined)}; set format=none transform=identity solver=none "
            "model.weights=memory, which measure it as it is."
        )


def check_widths(scheme: Scheme, auto: Auto | None, structure: Structure) -> None:
    """Refuse a group that does not divide the width of what it is for."""
    widths = structure.widths
    formats = {"weight": scheme.weight, "act": scheme.act}
    if auto is not None:
        formats |= {f"auto.candidates.{name}": format for name, format in auto.candidates.items()}
    for field, format in formats.items():
        for site, width in widths.items():
            if format is not None:
                format.check(width, f"format.{field}.group_size", site)
    sites = {name: site for site, linears in structure.linears.items() for name in linears}
    for (layer, name), parts in scheme.overrides.items():
        # Embedding and head are of no block, and as wide as the residual stream.
        width = structure.hidden if layer is None else widths[sites[name]]
        for role, format in parts.items():
            if format is not None:
                format.check(width, f"format.overrides: {role}.group_size", name)


def placement_facts(plan: Plan, transform: Transform) -> dict:
    """What a stored placement must agree with to be used in this run."""
    return {
        "model": plan.model.fingerprint(),
        "transform": type(transform).__name__,
        **transform.structure,
    }


def check_placement_files(plan: Plan, transforms: Sequence[Transform], context: ModelShape) -> None:
    """Refuse files to keep or take matrices that cannot be written or do not fit."""
    section = plan.settings["transform"]
    learned = [transform for transform in transforms if transform.learned]
    for key in ("save", "load"):
        if section.get(key) is not None and not learned:
            raise ConfigError(
                f"transform.{key}={section[key]} with transform={section['name']}: "
                "it learns nothing to keep."
            )
    save = section.get("save")
    if save is not None:
        if not isinstance(save, str) or Path(save).is_dir():
            raise ConfigError(f"transform.save={save}: needs the name of a file.")
        # Now, and not after the hours that learning may take.
        writable("transform.save", Path(save).parent)
    if section.get("load") is not None:
        # One at most learns: SmoothQuant, which may stand beside it, does not.
        file.check(section["load"], learned[0], context, placement_facts(plan, learned[0]))


def check_residual(transforms: Sequence[Transform], context: ModelShape) -> None:
    """Refuse a rotation of a residual stream that takes none."""
    structure = context.structure
    for transform in transforms:
        if not transform.residual or structure is None:
            continue
        residual = structure.residual
        if residual.group is None:
            raise ConfigError(
                f"transform={transform.name} with a {structure.architecture}: its residual stream "
                f"cannot be rotated, for {'; '.join(residual.why)}. Use transform=hadamard, or "
                "transform=adacodec transform.placement=site, which work site by site."
            )
        if residual.group == "fixes 1" and not transform.fixes_ones:
            raise ConfigError(
                f"transform={transform.name} with a {structure.architecture}: its norms subtract "
                "the mean, so that a rotation has to leave the vector of ones alone, and this one "
                "does not; use transform=quarot, or transform.placement=site for adacodec."
            )


def check_attention(field: str, context: ModelShape) -> None:
    """Refuse what belongs between queries, keys and values where nothing can be put there."""
    if context.structure is None:
        return
    unmet = context.structure.unmet
    if unmet is not None:
        raise ConfigError(
            f"{field} with a {context.structure.architecture}: keys and values are not met, for "
            f"{unmet}; leave the cache in 16 bits."
        )


def check_untouched(plan: Plan, solver: Solver, transforms: Sequence[Transform]) -> None:
    """Refuse to hold the untouched model where not even this one is in memory."""
    free = any(transform.free_decoder for transform in transforms)
    if free and solver.propagate != "none" and plan.settings["model"].get("weights") == "disk":
        raise ConfigError(
            f"solver.propagate={solver.propagate} with a transform whose decoder is free and "
            "model.weights=disk: it holds the untouched model; set model.weights=memory, or "
            "solver.propagate=none."
        )


def cache_warnings(plan: Plan, scheme: Scheme) -> list[str]:
    """What is to be said of a cache whose newest tokens are floats."""
    length = plan.evaluation.length
    if scheme.kv is None or not scheme.kv.window or scheme.kv.window < length:
        return []
    return [
        f"format.kv.window={scheme.kv.window} with eval.perplexity.length={length}: no key or "
        "value of a text is read quantized; evaluate longer ones"
    ]


def learning_warnings(plan: Plan, transforms: Sequence[Transform]) -> list[str]:
    """What is to be said of transforms that learn from the whole model's output."""
    whole = any(transform.whole for transform in transforms)
    if not whole or plan.settings["model"].get("weights") != "disk":
        return []
    name = plan.settings["transform"]["name"]
    return [f"transform={name} with model.weights=disk: learning end to end holds the whole model"]


def check_tuner(
    plan: Plan,
    tuner: Tuner,
    solver: Solver | None,
    scheme: Scheme,
    auto: Auto | None,
    structure: Structure,
) -> list[str]:
    """Refuse what cannot be tuned (ConfigError), before any weight is loaded; returns warnings."""
    name = f"tune={plan.settings['tune'].get('name')}"
    candidates = [] if auto is None else list(auto.candidates.values())
    formats = [scheme.part("weight", *where) for where in linears(structure)]
    found = list(dict.fromkeys(format for format in [*candidates, *formats] if format is not None))
    if solver is None or not found:
        raise ConfigError(
            f"{name} with no weight of a block quantized: there is nothing to tune; set tune=none, "
            "or a format of weights with solver=rtn or gptq."
        )
    if plan.settings["model"].get("weights") == "disk":
        raise ConfigError(
            f"{name} with model.weights=disk: it holds the whole model, and the untouched one; set "
            "model.weights=memory, or tune=none."
        )
    if tuner.windows is not None and plan.calibration.count is None:
        raise ConfigError(
            f"{name} with tune.windows={tuner.windows} and data.calibration.windows=null: solving "
            "takes all of the text, and none is left to learn from; set one of them."
        )
    return tuner.check(found)
