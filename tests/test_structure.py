"""The structure that is derived from a recorded forward, of whole models: tiny ones, and full-size
ones on meta. Facts of architectures are those of their papers and config files."""

from functools import cache

import pytest
import shapes
import zoo

from harness.config.errors import DataError
from harness.models.adapter import structure_of
from harness.models.tiny import FAMILIES, Tiny
from harness.pipeline.computation import confirm
from harness.structure.derive import derive
from harness.structure.structure import Structure

LINEARS = {
    "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_in": ("self_attn.o_proj",),
    "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
    "down_in": ("mlp.down_proj",),
}
A_NORM = "a norm writes the residual stream"


# whole models


@pytest.mark.parametrize("family", FAMILIES)
def test_a_llama_like_block_has_four_sites_and_two_feeds(family):
    model = Tiny(family=family).load()[0]
    structure = derive(model)
    config = model.config
    assert structure.residual.group == "O(n)"
    assert structure.layers == config.num_hidden_layers
    heads = config.num_attention_heads
    groups = config.num_key_value_heads
    for layer, sites in enumerate(structure.sites):
        assert {site.name: site.linears for site in sites} == LINEARS
        attn_in, o_in, mlp_in, down_in = sites
        start = f"model.layers.{layer}"
        assert attn_in.norm.module == f"{start}.input_layernorm"
        assert mlp_in.norm.module == f"{start}.post_attention_layernorm"
        assert all(site.residual and site.norm.alone for site in (attn_in, mlp_in))
        assert o_in.feed.matrix == f"{start}.self_attn.v_proj.weight"
        assert o_in.feed.grouped == (groups, heads // groups)
        assert o_in.width == heads * config.head_dim
        assert down_in.feed.matrix == f"{start}.mlp.up_proj.weight"
        assert down_in.feed.through == "product"
        assert all(site.feed.partial is None and site.merges for site in (o_in, down_in))
        attention = structure.attention[layer]
        assert (attention.heads, attention.kv_heads) == (heads, groups)
        assert attention.features == (config.head_dim, config.head_dim)


# {name in the zoo: (rotations of the residual stream, key/value heads of its attentions)}.
# LayerNorm leaves rotations that fix the ones, a norm behind a block's output leaves none.
GROUPS = {
    "mixtral": ("O(n)", {2}),
    "gpt_oss": ("O(n)", {2}),
    "deepseek_v3": ("O(n)", {4}),
    "qwen3_next": ("O(n)", {2}),
    "gemma2": (None, {2}),
    "gemma3_text": (None, {2}),
    "phi3": ("O(n)", {2}),
    "gpt2": ("fixes 1", {4}),
    "gpt_neo": ("fixes 1", {4}),
    "gpt_neox": ("fixes 1", {4}),
    "falcon": ("fixes 1", {2}),
    "cohere": ("fixes 1", {2}),
    "olmo2": (None, {2}),
    "nemotron_h": ("O(n)", {2}),
    "granite": ("O(n)", {2}),
    "llama4_text": (None, {2}),
    "bloom": (None, {4}),
    "mamba": ("O(n)", set()),
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_config_alone_tells_what_the_loaded_model_does(name):
    model = zoo.make(name)
    loaded = derive(model)
    told = structure_of(model.config)
    assert told.sites == loaded.sites
    assert told.attention == loaded.attention
    assert told.residual.group == loaded.residual.group
    assert told.residual.why == loaded.residual.why
    group, kv_heads = GROUPS[name]
    assert told.residual.group == group
    assert {each.kv_heads for each in told.attention.values()} == kv_heads


def test_a_loaded_model_that_is_not_its_configs_is_refused():
    """As a run does: what was planned and checked would be of another model."""
    told = structure_of(zoo.make("qwen2").config)
    confirm(zoo.make("qwen2"), told)
    with pytest.raises(DataError, match="the sites of the qwen2 that was loaded"):
        confirm(zoo.make("phi3"), told)


def test_the_matrices_of_the_blocks_are_all_found():
    """Of architectures whose every matrix of a block is read by a matrix product."""
    for name in ("mixtral", "gpt_oss", "deepseek_v3", "phi3", "gpt2", "falcon", "bloom"):
        model = zoo.make(name)
        structure = derive(model)
        found = {
            matrix.parameter
            for sites in structure.sites
            for site in sites
            for matrix in site.matrices
        }
        prefix = f"{structure.blocks}."
        matrices = {
            key
            for key, value in model.named_parameters()
            if key.startswith(prefix) and value.ndim > 1 and not key.endswith("_bias")
        }
        assert found == matrices


@pytest.mark.parametrize(
    "name",
    # a norm stands before the projection of the second, and behind the attention of the third
    ["llama", "bitnet", "diffllama"],
)
def test_what_attention_gives_is_o_in_and_what_the_mlp_gives_down_in(name):
    for sites in derive(zoo.make(name)).sites:
        names = {linear: site.name for site in sites for linear in site.linears}
        assert names["self_attn.o_proj"] == "o_in"
        assert names["mlp.down_proj"] == "down_in"


@pytest.mark.parametrize(
    ("name", "linears"),
    [
        ("qwen3", {"self_attn.q_proj", "self_attn.k_proj"}),  # normed on their way
        ("phi3", {"self_attn.qkv_proj"}),
        ("deepseek_v3", {"self_attn.q_b_proj", "self_attn.kv_b_proj"}),
        ("gpt_neo", {"attn.attention.q_proj", "attn.attention.k_proj"}),
        ("mamba", set()),
    ],
)
def test_what_makes_queries_and_keys_is_known_by_where_it_goes(name, linears):
    assert structure_of(zoo.config(name)).scored == linears


def test_a_router_is_left_in_float_and_experts_are_counted():
    model = zoo.make("mixtral")
    for sites in derive(model).sites:
        routers = [each for site in sites for each in site.matrices if not each.quantize]
        assert [each.name for each in routers] == ["mlp.gate"]
        assert {site.name for site in sites if site.experts} == {"experts_in", "experts_down_in"}
        assert {site.experts for site in sites} == {0, model.config.num_local_experts}


# full-size models, on meta

FULL = {
    "llama3_70b": (80, 64, 8, (128, 128), 0),
    "qwen3_30b_a3b": (48, 32, 4, (128, 128), 128),
    "deepseek_v3": (61, 128, 128, (192, 128), 256),
    "gpt_oss_120b": (36, 64, 8, (64, 64), 128),
    "gemma3_27b": (62, 32, 16, (128, 128), 0),
    "llama4_scout": (48, 40, 8, (128, 128), 16),
}
REFUSED = {"gemma3_27b": A_NORM, "llama4_scout": "experts"}


@cache
def full_size(name: str) -> Structure:
    return structure_of(shapes.config(name))


@pytest.mark.parametrize("name", FULL)
def test_full_size_models_are_as_their_makers_publish(name):
    structure = full_size(name)
    layers, heads, kv_heads, features, experts = FULL[name]
    assert structure.layers == layers
    assert structure.hidden == shapes.SHAPES[name]["hidden_size"]
    assert len(structure.attention) == layers
    for attention in structure.attention.values():
        assert (attention.heads, attention.kv_heads) == (heads, kv_heads)
        assert attention.features == features
    last = structure.sites[-1]
    assert {each.experts for site in last for each in site.matrices} - {None} == (
        {experts} if experts else set()
    )
    if name in REFUSED:
        assert structure.residual.group is None
        assert any(REFUSED[name] in why for why in structure.residual.why)
    else:
        assert structure.residual.group == "O(n)"
        assert not structure.residual.why


def test_the_first_three_layers_of_deepseek_v3_are_dense():
    structure = full_size("deepseek_v3")
    with_experts = [any(site.experts for site in sites) for sites in structure.sites]
    assert with_experts == [False] * 3 + [True] * 58
    assert structure.kinds == [list(range(3)), list(range(3, 61))]
