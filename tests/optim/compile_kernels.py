"""Compiles every kernel of the CUDA path, to the machine code of cards that need not be here.

python tests/optim/compile_kernels.py 80 90
"""

import sys
import tempfile
from itertools import product
from typing import Any

import torch  # noqa: F401 - Triton looks for it
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from optim.steps import cuda_kernels as kernels

TYPES = {"jobs": "*i64", "addresses": "*i64", "units": "*i32", "lists": "*i32", "first": "i32", "step_key": "i32"}
TYPES |= {"scratch": "*fp32", "exact_scratch": "*fp64", "coefficients": "*fp32", "all_finite": "*i1"}
TILES: list[dict[str, Any]] = [
    {"T_A": 8, "T_W": 256, "FACTORED": True, "BF16": True, "ALIGNED": True},
    {"T_A": 1, "T_W": 2048, "FACTORED": False, "BF16": False, "ALIGNED": False},
]


def compile_kernel(kernel: Any, card: int, **constants: Any) -> None:
    types = {name: TYPES.get(name, "constexpr") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=values)
    built = triton.compile(source, target=GPUTarget("cuda", card, 32), options={"enable_fp_fusion": True})
    assert built.asm["cubin"]


def compile_all(card: int) -> int:
    work: list[tuple[Any, dict[str, Any]]] = [(kernels.gather_factors, {}), (kernels.blend_columns, {})]
    work += [(kernels.reduce_units, {"WHAT": what}) for what in range(3)]
    work += [(kernels.blend_rows, {"KP": KP}) for KP in (1, 16)]
    for tile, rms in product(TILES, (False, True)):
        work.append((kernels.advance_units, {**tile, "ATAN": not rms, "RMS": rms, "STOCHASTIC": not rms}))
    for tile in TILES:
        work.append((kernels.measure_units, tile))
    for kernel, constants in work:
        compile_kernel(kernel, card, **constants)
    return len(work)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        for card in sys.argv[1:]:
            print(f"{card}:", compile_all(int(card)))
