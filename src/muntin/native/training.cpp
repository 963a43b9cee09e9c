// Layers of a transformer's block for training on the CPU: forward, and backward with the gradients of inputs and
// weights. What lies between the layers of one call stays in cache: a backward pass goes through a few hundred rows at
// a time, and computes again what is cheap (norms, activations, attention weights) rather than keep it.
//
// Legend: rows = tokens of all images, K channels in, N channels out, H hidden channels, A tokens of a window, h heads,
// D channels of a head. S: what activations are kept in, float or Half; weights, biases and their gradients are float.
// With Half the products of linear layers are of bfloat16, summed in float. All widths are multiples of LANES (of Half,
// K, N and H of 2 * LANES).

#include "attention.h"
#include "norms.h"
#include "operands.h"

// ------------------------------------------------------------------------------------------------------------ norms

// dn: the gradient of the normalised rows. Adds to those of weight and bias, side by side in `sums`, by way of `part`,
// so that long sums lose no digits; dx = the gradient of x, plus `beside`.
template <typename S>
static void normalise_backward(const S* x, const float* dn, int rows, int channels, const Norm& norm, const S* beside,
                               S* dx, float* part, float* sums) {
    std::memset(part, 0, 2 * channels * sizeof(float));
    for (int r = 0; r < rows; ++r, x += channels, dn += channels) {
        float mean, inverse;
        moments(x, channels, norm.epsilon, mean, inverse);
        vec sum = vec{}, along = vec{};
        for (int c = 0; c < channels; c += LANES) {
            const vec d = load(dn + c), unit = (load(x + c) - mean) * inverse, g = d * load(norm.weight + c);
            sum += g;
            along += g * unit;
            store(part + c, load(part + c) + d * unit);
            store(part + channels + c, load(part + channels + c) + d);
        }
        if (!dx) continue;
        const float shift = total(sum) / channels, slope = total(along) / channels;
        for (int c = 0; c < channels; c += LANES) {
            const vec unit = (load(x + c) - mean) * inverse;
            vec v = (load(dn + c) * load(norm.weight + c) - shift - unit * slope) * inverse;
            if (beside) v += load(beside + (int64_t)r * channels + c);
            store(dx + (int64_t)r * channels + c, v);
        }
    }
    for (int c = 0; c < 2 * channels; c += LANES) store(sums + c, load(sums + c) + load(part + c));
}

// The derivative of an activation at x, and its value. Of GELU by the density and the distribution function of the
// normal distribution (Abramowitz and Stegun 7.1.26, to 1.5e-7).
static inline vec slope_of(vec x, int act, vec& value) {
    if (act == GELU) {
        const vec bell = exponential(x * x * -0.5f), far = x < 0.0f ? -x : x;
        const vec t = 1.0f / (1.0f + far * (0.3275911f * 0.70710678118654752f));
        vec p = spread(0.5f * 1.061405429f);
        for (const float c : {-0.5f * 1.453152027f, 0.5f * 1.421413741f, -0.5f * 0.284496736f, 0.5f * 0.254829592f})
            p = p * t + c;
        const vec beyond = p * t * bell, below = x < 0.0f ? beyond : 1.0f - beyond;
        value = x * below;
        return below + x * bell * 0.3989422804014327f;
    }
    value = activated(x, act);
    return act == RELU ? (x > 0.0f ? spread(1.0f) : vec{}) : spread(1.0f);
}

template <typename S>
static void scaled(const S* x, int64_t first, int rows, int channels, const float* scale, int64_t tokens, S* y) {
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < channels; c += LANES) {
            const int64_t at = (int64_t)r * channels + c;
            store(y + at, load(x + at) * scale[(first + r) / tokens]);
        }
}

// The gradients of a norm, which threads have summed up side by side: (threads, 2, channels). G: Linear- or MlpGradient
template <typename G>
static void add_parts(const float* parts, int threads, int channels, const G& g) {
    for (int t = 0; t < threads; ++t)
        for (float* to : {g.dnorm_weight, g.dnorm_bias}) {
            if (to)
                for (int c = 0; c < channels; ++c) to[c] += parts[c];
            parts += channels;
        }
}

// What multiply_rows does with sums of rows from `first` on: y = residual + scale * (sums + bias). L: Linear or Mlp
template <typename S, typename L>
static auto joined(const L& l, const float* bias, int64_t first) {
    const S* residual = (const S*)l.residual;
    S* y = (S*)l.y;
    return [=, scale = l.scale, tokens = l.tokens, outputs = l.outputs](int r, int c, vec v) {
        const int64_t at = (first + r) * outputs + c;
        if (bias) v += load(bias + c);
        if (scale) v *= scale[(first + r) / tokens];
        AHEAD(y + at, outputs, 1);
        if (residual) {
            AHEAD(residual + at, outputs, 0);
            v += load(residual + at);
        }
        store(y + at, v);
    };
}

// --------------------------------------------------------------------------------------------------- linear layers

// What a layer does with its rows: y = residual + scale * (norm(x) @ w^T + bias), `scale` one factor per image
struct Linear {
    const void *x, *residual;
    const float *norm_weight, *norm_bias, *weight, *bias, *scale;
    void* y;
    int64_t rows, tokens;  // tokens: of an image
    float epsilon;
    int32_t inputs, outputs;
};

template <typename S>
static void linear_forward(const Linear& l, int threads) {
    typedef typename Packs<S>::type P;
    const int inputs = l.inputs, outputs = l.outputs;
    const Norm norm{l.norm_weight, l.norm_bias, l.epsilon};
    P* panels = (P*)kept_shared.get((int64_t)inputs * outputs * sizeof(float) + 4 * PANEL);
#pragma omp parallel num_threads(threads)
    {
        S* own = (S*)kept_own.get((int64_t)BLOCK * inputs * sizeof(S) + 64);
        pack_outputs<S>(l.weight, inputs, outputs, panels);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < l.rows; first += BLOCK) {
            const int count = (int)(l.rows - first < BLOCK ? l.rows - first : BLOCK);
            const S* x = (const S*)l.x + first * inputs;
            if (norm.weight) {
                normalise(x, count, inputs, norm, own);
                x = own;
            }
            multiply_rows(x, inputs, count, inputs, panels, outputs, joined<S>(l, l.bias, first));
        }
    }
}

// Gradients; null: not wanted. Those of biases and norms are added to what is there
struct LinearGradient {
    const void* dy;
    void* dx;
    float *dweight, *dbias, *dnorm_weight, *dnorm_bias;
};

template <typename S>
static void linear_backward(const Linear& l, const LinearGradient& g, int threads) {
    typedef typename Packs<S>::type P;
    const int inputs = l.inputs, outputs = l.outputs;
    const Norm norm{l.norm_weight, l.norm_bias, l.epsilon};
    const int64_t chunk = chunk_rows(l.rows, threads);
    const int64_t depth = (chunk + LANES) / LANES * LANES;
    Operands<P> operands;
    P* panels = nullptr;
    S *normal = nullptr, *scales = nullptr;
    float* parts = nullptr;
    for (const bool counting : {true, false}) {
        static thread_local size_t wanted;
        Pieces pieces{counting ? nullptr : kept_shared.get(wanted)};
        panels = pieces.take<P>((int64_t)inputs * outputs);
        operands = {pieces.take<P>(outputs * depth), pieces.take<P>(inputs * depth), depth};
        normal = pieces.take<S>(chunk * inputs);
        scales = pieces.take<S>(chunk * outputs);
        parts = pieces.take<float>((int64_t)threads * 2 * inputs);
        wanted = pieces.used;
    }
    std::memset(parts, 0, (int64_t)threads * 2 * inputs * sizeof(float));
    const bool into_rows = g.dx || norm.weight;
#pragma omp parallel num_threads(threads)
    {
        float* own = (float*)kept_own.get((int64_t)(BLOCK + 2) * inputs * sizeof(float) + 64);
        float* part = own + (int64_t)BLOCK * inputs;
        float* mine = parts + (int64_t)omp_get_thread_num() * 2 * inputs;
        if (into_rows) pack_inputs<S>(l.weight, inputs, outputs, panels);
        for (int64_t start = 0; start < l.rows; start += chunk) {
            const int count = (int)(l.rows - start < chunk ? l.rows - start : chunk);
            const S *x = (const S*)l.x + start * inputs, *dy = (const S*)g.dy + start * outputs;
            if (norm.weight || l.scale) {
#pragma omp for schedule(static)
                for (int r = 0; r < count; r += BLOCK) {
                    const int n = least(BLOCK, count - r);
                    if (norm.weight) normalise(x + (int64_t)r * inputs, n, inputs, norm, normal + (int64_t)r * inputs);
                    if (l.scale)
                        scaled(dy + (int64_t)r * outputs, start + r, n, outputs, l.scale, l.tokens,
                               scales + (int64_t)r * outputs);
                }
            }
            const S *into = norm.weight ? normal : x, *from = l.scale ? scales : dy;
            if (g.dweight) {
                pack_operands(from, outputs, into, inputs, count, g.dbias, operands);
#pragma omp barrier
                add_gradient(operands, outputs, inputs, (count + Packs<S>::EACH - 1) / Packs<S>::EACH, start == 0,
                             g.dweight);
            }
            if (into_rows) {
#pragma omp for schedule(static)
                for (int r = 0; r < count; r += BLOCK) {
                    const int n = least(BLOCK, count - r);
                    S* dx = g.dx ? (S*)g.dx + (start + r) * inputs : nullptr;
                    if (!norm.weight) {
                        multiply_rows(from + (int64_t)r * outputs, outputs, n, outputs, panels, inputs,
                                      [=](int i, int c, vec v) {
                                          AHEAD(dx + (int64_t)i * inputs + c, inputs, 1);
                                          store(dx + (int64_t)i * inputs + c, v);
                                      });
                        continue;
                    }
                    multiply_rows(from + (int64_t)r * outputs, outputs, n, outputs, panels, inputs,
                                  [=](int i, int c, vec v) { store(own + (int64_t)i * inputs + c, v); });
                    normalise_backward(x + (int64_t)r * inputs, own, n, inputs, norm, (const S*)nullptr, dx, part,
                                       mine);
                }
            } else {
#pragma omp barrier
            }
        }
    }
    add_parts(parts, threads, inputs, g);
}

// ------------------------------------------------------------------------------------------------ feed-forward layers

// y = residual + scale * (act(hidden) @ w2^T + bias2), hidden = norm(x) @ w1^T + bias1 (rows, H) is kept
struct Mlp {
    const void *x, *residual;
    const float *norm_weight, *norm_bias, *weight1, *bias1, *weight2, *bias2, *scale;
    void *hidden, *y;
    int64_t rows, tokens;
    float epsilon;
    int32_t inputs, width, outputs, act;
};

template <typename S>
static void mlp_forward(const Mlp& l, int threads) {
    typedef typename Packs<S>::type P;
    const int inputs = l.inputs, width = l.width, outputs = l.outputs;
    const Norm norm{l.norm_weight, l.norm_bias, l.epsilon};
    P* first_panels = (P*)kept_shared.get(((int64_t)inputs + outputs) * width * sizeof(float) + 4 * PANEL);
    P* second_panels = first_panels + (int64_t)inputs * width / Packs<S>::EACH;
#pragma omp parallel num_threads(threads)
    {
        S* own = (S*)kept_own.get((int64_t)BLOCK * (inputs + width) * sizeof(S) + 64);
        S* made = own + (int64_t)BLOCK * inputs;
        pack_outputs<S>(l.weight1, inputs, width, first_panels);
        pack_outputs<S>(l.weight2, width, outputs, second_panels);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < l.rows; first += BLOCK) {
            const int count = (int)(l.rows - first < BLOCK ? l.rows - first : BLOCK);
            const S* x = (const S*)l.x + first * inputs;
            if (norm.weight) {
                normalise(x, count, inputs, norm, own);
                x = own;
            }
            multiply_rows(x, inputs, count, inputs, first_panels, width, [=](int r, int c, vec v) {
                if (l.bias1) v += load(l.bias1 + c);
                AHEAD((S*)l.hidden + (first + r) * width + c, width, 1);
                store((S*)l.hidden + (first + r) * width + c, v);
                store(made + (int64_t)r * width + c, activated(v, l.act));
            });
            multiply_rows(made, width, count, width, second_panels, outputs, joined<S>(l, l.bias2, first));
        }
    }
}

// As LinearGradient; dx has dy added where x is the residual too
struct MlpGradient {
    const void* dy;
    void* dx;
    float *dweight1, *dbias1, *dweight2, *dbias2, *dnorm_weight, *dnorm_bias;
    int32_t beside;
};

template <typename S>
static void mlp_backward(const Mlp& l, const MlpGradient& g, int threads) {
    typedef typename Packs<S>::type P;
    const int inputs = l.inputs, width = l.width, outputs = l.outputs;
    const Norm norm{l.norm_weight, l.norm_bias, l.epsilon};
    const int64_t chunk = chunk_rows(l.rows, threads);
    const int64_t depth = (chunk + LANES) / LANES * LANES;
    Operands<P> first{}, second{};
    P *first_panels = nullptr, *second_panels = nullptr;
    S *normal = nullptr, *scales = nullptr, *made = nullptr, *slopes = nullptr;
    float* parts = nullptr;
    for (const bool counting : {true, false}) {
        static thread_local size_t wanted;
        Pieces pieces{counting ? nullptr : kept_shared.get(wanted)};
        first_panels = pieces.take<P>((int64_t)inputs * width);
        second_panels = pieces.take<P>((int64_t)outputs * width);
        first = {pieces.take<P>(width * depth), pieces.take<P>(inputs * depth), depth};
        second = {pieces.take<P>(outputs * depth), pieces.take<P>(width * depth), depth};
        normal = pieces.take<S>(chunk * inputs);
        scales = pieces.take<S>(chunk * outputs);
        made = pieces.take<S>(chunk * width);
        slopes = pieces.take<S>(chunk * width);
        parts = pieces.take<float>((int64_t)threads * 2 * inputs);
        wanted = pieces.used;
    }
    std::memset(parts, 0, (int64_t)threads * 2 * inputs * sizeof(float));
#pragma omp parallel num_threads(threads)
    {
        float* own = (float*)kept_own.get((int64_t)(BLOCK + 2) * inputs * sizeof(float) + 64);
        float* part = own + (int64_t)BLOCK * inputs;
        float* mine = parts + (int64_t)omp_get_thread_num() * 2 * inputs;
        pack_inputs<S>(l.weight1, inputs, width, first_panels);
        pack_inputs<S>(l.weight2, width, outputs, second_panels);
        for (int64_t start = 0; start < l.rows; start += chunk) {
            const int count = (int)(l.rows - start < chunk ? l.rows - start : chunk);
            const int steps = (count + Packs<S>::EACH - 1) / Packs<S>::EACH;
            const S *x = (const S*)l.x + start * inputs, *dy = (const S*)g.dy + start * outputs;
            const S* hidden = (const S*)l.hidden + start * width;
#pragma omp for schedule(static)
            for (int r = 0; r < count; r += BLOCK) {
                const int n = least(BLOCK, count - r);
                const S* from = dy + (int64_t)r * outputs;
                if (norm.weight) normalise(x + (int64_t)r * inputs, n, inputs, norm, normal + (int64_t)r * inputs);
                if (l.scale) {
                    scaled(from, start + r, n, outputs, l.scale, l.tokens, scales + (int64_t)r * outputs);
                    from = scales + (int64_t)r * outputs;
                }
                multiply_rows(from, outputs, n, outputs, second_panels, width, [=](int i, int c, vec v) {
                    const int64_t at = (int64_t)(r + i) * width + c;
                    vec value;
                    AHEAD(hidden + at, width, 0);
                    const vec slope = slope_of(load(hidden + at), l.act, value);
                    store(made + at, value);
                    store(slopes + at, v * slope);
                });
            }
            const S *into = norm.weight ? normal : x, *from = l.scale ? scales : dy;
            if (g.dweight2) pack_operands(from, outputs, made, width, count, g.dbias2, second);
            if (g.dweight1) pack_operands(slopes, width, into, inputs, count, g.dbias1, first);
#pragma omp barrier
            if (g.dweight2) add_gradient(second, outputs, width, steps, start == 0, g.dweight2);
            if (g.dweight1) add_gradient(first, width, inputs, steps, start == 0, g.dweight1);
#pragma omp for schedule(static)
            for (int r = 0; r < count; r += BLOCK) {
                const int n = least(BLOCK, count - r);
                S* dx = g.dx ? (S*)g.dx + (start + r) * inputs : nullptr;
                const S* beside = g.beside ? dy + (int64_t)r * inputs : nullptr;
                if (!norm.weight) {
                    if (dx)
                        multiply_rows(slopes + (int64_t)r * width, width, n, width, first_panels, inputs,
                                      [=](int i, int c, vec v) {
                                          const int64_t at = (int64_t)i * inputs + c;
                                          store(dx + at, beside ? v + load(beside + at) : v);
                                      });
                    continue;
                }
                multiply_rows(slopes + (int64_t)r * width, width, n, width, first_panels, inputs,
                              [=](int i, int c, vec v) { store(own + (int64_t)i * inputs + c, v); });
                normalise_backward(x + (int64_t)r * inputs, own, n, inputs, norm, beside, dx, part, mine);
            }
        }
    }
    add_parts(parts, threads, inputs, g);
}

// -------------------------------------------------------------------------------------------------- window attention

// softmax(scale q k^T + bias) v in windows of a map in raster order that is shifted, qkv (tokens, 3C) side by side.
// bias: (kinds, h, A, A up to a multiple of LANES), -inf beyond; kinds are those of Partition, 1 or, with a shift, 4.
// padding (3C): q, k and v of a token beside the map. factors (h): of unit vectors q and k in place of the scale, or
// null.
struct Window {
    const void* qkv;
    const float *bias, *padding, *factors;
    void* y;
    float scale;
    int32_t batch, height, width, heads, dim, window_height, window_width, shift_height, shift_width;

    Partition partition() const { return {height, width, window_height, window_width, shift_height, shift_width}; }
};

struct WindowGradient {
    const void* dy;
    void* dqkv;
    float *dbias, *dpadding, *dfactors;  // (splits, h, A, padded), (splits, 3C), (splits, h), zeros before
    int32_t splits;
};

// The tokens of all windows of an image: (windows, A)
static const int32_t* tabulate(const Partition& partition) {
    const int area = partition.area(), places = partition.places();
    int32_t* table = (int32_t*)kept_shared.get((int64_t)places * area * sizeof(int32_t));
    for (int place = 0; place < places; ++place) partition.tokens(place, table + (int64_t)place * area);
    return table;
}

// One window of one head, in scratch of its thread
template <typename S>
struct Cut {
    const Window& w;
    const Partition partition;
    const int area, padded, channels;
    float *q, *k, *v, *keys, *lengths, *weights, *out;  // q, k, v, out: (A, D); keys: (D, padded); lengths: (2, A)
    const int32_t* tokens;                              // of the window in its image, -1: padding

    explicit Cut(const Window& w)
        : w(w), partition(w.partition()), area(partition.area()), padded(padded_to(area)), channels(w.heads * w.dim) {}

    void place(Pieces& pieces) {
        const int64_t wide = (int64_t)padded * w.dim;
        q = pieces.take<float>(wide), k = pieces.take<float>(wide), v = pieces.take<float>(wide);
        keys = pieces.take<float>(wide), out = pieces.take<float>(wide);
        lengths = pieces.take<float>(2 * padded);
        weights = pieces.take<float>((int64_t)padded * padded);
    }

    // One of q, k and v (`part`), times a factor; unit: to unit length first, whose inverse lengths are kept
    void gather(const S* image, int head, int part, float factor, float* to, float* inverse) {
        const int64_t at = (int64_t)part * channels + head * w.dim;
        std::memset(to + (int64_t)area * w.dim, 0, (padded - area) * w.dim * sizeof(float));
        for (int t = 0; t < area; ++t, to += w.dim) {
            const S* from = image + (int64_t)tokens[t] * 3 * channels + at;
            vec squares = vec{};
            for (int c = 0; c < w.dim; c += LANES) {
                const vec x = tokens[t] < 0 ? load(w.padding + at + c) : load(from + c);
                store(to + c, x * factor);
                if (inverse) squares += x * x;
            }
            if (!inverse) continue;
            const float length = std::sqrt(total(squares));
            inverse[t] = length > 1e-12f ? 1.0f / length : 0.0f;
            for (int c = 0; c < w.dim; c += LANES) store(to + c, load(to + c) * inverse[t]);
        }
    }

    // (padded, D) -> (D, padded)
    void turned(const float* x, float* y) { pack_turned(x, w.dim, padded, w.dim, y, padded); }

    // softmax(q keys + bias): (A, padded)
    void attend(const float* bias) {
        for (int r = 0; r < area; r += ROWS) {
            const int count = least(ROWS, area - r);
            float* lines = weights + (int64_t)r * padded;
            for (int c = 0; c < padded; c += PANEL)
                block(count, q + r * w.dim, w.dim, w.dim, keys + c, padded,
                      Out{lines + c, padded, nullptr, nullptr, NONE, least(PANEL, padded - c)});
            for (int i = 0; i < count; ++i, lines += padded) {
                const float* beside = bias + (int64_t)(r + i) * padded;
                const float inverse =
                    exponentials(lines, padded, [=](int c, vec logits) { return logits + load(beside + c); });
                for (int c = 0; c < padded; c += LANES) store(lines + c, load(lines + c) * inverse);
            }
        }
    }

    // Of a window: q and k as they are multiplied, v, and the attention weights
    void prepare(int image, int place, int head, const int32_t* table) {
        const S* from = (const S*)w.qkv + (int64_t)image * w.height * w.width * 3 * channels;
        tokens = table + (int64_t)place * area;
        gather(from, head, 0, w.factors ? w.factors[head] : w.scale, q, w.factors ? lengths : nullptr);
        gather(from, head, 1, 1.0f, k, w.factors ? lengths + padded : nullptr);
        gather(from, head, 2, 1.0f, v, nullptr);
        turned(k, keys);
        attend(w.bias + ((int64_t)partition.kind(place) * w.heads + head) * area * padded);
    }

    // to (rows, columns) = a @ b, b (depth, columns); TURNED: a is (depth, rows)
    template <bool TURNED>
    static void product(const float* a, int64_t lda, int rows, int depth, const float* b, int64_t columns, float* to) {
        for (int c = 0; c < columns; c += PANEL)
            for (int r = 0; r < rows; r += ROWS)
                block<TURNED>(
                    least(ROWS, rows - r), TURNED ? a + r : a + r * lda, lda, depth, b + c, columns,
                    Out{to + r * columns + c, columns, nullptr, nullptr, NONE, least(PANEL, (int)columns - c)});
    }
};

template <typename S>
static void window_forward(const Window& w, int threads) {
    const int places = w.partition().places();
    const int32_t* table = tabulate(w.partition());
#pragma omp parallel num_threads(threads)
    {
        Cut<S> cut(w);
        Pieces count{nullptr};
        cut.place(count);
        Pieces pieces{kept_own.get(count.used)};
        cut.place(pieces);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < (int64_t)w.batch * places * w.heads; ++task) {
            const int head = task % w.heads, place = task / w.heads % places, image = task / w.heads / places;
            cut.prepare(image, place, head, table);
            Cut<S>::template product<false>(cut.weights, cut.padded, cut.area, cut.area, cut.v, w.dim, cut.out);
            S* y = (S*)w.y + (int64_t)image * w.height * w.width * cut.channels + head * w.dim;
            for (int t = 0; t < cut.area; ++t)
                if (cut.tokens[t] >= 0)
                    for (int c = 0; c < w.dim; c += LANES)
                        store(y + (int64_t)cut.tokens[t] * cut.channels + c, load(cut.out + t * w.dim + c));
        }
    }
}

template <typename S>
static void window_backward(const Window& w, const WindowGradient& g, int threads) {
    const int places = w.partition().places();
    const int32_t* table = tabulate(w.partition());
#pragma omp parallel num_threads(threads)
    {
        Cut<S> cut(w);
        float *dy = nullptr, *values = nullptr, *slopes = nullptr, *made = nullptr;
        for (const bool counting : {true, false}) {
            static thread_local size_t wanted;
            Pieces pieces{counting ? nullptr : kept_own.get(wanted)};
            cut.place(pieces);
            dy = pieces.take<float>(cut.padded * w.dim);
            values = pieces.take<float>(cut.padded * w.dim);  // (D, padded)
            slopes = pieces.take<float>((int64_t)cut.padded * cut.padded);
            made = pieces.take<float>(cut.padded * w.dim);
            wanted = pieces.used;
        }
        const int area = cut.area, padded = cut.padded, dim = w.dim, channels = cut.channels;
        const int64_t windows = (int64_t)w.batch * places;
        // a split of a head's windows adds up what they share
#pragma omp for schedule(static)
        for (int task = 0; task < w.heads * g.splits; ++task) {
            const int head = task / g.splits, split = task % g.splits;
            float* dbias = g.dbias ? g.dbias + ((int64_t)split * w.heads + head) * area * padded : nullptr;
            float* dpadding = g.dpadding + (int64_t)split * 3 * channels;
            for (int64_t window = windows * split / g.splits; window < windows * (split + 1) / g.splits; ++window) {
                const int64_t before = window / places * w.height * w.width;  // tokens
                cut.prepare(window / places, window % places, head, table);
                for (int t = 0; t < area; ++t) {
                    const S* from = (const S*)g.dy + (before + cut.tokens[t]) * channels + head * dim;
                    for (int c = 0; c < dim; c += LANES)
                        store(dy + t * dim + c, cut.tokens[t] >= 0 ? load(from + c) : vec{});
                }
                const auto scatter = [&](int part, const float* from) {
                    const int64_t at = (int64_t)part * channels + head * dim;
                    for (int t = 0; t < area; ++t)
                        for (int c = 0; c < dim; c += LANES) {
                            const vec x = load(from + t * dim + c);
                            if (cut.tokens[t] >= 0)
                                store((S*)g.dqkv + (before + cut.tokens[t]) * 3 * channels + at + c, x);
                            else
                                store(dpadding + at + c, load(dpadding + at + c) + x);
                        }
                };
                // of the unit vectors that `x` has, times `factor`, to those of the vectors themselves
                const auto to_unit = [&](float* d, const float* x, const float* inverse, float factor) {
                    float sum = 0.0f;
                    for (int t = 0; t < area; ++t) {
                        vec along = vec{};
                        for (int c = 0; c < dim; c += LANES) along += load(d + t * dim + c) * load(x + t * dim + c);
                        const float a = total(along) / factor;  // of the unit vector
                        sum += a;
                        for (int c = 0; c < dim; c += LANES)
                            store(d + t * dim + c,
                                  (load(d + t * dim + c) * factor - load(x + t * dim + c) * a) * inverse[t]);
                    }
                    return sum;
                };
                cut.template product<true>(cut.weights, padded, area, area, dy, dim, made);
                scatter(2, made);
                cut.turned(cut.v, values);
                cut.template product<false>(dy, dim, area, dim, values, padded, slopes);
                for (int t = 0; t < area; ++t) {
                    float *line = slopes + (int64_t)t * padded, *weights = cut.weights + (int64_t)t * padded;
                    vec along = vec{};
                    for (int c = 0; c < padded; c += LANES) along += load(line + c) * load(weights + c);
                    const float mean = total(along);
                    for (int c = 0; c < padded; c += LANES) {
                        const vec d = load(weights + c) * (load(line + c) - mean);
                        store(line + c, d);
                        if (dbias) store(dbias + (int64_t)t * padded + c, load(dbias + (int64_t)t * padded + c) + d);
                    }
                }
                cut.template product<true>(slopes, padded, area, area, cut.q, dim, made);
                if (w.factors) to_unit(made, cut.k, cut.lengths + padded, 1.0f);
                scatter(1, made);
                cut.template product<false>(slopes, padded, area, area, cut.k, dim, made);
                if (w.factors) {
                    g.dfactors[split * w.heads + head] += to_unit(made, cut.q, cut.lengths, w.factors[head]);
                } else {
                    for (int i = 0; i < area * dim; i += LANES) store(made + i, load(made + i) * w.scale);
                }
                scatter(0, made);
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------------ entry points

extern "C" int muntin_lanes() { return LANES; }
extern "C" int muntin_half() {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}
extern "C" void muntin_linear(const Linear* l, int half, int threads) { EITHER(linear_forward, *l, threads); }
extern "C" void muntin_linear_backward(const Linear* l, const LinearGradient* g, int half, int threads) {
    EITHER(linear_backward, *l, *g, threads);
}
extern "C" void muntin_mlp(const Mlp* l, int half, int threads) { EITHER(mlp_forward, *l, threads); }
extern "C" void muntin_mlp_backward(const Mlp* l, const MlpGradient* g, int half, int threads) {
    EITHER(mlp_backward, *l, *g, threads);
}
extern "C" void muntin_window(const Window* w, int half, int threads) { EITHER(window_forward, *w, threads); }
extern "C" void muntin_window_backward(const Window* w, const WindowGradient* g, int half, int threads) {
    EITHER(window_backward, *w, *g, threads);
}
