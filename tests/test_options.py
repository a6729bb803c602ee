"""Options beside ours: a folder of one's own, and those that installed packages bring."""

import os
import re
import signal
import sys

import pytest
from composed import ROOT
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from test_package import plugin

from harness.checkpoints.record import format_of, spec
from harness.command.main import COMMANDS, main
from harness.config import options, plugins
from harness.config.build import build, option
from harness.config.errors import ConfigError, DataError
from harness.config.search_path import composing
from harness.formats import NVFP4, Format
from harness.pipeline import ids
from harness.quantize.allocation import auto_of
from harness.transforms import Transform

OWN = """
# INT3 in groups of 64.
defaults: [int4, _self_]
name: mine
weight: {bits: 3, group_size: 64}
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder of one's own with a format."""
    monkeypatch.setattr(os, "environ", os.environ | {"HARNESS_CONF": str(tmp_path / "own")})
    (tmp_path / "own" / "format").mkdir(parents=True)
    (tmp_path / "own" / "format" / "mine.yaml").write_text(OWN)
    return tmp_path / "own"


@pytest.fixture
def command(monkeypatch, capfd):
    """The command in this process: words -> (exit status, standard output, standard error)."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["run.py"])

    def call(*words):
        try:
            status = main(words)
        except SystemExit as end:  # Hydra's way out of help
            status = end.code or 0
        return status, *capfd.readouterr()

    yield call
    signal.signal(signal.SIGTERM, before)
    HydraConfig.instance().cfg = None


@pytest.fixture
def flips(tmp_path, monkeypatch):
    """An installed plug-in: its version -> nothing."""

    def install(version):
        plugin(tmp_path / "site", version)
        plugins.plugins.cache_clear()

    install("1.2")
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield install
    plugins.plugins.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "flips"]:
        del sys.modules[name]


def test_an_option_of_ones_own_is_one_like_ours(own, command):
    with composing():
        section = compose("config", ["format=mine", "solver=rtn"]).format
    assert (section.weight.bits, section.weight.group_size, section.act.bits) == (3, 64, 4)
    assert option("format", "mine")["weight"]["bits"] == 3
    assert ids.of_format(option("format", "int4") | {"overrides": {"up_proj": "mine"}}, {})["named"]
    status, out, _ = command("--cfg", "job", "format=mine")
    assert status == 0 and "group_size: 64" in out
    told = command("--help")[1]
    assert "mine, mxfp4" in told
    assert all(re.search(rf"^ *(.*, )?{name} \(", told, re.M) for name in COMMANDS)
    status, _, told = command("format=mien")
    assert status == 2 and "Did you mean mine?" in told


def test_a_candidate_is_the_option_of_its_name(own):
    """intN is int4 with N bits where no option says otherwise; int8 always is."""
    weight = option("format", "int4")["weight"]
    section = {"bits_per_weight": 4.5, "candidates": ["int3", "abc12", "int8", "int16"]}

    def known():
        return ids.of_format(option("format", "int4") | {"auto": section}, {})["named"]

    (own / "format" / "abc12.yaml").write_text(OWN)
    assert build(weight | {"bits": 3}, "", Format) == auto_of(section, weight).candidates["int3"]
    before = known()
    assert before["int4:int3"] == before["int4:int8"]
    assert before["int4:int8"]["weight"] == weight
    (own / "format" / "int3.yaml").write_text(OWN.replace("64", "32"))
    candidates = auto_of(section, weight).candidates
    assert {name: (f.bits, f.group_size) for name, f in candidates.items()} == {
        "int3": (3, 32),
        "abc12": (3, 64),
        "int8": (8, 64),
        "int16": (16, None),
    }
    assert set(known()) == {"int3", "abc12", "int4:int8", "int16"}
    (own / "format" / "abc12.yaml").write_text(OWN.replace("64", "128"))
    assert known()["abc12"] != before["abc12"]


def test_a_folder_that_cannot_serve_is_refused_by_its_name(own, command):
    (own / "format" / "nvfp4.yaml").write_text(OWN)
    status, _, told = command("format=int4")
    assert status == 2 and told.count("\n") == 1
    for word in (str(own / "format" / "nvfp4.yaml"), "harness has an option format/nvfp4 already"):
        assert word in told
    (own / "format" / "nvfp4.yaml").unlink()
    (own / "sweeps").mkdir()
    (own / "sweeps" / "bits.yaml").write_text("# @package _global_\nseed: 7\n")
    status, _, told = command("-m", "sweeps=bits")
    assert status == 2 and "harness has an option sweeps/bits already" in told
    os.environ["HARNESS_CONF"] = str(own / "none")
    status, _, told = command("format=int4")
    assert status == 2 and f"HARNESS_CONF={own / 'none'}: is no folder" in told


def test_a_plug_in_runs_no_code_before_a_class_of_it_is_built(flips, capsys):
    with composing():
        node = compose("config", ["transform=flip"]).transform
    assert "flips" not in sys.modules
    assert "flip" in options.known("transform")
    transform = build({"_target_": node["_target_"]}, "transform", Transform)
    assert type(transform).__module__ == "flips.flip"
    assert capsys.readouterr().out == "flips is imported\n"


def test_ids_know_the_release_of_a_plug_in_and_no_other(flips):
    sections = [option("transform", name) for name in ("flip", "hadamard")]
    first = [ids.of_transform(section) for section in sections]
    assert first[1] == sections[1] and first[0] == sections[0] | {"releases": ["flips==1.2"]}
    flips("1.3")
    again = [ids.of_transform(section) for section in sections]
    assert again[1] == first[1] and again[0] != first[0]


def test_a_checkpoint_names_a_format_of_a_plug_in_where_that_is_installed(flips, tmp_path):
    code = "from harness.formats import NVFP4\n\n\nclass Wide(NVFP4):\n    pass\n"
    package = tmp_path / "site" / "flips"
    (package / "wide.py").write_text(code)
    (package / "trap.py").write_text("raise SystemExit")
    (package / "conf" / "format").mkdir()
    option = "weight:\n  _target_: flips.wide.Wide\nact:\n  _target_: harness.formats.NVFP4\n"
    (package / "conf" / "format" / "wide.yaml").write_text(option)
    wide = build({"_target_": "flips.wide.Wide"}, "format.weight", Format)
    told = spec(wide)
    assert told["_target_"] == "flips.wide.Wide"
    assert format_of(told, "there", Format) == wide
    assert spec(NVFP4())["_target_"] == "harness.formats.NVFP4"

    def refused(*targets):
        for target in targets:
            with pytest.raises(DataError, match=f"there._target_={target}: is no format"):
                format_of(told | {"_target_": target}, "there", Format)

    refused("flips.trap.Wide", "flips.flip.Flip", "harness.solvers.GPTQ", "os.system")
    (package / "conf" / "format" / "torn.yaml").write_text("weight: [")
    with pytest.raises(ConfigError, match=r"torn\.yaml: cannot be read .* install flips==1\.2"):
        format_of(told, "there", Format)
    (tmp_path / "site" / "flips-1.dist-info" / "entry_points.txt").unlink()
    plugins.plugins.cache_clear()
    refused("flips.wide.Wide")


def test_a_plug_in_without_options_is_named(flips, tmp_path, command):
    (tmp_path / "site" / "flips" / "conf").rename(tmp_path / "site" / "flips" / "config")
    plugins.plugins.cache_clear()
    status, _, told = command("format=int4")
    assert status == 2 and "flips==1.2" in told and "harness.plugins=flips" in told


def test_classes_of_packages_that_are_no_plug_in_are_not_built(flips, tmp_path):
    (tmp_path / "site" / "others.py").write_text("raise SystemExit")
    for target in ("others.Flip", "flips.flip.Placement", "flips.flip.torch"):
        with pytest.raises(ConfigError, match=f"transform._target_={target}"):
            build({"_target_": target}, "transform", Transform)


def test_a_checkout_and_its_options_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert options.checkout() == ROOT and options.conf() == ROOT / "conf"
    assert "bits" in options.known("sweeps") and {"sweeps", "format"} <= set(options.groups())
