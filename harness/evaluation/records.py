"""Metrics as flat records: metrics.json's `records`, and how a reader gets at them.

    records     [{"evaluation", "stage", "source", "metric", "value", "stderr", "n"}]
    displays    {evaluation: {metric: fields of Display}} of evaluations that are not shipped, so
                that a report shows them without their code

What was stored before there were records has the fields of its stages (ppl, divergence, zeroshot),
and its records follow from those. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict

from harness.evaluation.base import Display, Evaluation, Metric
from harness.evaluation.shipped import SHIPPED

ERROR = "_stderr"  # ends the key of a metric's standard error


def records(stages: Mapping[str, Mapping], names: Collection[str] = tuple(SHIPPED)) -> list[Metric]:
    """The records that the fields of stages hold. names: which fields are evaluations."""
    return [
        metric
        for stage, fields in stages.items()
        for name in names
        for source, figures in (fields.get(name) or {}).items()
        for metric in _metrics(name, stage, source, figures)
    ]


def _metrics(name: str, stage: str, source: str, figures: object) -> list[Metric]:
    """A bare number is the metric that bears the evaluation's name."""
    if not isinstance(figures, Mapping):
        return [Metric(name, stage, source, name, _number(figures))]
    count = figures.get("n")
    return [
        Metric(name, stage, source, key, _number(value), figures.get(f"{key}{ERROR}"), count)
        for key, value in figures.items()
        if key != "n" and key.removesuffix(ERROR) not in figures.keys() - {key}
    ]


def _number(value) -> float:
    """JSON has no NaN: what was not finite is stored as null."""
    return math.nan if value is None else value


def stored(metrics: Mapping) -> list[Metric]:
    """The records of a run, from its metrics.json."""
    flat = metrics.get("records")
    if not flat:
        return records(metrics.get("stages") or {})
    return [Metric(**record | {"value": _number(record["value"])}) for record in flat]


def plain(
    evaluations: Mapping[str, Evaluation], stages: Mapping[str, Mapping]
) -> dict[str, object]:
    """The fields `records` and `displays` of metrics.json; the latter only where there are any."""
    fields: dict[str, object] = {
        "records": [asdict(metric) for metric in records(stages, evaluations)]
    }
    displays = {
        name: {metric: asdict(display) for metric, display in evaluation.displays.items()}
        for name, evaluation in evaluations.items()
        if name not in SHIPPED
    }
    if displays:
        fields["displays"] = displays
    return fields


def described(metrics: Mapping) -> dict[str, dict[str, Display]]:
    """{evaluation: {metric: how it is shown}}: of the shipped ones, and of those a run brought."""
    described = {name: dict(evaluation.displays) for name, evaluation in SHIPPED.items()}
    for name, displays in (metrics.get("displays") or {}).items():
        brought = {metric: Display(**fields) for metric, fields in displays.items()}
        described.setdefault(name, brought)
    return described


def summary(metrics: Iterable[Metric]) -> dict[str, float | int]:
    """{evaluation/stage/source/metric: value}, with metric_stderr and n; a metric that bears the
    evaluation's name goes without its own."""
    values: dict[str, float | int] = {}
    for one in metrics:
        source = f"{one.evaluation}/{one.stage}/{one.source}"
        key = source if one.metric == one.evaluation else f"{source}/{one.metric}"
        values[key] = one.value
        if one.stderr is not None:
            values[f"{key}{ERROR}"] = one.stderr
        if one.n is not None:
            values[f"{source}/n"] = one.n
    return values


def rows(name: str, stages: Mapping[str, Mapping]) -> list[dict]:
    """An evaluation's figures as a table: {"stage", "task", metric: value, ...} a row."""
    return [
        {"stage": stage, "task": source, **figures}
        for stage, fields in stages.items()
        for source, figures in fields.get(name, {}).items()
    ]
