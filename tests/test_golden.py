"""The formats against golden vectors of public reference libraries: tests/golden, or any such
folder with --golden DIR.

Each file holds `<case>/x` and `<case>/<reference>/<what>`. A reference is matched to the check in
tests/references that sets the project's format as it must agree with it, either in every bit
(`exactly`) or, where the reference works in another order of arithmetic, up to ties and the last
bit of float32 (`nearly`). References this file does not know are skipped by name.
"""

import re
from pathlib import Path

import pytest
from references.floats import cast, fp8, fp8_unit
from references.fpquant import fpquant, fpquant_nvfp4
from references.integers import compressed_tensors_int, quarot
from references.llmcompressor import llmcompressor
from references.mx import mx_compressed_tensors, mx_exact, mx_fouroversix, mx_modelopt, mx_torchao
from references.nvfp4 import compressed_tensors_nvfp4, fouroversix, if4, nvfp4_nearly
from references.packed import packed
from safetensors import safe_open

FILES = (
    "casts",
    "fouroversix",
    "fp8",
    "fpquant",
    "if4",
    "int_compressed_tensors",
    "int_quarot_spinquant",
    "mse_llmcompressor",
    "mxfp4",
    "mxfp8_mxfp6",
    "nvfp4",
    "packed_checkpoints",
)


def pytest_generate_tests(metafunc):
    if {"file", "case", "reference"} <= set(metafunc.fixturenames):
        folder = Path(metafunc.config.getoption("--golden") or Path(__file__).parent / "golden")
        metafunc.parametrize(
            ("file", "case", "reference"),
            [(path, *row) for path in sorted(folder.glob("*.safetensors")) for row in rows(path)],
            ids=lambda v: getattr(v, "stem", v),
        )


def rows(path):
    with safe_open(path, "pt") as f:
        keys = [key.split("/") for key in f.keys()]  # noqa: SIM118
        return sorted({tuple(key[:2]) for key in keys if len(key) == 3})


def test_folder_is_there(golden_dir):
    assert golden_dir.is_dir(), f"no golden vectors in {golden_dir}"
    assert list(golden_dir.glob("*.safetensors")), f"no .safetensors file in {golden_dir}"


@pytest.mark.parametrize("name", FILES)
def test_file_is_there(golden_dir, name):
    if not (golden_dir / f"{name}.safetensors").exists():
        pytest.skip(f"{golden_dir} has no {name}.safetensors")
    assert rows(golden_dir / f"{name}.safetensors")


def test_reference(file, case, reference):
    checks = [
        (match, check)
        for pattern, check in REFERENCES.get(file.stem, ())
        if (match := re.fullmatch(pattern, reference))
    ]
    if not checks:
        pytest.skip(f"{file.name}: reference {reference} is not one this project follows")
    with safe_open(file, "pt") as f:
        prefix = f"{case}/{reference}/"
        golden = {
            key.removeprefix(prefix): f.get_tensor(key)
            for key in f.keys()  # noqa: SIM118
            if key.startswith(prefix)
        }
        x = f.get_tensor(f"{case}/x")
    for match, check in checks:
        grid = {"grid": case} if check is cast else {}
        check(x, golden, **match.groupdict(), **grid)


REFERENCES = {
    "casts": (
        (
            r"(?P<reference>torchao|compressed_tensors|ml_dtypes|gfloat|modelopt|fouroversix"
            r"|torch_clamped|\w+_unclamped)",
            cast,
        ),
    ),
    "fouroversix": ((r"fouroversix_(?P<choose>mse|mae|abs_max)", fouroversix),),
    "fp8": (
        (
            r"compressed_tensors_(?P<element>e4m3)_(?P<part>w|a)"
            r"_(?P<granularity>tensor|channel|token|group|block)(?P<group>\d*)",
            fp8,
        ),
        (r"torch_(?P<element>e4m3|e5m2)_unit", fp8_unit),
    ),
    "if4": ((r"fouroversix_(?P<choose>mse|mae|abs_max)", if4),),
    "fpquant": (
        (
            r"fpquant_(?P<kind>mxfp4|fp4_group\d+|int4_(?:sym|asym)_group\d+)"
            r"_(?P<observer>minmax|mse)",
            fpquant,
        ),
        (r"fpquant_nvfp4_(?P<observer>minmax|mse)", fpquant_nvfp4),
    ),
    "int_compressed_tensors": (
        (
            r"compressed_tensors_int(?P<bits>\d)_(?P<kind>sym|asym)"
            r"_(?P<granularity>group|channel|tensor)(?P<group>\d*)",
            compressed_tensors_int,
        ),
    ),
    "int_quarot_spinquant": (
        (
            r"(?:quarot|spinquant)_(?P<part>w|a)_int(?P<bits>\d)_(?P<kind>sym|asym)"
            r"(?:_clip(?P<clip>[\d.]+))?"
            r"_(?P<granularity>group|channel|token)(?P<group>\d*)(?P<mse>_mse)?",
            quarot,
        ),
    ),
    "mse_llmcompressor": (
        (
            r"llmcompressor_(?P<kind>nvfp4|mxfp4|int4_(?:sym|asym)_(?:group\d+|channel))",
            llmcompressor,
        ),
    ),
    "mxfp4": (
        (r"gfloat_(?P<rule>floor)", mx_exact),
        (r"torchao_(?P<rule>floor|even|ceil|rceil)", mx_torchao),
        (r"compressed_tensors", mx_compressed_tensors),
        (r"fouroversix_rceil", mx_fouroversix),
        (r"modelopt_rceil", mx_modelopt),
    ),
    "mxfp8_mxfp6": (
        (r"mxfp\d_(?P<element>\w+)_torchao_(?P<rule>floor|rceil)", mx_torchao),
        (r"mxfp\d_(?P<element>e\dm\d)_compressed_tensors", mx_compressed_tensors),
    ),
    "nvfp4": (
        (r"compressed_tensors(?P<math>_f32math)?", compressed_tensors_nvfp4),
        (
            r"(?P<reference>torchao|torchao_single_level|modelopt|fouroversix_static_[46])",
            nvfp4_nearly,
        ),
    ),
    "packed_checkpoints": (
        (r"(?P<kind>nvfp4|mxfp4|int4_(?:sym|asym)_(?:group\d+|channel))", packed),
    ),
}
