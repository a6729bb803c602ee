"""Every YAML of conf/ and sweeps/ composes, and what it describes can be built and checked."""

import pytest
from composed import ROOT, composed
from omegaconf import OmegaConf

from harness.components import transforms_of
from harness.config import build, fingerprint
from harness.errors import ConfigError

OPTIONS = [(p.parent.name, p.stem) for p in sorted((ROOT / "conf").glob("*/*.yaml")) + sorted((ROOT / "sweeps").glob("*.yaml"))]
NAMES = ["/".join(option) for option in OPTIONS]
NAMED = ("format", "transform", "solver", "eval", "export")


@pytest.mark.parametrize(("group", "name"), OPTIONS, ids=NAMES)
def test_option_composes_and_says_what_it_is(group, name):
    cfg, choices = composed(f"{group}={name}")
    assert choices[group] == name
    folder = ROOT / group if group == "sweeps" else ROOT / "conf" / group
    lines = [line for line in (folder / f"{name}.yaml").read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# "), "the first comment says what the option is"
    if group in NAMED:
        assert cfg[group].name == name


@pytest.mark.parametrize(("group", "name"), [o for o in OPTIONS if o[0] in ("transform", "solver", "format")])
def test_option_builds(group, name):
    cfg, _ = composed(f"{group}={name}")
    settings = {k: v for k, v in OmegaConf.to_container(cfg[group], resolve=True).items() if k != "name"}
    if (group, name) == ("solver", "none"):
        assert settings == {"_target_": None}
    elif group == "format":
        parts = {part: build(settings[part], group) for part in ("weight", "act", "kv")}
        on = {part for part, format in parts.items() if format}
        assert on == (set() if name == "none" else {"weight", "act", *(["kv"] if "kv" in name else [])})
    elif group == "transform":
        built = {type(transform).__module__ for transform in transforms_of({"name": name, **settings})}
        assert settings["_target_"].rpartition(".")[0] in built
    else:
        assert type(build(settings, group)).__module__ == settings["_target_"].rpartition(".")[0]


@pytest.mark.parametrize("target", ["os.system", "harness_of_another.Thing", "system"])
def test_foreign_targets_are_not_built(target):
    with pytest.raises(ConfigError, match=rf"solver\._target_={target}: only classes of this package"):
        build({"_target_": target, "command": "true"}, "solver")


def test_unknown_fields_get_the_nearest_name():
    with pytest.raises(ConfigError, match=r"solver\.dampp.*damp"):
        build({"_target_": "harness.solvers.GPTQ", "dampp": 1}, "solver")


def test_fingerprint_ignores_order_but_no_value():
    assert fingerprint({"a": 1, "b": [2, 3]}) == fingerprint({"b": [2, 3], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert fingerprint([1, 2]) != fingerprint([2, 1])
