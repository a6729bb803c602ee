"""R3 and the quantized KV cache, seen from the model's logits and from the cache's own entries."""

import pytest
import torch
from preserved import CACHE, exact_model, logits, token_ids
from transformers.cache_utils import DynamicCache

from harness.formats import KVCache
from harness.linalg.hadamard import Hadamard, random_signs
from harness.models.adapter import Adapter
from harness.models.attention import NAME, HeadsInput, attach, cache, detach
from harness.models.merge import place
from harness.models.tiny import FAMILIES, Tiny
from harness.transforms import Placement, Rotation

IDS = token_ids(2, 16)
PREFILL = 10
PIECES = [IDS[:, :PREFILL], *IDS[:, PREFILL:].split(1, dim=1)]
GROUPS = [None, 16, -1]


def float_model(family: str = "llama") -> Adapter:
    return Adapter(Tiny(family=family).load()[0])


def order(adapter: Adapter) -> int:
    return adapter.blocks[0].self_attn.head_dim


def rotation(n: int) -> Rotation:
    return Rotation(Hadamard(n, random_signs(n, torch.Generator().manual_seed(0))))


def quantize(adapter: Adapter, *, rotated: bool = False, **knobs) -> Adapter:
    """The model with quantized keys and values, and R3 where wanted."""
    if rotated:
        place(adapter, Placement(query_key=rotation(order(adapter))))
    for heads in attach(adapter):
        heads.format = KVCache(**knobs)
    return adapter


def error(adapter: Adapter, wanted: torch.Tensor) -> float:
    return float((logits(adapter, IDS) - wanted).norm() / wanted.norm())


@torch.no_grad()
def decoded(adapter: Adapter, past) -> torch.Tensor:
    """Logits of a prefill and of every later token, one at a time."""
    pieces = [
        adapter.model(input_ids=ids, use_cache=True, **{CACHE: past}).logits for ids in PIECES
    ]
    return torch.cat(pieces, dim=1)


def close(a: torch.Tensor, b: torch.Tensor, bound: float) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=bound)


@torch.no_grad()
def plant_key_outliers(adapter: Adapter, factor: float = 30.0) -> None:
    """One pair of key channels a head grows and the queries' own pair shrinks: RoPE turns the pair,
    so q k^T stays."""
    half = order(adapter) // 2
    for block in adapter.blocks:
        for linear, by in ((block.self_attn.k_proj, factor), (block.self_attn.q_proj, 1 / factor)):
            for tensor in linear.parameters():
                tensor.view(-1, 2 * half, *tensor.shape[1:])[:, [half - 1, 2 * half - 1]] *= by


@pytest.mark.parametrize("family", FAMILIES)
def test_attaching_with_nothing_set_changes_no_bit_and_detaching_leaves_no_trace(family):
    adapter = float_model(family)
    before, names = logits(adapter, IDS), dict(adapter.model.named_modules()).keys()
    implementation = adapter.model.config._attn_implementation
    heads = attach(adapter)
    assert len(heads) == len(adapter.blocks)
    assert adapter.model.config._attn_implementation == NAME + implementation
    assert torch.equal(logits(adapter, IDS), before)
    assert [id(module) for module in attach(adapter)] == [id(module) for module in heads]
    quantize(adapter)
    for _ in range(2):
        detach(adapter)
        assert adapter.model.config._attn_implementation == implementation
        assert dict(adapter.model.named_modules()).keys() == names
        assert torch.equal(logits(adapter, IDS), before)


def test_one_model_with_quantized_keys_leaves_its_twin_alone():
    one, other = float_model(), float_model()
    before = logits(other, IDS)
    assert error(quantize(one, bits=2, rotated=True), before) > 0.01
    assert not other.model.config._attn_implementation.startswith(NAME)
    assert not any(isinstance(module, HeadsInput) for module in other.model.modules())
    assert torch.equal(logits(other, IDS), before)
    attach(other)
    detach(one)
    assert all(torch.equal(logits(adapter, IDS), before) for adapter in (one, other))


@pytest.mark.parametrize("n", [32, 48, 80])
def test_rotated_queries_and_keys_have_the_same_scores(n):
    heads = HeadsInput()
    heads.codec = rotation(n)
    q, k, v = torch.randn(
        3, 2, 4, 7, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    rotated_q, rotated_k, same_v, _ = heads(q, k, v)
    assert torch.equal(same_v, v)
    assert (rotated_k - k).abs().max() > 0.1
    close(rotated_q @ rotated_k.mT, q @ k.mT, 1e-12 * n)


@pytest.mark.parametrize("family", FAMILIES)
def test_r3_preserves_the_logits(family):
    adapter = exact_model(family)
    before = logits(adapter, IDS)
    place(adapter, Placement(query_key=rotation(order(adapter))))
    close(logits(adapter, IDS), before, 1e-10)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_more_bits_make_a_smaller_error(family, rotated):
    adapter = float_model(family)
    before = logits(adapter, IDS)
    for clip, ratio in ((0.95, 2), (1.0, 8)):
        errors = [
            error(quantize(adapter, rotated=rotated, bits=b, clip_k=clip, clip_v=clip), before)
            for b in (8, 4, 2)
        ]
        assert 0 < errors[0] < errors[1] / ratio
        assert errors[1] < errors[2] / 2


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_r3_lowers_the_error_of_keys_with_an_outlier_channel(family, group_size):
    adapter = exact_model(family)
    before = logits(adapter, IDS)
    plant_key_outliers(adapter)
    close(logits(adapter, IDS), before, 1e-10)
    knobs = {"bits": 4, "clip_k": 1.0, "clip_v": 1.0, "group_size": group_size}
    plain = error(quantize(adapter, **knobs), before)
    assert 0 < error(quantize(adapter, rotated=True, **knobs), before) < plain / 1.2


@pytest.mark.parametrize(
    "fresh", [cache, lambda adapter: DynamicCache()], ids=["quantized", "plain"]
)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_cached_decoding_equals_the_full_forward(family, exact, group_size, fresh):
    adapter = exact_model(family) if exact else float_model(family)
    before, bound = logits(adapter, IDS), 1e-10 if exact else 1e-5
    close(decoded(adapter, fresh(adapter)), before, bound)
    full = logits(quantize(adapter, rotated=True, group_size=group_size), IDS)
    assert (full - before).abs().max() > 1e-3
    close(decoded(adapter, fresh(adapter)), full, bound)


@pytest.mark.parametrize("group_size", GROUPS)
def test_generated_tokens_are_those_of_full_forwards(group_size):
    adapter = quantize(exact_model("llama"), rotated=True, group_size=group_size)
    adapter.model.generation_config.eos_token_id = None
    ids = IDS[:1, :PREFILL]
    settings = {
        "do_sample": False,
        "max_new_tokens": 8,
        "attention_mask": torch.ones_like(ids),
        "pad_token_id": 0,
    }
    found = adapter.model.generate(ids, **{CACHE: cache(adapter)}, **settings)
    for _ in range(8):
        ids = torch.cat([ids, logits(adapter, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, ids)


@torch.no_grad()
@pytest.mark.parametrize("group_size", GROUPS)
def test_a_token_is_quantized_when_it_enters_the_cache_and_never_again(group_size):
    adapter = quantize(float_model(), rotated=True, bits=2, group_size=group_size)
    past, plain, kept = cache(adapter), DynamicCache(), []
    for ids in PIECES:
        adapter.model(input_ids=ids, use_cache=True, **{CACHE: past})
        adapter.model(input_ids=ids, use_cache=True, **{CACHE: plain})
        for layer, then in zip(past.layers, kept):
            assert torch.equal(
                torch.stack([layer.keys, layer.values])[..., :-1, :], torch.stack(then)
            )
        kept = [(layer.keys.clone(), layer.values.clone()) for layer in past.layers]
    heads = attach(adapter)[0]
    once = heads.store(
        plain.layers[0].keys, plain.layers[0].values
    )  # nothing in front of the first block is quantized
    close(torch.stack(kept[0]), torch.stack(once), 1e-6)
    group = kept[0][0][0, :, 0].flatten()[: {None: order(adapter), 16: 16, -1: None}[group_size]]
    assert 1 < len(group.unique()) <= 4


def test_gradients_pass_the_quantizer_to_what_the_keys_are_made_of():
    adapter, leaves = float_model(), []

    def leaf(_, args):
        leaves.append(args[0].detach().requires_grad_())
        return (leaves[-1],)

    for block in adapter.blocks:
        block.self_attn.k_proj.register_forward_pre_hook(leaf)
    found = []
    for knobs in (None, {"bits": 8}, {"bits": 4}):
        leaves.clear()
        adapter = adapter if knobs is None else quantize(adapter, **knobs)
        adapter.model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        found.append(torch.cat([x.grad.flatten() for x in leaves]))
        assert all(x.grad.isfinite().all() and x.grad.abs().max() > 0 for x in leaves)
    assert torch.cosine_similarity(found[0], found[1], dim=0) > 0.99
    assert torch.cosine_similarity(found[0], found[2], dim=0) > 0.7
