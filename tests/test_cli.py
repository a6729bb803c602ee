"""The command line as a person meets it: exit statuses, messages without tracebacks, sweeps,
interruption by kill -9."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time

import pytest
from composed import ROOT, SMALL
from hydra.core.hydra_config import HydraConfig


def command(tmp_path, *arguments, env=None):
    env = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1", **(env or {})}
    line = [sys.executable, str(ROOT / "run.py"), *arguments]
    return subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)


def test_one_run_and_the_stored_result(tmp_path):
    first = command(tmp_path, *SMALL)
    assert first.returncode == 0, first.stderr
    for word in ("baseline", "quantized", "ppl pydoc", "bits", "run directory", "peak MB"):
        assert word in first.stdout
    (directory,) = (p for p in (tmp_path / "runs").iterdir() if not p.name.startswith("_"))
    for name in (
        "config.yaml",
        "environment.json",
        "status.json",
        "metrics.json",
        "events.jsonl",
        "blocks/0001.safetensors",
    ):
        assert (directory / name).is_file()
    before = (directory / "metrics.json").stat().st_mtime_ns
    again = command(tmp_path, *SMALL)
    assert again.returncode == 0
    assert again.stdout == first.stdout
    assert (directory / "metrics.json").stat().st_mtime_ns == before


BAD = [
    (["format=nvfp5"], ["format=nvfp5", "nvfp4"]),
    (["format.weight.bitz=4"], ["format.weight.bitz", "format.weight.bits"]),
    (["sovler=rtn"], ["sovler", "solver"]),
    (["solver.damp=lots"], ["solver.damp=lots"]),
    (["format.weight.group_size=7"], ["format.weight.group_size"]),
    (["seed=[1"], ["seed=[1"]),
    (["run_root=/proc/nowhere"], ["run_root=/proc/nowhere"]),
    (["~seed"], ["seed"]),
    (["~eval.perplexity.corpora"], ["eval.perplexity.corpora"]),
    (["data=text", "data.path=5"], ["data.path=5"]),
    (["format.weight.mse=3"], ["format.weight.mse"]),
    (["format.weight._target_=null"], ["format.weight._target_"]),
    (["tracking.entity=5"], ["tracking.entity=5"]),
    (["solver=null"], ["solver"]),
    (["sweeps=bits"], ["sweeps=bits", "python run.py -m"]),
    (
        ["experiment=pca_table", "transform=pca"],
        ["experiment=pca_table goes through", "solver", "python run.py -m"],
    ),
    (
        ["-m", "transform=quarot,pca", "transform.posthadamard=true"],
        ["transform.posthadamard", "transform.post_hadamard"],
    ),
    (["-m", "--cfg", "job"], ["--cfg", "-m"]),
    (
        ["data=text", "data.path=${nowhere}"],
        ["data.path=${nowhere}: there is no setting nowhere"],
    ),
    (["solver=rtn", "solver.hessian_input=quantized"], ["solver.hessian_input=quantized"]),
]


@pytest.fixture
def called(tmp_path, monkeypatch, capfd):
    """`command` in this process, which has imported what a process of its own takes seconds to."""
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(os, "environ", os.environ | {"COLUMNS": "200"})
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
        return subprocess.CompletedProcess(arguments, end.value.code, *capfd.readouterr())

    yield call
    signal.signal(signal.SIGTERM, before)
    HydraConfig.instance().cfg = None


def is_one_readable_message(got, folder, names):
    assert got.returncode == 2
    assert "Traceback" not in got.stderr
    assert got.stdout == ""
    assert len(got.stderr.strip().splitlines()) == 1, got.stderr
    for name in names:
        assert name in got.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("arguments", "names"), BAD, ids=str)
def test_bad_input_is_one_readable_message(tmp_path, called, arguments, names):
    is_one_readable_message(called(*SMALL, *arguments), tmp_path, names)


@pytest.mark.parametrize("field", ["sovler", "format.weight.group_size", "transform.posthadamard"])
def test_so_it_is_of_a_process_of_its_own(tmp_path, field):
    """Found by Hydra, by what is built, and by a sweep: nothing else is imported or says more."""
    arguments, names = next((words, names) for words, names in BAD if field in names)
    is_one_readable_message(command(tmp_path, *SMALL, *arguments), tmp_path, names)


def test_sweep_records_the_impossible_job_and_skips_what_is_done(tmp_path):
    line = ["-m", *SMALL, "format=int4", "solver=rtn,gptq", "format.weight.group_size=64,7,32"]
    first = command(tmp_path, *line)
    assert first.returncode == 1, first.stderr
    assert "6 jobs, 2 failed" in first.stdout
    assert "format.weight.group_size=7" in first.stdout
    metrics = list((tmp_path / "runs").glob("*/metrics.json"))
    assert len(metrics) == 4
    times = {p: p.stat().st_mtime_ns for p in metrics}
    again = command(tmp_path, *line, "on_error=record")
    assert again.returncode == 0
    assert again.stdout.count("stored") == 4
    assert {p: p.stat().st_mtime_ns for p in metrics} == times


def test_brackets_in_names_reach_the_table(tmp_path):
    """What looks like markup is a name; and the exit status does not hang on the table."""
    folder = tmp_path / "[wiki]"
    folder.mkdir()
    got = command(
        tmp_path,
        "-m",
        *SMALL,
        "solver=rtn",
        f"eval.perplexity.corpora=['{folder}','{tmp_path}/[/nope]']",
    )
    assert got.returncode == 1, got.stderr
    assert "[wiki]" in got.stdout
    assert "1 jobs, 1 failed" in got.stdout


def test_named_sweep(tmp_path):
    got = command(tmp_path, "-m", *SMALL, "sweeps=group_size")
    assert got.returncode == 0, got.stderr
    assert "4 jobs, 0 failed" in got.stdout


def test_flags_may_stand_behind_overrides(tmp_path):
    got = command(
        tmp_path,
        *SMALL,
        "solver=none",
        "-m",
        "format=none",
        "run_root=~/runs",
        env={"HOME": str(tmp_path)},
    )
    assert got.returncode == 0, got.stderr
    assert "1 jobs, 0 failed" in got.stdout
    assert list((tmp_path / "runs").glob("*/metrics.json")), "~ is the home folder"
    shown = command(tmp_path, "solver=rtn", "--cfg", "job", "format=int4")
    assert shown.returncode == 0, shown.stderr
    assert "harness.formats.Integer" in shown.stdout


def test_home_in_an_option_file_of_a_sweep(tmp_path):
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    option = "# @package _global_\nrun_root: ~/runs\n"
    (tmp_path / "own" / "experiment" / "there.yaml").write_text(option)
    env = {"HOME": str(tmp_path / "home"), "HARNESS_CONF": str(tmp_path / "own")}
    line = [*SMALL, "-m", "solver=none", "format=none", "experiment=there"]
    got = command(tmp_path, *line, env=env)
    assert got.returncode == 0, got.stderr
    assert "1 jobs, 0 failed" in got.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"own", "home"}
    (metrics,) = (tmp_path / "home" / "runs").glob("[!_]*/metrics.json")
    assert "_sweeps" not in json.loads(metrics.read_text())["command"]


def test_termination_is_told_and_recorded(tmp_path):
    line = [*SMALL, "solver=adascale", "solver.iterations=100000"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *line],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not any(
        "solve" in path.read_text() for path in tmp_path.glob("runs/*/events.jsonl")
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 143, told
    assert told.strip().splitlines()[-1].startswith("terminated; the same command goes on")
    (status,) = tmp_path.glob("runs/*/status.json")
    assert json.loads(status.read_text())["status"] == "failed"


def test_kill_minus_nine_loses_nothing(tmp_path):
    line = [*SMALL, "data.calibration.windows=64", "data.calibration.length=256"]
    whole = command(tmp_path, *line, "run_root=whole")
    assert whole.returncode == 0, whole.stderr
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *line, "run_root=killed"],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not list(tmp_path.glob("killed/*/blocks/0000.safetensors")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was still running"
    (status,) = tmp_path.glob("killed/*/status.json")
    assert json.loads(status.read_text())["status"] == "running"
    resumed = command(tmp_path, *line, "run_root=killed")
    assert resumed.returncode == 0, resumed.stderr
    a, b = (
        json.loads(next(tmp_path.glob(f"{root}/*/metrics.json")).read_text())
        for root in ("whole", "killed")
    )
    for key in ("stages", "layers", "bits_per_weight", "run_id", "status"):
        assert a[key] == b[key]


def test_help_needs_no_torch(tmp_path):
    call = f"runpy.run_path({str(ROOT / 'run.py')!r}, run_name='__main__')"
    code = f"import sys, runpy; sys.argv = ['run.py', '--cfg', 'job']; {call}"
    loaded = "{'torch', 'transformers'} & set(sys.modules)"
    probe = f"try:\n  {code}\nexcept SystemExit: pass\nassert not {loaded}"
    got = subprocess.run(
        [sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True
    )
    assert got.returncode == 0, got.stderr
    assert "format:" in got.stdout
