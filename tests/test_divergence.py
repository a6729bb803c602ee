"""Divergence from the untouched model, block output errors and outliers: by hand, and in a run."""

import json

import pytest
import torch
from composed import small

from harness.calibration.outliers import EDGES, outliers, profiles
from harness.evaluation.caveats import marks
from harness.evaluation.divergence import WINDOWS, Reference
from harness.evaluation.perplexity import LOGITS_AT_ONCE, window_losses
from harness.models.adapter import Adapter
from harness.models.merge import place, swap
from harness.models.tiny import Tiny
from harness.pipeline.job import execute
from harness.transforms import Blocks, Placement

LENGTH = LOGITS_AT_ONCE + 40  # a whole piece and a short one


@pytest.fixture
def adapter():
    return Adapter(Tiny().load()[0])


@pytest.fixture
def windows():
    return torch.randint(256, (WINDOWS + 1, LENGTH), generator=torch.Generator().manual_seed(0))


def measured(adapter, windows, reference, path, streaming=False):
    watch = reference.compare("text", path, LENGTH)
    window_losses(adapter, windows, streaming=streaming, watch=watch)
    return watch


def test_kl_and_agreement_by_hand(adapter, windows, tmp_path):
    reference, path = Reference(adapter), tmp_path / "kept.safetensors"
    window_losses(adapter, windows, watch=reference.recorder("text"))
    reference.save(path)
    with torch.no_grad():
        before = adapter.model(windows[:WINDOWS]).logits[:, :-1].double().log_softmax(-1)
        same = measured(adapter, windows, reference, path)
        assert same.figures["kl"] == pytest.approx(0, abs=1e-6)
        assert same.figures["top1"] == 1
        assert same.positions == WINDOWS * (LENGTH - 1)
        for parameter in (
            adapter.head.weight,
            adapter.blocks[1].mlp.down_proj.weight,
        ):  # the kept head must not follow
            parameter += 0.05 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(1)
            )
        after = adapter.model(windows[:WINDOWS]).logits[:, :-1].double().log_softmax(-1)
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    top1 = float((before.argmax(-1) == after.argmax(-1)).double().mean())
    assert kl > 0.01
    for streaming in (False, True):
        found = measured(adapter, windows, reference, path, streaming).figures
        assert found["kl"] == pytest.approx(kl, rel=1e-4)
        assert found["top1"] == pytest.approx(top1)


def test_outliers_of_what_is_known(adapter, windows):
    """Tails before and after a matrix that mixes one loud channel into all."""
    swap(adapter)
    with torch.no_grad():
        adapter.blocks[0].input_layernorm.weight[5] *= 100
    before = profiles(adapter, windows)
    generator = torch.Generator().manual_seed(2)
    rotation = torch.linalg.qr(torch.randn(192, 192, generator=generator, dtype=torch.float64))[0]
    place(adapter, Placement(online={(0, "attn_in"): Blocks(rotation)}))
    found = outliers(before, profiles(adapter, windows))
    assert set(found["sites"]) == {"attn_in", "o_in", "mlp_in", "down_in"}
    for site, width in (("attn_in", 192), ("down_in", adapter.width(adapter.sites(0)[3]))):
        for counts in found["sites"][site].values():
            assert sum(counts) == len(adapter.blocks) * windows.numel() * width
    first, other = found["rows"][0], found["rows"][2]
    assert (first["layer"], first["site"]) == (0, "attn_in")
    assert first["before"]["kurtosis"] > 10 * first["after"]["kurtosis"]
    assert first["after"]["max_over_median"] < 0.2 * first["before"]["max_over_median"]
    assert other["before"] == pytest.approx(other["after"], rel=1e-3)
    assert len(found["edges"]) == len(EDGES) == 65


def test_a_run_keeps_them_all(tmp_path):
    cfg, choices = small(tmp_path, "format=nvfp4", "transform=hadamard", "solver=rtn")
    outcome = execute(cfg, choices, command="python run.py again")
    stages = outcome.metrics["stages"]
    assert set(stages["quantized"]["divergence"]) == {"pydoc"}
    assert 0 < stages["quantized"]["divergence"]["pydoc"]["kl"] < 1
    losses = stages["quantized"]["losses"]["pydoc"]
    assert torch.tensor(losses).mean().exp() == pytest.approx(stages["quantized"]["ppl"]["pydoc"])
    points = [
        json.loads(line)
        for line in (outcome.run.path / "tracking" / "curves.jsonl").read_text().splitlines()
    ]
    assert [point["step"] for point in points] == [0, 1]
    for point in points:
        assert point["block/sqnr_db"] == pytest.approx(
            -10 * torch.tensor(point["block/output_error"]).log10().item()
        )
        assert point["block/output_error"] > 0
    kept = json.loads((outcome.run.path / "outliers.json").read_text())
    assert len(kept["rows"]) == 8
    assert outcome.metrics["command"] == "python run.py again"
    assert outcome.metrics["marks"]["pydoc"][0] == "same corpus as calibration"


def test_block_error_is_that_of_the_quantized_block(tmp_path):
    """With 8-bit weights and activations the output moves far less than with 4 bits, and not at all
    without either."""
    errors = {}
    for bits in (4, 8):
        cfg, choices = small(
            tmp_path,
            "format=int8",
            f"format.weight.bits={bits}",
            f"format.act.bits={bits}",
            "solver=rtn",
        )
        run = execute(cfg, choices).run
        errors[bits] = json.loads(
            (run.path / "tracking" / "curves.jsonl").read_text().splitlines()[0]
        )["block/output_error"]
    assert errors[4] > 50 * errors[8] > 0


def test_marks_say_what_a_number_is():
    found = marks(
        ["wiki"], True, False, {"wiki": (8, 145), "pydoc": (58, 58)}, {"piqa": 200, "arc": None}
    )
    assert found["wiki"] == ["same corpus as calibration", "adapted", "first 8 of 145 windows"]
    assert found["pydoc"] == []
    assert found["piqa"] == ["first 200 documents"]
    assert found["arc"] == []
    assert marks((), False, False, {"wiki": (145, 145)}, {})["wiki"] == ["only corpus"]
    assert marks(["wiki"], False, False, {"wiki": (1, 1), "b": (1, 1)}, {})["wiki"] == [
        "same corpus as calibration"
    ]
    assert marks(["wiki"], True, True, {"wiki": (1, 1), "b": (1, 1)}, {})["b"] == [
        "learned elsewhere"
    ]


def test_an_evaluation_that_reads_part_of_a_corpus_leaves_its_marks():
    texts = {"wiki": (8, 145), "pydoc": (58, 58)}
    found = marks(["wiki"], False, False, texts, {"wiki": 20})
    assert found["wiki"] == [
        "same corpus as calibration",
        "first 8 of 145 windows",
        "first 20 documents",
    ]
