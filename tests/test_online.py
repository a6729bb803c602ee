"""What a transform costs at run time: operations of its codecs over those of the linears."""

import pytest
import torch
from composed import small

from harness.codecs.codec import Blocks, Diagonal, Kronecker, Rotation
from harness.codecs.composed import Chain, Repeated, Rows
from harness.linalg.hadamard import Hadamard
from harness.pipeline.job import execute

# the tiny model: 6 query heads and 2 of keys and values of 32 features each, 192 by 384
ATTENTION = HIDDEN = 192
INNER = 384
LINEARS = 2 * HIDDEN * ATTENTION + 2 * HIDDEN * 64 + 3 * HIDDEN * INNER


def dense(*shape):
    return Blocks(torch.ones(shape))


@pytest.mark.parametrize(
    ("codec", "entries"),
    [
        (Blocks(None), 0),
        (dense(48, 48), 48 * 48),
        (dense(3, 16, 16), 3 * 16 * 16),
        (dense(16, 16), 3 * 16 * 16),
        (Diagonal(torch.ones(48)), 48),
        (Kronecker(torch.eye(6), torch.eye(8)), 8 * 6 * 6 + 6 * 8 * 8),
        (Chain([dense(48, 48), Diagonal(torch.ones(48))]), 48 * 48 + 48),
        (Repeated(dense(8, 8), kv_heads=2, repeat=3), 6 * 8 * 8),
        (Rows(dense(16, 16), tuple(range(16))), 16 * 16),
        (Rotation(Hadamard(16)), 3 * 16 * 4),  # log2 16 additions a feature
        (Rotation(Hadamard(12)), 4 * 12 * 12),  # no faster than its core
        (Rotation(Hadamard(48)), 48 * (12 + 2)),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else "",
)
def test_operations_are_the_factors_entries(codec, entries):
    assert codec.operations(48) == entries


@pytest.mark.parametrize(
    ("settings", "each_layer"),
    [
        (["transform=identity"], 0),
        (["transform=quarot", "transform.r4=off"], 0),  # R1 and R2 are merged
        (["transform=quarot", "transform.r4=on"], INNER * (12 + 5)),
        (
            ["transform=hadamard", "transform.block_size=16"],
            4 * (2 * HIDDEN + ATTENTION + INNER),
        ),
        (
            ["transform=quarot", "transform.r3=on", "transform.r4=off"],
            (6 + 2) * 32 * 5,
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_run_says_what_stays_online(tmp_path, settings, each_layer):
    outcome = execute(*small(tmp_path, "solver=rtn", *settings))
    assert outcome.metrics["online"] == pytest.approx(each_layer / LINEARS)
