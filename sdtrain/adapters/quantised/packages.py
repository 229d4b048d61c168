"""The package that packs weights in each precision, and what to do where it is not installed. No torch."""

from __future__ import annotations

from importlib.util import find_spec

from sdtrain.config.schema import BasePrecision
from sdtrain.errors import Problem

PACKAGES: dict[BasePrecision, str] = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
"""The package that packs weights; the extra `quantised` of sdtrain has all of them."""


def package_problems(precision: BasePrecision) -> list[Problem]:
    """Return a problem where the package of a precision is not installed; nothing is imported to find out."""
    package = PACKAGES.get(precision)
    if package is None or find_spec(package) is not None:
        return []
    what = f"{precision} needs the package {package}, which is not installed; `pip install {package}`, or use "
    return [Problem("model.base_precision", what + '"full"')]
