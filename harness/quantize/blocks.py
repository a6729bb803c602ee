"""Quantize a model block by block while the calibration activations stream through it.

For each site of a block, in the order of the forward: collect statistics, solve, swap the weights,
go on with what was quantized. A solver may also prepare a block first (AWQ) or solve it as a whole
(AdaScale). A finished block is on disk before the next one begins; a block found there is loaded
and replayed by the same arithmetic, so an interrupted run ends with the same bits. What stands
outside the blocks, embedding and head, is one more block at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from harness.calibration.block import BlockView
from harness.calibration.stream import ENOUGH, Stream
from harness.calibration.subject import quiet, unlogged
from harness.formats import Scheme
from harness.models.adapter import Adapter
from harness.models.offload import trim
from harness.parallel import ALONE, Ranks
from harness.quantize.block import SolvedBlock
from harness.quantize.embeddings import Embeddings
from harness.quantize.gathering import site_input
from harness.quantize.untouched import Untouched
from harness.quantize.weights import decibel, relative
from harness.solvers import Solver
from harness.store import Run
from harness.structure.tape import tensors_of
from harness.transforms import generator


@torch.no_grad()
def quantize(
    adapter: Adapter,
    scheme: Scheme,
    solver: Solver | None,
    windows: Tensor,
    run: Run,
    done: Callable[[int, list[dict], dict], None],
    seed: int = 0,
    stage: Callable[[str, int], AbstractContextManager] = quiet,
    folder: Path | None = None,
    log: Callable[[dict, int], None] = unlogged,
    enough: int | None = ENOUGH,
    untouched: Untouched | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Solve every block of a placed model and switch its activation quantizers on.

    windows: calibration token ids [N, L]; solver None: only activation scales are taken. Solved
    blocks go to `run` and come from it when they are there. `done(index, layers, output)` is called
    after each block, and after what stands outside of them where that is quantized, with the report
    of every linear and of the block's output. stage shows the progress inside a block, log keeps
    its learning curve. folder: where activations lie; None: in memory. enough: an expert that the
    router gave fewer tokens is calibrated on all of its layer's; None: every expert is. untouched:
    what a solver compares with that propagates errors, where a transform has changed the model.
    ranks: each streams its share of the windows, and solves some of the linears.
    """
    count = len(adapter.blocks)
    outside = Embeddings(adapter, scheme, solver)
    missing = any(run.load_block(i) is None for i in range(count + outside.quantizes))
    # a solver of blocks takes a step on every batch, in which each rank has to have its part
    whole = solver is not None and solver.scope == "block"
    streaming = partial(
        Stream, windows=windows, folder=folder, enough=enough, ranks=ranks, apart=whole
    )
    # where scales span tokens, a text is quantized without its neighbours, as it is when evaluated
    at_once = 1 if scheme.spans_tokens else None
    if solver is not None and solver.windows is not None:
        at_once = solver.windows
    if at_once is not None:
        streaming = partial(streaming, tokens_at_once=at_once * windows.shape[1])
    original = stream = error = None
    if missing and solver is not None and (whole or solver.propagate != "none"):
        original = streaming(adapter if untouched is None else untouched.adapter)
    # the original stream has begun: it sees the embedding before this rounds it
    outside.embed(run)
    if missing:
        stream = streaming(adapter)
        error = OutputError(adapter, scheme, stream)
    for index in range(count):
        record = run.load_block(index)
        solved = SolvedBlock(adapter, scheme, solver, index, record, untouched, ranks)
        state = solved.state
        with adapter.open(index, write=True):
            if stream is not None and error is not None:
                if solved.record is None:
                    error.before(index)
                view = BlockView(
                    adapter, scheme, index, stream, generator(seed, "solver", index), stage, log
                )
                solved.walk(stream, original, view)
                if solved.record is None:
                    state.output = error.after(index)
            else:
                state.install()
        if solved.record is None:
            run.save_block(index, state.tensors, {"layers": state.layers, "output": state.output})
        done(index, state.layers, state.output)
        trim()
    if outside.quantizes:
        done(count, outside.finish(stream, run), {})
    for index in range(count):
        _activations(adapter, scheme, index, on=True)


def _activations(adapter: Adapter, scheme: Scheme, index: int, on: bool) -> None:
    """Switch the activation quantizers of a block on or off."""
    for site in adapter.sites(index):
        act = scheme.part("act", index, site.linears[0]) if on else None
        site_input(adapter, index, site).format = act


class OutputError:
    """What quantizing a block, weights and activations, costs its output.

    On the first calibration window, which the first rank has: the stream's input goes through the
    block before and after, so errors of earlier blocks do not count.
    """

    def __init__(self, adapter: Adapter, scheme: Scheme, stream: Stream):
        self.adapter = adapter
        self.scheme = scheme
        self.stream = stream
        if not stream.hidden:
            return
        # once: tensors made anew for each block would split the heap between its temporaries
        hidden, _ = stream.window(adapter.blocks[0])
        self._hidden = torch.empty_like(hidden)
        self._target = torch.empty_like(hidden)

    def before(self, index: int) -> None:
        """To be called before block `index` is changed."""
        if not self.stream.hidden:
            return
        self._hidden.copy_(self.stream.window(self.adapter.blocks[index])[0])
        self._target.copy_(self._forward(index))

    def after(self, index: int) -> dict:
        """{"output_error": |y' - y|^2 / |y|^2, "sqnr_db"}, once the block is quantized; of a rank
        that has no window, nothing."""
        if not self.stream.hidden:
            return {}
        _activations(self.adapter, self.scheme, index, on=True)
        noise = relative(self._forward(index), self._target)
        _activations(self.adapter, self.scheme, index, on=False)
        return {"output_error": noise, "sqnr_db": decibel(noise)}

    def _forward(self, index: int) -> Tensor:
        block = self.adapter.blocks[index]
        return tensors_of(block(self._hidden, **self.stream.window(block)[1]))[0]
