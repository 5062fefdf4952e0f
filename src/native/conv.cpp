// Compiled once per instruction set, as kernels.cpp is, and beside it because it takes as long.
#include "conv.h"

#include "dispatch.h"
#include "unit_conv.h"

namespace regrow {
namespace REGROW_ISA {

void run_conv_forward(int dtype, bool index64, int threads, const Geometry& geometry, Address starts, Address columns, Address values,
                      Address x, Address bias, Address y) {
    with_types(dtype, index64, [&](auto t, auto i) {
        using T = decltype(t);
        using I = decltype(i);
        conv::forward(threads, geometry, at<const Int>(starts), at<const I>(columns), at<const T>(values), at<const T>(x),
                      at<const T>(bias), at<T>(y));
    });
}

void run_conv_input_gradient(int dtype, bool index64, int threads, const Geometry& geometry, Address t_starts, Address t_rows,
                             Address order, Address values, Address dy, Address dx) {
    with_types(dtype, index64, [&](auto t, auto i) {
        using T = decltype(t);
        using I = decltype(i);
        conv::with_input_gradient(threads, geometry, at<const Int>(t_starts), at<const I>(t_rows), at<const I>(order),
                                  at<const T>(values), at<const T>(dy), at<T>(dx), [&](auto&& inputs) { conv::deal(threads, inputs); });
    });
}

void run_conv_backward(int dtype, bool index64, int threads, const Geometry& geometry, Address starts, Address columns,
                       Address t_starts, Address t_rows, Address order, Address values, Address x, Address dy, Address dx,
                       Address dvalues) {
    with_types(dtype, index64, [&](auto t, auto i) {
        using T = decltype(t);
        using I = decltype(i);
        const auto sample = [&](auto&&... inputs) {
            conv::with_value_gradient(threads, geometry, at<const Int>(starts), at<const I>(columns), at<const T>(x), at<const T>(dy),
                                      at<T>(dvalues), [&](auto&& values) {
                                          conv::deal(threads, inputs..., values);
                                          values.finish();
                                      });
        };
        if (!dx) return sample();
        conv::with_input_gradient(threads, geometry, at<const Int>(t_starts), at<const I>(t_rows), at<const I>(order),
                                  at<const T>(values), at<const T>(dy), at<T>(dx), sample);
    });
}

void run_unit_conv_forward(int dtype, bool index64, int threads, const Geometry& geometry, Int outputs, Int count, Address starts,
                           Address columns, Address values, Address x, Address bias, Address y) {
    const Int* begin = checked(starts, geometry.filters / outputs, count);
    with_types(dtype, index64, [&](auto t, auto i) {
        using T = decltype(t);
        using I = decltype(i);
        const conv::Units<const T, I> w{outputs, begin, at<const I>(columns), at<const T>(values)};
        conv::forward(threads, geometry, w, at<const T>(x), at<const T>(bias), at<T>(y));
    });
}

void run_unit_conv_input_gradient(int dtype, bool index64, int threads, const Geometry& geometry, Int outputs, Int count,
                                  Address starts, Address columns, Address values, Address dy, Address dx) {
    const Int* begin = checked(starts, geometry.filters / outputs, count);
    with_types(dtype, index64, [&](auto t, auto i) {
        using T = decltype(t);
        using I = decltype(i);
        const conv::Units<const T, I> w{outputs, begin, at<const I>(columns), at<const T>(values)};
        conv::with_input_gradient(threads, geometry, w, at<const T>(dy), at<T>(dx), [&](auto&& inputs) { conv::deal(threads, inputs); });
    });
}

void run_unit_conv_backward(int dtype, bool index64, int threads, const Geometry& geometry, Int outputs, Int count, Address starts,
                            Address columns, Address values, Address x, Address dy, Address dx, Address dvalues) {
    const Int* begin = checked(starts, geometry.filters / outputs, count);
    with_types(dtype, index64, [&](auto t, auto i) {
        using T = decltype(t);
        using I = decltype(i);
        const auto sample = [&](auto&&... inputs) {
            const conv::Units<T, I> w{outputs, begin, at<const I>(columns), at<T>(dvalues)};
            conv::with_value_gradient(threads, geometry, w, at<const T>(x), at<const T>(dy), [&](auto&& values) {
                conv::deal(threads, inputs..., values);
                values.finish();
            });
        };
        if (!dx) return sample();
        const conv::Units<const T, I> w{outputs, begin, at<const I>(columns), at<const T>(values)};
        conv::with_input_gradient(threads, geometry, w, at<const T>(dy), at<T>(dx), sample);
    });
}

}  // namespace REGROW_ISA
}  // namespace regrow
