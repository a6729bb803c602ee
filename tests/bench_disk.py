"""Bench parts of models whose blocks stay on disk: peak memory of a whole run, GPTQ of 4-bit
weights on a random bf16 model in shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from bench_models import row
from transformers import AutoConfig, AutoModelForCausalLM

from harness.models.tiny import byte_tokenizer

LARGE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
SEVEN = LARGE | {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
}
MIXTURE = {  # 2.06 B parameters
    "vocab_size": 32000,
    "hidden_size": 1024,
    "moe_intermediate_size": 768,
    "intermediate_size": 2048,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 13,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


def large() -> None:
    """1.1 B dense parameters, 8 windows of 512 tokens."""
    metrics = _run("llama", LARGE, "data.calibration.windows=8")
    row(
        "1.1 B parameters from disk, GPTQ: peak resident",
        metrics["peak_memory_mb"],
        "MB",
        "at most 3500",
    )
    row("   as the model of memory has it", held(LARGE), "MB")
    row("   seconds, evaluations included", sum(metrics["seconds"].values()), "s")
    row("7 B shapes by the same model of memory", held(SEVEN), "MB")


def mixture() -> None:
    """2 B parameters in experts, 4 windows of 512 tokens."""
    metrics = _run("qwen3_moe", MIXTURE, "data.calibration.windows=4")
    row(
        "2.0 B parameters in experts, from disk, GPTQ: peak resident",
        metrics["peak_memory_mb"],
        "MB",
        "at most 3500",
    )
    row("   seconds, evaluations included", sum(metrics["seconds"].values()), "s")


def _run(family: str, facts: dict, *settings: str) -> dict:
    """The metrics of a run in a process of its own, on a random model of those facts."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [family, json.dumps(facts), folder]
        subprocess.run([sys.executable, __file__, *arguments], check=True)
        root = Path(__file__).parent.parent
        chosen = [
            "model=hf",
            f"model.path={folder}",
            "model.weights=disk",
            "data=pydoc",
            "tracking=local",
            "solver=gptq",
            "format=int4",
            "format.act.bits=16",
            "data.calibration.length=512",
            "eval.perplexity.windows=2",
            "eval.perplexity.length=512",
            "eval.perplexity.corpora=[data]",
            f"run_root={folder}/runs",
            *settings,
        ]
        env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | {
            "PYTHONPATH": str(root)
        }
        command = [sys.executable, str(root / "run.py"), *chosen]
        subprocess.run(command, check=True, env=env, capture_output=True)
        return json.loads(next(Path(folder).glob("runs/*/metrics.json")).read_text())


def held(facts: dict, windows: int = 8, length: int = 512) -> float:
    """MB of bf16 embedding, head and one block twice (read, changed), activations and, for the
    widest site, six float32 squares (H, its damped copy before and after ordering, the factor, its
    inverse, that in order) and the stacked weights three times in float32; 450 MB of libraries."""
    hidden, wide = facts["hidden_size"], facts["intermediate_size"]
    heads = hidden // facts["num_attention_heads"] * facts["num_key_value_heads"]
    block = 2 * (2 * hidden * hidden + 2 * hidden * heads + 3 * hidden * wide)
    outside = 2 * 2 * facts["vocab_size"] * hidden
    activations = 2 * windows * length * (hidden + wide)
    solving = 4 * max(
        6 * wide * wide + 3 * wide * hidden, 6 * hidden * hidden + 3 * 2 * wide * hidden
    )
    return 450 + (outside + 2 * block + activations + solving) / 2**20


def _make(family: str, facts: dict, folder: str) -> None:
    """Save a random bf16 model in shards."""
    config = AutoConfig.for_model(family, **facts)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="400MB")
    byte_tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    _make(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])
