// Convolutions and BatchNorms for training on the CPU, forward and backward.
//
// Legend: S what maps are kept in, float or Half; weights, moments and sums are float. B images, a map (H, W, C) whose
// channels stand last in memory, rows = all its pixels, K channels in, N out, k x k taps. Maps keep their size but for
// the stride, odd kernels, zeros around.

#include "operands.h"

#include "maps.h"

// The first n values; beyond them zeros
static inline vec some(const float* p, int n) {
    if (n >= LANES) return load(p);
#if defined(__AVX512F__)
    return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
    vec v = vec{};
    for (int c = 0; c < n; ++c) v[c] = p[c];
    return v;
#endif
}

static inline void put(float* p, vec v, int n) {
    if (n >= LANES) return store(p, v);
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
    for (int c = 0; c < n; ++c) p[c] = v[c];
#endif
}

#if defined(__AVX512BF16__)
static inline vec some(const Half* p, int n) {
    if (n >= LANES) return load(p);
    const __m256i bits = _mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
static inline void put(Half* p, vec v, int n) {
    const __m256i bits = (__m256i)_mm512_cvtneps_pbh((__m512)v);
    _mm256_mask_storeu_epi16(p, n >= LANES ? (__mmask16)0xffff : (__mmask16)((1u << n) - 1), bits);
}
#endif

// As floats, or from floats
template <typename From, typename To>
static void converted(const From* x, int64_t count, To* y) {
    for (int64_t c = 0; c < count; c += LANES) {
        const int n = (int)(count - c < LANES ? count - c : LANES);
        put(y + c, some(x + c, n), n);
    }
}

// ------------------------------------------------------------------------------------------------- dense convolutions

// weight: (N, k * k * K), a pixel's channels side by side; planes: x is (B, K, H, W) in float, weight (N, K * k * k)
struct Conv {
    const void* x;
    const float *weight, *bias;  // bias: of a depthwise convolution, or null
    void* y;
    int32_t batch, height, width, inputs, outputs, kernel, stride, planes;
    int depth() const { return kernel * kernel * inputs; }
    int out_height() const { return (height - 1) / stride + 1; }
    int out_width() const { return (width - 1) / stride + 1; }
};

// The patch of an output, whose top left corner is at (top, left) of an image
template <typename S>
static void patch(const Conv& l, int image, int top, int left, float* to) {
    const int64_t first = (int64_t)image * l.height * l.width * l.inputs;
    if (l.planes && l.kernel == 3)
        return patch_of_planes<3>((const float*)l.x + first, l.height, l.width, l.inputs, 3, top, left, to);
    if (l.planes)
        return patch_of_planes<0>((const float*)l.x + first, l.height, l.width, l.inputs, l.kernel, top, left, to);
    const S* x = (const S*)l.x + first;
    if constexpr (std::is_same_v<S, float>) {
        patch_of_pixels(x, l.height, l.width, l.inputs, l.kernel, top, left, to);
    } else {
        const int begin = left < 0 ? -left : 0, end = least(l.kernel, l.width - left);
        for (int i = 0; i < l.kernel; ++i, to += l.kernel * l.inputs) {
            const int row = top + i;
            if (begin || end < l.kernel || row < 0 || row >= l.height)
                std::memset(to, 0, l.kernel * l.inputs * sizeof(float));
            if (row >= 0 && row < l.height)
                converted(x + ((int64_t)row * l.width + left + begin) * l.inputs, (end - begin) * l.inputs,
                          to + begin * l.inputs);
        }
    }
}

// x (rows, columns) -> (columns, rows)
template <typename S>
static void turned(const S* x, int64_t ldx, int rows, int columns, float* y, int64_t ldy) {
    for (int r = 0; r < rows; r += LANES)
        for (int c = 0; c < columns; c += LANES) {
            vec a[LANES];
            for (int i = 0; i < LANES; ++i) a[i] = r + i < rows ? some(x + (r + i) * ldx + c, columns - c) : vec{};
            turn(a);
            for (int i = 0; i < LANES && c + i < columns; ++i) put(y + (c + i) * ldy + r, a[i], (int)ldy - r);
        }
}

// x (rows, columns) -> panels (rows, PANEL) whose last is as wide as its columns up to a multiple of LANES
static void panels_of(const float* x, int64_t ldx, int rows, int columns, float* y) {
    for (int p = 0; p < columns; p += PANEL) {
        const int width = padded_to(least(PANEL, columns - p));
        for (int r = 0; r < rows; ++r, y += width)
            for (int c = 0; c < width; c += LANES) store(y + c, some(x + r * ldx + p + c, columns - p - c));
    }
}

// (rows, depth) @ panels (depth, columns) -> y, or added to it
template <bool ADD>
static void times_panels(const float* a, int64_t lda, int rows, int depth, const float* panels, int columns, float* y,
                         int64_t ldy) {
    for (int p = 0; p < columns; p += PANEL) {
        const int width = least(PANEL, columns - p), padded = padded_to(width);
        for (int r = 0; r < rows; r += ROWS) {
            float* to = y + r * ldy + p;
            block(least(ROWS, rows - r), a + r * lda, lda, depth, panels + (int64_t)p * depth, padded,
                  Out{to, ldy, nullptr, ADD ? to : nullptr, NONE, width});
        }
    }
}

template <typename S>
static void conv(const Conv& l, int threads) {
    const int depth = l.depth(), out_width = l.out_width(), out_height = l.out_height(), outputs = l.outputs;
    const int padded = padded_to(outputs);
    float* sideways = (float*)kept_shared.get((int64_t)2 * depth * padded * sizeof(float));
    float* panels = sideways + (int64_t)depth * padded;
    turned(l.weight, depth, outputs, depth, sideways, padded);
    panels_of(sideways, padded, depth, outputs, panels);
#pragma omp parallel num_threads(threads)
    {
        float* patches = (float*)kept_own.get((int64_t)BLOCK * (depth + outputs) * sizeof(float));
        float* made = patches + (int64_t)BLOCK * depth;
#pragma omp for schedule(static)
        for (int task = 0; task < l.batch * out_height; ++task) {
            const int top = task % out_height * l.stride - l.kernel / 2;
            for (int start = 0; start < out_width; start += BLOCK) {
                const int count = least(BLOCK, out_width - start);
                for (int p = 0; p < count; ++p)
                    patch<S>(l, task / out_height, top, (start + p) * l.stride - l.kernel / 2,
                             patches + (int64_t)p * depth);
                S* y = (S*)l.y + ((int64_t)task * out_width + start) * outputs;
                if constexpr (std::is_same_v<S, float>) made = y;
                times_panels<false>(patches, depth, count, depth, panels, outputs, made, outputs);
                if constexpr (!std::is_same_v<S, float>) converted(made, (int64_t)count * outputs, y);
            }
        }
    }
}

// dx: null where it is not wanted, as with planes. dweight: one for each thread (threads, N, k * k * K), zeros before;
// or null
struct ConvGradient {
    const void* dy;
    void* dx;
    float* dweight;
};

// Adds a patch to where it was taken from
static void add_patch(const float* patch, const Conv& l, int top, int left, float* image) {
    const int begin = left < 0 ? -left : 0, end = least(l.kernel, l.width - left);
    for (int i = 0; i < l.kernel; ++i, patch += l.kernel * l.inputs) {
        const int row = top + i;
        if (row < 0 || row >= l.height) continue;
        float* to = image + ((int64_t)row * l.width + left) * l.inputs;
        for (int c = begin * l.inputs; c < end * l.inputs; c += LANES) {
            const int left_over = end * l.inputs - c;
            put(to + c, some(to + c, left_over) + some(patch + c, left_over), left_over);
        }
    }
}

template <typename S>
static void conv_backward(const Conv& l, const ConvGradient& g, int threads) {
    constexpr bool EXACT = std::is_same_v<S, float>;
    const int depth = l.depth(), outputs = l.outputs, out_width = l.out_width(), pad = l.kernel / 2;
    const int pixels = l.out_height() * out_width, chunk = least(8 * BLOCK, pixels), ld = padded_to(chunk);
    const int64_t values = (int64_t)l.height * l.width * l.inputs;
    float* panels = (float*)kept_shared.get((int64_t)outputs * padded_to(depth) * sizeof(float));
    if (g.dx) panels_of(l.weight, depth, outputs, depth, panels);
#pragma omp parallel num_threads(threads)
    {
        float *patches = nullptr, *in_panels = nullptr, *sideways = nullptr, *exact = nullptr, *sums = nullptr;
        for (const bool counting : {true, false}) {
            static thread_local size_t wanted;
            Pieces pieces{counting ? nullptr : kept_own.get(wanted)};
            patches = pieces.take<float>((int64_t)chunk * depth);
            in_panels = pieces.take<float>((int64_t)chunk * padded_to(depth));
            sideways = pieces.take<float>((int64_t)outputs * ld);
            exact = pieces.take<float>(EXACT ? 0 : (int64_t)chunk * outputs);
            sums = pieces.take<float>(EXACT || !g.dx ? 0 : values);  // of an image
            wanted = pieces.used;
        }
        float* dweight = g.dweight ? g.dweight + (int64_t)omp_get_thread_num() * outputs * depth : nullptr;
#pragma omp for schedule(static)
        for (int image = 0; image < l.batch; ++image) {
            const S* dy = (const S*)g.dy + (int64_t)image * pixels * outputs;
            if constexpr (EXACT) sums = g.dx ? (float*)g.dx + image * values : nullptr;
            if (g.dx) std::memset(sums, 0, values * sizeof(float));
            for (int start = 0; start < pixels; start += chunk) {
                const int count = least(chunk, pixels - start);
                const S* from = dy + (int64_t)start * outputs;
                const auto corner = [&](int p, int& top, int& left) {
                    top = (start + p) / out_width * l.stride - pad, left = (start + p) % out_width * l.stride - pad;
                };
                if (dweight) {
                    for (int p = 0; p < count; ++p) {
                        int top, left;
                        corner(p, top, left);
                        patch<S>(l, image, top, left, patches + (int64_t)p * depth);
                    }
                    panels_of(patches, depth, count, depth, in_panels);
                    turned(from, outputs, count, outputs, sideways, ld);
                    times_panels<true>(sideways, ld, outputs, count, in_panels, depth, dweight, depth);
                }
                if (!g.dx) continue;
                const float* rows = nullptr;
                if constexpr (EXACT) {
                    rows = from;
                } else {
                    converted(from, (int64_t)count * outputs, exact);
                    rows = exact;
                }
                times_panels<false>(rows, outputs, count, outputs, panels, depth, patches, depth);
                for (int p = 0; p < count; ++p) {
                    int top, left;
                    corner(p, top, left);
                    add_patch(patches + (int64_t)p * depth, l, top, left, sums);
                }
            }
            if constexpr (!EXACT)
                if (g.dx) converted(sums, values, (S*)g.dx + image * values);
        }
    }
}

// --------------------------------------------------------------------------------------------- depthwise convolutions

// weight: taps (k * k, C), C a multiple of LANES; inputs == outputs
template <typename S>
static void depthwise(const Conv& l, int threads) {
    const int channels = l.inputs, out_width = l.out_width(), out_height = l.out_height();
    float* bias = (float*)kept_shared.get(channels * sizeof(float));
    if (l.bias)
        std::memcpy(bias, l.bias, channels * sizeof(float));
    else
        std::memset(bias, 0, channels * sizeof(float));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int task = 0; task < l.batch * out_height; ++task)
        depthwise_row<S>((const S*)l.x + (int64_t)(task / out_height) * l.height * l.width * channels, channels,
                         l.height, l.width, channels, l.kernel, l.stride, l.weight, bias, NONE, nullptr,
                         (S*)l.y + (int64_t)task * out_width * channels, channels, out_width, task % out_height);
}

// The gradient of taps at LANES channels, of one image: K * K sums that stay in registers
template <int K, typename S>
static void gradient_of_taps(const Conv& l, const S* x, const S* dy, float* dweight) {
    const int pad = K / 2, channels = l.inputs, out_width = l.out_width(), out_height = l.out_height();
    vec sums[K][K];
    for (int i = 0; i < K * K; ++i) sums[i / K][i % K] = vec{};
    for (int row = 0; row < out_height; ++row)
        for (int column = 0; column < out_width; ++column) {
            const vec d = load(dy + ((int64_t)row * out_width + column) * channels);
            const int top = row * l.stride - pad, left = column * l.stride - pad;
            const S* from = x + ((int64_t)top * l.width + left) * channels;
            if (top >= 0 && left >= 0 && top + K <= l.height && left + K <= l.width) {
                for (int i = 0; i < K; ++i)
                    for (int j = 0; j < K; ++j) sums[i][j] += d * load(from + ((int64_t)i * l.width + j) * channels);
                continue;
            }
            for (int i = 0; i < K; ++i)
                for (int j = 0; j < K; ++j)
                    if (top + i >= 0 && top + i < l.height && left + j >= 0 && left + j < l.width)
                        sums[i][j] += d * load(from + ((int64_t)i * l.width + j) * channels);
        }
    for (int i = 0; i < K * K; ++i)
        store(dweight + (int64_t)i * channels, load(dweight + (int64_t)i * channels) + sums[i / K][i % K]);
}

// dweight: (splits, k * k, C), zeros before; splits of the images add up apart
template <typename S>
static void depthwise_backward(const Conv& l, const ConvGradient& g, int splits, int threads) {
    const int channels = l.inputs, out_width = l.out_width(), out_height = l.out_height(), k = l.kernel;
    const int groups = channels / LANES;
    const int64_t in_values = (int64_t)l.height * l.width * channels;
    const int64_t out_values = (int64_t)out_height * out_width * channels;
    float* flipped = (float*)kept_shared.get((int64_t)(k * k + 1) * channels * sizeof(float));
    float* nothing = flipped + (int64_t)k * k * channels;
    for (int i = 0; i < k * k; ++i)
        std::memcpy(flipped + (int64_t)i * channels, l.weight + (int64_t)(k * k - 1 - i) * channels,
                    channels * sizeof(float));
    std::memset(nothing, 0, channels * sizeof(float));
#pragma omp parallel num_threads(threads)
    {
        if (g.dweight) {
#pragma omp for schedule(static) nowait
            for (int task = 0; task < groups * splits; ++task) {
                const int c = task % groups * LANES, split = task / groups;
                float* to = g.dweight + (int64_t)split * k * k * channels + c;
                for (int image = l.batch * split / splits; image < l.batch * (split + 1) / splits; ++image) {
                    const S *x = (const S*)l.x + image * in_values + c, *dy = (const S*)g.dy + image * out_values + c;
                    if (k == 3) gradient_of_taps<3>(l, x, dy, to);
                    else if (k == 5) gradient_of_taps<5>(l, x, dy, to);
                    else if (k == 7) gradient_of_taps<7>(l, x, dy, to);
                    else gradient_of_taps<1>(l, x, dy, to);
                }
            }
        }
        if (g.dx) {
#pragma omp for schedule(static)
            for (int task = 0; task < l.batch * l.height; ++task) {
                const int image = task / l.height, row = task % l.height;
                const S* dy = (const S*)g.dy + image * out_values;
                S* dx = (S*)g.dx + (int64_t)task * l.width * channels;
                if (l.stride == 1) {
                    depthwise_row<S>(dy, channels, out_height, out_width, channels, k, 1, flipped, nothing, NONE,
                                     nullptr, dx, channels, l.width, row);
                    continue;
                }
                for (int column = 0; column < l.width; ++column)
                    for (int c = 0; c < channels; c += LANES) {
                        vec sum = vec{};
                        for (int i = 0; i < k; ++i) {
                            const int y = row + k / 2 - i;
                            if (y < 0 || y % l.stride || y / l.stride >= out_height) continue;
                            for (int j = 0; j < k; ++j) {
                                const int x = column + k / 2 - j;
                                if (x < 0 || x % l.stride || x / l.stride >= out_width) continue;
                                sum += load(l.weight + (int64_t)(i * k + j) * channels + c) *
                                       load(dy + ((int64_t)(y / l.stride) * out_width + x / l.stride) * channels + c);
                            }
                        }
                        store(dx + (int64_t)column * channels + c, sum);
                    }
            }
        }
    }
}

// -------------------------------------------------------------------------------------------------------- BatchNorms

// y = act((z - mean) * inverse * weight + bias) over the channels of rows (rows, C)
struct Batch {
    const void* z;
    const float *weight, *bias;
    float *mean, *inverse, *variance;
    void* y;
    int64_t rows;
    float epsilon;
    int32_t channels, act;
};

constexpr int AT_ONCE = 128;  // rows whose moments are taken while they are in cache

// Mean, biased variance and 1 / sqrt(variance + epsilon): means and squares of blocks, put together (Chan et al. 1979)
template <typename S>
static void moments_of(const Batch& l, int threads) {
    const int channels = l.channels, wide = padded_to(channels);
    const int64_t blocks = (l.rows + AT_ONCE - 1) / AT_ONCE;
    float* parts = (float*)kept_shared.get((int64_t)threads * 2 * wide * sizeof(float));
    int64_t counts[1024] = {};
    threads = least(threads, 1024);
#pragma omp parallel num_threads(threads)
    {
        float *mean = parts + (int64_t)omp_get_thread_num() * 2 * wide, *squares = mean + wide;
        std::memset(mean, 0, 2 * wide * sizeof(float));
        int64_t seen = 0;
#pragma omp for schedule(static)
        for (int64_t at = 0; at < blocks; ++at) {
            const S* z = (const S*)l.z + at * AT_ONCE * channels;
            const int count = (int)(l.rows - at * AT_ONCE < AT_ONCE ? l.rows - at * AT_ONCE : AT_ONCE);
            const float part = (float)count / (float)(seen + count);
            for (int c = 0; c < channels; c += LANES) {
                const int n = channels - c;
                vec sum = vec{}, around = vec{};
                for (int r = 0; r < count; ++r) sum += some(z + (int64_t)r * channels + c, n);
                const vec middle = sum * (1.0f / count);
                for (int r = 0; r < count; ++r) {
                    const vec d = some(z + (int64_t)r * channels + c, n) - middle;
                    around += d * d;
                }
                const vec step = middle - load(mean + c);
                store(squares + c, load(squares + c) + around + step * step * ((float)seen * part));
                store(mean + c, load(mean + c) + step * part);
            }
            seen += count;
        }
        counts[omp_get_thread_num()] = seen;
    }
    for (int c = 0; c < channels; ++c) {
        double mean = 0.0, squares = 0.0, seen = 0.0;
        for (int t = 0; t < threads; ++t) {
            if (!counts[t]) continue;
            const double count = (double)counts[t], step = parts[(int64_t)t * 2 * wide + c] - mean;
            squares += parts[(int64_t)t * 2 * wide + wide + c] + step * step * seen * count / (seen + count);
            mean += step * count / (seen + count);
            seen += count;
        }
        l.mean[c] = (float)mean;
        l.variance[c] = (float)(squares / seen);
        l.inverse[c] = (float)(1.0 / std::sqrt(squares / seen + l.epsilon));
    }
}

// Scale and shift of each channel: (C up to a multiple of LANES) each
static void affine(const Batch& l, float* scale, float* shift) {
    for (int c = 0; c < l.channels; ++c) {
        scale[c] = l.weight[c] * l.inverse[c];
        shift[c] = l.bias[c] - l.mean[c] * scale[c];
    }
}

template <typename S>
static void normalise(const Batch& l, int threads) {
    const int channels = l.channels, wide = padded_to(channels);
    float *scale = (float*)kept_shared.get(2 * wide * sizeof(float)), *shift = scale + wide;
    affine(l, scale, shift);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < l.rows; ++r)
        for (int c = 0; c < channels; c += LANES) {
            const int64_t at = r * channels + c;
            const vec z = some((const S*)l.z + at, channels - c);
            put((S*)l.y + at, activated(z * load(scale + c) + load(shift + c), l.act), channels - c);
        }
}

static inline vec passed(vec dy, vec x, int act) {
    if (act == RELU) return x > 0.0f ? dy : vec{};
    if (act == HARDSWISH) {
        const vec slope = (2.0f * x + 3.0f) * (1.0f / 6.0f);
        return dy * (x > 3.0f ? spread(1.0f) : x < -3.0f ? vec{} : slope);
    }
    return dy;
}

// dz may be dy itself, or z
struct BatchGradient {
    const void* dy;
    void* dz;
    float *dweight, *dbias;
};

template <typename S>
static void normalise_backward(const Batch& l, const BatchGradient& g, int threads) {
    const int channels = l.channels, wide = padded_to(channels), act = l.act;
    float* scale = (float*)kept_shared.get((int64_t)(5 + 2 * threads) * wide * sizeof(float));
    float *shift = scale + wide, *first = shift + wide, *second = first + wide, *means = second + wide;
    float* parts = means + wide;
    affine(l, scale, shift);
    std::memset(parts, 0, (int64_t)threads * 2 * wide * sizeof(float));
    std::memcpy(means, l.mean, channels * sizeof(float));
    const int64_t blocks = (l.rows + AT_ONCE - 1) / AT_ONCE;
#pragma omp parallel num_threads(threads)
    {
        float* mine = parts + (int64_t)omp_get_thread_num() * 2 * wide;
#pragma omp for schedule(static)
        for (int64_t at = 0; at < blocks; ++at) {
            const int64_t start = at * AT_ONCE * channels;
            const int count = (int)(l.rows - at * AT_ONCE < AT_ONCE ? l.rows - at * AT_ONCE : AT_ONCE);
            for (int c = 0; c < channels; c += LANES) {
                const int n = channels - c;
                const vec a = load(scale + c), b = load(shift + c), mean = load(means + c);
                vec sum = vec{}, along = vec{};
                for (int r = 0; r < count; ++r) {
                    const vec z = some((const S*)l.z + start + (int64_t)r * channels + c, n);
                    const vec d = passed(some((const S*)g.dy + start + (int64_t)r * channels + c, n), z * a + b, act);
                    sum += d;
                    along += d * (z - mean);
                }
                store(mine + c, load(mine + c) + sum);
                store(mine + wide + c, load(mine + wide + c) + along);
            }
        }
#pragma omp single
        for (int c = 0; c < channels; ++c) {
            double sum = 0.0, along = 0.0;
            for (int t = 0; t < threads; ++t) {
                sum += parts[(int64_t)t * 2 * wide + c];
                along += parts[(int64_t)t * 2 * wide + wide + c];
            }
            along *= l.inverse[c];
            g.dbias[c] = (float)sum;
            g.dweight[c] = (float)along;
            // dz = scale * d - (first + second * (z - mean))
            first[c] = (float)(scale[c] * sum / l.rows);
            second[c] = (float)(scale[c] * along * l.inverse[c] / l.rows);
        }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < l.rows; ++r)
            for (int c = 0; c < channels; c += LANES) {
                const int64_t at = r * channels + c;
                const int n = channels - c;
                const vec z = some((const S*)l.z + at, n), a = load(scale + c);
                const vec d = passed(some((const S*)g.dy + at, n), z * a + load(shift + c), act);
                put((S*)g.dz + at, d * a - (load(first + c) + load(second + c) * (z - load(means + c))), n);
            }
    }
}

// ------------------------------------------------------------------------------------------------------ entry points

extern "C" void muntin_conv(const Conv* l, int half, int threads) { EITHER(conv, *l, threads); }
extern "C" void muntin_conv_backward(const Conv* l, const ConvGradient* g, int half, int threads) {
    EITHER(conv_backward, *l, *g, threads);
}
extern "C" void muntin_depthwise(const Conv* l, int half, int threads) { EITHER(depthwise, *l, threads); }
extern "C" void muntin_depthwise_backward(const Conv* l, const ConvGradient* g, int splits, int half, int threads) {
    EITHER(depthwise_backward, *l, *g, splits, threads);
}
extern "C" void muntin_moments(const Batch* l, int half, int threads) { EITHER(moments_of, *l, threads); }
extern "C" void muntin_normalise(const Batch* l, int half, int threads) { EITHER(normalise, *l, threads); }
extern "C" void muntin_normalise_backward(const Batch* l, const BatchGradient* g, int half, int threads) {
    EITHER(normalise_backward, *l, *g, threads);
}
