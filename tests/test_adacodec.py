"""AdaCodec and SpinQuant: what learning starts from and returns, which decoders may leave the
model's function, decoders fitted by ridge regression."""

from functools import partial

import pytest
import torch
from prepared import (
    CODECS,
    F64,
    NVFP4_ACT,
    PLACES,
    codec_matrices,
    codec_placement,
    every_family,
    moved,
    normal,
    prepared,
    put,
    stock,
    subject_of,
    transform,
)
from preserved import shape_of

from harness.formats import Integer, Scheme
from harness.linalg.hadamard import hadamard
from harness.linalg.stiefel import deviation, project
from harness.models.merge import place
from harness.transforms import Blocks
from harness.transforms.layerwise import Ridge
from harness.transforms.learn import Descent, Orthogonal, Teacher, placed_loss
from harness.transforms.loop import held_out

LEARNED = [
    ("spinquant", {"r3": "on"}),
    ("spinquant", {"objective": "lm", "r1": "random"}),
    *(
        (
            "adacodec",
            {"decoder": "tied", "init": "hadamard", "lr": 1, "max_angle": 0.1, "placement": p},
        )
        for p in PLACES
    ),
]


@every_family
@pytest.mark.parametrize("place_at", PLACES)
@pytest.mark.parametrize("init", ["identity", "hadamard", "pca"])
def test_adacodec_keeps_logits_where_it_starts(family, place_at, init):
    adapter, before = prepared(family)
    placement = put(
        adapter, transform("adacodec", placement=place_at, init=init, steps=0), NVFP4_ACT
    )
    assert placement.notes["codec_gap"] < 1e-10 and placement.notes["orthogonality"] < 1e-10
    assert moved(adapter, before) < 1e-8


@every_family
@pytest.mark.parametrize(("place_at", "decoder"), CODECS)
def test_adacodec_leaves_the_function_only_by_free_decoders(family, place_at, decoder):
    adapter, before = prepared(family)
    moving = codec_matrices(
        adapter, place_at, decoder, lambda m: Orthogonal(m, Descent(steps=20, batch=1, lr=0.1))
    )
    for step in range(5):
        for i, matrix in enumerate(moving.free.values()):
            matrix.grad = normal(*matrix.shape, seed=100 * step + i, dtype=torch.float32)
        moving.step()
    found = moving.snapshot()
    assert all(deviation(matrix) < 1e-5 for matrix in found.values())
    for name in (n for n in found if f"{n}^" in found):
        encoder = found[name]
        encoder = (
            encoder[:, None] if found[f"{name}^"].ndim > encoder.ndim and name != "R1" else encoder
        )
        assert float((encoder - found[f"{name}^"]).abs().amax((-2, -1)).min()) > 1e-2
    place(
        adapter,
        codec_placement(
            adapter, place_at, {name: project(matrix.double()) for name, matrix in found.items()}
        ),
    )
    assert moved(adapter, before) > 0.1 if decoder == "free" else moved(adapter, before) < 1e-8


@pytest.mark.parametrize(("objective", "lr", "improves"), [("kd", 50.0, False), ("lm", 0.1, True)])
def test_learning_returns_the_matrices_of_the_least_held_out_loss(objective, lr, improves):
    adapter, _ = prepared("llama", model=stock)
    scheme, subject = Scheme(act=NVFP4_ACT), subject_of(adapter)
    learner = transform("adacodec", objective=objective, steps=4, lr=lr, max_angle=None)
    placement = learner.fit(shape_of(adapter, scheme), subject)
    before, least = placement.notes["held_out_loss"]
    assert least < before if improves else least == before
    teacher = Teacher(subject) if objective == "kd" else None
    loss = partial(placed_loss, subject, scheme, placement, teacher)
    assert held_out(subject, loss) == pytest.approx(least, rel=1e-3)
    codecs = [
        placement.residual,
        *placement.merged.values(),
        *placement.online.values(),
        *placement.encoders.values(),
    ]
    eye = [
        torch.eye(codec.encoder.shape[-1], dtype=F64).expand_as(codec.encoder) for codec in codecs
    ]
    assert all(torch.equal(codec.encoder, start) != improves for codec, start in zip(codecs, eye))


def test_a_teacher_says_the_same_from_what_it_kept():
    adapter, _ = prepared("llama", model=stock)
    subject = subject_of(adapter)
    teacher, ids = Teacher(subject), subject.train[:1]
    wanted = adapter.model(ids, use_cache=False).logits
    assert all(torch.equal(teacher.logits(ids, again), wanted) for again in (False, True, True))
    calls = []
    handle = adapter.backbone.register_forward_hook(lambda *seen: calls.append(seen))
    teacher.logits(ids, again=True)
    teacher.logits(subject.held, again=False)
    handle.remove()
    assert len(calls) == 1


@every_family
@pytest.mark.parametrize(("name", "settings"), LEARNED, ids=str)
def test_learned_rotations_keep_logits_of_stock_float32(family, name, settings):
    adapter, before = prepared(family, model=stock)
    put(adapter, transform(name, **settings, steps=3, batch=3), NVFP4_ACT)
    assert moved(adapter, before) < 1e-4 * float(before.abs().max())


@pytest.mark.parametrize(
    "encoder", [torch.eye(32, dtype=F64), hadamard(32)], ids=["identity", "hadamard"]
)
@pytest.mark.parametrize(
    "act",
    [NVFP4_ACT.dynamic(), Integer(granularity="token", role="activation")],
    ids=["nvfp4", "int4"],
)
def test_a_ridge_decoder_lowers_the_error_of_what_it_was_fitted_on(act, encoder):
    x = (normal(512, 64) @ normal(64, 64, seed=1) + normal(64, seed=2)).float()
    codec = Blocks(encoder)
    ridge = Ridge(codec, act)
    ridge.add(x)
    decoder, error = ridge.finish()
    q = act.fake(codec.encode(x)).double()
    x = x.double()
    undecoded = float((codec.decode(q) - x).square().sum() / x.square().sum())
    assert error < undecoded
    assert error == pytest.approx(
        float((q @ decoder[0] - x).square().sum() / x.square().sum()), rel=1e-3
    )
