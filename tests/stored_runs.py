"""Run directories as a run leaves them: done, failed, interrupted. Nothing is computed."""

import math
import random
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from harness.store import write, write_json

MARKS = {
    "wikitext-2": ["same corpus as calibration", "first 8 of 145 windows"],
    "arc_easy": ["first 40 documents"],
}


@pytest.fixture(autouse=True)
def piped(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)


def stored(
    root: Path, run_id: str, status: str = "done", shift: float = 0.0, error=None, windows: int = 8
) -> Path:
    """A run directory as a run leaves it. Losses and answers are drawn from the same seed, then
    moved by `shift` nats."""
    generator, path, solver = random.Random(0), root / run_id, run_id.split("-")[3]
    nats = [generator.uniform(2.5, 3.5) + shift for _ in range(windows)]
    draw = generator.random
    answers = [
        {"doc": i, "acc": float(draw() < 0.5), "acc_norm": float(draw() > shift)} for i in range(40)
    ]
    right = sum(answer["acc_norm"] for answer in answers) / 40
    quantized = {
        "ppl": {"wikitext-2": math.exp(sum(nats) / windows), "pydoc": 14.0 + shift},
        "tokens": 2 * windows * 2048,
        "losses": {"wikitext-2": nats, "pydoc": nats},
        "divergence": {"wikitext-2": {"kl": 0.1 + shift, "top1": 0.83}},
        "zeroshot": {
            "arc_easy": {
                "acc": 0.5,
                "acc_stderr": 0.08,
                "acc_norm": right,
                "acc_norm_stderr": 0.07,
                "n": 40,
            }
        },
    }
    choices = dict(zip(("model", "format", "transform", "solver"), run_id.split("-"))) | {
        "data": "text",
        "experiment": None,
    }
    config = {"seed": 0, "solver": {"name": solver, "tasks": ["[a]", "b"]}, "run_root": "r"}
    write(path / "config.yaml", OmegaConf.to_yaml(config))
    began = {
        "status": status,
        "stage": "solve",
        "started": "2026-03-01T10:00:00+0000",
        "error": error,
    }
    write_json(path / "status.json", began)
    stages = {"baseline": {"ppl": {"wikitext-2": 17.0, "pydoc": 9.0}}} | (
        {"quantized": quantized} if status == "done" else {}
    )
    write_json(
        path / "metrics.json",
        {
            "run_id": run_id,
            "status": status,
            "choices": choices,
            "command": f"python run.py solver={solver} seed=0",
            "stages": stages,
            "bits_per_weight": 4.5 if status == "done" else None,
            "seconds": {"load": 1.0, "solve": 11.5},
            "peak_memory_mb": 1000.0,
            "layers": [
                {"name": f"layers.{i}.q_proj", "rel_error": i / 100, "sqnr_db": 20.0 - i}
                for i in range(9)
            ],
            "warnings": ["[careful]"],
            "notes": {},
            "marks": MARKS,
        },
    )
    write_json(
        path / "outliers.json",
        {
            "rows": [
                {
                    "layer": i,
                    "site": "down_in",
                    "before": {"kurtosis": 10.0 * i, "max_over_median": 312.0},
                    "after": {"kurtosis": 7.0 - i, "max_over_median": 3.0},
                }
                for i in range(4)
            ]
        },
    )
    write_json(path / "samples" / "quantized" / "arc_easy.json", answers)
    write(path / "blocks" / "0000.safetensors", "x" * 2_000_000)
    return path


@pytest.fixture
def root(tmp_path) -> Path:
    stored(tmp_path / "runs", "tiny-nvfp4-identity-gptq-aaaaaaaaa1")
    stored(tmp_path / "runs", "tiny-nvfp4-hadamard-rtn-aaaaaaaaa2", shift=0.3)
    stored(
        tmp_path / "runs",
        "tiny-int4-identity-gptq-bbbbbbbbb3",
        "failed",
        error="RuntimeError: first\nthe last [line]",
    )
    stored(tmp_path / "runs", "tiny-int4-identity-rtn-bbbbbbbbb4", "running")
    (tmp_path / "runs" / "_shared").mkdir()
    return tmp_path / "runs"
