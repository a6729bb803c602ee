"""A new format, exporter, tracker, transform or solver is one Python file and one YAML.

Each of those under tests/toys is put into a copy of the project, where nothing else is changed, and
used from the command line; what is parametrised over conf/ meets it, too.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from composed import ROOT, SMALL

from harness.calibration.shipped import Pydoc

TOYS = ROOT / "tests" / "toys"
ROOMS = {
    "format": "formats",
    "export": "checkpoints",
    "tracking": "tracking",
    "transform": "transforms",
    "solver": "solvers",
}
FORMAT = ["format=toy", "solver=rtn"]
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
def python(copy, tmp_path):
    """A command of Python that imports the copy, run in it; results lie under tmp_path."""
    env = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(copy)}

    def command(*arguments):
        line = [sys.executable, *map(str, arguments)]
        return subprocess.run(
            line, cwd=copy, env=env, capture_output=True, text=True, timeout=300, check=False
        )

    return command


@pytest.fixture
def run(python, tmp_path):
    """A run on the tiny model: its outcome, with .metrics and .path where it was computed."""
    text = ["data=text", "data.path=text", "data.name=pydoc", "eval.perplexity.corpora=[data]"]
    exports = f"export.path={tmp_path / 'exports'}"

    def command(*overrides):
        place = [exports] if any(word.startswith("export=") for word in overrides) else []
        root = f"run_root={tmp_path / 'runs'}"
        got = python("run.py", *SMALL, *text, root, *place, *overrides)
        stored = list((tmp_path / "runs").glob("[!_]*/metrics.json"))
        if stored:
            (got.metrics,) = (json.loads(path.read_text()) for path in stored)
            got.path = stored[0].parent
        return got

    return command


def quantized(metrics, stage="baseline"):
    """Perplexity as quantized over that of another stage."""
    stages = metrics["stages"]
    return stages["quantized"]["ppl"]["pydoc"] / stages[stage]["ppl"]["pydoc"]


def test_a_format_runs_is_exported_and_loaded_back(run, python, copy):
    got = run(*FORMAT, "export=harness")
    assert got.returncode == 0, got.stderr
    assert quantized(got.metrics) == pytest.approx(1, rel=0.2)
    assert quantized(got.metrics) != 1
    assert got.metrics["bits_per_weight"] == 5  # 4 and a float32 for 32
    exported = got.metrics["export"]
    assert exported["name"] == "tiny-llama-RTN_wpoweroftwo4_g32_apoweroftwo4_kv16_headfp16"
    loaded = python("-c", LOAD, exported["path"])
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split() == [str(copy / "harness" / "__init__.py"), "PowerOfTwo"]


@pytest.mark.parametrize("part", ["weight", "act"])
def test_a_layout_refuses_a_format_that_it_does_not_know(run, tmp_path, part):
    other = {"weight": "act", "act": "weight"}[part]
    off = [f"format.{other}.bits=16", *(["solver=none"] if part == "act" else [])]
    got = run(*FORMAT, *off, "export=compressed_tensors")
    assert got.returncode == 2, got.stderr
    assert len(got.stderr.strip().splitlines()) == 1, got.stderr
    for word in (f"format.{part}", "PowerOfTwo", "export=compressed_tensors", "export=harness"):
        assert word in got.stderr
    assert list(tmp_path.iterdir()) == [], "before any weight"


def test_an_exporter_writes_a_checkpoint_with_a_setting_of_its_own(run):
    got = run("format=int4", "format.act.bits=16", "solver=rtn", "export=toy", "export.half=true")
    assert got.returncode == 0, got.stderr
    exported = got.metrics["export"]
    assert exported["name"] == "tiny-llama-RTN_w4_g64_a16_kv16_headfp16"
    assert exported["weights"] == 14, "every weight was compared with what is loaded"
    evaluated, loaded = exported["ppl"]["pydoc"]
    assert loaded == pytest.approx(evaluated, rel=0.005)


def test_a_tracker_is_told_the_summary_beside_the_local_files(run, tmp_path):
    told = tmp_path / "told.jsonl"
    got = run("format=none", "solver=none", "tracking=toy", f"tracking.file={told}")
    assert got.returncode == 0, got.stderr
    summary = json.loads(told.read_text())
    assert summary["run_id"] == got.metrics["run_id"]
    assert summary["ppl/baseline/pydoc"] == got.metrics["stages"]["baseline"]["ppl"]["pydoc"]
    local = json.loads((got.path / "tracking" / "summary.json").read_text())
    assert local.items() <= summary.items()


def test_a_transform_passes_the_gate_and_a_solver_quantizes(run):
    got = run("format=nvfp4", "transform=toy", "solver=toy", "solver.factor=0.98")
    assert got.returncode == 0, got.stderr
    assert got.metrics["notes"]["gate"]["max"] < 1e-4
    assert quantized(got.metrics) == pytest.approx(1, rel=0.2)
    assert {layer["factor"] for layer in got.metrics["layers"]} == {0.98}


def test_what_is_parametrised_over_options_meets_the_toys(python):
    """Composes, builds; keeps to the arithmetic of formats; with every solver; before every
    format."""
    files = [f"tests/test_{name}.py" for name in ("configs", "formats", "pipeline", "matrix")]
    got = python("-m", "pytest", "-p", "no:cacheprovider", *files, "-k", "toy")
    assert got.returncode == 0, got.stdout
