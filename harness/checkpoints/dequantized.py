"""dequantized: a plain Hugging Face checkpoint of the weights that were evaluated.

    W <- Q(W) = q.dequantize(), in the model's dtype, bit for bit

Names, shapes and splits are those that transformers' own save_pretrained gives the architecture:
linears [out, in] ([in, out] where it holds them so), experts as its files have them. Nothing in it
says that anything was quantized, so that whatever reads such models reads this one: other
harnesses, fine-tuning, converters. It is as large as the untouched model, and weights alone:
activations, keys and values are floats for whoever loads it. Nothing may stay online.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harness.checkpoints.base import Exporter, Snapshot, modules, weight_at
from harness.config.errors import ConfigError
from harness.formats import Scheme
from harness.libraries.saved import Saved
from harness.models.adapter import Adapter
from harness.models.quant_linear import QuantLinear
from harness.structure.composite import model_class
from harness.structure.facts import config_of
from harness.structure.skeleton import skeleton
from harness.structure.structure import Structure
from harness.transforms import ModelShape, Transform

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Dequantized(Exporter):
    """Dequantized weights in the model's own layout."""

    name = "dequantized"
    weights_alone = True
    tolerance = 0.005  # experts add up in another order; a dense model's losses are the same

    def check(
        self,
        scheme: Scheme,
        transforms: Sequence[Transform],
        context: ModelShape,
        dtype: str = "auto",
    ) -> list[str]:
        for transform in transforms:
            left = transform.leaves(context)
            if left:
                raise ConfigError(
                    f"transform={transform.name} with export=dequantized: {', '.join(left)} would "
                    "have to run online, and a plain model runs nothing; take a transform that "
                    "merges, or use export=harness."
                )
        if not scheme.any("act") and scheme.kv is None:
            return []
        return [
            "export=dequantized: the file holds weights alone, so whoever loads it reads "
            "activations, keys and values as floats; format.act.bits=16 format.kv.bits=16 "
            "evaluates what is loaded"
        ]

    def tensors(self, snapshot: Snapshot) -> Iterator[tuple[str, Tensor]]:
        adapter = snapshot.adapter
        saved = Saved(skeleton(adapter.model.config))  # as it was before anything was swapped
        inside = f"{adapter.structure.blocks}."

        def block(named: tuple[str, Tensor]) -> str:
            name, _ = named
            return name.removeprefix(inside).partition(".")[0] if name.startswith(inside) else ""

        # one tensor of a file may be several parameters of a block
        for _, named in groupby(_parameters(adapter), block):
            yield from saved.tensors(dict(named)).items()

    def config(self, snapshot: Snapshot) -> dict:
        model = snapshot.adapter.model
        return {
            "architectures": [type(model).__name__],
            "dtype": str(model.dtype).removeprefix("torch."),
            "use_cache": True,
        }

    def load(self, folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        model = model_class(config_of(folder)).from_pretrained(folder, dtype=dtype)
        # its annotation, of a wrapped function, binds no self
        model = model.to(device).eval()  # pyright: ignore[reportArgumentType]
        model.config.use_cache = False
        return model

    def weight(self, model: PreTrainedModel, name: str) -> Tensor:
        weight = weight_at(model, name)
        return weight.mT if isinstance(dict(model.named_modules()).get(name), Conv1D) else weight


def _parameters(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all that transformers keeps of the model, as its own modules hold it."""
    turned = _turned(adapter.structure)
    inside: tuple[str, ...] = ()  # of experts, which their list has given already
    for name, module in modules(adapter):
        if name.startswith(inside):
            continue
        experts = _experts(module)
        if experts:
            inside += (f"{name}.",)
            owner = adapter.model.get_submodule(name.rpartition(".")[0])
            weight = torch.stack([linear.weight for linear in experts])
            yield name, weight.mT if owner.is_transposed else weight
            biases = [linear.bias for linear in experts if linear.bias is not None]
            if biases:
                yield f"{name}_bias", torch.stack(biases)
        for entry, tensor in module.state_dict(keep_vars=True).items():
            path = f"{name}.{entry}".removeprefix(".")
            if "." not in entry:
                yield path, tensor.detach().mT if path in turned else tensor.detach()


def _experts(module: nn.Module) -> list[QuantLinear]:
    """The linears that stand for one parameter of a layer's experts; none in any other module."""
    if not isinstance(module, nn.ModuleList):
        return []
    return [linear for linear in module if isinstance(linear, QuantLinear)]


def _turned(structure: Structure) -> set[str]:
    """The parameters that a model holds as [in, out]."""
    return {
        matrix.parameter
        for sites in structure.sites
        for site in sites
        for matrix in site.matrices
        if matrix.quantize and matrix.reads == 0
    }
