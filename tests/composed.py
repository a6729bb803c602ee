"""Composing the real configuration inside a test. Imports no torch."""

import copy
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from harness.calibration.shipped import Pydoc
from harness.command.run import GROUPS
from harness.pipeline.job import Outcome, execute

ROOT = Path(__file__).parent.parent
SMALL = [
    "model=tiny",
    "tracking=local",
    "data.calibration.windows=6",
    "data.calibration.length=64",
    "eval.perplexity.windows=2",
    "eval.perplexity.length=128",
]
# Nats a token from the untouched tiny model: 4 bits take it .02 to .12 away, rows of its values, of
# its MLP or of all in another order .3 to .5. Its perplexity is about as bad as before then.
NEAR = 0.2


def composed(*overrides: str):
    """(configuration, {group: option}) of `python run.py overrides`."""
    given = OverridesParser.create().parse_overrides(list(overrides))
    # Hydra itself refuses several values for a setting
    chosen = [each for each in given if each.key_or_group in GROUPS or each.is_sweep_override()]
    words = {str(each.key_or_group): str(each.input_line) for each in chosen}
    if len(words) == len(chosen) and all(map(alone, words, words.values())):
        cfg, choices = copy.deepcopy(whole())
        for group, word in words.items():
            its, of = whole(word)
            cfg[group], choices[group] = copy.deepcopy(its[group]), of[group]
    else:
        cfg, choices = copy.deepcopy(whole(*(each.input_line for each in chosen)))
    settings = [each for each in given if each not in chosen]
    ConfigLoaderImpl._apply_overrides_to_config(settings, cfg)
    return OmegaConf.create(dict(cfg.items())), choices


@cache
def whole(*overrides: str) -> tuple[DictConfig, dict[str, str | None]]:
    """What Hydra composes of options. Once for each choice of them: it takes as long as all
    forwards of a small run."""
    os.environ["HARNESS_ROOT"] = str(ROOT)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().cfg = None
    del os.environ["HARNESS_ROOT"]
    choices = {group: cfg.hydra.runtime.choices.get(group) for group in GROUPS}
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, choices


@cache
def alone(group: str, word: str) -> bool:
    """Whether the option `word` changes its own group and nothing else, so that what it sets does
    not depend on the options of other groups."""
    without = []
    for cfg, choices in (whole(), whole(word)):
        settings = OmegaConf.to_container(cfg)
        assert isinstance(settings, dict)
        if settings.pop(group, None) is None:
            return False
        without.append((settings, choices | {group: None}))
    return without[0] == without[1]


def small(tmp_path, *overrides: str):
    """A run on the tiny model that takes less than a second, with its results under tmp_path. Its
    corpus is the beginning of pydoc: tokenizing all of that takes longer than the run."""
    text = []
    if not any(override.startswith("data=") for override in overrides):
        folder = tmp_path / "text"
        folder.mkdir(parents=True, exist_ok=True)
        for file, part in (("train.txt", "calibration"), ("test.txt", "evaluation")):
            (folder / file).write_text(Pydoc().text(part)[:8000])
        text = [
            "data=text",
            f"data.path={folder}",
            "data.name=pydoc",
            "eval.perplexity.corpora=[data]",
        ]
    device = os.environ.get("HARNESS_TEST_DEVICE")
    where = [f"device={device}"] if device else []
    return composed(*SMALL, *where, *text, f"run_root={tmp_path / 'runs'}", *overrides)


def run(tmp_path, *overrides: str) -> Outcome:
    """How a small run ended, which may be badly. A name of its own under `tmp_path` is a store of
    its own; the same one again finds what is there."""
    return execute(*small(tmp_path, *overrides))


def done(tmp_path, *overrides: str) -> Outcome:
    """The outcome of a small run that has to end well."""
    outcome = run(tmp_path, *overrides)
    assert outcome.status == "done", outcome.error
    return outcome


def divergence(metrics: Mapping, stage: str = "quantized") -> float:
    """KL, nats a token, of a stage's model from the untouched one, on the text of `small`."""
    return metrics["stages"][stage]["divergence"]["pydoc"]["kl"]
