"""All runs below one root, and the records they share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.parallel import ALONE, Ranks
from harness.store.files import locked, remove_leftovers, tell, writable
from harness.store.run import Run


class Store:
    """All runs below one root. say: told in one line what is damaged and what is waited for.

    ranks: those that compute together; the first one holds locks and writes.
    """

    def __init__(self, root: str | Path, say: Callable[[str], None] = tell, ranks: Ranks = ALONE):
        self.root = Path(root)
        self._say = say
        self._ranks = ranks

    def check(self) -> None:
        """Raises ConfigError when nothing can be written below the root. Leaves nothing behind."""
        writable("run_root", self.root)

    def run(self, run_id: str) -> Run:
        """The run of that id; it need not exist yet."""
        return Run(self.root / run_id, self._say, self._ranks)

    def runs(self) -> Iterator[Run]:
        """All runs that ever started."""
        # folders with `_` are no runs: _shared, _sweeps
        paths = sorted(self.root.glob("[!_]*/status.json"))
        return (Run(path.parent, self._say) for path in paths)

    def shared(self, kind: str, key: str) -> Path:
        """The file of a record that many runs read."""
        return self.root / "_shared" / kind / f"{key}.json"

    @contextmanager
    def holding(self, path: Path) -> Iterator[None]:
        """Hold the right to make a shared record; who comes second waits, and finds it then.

        What a killed process was writing of it goes away.
        """
        with self._ranks.leading(self._alone(path)):
            yield

    @contextmanager
    def _alone(self, path: Path) -> Iterator[None]:
        """`holding` of one process."""
        with locked(path.with_suffix(".lock"), wait=True, say=self._say):
            remove_leftovers(path.parent.glob(f".{path.stem}.*"))
            remove_leftovers(path.with_suffix("").glob(".*"))
            yield

    def adopt_blocks(self, run: Run, quant_id: str) -> int:
        """Link solved blocks of another run with the same quant_id into `run`, and what tuners made
        of them.

        Returns how many solved blocks `run` then has.
        """
        return self._ranks.lead(lambda: self._adopt(run, quant_id))

    def _adopt(self, run: Run, quant_id: str) -> int:
        for other in self.runs():
            if other.path == run.path or other.status.get("quant_id") != quant_id:
                continue
            for path in other.path.glob("blocks/[0-9]*.safetensors"):
                target = run.path / "blocks" / path.name
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with contextlib.suppress(OSError):  # no links on this file system: solved again
                        os.link(path, target)
        return sum(path.stem.isdigit() for path in run.path.glob("blocks/[0-9]*.safetensors"))
