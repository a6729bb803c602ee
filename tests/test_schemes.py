"""Schemes: the key/value cache's parts and groups, and formats of single linears."""

import pytest
from number_formats import FORMATS, data, identical

from harness.config.errors import ConfigError
from harness.formats import Integer, KVCache, Scheme


def test_cache_groups():
    x = data(2, 3, 5, 16).contiguous()  # batch, heads, tokens, head_dim
    per_head = KVCache().fake(x, "key")
    identical(per_head[1, 2, 4], KVCache().part("key").fake(x[1, 2, 4]))
    together = KVCache(group_size=-1).fake(x, "value")
    identical(together[1, :, 4].reshape(-1), KVCache().part("value").fake(x[1, :, 4].reshape(-1)))
    halves = KVCache(group_size=8, clip_v=0.8)
    assert halves.part("value").clip == 0.8
    assert halves.part("key").clip == 0.95
    halves.check(16, "format.kv.group_size", "head_dim")
    with pytest.raises(ConfigError, match=r"kv\.group_size=8"):
        halves.check(12, "format.kv.group_size", "head_dim")


def test_overrides_replace_one_part():
    eight = Integer(bits=8, granularity="token", role="activation")
    overrides = {(1, "mlp.down_proj"): {"act": eight}, (0, "mlp.up_proj"): {"weight": None}}
    scheme = Scheme("w4a4", FORMATS["nvfp4"], FORMATS["nvfp4_token"], overrides=overrides)
    assert scheme.part("act", 1, "mlp.down_proj") is eight
    assert scheme.part("act", 0, "mlp.down_proj") is scheme.act
    assert scheme.part("weight", 1, "mlp.down_proj") is scheme.weight
    assert scheme.weights(0, ["mlp.up_proj", "mlp.down_proj"]) == {"mlp.down_proj": scheme.weight}
    assert scheme.part("weight", None, "lm_head") is None, (
        "the head is quantized by an override only"
    )
