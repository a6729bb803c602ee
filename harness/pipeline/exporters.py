"""The exporter of a run, and what it is to be asked about before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import cycle

from harness.checkpoints.base import Exporter
from harness.checkpoints.folder import check_destination
from harness.checkpoints.names import Name
from harness.config.build import build
from harness.config.errors import ConfigError
from harness.formats import Scheme
from harness.pipeline.plan import Plan
from harness.pipeline.sections import exporter_fields
from harness.quantize.allocation import Auto
from harness.quantize.named import linears
from harness.structure.structure import Structure


def exporter_of(plan: Plan, scheme: Scheme, structure: Structure) -> Exporter | None:
    """What writes the checkpoint, if one is asked for. Raises ConfigError."""
    section = plan.settings["export"]
    if section.get("_target_") is None:
        return None
    if not plan.quantizes:
        raise ConfigError(
            f"export={section['name']} with format=none: nothing is quantized; "
            "choose a format, or export=none."
        )
    exporter = build(exporter_fields(section), "export", Exporter)
    # What would fail only after the run.
    check_destination(section)
    # Refuses what no folder can be called.
    Name.of(plan.settings, plan.choices, scheme, structure.head)
    return exporter


def possible(scheme: Scheme, auto: Auto | None, structure: Structure) -> list[Scheme]:
    """The schemes that a run may end with, as far as an exporter tells them apart."""
    if auto is None:
        return [scheme]
    alike = [replace(scheme, weight=format) for format in auto.candidates.values()]
    # and one in which linears differ
    mixed = {
        place: {"weight": format, **scheme.overrides.get(place, {})}
        for place, format in zip(linears(structure), cycle(auto.candidates.values()))
    }
    return [scheme, *alike, replace(scheme, overrides={**scheme.overrides, **mixed})]


def stored_dtype(name: str, facts: Mapping) -> str:
    """The dtype of the model's weights, "auto" where only they tell."""
    if name != "auto":
        return name
    return str(facts.get("dtype") or name).removeprefix("torch.")
