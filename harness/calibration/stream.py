"""Calibration activations, carried through a model block by block.

Blocks are walked branch by branch, `h <- h + module(norm(h))`, in micro-batches: the entry site is
the norm's output, the exit site is what the branch's last linear is about to read. Stopping there
lets a solver quantize that linear before it runs, so one forward serves both statistics and
propagation, and replaying finished blocks does the same arithmetic. Rejected: holding each
micro-batch in a paused thread (same memory, more machinery), one whole-batch forward (four times
the intermediate activations).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.models.adapter import Adapter, Branch, Site


class _Reached(Exception):
    """Carries the arguments with which a module was about to be called; the module does not run."""

    def __init__(self, args: tuple, kwargs: dict):
        super().__init__()
        self.args, self.kwargs = args, kwargs


def arguments_at(module: nn.Module, run: Callable[[], object]) -> tuple[tuple, dict]:
    """Call `run()` up to the moment `module` would be entered.

    Returns the (args, kwargs) of that call. Raises RuntimeError where it never comes.
    """

    def stop(_: nn.Module, args: tuple, kwargs: dict) -> None:
        raise _Reached(args, kwargs)

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except _Reached as reached:
        return reached.args, reached.kwargs
    finally:
        handle.remove()
    raise RuntimeError(f"the forward never reached {type(module).__name__}")


class _PassedBy(nn.Module):
    """Stands where a block does while a forward passes by.

    It keeps what the block would be called with and hands the hidden states on as they are. What
    else is asked of it, the block answers.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        # past nn.Module's __setattr__, for the block is no submodule of this
        self.__dict__["block"] = block

    def __getattr__(self, name: str):
        return getattr(self.__dict__["block"], name)

    def forward(self, *args, **kwargs) -> Tensor:
        self.__dict__["kwargs"] = kwargs
        self.__dict__["hidden"] = args[0] if args else kwargs.pop("hidden_states")
        return self.__dict__["hidden"]


def arriving(adapter: Adapter, ids: Tensor) -> tuple[Tensor, list[dict]]:
    """(embedded tokens [B, L, hidden], what each block is called with besides) of token ids [B, L].

    Runs no block. Layers of one model may have other masks (sliding windows between full
    attention), and each gets its own.
    """
    blocks = adapter.blocks
    originals = list(blocks)
    passed = [_PassedBy(block) for block in originals]
    try:
        for index, stand_in in enumerate(passed):
            blocks[index] = stand_in
        adapter.backbone(input_ids=ids, use_cache=False)
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block
    return passed[0].hidden, [stand_in.kwargs for stand_in in passed]


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
    ):
        """windows: token ids [N, L].

        Runs the embedding, the rotary table and the masks once. `block_kwargs` {block: what it is
        called with besides hidden states, one a micro-batch}.
        """
        self.adapter = adapter
        self._folder = folder
        self.tokens = windows.numel()
        self._batch = max(1, tokens_at_once // windows.shape[1])
        self.block_kwargs: dict[nn.Module, list[dict]] = {block: [] for block in adapter.blocks}
        for index, batch in enumerate(windows.split(self._batch)):
            embedded, contexts = arriving(adapter, batch.to(adapter.device))
            if index == 0:
                self._hidden = self._room(embedded, embedded.shape[-1], windows.shape)
            self.hidden[index].copy_(embedded)
            for block, context in zip(adapter.blocks, contexts):
                self.block_kwargs[block].append(context)

    def _room(self, like: Tensor, width: int, shape: torch.Size) -> Tensor:
        """An empty [N, L, width] of like's dtype, in memory beside it or in a file."""
        if self._folder is None or like.device.type != "cpu":
            return like.new_empty(*shape, width)
        self._folder.mkdir(parents=True, exist_ok=True)
        size = shape.numel() * width
        # once mapped, the file needs no name, and lives as long as the tensor
        with tempfile.NamedTemporaryFile(dir=self._folder) as file:
            room = torch.from_file(file.name, shared=True, size=size, dtype=like.dtype)
        return room.view(*shape, width)

    @property
    def hidden(self) -> tuple[Tensor, ...]:
        """The residual stream, a view a micro-batch."""
        return self._hidden.split(self._batch)

    def window(self, block: nn.Module) -> tuple[Tensor, dict]:
        """The first window's hidden states [1, L, hidden], a view, and the context with them."""
        # what has a row a window is cut to the first; what all windows share stays
        rows = self.hidden[0].shape[0]
        alone = {
            key: value[:1] if isinstance(value, Tensor) and value.shape[0] == rows else value
            for key, value in self.block_kwargs[block][0].items()
        }
        return self.hidden[0][:1], alone

    def walk(self, block: nn.Module) -> Iterator[tuple[Site, Iterator[Tensor]]]:
        """Pass a block site by site, each with what it reads, one micro-batch at a time.

        A caller reads as much of it as it wants, once, and may then change the site's linears: the
        stream goes on with what they have become.
        """
        for branch in self.adapter.family.branches:
            yield branch.entry, self._entry(block, branch)
            activations = self._exit(block, branch)
            yield branch.exit, activations
            for _ in activations:  # what the caller left; the branch's output needs all of it
                pass
            self._close(block, branch)

    def _entry(self, block: nn.Module, branch: Branch) -> Iterator[Tensor]:
        """The branch's entry activations, one micro-batch at a time."""
        assert branch.entry.norm is not None  # a branch begins with one
        norm = block.get_submodule(branch.entry.norm)
        for hidden in self.hidden:
            yield norm(hidden)

    def _exit(self, block: nn.Module, branch: Branch) -> Iterator[Tensor]:
        """What the branch's last linear is about to read, one micro-batch at a time.

        It is kept for `_close`.
        """
        module = block.get_submodule(branch.module)
        last = block.get_submodule(branch.exit.linears[0])
        width = self.adapter.width(branch.exit)
        self._read = self._room(self._hidden, width, self._hidden.shape[:2])
        contexts: Iterable[dict] = repeat({})
        if branch.context:
            contexts = self.block_kwargs[block]
        rooms = self._read.split(self._batch)
        for context, x, room in zip(contexts, self._entry(block, branch), rooms):
            args, _ = arguments_at(last, lambda x=x, context=context: module(x, **context))
            yield room.copy_(args[0])

    def advance(self, block: nn.Module) -> None:
        """Pass a whole block as it is."""
        for _ in self.walk(block):
            pass

    def leave(self) -> Iterator[Tensor]:
        """What the output head reads, once all blocks are passed, one micro-batch at a time."""
        norm = self.adapter.model.get_submodule(self.adapter.family.final_norm)
        for hidden in self.hidden:
            yield norm(hidden)

    def _close(self, block: nn.Module, branch: Branch) -> None:
        """Run the last linear on what `_exit` kept, and add the branch to the stream in place."""
        last = block.get_submodule(branch.exit.linears[0])
        for hidden, read in zip(self.hidden, self._read.split(self._batch)):
            hidden += last(read)  # a view: the stream itself moves on
        del self._read
