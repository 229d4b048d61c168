// What the step does to a tile, a few hundred neighbouring elements that stay within the registers' reach: each is a plain
// loop over float arrays, which compilers turn into vector instructions. Included by `cpu.cpp`.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int SLICE_P = SDTRAIN_SLICE_P;
constexpr int64_t TILE = SDTRAIN_TILE;
constexpr float TINY = SDTRAIN_TINY;

inline float widen(uint16_t value) {
    uint32_t bits = uint32_t(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
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
inline float load(const float *p, int64_t i) { return p[i]; }
inline float load(const uint16_t *p, int64_t i) { return widen(p[i]); }

// n elements as floats: where they are, or widened into the buffer.
inline const float *as_float(const float *p, float *, int64_t) { return p; }
inline const float *as_float(const uint16_t *__restrict p, float *__restrict buffer, int64_t n) {
#pragma omp simd
    for (int32_t j = 0; j < int32_t(n); ++j) buffer[j] = widen(p[j]);
    return buffer;
}
inline float *as_float(float *p, float *, int64_t) { return p; }
inline float *as_float(uint16_t *p, float *buffer, int64_t n) {
    as_float(static_cast<const uint16_t *>(p), buffer, n);
    return buffer;
}

// Floats back to bfloat16, stochastically or to the nearest; the low half of the random bits is y's, the high half z's.
inline void put_back(float *, float *, const float *, const float *, int64_t, bool, uint32_t, uint32_t) {}
inline void put_back(uint16_t *__restrict y, uint16_t *__restrict z, const float *__restrict from_y,
                     const float *__restrict from_z, int64_t n, bool stochastic, uint32_t key, uint32_t element) {
    if (!stochastic) {
#pragma omp simd
        for (int32_t j = 0; j < int32_t(n); ++j) {
            y[j] = nearest(from_y[j]);
            z[j] = nearest(from_z[j]);
        }
        return;
    }
#pragma omp simd
    for (int32_t j = 0; j < int32_t(n); ++j) {
        uint32_t x = (element + uint32_t(j)) * SDTRAIN_HASH_ELEMENT + key;
        x ^= x >> 16;
        x *= SDTRAIN_HASH_FIRST;
        x ^= x >> 15;
        x *= SDTRAIN_HASH_SECOND;
        x ^= x >> 16;
        y[j] = uint16_t((bits_of(from_y[j]) + (x & 0xFFFFu)) >> 16);
        z[j] = uint16_t((bits_of(from_z[j]) + (x >> 16)) >> 16);
    }
}

// (4/pi) atan2(t, root) for root >= 0, by `ATAN_POLYNOMIAL` of second_moment.py: within 2.1e-7 of the true value (of up to 2).
inline float atan2_update(float t, float root) {
    float a = std::fabs(t);
    float low = a < root ? a : root, high = a < root ? root : a;
    float r = low / (high > TINY ? high : TINY), q = r * r;
    float p = SDTRAIN_ATAN_0;
    p = p * q + SDTRAIN_ATAN_1;
    p = p * q + SDTRAIN_ATAN_2;
    p = p * q + SDTRAIN_ATAN_3;
    p = p * q + SDTRAIN_ATAN_4;
    p = p * q + SDTRAIN_ATAN_5;
    p = p * q + SDTRAIN_ATAN_6;
    p = p * q + SDTRAIN_ATAN_7;
    p *= r;
    p = a > root ? 2.0f - p : p;
    return std::copysign(p, t);
}

inline float sum_of(const float *__restrict values, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int32_t j = 0; j < int32_t(n); ++j) sum += values[j];
    return sum;
}

inline void square(const float *__restrict values, float *__restrict squares, int64_t n) {
#pragma omp simd
    for (int32_t j = 0; j < int32_t(n); ++j) squares[j] = values[j] * values[j];
}

inline void add(const float *__restrict values, float *__restrict sums, int64_t n) {
#pragma omp simd
    for (int32_t j = 0; j < int32_t(n); ++j) sums[j] += values[j];
}

// Adds each element to the sum of its k; they come in runs of K.
inline void sum_by_k(const float *__restrict values, int64_t n, int64_t K, float *__restrict sums) {
    if (K == 1) {
        sums[0] += sum_of(values, n);
        return;
    }
    for (int64_t i = 0; i < n; i += K)
        for (int64_t k = 0; k < K; ++k) sums[k] += values[i + k];
}

// n values that repeat K of them, from number `from` on; K <= TILE. Copies twice as long each are fewer than n / K.
inline void repeat(const float *values, int64_t K, int64_t from, int64_t n, float *out) {
    std::memcpy(out, values + from, sizeof(float) * (K - from));
    std::memcpy(out + K - from, values, sizeof(float) * from);
    for (int64_t filled = K; filled < n; filled *= 2)
        std::memcpy(out + filled, out, sizeof(float) * (filled < n - filled ? filled : n - filled));
}

// u of n elements, in the place of the roots.
inline void updates(const float *__restrict g, float *__restrict u, int64_t n, float d, float d_eps, bool atan) {
    if (atan) {
#pragma omp simd
        for (int32_t j = 0; j < int32_t(n); ++j) u[j] = atan2_update(g[j] * d, u[j]);
    } else {
#pragma omp simd
        for (int32_t j = 0; j < int32_t(n); ++j) u[j] = g[j] * d / (u[j] + d_eps);
    }
}

}  // namespace
