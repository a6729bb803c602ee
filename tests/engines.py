"""Checkpoints as an engine gets them, and the environment in which vLLM stands."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from composed import ROOT
from test_checkpoint import evaluated, written

from harness.engines.served import Served

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
needs_vllm = pytest.mark.skipif(not PYTHON.is_file(), reason="needs .venv-vllm: make vllm")


def checkpoints(factory, settings: Mapping[str, Sequence[str]]) -> Callable[[str], Path]:
    """case -> its checkpoint, each made once, of what a run is given by `settings`."""

    @cache
    def get(case: str) -> Path:
        root = factory.mktemp(case)
        snapshot = evaluated(root, pytest.MonkeyPatch(), *settings[case])
        return written(snapshot, root / "checkpoint")

    return get


def served(folder: Path) -> Served:
    return Served(folder, torch.device("cpu"), torch.float32)


def states(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))
