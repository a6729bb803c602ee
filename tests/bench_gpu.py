"""Bench part for a GPU: blocks of a random model of real widths, there in bfloat16.

Eight billion weights in 32 blocks are what Llama 3.1 8B has; BLOCKS of them are timed, and all
stand in proportion. A random model gives no perplexity, and its times are a trained one's.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping

import torch
from bench_models import nvfp4, quantized, row
from transformers import LlamaConfig, LlamaForCausalLM

from harness.evaluation.perplexity import window_losses
from harness.models.adapter import Adapter
from harness.solvers import GPTQ, RTN

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LAYERS = 32
BLOCKS = 4
CALIBRATION = (32, 2048)
EVALUATION = (4, 2048)


def random_llama(widths: Mapping[str, int], device: torch.device) -> LlamaForCausalLM:
    """BLOCKS blocks of these widths with random weights, bfloat16."""
    config = LlamaConfig(**widths, num_hidden_layers=BLOCKS)
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def seconds(do: Callable[[], object], device: torch.device) -> float:
    """Wall seconds of it, whatever was started on the device included."""
    began = time.perf_counter()
    do()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def measured(
    widths: Mapping[str, int],
    device: torch.device,
    calibration: tuple[int, int] = CALIBRATION,
    evaluation: tuple[int, int] = EVALUATION,
) -> dict[str, float]:
    """{what: wall seconds} of BLOCKS blocks: forwards of the evaluation's windows, GPTQ."""
    model = random_llama(widths, device)
    generator = torch.Generator().manual_seed(0)
    vocabulary = widths["vocab_size"]
    text = torch.randint(vocabulary, calibration, generator=generator)
    windows = torch.randint(vocabulary, evaluation, generator=generator)
    plain = Adapter(model)
    other = quantized(copy.deepcopy(model), nvfp4(), RTN(), text[:1])

    def forward(adapter: Adapter) -> None:
        for window in windows:
            window_losses(adapter, window[None])

    found = {}
    for name, adapter in (("bfloat16", plain), ("NVFP4 W4A4", other)):
        seconds(lambda adapter=adapter: forward(adapter), device)  # kernels are chosen
        found[name] = seconds(lambda adapter=adapter: forward(adapter), device)
    found["GPTQ"] = seconds(lambda: quantized(model, nvfp4(), GPTQ(), text), device)
    return found


def gpu() -> None:
    if not torch.cuda.is_available():
        print("gpu: no CUDA device on this machine, nothing is measured")
        return
    device = torch.device("cuda", 0)
    print(f"gpu: {torch.cuda.get_device_name(device)}, {BLOCKS} blocks of Llama 3.1 8B")
    found = measured(LLAMA_8B, device)
    tokens = EVALUATION[0] * EVALUATION[1]
    row(f"bfloat16 forward, {tokens} tokens", found["bfloat16"], "s")
    row(f"NVFP4 W4A4 forward, {tokens} tokens", found["NVFP4 W4A4"], "s")
    row("ratio", found["NVFP4 W4A4"] / found["bfloat16"])
    row(f"GPTQ of {BLOCKS} blocks, {CALIBRATION[0]} windows", found["GPTQ"], "s")
    row(f"GPTQ of all {LAYERS} in proportion", found["GPTQ"] * LAYERS / BLOCKS, "s")
