"""WUSH: both sides of a product get equal second moments, at the least product of traces."""

import json

import pytest
import torch
import zoo
from composed import done
from preserved import exact_model, logits, tiny_shape, token_ids
from safetensors.torch import load_file

from harness.calibration.subject import StreamedModel
from harness.config.build import build, option
from harness.config.errors import ConfigError
from harness.formats import MX, NVFP4, Format, Integer, Scheme
from harness.linalg.hadamard import hadamard
from harness.linalg.stiefel import random_orthogonal
from harness.models.adapter import Adapter, shape_of
from harness.models.merge import place, swap
from harness.models.tiny import FAMILIES
from harness.transforms.wush import Wush, closed_form

F64 = torch.float64
IDS, WINDOWS = token_ids(), token_ids(4, 32, seed=2)
NV = Scheme(weight=NVFP4(), act=NVFP4(role="activation"))
WAYS = [
    {},
    {"block_size": 32},
    {"share": "blocks"},
    {"share": "site"},
    {"merge": True},
    {"share": "blocks", "merge": True},
    {"share": "site", "merge": True, "block_size": 4},
]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def moments(nb=3, g=16, seed=0):
    """C_x, C_w [nb, g, g] of features of unlike scales, and of directions of their own."""
    found = []
    for side in range(2):
        mix = normal(nb, g, g, seed=10 * seed + side) * 10 ** (0.5 * normal(nb, 1, g, seed=side))
        found.append(mix @ mix.mT / g)
    return found


def trace(c):
    return c.diagonal(dim1=-2, dim2=-1).sum(-1)


def root(c):
    """The symmetric C^(1/2)."""
    values, vectors = torch.linalg.eigh(c)
    return vectors * values.clamp_min(0).sqrt()[..., None, :] @ vectors.mT


def cost(encoder, inputs, weights):
    """tr(E^T C_x E) tr(D C_w D^T)."""
    decoder = torch.linalg.inv(encoder)
    return trace(encoder.mT @ inputs @ encoder) * trace(decoder @ weights @ decoder.mT)


def close(a, b, rtol=1e-8):
    assert float((a - b).abs().max()) <= rtol * float(b.abs().max())


# the closed form


@pytest.mark.parametrize("g", [4, 12, 16, 32])
def test_both_sides_get_the_same_flat_second_moments(g):
    inputs, weights = moments(g=g)
    encoder, decoder = closed_form(inputs, weights, 0.0)
    close(encoder @ decoder, torch.eye(g, dtype=F64).expand_as(encoder))
    turned = encoder.mT @ inputs @ encoder
    close(turned, decoder @ weights @ decoder.mT, 1e-6)
    # E E^T is the one positive definite P with P C_x P = C_w
    both = encoder @ encoder.mT
    close(both @ inputs @ both, weights, 1e-6)
    # flat: all features as large as one another
    powers = turned.diagonal(dim1=-2, dim2=-1)
    close(powers, powers.mean(-1, keepdim=True).expand_as(powers), 1e-6)


def test_the_product_of_traces_is_the_squared_nuclear_norm_and_no_less_is_found():
    inputs, weights = moments()
    encoder, _ = closed_form(inputs, weights, 0.0)
    least = torch.linalg.svdvals(root(inputs) @ root(weights)).sum(-1).square()
    close(cost(encoder, inputs, weights), least, 1e-6)
    orthogonal = [random_orthogonal(16, torch.Generator().manual_seed(i)) for i in range(5)]
    others = [torch.eye(16, dtype=F64), hadamard(16), *orthogonal]
    others += [normal(16, 16, seed=i) for i in range(20)]
    # and close by
    others += [
        encoder @ (torch.eye(16, dtype=F64) + 0.1 * normal(16, 16, seed=i)) for i in range(9)
    ]
    for other in others:
        assert (cost(other.expand_as(encoder), inputs, weights) >= least * (1 - 1e-9)).all()
    assert (cost(hadamard(16).expand_as(encoder), inputs, weights) > 2 * least).all()


def test_damping_is_that_of_the_inputs_and_of_s():
    """C_x + d I in place of C_x, and S + d' in place of S: E^T C E = H^T S' H."""
    inputs, weights = moments(g=8)
    encoder, decoder = closed_form(inputs, weights, 0.05)
    level = 0.05 * trace(inputs) / 8
    inputs = inputs + level[:, None, None] * torch.eye(8, dtype=F64)
    s = torch.linalg.svdvals(root(inputs) @ root(weights))
    damped = s + 0.05 * s.mean(-1, keepdim=True)
    for turned, expected in (
        (encoder.mT @ inputs @ encoder, damped),
        (decoder @ weights @ decoder.mT, s.square() / damped),
    ):
        close(torch.linalg.eigvalsh(turned).flip(-1), expected.sort(-1, descending=True)[0], 1e-6)


def test_few_tokens_and_features_that_are_never_on():
    rows, heavy = normal(3, 16), normal(2, 16, seed=1)
    inputs = torch.stack([rows.T @ rows, torch.zeros(16, 16, dtype=F64), rows.T @ rows])
    weights = torch.stack([heavy.T @ heavy, heavy.T @ heavy, torch.zeros(16, 16, dtype=F64)])
    for encoder, decoder in zip(*closed_form(inputs, weights, 0.01)):
        assert encoder.isfinite().all() and decoder.isfinite().all()
        close(encoder @ decoder, torch.eye(16, dtype=F64))


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_the_error_of_a_quantized_product_falls(name):
    """Inputs and weights of directions of their own in every block: against the Hadamard matrix,
    which knows of none."""
    section = option("format", name)
    act, weight = (build(section[part], f"format.{part}", Format) for part in ("act", "weight"))
    g = act.group_size
    bent = [
        10 ** (0.5 * normal(4, 1, g, seed=i))
        * random_orthogonal(g, torch.Generator().manual_seed(i))
        for i in (1, 2)
    ]
    x, w = (
        (normal(rows, 4, g, seed=rows).transpose(0, 1) @ b.mT).transpose(0, 1).flatten(1)
        for rows, b in zip((512, 64), bent)
    )

    def blocks(rows):
        cut = rows.unflatten(1, (4, g)).transpose(0, 1)
        return cut.mT @ cut / len(rows)

    def error(encoder, decoder):
        read, kept = (
            (rows.unflatten(1, (4, 1, g)) @ matrix).flatten(1).float()
            for rows, matrix in ((x, encoder), (w, decoder.mT))
        )
        y = act.dynamic().fake(read).double() @ weight.fake(kept).double().T
        return float((y - x @ w.T).square().sum() / (x @ w.T).square().sum())

    wush = error(*closed_form(blocks(x), blocks(w), 0.01))
    assert wush < 0.5 * error(hadamard(g), hadamard(g).T)


# on a model


def subject(adapter):
    return StreamedModel(adapter, WINDOWS)


def fitted(adapter, scheme=NV, **settings):
    transform = Wush(**settings)
    shape = shape_of(adapter.structure, scheme)
    assert transform.check(shape) == [] or "block_size" in settings
    return transform.fit(shape, subject(adapter))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_logits_stay(family, way):
    adapter = exact_model(family)
    before = logits(adapter, IDS)
    swap(adapter)
    placement = fitted(adapter, **way)
    o_in = {(layer, "o_in") for layer in range(2)}
    everywhere = {(layer, site) for layer in range(2) for site in adapter.structure.widths}
    assert set(placement.merged) == (o_in if way.get("merge") else set())
    assert set(placement.online) == everywhere - set(placement.merged)
    place(adapter, placement)
    assert float((logits(adapter, IDS) - before).abs().max()) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "phi3", "gpt2", "falcon_h1"])
def test_logits_of_other_architectures_stay(name):
    """Experts have one matrix for all of them, and their router, which reads the site as it is,
    stays out of it."""
    model = zoo.make(name)
    before = model(token_ids(2, 64), use_cache=False).logits
    adapter = Adapter(model)
    swap(adapter)
    place(adapter, fitted(adapter))
    after = model(token_ids(2, 64), use_cache=False).logits
    assert float((after - before).abs().max()) < 1e-4 * float(before.abs().max())


def recorded(adapter, linear):
    """What a linear reads of WINDOWS, [tokens, n]."""
    rows = []
    handle = linear.register_forward_pre_hook(lambda _, args: rows.append(args[0].detach()))
    logits(adapter, WINDOWS)
    handle.remove()
    return torch.cat(rows).flatten(0, -2).double()


def cut(rows, g=16):
    blocks = rows.unflatten(1, (-1, g)).transpose(0, 1)
    return blocks.mT @ blocks / len(rows)


def test_moments_are_those_of_what_the_linears_of_a_site_read_and_of_all_their_rows():
    adapter = exact_model("qwen3")
    swap(adapter)
    block = adapter.blocks[1]
    attention = block.self_attn
    own, whole, site = (fitted(adapter, share=s).online for s in ("none", "blocks", "site"))
    inputs = cut(recorded(adapter, attention.q_proj))
    weights = cut(torch.cat([getattr(attention, f"{n}_proj").weight for n in "qkv"]))
    codec = own[1, "attn_in"]
    # P C_x P = C_w but for the damping: compared with the formula's own E E^T
    encoder, _ = closed_form(inputs, weights, 0.01)
    close(codec.encoder @ codec.encoder.mT, encoder @ encoder.mT, 1e-4)
    encoder, _ = closed_form(inputs.mean(0), weights.mean(0), 0.01)
    shared = whole[1, "attn_in"].encoder
    assert shared.shape == (16, 16) and torch.equal(shared, shared.bfloat16().double())
    close(shared @ shared.mT, encoder @ encoder.mT, 0.02)
    assert not torch.equal(shared, whole[0, "attn_in"].encoder)
    assert torch.equal(site[0, "down_in"].encoder, site[1, "down_in"].encoder)
    assert not torch.equal(site[0, "down_in"].encoder, site[0, "mlp_in"].encoder)


def test_experts_stand_for_one_linear_and_their_router_for_none():
    adapter = Adapter(zoo.make("mixtral"))
    swap(adapter)
    mlp = adapter.blocks[1].mlp
    codec = fitted(adapter).online[1, "mlp_in"]
    # two of four experts read each token: all of them together read each twice
    inputs = cut(recorded(adapter, mlp.gate))
    weights = cut(torch.cat([linear.weight for linear in mlp.experts.gate_up_proj]).double())
    encoder, _ = closed_form(inputs, weights, 0.01)
    close(codec.encoder @ codec.encoder.mT, encoder @ encoder.mT, 1e-3)


def test_values_take_the_matrix_of_a_head():
    """Two value heads, three query heads on each, which share what their value head takes."""
    adapter = exact_model("llama")
    swap(adapter)
    attention = adapter.blocks[0].self_attn
    o, v = attention.o_proj.weight.clone(), attention.v_proj.weight.clone()
    per_head = [
        cut(rows).unflatten(0, (2, 3, 2)).mean(1).flatten(0, 1)
        for rows in (recorded(adapter, attention.o_proj), o)
    ]
    placement = fitted(adapter, merge=True)
    codec = placement.merged[0, "o_in"]
    assert codec.encoder.shape == (4, 16, 16)
    encoder, _ = closed_form(*per_head, 0.01)
    close(codec.encoder @ codec.encoder.mT, encoder @ encoder.mT, 1e-4)
    # v alone is moved, nothing of it by attn_in's matrix
    place(adapter, type(placement)(merged=placement.merged))
    close(attention.v_proj.weight, torch.block_diag(*codec.encoder).T @ v)
    assert not torch.allclose(attention.o_proj.weight, o)


@pytest.mark.parametrize("scheme, g", [
    (NV, 16),
    (Scheme(weight=NVFP4(), act=MX(role="activation")), 32),
    (Scheme(weight=MX()), 32),
    (Scheme(act=Integer(bits=8, granularity="token", role="activation"), weight=NVFP4()), 16),
    (Scheme(), 64),
])  # fmt: skip
def test_blocks_are_the_formats_groups(scheme, g):
    assert Wush().order(tiny_shape(scheme)) == g
    assert Wush(block_size=12).order(tiny_shape(scheme)) == 12


@pytest.mark.parametrize("settings, words", [
    ({"block_size": 7}, r"transform\.block_size=7 does not divide site attn_in .*: 64, 32, 16"),
    ({"block_size": 6}, r"transform\.block_size=6: no Hadamard matrix"),
    ({"block_size": True}, r"transform\.block_size=True: needs a whole number"),
    ({"block_size": "full"}, r"transform\.block_size=full: needs a whole number"),
    ({"block_size": 64, "merge": True}, r"transform\.merge=true: blocks of 64 .* 32 values"),
    ({"damp": 0}, r"transform\.damp=0"),
    ({"share": "layers"}, r"transform\.share=layers"),
    ({"merge": "o_in"}, r"transform\.merge=o_in"),
])  # fmt: skip
def test_refusals_name_the_field(settings, words):
    with pytest.raises(ConfigError, match=f"^{words}"):
        Wush(**settings).check(tiny_shape(NV))


def run(tmp_path, *overrides):
    return done(tmp_path, "transform=wush", "solver=rtn", *overrides)


def test_what_is_learned_is_that_of_a_group(tmp_path):
    """Whatever else the format is."""
    sources = []
    for settings in (["format=nvfp4"], ["format=mxfp4"], ["format=fouroversix"],
                     ["format=mxfp8"], ["format=int4", "format.weight.group_size=16"]):  # fmt: skip
        outcome = run(tmp_path, *settings)
        lines = (outcome.run.path / "events.jsonl").read_text().splitlines()
        (event,) = [e for e in map(json.loads, lines) if e["event"] == "placement"]
        sources.append(event["source"])
    assert sources == ["learned", "learned", "store", "store", "store"]


def test_fp_quant_holds_one_matrix_a_site(tmp_path):
    """And reads inputs with the very matrix that was evaluated."""
    act = ["format=mxfp4", "format.act.mx_scale=fpquant"]
    export = ["export=fp_quant", f"export.path={tmp_path / 'o'}", "transform.share=blocks"]
    outcome = run(tmp_path, *act, *export, f"transform.save={tmp_path / 'kept.safetensors'}")
    written = load_file(f"{outcome.metrics['export']['path']}/model.safetensors")
    kept = load_file(tmp_path / "kept.safetensors")
    encoder = kept["online.1.down_in.encoder"]
    held = written["model.layers.1.mlp.down_proj.forward_hadamard_matrix"]
    assert torch.equal(held.double(), encoder) and held.shape == (32, 32)
    close(encoder @ kept["online.1.down_in.decoder"], torch.eye(32, dtype=F64))


@pytest.mark.parametrize("way", ["transform.share=none", "transform.merge=true"])
def test_fp_quant_holds_no_other(tmp_path, way):
    settings = ["format=mxfp4", "format.act.mx_scale=fpquant", "transform.share=site", way]
    with pytest.raises(ConfigError, match=r"^transform=wush .* transform\.share=blocks"):
        run(tmp_path, *settings, "export=fp_quant", f"export.path={tmp_path / 'o'}")


@pytest.mark.parametrize("way", [[], ["transform.merge=true", "transform.share=site"]], ids=str)
def test_a_run_is_written_and_loaded_back(tmp_path, way):
    outcome = run(tmp_path, "format=nvfp4", "export=harness", f"export.path={tmp_path / 'o'}", *way)
    notes = outcome.metrics["notes"]
    assert notes["gate"]["max"] < 1e-4 and notes["block_size"] == 16
    sites = [192, 192, 384] if way else [192, 192, 192, 384]
    linears = 2 * (192 * 192 + 192 * 64) + 3 * 192 * 384
    assert outcome.metrics["online"] == pytest.approx(16 * sum(sites) / linears)
