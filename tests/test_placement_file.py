"""Placements in files: what comes back does what went in, bit for bit, and a file that cannot serve
is refused."""

import pytest
import torch
from preserved import exact_model, logits, shape_of, token_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from harness.config.errors import ConfigError
from harness.formats import Integer, KVCache, Scheme
from harness.linalg.hadamard import Hadamard, random_signs
from harness.linalg.stiefel import random_orthogonal
from harness.models.merge import fuse_norms, place, swap
from harness.transforms import (
    Blocks,
    Chain,
    Codec,
    Diagonal,
    Kronecker,
    Permutation,
    Placement,
    Repeated,
    Rotation,
    Rows,
    file,
)
from harness.transforms.identity import Identity
from harness.transforms.pca import PCA
from harness.transforms.quarot import QuaRot
from harness.transforms.spinquant import SpinQuant

FACTS = {"model": "tiny-llama(tie=True, seed=0)", "transform": "quarot"}
SCHEME = Scheme(act=Integer(granularity="token", role="activation"), kv=KVCache())
CONTEXT = shape_of(exact_model("llama"), SCHEME)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=draw(seed), dtype=dtype)


def orthogonal(n: int, seed: int = 0) -> torch.Tensor:
    return random_orthogonal(
        n, draw(seed)
    ).contiguous()  # a file keeps entries, not strides, which decide a product's last bit


def signed(n: int) -> Rotation:
    return Rotation(Hadamard(n, random_signs(n, draw(n))))


CODECS = {  # each on 192 features
    "dense": Blocks(orthogonal(192)),
    "blocks": Blocks(normal(12, 16, 16, dtype=torch.float32)),
    "one block for all": Blocks(normal(48, 48)),
    "blocks and decoder": Blocks(normal(12, 16, 16), normal(6, 32, 32, seed=1)),
    "decoder alone": Blocks(None, normal(12, 16, 16)),
    "identity": Blocks(None),
    "hadamard": Rotation(Hadamard(192)),
    "hadamard with signs": signed(192),
    "paley blocks": signed(48),
    "diagonal": Diagonal(normal(192).abs() + 0.1),
    "kronecker": Kronecker(normal(12, 12), normal(16, 16)),
    "permutation": Permutation(torch.randperm(192, generator=draw(7)), 32),
    "chain": Chain(
        [
            Diagonal(normal(192).abs() + 0.1),
            signed(192),
            Chain((Blocks(normal(12, 16, 16)), signed(64))),
        ]
    ),
    "rows": Rows(signed(32), list(range(64, 96))),
    "repeated": Repeated(signed(32), 2, 3),
    "repeated chain": Repeated(
        Chain([Blocks(normal(2, 32, 32)), Diagonal(normal(64).abs() + 0.1)]), 2, 3
    ),
}
SHARED = normal(12, 16, 16, seed=3)
FULL = Placement(
    residual=signed(192),
    merged={
        (0, "o_in"): CODECS["blocks"],
        (1, "o_in"): CODECS["dense"],
        (None, "mlp_in"): CODECS["diagonal"],
    },
    online={
        (None, "down_in"): CODECS["hadamard"],
        (1, "down_in"): CODECS["kronecker"],
        (None, "head_in"): CODECS["chain"],
    },
    query_key=signed(48),
    encoders={(0, "self_attn.o_proj"): Blocks(SHARED), (1, "mlp.down_proj"): CODECS["repeated"]},
    decoders={
        (0, "mlp.up_proj"): Blocks(None, SHARED),
        (1, "self_attn.q_proj"): CODECS["blocks and decoder"],
    },
    notes={
        "block": 16,
        "losses": [1.5, 1.25],
        "rotations": ["R1"],
        "own": {"tensor": "none", "deep": {"a": True}, "no": None},
    },
)


def reloaded(path, placement: Placement) -> Placement:
    path = path / "a.safetensors"
    file.save(path, placement, FACTS)
    file.check(str(path), Identity(), CONTEXT, FACTS)
    return file.load(path, Identity(), CONTEXT)


def assert_same(a: Codec, b: Codec) -> None:
    """Every map agrees in every bit, in both precisions."""
    assert type(a) is type(b) and a.twice == b.twice
    for dtype in (torch.float64, torch.float32):
        x = normal(5, 192, dtype=dtype, seed=9)
        for name in ("encode", "decode", "absorb"):
            found = getattr(b, name)(x)
            assert found.dtype == dtype
            assert torch.equal(found, getattr(a, name)(x)), name
        assert torch.equal(b.emit(x.mT), a.emit(x.mT))


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_comes_back_in_every_bit(tmp_path, name):
    assert {type(codec) for codec in CODECS.values()} == set(Codec.__subclasses__())
    wanted = CODECS[name]
    found = reloaded(tmp_path, Placement(residual=wanted)).residual
    if name == "transposed":
        wanted = Blocks(wanted.encoder.contiguous())
    assert_same(wanted, found)


def test_a_transposed_matrix_comes_back_with_its_entries(tmp_path):
    """A file keeps entries and not strides, and those decide a product's last bit."""
    matrix = normal(12, 16, 16).mT
    found = reloaded(tmp_path, Placement(residual=Blocks(matrix))).residual
    assert torch.equal(found.encoder, matrix)
    assert_same(Blocks(matrix.contiguous()), found)


def test_a_placement_comes_back_with_every_place_and_its_notes(tmp_path):
    found = reloaded(tmp_path, FULL)
    assert_same(FULL.residual, found.residual)
    assert_same(FULL.query_key, found.query_key)
    for name in ("merged", "online", "encoders", "decoders"):
        places = getattr(FULL, name)
        assert list(getattr(found, name)) == list(places)
        for where, codec in places.items():
            assert_same(codec, getattr(found, name)[where])
    assert found.notes == FULL.notes
    assert_same(FULL.online[None, "down_in"], found.encoder(0, "down_in"))
    assert_same(FULL.online[1, "down_in"], found.encoder(1, "down_in"))


def test_an_empty_placement_comes_back_empty(tmp_path):
    assert reloaded(tmp_path, Placement()).empty


def test_what_was_loaded_is_saved_as_it_was_and_replaces_the_old_file(tmp_path):
    path, seen = tmp_path / "deep" / "er" / "a.safetensors", []
    for placement in (Placement(residual=CODECS["dense"]), FULL, None):
        file.save(path, placement or file.load(path, Identity(), CONTEXT), FACTS)
        with safe_open(path, "pt") as opened:
            seen.append(
                (
                    opened.metadata(),
                    {name: tensor.tolist() for name, tensor in load_file(path).items()},
                )
            )
        assert list(path.parent.iterdir()) == [path]
    assert seen[0] != seen[1] == seen[2]


def test_a_save_that_fails_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "a.safetensors"
    file.save(path, FULL, FACTS)
    once = path.read_bytes()
    with pytest.raises(TypeError):
        file.save(path, Placement(notes={"not": object()}), FACTS)
    assert path.read_bytes() == once
    assert list(tmp_path.iterdir()) == [path]


def spinquant() -> SpinQuant:
    return SpinQuant(objective="kd", steps=1, batch=1, lr=0.1)


def published(**changed) -> dict[str, torch.Tensor]:
    """R1 and the R2 of every layer under the names that SpinQuant gives them."""
    heads = {f"model.layers.{i}.self_attn.R2": orthogonal(32, i + 1) for i in range(2)}
    return {"R1": orthogonal(192), **heads, **changed}


@pytest.mark.parametrize("transform", [QuaRot(), spinquant()], ids=["quarot", "spinquant"])
def test_published_rotations_preserve_the_function_with_the_transforms_own_r3_and_r4(
    tmp_path, transform
):
    path, tensors = tmp_path / "R.safetensors", published()
    save_file(tensors, path)
    file.check(str(path), transform, CONTEXT, FACTS)
    placement, own = file.load(path, transform, CONTEXT), QuaRot().fit(CONTEXT, None)
    torch.testing.assert_close(
        placement.residual.encoder, tensors["R1"].double(), rtol=0, atol=1e-6
    )
    for layer in range(2):
        r2 = tensors[f"model.layers.{layer}.self_attn.R2"].double()
        torch.testing.assert_close(placement.merged[layer, "o_in"].encoder, r2, rtol=0, atol=1e-6)
    x = normal(3, 384)
    assert torch.equal(
        placement.encoder(0, "down_in").encode(x), own.encoder(0, "down_in").encode(x)
    )
    assert_same(own.query_key, placement.query_key)
    adapter, ids = exact_model("llama"), token_ids()
    before = logits(adapter, ids)
    swap(adapter)
    fuse_norms(adapter)
    place(adapter, placement)
    torch.testing.assert_close(logits(adapter, ids), before, rtol=0, atol=1e-10)


def refused(path, message: str, transform=None, facts=FACTS) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        file.check(str(path), transform or QuaRot(), CONTEXT, facts)
    assert str(raised.value).startswith(f"transform.load={path}")


def test_what_is_no_safetensors_file_is_refused(tmp_path):
    refused(tmp_path / "missing.safetensors", "no such file")
    refused(tmp_path, "no such file")
    torch.save(published(), tmp_path / "R.bin")
    refused(tmp_path / "R.bin", "pickled")
    file.save(tmp_path / "cut.safetensors", FULL, FACTS)
    for length in (0, 5, 1000):
        (tmp_path / "cut.safetensors").write_bytes(
            (tmp_path / "cut.safetensors").read_bytes()[:length]
        )
        refused(tmp_path / "cut.safetensors", "not a safetensors file")


def test_a_flipped_byte_is_refused_before_it_is_used(tmp_path):
    """Wherever it is: unless it hits the word `digest`, and then the matrices are right."""
    path, placement = tmp_path / "a.safetensors", Placement(residual=CODECS["kronecker"])
    file.save(path, placement, FACTS)
    content, passed = path.read_bytes(), 0
    for where in [*range(1200), *range(1200, len(content), 97)]:
        path.write_bytes(content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :])
        try:
            file.check(str(path), Identity(), CONTEXT, FACTS)
        except ConfigError as error:
            assert str(error).startswith(f"transform.load={path}: ")
        else:
            passed += 1
            assert_same(placement.residual, file.load(path, Identity(), CONTEXT).residual)
    assert passed == len("digest")


def test_a_header_that_is_no_placement_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    for spec in ("{", "[]", "{}", "3", '{"facts": 3}'):
        save_file({"a": torch.ones(1)}, path, metadata={"placement": spec})
        refused(path, "damaged")


@pytest.mark.parametrize(
    "fact, other", [("model", "tiny-llama(tie=True, seed=1)"), ("transform", "spinquant")]
)
def test_a_file_of_another_model_or_transform_is_refused(tmp_path, fact, other):
    file.save(tmp_path / "a.safetensors", FULL, {**FACTS, fact: other})
    refused(tmp_path / "a.safetensors", f"its {fact} is .*{other[-5:-1]}.* this run's is ")


@pytest.mark.parametrize(
    "name, shape",
    [
        ("R1", (96, 96)),
        ("R1", (192,)),
        ("model.layers.1.self_attn.R2", (48, 48)),
        ("model.layers.2.self_attn.R2", (32, 32)),
        ("lm_head.weight", (258, 192)),
    ],
)
def test_published_rotations_of_other_shapes_are_refused(tmp_path, name, shape):
    save_file(published(**{name: torch.ones(shape)}), tmp_path / "R.safetensors")
    refused(tmp_path / "R.safetensors", f"{name} has shape", spinquant())


def test_matrices_that_the_transform_has_no_place_for_are_refused(tmp_path):
    path = tmp_path / "R.safetensors"
    save_file(published(), path)
    refused(path, "neither", PCA())
    without = {name: tensor for name, tensor in load_file(path).items() if name != "R1"}
    for unrelated in (without, {"model.norm.weight": torch.ones(192)}, {}):
        save_file(unrelated, path)
        refused(path, "neither")
