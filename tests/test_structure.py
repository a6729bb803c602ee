"""The structure that is derived from a recorded forward: sites, norms, feeds, names, the tape.

Facts of architectures are those of their papers and config files; what a tape gives is what the
block gives, in every bit.
"""

import copy
from dataclasses import replace
from functools import cache

import pytest
import shapes
import torch
import zoo
from composed import small
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

from harness.calibration.passage import leaf
from harness.calibration.recording import recorded
from harness.calibration.stream import Stream, arriving
from harness.config.errors import DataError
from harness.models.adapter import Adapter, structure_of
from harness.models.tiny import FAMILIES, Tiny, byte_tokenizer
from harness.pipeline.computation import confirm
from harness.pipeline.job import execute
from harness.structure.derive import derive
from harness.structure.naming import Facts, named
from harness.structure.norms import NormKind, norm_kind
from harness.structure.site import Feed
from harness.structure.structure import Structure
from harness.structure.tape import tensors_of

WIDTH = 48
LINEARS = {
    "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_in": ("self_attn.o_proj",),
    "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
    "down_in": ("mlp.down_proj",),
}
A_NORM = "a norm writes the residual stream"


def ids(seed: int = 0, length: int = 24, count: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, length), generator=generator)


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


# norms


class Wrapped(nn.Module):
    """No norm of any library, by F.normalize: sqrt(n) x / |x| times 1 + w."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * (1 + self.weight)


class Standardized(nn.Module):
    """A LayerNorm by another formula, whose shift has a name of its own."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
        return torch.addcmul(self.shift, (x - mean) * variance.rsqrt(), self.weight)


class ByHead(nn.Module):
    """Normalizes each 16 features by themselves, so that no rotation of all of them commutes."""

    def forward(self, x):
        parts = x.unflatten(-1, (-1, 16))
        return (parts / parts.square().mean(-1, keepdim=True).sqrt()).flatten(-2)


class Doubled(nn.Module):
    """A gain that is neither w nor 1 + w, so that nobody would know where to merge it."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return 2 * self.weight * F.rms_norm(x, x.shape[-1:])


NORMS = {
    "rms": (LlamaRMSNorm(WIDTH), NormKind("rms", "w", False)),
    "rms of torch": (nn.RMSNorm(WIDTH), NormKind("rms", "w", False)),
    "rms with 1 + w": (GemmaRMSNorm(WIDTH), NormKind("rms", "1+w", False)),
    "rms without gain": (nn.RMSNorm(WIDTH, elementwise_affine=False), NormKind("rms", "1", False)),
    "layer": (nn.LayerNorm(WIDTH), NormKind("layer", "w", True)),
    "layer without bias": (nn.LayerNorm(WIDTH, bias=False), NormKind("layer", "w", False)),
    "layer without gain": (OlmoLayerNorm(WIDTH), NormKind("layer", "1", False)),
    "unseen rms": (Wrapped(WIDTH), NormKind("rms", "1+w", False)),
    "unseen layer": (Standardized(WIDTH), NormKind("layer", "w", True)),
}
OTHERS = {
    "linear": nn.Linear(WIDTH, WIDTH),
    "silu": nn.SiLU(),
    "dropout": nn.Dropout(0.5),
    "dropout in evaluation": nn.Dropout(0.5).eval(),
    "softmax": nn.Softmax(dim=-1),
    "by head": ByHead(),
    "another gain": Doubled(WIDTH),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_norm_is_known_by_what_it_does(name, device):
    module, kind = NORMS[name]
    assert norm_kind(copy.deepcopy(module).to(device), WIDTH) == kind


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_norm_is_refused(name):
    assert norm_kind(OTHERS[name], WIDTH) is None


# the tape


def blocks_with_arguments(name: str, tokens: torch.Tensor):
    """(block, its sites, hidden states, what it is called with besides) of each block."""
    adapter = Adapter(zoo.make(name))
    hidden, contexts = arriving(adapter, tokens)
    for layer, context in enumerate(contexts):
        yield adapter.blocks[layer], adapter.sites(layer), hidden, context


def experts_of(block: nn.Module, sites) -> list[nn.Module]:
    """The modules that run experts: what they do depends on the router."""
    return [block.get_submodule(leaf(site)) for site in sites if site.expert == 0]


TAPED = [
    "qwen3", "gemma3_text", "gpt2", "falcon", "bloom", "mixtral", "gpt_oss", "deepseek_v3",
    "qwen3_next", "nemotron_h", "mamba",
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", TAPED)
def test_a_tape_gives_what_the_block_gives_for_other_tokens(name):
    """Call by call, and in the end nothing is held but the output."""
    first, second = (list(blocks_with_arguments(name, ids(seed))) for seed in (0, 1))
    for (block, sites, hidden, context), (_, _, others, other_context) in zip(first, second):
        tape = recorded(block, hidden, context, experts_of(block, sites))
        assert not tape.reads_content
        assert not torch.equal(hidden, others)
        values = dict(zip(tape.given, tensors_of((others, other_context))))
        for position in range(len(tape.calls)):
            tape.run(values, position, position + 1)
        expected = tensors_of(block(others, **other_context))[0]
        assert torch.equal(values[tape.output[0]], expected)
        assert {value for value in values if value.call is not None} == set(tape.output)


@torch.no_grad()
def test_a_leaf_may_change_after_it_was_recorded():
    block, _, hidden, context = next(blocks_with_arguments("llama", ids()))
    tape = recorded(block, hidden, context, [block.mlp.down_proj])
    assert [call.function for call in tape.calls if call.op == "leaf"] == [block.mlp.down_proj]
    before = tensors_of(block(hidden, **context))[0]
    block.mlp.down_proj.weight = nn.Parameter(-block.mlp.down_proj.weight)
    after = tensors_of(block(hidden, **context))[0]
    values = dict(zip(tape.given, tensors_of((hidden, context))))
    tape.run(values, 0, len(tape.calls))
    assert torch.equal(values[tape.output[0]], after)
    assert not torch.equal(before, after)


class Choosing(nn.Module):
    """Computes something else where the first token's first feature is negative."""

    def __init__(self, inner: nn.Module, asks: bool):
        super().__init__()
        self.inner = inner
        self.asks = asks
        self.went: set[bool] = set()

    def forward(self, x):
        if not self.asks:
            return self.inner(x)
        negative = x[0, 0, 0].item() < 0
        self.went.add(negative)
        return -self.inner(x) if negative else self.inner(x)


@pytest.mark.parametrize("asks", [True, False])
def test_a_forward_that_reads_a_tensors_content_is_known(asks):
    x = torch.ones(1, 3, 4)
    tape = recorded(Choosing(nn.Linear(4, 4), asks), x, {}, [])
    assert tape.reads_content == asks


@torch.no_grad()
def test_blocks_that_read_content_are_walked_all_the_same():
    """Windows go different ways, so that no recorded line holds for all of them."""
    adapter = Adapter(Tiny().load()[0])
    for block in adapter.blocks:
        block.mlp.act_fn = Choosing(block.mlp.act_fn, asks=True)
    windows = ids(count=6)
    stream = Stream(adapter, windows, tokens_at_once=windows.shape[1])
    for block in adapter.blocks:
        for _, arriving_there in stream.walk(block):
            assert len(list(arriving_there)) == len(windows)
        assert block.mlp.act_fn.went == {True, False}
    for window, walked in zip(windows, stream.leave()):
        expected = adapter.backbone(input_ids=window[None], use_cache=False).last_hidden_state
        torch.testing.assert_close(walked, expected, rtol=1e-5, atol=1e-5)


# feeds and names


def heads_in_order(kv_heads: int, repeat: int, size: int) -> list[int]:
    """Rows of a value projection behind each feature of attention's output."""
    return [
        kv * size + feature
        for kv in range(kv_heads)
        for _ in range(repeat)
        for feature in range(size)
    ]


def test_a_feed_knows_which_value_head_each_query_head_reads():
    rows = heads_in_order(2, 3, 4)
    feed = Feed("v", tuple(rows), 8, "heads", 6)
    assert feed.grouped == (2, 3)
    assert feed.written == tuple(range(8))
    assert feed.partial is None


def test_values_may_be_a_part_of_a_fused_matrix():
    """Behind the queries and keys of all heads, or behind those of their own head."""
    behind = Feed("qkv", tuple(16 + row for row in heads_in_order(2, 2, 4)), 24, "heads", 4)
    assert behind.grouped == (2, 2)
    assert behind.partial == tuple(range(16, 24))
    own = [head * 12 + 8 + feature for head in range(3) for feature in range(4)]
    between = Feed("qkv", tuple(own), 36, "heads", 3)
    assert between.grouped == (3, 1)
    assert between.partial == tuple(own)


def test_query_heads_that_take_value_heads_in_turn_are_no_groups():
    """Rotations of value heads would be merged in another order."""
    rows = heads_in_order(2, 1, 4) * 2
    feed = Feed("v", tuple(rows), 8, "heads", 4)
    assert feed.grouped is None
    assert feed.written == tuple(range(8))


def test_a_product_has_no_heads():
    assert Feed("up", tuple(range(8)), 8, "product").grouped is None
    assert Feed("gate_up", tuple(range(8, 16)), 16, "product").partial == tuple(range(8, 16))


PLAIN = Facts("mlp.some_proj", False, False, False, False, False, True)


def facts(**changed) -> Facts:
    return replace(PLAIN, **changed)


NAMED = {
    "attn_in": facts(residual=True, early=True),
    "o_in": facts(attended=True, exits=True, source="attn_in"),
    "mlp_in": facts(residual=True),
    "down_in": facts(exits=True, source="mlp_in"),
    "mixer_in": facts(residual=True, attends=False),
    "mixer_out": facts(exits=True, attends=False, source="mixer_in"),
    "experts_in": facts(residual=True, experts=True),
    "experts_down_in": facts(exits=True, experts=True),
    "some_in": facts(),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_site_is_called_by_what_it_is_for(name):
    assert named(NAMED[name], []) == name


def test_a_parallel_block_has_a_down_in_without_an_mlp_in():
    assert named(facts(exits=True, source="attn_in"), ["attn_in", "o_in"]) == "down_in"


def test_the_mlp_of_a_block_without_attention_comes_after_its_mixer():
    second = facts(residual=True, attends=False)
    assert named(second, ["mixer_in", "mixer_out"]) == "mlp_in"


def test_no_two_sites_of_a_block_share_a_name():
    """A name that is taken gives way to the reader's, that one to the reader's whole path."""
    taken: list[str] = []
    for _ in range(3):
        taken.append(named(NAMED["down_in"], taken))
    assert taken == ["down_in", "some_in", "mlp.some_proj_in"]


# a model that nobody has seen: attention and MLP read one norm, and queries, keys and values come
# out of one matrix


class UnseenConfig(PreTrainedConfig):
    model_type = "unseen_parallel"

    def __init__(self, hidden_size=64, layers=3, heads=4, groups=2, vocab_size=258, **fields):
        self.hidden_size = hidden_size
        self.layers = layers
        self.heads = heads
        self.groups = groups
        self.vocab_size = vocab_size
        super().__init__(**fields)


class UnseenBlock(nn.Module):
    def __init__(self, config: UnseenConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.heads
        self.groups = config.groups
        self.size = width // config.heads
        self.before = Wrapped(width)
        self.fused = nn.Linear(width, (config.heads + 2 * config.groups) * self.size)
        self.back = nn.Linear(width, width)
        self.wide = nn.Linear(width, 4 * width)
        self.gate = nn.Linear(width, 4 * width, bias=False)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, hidden):
        x = self.before(hidden)
        heads = self.fused(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.groups, self.groups], dim=1)
        repeat = self.heads // self.groups
        k = k.repeat_interleave(repeat, dim=1)
        v = v.repeat_interleave(repeat, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mlp = self.narrow(self.wide(x) * torch.tanh(self.gate(x)))
        return hidden + self.back(mixed.transpose(1, 2).flatten(-2)) + mlp


class UnseenModel(PreTrainedModel):
    config_class = UnseenConfig
    base_model_prefix = "body"

    def __init__(self, config: UnseenConfig):
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stack = nn.ModuleList(UnseenBlock(config) for _ in range(config.layers))
        self.after = Wrapped(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, use_cache=False, **_):
        hidden = self.table(input_ids)
        for block in self.stack:
            hidden = block(hidden)
        return BaseModelOutputWithPast(last_hidden_state=self.after(hidden))


class UnseenForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = UnseenConfig
    base_model_prefix = "body"

    def __init__(self, config: UnseenConfig):
        super().__init__(config)
        self.body = UnseenModel(config)
        self.out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.body.table

    def get_output_embeddings(self):
        return self.out

    def forward(self, input_ids, **arguments):
        hidden = self.body(input_ids, **arguments).last_hidden_state
        return CausalLMOutputWithPast(logits=self.out(hidden))


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
        largest = float(model(ids(count=4)).logits.abs().max())
    assert 0 < notes["gate"]["max"] < 1e-5 * largest
