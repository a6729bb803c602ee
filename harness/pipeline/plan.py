"""A run as decided but not begun: which model, texts, format, transform and solver, and the ids that follow from them.

`quant_id` covers what produces the quantized model, `run_id` adds what is evaluated and how. Both are computed without
torch, so that finished work is shown at once. build.py builds the rest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from harness.calibration.corpus import Corpus, Samples, TextFolder
from harness.config.build import ROOT, build, fingerprint, option
from harness.config.checks import integer, known_keys, one_of, typed
from harness.config.errors import ConfigError, DataError
from harness.evaluation.base import Evaluation
from harness.evaluation.shipped import evaluations, fingerprints
from harness.models.source import ModelSource
from harness.tracking import Tracker

NAMES = dict.fromkeys(("base", "dataset", "training", "peft"), str | None)
SERVES = {  # what an export may say of how its engine computes, whatever the format
    "scale_dtype": ("float32", "bf16", "fp16", "input"),
    "compute_dtype": ("float32", "input"),
    "zp_order": ("round_then_add", "add_then_round"),
    "zp_range": ("unsigned", "signed"),
}
EXPORT = {  # common to all exporters; what else an option has goes to its class
    "name": str,
    "_target_": str,
    "path": str,
    **NAMES,
    "push_to": str | None,
    "serves": Mapping[str, Mapping[str, str]],
}


@dataclass(frozen=True)
class Windows:
    """`count` windows of `length` tokens (count None: all of the text), in this `order`."""

    count: int | None
    length: int
    order: str = "first"

    def within(self, tokens: int) -> Windows:
        """Those of a text of so many tokens: where all of it is taken, it may be one shorter window
        (of two tokens at least, so that there is one to predict)."""
        return (
            self
            if self.count is not None
            else replace(self, length=max(2, min(self.length, tokens)))
        )


@dataclass(frozen=True)
class Plan:
    """`settings`: the resolved configuration; `choices`: {group: option}; `given`: settings that the command line names. The
    rest is built from them, without torch."""

    settings: dict
    choices: dict
    model: object
    calibration_corpus: Corpus
    calibration: Windows
    corpora: tuple[Corpus, ...]
    evaluation: Windows
    evaluations: Mapping[str, Evaluation]
    tracker: Tracker
    given: tuple[str, ...] = ()
    quant_id: str = field(init=False)
    run_id: str = field(init=False)
    baseline_id: str = field(init=False)

    def __post_init__(self):
        chosen = self.settings
        model = self._model()
        tested = [
            [[c.name, c.fingerprint("evaluation")] for c in self.corpora],
            vars(self.evaluation),
            self.model.amp,
        ]
        tested += fingerprints(self.evaluations)
        made = [model, self._format(), self._transform(), chosen["solver"], chosen["seed"]]
        if self.quantizes:
            made.append(chosen["eval"]["layer_windows"])
        if self.calibrates:
            made += [self.calibration_corpus.fingerprint("calibration"), vars(self.calibration)]
        labels = "-".join(
            str(self.choices.get(group) or group)
            for group in ("model", "format", "transform", "solver")
        )
        object.__setattr__(self, "quant_id", f"{labels}-{fingerprint(made)}")
        object.__setattr__(
            self, "run_id", f"{labels}-{fingerprint(made, tested, chosen['export'])}"
        )
        object.__setattr__(self, "baseline_id", fingerprint(model, tested))

    @property
    def device_kind(self) -> str:
        """cpu or cuda; numbers depend on that and on nothing finer. Looks for a device file, so that torch stays out."""
        name = self.settings["device"]
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        there = any(Path("/dev").glob("nvidia[0-9]*")) and not hidden
        return ("cuda" if there else "cpu") if name == "auto" else name.partition(":")[0]

    @property
    def calibrated(self) -> str | None:
        """Name of the corpus whose text calibrates: that of an evaluated one where it is the same text, whoever named it."""
        if not self.calibrates:
            return None
        mark = self.calibration_corpus.fingerprint("calibration")
        same = (
            c.name
            for c in self.corpora
            if not isinstance(c, Samples) and c.fingerprint("calibration") == mark
        )
        return next(same, self.calibration_corpus.name)

    @property
    def quantizes(self) -> bool:
        """Whether any weight, activation, key or value is quantized."""
        chosen = self.settings["format"]
        return bool(chosen["overrides"]) or any(
            chosen[part].get("bits") != 16 for part in ("weight", "act", "kv")
        )

    @property
    def calibrates(self) -> bool:
        """Whether the calibration text can matter."""
        chosen = self.settings["transform"]
        return (
            self.quantizes
            or not str(chosen.get("_target_")).endswith(".Identity")
            or chosen.get("smooth") is not None
        )

    def fit_id(self, part: int, sees: tuple[str, ...]) -> str:
        """The key of what one part of the transform learns, seeing these parts of the format; the solver never changes it."""
        chosen = self.settings
        formats = [chosen["format"][name] for name in sees]
        if sees and chosen["format"]["overrides"]:
            formats += [chosen["format"]["overrides"], self._format().get("named")]
        text = [self.calibration_corpus.fingerprint("calibration"), vars(self.calibration)]
        own = {key: value for key, value in self._transform().items() if key != "name"}
        return fingerprint(self._model(), own, part, formats, text, chosen["seed"])

    @property
    def learned_id(self) -> str:
        """The key of a file that keeps what the transform learned, whatever parts of the format it sees."""
        return self.fit_id(0, ("act", "kv"))

    def allocation_id(self) -> str:
        """The key of what format=auto measures of its candidates, whatever the budget and the solver."""
        chosen, formats = self.settings, self._format()
        measured = [formats["weight"], formats["auto"]["candidates"], formats.get("named")]
        text = [self.calibration_corpus.fingerprint("calibration"), vars(self.calibration)]
        return fingerprint(self._model(), self._transform(), measured, text, chosen["seed"])

    def _model(self) -> list:
        """What of the model and the machine changes numbers."""
        return [self.model.fingerprint(), self.model.dtype, self.device_kind]

    def _format(self) -> dict:
        """The format's settings, with what stands behind the options that overrides and candidates name, and what changes
        those."""
        chosen = self.settings["format"]
        candidates = {
            f"int4:{name}" if name[3:].isdigit() else name for name in _strings(chosen["auto"])
        }  # intN is int4's
        names = candidates | set(_strings(chosen["overrides"]))
        found = {
            name: option("format", name.partition(":")[0])
            for name in sorted(names)
            if _is_option(name.partition(":")[0])
        }
        if found and self.settings["export"].get("serves"):
            found["serves"] = self.settings["export"]["serves"]
        return {**chosen, "named": found} if found else chosen

    def _transform(self) -> dict:
        """The transform's settings as far as they change a number: not where its matrices go, and what is in a file read."""
        chosen = {key: value for key, value in self.settings["transform"].items() if key != "save"}
        path = chosen.get("load")
        if isinstance(path, str) and Path(path).is_file():
            chosen["load"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
        return chosen

    def check(self) -> None:
        """Texts and model are there and the texts long enough (ConfigError, DataError). Loads no weight."""
        if self.calibrates:
            self.calibration_corpus.check()
        for evaluation in self.evaluations.values():
            evaluation.check()
        for corpus in self.corpora:
            corpus.check()
        self.model.check()
        for corpus in self.corpora:
            _long_enough("eval.perplexity", self.evaluation, corpus.text("evaluation"))
        if self.calibrates and self.calibration.count is not None:
            _long_enough(
                "data.calibration", self.calibration, self.calibration_corpus.text("calibration")
            )
        tested = {corpus.fingerprint("evaluation") for corpus in self.corpora}
        if self.calibrates and self.calibration_corpus.fingerprint("calibration") in tested:
            raise ConfigError(
                f"data.calibration.path={self.settings['data']['calibration']['path']} is the text that is evaluated; "
                "calibrate on another one."
            )


def make_plan(
    settings: dict, choices: Mapping[str, str | None], overrides: Sequence[str] = ()
) -> Plan:
    """Build the torch-free parts of a run. overrides: those of the command line. Raises ConfigError or DataError."""
    _check_fixed(settings, choices, overrides)
    data, chosen = settings["data"], settings["data"]["calibration"]
    export = settings["export"]
    if export.get("_target_"):
        common = {key: value for key, value in export.items() if key in EXPORT}
        typed("export.", common, EXPORT, needed=EXPORT.keys() - {"serves"})
    else:
        known = {key: EXPORT[key] for key in ("name", "serves")}
        typed("export.", export, known, needed=("name",))
    if not settings["solver"].get("_target_"):
        typed("solver.", settings["solver"], {"name": str, "_target_": None})
    for part, rules in export.get("serves", {}).items():
        known_keys(f"export.serves.{part}.", rules, SERVES)
        for key, value in rules.items():
            one_of(f"export.serves.{part}.{key}", value, SERVES[key])
    files = {
        key: settings["transform"][key] for key in ("save", "load") if key in settings["transform"]
    }
    typed("transform.", files, dict.fromkeys(files, str | None))
    one_of("data.calibration.activations", chosen["activations"], ("memory", "disk"))
    corpus = _corpus(data)
    calibration = Windows(
        integer("data.calibration.windows", chosen["windows"], optional=True),
        integer("data.calibration.length", chosen["length"], low=2),
        one_of("data.calibration.order", chosen["order"], ("first", "random")),
    )
    integer("eval.layer_windows", settings["eval"]["layer_windows"], optional=True)
    perplexity = settings["eval"]["perplexity"]
    evaluation = Windows(
        integer("eval.perplexity.windows", perplexity["windows"], optional=True),
        integer("eval.perplexity.length", perplexity["length"], low=2),
    )
    model = build(settings["model"], "model", ModelSource)
    corpora: dict[str, Corpus] = {}
    if not perplexity["corpora"]:
        raise ConfigError(
            "eval.perplexity.corpora=[]: needs at least one corpus, e.g. [data, pydoc]."
        )
    for name in perplexity["corpora"]:
        each = corpus if name == "data" else _other("eval.perplexity.corpora", name)
        mark = each.fingerprint("evaluation")
        if any(other.name == each.name and key != mark for key, other in corpora.items()):
            raise ConfigError(
                f"eval.perplexity.corpora: two different texts are called {each.name}; set data.name to another."
            )
        corpora.setdefault(mark, each)
    calibration_corpus = corpus if chosen["path"] is None else Samples(chosen["path"])
    return Plan(
        settings,
        dict(choices),
        model,
        calibration_corpus,
        calibration,
        tuple(corpora.values()),
        evaluation,
        evaluations(settings["eval"]),
        build(settings["tracking"], "tracking", Tracker),
        tuple(key for key in map(_key, overrides) if "." in key),
    )


def _check_fixed(
    settings: Mapping, choices: Mapping[str, str | None], overrides: Sequence[str]
) -> None:
    """Refuse what looks like a setting and is what an option is: its name, its class."""
    for group in ("format", "transform", "solver", "eval", "export"):
        name = settings[group].get("name")
        if choices.get(group) not in (None, name):
            raise ConfigError(
                f"{group}.name={name}: is no setting, it is what the option is called; choose {group}={name}."
            )
    for override in overrides:
        if "_target_" in override and not _key(override).startswith("format.overrides"):
            raise ConfigError(
                f"{override}: the class is no setting, the option of {override.partition('.')[0]} decides it."
            )


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _long_enough(field: str, windows: Windows, text: str | list[str]) -> None:
    """Refuse a text with fewer bytes than tokens asked for; the exact count needs the tokenizer and comes later."""
    available, wanted = (
        sum(len(part.encode()) for part in ([text] if isinstance(text, str) else text)),
        windows.length,
    )
    wanted *= windows.count or 1
    if available < wanted:
        raise DataError(
            f"{field}.windows={windows.count} of {field}.length={windows.length} tokens need {wanted} tokens, the text has "
            f"{available} bytes; lower one of them, or give a longer text."
        )


def _other(field: str, name: str) -> Corpus:
    """An evaluation corpus by the name of a data option, or by its folder."""
    try:
        corpus = TextFolder(name) if "/" in name else _corpus(option("data", name))
        corpus.fingerprint("evaluation")
        return corpus
    except (ConfigError, DataError) as error:
        raise type(error)(f"{field}={name}: {error}") from None


def _strings(value) -> list[str]:
    """All strings among the values of nested settings."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, str):
        return [value]
    return [found for item in value for found in _strings(item)] if isinstance(value, list) else []


def _is_option(name: str) -> bool:
    """Whether conf/format has it; what it has not is refused when the format is built."""
    return (ROOT / "conf" / "format" / f"{name}.yaml").is_file()


def _corpus(data: Mapping) -> Corpus:
    return build(
        {k: v for k, v in data.items() if k not in ("calibration", "beside")}, "data", Corpus
    )


def unnamed(section: Mapping) -> dict:
    """A group's settings without the option's name, which no class takes."""
    return {k: v for k, v in section.items() if k != "name"}
