"""What an evaluation is, and the flat records that all of them give.

A new one is a class under `Evaluation` in this folder and an option of `conf/eval` that names it:

    evaluations: {entropy: {_target_: harness.evaluation.entropy.Entropy, windows: 2}}

Tables, pages, cards and trackers loop over records, so none of them needs to know of it. Imports
no torch: plans and reports ask evaluations about themselves before there is a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from harness.parallel import ALONE, Ranks

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from harness.evaluation.divergence import Reference
    from harness.formats import KVCache
    from harness.models.adapter import Adapter

Figures = Mapping[str, float | Mapping[str, float | int | None]]


@dataclass(frozen=True)
class Metric:
    """One number. stage: baseline (the untouched model) | transformed | quantized; source: the
    corpus or task it was measured on; stderr: its standard error; n: documents behind it."""

    evaluation: str
    stage: str
    source: str
    metric: str
    value: float
    stderr: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Display:
    """How a metric is shown.

    label: a word above a column; title: in a sentence (None: the label); percent: a share, shown
    times 100; lower_is_better: None where neither is; change: its difference to the untouched
    model has a column; alternative: of all alternatives of an evaluation only the first that a
    source has is shown, with its label beside the number; minor: left out where room is short;
    lost: a value above which no model works.
    """

    label: str
    title: str | None = None
    digits: int = 4
    percent: bool = False
    lower_is_better: bool | None = None
    change: bool = False
    alternative: bool = False
    minor: bool = False
    lost: float | None = None


class Watch(Protocol):
    """Looks on while a text passes: the final hidden states [T, hidden] of the positions from
    `position` of a window, and the logits [T, vocabulary], float32, that the head makes of them."""

    def __call__(self, window: int, position: int, states: Tensor, logits: Tensor, /) -> None: ...


@dataclass(frozen=True)
class Subject:
    """The model of a run at one stage.

    texts: token ids {corpus: [W, L]}; losses: {corpus: [W]}, float64, the summed next-token loss
    of each window in nats; watches: {corpus: what the evaluation's `watch` gave}, after the pass;
    amp: autocast dtype of a forward; reference: the untouched model, whose hidden states lie in
    `hidden` once it was evaluated; folder: for files of this stage; details: what else the
    stage's record shall hold; progress(title, steps): a bar, and what moves it on; ranks: the
    processes that measure it, of which the first one writes.
    """

    stage: str
    adapter: Adapter
    tokenizer: PreTrainedTokenizerBase
    amp: torch.dtype | None
    texts: Mapping[str, Tensor]
    reference: Reference
    hidden: Path
    folder: Path
    progress: Callable[[str, int], AbstractContextManager[Callable[[], None]]]
    ranks: Ranks = ALONE
    losses: dict[str, Tensor] = field(default_factory=dict)
    watches: Mapping[str, Watch] = field(default_factory=dict)
    details: dict[str, object] = field(default_factory=dict)


class Evaluation(ABC):
    """One thing that is measured of a model at every stage; its fields are its settings."""

    displays: ClassVar[Mapping[str, Display]] = {}  # by metric, in the order in which they show
    tabled: ClassVar[bool] = False  # whether trackers get a table, one row a stage and source
    # Whether `measure` puts together what the watches of several ranks saw, each of its share of a
    # text's windows; else every rank's watch sees all of them.
    adds_up: ClassVar[bool] = False

    def fingerprint(self) -> object:
        """What decides its numbers besides the run's model and texts, as plain values; None where
        nothing does."""
        return [f"{type(self).__module__}.{type(self).__qualname__}", vars(self)]

    def check(self) -> None:
        """Raise ConfigError or DataError for what cannot be measured. Loads no weight."""
        return None

    def check_export(self, layout: str, family: object, kv: KVCache | None) -> None:
        """Raise ConfigError for a checkpoint that it could not measure. Loads no weight.

        layout: the option of export, `none` where the run leaves no checkpoint; family: the
        config's model_type; kv: the format of keys and values.
        """
        return None

    def limits(self) -> Mapping[str, int | None]:
        """{source: the most documents that are read of it, None for all}, for honesty marks."""
        return {}

    def watch(self, subject: Subject, corpus: str) -> Watch | None:
        """Who looks on while a text passes: a pass serves all evaluations."""
        return None

    @abstractmethod
    def measure(self, subject: Subject) -> Figures:
        """{corpus or task: {metric: value, metric_stderr: its standard error, "n": documents}}, or
        {corpus or task: value} of an evaluation that has one metric, which bears its name."""

    def exported(self, subject: Subject, folder: Path) -> Figures:
        """The same as `measure` gives, of the run's checkpoint in `folder`, once it is there.

        subject: the model at the stage that was exported. Raises DataError for what cannot be
        measured after all: the run then fails, once all else is stored.
        """
        return {}

    def verify(self, stage: str, figures: Figures) -> None:
        """Raise FloatingPointError for figures of a model that is lost; they are kept by then."""
        return None
