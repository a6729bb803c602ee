"""A model that nobody has seen is looked through, quantized and rotated as a known one is."""

import pytest
import torch
import zoo
from composed import small
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from unseen import UnseenConfig, UnseenForCausalLM

from harness.models.tiny import byte_tokenizer
from harness.pipeline.job import execute
from harness.structure.derive import derive
from harness.structure.norms import NormKind


@pytest.fixture(scope="module")
def unseen(tmp_path_factory):
    """(the model, settings that run it from a folder)."""
    AutoConfig.register(UnseenConfig.model_type, UnseenConfig, exist_ok=True)
    AutoModelForCausalLM.register(UnseenConfig, UnseenForCausalLM, exist_ok=True)
    folder = tmp_path_factory.mktemp("unseen") / "model"
    model = AutoModelForCausalLM.from_config(UnseenConfig(), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model, ["model=hf", f"model.path={folder}"]


def test_an_unseen_model_is_looked_through(unseen):
    structure = derive(unseen[0])
    assert structure.residual.group == "O(n)"
    assert structure.final_norm.kind == NormKind("rms", "1+w", False)
    for layer, sites in enumerate(structure.sites):
        assert {site.name: site.linears for site in sites} == {
            "attn_in": ("fused", "wide", "gate"),
            "o_in": ("back",),
            "down_in": ("narrow",),
        }
        o_in, down_in = structure.site("o_in", layer), structure.site("down_in", layer)
        assert o_in.feed.grouped == (2, 2)
        assert o_in.feed.partial == tuple(range(96, 128))  # after 64 of queries and 32 of keys
        assert down_in.feed.matrix == f"body.stack.{layer}.wide.weight"


@pytest.mark.parametrize("weights", ["memory", "disk"])
def test_an_unseen_model_is_quantized_end_to_end(unseen, tmp_path, weights):
    """Its config does not say whether head and embedding are one."""
    model, settings = unseen
    export = ["export=harness", f"export.path={tmp_path / 'exports'}"]
    settings = [*settings, f"model.weights={weights}", *export]
    outcome = execute(*small(tmp_path, *settings, "format=nvfp4", "solver=gptq"))
    assert outcome.status == "done", outcome.error
    assert not hasattr(model.config, "tie_word_embeddings")
    assert outcome.metrics["notes"]["stream"] < 1e-6
    names = {layer["name"] for layer in outcome.metrics["layers"]}
    assert names == {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "out"
    }


@pytest.mark.parametrize("part", ["r1=random", "r2=true", "r4=on"])
def test_an_unseen_model_is_rotated_exactly(unseen, tmp_path, part):
    model, settings = unseen
    places = {"r1": "off", "r2": "false", "r3": "off", "r4": "off"}
    name, value = part.split("=")
    places[name] = value
    rotations = [f"transform.{key}={each}" for key, each in places.items()]
    settings = [*settings, "format=none", "solver=none", "transform=quarot", *rotations]
    outcome = execute(*small(tmp_path, *settings))
    assert outcome.status == "done", outcome.error
    notes = outcome.metrics["notes"]
    assert notes["rotations"] == [name.upper()]
    with torch.no_grad():
        largest = float(model(zoo.token_ids(count=4)).logits.abs().max())
    assert 0 < notes["gate"]["max"] < 1e-5 * largest
