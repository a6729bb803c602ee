"""Codecs merged into weights: what must leave the logits alone does, what must not is seen, and
live equals merged."""

from contextlib import nullcontext
from functools import partial
from itertools import product

import pytest
import torch
from preserved import exact_model, logits, shape_of, token_ids
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from harness.calibration.subject import StreamedModel
from harness.codecs.fold import fold
from harness.config.build import build, option
from harness.config.errors import ConfigError
from harness.formats import NVFP4, Format, Integer, KVCache, Scheme
from harness.linalg.hadamard import Hadamard, hadamard
from harness.linalg.stiefel import deviation, project, qr_orth, random_orthogonal
from harness.models.adapter import Adapter
from harness.models.attention import attach
from harness.models.merge import fuse_norms, place, swap
from harness.models.quant_linear import SiteInput
from harness.models.tiny import FAMILIES, Tiny
from harness.models.unmerged import unmerged
from harness.transforms import (
    Blocks,
    Diagonal,
    Kronecker,
    ModelShape,
    Placement,
    Role,
    Rotation,
    Transform,
    merge,
)
from harness.transforms.layerwise import Ridge
from harness.transforms.learn import Descent, Orthogonal, Teacher, placed_loss
from harness.transforms.loop import held_out
from harness.transforms.pca import PCA, principal_axes
from harness.transforms.quarot import QuaRot
from harness.transforms.sampling import Covariance
from harness.transforms.smoothquant import NORM_SITES, PRODUCT_SITES, SmoothQuant

F64 = torch.float64
IDS, WINDOWS = token_ids(), token_ids(4, 32, seed=2)
INT8 = Integer(bits=8, granularity="token", role="activation")
NVFP4_ACT = build(option("format", "nvfp4")["act"], "format.act", Format)
OFF = {"r1": "off", "r2": False, "r3": "off", "r4": "off"}
ALL = {"r1": "hadamard", "r2": True, "r3": "on", "r4": "on"}
ROTATIONS = [
    OFF,
    *({**OFF, "r1": r1} for r1 in ("hadamard", "random", 12)),
    *({**OFF, key: ALL[key]} for key in ("r2", "r3", "r4")),
    *({**ALL, "r1": r1} for r1 in ("hadamard", "random", 12)),
]
PLACES = ("stream", "site")
CODECS = list(product(PLACES, ("tied", "free")))
LEARNED = [
    ("spinquant", {"r3": "on"}),
    ("spinquant", {"objective": "lm", "r1": "random"}),
    *(
        (
            "adacodec",
            {"decoder": "tied", "init": "hadamard", "lr": 1, "max_angle": 0.1, "placement": p},
        )
        for p in PLACES
    ),
]
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


# rotations


@every_model
def test_norm_fusion_keeps_logits_and_leaves_unit_norms(family, tie):
    adapter, before = prepared(family, tie)
    assert moved(adapter, before) < 1e-10
    assert adapter.head.weight is not part(adapter, adapter.structure.embedding).weight
    assert all(
        (part(adapter, n).weight == 1).all()
        for n, role in adapter.roles.items()
        if role.kind == "norm"
    )


@every_model
@pytest.mark.parametrize("options", ROTATIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_rotations_keep_logits(family, tie, options):
    adapter, before = prepared(family, tie)
    placement = put(adapter, QuaRot(**options))
    assert placement.notes["rotations"] == [
        name.upper() for name in OFF if options[name] not in ("off", False)
    ]
    assert moved(adapter, before) < 1e-10


@every_model
def test_rotations_keep_logits_of_stock_float32(family, tie):
    adapter, before = prepared(family, tie, model=stock)
    put(adapter, QuaRot(**ALL))
    assert 0 < moved(adapter, before) < 1e-4


@every_family
def test_codecs_chained_at_one_site_keep_logits(family):
    """A rotated residual stream, a merged codec and an online one, which do not commute, at each
    site."""
    adapter, before = prepared(family)
    context = shape_of(adapter)
    scales = {
        (None, site): Diagonal(normal(n).exp())
        for site, n in context.widths.items()
        if site != "o_in"
    }
    values = {
        (None, "o_in"): Blocks(orthogonal(context.kv_heads, context.head_dim, context.head_dim))
    }
    online = {(None, site): Blocks(orthogonal(n, n, seed=1)) for site, n in context.widths.items()}
    place(
        adapter,
        Placement(
            Blocks(orthogonal(context.hidden, context.hidden, seed=2)), {**scales, **values}, online
        ),
    )
    assert moved(adapter, before) < 1e-10


@every_family
def test_online_heads_are_refused_where_no_hadamard_has_that_order(family):
    with pytest.raises(ConfigError, match=r"online_heads=true.*order 6"):
        QuaRot(r1="random", online_heads=True).check(shape_of(exact_model(family)))


@pytest.mark.parametrize("across", [None, random_orthogonal(4, draw())], ids=["hadamard", "random"])
def test_online_heads_leave_the_output_of_o_alone(across):
    """Four query heads on two key/value heads of 12, tokens mixed differently by each; H_12 is not
    symmetric."""
    kv, repeat, d, hidden, tokens = 2, 2, 12, 20, 5
    wide = kv * repeat * d
    context = ModelShape(
        {"attn_in": hidden, "o_in": wide, "mlp_in": hidden, "down_in": 24},
        1,
        kv * repeat,
        kv,
        d,
        Scheme(),
        0,
    )
    placement = QuaRot(r1="random", online_heads=True).fit(context, None)
    if across is not None:
        own = Kronecker(across, torch.eye(d, dtype=F64))
        placement = Placement(
            placement.residual, {(0, "o_in"): Rotation(Hadamard(d))}, {(None, "o_in"): own}
        )
    v = Role(0, "v", "linear", "attn_in", reads_residual=True, writes="o_in")
    o = Role(0, "o", "linear", "o_in", writes="residual", heads=(kv, repeat))
    x, mix = normal(tokens, hidden), normal(kv * repeat, tokens, tokens, seed=1)
    wv, bv = normal(kv * d, hidden, seed=2), normal(kv * d, seed=3)
    wo, bo = normal(hidden, wide, seed=4), normal(hidden, seed=5)

    def read_by_o(x, weight, bias):
        values = (
            (x @ weight.T + bias).view(tokens, kv, d).transpose(0, 1).repeat_interleave(repeat, 0)
        )
        return (mix @ values).transpose(0, 1).reshape(tokens, -1)

    wanted = read_by_o(x, wv, bv) @ wo.T + bo
    a = read_by_o(
        placement.residual.encode(x), merge(wv, placement, v), merge(bv, placement, v, "bias")
    )
    online = placement.encoder(0, "o_in")
    torch.testing.assert_close(online.encode(a).norm(), a.norm(), rtol=1e-12, atol=0)
    a = online.encode(a)
    found = a @ merge(wo, placement, o).T + merge(bo, placement, o, "bias")
    torch.testing.assert_close(placement.residual.decode(found), wanted, rtol=0, atol=1e-10)
    assert not torch.allclose(found, wanted, atol=0.1)


# mistakes that must be seen


@pytest.mark.parametrize("mistake", ["fused", "rotated"])
@every_family
def test_one_tensor_for_head_and_embedding_breaks_the_model(family, mistake):
    """Fused: the final norm's weight reaches the embedding. Rotated: what is shared turns once for
    each of its roles."""
    adapter, before = prepared(family)
    embedding = part(adapter, adapter.structure.embedding)
    if mistake == "fused":
        embedding.weight = adapter.head.weight
    else:
        placement = put(adapter, QuaRot(**{**OFF, "r1": "random"}))
        head = merge(embedding.weight.data, placement, adapter.roles[adapter.structure.head])
        adapter.head.weight.data, embedding.weight.data = head, head
    assert moved(adapter, before) > 0.1


@every_model
def test_a_rotation_without_norm_fusion_breaks_the_model(family, tie):
    adapter, before = prepared(family, tie, fuse=False)
    put(adapter, QuaRot(**{**OFF, "r1": "random"}))
    assert moved(adapter, before) > 0.1


@every_family
def test_absorbing_the_transpose_is_seen_with_a_paley_matrix_only(family):
    """A decoder R in place of R^T absorbs as W R^T; a symmetric Sylvester matrix hides that, so R
    must not be symmetric."""
    found = {}
    for n in (12, 64):
        adapter, before = prepared(family)
        place(adapter, Placement(residual=Blocks(hadamard(n), decoder=hadamard(n))))
        found[n] = moved(adapter, before)
    assert found[12] > 0.1
    assert found[64] < 1e-10
    assert torch.equal(hadamard(64), hadamard(64).T) and not torch.equal(
        hadamard(12), hadamard(12).T
    )


def test_forgetting_the_bias_of_v_breaks_the_model():
    adapter, before = prepared("qwen2")
    kept = [layer_part(adapter, "self_attn.v_proj", i).bias.clone() for i in range(2)]
    put(adapter, QuaRot(**{**OFF, "r2": True}))
    assert moved(adapter, before) < 1e-10
    for i, bias in enumerate(kept):
        layer_part(adapter, "self_attn.v_proj", i).bias.copy_(bias)
    assert moved(adapter, before) > 0.1


@every_family
def test_heads_tiled_instead_of_repeated_break_the_model(family):
    """A matrix of its own for each key/value head: query head j needs that of j // 3, not of j %
    2."""
    adapter, before = prepared(family)
    context = shape_of(adapter)
    matrices = orthogonal(context.kv_heads, context.head_dim, context.head_dim)
    kept = [layer_part(adapter, "self_attn.o_proj", i).weight.clone() for i in range(2)]
    place(adapter, Placement(merged={(None, "o_in"): Blocks(matrices)}))
    assert moved(adapter, before) < 1e-10
    for order, breaks in ((torch.arange(6) // 3, False), (torch.arange(6) % 2, True)):
        for i, weight in enumerate(kept):
            heads = torch.einsum("ohd,hde->ohe", weight.unflatten(1, (6, -1)), matrices[order])
            layer_part(adapter, "self_attn.o_proj", i).weight.copy_(heads.flatten(1))
        assert (moved(adapter, before) > 0.1) == breaks


@every_family
def test_subtracting_the_embedding_mean_changes_the_model(family):
    adapter, before = prepared(family)
    table = part(adapter, adapter.structure.embedding).weight.data
    table -= table.mean(-1, keepdim=True)
    assert moved(adapter, before) > 0.1


# pca and smoothquant


@every_model
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scope": "site"},
        {"block": 48},
        {"post_hadamard": True},
        {"head": False},
        {"scope": "site", "block": 12, "post_hadamard": True, "center": False},
    ],
    ids=str,
)
def test_pca_keeps_logits(family, tie, options):
    adapter, before = prepared(family, tie, fuse=False)
    placement = put(adapter, PCA(**options))
    assert len(placement.online) == (4 if options.get("scope") == "site" else 8) + options.get(
        "head", True
    )
    assert moved(adapter, before) < 1e-10


@every_model
@pytest.mark.parametrize(
    "sites", [NORM_SITES, PRODUCT_SITES, None], ids=["norms", "products", "all"]
)
def test_smoothquant_keeps_logits(family, tie, sites):
    adapter, before = prepared(family, tie, fuse=False)
    kept = {name: layer_part(adapter, f"mlp.{name}_proj").weight.clone() for name in ("gate", "up")}
    o = layer_part(adapter, "self_attn.o_proj").weight.clone()
    put(adapter, SmoothQuant(0.85, sites))
    assert moved(adapter, before) < 1e-10
    if sites == PRODUCT_SITES:
        assert torch.equal(layer_part(adapter, "mlp.gate_proj").weight, kept["gate"])
        assert not torch.equal(layer_part(adapter, "mlp.up_proj").weight, kept["up"])
        scale = (layer_part(adapter, "self_attn.o_proj").weight / o).unflatten(1, (2, 3, -1))
        torch.testing.assert_close(scale, scale[:1, :, :1].expand_as(scale), rtol=1e-12, atol=0)
        assert float(scale[0, 0, 0].std()) > 0 and not torch.allclose(
            scale[0, 0, 0], scale[0, 1, 0]
        )


@every_family
def test_smoothing_scales_are_those_of_the_channel_maxima(family):
    adapter, _ = prepared(family)
    subject, context = subject_of(adapter), shape_of(adapter)
    found = SmoothQuant(0.3, PRODUCT_SITES).fit(context, subject).merged
    for site, linear in zip(PRODUCT_SITES, ("self_attn.o_proj", "mlp.down_proj")):
        weight, rows = layer_part(adapter, linear).weight, []
        handle = layer_part(adapter, linear).register_forward_pre_hook(
            lambda _, args, rows=rows: rows.append(args[0])
        )
        logits(adapter, WINDOWS)
        handle.remove()
        x, w = rows[0].flatten(0, 1).abs().amax(0), weight.abs().amax(0)
        if site == "o_in":
            x, w = (t.unflatten(0, (2, 3, -1)).amax(1).flatten() for t in (x, w))
        torch.testing.assert_close(found[0, site].scale, x**0.3 / w**0.7, rtol=1e-5, atol=0)


@every_model
def test_smoothing_stacks_with_rotations_on_either_side(family, tie):
    for steps in (
        [SmoothQuant(0.5, PRODUCT_SITES), QuaRot(**ALL)],
        [QuaRot(**ALL), SmoothQuant(0.5, NORM_SITES)],
    ):
        adapter, before = prepared(family, tie)
        weight = layer_part(adapter, "mlp.down_proj").weight
        for step in steps:
            kept = weight.clone()
            put(adapter, step)
            assert moved(adapter, before) < 1e-10
        assert torch.equal(kept, weight) == isinstance(steps[-1], SmoothQuant)


@every_family
def test_smoothing_norm_sites_before_norm_fusion_does_nothing(family):
    plain, _ = prepared(family)
    smooth, _ = prepared(family, fuse=False)
    norm = layer_part(smooth, "input_layernorm").weight.clone()
    put(smooth, SmoothQuant(0.5, NORM_SITES))
    assert not torch.allclose(norm, layer_part(smooth, "input_layernorm").weight)
    fuse_norms(smooth)
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(smooth.model.state_dict()[name], tensor, rtol=1e-12, atol=0)


def test_principal_axes_diagonalise_what_they_were_fitted_on():
    """128 tokens at sites of 192 and more: C is rank deficient, and the axes are orthonormal all
    the same."""
    adapter, _ = prepared("qwen3")
    subject, context = subject_of(adapter), shape_of(adapter)
    where = [*context.widths, "head_in"]
    seen = subject.observe(lambda layer, site, n: Covariance(n, True), where, "")
    axes, even = (PCA(post_hadamard=h).fit(context, subject).online for h in (False, True))
    assert len(seen) == 9 and WINDOWS.numel() < 192
    for key, c in seen.items():
        v, trace = axes[key].encoder, float(c.diagonal(dim1=-2, dim2=-1).sum())
        assert deviation(v) < 1e-10
        rotated = (v.mT @ c @ v)[0]
        variances = rotated.diagonal()
        assert float((rotated - variances.diag()).abs().max()) < 1e-8 * trace
        assert (variances.diff() < 1e-12 * trace).all()
        assert (v.gather(-2, v.abs().argmax(-2, keepdim=True)) > 0).all() and torch.equal(
            v, principal_axes(c)
        )
        for seed in range(3):
            r = random_orthogonal(len(rotated), draw(seed))
            assert (
                (r.T @ c[0] @ r).diagonal().cumsum(0) <= variances.cumsum(0) + 1e-12 * trace
            ).all()
        spread = (even[key].encoder.mT @ c @ even[key].encoder)[0].diagonal()
        assert float(spread.std()) < 1e-10 * trace < float(variances.std())


# live, folded, merged


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


@every_family
@pytest.mark.parametrize(
    "act", [INT8, NVFP4(scope="token", role="activation")], ids=["int8", "nvfp4"]
)
@pytest.mark.parametrize("case", ["quarot", *CODECS], ids=str)
def test_live_equals_merged_with_quantizers_on(family, act, case):
    adapter, before = prepared(family)
    if case == "quarot":
        scheme = Scheme(act=act, kv=KVCache(bits=8))
        placement = QuaRot(**{**ALL, "r1": "random"}).fit(shape_of(adapter, scheme), None)
    else:
        scheme, seeds = Scheme(act=act), iter(range(99))
        matrices = codec_matrices(
            adapter,
            *case,
            lambda m: {n: orthogonal(*e.shape, seed=next(seeds)) for n, e in m.items()},
        )
        placement = codec_placement(adapter, case[0], matrices)
    with unmerged(adapter, placement, scheme):
        wanted = logits(adapter, IDS)
    with unmerged(adapter, placement):
        unquantized = logits(adapter, IDS)
    assert moved(adapter, before) < 1e-10
    place(adapter, placement)
    assert moved(adapter, unquantized) < 1e-10
    assert (moved(adapter, before) > 0.1) == (case[1] == "free")
    for module in adapter.model.modules():
        if isinstance(module, SiteInput):
            module.format = scheme.act.dynamic()
    for heads in attach(adapter):
        heads.format = scheme.kv
    assert moved(adapter, unquantized) > 1e-3
    assert moved(adapter, wanted) < 1e-8


@every_family
def test_the_gradient_through_fold_is_that_of_the_live_forward(family):
    """At matrices that are not orthogonal, where the loss does depend on them in every
    direction."""
    adapter = exact_model(family)
    fuse_norms(adapter)
    context = shape_of(adapter)
    shapes = [(context.hidden,) * 2, (context.layers, context.kv_heads, *(context.head_dim,) * 2)]
    leaves = [
        (orthogonal(*shape) + 0.02 * normal(*shape, seed=1)).requires_grad_() for shape in shapes
    ]

    def gradients(run):
        r1, r2 = leaves
        found = run(
            Placement(
                residual=Blocks(r1), merged={(i, "o_in"): Blocks(m) for i, m in enumerate(r2)}
            )
        )
        loss = cross_entropy(found[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    def folded(placement):
        weights = fold(
            {n: p.detach() for n, p in adapter.model.named_parameters()}, placement, adapter.roles
        )
        return functional_call(
            adapter.model, weights, kwargs={"input_ids": IDS, "use_cache": False}
        ).logits

    def lived(placement):
        with unmerged(adapter, placement):
            return adapter.model(input_ids=IDS, use_cache=False).logits

    wanted = gradients(folded)
    swap(adapter)
    for a, b in zip(gradients(lived), wanted):
        assert float(b.norm()) > 1e-3
        assert float((a - b).norm() / b.norm()) < 1e-8


# adacodec and learning


@every_family
@pytest.mark.parametrize("place_at", PLACES)
@pytest.mark.parametrize("init", ["identity", "hadamard", "pca"])
def test_adacodec_keeps_logits_where_it_starts(family, place_at, init):
    adapter, before = prepared(family)
    placement = put(
        adapter, transform("adacodec", placement=place_at, init=init, steps=0), NVFP4_ACT
    )
    assert placement.notes["codec_gap"] < 1e-10 and placement.notes["orthogonality"] < 1e-10
    assert moved(adapter, before) < 1e-8


@every_family
@pytest.mark.parametrize(("place_at", "decoder"), CODECS)
def test_adacodec_leaves_the_function_only_by_free_decoders(family, place_at, decoder):
    adapter, before = prepared(family)
    moving = codec_matrices(
        adapter, place_at, decoder, lambda m: Orthogonal(m, Descent(steps=20, batch=1, lr=0.1))
    )
    for step in range(5):
        for i, matrix in enumerate(moving.free.values()):
            matrix.grad = normal(*matrix.shape, seed=100 * step + i, dtype=torch.float32)
        moving.step()
    found = moving.snapshot()
    assert all(deviation(matrix) < 1e-5 for matrix in found.values())
    for name in (n for n in found if f"{n}^" in found):
        encoder = found[name]
        encoder = (
            encoder[:, None] if found[f"{name}^"].ndim > encoder.ndim and name != "R1" else encoder
        )
        assert float((encoder - found[f"{name}^"]).abs().amax((-2, -1)).min()) > 1e-2
    place(
        adapter,
        codec_placement(
            adapter, place_at, {name: project(matrix.double()) for name, matrix in found.items()}
        ),
    )
    assert moved(adapter, before) > 0.1 if decoder == "free" else moved(adapter, before) < 1e-8


@pytest.mark.parametrize(("objective", "lr", "improves"), [("kd", 50.0, False), ("lm", 0.1, True)])
def test_learning_returns_the_matrices_of_the_least_held_out_loss(objective, lr, improves):
    adapter, _ = prepared("llama", model=stock)
    scheme, subject = Scheme(act=NVFP4_ACT), subject_of(adapter)
    learner = transform("adacodec", objective=objective, steps=4, lr=lr, max_angle=None)
    placement = learner.fit(shape_of(adapter, scheme), subject)
    before, least = placement.notes["held_out_loss"]
    assert least < before if improves else least == before
    teacher = Teacher(subject) if objective == "kd" else None
    loss = partial(placed_loss, subject, scheme, placement, teacher)
    assert held_out(subject, loss) == pytest.approx(least, rel=1e-3)
    codecs = [
        placement.residual,
        *placement.merged.values(),
        *placement.online.values(),
        *placement.encoders.values(),
    ]
    eye = [
        torch.eye(codec.encoder.shape[-1], dtype=F64).expand_as(codec.encoder) for codec in codecs
    ]
    assert all(torch.equal(codec.encoder, start) != improves for codec, start in zip(codecs, eye))


def test_a_teacher_says_the_same_from_what_it_kept():
    adapter, _ = prepared("llama", model=stock)
    subject = subject_of(adapter)
    teacher, ids = Teacher(subject), subject.train[:1]
    wanted = adapter.model(ids, use_cache=False).logits
    assert all(torch.equal(teacher.logits(ids, again), wanted) for again in (False, True, True))
    calls = []
    handle = adapter.backbone.register_forward_hook(lambda *seen: calls.append(seen))
    teacher.logits(ids, again=True)
    teacher.logits(subject.held, again=False)
    handle.remove()
    assert len(calls) == 1


@every_family
@pytest.mark.parametrize(("name", "settings"), LEARNED, ids=str)
def test_learned_rotations_keep_logits_of_stock_float32(family, name, settings):
    adapter, before = prepared(family, model=stock)
    put(adapter, transform(name, **settings, steps=3, batch=3), NVFP4_ACT)
    assert moved(adapter, before) < 1e-4 * float(before.abs().max())


@pytest.mark.parametrize(
    "encoder", [torch.eye(32, dtype=F64), hadamard(32)], ids=["identity", "hadamard"]
)
@pytest.mark.parametrize(
    "act",
    [NVFP4_ACT.dynamic(), Integer(granularity="token", role="activation")],
    ids=["nvfp4", "int4"],
)
def test_a_ridge_decoder_lowers_the_error_of_what_it_was_fitted_on(act, encoder):
    x = (normal(512, 64) @ normal(64, 64, seed=1) + normal(64, seed=2)).float()
    codec = Blocks(encoder)
    ridge = Ridge(codec, act)
    ridge.add(x)
    decoder, error = ridge.finish()
    q = act.fake(codec.encode(x)).double()
    x = x.double()
    undecoded = float((codec.decode(q) - x).square().sum() / x.square().sum())
    assert error < undecoded
    assert error == pytest.approx(
        float((q @ decoder[0] - x).square().sum() / x.square().sum()), rel=1e-3
    )
