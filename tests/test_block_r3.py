"""R3 in blocks: queries and keys are rotated within the blocks of their quantizer."""

import pytest
import torch
from preserved import exact_model, logits, shape_of, token_ids

from harness.config.errors import ConfigError
from harness.formats import KVCache, Scheme
from harness.models.attention import attach
from harness.models.merge import place, swap
from harness.transforms.quarot import QuaRot

IDS = token_ids(2, 16)
ALONE = {"r1": "off", "r2": False, "r4": "off"}
MX = Scheme(kv=KVCache(kind="mxfp4", bits=4))


def fitted(adapter, r3, scheme=MX, **knobs):
    transform = QuaRot(r3=r3, **ALONE, **knobs)
    shape = shape_of(adapter, scheme, solver=None)
    transform.check(shape)
    return transform.fit(shape, None).query_key


def dense(codec, n: int) -> torch.Tensor:
    return codec.encode(torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("block", [2, 8, 16])
def test_r3_of_a_block_size_is_block_diagonal_and_orthogonal(block):
    adapter = exact_model("llama")
    n = adapter.structure.head_dim
    assert n > block
    matrix = dense(fitted(adapter, block), n)
    blocks = matrix.view(n // block, block, n // block, block)
    for i in range(n // block):
        for j in range(n // block):
            found = blocks[i, :, j]
            if i != j:
                assert torch.equal(found, torch.zeros_like(found))
            else:
                assert torch.equal(found.abs(), torch.full_like(found, found[0, 0].abs().item()))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n).double(), rtol=0, atol=1e-12)


def test_a_block_of_the_whole_head_is_r3():
    adapter = exact_model("llama")
    n = adapter.structure.head_dim
    assert torch.equal(dense(fitted(adapter, n), n), dense(fitted(adapter, "on"), n))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_logits_stay(family):
    adapter = exact_model(family)
    before = logits(adapter, IDS)
    transform = QuaRot(r3=8, **ALONE)
    swap(adapter)
    place(adapter, transform.fit(shape_of(adapter, MX, solver=None), None))
    assert all(heads.codec is not None for heads in attach(adapter))
    torch.testing.assert_close(logits(adapter, IDS), before, rtol=0, atol=1e-10)


def test_an_outlier_stays_in_its_block():
    """Why blocks: groups of 8 beside the one with a large channel keep their scales, which a
    rotation of the whole head raises."""
    adapter = exact_model("llama")
    n = adapter.structure.head_dim
    cache = KVCache(bits=4, group_size=8, clip_k=1.0, compute_dtype="input")
    k = torch.randn(1, 1, 64, n, generator=torch.Generator().manual_seed(0)).double()
    k[..., 3] *= 200
    errors = {}
    for r3 in (8, "on"):
        codec = fitted(adapter, r3, Scheme(kv=cache))
        back = codec.decode(cache.fake(codec.encode(k), "key"))
        errors[r3] = (back - k)[..., 8:].norm()
    assert errors[8] < errors["on"] / 10


def test_auto_leaves_keys_alone_that_are_quantized_by_channel():
    adapter = exact_model("llama")
    channel = KVCache(bits=2, group_size=8, window=8, key_axis="channel")
    assert fitted(adapter, "auto", Scheme(kv=channel)) is None
    assert fitted(adapter, "auto", Scheme()) is None
    assert fitted(adapter, "auto") is not None
    assert fitted(adapter, 8, Scheme(kv=channel)) is not None


@pytest.mark.parametrize(
    ("r3", "message"),
    [
        (7, r"transform\.r3=7 does not divide the 32 features"),
        (64, r"transform\.r3=64 does not divide the 32"),
        (0, r"transform\.r3=0: needs a whole number of at least 1"),
        (-4, r"transform\.r3=-4"),
        ("half", r"transform\.r3=half: choose one of"),
    ],
)
def test_refusals_name_the_setting(r3, message):
    with pytest.raises(ConfigError, match=message):
        fitted(exact_model("llama"), r3)
