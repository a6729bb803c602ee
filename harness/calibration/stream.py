"""Calibration activations, carried through a model block by block.

Blocks are walked site by site in micro-batches (passage.py). Stopping where a site is about to be
read lets a solver quantize its linears before they run, so one forward serves both statistics and
propagation, and replaying finished blocks does the same arithmetic.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.calibration.passage import Arriving, Passage
from harness.models.adapter import Adapter
from harness.parallel import ALONE, Ranks
from harness.structure.site import Site
from harness.structure.tape import tensors_of

ENOUGH = 128  # tokens: an expert that the router gave fewer is shown all of its layer's


class _PassedBy(nn.Module):
    """Stands where a block does while a forward passes by.

    It keeps what the block would be called with and hands the hidden states on as they are, or
    `given` ones, as the first of the `returned` results of a block. What else is asked of it, the
    block answers.
    """

    def __init__(self, block: nn.Module, returned: int, given: Tensor | None = None):
        super().__init__()
        # past nn.Module's __setattr__, for the block is no submodule of this
        self.__dict__ |= {"block": block, "returned": returned, "given": given}

    def __getattr__(self, name: str):
        return getattr(self.__dict__["block"], name)

    def forward(self, *args, **kwargs) -> Tensor | tuple[Tensor | None, ...]:
        held = self.__dict__
        called = inspect.signature(held["block"].forward).bind(*args, **kwargs)
        first, *_ = called.signature.parameters
        arguments = dict(called.arguments)
        hidden = arguments.pop(first)
        for name, parameter in called.signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name, {})
        held["kwargs"] = arguments
        held["hidden"] = hidden
        result = hidden if held["given"] is None else held["given"]
        rest = [None] * (held["returned"] - 1)
        return (result, *rest) if held["returned"] else result


def arriving(adapter: Adapter, ids: Tensor) -> tuple[Tensor, list[dict]]:
    """(embedded tokens [B, L, hidden], what each block is called with besides) of token ids [B, L].

    Runs no block. Layers of one model may have other masks (sliding windows between full
    attention), and each gets its own.
    """
    passed, _ = _pass_by(adapter, ids)
    return passed[0].hidden, [stand_in.kwargs for stand_in in passed]


def _pass_by(
    adapter: Adapter, ids: Tensor, leaving: Tensor | None = None
) -> tuple[list[_PassedBy], Tensor]:
    """What stood in for the blocks in a forward, and what the head would read of it.

    leaving: hidden states to come out of the last block.
    """
    blocks = adapter.blocks
    originals = list(blocks)
    returned = adapter.structure.returned
    passed = [_PassedBy(block, returned) for block in originals[:-1]]
    passed.append(_PassedBy(originals[-1], returned, leaving))
    try:
        for index, stand_in in enumerate(passed):
            blocks[index] = stand_in
        output = adapter.backbone(input_ids=ids, use_cache=False)
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block
    return passed, output.last_hidden_state


class Stream:
    """Hidden states of all calibration windows [N, L, hidden], walked in micro-batches.

    A micro-batch has at most `tokens_at_once` tokens, but at least a window. What outlives it lies
    in one allocation each, so that the temporaries between reuse the same memory; with a `folder`,
    in files there, whose pages the system may drop and read again.
    """

    def __init__(
        self,
        adapter: Adapter,
        windows: Tensor,
        tokens_at_once: int = 2048,
        folder: Path | None = None,
        enough: int | None = ENOUGH,
        ranks: Ranks = ALONE,
        apart: bool = False,
    ):
        """windows: token ids [N, L]. enough: see Passage. ranks: each has its share of the
        micro-batches, which are those of one process: some quantizers look at all of one. apart:
        they are cut, so that ranks share the windows of each of one process's, a batch here.

        Runs the embedding, the rotary table and the masks once. `block_kwargs` {block: what it is
        called with besides hidden states, one a micro-batch}. tokens: of all ranks; starts: where
        in the text each micro-batch begins. batches: the windows of each; places: (batch, row in
        it) with which each micro-batch begins.
        """
        self.adapter = adapter
        self._folder = folder
        self.ranks = ranks
        self.tokens = windows.numel()
        self._enough = enough
        self._alone: dict[nn.Module, dict] | None = None
        count = len(windows)
        together = max(1, tokens_at_once // windows.shape[1])
        self.batches = [min(together, count - first) for first in range(0, count, together)]
        self._batch = _divisor(together, together // ranks.count) if apart else together
        firsts = ranks.share(range(0, count, self._batch))
        self.starts = [first * windows.shape[1] for first in firsts]
        self.places = [divmod(first, together) for first in firsts]
        self._windows = ranks.share(windows.split(self._batch))
        self._hidden = torch.empty(0, device=adapter.device)  # of a rank without a micro-batch
        self.block_kwargs: dict[nn.Module, list[dict]] = {block: [] for block in adapter.blocks}
        for index, batch in enumerate(self._windows):
            embedded, contexts = arriving(adapter, batch.to(adapter.device))
            if embedded.shape[:2] != batch.shape:
                raise RuntimeError(
                    f"model: blocks of a {adapter.structure.architecture} take hidden states "
                    f"{list(embedded.shape)} for tokens {list(batch.shape)}, and cannot be walked "
                    "one by one."
                )
            if index == 0:
                count = sum(map(len, self._windows))
                # a token may have several vectors
                shape = torch.Size((count, *embedded.shape[1:]))
                self._hidden = self._room(embedded, shape.numel()).view(shape)
            self.hidden[index].copy_(embedded)
            for block, context in zip(adapter.blocks, contexts):
                self.block_kwargs[block].append(context)

    def _room(self, like: Tensor, size: int) -> Tensor:
        """An empty [size] of like's dtype, in memory beside it or in a file."""
        if self._folder is None or like.device.type != "cpu" or not size:
            return like.new_empty(size)
        self._folder.mkdir(parents=True, exist_ok=True)
        # once mapped, the file needs no name, and lives as long as the tensor
        with tempfile.NamedTemporaryFile(dir=self._folder) as file:
            return torch.from_file(file.name, shared=True, size=size, dtype=like.dtype)

    @property
    def hidden(self) -> tuple[Tensor, ...]:
        """The residual stream, a view a micro-batch."""
        return self._hidden.split(self._batch) if self._windows else ()

    def window(self, block: nn.Module) -> tuple[Tensor, dict]:
        """This rank's first window's hidden states [1, L, hidden], a view, and what the block is
        called with beside them."""
        if self._alone is None:
            # asked of the model, for only it knows what has a row for each window
            _, contexts = arriving(self.adapter, self._windows[0][:1].to(self.adapter.device))
            self._alone = dict(zip(self.adapter.blocks, contexts))
        return self.hidden[0][:1], self._alone[block]

    def leading(self, block: nn.Module, tokens: int) -> list[tuple[Tensor, dict]]:
        """The micro-batches of the text's first tokens, on every rank: hidden states, copied, and
        what the block is called with beside them."""
        passing = zip(self.starts, self.hidden, self.block_kwargs[block])
        own = [(hidden.clone(), kwargs) for start, hidden, kwargs in passing if start < tokens]
        return self.ranks.merged(own)

    def walk(
        self, block: nn.Module, stay: bool = False, twin: nn.Module | None = None
    ) -> Iterator[tuple[Site, Arriving]]:
        """Pass a block site by site, each with what it reads, one micro-batch at a time.

        A caller reads as much of it as it wants, once, and may then change the site's linears: the
        stream goes on with what they have become. stay: on a copy, so that the stream does not.
        twin: a copy of the block, which is passed in its place.
        """
        index = list(self.adapter.blocks).index(block)
        sites = self.adapter.sites(index)
        hidden = self.hidden
        if stay:
            copy = self._room(self._hidden, self._hidden.numel()).view_as(self._hidden)
            copied = copy.copy_(self._hidden).split(self._batch)
            hidden = copied[: len(hidden)]
        passed = block if twin is None else twin
        kwargs = self.block_kwargs[block]
        alone = twin is None
        room = self._room
        passage = Passage(
            passed, sites, hidden, kwargs, room, self.starts, self._enough, alone, self.ranks
        )
        for site in sites:
            yield site, passage.arriving(site)
        if not stay:
            passage.finish()

    def advance(self, block: nn.Module) -> None:
        """Pass a whole block as it is."""
        for hidden, kwargs in zip(self.hidden, self.block_kwargs[block]):
            hidden.copy_(tensors_of(block(hidden, **kwargs))[0])

    def leave(self) -> Iterator[Tensor]:
        """What the output head reads, once all blocks are passed, one micro-batch at a time."""
        for hidden, ids in zip(self.hidden, self._windows):
            yield _pass_by(self.adapter, ids.to(self.adapter.device), hidden)[1]


def _divisor(number: int, most: int) -> int:
    """The greatest divisor that is no greater than `most`; 1 at least."""
    return max(each for each in range(1, number + 1) if number % each == 0 and each <= max(1, most))
