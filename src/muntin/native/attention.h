// What attention in inference (kernels.cpp) and in training (training.cpp) share.

#pragma once

#include "products.h"

// exp(change(c, logits) - the largest) in place of a line of logits, `padded` of them, a multiple of LANES. Returns
// 1 / the sum. change(c, logits) gives the logits from column c on, -inf beyond the tokens.
template <typename Change>
static inline float exponentials(float* line, int padded, Change change) {
    vec most = spread(-INFINITY);
    for (int c = 0; c < padded; c += LANES) {
        const vec logits = change(c, load(line + c));
        store(line + c, logits);
        most = larger(most, logits);
    }
    const float top = largest(most);
    vec sum = vec{};
    for (int c = 0; c < padded; c += LANES) {
        const vec e = exponential(load(line + c) - top);
        sum += e;
        store(line + c, e);
    }
    return 1.0f / total(sum);
}

// A map that is cut into windows after a shift. A window's place: in raster order.
struct Partition {
    int height, width, window_height, window_width, shift_height, shift_width;

    int area() const { return window_height * window_width; }
    int down() const { return (height + window_height - 1) / window_height; }
    int across() const { return (width + window_width - 1) / window_width; }
    int places() const { return down() * across(); }

    // Of a window, as biases have one matrix each: 1 at the right end and 2 at the bottom where there is a shift, 3 at
    // both, otherwise 0
    int kind(int place) const {
        return (shift_height && place / across() == down() - 1 ? 2 : 0) +
               (shift_width && place % across() == across() - 1);
    }

    // The tokens of a window in raster order of the map, -1 beside it: (area)
    void tokens(int place, int32_t* to) const {
        const int top = place / across() * window_height + shift_height, high = down() * window_height;
        const int left = place % across() * window_width + shift_width, wide = across() * window_width;
        for (int i = 0; i < window_height; ++i) {
            const int row = top + i < high ? top + i : top + i - high;
            for (int j = 0; j < window_width; ++j) {
                const int column = left + j < wide ? left + j : left + j - wide;
                *to++ = row < height && column < width ? row * width + column : -1;
            }
        }
    }
};
