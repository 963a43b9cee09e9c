// Operands of products in the order in which tiles read them, and, for training, the gradients of weights.
//
// Legend: K channels in, N channels out. S: what activations are kept in, float or Half; weights and their gradients
// are float. With Half products are of bfloat16, summed in float.

#pragma once

#include "products.h"

#include <cstdlib>

constexpr int BLOCK = 8 * ROWS;  // rows that a thread takes at a time

// A bfloat16 in memory
struct Half {
    uint16_t bits;
};

template <typename S>
struct Packs {  // what products of S multiply
    typedef float type;
    static constexpr int EACH = 1;
};
template <>
struct Packs<Half> {
    typedef Pair type;
    static constexpr int EACH = 2;
};

#if defined(__AVX512BF16__)
static inline __m512i widened(const Half* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
static inline vec load(const Half* p) { return (vec)_mm512_slli_epi32(widened(p), 16); }
static inline void store(Half* p, vec v) {
    const __m256bh bits = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &bits, sizeof bits);
}
#endif

// Memory that a thread keeps from call to call
struct Kept {
    void* at = nullptr;
    size_t bytes = 0;
    ~Kept() { std::free(at); }
    char* get(size_t wanted) {
        if (wanted > bytes) {
            std::free(at);
            bytes = (wanted + 4095) / 4096 * 4096;
            at = std::aligned_alloc(4096, bytes);
            if (!at) std::abort();
        }
        return (char*)at;
    }
};
static thread_local Kept kept_shared, kept_own;

// Pieces of one allocation; with a null base it only counts
struct Pieces {
    char* base;
    size_t used = 0;
    template <typename T>
    T* take(size_t count) {
        T* p = (T*)(base + used);
        used += (count * sizeof(T) + 4 * PANEL + 63) / 64 * 64;  // and room to read beyond
        return p;
    }
};

// ------------------------------------------------------------------------------------------ operands in their order

// The d-th step of a product's depth that runs along the rows of x, for LANES columns: zeros beyond the last row
template <typename S>
static inline vec step_of(const S* x, int64_t ld, int rows, int d) {
    if constexpr (std::is_same_v<S, float>) {
        return d < rows ? load(x + d * ld) : vec{};
    } else {
#if defined(__AVX512BF16__)
        if (2 * d >= rows) return vec{};
        const __m512i upper = widened(x + 2 * d * ld);
        if (2 * d + 1 == rows) return (vec)upper;
        return (vec)_mm512_or_si512(upper, _mm512_slli_epi32(widened(x + (2 * d + 1) * ld), 16));
#else
        return vec{};
#endif
    }
}

// x (rows, columns) -> (columns, rows packed), whose lines are `ld` long: rows are the depth
template <typename S>
static void pack_turned(const S* x, int64_t ldx, int rows, int columns, typename Packs<S>::type* y, int64_t ld) {
    const int depth = (rows + Packs<S>::EACH - 1) / Packs<S>::EACH;
    for (int d = 0; d < depth; d += LANES)
        for (int c = 0; c < columns; c += LANES) {
            vec a[LANES];
            for (int i = 0; i < LANES; ++i) a[i] = step_of(x + c, ldx, rows, d + i);
            turn(a);
            for (int i = 0; i < LANES; ++i) store((float*)(y + (c + i) * ld + d), a[i]);
        }
}

// x (rows, columns) -> a panel (rows packed, columns)
template <typename S>
static void pack_panel(const S* x, int64_t ldx, int rows, int columns, typename Packs<S>::type* y) {
    const int depth = (rows + Packs<S>::EACH - 1) / Packs<S>::EACH;
    for (int d = 0; d < depth; ++d, y += columns)
        for (int c = 0; c < columns; c += LANES) store((float*)(y + c), step_of(x + c, ldx, rows, d));
}

// Weights (N, K) -> the panel of `columns` outputs from w on, whose depth is K
template <typename S>
static void panel_of_outputs(const float* w, int inputs, int columns, typename Packs<S>::type* y) {
    for (int k = 0; k < inputs; k += LANES * Packs<S>::EACH)
        for (int n = 0; n < columns; n += LANES) {
            vec a[LANES];
            for (int i = 0; i < LANES; ++i) {
                const float* from = w + (int64_t)(n + i) * inputs + k;
                if constexpr (std::is_same_v<S, float>) {
                    a[i] = load(from);
                } else {
#if defined(__AVX512BF16__)
                    a[i] = (vec)(__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
#endif
                }
            }
            turn(a);
            for (int i = 0; i < LANES; ++i)
                store((float*)(y + (int64_t)(k / Packs<S>::EACH + i) * columns + n), a[i]);
        }
}

// Weights (N, K) -> the panel of `columns` inputs from w on, whose depth is N
template <typename S>
static void panel_of_inputs(const float* w, int inputs, int outputs, int columns, typename Packs<S>::type* y) {
    if constexpr (std::is_same_v<S, float>) {
        pack_panel(w, inputs, outputs, columns, y);
    } else {
#if defined(__AVX512BF16__)
        for (int n = 0; n < outputs; n += 2, y += columns)
            for (int c = 0; c < columns; c += LANES) {
                const __m512 one = _mm512_loadu_ps(w + (int64_t)n * inputs + c);
                const __m512 two = _mm512_loadu_ps(w + (int64_t)(n + 1) * inputs + c);
                const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(one));
                const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(two));
                store((float*)(y + c), (vec)_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
#endif
    }
}

// All panels of a weight, by all threads
template <typename S>
static void pack_outputs(const float* w, int inputs, int outputs, typename Packs<S>::type* y) {
#pragma omp for schedule(static)
    for (int n = 0; n < outputs; n += PANEL)
        panel_of_outputs<S>(w + (int64_t)n * inputs, inputs, least(PANEL, outputs - n),
                            y + (int64_t)n * (inputs / Packs<S>::EACH));
}
template <typename S>
static void pack_inputs(const float* w, int inputs, int outputs, typename Packs<S>::type* y) {
#pragma omp for schedule(static)
    for (int k = 0; k < inputs; k += PANEL)
        panel_of_inputs<S>(w + k, inputs, outputs, least(PANEL, inputs - k),
                           y + (int64_t)k * (outputs / Packs<S>::EACH));
}

// (rows, depth) @ panels of `columns` in all; finish(row, column, sums) gets LANES of them at a time
template <typename P, typename Finish>
static void multiply(const P* a, int64_t lda, int rows, int depth, const P* panels, int columns, Finish finish) {
    alignas(64) float sums[ROWS * PANEL];
    for (int p = 0; p < columns; p += PANEL) {
        const int width = least(PANEL, columns - p);
        const Out out{sums, PANEL, nullptr, nullptr, NONE, width};
        for (int r = 0; r < rows; r += ROWS) {
            const int count = least(ROWS, rows - r);
            block(count, a + r * lda, lda, depth, panels + (int64_t)p * depth, width, out);
            for (int i = 0; i < count; ++i)
                for (int c = 0; c < width; c += LANES) finish(r + i, p + c, load(sums + i * PANEL + c));
        }
    }
}

// What the next tile reads, or writes: a tile's rows are too short for a processor to see where they lead
#define AHEAD(p, stride, write) __builtin_prefetch((p) + (int64_t)ROWS * (stride), write)

// The same for rows as they are kept
template <typename S, typename Finish>
static void multiply_rows(const S* a, int64_t lda, int rows, int depth, const typename Packs<S>::type* panels,
                          int columns, Finish finish) {
    typedef typename Packs<S>::type P;
    multiply((const P*)a, lda / Packs<S>::EACH, rows, depth / Packs<S>::EACH, panels, columns, finish);
}

// ------------------------------------------------------------------------------------------------ gradients of weights

// Rows of a chunk, as both operands of a weight's gradient: `turned` (N, rows), `panels` of (rows, K)
template <typename P>
struct Operands {
    P *turned, *panels;
    int64_t ld;  // of turned
};

// Of the chunk's dy (rows, N) and x (rows, K), by all threads, without a barrier at the end. Adds the sums of dy's
// columns to dbias.
template <typename S>
static void pack_operands(const S* dy, int outputs, const S* x, int inputs, int rows, float* dbias,
                          const Operands<typename Packs<S>::type>& to) {
    const int depth = (rows + Packs<S>::EACH - 1) / Packs<S>::EACH;
#pragma omp for schedule(static) nowait
    for (int n = 0; n < outputs; n += LANES) {
        pack_turned(dy + n, outputs, rows, LANES, to.turned + n * to.ld, to.ld);
        if (!dbias) continue;
        vec sum = vec{};
        for (int r = 0; r < rows; ++r) sum += load(dy + (int64_t)r * outputs + n);
        store(dbias + n, load(dbias + n) + sum);
    }
#pragma omp for schedule(static) nowait
    for (int k = 0; k < inputs; k += PANEL)
        pack_panel(x + k, inputs, rows, least(PANEL, inputs - k), to.panels + (int64_t)k * depth);
}

// dw (N, K) += dy^T x, or = where `first`, by all threads, without a barrier at the end
template <typename P>
static void add_gradient(const Operands<P>& from, int outputs, int inputs, int depth, bool first, float* dw) {
    const int groups = (outputs + BLOCK - 1) / BLOCK, panels = (inputs + PANEL - 1) / PANEL;
#pragma omp for schedule(static) nowait
    for (int task = 0; task < groups * panels; ++task) {
        const int k = task / groups * PANEL, n = task % groups * BLOCK;
        multiply(from.turned + n * from.ld, from.ld, least(BLOCK, outputs - n), depth,
                 from.panels + (int64_t)k * depth, least(PANEL, inputs - k), [=](int r, int c, vec v) {
                     float* to = dw + (int64_t)(n + r) * inputs + k + c;
                     store(to, first ? v : load(to) + v);
                 });
    }
}

// Rows that go through a backward pass at a time: larger chunks fell out of the caches
static inline int64_t chunk_rows(int64_t rows, int threads) {
    const int64_t most = BLOCK * (int64_t)(threads < 4 ? 8 : 2 * threads);
    return rows < most ? rows : most;
}

// A function of S, for what the caller says that it has
#if defined(__AVX512BF16__)
#define EITHER(call, ...) half ? call<Half>(__VA_ARGS__) : call<float>(__VA_ARGS__)
#else
#define EITHER(call, ...) call<float>(__VA_ARGS__)
#endif
