"""Whole runs of one process and of two ranks, in this process and by torchrun, and what they leave
behind."""

import io
import json
import os
import socket
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from composed import ROOT, SMALL, composed

from harness.calibration.shipped import Pydoc
from harness.command.run import run as command
from harness.parallel import Ranks
from harness.pipeline.job import execute
from harness.store import Run
from harness.tracking.replay import Record

WORDS = [
    *SMALL,
    "data=text",
    "data.path={folder}/text",
    "data.name=pydoc",
    "eval.perplexity.corpora=[data]",
    "run_root={root}",
]
# Each rank has micro-batches of its own; steps on one window, which one rank has, and on three, of
# which one has two.
RUNS = {
    "plain": ["data.calibration.length=512"],
    "adascale": [
        "format=nvfp4",
        "transform=spinquant",
        "transform.steps=2",
        "transform.r3=off",
        "transform.r4=off",
        "solver=adascale",
        "solver.iterations=6",
        "export=compressed_tensors",
        "export.path={root}/exports",
    ],
    "signround": [
        "format=int4",
        "transform=flatquant",
        "transform.steps=2",
        "solver=signround",
        "solver.steps=6",
        "solver.batch=3",
        "data.calibration.windows=7",
        "tune=scales",
        "tune.steps=3",
        "tune.windows=4",
        "eval=generate",
        "eval.generate.tokens=4",
    ],
}


def texts(folder: Path) -> None:
    """The corpus of whole runs."""
    (folder / "text").mkdir(parents=True, exist_ok=True)
    for file, part in (("train.txt", "calibration"), ("test.txt", "evaluation")):
        (folder / "text" / file).write_text(Pydoc().text(part)[:8000])


def runs(ranks: Ranks) -> dict:
    """Whole runs: what each leaves behind, of one process once, of two ranks twice."""
    folder = Path(ranks.lead(lambda: os.environ["RANKS_FOLDER"]))
    ranks.lead(lambda: texts(folder))

    def done(name: str, words: list[str], time: int) -> dict:
        root = folder / f"{name}.{ranks.count}.{time}"
        settings = [word.format(folder=folder, root=root) for word in (*WORDS, *words)]
        outcome = execute(*ranks.lead(lambda: composed(*settings)), ranks=ranks)
        return ranks.lead(lambda: left(outcome.run, root))

    return {
        name: [done(name, words, time) for time in range(ranks.count)]
        for name, words in RUNS.items()
    }


def left(run: Run, root: Path) -> dict:
    """The numbers of a run that is done, and all tensors that it wrote."""
    metrics = run.metrics
    assert metrics is not None and metrics["status"] == "done", run.status
    return {
        "records": metrics["records"],
        "stages": metrics["stages"],
        "layers": metrics["layers"],
        "curves": [point for _, point in Record.read(run).curves],
        "tensors": {
            # its name is that of its settings, of which the export's folder is one
            str(path.relative_to(root)).replace(run.path.name, "run"): path.read_bytes()
            for path in sorted(root.rglob("*.safetensors"))
        },
    }


def refused(ranks: Ranks) -> tuple:
    """How a command ends with a setting that is wrong, and what it says; of several ranks."""
    if ranks.count == 1:
        return ()
    os.environ |= {
        "RANK": str(ranks.rank),
        "LOCAL_RANK": str(ranks.rank),
        "WORLD_SIZE": str(ranks.count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(ranks.lead(free_port)),
    }
    root = Path(os.environ["RANKS_FOLDER"]) / "refused"
    said = io.StringIO()
    with redirect_stderr(said), pytest.raises(SystemExit) as end:
        command(["model=tiny", f"run_root={root}", "format.weight.group_size=7"])
    return end.value.code, said.getvalue(), root.exists()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


# The same by torchrun.


def launched(folder: Path, end: str = "") -> subprocess.CompletedProcess:
    """The plain run on two ranks, which ends as mortal.py has it."""
    texts(folder)
    if end:
        (folder / "end").write_text(end)
    else:
        (folder / "end").unlink(missing_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = str(ROOT / "tests" / "mortal.py")
    line = [sys.executable, *launcher, script, *plain()]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=600)


def plain() -> list[str]:
    """The settings of the plain run, in a folder of its own."""
    return [word.format(folder=".", root="runs") for word in (*WORDS, *RUNS["plain"])]


def stored(folder: Path) -> tuple[Path, dict]:
    """The run directory, and its status.json."""
    (run,) = folder.glob("runs/tiny*")
    return run, json.loads((run / "status.json").read_text())


def solutions(run: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(run.glob("blocks/*"))]


def solved_blocks(run: dict) -> list[bytes]:
    """The same of a run in this process."""
    return [content for path, content in run["tensors"].items() if "/blocks/" in path]


def records(run: Path) -> list[dict]:
    return json.loads((run / "metrics.json").read_text())["records"]
