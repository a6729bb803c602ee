"""Sweeps in several processes: no work lost or done twice, whoever dies; and what a row says about
itself."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial

import pytest
from composed import ROOT, SMALL
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from test_cli import command

from harness.pipeline.devices import free
from harness.report.sweep import sweep

GRID = [
    "format=nvfp4,int4",
    "transform=hadamard,dartquant",
    "solver=rtn,gptq",
    "data.calibration.windows=16",
]


def events(root):
    """[(run, event)] of all runs."""
    return [
        (path.parent.name, json.loads(line))
        for path in sorted(root.glob("[!_]*/events.jsonl"))
        for line in path.read_text().splitlines()
    ]


def done(root):
    return {
        path.parent.name: path
        for path in root.glob("[!_]*/status.json")
        if json.loads(path.read_text())["status"] == "done"
    }


def seen(root):
    """{finished run: (when its status was last written, how many events it has)}."""
    counts = Counter(run for run, _ in events(root))
    return {run: (path.stat().st_mtime_ns, counts[run]) for run, path in done(root).items()}


def test_a_killed_pool_goes_on_and_repeats_nothing(tmp_path):
    line = ["-m", *SMALL, *GRID, "hydra/launcher=local_pool", "run_root=runs"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pool = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *line],
        cwd=tmp_path,
        env=env,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    root = tmp_path / "runs"
    while pool.poll() is None and len(done(root)) < 3:
        time.sleep(0.02)
    os.killpg(pool.pid, signal.SIGKILL)
    assert pool.wait() == -signal.SIGKILL, "it was still running"
    finished = seen(root)
    assert 3 <= len(finished) < 8
    again = command(tmp_path, *line)
    assert again.returncode == 0, again.stderr
    assert "8 jobs, 0 failed" in again.stdout
    assert again.stdout.count(" stored ") == len(finished)
    assert len(done(root)) == 8
    assert {run: facts for run, facts in seen(root).items() if run in finished} == finished
    solved = Counter(
        (run, event["index"]) for run, event in events(root) if event["event"] == "block"
    )
    assert len(solved) == 16
    assert set(solved.values()) == {1}
    sources = [event for _, event in events(root) if event["event"] in ("baseline", "placement")]
    computed = Counter(
        event.get("key", "baseline")
        for event in sources
        if event["source"] in ("computed", "learned")
    )
    assert len(computed) == 2, "one baseline, and one R1 for all formats and solvers"
    assert set(computed.values()) == {1}
    (page,) = (root / "_sweeps").glob("*/report.html")
    assert all(run in page.read_text() for run in done(root))


def test_a_killed_worker_costs_its_jobs_and_not_the_table(tmp_path):
    line = ["-m", *SMALL, "solver=rtn,adascale_paper", "hydra/launcher=local_pool", "run_root=runs"]
    env, root = {**os.environ, "OMP_NUM_THREADS": "1"}, tmp_path / "runs"
    pool = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *line],
        cwd=tmp_path,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    slow, told = [], []
    while pool.poll() is None and not (told and slow):
        told = list(root.glob("_sweeps/*/00000.json"))
        slow = list(root.glob("*adascale_paper*/status.json"))
        time.sleep(0.02)
    os.kill(json.loads(slow[0].read_text())["pid"], signal.SIGKILL)
    told, _ = pool.communicate(timeout=60)
    assert pool.returncode == 1
    assert "2 jobs, 1 failed" in told
    assert "job 1" in told and "the same command goes on" in told
    (page,) = (root / "_sweeps").glob("*/report.html")
    assert all(run in page.read_text() for run in done(root))


def test_a_run_that_two_jobs_of_a_sweep_want_is_computed_once(tmp_path):
    line = [
        "-m",
        *SMALL,
        "solver=adascale",
        "solver.iterations=20,20",
        "hydra/launcher=local_pool",
        "run_root=runs",
    ]
    swept = command(tmp_path, *line)
    assert swept.returncode == 0, swept.stderr
    assert "2 jobs, 0 failed" in swept.stdout
    blocks = [event["index"] for _, event in events(tmp_path / "runs") if event["event"] == "block"]
    assert len(blocks) == len(set(blocks)) > 0


def rows(tmp_path, monkeypatch, *words):
    """The overrides of each job of a sweep, nothing run."""
    monkeypatch.setenv("HARNESS_ROOT", str(ROOT))
    monkeypatch.setenv("HARNESS_SWEEP", "sweep")
    found = []
    sweep(
        lambda cfg: found.append(list(HydraConfig.get().overrides.task)),
        ["tracking=local", f"run_root={tmp_path}", *words],
    )
    return [
        " ".join(word for word in row if not word.startswith(("tracking=", "run_root=")))
        for row in found
    ]


def test_a_setting_applies_to_the_rows_whose_options_have_it(tmp_path, monkeypatch):
    jobs = partial(rows, tmp_path, monkeypatch)
    assert jobs("experiment=adascale_qsim", "solver.iterations=20,30") == [
        "solver=minmax experiment=adascale_qsim",
        "solver=adascale_paper experiment=adascale_qsim solver.iterations=20",
        "solver=adascale_paper experiment=adascale_qsim solver.iterations=30",
    ], "and a row that lacks what varies stands once"
    assert jobs("transform=identity,quarot,pca", "transform.r3=on", "transform.head=false") == [
        "transform=identity",
        "transform=quarot transform.r3=on",
        "transform=pca transform.head=False",
    ]
    assert jobs("eval=perplexity,zeroshot", "eval.zeroshot.limit=5", "++data.beside=c4") == [
        "eval=perplexity ++data.beside=c4",
        "eval=zeroshot eval.zeroshot.limit=5 ++data.beside=c4",
    ]
    with pytest.raises(ConfigCompositionException, match=r"solver\.iterationz"):
        jobs("experiment=adascale_qsim", "solver.iterationz=20")
    with pytest.raises(ConfigCompositionException, match=r"hydra\.sweeper\.nope"):
        jobs("solver=rtn,gptq", "hydra.sweeper.nope=1")


def test_a_row_is_run_again_by_its_command(tmp_path):
    """Out of an experiment whose option would start a sweep; and the command line replaces what the
    option sweeps over."""
    swept = command(
        tmp_path, "-m", *SMALL, "experiment=adascale_qsim", "solver=rtn", "run_root=runs"
    )
    assert swept.returncode == 0, swept.stderr
    assert "1 jobs, 0 failed" in swept.stdout
    (path,) = (tmp_path / "runs").glob("[!_]*/metrics.json")
    words = json.loads(path.read_text())["command"]
    again = subprocess.run(
        f"{sys.executable} {ROOT}/run.py {words.removeprefix('python run.py ')}",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert again.returncode == 0, again.stderr
    assert "stored result" in again.stderr
    assert str(path.parent.relative_to(tmp_path)) in again.stdout


def test_a_preempted_job_of_a_queue_goes_on(tmp_path):
    """submitit's local executor sends and handles the signal that SLURM sends before it takes a
    machine away."""
    line = [
        "-m",
        *SMALL,
        "data.calibration.windows=64",
        "data.calibration.length=256",
        "solver=gptq,rtn",
        "run_root=runs",
        "hydra/launcher=submitit_local",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    queue = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *line],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    root = tmp_path / "runs"
    while queue.poll() is None and not list(root.glob("*gptq*/blocks/0000.safetensors")):
        time.sleep(0.005)
    (status,) = root.glob("*gptq*/status.json")
    os.kill(json.loads(status.read_text())["pid"], signal.SIGUSR2)
    told, _ = queue.communicate(timeout=120)
    assert queue.returncode == 0, told
    assert "2 jobs, 0 failed" in told
    own = [event for run, event in events(root) if "gptq" in run]
    assert [event["event"] for event in own].count("start") == 2
    assert sorted(event["index"] for event in own if event["event"] == "block") == [0, 1]


def test_every_job_takes_a_gpu_of_its_own(tmp_path):
    names = ["0", "1", " 2"]
    with free(tmp_path, names) as a, free(tmp_path, names) as b:
        assert (a, b) == (0, 1)
        with free(tmp_path, names) as c, free(tmp_path, names) as shared:
            assert c == 2
            assert shared in range(3)
        with free(tmp_path, names) as again:
            assert again == 2
    with free(tmp_path, names) as first:
        assert first == 0
