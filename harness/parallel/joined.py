"""Which processes compute a run together, as whoever launched them says.

    torchrun    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
    srun        SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_NODELIST, SLURM_JOB_ID

Slurm's count where a step has several tasks: `hydra/launcher=slurm` with tasks_per_node, or srun by
hand. Imports no torch where a process is alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from harness.parallel.ranks import ALONE, Place, Ranks

PORTS = 20000  # ports of slurm's jobs begin here, and are so many


def place(environ: Mapping[str, str]) -> Place | None:
    """From the environment; None where a process is alone."""
    if int(environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in environ:
        rank = int(environ["RANK"])
        return Place(rank, int(environ["WORLD_SIZE"]), int(environ["LOCAL_RANK"]), "env://")
    # of a step: in a batch script, which is a process alone, there is none
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        port = PORTS + int(environ["SLURM_JOB_ID"]) % PORTS
        return Place(
            int(environ["SLURM_PROCID"]),
            int(environ["SLURM_STEP_NUM_TASKS"]),
            int(environ["SLURM_LOCALID"]),
            f"tcp://{first_host(environ['SLURM_STEP_NODELIST'])}:{port}",
        )
    return None


def first_host(nodes: str) -> str:
    """The first of a list of hosts as slurm writes it: `gpu[03-05,9],login` begins with gpu03."""
    first = re.match(r"([^\[,]+)(?:\[(\w+))?", nodes)
    if first is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes} names no host")
    return first[1] + (first[2] or "")


@contextmanager
def joined(environ: Mapping[str, str]) -> Iterator[Ranks]:
    """The ranks of this process's run, until it ends."""
    own = place(environ)
    if own is None:
        yield ALONE
        return
    from harness.parallel.group import Group  # torch takes seconds to import

    group = Group.join(own)
    try:
        yield group
    finally:
        group.leave()
