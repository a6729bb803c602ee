"""What a checkpoint is, as plain values: quantization_metadata.json.

The model card is written from it too.

    {"name", "model", "base_model", "revision", "license", "seed", "class",
     "method": {"transform", "solver", and "tune" where there is one},
     "calibration": {"corpus", "windows", "length", "order"},
     "bits": {"weights", "activations", "kv", "head":
              {"format", "bits", "group_size", "granularity", "symmetric"}},
     "quantized": "210/211",
     "formats": {format: tensors},
     "layers": [{"name", "format", "bits", "group_size", "shape", "weights", "stored_bits"}],
     "sizes": {..},
     "kv_cache": {..},
     "evaluation": {stage: {"ppl", "divergence", "zeroshot", "tokens"}},
     "texts": [{"prompt", stage: how it goes on}],
     "records", "displays", "marks", "run_id", "command", "harness"}

model is the untouched model's name, base_model its hub id (null: it came from no hub), class the
one of transformers' that loads it. `bits` is what holds for all linears, `layers` what each one
has. sizes, in bytes: "before" are all parameters of the untouched model at 2 bytes, tied ones once;
"after" are the files that hold weights (Exporter.files); "files" is everything in the folder but
this record, the card and the hashes; "weights" are codes, scales and zero points of what is
quantized. kv_cache, in bytes a token: at "fp16", and "quantized" as a packed cache would take,
scales and zero points included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from harness.checkpoints.base import Exporter, Snapshot
from harness.checkpoints.names import base_of, hub_id
from harness.checkpoints.public import public
from harness.checkpoints.spelling import word
from harness.config.build import build
from harness.formats import Format, KVCache, QTensor, weight_format
from harness.models.adapter import Adapter
from harness.models.quant_linear import QuantLinear
from harness.models.source import ModelSource
from harness.report.texts import said
from harness.store import version
from harness.structure.composite import model_class
from harness.structure.structure import Structure

FIGURES = ("ppl", "divergence", "zeroshot", "tokens")


def metadata(snapshot: Snapshot, exporter: Exporter, name: str, folder: Path) -> dict:
    """What the checkpoint `name`, whose tensors lie in `folder`, is.

    exporter: what wrote them, of which it asks which files they are. Reads every quantized tensor
    once.
    """
    settings = snapshot.settings
    choices = snapshot.choices
    scheme = snapshot.scheme
    metrics = snapshot.metrics
    adapter = snapshot.adapter
    section = settings["model"]
    remote = hub_id(section)
    layers = [_layer(module, q) for module, q in snapshot.qtensors.items()]
    linears = {module for module, role in adapter.roles.items() if role.kind == "linear"}
    return {
        "name": name,
        "model": base_of(section),
        "base_model": remote or section.get("hub"),  # a package is made from one
        "revision": section.get("revision") if remote else None,
        "license": section.get("license"),
        "method": _method(choices),
        "seed": settings["seed"],
        "class": model_class(adapter.model.config).__name__,
        "calibration": _calibration(
            settings["data"], choices["data"], metrics.get("calibration", {})
        ),
        "bits": {
            "weights": _part(scheme.weight),
            "activations": _part(scheme.act),
            "kv": _cache(scheme.kv),
            "head": _part(scheme.part("weight", None, adapter.structure.head)),
        },
        "quantized": f"{sum(layer['name'] in linears for layer in layers)}/{len(linears)}",
        "formats": dict(Counter(layer["format"] for layer in layers)),
        "layers": layers,
        "sizes": _sizes(
            adapter,
            _tied(section),
            sum(layer["stored_bits"] for layer in layers),
            folder,
            exporter.files,
        ),
        "kv_cache": _kv_bytes(scheme.kv, adapter.structure),
        "evaluation": {
            stage: {key: figures[key] for key in FIGURES if key in figures}
            for stage, figures in metrics.get("stages", {}).items()
        },
        "texts": said(metrics.get("stages", {})),
        "records": metrics.get("records", []),
        "displays": metrics.get("displays", {}),
        "marks": metrics.get("marks", {}),
        "run_id": metrics.get("run_id"),
        "command": public(metrics.get("command")),
        "harness": version(),
    }


def _layer(name: str, q: QTensor) -> dict:
    """What is said of one quantized weight."""
    format = weight_format(q)
    return {
        "name": name,
        "format": _spelled(format),
        "bits": format.bits,
        "group_size": format.group_size,
        "shape": list(q.shape),
        "weights": q.codes.numel(),
        "stored_bits": q.bits(),
    }


def _spelled(format: Format) -> str:
    spelling = word(format)
    return f"int{spelling}" if isinstance(spelling, int) else spelling


def _method(choices: Mapping[str, str | None]) -> dict[str, str | None]:
    """The options that made it."""
    method = {name: choices[name] for name in ("transform", "solver")}
    if choices.get("tune") not in (None, "none"):
        method["tune"] = choices["tune"]
    return method


def _part(format: Format | None) -> dict:
    """The format of weights or activations; 16 bits: not quantized."""
    if format is None:
        return {
            "format": "fp16",
            "bits": 16,
            "group_size": None,
            "granularity": None,
            "symmetric": None,
        }
    return {
        "format": _spelled(format),
        "bits": format.bits,
        "group_size": format.group_size,
        "granularity": format.granularity,
        "symmetric": format.symmetric,
    }


def _cache(kv: KVCache | None) -> dict:
    if kv is None:
        return _part(None)
    part = kv.part("key")
    granularity = part.granularity
    if granularity == "token":
        granularity = "head" if kv.group_size is None else "token"
    return _part(part) | {"granularity": granularity}


def _calibration(data: Mapping, option: str | None, used: Mapping) -> dict:
    """Of a text of one's own the file's name only: where it lies is nobody's business.

    used: the windows there were, and the names of several corpora.
    """
    section = data["calibration"]
    windows = {key: section[key] for key in ("windows", "length", "order")}
    corpus = data["name"]
    if section["path"]:
        corpus = Path(section["path"]).name
    elif not corpus:
        source = data.get("path") or option
        assert source is not None, "a corpus is a name, a file or an option"
        corpus = Path(source).name
    return {"corpus": corpus, **windows, **used}


def _sizes(adapter: Adapter, tied: bool, stored_bits: int, folder: Path, weights: str) -> dict:
    """tied: whether head and embedding of the untouched model are one tensor.

    A transform separates them. weights: glob of the files in folder that hold them.
    """
    model = adapter.model
    parameters = list(model.parameters())
    for module in model.modules():
        if isinstance(module, QuantLinear):
            parameters += [tensor for tensor in (module.weight, module.bias) if tensor is not None]
    count = sum(tensor.numel() for tensor in parameters)
    if tied and adapter.head.weight is not model.get_input_embeddings().weight:
        count -= adapter.head.weight.numel()
    before = 2 * count
    after = sum(path.stat().st_size for path in folder.glob(weights))
    files = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        "before": before,
        "after": after,
        "files": files,
        "weights": -(-stored_bits // 8),
        "reduction_percent": 100 * (1 - after / before),
    }


def _tied(section: Mapping) -> bool:
    """Whether the model came with one matrix for head and embedding."""
    return bool(build(section, "model", ModelSource).facts().get("tie_word_embeddings"))


def _kv_bytes(kv: KVCache | None, structure: Structure) -> dict:
    """Bytes of keys and values a token that is quantized."""
    width = structure.head_dim
    layers = len(structure.attention)
    heads = max((each.kv_heads for each in structure.attention.values()), default=0)
    plain = 2 * layers * heads * width * 2
    if kv is None or not plain:
        return {"fp16": plain, "quantized": plain, "reduction_percent": 0.0}
    packed = layers * kv.token_bits(heads, width) / 8
    return {"fp16": plain, "quantized": packed, "reduction_percent": 100 * (1 - packed / plain)}
