"""What the documents show runs as it stands there."""

import re

import pytest
import torch
from composed import ROOT


def examples(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.S)


@pytest.mark.parametrize("document, count", [("README.md", 1), ("CONTRIBUTING.md", 2)])
def test_each_python_example_runs_by_itself(document, count):
    found = examples(document)
    assert len(found) == count
    with torch.random.fork_rng(devices=[]):
        for example in found:
            exec(example, {})


def test_the_placements_of_the_example_are_what_their_transforms_promise():
    names: dict = {}
    with torch.random.fork_rng(devices=[]):
        exec(examples("CONTRIBUTING.md")[-1], names)
    assert names["placements"]["quarot"].residual is not None
    before, after = names["placements"]["adacodec"].notes["held_out_loss"]
    assert after <= before


def test_the_transform_of_ten_minutes_leaves_the_model_as_it_is():
    """Its matrices are orthogonal: what it encodes, its inverse decodes."""
    names: dict = {}
    exec(examples("CONTRIBUTING.md")[0], names)
    shape = type("Shape", (), {"widths": {"attn_in": 48}})()
    codec = names["Flip"]().fit(shape, None).online[None, "attn_in"]
    x = torch.randn(3, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(codec.encode(x), x.flip(-1))
    assert torch.allclose(codec.decode(codec.encode(x)), x)
