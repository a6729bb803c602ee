"""Tiny random models of every family, and a byte tokenizer: a run in seconds, offline.

Two layers, grouped-query attention (6 heads on 2), random everything: a rotation that forgets a
bias, a norm weight or a query/key norm changes the logits and is caught. For Qwen3 heads * head_dim
= 288 differs from the hidden size 192.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.config.checks import boolean, integer, one_of
from harness.models.source import ModelSource

if TYPE_CHECKING:
    import torch

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
VOCABULARY = 256 + len(SPECIAL)


@dataclass(kw_only=True)
class Tiny(ModelSource):
    """A random model drawn from its own generator.

    `tie`: output head and embedding share one matrix. Nothing is trained.
    """

    family: str = "llama"
    tie: bool = True
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        one_of("model.family", self.family, FAMILIES)
        boolean("model.tie", self.tie)
        integer("model.seed", self.seed, low=0)
        self.name = self.name or f"tiny-{self.family}"

    def check(self) -> None:
        """Nothing can be missing."""

    def facts(self) -> dict:
        fields = {
            "model_type": self.family,
            "vocab_size": VOCABULARY,
            "hidden_size": 192,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": self.tie,
            "bos_token_id": 256,
            "eos_token_id": 257,
            "pad_token_id": None,
        }
        if self.family == "mistral":
            fields["sliding_window"] = None
        if self.family == "qwen3":
            fields["head_dim"] = 48
        return fields

    def load(self, device: str | torch.device = "cpu"):
        """Weights N(0, 0.05^2), biases N(0, 0.1^2), norm weights 1 + N(0, 0.2^2).

        They are drawn in float32 in order of their names.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(**self.facts())
        # transformers initializes from the global generator, whose state is the caller's
        with torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                noise = torch.randn(parameter.shape, generator=generator)
                if name.endswith("norm.weight"):
                    parameter.copy_(1 + 0.2 * noise)
                elif name.endswith(".bias"):
                    parameter.copy_(0.1 * noise)
                else:
                    parameter.copy_(0.05 * noise)
        # of weights only: the rotary table stays float32 in models that are read from files too
        if self.dtype == "bfloat16":
            for parameter in model.parameters():
                parameter.data = parameter.data.bfloat16()
        return self.ready(model, device), byte_tokenizer()

    def fingerprint(self) -> str:
        return f"tiny-{self.family}(tie={self.tie}, seed={self.seed})"


def byte_tokenizer():
    """One token for each byte of UTF-8 (ids 0..255) and <|bos|> = 256, <|eos|> = 257."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE({letter: index for index, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL
    )
