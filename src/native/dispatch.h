// From the numbers that Python passes to the types that the kernels are compiled for; and what units.cpp and conv.cpp provide.
#pragma once

#include <stdexcept>
#include <string>

#include "kernels.h"
#include "simd.h"

namespace regrow {
namespace REGROW_ISA {

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

template <class F>
void with_type(int dtype, F&& f) {
    if (dtype == 0) {
        f(float());
    } else if (dtype == 1) {
        f(double());
    } else {
        f(bfloat16());
    }
}
template <class F>
void with_types(int dtype, bool index64, F&& f) {
    with_type(dtype, [&](auto t) { index64 ? f(t, std::int64_t()) : f(t, std::int32_t()); });
}

// The kernels walk from start to start: a last one beyond the columns would lead them out of the memory of both.
inline const Int* checked(Address address, Int rows, Int count) {
    const Int* starts = at<const Int>(address);
    if (starts[0] != 0 || starts[rows] != count) {
        throw std::invalid_argument("starts must run from 0 to the number of columns, " + std::to_string(count) + ", and run from " +
                                    std::to_string(starts[0]) + " to " + std::to_string(starts[rows]));
    }
    return starts;
}

void run_unit_spmm(int dtype, bool index64, int threads, Int outputs, Int inputs, Int rows, Int cols, Int count, bool transposed,
                   Int batch, Address starts, Address columns, Address values, Address x, Int x_batch, Int x_feature, Address bias,
                   Address y, Int y_batch, Int y_feature);

void run_unit_backward(int dtype, bool index64, int threads, Int outputs, Int inputs, Int rows, Int cols, Int count, Int batch,
                       Address starts, Address columns, Address values, Address x, Int x_batch, Int x_feature, Address dy, Int dy_batch,
                       Int dy_feature, Address dx, Int dx_batch, Int dx_feature, Address dvalues);

void run_conv_forward(int dtype, bool index64, int threads, const Geometry& geometry, Address starts, Address columns, Address values,
                      Address x, Address bias, Address y);

void run_conv_input_gradient(int dtype, bool index64, int threads, const Geometry& geometry, Address t_starts, Address t_rows,
                             Address order, Address values, Address dy, Address dx);

void run_conv_backward(int dtype, bool index64, int threads, const Geometry& geometry, Address starts, Address columns,
                       Address t_starts, Address t_rows, Address order, Address values, Address x, Address dy, Address dx,
                       Address dvalues);

void run_unit_conv_forward(int dtype, bool index64, int threads, const Geometry& geometry, Int outputs, Int count, Address starts,
                           Address columns, Address values, Address x, Address bias, Address y);

void run_unit_conv_input_gradient(int dtype, bool index64, int threads, const Geometry& geometry, Int outputs, Int count,
                                  Address starts, Address columns, Address values, Address dy, Address dx);

void run_unit_conv_backward(int dtype, bool index64, int threads, const Geometry& geometry, Int outputs, Int count, Address starts,
                            Address columns, Address values, Address x, Address dy, Address dx, Address dvalues);

}  // namespace REGROW_ISA
}  // namespace regrow
