"""The kernels of `cuda.py`, in Triton: the step of `plain.py` for CUDA, a few launches for all tensors of a model.

A program works on a unit, a few tiles of one tensor, and finds what it needs in the tensor's row of a table of numbers
and addresses. A tensor with factors is read as (A, B * K): the two factored axes, and the others. Sums that several
units have a part in are added up in a fixed order by a later launch, so that results never depend on who was first.
Imported only where Triton is (`cuda.usable`).
"""

import triton
import triton.language as tl

from optim.formulas.numbers import SLICE_P as SLICE
from optim.formulas.numbers import Coefficients
from optim.formulas.rounding import GOLDEN, MULTIPLIERS
from optim.formulas.second_moment import ATAN_POLYNOMIAL
from optim.formulas.second_moment import TINY as SMALLEST

COLUMNS = (
    *("z", "row", "col", "v", "s", "p0"),  # addresses of the state; 0: there is none
    *("row_now", "col_now", "totals", "sums"),  # and of what a step finds
    *("partial", "row_partial", "col_partial"),  # places in the scratch of a step
    *("A", "B", "K", "whole_a", "chunks", "strips", "offset", "whole", "group", "key"),
)
"""The fields of a tensor's row in the table, each an int64. `chunks`, `strips`: in how many units A and B are cut."""

Z, ROW, COL, V, S, P0 = (tl.constexpr(COLUMNS.index(name)) for name in COLUMNS[:6])
ROW_NOW, COL_NOW, TOTAL, SUMS = (tl.constexpr(COLUMNS.index(name)) for name in COLUMNS[6:10])
PARTIAL, ROW_PARTIAL, COL_PARTIAL = (tl.constexpr(COLUMNS.index(name)) for name in COLUMNS[10:13])
A, B, K, WHOLE_A, CHUNKS, STRIPS, OFFSET, WHOLE, GROUP, KEY = (
    tl.constexpr(COLUMNS.index(name)) for name in COLUMNS[13:]
)
NUM_COLUMNS = tl.constexpr(len(COLUMNS))

D, BETA2, SQUARE, LAM, BETA3, DLR, WEIGHT, Y_SHARE, DECAY, DECAY_APART, D_EPS = (
    tl.constexpr(Coefficients._fields.index(name))
    for name in (
        *("d", "beta2", "square", "lam", "beta3", "dlr"),
        *("weight", "y_share", "decay", "decay_apart", "d_eps"),
    )
)
NUM_COEFFICIENTS = tl.constexpr(len(Coefficients._fields))

kernel = triton.jit(do_not_specialize=["first", "step_key"])
"""Of what the host starts. Numbers that differ from launch to launch must not make a new kernel each."""

CHUNK = tl.constexpr(16)
"""Tiles along A that one unit goes through."""
VECTOR = tl.constexpr(1024)
"""Elements of a unit of the kernels that work on factors."""
SLICE_P = tl.constexpr(SLICE)
TINY = tl.constexpr(SMALLEST)
HASH_ELEMENT, HASH_FIRST, HASH_SECOND = (tl.constexpr(number) for number in (GOLDEN, *MULTIPLIERS))
ATAN_0, ATAN_1, ATAN_2, ATAN_3, ATAN_4, ATAN_5, ATAN_6, ATAN_7 = (tl.constexpr(value) for value in ATAN_POLYNOMIAL)
TOTAL_OF_SQUARES, RMS_DIVISOR, PRODIGY_SUMS = (tl.constexpr(position) for position in range(3))


@triton.jit
def _field(jobs, job, column: tl.constexpr):
    return tl.load(jobs + job * NUM_COLUMNS + column)


@triton.jit
def _coefficient(coefficients, group, which: tl.constexpr):
    return tl.load(coefficients + group * NUM_COEFFICIENTS + which)


@triton.jit
def _floats(address):
    return address.to(tl.pointer_type(tl.float32))


@triton.jit
def _halves(address):
    return address.to(tl.pointer_type(tl.uint16))


@triton.jit
def _widen(bits):
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _nearest(values):
    """The bits of the nearest bfloat16, ties to even."""
    bits = values.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)


@triton.jit
def _read(address, at, mask, BF16: tl.constexpr, ALIGNED: tl.constexpr):
    """Elements of a tensor as float32, 0 where the mask is not."""
    if BF16:
        halves = _halves(address)
        if ALIGNED:
            halves = tl.multiple_of(halves, 16)
        return _widen(tl.load(halves + at, mask=mask, other=0))
    else:
        floats = _floats(address)
        if ALIGNED:
            floats = tl.multiple_of(floats, 16)
        return tl.load(floats + at, mask=mask, other=0.0)


@triton.jit
def _write(address, at, values, mask, BF16: tl.constexpr, ALIGNED: tl.constexpr):
    """values: float32, or the uint32 bits of float32 of which the upper half is what bfloat16 is to hold."""
    if BF16:
        halves = _halves(address)
        if ALIGNED:
            halves = tl.multiple_of(halves, 16)
        tl.store(halves + at, values, mask=mask)
    else:
        floats = _floats(address)
        if ALIGNED:
            floats = tl.multiple_of(floats, 16)
        tl.store(floats + at, values, mask=mask)


@triton.jit
def _columns(jobs, job, strip, T_W: tl.constexpr, ALIGNED: tl.constexpr):
    """B * K, the elements of a row; where the columns of a tile stand in it; and which of them exist."""
    width = (_field(jobs, job, B) * _field(jobs, job, K)).to(tl.int32)
    if ALIGNED:
        width = tl.multiple_of(width, 16)
    at = strip * T_W + tl.arange(0, T_W)
    return width, at, at < width


@kernel
def measure_units(
    jobs, addresses, units, first, scratch, exact_scratch,
    T_A: tl.constexpr, T_W: tl.constexpr,
    FACTORED: tl.constexpr, BF16: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Sums of g^2 of a unit: of its columns, of its rows, and of all."""
    unit = units + (first + tl.program_id(0)) * 3
    job, chunk, strip = tl.load(unit), tl.load(unit + 1), tl.load(unit + 2)
    g_address = tl.load(addresses + job * 2 + 1)
    num_rows, num_k = _field(jobs, job, A).to(tl.int32), _field(jobs, job, K).to(tl.int32)
    width, col, col_mask = _columns(jobs, job, strip, T_W, ALIGNED)
    begin = chunk * (T_A * CHUNK)
    end = tl.minimum(begin + T_A * CHUNK, num_rows)
    col_sum = tl.zeros((T_W,), dtype=tl.float32)
    for a0 in range(begin, end, T_A):
        a = a0 + tl.arange(0, T_A)
        g = _read(g_address, a[:, None] * width + col[None, :], (a < end)[:, None] & col_mask[None, :], BF16, ALIGNED)
        squares = g * g
        col_sum += tl.sum(squares, axis=0)
        if FACTORED:
            rows = scratch + _field(jobs, job, ROW_PARTIAL) + (strip * num_rows + a) * num_k
            for k in range(num_k):
                of_k = tl.where((col % num_k == k)[None, :], squares, 0.0)
                tl.store(rows + k, tl.sum(of_k, axis=1), mask=a < end)
    if FACTORED:
        tl.store(scratch + _field(jobs, job, COL_PARTIAL) + chunk * width + col, col_sum, mask=col_mask)
    place = _field(jobs, job, PARTIAL) + (chunk * _field(jobs, job, STRIPS) + strip) * 2
    tl.store(exact_scratch + place, tl.sum(col_sum).to(tl.float64))


@kernel
def gather_factors(jobs, lists, first, scratch):
    """Adds up the parts of a stretch of row or column sums."""
    item = lists + (first + tl.program_id(0)) * 3
    job, is_col, tile = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    num = (_field(jobs, job, A) * _field(jobs, job, K)).to(tl.int32)
    parts, source, target = _field(jobs, job, STRIPS), _field(jobs, job, ROW_PARTIAL), _field(jobs, job, ROW_NOW)
    if is_col != 0:
        num = (_field(jobs, job, B) * _field(jobs, job, K)).to(tl.int32)
        parts, source, target = _field(jobs, job, CHUNKS), _field(jobs, job, COL_PARTIAL), _field(jobs, job, COL_NOW)
    at = tile * VECTOR + tl.arange(0, VECTOR)
    total = tl.zeros((VECTOR,), dtype=tl.float32)
    for part in range(parts.to(tl.int32)):
        total += tl.load(scratch + source + part * num + at, mask=at < num, other=0.0)
    tl.store(_floats(target) + at, total, mask=at < num)


@kernel
def reduce_units(jobs, lists, first, exact_scratch, all_finite, WHAT: tl.constexpr):
    """Adds up what the units of a tensor found: the sum of g^2, of u^2, or Prodigy's two sums."""
    job = tl.load(lists + first + tl.program_id(0))
    num = (_field(jobs, job, CHUNKS) * _field(jobs, job, STRIPS)).to(tl.int32)
    parts = exact_scratch + _field(jobs, job, PARTIAL)
    one = tl.zeros((VECTOR,), dtype=tl.float64)
    two = tl.zeros((VECTOR,), dtype=tl.float64)
    for begin in range(0, num, VECTOR):
        at = begin + tl.arange(0, VECTOR)
        one += tl.load(parts + 2 * at, mask=at < num, other=0.0)
        if WHAT == PRODIGY_SUMS:
            two += tl.load(parts + 2 * at + 1, mask=at < num, other=0.0)
    sums = _field(jobs, job, SUMS).to(tl.pointer_type(tl.float64))
    if WHAT == TOTAL_OF_SQUARES:
        tl.store(_floats(_field(jobs, job, TOTAL)), tl.sum(one).to(tl.float32))
    elif WHAT == RMS_DIVISOR:
        rms = tl.sqrt(tl.sum(one) / _field(jobs, job, WHOLE).to(tl.float64))
        tl.store(sums + 2, 1.0 / tl.sqrt(tl.maximum(rms, 1.0)))
    else:
        counts = tl.load(all_finite) != 0  # if not, the units have left nothing here
        tl.store(sums, tl.where(counts, tl.sum(one), 0.0))
        tl.store(sums + 1, tl.where(counts, tl.sum(two), 0.0))


@kernel
def blend_columns(jobs, lists, first, coefficients, all_finite):
    """C takes in the means of this step's g^2; sqrt(C) takes the place of the sums."""
    if tl.load(all_finite) != 0:
        item = lists + (first + tl.program_id(0)) * 2
        job, tile = tl.load(item), tl.load(item + 1)
        group = _field(jobs, job, GROUP)
        at = tile * VECTOR + tl.arange(0, VECTOR)
        mask = at < (_field(jobs, job, B) * _field(jobs, job, K)).to(tl.int32)
        col, now = _floats(_field(jobs, job, COL)) + at, _floats(_field(jobs, job, COL_NOW)) + at
        gain = _coefficient(coefficients, group, SQUARE) / _field(jobs, job, WHOLE_A).to(tl.float32)
        before = tl.load(col, mask=mask, other=0.0)
        blended = tl.load(now, mask=mask, other=0.0) * gain + before * _coefficient(coefficients, group, BETA2)
        tl.store(col, blended, mask=mask)
        tl.store(now, tl.sqrt_rn(blended), mask=mask)


@kernel
def blend_rows(jobs, lists, first, coefficients, all_finite, KP: tl.constexpr):
    """R takes in its means, too; sqrt(R / mean(R)) takes the place of the sums. mean(R) is the mean of C over B."""
    if tl.load(all_finite) != 0:
        item = lists + (first + tl.program_id(0)) * 2
        job, tile = tl.load(item), tl.load(item + 1)
        group = _field(jobs, job, GROUP)
        num_a, num_b = _field(jobs, job, A).to(tl.int32), _field(jobs, job, B).to(tl.int32)
        num_k = _field(jobs, job, K).to(tl.int32)
        k = tl.arange(0, KP)
        col = _floats(_field(jobs, job, COL))
        total = tl.zeros((VECTOR // KP, KP), dtype=tl.float32)
        for begin in range(0, num_b, VECTOR // KP):
            b = begin + tl.arange(0, VECTOR // KP)
            mask = (b < num_b)[:, None] & (k < num_k)[None, :]
            total += tl.load(col + b[:, None] * num_k + k[None, :], mask=mask, other=0.0)
        mean = tl.maximum(tl.sum(total, axis=0) / num_b.to(tl.float32), TINY)
        a = tile * (VECTOR // KP) + tl.arange(0, VECTOR // KP)
        at, mask = a[:, None] * num_k + k[None, :], (a < num_a)[:, None] & (k < num_k)[None, :]
        row, now = _floats(_field(jobs, job, ROW)) + at, _floats(_field(jobs, job, ROW_NOW)) + at
        gain = _coefficient(coefficients, group, SQUARE) / num_b.to(tl.float32)
        before = tl.load(row, mask=mask, other=0.0)
        blended = tl.load(now, mask=mask, other=0.0) * gain + before * _coefficient(coefficients, group, BETA2)
        tl.store(row, blended, mask=mask)
        tl.store(now, tl.sqrt_rn(tl.div_rn(blended, mean[None, :] + tl.zeros_like(blended))), mask=mask)


@triton.jit
def _atan2_update(t, root):
    """(4/pi) atan2(t, root) for root >= 0, by `second_moment.ATAN_POLYNOMIAL`."""
    a = tl.abs(t)
    r = tl.div_rn(tl.minimum(a, root), tl.maximum(tl.maximum(a, root), TINY))
    q = r * r
    p = q * ATAN_0 + ATAN_1
    p = p * q + ATAN_2
    p = p * q + ATAN_3
    p = p * q + ATAN_4
    p = p * q + ATAN_5
    p = p * q + ATAN_6
    p = p * q + ATAN_7
    p *= r
    p = tl.where(a > root, 2.0 - p, p)
    return tl.where(t < 0, -p, p)


@triton.jit
def _root(jobs, job, coefficients, group, a, col, at, mask, g, FACTORED: tl.constexpr, KEEP: tl.constexpr):
    """sqrt v of a tile; where nothing is factored, v takes in g^2 (and is kept, if KEEP)."""
    if FACTORED:
        num_k = _field(jobs, job, K).to(tl.int32)
        row_at = a[:, None] * num_k + (col % num_k)[None, :]
        row_root = tl.load(_floats(_field(jobs, job, ROW_NOW)) + row_at, mask=mask, other=0.0)
        col_root = tl.load(_floats(_field(jobs, job, COL_NOW)) + col[None, :] + a[:, None] * 0, mask=mask, other=0.0)
        return row_root * col_root
    else:
        v = _floats(_field(jobs, job, V)) + at
        before = tl.load(v, mask=mask, other=0.0)
        new = before * _coefficient(coefficients, group, BETA2) + g * _coefficient(coefficients, group, SQUARE) * g
        if KEEP:
            tl.store(v, new, mask=mask)
        return tl.sqrt_rn(new)


@triton.jit
def _update(coefficients, group, g, root, ATAN: tl.constexpr):
    """u before it is scaled or decayed."""
    numerator = g * _coefficient(coefficients, group, D)
    if ATAN:
        return _atan2_update(numerator, root)
    else:
        return tl.div_rn(numerator, root + _coefficient(coefficients, group, D_EPS))


@kernel
def squared_update_units(
    jobs, addresses, units, first, coefficients, all_finite, exact_scratch,
    T_A: tl.constexpr, T_W: tl.constexpr,
    FACTORED: tl.constexpr, BF16: tl.constexpr, ALIGNED: tl.constexpr, ATAN: tl.constexpr,
):  # fmt: skip
    """|u|^2 of a unit, for StableAdamW; nothing is changed."""
    if tl.load(all_finite) != 0:
        unit = units + (first + tl.program_id(0)) * 3
        job, chunk, strip = tl.load(unit), tl.load(unit + 1), tl.load(unit + 2)
        g_address, group = tl.load(addresses + job * 2 + 1), _field(jobs, job, GROUP)
        width, col, col_mask = _columns(jobs, job, strip, T_W, ALIGNED)
        begin = chunk * (T_A * CHUNK)
        end = tl.minimum(begin + T_A * CHUNK, _field(jobs, job, A).to(tl.int32))
        total = tl.zeros((T_W,), dtype=tl.float32)
        for a0 in range(begin, end, T_A):
            a = a0 + tl.arange(0, T_A)
            at, mask = a[:, None] * width + col[None, :], (a < end)[:, None] & col_mask[None, :]
            g = _read(g_address, at, mask, BF16, ALIGNED)
            root = _root(jobs, job, coefficients, group, a, col, at, mask, g, FACTORED, False)
            u = tl.where(mask, _update(coefficients, group, g, root, ATAN), 0.0)
            total += tl.sum(u * u, axis=0)
        place = _field(jobs, job, PARTIAL) + (chunk * _field(jobs, job, STRIPS) + strip) * 2
        tl.store(exact_scratch + place, tl.sum(total).to(tl.float64))


@triton.jit
def _prodigy_sums(jobs, job, coefficients, group, at, mask, g, z, s_address):
    """Of every 11th element of the whole tensor: <g, p0 - z> and |s|_1; s is brought up to date."""
    shift = ((_field(jobs, job, OFFSET) % SLICE_P) * (SLICE_P - 1) % SLICE_P).to(tl.int32)  # -offset modulo 11
    since = at - shift
    chosen = mask & (since >= 0) & (since % SLICE_P == 0)
    place = since // SLICE_P
    away = -z
    p0 = _field(jobs, job, P0)
    if p0 != 0:
        away += _widen(tl.load(_halves(p0) + place, mask=chosen, other=0))
    s = _halves(s_address) + place
    # each of the two operations rounds to bfloat16
    decayed = _widen(_nearest(_widen(tl.load(s, mask=chosen, other=0)) * _coefficient(coefficients, group, BETA3)))
    new = _nearest(decayed + g * _coefficient(coefficients, group, LAM))
    tl.store(s, new, mask=chosen)
    num = tl.sum(tl.sum(tl.where(chosen, g * away, 0.0), axis=1), axis=0)
    den = tl.sum(tl.sum(tl.where(chosen, tl.abs(_widen(new)), 0.0), axis=1), axis=0)
    return num, den


@triton.jit
def _random_bits(jobs, job, step_key, at):
    """As `rounding.random_bits`."""
    key = _field(jobs, job, KEY).to(tl.uint32) ^ step_key.to(tl.uint32)
    x = (at + _field(jobs, job, OFFSET).to(tl.int32)).to(tl.uint32) * HASH_ELEMENT + key
    x = (x ^ (x >> 16)) * HASH_FIRST
    x = (x ^ (x >> 15)) * HASH_SECOND
    return x ^ (x >> 16)


@kernel
def advance_units(
    jobs, addresses, units, first, coefficients, all_finite, exact_scratch, step_key,
    T_A: tl.constexpr, T_W: tl.constexpr,
    FACTORED: tl.constexpr, BF16: tl.constexpr, ALIGNED: tl.constexpr,
    ATAN: tl.constexpr, RMS: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """The step of a unit: y and z move, and Prodigy's sums are taken at the point they leave."""
    if tl.load(all_finite) != 0:
        unit = units + (first + tl.program_id(0)) * 3
        job, chunk, strip = tl.load(unit), tl.load(unit + 1), tl.load(unit + 2)
        y_address, g_address = tl.load(addresses + job * 2), tl.load(addresses + job * 2 + 1)
        z_address, s_address, group = _field(jobs, job, Z), _field(jobs, job, S), _field(jobs, job, GROUP)
        width, col, col_mask = _columns(jobs, job, strip, T_W, ALIGNED)
        begin = chunk * (T_A * CHUNK)
        end = tl.minimum(begin + T_A * CHUNK, _field(jobs, job, A).to(tl.int32))
        dlr, weight = _coefficient(coefficients, group, DLR), _coefficient(coefficients, group, WEIGHT)
        share = _coefficient(coefficients, group, Y_SHARE)
        away = dlr * _coefficient(coefficients, group, DECAY) + _coefficient(coefficients, group, DECAY_APART)
        if RMS:
            dlr *= tl.load(_field(jobs, job, SUMS).to(tl.pointer_type(tl.float64)) + 2).to(tl.float32)
        num, den = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
        for a0 in range(begin, end, T_A):
            a = a0 + tl.arange(0, T_A)
            at, mask = a[:, None] * width + col[None, :], (a < end)[:, None] & col_mask[None, :]
            g = _read(g_address, at, mask, BF16, ALIGNED)
            y = _read(y_address, at, mask, BF16, ALIGNED)
            z = _read(z_address, at, mask, BF16, ALIGNED)
            if s_address != 0:
                more_num, more_den = _prodigy_sums(jobs, job, coefficients, group, at, mask, g, z, s_address)
                num += more_num.to(tl.float64)
                den += more_den.to(tl.float64)
            root = _root(jobs, job, coefficients, group, a, col, at, mask, g, FACTORED, True)
            move = _update(coefficients, group, g, root, ATAN) * dlr + away * y
            y = y + weight * (z - y) - share * move
            z = z - move
            if BF16:
                if STOCHASTIC:
                    bits = _random_bits(jobs, job, step_key, at)
                    y_bits = ((y.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)) >> 16).to(tl.uint16)
                    z_bits = ((z.to(tl.uint32, bitcast=True) + (bits >> 16)) >> 16).to(tl.uint16)
                else:
                    y_bits, z_bits = _nearest(y), _nearest(z)
                _write(y_address, at, y_bits, mask, BF16, ALIGNED)
                _write(z_address, at, z_bits, mask, BF16, ALIGNED)
            else:
                _write(y_address, at, y, mask, BF16, ALIGNED)
                _write(z_address, at, z, mask, BF16, ALIGNED)
        place = _field(jobs, job, PARTIAL) + (chunk * _field(jobs, job, STRIPS) + strip) * 2
        tl.store(exact_scratch + place, num * _coefficient(coefficients, group, LAM).to(tl.float64))
        tl.store(exact_scratch + place + 1, den)
