"""Exports as a run makes them: named, described, loaded back, measured again, generated from."""

import json

import pytest
import torch
from composed import small
from exported import PLAIN, RIGHT, left, run

import harness
from harness.config.errors import ConfigError
from harness.models.adapter import Adapter
from harness.pipeline.export import WINDOWS
from harness.pipeline.job import execute


@pytest.mark.parametrize("layout", RIGHT)
def test_a_run_leaves_a_checkpoint_that_is_what_it_evaluated(tmp_path, layout):
    outcome = run(tmp_path, f"export={layout}", *RIGHT[layout])
    assert outcome.status == "done", outcome.error
    (name,) = left(tmp_path)
    folder, found = tmp_path / "out" / name, outcome.metrics["export"]
    assert "_wnvfp4_" in name
    assert found["path"] == str(folder)
    assert found["weights"] == 14
    for evaluated, loaded in found["ppl"].values():
        assert loaded == pytest.approx(evaluated, rel=1e-12 if layout == "harness" else 5e-3)
    about = json.loads((folder / "quantization_metadata.json").read_text())
    assert about["quantized"] == "14/15"
    assert about["run_id"] == outcome.metrics["run_id"]
    card = (folder / "README.md").read_text()
    assert "python run.py again" in card
    assert f"{outcome.metrics['stages']['quantized']['ppl']['pydoc']:.4f}" in card
    assert not [path for path in folder.iterdir() if path.suffix in (".py", ".bin", ".pt", ".pkl")]


@pytest.mark.parametrize("layout", RIGHT)
def test_a_checkpoint_is_measured_as_it_is(tmp_path, layout):
    outcome = run(tmp_path, f"export={layout}", *RIGHT[layout])
    cfg, choices = small(
        tmp_path / "again", "model=checkpoint", f"model.path={outcome.metrics['export']['path']}"
    )
    again = execute(cfg, choices)
    assert again.status == "done", again.error
    known, got = outcome.metrics["stages"]["quantized"], again.metrics["stages"]["baseline"]
    assert again.metrics["bits_per_weight"] is None
    cache = "kv4" if layout == "harness" else ""
    assert again.metrics["holds"] == {
        "format": f"nvfp4-w4a4{cache}",
        "transform": "quarot",
        "solver": "rtn",
    }
    assert "holds" not in outcome.metrics
    if layout == "harness":
        assert got["losses"] == known["losses"]
    assert got["ppl"]["pydoc"] == pytest.approx(
        known["ppl"]["pydoc"], rel=0.03
    )  # one in bfloat16 flips some codes
    cfg, choices = small(
        tmp_path / "again",
        "model=checkpoint",
        f"model.path={outcome.metrics['export']['path']}",
        *PLAIN,
    )
    with pytest.raises(ConfigError, match="measured as it is"):
        execute(cfg, choices)


def test_generation_with_a_quantized_cache_is_the_uncached_one(tmp_path):
    outcome = run(tmp_path, "export=harness", *RIGHT["harness"], "model.dtype=float32")
    model, tokenizer = harness.load(outcome.metrics["export"]["path"])
    model = model.double()
    ids = tokenizer("The limits of the language", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        told = model.generate(ids, max_new_tokens=20, do_sample=False)
        slow = ids
        for _ in range(20):
            slow = torch.cat([slow, model(slow, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(told, slow)
    assert Adapter(model).blocks[0].self_attn.heads_input.format.bits == 4
    assert WINDOWS == 2
