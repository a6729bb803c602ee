"""Where a run computes.

Runs of one machine that leave the choice open (device=auto) each take a GPU that no other holds.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from harness.config.errors import ConfigError
from harness.parallel import ALONE, Ranks
from harness.store import RunLocked, locked


@contextmanager
def device(name: str, folder: Path, ranks: Ranks = ALONE) -> Iterator[torch.device]:
    """The device that a setting (auto | cpu | cuda | cuda:N) means, until the run ends.

    folder: where the locks of runs lie. ranks: of one machine, each of which has a GPU of its own,
    by its number there. Raises ConfigError where a setting would give all of them the same one.
    """
    if ranks.local is not None and name.startswith("cuda:"):
        raise ConfigError(
            f"device={name} with {ranks.count} ranks: each takes a GPU of its own; set device=auto."
        )
    if ranks.local is not None and name != "cpu" and torch.cuda.is_available():
        yield torch.device("cuda", ranks.local % torch.cuda.device_count())
    elif name != "auto":
        yield torch.device(name)
    elif not torch.cuda.is_available():
        yield torch.device("cpu")
    else:
        # By the machine's names, for processes may be shown different ones of its GPUs.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = [str(index) for index in range(torch.cuda.device_count())]
        if visible:
            names = visible.split(",")
        with free(folder, names) as index:
            yield torch.device("cuda", index)


def described(device: torch.device) -> dict:
    """What of the device and of torch's arithmetic on it can change a number, as plain values."""
    gpu = device.type == "cuda"
    return {
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


@contextmanager
def free(folder: Path, names: Sequence[str]) -> Iterator[int]:
    """The index of the first of this machine's GPUs `names` that nobody holds.

    With all of them held, one is shared.
    """
    with ExitStack() as held:
        for index, name in enumerate(names):
            try:
                held.enter_context(locked(folder / f"{socket.gethostname()}-{name.strip()}.lock"))
            except RunLocked:
                continue
            yield index
            return
        # Whichever, but not the same one for all.
        yield os.getpid() % len(names)
