"""Writes the project's own checkpoint, which holds every transform x format x KV cache.

native.py says how.

Nothing is computed anew: codes and scales are those that were solved, all else is taken from the
model as it was evaluated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from harness.checkpoints.base import Exporter, Snapshot, modules
from harness.checkpoints.native import load, sites
from harness.checkpoints.native_files import PLACEMENT, RECORD, guard
from harness.checkpoints.record import Record
from harness.checkpoints.snippets import fenced, pretrained
from harness.codecs.packing import pack
from harness.formats import Scheme, weight_format
from harness.models.adapter import Adapter
from harness.models.attention import named
from harness.models.offload import read
from harness.store import replacing, write_json
from harness.transforms import ModelShape, Placement, Transform

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Checkpoint(Exporter):
    """Codes, online matrices and formats of the evaluated model.

    Its logits come back in every bit.
    """

    name = "harness"
    library = "harness"

    def check(
        self,
        scheme: Scheme,
        transforms: Sequence[Transform],
        context: ModelShape,
        dtype: str = "auto",
    ) -> list[str]:
        return []

    def tensors(self, snapshot: Snapshot) -> Iterator[tuple[str, Tensor]]:
        adapter = snapshot.adapter
        quantized = snapshot.qtensors
        written: set[str] = set()
        if snapshot.towers is not None:
            # from the files, where each has its own dtype and name
            for name, file in snapshot.towers.files.items():
                yield name, read({name: file}, "cpu")[name]
                written.update(snapshot.towers.parameters[name])
        for name, module in modules(adapter):
            parameters = dict(module.named_parameters(recurse=False))
            for part, tensor in (parameters | dict(module.named_buffers(recurse=False))).items():
                if f"{name}.{part}".removeprefix(".") in written:
                    continue
                if part == "weight" and name in quantized:
                    for key, value in quantized[name].state().items():
                        yield f"{name}.{key}", value
                else:
                    yield f"{name}.{part}", tensor
        for name, site in sites(adapter):
            if site.global_scale is not None:
                yield f"{name}.global_scale", site.global_scale
        if snapshot.scheme.kv is not None:
            yield from _cache_scales(adapter)

    def config(self, snapshot: Snapshot) -> dict:
        """A run evaluates without a cache; who loads the checkpoint wants one."""
        adapter = snapshot.adapter
        own = {"dtype": _dtype(adapter), "architectures": [type(adapter.model).__name__]}
        return {"use_cache": True, **own, **guard()}

    def extras(self, snapshot: Snapshot, folder: Path) -> None:
        """The online matrices and the formats.

        The digests are the caller's, who knows when the folder is complete.
        """
        adapter = snapshot.adapter
        specs = []
        tensors: dict[str, Tensor] = {}
        for index, placement in enumerate(snapshot.placements):
            specs.append(pack(_online(placement, adapter), tensors, f"{index}."))
        with replacing(folder / PLACEMENT) as temporary:
            save_file(tensors, temporary, metadata={"placements": json.dumps(specs)})
        inputs = {name: site.format for name, site in sites(adapter) if site.format is not None}
        weights = {name: weight_format(q) for name, q in snapshot.qtensors.items()}
        record = Record(adapter.model.dtype, weights, inputs, snapshot.scheme.kv)
        write_json(folder / RECORD, record.written())

    def load(self, folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        model, _ = load(folder, device, dtype)
        model.config.use_cache = False
        return model

    def loading(self, name: str, kind: str) -> list[str]:
        code = f"import harness\n\nmodel, tokenizer = harness.load({json.dumps(name)})"
        return [
            fenced(code, "python"),
            "The same model by transformers, which needs that import:",
            fenced(f"import harness\n{pretrained(name, kind)}", "python"),
        ]


def _cache_scales(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """(name, scale) of keys and values, where they are calibrated."""
    for name, heads in named(adapter).items():
        for part, scale in heads.scales.items():
            yield f"{name}.{part}_scale", scale


def _dtype(adapter: Adapter) -> str:
    return str(adapter.model.dtype).removeprefix("torch.")


def _online(placement: Placement, adapter: Adapter) -> Placement:
    """What of a placement stays online, in the dtype it is computed in.

    The rest is merged into the weights.
    """
    dtype = torch.promote_types(adapter.model.dtype, torch.float32)

    cpu = torch.device("cpu")
    online = {where: codec.to(cpu, dtype) for where, codec in placement.online.items()}
    rotation = placement.query_key
    return Placement(online=online, query_key=None if rotation is None else rotation.to(cpu, dtype))
