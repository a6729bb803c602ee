import pytest


def pytest_addoption(parser):
    parser.addoption("--golden", default=None, metavar="DIR", help="golden vectors to check instead of our own")


@pytest.fixture(scope="session")
def golden_dir(request):
    from pathlib import Path

    return Path(request.config.getoption("--golden") or Path(__file__).parent / "golden")
