"""A checkpoint of this project inside the model that an engine has of its own.

    fused linear    y = [y_1 | y_2 | ..],  y_i = encode_i(decode_i(Q(x E)) W_i^T + b_i)
    attention       scores = (q R3) Q(k R3)^T,  values Q(v)

Engines fuse the linears that read one activation (q, k, v; gate, up) and hold no linear alone.
Here such a layer is computed by our own linears, the very modules of the model that was evaluated,
so that the arithmetic of formats and codecs is that of the evaluation: x is encoded and quantized
once by the site that the parts share. Attention gets queries, keys and values after RoPE, where R3
and the formats of a cache act, a token by itself. Embedding and head are ours; norms, rotary
embeddings, activation functions and attention itself are the engine's. What that leaves out is
refused (models/engine.py). Knows of no engine: vllm_plugin.py puts it into one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.checkpoints.native import load
from harness.checkpoints.record import Record
from harness.formats import Format
from harness.models.attention import HeadsInput
from harness.models.quant_linear import QuantLinear

MATRICES = (QuantLinear, nn.Linear, nn.Embedding)


def apart(activations: Mapping[str, Format], alone: bool) -> str | None:
    """Why an engine that computes a sequence's tokens in one forward, `alone` or not, would not
    compute what was evaluated, None where it does."""
    spanning = sorted(site for site, format in activations.items() if format.spans_tokens)
    if not spanning or alone:
        return None
    return (
        f"scales at {spanning[0]} span tokens, and would be others where sequences share a forward "
        "or one takes several; give the engine max_num_seqs=1 enable_prefix_caching=False and "
        "max_num_batched_tokens as large as max_model_len"
    )


@dataclass(frozen=True)
class Fused:
    """Linears that an engine has as one, applied to what they all read."""

    parts: Sequence[nn.Module]

    def __call__(self, x: Tensor) -> Tensor:
        """[.., n] -> [.., sum of the parts' outputs]."""
        return torch.cat([part(x) for part in self.parts], dim=-1)


@dataclass(frozen=True)
class Heads:
    """What stands before an engine's attention: R3, and the formats of a KV cache."""

    inputs: HeadsInput
    head_dim: int

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each [tokens, heads * head_dim], after RoPE, as it is attended to and kept."""
        query, key, value = (
            x.reshape(len(x), -1, self.head_dim).transpose(0, 1)[None] for x in (query, key, value)
        )
        key, value = self.inputs.store(key, value)
        query = self.inputs.rotate(query)
        query, key, value = (x[0].transpose(0, 1).flatten(1) for x in (query, key, value))
        return query, key, value


class Served:
    """The modules of a checkpoint that an engine computes with, by the engine's names of them."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype):
        """dtype: that the engine computes in; device: where."""
        own = Record.read(folder).dtype
        self.model, _ = load(folder, device, None if dtype == own else dtype)

    def fused(self, name: str, packed: Mapping[str, Sequence[str]]) -> Fused:
        """The linear of that name; packed: {what is fused: its parts}."""
        owner, _, leaf = name.rpartition(".")
        parent = self.model.get_submodule(owner)
        return Fused([parent.get_submodule(part) for part in packed.get(leaf, [leaf])])

    def heads(self, name: str, head_dim: int) -> Heads | None:
        """What stands before the attention `name`, within its module; None where nothing does."""
        inputs = getattr(self.model.get_submodule(name.rpartition(".")[0]), "heads_input", None)
        return Heads(inputs, head_dim) if isinstance(inputs, HeadsInput) else None

    @property
    def embedding(self) -> Tensor:
        """[vocabulary, hidden]."""
        return self.model.get_input_embeddings().weight

    @property
    def head(self) -> Fused:
        return Fused([self.model.get_output_embeddings()])

    def others(self) -> re.Pattern[str]:
        """Finds the names in the files of all that is served from here. An engine reads the rest:
        it asks by the name in the file, and by that within the outermost module."""
        names = list(self._rest())
        names += [name.partition(".")[2] for name in names]
        return re.compile(f"^(?!(?:{'|'.join(re.escape(name) for name in names)})$)")

    def _rest(self) -> Iterator[str]:
        for owner, module in self.model.named_modules():
            if not isinstance(module, MATRICES):
                for name, _ in module.named_parameters(recurse=False):
                    yield f"{owner}.{name}"
