"""gguf: one file that llama.cpp loads, its weights those that were evaluated, bit for bit.

Held: Llama (SmolLM2), Mistral, Qwen2 and Qwen3; the weights of ggml.py, mixed over linears as one
likes, embedding and head too; all that is merged into weights. Float matrices stay in the model's
dtype, vectors (norms, biases) are float32. Refused: what stays online; activations, keys and values
in low bits, for llama.cpp rounds activations to 8 bits in its own products and has caches of its
own kinds.

llama.cpp turns neighbours (2i, 2i + 1) of a Llama's queries and keys where transformers turns
(i, i + d/2), so rows of each head of d go from i + t d/2 to 2i + t, t = 0, 1; Qwen's stay. Names
are those of gguf's own table. Frequencies that are stretched (Llama 3.1) stand in rope_freqs.weight
as what llama.cpp divides them by.

The gate reads the file back with transformers, which knows GGUF and nothing of this.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch
from torch import Tensor

from harness.checkpoints import ggml
from harness.checkpoints.base import Exporter, Snapshot, modules
from harness.checkpoints.gguf_vocabulary import add_vocabulary, byte_level
from harness.checkpoints.snippets import fenced
from harness.config.errors import ConfigError, DataError
from harness.formats import Scheme
from harness.libraries.conversion import read_gguf
from harness.models.adapter import Adapter
from harness.store import replacing
from harness.structure.facts import config_of
from harness.structure.skeleton import skeleton
from harness.transforms import ModelShape, Transform

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FILE = "model.gguf"
KINDS = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
FREQUENCIES = "rope_freqs.weight"


class Gguf(Exporter):
    """The GGUF layout.

    pre: llama.cpp's name of the pre-tokenizer; None: that of the evaluated tokenizer.
    """

    name = "gguf"
    files = FILE
    library = "llama-cpp-python"
    weights_alone = True

    def __init__(self, pre: str | None = None):
        self.pre = pre

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
                    f"transform={transform.name} with export=gguf: {', '.join(left)} would have to "
                    "run online, and llama.cpp runs nothing; take a transform that merges, or use "
                    "export=harness."
                )
        for part, quantized in (("act", scheme.any("act")), ("kv", scheme.kv is not None)):
            if quantized:
                raise ConfigError(
                    f"format.{part} with export=gguf: llama.cpp rounds activations and its cache "
                    f"in its own ways; set format.{part}.bits=16, or use export=harness."
                )
        formats = [(scheme.weight, "format.weight")]
        for (_, name), parts in scheme.overrides.items():
            formats.append((parts.get("weight"), f"format.overrides: {name}.weight"))
        for format, field in formats:
            if format is not None:
                ggml.refuse(format, field, context)
        return []

    def check_config(self, facts: Mapping) -> None:
        kind = facts["model_type"]
        if kind not in KINDS:
            raise ConfigError(
                f"export=gguf with a {kind}: it writes {', '.join(KINDS)}; use "
                "export=dequantized, which llama.cpp's converter reads."
            )
        act = facts.get("hidden_act", "silu")
        rope = facts.get("rope_parameters") or {}
        stretched = ("default", "llama3") if KINDS[kind] is gguf.MODEL_ARCH.LLAMA else ("default",)
        sliding = "sliding_attention" in (facts.get("layer_types") or ())
        sliding = sliding or (kind == "mistral" and facts.get("sliding_window") is not None)
        for key, value, held in (
            ("hidden_act", act, act == "silu"),
            ("rope_type", rope.get("rope_type"), rope.get("rope_type", "default") in stretched),
            ("sliding_window", facts.get("sliding_window"), not sliding),
        ):
            if not held:
                raise ConfigError(
                    f"export=gguf with a {kind} of {key}={value}: llama.cpp computes such a model "
                    "otherwise; use export=harness."
                )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        byte_level(tokenizer, self.pre)

    def write(self, snapshot: Snapshot, folder: Path) -> None:
        config = snapshot.adapter.model.config
        with replacing(folder / FILE) as temporary:
            # what is written waits in a file, so that one block is in memory
            writer = gguf.GGUFWriter(temporary, _architecture(config), use_temp_file=True)
            describe(writer, config)
            add_vocabulary(writer, snapshot.tokenizer, config.vocab_size, self.pre)
            for name, kind, data in _entries(snapshot):
                writer.add_tensor(name, _bytes(data), raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()

    def tensors(self, snapshot: Snapshot) -> Iterator[tuple[str, Tensor]]:
        for name, _, data in _entries(snapshot):
            yield name, data

    def config(self, snapshot: Snapshot) -> dict:
        model = snapshot.adapter.model
        dtype = str(model.dtype).removeprefix("torch.")
        return {"architectures": [type(model).__name__], "dtype": dtype, "use_cache": True}

    def load(self, folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        config = config_of(folder)
        empty = skeleton(config)
        _, tensors = read_gguf(folder / FILE, _named(config), empty)
        missing = empty.state_dict().keys() - tensors.keys()
        if config.tie_word_embeddings:
            missing.discard("lm_head.weight")
        if missing:
            raise DataError(f"{folder / FILE} lacks {', '.join(sorted(missing)[:4])}")
        model = type(empty).from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
        model = model.to(device).eval()  # pyright: ignore[reportArgumentType]
        model.config.use_cache = False
        return model

    def loading(self, name: str, kind: str) -> list[str]:
        path = json.dumps(f"{name}/{FILE}")
        code = f"from llama_cpp import Llama\n\nmodel = Llama({path})"
        return ["With llama.cpp:", fenced(code, "python")]


def rotated(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads * d, ..] of a Llama's q or k in the order that llama.cpp turns them in."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _entries(snapshot: Snapshot) -> Iterator[tuple[str, gguf.GGMLQuantizationType, Tensor]]:
    """(name in the file, type, rows: floats, or bytes of what is quantized)."""
    adapter = snapshot.adapter
    config = adapter.model.config
    kind = KINDS[config.model_type]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, module in modules(adapter):
        quantized = snapshot.qtensors.get(name)
        for entry, tensor in module.state_dict(keep_vars=True).items():
            if "." in entry:
                continue
            data = tensor.detach()
            form = ggml.FLOATS[data.dtype]
            if quantized is not None and entry == "weight":
                data, form = ggml.blocks(quantized), ggml.type_of(quantized)
            elif data.ndim == 1:
                data, form = data.float(), gguf.GGMLQuantizationType.F32
            turned = heads.get(name.rpartition(".")[2])
            if turned is not None and kind is gguf.MODEL_ARCH.LLAMA:
                data = rotated(data, turned)
            found = names.get_name(f"{name}.{entry}", (".weight", ".bias"))
            assert found is not None, f"{name}.{entry} of a {config.model_type} has a name"
            yield found, form, data
    factors = _stretched(adapter)
    if factors is not None:
        yield FREQUENCIES, gguf.GGMLQuantizationType.F32, factors


def _stretched(adapter: Adapter) -> Tensor | None:
    """theta^(-2i/d) / f_i [d / 2], float32, of the frequencies f; None where they are those."""
    rope = adapter.model.config.rope_parameters
    if rope["rope_type"] == "default":
        return None
    used = adapter.backbone.rotary_emb.inv_freq.double()
    powers = torch.arange(len(used), dtype=torch.float64, device=used.device) / len(used)
    return (rope["rope_theta"] ** -powers / used).float()


def describe(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    """The sizes of the model."""
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_vocab_size(config.vocab_size)


def _architecture(config: PreTrainedConfig) -> str:
    return gguf.MODEL_ARCH_NAMES[KINDS[config.model_type]]


def _named(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config of the architecture by whose names transformers reads the file."""
    from transformers import AutoConfig

    return AutoConfig.for_model(_architecture(config), num_hidden_layers=config.num_hidden_layers)


def _bytes(data: Tensor) -> np.ndarray:
    """Rows as numpy has them: vectors as float32, all else as bytes."""
    data = data.cpu().contiguous()
    return data.numpy() if data.ndim == 1 else data.view(torch.uint8).numpy()
