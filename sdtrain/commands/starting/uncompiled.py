"""PyTorch's compiler is not imported for a run that compiles nothing, though the libraries tell it about themselves.

Importing it takes half a second and 900 modules. diffusers and transformers do so to mark functions and classes for it,
and an optimizer, when a method of it is called, to keep that method from it. Without the compiler a mark means nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from sdtrain.commands.starting.bare import BarePackage

COMPILER = "torch._dynamo"
MARKS = ("allow_in_graph", "assume_constant_result", "disable")
"""What libraries ask of the compiler while they are imported."""

PART = "torch._dynamo._trace_wrapped_higher_order_op"
"""A module of the compiler that needs none of its others. transformers asks for it, later than for marks."""


@contextmanager
def unmarked() -> Iterator[None]:
    """Let what is imported meanwhile stay unmarked, unless the compiler is there already.

    Whoever asks the compiler for anything but marks gets it, and afterwards an import of it is one as ever.
    """
    spec = find_spec(COMPILER)  # which imports torch
    if spec is None or COMPILER in sys.modules:
        yield
        return
    package, last = COMPILER.split(".")
    stand_in = BarePackage(spec)
    vars(stand_in).update(dict.fromkeys(MARKS, mark))
    sys.modules[COMPILER] = stand_in
    setattr(sys.modules[package], last, stand_in)
    if find_spec(PART) is not None:
        import_module(PART)
    finder = InOrder(stand_in)
    sys.meta_path.insert(0, finder)
    try:
        yield
        if stand_in.is_bare:
            spare_optimizers()
    finally:
        sys.meta_path.remove(finder)
        if stand_in.is_bare:
            stand_in.is_bare = False  # whoever holds it finds in it what the compiler holds
            del sys.modules[COMPILER]
            delattr(sys.modules[package], last)


class InOrder(MetaPathFinder):
    """Runs the file of a package that is held back before any of its modules, as Python does: they import each other in
    circles, which only come to an end from there."""

    def __init__(self, package: BarePackage) -> None:
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not (self.package.is_bare and fullname.startswith(self.package.__name__ + ".")):
            return None
        self.package.run()
        if fullname not in sys.modules:
            return None  # its file does not import it, so that the next finder does
        module = sys.modules[fullname]
        module.__spec__ = ModuleSpec(fullname, _Imported(module))  # else Python would load it a second time
        return module.__spec__


class _Imported(Loader):
    """Gives a module that was imported while Python asked where to find it."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


def mark(function: Any = None, *_: object, **__: object) -> Any:
    """Return the function as it is, or what decorates one so."""
    return (lambda given: given) if function is None else function


def spare_optimizers() -> None:
    """Let the methods of optimizers that torch keeps from its compiler run as they are, without asking it first."""
    from torch.optim import Optimizer

    for method in vars(Optimizer).values():
        if (plain := getattr(method, "__wrapped__", None)) is not None:
            setattr(plain, "__dynamo_disable", plain)  # where `torch._disable_dynamo` looks first
