// Compiled once per instruction set (REGROW_ISA names it and its namespace); everything it defines is in that namespace.
#include "kernels.h"

#include "dispatch.h"
#include "linear.h"

namespace regrow {
namespace REGROW_ISA {
namespace {

void run_spmm(int dtype, bool index64, int threads, Int rows, Int cols, Int batch, Address starts, Address columns, Address order,
              Address values, Address x, Int x_batch, Int x_feature, Address bias, Address y, Int y_batch, Int y_feature) {
    with_types(dtype, index64, [&](auto t, auto i) {
        using T = decltype(t);
        using I = decltype(i);
        const Sparse<const T, I> w{rows, cols, at<const Int>(starts), at<const I>(columns), at<const I>(order), at<const T>(values)};
        spmm(threads, w, batch, Activations<const T>{at<const T>(x), x_batch, x_feature}, at<const T>(bias),
             Activations<T>{at<T>(y), y_batch, y_feature});
    });
}

void run_backward(int dtype, bool index64, int threads, Int rows, Int cols, Int batch, Address starts, Address columns, Address t_starts,
                  Address t_rows, Address order, Address values, Address x, Int x_batch, Int x_feature, Address dy, Int dy_batch,
                  Int dy_feature, Address dx, Int dx_batch, Int dx_feature, Address dvalues) {
    with_types(dtype, index64, [&](auto t, auto i) {
        using T = decltype(t);
        using I = decltype(i);
        const Sparse<T, I> w{rows, cols, at<const Int>(starts), at<const I>(columns), nullptr, at<T>(dvalues)};
        const Sparse<const T, I> back{cols, rows, at<const Int>(t_starts), at<const I>(t_rows), at<const I>(order), at<const T>(values)};
        backward(threads, w, dx ? &back : nullptr, batch, Activations<const T>{at<const T>(x), x_batch, x_feature},
                 Activations<const T>{at<const T>(dy), dy_batch, dy_feature}, Activations<T>{at<T>(dx), dx_batch, dx_feature});
    });
}

void run_transpose(int dtype, int threads, Int rows, Int cols, Address source, Int source_ld, Address target, Int target_ld) {
    with_type(dtype, [&](auto t) {
        using T = decltype(t);
        transpose(threads, rows, cols, at<const T>(source), source_ld, at<T>(target), target_ld);
    });
}

void run_transpose_index(bool index64, Int rows, Int cols, Address starts, Address columns, Address t_starts, Address t_rows,
                         Address order) {
    if (index64) {
        transpose_index(rows, cols, at<const Int>(starts), at<const std::int64_t>(columns), at<Int>(t_starts),
                        at<std::int64_t>(t_rows), at<std::int64_t>(order));
    } else {
        transpose_index(rows, cols, at<const Int>(starts), at<const std::int32_t>(columns), at<Int>(t_starts),
                        at<std::int32_t>(t_rows), at<std::int32_t>(order));
    }
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {run_spmm, run_backward, run_transpose, run_transpose_index,
                         run_conv_forward, run_conv_input_gradient, run_conv_backward,
                         run_unit_spmm, run_unit_backward,
                         run_unit_conv_forward, run_unit_conv_input_gradient, run_unit_conv_backward};

}  // namespace REGROW_ISA
}  // namespace regrow
