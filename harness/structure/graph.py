"""Which values of a tape come from which, and how: moves, scalings, sums, matrix products.

A *move* puts the same numbers in other places (views, transposes, copies, gathers of rows). A move
keeps *vectors* where the last dimension stays whole, so that a rotation of that dimension passes
through it. What a function does is known by its name in torch's public interface.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.structure.tape import Call, Tape, Value

RESHAPES = {"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"}
TURNS = {"transpose", "swapaxes", "permute", "movedim", "T", "mT", "t", "H"}
PARTS = {"chunk", "split", "split_with_sizes", "tensor_split"}
COPIES = {
    "contiguous", "clone", "detach", "to", "float", "half", "bfloat16", "double", "type_as", "type",
    "dropout", "identity", "requires_grad_", "alias", "cpu", "cuda", "data", "as_subclass",
}  # fmt: skip
ROWS = {
    "squeeze", "unsqueeze", "expand", "expand_as", "repeat", "repeat_interleave", "broadcast_to",
    "__getitem__", "index_select", "select", "narrow", "slice", "unbind", "gather", "index", "pad",
    "roll", "masked_fill", "masked_fill_", "nan_to_num",
}  # fmt: skip
MOVES = RESHAPES | TURNS | PARTS | COPIES | ROWS
SCALINGS = {"mul", "div", "multiply", "true_divide", "mul_", "div_", "__mul__", "__rmul__"}
SCALINGS |= {"__truediv__", "__imul__", "__itruediv__"}
SUMS = {"add", "__add__", "__radd__", "add_", "__iadd__", "sub", "__sub__"}
SCATTERS = {"index_add_", "index_add", "scatter_add_", "index_put_", "__setitem__"}
JOINS = {"cat", "stack"}
REDUCTIONS = {"sum", "mean"}
# of another tensor's dtype or shape, whose content they do not read
LIKE = {"type_as", "expand_as", "view_as", "reshape_as"}
PRODUCTS = {"linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "_grouped_mm"}
PRODUCTS |= {"grouped_mm", "__rmatmul__"}
FRESH = {
    "zeros_like", "zeros", "new_zeros", "empty_like", "empty", "new_empty", "ones_like", "ones",
    "new_ones", "full", "full_like", "arange",
}  # fmt: skip


@dataclass(eq=False)
class Product:
    """A matrix product with a parameter (or one slice of it for each expert).

    reads, writes: the parameter's axes that are summed over and that come out; bias: a parameter.
    from_left: the parameter stands before what it reads, W x, which no module does.
    """

    call: Call
    x: Value
    parameter: str
    reads: int
    writes: int
    bias: str | None = None
    from_left: bool = False

    @property
    def output(self) -> Value:
        """What it gives."""
        return self.call.outputs[0]


class Graph:
    """The values of a tape by what they come from and what uses them."""

    def __init__(self, tape: Tape):
        self.tape = tape
        self.users: dict[Value, list[Call]] = defaultdict(list)
        for call in tape.calls:
            for value in dict.fromkeys(call.inputs):
                self.users[value].append(call)
        self.products = {
            product.output: product
            for product in map(self._product, tape.calls)
            if product is not None
        }

    def _product(self, call: Call) -> Product | None:
        """The matrix product that a call is."""
        if call.op not in PRODUCTS:
            return None
        inputs = call.inputs
        parameters = [value for value in inputs if parameter(value) is not None]
        matrices = [value for value in parameters if len(value.shape) > 1]
        if not matrices:
            return None
        matrix = matrices[0]
        others = [value for value in inputs if value not in parameters]
        placed = axes(matrix)
        if not others or placed is None:
            return None
        # `linear` reads the weight's last axis, a product x @ w the one before
        from_left = inputs[0] is matrix
        turned = call.op == "linear" or from_left
        reads, writes = (placed[-1], placed[-2]) if turned else (placed[-2], placed[-1])
        name = parameter(matrix)
        assert name is not None
        vectors = [parameter(value) for value in parameters if len(value.shape) == 1]
        bias = next(iter(vectors), None)
        return Product(call, others[0], name, reads, writes, bias, from_left)

    def reading(self, value: Value) -> list[Call]:
        """The calls that use what a value holds, and not only its shape."""
        return [
            call
            for call in self.users[value]
            if call.op not in FRESH and not (call.op in LIKE and call.inputs[0] is not value)
        ]

    def into(self, value: Value) -> list[Call]:
        """The calls that use a value, looking through moves that keep its vectors."""
        found = []
        for call in self.reading(value):
            if keeps_vectors(call) and call.inputs[0] is value:
                for output in call.outputs:
                    found += self.into(output)
            else:
                found.append(call)
        return found


def parameter(value: Value) -> str | None:
    """The name of the parameter that a value is, or is a view or copy of."""
    while value.name is None and value.call is not None and value.call.op in MOVES:
        value = value.call.inputs[0]
    return value.name


def axes(value: Value) -> list[int] | None:
    """Which of a parameter's axes each axis of its view is; None where that is not plain."""
    if value.name is not None:
        return list(range(len(value.shape)))
    call = value.call
    if call is None or not call.inputs:
        return None
    base = axes(call.inputs[0])
    if base is None:
        return None
    if call.op in TURNS:
        return _turned(base, call)
    if call.op in COPIES or call.inputs[0].shape == value.shape:
        return base
    # one expert, or the experts of some tokens
    if call.op in ("__getitem__", "unbind", "select"):
        return base[len(base) - len(value.shape) :] if len(value.shape) < len(base) else base
    return None


def _turned(base: list[int], call: Call) -> list[int]:
    """The axes after a transpose or permutation: as it moves a tensor whose sizes number them."""
    probe = torch.empty([size + 2 for size in base], device="meta")
    return [size - 2 for size in moved(call, probe).shape]


def moved(call: Call, value: Tensor, part: int = 0) -> Tensor:
    """What a move makes of another tensor in place of its first value."""
    first = call.inputs[0]
    changed = False

    def put(item):
        nonlocal changed
        if item is first and not changed:
            changed = True
            return value
        if isinstance(item, Value):
            if item.tensor is None:
                raise ValueError("a move by computed positions")
            return item.tensor
        if isinstance(item, tuple | list):
            return type(item)(put(inner) for inner in item)
        return item

    result = call.function(*put(call.args), **{key: put(v) for key, v in call.kwargs.items()})
    return result[part] if isinstance(result, tuple | list) else result


def keeps_vectors(call: Call) -> bool:
    """Whether a call only moves whole vectors of the last dimension."""
    if call.op not in MOVES or not call.inputs:
        return False
    before = call.inputs[0].shape
    after = call.outputs[0].shape
    if not before or not after or before[-1] != after[-1]:
        return False
    if call.op in TURNS:
        # sizes tell the axes apart
        probe = torch.empty([size + 2 for size in range(len(before))], device="meta")
        return moved(call, probe).shape[-1] == len(before) + 1
    return call.op != "gather"


def root(value: Value) -> Value:
    """The value whose vectors a value holds in other places."""
    while value.call is not None and keeps_vectors(value.call):
        value = value.call.inputs[0]
    return value


def back(value: Value, stop: Container[Value]) -> tuple[Value, list[Value]]:
    """(where moves come from, the values on the way in order), back to one of `stop` or as far as
    moves go."""
    path: list[Value] = []
    while value not in stop:
        call = value.call
        if call is None or call.op not in MOVES or parameter(value) is not None:
            break
        path.insert(0, value)
        value = call.inputs[0]
    return value, path


def positions(start: Value, path: list[Value]) -> Tensor:
    """For each place of the path's end, the position in `start` (flat) that it is moved from.

    Raises ValueError where a move depends on computed positions.
    """
    places = torch.arange(torch.Size(start.shape).numel()).view(start.shape)
    for value in path:
        assert value.call is not None
        places = moved(value.call, places, value.part)
    return places


def scales(call: Call) -> bool:
    """Whether a call multiplies every vector of one input by a number."""
    if call.op not in SCALINGS or not call.inputs:
        return False
    shape = call.outputs[0].shape
    vectors = [value for value in call.inputs if value.shape == shape and not scalar(value)]
    return len(vectors) == 1 and all(scalar(v) for v in call.inputs if v is not vectors[0])


def source(value: Value) -> Value:
    """The value whose vectors a value holds, in other places or times numbers."""
    value = root(value)
    while value.call is not None and scales(value.call):
        call = value.call
        value = root(next(v for v in call.inputs if not scalar(v)))
    return value


def scalar(value: Value) -> bool:
    """Whether a value is one number, or one for each vector."""
    if parameter(value) is not None:
        return all(size == 1 for size in value.shape)
    return not value.shape or value.shape[-1] == 1
