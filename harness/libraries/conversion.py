"""transformers, its insides: how the tensors of a file become the parameters of a model.

get_model_conversion_mapping, rename_source_key, WeightConverter
    which tensors of a file become which parameter (experts are stored one by one)
load_gguf_checkpoint
    tensors and config of a GGUF file

saved.py has the way back.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


class Conversion:
    """How a file's tensors become the parameters of a model: by other names, or several in one."""

    def __init__(self, model: PreTrainedModel):
        """model: on any device, `meta` included."""
        mapping = get_model_conversion_mapping(model)
        self._model = model
        self._expected = model.state_dict()
        self._renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        self._converters = [each for each in mapping if isinstance(each, WeightConverter)]
        self._by_pattern = {p: each for each in self._converters for p in each.source_patterns}

    def parameters(self, name: str) -> tuple[str, ...]:
        """The parameters that a tensor of a file is, or is a part of; its own name where none."""
        target, pattern = self._renamed(name)
        if pattern is None:
            return (target,)
        first, *rest = self._by_pattern[pattern].target_patterns
        return (target, *(target.replace(first, other) for other in rest))

    def converts(self, name: str) -> bool:
        """Whether a tensor of a file is changed on its way, and not only renamed."""
        return self._renamed(name)[1] is not None

    def converted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{parameter: tensor} of whole parameters' {name in a file: tensor}."""
        result: dict[str, Tensor] = {}
        # the shapes of a model as it was made, whatever has taken a parameter's place since
        made_as = SimpleNamespace(get_parameter=self._expected.__getitem__)
        gathered: dict[str, WeightConverter] = {}
        # experts in the order of their numbers
        for name in sorted(tensors, key=_natural):
            target, pattern = self._renamed(name)
            if pattern is None:
                result[target] = tensors[name]
                continue
            converter = gathered.setdefault(target, copy.deepcopy(self._by_pattern[pattern]))
            converter.add_tensor(target, name, pattern, cast(Any, tensors[name]))
        for target, converter in gathered.items():
            made = converter.convert(target, model=cast(Any, made_as), config=self._model.config)
            for key, tensor in made.items():
                result[key] = tensor[0] if isinstance(tensor, list) else tensor
        return result

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """(parameter, the pattern of its converter or None) for a tensor's name."""
        prefix = self._model.base_model_prefix
        target, pattern = rename_source_key(
            name, self._renamings, self._converters, prefix, self._expected
        )
        if target not in self._expected and name in self._expected:
            return name, None
        return target, pattern


def read_gguf(
    path: Path, config: PreTrainedConfig, skeleton: nn.Module
) -> tuple[dict, dict[str, Tensor]]:
    """(config fields, {parameter name: float32 tensor}) of a GGUF file, for a model of that config.

    The skeleton is shown without its submodules, for the loader works out the whole table of names
    again for each of them.
    """
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    names = SimpleNamespace(config=config, state_dict=skeleton.state_dict, named_children=dict)
    content = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=names)
    return content["config"], content["tensors"]


def _natural(name: str) -> list[tuple[bool, int | str]]:
    """A key that sorts numbers in names by their size."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in name.split(".")]
