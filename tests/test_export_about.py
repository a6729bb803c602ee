"""What a checkpoint says of itself is read as data, whatever stands there."""

import json

import pytest

from harness.checkpoints.about import ABOUT, held


def about(formats, *bits, **method) -> str:
    parts = dict(
        zip(("weights", "activations", "kv"), ({"format": "int4", "bits": n} for n in bits))
    )
    return json.dumps({"formats": formats, "bits": parts, "method": method})


NOTHING = (None, None, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            about({"int4": 14}, 4, 16, 16, transform="quarot", solver="gptq"),
            ("int4-w4a16", "quarot", "gptq"),
        ),
        (
            about({"int8": 1, "int4": 14}, 4, 8, 4, transform="pca"),
            ("int4+int8-w4a8kv4", "pca", None),
        ),
        (about({}, 16, 8, 16), ("int4-w16a8", None, None)),
        (about({"<b>": 1}, 4, 4, 16, transform="[red]x[/]", solver="\u001b[2J"), NOTHING),
        (
            about({"int4": "14"}, 4, 4, 16, transform=["quarot"], solver=None),
            ("int4-w4a4", None, None),
        ),
        (about({"x" * 99: 1}, 4, 4, 16, transform="y" * 99), NOTHING),
        (about({"int4": 14}, 4, "4", 16), NOTHING),
        (about({"int4": 14}, True, 4, 16), NOTHING),
        (about({"int4": 14}, 4, 10**400, 16), NOTHING),
        (about({"int4": 14}, 4), NOTHING),
        (about([], 4, 4, 4), ("int4-w4a4kv4", None, None)),
        ('{"bits": 4, "method": 7}', NOTHING),
        ("[]", NOTHING),
        ("{", NOTHING),
        ("[" * 100_000, NOTHING),
        ("\udcff", NOTHING),
        (None, NOTHING),
    ],
    ids=range(17),
)
def test_what_a_checkpoint_says_of_itself_is_read_as_data(tmp_path, text, expected):
    if text is not None:
        (tmp_path / ABOUT).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert tuple(held(tmp_path).values()) == expected
