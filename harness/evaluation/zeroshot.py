"""Zero-shot accuracy through lm-eval, on the model object itself.

A task is `agreement` (shipped, agreement.py), a .jsonl file of eval.zeroshot.data_path, or a task
of lm-eval by name (of include_path, else its own, which need the hub). A file holds one of

    {"query", "choices", "gold"}     which continuation is likeliest; acc by log-likelihood, acc_norm by that over its bytes
    {"context", "continuation"}      whether the continuation is what greedy decoding gives (LAMBADA), and its perplexity

Requests are padded to a batch, except where an activation is read on a scale that spans tokens:
padding and neighbours would be part of it, so each request is then a forward of its own. lm-eval
seeds the global generators unless told not to, and it is told not to; what it draws is undone.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_type_hints

import numpy

from harness.config.checks import integer, nearest, typed
from harness.config.errors import ConfigError, DataError
from harness.evaluation.agreement import NAME, documents
from harness.evaluation.base import Display, Evaluation, Figures, Subject
from harness.store import write_checked

CHOICE, CONTINUATION = ("query", "choices", "gold"), ("context", "continuation")
METRICS = ("acc_norm", "acc", "exact_match", "mc2", "mc1")  # the first of a task is the one shown


@dataclass(frozen=True)
class ZeroShot(Evaluation):
    """tasks: names; data_path: a folder of .jsonl files; include_path: a folder of lm-eval task
    files; limit: documents a task; shots: examples before each document, one number or {task:
    number}, null: as the task says; batch_size: of requests."""

    tasks: tuple[str, ...]
    data_path: str | None = None
    include_path: str | None = None
    limit: int | None = None
    shots: int | Mapping[str, int | None] | None = None
    batch_size: int = 8

    displays = {
        metric: Display(
            metric,
            title="accuracy",
            digits=1,
            percent=True,
            lower_is_better=False,
            alternative=True,
        )
        for metric in METRICS
    }
    tabled = True

    @classmethod
    def of(cls, section: Mapping | None) -> ZeroShot | None:
        """From `eval.zeroshot`; None where it is off. Raises ConfigError."""
        if section is None:
            return None
        hints = get_type_hints(cls)
        settings = {field.name: hints[field.name] for field in fields(cls)}
        typed("eval.zeroshot.", section, settings, needed=("tasks",))
        tasks = section["tasks"]
        if not tasks or len(set(tasks)) < len(tasks):
            raise ConfigError(
                f"eval.zeroshot.tasks={tasks}: needs a list of tasks, each once, e.g. [agreement]."
            )
        integer("eval.zeroshot.limit", section.get("limit"), optional=True)
        integer("eval.zeroshot.batch_size", section.get("batch_size", 8))
        shots = section.get("shots")
        for task, count in (shots if isinstance(shots, Mapping) else {"shots": shots}).items():
            integer(f"eval.zeroshot.{task}", count, low=0, optional=True)
        for field in ("data_path", "include_path"):
            if section.get(field) is not None and not Path(str(section[field])).is_dir():
                raise DataError(f"eval.zeroshot.{field}={section[field]}: is no folder.")
        chosen = cls(**{**section, "tasks": tuple(tasks)})
        for name in tasks:
            if chosen.file(name) is not None:
                _read(chosen.file(name))
        return chosen

    def file(self, name: str) -> Path | None:
        """The file that holds a task, if one does."""
        path = None if self.data_path is None else Path(self.data_path) / f"{name}.jsonl"
        return path if path is not None and path.is_file() else None

    def fingerprint(self) -> list:
        """What decides its numbers, as plain values."""
        shots = dict(self.shots) if isinstance(self.shots, Mapping) else self.shots
        texts = {
            name: path and hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            for name in self.tasks
            for path in [self.file(name)]
        }
        files = (
            []
            if self.include_path is None
            else [p for p in sorted(Path(self.include_path).rglob("*")) if p.is_file()]
        )
        included = hashlib.sha256(
            b"".join(str(path).encode() + path.read_bytes() for path in files)
        ).hexdigest()[:16]
        return [texts, included if files else None, self.limit, shots]

    def check(self) -> None:
        """Raise ConfigError for a task that is neither a file, nor shipped, nor known to lm-eval.
        Reading its list takes seconds."""
        named = [name for name in self.tasks if self.file(name) is None and name != NAME]
        if named:
            from lm_eval.tasks import TaskManager

            known = TaskManager(
                include_path=self.include_path, include_defaults=self.include_path is None
            ).all_tasks
            for name in named:
                if name not in known:
                    raise ConfigError(
                        f"eval.zeroshot.tasks: there is no task {name}.{nearest(name, [*known, NAME])} Tasks are "
                        "files of eval.zeroshot.data_path, agreement, and those of lm-eval."
                    )

    def limits(self) -> Mapping[str, int | None]:
        return dict.fromkeys(self.tasks, self.limit)

    def measure(self, subject: Subject) -> Figures:
        with subject.progress(f"zero-shot {subject.stage}", len(self.tasks)) as advance:
            figures, samples = zeroshot(
                subject.adapter.model, subject.tokenizer, self, subject.amp, advance
            )
        subject.details["samples"] = {  # digests; a file holds what every document got
            task: write_checked(subject.folder / f"{task}.json", answers)
            for task, answers in samples.items()
        }
        return figures


def tasks_for_lm_eval(chosen: ZeroShot) -> list:
    """Every task as lm-eval takes it: a configuration with its documents, or a name."""
    return [_configured(chosen, name) for name in chosen.tasks]


def zeroshot(
    model, tokenizer, chosen: ZeroShot, amp=None, advance: Callable[[], None] = lambda: None
) -> tuple[dict, dict]:
    """({task: {metric: value, metric_stderr: value, "n": documents}}, {task: [one dict a
    document]}).

    model: a causal language model; amp: autocast dtype of its forward; advance: called after each
    task.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = tasks_for_lm_eval(chosen)
    named = any(isinstance(task, str) for task in tasks)
    manager = TaskManager(
        include_path=chosen.include_path, include_defaults=named and chosen.include_path is None
    )
    shots = (
        chosen.shots
        if isinstance(chosen.shots, Mapping)
        else dict.fromkeys(chosen.tasks, chosen.shots)
    )
    batch = together(model, chosen)
    wrapped = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch, mixed_precision_dtype=amp
    )
    figures, samples = {}, {}
    for name, task in zip(chosen.tasks, tasks):
        with _undisturbed():
            found = simple_evaluate(
                wrapped,
                tasks=[task],
                num_fewshot=shots.get(name),
                limit=chosen.limit,
                task_manager=manager,
                log_samples=True,
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
                bootstrap_iters=100,
            )
        for key, result in found["results"].items():
            figures[key] = _figures(result, found["n-samples"].get(key, {}).get("effective"))
        for key, kept in found.get("samples", {}).items():
            samples[key] = [_sample(one) for one in kept]
        advance()
    return figures, samples


def together(model, chosen: ZeroShot) -> int:
    """Requests in one forward: batch_size, or one where an activation's scale spans tokens."""
    from harness.libraries import compressed_tensors
    from harness.models.quant_linear import SiteInput

    for module in model.modules():
        own = module.format if isinstance(module, SiteInput) else None
        if (own is not None and own.spans_tokens) or compressed_tensors.spans_tokens(module):
            return 1
    return chosen.batch_size


@contextmanager
def _undisturbed() -> Iterator[None]:
    """lm-eval warns of every task that brings its own documents, draws from the global generators
    and shows bars of its own: all as before after it."""
    logger = logging.getLogger("lm_eval")
    level, drawn, arrays = logger.level, random.getstate(), numpy.random.get_state()
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        random.setstate(drawn)
        numpy.random.set_state(arrays)


def _configured(chosen: ZeroShot, name: str):
    from datasets import Dataset, DatasetDict

    path = chosen.file(name)
    if path is None and name != NAME:
        return name
    rows = documents() if path is None else _read(path)

    def load(**_):
        return DatasetDict({"test": Dataset.from_list(rows)})

    common = {
        "task": name,
        "custom_dataset": load,
        "test_split": "test",
        "metadata": {"version": 1},
    }
    if "context" in rows[0]:
        metrics = [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ]
        texts = {
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{' ' + continuation}}",
            "target_delimiter": "",
        }
        return common | texts | {"output_type": "loglikelihood", "metric_list": metrics}
    own = name == NAME and path is None  # both answers are of one length, but not in bytes
    metrics = [
        {"metric": m, "aggregation": "mean", "higher_is_better": True}
        for m in ("acc", "acc_norm")[: 1 if own else 2]
    ]
    text = "{{query}}" if own else "{{query.rstrip() + '\\nAnswer:'}}"
    return common | {
        "output_type": "multiple_choice",
        "doc_to_text": text,
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": metrics,
    }


def _read(path: Path) -> list[dict]:
    """The documents of a file, one a line that ends in \\n, with the keys of their kind alone.
    Raises DataError naming the line."""
    try:
        content = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"eval.zeroshot: {path} is not UTF-8 ({error.reason} at byte {error.start}); convert it."
        ) from None
    rows = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise DataError(f"eval.zeroshot: {path} line {number} is not JSON.") from None
        kinds = {CHOICE: _is_choice, CONTINUATION: _is_continuation}
        own = next(
            (keys for keys, fits in kinds.items() if isinstance(row, dict) and fits(row)), None
        )
        if own is None:
            raise DataError(
                f"eval.zeroshot: {path} line {number} has neither query, choices (texts), gold (the index of "
                "one) nor context and continuation (texts)."
            )
        rows.append({key: row[key] for key in own})
    if not rows or any(row.keys() != rows[0].keys() for row in rows):
        raise DataError(f"eval.zeroshot: {path} is empty or mixes two kinds of documents.")
    return rows


def _is_choice(row: Mapping) -> bool:
    query, choices, gold = (row.get(key) for key in ("query", "choices", "gold"))
    texts = isinstance(choices, list) and all(isinstance(text, str) for text in [query, *choices])
    return texts and type(gold) is int and 0 <= gold < len(choices)


def _is_continuation(row: Mapping) -> bool:
    return all(isinstance(row.get(key), str) for key in ("context", "continuation"))


def _figures(result: Mapping, count: int | None) -> dict:
    """lm-eval's {"acc,none": .., "acc_stderr,none": ..} without filters' names (the last filter of
    a metric stands)."""
    figures = {
        key.partition(",")[0]: value for key, value in result.items() if isinstance(value, float)
    }
    return figures | {"n": count}


def _sample(kept: Mapping) -> dict:
    """What stays of one document: which one, its metrics, the log-likelihood of every answer."""
    scores = [
        answer[0] if isinstance(answer, tuple | list) else answer
        for answer in kept["filtered_resps"]
    ]
    own = {key: kept[key] for key in METRICS if isinstance(kept.get(key), int | float)}
    return {
        "doc": kept["doc_id"],
        **own,
        "scores": [score for score in scores if isinstance(score, int | float)],
    }
