from importlib.metadata import PackageNotFoundError, version

import pytest

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


@pytest.fixture(scope="session")
def golden_dir(request):
    from pathlib import Path

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
