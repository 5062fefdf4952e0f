// Compiled once per instruction set, as kernels.cpp is, and beside it because it takes as long.
#include "units.h"

#include "dispatch.h"

namespace regrow {
namespace REGROW_ISA {
void run_unit_spmm(int dtype, bool index64, int threads, Int outputs, Int inputs, Int rows, Int cols, Int count, bool transposed,
                   Int batch, Address starts, Address columns, Address values, Address x, Int x_batch, Int x_feature, Address bias,
                   Address y, Int y_batch, Int y_feature) {
    const Int* begin = checked(starts, rows, count);
    with_types(dtype, index64, [&](auto t, auto i) {
        using T = decltype(t);
        using I = decltype(i);
        const units::Weight<const T, I> w{rows, cols, outputs, inputs, begin, at<const I>(columns), at<const T>(values)};
        units::spmm(threads, w, transposed, batch, Activations<const T>{at<const T>(x), x_batch, x_feature}, at<const T>(bias),
                    Activations<T>{at<T>(y), y_batch, y_feature});
    });
}

void run_unit_backward(int dtype, bool index64, int threads, Int outputs, Int inputs, Int rows, Int cols, Int count, Int batch,
                       Address starts, Address columns, Address values, Address x, Int x_batch, Int x_feature, Address dy, Int dy_batch,
                       Int dy_feature, Address dx, Int dx_batch, Int dx_feature, Address dvalues) {
    const Int* begin = checked(starts, rows, count);
    with_types(dtype, index64, [&](auto t, auto i) {
        using T = decltype(t);
        using I = decltype(i);
        const units::Weight<T, I> w{rows, cols, outputs, inputs, begin, at<const I>(columns), at<T>(dvalues)};
        const units::Weight<const T, I> back{rows, cols, outputs, inputs, begin, at<const I>(columns), at<const T>(values)};
        units::backward(threads, w, dx ? &back : nullptr, batch, Activations<const T>{at<const T>(x), x_batch, x_feature},
                        Activations<const T>{at<const T>(dy), dy_batch, dy_feature}, Activations<T>{at<T>(dx), dx_batch, dx_feature});
    });
}

}  // namespace REGROW_ISA
}  // namespace regrow
