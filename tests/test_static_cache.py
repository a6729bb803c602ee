"""Keys and values on scales calibrated once a layer: the extremes of the calibration text."""

import json

import pytest
import torch
from composed import small
from preserved import exact_model, logits, token_ids
from safetensors import safe_open

from harness.calibration.cache import calibrate
from harness.config.errors import ConfigError
from harness.formats import KVCache
from harness.linalg.hadamard import Hadamard
from harness.models.attention import HeadsInput, attach, named
from harness.models.merge import place
from harness.pipeline.job import execute
from harness.transforms import Placement, Rotation

IDS = token_ids(5, 24)
FP8 = KVCache(kind="fp8", bits=8, scale="static")


@torch.no_grad()
def seen(adapter) -> dict[str, list[torch.Tensor]]:
    """{attention: [all rotated keys, all values]} of whole forwards, at the attention's door."""
    found = {}
    handles = []
    for name, heads in named(adapter).items():
        found[name] = [[], []]

        def keep(module, args, kept=found[name]):
            kept[0].append(module.rotate(args[1]))
            kept[1].append(args[2])

        handles.append(heads.register_forward_pre_hook(keep))
    logits(adapter, IDS)
    for handle in handles:
        handle.remove()
    return {name: [torch.cat(each) for each in kept] for name, kept in found.items()}


@pytest.mark.parametrize("rotated", [False, True])
def test_a_layers_scale_is_its_greatest_magnitude_over_448(rotated):
    adapter = exact_model("qwen3")
    if rotated:
        place(adapter, Placement(query_key=Rotation(Hadamard(adapter.structure.head_dim))))
    wanted = seen(adapter)
    calibrate(adapter, FP8, IDS)
    scales = set()
    for name, heads in named(adapter).items():
        heads.format = FP8
        for part, x in zip(("key", "value"), wanted[name]):
            amax = x.abs().max().float()
            torch.testing.assert_close(heads.scales[part], amax.reshape(1), rtol=1e-6, atol=0)
            s = (amax / 448).bfloat16().float()
            cast = (x.float() / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s
            torch.testing.assert_close(heads.quantize(x, part).float(), cast, rtol=1e-6, atol=0)
            scales.add(float(s))
    assert len(scales) == 2 * len(adapter.blocks), "each layer has its own"


def test_what_comes_later_is_clamped_to_the_range():
    heads = HeadsInput()
    heads.format = FP8
    for part in ("key", "value"):
        heads.scales[part] = torch.tensor([2.0])
    x = torch.tensor([[[[-9.0, 1.0, 2.0, 5.0]]]])
    _, k, v, _ = heads(x, x, x)
    reach = 448 * float(torch.tensor(2 / 448).bfloat16())
    assert k.flatten().tolist() == v.flatten().tolist()
    assert k[..., [0, 2, 3]].flatten().tolist()[::2] == pytest.approx([-reach, reach])


def test_nvfp4_takes_the_calibrated_float32_scale():
    kv = KVCache(kind="nvfp4", bits=4, scale="static")
    adapter = exact_model("llama")
    calibrate(adapter, kv, IDS)
    wanted = seen(adapter)
    for name, heads in named(adapter).items():
        heads.format = kv
        g = 2688 / wanted[name][0].abs().max().float()
        torch.testing.assert_close(heads.scales["key"], g.reshape(1), rtol=1e-6, atol=0)
        # a block on its own, as NVFP4 has it
        x = wanted[name][0].float()
        block = x[0, 0, 0, :16]
        s = (g * block.abs().max() / 6).to(torch.float8_e4m3fn).float() / g
        grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        near = grid[(block.abs() / s).unsqueeze(-1).sub(grid).abs().argmin(-1)] * s * block.sign()
        torch.testing.assert_close(heads.quantize(x, "key")[0, 0, 0, :16], near)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"kind": "integer", "bits": 8}, ["scale=static", "kind=integer"]),
        ({"kind": "mxfp4", "bits": 4}, ["scale=static", "kind=mxfp4"]),
        ({"group_size": 16}, ["scale=static", "group_size=16"]),
        ({"group_size": -1}, ["scale=static", "group_size=-1"]),
    ],
    ids=str,
)
def test_refusals_name_the_fields(knobs, words):
    with pytest.raises(ConfigError) as refusal:
        KVCache(**({"kind": "fp8", "bits": 8, "scale": "static"} | knobs))
    assert all(word in str(refusal.value) for word in words)


@pytest.mark.parametrize("export", ["harness", "compressed_tensors"])
def test_a_run_calibrates_and_exports_its_scales(tmp_path, export):
    options = ["format=fp8_kv_static", "solver=rtn", "model.dtype=bfloat16"]
    options += [f"export={export}", f"export.path={tmp_path / 'out'}"]
    outcome = execute(*small(tmp_path, *options))
    assert outcome.status == "done", outcome.error
    assert not any("vLLM does not" in warning for warning in outcome.metrics["warnings"])
    (folder,) = (path.parent for path in (tmp_path / "out").glob("*/config.json"))
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = file.keys()
        names = [name for name in stored if name.endswith(("k_scale", "key_scale"))]
        scales = {name: file.get_tensor(name) for name in names}
    assert len(scales) == 2
    assert len({float(scale) for scale in scales.values()}) == 2
    config = json.loads((folder / "config.json").read_text())
    if export == "compressed_tensors":
        scheme = config["quantization_config"]["kv_cache_scheme"]
        assert scheme["strategy"] == "tensor" and scheme["dynamic"] is False
    # the same solved blocks from the store, calibrated again
    again = execute(*small(tmp_path, *options, "eval.perplexity.windows=3"))
    assert again.metrics["quant_id"] == outcome.metrics["quant_id"]
    losses = [each.metrics["stages"]["quantized"]["losses"]["pydoc"] for each in (outcome, again)]
    assert losses[0] == losses[1][:2]


def test_attaching_again_keeps_the_scales():
    adapter = exact_model("llama")
    calibrate(adapter, FP8, IDS)
    assert all(set(heads.scales) == {"key", "value"} for heads in attach(adapter))
