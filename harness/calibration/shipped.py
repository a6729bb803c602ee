"""Two texts that every Python carries: its language reference and its standard library.

Nothing has to be fetched. Both are lists of pages, joined by blank lines and cut at the page
boundary nearest to three quarters: the first part calibrates, the last evaluates. They differ
between Python versions; their fingerprints tell them apart.
"""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Protocol, runtime_checkable

from harness.calibration.corpus import PARTS, Corpus
from harness.config.errors import DataError

MODULES = (
    "argparse",
    "ast",
    "calendar",
    "collections",
    "configparser",
    "csv",
    "datetime",
    "difflib",
    "dis",
    "doctest",
    "fractions",
    "ftplib",
    "gettext",
    "heapq",
    "inspect",
    "logging",
    "mailbox",
    "nntplib",
    "optparse",
    "pathlib",
    "pickle",
    "random",
    "shutil",
    "smtplib",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "textwrap",
    "threading",
    "typing",
    "uuid",
    "zipfile",
)


@runtime_checkable
class _Loader(Protocol):
    """What has sources: the loader of files, and that of zip archives, no InspectLoader."""

    def get_source(self, name: str, /) -> str | None: ...


class Pydoc(Corpus):
    """The topics of the Python language reference, sorted.

    `pydoc_data.topics`, about 465 kB of English and code.
    """

    calibration_share = 0.75

    def __init__(self, name: str = "pydoc"):
        self.name = name

    def check(self) -> None:
        self._split()

    def text(self, part: str) -> str:
        return "\n\n".join(self._split()[PARTS.index(part)])

    def pages(self) -> list[str]:
        """The whole text. Raises DataError where this Python comes without it."""
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise DataError(
                "data=pydoc: this Python comes without pydoc_data; use data=text data.path=DIR"
            ) from error
        return [topics[key] for key in sorted(topics)]

    def _split(self) -> tuple[list[str], list[str]]:
        """The pages that calibrate, and those that evaluate."""
        pages = self.pages()
        target = self.calibration_share * sum(map(len, pages))
        cut = min(range(1, len(pages)), key=lambda i: abs(sum(map(len, pages[:i])) - target))
        return pages[:cut], pages[cut:]


class Stdlib(Pydoc):
    """Source code of the standard library: the modules of MODULES that this version has.

    About 1.4 MB of Python.
    """

    def __init__(self, name: str = "stdlib"):
        super().__init__(name)

    def pages(self) -> list[str]:
        specs = [find_spec(name) for name in MODULES]
        sources = [_source(spec) for spec in specs if spec is not None]
        pages = [source for source in sources if source]
        # two at least: one page would leave a part of the text without any
        if len(pages) < len(sources) or len(pages) < 2:
            raise DataError(
                "data=stdlib: this Python comes without the sources of its library; "
                "use data=text data.path=DIR"
            )
        return pages


def _source(spec: ModuleSpec) -> str | None:
    """A module's source code, or None where its loader has none."""
    return spec.loader.get_source(spec.name) if isinstance(spec.loader, _Loader) else None
