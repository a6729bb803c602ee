"""Composing the real configuration inside a test. Imports no torch."""

import os
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from harness.calibration.shipped import Pydoc

ROOT = Path(__file__).parent.parent
GROUPS = (
    "model",
    "data",
    "format",
    "transform",
    "solver",
    "tune",
    "eval",
    "export",
    "tracking",
    "recipe",
    "experiment",
    "sweeps",
)
SMALL = [
    "model=tiny",
    "tracking=local",
    "data.calibration.windows=6",
    "data.calibration.length=64",
    "eval.perplexity.windows=2",
    "eval.perplexity.length=128",
]


def composed(*overrides: str):
    """(configuration, {group: option}) of `python run.py overrides`."""
    os.environ["HARNESS_ROOT"] = str(ROOT)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=list(overrides), return_hydra_config=True)
    choices = {group: cfg.hydra.runtime.choices.get(group) for group in GROUPS}
    HydraConfig.instance().cfg = None
    del os.environ["HARNESS_ROOT"]
    plain = {k: v for k, v in cfg.items() if k != "hydra"}
    from omegaconf import OmegaConf

    return OmegaConf.create(plain), choices


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
    return composed(*SMALL, *text, f"run_root={tmp_path / 'runs'}", *overrides)
