"""One run directory: what is written while the run goes on, and what is read again."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from copy import copy
from pathlib import Path

from omegaconf import OmegaConf

from harness.parallel import ALONE, Ranks
from harness.store.files import (
    append,
    finite,
    now,
    read_json,
    remove_leftovers,
    tell,
    whole_lines,
    write,
    write_json,
)
from harness.store.provenance import environment
from harness.store.records import checked, write_checked
from harness.store.tensors import load_tensors, save_tensors


class Run:
    """One run directory. say: told in one line, and once, of each record that is damaged.

    ranks: those that compute it; the first one writes, all read the parts that it has.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = tell, ranks: Ranks = ALONE):
        self.path = path
        self._say = say
        self._ranks = ranks
        # Of the learned matrices and the allocation under which this run's blocks are solved.
        self.placement = ""
        # Of the tuner whose tensors stand in for those of solved blocks; empty: none's.
        self.tuned = ""
        self._damaged: dict[Path, str] = {}
        self._digests: dict[str, str] = {}
        self._started = False

    @property
    def status(self) -> dict:
        """status.json: {"status": running|done|failed, "quant_id", "stage", "digests", ...}.

        Empty before the first start. digests: {file: SHA-256} of `save`, once the run has ended.
        """
        record = read_json(self.path / "status.json")
        return record if isinstance(record, dict) else {}

    @property
    def metrics(self) -> dict | None:
        """metrics.json, or None."""
        record = self.read("metrics.json")
        return record if isinstance(record, dict) else None

    def start(self, config: dict, status: dict) -> None:
        """Write what is known before any work: settings, environment, status `running`.

        The caller holds the run's lock; what a killed attempt was writing goes away.
        """
        if not self._ranks.first:
            return
        remove_leftovers(self.path.rglob(".*"))
        whole_lines(self.path / "events.jsonl")
        write(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
        write_json(self.path / "environment.json", environment())
        begun = {
            "status": "running",
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": now(),
            **status,
        }
        write_json(self.path / "status.json", begun)
        self.event("start", pid=os.getpid())
        self._started = True
        for path, why in self._damaged.items():
            self.event("damaged", file=str(path), why=why)

    def set_status(self, **fields) -> None:
        """Merge fields into status.json."""
        if not self._ranks.first:
            return
        write_json(self.path / "status.json", {**self.status, **fields, "updated": now()})

    def set_environment(self, **fields) -> None:
        """Merge fields into environment.json."""
        if not self._ranks.first:
            return
        path = self.path / "environment.json"
        record = read_json(path)
        if not isinstance(record, dict):
            record = {}
        write_json(path, {**record, **fields})

    def save(self, name: str, value) -> None:
        """Replace the JSON file `name` of the run."""
        if not self._ranks.first:
            return
        self._digests[name] = write_checked(self.path / name, value)

    def read(self, name: str):
        """What `save` was given, or None where it is missing or damaged.

        Before its end, and of runs from before there were digests, a file is taken as it is.
        """
        digests = self.status.get("digests")
        digest = digests.get(name) if isinstance(digests, dict) else None
        return checked(self.path / name, digest, self.damaged)

    def save_metrics(self, metrics: dict) -> None:
        """Replace metrics.json."""
        self.save("metrics.json", metrics)

    def end(self, metrics: dict) -> None:
        """Write how the run ended: metrics["status"]."""
        self.save_metrics(metrics)
        self.set_status(status=metrics["status"], digests=self._digests)
        self.event("end", status=metrics["status"])

    def alone(self) -> Run:
        """This run as the first rank reads it by itself."""
        own = copy(self)
        own._ranks = ALONE
        return own

    def event(self, name: str, **fields) -> None:
        """Append one line to events.jsonl."""
        if not self._ranks.first:
            return
        line = json.dumps(finite({"time": now(), "event": name, **fields}))
        append(self.path / "events.jsonl", line)

    def damaged(self, path: Path, why: str) -> None:
        """Say once that a record is damaged and counts as absent; the run's events know it too."""
        if path in self._damaged:
            return
        self._damaged[path] = why
        self._say(f"{path} is damaged ({why}); it counts as absent")
        if self._started:
            self.event("damaged", file=str(path), why=why)

    def part(self, name: str) -> Path:
        """Where a part of the quantized model lies: block 7 is `0007`, what a tuner made of it
        `0007.KEY`."""
        return self.path / "blocks" / f"{name}.safetensors"

    def block(self, index: int) -> Path:
        """Where block `index` lies once it is solved."""
        return self.part(f"{index:04d}")

    def save_part(self, name: str, tensors: dict, report: dict) -> None:
        """Write a part's tensors and its report in one step."""
        if not self._ranks.first:
            return
        text = json.dumps(finite({**report, "placement": self.placement}))
        save_tensors(self.part(name), tensors, {"report": text})

    def save_block(self, index: int, tensors: dict, report: dict) -> None:
        """`save_part` of a solved block."""
        self.save_part(f"{index:04d}", tensors, report)
        self.event("block", index=index)

    def load_block(self, index: int) -> tuple[dict, dict] | None:
        """`load_part` of a solved block."""
        return self.load_part(f"{index:04d}")

    def load_part(self, name: str) -> tuple[dict, dict] | None:
        """(tensors, report) of a part.

        None where it is missing, damaged, or made under other matrices.
        """
        return self._ranks.lead(lambda: self._read_part(name))

    def _read_part(self, name: str) -> tuple[dict, dict] | None:
        record = load_tensors(self.part(name), self.damaged)
        if record is None:
            return None
        tensors, metadata = record
        report = json.loads(metadata["report"])
        if report.pop("placement") != self.placement:
            return None
        return tensors, report

    def forget(self) -> None:
        """Drop what an earlier, finished or failed attempt left (force=true)."""
        if not self._ranks.first:
            return
        for path in [*self.path.glob("blocks/*"), *self.path.glob("*.json*")]:
            path.unlink()
