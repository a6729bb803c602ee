"""What the fields of a run's records are, as far as tables and pages count on it: metrics.json and
status.json are files, and what is in them may have come from anywhere. A field of another shape is
as good as none."""

from __future__ import annotations

from collections.abc import Mapping

from harness.config.checks import fits

NUMBER = float | None
FIGURES = Mapping[str, Mapping[str, NUMBER]]  # {corpus or task: {metric: value}}
RECORD = dict.fromkeys(("evaluation", "stage", "source", "metric"), str) | {
    "value": NUMBER,
    "stderr": NUMBER,
    "n": int | None,
}
DISPLAY = {
    "label": str,
    "title": str | None,
    "digits": int,
    "percent": bool,
    "lower_is_better": bool | None,
    "change": bool,
    "alternative": bool,
    "minor": bool,
    "lost": NUMBER,
}
STAGE = {
    "ppl": Mapping[str, NUMBER],
    "losses": Mapping[str, list[NUMBER]],
    "tokens": int,
    "divergence": FIGURES,
    "zeroshot": FIGURES,
    "samples": Mapping[str, str],
    "texts": Mapping[str, str],
}
METRICS = {
    "run_id": str,
    "quant_id": str | None,
    "baseline_id": str | None,
    "status": str,
    "choices": Mapping[str, str | None],
    "command": str | None,
    "marks": Mapping[str, list[str]],
    "stages": Mapping[str, Mapping],
    "records": list[Mapping],
    "displays": Mapping[str, Mapping[str, Mapping]],
    "bits_per_weight": NUMBER,
    "online": NUMBER,
    "seconds": Mapping[str, float],
    "peak_memory_mb": NUMBER,
    "layers": list[Mapping[str, float | str | None]],
    "warnings": list[str],
    "notes": Mapping,
    "holds": Mapping[str, str | None],
    "export": Mapping,
}
STATUS: dict[str, object] = dict.fromkeys(
    ("status", "stage", "error", "started", "updated", "sweep", "quant_id", "command"), str | None
)


def sound(record: object, shape: Mapping[str, object]) -> dict:
    """The fields of a record that are of their shape."""
    if not isinstance(record, Mapping):
        return {}
    return {
        key: record[key] for key, hint in shape.items() if key in record and fits(record[key], hint)
    }


def metrics(record: object) -> dict:
    """metrics.json as far as it is sound, stage by stage, record by record."""
    found = sound(record, METRICS)
    if "stages" in found:
        found["stages"] = {name: sound(stage, STAGE) for name, stage in found["stages"].items()}
    if "records" in found:
        records = [sound(one, RECORD) for one in found["records"]]
        found["records"] = [one for one in records if one.keys() == RECORD.keys()]
    if "displays" in found:
        found["displays"] = {
            name: {
                metric: {"label": metric} | sound(display, DISPLAY)
                for metric, display in displays.items()
            }
            for name, displays in found["displays"].items()
        }
    return found
