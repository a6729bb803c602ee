"""The transforms that act on each site by itself: encoder and decoder undo each other, and weights
absorb the decoder."""

import math
from itertools import product

import pytest
import torch
from composed import ROOT
from omegaconf import OmegaConf

from harness.config.build import build
from harness.config.errors import ConfigError
from harness.formats import MX, NVFP4, Integer, Scheme
from harness.linalg import hadamard
from harness.transforms import Blocks, ModelShape, Rotation, Transform
from harness.transforms.dct import dct
from harness.transforms.dst import dst
from harness.transforms.fast_food import fast_food
from harness.transforms.full import INITS, PARAMETRIZATIONS, dense
from harness.transforms.gsr import sequency, sign_changes
from harness.transforms.identity_low_rank import with_inverse
from harness.transforms.kronecker import closest

WIDTHS = {"attn_in": 192, "o_in": 288, "mlp_in": 192, "down_in": 384}
CHOSEN = ["hadamard", "dct", "dst", "gsr", "fast_food", "identity_low_rank"]
NAMES = [*CHOSEN, "full", "kronecker"]
RANDOM = {
    "hadamard": {"random_signs": True},
    "fast_food": {},
    "identity_low_rank": {},
    "full": {},
    "kronecker": {},
}
MATRICES = [
    {"parametrization": p, "init": i}
    for p, i in product(PARAMETRIZATIONS, INITS)
    if i != "hadamard"
]
CASES = [
    *((name, {}) for name in NAMES),
    *((name, {"block_size": 12}) for name in CHOSEN if name != "gsr"),
    *((name, {"block_size": "full"}) for name in ("dct", "dst", "identity_low_rank")),
    *(("full", settings) for settings in MATRICES),
    *(("kronecker", settings) for settings in MATRICES),
    ("hadamard", {"random_signs": True}),
    ("fast_food", {"block_size": 1}),
    ("fast_food", {"block_size": 96}),
    ("identity_low_rank", {"block_size": 96, "rank": 20, "alpha": 3.5}),
]
EYE = torch.eye(192, dtype=torch.float64)


def transform(name, **settings):
    options = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "transform" / f"{name}.yaml"))
    assert options.pop("name") == name
    del options["smooth"]  # a stage of its own, not the class's
    return build({**options, **settings}, "transform", Transform)


def context(widths=WIDTHS, seed=0, scheme=None, solver=None):
    shape = {"layers": 2, "heads": 9, "kv_heads": 3, "head_dim": 32}
    return ModelShape(widths=widths, scheme=scheme or Scheme(), seed=seed, solver=solver, **shape)


def codecs(name, seed=0, widths=WIDTHS, **settings):
    placement = transform(name, **settings).fit(context(widths, seed), None)
    assert set(placement.online) == {(None, site) for site in widths}
    assert not (
        placement.residual
        or placement.merged
        or placement.query_key
        or placement.encoders
        or placement.decoders
    )
    return {site: codec for (_, site), codec in placement.online.items()}


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=draw(seed), dtype=torch.float64)


def close(a, b, bound=1e-8):
    torch.testing.assert_close(a, b, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("name", "settings"),
    CASES,
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())),
)
def test_exact(name, settings):
    """x E D = x, (y D) W^T = y (W D^T)^T, (x E)(W D^T)^T = x W^T, for one and two leading
    dimensions."""
    subject = transform(name, **settings)
    assert subject.exact and not (subject.residual or subject.learned or subject.free_decoder)
    assert subject.check(context()) == []
    for site, codec in codecs(name, **settings).items():
        x, w = normal(2, 3, WIDTHS[site]), normal(5, WIDTHS[site], seed=1)
        close(codec.decode(codec.encode(x)), x)
        close(codec.decode(x[0]) @ w.T, x[0] @ codec.absorb(w).T)
        close(codec.encode(x) @ codec.absorb(w).T, x @ w.T)


def test_exact_for_hadamard_factors():
    """Widths whose own order, or whose factors, are Hadamard orders."""
    widths = {"attn_in": 64, "o_in": 144, "mlp_in": 64, "down_in": 576}
    for name, parametrization in product(("full", "kronecker"), PARAMETRIZATIONS):
        for site, codec in codecs(
            name, widths=widths, parametrization=parametrization, init="hadamard"
        ).items():
            x, w = normal(3, widths[site]), normal(5, widths[site], seed=1)
            close(codec.decode(codec.encode(x)), x)
            close(codec.encode(x) @ codec.absorb(w).T, x @ w.T)


@pytest.mark.parametrize("name", NAMES)
def test_seed_decides_every_bit(name):
    settings = RANDOM.get(name, {})
    for site, codec in codecs(name, seed=3, **settings).items():
        x = torch.eye(WIDTHS[site], dtype=torch.float64)
        assert torch.equal(codec.encode(x), codecs(name, seed=3, **settings)[site].encode(x))
        assert torch.equal(codec.encode(x), codecs(name, seed=4, **settings)[site].encode(x)) == (
            name not in RANDOM
        )


@pytest.mark.parametrize("name", NAMES)
def test_global_random_state_and_default_device_do_not_matter(name):
    before = torch.random.get_rng_state()
    with torch.device("meta"):
        made = codecs(name, **RANDOM.get(name, {}))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert made["attn_in"].encode(EYE).device.type == "cpu"


def test_sites_of_one_matrix():
    """Blocks of one order are the same at every site; a dense matrix belongs to its site."""
    for name in ("fast_food", "identity_low_rank"):
        made = codecs(name)
        assert torch.equal(made["attn_in"].encoder, made["down_in"].encoder)
    for name in ("full", "kronecker"):
        made = codecs(name)
        assert not torch.equal(made["attn_in"].encode(EYE), made["mlp_in"].encode(EYE))


@pytest.mark.parametrize("name", CHOSEN)
def test_block_choice(name):
    """96 divides all widths, so 32 is the largest of the usual blocks that does."""
    assert transform(name).orders(WIDTHS) == dict.fromkeys(WIDTHS, 32)
    assert transform(name).fit(context(), None).notes == {"block_size": [32]}
    assert transform(name, block_size="full").orders({"attn_in": 64, "down_in": 256}) == {
        "attn_in": 64,
        "down_in": 256,
    }
    with pytest.raises(
        ConfigError,
        match=r"^transform\.block_size=7 does not divide site attn_in \(192 .* site: 32, 16\.",
    ):
        transform(name, block_size=7).check(context())
    for bad in (0, -16, 2.0, True, "half", None):
        with pytest.raises(ConfigError, match=r"^transform\.block_size=.*: needs .*a whole number"):
            transform(name, block_size=bad).check(context())
    with pytest.raises(ConfigError, match=r"^transform\.block_size=auto: none of .* divides all"):
        transform(name).check(context({"attn_in": 24, "o_in": 25}))
    with pytest.raises(
        ConfigError, match=r"^transform\.block_size=3 .*: none of \(128, 64, 32, 16\)"
    ):
        transform(name, block_size=3).check(context({"attn_in": 25}))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gsr", {"block_size": 12}, r"transform\.block_size=12: .*power of two, 12 is none"),
        ("gsr", {"block_size": "full"}, r"transform\.block_size=full: .*192"),
        ("hadamard", {"block_size": 6}, r"transform\.block_size=6: no Hadamard matrix"),
        (
            "hadamard",
            {"block_size": "full"},
            r"transform\.block_size=full: no Hadamard matrix of order 184",
        ),
        ("hadamard", {"backend": "fast"}, r"transform\.backend='fast'"),
        ("hadamard", {"random_signs": 1}, r"transform\.random_signs=1"),
        ("fast_food", {"block_size": 6}, r"transform\.block_size=6: no Hadamard matrix"),
        (
            "full",
            {"init": "hadamrd"},
            r"transform\.init=hadamrd: .*Did you mean hadamard.*identity, orthogonal",
        ),
        (
            "full",
            {"parametrization": "cayley"},
            r"transform\.parametrization=cayley: .*general, orthogonal, svd",
        ),
        (
            "full",
            {"init": "hadamard"},
            r"transform\.init=hadamard: .*order 184, which a site of 184 .*orthogonal",
        ),
        ("kronecker", {"init": None}, r"transform\.init=None"),
        ("kronecker", {"parametrization": True}, r"transform\.parametrization=True"),
        (
            "kronecker",
            {"init": "hadamard"},
            r"transform\.init=hadamard: .*order 18, which a site of 288",
        ),
        ("identity_low_rank", {"rank": 0}, r"transform\.rank=0"),
        ("identity_low_rank", {"rank": 33}, r"transform\.rank=33 .*32"),
        ("identity_low_rank", {"alpha": -1}, r"transform\.alpha=-1"),
        ("identity_low_rank", {"alpha": "one"}, r"transform\.alpha=one"),
    ],
    ids=str,
)
def test_refusals_name_the_field(name, settings, message):
    widths = {"attn_in": 184} if "184" in message else WIDTHS
    with pytest.raises(ConfigError, match=f"^{message}"):
        transform(name, **settings).check(context(widths))


def test_warnings():
    nvfp4 = Scheme(weight=NVFP4(), act=NVFP4(role="activation"))
    weights, inputs = Scheme(weight=NVFP4()), Scheme(act=NVFP4(role="activation"))
    assert transform("hadamard").check(context(scheme=nvfp4, solver="gptq")) == []
    assert transform("hadamard").check(context(scheme=inputs, solver="rtn")) == []
    assert transform("dct").check(context(scheme=nvfp4, solver="rtn")) == []
    for scheme, solver in ((nvfp4, "rtn"), (weights, "rtn"), (nvfp4, "minmax")):
        (harm,) = transform("hadamard").check(context(scheme=scheme, solver=solver))
        assert "NVFP4" in harm and "RTN" in harm
    both = Scheme(
        weight=Integer(bits=4, granularity="group", group_size=96, symmetric=True),
        act=MX(role="activation"),
    )
    for name in CHOSEN:
        assert transform(name, block_size=16).check(context(scheme=both)) == [
            "transform.block_size=16 is smaller than the format's group 96",
            "transform.block_size=16 is smaller than the format's group 32",
        ]
        assert len(transform(name, block_size=32).check(context(scheme=both))) == 1
    assert transform("full").check(context(scheme=both)) == []


def test_hadamard_is_what_it_was():
    """R = diag(sigma) H with sigma drawn from (seed, order), applied fast."""
    codec = codecs("hadamard", block_size=12)["attn_in"]
    assert isinstance(codec, Rotation) and codec.matrix.signs is None
    close(codec.encode(EYE)[:12, :12], hadamard(12), 1e-15)
    signed = codecs("hadamard", block_size=12, random_signs=True)
    assert torch.equal(signed["attn_in"].matrix.signs, signed["down_in"].matrix.signs)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 32, 96, 1000])
def test_cosines_and_sines(n):
    i, k = n // 3, n // 2
    half = math.sqrt(0.5)
    cosine, sine = half if k == 0 else 1, half if k == n - 1 else 1
    scale = math.sqrt(2 / n)
    assert dct(n)[i, k].item() == pytest.approx(
        scale * cosine * math.cos(math.pi * (2 * i + 1) * k / (2 * n)), abs=1e-13
    )
    assert dst(n)[i, k].item() == pytest.approx(
        scale * sine * math.sin(math.pi * (2 * i + 1) * (k + 1) / (2 * n)), abs=1e-13
    )
    for matrix in (dct(n), dst(n)):
        close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), 1e-12)
        assert n < 3 or (matrix - matrix.T).abs().max() > 0.01
    constant = torch.full((n,), n**-0.5, dtype=torch.float64)
    close(constant @ dct(n), torch.eye(n, dtype=torch.float64)[0], 1e-12)


@pytest.mark.parametrize("n", [1, 2, 16, 32, 128])
def test_sequency_order(n):
    matrix = sequency(n)
    assert sign_changes(matrix).tolist() == list(range(n))
    columns = {tuple(column) for column in hadamard(n).T.tolist()}
    assert {tuple(column) for column in matrix.T.tolist()} == columns
    close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("n", [1, 2, 12, 32, 128, 384])
def test_fast_food_has_unit_rows_and_can_be_inverted(n):
    squares, conditions = [], []
    for seed in range(20):
        matrix = fast_food(n, draw(seed))
        squares.append(matrix.square().sum(1).mean().item())
        conditions.append(torch.linalg.cond(matrix).item())
    assert max(conditions) < 100
    assert sum(squares) / len(squares) == pytest.approx(1, abs=5 * math.sqrt(2 / 20) / n)


def test_fast_food_matrix_is_the_product():
    """B = c S H G P H D with the draws taken by hand."""
    n, generator = 12, draw(5)
    signs = 2.0 * torch.randint(2, (n,), generator=generator, dtype=torch.float64) - 1
    shuffle = torch.eye(n, dtype=torch.float64)[torch.randperm(n, generator=generator)]
    gauss = torch.randn(n, generator=generator, dtype=torch.float64)
    gauss = torch.where(gauss < 0, -1.0, 1.0) * gauss.abs().clamp(min=1 / 8)
    chi = torch.randn(n, n, generator=generator, dtype=torch.float64).norm(dim=1)
    h = hadamard(n)
    product = (
        torch.diag(chi) @ h @ torch.diag(gauss) @ shuffle @ h @ torch.diag(signs) / gauss.norm()
    )
    close(fast_food(n, draw(5)), product, 1e-14)


@pytest.mark.parametrize("init", INITS)
def test_parametrizations(init):
    n, eye = 48, torch.eye(48, dtype=torch.float64)
    general, orthogonal, svd = (dense(n, p, init, draw(1)) for p in PARAMETRIZATIONS)
    close(orthogonal @ orthogonal.T, eye, 1e-12)
    assert torch.equal(general, orthogonal) == (init != "xavier")
    if init == "identity":
        assert torch.equal(general, eye) and torch.equal(svd, eye)
        return
    if init == "hadamard":
        assert torch.equal(general, hadamard(n))
    if init == "xavier":
        assert general.std().item() == pytest.approx(n**-0.5, rel=0.1)
        assert (orthogonal.T @ general).diagonal().min() > 0
        close((orthogonal.T @ general).tril(-1), torch.zeros(n, n, dtype=torch.float64), 1e-12)
    s = torch.linalg.svdvals(svd)
    assert 0.5 - 1e-9 <= s.min() < 0.65 and 1.6 < s.max() <= 2 + 1e-9
    assert s.log2().mean().abs() < 0.4


def test_full_is_one_matrix_a_site():
    for site, codec in codecs("full", init="xavier").items():
        assert isinstance(codec, Blocks)
        assert codec.encoder.shape == codec.decoder.shape == (WIDTHS[site], WIDTHS[site])
        assert codec.encoder.dtype == codec.decoder.dtype == torch.float64
    assert codecs("full")["attn_in"].decoder is None
    assert transform("full").fit(context(), None).notes == {"block_size": [192, 288, 384]}


def test_kronecker_is_the_dense_product():
    assert [closest(n) for n in (576, 192, 384, 1536, 7, 1)] == [
        (24, 24),
        (12, 16),
        (16, 24),
        (32, 48),
        (1, 7),
        (1, 1),
    ]
    for site, codec in codecs("kronecker", init="xavier").items():
        assert (len(codec.left), len(codec.right)) == closest(WIDTHS[site])
        assert codec.left.dtype == codec.right.dtype == torch.float64
        x = normal(4, WIDTHS[site])
        close(codec.encode(x), x @ torch.kron(codec.left, codec.right), 1e-12)
        close(codec.decode(x), x @ torch.linalg.inv(torch.kron(codec.left, codec.right)))


@pytest.mark.parametrize("rank", [1, 8, 32])
def test_low_rank_and_its_inverse(rank):
    codec = codecs("identity_low_rank", rank=rank, alpha=2.0)["attn_in"]
    eye = torch.eye(32, dtype=torch.float64)
    close(codec.encoder @ codec.decoder, eye, 1e-10)
    assert torch.linalg.matrix_rank(codec.encoder - eye) == rank
    u, v = normal(32, rank), normal(rank, 32, seed=1)
    matrix, inverse = with_inverse(u, v)
    close(matrix, eye + u @ v, 0)
    close(inverse, torch.linalg.inv(matrix), 1e-9)


def test_low_rank_scale():
    """alpha = r unless given, and T - I is proportional to alpha."""
    eye = torch.eye(32, dtype=torch.float64)
    one, default, two = (
        codecs("identity_low_rank", **s)["attn_in"].encoder - eye
        for s in ({"alpha": 1}, {}, {"alpha": 16})
    )
    close(default, 8 * one, 1e-12)
    close(two, 16 * one, 1e-12)
    assert torch.equal(codecs("identity_low_rank", alpha=0)["attn_in"].encoder, eye)
