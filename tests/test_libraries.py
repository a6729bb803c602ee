"""What is used of other libraries' insides, each piece by itself: a release that moves one is named
here."""

import json
from importlib.metadata import version

import pytest
import torch
import zoo
from huggingface_hub import errors
from preserved import CACHE
from safetensors.torch import load_file
from transformers import AutoConfig

from harness.calibration.corpus import HubText
from harness.libraries import compressed_tensors, conversion, datasets, hub, hydra, saved
from harness.libraries import transformers as inside
from harness.models.tiny import Tiny


def says(library: str, what: str) -> str:
    return f"{library} {version(library)} {what}; harness/libraries/ says how it was"


@pytest.fixture(scope="module")
def model():
    return Tiny().load()[0]


@torch.no_grad()
def test_an_attention_function_is_found_by_its_name(model):
    ids, called = torch.arange(8)[None], []
    plain = model(ids, use_cache=False).logits

    def attention(module, query, key, value, attention_mask, **kwargs):
        called.append(key.shape[2])
        inner = inside.attention_function(module, before)
        return inner(module, query, key, value, attention_mask, **kwargs)

    before = inside.attention_name(model.config)
    inside.name_attention("test_libraries", attention, before)
    inside.use_attention(model, "test_libraries")
    try:
        named = model(ids, use_cache=False).logits
    finally:
        inside.use_attention(model, before)
    assert called == [8, 8], says(
        "transformers", "does not call the attention that the config names"
    )
    assert torch.equal(named, plain), says(
        "transformers", "gives a named attention other arguments or another mask"
    )


@torch.no_grad()
def test_a_backbone_is_handed_the_cache_of_a_generation(model):
    found = []
    hook = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: found.append(inside.empty_plain_cache(kwargs)), with_kwargs=True
    )
    past = inside.DynamicCache()
    try:
        model(torch.arange(8)[None], use_cache=True, **{CACHE: past})
        model(torch.arange(1)[None], use_cache=True, **{CACHE: past})
    finally:
        hook.remove()
    assert found[0] is past, says(
        "transformers", f"hands the cache over by another name than {inside.CACHE_ARGUMENTS}"
    )
    assert found[1] is None, "a cache that holds something is not to be replaced"


@torch.no_grad()
def test_a_layer_of_the_cache_stores_what_update_is_given(model):
    class Halved(inside.DynamicLayer):
        def update(self, keys, values, *args, **kwargs):
            return super().update(keys / 2, values, *args, **kwargs)

    past, plain = inside.Cache(layers=[Halved() for _ in range(2)]), inside.DynamicCache()
    for each in (past, plain):
        model(torch.arange(8)[None], use_cache=True, **{CACHE: each})
    same = torch.equal(past.layers[0].keys, plain.layers[0].keys / 2)
    assert same, says(
        "transformers", "no longer passes new keys and values through a layer's update"
    )


def test_an_infinity_of_a_config_comes_back_from_its_file(tmp_path):
    config = zoo.config("mamba2")
    assert config.time_step_limit[1] == float("inf")
    text = json.dumps(inside.config_json(config.to_dict()), allow_nan=False)
    (tmp_path / "config.json").write_text(text)
    again = AutoConfig.from_pretrained(tmp_path)
    same = list(again.time_step_limit) == list(config.time_step_limit)
    assert same, says("transformers", "writes infinities of a config otherwise")


def test_an_untied_head_is_saved_by_its_own_name(tmp_path):
    model = Tiny().load()[0]
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    inside.untie_names(model)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert "lm_head.weight" in names, says("transformers", "keeps tied names elsewhere")


def test_names_that_a_model_has_no_use_for(model):
    assert inside.unused(model, ["model.layers.0.mlp.up_proj.weight"]) == []
    # an AttributeError where it has another name
    type(model)._keys_to_ignore_on_load_unexpected  # noqa: B018


def test_a_gguf_file_gives_tensors_by_their_names_here(model, tmp_path):
    gguf = pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM

    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    weights = model.state_dict()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in weights.items():
        if (
            name.endswith(".weight") and "q_proj" not in name and "k_proj" not in name
        ):  # those GGUF permutes
            key = names.get_name(name, try_suffixes=(".weight",))
            writer.add_tensor(key, tensor.numpy())
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    config = AutoConfig.for_model(**Tiny().facts())
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    facts, tensors = conversion.read_gguf(path, config, skeleton)
    assert facts["num_hidden_layers"] == 2, says(
        "transformers", "reads a GGUF header into other fields"
    )
    for name in (
        "model.layers.1.mlp.up_proj.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ):
        same = name in tensors and torch.equal(torch.as_tensor(tensors[name]), weights[name])
        assert same, says("transformers", f"does not give {name} of a GGUF file back")


def test_keys_are_quantized_by_compressed_tensors_or_refused():
    """A cache scheme applied as compressed-tensors applies it: keys take few values where nothing
    was refused."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = Tiny().load()[0]
    kv = {
        "num_bits": 2,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": 32,
        "dynamic": True,
    }
    scheme = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "kv_cache_scheme": kv,
    }
    apply_quantization_config(model, QuantizationConfig(**scheme))
    past = inside.DynamicCache()
    model(torch.arange(8)[None], use_cache=True, **{CACHE: past})
    quantized = len(past.layers[0].keys[0, 0, 0].unique()) <= 4
    works = compressed_tensors.cache_refusal() is None
    assert quantized == works, says(
        "compressed-tensors", f"quantizes keys: {quantized}, said to: {works}"
    )


def test_a_set_in_the_local_cache_is_found_without_the_hub(monkeypatch, tmp_path):
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
    assert datasets.offline(), says("datasets", "has another switch for working offline")
    assert datasets.cached_builder("owner/name", "plain") is None, says(
        "datasets", "refuses an unknown set otherwise"
    )
    assert HubText("owner/name", "plain", "test")._cached() is None


def test_a_sweep_is_split_into_every_combination():
    parsed = hydra.OverridesParser.create().parse_overrides(["a=1,2", "b=x,y", "c=[1,2]"])
    rows = [
        ["a=1", "b=x", "c=[1,2]"],
        ["a=1", "b=y", "c=[1,2]"],
        ["a=2", "b=x", "c=[1,2]"],
        ["a=2", "b=y", "c=[1,2]"],
    ]
    assert hydra.jobs_of(parsed) == rows, says(
        "hydra-core", "splits the values of a sweep otherwise"
    )


@torch.no_grad()
def test_what_runs_experts_is_found_by_its_name():
    mixture = zoo.make("mixtral")
    ids, called = torch.arange(8)[None], []
    plain = mixture(ids, use_cache=False).logits
    experts = [module for module in mixture.modules() if inside.runs_experts(module)]

    def run(module, hidden, index, weights):
        called.append(module)
        return torch.zeros_like(hidden)

    inside.name_experts("test_libraries", run)
    inside.use_experts(mixture, "test_libraries")
    silent = mixture(ids, use_cache=False).logits
    assert called == experts != [], says("transformers", "runs experts by another name or way")
    assert not torch.equal(silent, plain)


def test_experts_of_a_file_become_the_parameters_of_a_model(tmp_path):
    mixture = zoo.make("mixtral")
    mixture.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    converted = conversion.Conversion(mixture).converted(tensors)
    wanted = mixture.state_dict()
    assert set(tensors) != set(wanted), says("transformers", "stores experts as they are in memory")
    same = converted.keys() == wanted.keys() and all(
        torch.equal(converted[name], tensor) for name, tensor in wanted.items()
    )
    assert same, says("transformers", "converts a file's tensors otherwise than it loads them")


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "hy_v3", "gpt_oss"])
def test_a_model_is_saved_under_the_names_that_are_said(tmp_path, name):
    """Experts part by part, in the rows that are said."""
    mixture = zoo.make(name)
    mixture.save_pretrained(tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    stored = saved.Saved(mixture)
    wanted: dict[str, torch.Tensor] = {}
    for parameter, tensor in mixture.state_dict().items():
        parts = ()
        if tensor.ndim == 3:
            turned = name == "gpt_oss"
            experts, *shape = tensor.shape
            parts = stored.parts(parameter, experts, shape[turned], turned)
            assert bool(parts) is not turned, parameter
        for part, rows in parts:
            for expert in range(len(tensor)):
                wanted[f"{part.replace('*', str(expert))}.weight"] = tensor[expert, list(rows)]
        if not parts:
            wanted[stored.name(parameter)] = tensor
    same = file.keys() == wanted.keys() and all(torch.equal(file[n], w) for n, w in wanted.items())
    assert same, says("transformers", "saves a model under other names, or other rows")


def test_experts_of_a_compressed_file_are_decoded_as_those_of_linears_or_to_nothing_else():
    """What is tried on one weight is what a whole model gets: with a global scale, which is left
    out, other values than without."""
    packed = torch.randint(256, (8, 16), dtype=torch.uint8)
    scale = torch.full((8, 2), 2.0).to(torch.float8_e4m3fn)
    args = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    group = {"targets": ["Linear"], "weights": args, "format": "nvfp4-pack-quantized"}
    like = torch.empty(8, 32, dtype=torch.bfloat16)
    made = []
    for g in (1.0, 4.0):
        entries = {"weight_packed": packed, "weight_scale": scale}
        entries["weight_global_scale"] = torch.tensor([g])
        made.append(compressed_tensors.expert_loaded(entries, group, like))
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values])[codes.long()] * 2
    assert torch.equal(made[0].float(), values), says("transformers", "decodes experts otherwise")
    assert made[0].dtype == torch.bfloat16
    right = torch.equal(made[1].float(), values / 4)
    assert right or torch.equal(made[1], made[0]), says("transformers", "decodes experts otherwise")
    assert compressed_tensors.expert_loaded({"weight": packed}, group, like) is None


def test_what_is_computed_from_a_config_is_what_a_built_model_has():
    built = zoo.make("gemma2")
    with torch.device("meta"):
        model = type(built)(built.config)
    state = torch.get_rng_state()
    inside.compute_buffers(model, "cpu")
    assert torch.equal(torch.get_rng_state(), state), "another's generator is left alone"
    wanted = dict(built.named_buffers())
    same = all(torch.equal(buffer, wanted[name]) for name, buffer in model.named_buffers())
    assert wanted and same, says("transformers", "computes buffers in another place")


def test_what_is_wrong_with_a_repository_is_told_by_the_hubs_errors():
    """Also where transformers raises an error of its own from them."""
    unknown, gated, revision = (
        kind.__new__(kind)
        for kind in (
            errors.RepositoryNotFoundError,
            errors.GatedRepoError,
            errors.RevisionNotFoundError,
        )
    )
    behind = OSError("no config.json")
    behind.__cause__ = gated
    library = "huggingface-hub"
    assert hub.refusal(unknown).startswith("is not on the hub"), says(library, "tells no names")
    assert hub.refusal(gated) == hub.refusal(behind), says(library, "tells no gated repositories")
    assert hub.refusal(behind).startswith("is gated")
    assert hub.refusal(revision, "v2") == "has no v2", says(library, "tells no revisions")
    assert hub.refusal(ConnectionError("no route")) is None
