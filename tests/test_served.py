"""What an engine computes with: the linears, heads and embeddings of a checkpoint are ours in every
bit; what it would compute otherwise is refused."""

import pytest
import torch
from engines import PACKED, checkpoints, served, states
from test_checkpoint import CASES
from torch import nn

import harness
from harness.engines.served import apart
from harness.formats import FP8, NVFP4, KVCache
from harness.models.engine import FAMILIES, refusal

SERVED = ("adacodec", "mixed", "pca", "rotations", "static nvfp4 cache")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{case: its checkpoint}, each made once."""
    return checkpoints(tmp_path_factory, CASES)


@pytest.mark.parametrize("case", SERVED)
def test_a_fused_linear_is_its_parts_in_every_bit(case, folders):
    model, _ = harness.load(folders(case))
    ours = served(folders(case))
    for block in ("model.layers.0", "model.layers.1"):
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            owner, _, leaf = f"{block}.{name}".rpartition(".")
            parts = [model.get_submodule(f"{owner}.{part}") for part in PACKED.get(leaf, [leaf])]
            x = states(7, parts[0].in_features)
            # each by itself: a site's own text is read from memory of its own
            wanted = torch.cat([part(x.clone()) for part in parts], dim=-1)
            assert torch.equal(ours.fused(f"{block}.{name}", PACKED)(x), wanted), name
    x = states(5, model.config.hidden_size)
    assert torch.equal(ours.head(x), model.get_output_embeddings()(x))
    ids = torch.arange(9)
    looked_up = nn.functional.embedding(ids, ours.embedding)
    assert torch.equal(looked_up, model.get_input_embeddings()(ids))


def test_what_parts_share_is_encoded_and_quantized_once(folders, monkeypatch):
    fused = served(folders("adacodec")).fused("model.layers.0.self_attn.qkv_proj", PACKED)
    site = fused.parts[0].site
    assert [part.site for part in fused.parts] == [site] * 3
    seen, encode = [], type(site).encode
    monkeypatch.setattr(type(site), "encode", lambda self, x: (seen.append(x), encode(self, x))[1])
    for tokens in (3, 4):
        fused(states(tokens, fused.parts[0].in_features))
    assert [len(x) for x in seen] == [3, 4]


@pytest.mark.parametrize("case", ["rotations", "static nvfp4 cache"])
def test_attention_gets_what_ours_gets(case, folders):
    """Heads of tokens in a row, as engines lay them, against [B, heads, T, head_dim]."""
    model, _ = harness.load(folders(case))
    attention = model.get_submodule("model.layers.1.self_attn")
    size = attention.head_dim
    heads = served(folders(case)).heads("model.layers.1.self_attn.attn", size)
    assert heads is not None
    laid = [states(1, count, 11, size) for count in (6, 2, 2)]
    wanted = attention.heads_input(*laid)[:3]
    assert not torch.equal(wanted[1], laid[1])
    got = heads(*(x[0].transpose(0, 1).reshape(11, -1) for x in laid))
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one.view(11, -1, size).transpose(0, 1), other[0])


def test_attention_is_left_alone_where_nothing_acts_there(folders):
    assert served(folders("pca")).heads("model.layers.0.self_attn.attn", 32) is None


@pytest.mark.parametrize("case", ["mixed", "rotations"])
def test_an_engine_reads_norms_and_nothing_else(case, folders):
    from harness.models.weights import tensor_files

    others = served(folders(case)).others()
    left = {name for name in tensor_files(folders(case)) if not others.search(name)}
    model, _ = harness.load(folders(case))
    norms = {name for name, _ in model.named_parameters() if "norm" in name}
    assert left == norms
    assert all(not others.search(name.removeprefix("model.")) for name in norms)


@pytest.mark.parametrize(
    ("family", "kv", "why"),
    [
        ("deepseek_v3", None, "model_type=deepseek_v3"),
        ("gemma3", None, "only layers of gemma3_text, llama"),
        (None, None, "model_type=None"),
        ("llama", KVCache(bits=4, window=32, key_axis="channel", group_size=32), "window=32"),
    ],
)
def test_what_an_engine_computes_otherwise_is_refused(family, kv, why):
    assert why in (refusal(family, kv) or "")


def test_what_it_computes_alike_is_taken():
    assert {refusal(family, KVCache(bits=4)) for family in FAMILIES} == {None}
    token = FP8(granularity="token", role="activation")
    tensor = NVFP4(scope="tensor", role="activation")
    assert apart({"a": token}, alone=False) is None
    assert apart({"a": token, "b": tensor}, alone=True) is None
    assert "scales at b span tokens" in (apart({"a": token, "b": tensor}, alone=False) or "")
