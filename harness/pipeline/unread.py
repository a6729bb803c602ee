"""Settings that a command line gives and that nothing reads: known and of the right kind, so no error, but a warning in the
result. A part that is switched off reads none of its own; a class says in `unread` which of its fields its other values mute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from harness.pipeline.plan import Plan


def unread(plan: Plan, built: Mapping[str, object] | None = None) -> list[str]:
    """One sentence for each. built: {section: what was made from it}, once that is known; None where a section is off."""
    return [
        f"{key} has no effect with {why}"
        for key in plan.given
        for section, switch, why in _muted(plan, built or {})
        if key != switch and f"{key}.".startswith(f"{section}.")
    ]


def _muted(plan: Plan, built: Mapping[str, object]) -> Iterator[tuple[str, str, str]]:
    """(a section or setting without effect, the setting that makes it so, the reason)."""
    format, tracking, export = (
        plan.settings[section] for section in ("format", "tracking", "export")
    )
    shared = (
        format["overrides"] or format["auto"]
    )  # which take what they do not say from weight and act
    parts = ["kv"] if shared else ["weight", "act", "kv"]
    for part in parts:
        if format[part].get("bits") == 16:
            yield f"format.{part}", f"format.{part}.bits", f"format.{part}.bits=16"
    if not plan.calibrates:
        yield "data.calibration", "", "nothing to calibrate"
    if tracking.get("wandb") is False:
        yield "tracking", "tracking.wandb", "tracking.wandb=false"
    for part, rules in (export.get("serves") or {}).items():
        for key in rules:
            if key not in format[part] and not shared:
                yield (
                    f"export.serves.{part}.{key}",
                    "",
                    f"format={format['name']}, which has no such choice",
                )
            if f"format.{part}.{key}" in plan.given:
                yield f"export.serves.{part}.{key}", "", f"format.{part}.{key}"
    for section, part in built.items():
        if part is not None and not (shared and section in ("format.weight", "format.act")):
            yield from (
                (f"{section}.{name}", "", f"{type(part).__name__} as it is set")
                for name in part.unread
            )
