import math

import pytest
import torch

from harness.config.errors import ConfigError
from harness.linalg import Hadamard, factors, hadamard, random_signs
from harness.linalg.paley import constructible, paley

GAPS = (92, 116)  # the multiples of 4 up to 128 that Paley does not reach
ORDERS = [1, 2, *(n for n in range(4, 129, 4) if n not in GAPS), 344, 576, 1536]
SMALLEST_CORE = {
    36: [576],
    28: [896, 3584, 14336, 28672],
    60: [960],
    12: [768, 1536, 3072, 6144, 12288],
    20: [640, 1280, 2560, 5120, 10240],
    76: [4864, 9728],
    140: [8960, 4480],
    344: [11008, 22016],
    108: [13824, 27648],
    68: [17408],
    148: [18944],
    100: [25600, 6400, 1600],
    924: [29568],
    44: [11264],
    1: [1, 2, 64, 128, 2048, 4096, 8192],
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomized(n: int, **options) -> Hadamard:
    return Hadamard(n, random_signs(n, generator()), **options)


@pytest.mark.parametrize("n", ORDERS)
def test_every_reachable_order_is_hadamard(n):
    h = hadamard(n)
    assert h.dtype == torch.float64
    torch.testing.assert_close(
        h.abs(), torch.full((n, n), 1 / math.sqrt(n), dtype=torch.float64), rtol=0, atol=1e-15
    )
    torch.testing.assert_close(h @ h.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("n", [*ORDERS, 29568 // 32])
def test_fast_product_equals_dense(n):
    r = randomized(n)
    x = torch.randn(3, 2 * n, dtype=torch.float64, generator=generator())
    dense = torch.block_diag(r.dense(), r.dense())
    torch.testing.assert_close(r.apply(x), x @ dense, rtol=0, atol=1e-10)
    torch.testing.assert_close(r.apply_transpose(x), x @ dense.T, rtol=0, atol=1e-10)


def test_rows_times_signed_hadamard():
    """R = diag(sigma) H and not H diag(sigma): the basis vector e_i picks sigma_i times row i of
    H."""
    r = randomized(12)
    torch.testing.assert_close(
        r.apply(torch.eye(12, dtype=torch.float64)), r.signs[:, None] * hadamard(12)
    )
    assert not torch.allclose(r.dense(), hadamard(12) * r.signs)


@pytest.mark.parametrize("n", [11008, 13824, 25600])
def test_large_orders_without_the_dense_matrix(n):
    r = randomized(n)
    x = torch.randn(2, n, dtype=torch.float64, generator=generator())
    y = r.apply(x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-10, atol=0)
    torch.testing.assert_close(r.apply_transpose(y), x, rtol=0, atol=1e-10)
    core, power = factors(n)
    column = (
        r.signs * paley(core)[:, 5].repeat_interleave(power) / math.sqrt(n)
    )  # the Sylvester factor starts with ones
    torch.testing.assert_close(y[:, 5 * power], x @ column, rtol=0, atol=1e-10)


@pytest.mark.parametrize("order", [4, 8, 12, 20, 24, 28, 44, 60, 68, 140, 344])
def test_first_construction_is_not_symmetric(order):
    h = paley(order)
    assert not torch.equal(h, h.T)
    skew = h - torch.eye(order, dtype=torch.float64)
    assert torch.equal(skew, -skew.T)


@pytest.mark.parametrize("order", [36, 52, 76, 100, 148, 924])
def test_second_construction_is_symmetric(order):
    h = paley(order)
    assert torch.equal(h, h.T)
    assert torch.equal(h @ h, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize(("order", "both"), [(12, 5), (20, 9), (28, 13), (60, 29)])
def test_the_first_construction_is_preferred(order, both):
    """order/2 - 1 = `both` is a prime power, 1 mod 4: the symmetric matrix exists too and is not
    taken."""
    assert order == 2 * (both + 1) and both % 4 == 1
    assert not torch.equal(paley(order), paley(order).T)


def test_fields_of_prime_powers():
    """GF(25), GF(27), GF(49), GF(343), GF(121); 1252 = 2 (5^4 + 1) would need a fourth power."""
    for order in (2 * 26, 28, 2 * 50, 344, 2 * 122):
        h = paley(order)
        assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.float64))
    assert not constructible(1252)
    with pytest.raises(ValueError, match="1252"):
        paley(1252)


@pytest.mark.parametrize(
    ("core", "n"), [(core, n) for core, sizes in SMALLEST_CORE.items() for n in sizes]
)
def test_smallest_core_of_the_usual_dimensions(core, n):
    assert factors(n) == (core, n // core)


@pytest.mark.parametrize(
    ("n", "way_out"),
    [
        (13696, "blocks: 128, 64, 32, 16"),
        (92, "blocks: 4, 2"),
        (6, "blocks: 2"),
        (7, "not Hadamard"),
        (0, "positive"),
    ],
)
def test_unreachable_orders_name_the_way_out(n, way_out):
    with pytest.raises(ConfigError, match=way_out) as error:
        factors(n)
    assert str(n) in str(error.value)
    with pytest.raises(ConfigError):
        Hadamard(n)


def test_seed_decides_the_signs():
    assert torch.equal(random_signs(256, generator(3)), random_signs(256, generator(3)))
    assert not torch.equal(random_signs(256, generator(3)), random_signs(256, generator(4)))
    signs = random_signs(10000, generator())
    assert torch.equal(signs.abs(), torch.ones(10000, dtype=torch.float64))
    assert abs(signs.mean()) < 5 / math.sqrt(10000)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [64, 576])
def test_dtype_is_kept_and_rounded_once(dtype, n):
    r = randomized(n)
    x = torch.randn(4, n, dtype=torch.float64, generator=generator()).to(dtype)
    exact = x.double() @ r.dense()
    y = r.apply(x)
    assert y.dtype == dtype
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 4 * math.sqrt(n) * wide
    assert ((y.double() - exact).abs() <= bound).all()


def test_gradients_pass_even_if_first_used_for_inference():
    r = randomized(1020)
    with torch.inference_mode():
        r.apply(torch.ones(1, 1020))
    x = torch.randn(2, 1020, generator=generator(), requires_grad=True)
    weight = torch.randn(2, 1020, generator=generator(1))
    (r.apply(x) * weight).sum().backward()
    torch.testing.assert_close(x.grad, r.apply_transpose(weight))


def test_default_device_does_not_leak_into_the_matrix():
    with torch.device("meta"):
        r = Hadamard(1164)
        r.apply(torch.ones(1, 1164, device="cpu"))
        assert r.dense().device.type == hadamard(2048).device.type == "cpu"
    x = torch.ones(1, 1164, dtype=torch.float64)
    assert r.apply_transpose(r.apply(x)).allclose(x)


def test_settings_that_cannot_work():
    with pytest.raises(ConfigError, match="signs"):
        Hadamard(16, torch.ones(8))
    with pytest.raises(ConfigError, match="signs"):
        Hadamard(16, torch.zeros(16))
    with pytest.raises(ConfigError, match="backend='fast'"):
        Hadamard(16, backend="fast")
    with pytest.raises(ConfigError, match="does not divide"):
        Hadamard(16).apply(torch.ones(2, 24))


def test_backends_agree():
    x = torch.randn(8, 1536, generator=generator())
    reference = randomized(768, backend="torch").apply(x)
    torch.testing.assert_close(randomized(768, backend="auto").apply(x), reference)
    try:
        import fast_hadamard_transform  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="fast-hadamard-transform"):
            Hadamard(768, backend="kernel")
        return
    kernel = randomized(768, backend="kernel")
    torch.testing.assert_close(kernel.apply(x), reference)
    if torch.cuda.is_available():
        torch.testing.assert_close(kernel.apply(x.cuda()).cpu(), reference, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            kernel.apply_transpose(kernel.apply(x.cuda())).cpu(), x, rtol=1e-5, atol=1e-5
        )
