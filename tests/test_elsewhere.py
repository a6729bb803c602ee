"""Every part of the pipeline says where its tensors go: runs on a device that is not the CPU.

In a process of its own, for a backend cannot be taken back. Shapes and dtypes of kernels are not
seen here, nor what runs in another order on a GPU.
"""

import json
import os
import subprocess
import sys

import pytest
from composed import ROOT, small

from harness.pipeline.job import execute

GPTQ = "format=nvfp4 solver=gptq transform=quarot"
RUNS = (
    GPTQ,
    "format=nvfp4 recipe=propagated solver.refit=true transform=adacodec"
    " transform.steps=2 transform.batch=1",
    "format=mxfp4_kv recipe=wush",
    "format=int4 format.weight.group_size=32 solver=awq transform=residual",
    "format=w4a4kv4 solver=adascale solver.iterations=2 transform=jointquant transform.r1.epochs=1",
    "format=nvfp4 solver=faar solver.steps=2 transform=flatquant"
    " transform.steps=2 transform.batch=1",
    "format=nvfp4 solver=rtn tune=weights tune.steps=2 tune.windows=null transform=spinquant"
    " transform.steps=2 transform.batch=1",
    "format=auto solver=rtn tune=scales tune.steps=2 tune.windows=null",
    "format=kivi2 solver=none transform=pca",
    "format=fp8_kv_static solver=rtn transform=smoothquant",
    "format=int4 format.weight.group_size=32 format.overrides={lm_head:8,embed_tokens:int8}"
    " solver=rtn export=harness",
)


def elsewhere(*words):
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, *words]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)


def test_the_pipeline_on_another_device(tmp_path):
    found = elsewhere("tests/elsewhere.py", str(tmp_path / "far"), *RUNS)
    assert found.returncode == 0, found.stderr[-3000:]
    lines = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]
    assert [line["overrides"] for line in lines] == list(RUNS)
    near = execute(*small(tmp_path / "near", *GPTQ.split())).metrics["stages"]["quantized"]["ppl"]
    assert lines[0]["ppl"]["pydoc"] == pytest.approx(near["pydoc"], rel=0.01)


FORGOTTEN = """
import torch
from elsewhere import FAR, Elsewhere
with Elsewhere():
    x = torch.ones(3, device=FAR)
    assert x.device == FAR and (x + 1).sum().item() == 6
    assert (x * torch.tensor(2.0)).tolist() == [2, 2, 2]
    assert torch.arange(3, device=FAR)[1:].cpu().tolist() == [1, 2]
    for forgets in (
        lambda: x + torch.ones(3), lambda: torch.cat([x, torch.zeros(1)]), lambda: x.numpy()
    ):
        try:
            forgets()
        except (RuntimeError, TypeError):
            print("refused")
"""


def test_what_a_device_refuses():
    found = elsewhere("-c", FORGOTTEN)
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.split() == ["refused"] * 3
