"""Zero-shot accuracy through lm-eval, on the model object itself.

A task is shipped, a .jsonl file of eval.zeroshot.data_path, or one of lm-eval by name (of
include_path, else its own, which need the hub); tasks.py says how lm-eval takes it.

Requests are padded to a batch, except where an activation is read on a scale that spans tokens:
padding and neighbours would be part of it, so each request is then a forward of its own. lm-eval
seeds the global generators unless told not to, and it is told not to; what it draws is undone.
"""

from __future__ import annotations

import hashlib
import io
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_type_hints

import numpy

from harness.config.checks import integer, typed
from harness.config.errors import ConfigError, DataError
from harness.config.extras import need
from harness.evaluation.agreement import NAME
from harness.evaluation.base import Display, Evaluation, Figures, Subject
from harness.evaluation.documents import read
from harness.evaluation.tasks import (
    METRICS,
    configured,
    figures_of,
    refuse_unknown,
    sample,
    show_examples,
)
from harness.parallel import ALONE, Ranks
from harness.store import write_checked

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        settings = {each.name: hints[each.name] for each in fields(cls)}
        typed("eval.zeroshot.", section, settings, needed=("tasks",))
        tasks = section["tasks"]
        if not tasks or len(set(tasks)) < len(tasks):
            raise ConfigError(
                f"eval.zeroshot.tasks={tasks}: needs a list of tasks, each once, e.g. [agreement]."
            )
        integer("eval.zeroshot.limit", section.get("limit"), optional=True)
        integer("eval.zeroshot.batch_size", section.get("batch_size", 8))
        shots = section.get("shots")
        counts = shots if isinstance(shots, Mapping) else {"shots": shots}
        for task, count in counts.items():
            integer(f"eval.zeroshot.{task}", count, low=0, optional=True)
        for field in ("data_path", "include_path"):
            if section.get(field) is not None and not Path(str(section[field])).is_dir():
                raise DataError(f"eval.zeroshot.{field}={section[field]}: is no folder.")
        zeroshot = cls(**{**section, "tasks": tuple(tasks)})
        for path in map(zeroshot.file, tasks):
            if path is not None:
                read(path)
        return zeroshot

    def file(self, name: str) -> Path | None:
        """The file that holds a task, if one does."""
        if self.data_path is None:
            return None
        path = Path(self.data_path) / f"{name}.jsonl"
        return path if path.is_file() else None

    def fingerprint(self) -> list:
        """What decides its numbers, as plain values: what is in the files, not where they lie."""
        shots = dict(self.shots) if isinstance(self.shots, Mapping) else self.shots
        texts: dict[str, str | None] = dict.fromkeys(self.tasks)
        for name in self.tasks:
            path = self.file(name)
            if path is not None:
                texts[name] = _digest(path.read_bytes())
        return [texts, self._included(), self.limit, shots]

    def _included(self) -> str | None:
        """A digest of the task files of include_path; None where there are none."""
        if self.include_path is None:
            return None
        paths = [path for path in sorted(Path(self.include_path).rglob("*")) if path.is_file()]
        content = b"".join(str(path).encode() + path.read_bytes() for path in paths)
        return _digest(content) if paths else None

    def check(self) -> None:
        """Raise ConfigError where lm-eval or what it needs is not installed, and for a task that is
        neither a file, nor shipped, nor known to lm-eval. Reading its list takes seconds."""
        for library in ("lm_eval", "datasets", "accelerate"):
            need(library, "eval.zeroshot", extra="zeroshot")
        named = [name for name in self.tasks if self.file(name) is None and name != NAME]
        if named:
            refuse_unknown(named, self.include_path)

    def limits(self) -> Mapping[str, int | None]:
        return dict.fromkeys(self.tasks, self.limit)

    def measure(self, subject: Subject) -> Figures:
        with subject.progress(f"zero-shot {subject.stage}", len(self.tasks)) as advance:
            figures, samples = zeroshot(
                subject.adapter.model, subject.tokenizer, self, subject.amp, advance, subject.ranks
            )
        subject.details["samples"] = {  # digests; a file holds what every document got
            task: subject.ranks.lead(
                partial(write_checked, subject.folder / f"{task}.json", answers)
            )
            for task, answers in samples.items()
        }
        return figures


def tasks_for_lm_eval(settings: ZeroShot) -> list[dict | str]:
    """Every task as lm-eval takes it: a configuration with its documents, or a name."""
    return [configured(name, settings.file(name)) for name in settings.tasks]


def zeroshot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: ZeroShot,
    amp: torch.dtype | None = None,
    advance: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> tuple[dict[str, dict], dict[str, list[dict]]]:
    """({task: {metric: value, metric_stderr: value, "n": documents}}, {task: [one dict a
    document]}).

    model: a causal language model; amp: autocast dtype of its forward; advance: called after each
    task; ranks: each answers its share of the documents.
    """
    from lm_eval import evaluate
    from lm_eval.tasks import TaskManager

    from harness.evaluation.requests import SharedLM

    tasks = tasks_for_lm_eval(settings)
    named = any(isinstance(task, str) for task in tasks)
    manager = TaskManager(
        include_path=settings.include_path, include_defaults=named and settings.include_path is None
    )
    shots = settings.shots
    if not isinstance(shots, Mapping):
        shots = dict.fromkeys(settings.tasks, shots)
    # lm-eval's decorators hide what these two take, so it is passed as what it is: by name.
    wrapping = {
        "pretrained": model,
        # what hears stands among those that translate, in lm-eval's view
        "backend": "causal",
        "tokenizer": tokenizer,
        "batch_size": together(model, settings.batch_size),
        "mixed_precision_dtype": amp,
    }
    lm = SharedLM(ranks, **wrapping)
    figures, samples = {}, {}
    for name, task in zip(settings.tasks, tasks):
        # simple_evaluate does these three and lists the packages of the machine, for seconds
        with _undisturbed():
            chosen = manager.load([task])
            show_examples(chosen["tasks"], shots.get(name))
            options = {"lm": lm, "task_dict": chosen, "limit": settings.limit}
            answers: dict = dict(evaluate(**options, bootstrap_iters=100) or {})
        # lm-eval gives none to who is not the first process of its machine
        for key, result in answers.get("results", {}).items():
            figures[key] = figures_of(result, answers["n-samples"].get(key, {}).get("effective"))
        for key, read_documents in answers.get("samples", {}).items():
            samples[key] = [sample(document) for document in read_documents]
        advance()
    return ranks.gather((figures, samples))[0]


def together(model: PreTrainedModel, batch_size: int) -> int:
    """Requests in one forward: batch_size, or one where an activation's scale spans tokens."""
    from harness.libraries import compressed_tensors
    from harness.models.quant_linear import SiteInput

    for module in model.modules():
        act = module.format if isinstance(module, SiteInput) else None
        if (act is not None and act.spans_tokens) or compressed_tensors.spans_tokens(module):
            return 1
    return batch_size


@contextmanager
def _undisturbed() -> Iterator[None]:
    """lm-eval warns of every task that brings its own documents, draws from the global generators
    and shows bars of its own: all as before after it."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    python = random.getstate()
    arrays = numpy.random.get_state()
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        random.setstate(python)
        numpy.random.set_state(arrays)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
