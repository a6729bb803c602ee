"""What can be removed of a run root, how much that frees, and the removal itself."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

from harness.evaluation.records import stored
from harness.report.rows import final_stage
from harness.store import Run, RunLocked, aside, locked


def doomed(row: dict, blocks: bool) -> Path | None:
    """What `prune` would remove of a run. Nothing that lies behind a link, and no run whose figures
    are complete."""
    path = Path(row["path"])
    ended = row["status"] in ("failed", "interrupted")
    # A run can be killed between its last figure and the word that it is done.
    if ended and (Run(path).metrics or {}).get("status") != "done":
        target = path
    elif blocks and any(one.stage == final_stage(row) for one in stored(row)):
        target = path / "blocks"
    else:
        return None
    linked = any(each.is_symlink() for each in (path, target, path / "lock"))
    return target if target.is_dir() and not linked else None


def freed(targets: list[Path]) -> list[int]:
    """Bytes that removing all targets frees, each one's part: a file that other hard links keep
    frees none."""
    files = [
        [path.lstat() for path in target.rglob("*") if not path.is_dir()] for target in targets
    ]
    links = Counter((s.st_dev, s.st_ino) for own in files for s in own)
    return [
        sum(s.st_size // s.st_nlink for s in own if links[s.st_dev, s.st_ino] == s.st_nlink)
        for own in files
    ]


def remove(row: dict, target: Path) -> bool:
    """Remove `target` unless the run went on since `row` was read. It is moved aside first: a
    process that starts the run meanwhile finds it whole or gone."""
    run = Run(Path(row["path"]))
    try:
        with locked(run.path / "lock"):
            if any(run.status.get(key) != row[key] for key in ("started", "updated")):
                return False
            place = aside(target, run.path.parent)
    except RunLocked:
        return False
    shutil.rmtree(place)
    return True
