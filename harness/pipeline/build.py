"""What works on weights, built from a plan and checked against the model's config before any weight is loaded.

Every refusal is a ConfigError that names the fields that do not go together and a way out; what is doubtful but legal becomes
a warning, which stands in the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from harness.checkpoints.base import Exporter, check_destination
from harness.checkpoints.names import Name
from harness.config.build import build
from harness.config.checks import one_of, typed
from harness.config.errors import ConfigError
from harness.formats import Format, KVCache, Scheme
from harness.models.adapter import family_of, shape_of
from harness.pipeline.plan import EXPORT, Plan, unnamed
from harness.pipeline.unread import unread
from harness.quantize.allocation import auto_of
from harness.quantize.overrides import resolve
from harness.solvers import Solver
from harness.store import writable
from harness.transforms import Transform, file
from harness.transforms.identity import Identity
from harness.transforms.smoothquant import NORM_SITES, PRODUCT_SITES, SmoothQuant

PARTS = {"weight": Format, "act": Format, "kv": KVCache}


@dataclass(frozen=True)
class Components:
    """What works on weights: formats, the transforms to place one after the other, solver (None: weights stay); the tracker;
    what their combination warns of. auto: how the weights' formats are to be allocated, if at all."""

    scheme: object
    auto: object
    transforms: list
    solver: object
    context: object
    tracker: object
    exporter: object
    warnings: list[str]


def components(plan: Plan) -> Components:
    """Build formats, transform and solver and check them against the model's real module shapes. Raises ConfigError."""
    settings = plan.settings
    _check_device(settings["device"])
    facts = plan.model.facts()
    family = family_of(facts.get("model_type"))
    parts = {
        part: build(settings["format"][part], f"format.{part}", base)
        for part, base in PARTS.items()
    }
    serves = settings["export"].get("serves") or {}
    scheme = Scheme(
        **parts, overrides=resolve(settings["format"], family, facts["num_hidden_layers"], serves)
    )
    auto = auto_of(settings["format"]["auto"], settings["format"]["weight"], serves.get("weight"))
    if auto is not None and scheme.weight is None:
        raise ConfigError(
            "format.auto with format.weight.bits=16: there is nothing to allocate; set format.weight, or "
            "format.auto=null."
        )
    solver = (
        build(unnamed(settings["solver"]), "solver", Solver)
        if settings["solver"].get("_target_")
        else None
    )
    transforms = transforms_of(settings["transform"])
    learned = [t for t in transforms if t.learned]
    solver_name = plan.choices.get("solver", "solver")
    if plan.model.quantized and (
        plan.quantizes or not isinstance(transforms[-1], Identity) or len(transforms) > 1
    ):
        raise ConfigError(
            f"model={plan.choices['model']} with a format or a transform: a checkpoint is measured as it is; set "
            "format=none transform=identity solver=none."
        )
    if solver is None and scheme.any("weight"):
        bits = (
            "format.overrides"
            if scheme.weight is None
            else f"format.weight.bits={scheme.weight.bits}"
        )
        raise ConfigError(
            f"{bits} with solver=none: nothing would quantize the weights; use solver=rtn or gptq, or "
            "format.weight.bits=16."
        )
    if solver is not None and not scheme.any("weight"):
        raise ConfigError(
            f"format.weight.bits=16 with solver={solver_name}: no weight is quantized; set solver=none or a "
            "format."
        )

    _check_lengths(plan, facts)
    _check_widths(scheme, auto, family, facts)
    context = shape_of(facts, scheme, settings["seed"], solver_name if solver is not None else None)
    if scheme.kv is not None:
        scheme.kv.check(context.head_dim, "format.kv.group_size", "the key/value heads")
    warnings = [warning for transform in transforms for warning in transform.check(context)]
    _check_file(settings["transform"], learned, context, plan)
    if solver is not None:
        _check_auto(auto, scheme, family, facts)
        warnings += _check_solver(solver, solver_name, scheme, auto, transforms, context)
        if solver.hessian_input == "auto":
            seen = (
                scheme.any("act")
                and "hessian" in solver.needs
                and any(t.free_decoder for t in transforms)
            )
            solver = replace(solver, hessian_input="quantized" if seen else "fp")
    if (
        learned
        and settings["model"].get("weights") == "disk"
        and any("act" in t.sees for t in learned)
    ):
        name = settings["transform"]["name"]
        warnings.append(
            f"transform={name} with model.weights=disk: learning end to end holds the whole model"
        )
    exporter = _exporter(plan, scheme, family)
    if exporter is not None:
        candidates = (
            []
            if auto is None
            else [replace(scheme, weight=format) for format in auto.candidates.values()]
        )
        dtype = settings["model"]["dtype"]
        if dtype == "auto":
            dtype = str(facts.get("dtype") or dtype).removeprefix("torch.")
        told = [
            warning
            for each in (scheme, *candidates)
            for warning in exporter.check(each, transforms, context, dtype)
        ]
        warnings += dict.fromkeys(told)
    built = {f"format.{part}": format for part, format in parts.items()} | {
        "solver": solver,
        "transform": transforms[-1],
    }
    warnings += unread(plan, built)
    return Components(scheme, auto, transforms, solver, context, plan.tracker, exporter, warnings)


def _exporter(plan: Plan, scheme: Scheme, family):
    """What writes the checkpoint, if one is asked for."""
    section = plan.settings["export"]
    target = section.get("_target_")
    if target is None:
        return None
    if not plan.quantizes:
        raise ConfigError(
            f"export={section['name']} with format=none: nothing is quantized; choose a format, or export=none."
        )
    own = {
        key: value for key, value in section.items() if key not in (EXPORT.keys() - {"_target_"})
    }
    exporter = build(own, "export", Exporter)
    check_destination(section)
    Name.of(plan.settings, plan.choices, scheme, family.head)
    return exporter


def _check_lengths(plan: Plan, facts: Mapping) -> None:
    """Refuse windows that the model's positions cannot hold."""
    longest = facts.get("max_position_embeddings")
    read = {"data.calibration": plan.calibration} if plan.calibrates else {}
    for where, windows in (read | {"eval.perplexity": plan.evaluation}).items():
        if longest and windows.length > longest:
            raise ConfigError(
                f"{where}.length={windows.length} is more than the model's {longest} positions; lower it."
            )


def _check_widths(scheme: Scheme, auto, family, facts: Mapping) -> None:
    """Refuse a group that does not divide the width of what it is for."""
    widths = family.widths(facts)
    candidates = (
        {}
        if auto is None
        else {f"auto.candidates.{name}": format for name, format in auto.candidates.items()}
    )
    for field, part in {"weight": scheme.weight, "act": scheme.act, **candidates}.items():
        for site, width in widths.items():
            if part is not None:
                part.check(width, f"format.{field}.group_size", site)
    readers = {name: site.name for site in family.sites for name in site.linears}
    for (layer, name), own in scheme.overrides.items():
        width = facts["hidden_size"] if layer is None else widths[readers[name]]
        for role, part in own.items():
            if part is not None:
                part.check(width, f"format.overrides: {role}.group_size", name)


def _check_auto(auto, scheme: Scheme, family, facts: Mapping) -> None:
    """Refuse a budget below every candidate, and an allocation of nothing."""
    if auto is None:
        return
    least = min(format.bits for format in auto.candidates.values())
    if least > auto.bits_per_weight:
        raise ConfigError(
            f"format.auto.bits_per_weight={auto.bits_per_weight}: the smallest candidate has {least} bits; raise "
            "it, or add a smaller candidate."
        )
    linears = sum(len(site.linears) for site in family.sites) * facts["num_hidden_layers"]
    if (
        sum(layer is not None and "weight" in own for (layer, _), own in scheme.overrides.items())
        == linears
    ):
        raise ConfigError(
            "format.auto with format.overrides of every linear: nothing is left to allocate; drop one of them."
        )


def _check_solver(solver, name: str, scheme: Scheme, auto, transforms: list, context) -> list[str]:
    """Refuse what the solver cannot do with these formats and transforms; returns warnings."""
    candidates = [] if auto is None else auto.candidates.values()
    formats = [
        scheme.weight,
        *candidates,
        *(own.get("weight") for own in scheme.overrides.values()),
    ]
    formats = list(dict.fromkeys(format for format in formats if format is not None))
    warnings = list(
        dict.fromkeys(warning for format in formats for warning in solver.check(format))
    )
    warnings += solver.check_together(formats, _scalable(scheme, transforms, context))
    if solver.prepares and any(isinstance(transform, SmoothQuant) for transform in transforms):
        raise ConfigError(
            f"solver={name} with smoothquant (transform or transform.smooth): both scale the same channels; use "
            "one of them."
        )
    if solver.hessian_input == "quantized" and (
        not scheme.any("act") or "hessian" not in solver.needs
    ):
        bits = 16 if scheme.act is None else scheme.act.bits
        raise ConfigError(
            f"solver.hessian_input=quantized with solver={name} and format.act.bits={bits}: there is no Hessian of quantized "
            "activations; set solver.hessian_input=fp."
        )
    return warnings


def _scalable(scheme: Scheme, transforms: list, context) -> dict[str, str]:
    """{site: free | shared | fixed} of the sites whose linears are quantized (solvers.Block.scalable)."""
    encoded = {site for transform in transforms for site in transform.encodes(context)}
    shared = {"o_in"} if context.heads > context.kv_heads else set()
    return {
        site: "fixed" if site in encoded else "shared" if site in shared else "free"
        for site, linears in context.readers.items()
        if any(scheme.weights(layer, linears) for layer in range(context.layers))
    }


def transforms_of(section: Mapping) -> list:
    """The transform, with SmoothQuant before or after it where `smooth` asks for that."""
    own = {
        key: value
        for key, value in section.items()
        if key not in ("name", "smooth", "save", "load")
    }
    transform, smooth = build(own, "transform", Transform), section.get("smooth")
    transform.name = section["name"]
    if smooth is None:
        return [transform]
    typed("transform.smooth.", smooth, {"alpha": float, "when": str, "sites": list[str] | None})
    when = one_of("transform.smooth.when", smooth.get("when", "before"), ("before", "after"))
    if when == "after" and not transform.residual:
        raise ConfigError(
            f"transform.smooth.when=after with transform={section['name']}: only a rotated residual stream has a "
            "basis of its own to smooth in; set transform.smooth.when=before."
        )
    legal = (
        {"before": PRODUCT_SITES, "after": NORM_SITES}[when]
        if transform.residual
        else (*NORM_SITES, *PRODUCT_SITES)
    )
    sites = {"sites": list(legal)} | {
        key: value for key, value in smooth.items() if key != "when" and value is not None
    }
    stacked = build(
        {"_target_": "harness.transforms.smoothquant.SmoothQuant", **sites},
        "transform.smooth",
        SmoothQuant,
    )
    for site in stacked.sites:
        if site not in legal:
            raise ConfigError(
                f"transform.smooth.sites={smooth['sites']} with transform.smooth.when={when}: under a rotated "
                f"residual stream {site} cannot be smoothed then; legal: {', '.join(legal)}."
            )
    return [stacked, transform] if when == "before" else [transform, stacked]


def placement_facts(plan: Plan, transform) -> dict:
    """What a stored placement must agree with to be used in this run."""
    return {
        "model": plan.model.fingerprint(),
        "transform": type(transform).__name__,
        **transform.structure,
    }


def _check_file(section: Mapping, learned: list, context, plan: Plan) -> None:
    for key in ("save", "load"):
        if section.get(key) is not None and not learned:
            raise ConfigError(
                f"transform.{key}={section[key]} with transform={section['name']}: it learns nothing to keep."
            )
    kept = section.get("save")
    if kept is not None:
        if not isinstance(kept, str) or Path(kept).is_dir():
            raise ConfigError(f"transform.save={kept}: needs the name of a file.")
        writable("transform.save", Path(kept).parent)
    if section.get("load") is not None:
        file.check(section["load"], learned[0], context, placement_facts(plan, learned[0]))


def _check_device(name: str) -> None:
    index = int(name.partition(":")[2] or 0)
    if name.startswith("cuda") and index >= torch.cuda.device_count():
        raise ConfigError(
            f"device={name}: this machine has {torch.cuda.device_count()} CUDA devices; use device=cpu or auto."
        )
