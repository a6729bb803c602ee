"""Caches whose newest tokens are floats (KIVI): against decoding token by token in float64."""

from types import SimpleNamespace

import pytest
import torch
from composed import small
from preserved import CACHE, exact_model, logits, token_ids
from transformers.cache_utils import DynamicCache

from harness.config.build import option, settings
from harness.config.errors import ConfigError
from harness.formats import KVCache
from harness.linalg.hadamard import Hadamard
from harness.models.attention import HeadsInput, _attention, attach, cache
from harness.models.merge import place
from harness.pipeline.build import components
from harness.pipeline.job import execute
from harness.pipeline.plan import make_plan
from harness.transforms import Placement, Rotation

G, R = 4, 8  # tokens a group, tokens of the window
KIVI = {
    "bits": 2,
    "group_size": G,
    "key_axis": "channel",
    "window": R,
    "zp": "float_offset",
    "incl0": "never",
    "clip_k": 1.0,
    "clip_v": 1.0,
    "compute_dtype": "input",
}
TOKEN_KEYS = KIVI | {"key_axis": "token"}


def rounded(group: torch.Tensor) -> torch.Tensor:
    """A group of numbers on the four levels from its least to its greatest, which are stored in
    float32."""
    low, high = group.min(), group.max()
    step = ((high - low) / 3).float().double()
    low = low.float().double()
    return ((group - low) / step).round() * step + low


def quantized(vector: torch.Tensor) -> torch.Tensor:
    """Groups of G neighbours of a vector, each by itself."""
    return torch.cat([rounded(group) for group in vector.split(G)])


def decoded_attention(q, k, v, per_channel: bool, reach: int) -> torch.Tensor:
    """One head's output [T, D], a token at a time, as KIVI's code keeps its two caches. reach: how
    many tokens back are seen."""
    key_cache, key_window, value_cache, value_window = [], [], [], []
    out = []
    for t in range(len(q)):
        key_window.append(k[t])
        value_window.append(v[t])
        keys = torch.stack(key_cache + key_window)
        values = torch.stack(value_cache + value_window)
        scores = keys @ q[t] / q.shape[-1] ** 0.5
        scores[: max(0, t + 1 - reach)] = -torch.inf
        out.append(scores.softmax(0) @ values)
        if len(key_window) == R:
            full = torch.stack(key_window)
            rows = full.T if per_channel else full
            block = torch.stack([quantized(row) for row in rows])
            key_cache += list(block.T if per_channel else block)
            key_window = []
        if len(value_window) > R:
            value_cache.append(quantized(value_window.pop(0)))
    return torch.stack(out)


def states(tokens: int, heads: int = 4) -> list[torch.Tensor]:
    """Queries, and keys and values with an offset channel, of half as many heads."""
    draw = torch.Generator().manual_seed(tokens)
    q, k, v = (
        torch.randn(2, n, tokens, 8, generator=draw, dtype=torch.float64)
        for n in (heads, heads // 2, heads // 2)
    )
    k[..., 3] += 9
    return [q, k, v]


def masks(tokens: int, kind: str) -> tuple[torch.Tensor | None, int]:
    """A mask as a model gives it, and how far back it lets see."""
    if kind == "none":
        return None, tokens
    s = torch.arange(tokens)
    reach = 5 if kind == "sliding" else tokens
    seen = (s <= s[:, None]) & (s > s[:, None] - reach)
    if kind == "added":
        least = torch.finfo(torch.float64).min
        return torch.zeros(1, 1, tokens, tokens).double().masked_fill(~seen, least), reach
    return seen[None, None], reach


@pytest.mark.parametrize("mask", ["none", "sliding", "added"])
@pytest.mark.parametrize("tokens", [R - 1, R, R + 1, 29])
@pytest.mark.parametrize("knobs", [KIVI, TOKEN_KEYS], ids=["channel", "token"])
def test_one_forward_reads_what_decoding_reads(knobs, tokens, mask):
    heads = HeadsInput()
    heads.before = "sdpa"
    heads.format = KVCache(**knobs)
    module = SimpleNamespace(heads_input=heads, num_key_value_groups=2, is_causal=True)
    q, k, v = states(tokens)
    given, reach = masks(tokens, mask)
    out, _ = _attention(module, q, k, v, given)
    per_channel = knobs["key_axis"] == "channel"
    for b in range(2):
        for h in range(4):
            wanted = decoded_attention(q[b, h], k[b, h // 2], v[b, h // 2], per_channel, reach)
            torch.testing.assert_close(out[b, :, h], wanted, rtol=0, atol=1e-12)
    heads.format = None
    plain, _ = _attention(module, q, k, v, given)
    # the first R tokens read floats alone
    torch.testing.assert_close(out[:, :R], plain[:, :R], rtol=0, atol=1e-12)
    assert (tokens <= R) == torch.allclose(out, plain)


def test_channels_with_an_offset_lose_less_by_groups_of_their_own():
    """Why keys are taken by channel: a token's group that meets a large channel rounds the rest
    away."""
    _, k, _ = states(32)
    errors = [
        float((KVCache(**(KIVI | {"key_axis": axis})).fake(k, "key") - k).norm())
        for axis in ("channel", "token")
    ]
    assert errors[0] < errors[1] / 2


IDS = token_ids(2, 3 * R + 3)


def windowed(family: str, attention: str = "sdpa"):
    adapter = exact_model(family)
    adapter.model.set_attn_implementation(attention)
    for heads in attach(adapter):
        heads.format = KVCache(**KIVI)
    return adapter


@torch.no_grad()
def stepped(adapter, past, sizes) -> torch.Tensor:
    pieces = [
        adapter.model(input_ids=ids, use_cache=True, **{CACHE: past}).logits
        for ids in IDS.split(sizes, dim=1)
    ]
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("fresh", [cache, lambda adapter: DynamicCache()], ids=["ours", "plain"])
@pytest.mark.parametrize("prefill", [1, R - 1, R, 13])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_decoding_with_a_cache_is_the_full_forward(family, attention, prefill, fresh):
    adapter = windowed(family, attention)
    place(adapter, Placement(query_key=Rotation(Hadamard(adapter.structure.head_dim))))
    full = logits(adapter, IDS)
    for heads in attach(adapter):
        heads.format = None
    assert (logits(adapter, IDS) - full).abs().max() > 1e-3
    for heads in attach(adapter):
        heads.format = KVCache(**KIVI)
    rest = IDS.shape[1] - prefill
    sizes = [prefill, 5, *[1] * (rest - 5)]
    # the plain attention has its softmax in float32
    bound = 1e-10 if attention == "sdpa" else 1e-5
    torch.testing.assert_close(stepped(adapter, fresh(adapter), sizes), full, rtol=0, atol=bound)


@torch.no_grad()
def test_a_token_stays_float_until_the_window_is_past_it_and_is_quantized_once():
    adapter = windowed("llama")
    past, plain = cache(adapter), DynamicCache()
    kept = None
    for t, ids in enumerate(IDS.split(1, dim=1)):
        adapter.model(input_ids=ids, use_cache=True, **{CACHE: past})
        adapter.model(input_ids=ids, use_cache=True, **{CACHE: plain})
        layer, floats = past.layers[0], plain.layers[0]
        old = t - t % R, max(0, t - R)
        for x, y, count in (
            (layer.keys, floats.keys, old[0]),
            (layer.values, floats.values, old[1]),
        ):
            assert torch.equal(x[..., count:, :], y[..., count:, :])
            assert count == 0 or not torch.allclose(x[..., :count, :], y[..., :count, :])
        if kept is not None:
            for x, (before, count) in zip((layer.keys, layer.values), kept):
                assert torch.equal(x[..., :count, :], before[..., :count, :])
        kept = list(zip((layer.keys.clone(), layer.values.clone()), old))


def test_generated_tokens_are_those_of_full_forwards():
    adapter = windowed("llama")
    adapter.model.generation_config.eos_token_id = None
    ids = IDS[:1, :R]
    found = adapter.model.generate(
        ids,
        do_sample=False,
        max_new_tokens=2 * R,
        attention_mask=torch.ones_like(ids),
        pad_token_id=0,
        **{CACHE: cache(adapter)},
    )
    for _ in range(2 * R):
        ids = torch.cat([ids, logits(adapter, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, ids)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"window": 0}, ["key_axis=channel", "window=0"]),
        ({"window": 6}, ["window=6", "multiple of 4"]),
        ({"window": -1}, ["window=-1"]),
        ({"group_size": None}, ["key_axis=channel", "group_size=None"]),
        ({"group_size": -1}, ["key_axis=channel", "group_size=-1"]),
        ({"kind": "nvfp4", "bits": 4}, ["group_size=4"]),
        ({"key_axis": "head"}, ["key_axis=head"]),
        ({"incl0": "auto"}, ["incl0=auto"]),
        ({"zp": "rounded", "zp_range": "signed"}, ["incl0=never", "zp_range=signed"]),
    ],
    ids=str,
)
def test_refusals_name_the_fields(knobs, words):
    with pytest.raises(ConfigError) as refusal:
        KVCache(**(KIVI | knobs))
    assert all(word in str(refusal.value) for word in words)


SHORT = ["solver=none", "eval.perplexity.length=128", "format.kv.window=32"]


@pytest.mark.parametrize("format", ["kivi2", "kivi4"])
def test_presets_are_the_published_settings(format):
    section = option("format", format)
    kv = section["kv"]
    assert (kv["group_size"], kv["window"], kv["key_axis"]) == (32, 128, "channel")
    assert (kv["zp"], kv["incl0"], kv["symmetric"]) == ("float_offset", "never", False)
    assert kv["bits"] == int(format[-1])
    assert section["weight"]["bits"] == section["act"]["bits"] == 16


def test_runs_with_a_window(tmp_path):
    ppl = {}
    for format in ("kivi2", "kivi4"):
        cfg, choices = small(
            tmp_path,
            f"format={format}",
            *SHORT,
            "export=harness",
            f"export.path={tmp_path / format}",
        )
        outcome = execute(cfg, choices)
        assert outcome.status == "done", outcome.error
        stages = outcome.metrics["stages"]
        ppl[format] = stages["quantized"]["ppl"]["pydoc"]
        ppl["float"] = stages["baseline"]["ppl"]["pydoc"]
        again = execute(cfg, choices)
        assert again.metrics["stages"] == stages
    assert ppl["kivi2"] != ppl["kivi4"] != ppl["float"]
    assert abs(ppl["kivi4"] / ppl["float"] - 1) < 0.05


def test_texts_that_fit_the_window_are_warned_of(tmp_path):
    cfg, choices = small(tmp_path, "format=kivi2", "solver=none")
    (warning,) = components(make_plan(settings(cfg), choices)).warnings
    assert "format.kv.window=128" in warning and "eval.perplexity.length=128" in warning
