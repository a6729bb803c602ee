"""What sites are called, by what they are for.

    attn_in, o_in      what queries, keys and values read; what attention's output projection reads
    mlp_in, down_in    what the MLP reads; what its last matrix reads
    mixer_in, mixer_out    the same of a block without attention (a state space, linear attention)
    experts_in, experts_down_in    what routed experts read of mlp_in, and within themselves

Any other site is called by its first reader, `kv_b_in` for a kv_b_proj. No architecture is asked
for its name, so that `transform.r4` means the same activation in every model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """What a name follows from.

    reader: name of the first matrix. residual: it reads the residual stream. attended: it reads an
    attention's output. exits: its matrices write the residual stream. source: the site that what it
    reads is computed from. early: before the block's attention. attends: the block has one. shared:
    another site, the router's, is the same tensor.
    """

    reader: str
    residual: bool
    attended: bool
    exits: bool
    experts: bool
    early: bool
    attends: bool
    source: str | None = None
    shared: bool = False


def named(facts: Facts, others: Iterable[str]) -> str:
    """The name of a site beside `others` of its block."""
    taken = set(others)
    name = _meant(facts, taken)
    if name in taken:
        name = _by_reader(facts.reader.rpartition(".")[2])
    return name if name not in taken else f"{facts.reader}_in"


def _meant(facts: Facts, taken: set[str]) -> str:
    """The name by what the site is for."""
    if facts.attended:
        return "o_in"
    if facts.experts:
        return "experts_in" if facts.residual or facts.shared else "experts_down_in"
    if facts.residual and facts.attends:
        return "attn_in" if facts.early else "mlp_in"
    if facts.residual:
        return "mlp_in" if "mixer_in" in taken else "mixer_in"
    if facts.exits and facts.source == "mixer_in":
        return "mixer_out"
    # behind the attention; in a parallel block both parts read one site
    if facts.exits and facts.source in ("mlp_in", "attn_in") and not facts.early:
        return "down_in"
    return _by_reader(facts.reader.rpartition(".")[2])


def _by_reader(reader: str) -> str:
    """`kv_b_in` of a kv_b_proj."""
    return reader.removesuffix("_proj") + "_in"
