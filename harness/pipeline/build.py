"""What works on weights, built from a plan before any weight is loaded.

combinations.py and solvable.py check it. Raises ConfigError, which names the fields at fault and a
way out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

from transformers import CONFIG_MAPPING, AutoConfig

from harness.checkpoints.base import Exporter
from harness.config.build import build
from harness.config.checks import nearest
from harness.config.errors import ConfigError, reason
from harness.formats import Format, KVCache, Scheme
from harness.models.adapter import shape_of, structure_of
from harness.models.device import refuse_missing
from harness.pipeline import combinations, solvable
from harness.pipeline.exporters import exporter_of, possible, stored_dtype
from harness.pipeline.plan import Plan
from harness.pipeline.sections import unnamed
from harness.pipeline.transforms import transforms_of
from harness.pipeline.unread import unread
from harness.quantize.allocation import Auto, auto_of
from harness.quantize.overrides import resolve
from harness.solvers import Solver
from harness.structure.facts import text_of
from harness.structure.structure import Structure
from harness.tracking import Tracker
from harness.transforms import ModelShape, Transform
from harness.tune import Tuner

T = TypeVar("T", Solver, Tuner)


@dataclass(frozen=True)
class Components:
    """What works on weights, and what its combination warns of.

    structure: the model's, from its config. scheme: the formats, overrides resolved. auto: how
    those of the weights are to be allocated, if at all. transforms: to be placed one after the
    other. solver: None leaves weights as they are. tuner: None leaves what was solved. context:
    what transforms may know of the model. exporter: None where nothing is exported.
    """

    structure: Structure
    scheme: Scheme
    auto: Auto | None
    transforms: list[Transform]
    solver: Solver | None
    tuner: Tuner | None
    context: ModelShape
    tracker: Tracker
    exporter: Exporter | None
    warnings: list[str]


def components(plan: Plan) -> Components:
    """Build formats, transforms, solver and exporter of a run and check them against the model's
    real module shapes. Raises ConfigError."""
    settings = plan.settings
    refuse_missing("device", settings["device"])
    facts = plan.model.facts()
    structure = structure_from(facts)
    combinations.check_blocks(plan, structure)
    scheme, auto = _formats(settings, structure)
    solver = _chosen(settings["solver"], "solver", Solver)
    if solver is not None:
        solver = solver.told(structure.scored)
    transforms = transforms_of(settings["transform"])
    combinations.check_parts(plan, scheme, solver, transforms)
    combinations.check_lengths(plan, text_of(facts))
    combinations.check_widths(scheme, auto, structure)

    name = plan.choices.get("solver", "solver")
    context = shape_of(structure, scheme, settings["seed"], None if solver is None else name)
    warnings = _placed(plan, scheme, transforms, context)
    if solver is not None:
        if auto is not None:
            solvable.check_budget(auto, scheme, structure)
        combinations.check_untouched(plan, solver, transforms)
        warnings += solvable.check_solver(solver, name, scheme, auto, transforms, context)
        solver, unread_input = _hessian_input(plan, solver, scheme, auto, transforms)
        warnings += unread_input
    warnings += combinations.learning_warnings(plan, transforms)
    tuner = _chosen(settings["tune"], "tune", Tuner)
    if tuner is not None:
        warnings += combinations.check_tuner(plan, tuner, solver, scheme, auto, structure)
    warnings += _expert_warnings(plan, structure)

    exporter = exporter_of(plan, scheme, structure)
    if exporter is not None:
        exporter.check_config(facts)
        dtype = stored_dtype(settings["model"]["dtype"], facts)
        doubts = [
            warning
            for each in possible(scheme, auto, structure)
            for warning in exporter.check(each, transforms, context, dtype)
        ]
        warnings += dict.fromkeys(doubts)  # each once
    for evaluation in plan.evaluations.values():
        evaluation.check_export(settings["export"]["name"], facts.get("model_type"), scheme.kv)
    built = {
        "format.weight": scheme.weight,
        "format.act": scheme.act,
        "format.kv": scheme.kv,
        "solver": solver,
        "tune": tuner,
        "transform": transforms[-1],
    }
    warnings += unread(plan, built)
    return Components(
        structure,
        scheme,
        auto,
        transforms,
        solver,
        tuner,
        context,
        plan.tracker,
        exporter,
        warnings,
    )


def _placed(
    plan: Plan, scheme: Scheme, transforms: list[Transform], context: ModelShape
) -> list[str]:
    """Check that the cache and the transforms can stand where they are to; what is doubtful."""
    if scheme.kv is not None:
        combinations.check_attention(f"format.kv.bits={scheme.kv.bits}", context)
        scheme.kv.check(context.head_dim, "format.kv.group_size", "the key/value heads")
    combinations.check_residual(transforms, context)
    warnings = combinations.cache_warnings(plan, scheme)
    warnings += [warning for transform in transforms for warning in transform.check(context)]
    combinations.check_placement_files(plan, transforms, context)
    return warnings


def _hessian_input(
    plan: Plan, solver: Solver, scheme: Scheme, auto: Auto | None, transforms: list[Transform]
) -> tuple[Solver, list[str]]:
    """The solver with its `auto` settled, and a warning where it is set but not read."""
    if solver.hessian_input == "auto":
        settled = solvable.hessian_input(solver, scheme, auto, transforms)
        solver = replace(solver, hessian_input=settled)
    setting = "solver.hessian_input"
    if setting not in plan.given or solvable.reads_hessian(solver, scheme, auto):
        return solver, []
    return solver, [f"{setting} has no effect with {type(solver).__name__} as it is set"]


def _expert_warnings(plan: Plan, structure: Structure) -> list[str]:
    """Routed experts that stay as they are, and settings for some that the model has not."""
    warnings = []
    left = structure.float_experts
    if left and plan.quantizes:
        warnings.append(
            f"{', '.join(left)} stay float: experts that transformers' interface does not run"
        )
    if not structure.mixes:
        warnings += [
            f"{key} has no effect with a model that has no routed experts"
            for key in ("data.calibration.experts", "solver.min_tokens")
            if key in plan.given
        ]
    return warnings


def structure_from(facts: Mapping) -> Structure:
    """The structure of a model from the fields of its config, before any weight is read.

    Raises ConfigError where transformers has no such architecture, or it cannot be looked through.
    """
    kind = facts.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ConfigError(
            f"model: transformers has no architecture '{kind}'.{nearest(kind, CONFIG_MAPPING)} "
            "A newer release may have it."
        )
    try:
        return _structure(json.dumps(facts))
    except Exception as error:  # a model's own code runs on tensors without content
        raise ConfigError(
            f"model: a forward of {kind} could not be looked through ({reason(error)}), so that "
            "its parts are unknown."
        ) from error


@lru_cache(maxsize=8)
def _structure(config: str) -> Structure:
    """The structure of a config.json, from which alone it follows: jobs of a sweep share it."""
    return structure_of(AutoConfig.for_model(**json.loads(config)))


def _formats(settings: Mapping, structure: Structure) -> tuple[Scheme, Auto | None]:
    """The formats of all parts, and how those of weights are allocated."""
    section = settings["format"]
    # What loads an exported file computes by its own rules, and formats are to compute by them too.
    serves = settings["export"].get("serves") or {}
    scheme = Scheme(
        weight=build(section["weight"], "format.weight", Format),
        act=build(section["act"], "format.act", Format),
        kv=build(section["kv"], "format.kv", KVCache),
        overrides=resolve(section, structure, serves),
    )
    auto = auto_of(section["auto"], section["weight"], serves.get("weight"))
    if auto is not None and scheme.weight is None:
        raise ConfigError(
            "format.auto with format.weight.bits=16: there is nothing to allocate; "
            "set format.weight, or format.auto=null."
        )
    return scheme, auto


def _chosen(section: Mapping, group: str, base: type[T]) -> T | None:
    """What an option of a group builds; None where it is `none`, which has no class."""
    if not section.get("_target_"):
        return None
    return build(unnamed(section), group, base)
