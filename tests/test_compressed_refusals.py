"""What the compressed-tensors layout cannot hold is refused with both fields and a way out; what is
served otherwise than evaluated is warned of."""

import json
import re
from dataclasses import replace

import pytest
import torch
from compressed import CACHED, F8, F8_TENSOR, F8_TOKEN, G64, KV4, KV8, NV, NV_ACT, mx, token, weight
from preserved import tiny_shape
from safetensors.torch import save_file

from harness.checkpoints import layouts
from harness.checkpoints import source as checkpoint_source
from harness.checkpoints.compressed_tensors import CompressedTensors
from harness.checkpoints.source import CheckpointModel
from harness.config.errors import ConfigError, DataError
from harness.formats import FP4, FP8, NVFP4, FourOverSix, KVCache, Scheme
from harness.models.tiny import Tiny
from harness.transforms.hadamard import HadamardBlocks
from harness.transforms.identity import Identity
from harness.transforms.quarot import QuaRot

REFUSED = {
    "format.act.mx_scale=floor": Scheme(
        weight=mx("e2m1"), act=mx("e2m1", "activation", mx_scale="floor")
    ),
    "format.act.mx_even_mbits=element": Scheme(weight=mx("e4m3"), act=mx("e4m3", "activation")),
    "format.weight.element=e3m2": Scheme(weight=mx("e3m2")),
    "format.weight.mx_scale=fpquant": Scheme(weight=mx("e2m1", mx_scale="fpquant")),
    "format.weight=FP4": Scheme(weight=FP4()),
    "format.weight.element=e5m2": Scheme(weight=replace(F8, element="e5m2")),
    "format.weight.scale_dtype=float32": Scheme(weight=FP8()),
    "format.act.scale_dtype=float32": Scheme(
        weight=F8, act=replace(F8_TENSOR, range="static", scale_dtype="float32")
    ),
    "format.act.compute_dtype=float32": Scheme(
        weight=F8, act=replace(F8_TOKEN, compute_dtype="float32")
    ),
    "format.act.group_size=128": Scheme(  # of 192 and 384 features
        weight=F8, act=replace(F8_TOKEN, granularity="group", group_size=128, pad="zero")
    ),
    "format.kv.bits=4 and format.kv.kind=nvfp4": Scheme(
        kv=KVCache(kind="nvfp4", compute_dtype="input")
    ),
    "format.kv.bits=8 and format.kv.kind=fp8_e5m2": Scheme(kv=replace(KV8, kind="fp8_e5m2")),
    "format.kv.bits=8 and format.kv.group_size=-1": Scheme(kv=replace(KV8, group_size=-1)),
    "format.act=FourOverSix": Scheme(weight=NV, act=FourOverSix(role="activation", scope="static")),
    "format.act.scope=token": Scheme(weight=NV, act=NVFP4(role="activation", scope="token")),
    "format.weight.scale_dtype=input": Scheme(weight=replace(G64, scale_dtype="input")),
    "format.weight.incl0=auto": Scheme(weight=replace(G64, symmetric=False, incl0="auto")),
    "format.act.clip=0.9": Scheme(weight=G64, act=token(clip=0.9)),
    "format.act.int_scale=qmax": Scheme(weight=G64, act=token(symmetric=True)),
    "format.overrides: mlp.up_proj.act.scope=tensor": Scheme(
        weight=NV, act=NV_ACT, overrides={(1, "mlp.up_proj"): {"act": NVFP4(role="activation")}}
    ),
    "format.overrides: mlp.up_proj.act.clip=0.9": Scheme(  # of one block, whatever others have
        weight=NV,
        act=NV_ACT,
        overrides={
            (0, "mlp.up_proj"): {"act": token(clip=0.9)},
            (1, "mlp.up_proj"): {"act": token()},
        },
    ),
    "format.overrides: model.embed_tokens": Scheme(
        weight=NV, overrides={(None, "model.embed_tokens"): {"weight": weight(8)}}
    ),
    "format.kv.bits=4 and format.kv.clip_k=0.95": Scheme(weight=G64, kv=replace(KV4, clip_k=0.95)),
    "format.kv.bits=8 and format.kv.symmetric=True": Scheme(
        weight=G64, kv=replace(KV4, bits=8, symmetric=True)
    ),
}


@pytest.mark.parametrize("field", REFUSED)
def test_formats_that_the_layout_cannot_hold(field):
    context = tiny_shape(REFUSED[field])
    with pytest.raises(
        ConfigError,
        match=f"^{re.escape(field)}.* with export=compressed_tensors: .* use export=harness",
    ):
        CompressedTensors().check(REFUSED[field], [Identity()], context)


@pytest.mark.parametrize(
    ("transform", "left"),
    [
        (HadamardBlocks(), "a matrix at attn_in"),
        (QuaRot(), "R4"),
        (QuaRot(r4="off", online_heads=True), "a mix of heads"),
    ],
)
def test_what_stays_online_is_refused(transform, left):
    scheme = Scheme(weight=NV, act=NV_ACT)
    with pytest.raises(
        ConfigError,
        match=f"transform=.* with export=compressed_tensors: .*{left}.* use export=harness",
    ):
        CompressedTensors().check(scheme, [Identity(), transform], tiny_shape(scheme))


def test_what_is_served_otherwise_is_warned_of():
    scheme = Scheme(weight=FourOverSix(), act=NV_ACT, kv=KV4 if CACHED else None)
    context = tiny_shape(scheme)
    words = [*["kv"][:CACHED], "FourOverSix", "served in bfloat16 and evaluated in"]
    for dtype in ("float32", "float16", "auto", "bfloat16"):
        warned = CompressedTensors().check(scheme, [], context, dtype)
        expected = words[:-1] if dtype == "bfloat16" else words
        assert [next(word for word in words if word in each) for each in warned] == expected
    assert CompressedTensors().check(Scheme(weight=NV), [], context, "float32") == []
    assert CompressedTensors().check(Scheme(weight=G64, act=token()), [], context, "float16") == []


def test_a_cache_that_nothing_would_quantize_is_refused(tmp_path, monkeypatch):
    scheme = Scheme(kv=KV4)
    monkeypatch.setattr(
        layouts, "cache_refusal", lambda: "one does not find the cache of the other"
    )
    with pytest.raises(
        ConfigError, match=r"format\.kv\.bits=4 with export=compressed_tensors: one does not find"
    ):
        CompressedTensors().check(scheme, [], tiny_shape(scheme))
    monkeypatch.setattr(
        checkpoint_source, "cache_refusal", lambda: "one does not find the cache of the other"
    )
    scheme = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 4}}
    (tmp_path / "config.json").write_text(
        json.dumps(Tiny().facts() | {"quantization_config": scheme})
    )
    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"kv_cache_scheme: one does not find"):
        CheckpointModel(path=str(tmp_path)).check()
    assert CompressedTensors().check(Scheme(weight=NV), [], tiny_shape(Scheme(weight=NV))) == []
