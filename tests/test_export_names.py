"""Names of checkpoints, and what metadata and card say of one whose figures are known by hand."""

import itertools
import json
import shlex

import pytest
import yaml
from composed import composed
from format_parts import PARTS
from transformers import AutoConfig

from harness.checkpoints.base import Snapshot
from harness.checkpoints.card import card
from harness.checkpoints.compressed_tensors import CompressedTensors
from harness.checkpoints.metadata import metadata
from harness.checkpoints.names import LONGEST, Name, base_of, hub_id
from harness.checkpoints.native_writer import Checkpoint
from harness.checkpoints.public import public
from harness.config.build import build, option, settings
from harness.config.errors import ConfigError
from harness.formats import NVFP4, Format, KVCache, Scheme
from harness.models import merge
from harness.models.adapter import Adapter, structure_of
from harness.models.source import untie
from harness.models.tiny import Tiny
from harness.quantize.overrides import resolve

EXAMPLE = "Qwen3-0.6B-openmath_SFT_LoRa256_QuaRot_w4_g64_a4_kv4_headfp16"
COMMAND = "python run.py format=w4a4kv4 'data.path=a|b'"


STRUCTURE = structure_of(AutoConfig.for_model(**Tiny().facts()))


def run_name(*overrides: str, **export) -> Name:
    cfg, choices = composed(*overrides)
    plain = settings(cfg) | {
        "export": {"base": None, "dataset": None, "training": None, "peft": None, **export}
    }
    parts = {
        part: build(plain["format"][part], f"format.{part}", base) for part, base in PARTS.items()
    }
    scheme = Scheme(**parts, overrides=resolve(plain["format"], STRUCTURE))
    return Name.of(plain, choices, scheme, "lm_head")


def test_the_example():
    name = Name(
        "Qwen3-0.6B", "openmath", "SFT", "LoRa256", "QuaRot", weight=4, group=64, act=4, kv=4
    )
    assert str(name) == EXAMPLE


def test_every_name_is_another():
    bases = ("Qwen3-0.6B", "SmolLM2-135M-Instruct", "Llama-3.2-1B", "smollm2_135m", "X-w4_g64")
    methods = (None, "GPTQ", "QuaRot.GPTQ", "kv4")
    words = list(
        itertools.product((None, "wikitext2", "w4"), (None, "SFT"), (None, "LoRa256"), methods)
    )
    tags = (
        (4, 64, 4, 4, "fp16"),
        (3, None, 16, 16, 4),
        ("nvfp4", 16, "nvfp4", 8, "mxfp8.e5m2"),
        (2, "tensor", 8, 2, "fp4"),
        ("fouroversix", 16, "fouroversix", 16, "fp16"),
        ("mixed4", 32, "mixedfouroversix", 16, 8),
        ("auto4.5", None, 8, 8, 8),
    )
    texts = set()
    for base, own, (weight, group, act, kv, head) in itertools.product(bases, words, tags):
        if own[0] and not any(own[1:]):
            continue
        name = Name(base, *own, weight=weight, group=group, act=act, kv=kv, head=head)
        texts.add(str(name))
    assert len(texts) == 5 * (3 * 2 * 2 * 4 - 2) * 7


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"dataset": "open-math", "method": "RTN"}, "dataset=open-math"),
        ({"dataset": "LoRA8", "method": "RTN"}, "dataset=LoRA8"),
        ({"dataset": "openmath"}, "dataset=openmath: alone"),
        ({"training": "tuned"}, "training=tuned.*SFT"),
        ({"method": "Qua_Rot"}, "method=Qua_Rot"),
        ({"act": "w4"}, "act=w4"),
        ({"weight": "4"}, "weight=4"),
    ],
)
def test_what_would_be_read_as_another_part_is_refused(parts, words):
    with pytest.raises(ValueError, match=words):
        Name(**{"base": "X", "weight": 4} | parts)


def test_runs_of_a_sweep_have_names_of_their_own():
    formats = (
        "nvfp4",
        "fouroversix",
        "if4",
        "mxfp4",
        "mxfp6",
        "mxfp8",
        "fp4",
        "fp8",
        "fp8_static",
        "fp8_block",
        "fp8_kv",
        "nvfp4_kv",
        "mxfp4_kv",
        "w4a8_fp8",
        "int4",
        "int8",
        "w4a4kv4",
        "w4a8kv4",
        "w4a8kv8",
        "auto",
    )
    names = [run_name(f"format={format}") for format in formats]
    names += [
        run_name("format=int4", f"transform={x}", f"solver={y}")
        for x in ("hadamard", "quarot", "jointquant", "jq_seed", "adacodec")
        for y in ("rtn", "gptq", "awq")
    ]
    assert len({str(name) for name in names}) == len(names)
    assert str(names[0]) == "SmolLM2-135M-Instruct-GPTQ_wnvfp4_g16_anvfp4_kv16_headfp16"
    block = run_name("format=fp8_block", "format.kv={kind: nvfp4, bits: 4}")
    assert str(block) == "SmolLM2-135M-Instruct-GPTQ_wfp8_g128x128_afp8_kvnvfp4_headfp16"
    e5m2 = run_name("format=fp8_static", "format.weight.element=e5m2")
    assert str(e5m2) == "SmolLM2-135M-Instruct-GPTQ_wfp8.e5m2_gtensor_afp8_kv16_headfp16"
    jq_seed = run_name("format=int4", "transform=jq_seed")
    assert str(jq_seed) == "SmolLM2-135M-Instruct-JQSeed.GPTQ_w4_g64_a4_kv16_headfp16"


def test_a_name_says_what_the_settings_change():
    overrides = "format.overrides={lm_head: mxfp8, down_proj: 8}"
    assert (
        str(
            run_name(
                "model=qwen3_0_6b",
                "format=int8",
                "solver=rtn",
                dataset="openmath",
                training="SFT",
                peft="LoRa256",
            )
        )
        == "Qwen3-0.6B-openmath_SFT_LoRa256_RTN_w8_a8_kv16_headfp16"
    )
    assert (
        str(run_name("format=int4", overrides, base="Llama-3.2-1B"))
        == "Llama-3.2-1B-GPTQ_wmixed4_g64_a4_kv16_headmxfp8"
    )
    assert (
        str(
            run_name(
                "format=mxfp6",
                "format.weight.element=e3m2",
                "format.act.bits=16",
                "format.kv.bits=3",
            )
        )
        == "SmolLM2-135M-Instruct-GPTQ_wmxfp6.e3m2_g32_a16_kv3_headfp16"
    )
    assert run_name("format=auto").weight == "auto4.5"
    assert run_name("transform.smooth={alpha: 0.5, when: before}").method == "SmoothQuant.GPTQ"
    with pytest.raises(ConfigError, match=r"export\.dataset=open-math"):
        run_name(dataset="open-math")


def test_a_base_is_the_models_name_and_a_hub_id_what_it_is(tmp_path, monkeypatch):
    """Whatever the option is called, and wherever a folder lies."""
    folder = tmp_path / "my-model"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    for overrides, base, hub in (
        (["model=tiny", "model.family=qwen3"], "tiny-qwen3", None),
        (["model=smollm2_135m"], "SmolLM2-135M-Instruct", None),
        (["model=llama32_1b"], "Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        (["model=hf", "model.path=owner/its-model"], "its-model", "owner/its-model"),
        *[
            (["model=hf", f"model.path='{path}'"], "my-model", None)
            for path in (folder, ".", "~/my-model", "../my-model/")
        ],
    ):
        cfg, _ = composed(*overrides)
        model = settings(cfg)["model"]
        assert (base_of(model), hub_id(model)) == (base, hub), overrides


def test_a_name_fits_into_a_folders(tmp_path):
    """With the run's mark and what stands around it while it is written and replaced."""
    longest = run_name(base="b" * (LONGEST - len(str(run_name(base="b"))) + 1))
    (tmp_path / f".{longest}.0123456789.old").mkdir()
    with pytest.raises(ConfigError, match=r"^export\.base=b+: .* 240 letters .* at most 239"):
        run_name(base=longest.base + "b")
    with pytest.raises(ConfigError, match=r"^export\.dataset=d+: "):
        run_name(base="b" * 100, dataset="d" * 150)


@pytest.fixture(scope="module")
def about(tmp_path_factory):
    """Metadata of a tiny model with two of its linears quantized, in a folder of 1,000 bytes of
    tensors and 24 of others."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "model.safetensors").write_bytes(bytes(1000))
    (folder / "config.json").write_bytes(bytes(24))
    cfg, choices = composed("model=tiny", "format=w4a4kv4", "transform=quarot", "seed=3")
    model, tokenizer = Tiny().load()
    adapter = Adapter(model)
    merge.swap(adapter)
    untie(model)
    plain = settings(cfg)
    parts = {
        part: build(plain["format"][part], f"format.{part}", Format) for part in ("weight", "act")
    }
    chosen = {
        "model.layers.0.self_attn.q_proj": parts["weight"],
        "model.layers.1.mlp.down_proj": NVFP4(),
    }
    qtensors = {
        name: format.quantize(model.get_submodule(name).weight) for name, format in chosen.items()
    }
    metrics = {
        "run_id": "tiny-w4a4kv4-quarot-gptq-0123456789",
        "command": COMMAND,
        "stages": {
            "baseline": {
                "ppl": {"wiki|text": 22.75, "pydoc": 14.1234},
                "tokens": 64,
                "losses": {"pydoc": [3.1]},
                "zeroshot": {"arc_easy": {"acc": 0.5, "acc_stderr": 0.035, "n": 200}},
            },
            "quantized": {
                "ppl": {"wiki|text": 25.5, "pydoc": float("inf")},
                "tokens": 64,
                "divergence": {"wiki|text": {"kl": 0.2125, "top1": 0.831}},
                "zeroshot": {"arc_easy": {"acc": 0.41, "acc_stderr": 0.0349, "n": 200}},
            },
        },
        "marks": {
            "wiki|text": ["same corpus as calibration", "first 8 of 145 windows"],
            "pydoc": [],
            "arc_easy": ["first 200 documents"],
        },
    }
    snapshot = Snapshot(
        adapter, tokenizer, Scheme(**parts, kv=KVCache()), (), qtensors, plain, choices, metrics
    )
    return metadata(snapshot, Checkpoint(), "tiny-QuaRot.GPTQ_w4_g64_a4_kv4_headfp16", folder)


def test_counts_and_sizes_by_hand(about):
    q, down = about["layers"]
    bits = 192 * 192 * 4 + 192 * 3 * 32  # three groups of 64 a row, scales in the model's float32
    assert q == {
        "name": "model.layers.0.self_attn.q_proj",
        "format": "int4",
        "bits": 4,
        "group_size": 64,
        "shape": [192, 192],
        "weights": 192 * 192,
        "stored_bits": bits,
    }
    assert (down["format"], down["stored_bits"]) == ("nvfp4", 192 * 384 * 4 + 192 * 24 * 8 + 32)
    assert about["quantized"] == "2/15"
    assert about["formats"] == {"int4": 1, "nvfp4": 1}
    block = 2 * 192 * 192 + 2 * 64 * 192 + 3 * 192 * 384 + 2 * 192
    before = 2 * (
        258 * 192 + 2 * block + 192
    )  # the head came tied to the embedding, and counts once
    assert about["sizes"] == {
        "before": before,
        "after": 1000,
        "files": 1024,
        "weights": (bits + down["stored_bits"]) // 8,
        "reduction_percent": 100 * (1 - 1000 / before),
    }
    packed = (
        2 * 2 * 2 * (32 * 4 + 32 + 4) / 8
    )  # layers, keys and values, heads; codes, float32 scale, zero point
    assert about["kv_cache"] == {
        "fp16": 512,
        "quantized": packed,
        "reduction_percent": 100 * (1 - packed / 512),
    }


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("eval.perplexity.corpora=[data,/home/me/secret]", "eval.perplexity.corpora=[data,secret]"),
        ("data.path=../me/x", "data.path=x"),
        ("data.path=me/texts/x", "data.path=x"),
        ("data.path=/home/me/my texts/", "data.path=my texts"),
        ("data.path=/home/me/a\\,b/c", "data.path=c"),
        ("data.path=my texts/../a b/c", "data.path=c"),
        ("export.path=~/out", "export.path=out"),
        ("data.calibration={path: /home/me/y}", "data.calibration={path: y}"),
        (
            "data.calibration={path:'~me/a, b/y',windows: 3}",
            "data.calibration={path:'y',windows: 3}",
        ),
        ("model.path=owner/name", "model.path=owner/name"),
        ("hydra/launcher=slurm", "hydra/launcher=slurm"),
        (
            "eval.generate.prompts=['Half of 3/4 and/or (see ../me/x) http://a/b']",
            "eval.generate.prompts=['Half of 3/4 and/or (see x) http://a/b']",
        ),
    ],
    ids=str,
)
def test_no_folder_of_whoever_ran_it_is_public(word, told):
    assert public(shlex.join(["python", "run.py", word])) == shlex.join(["python", "run.py", told])


def test_what_is_a_folder_here_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "model").mkdir(parents=True)
    assert public("harness model.path=me/model") == "harness model.path=model"


def test_where_it_came_from(about):
    assert about["method"] == {"transform": "quarot", "solver": "gptq"}
    assert about["calibration"] == {
        "corpus": "pydoc",
        "windows": 32,
        "length": 512,
        "order": "first",
    }
    assert (about["seed"], about["command"], about["run_id"][-10:]) == (3, COMMAND, "0123456789")
    weights = {
        "format": "int4",
        "bits": 4,
        "group_size": 64,
        "granularity": "group",
        "symmetric": True,
    }
    assert about["bits"]["weights"] == weights
    assert about["bits"]["kv"]["granularity"] == "head" and about["bits"]["head"]["bits"] == 16
    assert set(about["evaluation"]["baseline"]) == {"ppl", "zeroshot", "tokens"}
    assert about["harness"].startswith("0.")


def cells(text: str, label: str) -> list[str]:
    """The cells of the one table row that begins with a label."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return row.split(" | ")[1:]


def test_the_card_shows_numbers_marks_and_command(about):
    text = card(json.loads(json.dumps(about)), Checkpoint())
    corpus = r"wiki\|text"
    assert cells(text, f"perplexity, {corpus}") == ["22.7500 cs", "25.5000 cs |"]
    assert cells(text, "perplexity, pydoc") == ["14.1234", "inf |"]
    assert cells(text, f"KL from the untouched model, {corpus}") == ["", "0.2125 cs |"]
    assert cells(text, r"accuracy in percent, arc\_easy") == [
        "acc 50.0 ± 3.5 s",
        "acc 41.0 ± 3.5 s |",
    ]
    assert cells(text, "weights")[0] == "int4 (1), nvfp4 (1)"
    assert f"- {corpus} (cs): same corpus as calibration, first 8 of 145 windows" in text
    assert f"```sh\n{COMMAND}\n```" in text
    assert "32 windows of 512 tokens" in text
    assert 'harness.load("tiny-QuaRot.GPTQ_w4_g64_a4_kv4_headfp16")' in text


def test_the_front_matter_is_yaml_whatever_the_names(about):
    front = card(about | {"base_model": "own: 'er\"/na#me"}, CompressedTensors()).split("---\n")[1]
    fields = yaml.safe_load(front)
    assert fields["base_model"] == "own: 'er\"/na#me"
    assert fields["library_name"] == "transformers"
    assert {"QuaRot", "GPTQ", "int4", "compressed-tensors"} <= set(fields["tags"])


@pytest.mark.parametrize("name", ["smollm2_135m", "gemma3_270m"])
def test_a_model_out_of_a_package_names_what_it_was_made_from(name):
    """And is called and known as before: neither its name nor its id looks at it."""
    section = option("model", name)
    assert section["hub"].count("/") == 1
    assert base_of(section) == section["name"]
    assert hub_id(section) is None


def test_a_model_from_elsewhere_has_no_base_model(about):
    assert (about["base_model"], about["model"]) == (None, "tiny-llama")
    text = card(json.loads(json.dumps(about)), Checkpoint())
    fields = yaml.safe_load(text.split("---\n")[1])
    assert not {"base_model", "base_model_relation", "license"} & set(fields)
    assert "\ntiny-llama by QuaRot and GPTQ: " in text
    text = card(
        about | {"base_model": "owner/its-model", "revision": "v1", "license": "llama3.1"},
        Checkpoint(),
    )
    fields = yaml.safe_load(text.split("---\n")[1])
    assert (fields["base_model"], fields["base_model_relation"]) == ("owner/its-model", "quantized")
    assert fields["license"] == "llama3.1"
    assert "\nowner/its-model (revision v1) by " in text


def test_how_to_load_follows_the_layout(about):
    text = card(about | {"command": "echo '```'"}, CompressedTensors())
    assert "AutoModelForCausalLM.from_pretrained(" in text and "vllm serve tiny-QuaRot" in text
    assert "harness.load" not in text
    assert "````sh\necho '```'\n````" in text
