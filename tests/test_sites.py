"""Sites of a block: what feeds one, and what it is called."""

from dataclasses import replace

import pytest

from harness.structure.naming import Facts, named
from harness.structure.site import Feed


def heads_in_order(kv_heads: int, repeat: int, size: int) -> list[int]:
    """Rows of a value projection behind each feature of attention's output."""
    return [
        kv * size + feature
        for kv in range(kv_heads)
        for _ in range(repeat)
        for feature in range(size)
    ]


def test_a_feed_knows_which_value_head_each_query_head_reads():
    rows = heads_in_order(2, 3, 4)
    feed = Feed("v", tuple(rows), 8, "heads", 6)
    assert feed.grouped == (2, 3)
    assert feed.written == tuple(range(8))
    assert feed.partial is None


def test_values_may_be_a_part_of_a_fused_matrix():
    """Behind the queries and keys of all heads, or behind those of their own head."""
    behind = Feed("qkv", tuple(16 + row for row in heads_in_order(2, 2, 4)), 24, "heads", 4)
    assert behind.grouped == (2, 2)
    assert behind.partial == tuple(range(16, 24))
    own = [head * 12 + 8 + feature for head in range(3) for feature in range(4)]
    between = Feed("qkv", tuple(own), 36, "heads", 3)
    assert between.grouped == (3, 1)
    assert between.partial == tuple(own)


def test_query_heads_that_take_value_heads_in_turn_are_no_groups():
    """Rotations of value heads would be merged in another order."""
    rows = heads_in_order(2, 1, 4) * 2
    feed = Feed("v", tuple(rows), 8, "heads", 4)
    assert feed.grouped is None
    assert feed.written == tuple(range(8))


def test_a_product_has_no_heads():
    assert Feed("up", tuple(range(8)), 8, "product").grouped is None
    assert Feed("gate_up", tuple(range(8, 16)), 16, "product").partial == tuple(range(8, 16))


PLAIN = Facts("mlp.some_proj", False, False, False, False, False, True)


def facts(**changed) -> Facts:
    return replace(PLAIN, **changed)


NAMED = {
    "attn_in": facts(residual=True, early=True),
    "o_in": facts(attended=True, exits=True, source="attn_in"),
    "mlp_in": facts(residual=True),
    "down_in": facts(exits=True, source="mlp_in"),
    "mixer_in": facts(residual=True, attends=False),
    "mixer_out": facts(exits=True, attends=False, source="mixer_in"),
    "experts_in": facts(residual=True, experts=True),
    "experts_down_in": facts(exits=True, experts=True),
    "some_in": facts(),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_site_is_called_by_what_it_is_for(name):
    assert named(NAMED[name], []) == name


def test_a_parallel_block_has_a_down_in_without_an_mlp_in():
    assert named(facts(exits=True, source="attn_in"), ["attn_in", "o_in"]) == "down_in"


def test_the_mlp_of_a_block_without_attention_comes_after_its_mixer():
    second = facts(residual=True, attends=False)
    assert named(second, ["mixer_in", "mixer_out"]) == "mlp_in"


def test_no_two_sites_of_a_block_share_a_name():
    """A name that is taken gives way to the reader's, that one to the reader's whole path."""
    taken: list[str] = []
    for _ in range(3):
        taken.append(named(NAMED["down_in"], taken))
    assert taken == ["down_in", "some_in", "mlp.some_proj_in"]
