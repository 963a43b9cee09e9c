// LayerNorm of rows, as inference (kernels.cpp) and training (training.cpp) share it. S: float, or Half of operands.h.

#pragma once

#include "products.h"

// LayerNorm over the channels; weight null: none
struct Norm {
    const float *weight, *bias;
    float epsilon;
};

template <typename S>
static inline void moments(const S* x, int channels, float epsilon, float& mean, float& inverse) {
    vec sum = vec{}, squares = vec{};
    for (int c = 0; c < channels; c += LANES) sum += load(x + c);
    mean = total(sum) / channels;
    for (int c = 0; c < channels; c += LANES) {
        const vec d = load(x + c) - mean;
        squares += d * d;
    }
    inverse = 1.0f / std::sqrt(total(squares) / channels + epsilon);
}

// y = the normalised rows, plus `residual`
template <typename S>
static void normalise(const S* x, int rows, int channels, const Norm& norm, S* y, const S* residual = nullptr) {
    for (int r = 0; r < rows; ++r, x += channels, y += channels) {
        float mean, inverse;
        moments(x, channels, norm.epsilon, mean, inverse);
        for (int c = 0; c < channels; c += LANES) {
            vec v = (load(x + c) - mean) * inverse * load(norm.weight + c) + load(norm.bias + c);
            if (residual) v += load(residual + (int64_t)r * channels + c);
            store(y + c, v);
        }
    }
}
