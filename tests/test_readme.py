"""What the README shows runs as it stands there."""

import re

import torch
from composed import ROOT


def test_each_python_example_runs_by_itself():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    with torch.random.fork_rng(devices=[]):
        for block in blocks:
            names: dict = {}
            exec(block, names)
    assert len(blocks) == 2
    assert names["placements"]["quarot"].residual is not None
    before, after = names["placements"]["adacodec"].notes["held_out_loss"]
    assert after <= before
