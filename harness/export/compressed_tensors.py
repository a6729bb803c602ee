"""compressed_tensors: the checkpoint that transformers and vLLM load, in bfloat16, for what needs no code of ours at run time.

Held: the formats of `layouts`, mixed over linears as one likes, the head too; integer keys and values (`kv_cache_scheme`, which
transformers applies); all that is merged into weights. Refused: what stays online. compressed-tensors has a `transform_config`,
but transformers (5.23) drops it on loading, so a file that counted on it would compute something else without a word.

A loaded weight is bfloat16(evaluated weight) in every element. Floats (norms, embeddings, biases, a head that is not quantized)
are stored as bfloat16; scales of integers are, too, since transformers casts them to the checkpoint's dtype on loading and
decodes in that: codes and zero points are exact in it and (q - z) s is rounded once. NVFP4 is decoded in float32, MX exactly.

transformers quantizes activations by the same rules as here, in bfloat16. A run with model.dtype=bfloat16 and
format.act.compute_dtype=input (integers also zp_order=add_then_round, zp_range=signed) is served bit for bit; one in float32 is
not: rounding flips some codes, and these flip others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.errors import ConfigError
from harness.export import layouts
from harness.export.base import Exporter, Snapshot, modules
from harness.formats import Format, FourOverSix, QTensor, Scheme
from harness.models.families import FAMILIES, head_dim
from harness.models.quant_linear import QuantLinear
from harness.transforms import Context, Transform


class CompressedTensors(Exporter):
    """The compressed-tensors layout."""

    name = "compressed_tensors"
    tolerance = 0.005
    stored = torch.bfloat16

    def check(self, scheme: Scheme, transforms: Sequence[Transform], context: Context) -> list[str]:
        for transform in transforms:
            left = transform.leaves(context)
            if left:
                raise ConfigError(f"transform={transform.name} with export=compressed_tensors: {', '.join(left)} would have "
                                  "to run online, and whoever loads the file would not run it; use export=harness.")
        layouts.cache_scheme(scheme.kv, context.head_dim)
        parts = {"format.weight": scheme.weight, "format.act": scheme.act}
        for (layer, name), own in scheme.overrides.items():
            if layer is None and any(name == family.embedding for family in FAMILIES.values()):
                raise ConfigError(f"format.overrides: {name} with export=compressed_tensors: transformers does not load a "
                                  "packed embedding; drop it there, or use export=harness.")
            parts |= {f"format.overrides: {name}.{part}": format for part, format in own.items()}
        formats = {field: format for field, format in parts.items() if format is not None}
        for field, format in formats.items():
            layouts.refuse(format, field)
        warnings = []
        if scheme.kv is not None:
            warnings.append("format.kv with export=compressed_tensors: transformers applies it, vLLM does not")
        if any(isinstance(format, FourOverSix) for format in formats.values()):
            warnings.append("FourOverSix with export=compressed_tensors: of a bfloat16 model, a weight whose values the file "
                            "cannot give back is refused when it is written")
        if any(format.role == "activation" and format.compute_dtype != "input" for format in formats.values()):
            warnings.append("format.act with export=compressed_tensors: transformers computes activations' codes in bfloat16; "
                            "model.dtype=bfloat16 and format.act.compute_dtype=input evaluate the same")
        return warnings

    def tensors(self, snapshot: Snapshot) -> Iterator[tuple[str, Tensor]]:
        kinds = {name: kind for (kind, *_), names in _groups(snapshot) for name in names}
        for name, module in modules(snapshot.adapter):
            for entry, tensor in _entries(module, snapshot.qtensors.get(name), kinds.get(name)):
                yield f"{name}.{entry}", tensor

    def config(self, snapshot: Snapshot) -> dict:
        model, groups = snapshot.adapter.model, _groups(snapshot)
        quantized = {name for _, names in groups for name in names}
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | QuantLinear)]
        described = {
            f"group_{index}": {
                "targets": ["Linear"] if len(groups) == 1 else names, "weights": layouts.described(weight),
                "input_activations": layouts.described(act), "output_activations": None, "format": kind,
            }
            for index, ((kind, weight, act), names) in enumerate(groups)
        }
        kinds = {kind for (kind, *_), _ in groups}
        quantization = {
            "quant_method": "compressed-tensors",
            "format": kinds.pop() if len(kinds) == 1 else "mixed-precision" if kinds else "dense",
            "quantization_status": "compressed",
            "config_groups": described,
            "ignore": [name for name in linears if name not in quantized],
            "kv_cache_scheme": layouts.cache_scheme(snapshot.scheme.kv, head_dim(model.config.to_dict())),
            "global_compression_ratio": None,
        }
        if any(kind == "pack-quantized" and not weight.symmetric for (kind, weight, _), _ in groups):
            quantization["dequantize"] = True  # see layouts.layout
        own = {"architectures": [type(model).__name__], "dtype": "bfloat16", "use_cache": True}
        return own | {"quantization_config": quantization}

    def load(self, folder: Path, device: torch.device, dtype: torch.dtype):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
        model.config.use_cache = False
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.long, device=device))  # the first forward unpacks the weights
        # transformers refuses to cast what it loaded quantized; once it is unpacked, nothing stands against it
        return model if dtype == model.dtype else nn.Module.to(model, dtype)

    def weight(self, model, name: str) -> Tensor:
        return model.get_submodule(name).weight.bfloat16()  # what it was loaded as


def _groups(snapshot: Snapshot) -> list[tuple[tuple[str, Format | None, Format | None], list[str]]]:
    """[((layout, weight format, activation format), names)] of every quantized linear, in the order of the model. Raises
    ConfigError for what the file cannot hold."""
    for placement in snapshot.placements:
        if placement.online or placement.query_key is not None:
            raise ConfigError("a transform that stays online with export=compressed_tensors: whoever loads the file would not "
                              "run it; use export=harness.")
    groups: dict[tuple[Format | None, Format | None], list[str]] = {}
    for name, module in snapshot.adapter.model.named_modules():
        q = snapshot.qtensors.get(name)
        weight, act = None if q is None else q.format, module.site.format if isinstance(module, QuantLinear) else None
        if weight is None and act is None:
            continue
        for format in (weight, act):
            if format is not None:
                layouts.refuse(format, name)
        groups.setdefault((weight, act), []).append(name)
    alone = [act for _, act in groups] == [None] and snapshot.scheme.kv is None
    return [((layouts.layout(*pair, alone), *pair), names) for pair, names in groups.items()]


def _entries(module: nn.Module, q: QTensor | None, kind: str | None) -> Iterator[tuple[str, Tensor]]:
    """(entry, tensor) of one module's own tensors; q, kind: its quantized weight and how that is laid out."""
    if q is not None:
        yield from layouts.weight_entries(q, kind).items()
    if isinstance(module, QuantLinear):
        yield from layouts.input_entries(module.site.format, module.site.global_scale).items()
    for entry, tensor in module.state_dict(keep_vars=True).items():
        if "." not in entry and not (entry == "weight" and q is not None):
            yield entry, tensor.detach().to(torch.bfloat16, copy=True)
