"""transformers, its insides: the names under which a model's tensors are saved.

get_model_conversion_mapping, reverse_transform, PrefixChange
    how a file's tensors become parameters, and the way back
rename_source_key
    what of it a name meets
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from harness.libraries.conversion import Conversion

Parts = tuple[tuple[str, range], ...]


class Saved:
    """What files of a model's class call its tensors, whatever file this model came from."""

    def __init__(self, model: PreTrainedModel):
        """model: on any device, `meta` included."""
        # a prefix tells where one file came from; legacy names are read, and not written any more
        mapping = [
            each.reverse_transform()
            for each in reversed(get_model_conversion_mapping(model, add_legacy=False))
            if not isinstance(each, PrefixChange)
        ]
        self._model = model
        self._renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        self._converters = [each for each in mapping if isinstance(each, WeightConverter)]
        self._loaded = Conversion(model)

    def name(self, name: str) -> str:
        """A tensor's name in a file; its own where it is not found again by another."""
        saved, _ = rename_source_key(name, self._renamings, [])
        return saved if self._loaded.parameters(saved) == (name,) else name

    def modules(self, names: Iterable[str]) -> list[str]:
        """Modules as they are called here and in a file, where that differs."""
        both = ((name, self.name(f"{name}.weight").removesuffix(".weight")) for name in names)
        return list(dict.fromkeys(name for pair in both for name in pair))

    def parts(self, parameter: str, experts: int, rows: int, turned: bool) -> Parts:
        """The matrices [out, in] in which files hold each expert's of a parameter [experts, ., .].

        ((name of its module, with * for the expert's number, which of the `rows` it is), ..); none
        where files hold them otherwise. turned: the parameter is [experts, in, out].
        """
        experts = min(experts, 2)  # the others are like these
        # saved in place of the weights, the numbers of the rows tell where each of them goes
        numbers = torch.arange(experts * rows).view(experts, rows, 1)
        saved = self.tensors({parameter: numbers.mT if turned else numbers})
        parts: dict[tuple[str, range], None] = {}
        for name, tensor in saved.items():
            if tensor.shape[1:] != (1,):
                return ()
            expert = int(tensor[0]) // rows
            own = (tensor.flatten() - expert * rows).tolist()
            step = own[1] - own[0] if len(own) > 1 else 1
            there = range(own[0], own[0] + step * len(own), step)
            head, _, tail = name.removesuffix(".weight").rpartition(f".{expert}.")
            if list(there) != own or not head or not name.endswith(".weight"):
                return ()
            parts[f"{head}.*.{tail}", there] = None
        return tuple(parts) if len(parts) * experts == len(saved) else ()

    def tensors(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{name in a file: tensor} of {parameter: what stands in its place}, memory of its own each
        where several share one. All parameters of a block belong together."""
        result: dict[str, Tensor] = {}
        gathered: dict[str, WeightConverter] = {}
        by_pattern = {p: each for each in self._converters for p in each.source_patterns}
        for parameter, tensor in parameters.items():
            target, pattern = rename_source_key(parameter, [], self._converters)
            if pattern is None:
                result[self.name(parameter)] = tensor
                continue
            converter = gathered.setdefault(target, copy.deepcopy(by_pattern[pattern]))
            converter.add_tensor(target, parameter, pattern, cast(Any, tensor))
        for target, converter in gathered.items():
            made = converter.convert(target, model=self._model, config=self._model.config)
            for name, each in made.items():
                tensor = each[0] if isinstance(each, list) else each
                saved, _ = rename_source_key(name, self._renamings, [])
                result[saved] = tensor.clone()
        return result
