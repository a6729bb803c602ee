"""Odd values in every setting of many options: each ends in a finished run, or in one line that
names the setting, before anything is written. A key that no option has is refused wherever it
stands.

Each choice of options tries a sample of its settings and values, drawn by the choice's name; what
passes the checks is run.
"""

import random
from io import StringIO

import pytest
from composed import small
from omegaconf import OmegaConf
from rich.console import Console

from harness.config.errors import ConfigError, DataError
from harness.pipeline.job import execute
from harness.report.progress import Reporter

ODD = (None, "foo", "", -1, 0, 1e9, True, [], {}, 3.7, float("nan"))
DRAWN = 60
INT4 = ["format=int4", "format.weight.group_size=32"]
WHIP = ["transform.r1.epochs=1", "transform.r2.epochs=1"]
LEARNED = ["transform.steps=1", "transform.batch=1"]
CHOICES = {
    "gptq": ["format=nvfp4", "solver=gptq"],
    "awq": [*INT4, "solver=awq", "solver.grid=3", "transform=quarot"],
    "adascale": [
        "format=w4a4kv4",
        "format.weight.group_size=32",
        "solver=adascale",
        "solver.iterations=2",
    ],
    "untouched": ["format=none", "solver=none", "eval=zeroshot", "eval.zeroshot.limit=1"],
    "auto": ["format=auto", "solver=rtn", "format.auto.candidates=[int4,nvfp4]"],
    "overrides": [
        *INT4,
        "solver=rtn",
        "format.overrides={down_proj: 8, first_1: {act: 16}}",
        "transform=pca",
    ],
    "hadamard": [
        "format=mxfp4",
        "solver=rtn",
        "transform=hadamard",
        "transform.smooth={alpha: 0.5, sites: null}",
    ],
    "spinquant": ["format=fouroversix", "solver=rtn", "transform=spinquant", *LEARNED],
    "adacodec": ["format=nvfp4", "solver=rtn", "transform=adacodec", *LEARNED],
    "dartquant": ["format=int8", "solver=minmax", "transform=dartquant", *WHIP],
    "jointquant": [*INT4, "solver=rtn", "transform=jointquant", *WHIP],
    "ablation": [*INT4, "solver=rtn", "transform=identity_low_rank"],
    "exported": ["format=int8", "solver=rtn", "export=compressed_tensors", "transform=smoothquant"],
}


def nodes(config, prefix=""):
    """(name, whether it is a group of settings) of everything below `config`."""
    for key in config:
        name, value = f"{prefix}{key}", config._get_node(key)
        group = OmegaConf.is_dict(value) and not value._is_none()
        yield name, group
        yield from nodes(value, f"{name}.") if group else ()


def cases(config, drawn):
    """(setting, value): a sample of odd values, and an unknown key in every group."""
    found = list(nodes(config))
    known = [
        name
        for name, _ in found
        if "." in name and not name.endswith("_target_") and name != "tracking.wandb"
    ]
    odd = [(name, value) for name in known for value in ODD]
    unknown = [(f"{name}.nope", 1) for name, group in found if group]
    return [*drawn.sample(odd, DRAWN), *unknown]


def refusal(config, choices, name):
    """The message of a run that could not begin, None of one that ended."""
    try:
        outcome = execute(
            config, choices, reporter=Reporter(Console(file=StringIO())), overrides=[f"{name}=odd"]
        )
    except (ConfigError, DataError) as error:
        return str(error)
    assert outcome.status == "done", outcome.error
    return None


@pytest.mark.parametrize("choice", CHOICES)
def test_every_value_is_run_or_refused_in_one_line(tmp_path, monkeypatch, choice):
    plain, choices = small(tmp_path, *CHOICES[choice])
    plain.run_root, plain = "runs", OmegaConf.to_container(plain)
    drawn, refused = random.Random(choice), 0
    for index, (name, value) in enumerate(cases(OmegaConf.create(plain), drawn)):
        folder = tmp_path / str(index)
        folder.mkdir()
        monkeypatch.chdir(folder)
        config = OmegaConf.create(plain)
        OmegaConf.update(config, name, value, merge=False, force_add=True)
        told = refusal(config, choices, name)
        if told is None:
            assert not name.endswith(".nope")
            continue
        refused += 1
        assert name.rpartition(".")[2] in told, (name, value)
        assert "\n" not in told, (name, value)
        assert list(folder.iterdir()) == [], (name, value)
    assert refused > DRAWN / 2
