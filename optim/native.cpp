// The step of `stacks.py` for the CPU, one pass over memory: the plain path's fast twin. Compiled by `native.py` on first use.
//
// Work is cut into blocks of about 32,768 elements that stay in one core's cache. How a tensor is cut depends on its shape
// alone and sums are added up block by block, so results depend neither on the number of threads nor on what else is in a call.

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int SLICE_P = 11;
constexpr float TINY = 1.1754943508222875e-38f;

// One parameter; the layout is that of `native.py`'s table of int64.
struct Job {
    void *y;
    const void *g;
    void *z;
    float *row, *col;            // R [A, K] and C [B, K]; null where nothing is factored
    float *v;                    // full second moment [numel], or null
    uint16_t *s;                 // bfloat16, or null once d is frozen
    const uint16_t *p0;          // bfloat16, or null: starts at zero
    float *row_root, *col_root;  // within the step: sums of g^2, then sqrt(R / mean R) and sqrt(C)
    float *total;                // sum of g^2
    double *sums;                // num, den
    double *partial;             // [blocks, 2], then reused for |u|^2
    float *col_partial;          // [blocks, B * K] where there is more than one block
    int64_t A, B, K;             // axes: factored, factored, the rest
    int64_t whole_a;             // A of the unsharded tensor
    int64_t rows;                // rows (of B * K elements) a block
    int64_t offset;              // number of the first element in the unsharded tensor
    int64_t whole;               // elements of the unsharded tensor
    int64_t group;
    int64_t key;
};

// The order is that of `prodigy.Coefficients`.
struct Coefficients {
    float d, beta1, gain, beta2, square, lam, beta3, dlr, weight, y_share, decay, decay_apart, d_eps, clamp;
};

struct Unit { int64_t job, block; };

inline float load(const float *p, int64_t i) { return p[i]; }
inline float load(const uint16_t *p, int64_t i) {
    uint32_t bits = uint32_t(p[i]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline uint16_t nearest(float value) {
    uint32_t bits = bits_of(value);
    return uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
inline uint32_t random_bits(uint32_t element, uint32_t key) {
    uint32_t x = element * 0x9E3779B9u + key;
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    return x ^ (x >> 16);
}
inline void store(float *p, int64_t i, float value, uint32_t) { p[i] = value; }
inline void store(uint16_t *p, int64_t i, float value, uint32_t random) {
    p[i] = uint16_t((bits_of(value) + random) >> 16);
}

// (4/pi) atan2(t, root) for root >= 0; a minimax polynomial of atan on [0, 1], within 2.1e-7 of the true value (of up to 2).
inline float atan2_update(float t, float root) {
    float a = std::fabs(t);
    float low = a < root ? a : root, high = a < root ? root : a;
    float r = low / (high > TINY ? high : TINY), q = r * r;
    float p = -0.005162435118108988f;
    p = p * q + 0.02783678099513054f;
    p = p * q - 0.07118978351354599f;
    p = p * q + 0.12276826798915863f;
    p = p * q - 0.17709016799926758f;
    p = p * q + 0.2539675533771515f;
    p = p * q - 0.4243689775466919f;
    p = p * q + 1.2732386589050293f;
    p *= r;
    p = a > root ? 2.0f - p : p;
    return std::copysign(p, t);
}

template <bool ATAN> inline float raw_update(float t, float root, float d_eps) {
    return ATAN ? atan2_update(t, root) : t / (root + d_eps);
}

template <typename T> void measure_block(const Job &job, int64_t block) {
    const T *g = static_cast<const T *>(job.g);
    int64_t width = job.B * job.K, first = block * job.rows, last = first + job.rows < job.A ? first + job.rows : job.A;
    if (!job.row) {
        double total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t i = first * width; i < last * width; ++i) total += double(load(g, i)) * load(g, i);
        job.partial[2 * block] = total;
        return;
    }
    float *col = job.rows < job.A ? job.col_partial + block * width : job.col_root;
    std::memset(col, 0, sizeof(float) * width);
    for (int64_t a = first; a < last; ++a) {
        const T *line = g + a * width;
        if (job.K == 1) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < width; ++j) {
                float square = load(line, j) * load(line, j);
                col[j] += square;
                sum += square;
            }
            job.row_root[a] = sum;
            continue;
        }
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) col[j] += load(line, j) * load(line, j);
        for (int64_t k = 0; k < job.K; ++k) {
            float sum = 0;
            for (int64_t b = 0; b < job.B; ++b) sum += load(line, b * job.K + k) * load(line, b * job.K + k);
            job.row_root[a * job.K + k] = sum;
        }
    }
}

// Adds up what the blocks found: column sums and the total.
void measure_total(const Job &job) {
    int64_t width = job.B * job.K, blocks = job.A ? (job.A + job.rows - 1) / job.rows : 0;
    double total = 0;
    if (!job.row) {
        for (int64_t b = 0; b < blocks; ++b) total += job.partial[2 * b];
        *job.total = float(total);
        return;
    }
    if (blocks != 1) {
        std::memset(job.col_root, 0, sizeof(float) * width);
        for (int64_t b = 0; b < blocks; ++b)
            for (int64_t j = 0; j < width; ++j) job.col_root[j] += job.col_partial[b * width + j];
    }
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < width; ++j) total += job.col_root[j];
    *job.total = float(total);
}

// R and C take in this step's means; their roots take the place of the sums.
void blend(const Job &job, const Coefficients &c) {
    if (!job.row) return;
    float row_gain = c.square / float(job.B), col_gain = c.square / float(job.whole_a);
    for (int64_t j = 0; j < job.B * job.K; ++j) {
        job.col[j] = job.col_root[j] * col_gain + job.col[j] * c.beta2;
        job.col_root[j] = std::sqrt(job.col[j]);
    }
    for (int64_t k = 0; k < job.K; ++k) {
        double mean = 0;
        for (int64_t b = 0; b < job.B; ++b) mean += job.col[b * job.K + k];
        float divisor = float(mean / double(job.B));
        divisor = divisor > TINY ? divisor : TINY;
        for (int64_t a = 0; a < job.A; ++a) {
            int64_t i = a * job.K + k;
            job.row[i] = job.row_root[i] * row_gain + job.row[i] * c.beta2;
            job.row_root[i] = std::sqrt(job.row[i] / divisor);
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
#pragma omp simd reduction(+ : num, den)
    for (int64_t i = from; i < to; ++i) {
        int64_t e = i * SLICE_P + shift;
        float gradient = load(g, e);
        num += gradient * ((job.p0 ? load(job.p0, i) : 0.0f) - load(z, e));
        uint16_t decayed = nearest(load(job.s, i) * c.beta3);
        uint16_t sum = nearest(load(&decayed, 0) + gradient * c.lam);
        job.s[i] = sum;
        den += std::fabs(load(&sum, 0));
    }
    out[0] = num * c.lam;
    out[1] = den;
}

// y and z of one line of n elements. ROOT: 0 sqrt v = scale * root[j]; 1 root[j]; 2 from v, which is brought up to date.
template <typename T, bool ATAN, int ROOT, bool DECAY, bool STOCHASTIC>
void advance_line(T *y, const T *g, T *z, float *v, const float *root, float scale, float divide, int64_t n,
                  const Coefficients &c, uint32_t key, uint32_t element) {
    const float d = c.d, dlr = c.dlr, weight = c.weight, share = c.y_share, decay = c.decay, apart = c.decay_apart;
    const float beta2 = c.beta2, square = c.square, d_eps = c.d_eps;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
        float gradient = load(g, j), y0 = load(y, j), z0 = load(z, j);
        float sqrt_v;
        if (ROOT == 0) sqrt_v = scale * root[j];
        if (ROOT == 1) sqrt_v = root[j];
        if (ROOT == 2) {
            float moment = v[j] * beta2 + gradient * square * gradient;
            v[j] = moment;
            sqrt_v = std::sqrt(moment);
        }
        float u = raw_update<ATAN>(gradient * d, sqrt_v, d_eps) * divide;
        if (DECAY) u += decay * y0;
        float move = u * dlr;
        float away = DECAY ? apart * y0 : 0.0f;
        float y1 = y0 + weight * (z0 - y0) - share * (move + away);
        float z1 = z0 - move - away;
        uint32_t random = STOCHASTIC ? random_bits(element + uint32_t(j), key) : 0u;
        if (STOCHASTIC || sizeof(T) == 4) {
            store(y, j, y1, random & 0xFFFFu);
            store(z, j, z1, random >> 16);
        } else {
            store(y, j, y1, 0x7FFFu + ((bits_of(y1) >> 16) & 1u));
            store(z, j, z1, 0x7FFFu + ((bits_of(z1) >> 16) & 1u));
        }
    }
}

template <typename T, bool ATAN, bool DECAY, bool STOCHASTIC>
void advance_rows(const Job &job, int64_t a0, int64_t a1, float divide, const Coefficients &c, uint32_t step_key, float *line) {
    int64_t width = job.B * job.K;
    uint32_t key = uint32_t(job.key) ^ step_key;
    T *y = static_cast<T *>(job.y), *z = static_cast<T *>(job.z);
    const T *g = static_cast<const T *>(job.g);
    if (!job.row) {
        int64_t i = a0 * width;
        advance_line<T, ATAN, 2, DECAY, STOCHASTIC>(y + i, g + i, z + i, job.v + i, nullptr, 1, divide, (a1 - a0) * width, c,
                                                    key, uint32_t(job.offset + i));
        return;
    }
    for (int64_t a = a0; a < a1; ++a) {
        int64_t i = a * width;
        uint32_t element = uint32_t(job.offset + i);
        if (job.K == 1) {
            advance_line<T, ATAN, 0, DECAY, STOCHASTIC>(y + i, g + i, z + i, nullptr, job.col_root, job.row_root[a], divide, width,
                                                        c, key, element);
            continue;
        }
        for (int64_t b = 0; b < job.B; ++b)
            for (int64_t k = 0; k < job.K; ++k)
                line[b * job.K + k] = job.col_root[b * job.K + k] * job.row_root[a * job.K + k];
        advance_line<T, ATAN, 1, DECAY, STOCHASTIC>(y + i, g + i, z + i, nullptr, line, 1, divide, width, c, key, element);
    }
}

// |u|^2 of a block, for StableAdamW; eps > 0 only.
template <typename T> double squared_update(const Job &job, int64_t a0, int64_t a1, const Coefficients &c) {
    int64_t width = job.B * job.K;
    const T *g = static_cast<const T *>(job.g);
    double total = 0;
    if (!job.row) {
        for (int64_t i = a0 * width; i < a1 * width; ++i) {
            float value = load(g, i);
            float u = value * c.d / (std::sqrt(job.v[i] * c.beta2 + value * c.square * value) + c.d_eps);
            total += double(u) * u;
        }
        return total;
    }
    for (int64_t a = a0; a < a1; ++a) {
        const T *gradient = g + a * width;
        float sum = 0;
        if (job.K == 1) {
            float scale = job.row_root[a];
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < width; ++j) {
                float u = load(gradient, j) * c.d / (scale * job.col_root[j] + c.d_eps);
                sum += u * u;
            }
        } else {
            for (int64_t b = 0; b < job.B; ++b)
                for (int64_t k = 0; k < job.K; ++k) {
                    int64_t j = b * job.K + k;
                    float u = load(gradient, j) * c.d / (job.row_root[a * job.K + k] * job.col_root[j] + c.d_eps);
                    sum += u * u;
                }
        }
        total += sum;
    }
    return total;
}

template <typename T>
void advance_block(const Job &job, int64_t block, float divide, const Coefficients &c, bool atan, bool stochastic,
                   uint32_t step_key, float *line) {
    int64_t width = job.B * job.K, a0 = block * job.rows, a1 = a0 + job.rows < job.A ? a0 + job.rows : job.A;
    prodigy_sums<T>(job, a0 * width, a1 * width, c, job.partial + 2 * block);
    bool decay = c.decay != 0 || c.decay_apart != 0;
    bool rounds = stochastic && sizeof(T) == 2;
#define ROWS(ATAN, DECAY, ROUNDS) advance_rows<T, ATAN, DECAY, ROUNDS>(job, a0, a1, divide, c, step_key, line)
    if (atan && decay) rounds ? ROWS(true, true, true) : ROWS(true, true, false);
    if (atan && !decay) rounds ? ROWS(true, false, true) : ROWS(true, false, false);
    if (!atan && decay) rounds ? ROWS(false, true, true) : ROWS(false, true, false);
    if (!atan && !decay) rounds ? ROWS(false, false, true) : ROWS(false, false, false);
#undef ROWS
}

}  // namespace

extern "C" {

int64_t sdtrain_job_bytes() { return sizeof(Job); }

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

// scratch: float [threads, longest row]. With an unsound gradient everything stays as it is.
void sdtrain_advance(const Job *jobs, int64_t num_jobs, const Unit *units, int64_t num_units, const Coefficients *table,
                     const uint8_t *sound, int bf16, int atan, int rms, int stochastic, uint32_t step_key, float *scratch,
                     int64_t longest, int threads) {
    if (!*sound) return;
#pragma omp parallel num_threads(threads) if (num_units > 1)
    {
#ifdef _OPENMP
        float *line = scratch + longest * omp_get_thread_num();
#else
        float *line = scratch;
#endif
#pragma omp for schedule(dynamic, 4)
        for (int64_t i = 0; i < num_jobs; ++i) blend(jobs[i], table[jobs[i].group]);
        if (rms) {
#pragma omp for schedule(dynamic, 4)
            for (int64_t i = 0; i < num_units; ++i) {
                const Job &job = jobs[units[i].job];
                const Coefficients &c = table[job.group];
                int64_t a0 = units[i].block * job.rows, a1 = a0 + job.rows < job.A ? a0 + job.rows : job.A;
                job.partial[2 * units[i].block] =
                        bf16 ? squared_update<uint16_t>(job, a0, a1, c) : squared_update<float>(job, a0, a1, c);
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
            const Coefficients &c = table[job.group];
            float divide = rms ? float(job.sums[2]) : 1.0f;
            if (bf16)
                advance_block<uint16_t>(job, units[i].block, divide, c, atan, stochastic, step_key, line);
            else
                advance_block<float>(job, units[i].block, divide, c, atan, stochastic, step_key, line);
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
