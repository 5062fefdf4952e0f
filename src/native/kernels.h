// What every instruction set provides. Addresses are integers, as Python has them; null is 0. Types: 0 float32, 1 float64, 2 bfloat16.
#pragma once

#include <cstdint>

namespace regrow {

using Int = std::int64_t;
using Address = std::uintptr_t;

// Of a convolution: x is (images, channels, height, width), the weight (filters, channels / groups, kernel_height, kernel_width).
struct Geometry {
    Int images, channels, height, width;
    Int filters, kernel_height, kernel_width;
    Int stride_height, stride_width, padding_height, padding_width, dilation_height, dilation_width;
    Int groups;

    Int kernel_size() const { return kernel_height * kernel_width; }
    Int group_channels() const { return channels / groups; }
    Int group_filters() const { return filters / groups; }
    Int columns() const { return group_channels() * kernel_size(); }
    Int output_height() const {
        return (height + 2 * padding_height - dilation_height * (kernel_height - 1) - 1) / stride_height + 1;
    }
    Int output_width() const {
        return (width + 2 * padding_width - dilation_width * (kernel_width - 1) - 1) / stride_width + 1;
    }
};

struct Kernels {
    void (*spmm)(int dtype, bool index64, int threads, Int rows, Int cols, Int batch, Address starts, Address columns, Address order,
                 Address values, Address x, Int x_batch, Int x_feature, Address bias, Address y, Int y_batch, Int y_feature);
    // Backward products give dvalues, and where dx is not null that too.
    void (*backward)(int dtype, bool index64, int threads, Int rows, Int cols, Int batch, Address starts, Address columns,
                     Address t_starts, Address t_rows, Address order, Address values, Address x, Int x_batch, Int x_feature, Address dy,
                     Int dy_batch, Int dy_feature, Address dx, Int dx_batch, Int dx_feature, Address dvalues);
    void (*transpose)(int dtype, int threads, Int rows, Int cols, Address source, Int source_ld, Address target, Int target_ld);
    void (*transpose_index)(bool index64, Int rows, Int cols, Address starts, Address columns, Address t_starts, Address t_rows,
                            Address order);
    void (*conv_forward)(int dtype, bool index64, int threads, const Geometry& geometry, Address starts, Address columns, Address values,
                         Address x, Address bias, Address y);
    void (*conv_input_gradient)(int dtype, bool index64, int threads, const Geometry& geometry, Address t_starts, Address t_rows,
                                Address order, Address values, Address dy, Address dx);
    void (*conv_backward)(int dtype, bool index64, int threads, const Geometry& geometry, Address starts, Address columns,
                          Address t_starts, Address t_rows, Address order, Address values, Address x, Address dy, Address dx,
                          Address dvalues);
    // Of rows x cols units of `outputs` x `inputs`, `count` are active.
    void (*unit_spmm)(int dtype, bool index64, int threads, Int outputs, Int inputs, Int rows, Int cols, Int count, bool transposed,
                      Int batch, Address starts, Address columns, Address values, Address x, Int x_batch, Int x_feature, Address bias,
                      Address y, Int y_batch, Int y_feature);
    void (*unit_backward)(int dtype, bool index64, int threads, Int outputs, Int inputs, Int rows, Int cols, Int count, Int batch,
                          Address starts, Address columns, Address values, Address x, Int x_batch, Int x_feature, Address dy,
                          Int dy_batch, Int dy_feature, Address dx, Int dx_batch, Int dx_feature, Address dvalues);
    // Of units of `outputs` filters x one tap of one channel; no unit spans two groups.
    void (*unit_conv_forward)(int dtype, bool index64, int threads, const Geometry& geometry, Int outputs, Int count, Address starts,
                              Address columns, Address values, Address x, Address bias, Address y);
    void (*unit_conv_input_gradient)(int dtype, bool index64, int threads, const Geometry& geometry, Int outputs, Int count,
                                     Address starts, Address columns, Address values, Address dy, Address dx);
    void (*unit_conv_backward)(int dtype, bool index64, int threads, const Geometry& geometry, Int outputs, Int count, Address starts,
                               Address columns, Address values, Address x, Address dy, Address dx, Address dvalues);
};

}  // namespace regrow
