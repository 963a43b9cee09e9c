// Convolutions and BatchNorms for training on the CPU, forward and backward, in float.
//
// Legend: B images, a map (H, W, C) whose channels stand last in memory, rows = all its pixels, K channels in, N out,
// k x k taps. Maps keep their size but for the stride, odd kernels, zeros around.

#include "maps.h"
#include "operands.h"

static inline int padded_to(int count) { return (count + LANES - 1) / LANES * LANES; }

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

// ------------------------------------------------------------------------------------------------- dense convolutions

// weight: (N, k * k * K), a pixel's channels side by side; planes: x is (B, K, H, W), and weight (N, K * k * k)
struct Conv {
    const float *x, *weight;
    float* y;
    int32_t batch, height, width, inputs, outputs, kernel, stride, planes;
    int depth() const { return kernel * kernel * inputs; }
    int out_height() const { return (height - 1) / stride + 1; }
    int out_width() const { return (width - 1) / stride + 1; }
};

// The patch of an output, whose top left corner is at (top, left) of an image
static void patch(const Conv& l, const float* image, int top, int left, float* to) {
    if (!l.planes)
        patch_of_pixels(image, l.height, l.width, l.inputs, l.kernel, top, left, to);
    else if (l.kernel == 3)
        patch_of_planes<3>(image, l.height, l.width, l.inputs, 3, top, left, to);
    else
        patch_of_planes<0>(image, l.height, l.width, l.inputs, l.kernel, top, left, to);
}

// x (rows, columns) -> (columns, rows)
static void turned(const float* x, int64_t ldx, int rows, int columns, float* y, int64_t ldy) {
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

extern "C" void muntin_conv(const Conv* l, int threads) {
    const int depth = l->depth(), out_width = l->out_width(), out_height = l->out_height();
    const int padded = padded_to(l->outputs);
    float* sideways = (float*)kept_shared.get((int64_t)2 * depth * padded * sizeof(float));
    float* panels = sideways + (int64_t)depth * padded;
    turned(l->weight, depth, l->outputs, depth, sideways, padded);
    panels_of(sideways, padded, depth, l->outputs, panels);
#pragma omp parallel num_threads(threads)
    {
        float* patches = (float*)kept_own.get((int64_t)BLOCK * depth * sizeof(float));
#pragma omp for schedule(static)
        for (int task = 0; task < l->batch * out_height; ++task) {
            const int top = task % out_height * l->stride - l->kernel / 2;
            const float* image = l->x + (int64_t)(task / out_height) * l->height * l->width * l->inputs;
            for (int start = 0; start < out_width; start += BLOCK) {
                const int count = least(BLOCK, out_width - start);
                for (int p = 0; p < count; ++p)
                    patch(*l, image, top, (start + p) * l->stride - l->kernel / 2, patches + (int64_t)p * depth);
                times_panels<false>(patches, depth, count, depth, panels, l->outputs,
                                    l->y + ((int64_t)task * out_width + start) * l->outputs, l->outputs);
            }
        }
    }
}

// dx: null where it is not wanted, as with planes. dweight: one for each thread (threads, N, k * k * K), zeros before; or null
struct ConvGradient {
    const float* dy;
    float *dx, *dweight;
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

extern "C" void muntin_conv_backward(const Conv* l, const ConvGradient* g, int threads) {
    const int depth = l->depth(), outputs = l->outputs, out_width = l->out_width(), pad = l->kernel / 2;
    const int pixels = l->out_height() * out_width, chunk = least(8 * BLOCK, pixels), ld = padded_to(chunk);
    float* panels = (float*)kept_shared.get((int64_t)outputs * padded_to(depth) * sizeof(float));
    if (g->dx) panels_of(l->weight, depth, outputs, depth, panels);
#pragma omp parallel num_threads(threads)
    {
        float *patches = nullptr, *in_panels = nullptr, *sideways = nullptr;
        for (const bool counting : {true, false}) {
            static thread_local size_t wanted;
            Pieces pieces{counting ? nullptr : kept_own.get(wanted)};
            patches = pieces.take<float>((int64_t)chunk * depth);
            in_panels = pieces.take<float>((int64_t)chunk * padded_to(depth));
            sideways = pieces.take<float>((int64_t)outputs * ld);
            wanted = pieces.used;
        }
        float* dweight = g->dweight ? g->dweight + (int64_t)omp_get_thread_num() * outputs * depth : nullptr;
#pragma omp for schedule(static)
        for (int image = 0; image < l->batch; ++image) {
            const int64_t values = (int64_t)l->height * l->width * l->inputs;
            const float *x = l->x + image * values, *dy = g->dy + (int64_t)image * pixels * outputs;
            float* dx = g->dx ? g->dx + image * values : nullptr;
            if (dx) std::memset(dx, 0, values * sizeof(float));
            for (int start = 0; start < pixels; start += chunk) {
                const int count = least(chunk, pixels - start);
                const float* from = dy + (int64_t)start * outputs;
                const auto corner = [&](int p, int& top, int& left) {
                    top = (start + p) / out_width * l->stride - pad, left = (start + p) % out_width * l->stride - pad;
                };
                if (dweight) {
                    for (int p = 0; p < count; ++p) {
                        int top, left;
                        corner(p, top, left);
                        patch(*l, x, top, left, patches + (int64_t)p * depth);
                    }
                    panels_of(patches, depth, count, depth, in_panels);
                    turned(from, outputs, count, outputs, sideways, ld);
                    times_panels<true>(sideways, ld, outputs, count, in_panels, depth, dweight, depth);
                }
                if (!dx) continue;
                times_panels<false>(from, outputs, count, outputs, panels, depth, patches, depth);
                for (int p = 0; p < count; ++p) {
                    int top, left;
                    corner(p, top, left);
                    add_patch(patches + (int64_t)p * depth, *l, top, left, dx);
                }
            }
        }
    }
}

// --------------------------------------------------------------------------------------------- depthwise convolutions

// weight: taps (k * k, C), C a multiple of LANES; inputs == outputs
extern "C" void muntin_depthwise(const Conv* l, int threads) {
    const int channels = l->inputs, out_width = l->out_width(), out_height = l->out_height();
    float* nothing = (float*)kept_shared.get(channels * sizeof(float));
    std::memset(nothing, 0, channels * sizeof(float));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int task = 0; task < l->batch * out_height; ++task)
        depthwise_row(l->x + (int64_t)(task / out_height) * l->height * l->width * channels, channels, l->height,
                      l->width, channels, l->kernel, l->stride, l->weight, nothing, NONE, nullptr,
                      l->y + (int64_t)task * out_width * channels, channels, out_width, task % out_height);
}

// The gradient of taps at LANES channels: K * K sums that stay in registers
template <int K>
static void gradient_of_taps(const Conv& l, const float* x, const float* dy, float* dweight) {
    const int pad = K / 2, channels = l.inputs, out_width = l.out_width(), out_height = l.out_height();
    vec sums[K][K];
    for (int i = 0; i < K * K; ++i) sums[i / K][i % K] = load(dweight + (int64_t)i * channels);
    for (int row = 0; row < out_height; ++row)
        for (int column = 0; column < out_width; ++column) {
            const vec d = load(dy + ((int64_t)row * out_width + column) * channels);
            const int top = row * l.stride - pad, left = column * l.stride - pad;
            const float* from = x + ((int64_t)top * l.width + left) * channels;
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
    for (int i = 0; i < K * K; ++i) store(dweight + (int64_t)i * channels, sums[i / K][i % K]);
}

// dweight: (splits, k * k, C), zeros before; splits of the images add up apart
extern "C" void muntin_depthwise_backward(const Conv* l, const ConvGradient* g, int splits, int threads) {
    const int channels = l->inputs, out_width = l->out_width(), out_height = l->out_height(), k = l->kernel;
    const int groups = channels / LANES;
    const int64_t in_values = (int64_t)l->height * l->width * channels;
    const int64_t out_values = (int64_t)out_height * out_width * channels;
    float* flipped = (float*)kept_shared.get((int64_t)(k * k + 1) * channels * sizeof(float));
    float* nothing = flipped + (int64_t)k * k * channels;
    for (int i = 0; i < k * k; ++i)
        std::memcpy(flipped + (int64_t)i * channels, l->weight + (int64_t)(k * k - 1 - i) * channels,
                    channels * sizeof(float));
    std::memset(nothing, 0, channels * sizeof(float));
#pragma omp parallel num_threads(threads)
    {
        if (g->dweight) {
#pragma omp for schedule(static) nowait
            for (int task = 0; task < groups * splits; ++task) {
                const int c = task % groups * LANES, split = task / groups;
                float* to = g->dweight + (int64_t)split * k * k * channels + c;
                for (int image = l->batch * split / splits; image < l->batch * (split + 1) / splits; ++image) {
                    const float *x = l->x + image * in_values + c, *dy = g->dy + image * out_values + c;
                    if (k == 3) gradient_of_taps<3>(*l, x, dy, to);
                    else if (k == 5) gradient_of_taps<5>(*l, x, dy, to);
                    else if (k == 7) gradient_of_taps<7>(*l, x, dy, to);
                    else gradient_of_taps<1>(*l, x, dy, to);
                }
            }
        }
        if (g->dx) {
#pragma omp for schedule(static)
            for (int task = 0; task < l->batch * l->height; ++task) {
                const int image = task / l->height, row = task % l->height;
                const float* dy = g->dy + image * out_values;
                float* dx = g->dx + (int64_t)task * l->width * channels;
                if (l->stride == 1) {
                    depthwise_row(dy, channels, out_height, out_width, channels, k, 1, flipped, nothing, NONE, nullptr,
                                  dx, channels, l->width, row);
                    continue;
                }
                for (int column = 0; column < l->width; ++column)
                    for (int c = 0; c < channels; c += LANES) {
                        vec sum = vec{};
                        for (int i = 0; i < k; ++i) {
                            const int y = row + k / 2 - i;
                            if (y < 0 || y % l->stride || y / l->stride >= out_height) continue;
                            for (int j = 0; j < k; ++j) {
                                const int x = column + k / 2 - j;
                                if (x < 0 || x % l->stride || x / l->stride >= out_width) continue;
                                sum += load(l->weight + (int64_t)(i * k + j) * channels + c) *
                                       load(dy + ((int64_t)(y / l->stride) * out_width + x / l->stride) * channels + c);
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
    const float *z, *weight, *bias;
    float *mean, *inverse, *variance, *y;
    int64_t rows;
    float epsilon;
    int32_t channels, act;
};

constexpr int AT_ONCE = 128;  // rows whose moments are taken while they are in cache

// Mean, biased variance and 1 / sqrt(variance + epsilon): means and squares of blocks, put together (Chan et al. 1979)
extern "C" void muntin_moments(const Batch* l, int threads) {
    const int channels = l->channels, wide = padded_to(channels);
    const int64_t blocks = (l->rows + AT_ONCE - 1) / AT_ONCE;
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
            const float* z = l->z + at * AT_ONCE * channels;
            const int count = (int)(l->rows - at * AT_ONCE < AT_ONCE ? l->rows - at * AT_ONCE : AT_ONCE);
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
        l->mean[c] = (float)mean;
        l->variance[c] = (float)(squares / seen);
        l->inverse[c] = (float)(1.0 / std::sqrt(squares / seen + l->epsilon));
    }
}

// Scale and shift of each channel: (C up to a multiple of LANES) each
static void affine(const Batch& l, float* scale, float* shift) {
    for (int c = 0; c < l.channels; ++c) {
        scale[c] = l.weight[c] * l.inverse[c];
        shift[c] = l.bias[c] - l.mean[c] * scale[c];
    }
}

extern "C" void muntin_normalise(const Batch* l, int threads) {
    const int channels = l->channels, wide = padded_to(channels);
    float *scale = (float*)kept_shared.get(2 * wide * sizeof(float)), *shift = scale + wide;
    affine(*l, scale, shift);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < l->rows; ++r)
        for (int c = 0; c < channels; c += LANES) {
            const int64_t at = r * channels + c;
            put(l->y + at, activated(some(l->z + at, channels - c) * load(scale + c) + load(shift + c), l->act),
                channels - c);
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

// dz may be dy itself
struct BatchGradient {
    const float* dy;
    float *dz, *dweight, *dbias;
};

extern "C" void muntin_normalise_backward(const Batch* l, const BatchGradient* g, int threads) {
    const int channels = l->channels, wide = padded_to(channels), act = l->act;
    float* scale = (float*)kept_shared.get((int64_t)(5 + 2 * threads) * wide * sizeof(float));
    float *shift = scale + wide, *first = shift + wide, *second = first + wide, *means = second + wide;
    float* parts = means + wide;
    affine(*l, scale, shift);
    std::memset(parts, 0, (int64_t)threads * 2 * wide * sizeof(float));
    std::memcpy(means, l->mean, channels * sizeof(float));
    const int64_t blocks = (l->rows + AT_ONCE - 1) / AT_ONCE;
#pragma omp parallel num_threads(threads)
    {
        float* mine = parts + (int64_t)omp_get_thread_num() * 2 * wide;
#pragma omp for schedule(static)
        for (int64_t at = 0; at < blocks; ++at) {
            const int64_t start = at * AT_ONCE * channels;
            const int count = (int)(l->rows - at * AT_ONCE < AT_ONCE ? l->rows - at * AT_ONCE : AT_ONCE);
            for (int c = 0; c < channels; c += LANES) {
                const int n = channels - c;
                const vec a = load(scale + c), b = load(shift + c), mean = load(means + c);
                vec sum = vec{}, along = vec{};
                for (int r = 0; r < count; ++r) {
                    const vec z = some(l->z + start + (int64_t)r * channels + c, n);
                    const vec d = passed(some(g->dy + start + (int64_t)r * channels + c, n), z * a + b, act);
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
            along *= l->inverse[c];
            g->dbias[c] = (float)sum;
            g->dweight[c] = (float)along;
            // dz = scale * d - (first + second * (z - mean))
            first[c] = (float)(scale[c] * sum / l->rows);
            second[c] = (float)(scale[c] * along * l->inverse[c] / l->rows);
        }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < l->rows; ++r)
            for (int c = 0; c < channels; c += LANES) {
                const int64_t at = r * channels + c;
                const int n = channels - c;
                const vec z = some(l->z + at, n), a = load(scale + c);
                const vec d = passed(some(g->dy + at, n), z * a + load(shift + c), act);
                put(g->dz + at, d * a - (load(first + c) + load(second + c) * (z - load(means + c))), n);
            }
    }
}
