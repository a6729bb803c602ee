"""compressed_tensors: the checkpoint that transformers and vLLM load.

For what needs no code of ours at run time.

Held: the formats of `layouts`, mixed over linears as one likes, the head too; routed experts
(experts.py); keys and values of integers, FP8 and MXFP4 (`kv_cache_scheme`, which transformers
applies, and vLLM where scales are stored: FP8, scale=unit or static); all that is merged into
weights. Tensors are called as transformers saves them. Refused: what stays online.
compressed-tensors has a `transform_config`, but transformers (5.23) drops it on loading, so a file
that counted on it would compute something else without a word. export.engine=vllm writes it, for
vLLM alone (online_config.py).

The file is served in bfloat16; of a float16 model of integers in float16 (NVFP4 and MX weights are
unpacked to bfloat16 even then, on which float16 inputs fail). A loaded weight is the decoded one,
rounded once to that dtype. Floats (norms, embeddings, biases, a head that is not quantized) are
stored in it; scales of integers and FP8 are, too, since transformers casts them to the checkpoint's
dtype on loading and decodes in that: codes and zero points are exact in it and (q - z) s is rounded
once. NVFP4 is decoded in float32, MX exactly.

Activations, keys and values are quantized at run time by the rules of `export.serves`, which the
formats take before anything is solved: in the model's dtype, zero points signed and added before
rounding. So a run in the dtype in which the file is served (model.dtype=bfloat16) evaluates what is
served, bit for bit; one in float32 does not: rounding flips some codes, and these flip others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from harness.checkpoints import entries, layouts, online_config, online_reader
from harness.checkpoints.base import Exporter, Snapshot, cast, modules, weight_at
from harness.checkpoints.experts import parts_of, refuse_experts, routers, targets
from harness.checkpoints.snippets import served
from harness.config.checks import one_of
from harness.config.errors import ConfigError
from harness.config.extras import need
from harness.formats import Format, FourOverSix, Scheme, weight_format
from harness.libraries.saved import Saved
from harness.models.attention import named
from harness.models.quant_linear import QuantLinear
from harness.structure.composite import model_class
from harness.structure.facts import config_of
from harness.transforms import ModelShape, Transform

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CompressedTensors(Exporter):
    """The compressed-tensors layout. engine: None for whatever loads it, vllm for vLLM alone."""

    name = "compressed_tensors"
    package = "compressed-tensors"
    tolerance = 0.005

    def __init__(self, engine: str | None = None):
        self.engine = None if engine is None else one_of("export.engine", engine, ("vllm",))
        if self.engine is not None:
            self.library = self.engine

    def stored(self, snapshot: Snapshot) -> torch.dtype:
        return entries.served(snapshot.adapter.model.dtype, _formats(snapshot.scheme))

    def check(
        self,
        scheme: Scheme,
        transforms: Sequence[Transform],
        context: ModelShape,
        dtype: str = "auto",
    ) -> list[str]:
        need("compressed_tensors", "export=compressed_tensors")
        told = online_config.check(transforms, context, self.engine)
        layouts.refuse_linears("compressed_tensors", context, experts=True)
        layouts.cache_scheme(scheme.kv, context.head_dim)
        for layer, name in scheme.overrides:
            if layer is None and _embeds(context, name):
                raise ConfigError(
                    f"format.overrides: {name} with export=compressed_tensors: transformers does "
                    "not load a packed embedding; drop it there, or use export=harness."
                )
        formats = _formats(scheme)
        refuse_experts(scheme, context, formats)
        for format, field in formats.items():
            layouts.refuse(format, field)
            layouts.refuse_padding(format, field, context)
        return told + self._warnings(scheme, formats, dtype)

    def _warnings(self, scheme: Scheme, formats: Iterable[Format], dtype: str) -> list[str]:
        """What is held, and yet not everywhere computed as it was evaluated."""
        warnings = []
        if scheme.kv is not None and not entries.scales_stored(scheme.kv):
            warnings.append(
                "format.kv with export=compressed_tensors: transformers applies it, vLLM does not"
            )
        if any(isinstance(format, FourOverSix) for format in formats):
            warnings.append(
                "FourOverSix with export=compressed_tensors: of a bfloat16 model, a weight whose "
                "values the file cannot give back is refused when it is written"
            )
        evaluated = getattr(torch, dtype, None)
        served = entries.served(evaluated, formats)
        if (scheme.any("act") or scheme.kv is not None) and served != evaluated:
            name = str(served).removeprefix("torch.")
            other = "the dtype of its weights" if evaluated is None else dtype
            warnings.append(
                f"export=compressed_tensors: the file is served in {name} and evaluated in "
                f"{other}, where rounding gives some activations another code; model.dtype={name} "
                "evaluates what is served"
            )
        return warnings

    def tensors(self, snapshot: Snapshot) -> Iterator[tuple[str, Tensor]]:
        saved = Saved(snapshot.adapter.model)
        online = online_config.groups(snapshot, self.engine)
        matrices = online_config.tensors(online, self.stored(snapshot))
        for name, tensor in chain(self._tensors(snapshot), matrices):
            yield saved.name(name), tensor

    def _tensors(self, snapshot: Snapshot) -> Iterator[tuple[str, Tensor]]:
        """The same by the names of modules, those of experts' parts apart."""
        kinds = {name: kind for (kind, *_), names in _groups(snapshot) for name in names}
        evaluated = snapshot.adapter.model.dtype
        served = self.stored(snapshot)
        experts = parts_of(snapshot.adapter.structure)
        kv = snapshot.scheme.kv
        for name, heads in named(snapshot.adapter).items() if kv is not None else ():
            for entry, tensor in entries.cache_entries(kv, heads.scales, evaluated).items():
                yield f"{name}.{entry}", tensor.to(served)
        for name, module in modules(snapshot.adapter):
            q = snapshot.qtensors.get(name)
            if q is not None:
                for part, rows in experts.get(name, [(name, range(len(q.codes)))]):
                    held = entries.weight_entries(q.rows(rows), kinds[name], served)
                    for entry, tensor in held.items():
                        # parts share the scale of the whole, and a file nothing
                        yield f"{part}.{entry}", tensor.clone()
            if isinstance(module, QuantLinear):
                for entry, tensor in entries.input_entries(
                    module.site.format, module.site.global_scale, evaluated
                ).items():
                    yield f"{name}.{entry}", tensor
            for entry, tensor in module.state_dict(keep_vars=True).items():
                if "." not in entry and not (entry == "weight" and q is not None):
                    # a buffer may have a dtype of its own, in which it is loaded
                    own = entry in module._buffers and not isinstance(module, QuantLinear)
                    dtype = tensor.dtype if own else served
                    yield f"{name}.{entry}", tensor.detach().to(dtype, copy=True)

    def config(self, snapshot: Snapshot) -> dict:
        model = snapshot.adapter.model
        online = online_config.groups(snapshot, self.engine)
        groups = _groups(snapshot)
        saved = Saved(model)
        quantized = {name for _, names in groups for name in names}
        linears = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | QuantLinear)
        ]
        linears += routers(snapshot.adapter.structure)  # which are linears to engines
        described = {
            f"group_{index}": layouts.config_group(
                weight,
                act,
                kind,
                ["Linear"] if len(groups) == 1 else targets(names, snapshot.adapter),
            )
            for index, ((kind, weight, act), names) in enumerate(groups)
        }
        kinds = {kind for (kind, *_), _ in groups}
        common = "mixed-precision"
        if len(kinds) < 2:
            common = kinds.pop() if kinds else "dense"
        quantization = {
            "quant_method": "compressed-tensors",
            "format": common,
            "quantization_status": "compressed",
            "config_groups": described,
            "ignore": saved.modules(name for name in linears if name not in quantized),
            "kv_cache_scheme": layouts.cache_scheme(
                snapshot.scheme.kv, snapshot.adapter.structure.head_dim
            ),
            "global_compression_ratio": None,
        }
        if any(
            kind == "pack-quantized" and weight is not None and not weight.symmetric
            for (kind, weight, _), _ in groups
        ):
            quantization["dequantize"] = True  # see layouts.layout
        if online:
            quantization["transform_config"] = online_config.config(online, saved)
        served = str(self.stored(snapshot)).removeprefix("torch.")
        return {
            "architectures": [type(model).__name__],
            "dtype": served,
            "use_cache": True,
            "quantization_config": quantization,
        }

    def load(self, folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        model = model_class(config_of(folder)).from_pretrained(folder)
        # its annotation, of a wrapped function, binds no self
        model = model.to(device).eval()  # pyright: ignore[reportArgumentType]
        model.config.use_cache = False
        with torch.no_grad():  # the first forward unpacks the weights
            model(torch.zeros(1, 1, dtype=torch.long, device=device))
        online_reader.run(model, folder)
        cast(model, model.dtype, dtype)
        return model

    def weight(self, model: PreTrainedModel, name: str) -> Tensor:
        return weight_at(model, name).to(model.config.dtype)  # what it was loaded as

    def loading(self, name: str, kind: str) -> list[str]:
        if self.engine is None:
            return super().loading(name, kind)
        left = "transformers leaves out what its config.json has as transform_config."
        return [*served(name), left]


def _embeds(shape: ModelShape, name: str) -> bool:
    """Whether that is the embedding's name."""
    return shape.structure is not None and name == shape.structure.embedding


def _formats(scheme: Scheme) -> dict[Format, str]:
    """{format: field that sets it} of all that is quantized, the cache apart."""
    parts = [(scheme.weight, "format.weight"), (scheme.act, "format.act")]
    for (_, name), roles in scheme.overrides.items():
        parts += [(format, f"format.overrides: {name}.{part}") for part, format in roles.items()]
    fields: dict[Format, str] = {}
    for format, field in parts:
        if format is not None:
            fields.setdefault(format, field)
    return fields


def _groups(snapshot: Snapshot) -> list[tuple[tuple[str, Format | None, Format | None], list[str]]]:
    """[((layout, weight format, activation format), names)] of every quantized linear, in the order
    of the model. Raises ConfigError for what the file cannot hold.
    """
    groups: dict[tuple[Format | None, Format | None], list[str]] = {}
    for name, module in snapshot.adapter.model.named_modules():
        q = snapshot.qtensors.get(name)
        weight = None if q is None else weight_format(q)
        act = module.site.format if isinstance(module, QuantLinear) else None
        if weight is None and act is None:
            continue
        for format in (weight, act):
            if format is not None:
                layouts.refuse(format, name)
        groups.setdefault((weight, act), []).append(name)
    alone = [act for _, act in groups] == [None] and snapshot.scheme.kv is None
    return [((layouts.layout(*pair, alone), *pair), names) for pair, names in groups.items()]
