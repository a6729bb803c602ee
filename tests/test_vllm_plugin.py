"""vLLM's plug-in, with a stand-in for what it derives from: each layer computes what ours does, and
settings under which it would not are refused."""

import importlib
import sys
from types import ModuleType

import pytest
import torch
from engines import PACKED, checkpoints, served, states
from test_checkpoint import CASES, evaluated, written
from torch import nn

import harness
from harness.config.errors import DataError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{case: its checkpoint}, each made once."""
    return checkpoints(tmp_path_factory, CASES)


class Layer(nn.Module):
    """Any layer of vLLM's."""

    head_size = 48


def stand_in(monkeypatch, settings) -> dict[str, type]:
    """Modules by vLLM's names, with the classes that the plug-in asks for; returns those."""
    base = "vllm.model_executor.layers"
    kinds = {
        name: type(name, (Layer,), {})
        for name in ("Attention", "LinearBase", "VocabParallelEmbedding")
    }
    kinds["ParallelLMHead"] = type("ParallelLMHead", (kinds["VocabParallelEmbedding"],), {})
    registered: dict[str, type] = {}

    def register(name):
        return lambda cls: registered.setdefault(name, cls)

    class Method:
        def __init__(self, *args):
            pass

    class Config:
        def __init__(self):
            self.packed_modules_mapping = dict(PACKED)

    class Mapper:
        def __init__(self, orig_to_new_regex):
            self.regex = orig_to_new_regex

    modules = {
        "vllm": {},
        "vllm.config": {"get_current_vllm_config": lambda: settings},
        "vllm.model_executor": {},
        base: {},
        f"{base}.attention": {"Attention": kinds["Attention"]},
        f"{base}.linear": {"LinearBase": kinds["LinearBase"], "LinearMethodBase": Method},
        f"{base}.quantization": {"register_quantization_config": register},
        f"{base}.quantization.base_config": {"QuantizationConfig": Config},
        f"{base}.quantization.kv_cache": {"BaseKVCacheMethod": Method},
        f"{base}.vocab_parallel_embedding": kinds,
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.utils": {"WeightsMapper": Mapper},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "harness.engines.vllm_plugin", raising=False)
    importlib.import_module("harness.engines.vllm_plugin").register()
    monkeypatch.delitem(sys.modules, "harness.engines.vllm_plugin")
    return kinds | registered


def engine(eager=True, world=1, sequences=1, cached=False, tokens=64):
    class Settings:
        class model_config:
            enforce_eager = eager
            dtype = torch.float32
            max_model_len = 64

        class cache_config:
            enable_prefix_caching = cached

        class parallel_config:
            world_size = world

        class scheduler_config:
            max_num_seqs = sequences
            max_num_batched_tokens = tokens

    return Settings


def test_the_plug_in_gives_each_layer_ours(folders, monkeypatch):
    folder = folders("rotations")
    kinds = stand_in(monkeypatch, engine())
    config = kinds["harness"].from_config({"quant_method": "harness"})
    config.maybe_update_config(str(folder))
    model, _ = harness.load(folder)
    x = states(4, model.config.hidden_size)

    linear = kinds["LinearBase"]()
    method = config.get_quant_method(linear, "model.layers.0.mlp.gate_up_proj")
    method.create_weights(linear, 1, [2], 3)
    assert not list(linear.parameters())
    gate, up = (model.get_submodule(f"model.layers.0.mlp.{name}_proj") for name in ("gate", "up"))
    garbage = torch.full((2 * gate.out_features,), torch.nan)
    assert torch.equal(method.apply(linear, x, garbage), torch.cat([gate(x), up(x)], -1))

    head = kinds["ParallelLMHead"]()
    method = config.get_quant_method(head, "lm_head")
    assert method.tie_weights(head, nn.Embedding(2, 2)) is head
    assert torch.equal(method.apply(head, x), model.lm_head(x))

    table = kinds["VocabParallelEmbedding"]()
    ids = torch.tensor([3, 1])
    found = config.get_quant_method(table, "").embedding(table, ids)
    assert torch.equal(found, model.get_input_embeddings()(ids))

    class Told(kinds["Attention"]):
        def forward(self, *states):
            return states

    attention = Told()
    config.get_quant_method(attention, "model.layers.0.self_attn.attn").create_weights(attention)
    laid = [states(4, count * Layer.head_size) for count in (6, 2, 2)]
    heads = served(folder).heads("model.layers.0.self_attn.attn", Layer.head_size)
    assert heads is not None
    for one, other in zip(attention(*laid), heads(*laid), strict=True):
        assert torch.equal(one, other)

    pattern = next(iter(config.get_checkpoint_weight_mapper().regex))
    assert pattern.search("model.layers.0.mlp.up_proj.codes")
    assert not pattern.search("model.layers.0.input_layernorm.weight")


@pytest.mark.parametrize("other", [{"sequences": 2}, {"cached": True}, {"tokens": 63}])
def test_the_plug_in_keeps_scales_that_span_tokens_to_one_forward(other, tmp_path, monkeypatch):
    run = ["format=nvfp4", "format.act.scope=tensor", "solver=rtn"]
    folder = written(evaluated(tmp_path, monkeypatch, *run), tmp_path / "checkpoint")
    for settings, refused in ((engine(), False), (engine(**other), True)):
        config = stand_in(monkeypatch, settings)["harness"].from_config({})
        config.maybe_update_config(str(folder))
        if refused:
            with pytest.raises(DataError, match="span tokens"):
                config.get_checkpoint_weight_mapper()
        else:
            config.get_checkpoint_weight_mapper()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (engine(eager=False), "enforce_eager=True"),
        (engine(world=2), "tensor_parallel_size=1"),
    ],
)
def test_the_plug_in_refuses_what_would_not_be_ours(settings, error, folders, monkeypatch):
    kinds = stand_in(monkeypatch, settings)
    config = kinds["harness"].from_config({})
    config.maybe_update_config(str(folders("rotations")))
    with pytest.raises(DataError, match=error):
        config.get_quant_method(kinds["LinearBase"](), "model.layers.0.mlp.gate_up_proj")
    config.maybe_update_config("owner/name")
    with pytest.raises(DataError, match="is no folder"):
        config.get_quant_method(kinds["LinearBase"](), "model.layers.0.mlp.gate_up_proj")
