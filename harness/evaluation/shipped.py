"""The evaluations that every run has, and the two that an option of `eval` turns on.

Their names are those of the fields of a stage's record: stages.quantized.ppl, .divergence,
.zeroshot. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from harness.config.build import build
from harness.config.errors import ConfigError
from harness.evaluation.base import Display, Evaluation, Figures, Subject, Watch
from harness.evaluation.generate import TEXTS, Generate
from harness.evaluation.zeroshot import ZeroShot

LOST = 100.0  # a perplexity no working language model has


class Perplexity(Evaluation):
    """Perplexity of the run's texts (perplexity.py)."""

    displays = {
        "ppl": Display("ppl", title="perplexity", lower_is_better=True, change=True, lost=LOST),
    }

    def fingerprint(self) -> None:
        """Nothing but the texts and windows, which every run id covers."""

    def measure(self, subject: Subject) -> Figures:
        from harness.evaluation.perplexity import perplexity

        lengths = {corpus: text.shape[1] for corpus, text in subject.texts.items()}
        subject.details["losses"] = {
            corpus: (losses / (lengths[corpus] - 1)).tolist()
            for corpus, losses in subject.losses.items()
        }
        subject.details["tokens"] = sum(text.numel() for text in subject.texts.values())
        return {
            corpus: perplexity(losses, lengths[corpus]) for corpus, losses in subject.losses.items()
        }

    def verify(self, stage: str, figures: Figures) -> None:
        lost = [
            corpus
            for corpus, value in figures.items()
            if not (isinstance(value, float) and math.isfinite(value))
        ]
        if lost:
            raise FloatingPointError(
                f"the {stage} model's perplexity on {', '.join(lost)} is not finite"
            )


class FromUntouched(Evaluation):
    """Divergence of the next-token distribution from the untouched model's (divergence.py)."""

    displays = {
        "kl": Display("KL", title="KL from the untouched model", lower_is_better=True),
        "top1": Display(
            "top-1",
            title="top-1 agreement with it",
            digits=1,
            percent=True,
            lower_is_better=False,
            minor=True,
        ),
    }

    adds_up = True

    def fingerprint(self) -> None:
        """Nothing but the texts, which every run id covers."""

    def watch(self, subject: Subject, corpus: str) -> Watch:
        if subject.stage == "baseline":
            return subject.reference.recorder(corpus)
        length = subject.texts[corpus].shape[1]
        return subject.reference.compare(corpus, subject.hidden, length, subject.ranks)

    def measure(self, subject: Subject) -> Figures:
        from harness.evaluation.divergence import Divergence

        return {  # nothing of the untouched model, which was recorded and not compared
            corpus: watch.figures
            for corpus, watch in subject.watches.items()
            if isinstance(watch, Divergence)
        }


SHIPPED: dict[str, type[Evaluation]] = {
    "ppl": Perplexity,
    "divergence": FromUntouched,
    "zeroshot": ZeroShot,
    "generate": Generate,
}
RESERVED = ("losses", "tokens", "samples", TEXTS, *SHIPPED)  # what a stage's record holds already


def evaluations(section: Mapping) -> dict[str, Evaluation]:
    """{name: evaluation} of `eval`, in the order in which they are measured. Raises ConfigError."""
    built: dict[str, Evaluation] = {"ppl": Perplexity(), "divergence": FromUntouched()}
    zeroshot = ZeroShot.of(section["zeroshot"])
    if zeroshot is not None:
        built["zeroshot"] = zeroshot
    generate = Generate.of(section.get("generate"))
    if generate is not None:
        built["generate"] = generate
    for name, node in section["evaluations"].items():
        if name in RESERVED or "/" in name:  # trackers make a path of it
            raise ConfigError(f"eval.evaluations.{name}: is taken or no name; choose another.")
        evaluation = build(node, f"eval.evaluations.{name}", Evaluation)
        if isinstance(evaluation, Evaluation):  # None: turned off
            built[name] = evaluation
    return built


def fingerprints(evaluations: Mapping[str, Evaluation]) -> list:
    """What of them a run id covers: those that say nothing leave it as it was before they came."""
    # The name of a shipped one follows from its mark; that of another names fields of the record.
    marks = {name: one.fingerprint() for name, one in evaluations.items()}
    return [
        mark if name in SHIPPED else [name, mark]
        for name, mark in marks.items()
        if mark is not None or name not in SHIPPED
    ]
