"""What the documents show runs as it stands there."""

import re
import shlex

import pytest
import torch
from composed import ROOT

from harness.report.sweep import sweep


def examples(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.S)


def test_each_python_example_runs_by_itself():
    """Those of README.md run where nothing but the package is installed, in test_package.py."""
    found = examples("CONTRIBUTING.md")
    assert len(found) == 2
    with torch.random.fork_rng(devices=[]):
        for example in found:
            exec(example, {})


def test_the_placements_of_the_example_are_what_their_transforms_promise():
    names: dict = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a text that can be learned from in its few steps
        exec(examples("CONTRIBUTING.md")[-1], names)
    assert names["placements"]["quarot"].residual is not None
    before, after = names["placements"]["adacodec"].notes["held_out_loss"]
    assert after < before


def test_the_transform_of_ten_minutes_leaves_the_model_as_it_is():
    """Its matrices are orthogonal: what it encodes, its inverse decodes."""
    names: dict = {}
    exec(examples("CONTRIBUTING.md")[0], names)
    shape = type("Shape", (), {"widths": {"attn_in": 48}})()
    codec = names["Flip"]().fit(shape, None).online[None, "attn_in"]
    x = torch.randn(3, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(codec.encode(x), x.flip(-1))
    assert torch.allclose(codec.decode(codec.encode(x)), x)


def commands(document: str) -> list[str]:
    """What a document runs with `run.py`, in the text or in a block, without its comments."""
    text = (ROOT / document).read_text().replace("\\\n", "")
    lines = re.findall(r"^python run\.py .*$", text, re.M)
    lines += re.findall(r"`(python run\.py [^`]*=[^`]*)`", text)
    tables = re.findall(r"`(TABLE [^`]*)`", text)
    table = "python run.py -m data=text data.path=DIR"
    return [*lines, *(line.replace("TABLE", table, 1) for line in tables)]


# A grid on this text and nothing else composes in test_configs.py, and takes long.
GRID = re.compile(
    r"python run\.py -m (hydra/\S+ )?(sweeps|experiment)=\w+( data=text data\.path=DIR)?\s*(#.*)?"
)
COMMANDS = [
    line
    for name in ("README.md", "sweeps/RESULTS.md", "sweeps/SERVING.md")
    for line in commands(name)
    if not GRID.fullmatch(line)
]


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_composes(tmp_path, monkeypatch, line):
    """Every setting that a document names is one that its options have."""
    monkeypatch.setenv("HARNESS_ROOT", str(ROOT))
    monkeypatch.setenv("HARNESS_SWEEP", "sweep")
    words = shlex.split(line.replace("windows=N", "windows=4"), comments=True)[2:]
    settings = [word for word in words if word != "-m" and not word.startswith("hydra/")]
    jobs: list = []
    sweep(jobs.append, ["tracking=local", f"run_root={tmp_path}", *settings])
    assert jobs
