// Programs of small layers on the CPU: linear layers, convolutions, norms, cascaded group attention, Manhattan
// attention, means and gates, run one after the other in a single parallel region. What such layers take in a
// framework is mostly the calling of them.
//
// Legend: B images, N = H * W tokens of a map in raster order, rows = B * N (or B), C channels, last in memory
// ("channels last"); A tokens of a window, L of a line, h heads, K channels of a query or key, V of a value. float32.
// Weights of products stand in panels of PANEL output channels, each a (C, panel) matrix (_arrange in prepare.py).

#include "attention.h"
#include "maps.h"
#include "norms.h"
#include "operands.h"

constexpr int PATCHES = 4 * ROWS;  // of a convolution, put side by side
constexpr int MOST = 1024;         // values of a program

// ------------------------------------------------------------------------------------------------------- attention

// softmax(change(q keys)) values for at most ROWS queries. keys: (depth, padded), padded the tokens up to a multiple of
// LANES; change(i, c, logits) gives the logits of query i from column c on, -inf beyond the tokens.
template <typename Change>
static void attend(int rows, const float* q, int64_t ldq, int depth, const float* keys, int tokens,
                   const float* values, int64_t ldv, int dim, float* y, int64_t ldy, float* weights, Change change) {
    const int padded = padded_to(tokens);
    for (int c = 0; c < padded; c += PANEL) {
        const Out out{weights + c, padded, nullptr, nullptr, NONE, least(PANEL, padded - c)};
        block(rows, q, ldq, depth, keys + c, padded, out);
    }
    float inverse[ROWS];
    for (int i = 0; i < rows; ++i)
        inverse[i] = exponentials(weights + (int64_t)i * padded, padded,
                                  [=](int c, vec logits) { return change(i, c, logits); });
    for (int c = 0; c < dim; c += PANEL) {
        float made[ROWS * PANEL];
        const int columns = least(PANEL, dim - c);
        block(rows, weights, padded, tokens, values + c, ldv, Out{made, PANEL, nullptr, nullptr, NONE, columns});
        for (int i = 0; i < rows; ++i)
            for (int d = 0; d < columns; d += LANES) store(y + i * ldy + c + d, load(made + i * PANEL + d) * inverse[i]);
    }
}

// -------------------------------------------------------------------------------------------------------- programs

enum Kind { LINEAR = 0, DEPTHWISE = 1, CASCADE = 2, MEAN = 3, SCALE = 4, CONV = 5, NORM = 6, ROTATE = 7, MIX = 8,
    MERGE = 9, WINDOW = 10 };
enum Lines { HORIZONTAL = 0, VERTICAL = 1, WHOLE = 2 };

struct Head {
    const void* qkv;
    const float *qkv_bias, *taps, *tap_bias;
    int32_t kernel;
};

// One layer. Buffers are numbers into the program's table; -1: none.
struct Layer {
    int32_t kind, act;
    int32_t source, to, other;                   // values; `other` is the residual, of SCALE the factors, of MIX v
    int32_t rows, inputs, outputs;               // LINEAR, NORM: rows of all images; otherwise of one
    int32_t height, width, kernel, stride;       // of the input map; MIX: `kernel` is its Lines
    int32_t planes;                              // CONV: the input is (C, H, W), and so is a patch
    int32_t half;                                // products with weights of bfloat16
    int32_t window_height, window_width, shift_height, shift_width, heads, key;
    int32_t together, block;       // so many layers from here on run `block` rows at a time; 0: one after the other
    const void* weight;            // panels of float or of Pair, otherwise floats
    const float* bias;             // of attention: `bias` is (h, A, A up to a multiple of LANES), -inf beyond
    const float* factors;          // WINDOW: of unit vectors q, or null where q and k are taken as they are
    const Head* head;
    float epsilon;

    Norm norm() const { return {(const float*)weight, bias, epsilon}; }
};

static void run_cascade(const Layer& l, const float* x, float* y, int batch, float* scratch) {
    const int height = l.height, width = l.width, channels = l.inputs, value = channels / l.heads;
    const int wh = l.window_height, ww = l.window_width, area = wh * ww;
    const int padded = padded_to(area), wide = 2 * l.key + value;
    const int down = (height + wh - 1) / wh, across = (width + ww - 1) / ww;
    float* group = scratch;                               // (A, V): what the head sees
    float* qkv = group + (int64_t)area * value;           // (A, 2K + V), and room to read beyond
    float* query = qkv + (int64_t)area * wide + PANEL;    // (A, K)
    float* keys = query + (int64_t)area * l.key;          // (K, A up to a multiple of LANES)
    float* weights = keys + (int64_t)l.key * padded + PANEL;  // (ROWS, the same)
    float* given = weights + (int64_t)ROWS * padded + PANEL;  // (A, V): what the head before has given
    Pair* halves = l.half ? (Pair*)(given + (int64_t)area * value) : nullptr;
    const int panels = (wide + PANEL - 1) / PANEL;
#pragma omp for schedule(static)
    for (int task = 0; task < batch * down * across; ++task) {
        const int image = task / (down * across), place = task % (down * across);
        const int y0 = place / across * wh, x0 = place % across * ww;
        for (int h = 0; h < l.heads; ++h) {
            for (int t = 0; t < area; ++t) {
                const int row = y0 + t / ww, column = x0 + t % ww;
                float* to = group + (int64_t)t * value;
                const float* before = given + (int64_t)t * value;
                const bool real = row < height && column < width;
                const float* from = x + (((int64_t)image * height + row) * width + column) * channels + h * value;
                if (real && h)
                    for (int c = 0; c < value; ++c) to[c] = from[c] + before[c];
                else if (real)
                    std::memcpy(to, from, value * sizeof(float));
                else if (h)
                    std::memcpy(to, before, value * sizeof(float));
                else
                    std::memset(to, 0, value * sizeof(float));
            }
            const Head& head = l.head[h];
            const Weights into{head.qkv, head.qkv_bias, value, wide, halves};
            linear(group, value, into, NONE, nullptr, qkv, wide, 0, area, 0, panels);
            for (int row = 0; row < wh; ++row)
                depthwise_row<float>(qkv, wide, wh, ww, l.key, head.kernel, 1, head.taps, head.tap_bias, NONE,
                                     nullptr, query + (int64_t)row * ww * l.key, l.key, ww, row);
            pack_turned(qkv + l.key, wide, area, l.key, keys, padded);
            for (int r = 0; r < area; r += ROWS) {
                const float* bias = l.bias + ((int64_t)h * area + r) * padded;
                attend(least(ROWS, area - r), query + (int64_t)r * l.key, l.key, l.key, keys, area, qkv + 2 * l.key,
                       wide, value, given + (int64_t)r * value, value, weights,
                       [=](int i, int c, vec logits) { return logits + load(bias + (int64_t)i * padded + c); });
            }
            for (int t = 0; t < area; ++t) {
                const int row = y0 + t / ww, column = x0 + t % ww;
                if (row >= height || column >= width) continue;
                float* to = y + (((int64_t)image * height + row) * width + column) * channels + h * value;
                const float* from = given + (int64_t)t * value;
                for (int c = 0; c < value; c += LANES) store(to + c, activated(load(from + c), l.act));
            }
        }
    }
}

// Manhattan attention along the rows or the columns of a map, or between all its tokens. x: q and k side by side,
// (N, 2C); `weight` holds ln(gamma) of each head, `bias` each token's row and then each token's column.
static void run_mix(const Layer& l, const float* x, const float* v, float* y, int batch, float* scratch) {
    const int height = l.height, width = l.width, tokens = height * width, channels = l.outputs, dim = l.key;
    const bool rows = l.kernel == HORIZONTAL, whole = l.kernel == WHOLE;
    const int length = whole ? tokens : rows ? width : height, lines = whole ? 1 : rows ? height : width;
    const int step = rows || whole ? 1 : width;  // tokens from one to the next
    const int padded = padded_to(length), tiles = (length + ROWS - 1) / ROWS;
    const float scale = 1.0f / std::sqrt((float)dim);
    float* keys = scratch;                           // (K, L up to a multiple of LANES), and room to read beyond
    float* weights = keys + (int64_t)dim * padded + PANEL;     // (ROWS, the same)
    float* values = weights + (int64_t)ROWS * padded + PANEL;  // (L, K): lines of a map stand far apart
    float* places = values + (int64_t)length * dim + PANEL;    // WHOLE: of the tokens: rows, then columns
    float* decay = places;                                     // of a line: from L - 1 places before to all behind
    float beyond[LANES];                                       // of its last vector: 0, and then -inf
    for (int t = 0; t < LANES; ++t) beyond[t] = padded - LANES + t < length ? 0.0f : -INFINITY;
    if (whole)
        for (int t = 0; t < padded; ++t) {
            places[t] = t >= length ? 1e30f : t / width;
            places[padded + t] = t >= length ? 1e30f : t % width;
        }
    // few lines are shared out in chunks of their queries
    const int whole_tasks = batch * lines * l.heads, wanted = 4 * omp_get_num_threads();
    const int chunks = least(tiles, (wanted + whole_tasks - 1) / whole_tasks);
#pragma omp for schedule(static)
    for (int task = 0; task < whole_tasks * chunks; ++task) {
        const int chunk = task % chunks, head = task / chunks % l.heads, line = task / chunks / l.heads % lines;
        const int image = task / chunks / l.heads / lines;
        const int64_t first = (int64_t)image * tokens + (rows ? (int64_t)line * width : whole ? 0 : line);
        const float* q = x + first * 2 * channels + head * dim;
        const int64_t ldq = (int64_t)step * 2 * channels, ldv = (int64_t)step * channels;
        const float slope = ((const float*)l.weight)[head];
        pack_turned(q + channels, ldq, length, dim, keys, padded);
        for (int t = 0; t < length; ++t)
            for (int c = 0; c < dim; c += LANES)
                store(values + (int64_t)t * dim + c, load(v + (first + (int64_t)t * step) * channels + head * dim + c));
        if (!whole)
            for (int t = 0; t < length + padded; ++t) decay[t] = slope * std::abs(t - length + 1);
        const int last = least(length, tiles * (chunk + 1) / chunks * ROWS);
        for (int r = tiles * chunk / chunks * ROWS; r < last; r += ROWS) {
            const auto mixed = [&](auto change) {
                attend(least(ROWS, last - r), q + r * ldq, ldq, dim, keys, length, values, dim, dim,
                       y + first * channels + head * dim + r * ldv, ldv, weights, change);
            };
            if (whole)
                mixed([=](int i, int c, vec logits) {
                    const vec dy = load(places + c) - places[r + i];
                    const vec dx = load(places + padded + c) - places[padded + r + i];
                    return logits * scale + slope * (larger(dy, -dy) + larger(dx, -dx));
                });
            else
                mixed([=](int i, int c, vec logits) {
                    const vec changed = logits * scale + load(decay + c - (r + i) + length - 1);
                    return c + LANES <= length ? changed : changed + load(beyond);
                });
        }
    }
}

// A convolution of a k x k kernel: patches side by side, and their product with the weights (k * k * C, columns)
static void run_conv(const Layer& l, const float* x, float* y, int batch, float* scratch) {
    const int out_height = (l.height - 1) / l.stride + 1, out_width = (l.width - 1) / l.stride + 1;
    const int depth = l.kernel * l.kernel * l.inputs, pad = l.kernel % 2 ? l.kernel / 2 : 0;
    const int panels = (l.outputs + PANEL - 1) / PANEL;
    Pair* halves = l.half ? (Pair*)(scratch + (int64_t)PATCHES * depth) : nullptr;
    const Weights weights{l.weight, l.bias, depth, l.outputs, halves};
#pragma omp for schedule(static)
    for (int task = 0; task < batch * out_height; ++task) {
        const int top = task % out_height * l.stride - pad;
        const float* image = x + (int64_t)(task / out_height) * l.height * l.width * l.inputs;
        for (int start = 0; start < out_width; start += PATCHES) {
            const int count = least(PATCHES, out_width - start);
            for (int p = 0; p < count; ++p) {
                const int left = (start + p) * l.stride - pad;
                float* to = scratch + (int64_t)p * depth;
                if (!l.planes)
                    patch_of_pixels(image, l.height, l.width, l.inputs, l.kernel, top, left, to);
                else if (l.kernel == 3)
                    patch_of_planes<3>(image, l.height, l.width, l.inputs, 3, top, left, to);
                else if (l.kernel == 4)
                    patch_of_planes<4>(image, l.height, l.width, l.inputs, 4, top, left, to);
                else
                    patch_of_planes<0>(image, l.height, l.width, l.inputs, l.kernel, top, left, to);
            }
            linear(scratch, depth, weights, l.act, nullptr, y + ((int64_t)task * out_width + start) * l.outputs,
                   l.outputs, 0, count, 0, panels);
        }
    }
}

// (A, K) of one of q, k and v, times a factor; unit: to unit length first, a zero vector stays zero
static void gather(const int32_t* tokens, int area, const float* x, int64_t ldx, const float* padding, int dim,
                   bool unit, float factor, float* to) {
    for (int t = 0; t < area; ++t, to += dim) {
        const float* from = tokens[t] < 0 ? padding : x + tokens[t] * ldx;
        float scale = factor;
        if (unit) {
            vec squares = vec{};
            for (int c = 0; c < dim; c += LANES) squares += load(from + c) * load(from + c);
            const float length = std::sqrt(total(squares));
            scale = length > 1e-12f ? factor / length : 0.0f;
        }
        for (int c = 0; c < dim; c += LANES) store(to + c, load(from + c) * scale);
    }
}

// Attention in windows of a map that is shifted. x: q, k and v side by side, (N, 3C); `weight` is what stands there for
// a token beside the map; `bias` has a matrix for each kind of window.
static void run_window(const Layer& l, const float* x, float* y, int batch, float* scratch) {
    const Partition partition{l.height, l.width, l.window_height, l.window_width, l.shift_height, l.shift_width};
    const int channels = l.outputs, dim = l.key, area = partition.area(), places = partition.places();
    const int padded = padded_to(area);
    int32_t* tokens = (int32_t*)scratch;                      // (A): of the window in its image, -1: beside the map
    float* query = scratch + padded;                          // (A, K)
    float* values = query + (int64_t)area * dim;              // (A, K)
    float* made = values + (int64_t)area * dim;               // (A, K); first the keys in rows
    float* keys = made + (int64_t)area * dim;                 // (K, A up to a multiple of LANES), room to read beyond
    float* weights = keys + (int64_t)dim * padded + PANEL;    // (ROWS, the same)
#pragma omp for schedule(static)
    for (int task = 0; task < batch * places * l.heads; ++task) {
        const int head = task % l.heads, place = task / l.heads % places, image = task / l.heads / places;
        partition.tokens(place, tokens);
        const float* from = x + (int64_t)image * l.height * l.width * 3 * channels + head * dim;
        const float* padding = (const float*)l.weight + head * dim;
        const bool unit = l.factors;
        gather(tokens, area, from, 3 * channels, padding, dim, unit, unit ? l.factors[head] : 1.0f, query);
        gather(tokens, area, from + channels, 3 * channels, padding + channels, dim, unit, 1.0f, made);
        pack_turned(made, dim, area, dim, keys, padded);
        gather(tokens, area, from + 2 * channels, 3 * channels, padding + 2 * channels, dim, false, 1.0f, values);
        const float* all = l.bias + ((int64_t)partition.kind(place) * l.heads + head) * area * padded;
        for (int r = 0, tiles = (area + ROWS - 1) / ROWS; tiles; --tiles) {
            const int rows = (area - r + tiles - 1) / tiles;
            const float* bias = all + (int64_t)r * padded;
            attend(rows, query + (int64_t)r * dim, dim, dim, keys, area, values, dim, dim, made + (int64_t)r * dim, dim,
                   weights, [=](int i, int c, vec logits) { return logits + load(bias + (int64_t)i * padded + c); });
            r += rows;
        }
        float* to = y + (int64_t)image * l.height * l.width * channels + head * dim;
        for (int t = 0; t < area; ++t)
            if (tokens[t] >= 0)
                for (int c = 0; c < dim; c += LANES)
                    store(to + (int64_t)tokens[t] * channels + c, load(made + (int64_t)t * dim + c));
    }
}

// 2x2 neighbours side by side, from top to bottom and then from left to right; zeros beside the map
static void run_merge(const Layer& l, const float* x, float* y, int batch) {
    const int out_height = (l.height + 1) / 2, out_width = (l.width + 1) / 2;
#pragma omp for schedule(static)
    for (int task = 0; task < batch * out_height; ++task) {
        const int image = task / out_height, top = task % out_height * 2;
        for (int column = 0; column < out_width; ++column)
            for (int part = 0; part < 4; ++part) {
                const int row = top + part % 2, at = 2 * column + part / 2;
                float* to = y + (((int64_t)task * out_width + column) * 4 + part) * l.inputs;
                if (row < l.height && at < l.width)
                    std::memcpy(to, x + (((int64_t)image * l.height + row) * l.width + at) * l.inputs,
                                l.inputs * sizeof(float));
                else
                    std::memset(to, 0, l.inputs * sizeof(float));
            }
    }
}

// Layers that take each row by itself, LINEAR and NORM, over a few rows at a time: what is between them stays in cache.
// A value that only they see has its place in `scratch`, for these rows alone; `offsets` tells it as -1 - place.
static void run_together(const Layer* layers, const int64_t* offsets, float* const* buffers, float* scratch,
                         double* clock) {
    const int rows = layers->rows, threads = omp_get_num_threads(), tiles = (rows + ROWS - 1) / ROWS;
#pragma omp for schedule(static)
    for (int chunk = 0; chunk < threads; ++chunk) {
        const int start = (int)((int64_t)tiles * chunk / threads) * ROWS;
        const int stop = least(rows, (int)((int64_t)tiles * (chunk + 1) / threads) * ROWS);
        for (int first = start; first < stop; first += layers->block) {
            const int count = least(layers->block, stop - first);
            for (int i = 0; i < layers->together; ++i) {
                const Layer& l = layers[i];
                const double before = clock ? omp_get_wtime() : 0.0;
                const auto at = [&](int value, int channels) {
                    const int64_t place = -1 - offsets[value];
                    return place < 0 ? buffers[value] + (int64_t)first * channels : scratch + place;
                };
                const float* x = at(l.source, l.inputs);
                float* y = at(l.to, l.outputs);
                const float* residual = l.other < 0 ? nullptr : at(l.other, l.outputs);
                if (l.kind == NORM) {
                    normalise(x, count, l.inputs, l.norm(), y, residual);
                } else {
                    const Weights weights{l.weight, l.bias, l.inputs, l.outputs, l.half ? (Pair*)scratch : nullptr};
                    linear(x, l.inputs, weights, l.act, residual, y, l.outputs, 0, count, 0,
                           (l.outputs + PANEL - 1) / PANEL);
                }
                if (clock && chunk == 0) clock[i] += omp_get_wtime() - before;
            }
        }
    }
}

// Pairs of channels of each head turned: `weight` has, for each token, the cosines and the signed sines of a head
static void run_rotate(const Layer& l, float* x, int batch) {
    const int dim = l.key, tokens = l.rows;
#pragma omp for schedule(static)
    for (int task = 0; task < batch * tokens; ++task) {
        const float* turn = (const float*)l.weight + (int64_t)(task % tokens) * 2 * dim;
        float* row = x + (int64_t)task * l.inputs;
        for (int start = 0; start < l.inputs; start += dim)
            for (int c = 0; c < dim; c += LANES) {
                const vec v = load(row + start + c);
                store(row + start + c, v * load(turn + c) + swapped(v) * load(turn + dim + c));
            }
    }
}

static void run_layer(const Layer& l, float* const* buffers, int batch, float* scratch) {
    const float* x = buffers[l.source];
    float* y = buffers[l.to];
    if (l.kind == LINEAR) {
        // too few rows to share out: panels are too
        const int panels = (l.outputs + PANEL - 1) / PANEL, tiles = (l.rows + ROWS - 1) / ROWS;
        const int chunks = least(tiles, omp_get_num_threads());
        const float* residual = l.other < 0 ? nullptr : buffers[l.other];
#pragma omp for schedule(static)
        for (int task = 0; task < chunks * panels; ++task) {
            const int chunk = task % chunks, panel = task / chunks;
            const int first = (int)((int64_t)tiles * chunk / chunks) * ROWS;
            const int last = least(l.rows, (int)((int64_t)tiles * (chunk + 1) / chunks) * ROWS);
            const Weights weights{l.weight, l.bias, l.inputs, l.outputs, l.half ? (Pair*)scratch : nullptr};
            linear(x, l.inputs, weights, l.act, residual, y, l.outputs, first, last, panel, panel + 1);
        }
    } else if (l.kind == DEPTHWISE) {
        const int out_height = (l.height - 1) / l.stride + 1, out_width = (l.width - 1) / l.stride + 1;
#pragma omp for schedule(static)
        for (int task = 0; task < batch * out_height; ++task) {
            const int image = task / out_height, row = task % out_height;
            depthwise_row<float>(x + (int64_t)image * l.height * l.width * l.inputs, l.inputs, l.height, l.width,
                                 l.inputs, l.kernel, l.stride, (const float*)l.weight, l.bias, l.act,
                                 l.other < 0 ? nullptr : buffers[l.other] + (int64_t)task * out_width * l.inputs,
                                 y + (int64_t)task * out_width * l.inputs, l.inputs, out_width, row);
        }
    } else if (l.kind == CASCADE) {
        run_cascade(l, x, y, batch, scratch);
    } else if (l.kind == MIX) {
        run_mix(l, x, buffers[l.other], y, batch, scratch);
    } else if (l.kind == CONV) {
        run_conv(l, x, y, batch, scratch);
    } else if (l.kind == NORM) {
        const float* residual = l.other < 0 ? nullptr : buffers[l.other];
#pragma omp for schedule(static)
        for (int row = 0; row < l.rows; ++row) {
            const int64_t at = (int64_t)row * l.inputs;
            normalise(x + at, 1, l.inputs, l.norm(), y + at, residual ? residual + at : nullptr);
        }
    } else if (l.kind == MERGE) {
        run_merge(l, x, y, batch);
    } else if (l.kind == WINDOW) {
        run_window(l, x, y, batch, scratch);
    } else if (l.kind == ROTATE) {
        run_rotate(l, y, batch);
    } else if (l.kind == MEAN) {
        const int groups = l.inputs / LANES;
#pragma omp for schedule(static)
        for (int task = 0; task < batch * groups; ++task) {
            const int image = task / groups, c = task % groups * LANES;
            vec sum = vec{};
            for (int t = 0; t < l.rows; ++t) sum += load(x + ((int64_t)image * l.rows + t) * l.inputs + c);
            store(y + (int64_t)image * l.inputs + c, sum * (1.0f / l.rows));
        }
    } else {  // SCALE: a map by a factor for each image and channel
        const float* factor = buffers[l.other];
#pragma omp for schedule(static)
        for (int task = 0; task < batch * l.rows; ++task)
            for (int c = 0; c < l.inputs; c += LANES)
                store(y + (int64_t)task * l.inputs + c,
                      load(x + (int64_t)task * l.inputs + c) * load(factor + (int64_t)(task / l.rows) * l.inputs + c));
    }
}

extern "C" int muntin_lanes() { return LANES; }
extern "C" int muntin_panel() { return PANEL; }
extern "C" int muntin_rows() { return ROWS; }
extern "C" int muntin_half() {
#if defined(__AVX512BF16__)
    return HALVES;
#else
    return 0;
#endif
}
extern "C" int muntin_values() { return MOST; }
extern "C" int muntin_patches() { return PATCHES; }
extern "C" int muntin_layer_bytes() { return sizeof(Layer); }

// `batch` images at a time, `times` times, so that what is between the layers stays in cache. `offsets` has a place in
// `scratch` for each of `values` values, or one below 0 (run_together), but the first is the input x and the one called
// `last` the output y, which move on by so many floats. After `own` floats of the scratch come `each` floats for every
// thread. `clock`, unless it is null, gets the seconds of each layer added.
extern "C" void muntin_run(const Layer* layers, int count, const int64_t* offsets, int values, int last, float* x,
                           float* y, int batch, int times, int64_t input, int64_t output, float* scratch, int64_t own,
                           int64_t each, int threads, double* clock) {
    double before = clock ? omp_get_wtime() : 0.0;
#pragma omp parallel num_threads(threads)
    {
        float* apart = scratch + own + each * omp_get_thread_num();
        float* mine[MOST];
        for (int i = 0; i < values; ++i) mine[i] = offsets[i] < 0 ? nullptr : scratch + offsets[i];
        mine[0] = x;
        mine[last] = y;
        for (int t = 0; t < times; ++t, mine[0] += input, mine[last] += output)
            for (int i = 0; i < count; i += layers[i].together ? layers[i].together : 1) {
                if (layers[i].together)
                    run_together(layers + i, offsets, mine, apart, clock ? clock + i : nullptr);
                else
                    run_layer(layers[i], mine, batch, apart);
                if (clock && omp_get_thread_num() == 0) {  // all have finished the layer
                    const double now = omp_get_wtime();
                    if (!layers[i].together) clock[i] += now - before;
                    before = now;
                }
            }
    }
}
