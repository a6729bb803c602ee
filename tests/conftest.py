import gc
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm")  # files in memory, where a system has them
DEVICE = "HARNESS_TEST_DEVICE"  # what `composed.small` runs on
ROOM = 4 * 2**30  # bytes; all tests together leave about 1 GiB

OPTIONAL = ("compressed_tensors", "lm_eval", "datasets", "plotly", "wandb", "gguf", "scipy")
COMPARED = (
    "test_compressed_activations.py",
    "test_compressed_entries.py",
    "test_compressed_experts.py",
    "test_compressed_refusals.py",
    "test_compressed_tensors.py",
    "test_export_dtypes.py",
    "test_fp8_compressed_tensors.py",
    "test_online_config.py",
    "test_zeroshot.py",
)
collect_ignore = [] if find_spec("compressed_tensors") else list(COMPARED)

LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "huggingface-hub",
    "safetensors",
    "accelerate",
    "gguf",
    "hydra-core",
    "omegaconf",
    "datasets",
    "lm-eval",
    "numpy",
    "scipy",
    "wandb",
    "plotly",
    "compressed-tensors",
)


def pytest_addoption(parser):
    parser.addoption(
        "--golden", default=None, metavar="DIR", help="golden vectors to check instead of our own"
    )
    parser.addoption("--device", default=None, help="where runs of the tests compute: cpu, cuda")


def pytest_configure(config):
    """Every file of a run is synced, which on a disk takes a tenth of the tests' time."""
    if config.getoption("--device"):
        os.environ[DEVICE] = config.getoption("--device")
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def pytest_collection_finish():
    """What is imported by now stays; searching it for garbage takes a twentieth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def golden_dir(request):
    return Path(request.config.getoption("--golden") or Path(__file__).parent / "golden")


def pytest_terminal_summary(terminalreporter):
    """The releases under test: a red run on a fresh machine says at once what is new there."""
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} missing")
    terminalreporter.write_line(", ".join(found))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test of a package that is not installed is skipped by that name: `make gpu` runs with what
    a machine has."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if error.name in OPTIONAL and find_spec(error.name) is None:
            pytest.skip(f"{error.name} is not installed")
        raise
