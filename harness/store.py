"""The run store: `runs/<run_id>/` holds everything a run knows; the directory is the truth, trackers are mirrors.

    config.yaml environment.json status.json metrics.json events.jsonl lock blocks/NNNN.safetensors tracking/
    _shared/<kind>/<key>.json      records many runs read (baselines), outside any run
    _sweeps/<sweep>/<job>.json     one record a sweep job

Every file is replaced atomically, so a reader or a killed writer never leaves a half. Imports no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from omegaconf import OmegaConf

from harness.errors import ConfigError
from harness.files import replacing

PACKAGES = ("torch", "transformers", "hydra-core", "omegaconf", "datasets", "safetensors", "lm-eval", "wandb", "numpy")


def writable(field: str, folder: Path) -> None:
    """Raises ConfigError when nothing can be written in `folder` or where it would be made. Leaves nothing behind."""
    parent = folder
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ConfigError(f"{field}={folder}: cannot write there ({error.strerror}); give a writable folder.") from None


class RunLocked(RuntimeError):
    """Another process is writing this run."""


def write(path: Path, content: str) -> None:
    """Replace `path` by `content` in one step."""
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def write_json(path: Path, value) -> None:
    """`write` of indented JSON; infinities and NaN become null, which every JSON reader accepts."""
    write(path, json.dumps(_finite(value), indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path):
    """The parsed file, or None where there is none or it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def header(path: Path) -> dict:
    """The metadata of a safetensors file; empty where there is no such file. Reads no tensor, imports no torch."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def held(path: Path) -> bool:
    """Whether a process holds `path` as a lock; takes none, needs no right to write."""
    try:
        with open(path, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _finite(value):
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold `path` as a lock of this process; the system lets go of it when the process dies.

    Raises RunLocked at once when another process holds it, unless `wait`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            raise RunLocked(f"{path.parent} is being written by another process ({file.read().strip() or 'unknown'})") from None
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


class Run:
    """One run directory."""

    def __init__(self, path: Path):
        self.path = path
        self.placement = ""  # digest of the learned matrices and of the allocation under which this run's blocks are solved

    @property
    def status(self) -> dict:
        """status.json: {"status": running|done|failed, "quant_id", "stage", "error", ...}; empty before the first start."""
        return read_json(self.path / "status.json") or {}

    @property
    def metrics(self) -> dict | None:
        """metrics.json, or None."""
        return read_json(self.path / "metrics.json")

    def start(self, config: dict, status: dict) -> None:
        """Write what is known before any work: settings, environment, status `running`."""
        write(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
        write_json(self.path / "environment.json", environment())
        for leftover in self.path.glob("blocks/.*"):
            leftover.unlink()
        begun = {"status": "running", "pid": os.getpid(), "host": socket.gethostname(), "started": _now(), **status}
        write_json(self.path / "status.json", begun)
        self.event("start", pid=os.getpid())

    def set_status(self, **fields) -> None:
        """Merge fields into status.json."""
        write_json(self.path / "status.json", {**self.status, **fields, "updated": _now()})

    def save_metrics(self, metrics: dict) -> None:
        """Replace metrics.json."""
        write_json(self.path / "metrics.json", metrics)

    def event(self, name: str, **fields) -> None:
        """Append one line to events.jsonl."""
        with open(self.path / "events.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": _now(), "event": name, **_finite(fields)}) + "\n")

    def block(self, index: int) -> Path:
        """Where block `index` lies once it is solved."""
        return self.path / "blocks" / f"{index:04d}.safetensors"

    def save_block(self, index: int, tensors: dict, report: dict) -> None:
        """Write a solved block's tensors and its report in one step."""
        from safetensors.torch import save_file

        with replacing(self.block(index)) as temporary:
            save_file(tensors, temporary, metadata={"report": json.dumps(_finite({**report, "placement": self.placement}))})
        self.event("block", index=index)

    def load_block(self, index: int) -> tuple[dict, dict] | None:
        """(tensors, report) of a solved block, or None; a damaged file, or one solved under other matrices, counts as none."""
        from safetensors import SafetensorError, safe_open

        if not self.block(index).is_file():
            return None
        try:
            with safe_open(self.block(index), "pt") as file:
                report = json.loads(file.metadata()["report"])
                if report.pop("placement", "") != self.placement:
                    return None
                return {k: file.get_tensor(k) for k in file.keys()}, report  # noqa: SIM118
        except SafetensorError as error:
            self.event("damaged block", index=index, error=str(error))
            return None

    def forget(self) -> None:
        """Drop what an earlier, finished or failed attempt left (force=true)."""
        for path in [*self.path.glob("blocks/*"), *self.path.glob("*.json*")]:
            path.unlink()


class Store:
    """All runs below one root."""

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def check(self) -> None:
        """Raises ConfigError when nothing can be written below the root. Leaves nothing behind."""
        writable("run_root", self.root)

    def run(self, run_id: str) -> Run:
        """The run of that id; it need not exist yet."""
        return Run(self.root / run_id)

    def runs(self) -> Iterator[Run]:
        """All runs that ever started."""
        return (Run(path.parent) for path in sorted(self.root.glob("[!_]*/status.json")))

    def shared(self, kind: str, key: str) -> Path:
        """The file of a record that many runs read."""
        return self.root / "_shared" / kind / f"{key}.json"

    def adopt_blocks(self, run: Run, quant_id: str) -> int:
        """Link solved blocks of another run with the same quant_id into `run`; returns how many blocks `run` then has."""
        for other in self.runs():
            if other.path == run.path or other.status.get("quant_id") != quant_id:
                continue
            for path in other.path.glob("blocks/[0-9]*.safetensors"):
                target = run.path / "blocks" / path.name
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with contextlib.suppress(OSError):  # no links on this file system: solved again
                        os.link(path, target)
        return len(list(run.path.glob("blocks/[0-9]*.safetensors")))


def environment() -> dict:
    """Versions and the machine; no environment variables, so no secret can be among them."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count(), "packages": versions}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
