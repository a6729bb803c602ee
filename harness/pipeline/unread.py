"""Settings that a command line gives and that nothing reads: known and of the right kind, so no
error, but a warning in the result.

A part that is switched off reads none of its own; a class says in `unread` which of its fields its
other values mute. Imports no torch: a stored result has these warnings, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from harness.pipeline.plan import Plan

if TYPE_CHECKING:
    from harness.formats import Format, KVCache
    from harness.solvers import Solver
    from harness.transforms import Transform
    from harness.tune import Tuner

    Part = Format | KVCache | Solver | Transform | Tuner | None


def unread(plan: Plan, built: Mapping[str, Part] | None = None) -> list[str]:
    """One sentence for each.

    built: {section: what was made from it}, once that is known; None where a section is off.
    """
    return [
        f"{key} has no effect with {why}"
        for key in plan.given
        for section, switch, why in _muted(plan, built or {})
        if key != switch and f"{key}.".startswith(f"{section}.")
    ]


def _muted(plan: Plan, built: Mapping[str, Part]) -> Iterator[tuple[str, str, str]]:
    """(a section or setting without effect, the setting that makes it so, the reason)."""
    section = plan.settings["format"]
    # Overrides and candidates take what they do not say from weight and act.
    shared = section["overrides"] or section["auto"]
    for part in ["kv"] if shared else ["weight", "act", "kv"]:
        if section[part].get("bits") == 16:
            yield f"format.{part}", f"format.{part}.bits", f"format.{part}.bits=16"
    if section["act"].get("bits") == 16 and not shared:
        yield "solver.stream", "", "format.act.bits=16"
    if not plan.calibrates:
        yield "data.calibration", "", "nothing to calibrate"
    if plan.experts == "all":
        yield "solver.min_tokens", "", "data.calibration.experts=all"
    if plan.settings["tracking"].get("wandb") is False:
        yield "tracking", "tracking.wandb", "tracking.wandb=false"
    yield from _unserved(plan, bool(shared))
    for name, part in built.items():
        if part is not None and not (shared and name in ("format.weight", "format.act")):
            for field in part.unread:
                yield f"{name}.{field}", "", f"{type(part).__name__} as it is set"


def _unserved(plan: Plan, shared: bool) -> Iterator[tuple[str, str, str]]:
    """The same of `export.serves`. shared: whether other formats read it, too."""
    section = plan.settings["format"]
    serves = plan.settings["export"].get("serves") or {}
    for part, rules in serves.items():
        for key in rules:
            name = f"export.serves.{part}.{key}"
            if key not in section[part] and not shared:
                yield name, "", f"format={section['name']}, which has no such choice"
            if f"format.{part}.{key}" in plan.given:
                yield name, "", f"format.{part}.{key}"
