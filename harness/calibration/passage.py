"""One block's forward, of all micro-batches at once, stopped where a site is about to be read.

The forward is recorded once for each shape of micro-batch (harness/structure/tape.py) and run again
on the others; between sites, the values that later calls need are kept, in one allocation for all
micro-batches. Where a forward depends on what the tokens are (it reads a tensor's content), no
recorded line holds for all: the block then runs anew up to each site.

Rejected: holding each micro-batch in a paused thread (frames keep alive what no call needs any
more), one whole-batch forward (all intermediate activations at once).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from harness.calibration.recording import arguments_at, recorded
from harness.models.experts import inside, is_last, routed
from harness.models.offload import trim
from harness.parallel import ALONE, Ranks
from harness.structure.site import Site
from harness.structure.tape import Tape, Value, tensors_of

Room = Callable[[Tensor, int], Tensor]  # (like, elements) -> an empty [elements]


@dataclass(frozen=True)
class Arriving:
    """What the linears of a site are about to read, one micro-batch at a time; once.

    starts: the row of the whole text with which each begins. routed: how many tokens the router
    gave the site's expert, on all ranks; None of any other site. every: whether the expert is shown
    all of its layer's tokens instead of those.
    """

    activations: Iterator[Tensor]
    starts: Sequence[int]
    routed: int | None = None
    every: bool = False

    def __iter__(self) -> Iterator[Tensor]:
        return self.activations


class Passage:
    """A block on its way through a stream.

    sites: its sites, whose linears may be changed once they are reached. hidden: the stream's
    views, one a micro-batch, which take the block's output at the end; kwargs: what the block is
    called with besides, of each. room: where kept values lie. starts: the token of the whole text
    with which each micro-batch begins. enough: an expert that the router gave fewer tokens is shown
    all of its layer's; None: every expert is. tidy: give freed memory back at each site; what is
    passed beside another leaves that to it. ranks: each passes other micro-batches.
    """

    def __init__(
        self,
        block: nn.Module,
        sites: Sequence[Site],
        hidden: Sequence[Tensor],
        kwargs: Sequence[dict],
        room: Room,
        starts: Sequence[int],
        enough: int | None = None,
        tidy: bool = True,
        ranks: Ranks = ALONE,
    ):
        self.block = block
        self.enough = enough
        self._tidy = tidy
        self._leaves = {name: block.get_submodule(name) for name in _leaf_names(sites)}
        self.hidden = hidden
        self.kwargs = kwargs
        self.room = room
        self.starts = starts
        self.ranks = ranks
        self._tapes: dict[tuple, Tape] = {}
        self._values: list[dict[Value, Tensor]] = []
        self._at = [0] * len(hidden)  # the next call of each micro-batch
        self._rooms: dict[tuple[int, int], tuple[int, Tensor]] = {}
        self._given: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def arriving(self, site: Site) -> Arriving:
        """What the site's linears are about to read; to be asked for once."""
        if site.expert is None:
            self._given.clear()
            return Arriving((args[0] for args in self._reaching(site)), self.starts)
        module = self._leaves[leaf(site)]
        given = self._experts(site)
        routes = [routed(index, site.expert)[0] for _, index in given]
        starts, count = self.ranks.starts(list(map(len, routes)))
        every = self.enough is None or count < self.enough
        if every:
            starts = self.starts
        else:
            starts = [start for start, route in zip(starts, routes) if len(route)]
        shown = (x if every else x[route] for (x, _), route in zip(given, routes))
        shown = (x for x in shown if len(x))
        if is_last(site.linears[0]):
            shown = (inside(module, site.expert, x) for x in shown)
        return Arriving(shown, starts, count, every)

    def _experts(self, site: Site) -> list[tuple[Tensor, Tensor]]:
        """(what is given to a site's experts, the router's choices) of each micro-batch; found once
        for all of them."""
        name = leaf(site)
        if name not in self._given:
            self._given[name] = [(x, index) for x, index, _ in self._reaching(site)]
        return self._given[name]

    def _reaching(self, site: Site) -> Iterator[tuple]:
        """What the module that reads a site is called with, one micro-batch at a time."""
        module = self._leaves[leaf(site)]
        if self.hidden:
            self._tape(0)
        if self._tidy:
            trim()  # the holes of a forward, into which what is kept would not fit
        for index in range(len(self.hidden)):
            tape = self._tape(index)
            if tape.reads_content:
                yield self._stopped(index, module)
                continue
            call = next(call for call in tape.calls if call.function is module)
            # what experts read is kept, for each of them asks for it
            start = tape.resting(call.position) if site.expert is None else call.position
            self._run(index, start)
            # on a copy: what is made on the last stretch is made again when the block goes on
            values = dict(self._values[index])
            tape.run(values, start, call.position)
            yield tuple(values[value] for value in call.inputs)
        # what lay there was needed up to here
        first = self._values[0] if self._values else {}
        live = {_place(value) for value in first if value.call is not None}
        self._rooms = {place: room for place, room in self._rooms.items() if place in live}

    def finish(self) -> None:
        """Run what is left of the block; its output becomes the stream."""
        self._given.clear()
        for index, hidden in enumerate(self.hidden):
            tape = self._tape(index)
            if tape.reads_content:
                output = tensors_of(self.block(hidden, **self.kwargs[index]))[0]
            else:
                self._run(index, len(tape.calls))
                output = self._values[index].pop(tape.output[0])
            hidden.copy_(output)
        self._rooms.clear()

    def _tape(self, index: int) -> Tape:
        """The tape for a micro-batch, recorded for its shape; its values so far stand beside it."""
        given = tensors_of((self.hidden[index], self.kwargs[index]))
        shape = tuple(tuple(tensor.shape) for tensor in given)
        if shape not in self._tapes:
            self._tapes[shape] = recorded(
                self.block, self.hidden[index], self.kwargs[index], self._leaves.values()
            )
        tape = self._tapes[shape]
        if len(self._values) == index:
            self._values.append(dict(zip(tape.given, given)))
        return tape

    def _stopped(self, index: int, module: nn.Module) -> tuple:
        """What a module is about to be called with, in a forward from the block's beginning."""

        def run() -> object:
            return self.block(self.hidden[index], **self.kwargs[index])

        args, kwargs = arguments_at(module, run)
        return (*args, *kwargs.values())

    def _run(self, index: int, stop: int) -> None:
        """Go on to a call, and keep what is left."""
        tape = self._tape(index)
        values = self._values[index]
        tape.run(values, self._at[index], stop)
        self._at[index] = stop
        if stop < len(tape.calls):
            self._keep(index, tape)

    def _keep(self, index: int, tape: Tape) -> None:
        """Move what a micro-batch needs later into the rooms of all of them."""
        values = self._values[index]
        stream = self.hidden[index]
        for value, tensor in values.items():
            if value.call is None:
                continue
            if tensor.data_ptr() == stream.data_ptr():
                continue
            used = any(other.data_ptr() == stream.data_ptr() for other in values.values())
            if not used and (tensor.shape, tensor.dtype) == (stream.shape, stream.dtype):
                # what entered the block is not needed any more: the stream's own place is free
                place = stream
            else:
                place = self._room(value, index, tensor)
            if tensor.data_ptr() != place.data_ptr():
                values[value] = place.copy_(tensor)

    def _room(self, value: Value, index: int, like: Tensor) -> Tensor:
        """A place for one value of one micro-batch."""
        key = _place(value)
        if key not in self._rooms:  # the first micro-batch is the largest
            size = like.numel()
            self._rooms[key] = (size, self.room(like, size * len(self.hidden)))
        size, room = self._rooms[key]
        return room[index * size : index * size + like.numel()].view(like.shape)


def leaf(site: Site) -> str:
    """The block-relative module that reads a site: its first linear, or the experts as a whole."""
    first = site.linears[0]
    return first if site.expert is None else first.rpartition(".")[0].rpartition(".")[0]


def _leaf_names(sites: Sequence[Site]) -> set[str]:
    """The block-relative modules whose content may change on the way."""
    return {name if site.expert is None else leaf(site) for site in sites for name in site.linears}


def _place(value: Value) -> tuple[int, int]:
    """Where a value stands on its tape, the same on tapes of other shapes."""
    assert value.call is not None
    return value.call.position, value.part
