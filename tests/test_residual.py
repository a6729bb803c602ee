"""Residual channels: y is the product of n + k features, and what is counted are n + k."""

import copy

import pytest
import torch
import zoo
from composed import done, small
from preserved import exact_model, logits, tiny_shape, token_ids
from test_wush import recorded

from harness.calibration.stream import Stream
from harness.calibration.subject import StreamedModel
from harness.checkpoints.native import load
from harness.config.build import build, option
from harness.config.errors import ConfigError
from harness.formats import MX, NVFP4, Format, Integer, Scheme
from harness.models.adapter import Adapter, shape_of
from harness.models.merge import place, swap
from harness.models.quant_linear import QuantLinear, SiteInput
from harness.models.tiny import FAMILIES, Tiny
from harness.pipeline.job import execute
from harness.quantize.gathering import Gathering
from harness.solvers import GPTQ
from harness.transforms import Chain, Diagonal, Permutation
from harness.transforms.residual import Residual

F64 = torch.float64
IDS, WINDOWS = token_ids(), token_ids(4, 32, seed=2)
NV = Scheme(weight=NVFP4(), act=NVFP4(role="activation"))
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def normal(*shape, seed=0):
    """Features of unlike ranges."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=F64)
    return x * 10 ** (0.5 * torch.randn(shape[-1], generator=generator, dtype=F64))


def nearest(x, points):
    """The point nearest to each element, of all of them."""
    points = torch.tensor(sorted({*points, *(-p for p in points)}), dtype=F64)
    return points[(x[..., None] - points).abs().argmin(-1)]


def nvfp4(x, amax):
    """NVFP4 in float64 under the global scale of a tensor whose max |x| is amax."""
    blocks, g = x.unflatten(-1, (-1, 16)), 2688 / amax
    u = g * blocks.abs().amax(-1, keepdim=True) / 6
    scale = u.clamp(max=448).float().to(torch.float8_e4m3fn).double() / g
    return (nearest(blocks / scale, E2M1) * scale).flatten(-2)


def mxfp4(x, amax):
    blocks = x.unflatten(-1, (-1, 32))
    scale = 2 ** (blocks.abs().amax(-1, keepdim=True).log2().floor() - 2)
    return (nearest(blocks / scale, E2M1) * scale).flatten(-2)


def int4(x, amax):
    blocks = x.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 7
    return (nearest(blocks / scale, range(8)) * scale).flatten(-2)


REFERENCES = {
    "nvfp4": (nvfp4, NVFP4(), NVFP4(role="activation")),
    "mxfp4": (mxfp4, MX(), MX(role="activation")),
    "int4": (
        int4,
        Integer(granularity="group", group_size=32),
        Integer(granularity="group", group_size=32, role="activation"),
    ),
}


# the product


@pytest.mark.parametrize("k", [32, 64, 128])
@pytest.mark.parametrize("name", REFERENCES)
def test_y_is_the_product_of_n_and_k_features(name, k):
    q, weight, act = REFERENCES[name]
    x, w, order = normal(40, 128), normal(24, 128, seed=1), torch.randperm(128)
    site = SiteInput(1)
    site.codec, site.format = Permutation(order, k), act
    linear = QuantLinear(weight.quantize(site.codec.absorb(w).float()).dequantize(), None, site)
    sorted_x, sorted_w = x.float().double()[:, order], w.float().double()[:, order]
    rounded, columns = q(sorted_x, sorted_x.abs().max()), q(sorted_w, sorted_w.abs().max())
    residual = q((sorted_x - rounded)[:, :k], sorted_x.abs().max())
    expected = torch.cat([rounded, residual], 1) @ torch.cat([columns, columns[:, :k]], 1).T
    y = linear(x.float()).double()
    assert float((y - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    site.codec = Permutation(order)
    once = linear(x.float()).double()
    assert float((once - expected).abs().max()) > 1e-3 * float(expected.abs().max())
    # nearer to what the quantized weights make of x itself
    exact = sorted_x @ columns.T
    assert (y - exact).square().sum() < (once - exact).square().sum()


@pytest.mark.parametrize("name", ["nvfp4", "fouroversix", "mxfp4", "mxfp6", "mxfp8", "fp4", "if4",
                                  "fp8", "fp8_block", "int4", "int8"])  # fmt: skip
def test_no_element_is_further_away(name):
    act = build(option("format", name)["act"], "format.act", Format).dynamic()
    x = normal(64, 256, seed=3).float()
    once, twice = act.fake(x), act.fake(x, twice=128)
    assert torch.equal(once[:, 128:], twice[:, 128:]), "the others are read as they were"
    before, after = ((x - q)[:, :128].abs() for q in (once, twice))
    assert (after <= before + 1e-6 * x[:, :128].abs()).all()
    assert float(after.square().sum()) < 0.2 * float(before.square().sum())
    # the gradient is straight through both
    x.requires_grad_()
    act.fake(x, ste=True, twice=128).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("scope", ["tensor", "token", "static"])
def test_both_parts_stand_under_one_global_scale(scope):
    """As one product has one: that of x, not of the residual, a token's where tokens have one."""
    act = NVFP4(role="activation", scope=scope)
    x = normal(5, 64, seed=4).float()
    amax = {"tensor": x.abs().max(), "token": x.abs().amax(-1, keepdim=True),
            "static": torch.tensor(300.0)}[scope]  # fmt: skip
    given = act.global_from_amax(amax) if scope == "static" else None
    rows = [amax.double().expand(5, 1)[i] for i in range(5)]
    once = torch.stack([nvfp4(row.double(), a) for row, a in zip(x, rows)])
    rest = torch.stack([nvfp4(row, a) for row, a in zip((x - once)[:, :32], rows)])
    expected = once + torch.nn.functional.pad(rest, (0, 32))
    found = act.fake(x, global_scale=given, twice=32).double()
    assert float((found - expected).abs().max()) < 1e-6 * float(x.abs().max())


def test_a_permutation_is_undone_by_its_readers_and_keeps_its_indices():
    x, w, order = normal(6, 20), normal(8, 20, seed=1), torch.randperm(20)
    codec = Permutation(order, 4).to(torch.device("cpu"), torch.bfloat16)
    assert codec.order.dtype == torch.int64 and codec.twice == 4
    matrix = torch.eye(20, dtype=F64)[:, order]
    assert torch.equal(codec.encode(x), x @ matrix)
    assert torch.equal(codec.decode(codec.encode(x)), x)
    assert torch.equal(codec.absorb(w), w @ matrix)
    assert torch.equal(codec.emit(w.T), matrix.T @ w.T)
    assert Chain([Diagonal(torch.ones(20)), codec]).twice == 4


# on a model


def fitted(adapter, scheme=NV, **settings):
    transform = Residual(**settings)
    shape = shape_of(adapter.structure, scheme)
    assert transform.check(shape) == []
    return transform.fit(shape, StreamedModel(adapter, WINDOWS))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay(family):
    adapter = exact_model(family)
    before = logits(adapter, IDS)
    swap(adapter)
    place(adapter, fitted(adapter))
    assert float((logits(adapter, IDS) - before).abs().max()) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "phi3", "gpt2", "falcon_h1"])
def test_logits_of_other_architectures_stay(name):
    model = zoo.make(name)
    before = model(token_ids(2, 64), use_cache=False).logits
    adapter = Adapter(model)
    swap(adapter)
    place(adapter, fitted(adapter))
    after = model(token_ids(2, 64), use_cache=False).logits
    assert float((after - before).abs().max()) < 1e-4 * float(before.abs().max())


@pytest.mark.parametrize(("scheme", "step"), [
    (NV, 16),
    (Scheme(weight=MX(), act=NVFP4(role="activation")), 32),
    (Scheme(act=MX(role="activation")), 32),
    (Scheme(weight=NVFP4(), act=Integer(granularity="token", role="activation")), 16),
])  # fmt: skip
def test_channels_stand_by_their_maxima_and_k_is_counted_by_the_groups(scheme, step):
    adapter = exact_model("llama")
    # unlike channels, as no tiny model has them
    gain = adapter.blocks[1].post_attention_layernorm.weight
    gain.data.mul_(10 ** (torch.randperm(192, dtype=F64) / 64))
    swap(adapter)
    peak = recorded(adapter, adapter.blocks[1].mlp.gate_proj).abs().amax(0)
    for threshold in (0.5, 0.125, 0.01, 0):
        codec = fitted(adapter, scheme, threshold=threshold).online[1, "mlp_in"]
        assert (peak[codec.order].diff() <= 0).all()
        above = sum(p > threshold * max(peak.tolist()) for p in peak.tolist())
        assert codec.twice % step == 0 and codec.twice - step < above <= codec.twice
    assert codec.twice == 192
    assert fitted(adapter, scheme, channels=64).online[1, "mlp_in"].twice == 64


def test_where_nothing_is_quantized_nothing_is_sorted():
    floats = {(1, f"self_attn.{n}_proj"): {"act": None} for n in "qkv"}
    scheme = Scheme(weight=NV.weight, act=NV.act, overrides=floats)
    adapter = exact_model("llama")
    swap(adapter)
    online = fitted(adapter, scheme).online
    assert (0, "attn_in") in online and (1, "attn_in") not in online


@torch.no_grad()
def test_a_solver_sees_both_terms():
    """H of what the linears read: both terms where hessian_input=quantized."""
    adapter = exact_model("llama")
    swap(adapter)
    place(adapter, fitted(adapter, channels=32))
    stream = Stream(adapter, WINDOWS)
    solver = GPTQ(hessian_input="quantized")
    site, arriving = next(stream.walk(adapter.blocks[0]))
    gathering = Gathering(adapter, NV, solver, 0, stream)
    hessian = gathering.gather(site, arriving).statistics.hessian.double()
    read = copy.deepcopy(adapter.blocks[0].self_attn.q_proj.site)
    x = recorded(adapter, adapter.blocks[0].self_attn.q_proj)
    for twice in (0, 32):
        z = read.codec.encode(x)
        rounded = nvfp4(z, z.abs().max())
        rounded[:, :twice] += nvfp4((z - rounded)[:, :twice], z.abs().max())
        expected = 2 / len(z) * rounded.T @ rounded
        near = float((hessian - expected).abs().max()) < 1e-4 * float(expected.abs().max())
        assert near == (twice == 32)


# a run


def run(tmp_path, *overrides):
    return done(tmp_path, "transform=residual", "solver=rtn", *overrides)


def test_bits_and_flops_are_those_of_n_and_k(tmp_path):
    metrics = run(tmp_path, "transform.channels=32").metrics
    model, _ = Tiny().load()
    bits = weights = outputs = 0
    for layer in metrics["layers"]:
        out, n = model.get_submodule(layer["name"]).weight.shape
        stored = 4.5 * out * n + 32  # and a global scale
        assert layer["bits"] == pytest.approx(stored * (1 + 32 / n), abs=1)
        bits += layer["bits"]
        weights += out * n
        outputs += out
    assert metrics["bits_per_weight"] == bits / weights
    assert metrics["online"] == pytest.approx(32 * outputs / weights)
    assert set(metrics["notes"]["residual_channels"].values()) == {32}


def test_a_budget_of_bits_holds_the_repeated_columns(tmp_path):
    auto = ["format=auto", "format.auto.candidates=[int2,int4]", "format.auto.bits_per_weight=4.6"]
    metrics = run(tmp_path, *auto, "format.weight.group_size=16", "transform.channels=32").metrics
    assert 4 < metrics["bits_per_weight"] <= 4.6


def test_errors_fall_at_every_linear(tmp_path):
    """The more channels, with the weights as they are."""
    off = ["format.weight.bits=16", "solver=none"]
    few, some, all_of_192 = (
        run(tmp_path, *off, f"transform.channels={k}").metrics["layers"] for k in (16, 64, 192)
    )
    for a, b, c in zip(few, some, all_of_192, strict=True):
        assert a["rel_error"] > b["rel_error"] > c["rel_error"]


@torch.no_grad()
def test_it_is_exported_and_loaded_back(tmp_path):
    outcome = run(tmp_path, "export=harness", f"export.path={tmp_path / 'out'}")
    folder = outcome.metrics["export"]["path"]
    model, _ = load(folder)
    assert model.model.layers[1].mlp.down_proj.site.twice > 0
    checkpoint = ["model=checkpoint", f"model.path={folder}", "format=none", "transform=identity"]
    cfg, choices = small(tmp_path, *checkpoint, "solver=none")
    again = execute(cfg, choices)
    assert again.status == "done", again.error
    quantized = outcome.metrics["stages"]["quantized"]["ppl"]
    assert again.metrics["stages"]["baseline"]["ppl"] == quantized


@pytest.mark.parametrize("format", ["compressed_tensors", "fp_quant", "dequantized"])
def test_what_cannot_hold_it_refuses(tmp_path, format):
    act = ["format=mxfp4", "format.act.mx_scale=fpquant"] if format == "fp_quant" else []
    cfg, choices = small(tmp_path, "transform=residual", f"export={format}", *act)
    with pytest.raises(ConfigError, match=rf"transform=residual with export={format}: residual ch"):
        execute(cfg, choices)


@pytest.mark.parametrize(("settings", "scheme", "words"), [
    ({}, Scheme(weight=NVFP4()), r"format\.act\.bits=16 with transform=transform"),
    ({}, Scheme(act=Integer(granularity="tensor", role="activation")), r"format\.act\.granularity"),
    ({"channels": 24}, NV, r"transform\.channels=24: site attn_in .* groups, 16, up to its 192"),
    ({"channels": 16}, Scheme(act=NV.act, weight=MX()), r"transform\.channels=16: .* groups, 32"),
    ({"channels": 208}, NV, r"transform\.channels=208"),
    ({"channels": 0}, NV, r"transform\.channels \(or auto\)=0: needs a whole number"),
    ({"channels": True}, NV, r"transform\.channels \(or auto\)=True"),
    ({"channels": "worst"}, NV, r"transform\.channels \(or auto\)=worst"),
    ({"threshold": 2}, NV, r"transform\.threshold=2"),
])  # fmt: skip
def test_refusals_name_the_field(settings, scheme, words):
    with pytest.raises(ConfigError, match=f"^{words}"):
        Residual(**settings).check(tiny_shape(scheme))
