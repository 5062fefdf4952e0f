// From the numbers that Python passes to the types that the kernels are compiled for; and what units.cpp provides.
#pragma once

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

void run_unit_spmm(int dtype, bool index64, int threads, Int outputs, Int inputs, Int rows, Int cols, Int count, bool transposed,
                   Int batch, Address starts, Address columns, Address values, Address x, Int x_batch, Int x_feature, Address bias,
                   Address y, Int y_batch, Int y_feature);

void run_unit_sddmm(int dtype, bool index64, int threads, Int outputs, Int inputs, Int rows, Int cols, Int count, Int batch,
                    Address starts, Address columns, Address x, Int x_batch, Int x_feature, Address dy, Int dy_batch, Int dy_feature,
                    Address dvalues);

}  // namespace REGROW_ISA
}  // namespace regrow
