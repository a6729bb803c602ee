"""A module on its way through a forward: with what it is called, and a block's forward on tape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from harness.structure.tape import Tape, tensors_of


class Reached(Exception):
    """Carries the arguments with which a module was about to be called; the module does not run."""

    def __init__(self, args: tuple, kwargs: dict):
        super().__init__()
        self.args, self.kwargs = args, kwargs


def arguments_at(module: nn.Module, run: Callable[[], object]) -> tuple[tuple, dict]:
    """Call `run()` up to the moment `module` would be entered.

    Returns the (args, kwargs) of that call. Raises RuntimeError where it never comes.
    """

    def stop(_: nn.Module, args: tuple, kwargs: dict) -> None:
        raise Reached(args, kwargs)

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except Reached as reached:
        return reached.args, reached.kwargs
    finally:
        handle.remove()
    raise RuntimeError(f"the forward never reached {type(module).__name__}")


@torch.no_grad()
def recorded(block: nn.Module, hidden: Tensor, kwargs: dict, apart: Iterable[nn.Module]) -> Tape:
    """The tape of a block's forward; apart: modules whose content may change, its leaves."""
    tape = Tape(tensors_of((hidden, kwargs)))
    with ExitStack() as hooks:
        for module in apart:
            hooks.enter_context(tape.leaf(module))
            hooks.enter_context(_outlined(module))
        with tape:
            result = block(hidden, **kwargs)
    tape.finish(result)
    return tape


@contextmanager
def _outlined(module: nn.Module) -> Iterator[None]:
    """Within it, a leaf gives zeros like what it would give: a tape keeps no more of it, and these
    modules are what a forward costs.
    """
    forward = module.forward
    own = {key: value for key, value in module.__dict__.items() if key == "forward"}

    def outline(x: Tensor, *routes: Tensor) -> Tensor:
        if routes:  # experts give what they are given
            return torch.zeros_like(x)
        row = forward(x.flatten(0, -2)[:1])
        return row.new_zeros(*x.shape[:-1], row.shape[-1])

    module.__dict__["forward"] = outline
    try:
        yield
    finally:
        del module.__dict__["forward"]
        module.__dict__ |= own  # where something else had put one there
