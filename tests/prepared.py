"""Tiny models made ready to be merged into, what is put into them, and how far their logits
move."""

from contextlib import nullcontext
from itertools import product

import pytest
import torch
from preserved import exact_model, logits, shape_of, token_ids

from harness.calibration.subject import StreamedModel
from harness.config.build import build, option
from harness.formats import Format, Scheme
from harness.linalg.stiefel import qr_orth
from harness.models.adapter import Adapter
from harness.models.merge import fuse_norms, place, swap
from harness.models.tiny import FAMILIES, Tiny
from harness.transforms import Transform

F64 = torch.float64
IDS, WINDOWS = token_ids(), token_ids(4, 32, seed=2)
NVFP4_ACT = build(option("format", "nvfp4")["act"], "format.act", Format)
OFF = {"r1": "off", "r2": False, "r3": "off", "r4": "off"}
ALL = {"r1": "hadamard", "r2": True, "r3": "on", "r4": "on"}
PLACES = ("stream", "site")
CODECS = list(product(PLACES, ("tied", "free")))
every_family = pytest.mark.parametrize("family", FAMILIES)
every_model = pytest.mark.parametrize(("family", "tie"), list(product(FAMILIES, (True, False))))


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=draw(seed), dtype=dtype)


def orthogonal(*shape, seed=0):
    return qr_orth(normal(*shape, seed=seed))


def stock(family, tie=True):
    """A tiny model as it is: float32, with the norms of transformers."""
    return Adapter(Tiny(family=family, tie=tie).load()[0])


def prepared(family, tie=True, fuse=True, model=exact_model):
    """A swapped model, its norms fused, and the logits it had before."""
    adapter = model(family, tie)
    before = logits(adapter, IDS)
    swap(adapter)
    if fuse:
        fuse_norms(adapter)
    return adapter, before


def subject_of(adapter, windows=WINDOWS):
    return StreamedModel(adapter, windows, lambda title, total: nullcontext(lambda note="": None))


def put(adapter, transform, act=None):
    """Fit a transform and merge what it finds."""
    placement = transform.fit(shape_of(adapter, Scheme(act=act)), subject_of(adapter))
    place(adapter, placement)
    return placement


def moved(adapter, before):
    return float((logits(adapter, IDS) - before).abs().max())


def part(adapter, name):
    return adapter.model.get_submodule(name)


def layer_part(adapter, name, layer=0):
    return part(adapter, adapter.name(layer, name))


def transform(name, **settings):
    own = {
        k: v
        for k, v in option("transform", name).items()
        if k not in ("name", "smooth", "save", "load")
    }
    return build({**own, **settings}, "transform", Transform)


def codec_matrices(adapter, placement, decoder, make):
    """Matrices of every name and shape of an AdaCodec, made from the identity it would begin
    with."""
    codec = transform("adacodec", placement=placement, decoder=decoder, block_size=16)
    return make(codec.start(shape_of(adapter), StreamedModel(adapter, token_ids())))


def codec_placement(adapter, placement, matrices):
    gains = {
        (i, site): torch.linspace(0.5, 1.5, 192).double()
        for i in range(2)
        for site in ("attn_in", "mlp_in")
    }
    subject = StreamedModel(adapter, token_ids(), gains=gains)
    return transform("adacodec", placement=placement).build(shape_of(adapter), subject, matrices)
