"""Names of checkpoints: no two are alike, each says what settings change and fits into a
folder's."""

import itertools

import pytest
from composed import composed
from format_parts import PARTS
from transformers import AutoConfig

from harness.checkpoints.names import LONGEST, Name, base_of, hub_id
from harness.config.build import build, option, settings
from harness.config.errors import ConfigError
from harness.formats import Scheme
from harness.models.adapter import structure_of
from harness.models.tiny import Tiny
from harness.quantize.overrides import resolve

EXAMPLE = "Qwen3-0.6B-openmath_SFT_LoRa256_QuaRot_w4_g64_a4_kv4_headfp16"
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


@pytest.mark.parametrize("name", ["smollm2_135m", "gemma3_270m"])
def test_a_model_out_of_a_package_names_what_it_was_made_from(name):
    """And is called and known as before: neither its name nor its id looks at it."""
    section = option("model", name)
    assert section["hub"].count("/") == 1
    assert base_of(section) == section["name"]
    assert hub_id(section) is None
