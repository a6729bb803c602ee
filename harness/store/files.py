"""Files that are replaced in one step, locks between processes, and errors that name the file.

A file is written as `.NAME.PID` beside its place and then renamed; `remove_leftovers` takes away
what a killed process left of that.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from harness.config.errors import ConfigError

PATIENCE = 1.0  # seconds that a wait for another process stays silent
POLL = 0.02  # seconds between looks at a lock meanwhile


class RunLocked(RuntimeError):
    """Another process is writing this run."""


def tell(message: str) -> None:
    """One line to whoever watches, where no reporter was given."""
    print(message, file=sys.stderr)


def now() -> str:
    """The local time as ISO 8601, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def writable(field: str, folder: Path) -> None:
    """Raises ConfigError when nothing can be written in `folder` or where it would be made.

    Leaves nothing behind.
    """
    parent = folder
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"{field}={folder}: cannot write there ({error.strerror}); give a writable folder."
        ) from None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within it, an OSError names `path`, whatever was open; that of a full disk says a way out."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        reason = error.strerror
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"{os.strerror(error.errno)}; free some space there, or write to another disk"
        raise OSError(error.errno, reason, str(path)) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a name to write to, which then becomes `path` in one step.

    Readers see the old file or the new one, and a kill leaves either. Its mode is that of any new
    file, whatever the writer makes of it: safetensors puts a private one (0600) in its place.
    Raises OSError naming `path`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)
            # on the disk before it has the name: a power cut must not leave an empty file
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def remove_leftovers(candidates: Iterable[Path]) -> None:
    """Remove those that a process which is gone was writing (`.NAME.PID`).

    For whoever holds the lock under which such files are written: then no other host writes one.
    """
    for path in list(candidates):
        hidden, _, pid = path.name.rpartition(".")
        if hidden.startswith(".") and pid.isdigit() and not Path("/proc", pid).exists():
            path.unlink(missing_ok=True)


def aside(folder: Path, root: Path) -> Path:
    """Move a folder into a new one of a run root, which is no run's; returns that, to be removed.

    A process that comes meanwhile finds the folder whole or gone.
    """
    place = Path(tempfile.mkdtemp(prefix="_removed-", dir=root))
    folder.rename(place / folder.name)
    return place


def write(path: Path, content: str) -> None:
    """Replace `path` by `content` in one step."""
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def append(path: Path, line: str) -> None:
    """Add one line to a file of lines."""
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def whole_lines(path: Path) -> None:
    """Drop the half line that a kill can leave: what is appended next must not be glued to it."""
    if path.exists():
        content = path.read_bytes()
        whole, newline, rest = content.rpartition(b"\n")
        if rest:
            write(path, (whole + newline).decode("utf-8", errors="replace"))


def as_json(value) -> str:
    """Indented JSON; infinities and NaN become null, which every JSON reader accepts."""
    return json.dumps(finite(value), indent=1, ensure_ascii=False) + "\n"


def finite(value):
    """`value` with None for every float that is not finite."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    # x - x is 0 for every finite x, and NaN for infinities and NaN
    if isinstance(value, float) and value - value != 0:
        return None
    return value


def write_json(path: Path, value) -> None:
    """`write` of `as_json`."""
    write(path, as_json(value))


def read_json(path: Path):
    """The parsed file, or None where there is none or it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


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


@contextmanager
def locked(path: Path, wait: bool = False, say: Callable[[str], None] = tell) -> Iterator[None]:
    """Hold `path` as a lock of this process; the system lets go of it when the process dies.

    Raises RunLocked at once when another process holds it, unless `wait`: then `say` is told once
    who that is, if it takes longer than PATIENCE.
    """
    while True:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        # "a+" empties nothing: who holds the lock is written in the file
        with open(path, "a+", encoding="utf-8") as file:
            if not _taken(file):
                if not wait:
                    raise RunLocked(
                        f"{path.parent} is being written by another process ({_holder(file)})"
                    )
                _wait(file, path, say)
            if not _stands(file, path):
                continue  # who held it took its folder away, and the next one locks a new file
            holder = f"pid {os.getpid()} on {socket.gethostname()} since {now()}"
            with naming(path):
                os.ftruncate(file.fileno(), 0)
                os.write(file.fileno(), holder.encode())
            yield
            return


def _taken(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _stands(file: TextIO, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _wait(file: TextIO, path: Path, say: Callable[[str], None]) -> None:
    """Take the lock once the other process lets go; say who that is after PATIENCE."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        time.sleep(POLL)
        if _taken(file):
            return
    say(f"waiting for another process ({_holder(file)}), which holds {path}")
    fcntl.flock(file, fcntl.LOCK_EX)


def _holder(file: TextIO) -> str:
    file.seek(0)
    return file.read().strip() or "unknown"
