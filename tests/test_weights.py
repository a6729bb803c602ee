"""One answer for memory and disk to which files, which dtype, which shapes, tied or not; it is that
of `from_pretrained`, or a refusal before any weight is read."""

import json

import pytest
import torch
from composed import small
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from harness.config.errors import DataError
from harness.evaluation.perplexity import window_losses
from harness.models.adapter import Adapter
from harness.models.hub import Hub
from harness.models.tiny import Tiny, byte_tokenizer
from harness.pipeline.job import execute

UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"
IDS = torch.arange(48).view(2, 24)


@pytest.fixture
def folder(tmp_path):
    model, tokenizer = Tiny(family="qwen3").load()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def tensors(folder) -> dict:
    return load_file(folder / "model.safetensors")


def write(folder, content: dict, name: str = "model.safetensors") -> None:
    save_file(
        {key: tensor.contiguous() for key, tensor in content.items()},
        folder / name,
        metadata={"format": "pt"},
    )


def index(folder, **names) -> None:
    content = {
        "metadata": {},
        "weight_map": {key.replace("__", "."): file for key, file in names.items()},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def config(folder, **changed) -> None:
    facts = json.loads((folder / "config.json").read_text()) | changed
    (folder / "config.json").write_text(json.dumps({k: v for k, v in facts.items() if v != "gone"}))


def losses(folder, weights: str, dtype: str = "auto") -> torch.Tensor:
    model, _ = Hub(path=str(folder), weights=weights, dtype=dtype).load()
    adapter = Adapter(model)
    adapter.offloaded = Hub(path=str(folder), weights=weights).offloaded(model, folder / "scratch")
    return window_losses(adapter, IDS, streaming=weights == "disk")


# the same as from_pretrained


def single_beside_an_index(folder):
    write(
        folder, {key: tensor * 2 for key, tensor in tensors(folder).items()}, "model-1.safetensors"
    )
    index(folder, **{key.replace(".", "__"): "model-1.safetensors" for key in tensors(folder)})


def several_indices(folder):
    write(folder, tensors(folder), "model-1.safetensors")
    index(folder, **{key.replace(".", "__"): "model-1.safetensors" for key in tensors(folder)})
    (folder / "model.safetensors").unlink()
    (folder / "consolidated.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "none.safetensors"}})
    )


def no_dtype(folder):
    write(folder, {key: tensor.bfloat16() for key, tensor in tensors(folder).items()})
    config(folder, dtype="gone")


def a_mixture_of_dtypes(folder):
    write(
        folder,
        {
            key: tensor if "norm" in key else tensor.bfloat16()
            for key, tensor in tensors(folder).items()
        },
    )
    config(folder, dtype="gone")


def half_precision(folder):
    write(folder, {key: tensor.half() for key, tensor in tensors(folder).items()})
    config(folder, dtype="float16")


def another_dtype_than_the_config(folder):
    write(folder, {key: tensor.half() for key, tensor in tensors(folder).items()})


def a_head_of_its_own(folder):
    content = tensors(folder)
    write(folder, content | {"lm_head.weight": content["model.embed_tokens.weight"] * 2})


def the_head_once_more(folder):
    content = tensors(folder)
    write(folder, content | {"lm_head.weight": content["model.embed_tokens.weight"].clone()})


def old_rotary_tables(folder):
    write(
        folder, tensors(folder) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(24)}
    )


SAME = [
    single_beside_an_index,
    several_indices,
    no_dtype,
    a_mixture_of_dtypes,
    half_precision,
    another_dtype_than_the_config,
    a_head_of_its_own,
    the_head_once_more,
    old_rotary_tables,
]


@pytest.mark.parametrize("change", SAME, ids=lambda change: change.__name__)
def test_memory_and_disk_read_what_from_pretrained_reads(folder, change):
    change(folder)
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    expected = window_losses(Adapter(wanted), IDS)
    for weights in ("memory", "disk"):
        source = Hub(path=str(folder), weights=weights, dtype="auto")
        source.check()
        model, _ = source.load()
        assert model.dtype == wanted.dtype
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        assert tied == (wanted.lm_head.weight is wanted.model.embed_tokens.weight)
        assert model.config.tie_word_embeddings == tied
        assert source.warnings == []
        assert torch.equal(losses(folder, weights), expected)


# refused, in both alike, before a weight is read


def codes(dtype: torch.dtype, beside: str = ""):
    def change(folder):
        content = tensors(folder)
        content[UP] = content[UP].to(dtype)
        write(folder, content | ({UP + beside: torch.ones(1)} if beside else {}))

    return change


def in_two_files(folder):
    content = tensors(folder)
    write(folder, content, "model-1.safetensors")
    write(folder, {NORM: content[NORM] * 7}, "model-2.safetensors")
    (folder / "model.safetensors").unlink()
    index(folder, a="model-1.safetensors", b="model-2.safetensors")


def outside_of_the_folder(folder):
    (folder / "weights").mkdir()
    (folder / "model.safetensors").rename(folder / "weights" / "model.safetensors")
    (folder / "inner").mkdir()
    for path in folder.glob("*.json"):
        path.rename(folder / "inner" / path.name)
    index(folder / "inner", a="../weights/model.safetensors")


def without(name: str):
    return lambda folder: write(
        folder, {key: tensor for key, tensor in tensors(folder).items() if key != name}
    )


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


REFUSED = {
    "float8": (codes(torch.float8_e4m3fn), rf"{UP} .*F8_E4M3: codes"),
    "float8 with scales": (codes(torch.float8_e4m3fn, "_scale"), "codes of a quantized model"),
    "int8": (codes(torch.int8, "_scale"), "I8: codes"),
    "uint8": (codes(torch.uint8), "U8: codes"),
    "scales beside a float": (
        codes(torch.bfloat16, "_scale"),
        rf"no parameter of the model takes {UP}_scale",
    ),
    "a quantization config": (
        lambda f: config(f, quantization_config={"quant_method": "mine"}),
        "quantization_config",
    ),
    "more layers than the config": (
        lambda f: config(f, num_hidden_layers=1, layer_types="gone"),
        r"num_hidden_layers",
    ),
    "fewer layers": (
        lambda f: config(f, num_hidden_layers=3, layer_types="gone"),
        r"lacks the weights model\.layers\.2\.",
    ),
    "another vocabulary": (
        lambda f: config(f, vocab_size=250),
        r"embed_tokens.weight has shape \[258, 192\].*\[250, 192\]",
    ),
    "another width": (lambda f: config(f, hidden_size=96), r"has shape .*config\.json asks for"),
    "a tensor in two files": (in_two_files, rf"both hold {NORM}"),
    "a missing tensor": (without(NORM), rf"lacks the weights {NORM}"),
    "a truncated file": (truncated, r"model\.safetensors is damaged"),
    "no tokenizer": (
        lambda f: [p.unlink() for p in f.glob("tokenizer*")],
        "needs a tokenizer beside its weights",
    ),
}


@pytest.mark.parametrize("weights", ["memory", "disk"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_any_weight(folder, case, weights):
    change, message = REFUSED[case]
    change(folder)
    source = Hub(path=str(folder), weights=weights)
    with pytest.raises(DataError, match=rf"model\.path={folder}.*{message}"):
        source.check()


def test_no_file_outside_of_the_folder_is_read(folder):
    outside_of_the_folder(folder)
    with pytest.raises(DataError, match=r"weight_map names \.\./weights/model\.safetensors"):
        Hub(path=str(folder / "inner")).check()


INDICES = [
    "[]",
    '"text"',
    "{",
    "{}",
    '{"weight_map": 3}',
    '{"weight_map": {"a": 1}}',
    '{"weight_map": {}}',
]


@pytest.mark.parametrize("content", INDICES)
def test_a_broken_index_is_one_error(folder, content):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(DataError, match=r"model\.safetensors\.index\.json"):
        Hub(path=str(folder)).check()


def test_a_tensor_of_nothing_in_the_model_is_a_warning(folder):
    write(folder, tensors(folder) | {"classifier.weight": torch.ones(2)})
    source = Hub(path=str(folder))
    source.check()
    assert source.warnings == ["no parameter of the model takes classifier.weight"]


# facts


def test_what_a_config_leaves_out_is_what_transformers_fills_in(tmp_path):
    facts = Tiny(family="qwen3").facts() | {"head_dim": 128}  # Qwen3's own default
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**facts)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    config(tmp_path, head_dim="gone", layer_types="gone")
    source = Hub(path=str(tmp_path))
    source.check()
    facts = source.facts()
    assert facts["head_dim"] == 128
    assert facts["layer_types"] == ["full_attention"] * 2
    adapter = Adapter(source.load()[0])
    assert adapter.structure.widths == {site.name: adapter.width(site) for site in adapter.sites(0)}


def test_the_tiny_models_state_what_transformers_would_fill_in():
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        stated = Tiny(family=family).facts()
        filled = AutoConfig.for_model(**stated).to_dict()
        assert {key: filled[key] for key in stated} == stated


BROKEN = {
    "[]": "holds list",
    '"text"': "holds str",
    "{": "not JSON",
    "{}": "model_type=None",
    '{"model_type": 3}': "model_type=3",
    '{"model_type": "no_such_model"}': "no_such_model",
}


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_config_is_one_error_that_names_the_file(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(DataError, match=rf"model\.path=.*config\.json.*{BROKEN[content]}"):
        Hub(path=str(folder)).check()


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_size", "wide"),
        ("num_attention_heads", 0),
        ("num_hidden_layers", -1),
        ("num_key_value_heads", 4),
        ("intermediate_size", 3.5),
        ("vocab_size", None),
        ("head_dim", [3]),
        ("num_hidden_layers", True),
    ],
)
def test_a_mistyped_size_is_named(folder, key, value):
    config(folder, **{key: value})
    with pytest.raises(DataError, match=rf"config\.json.*{key}"):
        Hub(path=str(folder)).check()


# runs


def a_tokenizer_with_more_tokens(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["e"] = 400
    path.write_text(json.dumps(content))


def not_finite(folder):
    content = tensors(folder)
    content[UP][0, 0] = torch.nan
    write(folder, content)


@pytest.mark.parametrize(
    "change",
    [a_tokenizer_with_more_tokens, not_finite, truncated],
    ids=lambda change: change.__name__,
)
def test_a_run_that_cannot_begin_leaves_nothing(folder, tmp_path, change):
    change(folder)
    root = tmp_path / "elsewhere"
    with pytest.raises(DataError):
        execute(*small(root, "model=hf", f"model.path={folder}"))
    assert not list(root.glob("runs/[!_]*"))
    assert not list(root.glob("runs/_shared/baselines/*"))


def test_what_is_left_over_stands_in_the_result(folder, tmp_path):
    write(folder, tensors(folder) | {"classifier.weight": torch.ones(2)})
    outcome = execute(
        *small(tmp_path / "elsewhere", "model=hf", f"model.path={folder}", "solver=rtn")
    )
    assert "no parameter of the model takes classifier.weight" in outcome.metrics["warnings"]
