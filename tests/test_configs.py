"""Every YAML of conf/ and sweeps/ composes, and what it describes can be built and checked."""

import re
from collections.abc import Mapping

import pytest
from composed import ROOT, composed, whole
from density import settings as texts
from density import wide
from format_parts import PARTS
from hydra.errors import HydraException
from omegaconf import OmegaConf

from harness.config.build import build, fingerprint
from harness.config.checks import typed
from harness.config.errors import ConfigError
from harness.formats import Format
from harness.models.hub import Hub
from harness.models.source import ModelSource
from harness.pipeline.transforms import transforms_of
from harness.solvers import Solver
from harness.tune import Tuner

OPTIONS = [
    (p.parent.name, p.stem)
    for p in sorted((ROOT / "conf").glob("*/*.yaml")) + sorted((ROOT / "sweeps").glob("*.yaml"))
]
NAMES = ["/".join(option) for option in OPTIONS]
NAMED = ("format", "transform", "solver", "tune", "eval", "export")


@pytest.mark.parametrize(("group", "name"), OPTIONS, ids=NAMES)
def test_option_composes_and_says_what_it_is(group, name):
    cfg, choices = composed(f"{group}={name}")
    assert choices[group] == name
    folder = ROOT / group if group == "sweeps" else ROOT / "conf" / group
    lines = [
        line
        for line in (folder / f"{name}.yaml").read_text().splitlines()
        if not line.startswith("# @package")
    ]
    assert lines[0].startswith("# "), "the first comment says what the option is"
    if group in NAMED:
        assert cfg[group].name == name


def test_no_line_of_settings_is_longer_than_one_of_code():
    assert [where for path in texts() for where in wide(path)] == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["transform.steps=3", "transform=adacodec", "seed=1", "run_root=a b"],
        ["experiment=leaderboard", "format=int4", "format.weight.group_size=null", "recipe=wush"],
        ["format=mxfp4", "solver=awq", "transform=quarot", "eval=zeroshot", "solver.grid=5"],
        ["model=tiny", "transform=wush", "tune=scales", "format=w4a4kv4"],
        ["model=checkpoint", "model.path=/of/somebody", "data=c4"],
        ["+format.overrides.down_proj={bits: 8}", "~tune", "export=none", "data=text"],
    ],
    ids=str,
)
def test_settings_on_options_composed_before_are_what_hydra_composes(overrides):
    cfg, choices = whole.__wrapped__(*overrides)
    composed(*overrides)  # leaves what the next is made of as it was
    found, chosen = composed(*overrides)
    assert OmegaConf.to_container(found) == OmegaConf.to_container(cfg)
    assert chosen == choices


@pytest.mark.parametrize("setting", ["seed=1,2", "format=int4,nvfp4", "format.width=1", "seeds=1"])
def test_what_hydra_refuses_is_refused(setting):
    with pytest.raises(HydraException) as told:
        whole.__wrapped__(setting)
    with pytest.raises(type(told.value), match=re.escape(str(told.value))):
        composed(setting)


def test_help_lists_what_hydra_leaves_out():
    shown = OmegaConf.load(ROOT / "conf" / "config.yaml").hydra.help.template
    (sweeps,), (launchers,) = (
        re.findall(rf"^{group}: (.*)$", shown, re.M) for group in ("sweeps", "hydra/launcher")
    )
    assert sweeps.split(", ") == [name for group, name in OPTIONS if group == "sweeps"]
    assert {path.stem for path in (ROOT / "conf" / "hydra" / "launcher").glob("*.yaml")} < set(
        launchers.split(", ")
    )


@pytest.mark.parametrize(
    ("group", "name"), [o for o in OPTIONS if o[0] in ("transform", "solver", "tune", "format")]
)
def test_option_builds(group, name):
    cfg, _ = composed(f"{group}={name}")
    settings = {
        k: v for k, v in OmegaConf.to_container(cfg[group], resolve=True).items() if k != "name"
    }
    if (group, name) in (("solver", "none"), ("tune", "none")):
        assert settings == {"_target_": None}
    elif group == "format":
        for part, base in PARTS.items():
            section, built = settings[part], build(settings[part], group, base)
            bits = section.get("bits")
            assert (built is None) == (bits == 16), "16 bits switch a part off, and nothing else"
            if built is not None:
                assert type(built).__name__ == section["_target_"].rpartition(".")[2]
                assert bits in (None, built.bits), "a class may have one width alone"
    elif group == "transform":
        built = {
            type(transform).__module__ for transform in transforms_of({"name": name, **settings})
        }
        assert settings["_target_"].rpartition(".")[0] in built
    else:
        base = {"solver": Solver, "tune": Tuner}[group]
        assert (
            type(build(settings, group, base)).__module__ == settings["_target_"].rpartition(".")[0]
        )


@pytest.mark.parametrize("target", ["os.system", "harness_of_another.Thing", "system"])
def test_foreign_targets_are_not_built(target):
    with pytest.raises(
        ConfigError, match=rf"solver\._target_={target}: only classes of this package"
    ):
        build({"_target_": target, "command": "true"}, "solver", Solver)


@pytest.mark.parametrize(
    "target",
    [
        "harness.store.Path",
        "harness.report.page.write_page",
        "harness.formats.NVFP4",
        "harness.solvers.Solution",
        "harness.solvers.nowhere",
        "harness.nowhere.GPTQ",
    ],
)
def test_only_our_own_classes_of_the_kind_that_is_wanted_are_built(target):
    """Not what a module imported, no function, no class that belongs elsewhere."""
    with pytest.raises(
        ConfigError,
        match=rf"solver\._target_={target}: (no class of this package that can|there is no such)",
    ):
        build({"_target_": target}, "solver", Solver)


def test_values_stay_plain(tmp_path):
    """A target inside a value builds nothing, wherever the value came from."""
    page = {
        "_target_": "harness.report.page.write_page",
        "root": str(tmp_path),
        "path": str(tmp_path / "page.html"),
    }
    for target, key, base in (
        ("harness.formats.NVFP4", "mse", Format),
        ("harness.solvers.GPTQ", "damp", Solver),
    ):
        with pytest.raises(ConfigError, match=rf"^there\.{key}"):
            build({"_target_": target, key: page}, "there", base)
    assert list(tmp_path.iterdir()) == []


OFF = [
    ("format.kv.clip_k", "foo"),
    ("format.kv.nope", 1),
    ("format.act.mse", 3),
    ("format.act.symmetric", 1),
    ("format.weight.group_size", 1.5),
    ("format.weight.nope", 1),
]


@pytest.mark.parametrize(("field", "value"), OFF, ids=str)
def test_what_is_off_is_checked_too(field, value):
    section = OmegaConf.to_container(composed("format=int4")[0].format, resolve=True)
    _, part, key = field.split(".")
    with pytest.raises(ConfigError, match=rf"^{field}"):
        build(section[part] | {"bits": 16, key: value}, f"format.{part}", PARTS[part])
    assert build(section[part] | {"bits": 16}, f"format.{part}", PARTS[part]) is None


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [
        (1, float, True),
        (True, float, False),
        (True, int, False),
        (1.0, int, False),
        (1, bool, False),
        (None, int | None, True),
        ("a", int | str, True),
        (["a"], tuple[str, ...], True),
        (["a", 1], list[str], False),
        ("a", list[str], False),
        ({"a": 1}, Mapping[str, int], True),
        ({"a": "b"}, Mapping[str, int], False),
        ([], Mapping, False),
        (None, str, False),
    ],
)
def test_a_type_means_the_same_everywhere(value, hint, fits):
    if fits:
        typed("there.", {"key": value}, {"key": hint})
    else:
        with pytest.raises(ConfigError, match=r"^there\.key=.*: needs "):
            typed("there.", {"key": value}, {"key": hint})


def test_unknown_fields_get_the_nearest_name():
    with pytest.raises(ConfigError, match=r"solver\.dampp.*damp"):
        build({"_target_": "harness.solvers.GPTQ", "dampp": 1}, "solver", Solver)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"family": "qwen"}, r"model\.family=qwen: .*Did you mean qwen3 or qwen2"),
        ({"dtype": "bfloat"}, r"model\.dtype=bfloat: .*Did you mean bfloat16"),
        ({"amp": "bf16"}, r"model\.amp=bf16: .*Legal: null, bfloat16\.$"),
        ({"seed": -1}, r"model\.seed=-1: needs a whole number of at least 0\.$"),
    ],
)
def test_a_models_settings_are_refused_as_all_others(setting, says):
    with pytest.raises(ConfigError, match=f"^{says}"):
        build({"_target_": "harness.models.tiny.Tiny"} | setting, "model", ModelSource)


def test_only_what_comes_from_the_hub_has_code_to_trust():
    trusting = {"_target_": "harness.models.hub.Hub", "path": "a/b", "trust_remote_code": True}
    assert isinstance(build(trusting, "model", ModelSource), Hub)
    with pytest.raises(ConfigError, match=r"^model\.trust_remote_code: no such setting"):
        build(
            {"_target_": "harness.models.tiny.Tiny", "trust_remote_code": True},
            "model",
            ModelSource,
        )


def test_fingerprint_ignores_order_but_no_value():
    assert fingerprint({"a": 1, "b": [2, 3]}) == fingerprint({"b": [2, 3], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert fingerprint([1, 2]) != fingerprint([2, 1])
