"""Fused norms, R1 to R4 and online heads leave the logits alone."""

import pytest
import torch
from prepared import (
    ALL,
    F64,
    OFF,
    draw,
    every_family,
    every_model,
    moved,
    normal,
    part,
    prepared,
    put,
    stock,
)
from preserved import exact_model, shape_of

from harness.config.errors import ConfigError
from harness.formats import Scheme
from harness.linalg.hadamard import Hadamard
from harness.linalg.stiefel import random_orthogonal
from harness.transforms import Kronecker, ModelShape, Placement, Role, Rotation, merge
from harness.transforms.quarot import QuaRot

ROTATIONS = [
    OFF,
    *({**OFF, "r1": r1} for r1 in ("hadamard", "random", 12)),
    *({**OFF, key: ALL[key]} for key in ("r2", "r3", "r4")),
    *({**ALL, "r1": r1} for r1 in ("hadamard", "random", 12)),
]


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
