"""Bench parts of mixtures of experts: a layer's experts solved at once against one by one, and the
memory of a model larger than that."""

from __future__ import annotations

import time

import torch
from bench_models import nvfp4, quantized, row
from transformers import AutoConfig, AutoModelForCausalLM

from harness.solvers import GPTQ, Problem, Solution

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


class Timed(GPTQ):
    """GPTQ that counts the seconds it takes to solve."""

    def solve_together(self, problems: list[Problem]) -> list[Solution]:
        start = time.perf_counter()
        solutions = self._solved(problems)
        spent = time.perf_counter() - start
        self.__dict__["spent"] = self.__dict__.get("spent", 0.0) + spent
        return solutions

    def _solved(self, problems: list[Problem]) -> list[Solution]:
        return super().solve_together(problems)


class OneByOne(Timed):
    """The same, one expert after another."""

    def _solved(self, problems: list[Problem]) -> list[Solution]:
        return [GPTQ().solve(problem) for problem in problems]


@torch.no_grad()
def experts() -> None:
    """Seconds of quantizing one block with 64 experts, NVFP4 W4A4, 8,192 tokens: in the solver, and
    with the forwards and Hessians that both need."""
    config = AutoConfig.for_model("qwen3_moe", **LAYER)
    tokens = torch.randint(256, WINDOWS, generator=torch.Generator().manual_seed(0))
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        best: dict[tuple[str, str], float] = {}
        for solver in (OneByOne(), Timed()) * 3:
            solver.__dict__["spent"] = 0.0
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            start = time.perf_counter()
            quantized(model, nvfp4(), solver, tokens)
            parts = {"block": time.perf_counter() - start, "solver": solver.__dict__["spent"]}
            for part, seconds in parts.items():
                key = (type(solver).__name__, part)
                best[key] = min(seconds, best.get(key, seconds))
        for part, bound in (("solver", "at least 3"), ("block", "")):
            one, together = best["OneByOne", part], best["Timed", part]
            row(f"64 experts, {threads} threads, {part}: {one:.2f} s one by one", together, "s")
            row("   times as fast at once", one / together, "", bound)
