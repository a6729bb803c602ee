"""The model card of a checkpoint: README.md, from what metadata.py says and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence

from harness.checkpoints.base import Exporter
from harness.checkpoints.snippets import fenced
from harness.checkpoints.spelling import spelled
from harness.report.figures import columns, figures, number
from harness.report.marks import legend, letters

STAGES = {
    "baseline": "untouched model",
    "transformed": "float model, transformed",
    "quantized": "this checkpoint",
}
PARTS = {
    "weights": "weights",
    "activations": "activations",
    "kv": "KV cache",
    "head": "output head",
}
SPECIAL = re.compile(r"([\\`*_\[\]<>|~&#$])")


def card(metadata: Mapping, exporter: Exporter) -> str:
    """Markdown with YAML front matter.

    exporter: what wrote the files, of which it asks who loads them, and how.
    """
    sections = [
        _front(metadata, exporter),
        f"# {_plain(metadata['name'])}",
        _sentence(metadata),
        "## What it measures",
        _figures(metadata),
        _marks(metadata),
        _floats(metadata, exporter),
        *_texts(metadata),
        "## How it was made",
        fenced(metadata["command"] or "(not recorded)", "sh"),
        _origin(metadata),
        "## How to load it",
        *exporter.loading(metadata["name"], metadata["class"]),
        "## Bits and sizes",
        _bits(metadata),
        _sizes(metadata),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front(metadata: Mapping, exporter: Exporter) -> str:
    """Every value as JSON, which YAML reads: nothing in it can be taken for syntax."""
    layout = exporter.name.replace("_", "-")
    tags = ["quantized", *metadata["formats"], *_methods(metadata), layout]
    fields: dict[str, object] = {}
    if metadata["base_model"]:
        fields["base_model"] = metadata["base_model"]
        fields["base_model_relation"] = "quantized"
    if metadata["license"]:
        fields["license"] = metadata["license"]
    fields["library_name"] = exporter.library
    fields["pipeline_tag"] = "text-generation"
    fields["tags"] = list(dict.fromkeys(tags))
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items()]
    return "\n".join(["---", *lines, "---"])


def _methods(metadata: Mapping) -> list[str]:
    method = metadata["method"]
    return [
        spelled(option)
        for option in (method["transform"], method["solver"], method.get("tune"))
        if option not in (None, "identity", "none")
    ]


def _sentence(metadata: Mapping) -> str:
    parts = [
        f"{PARTS[part]} in {format['format']}{_group(format)}"
        for part, format in metadata["bits"].items()
        if format["bits"] != 16
    ]
    methods = _methods(metadata)
    by = f" by {' and '.join(methods)}" if methods else ""
    revision = f" (revision {_plain(metadata['revision'])})" if metadata["revision"] else ""
    quantized = f"{metadata['quantized']} linear layers quantized"
    model = _plain(metadata["base_model"] or metadata["model"])
    return f"{model}{revision}{by}: {_plain('; '.join([*parts, quantized]))}."


def _figures(metadata: Mapping) -> str:
    """One row a figure, one column a stage, letters of the honesty marks beside the numbers."""
    stages = figures({**metadata, "stages": metadata["evaluation"]})
    marks = letters(metadata["marks"])
    rows = []
    for column in columns(stages.values()):
        source = column.record.source
        percent = " in percent" if column.display.percent else ""
        row = [f"{column.display.title or column.display.label}{percent}, {source}"]
        for stage in stages.values():
            text = stage[column.column].named if column.column in stage else ""
            # a mark belongs to a number: where there is none, the cell stays empty
            row.append(f"{text} {marks.get(source, '')}".strip() if text else "")
        rows.append(row)
    head = ["", *(STAGES.get(stage, stage) for stage in stages)]
    return _table(head, rows) if rows else "Nothing was measured."


def _marks(metadata: Mapping) -> str:
    """What must be said beside the numbers."""
    marks = letters(metadata["marks"])
    lines = [
        f"- {_plain(name)} ({marks[name]}): {_plain(', '.join(reasons))}"
        for name, reasons in metadata["marks"].items()
        if reasons
    ]
    if not lines:
        return ""
    return "\n".join([f"Letters beside a number: {legend(marks.values())}.", "", *lines])


def _texts(metadata: Mapping) -> list[str]:
    """What the untouched model and this one say to the same prompts."""
    rows = metadata["texts"]
    stages = list(dict.fromkeys(stage for row in rows for stage in row if stage != "prompt"))
    if not stages:
        return []
    head = ["prompt", *(STAGES.get(stage, stage) for stage in stages)]
    cells = [[row["prompt"], *(row.get(stage, "") for stage in stages)] for row in rows]
    return ["## What it says", "Greedily, from prompts as they stand.", _table(head, cells)]


def _floats(metadata: Mapping, exporter: Exporter) -> str:
    """What the figures are of and the files are not, where they hold weights alone."""
    bits = metadata["bits"]
    quantized = [PARTS[part] for part in ("activations", "kv") if bits[part]["format"] != "fp16"]
    if not exporter.weights_alone or not quantized:
        return ""
    return (
        f"These files hold weights alone: the figures are with {' and '.join(quantized)} quantized "
        "as below, which a model loaded from them reads as floats."
    )


def _origin(metadata: Mapping) -> str:
    text = metadata["calibration"]
    return (
        f"Run {_plain(metadata['run_id'])}, seed {metadata['seed']}, harness "
        f"{metadata['harness']}. Calibrated on {_plain(text['corpus'])}: {text['windows']} windows "
        f"of {text['length']} tokens, order {_plain(text['order'])}."
    )


def _bits(metadata: Mapping) -> str:
    rows = []
    for part, format in metadata["bits"].items():
        counts = metadata["formats"] if part == "weights" else {}
        name = format["format"]
        if len(counts) > 1:
            name = ", ".join(f"{word} ({count})" for word, count in counts.items())
        scales = _group(format).removeprefix(" ") or "-"
        rows.append([PARTS[part], name, str(format["bits"]), scales])
    return _table(["", "format", "bits", "scales"], rows)


def _group(format: Mapping) -> str:
    """` in groups of 64`, ` per token`; nothing where nothing is scaled."""
    granularity = format["granularity"]
    if granularity is None:
        return ""
    return (
        f" in groups of {format['group_size']}" if granularity == "group" else f" per {granularity}"
    )


def _sizes(metadata: Mapping) -> str:
    size = metadata["sizes"]
    cache = metadata["kv_cache"]
    rows = [
        ["weight files, MB", number(size["before"] / 1e6, 2), number(size["after"] / 1e6, 2)],
        ["KV cache a token, bytes", number(cache["fp16"], 0), number(cache["quantized"], 0)],
    ]
    saved = [number(part["reduction_percent"], 1) for part in (size, cache)]
    return _table(
        ["", "fp16", "this checkpoint", "saved, percent"],
        [[*row, cell] for row, cell in zip(rows, saved)],
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    cells = [[_plain(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [*lines, *cells])


def _plain(text: str) -> str:
    """Text that Markdown takes for nothing but text, on one line."""
    return SPECIAL.sub(r"\\\1", " ".join(str(text).split()))
