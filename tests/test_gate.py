"""What holds a run to the model it says it is of: exact transforms within the model's own noise,
the stream against the forward."""

import pytest
import torch
from composed import small
from transformers import AutoConfig, AutoModelForCausalLM

from harness.evaluation.gate import FLOAT_MEAN, exact_logits, stream_gate
from harness.evaluation.perplexity import window_losses
from harness.models import merge
from harness.models.adapter import Adapter
from harness.models.tiny import FAMILIES, Tiny, byte_tokenizer
from harness.pipeline import fitting
from harness.pipeline.job import execute

IDS = torch.randint(256, (2, 96), generator=torch.Generator().manual_seed(0))


def saved(folder, **facts):
    """A random model of these facts, and the settings that run it."""
    config = AutoConfig.for_model(**Tiny(family="qwen3").facts() | facts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model.eval(), ["model=hf", f"model.path={folder}"]


# masks of their own

MIXED = {
    "use_sliding_window": True,
    "sliding_window": 16,
    "max_window_layers": 1,
    "num_hidden_layers": 3,
}


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_layers_with_different_masks_are_streamed_with_their_own(tmp_path, family):
    model, _ = saved(tmp_path, model_type=family, **MIXED)
    assert set(model.config.layer_types) == {"full_attention", "sliding_attention"}
    adapter = Adapter(model)
    streamed, whole = (
        window_losses(adapter, IDS, streaming=streaming) for streaming in (True, False)
    )
    torch.testing.assert_close(streamed, whole, rtol=1e-6, atol=0)
    assert stream_gate(adapter, IDS[:1]) < 1e-6


def test_a_run_over_mixed_layers_is_the_same_from_disk(tmp_path):
    _, settings = saved(tmp_path / "model", **MIXED)
    found = []
    for weights in ("memory", "disk"):
        outcome = execute(
            *small(tmp_path / weights, *settings, f"model.weights={weights}", "transform=quarot")
        )
        assert outcome.status == "done", outcome.error
        found.append(outcome.metrics["stages"])
    assert found[0] == found[1]


# the stream


def test_a_model_whose_blocks_cannot_be_walked_is_found_out():
    """Its forward doubles what leaves the first block, outside of it. Its logits would pass any
    gate, for nothing has changed."""
    model = Tiny().load()[0]
    running = []
    model.model.register_forward_pre_hook(lambda *_: running.append(True))
    model.model.register_forward_hook(lambda *_: running.pop() and None)
    model.model.layers[0].register_forward_hook(lambda _, args, y: 2 * y if running else y)
    with pytest.raises(RuntimeError, match="the calibration stream is"):
        stream_gate(Adapter(model), IDS[:1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_declared_families_pass(family, dtype):
    adapter = Adapter(Tiny(family=family, dtype=dtype).load()[0])
    assert stream_gate(adapter, IDS[:1]) < (1e-6 if dtype == "float32" else 0.01)


# 16 bits


def loud(folder, scale: float = 30.0):
    """A bfloat16 Qwen2 whose queries and keys are large against the logits' scale, so that their
    rounding shows."""
    model, tokenizer = Tiny(family="qwen2").load()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.bias", "k_proj.bias")):
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ["model=hf", f"model.path={folder}", "model.dtype=bfloat16"]


def test_an_exact_transform_of_a_model_that_16_bits_are_few_for_passes(tmp_path):
    outcome = execute(
        *small(
            tmp_path, *loud(tmp_path / "model"), "format=w4a4kv4", "transform=quarot", "solver=rtn"
        )
    )
    assert outcome.status == "done", outcome.error
    gate = outcome.metrics["notes"]["gate"]
    assert gate["mean"] > 100 * FLOAT_MEAN, "further than any model in float32 may go"


def test_float32_logits_of_a_bfloat16_model_are_those_of_its_weights():
    model = Tiny(family="qwen3", dtype="bfloat16").load()[0]
    got = exact_logits(Adapter(model), IDS)
    assert got.dtype == torch.float32
    wanted = model.float()(IDS, use_cache=False).logits
    torch.testing.assert_close(
        got, wanted, rtol=0, atol=2e-2 * float(wanted.std())
    )  # the rotary table was rounded with it


@pytest.mark.parametrize("forgotten", ["v_proj", "o_proj"])
def test_a_bias_forgotten_in_16_bits_is_found(tmp_path, monkeypatch, forgotten):
    """Of one linear of one block, in a model where that is a small part of the logits."""
    place = merge.place

    def careless(adapter, placement):
        place(adapter, placement)
        weight = adapter.blocks[0].get_submodule(f"self_attn.{forgotten}").weight
        weight.copy_(weight.roll(1, 0))

    monkeypatch.setattr(fitting.merge, "place", torch.no_grad()(careless))
    settings = [
        "model.family=qwen2",
        "model.dtype=bfloat16",
        "transform=quarot",
        "format=w4a4kv4",
        "solver=rtn",
    ]
    outcome = execute(*small(tmp_path, *settings))
    assert outcome.status == "failed"
    assert (
        "transform=quarot changed the model" in outcome.error
        and "model.dtype=float32" in outcome.error
    )
    assert list((tmp_path / "runs" / "_shared" / "baselines").glob("*.json")), (
        "what was finished is kept"
    )
