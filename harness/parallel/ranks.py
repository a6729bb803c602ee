"""What a process knows of those that compute the same run beside it.

    rank r of N takes the items r, r + N, r + 2N, .. of a list; what it finds is added up, or laid
    in the list's order again

All ranks run the same lines and so meet in the same order: whatever takes part of all of them (a
sum, a gathering) stands where each of them comes by, also one that has no item. Here is a process
that is alone: a share is everything, a sum is what it is, and nothing costs anything. group.py has
several. Imports no torch: a stored result is shown by a process that has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """A rank's place among `count`; local: its number on its machine; url: where all meet."""

    rank: int
    count: int
    local: int
    url: str


class RankLost(RuntimeError):
    """Another rank ended, so that this one cannot go on."""


class Ranks:
    """A process alone: rank 0 of 1. local: its number on its machine, None where it is alone."""

    rank: int = 0
    count: int = 1
    local: int | None = None

    @property
    def first(self) -> bool:
        """Whether this rank writes files and talks to a person; another may once it is gone."""
        return self.rank == 0

    def share(self, items: Any) -> Any:
        """This rank's items of a sequence, or rows of a tensor, that all ranks have."""
        return items[self.rank :: self.count]

    def owns(self, index: int) -> bool:
        """Whether an item of that index is in this rank's share."""
        return index % self.count == self.rank

    def merged(self, items: Iterable[T]) -> list[T]:
        """The list whose `share`s these are, on every rank."""
        shares = self.gather(list(items))
        total = sum(map(len, shares))
        return [shares[index % self.count][index // self.count] for index in range(total)]

    def starts(self, sizes: Sequence[int]) -> tuple[list[int], int]:
        """Where each item of this rank's share begins if all are laid side by side; the end."""
        merged = self.merged(sizes)
        ends = list(accumulate(merged))
        begins = [end - size for end, size in zip(ends, merged)]
        return self.share(begins), sum(merged)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, on every rank."""
        return [value]

    def sum_(self, *tensors: Tensor) -> None:
        """Add what all ranks have there, in place."""

    def maximum_(self, *tensors: Tensor) -> None:
        """Take the greatest that any rank has there, in place."""

    def in_turn(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        """All ranks' tensors in the order of the list whose shares they are, on every rank."""
        yield from tensors

    def lead(self, call: Callable[[], T]) -> T:
        """What call() gives on rank 0, which alone makes it; what it raises, all raise.

        Within it nothing may take part of all ranks.
        """
        return call()

    @contextmanager
    def leading(self, context: AbstractContextManager) -> Iterator[None]:
        """Rank 0 alone enters; the others go on once it has."""
        with context:
            yield

    def cause(self, error: BaseException) -> BaseException:
        """An error, or what ended another rank where this one only follows from that."""
        return error

    def speaks(self, message: str) -> str | None:
        """What goes before a message of how this rank ended; None where another one says it."""
        return ""


ALONE = Ranks()
