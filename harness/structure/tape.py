"""A forward as a straight line of torch calls: recorded once, looked at, and run again.

A `TorchFunctionMode` sees every torch function that a forward calls; what it calls with and what
comes of it are *values*. Modules named as leaves are recorded as one call each, so that what they
compute may be changed later (a linear that is quantized). Run again on other tokens of the same
shape, the line gives what the module gives, in every bit, and may be stopped at any call.

Rejected: torch.fx and torch.export, which trace what a model would do with symbols, refuse what
they cannot express, and know no leaves that change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

# what is not done twice
HEAVY = {"leaf", "scaled_dot_product_attention", "linear", "matmul", "__matmul__", "bmm", "addmm"}
# what makes a number of Python's, or a shape, out of a tensor's content: another text, another line
READS_CONTENT = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero"}


@dataclass(eq=False, repr=False)
class Value:
    """One tensor of a recorded forward.

    call: what made it, as output number `part`; None for what the forward was given.
    tensor, name: of a parameter, a buffer or another constant, which are no forward's own.
    last: position of the last call that needs it.
    """

    shape: tuple[int, ...]
    call: Call | None = None
    part: int = 0
    tensor: Tensor | None = None
    name: str | None = None
    last: int = -1


@dataclass(eq=False, repr=False)
class Call:
    """One torch function, or leaf module, with Values in place of tensors.

    outputs: of the tensors it returned, in order; layer: the block it stands in.
    """

    function: Callable
    args: tuple
    kwargs: dict
    position: int
    layer: int | None = None
    outputs: list[Value] = field(default_factory=list)

    @property
    def op(self) -> str:
        """The function's name; `leaf` of a module."""
        if isinstance(self.function, nn.Module):
            return "leaf"
        name = getattr(self.function, "__name__", "")
        # a property of Tensor, such as T, is called through its getter
        return self.function.__self__.__name__ if name == "__get__" else name

    @property
    def inputs(self) -> list[Value]:
        """The values among its arguments, in order."""
        return [v for v in _leaves((self.args, self.kwargs)) if isinstance(v, Value)]


class Tape(TorchFunctionMode):
    """What a forward calls while this mode is on.

    given: tensors that the forward gets from outside, the same in number and order for every run.
    names: {id of a parameter: its name}.
    """

    def __init__(self, given: Sequence[Tensor], names: dict[int, str] | None = None):
        super().__init__()
        self.calls: list[Call] = []
        self.given = [Value(tuple(tensor.shape)) for tensor in given]
        self.output: list[Value] = []
        self.reads_content = False
        self.layer: int | None = None
        self._names = names or {}
        self._resting: dict[int, int] = {}
        self._inside: list[nn.Module] = []  # the leaves that run; nothing in them is recorded
        # weak, for a value's tensor goes as soon as the forward has no use for it
        self._values = WeakIdKeyDictionary()
        for tensor, value in zip(given, self.given):
            self._values[tensor] = value

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._inside:
            self._note(func, args, kwargs, result)
        return result

    @contextmanager
    def leaf(
        self, module: nn.Module, when: Callable[[nn.Module, tuple], bool] = lambda *_: True
    ) -> Iterator[None]:
        """Within it, a forward records each call of `module` (with arguments, `when` they are
        such) as one."""

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if not self._inside:
                self._inside.append(module)
                if not when(module, args):  # what it tries is not recorded either
                    self._inside.pop()

        def leave(module: nn.Module, args: tuple, kwargs: dict, result: object) -> None:
            if self._inside and self._inside[-1] is module:
                self._inside.pop()
                self._note(module, args, kwargs, result)

        with ExitStack() as hooks:
            # before and after any other hook, which so belong to what is recorded
            first = module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
            hooks.callback(first.remove)
            hooks.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
            yield

    def finish(self, result: object) -> None:
        """Say what the forward returned."""
        self.output = [self.value(tensor) for tensor in tensors_of(result)]
        for call in self.calls:
            for value in call.inputs:
                value.last = call.position
        for value in self.output:
            value.last = len(self.calls)

    def resting(self, position: int) -> int:
        """Where to leave a forward that is to go on at a call: there, or a little before, where
        fewer numbers have to be kept and making the others again costs next to nothing."""
        # asked for each micro-batch, and for each expert of a block
        if position not in self._resting:
            self._resting[position] = self._leanest(position)
        return self._resting[position]

    def _leanest(self, position: int) -> int:
        """What `resting` finds."""
        best = position
        least = self._kept(position)
        for call in reversed(self.calls[:position]):
            if call.op in HEAVY or _in_place(call.op):
                break
            kept = self._kept(call.position)
            if kept < least:
                best = call.position
                least = kept
        return best

    def _kept(self, position: int) -> int:
        """How many numbers made before a call are needed from there on."""
        return sum(
            prod(value.shape)
            for call in self.calls[:position]
            for value in call.outputs
            if value.last >= position
        )

    def run(self, values: dict[Value, Tensor], start: int, stop: int) -> None:
        """Make the calls from `start` up to `stop`, with the values there are.

        values: what earlier calls left and what the forward is given; changed in place to what
        later calls need.
        """
        for call in self.calls[start:stop]:
            args = _with(call.args, values)
            result = call.function(*args, **_with(call.kwargs, values))
            results = tensors_of(args[0] if call.op == "__setitem__" else result)
            for value, tensor in zip(call.outputs, results):
                values[value] = tensor
            for value in (*call.inputs, *call.outputs):
                if value.last <= call.position:
                    values.pop(value, None)

    def value(self, tensor: Tensor) -> Value:
        """What stands for a tensor; one that is new here is a constant."""
        if tensor not in self._values:
            name = self._names.get(id(tensor))
            self._values[tensor] = Value(tuple(tensor.shape), tensor=tensor, name=name)
        return self._values[tensor]

    def _note(self, function: Callable, args: tuple, kwargs: dict, result: object) -> None:
        """Record one call, unless nothing new came of it."""
        call = Call(function, args, kwargs, len(self.calls), self.layer)
        name = call.op
        if name in READS_CONTENT:
            self.reads_content = True
        changed = name == "__setitem__"
        tensors = tensors_of(args[0] if changed else result)
        given = {id(tensor) for tensor in _leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        # `x.contiguous()` may be x; `x += y` is x with other content
        if not (changed or _in_place(name)) and all(id(tensor) in given for tensor in tensors):
            return
        call.args = self._noted(args)
        call.kwargs = self._noted(kwargs)
        self.calls.append(call)
        for part, tensor in enumerate(tensors):
            value = Value(tuple(tensor.shape), call, part)
            self._values[tensor] = value
            call.outputs.append(value)

    def _noted(self, item: Any) -> Any:
        """Arguments with Values in place of tensors."""
        if isinstance(item, Tensor):
            return self.value(item)
        return _mapped(item, self._noted)


def _in_place(name: str) -> bool:
    """Whether a function of that name changes its first argument and returns it."""
    if name.startswith("__"):
        return name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    return name.endswith("_")


def _with(item: Any, values: dict[Value, Tensor]) -> Any:
    """Arguments with tensors in place of Values."""
    if type(item) is Value:
        return values[item] if item.tensor is None else item.tensor
    return _mapped(item, lambda part: _with(part, values))


def _mapped(item: Any, change: Callable[[Any], Any]) -> Any:
    """A tuple, list, dictionary or slice of changed parts; anything else as it is."""
    kind = type(item)
    if kind is tuple or kind is list:
        return kind([change(part) for part in item])
    if kind is dict:
        return {key: change(part) for key, part in item.items()}
    if kind is slice:
        return slice(change(item.start), change(item.stop), change(item.step))
    return item


def _leaves(item) -> Iterator:
    """All that stands in nested tuples, lists, dictionaries and slices."""
    if isinstance(item, tuple | list):
        for part in item:
            yield from _leaves(part)
    elif isinstance(item, dict):
        yield from _leaves(tuple(item.values()))
    elif isinstance(item, slice):
        yield from _leaves((item.start, item.stop, item.step))
    else:
        yield item


def tensors_of(result: object) -> list[Tensor]:
    """The tensors of what a forward or function is given or returns, in order."""
    # by pytree, which knows the output classes of transformers
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
