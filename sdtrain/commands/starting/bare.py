"""Packages whose own file reads or imports everything in them, held back until somebody asks the package for a name.

transformers lists the classes of 400 families of models by reading their files, and diffusers imports every transformer
that it has, when one module beside them is imported. A run imports its modules by their full names and asks the
packages for nothing, so their own files need not run; whoever does ask gets what they hold, as ever.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

CROWDED = ("transformers.models", "diffusers.models.transformers")
"""Packages of which a run uses a module or two."""


class BarePackage(ModuleType):
    """A package that finds its modules, and runs its own file at the first name that is none of the import system's."""

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(spec.name)
        self.__spec__ = spec
        self.__file__ = spec.origin
        self.__path__ = list(spec.submodule_search_locations or ())
        self.is_bare = True

    def __getattr__(self, name: str) -> Any:  # whatever the package holds
        spec = self.__spec__
        if spec is None or spec.loader is None or (name.startswith("__") and name != "__all__"):
            raise AttributeError(name)
        if self.is_bare:
            self.run()
            return getattr(sys.modules[spec.name], name)
        if (there := import_module(spec.name)) is not self:  # another is in its place, and somebody holds this one
            return getattr(there, name)
        raise AttributeError(f"module {spec.name!r} has no attribute {name!r}")

    def run(self) -> None:
        """Run the package's own file, once."""
        spec = self.__spec__
        if self.is_bare and spec is not None and spec.loader is not None:
            self.is_bare = False
            spec.loader.exec_module(self)


def hold_back(name: str) -> None:
    """Let a package run its own file late, unless it has been imported or is not there; its parents are imported."""
    if name in sys.modules:
        return
    spec = find_spec(name)
    if spec is not None:
        parent, _, last = name.rpartition(".")
        sys.modules[name] = BarePackage(spec)
        setattr(sys.modules[parent], last, sys.modules[name])  # as an import does
