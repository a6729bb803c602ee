"""Several processes as ranks of one run, by torch.distributed: gloo on CPUs, nccl on GPUs.

A rank that fails says why under `failed/RANK` of the store through which all met, before it goes;
one that is killed is missed by its process id. Who waits for it in a collective finds either.
"""

from __future__ import annotations

import io
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from harness.libraries.distributed import connected
from harness.parallel.ranks import Place, RankLost, Ranks

T = TypeVar("T")

# A rank that is gone closes its connections, which ends a wait; one at work may take its time.
WAIT = timedelta(hours=24)
MEET = timedelta(minutes=10)  # for all ranks to have come
PATIENCE = 5.0  # seconds in which a rank that ends says why
POLL = 0.05


class Group(Ranks):
    """This process's rank; made by `join`."""

    def __init__(self, place: Place, store: Store, group: dist.ProcessGroup):
        self.rank = place.rank
        self.count = place.count
        self.local = place.local
        self._store = store
        self._group = group
        self._writer = 0
        self._places = self.gather((socket.gethostname(), os.getpid()))

    @property
    def first(self) -> bool:
        return self.rank == self._writer

    @classmethod
    def join(cls, place: Place) -> Group:
        """Wait until all ranks have come."""
        if torch.cuda.is_available():
            torch.cuda.set_device(place.local % torch.cuda.device_count())
        meeting = rendezvous(place.url, place.rank, place.count, timeout=MEET)
        store, _, _ = next(meeting)
        group = connected(PrefixStore("group", store), place.rank, place.count, WAIT)
        return cls(place, PrefixStore("harness", store), group)

    def leave(self) -> None:
        """No rank is heard of any more."""
        self._group.shutdown()

    def gather(self, value: T) -> list[T]:
        values: list = [None] * self.count
        with _meeting():
            dist.all_gather_object(values, _packed(value), self._group)
        return [_unpacked(packed) for packed in values]

    def sum_(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            whole = tensor.contiguous()  # itself, in most cases
            with _meeting():
                dist.all_reduce(whole, group=self._group)
            if whole is not tensor:
                tensor.copy_(whole)

    def maximum_(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            with _meeting():
                dist.all_reduce(tensor, dist.ReduceOp.MAX, self._group)

    def in_turn(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        own = iter(tensors)
        while True:
            mine = next(own, None)
            told = None if mine is None else (mine.shape, mine.dtype, mine.device.type)
            everyone = self.gather(told)
            if not any(everyone):
                return
            for rank, outline in enumerate(everyone):
                if outline is None:
                    continue
                shape, dtype, kind = outline
                if rank == self.rank and mine is not None:
                    tensor = mine.contiguous()
                else:
                    tensor = torch.empty(shape, dtype=dtype, device=kind)
                self._send(tensor, rank)
                yield tensor

    def _send(self, tensor: Tensor, rank: int) -> None:
        """A rank's tensor to all others, in place of theirs."""
        with _meeting():
            dist.broadcast(tensor, group=self._group, group_src=rank)

    def lead(self, call: Callable[[], T]) -> T:
        told = b""
        if self.rank == 0:
            try:
                told = _packed((call(), None))
            except Exception as error:
                told = _packed((None, _sendable(error)))
        length = torch.tensor(len(told))
        self._send(length, 0)
        sent = torch.empty(int(length), dtype=torch.uint8)
        if self.rank == 0:
            sent = torch.frombuffer(bytearray(told), dtype=torch.uint8)
        self._send(sent, 0)
        value, error = _unpacked(sent.numpy().tobytes())
        if error is not None:
            raise error
        return value

    @contextmanager
    def leading(self, context: AbstractContextManager) -> Iterator[None]:
        with ExitStack() as held:
            self.lead(lambda: held.enter_context(context) and None)
            yield

    def cause(self, error: BaseException) -> BaseException:
        interrupted = isinstance(error, KeyboardInterrupt)
        with suppress(ValueError):  # of a thread
            # torchrun ends the others at once, and this one is ending: what it says must get out
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            if not interrupted and not isinstance(error, RankLost):
                self._store.set(f"failed/{self.rank}", f"{type(error).__name__}: {error}")
                return error
            if interrupted:
                self._store.set(f"interrupted/{self.rank}", "")
            until = time.monotonic() + PATIENCE
            while True:
                lost = self._lost()
                if lost is not None:
                    return RankLost(lost)
                if interrupted or time.monotonic() > until:
                    return error
                time.sleep(POLL)
        except dist.DistError:  # the store was that of the rank that is gone
            return error

    def _lost(self) -> str | None:
        """Which other rank ended by itself, and why."""
        killed = []
        for rank, (host, pid) in enumerate(self._places):
            if rank == self.rank or self._store.check([f"interrupted/{rank}"]):
                continue
            if self._store.check([f"failed/{rank}"]):
                return f"rank {rank}: {self._store.get(f'failed/{rank}').decode()}"
            if host == socket.gethostname() and not _alive(pid):
                killed.append(rank)
        if not killed:
            return None
        if killed[0] == 0:  # the first that lives tells of it
            self._writer = min(set(range(self.count)) - set(killed))
        host, pid = self._places[killed[0]]
        return f"rank {killed[0]} (process {pid} on {host}) was killed"

    def speaks(self, message: str) -> str | None:
        with suppress(dist.DistError):
            if self.first:
                self._store.set("said", message)
                return ""
            if message.startswith(RankLost.__name__):
                return None
            self._store.wait(["said"], timedelta(seconds=PATIENCE))
            if self._store.get("said").decode() == message:
                return None
        return f"rank {self.rank}: "


@contextmanager
def _meeting() -> Iterator[None]:
    """Raises RankLost where a collective fails."""
    try:
        yield
    except RuntimeError as error:
        first, *_ = str(error).splitlines() or [""]
        raise RankLost(f"another rank is gone ({first})") from error


def _packed(value: object) -> bytes:
    """A value as other ranks can have it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(packed: bytes):
    """What was packed, with tensors of a GPU on this rank's."""
    count = torch.cuda.device_count()
    places = {f"cuda:{index}": f"cuda:{torch.cuda.current_device()}" for index in range(count)}
    return torch.load(io.BytesIO(packed), map_location=places, weights_only=False)


def _sendable(error: Exception) -> Exception:
    """An exception as another process can raise it."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # of a class whose pickle does not come back
        return RuntimeError(f"{type(error).__name__}: {error}")


def _alive(pid: int) -> bool:
    """Whether a process of this machine runs: one that is gone may wait for its parent to look."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
