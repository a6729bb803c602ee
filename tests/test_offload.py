"""Models larger than memory: a run whose blocks stay on disk gives the same numbers, and holds one
block at a time."""

import pytest
import torch
from composed import small

from harness.config.errors import DataError
from harness.evaluation.perplexity import window_losses
from harness.models.adapter import Adapter
from harness.models.hub import Hub
from harness.models.tiny import Tiny
from harness.pipeline.job import execute

TRANSFORMS = {
    "identity": [],
    "quarot": [],
    "pca": [],
    "hadamard": [],
    "wush": ["transform.merge=true"],
    "residual": [],
    "jointquant": ["transform.r1.epochs=1"],
    "adacodec": ["transform.steps=1", "transform.batch=1"],
    "flatquant": ["transform.steps=1"],
    "block_affine": ["transform.steps=1", "transform.objective=kd"],
}


FAMILIES = ("llama", "qwen3")


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    """A tiny model saved in several shards."""
    model, tokenizer = Tiny(family=request.param).load()
    model.save_pretrained(tmp_path / "model", max_shard_size="600KB")
    tokenizer.save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    return tmp_path / "model"


def outcomes(tmp_path, folder, *overrides):
    for weights in ("memory", "disk"):
        source = ["model=hf", f"model.path={folder}", f"model.weights={weights}"]
        cfg, choices = small(tmp_path / weights, *source, *overrides)
        yield execute(cfg, choices)


@pytest.mark.parametrize(
    ("folder", "transform"),
    [(FAMILIES[index % 2], transform) for index, transform in enumerate(TRANSFORMS)],
    indirect=["folder"],
)
def test_the_same_numbers_from_disk(tmp_path, folder, transform):
    memory, disk = outcomes(
        tmp_path, folder, f"transform={transform}", "format.kv.bits=4", *TRANSFORMS[transform]
    )
    assert disk.status == "done", disk.error
    assert disk.metrics["stages"] == memory.metrics["stages"]
    assert disk.metrics["run_id"] == memory.metrics["run_id"], (
        "where the weights are changes no number"
    )
    for index in range(2):
        assert disk.run.block(index).read_bytes() == memory.run.block(index).read_bytes()
    assert not (disk.run.path / "scratch").exists()


def test_calibration_activations_on_disk(tmp_path):
    outcomes = []
    for place in ("memory", "disk"):
        settings = [
            "solver=adascale",
            "solver.iterations=2",
            f"data.calibration.activations={place}",
        ]
        cfg, choices = small(tmp_path / place, *settings)
        outcomes.append(execute(cfg, choices))
    assert outcomes[0].metrics["stages"] == outcomes[1].metrics["stages"]
    assert outcomes[0].metrics["run_id"] == outcomes[1].metrics["run_id"]
    assert not (outcomes[1].run.path / "scratch").exists()


SOLVERS = {
    "awq": ["solver.grid=3"],
    "adascale": ["solver.iterations=3"],
    "signround": ["solver.steps=3", "solver.batch=1"],
    "minmax": [
        "format=int4",
        "format.weight.group_size=32",
        "format.overrides={lm_head: 8, embed_tokens: 8}",
    ],
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_kind_of_solver_from_disk(tmp_path, folder, solver):
    memory, disk = outcomes(tmp_path, folder, f"solver={solver}", *SOLVERS[solver])
    assert disk.status == "done", disk.error
    assert disk.metrics["stages"] == memory.metrics["stages"]


def test_one_block_at_a_time(folder, tmp_path):
    source = Hub(path=str(folder), weights="disk")
    model, _ = source.load()
    adapter = Adapter(model, source.offloaded(model, tmp_path / "scratch"))

    def resident():
        return [not block.mlp.up_proj.weight.is_meta for block in adapter.blocks]

    assert resident() == [False, False]
    seen = []
    for block in adapter.blocks:
        block.mlp.register_forward_hook(lambda *_: seen.append(resident()))
    with torch.no_grad():
        model(torch.arange(10)[None])
    assert seen == [[True, False], [False, True]]
    with adapter.open(1):
        with adapter.open(1):
            assert resident() == [False, True]
        assert resident() == [False, True], "the outer one still needs it"
    assert resident() == [False, False]
    with adapter.open(0, write=True):
        adapter.blocks[0].mlp.up_proj.weight.data.fill_(3)
    with adapter.open(0):
        assert (adapter.blocks[0].mlp.up_proj.weight == 3).all(), "a change lasts"
    with adapter.open(0):
        adapter.blocks[0].mlp.up_proj.weight.data.fill_(5)
    with adapter.open(0):
        assert (adapter.blocks[0].mlp.up_proj.weight == 3).all(), "unless it was not to be written"


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_streaming_evaluation_is_the_same(amp):
    adapter = Adapter(Tiny(family="qwen2").load()[0])
    ids = torch.randint(256, (3, 70), generator=torch.Generator().manual_seed(0))
    count = [0, 0]

    def advance(which):
        count[which] += 1

    plain = window_losses(adapter, ids, amp, lambda: advance(0))
    streamed = window_losses(adapter, ids, amp, lambda: advance(1), streaming=True)
    assert torch.equal(plain, streamed)
    assert count == [3, 2]


def test_a_missing_weight_is_named(folder):
    (sorted(folder.glob("*.safetensors"))[0]).unlink()
    source = Hub(path=str(folder), weights="disk")
    with pytest.raises(DataError, match=r"lacks|safetensors"):
        source.check()
