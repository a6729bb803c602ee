"""What leaves the harness: a model exactly as it was evaluated, and the layouts that hold one.

An exporter says what it cannot hold, which tensors it writes under which names, and what
config.json must say about them. folder.py writes the rest of a checkpoint around them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from harness.checkpoints.shards import write_shards
from harness.formats import Format, QTensor, Scheme
from harness.models.adapter import Adapter
from harness.models.quant_linear import SiteInput
from harness.models.weights import Weights
from harness.transforms import ModelShape, Placement, Transform

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Snapshot:
    """A model as it was evaluated.

    adapter: placed, its weights solved (dequantized values in QuantLinear), activation quantizers
    on; tokenizer; scheme: the formats of all parts, overrides resolved; placements in the order in
    which they were placed; qtensors: {absolute module name: QTensor} of every quantized weight;
    settings, choices: of the run; metrics: its results so far; origin: the files that the model
    came from, None where there are none.
    """

    adapter: Adapter
    tokenizer: PreTrainedTokenizerBase
    scheme: Scheme
    placements: Sequence[Placement]
    qtensors: Mapping[str, QTensor]
    settings: Mapping
    choices: Mapping[str, str | None]
    metrics: Mapping = field(default_factory=dict)
    origin: Weights | None = None

    @property
    def towers(self) -> Weights | None:
        """What of origin stands beside the text decoder, None where nothing does."""
        structure = self.adapter.structure
        if self.origin is None or not structure.towers:
            return None
        parameters = self.origin.parameters
        beside = {name: each for name, each in parameters.items() if structure.beside(each[0])}
        stored = {name: self.origin.stored[name] for name in beside}
        return replace(self.origin, stored=stored, parameters=beside)


class Exporter(ABC):
    """One layout of checkpoints.

    name: as `export=` calls it. tolerance: relative perplexity difference that loading back may
    show, None where it must be the same. weights_alone: whoever loads it reads activations, keys
    and values as floats. library: who loads it, by the hub's word; package: what transformers needs
    besides to read it. A field of the option that is none of the common ones
    (sections.EXPORT) is an argument of the class.
    """

    name: str
    tolerance: float | None = None
    weights_alone: bool = False
    library: str = "transformers"
    package: str | None = None

    @abstractmethod
    def check(
        self,
        scheme: Scheme,
        transforms: Sequence[Transform],
        context: ModelShape,
        dtype: str = "auto",
    ) -> list[str]:
        """Refuse (ConfigError, naming both fields and a way out) what the layout cannot hold,
        before any weight is loaded; returns warnings. dtype: of the model, "auto" where only its
        weights tell.
        """

    # most layouts hold whatever transformers has
    def check_config(self, facts: Mapping) -> None:  # noqa: B027
        """Refuse (ConfigError) a model whose config the layout cannot say, as `check` does.

        facts: the fields of transformers' config.
        """

    # most layouts take it as it is
    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:  # noqa: B027
        """Refuse (ConfigError or DataError) a tokenizer that the layout cannot say.

        Called when the model is loaded, before anything is computed.
        """

    def stored(self, snapshot: Snapshot) -> torch.dtype | None:
        """Dtype of weights and biases in the file, and of who computes with them.

        None: as they were evaluated.
        """
        return None

    @abstractmethod
    def tensors(self, snapshot: Snapshot) -> Iterator[tuple[str, Tensor]]:
        """(name in the file, tensor), in the order of the model."""

    @abstractmethod
    def config(self, snapshot: Snapshot) -> dict:
        """What config.json says beside the model's own fields."""

    @abstractmethod
    def load(self, folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        """The model as a user of the checkpoint gets it who computes in dtype, in evaluation mode,
        without KV cache.
        """

    @abstractmethod
    def weight(self, model: PreTrainedModel, name: str) -> Tensor:
        """The weight [out, in] with which module `name` of a loaded model computes."""

    def write(self, snapshot: Snapshot, folder: Path) -> None:
        """Write the weights into the folder, as safetensors of bounded size."""
        write_shards(self.tensors(snapshot), folder)

    # most layouts have none
    def extras(self, snapshot: Snapshot, folder: Path) -> None:  # noqa: B027
        """Write further files of the layout into the folder."""


def modules(adapter: Adapter) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the whole model, blocks in memory while they are visited.

    Without the inputs of sites, and without a head that is one matrix with the embedding.
    """
    inside = f"{adapter.structure.blocks}."
    tied = adapter.head.weight is adapter.model.get_submodule(adapter.structure.embedding).weight

    def layer(named: tuple[str, nn.Module]) -> int | None:
        name, _ = named
        if not name.startswith(inside):
            return None
        return int(name.removeprefix(inside).partition(".")[0])

    for index, named in groupby(adapter.model.named_modules(), layer):
        with adapter.open(index):
            for name, module in named:
                if not isinstance(module, SiteInput) and not (tied and module is adapter.head):
                    yield name, module


def weight_format(quantized: QTensor) -> Format:
    """The format of a weight with all its settings, of which a QTensor itself asks few."""
    assert isinstance(quantized.format, Format), "weights are quantized by a Format"
    return quantized.format


def weight_at(model: nn.Module, name: str) -> Tensor:
    """The weight [out, in] of module `name`, or of an expert's linear where there is no module."""
    path, _, expert = name.rpartition(".")
    owner, _, parameter = path.rpartition(".")
    module = model.get_submodule(owner)
    if parameter in module._parameters:
        weight = module.get_parameter(parameter)[int(expert)]
        return weight.mT if module.is_transposed else weight
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


@torch.no_grad()
def cast(model: nn.Module, old: torch.dtype, new: torch.dtype) -> None:
    """Give a model's tensors of dtype `old` another, in place.

    What has a dtype of its own (the rotary table, global scales) keeps it. transformers refuses to
    cast what it loaded quantized.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == old:
            tensor.data = tensor.data.to(new)
