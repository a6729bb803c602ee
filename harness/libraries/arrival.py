"""Runs a module of ours once another library's has been imported, and imports neither before.

transformers learns of a quantization method by a call to its `register_quantizer`, and has no entry
points. To import it for that costs seconds and all of torch, whenever a command only looks
at what is stored; so the call waits in Python's own list of finders until somebody imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def after(library: str, ours: str) -> None:
    """Import the module `ours` as soon as the module `library` is there; at once if it is."""
    if library in sys.modules:
        import_module(ours)
    else:
        sys.meta_path.insert(0, _Arrival(library, ours))


class _Arrival(MetaPathFinder):
    """Finds nothing itself, and leaves when what it waits for is looked for."""

    def __init__(self, library: str, ours: str):
        self.library = library
        self.ours = ours

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.library:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Followed(spec.loader, self.ours)
        return spec


class _Followed(Loader):
    """A library's own loader, with a module of ours imported after what it loads."""

    def __init__(self, loader: Loader, ours: str):
        self.loader = loader
        self.ours = ours

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None  # it was found by one
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        import_module(self.ours)
