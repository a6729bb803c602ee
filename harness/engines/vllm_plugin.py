"""vLLM's side: a quantization method `harness`, by which it evaluates our checkpoints.

    vllm serve DIR --enforce-eager

loads a folder of `export=harness` once this package is installed beside vLLM (entry point
vllm.general_plugins), on a CPU too. Weights are dequantized: this measures what no kernel computes
yet, and saves no memory. served.py says what of a layer is ours. Public hooks:
    register_quantization_config, QuantizationConfig, LinearMethodBase, BaseKVCacheMethod.

Imported by vLLM alone. Source: vLLM 0.32, model_executor/layers/quantization/base_config.py.
"""

# pyright: reportMissingImports=false
# vLLM stands in an environment of its own

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper

from harness.checkpoints.native_files import METHOD
from harness.checkpoints.record import Record
from harness.config.errors import DataError
from harness.engines.served import Fused, Heads, Served, apart
from harness.models.engine import refusal
from harness.structure.facts import read_object


class Matrix(LinearMethodBase):
    """Linears of ours in place of a layer's weight; vLLM has no parameter there."""

    def __init__(self, linears: Fused):
        self.linears = linears

    def create_weights(self, layer: nn.Module, *args, **kwargs) -> None:
        pass

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """bias: vLLM's own, which no file filled; ours is added by our linears."""
        return self.linears(x)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        return layer  # one matrix in our model already


class Lookup(Matrix):
    """An embedding of ours."""

    def __init__(self, weight: Tensor):
        self.weight = weight

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.weight)


class Cache(BaseKVCacheMethod):
    """Queries, keys and values on their way into a layer's attention."""

    def __init__(self, config: QuantizationConfig, heads: Heads):
        super().__init__(config)
        self.heads = heads

    def create_weights(self, layer: nn.Module) -> None:
        layer.register_forward_pre_hook(lambda _, states: self.heads(*states))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass  # its scales, for a cache of vLLM's own formats, stay one


class HarnessConfig(QuantizationConfig):
    """Knows the folder; reads it when the first layer asks, in the process that computes."""

    folder: Path
    served: Served | None = None

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # all stands in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> HarnessConfig:
        return cls()

    def maybe_update_config(self, model_name: str, *args, **kwargs) -> None:
        self.folder = Path(model_name)

    def get_quant_method(self, layer: Any, prefix: str):
        """Ours of every linear, of embedding and head, and of attention where it has any."""
        served = self.served or self._load()
        if isinstance(layer, Attention):
            heads = served.heads(prefix, layer.head_size)
            return None if heads is None else Cache(self, heads)
        if isinstance(layer, ParallelLMHead):
            return Matrix(served.head)
        if isinstance(layer, VocabParallelEmbedding):
            return Lookup(served.embedding)
        if isinstance(layer, LinearBase):
            return Matrix(served.fused(prefix, self.packed_modules_mapping))
        return None

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Leaves vLLM's loader what is not served by us."""
        served = self.served or self._load()
        return WeightsMapper(orig_to_new_regex={served.others(): None})

    def _load(self) -> Served:
        vllm = get_current_vllm_config()
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: is no folder; download the checkpoint first.")
        if not vllm.model_config.enforce_eager:
            raise DataError(
                "our formats are no kernels and are not compiled: give vLLM enforce_eager=True "
                "(--enforce-eager)."
            )
        if vllm.parallel_config.world_size > 1:
            raise DataError(
                f"{vllm.parallel_config.world_size} processes for one model: our linears are not "
                "split; give vLLM tensor_parallel_size=1 and pipeline_parallel_size=1."
            )
        record = Record.read(self.folder)
        family = read_object(self.folder / "config.json")["model_type"]
        alone = (
            vllm.scheduler_config.max_num_seqs == 1
            and vllm.scheduler_config.max_num_batched_tokens >= vllm.model_config.max_model_len
            and not vllm.cache_config.enable_prefix_caching
        )
        why = refusal(family, record.kv) or apart(record.activations, alone)
        if why is not None:
            raise DataError(f"{self.folder}: {why}.")
        device = torch.get_default_device()
        self.served = Served(self.folder, device, vllm.model_config.dtype)
        return self.served


def register() -> None:
    """What the entry point calls, in every process of vLLM."""
    register_quantization_config(METHOD)(HarnessConfig)
