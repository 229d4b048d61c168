"""The package that packs weights in each precision, and what to do where it is not installed. No torch."""

from __future__ import annotations

from importlib.util import find_spec

from sdtrain.config.schema import BasePrecision
from sdtrain.errors import Problem

PACKAGES: dict[BasePrecision, tuple[str, ...]] = {
    "int8": ("torchao",),
    "fp8": ("torchao",),
    "nf4": ("bitsandbytes", "torchao"),  # some layers stay in int8
}
"""The packages that pack weights; the extra `quantised` of sdtrain has all of them."""


def package_problems(precision: BasePrecision) -> list[Problem]:
    """Return a problem where a package of a precision is not installed; nothing is imported to find out."""
    missing = [package for package in PACKAGES.get(precision, ()) if find_spec(package) is None]
    if not missing:
        return []
    are = "is" if len(missing) == 1 else "are"
    packages = f"the package{'s' * (len(missing) > 1)} {' and '.join(missing)}, which {are} not installed"
    what = f"{precision} needs {packages}; `pip install {' '.join(missing)}`, or use "
    return [Problem("model.base_precision", what + '"full"')]
