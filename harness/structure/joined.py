"""Why the blocks of a model cannot be taken one by one, where they cannot.

A block is taken by itself if all that it needs of the others is the hidden states [B, T, ..] that
the one before it hands on, and if nobody else computes with its weights.
"""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedModel

from harness.libraries.transformers import shared_names
from harness.structure.forward import TOKENS, Forward
from harness.structure.graph import FRESH, LIKE
from harness.structure.tape import Call, Value


def joined(forward: Forward) -> tuple[str, ...]:
    """The reasons of a model; empty where each block may be taken by itself."""
    return (*_in_batches(forward), *_read(forward), *_shared(forward.model, forward.blocks))


def _in_batches(forward: Forward) -> Iterator[str]:
    """Hidden states begin with the batch and the tokens."""
    if forward.arriving[:2] != (1, TOKENS):
        shape = ", ".join("T" if size == TOKENS else str(size) for size in forward.arriving)
        yield f"blocks take hidden states [{shape}] for tokens [1, T]"


def _read(forward: Forward) -> Iterator[str]:
    """The first block that reads more of another than what it hands on."""
    made: dict[Value, int] = {}  # by which block, or of what it made
    for call in forward.tape.calls:
        for value in _contents(call):
            block = made.get(value)
            if block is None or block == call.layer:
                continue
            if call.layer is None:
                made |= dict.fromkeys(call.outputs, block)
            elif forward.handed[block] is not value or block != call.layer - 1:
                yield f"block {call.layer} reads more of block {block} than its hidden states"
                return
        if call.layer is not None:
            made |= dict.fromkeys(call.outputs, call.layer)


def _contents(call: Call) -> list[Value]:
    """The inputs of which a call reads more than the shape."""
    if call.op in FRESH:
        return []
    return call.inputs[:1] if call.op in LIKE else call.inputs


def _shared(model: PreTrainedModel, blocks: str) -> Iterator[str]:
    """Blocks that have weights in common."""
    layers = {}
    for name, other in shared_names(model).items():
        if name.startswith(f"{blocks}.") and other.startswith(f"{blocks}."):
            pair = sorted(int(each[len(blocks) + 1 :].partition(".")[0]) for each in (name, other))
            layers[tuple(pair)] = None
    for first, second in layers:
        yield f"blocks {first} and {second} share their weights"
