"""The whip loss, its three schedules on a model with outlier channels, and the even sample they
learn from."""

import math
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from preserved import shape_of, token_ids

from harness.calibration.subject import StreamedModel
from harness.linalg.hadamard import Hadamard, random_signs
from harness.linalg.stiefel import deviation, random_orthogonal
from harness.models.adapter import Adapter
from harness.models.merge import fuse_norms, swap
from harness.models.tiny import Tiny
from harness.transforms.dartquant import DartQuant
from harness.transforms.jointquant import JointQuant
from harness.transforms.qr_orth import Calibration
from harness.transforms.sampling import Reservoir
from harness.transforms.whip import SCHEDULES, whip

N = 576
LEAST = 1 / math.e
PLAN = {"lr": 0.01, "epochs": 4, "batch": 64}
KEPT = 256


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=draw(seed), dtype=torch.float64)


def randomized(n: int, seed: int = 0) -> torch.Tensor:
    return Hadamard(n, random_signs(n, draw(seed))).dense()


def unit(x: torch.Tensor) -> torch.Tensor:
    """Every row with rms 1."""
    return x / x.square().mean(-1, keepdim=True).sqrt()


def spiky(rows: int, n: int, seed: int = 0) -> torch.Tensor:
    """A few channels carry nearly all of each row."""
    return unit(normal(rows, n, seed=seed) * torch.where(torch.arange(n) % 20 == 7, 30.0, 1.0))


@contextmanager
def stage(title: str, total: int):
    yield lambda note="": None


@cache
def subject() -> StreamedModel:
    """A tiny model whose residual stream has outlier channels, as the transforms see it."""
    adapter = Adapter(Tiny(family="llama").load()[0])
    with torch.no_grad():
        adapter.backbone.embed_tokens.weight[:, 7::20] *= 30
    swap(adapter)
    fuse_norms(adapter)
    return StreamedModel(adapter, token_ids(6, 64), stage)


def learned(kind=DartQuant, seed: int = 0, **settings):
    """(R1 as a matrix, R2 a layer, notes) of a fit on the subject."""
    settings = {
        "r1": PLAN,
        "r2": None,
        "r1_targets": ("q", "up"),
        "max_tokens_per_site": KEPT,
        **settings,
    }
    r1, r2, notes = kind(**settings).matrices(shape_of(subject().adapter, seed=seed), subject())
    return r1.encoder, r2, notes


@cache
def inputs() -> torch.Tensor:
    """What q and up read in every layer, [sites, T, hidden]."""
    found = subject().observe(
        lambda layer, site, n: Reservoir(KEPT, 0, layer, site), ["attn_in", "mlp_in"], ""
    )
    return torch.stack(list(found.values()))


@pytest.mark.parametrize(
    "y, share",
    [
        (normal(2000, N), 0.523),
        (
            (torch.rand(2000, N, generator=draw(), dtype=torch.float64) * 2 - 1) * math.sqrt(3),
            0.475,
        ),
        (torch.stack([random_signs(N, draw(seed)) for seed in range(4)]), LEAST),
    ],
    ids=["gaussian", "uniform", "two-point"],
)
def test_whip_of_a_distribution_of_unit_rms(y, share):
    assert whip(y).item() == pytest.approx(share * N, rel=0.01)


def test_no_row_of_unit_rms_has_less_whip_than_one_of_equal_magnitudes():
    for y in (normal(50, 64), spiky(50, 64), unit(1 + 0.1 * normal(50, 64)), normal(50, 64).exp()):
        assert (unit(y).abs().neg().exp().sum(-1) >= 64 * LEAST - 1e-9).all()


def test_whip_does_not_see_column_signs_or_permutations():
    x, r = spiky(100, 64), random_orthogonal(64, draw(1))
    shuffled = r[:, torch.randperm(64, generator=draw(2))] * random_signs(64, draw(3))
    torch.testing.assert_close(whip(x @ shuffled), whip(x @ r), rtol=1e-13, atol=0)


def test_a_random_hadamard_lowers_the_whip_of_spikes_to_that_of_a_gaussian():
    x = spiky(200, N)
    assert whip(x) > 0.8 * N
    assert whip(x @ randomized(N)).item() == pytest.approx(0.523 * N, rel=0.02)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_training_lowers_the_whip_below_that_of_the_hadamard_start(schedule):
    r, r2, notes = learned(schedule=schedule)
    before, after = notes["r1_whip"]
    assert whip(inputs()) > 1.2 * before
    assert after < 0.99 * before
    assert whip(inputs().double() @ r).item() == pytest.approx(after, rel=1e-5)
    assert not r2
    assert deviation(r) < 1e-10


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_notes_tell_how_far_r1_moved_and_in_how_many_steps(schedule):
    start, _, none = learned(schedule=schedule, r1={**PLAN, "epochs": 0})
    assert none["r1_moved"] < 1e-4
    r, _, notes = learned(schedule=schedule)
    assert notes["schedule"] == schedule
    assert 0.1 < notes["r1_moved"] == pytest.approx(float((r - start).norm()), rel=1e-3)
    assert notes["r1_steps"] > 0


def test_schedules_differ_and_every_one_is_reproducible():
    found = {schedule: learned(schedule=schedule)[0] for schedule in SCHEDULES}
    for schedule, r in found.items():
        assert torch.equal(learned(schedule=schedule)[0], r)
        assert not torch.equal(learned(schedule=schedule, seed=1)[0], r)
        assert all((r - other).norm() > 0.01 for name, other in found.items() if name != schedule)


def test_one_clipped_step_an_epoch_hardly_leaves_the_start():
    plan = {"lr": 0.001, "epochs": 10, "batch": 64, "cosine": True}
    _, _, often = learned(JointQuant, r1=plan)
    _, _, seldom = learned(JointQuant, r1={**plan, "steps_per_epoch": 1, "grad_clip": 1.0})
    assert (seldom["r1_steps"], often["r1_steps"]) == (10, 10 * KEPT // 64)
    assert 0 < seldom["r1_moved"] < 0.05 < often["r1_moved"] / 5
    assert seldom["r1_whip"][1] < seldom["r1_whip"][0]
    assert often["r1_whip"][1] < seldom["r1_whip"][1]


@pytest.mark.parametrize("kind", [DartQuant, JointQuant])
def test_r2_is_an_orthogonal_matrix_a_head_that_lowers_its_own_whip(kind):
    still = {**PLAN, "epochs": 0}
    _, r2, notes = learned(kind, r1=still, r2=PLAN)
    _, start, _ = learned(kind, r1=still, r2=still)
    assert sorted(r2) == [0, 1]
    heads = subject().observe(lambda layer, site, n: Reservoir(KEPT, 0, layer, site), ["o_in"], "")
    losses = []
    for layer, codec in r2.items():
        assert codec.encoder.shape == (2, 32, 32)
        assert deviation(codec.encoder) < 1e-10
        for group, (old, new) in enumerate(zip(start[layer].encoder, codec.encoder)):
            x = heads[layer, "o_in"].double().view(-1, 2, 3, 32)[:, group]
            losses.append((whip(x @ old), whip(x @ new)))
    assert all(after < before for before, after in losses)
    assert torch.tensor(losses).mean(0).tolist() == pytest.approx(notes["r2_whip"], rel=1e-5)


@pytest.mark.parametrize("lr, spoilt", [(0.01, math.nan), (0.01, math.inf), (math.inf, 1.0)])
def test_a_loss_that_is_no_number_stops_the_descent(lr, spoilt):
    x = spiky(64, 16).float()
    x[3, 5] *= spoilt
    start = randomized(16).float()
    with pytest.raises(FloatingPointError, match="whip"):
        Calibration(lr=lr, epochs=1, batch=64).descend(
            start, x, torch.Generator(), 3, lambda r, y: whip(y @ r)
        )


@pytest.mark.parametrize("pieces", [[1] * 500, [100] * 5, [7, 293, 200], [499, 1]])
@pytest.mark.parametrize("size", [10, 400, 500, 1000])
def test_a_reservoir_does_not_see_micro_batches(size, pieces):
    x, whole, split = normal(500, 3).float(), Reservoir(size, 0, "site"), Reservoir(size, 0, "site")
    whole.add(x.view(5, 100, 3))
    for piece in x.split(pieces):
        split.add(piece)
    assert whole.finish().shape == (min(size, 500), 3)
    assert torch.equal(split.finish(), whole.finish())
    if size >= 500:
        assert torch.equal(whole.finish().sort(0).values, x.sort(0).values)


def test_a_reservoir_is_an_even_sample_of_the_rows():
    index, samples = torch.arange(2000.0)[:, None], []
    for seed in range(20):
        kept = Reservoir(200, seed)
        for piece in index.split(150):
            kept.add(piece)
        samples.append(kept.finish().flatten())
        assert len(samples[-1].unique()) == 200
    assert torch.cat(samples).mean().item() == pytest.approx(
        999.5, abs=4 * 2000 / math.sqrt(12 * 4000)
    )
    quarters = torch.histc(torch.cat(samples), bins=4, min=0, max=2000)
    assert quarters.tolist() == pytest.approx([1000] * 4, abs=4 * math.sqrt(4000 * 3 / 16))
    assert samples[0].tolist() != samples[1].tolist()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_step_is_a_point_of_a_curve(schedule):
    """Of the mean whip, which the notes say too, whatever sum the schedule descends on; and R2's
    beside R1's."""
    points = []
    own = StreamedModel(
        subject().adapter, token_ids(6, 64), log=lambda values, step: points.append((step, values))
    )
    plan = {"lr": 0.01, "epochs": 4, "batch": 64}
    kind = DartQuant(r1=plan, r2=plan, schedule=schedule, max_tokens_per_site=KEPT)
    notes = kind.matrices(shape_of(own.adapter), own)[2]
    curves = {
        name: [(step, values[name]) for step, values in points if name in values]
        for name in ("r1/whip", "r2/whip")
    }
    assert sum(map(len, curves.values())) == len(points)
    pieces = len(inputs()) if schedule == "greedy" else 1
    assert [step for step, _ in curves["r1/whip"]] == list(range(1, notes["r1_steps"] * pieces + 1))
    assert [step for step, _ in curves["r2/whip"]] == list(range(1, len(curves["r2/whip"]) + 1))
    for name, curve in curves.items():
        before, after = notes[name.replace("/", "_")]
        assert after < before
        if (
            schedule != "greedy" or name == "r2/whip"
        ):  # greedy begins at one layer's whip, not at the mean
            assert curve[0][1] == pytest.approx(before, rel=0.1)
            assert curve[-1][1] == pytest.approx(after, rel=0.1)
