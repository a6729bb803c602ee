"""A run as decided but not begun: what it consists of, and the ids that follow from that.

`quant_id` covers what produces the quantized model, `run_id` adds what is evaluated and how: ids.py
says of what. Both need no torch, so that finished work is shown at once. build.py builds the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from harness.calibration.corpus import Corpus
from harness.config.build import build, fingerprint
from harness.config.checks import integer, one_of, typed
from harness.evaluation.base import Evaluation
from harness.evaluation.shipped import evaluations
from harness.models.source import ModelSource
from harness.pipeline import ids
from harness.pipeline.sections import (
    check_export,
    check_files,
    check_fixed,
    check_serves,
    setting_of,
)
from harness.pipeline.texts import (
    Windows,
    calibrating,
    check_texts,
    corpus_of,
    evaluated,
    names_of,
    windows_of,
)
from harness.tracking import Tracker

BOS = ("auto", "first", "window", "none")


@dataclass(frozen=True)
class Plan:
    """What a run consists of, as far as it is built without torch.

    settings: the resolved configuration. choices: {group: option}. calibration_corpora,
    calibration: the texts that calibrate in turn, and their windows; corpora, evaluation: those
    that are evaluated. bos: where a BOS stands in them. experts: which tokens calibrate routed
    experts. evaluations: {name: what is measured}. given: settings that the command line names.

    quant_id, tune_id, run_id, baseline_id: the keys under which the store keeps the solved blocks,
    what a tuner made of them (empty: there is none), the result, and the untouched model's figures.
    """

    settings: dict
    choices: dict[str, str | None]
    model: ModelSource
    calibration_corpora: tuple[Corpus, ...]
    calibration: Windows
    corpora: tuple[Corpus, ...]
    evaluation: Windows
    evaluations: Mapping[str, Evaluation]
    tracker: Tracker
    bos: str = "auto"
    experts: str = "routed"
    given: tuple[str, ...] = ()
    quant_id: str = field(init=False)
    tune_id: str = field(init=False)
    run_id: str = field(init=False)
    baseline_id: str = field(init=False)

    def __post_init__(self):
        settings = self.settings
        model = self._model()
        tested = ids.of_evaluation(
            self.corpora, self.evaluation, self.model.amp, self.evaluations, self.bos
        )
        # What makes the quantized model, and so which runs share solved blocks.
        made = [
            model,
            self._format(),
            self._transform(),
            ids.of_solver(settings["solver"]),
            settings["seed"],
        ]
        if self.quantizes:  # errors of layers are kept with the blocks
            made.append(settings["eval"]["layer_windows"])
        if self.calibrates:
            made += self._calibration()
        # For people who look into the store; the digits behind them tell runs apart.
        labels = "-".join(
            str(self.choices.get(group) or group)
            for group in ("model", "format", "transform", "solver")
        )
        tuned = ids.of_tune(settings["tune"])
        found = {
            "quant_id": f"{labels}-{fingerprint(made)}",
            # Beside solved blocks, whose key says all else.
            "tune_id": fingerprint(tuned, self.model.amp) if tuned else "",
            "run_id": f"{labels}-{fingerprint(made, tested, settings['export'], *tuned)}",
            "baseline_id": fingerprint(model, tested),
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)  # frozen, and computed from the rest

    @property
    def device_kind(self) -> str:
        """cpu or cuda; numbers depend on that and on nothing finer."""
        return ids.device_kind(self.settings["device"])

    @property
    def calibrated(self) -> tuple[str, ...]:
        """Names of the corpora whose texts calibrate."""
        return names_of(self.calibration_corpora, self.corpora) if self.calibrates else ()

    @property
    def enough(self) -> int | None:
        """An expert with fewer tokens is calibrated on all of its layer's; None: every one is."""
        if self.experts == "all":
            return None
        return self.settings["solver"].get("min_tokens", ids.MIN_TOKENS)

    @property
    def quantizes(self) -> bool:
        """Whether any weight, activation, key or value is quantized."""
        section = self.settings["format"]
        return bool(section["overrides"]) or any(
            section[part].get("bits") != 16 for part in ("weight", "act", "kv")
        )

    @property
    def calibrates(self) -> bool:
        """Whether the calibration text can matter."""
        section = self.settings["transform"]
        return (
            self.quantizes
            or not str(section.get("_target_")).endswith(".Identity")
            or section.get("smooth") is not None
        )

    def fit_id(self, part: int, sees: tuple[str, ...], settled: tuple[object, ...] = ()) -> str:
        """The key of what one part of the transform learns, seeing these parts of the format, and
        with what is settled by it; the solver never changes it."""
        section = self._format()
        formats = [*(section[name] for name in sees), *settled]
        # Overrides may be of any part that is seen.
        if sees and section["overrides"]:
            formats += [section["overrides"], section.get("named")]
        transform = {key: value for key, value in self._transform().items() if key != "name"}
        return fingerprint(
            self._model(), transform, part, formats, self._calibration(), self.settings["seed"]
        )

    @property
    def learned_id(self) -> str:
        """The key of a file that keeps what the transform learned, whatever parts of the format it
        sees."""
        return self.fit_id(0, ("act", "kv"))

    def allocation_id(self) -> str:
        """The key of what format=auto measures of its candidates, whatever the budget and the
        solver."""
        formats = self._format()
        measured = [formats["weight"], formats["auto"]["candidates"], formats.get("named")]
        return fingerprint(
            self._model(),
            self._transform(),
            measured,
            self._calibration(),
            self.settings["seed"],
        )

    def _model(self) -> list:
        """What of the model and the machine changes numbers."""
        return [self.model.fingerprint(), self.model.dtype, self.device_kind]

    def _calibration(self) -> list:
        """What of the calibration text changes numbers."""
        texts = self.calibration_corpora
        return ids.of_calibration(texts, self.calibration, self.bos, self.experts)

    def _format(self) -> dict:
        """What of the format changes numbers."""
        return ids.of_format(self.settings["format"], self.settings["export"])

    def _transform(self) -> dict:
        """What of the transform changes numbers."""
        return ids.of_transform(self.settings["transform"])

    def check(self) -> None:
        """Texts and model are there and the texts long enough (ConfigError, DataError). Loads no
        weight."""
        texts = self.calibration_corpora if self.calibrates else ()
        for corpus in texts:
            corpus.check()
        for evaluation in self.evaluations.values():
            evaluation.check()
        for corpus in self.corpora:
            corpus.check()
        self.model.check()
        check_texts(texts, self.calibration, self.corpora, self.evaluation)


def make_plan(
    settings: dict, choices: Mapping[str, str | None], overrides: Sequence[str] = ()
) -> Plan:
    """Build the torch-free parts of a run.

    overrides: those of the command line. Raises ConfigError or DataError.
    """
    check_fixed(settings, choices, overrides)
    check_export(settings["export"])
    if not settings["solver"].get("_target_"):
        typed("solver.", settings["solver"], {"name": str, "_target_": None})
    if not settings["tune"].get("_target_"):
        typed("tune.", settings["tune"], {"name": str, "_target_": None})
    check_serves(settings["export"])
    check_files(settings["transform"])
    data = settings["data"]
    one_of("data.calibration.activations", data["calibration"]["activations"], ("memory", "disk"))
    corpus = corpus_of(data)
    calibration = windows_of("data.calibration", data["calibration"])
    integer("eval.layer_windows", settings["eval"]["layer_windows"], optional=True)
    evaluation = windows_of("eval.perplexity", settings["eval"]["perplexity"])
    model = build(settings["model"], "model", ModelSource)
    corpora = evaluated(settings["eval"]["perplexity"]["corpora"], corpus)
    return Plan(
        settings=settings,
        choices=dict(choices),
        model=model,
        calibration_corpora=calibrating(data["calibration"], calibration, corpus),
        calibration=calibration,
        corpora=corpora,
        evaluation=evaluation,
        evaluations=evaluations(settings["eval"]),
        tracker=build(settings["tracking"], "tracking", Tracker),
        experts=one_of(
            "data.calibration.experts",
            data["calibration"].get("experts", "routed"),
            ("routed", "all"),
        ),
        bos=one_of("data.bos", data.get("bos", "auto"), BOS),
        given=tuple(name for name in map(setting_of, overrides) if "." in name),
    )
