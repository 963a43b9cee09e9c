// Convolutions of maps whose channels stand last in memory, row by row.

#pragma once

#include "products.h"

constexpr int TOGETHER = 4;  // columns of a depthwise convolution whose sums are in registers

// ------------------------------------------------------------------------------------------- depthwise convolution

// Some columns of a row, none of whose taps lies beside the map
template <int COLUMNS, typename S>
static void depthwise_columns(const S* x, int64_t pixel, int64_t line, int channels, int k, int stride, int first,
                              int last, const float* taps, const float* bias, int act, const S* residual, S* y,
                              int64_t out_pixel) {
    for (int c = 0; c < channels; c += LANES) {
        vec sums[COLUMNS];
        for (int p = 0; p < COLUMNS; ++p) sums[p] = load(bias + c);
        for (int i = first; i < last; ++i)
            for (int j = 0; j < k; ++j) {
                const vec tap = load(taps + (int64_t)(i * k + j) * channels + c);
                for (int p = 0; p < COLUMNS; ++p) sums[p] += load(x + i * line + (p * stride + j) * pixel + c) * tap;
            }
        for (int p = 0; p < COLUMNS; ++p) {
            vec sum = activated(sums[p], act);
            if (residual) sum += load(residual + p * out_pixel + c);
            store(y + p * out_pixel + c, sum);
        }
    }
}

// One row of act(convolution) + residual, `channels` a multiple of LANES: taps (k * k, channels), zeros around the map
template <typename S>
static void depthwise_row(const S* x, int64_t pixel, int height, int width, int channels, int k, int stride,
                          const float* taps, const float* bias, int act, const S* residual, S* y,
                          int64_t out_pixel, int out_width, int row) {
    const int pad = k / 2, top = row * stride - pad;
    const int first = top < 0 ? -top : 0, last = least(k, height - top);
    for (int column = 0; column < out_width; ++column) {
        const int left = column * stride - pad;
        const int begin = left < 0 ? -left : 0, end = least(k, width - left);
        const bool inside = begin == 0 && column + TOGETHER <= out_width && left + (TOGETHER - 1) * stride + k <= width;
        if (inside) {
            depthwise_columns<TOGETHER>(x + ((int64_t)top * width + left) * pixel, pixel, (int64_t)width * pixel,
                                        channels, k, stride, first, last, taps, bias, act,
                                        residual ? residual + column * out_pixel : nullptr, y + column * out_pixel,
                                        out_pixel);
            column += TOGETHER - 1;
            continue;
        }
        for (int c = 0; c < channels; c += LANES) {
            vec sum = load(bias + c);
            for (int i = first; i < last; ++i) {
                const S* line = x + ((int64_t)(top + i) * width + left) * pixel + c;
                for (int j = begin; j < end; ++j)
                    sum += load(line + j * pixel) * load(taps + (int64_t)(i * k + j) * channels + c);
            }
            sum = activated(sum, act);
            if (residual) sum += load(residual + column * out_pixel + c);
            store(y + column * out_pixel + c, sum);
        }
    }
}

// ------------------------------------------------------------------------------------------------------- patches

// The patch of a map (C, H, W) whose top left corner is at (top, left), as (C, k, k)
template <int K>
static void patch_of_planes(const float* x, int height, int width, int channels, int k, int top, int left, float* to) {
    const int side = K ? K : k;
    const bool inside = top >= 0 && left >= 0 && top + side <= height && left + side <= width;
    for (int c = 0; c < channels; ++c, x += (int64_t)height * width)
        for (int i = 0; i < side; ++i)
            for (int j = 0; j < side; ++j) {
                const int row = top + i, column = left + j;
                const bool real = inside || (row >= 0 && row < height && column >= 0 && column < width);
                *to++ = real ? x[(int64_t)row * width + column] : 0.0f;
            }
}

// The patch of a map (H, W, C) whose top left corner is at (top, left), as (k, k, C)
static void patch_of_pixels(const float* x, int height, int width, int channels, int k, int top, int left, float* to) {
    const int begin = left < 0 ? -left : 0, end = least(k, width - left);
    for (int i = 0; i < k; ++i, to += k * channels) {
        const int row = top + i;
        if (row < 0 || row >= height) {
            std::memset(to, 0, k * channels * sizeof(float));
            continue;
        }
        const float* from = x + ((int64_t)row * width + left) * channels;
        std::memset(to, 0, begin * channels * sizeof(float));
        std::memcpy(to + begin * channels, from + begin * channels, (end - begin) * channels * sizeof(float));
        std::memset(to + end * channels, 0, (k - end) * channels * sizeof(float));
    }
}
