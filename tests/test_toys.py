"""A new format, exporter, tracker, transform, solver or tuner is one Python file and one YAML.

Each of those under tests/toys is put into a copy of the project, where nothing else is changed, and
used from the command line; what is parametrised over conf/ meets it, too.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from composed import NEAR, ROOT, SMALL, divergence
from safetensors.torch import load_file

from harness.calibration.shipped import Pydoc

TOYS = ROOT / "tests" / "toys"
ROOMS = {
    "format": "formats",
    "export": "checkpoints",
    "tracking": "tracking",
    "transform": "transforms",
    "solver": "solvers",
    "tune": "tune",
}
LOAD = """
import sys, torch, harness
model, tokenizer = harness.load(sys.argv[1])
ids = tokenizer("def f(x):", return_tensors="pt").input_ids
block = model.model.layers[0].self_attn
assert torch.isfinite(model(ids).logits).all()
print(harness.__file__, type(block.q_proj.site.format).__name__, sep="\\n")
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project with every toy in place, and a short text beside it."""
    folder = tmp_path_factory.mktemp("copy")
    unwanted = shutil.ignore_patterns("__pycache__", "golden", "toys", "test_toys.py")
    for name in ("harness", "conf", "sweeps", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for name in ("run.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for group, room in ROOMS.items():
        shutil.copy(TOYS / group / "toy.py", folder / "harness" / room)
        shutil.copy(TOYS / group / "toy.yaml", folder / "conf" / group)
    (folder / "text").mkdir()
    for file, part in (("train.txt", "calibration"), ("test.txt", "evaluation")):
        (folder / "text" / file).write_text(Pydoc().text(part)[:8000])
    return folder


@pytest.fixture
def python(copy):
    """Runs Python in the copy, which is what it imports: arguments -> CompletedProcess."""
    # the copy goes first, then wherever the libraries are
    path = os.pathsep.join(filter(None, (str(copy), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}

    def command(*arguments):
        line = [sys.executable, *map(str, arguments)]
        return subprocess.run(
            line, cwd=copy, env=env, capture_output=True, text=True, timeout=300, check=False
        )

    return command


@dataclass(frozen=True)
class Outcome:
    """How a command of run.py ended; where there is no run, no metrics and no folder of one."""

    status: int
    told: str
    metrics: dict
    folder: Path | None


@pytest.fixture
def run(python, tmp_path):
    """Runs run.py on the tiny model, once a test: overrides -> Outcome."""
    text = ["data=text", "data.path=text", "data.name=pydoc", "eval.perplexity.corpora=[data]"]
    root = f"run_root={tmp_path / 'runs'}"

    def command(*overrides):
        got = python("run.py", *SMALL, *text, root, *overrides)
        stored = next((tmp_path / "runs").glob("[!_]*/metrics.json"), None)
        metrics = {} if stored is None else json.loads(stored.read_text())
        return Outcome(got.returncode, got.stderr, metrics, stored and stored.parent)

    return command


@pytest.fixture
def exports(tmp_path):
    """The setting that has checkpoints lie beside the results."""
    return f"export.path={tmp_path / 'exports'}"


def test_a_format_runs_is_exported_and_loaded_back(run, python, copy, exports):
    got = run("format=toy", "solver=rtn", "export=harness", exports)
    assert got.status == 0, got.told
    assert 0 < divergence(got.metrics) < NEAR
    assert got.metrics["bits_per_weight"] == 5  # 4 and a float32 for 32
    exported = got.metrics["export"]
    assert exported["name"] == "tiny-llama-RTN_wpoweroftwo4_g32_apoweroftwo4_kv16_headfp16"
    loaded = python("-c", LOAD, exported["path"])
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split() == [str(copy / "harness" / "__init__.py"), "PowerOfTwo"]


@pytest.mark.parametrize(
    ("part", "off"),
    [
        ("weight", ["format.act.bits=16", "solver=rtn"]),
        ("act", ["format.weight.bits=16", "solver=none"]),
    ],
    ids=["weight", "act"],
)
def test_a_layout_refuses_a_format_that_it_does_not_know(run, tmp_path, exports, part, off):
    got = run("format=toy", *off, "export=compressed_tensors", exports)
    assert got.status == 2, got.told
    assert len(got.told.strip().splitlines()) == 1, got.told
    for word in (f"format.{part}", "PowerOfTwo", "export=compressed_tensors", "export=harness"):
        assert word in got.told
    assert list(tmp_path.iterdir()) == [], "before any weight"


def test_an_exporter_writes_a_checkpoint_with_a_setting_and_a_file_of_its_own(run, exports):
    weights = ["format=int4", "format.act.bits=16", "solver=rtn"]
    got = run(*weights, "export=toy", "export.half=true", exports)
    assert got.status == 0, got.told
    exported = got.metrics["export"]
    assert exported["name"] == "tiny-llama-RTN_w4_g64_a16_kv16_headfp16"
    assert exported["weights"] == 14, "every weight was compared with what is loaded"
    evaluated, loaded = exported["ppl"]["pydoc"]
    assert loaded == pytest.approx(evaluated, rel=0.005)
    folder = Path(exported["path"])
    assert exported["sizes"]["after"] == (folder / "weights.toy").stat().st_size
    text = (folder / "README.md").read_text()
    assert 'library_name: "toys"' in text
    loading = text.partition("## How to load it\n\n")[2].partition("\n\n## ")[0]
    assert loading == f"With toys:\n\n```sh\ntoys {exported['name']}/weights.toy\n```"


def test_a_tracker_is_told_the_summary_beside_the_local_files(run, tmp_path):
    told = tmp_path / "told.jsonl"
    got = run("format=none", "solver=none", "tracking=toy", f"tracking.file={told}")
    assert got.status == 0, got.told
    summary = json.loads(told.read_text())
    assert summary["run_id"] == got.metrics["run_id"]
    assert summary["ppl/baseline/pydoc"] == got.metrics["stages"]["baseline"]["ppl"]["pydoc"]
    local = json.loads((got.folder / "tracking" / "summary.json").read_text())
    assert local.items() <= summary.items()


def test_a_transform_passes_the_gate_and_a_solver_quantizes(run):
    got = run("format=nvfp4", "transform=toy", "solver=toy", "solver.factor=0.98")
    assert got.status == 0, got.told
    assert got.metrics["notes"]["gate"]["max"] < 1e-4
    assert 0 < divergence(got.metrics) < NEAR
    assert {layer["factor"] for layer in got.metrics["layers"]} == {0.98}


def test_a_tuner_changes_what_was_solved(run, exports):
    got = run("format=fp4", "solver=rtn", "tune=toy", "tune.factor=1.25", "export=harness", exports)
    assert got.status == 0, got.told
    assert got.metrics["notes"]["grown"] == 1.25
    assert got.metrics["export"]["name"].startswith("tiny-llama-RTN.Toy_")
    assert 0 < divergence(got.metrics) < NEAR
    grown, solved = sorted((got.folder / "blocks").glob("0001.*"), key=lambda path: len(path.name))[
        ::-1
    ]
    name = "mlp.up_proj.scale"
    assert torch.allclose(load_file(grown)[name], 1.25 * load_file(solved)[name])


def test_what_is_parametrised_over_options_meets_the_toys(python):
    """They compose and build, keep to the arithmetic of formats, and meet every other option."""
    files = [f"tests/test_{name}.py" for name in ("configs", "formats", "pipeline", "matrix")]
    got = python("-m", "pytest", "-p", "no:cacheprovider", *files, "-k", "toy")
    assert got.returncode == 0, got.stdout
