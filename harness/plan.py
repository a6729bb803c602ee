"""A run as decided but not begun: which model, texts, format, transform and solver, and the ids that follow from them.

`quant_id` covers what produces the quantized model, `run_id` adds what is evaluated and how. Both are computed without
torch, so that finished work is shown at once. `components` builds the rest and checks it against the model's config
before any weight is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from harness.calibration.corpus import Corpus, Samples, TextFolder
from harness.checks import integer, known_keys, nearest, one_of
from harness.config import build, fingerprint, option
from harness.errors import ConfigError


@dataclass(frozen=True)
class Windows:
    """`count` windows of `length` tokens (count None: all of the text), in this `order`."""

    count: int | None
    length: int
    order: str = "first"


@dataclass(frozen=True)
class Plan:
    """`settings`: the resolved configuration; `choices`: {group: option}; the rest is built from them, without torch."""

    settings: dict
    choices: dict
    model: object
    calibration_corpus: Corpus
    calibration: Windows
    corpora: tuple[Corpus, ...]
    evaluation: Windows
    quant_id: str = field(init=False)
    run_id: str = field(init=False)
    baseline_id: str = field(init=False)

    def __post_init__(self):
        chosen = self.settings
        model = [self.model.fingerprint(), chosen["model"]["dtype"], chosen["device"]]
        tested = [[c.fingerprint() for c in self.corpora], vars(self.evaluation), chosen["model"]["amp"]]
        read = [self.calibration_corpus.fingerprint(), chosen["data"]["calibration"]]
        made = [model, read, chosen["format"], chosen["transform"], chosen["solver"], chosen["seed"]]
        labels = "-".join(str(self.choices.get(group) or group) for group in ("model", "format", "transform", "solver"))
        rest = {k: v for k, v in chosen["eval"].items() if k not in ("name", "perplexity")}
        object.__setattr__(self, "quant_id", f"{labels}-{fingerprint(made)}")
        object.__setattr__(self, "run_id", f"{labels}-{fingerprint(made, tested, rest, chosen['export'])}")
        object.__setattr__(self, "baseline_id", fingerprint(model, tested, rest))

    def check(self) -> None:
        """Texts and model are there (ConfigError, DataError). Loads no weight, imports no torch unless the model needs it."""
        self.calibration_corpus.check()
        for corpus in self.corpora:
            corpus.check()
        self.model.check()


def make_plan(settings: dict, choices: Mapping[str, str | None]) -> Plan:
    """Build the torch-free parts of a run. Raises ConfigError or DataError."""
    one_of("export", settings["export"]["name"], ("none",))
    data = settings["data"]
    corpus = _corpus(data)
    chosen = data["calibration"]
    known_keys("data.calibration.", chosen, ("windows", "length", "order", "path"))
    own = chosen["path"] is not None
    calibration = Windows(
        integer("data.calibration.windows", chosen["windows"]),
        integer("data.calibration.length", chosen["length"], low=2),
        one_of("data.calibration.order", chosen["order"], ("first", "random")),
    )
    known_keys("eval.", settings["eval"], ("name", "perplexity"))
    perplexity = settings["eval"]["perplexity"]
    known_keys("eval.perplexity.", perplexity, ("windows", "length", "corpora"))
    evaluation = Windows(
        integer("eval.perplexity.windows", perplexity["windows"], optional=True),
        integer("eval.perplexity.length", perplexity["length"], low=2),
    )
    model = build(_unnamed(settings["model"]), "model")
    corpora = {}
    for name in perplexity["corpora"]:
        each = corpus if name == "data" else TextFolder(name) if "/" in str(name) else _corpus(option("data", name))
        each.check()
        corpora.setdefault(each.fingerprint(), each)
    if not corpora:
        raise ConfigError("eval.perplexity.corpora=[]: name at least one, e.g. [data, pydoc].")
    calibration_corpus = Samples(chosen["path"]) if own else corpus
    calibration_corpus.check()
    return Plan(settings, dict(choices), model, calibration_corpus, calibration, tuple(corpora.values()), evaluation)


@dataclass(frozen=True)
class Components:
    """What works on weights: formats, transform, solver (None: weights stay), and the warnings their combination earns."""

    scheme: object
    transform: object
    solver: object
    context: object
    warnings: list[str]


def components(plan: Plan) -> Components:
    """Build formats, transform and solver and check them against the model's real module shapes. Raises ConfigError."""
    from harness.formats import Scheme
    from harness.models.families import family_of, skeleton
    from harness.transforms import Context

    settings = plan.settings
    parts = {k: build(v, f"format.{k}") for k, v in _unnamed(settings["format"]).items()}
    if settings["format"]["overrides"]:
        raise ConfigError("format.overrides: mixed precision per role is not available yet; leave it empty.")
    if parts["kv"] is not None:
        raise ConfigError(f"format.kv.bits={settings['format']['kv']['bits']}: the KV cache stays in float for now; set 16.")
    scheme = Scheme(**parts)
    solver = build(_unnamed(settings["solver"]), "solver") if settings["solver"]["_target_"] else None
    transform = build(_unnamed(settings["transform"]), "transform")
    name = plan.choices.get("solver", "solver")
    if solver is None and scheme.weight is not None:
        raise ConfigError(
            f"format.weight.bits={scheme.weight.bits} with solver=none: nothing would quantize the weights; "
            "use solver=rtn or gptq, or format.weight.bits=16."
        )
    if solver is not None and scheme.weight is None:
        raise ConfigError(f"format.weight.bits=16 with solver={name}: no weight is quantized; set solver=none or a format.")

    config = plan.model.config()
    family = family_of(config)
    block = skeleton(config).get_submodule(family.blocks)[0]
    widths = {site.name: block.get_submodule(site.linears[0]).in_features for site in family.sites}
    longest = getattr(config, "max_position_embeddings", None)
    for where, windows in (("data.calibration", plan.calibration), ("eval.perplexity", plan.evaluation)):
        if longest and windows.length > longest:
            raise ConfigError(f"{where}.length={windows.length} is more than the model's {longest} positions; lower it.")
    for site, width in widths.items():
        for role in ("weight", "act"):
            part = getattr(scheme, role)
            if part is not None:
                part.check(width, f"format.{role}.group_size", site)
    context = Context(widths=widths, scheme=scheme, seed=settings["seed"])
    warnings = list(transform.check(context))
    if solver is not None:
        warnings += solver.check(scheme.weight)
    return Components(scheme, transform, solver, context, warnings)


def _corpus(data: Mapping) -> Corpus:
    return build({k: v for k, v in data.items() if k != "calibration"}, "data")


def _unnamed(section: Mapping) -> dict:
    if "_target_" not in section and "name" not in section:
        raise ConfigError(f"a section without _target_ and name: {section}.{nearest('name', section)}")
    return {k: v for k, v in section.items() if k != "name"}
