"""Distillation after solving: the whole model as it is served follows the untouched one.

    min over theta of  mean_t KL(p_t || q_t(theta)),      p of the untouched model, q of this one

theta is whatever a subclass makes weights of, and besides the gains of norms and the biases of
linears. The embedding, the head and whatever else the model has stay as they are. Activations, keys
and values pass gradients straight through. Adam's rate falls to 0 by a cosine; the iterate with the
least loss on the held-out windows is taken, the solved model being one of them. The next token is
no target: the law of the untouched model is, so that the text can only say where to follow it.

Source: the loss is QAD's (arXiv 2601.20088), all else is ours.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.config.checks import boolean, integer, number
from harness.formats import QTensor
from harness.models.adapter import Adapter
from harness.models.quant_linear import QuantLinear
from harness.transforms.loop import Best, Course, descend
from harness.tune.base import Student, Tuned, Tuner

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what Adam keeps of each tensor


class Quantized(nn.Module):
    """A weight [out, in] made of parameters; calling it gives its values, differentiable in
    them."""

    def rates(self) -> dict[str, float]:
        """{parameter: how much faster than the tuner's own rate it moves}."""
        return dict.fromkeys((name for name, _ in self.named_parameters()), 1.0)

    def qtensor(self) -> QTensor:
        """The codes and scales of these very values."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Distillation(Tuner):
    """steps. batch: windows a step. lr: Adam's rate.
    norms: learn gains of norms and biases, too. lr_norms: their rate, relative to each gain, and to
        the root mean square of a bias.
    """

    steps: int = 200
    batch: int = 1
    lr: float = 1e-3
    norms: bool = True
    lr_norms: float = 1e-3

    def __post_init__(self):
        super().__post_init__()
        integer("tune.steps", self.steps, low=0)
        integer("tune.batch", self.batch)
        number("tune.lr", self.lr, 0, 1)
        boolean("tune.norms", self.norms)
        number("tune.lr_norms", self.lr_norms, 0, 1)

    @property
    def unread(self) -> tuple[str, ...]:
        return () if self.norms else ("lr_norms",)

    @abstractmethod
    def follow(self, q: QTensor, weight: Tensor | None) -> Quantized:
        """What a solved weight is made of while it is learned; at first it gives q's values.

        weight: the float one that was solved, where the tuner asks for it.
        """

    def tune(self, student: Student) -> Tuned:
        linears = {
            name: self.follow(q, student.solved.pop(name, None))
            for name, q in student.qtensors.items()
        }
        rates: dict[str, tuple[Tensor, float]] = {}
        for name, linear in linears.items():
            faster = linear.rates()
            for key, parameter in linear.named_parameters():
                rates[f"{name}.{key}"] = (parameter, self.lr * faster[key])
        beside = floats(student.adapter) if self.norms else {}
        for name, one in beside.items():
            rates[name] = (one.free, self.lr_norms)
        moving = Moving(rates, self.steps)
        making: dict[str, Callable[[], Tensor]] = {f"{n}.weight": x for n, x in linears.items()}
        making |= {name: one.served for name, one in beside.items()}
        with torch.enable_grad(), made(student.adapter, making):
            best = self._learn(student, moving)
        moving.take(best.values)
        notes = {"tune_held_out": [best.first, best.loss], "tune_best_step": best.step}
        tensors = {name: one.served().detach() for name, one in beside.items()}
        return Tuned({name: x.qtensor() for name, x in linears.items()}, tensors, notes)

    def _learn(self, student: Student, moving: Moving) -> Best:
        """The best iterate, from where an earlier attempt was left."""
        advice = f"lower tune.lr={self.lr}"
        course = Course(self.steps, self.batch, "tune", "tune", advice)

        def keep(best: Best) -> None:
            values = {f"best.{name}": value for name, value in best.values.items()}
            numbers = {key: value for key, value in vars(best).items() if key != "values"}
            student.kept.save(moving.state() | values, numbers)

        begun = None
        found = student.kept.load()
        if found is not None:
            tensors, numbers = found
            begun = Best(moving, numbers["first"], self.steps)
            vars(begun).update(numbers)
            begun.values = {name: tensors[f"best.{name}"].to(x) for name, x in moving.free.items()}
            moving.resume(tensors, begun.reached)
        return descend(student.model, moving, student.loss, course, begun, keep)


@dataclass(frozen=True)
class Float:
    """A tensor that stays float: start + size (e^free - 1), or start + size free for a bias.

    free: a leaf, 0 at first. A gain moves by a share of itself (size: the gain), for some are a
    thousandth of their norm's others, and hold down channels a thousand times as large. A bias
    moves by its root mean square, for it may be 0. dtype: as it is served.
    """

    start: Tensor
    size: Tensor
    free: Tensor
    gain: bool
    dtype: torch.dtype

    def served(self) -> Tensor:
        """As the model has it."""
        moved = self.free.expm1() if self.gain else self.free
        return (self.start + self.size * moved).to(self.dtype)


def floats(adapter: Adapter) -> dict[str, Float]:
    """{absolute name: it} of the norms, and of the biases of the blocks' linears."""
    found = {}
    for name, role in adapter.roles.items():
        module = adapter.model.get_submodule(name)
        leaves = ["bias"]
        if role.kind == "norm":
            leaves.append("weight")
        elif role.layer is None or not isinstance(module, QuantLinear):
            continue
        for leaf in leaves:
            tensor = getattr(module, leaf, None)
            if not isinstance(tensor, Tensor):
                continue
            start = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
            gain = leaf == "weight"
            size = start + (role.gain == "1+w") if gain else start.square().mean().sqrt()
            free = torch.zeros_like(start).requires_grad_()
            found[f"{name}.{leaf}"] = Float(start, size, free, gain, tensor.dtype)
    return found


class Moving:
    """Named tensors under Adam.

    rates: {name: (tensor, its rate at first)}.
    """

    def __init__(self, rates: Mapping[str, tuple[Tensor, float]], steps: int):
        self.free = {name: tensor for name, (tensor, _) in rates.items()}
        self.rates = [rate for _, rate in rates.values()]
        self.steps = steps
        self.taken = 0
        # one group each, for each has a rate of its own
        groups = [{"params": [tensor], "lr": rate} for tensor, rate in rates.values()]
        # fused: one pass over parameters that may be as many as the weights
        self.adam = torch.optim.Adam(groups, fused=True)

    def step(self) -> None:
        """One step along the gradients gathered since the last."""
        left = (1 + math.cos(math.pi * self.taken / self.steps)) / 2
        for group, rate in zip(self.adam.param_groups, self.rates):
            group["lr"] = rate * left
        self.adam.step()
        self.adam.zero_grad()
        self.taken += 1

    def leaves(self) -> list[Tensor]:
        """The tensors whose gradients are gathered."""
        return list(self.free.values())

    def snapshot(self) -> dict[str, Tensor]:
        """The values now, as copies."""
        return {name: tensor.detach().clone() for name, tensor in self.free.items()}

    @torch.no_grad()
    def take(self, values: Mapping[str, Tensor]) -> None:
        """Set the values."""
        for name, tensor in self.free.items():
            tensor.copy_(values[name])

    def state(self) -> dict[str, Tensor]:
        """{`free.NAME`, `exp_avg.NAME`, ..: tensor} of all that the next steps depend on."""
        state = {f"free.{name}": tensor.detach() for name, tensor in self.free.items()}
        for name, tensor in self.free.items():
            # an expert that no token was routed to has none
            moments = self.adam.state[tensor]
            state |= {f"{key}.{name}": moments[key] for key in MOMENTS if key in moments}
        return state

    def resume(self, state: Mapping[str, Tensor], taken: int) -> None:
        """Go on from a `state` after so many steps."""
        self.taken = taken
        self.take({name: state[f"free.{name}"] for name in self.free})
        for name, tensor in self.free.items():
            if f"step.{name}" in state:
                moments = {key: state[f"{key}.{name}"].to(tensor.device) for key in MOMENTS}
                self.adam.state[tensor] = moments


@contextmanager
def made(adapter: Adapter, making: Mapping[str, Callable[[], Tensor]]) -> Iterator[None]:
    """Within it, each of these tensors is made anew when its module runs.

    Only then, so that experts that are not asked cost nothing. On leaving, the model has the latest
    values.
    """
    places = []
    handles = []
    for name, make in making.items():
        owner, _, leaf = name.rpartition(".")
        module = adapter.model.get_submodule(owner)
        parameter = module._parameters.get(leaf)
        # a buffer, a weight, is not kept: the model would be in memory twice
        held = module._buffers if parameter is None else module._parameters
        places.append((held, leaf, make, parameter))

        def put(module, args, held=held, leaf=leaf, make=make) -> None:
            held[leaf] = make()

        handles.append(module.register_forward_pre_hook(put))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for held, leaf, make, parameter in places:
                held[leaf] = make() if parameter is None else parameter.copy_(make())
