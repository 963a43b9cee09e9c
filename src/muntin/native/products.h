// Vectors, and products of tiles that stay in registers: what the programs (kernels.cpp) and the layers of training
// (training.cpp) are made from. LANES floats are a vector.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include <omp.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, WIDE = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, WIDE = 2;
#else
constexpr int LANES = 4, WIDE = 4;
#endif
constexpr int ROWS = 6;               // of a tile: ROWS * WIDE accumulators stay in registers
constexpr int PANEL = LANES * WIDE;   // columns of a tile
constexpr int HALVES = 8 * ROWS;       // rows that are rounded to bfloat16 at a time

typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t ivec __attribute__((vector_size(LANES * sizeof(float))));

static inline int least(int a, int b) { return a < b ? a : b; }

// The next multiple of LANES
static inline int padded_to(int count) { return (count + LANES - 1) / LANES * LANES; }

static inline vec load(const float* p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
static inline vec spread(float x) { return x - vec{}; }
// Of a bound and x; NaN stays NaN
#if defined(__AVX512F__)
static inline vec larger(vec bound, vec x) { return (vec)_mm512_max_ps((__m512)bound, (__m512)x); }
static inline vec smaller(vec bound, vec x) { return (vec)_mm512_min_ps((__m512)bound, (__m512)x); }
#elif defined(__AVX__)
static inline vec larger(vec bound, vec x) { return (vec)_mm256_max_ps((__m256)bound, (__m256)x); }
static inline vec smaller(vec bound, vec x) { return (vec)_mm256_min_ps((__m256)bound, (__m256)x); }
#else
static inline vec larger(vec bound, vec x) { return bound > x ? bound : x; }
static inline vec smaller(vec bound, vec x) { return bound < x ? bound : x; }
#endif

// exp to 1 unit in the last place up to e^88; 0 below -87. Adding `digits` rounds to a whole number, which then stands
// in the last bits.
static inline vec exponential(vec x) {
    const vec low = spread(-87.0f);
    const vec clamped = smaller(spread(88.0f), larger(low, x));
    const vec digits = spread(12582912.0f), moved = clamped * 1.44269504088896341f + digits, whole = moved - digits;
    const vec r = clamped - whole * 0.693359375f + whole * 2.12194440e-4f;
    vec y = spread(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    ivec power;
    std::memcpy(&power, &moved, sizeof power);
    power = (power << 23) + (127 << 23);
    vec scale;
    std::memcpy(&scale, &power, sizeof scale);
    return x < low ? vec{} : y * scale;
}

// The rational approximation of single precision that Eigen and XLA use
static inline vec error_function(vec x) {
    x = smaller(spread(4.0f), larger(spread(-4.0f), x));
    const vec s = x * x;
    vec p = spread(-2.72614225801306e-10f);
    for (const float c : {2.77068142495902e-08f, -2.10102402082508e-06f, -5.69250639462346e-05f, -7.34990630326855e-04f,
                          -2.95459980854025e-03f, -1.60960333262415e-02f})
        p = p * s + c;
    vec q = spread(-1.45660718464996e-05f);
    for (const float c : {-2.13374055278905e-04f, -1.68282697438203e-03f, -7.37332916720468e-03f,
                          -1.42647390514189e-02f})
        q = q * s + c;
    return x * p / q;
}

#if defined(__clang__)
#define SHUFFLED(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define SHUFFLED(x, ...) __builtin_shuffle(x, ivec{__VA_ARGS__})
#endif

// Neighbours change places
static inline vec swapped(vec x) {
#if defined(__AVX512F__)
    return SHUFFLED(x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif defined(__AVX__)
    return SHUFFLED(x, 1, 0, 3, 2, 5, 4, 7, 6);
#else
    return SHUFFLED(x, 1, 0, 3, 2);
#endif
}

#if defined(__AVX512F__)
static inline float total(vec x) { return _mm512_reduce_add_ps((__m512)x); }
static inline float largest(vec x) { return _mm512_reduce_max_ps((__m512)x); }
#elif defined(__AVX__)
static inline float total(vec x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
static inline float largest(vec x) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#else
static inline float total(vec x) { return (x[0] + x[1]) + (x[2] + x[3]); }
static inline float largest(vec x) {
    float top = x[0];
    for (int c = 1; c < LANES; ++c) top = x[c] > top ? x[c] : top;
    return top;
}
#endif

// LANES x LANES values of 32 bits
static inline void turn(vec (&a)[LANES]) {
#if defined(__clang__)
    float from[LANES][LANES], to[LANES][LANES];
    std::memcpy(from, a, sizeof from);
    for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < LANES; ++j) to[j][i] = from[i][j];
    std::memcpy(a, to, sizeof to);
#else
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2) {
        ivec low, high;
        for (int j = 0; j < LANES; ++j) {
            low[j] = j & step ? LANES + j - step : j;
            high[j] = j & step ? LANES + j : j + step;
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i)
            if (!(i & step)) {
                const vec x = a[i], y = a[i + step];
                a[i] = __builtin_shuffle(x, y, low);
                a[i + step] = __builtin_shuffle(x, y, high);
            }
    }
#endif
}

enum Act { NONE = 0, RELU = 1, HARDSWISH = 2, SIGMOID = 3, GELU = 4 };

static inline vec activated(vec x, int act) {
    switch (act) {
        case RELU: return larger(vec{}, x);
        case HARDSWISH: return x * smaller(spread(6.0f), larger(vec{}, x + 3.0f)) * (1.0f / 6.0f);
        case SIGMOID: return 1.0f / (1.0f + exponential(-x));
        case GELU: {
            const vec y = x * 0.5f * (1.0f + error_function(x * 0.70710678118654752f));
            return x < -6.0f ? vec{} : y;  // where the approximation of erf is not quite -1
        }
        default: return x;
    }
}

// ------------------------------------------------------------------------------------------------------- products

// Two bfloat16 that follow each other along the depth of a product
struct Pair {
    uint32_t bits;
};

static inline uint32_t rounded(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40u;  // not a number
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

// (rows, depth) -> pairs (rows, depth / 2, rounded up)
static void halve(const float* x, int64_t ldx, int rows, int depth, Pair* y) {
    for (int r = 0; r < rows; ++r, x += ldx) {
        int k = 0;
#if defined(__AVX512BF16__)
        for (; k + 32 <= depth; k += 32, y += 16) {
            const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + k + 16), _mm512_loadu_ps(x + k));
            std::memcpy(y, &both, sizeof both);
        }
#endif
        for (; k < depth; k += 2, ++y) y->bits = rounded(x[k]) | (k + 1 < depth ? rounded(x[k + 1]) << 16 : 0u);
    }
}

// Where a product goes: act(a @ b + bias) + residual. `columns` of the panel are real.
struct Out {
    float* y;
    int64_t stride;
    const float* bias;      // of the panel, or null
    const float* residual;  // laid out as y, or null
    int act;
    int columns;
};

template <int ACT, int N>
static inline void activate_as(vec* sums) {
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) sums[i] = activated(sums[i], ACT);
}
template <int N>
static inline void activate(vec* sums, int act) {
    switch (act) {
        case RELU: return activate_as<RELU, N>(sums);
        case HARDSWISH: return activate_as<HARDSWISH, N>(sums);
        case SIGMOID: return activate_as<SIGMOID, N>(sums);
        default: return activate_as<GELU, N>(sums);
    }
}

// The real columns of a tile's sums (rows, wide), plus the residual
static __attribute__((noinline)) void store_some(const vec* sums, int rows, int wide, const Out& out) {
    for (int i = 0; i < rows; ++i)
        for (int c = 0; c < out.columns; ++c) {
            const int64_t at = i * out.stride + c;
            out.y[at] = sums[i * wide + c / LANES][c % LANES] + (out.residual ? out.residual[at] : 0.0f);
        }
}

// T: float, or Pair, of which there is half the depth. TURNED: a is (depth, rows)
template <int R, int W, bool TURNED, typename T>
static void tile(const T* a, int64_t lda, int depth, const T* b, int64_t ldb, const Out& out) {
    vec sums[R][W];
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < W; ++j) sums[i][j] = out.bias ? load(out.bias + j * LANES) : vec{};
    for (int k = 0; k < depth; ++k, b += ldb) {
        if constexpr (std::is_same_v<T, float>) {
            vec columns[W];
            for (int j = 0; j < W; ++j) columns[j] = load(b + j * LANES);
            for (int i = 0; i < R; ++i)
                for (int j = 0; j < W; ++j) sums[i][j] += a[TURNED ? k * lda + i : i * lda + k] * columns[j];
        } else {
#if defined(__AVX512BF16__)
            __m512i columns[W];
            for (int j = 0; j < W; ++j) columns[j] = _mm512_loadu_si512(b + j * LANES);
            for (int i = 0; i < R; ++i) {
                const __m512bh both = (__m512bh)_mm512_set1_epi32((int)a[i * lda + k].bits);
                for (int j = 0; j < W; ++j)
                    sums[i][j] = (vec)_mm512_dpbf16_ps((__m512)sums[i][j], both, (__m512bh)columns[j]);
            }
#endif
        }
    }
    if (out.act != NONE) {
        vec held[R * W];  // so that the sums themselves never leave their registers
        for (int i = 0; i < R * W; ++i) held[i] = sums[i / W][i % W];
        activate<R * W>(held, out.act);
        for (int i = 0; i < R * W; ++i) sums[i / W][i % W] = held[i];
    }
    if (out.columns == W * LANES) {
        if (out.residual)
            for (int i = 0; i < R; ++i)
                for (int j = 0; j < W; ++j) sums[i][j] += load(out.residual + i * out.stride + j * LANES);
        for (int i = 0; i < R; ++i)
            for (int j = 0; j < W; ++j) store(out.y + i * out.stride + j * LANES, sums[i][j]);
        return;
    }
    vec held[R * W];
    for (int i = 0; i < R * W; ++i) held[i] = sums[i / W][i % W];
    store_some(held, R, W, out);
}

template <int W, bool TURNED, typename T>
static void tile_rows(int rows, const T* a, int64_t lda, int depth, const T* b, int64_t ldb, const Out& out) {
    switch (rows) {
        case 1: return tile<1, W, TURNED>(a, lda, depth, b, ldb, out);
        case 2: return tile<2, W, TURNED>(a, lda, depth, b, ldb, out);
        case 3: return tile<3, W, TURNED>(a, lda, depth, b, ldb, out);
        case 4: return tile<4, W, TURNED>(a, lda, depth, b, ldb, out);
        case 5: return tile<5, W, TURNED>(a, lda, depth, b, ldb, out);
        default: return tile<6, W, TURNED>(a, lda, depth, b, ldb, out);
    }
}

// (rows <= ROWS, depth) @ (depth, columns <= PANEL); b may be read up to the next multiple of LANES columns
template <bool TURNED = false, typename T>
static void block(int rows, const T* a, int64_t lda, int depth, const T* b, int64_t ldb, const Out& out) {
    switch ((out.columns + LANES - 1) / LANES) {
        case 1: return tile_rows<1, TURNED>(rows, a, lda, depth, b, ldb, out);
        case 2: return tile_rows<2, TURNED>(rows, a, lda, depth, b, ldb, out);
#if !defined(__AVX__) || defined(__AVX512F__)
        case 3: return tile_rows<3, TURNED>(rows, a, lda, depth, b, ldb, out);
        default: return tile_rows<4, TURNED>(rows, a, lda, depth, b, ldb, out);
#else
        default: return tile_rows<2, TURNED>(rows, a, lda, depth, b, ldb, out);
#endif
    }
}

// What a product multiplies with: panels of float, or of Pair. Of `halves`, HALVES rows of pairs fit.
struct Weights {
    const void* panels;
    const float* bias;
    int inputs, outputs;
    Pair* halves;  // null: panels of float
};

// Rows from `first` to `last` of x @ w, panel by panel; x begins at the row `base`
template <typename T>
static void product(const T* x, int base, int64_t ldx, int depth, const Weights& w, int act, const float* residual,
                    float* y, int64_t ldy, int first, int last, int from, int to) {
    for (int p = from; p < to; ++p) {
        const int width = least(PANEL, w.outputs - p * PANEL), padded = padded_to(width);
        const T* panel = (const T*)w.panels + (int64_t)p * PANEL * depth;
        // tiles of equal height: one of a single row would wait for its few sums
        for (int r = first, tiles = (last - first + ROWS - 1) / ROWS; tiles; --tiles) {
            const int rows = (last - r + tiles - 1) / tiles;
            const Out out{y + r * ldy + p * PANEL, ldy, w.bias + p * PANEL,
                          residual ? residual + r * ldy + p * PANEL : nullptr, act, width};
            block(rows, x + (r - base) * ldx, ldx, depth, panel, padded, out);
            r += rows;
        }
    }
}

// The same for panels `from` to `to` of weights of either kind
static void linear(const float* x, int64_t ldx, const Weights& w, int act, const float* residual, float* y, int64_t ldy,
                   int first, int last, int from, int to) {
    if (!w.halves) return product(x, 0, ldx, w.inputs, w, act, residual, y, ldy, first, last, from, to);
    const int depth = (w.inputs + 1) / 2;
    for (int start = first; start < last; start += HALVES) {
        const int stop = least(last, start + HALVES);
        halve(x + start * ldx, ldx, stop - start, w.inputs, w.halves);
        product((const Pair*)w.halves, start, depth, depth, w, act, residual, y, ldy, start, stop, from, to);
    }
}
