"""What the README shows runs as it stands there."""

import re

import torch
from composed import ROOT


def test_python_examples_run_one_after_the_other():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names: dict = {}
    with torch.random.fork_rng(devices=[]):
        for block in blocks:
            exec(block, names)
    assert len(blocks) == 2
    assert names["placements"]["quarot"].residual is not None
    before, after = names["placements"]["adacodec"].notes["held_out_loss"]
    assert after <= before
