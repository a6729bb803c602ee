"""Learned matrices are the same bits for the same seed, kept in the store and in files, and learned
again where those are damaged."""

import pytest
import torch
from events import events
from safetensors.torch import save_file
from transformed import run

from harness.calibration.subject import StreamedModel
from harness.config.errors import ConfigError
from harness.formats import NVFP4, Scheme
from harness.models.adapter import Adapter
from harness.models.merge import fuse_norms, swap
from harness.models.tiny import Tiny
from harness.transforms import Blocks, Placement
from harness.transforms.learn import Descent, end_to_end


@pytest.mark.parametrize(
    "transform", ["spinquant", "dartquant", "adacodec", "pca", "wush", "flatquant"]
)
def test_learned_matrices_are_the_same_bits_for_the_same_seed(tmp_path, transform):
    first, again, _ = (
        run(
            tmp_path / name,
            transform,
            f"transform.save={tmp_path / name}.safetensors",
            f"seed={seed}",
        )
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first.metrics["stages"] == again.metrics["stages"]
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    if transform in ("spinquant", "dartquant", "flatquant"):
        assert (tmp_path / "a.safetensors").read_bytes() != (
            tmp_path / "c.safetensors"
        ).read_bytes()


@pytest.mark.parametrize("transform", ["spinquant", "adacodec", "pca", "wush", "jointquant"])
def test_saved_matrices_loaded_elsewhere_give_the_same_model(tmp_path, transform):
    path = tmp_path / "learned.safetensors"
    first = run(tmp_path / "a", transform, f"transform.save={path}")
    loaded = run(tmp_path / "b", transform, f"transform.load={path}")
    assert loaded.metrics["stages"] == first.metrics["stages"]
    assert [event["source"] for event in events(loaded, "placement")] == [str(path)]
    assert loaded.metrics["run_id"] != first.metrics["run_id"]


def test_what_is_learned_again_invalidates_the_blocks_solved_under_it(tmp_path):
    """Blocks hold weights in the learned basis: other matrices under the same settings must not
    meet them."""
    first = run(tmp_path, "dartquant")
    (stored,) = (tmp_path / "runs" / "_shared" / "placements").glob("*.safetensors")
    other = run(tmp_path / "other", "dartquant", "seed=1")
    (foreign,) = (tmp_path / "other" / "runs" / "_shared" / "placements").glob("*.safetensors")
    stored.write_bytes(foreign.read_bytes())
    again = run(tmp_path, "dartquant", "eval.perplexity.windows=3")
    assert again.metrics["quant_id"] == first.metrics["quant_id"] != other.metrics["quant_id"]
    assert [event["index"] for event in events(again, "block")] == [0, 1], "solved anew"


def test_a_damaged_placement_is_learned_again(tmp_path):
    first = run(tmp_path, "pca")
    (stored,) = (tmp_path / "runs" / "_shared" / "placements").glob("*.safetensors")
    stored.write_bytes(stored.read_bytes()[:100])
    again = run(tmp_path, "pca", "solver=rtn")
    assert again.status == "done", again.error
    assert [event["source"] for event in events(again, "placement")] == ["learned"]
    assert first.status == "done"


def test_saving_is_done_for_a_stored_result_too(tmp_path):
    run(tmp_path, "pca")
    kept = tmp_path / "late.safetensors"
    assert run(tmp_path, "pca", f"transform.save={kept}").status == "done"
    assert kept.is_file()


def test_rotations_on_demand_beside_loaded_ones(tmp_path):
    path = tmp_path / "learned.safetensors"
    run(tmp_path / "a", "spinquant", f"transform.save={path}")
    loaded = run(
        tmp_path / "b",
        "spinquant",
        f"transform.load={path}",
        "format.kv.bits=4",
        "transform.r4=off",
    )
    assert loaded.metrics["notes"]["rotations"] == ["R1", "R2", "R3"]


def test_rotations_in_spinquants_layout(tmp_path):
    def orthogonal(n):
        return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n)))[
            0
        ].contiguous()

    path = tmp_path / "rotations.safetensors"
    save_file(
        {
            "R1": orthogonal(192),
            **{f"model.layers.{i}.self_attn.R2": orthogonal(32) for i in range(2)},
        },
        path,
    )
    outcome = run(
        tmp_path,
        "spinquant",
        f"transform.load={path}",
        "format=int4",
        "format.weight.group_size=32",
    )
    assert outcome.status == "done", outcome.error
    assert outcome.metrics["notes"]["gate"]["max"] < 1e-4


def test_a_rotation_of_another_model_is_refused(tmp_path):
    path = tmp_path / "learned.safetensors"
    run(tmp_path / "a", "pca", f"transform.save={path}")
    with pytest.raises(ConfigError, match=r"transform\.load=.*its model is tiny-llama"):
        run(tmp_path / "b", "pca", f"transform.load={path}", "model.family=qwen2")


def test_a_loss_that_is_not_finite_stops_learning():
    model, _ = Tiny().load()
    adapter = Adapter(model)
    swap(adapter)
    fuse_norms(adapter)
    model.lm_head.weight.data[3] = 3e38  # overflows to infinity, whose softmax is not a number
    subject = StreamedModel(adapter, torch.arange(128).view(2, 64))
    start, scheme = {"R1": torch.eye(192)}, Scheme(act=NVFP4(role="activation"))
    with pytest.raises(
        FloatingPointError, match=r"lm loss is nan in step 1 of 3: lower transform\.lr"
    ):
        end_to_end(
            subject, scheme, start, lambda m: Placement(Blocks(m["R1"])), Descent(3, 1, 0.1), "lm"
        )
