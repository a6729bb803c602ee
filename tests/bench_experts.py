"""Bench parts of mixtures of experts: a layer's experts solved at once against one by one, and the
memory of a model larger than that."""

from __future__ import annotations

import time

import torch
from bench_models import nvfp4, quantized, row
from transformers import AutoConfig, AutoModelForCausalLM

from harness.solvers import GPTQ
from harness.solvers.base import Problem, Solution, Solver

LAYER = {  # 64 experts, 8 a token
    "hidden_size": 512,
    "moe_intermediate_size": 256,
    "intermediate_size": 512,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 258,
}
WINDOWS = (16, 512)


class OneByOne(GPTQ):
    """GPTQ that takes one expert after another."""

    def solve_together(self, problems: list[Problem]) -> list[Solution]:
        return Solver.solve_together(self, problems)

    def solve(self, problem: Problem) -> Solution:
        return super().solve_together([problem])[0]


@torch.no_grad()
def experts() -> None:
    """Seconds of quantizing one block with 64 experts, NVFP4 W4A4, 8,192 tokens."""
    torch.set_num_threads(1)
    config = AutoConfig.for_model("qwen3_moe", **LAYER)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, WINDOWS, generator=generator)
    seconds = {}
    for solver in (OneByOne(), GPTQ(), OneByOne(), GPTQ()):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        start = time.perf_counter()
        quantized(model, nvfp4(), solver, tokens)
        spent = time.perf_counter() - start
        name = type(solver).__name__
        seconds[name] = min(spent, seconds.get(name, spent))
    row("64 experts one by one", seconds["OneByOne"], "s")
    row("64 experts at once", seconds["GPTQ"], "s")
    row("   times as fast", seconds["OneByOne"] / seconds["GPTQ"], "", "at least 3")
