// The step of `plain.py` for the CPU, one pass over memory: the plain path's fast twin. Compiled by `cpu.py` on first use.
//
// Work is cut into blocks of about 32,768 elements that stay in one core's cache, and these into tiles of 512, for which
// `cpu_tiles.h` has the arithmetic. How a tensor is cut depends on its shape alone and sums are added up block by block,
// so results depend neither on the number of threads nor on what else is in a call.

#ifndef SDTRAIN_JOB_FIELDS
#error "compiled by cpu.py, which hands over the names and numbers that Python knows, too"
#endif

#include "cpu_tiles.h"

namespace {

// One parameter. `cpu.py` says the fields, their types and their order (`JOB`), and hands them to the compiler.
struct Job {
    SDTRAIN_JOB_FIELDS
};

// As `Coefficients` in prodigy.py has them, handed over likewise.
struct Coefficients {
    float SDTRAIN_COEFFICIENT_NAMES;
};

struct Unit { int64_t job, block; };

// Sums of g^2 of whole rows that share a tile (rows of at most TILE elements), or of one row in several tiles.
template <typename T> void measure_block(const Job &job, int64_t block) {
    const T *g = static_cast<const T *>(job.g);
    float buffer[TILE], squares[TILE], by_place[TILE], wide[TILE] = {0};
    int64_t width = job.B * job.K, first = block * job.rows, last = first + job.rows < job.A ? first + job.rows : job.A;
    if (!job.col) {
        double total = 0;
        for (int64_t i = first * width; i < last * width; i += TILE) {
            int64_t n = last * width - i < TILE ? last * width - i : TILE;
            square(as_float(g + i, buffer, n), squares, n);
            total += sum_of(squares, n);
        }
        job.partial[2 * block] = total;
        return;
    }
    float *col = job.rows < job.A ? job.col_partial + block * width : job.col_now;
    std::memset(col, 0, sizeof(float) * width);
    std::memset(job.row_now + first * job.K, 0, sizeof(float) * (last - first) * job.K);
    int64_t together = width <= TILE ? TILE / width : 1;
    // a row of several tiles is cut where K begins anew, so that elements of one k always share a place in a tile
    int64_t tile = width <= TILE ? TILE : TILE - TILE % job.K;
    for (int64_t a = first; a < last; a += together) {
        int64_t rows = last - a < together ? last - a : together;
        if (width > TILE && job.K > 1) std::memset(by_place, 0, sizeof(by_place));
        for (int64_t at = 0; at < rows * width; at += tile) {
            int64_t n = rows * width - at < tile ? rows * width - at : tile;
            square(as_float(g + a * width + at, buffer, n), squares, n);
            if (width > TILE) {
                add(squares, col + at, n);
                if (job.K == 1)
                    job.row_now[a] += sum_of(squares, n);
                else
                    add(squares, by_place, n);
                continue;
            }
            add(squares, wide, n);
            for (int64_t r = 0; r < rows; ++r) sum_by_k(squares + r * width, width, job.K, job.row_now + (a + r) * job.K);
        }
        if (width > TILE && job.K > 1) sum_by_k(by_place, tile, job.K, job.row_now + a * job.K);
    }
    if (width <= TILE)
        for (int64_t r = 0; r < together; ++r) add(wide + r * width, col, width);
}

// Adds up what the blocks found: column sums and the total.
void measure_total(const Job &job) {
    int64_t width = job.B * job.K, blocks = job.A ? (job.A + job.rows - 1) / job.rows : 0;
    double total = 0;
    if (!job.col) {
        for (int64_t b = 0; b < blocks; ++b) total += job.partial[2 * b];
        *job.totals = float(total);
        return;
    }
    if (blocks != 1) {
        std::memset(job.col_now, 0, sizeof(float) * width);
        for (int64_t b = 0; b < blocks; ++b)
            for (int64_t j = 0; j < width; ++j) job.col_now[j] += job.col_partial[b * width + j];
    }
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < width; ++j) total += job.col_now[j];
    *job.totals = float(total);
}

// R and C take in this step's means; their roots take the place of the sums.
void blend(const Job &job, const Coefficients &c) {
    if (!job.col) return;
    float row_gain = c.square / float(job.B), col_gain = c.square / float(job.whole_a);
    for (int64_t j = 0; j < job.B * job.K; ++j) {
        job.col[j] = job.col_now[j] * col_gain + job.col[j] * c.beta2;
        job.col_now[j] = std::sqrt(job.col[j]);
    }
    for (int64_t k = 0; k < job.K; ++k) {
        double mean = 0;
        for (int64_t b = 0; b < job.B; ++b) mean += job.col[b * job.K + k];
        float divisor = float(mean / double(job.B));
        divisor = divisor > TINY ? divisor : TINY;
        for (int64_t a = 0; a < job.A; ++a) {
            int64_t i = a * job.K + k;
            job.row[i] = job.row_now[i] * row_gain + job.row[i] * c.beta2;
            job.row_now[i] = std::sqrt(job.row[i] / divisor);
        }
    }
}

// Every 11th element of the unsharded tensor: num, s and den of a block.
template <typename T> void prodigy_sums(const Job &job, int64_t first, int64_t last, const Coefficients &c, double *out) {
    if (!job.s) return;
    const T *g = static_cast<const T *>(job.g), *z = static_cast<const T *>(job.z);
    int64_t shift = (SLICE_P - job.offset % SLICE_P) % SLICE_P;  // the first slice of the tensor here
    int64_t from = first <= shift ? 0 : (first - shift + SLICE_P - 1) / SLICE_P;
    int64_t to = last <= shift ? 0 : (last - shift + SLICE_P - 1) / SLICE_P;
    double num = 0, den = 0;
    float gradients[TILE], away[TILE];
    const float beta3 = c.beta3, lam = c.lam;
    for (int64_t i = from; i < to; i += TILE) {
        int32_t n = int32_t(to - i < TILE ? to - i : TILE);
        const T *from_g = g + i * SLICE_P + shift, *from_z = z + i * SLICE_P + shift;
        uint16_t *__restrict s = job.s + i;
        for (int32_t j = 0; j < n; ++j) gradients[j] = load(from_g, j * SLICE_P);
        for (int32_t j = 0; j < n; ++j) away[j] = -load(from_z, j * SLICE_P);
        if (job.p0)
            for (int32_t j = 0; j < n; ++j) away[j] += widen(job.p0[i + j]);
        float dot = 0, norm = 0;
#pragma omp simd reduction(+ : dot)
        for (int32_t j = 0; j < n; ++j) dot += gradients[j] * away[j];
#pragma omp simd reduction(+ : norm)
        for (int32_t j = 0; j < n; ++j) {
            // each of the two operations rounds to bfloat16
            uint16_t sum = nearest(widen(nearest(widen(s[j]) * beta3)) + gradients[j] * lam);
            s[j] = sum;
            norm += std::fabs(widen(sum));
        }
        num += dot;
        den += norm;
    }
    out[0] = num * lam;
    out[1] = den;
}

// sqrt v of n elements from number i of the tensor; where nothing is factored, v takes in g^2 (and is kept, if `keep`).
inline void roots(const Job &job, int64_t i, int64_t n, const float *__restrict g, const Coefficients &c, bool keep,
                  float *__restrict root) {
    if (!job.col) {
        float *__restrict v = job.v + i;
        const float beta2 = c.beta2, gain = c.square;
        if (keep) {
#pragma omp simd
            for (int32_t j = 0; j < int32_t(n); ++j) v[j] = v[j] * beta2 + g[j] * gain * g[j];
#pragma omp simd
            for (int32_t j = 0; j < int32_t(n); ++j) root[j] = std::sqrt(v[j]);
        } else {
#pragma omp simd
            for (int32_t j = 0; j < int32_t(n); ++j) root[j] = std::sqrt(v[j] * beta2 + g[j] * gain * g[j]);
        }
        return;
    }
    int64_t width = job.B * job.K, a = i / width, at = i % width;
    for (int64_t done = 0; done < n; ++a, at = 0) {
        int64_t here = width - at < n - done ? width - at : n - done;
        const float *__restrict col = job.col_now + at;
        if (job.K == 1) {
            const float scale = job.row_now[a];
#pragma omp simd
            for (int32_t j = 0; j < int32_t(here); ++j) root[done + j] = scale * col[j];
        } else {
            float scales[2 * TILE];
            repeat(job.row_now + a * job.K, job.K, at % job.K, here, scales);
#pragma omp simd
            for (int32_t j = 0; j < int32_t(here); ++j) root[done + j] = scales[j] * col[j];
        }
        done += here;
    }
}

// |u|^2 of a block, for StableAdamW; nothing is changed.
template <typename T> double squared_update(const Job &job, int64_t first, int64_t last, const Coefficients &c, bool atan) {
    float buffer[TILE], u[TILE], squares[TILE];
    double total = 0;
    for (int64_t i = first; i < last; i += TILE) {
        int64_t n = last - i < TILE ? last - i : TILE;
        const float *g = as_float(static_cast<const T *>(job.g) + i, buffer, n);
        roots(job, i, n, g, c, false, u);
        updates(g, u, n, c.d, c.d_eps, atan);
        square(u, squares, n);
        total += sum_of(squares, n);
    }
    return total;
}

// The step of a block: y and z move.
template <typename T>
void advance_block(const Job &job, int64_t first, int64_t last, float divide, const Coefficients &c, bool atan, bool stochastic,
                   uint32_t step_key) {
    float wide_g[TILE], wide_y[TILE], wide_z[TILE], u[TILE];
    const float dlr = c.dlr * divide, weight = c.weight, share = c.y_share, away = c.dlr * c.decay + c.decay_apart;
    for (int64_t i = first; i < last; i += TILE) {
        int64_t n = last - i < TILE ? last - i : TILE;
        T *to_y = static_cast<T *>(job.y) + i, *to_z = static_cast<T *>(job.z) + i;
        const float *g = as_float(static_cast<const T *>(job.g) + i, wide_g, n);
        float *__restrict y = as_float(to_y, wide_y, n), *__restrict z = as_float(to_z, wide_z, n);
        roots(job, i, n, g, c, true, u);
        updates(g, u, n, c.d, c.d_eps, atan);
#pragma omp simd
        for (int32_t j = 0; j < int32_t(n); ++j) {
            float move = u[j] * dlr + away * y[j];
            y[j] = y[j] + weight * (z[j] - y[j]) - share * move;
            z[j] = z[j] - move;
        }
        put_back(to_y, to_z, y, z, n, stochastic, uint32_t(job.key) ^ step_key, uint32_t(job.offset + i));
    }
}

template <typename T>
void step_block(const Job &job, int64_t block, float divide, const Coefficients &c, bool atan, bool stochastic, uint32_t step_key) {
    int64_t width = job.B * job.K, a1 = (block + 1) * job.rows < job.A ? (block + 1) * job.rows : job.A;
    int64_t first = block * job.rows * width, last = a1 * width;
    prodigy_sums<T>(job, first, last, c, job.partial + 2 * block);
    advance_block<T>(job, first, last, divide, c, atan, stochastic, step_key);
}

}  // namespace

extern "C" {

int64_t sdtrain_job_bytes() { return sizeof(Job); }

#define SDTRAIN_TEXT_OF(...) #__VA_ARGS__
#define SDTRAIN_TEXT(...) SDTRAIN_TEXT_OF(__VA_ARGS__)
const char *sdtrain_layout() {
    return SDTRAIN_TEXT(SDTRAIN_JOB_FIELDS) SDTRAIN_TEXT(float SDTRAIN_COEFFICIENT_NAMES;);
}

void sdtrain_measure(const Job *jobs, int64_t num_jobs, const Unit *units, int64_t num_units, int bf16, int threads) {
#pragma omp parallel num_threads(threads) if (num_units > 1)
    {
#pragma omp for schedule(dynamic, 4)
        for (int64_t i = 0; i < num_units; ++i) {
            const Job &job = jobs[units[i].job];
            bf16 ? measure_block<uint16_t>(job, units[i].block) : measure_block<float>(job, units[i].block);
        }
#pragma omp for schedule(dynamic, 4)
        for (int64_t i = 0; i < num_jobs; ++i) measure_total(jobs[i]);
    }
}

// With a gradient that is not finite everything stays as it is.
void sdtrain_advance(const Job *jobs, int64_t num_jobs, const Unit *units, int64_t num_units, const Coefficients *coefficients,
                     const uint8_t *all_finite, int bf16, int atan, int rms, int stochastic, uint32_t step_key, int threads) {
    if (!*all_finite) return;
#pragma omp parallel num_threads(threads) if (num_units > 1)
    {
#pragma omp for schedule(dynamic, 4)
        for (int64_t i = 0; i < num_jobs; ++i) blend(jobs[i], coefficients[jobs[i].group]);
        if (rms) {
#pragma omp for schedule(dynamic, 4)
            for (int64_t i = 0; i < num_units; ++i) {
                const Job &job = jobs[units[i].job];
                const Coefficients &c = coefficients[job.group];
                int64_t a0 = units[i].block * job.rows, a1 = a0 + job.rows < job.A ? a0 + job.rows : job.A;
                int64_t width = job.B * job.K, first = a0 * width, last = a1 * width;
                job.partial[2 * units[i].block] = bf16 ? squared_update<uint16_t>(job, first, last, c, atan)
                                                       : squared_update<float>(job, first, last, c, atan);
            }
#pragma omp for schedule(dynamic, 4)
            for (int64_t i = 0; i < num_jobs; ++i) {
                const Job &job = jobs[i];
                int64_t blocks = job.A ? (job.A + job.rows - 1) / job.rows : 0;
                double total = 0;
                for (int64_t b = 0; b < blocks; ++b) total += job.partial[2 * b];
                double rms_of_u = std::sqrt(total / double(job.whole));
                job.sums[2] = 1.0 / std::sqrt(rms_of_u > 1.0 ? rms_of_u : 1.0);
            }
        }
#pragma omp for schedule(dynamic, 4)
        for (int64_t i = 0; i < num_units; ++i) {
            const Job &job = jobs[units[i].job];
            const Coefficients &c = coefficients[job.group];
            float divide = rms ? float(job.sums[2]) : 1.0f;
            if (bf16)
                step_block<uint16_t>(job, units[i].block, divide, c, atan, stochastic, step_key);
            else
                step_block<float>(job, units[i].block, divide, c, atan, stochastic, step_key);
        }
#pragma omp for schedule(dynamic, 4)
        for (int64_t i = 0; i < num_jobs; ++i) {
            const Job &job = jobs[i];
            int64_t blocks = job.A ? (job.A + job.rows - 1) / job.rows : 0;
            double num = 0, den = 0;
            for (int64_t b = 0; job.s && b < blocks; ++b) {
                num += job.partial[2 * b];
                den += job.partial[2 * b + 1];
            }
            job.sums[0] = num;
            job.sums[1] = den;
        }
    }
}
}
