"""torch.distributed, its insides: processes connected, and none of it the default of the library.

ProcessGroup._set_default_backend, ProcessGroup._register_backend, ProcessGroupNCCL.Options._timeout
    what init_process_group does but for the default group

Libraries that find a default group take it for theirs, and compute with others what a process wants
to compute by itself: compressed-tensors unpacks a share of a model's layers and waits for the rest.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store


def connected(store: Store, rank: int, count: int, timeout: timedelta) -> dist.ProcessGroup:
    """The group of all ranks that meet through a store: gloo on CPUs, nccl on GPUs."""
    kinds = dist.ProcessGroup.BackendType
    group = dist.ProcessGroup(store, rank, count)
    group._set_default_backend(kinds.GLOO)
    gloo = dist.ProcessGroupGloo(PrefixStore("cpu", store), rank, count, timeout)
    group._register_backend(torch.device("cpu"), kinds.GLOO, gloo)
    if torch.cuda.is_available():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        nccl = dist.ProcessGroupNCCL(PrefixStore("cuda", store), rank, count, options)
        group._register_backend(torch.device("cuda"), kinds.NCCL, nccl)
    return group
