"""Routed experts as linears of their own, each with what it alone reads.

    y_t = sum_k w_tk down_e(act(gate_up_e(x_t))),      e = e_k(t), the router's choice

transformers keeps the matrices of a layer's experts in one tensor and calls a function by the name
in the model's config (as it does for attention). `swap_experts` puts a QuantLinear in place of each
expert's part, and names a function that runs them one after another; sites of experts are
`experts_in.3` and `experts_down_in.3`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from harness.libraries.transformers import name_experts, use_experts
from harness.models.quant_linear import QuantLinear, SiteInput

NAME = "harness_experts"
DOWN = "down_proj"


def swap_experts(model: nn.Module, module: nn.Module, names: list[str]) -> None:
    """Put a ModuleList of QuantLinears in place of each parameter [experts, ., .] of `module`.

    Nothing is computed differently; the weights are views of what is there where its layout allows.
    """
    for name in names:
        weights = module.get_parameter(name).data
        if module.is_transposed:
            weights = weights.mT.contiguous()
        biases = module._parameters.get(f"{name}_bias")
        linears = [
            QuantLinear(weight, None if biases is None else biases.data[expert], SiteInput(1))
            for expert, weight in enumerate(weights)
        ]
        del module._parameters[name]
        module._parameters.pop(f"{name}_bias", None)
        module.add_module(name, nn.ModuleList(linears))
    name_experts(NAME, run)
    use_experts(model, NAME)


def entering(module: nn.Module) -> nn.ModuleList:
    """The linears that experts read their input with."""
    return next(child for name, child in _linears(module) if name != DOWN)


def leaving(module: nn.Module) -> nn.ModuleList:
    """The linears that experts write their output with."""
    return next(child for name, child in _linears(module) if name == DOWN)


def is_last(linear: str) -> bool:
    """Whether an expert's linear, by its block-relative name, writes the experts' output."""
    return linear.split(".")[-2] == DOWN


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and isinstance(child[0], QuantLinear):
            yield name, child


def inside(module: nn.Module, expert: int, x: Tensor) -> Tensor:
    """What one expert's last linear reads, for its input x [tokens, hidden]."""
    y = entering(module)[expert](x)
    name = "_apply_gate" if module.has_gate else "act_fn"
    return getattr(module, name)(y)


def routed(index: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """(tokens, which of their choices) that the router gave an expert; index [tokens, choices]."""
    tokens, choices = torch.nonzero(index == expert, as_tuple=True)
    return tokens, choices


def run(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The experts' output [tokens, hidden] for hidden [tokens, hidden], the router's choices and
    their weights [tokens, choices]."""
    output = torch.zeros_like(hidden)
    linears = leaving(module)
    for expert, linear in enumerate(linears):
        tokens, choice = routed(index, expert)
        if not len(tokens):
            continue
        y = linear(inside(module, expert, hidden[tokens]))
        if getattr(module, "has_post_expert_norm", False):  # not in every release
            y = module.get_submodule("post_expert_norm")(y)
        y = y * weights[tokens, choice, None]
        output.index_add_(0, tokens, y.to(output.dtype))
    return output
