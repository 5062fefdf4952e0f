// The inner loops of products with a weight made of units.
//
// A unit is some consecutive outputs x some consecutive inputs, all active or none. The values of unit j are
// values[j][input][output]: what one input sends to all outputs of the unit lies side by side. Its column counts in units.
//
//   forward          The sums of H outputs x NV vectors of batch elements stay in registers. One load of an input serves all of
//                    them: H + NV loads for H NV multiply-adds, where a single entry takes one for one.
//   input gradient   The same walk the other way: the gradients of H outputs stay in registers, and an input's NV vectors are
//                    loaded, added to and stored. No index of the transposed weight is needed.
//   value gradient   U inputs x H outputs = one vector's number of sums over the batch stay in registers. A transposing reduction
//                    makes one vector of them, in the order in which values are stored.
#pragma once

#include <algorithm>

#include "simd.h"

namespace regrow {
namespace REGROW_ISA {
namespace units {

// What the loops need of a weight.
template <class I>
struct Units {
    const I* columns;
    Int last, outputs, inputs;  // last: the last unit
};

constexpr Int ahead = 8;  // units between a request for activations and their use
template <int NV>
constexpr int most_held = std::min(accumulators / 2, accumulators / NV);  // outputs that fit in registers, NV vectors of each

// How many outputs of a unit are computed together: the largest power of 2, at most `most`, that divides them.
inline int together(Int outputs, int most) { return int(std::min<Int>(most, outputs & -outputs)); }

// Calls f with `count`, a power of 2 of at most `most`.
template <int most, int H = 1, class F>
void with_held(int count, F&& f) {
    if constexpr (H < most) {
        if (count > H) return with_held<most, 2 * H>(count, f);
    }
    f(std::integral_constant<int, H>());
}

// Asks for NV vectors. Columns jump about, which the processor's own prefetching cannot follow.
template <int NV, class A>
inline void ask(const A* activations) {
    constexpr int line = 64 / sizeof(A);
#pragma GCC unroll 16
    for (int i = 0; i < NV * lanes<A>; i += line) __builtin_prefetch(activations + i);
}

// sums[0:H][width] += H outputs of units j0..j1 times x; `values` are those of unit j0 and of the first such output.
template <int H, int NV, bool thin, class A, class I>
void gather(const Units<I>& w, Int j0, Int j1, const A* values, const A* x, A* sums) {
    constexpr int n = lanes<A>;
    const Int inputs = thin ? 1 : w.inputs, outputs = w.outputs;
    Vector<A> acc[H][NV];
#pragma GCC unroll 16
    for (int i = 0; i < H * NV; ++i) acc[i / NV][i % NV] = load<n>(sums + i * n);
    for (Int j = j0; j < j1; ++j) {
        ask<NV>(x + Int(w.columns[std::min(j + ahead, w.last)]) * (inputs * NV * n));
        const A* in = x + Int(w.columns[j]) * (inputs * NV * n);
        for (Int i = 0; i < inputs; ++i, in += NV * n, values += outputs) {
            Vector<A> activations[NV];
#pragma GCC unroll 16
            for (int v = 0; v < NV; ++v) activations[v] = load<n>(in + v * n);
#pragma GCC unroll 16
            for (int k = 0; k < H * NV; ++k) acc[k / NV][k % NV] += values[k / NV] * activations[k % NV];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < H * NV; ++i) store<n>(sums + i * n, acc[i / NV][i % NV]);
}

// dx[inputs of units j0..j1][width] += H of their outputs times dy[0:H][width], which are `stride` apart.
template <int H, int NV, bool thin, class A, class I>
void scatter(const Units<I>& w, Int j0, Int j1, const A* values, const A* dy, Int stride, A* dx) {
    constexpr int n = lanes<A>;
    const Int inputs = thin ? 1 : w.inputs, outputs = w.outputs;
    Vector<A> gradients[H][NV];
#pragma GCC unroll 16
    for (int i = 0; i < H * NV; ++i) gradients[i / NV][i % NV] = load<n>(dy + i / NV * stride + i % NV * n);
    for (Int j = j0; j < j1; ++j) {
        ask<NV>(dx + Int(w.columns[std::min(j + ahead, w.last)]) * (inputs * NV * n));
        A* out = dx + Int(w.columns[j]) * (inputs * NV * n);
        for (Int i = 0; i < inputs; ++i, out += NV * n, values += outputs) {
            Vector<A> sums[NV];
#pragma GCC unroll 16
            for (int v = 0; v < NV; ++v) sums[v] = load<n>(out + v * n);
#pragma GCC unroll 16
            for (int k = 0; k < H * NV; ++k) sums[k % NV] += values[k / NV] * gradients[k / NV][k % NV];
#pragma GCC unroll 16
            for (int v = 0; v < NV; ++v) store<n>(out + v * n, sums[v]);
        }
    }
}

template <int N, class A>
inline void add_or_set(A* sums, Vector<A, N> x, bool set) {
    store<N>(sums, set ? x : x + load<N>(sums));
}

// For inputs e..end: sums[e][0:H] = (first ? 0 : themselves) + the dot products of dy[0:H][width] and x[e][width], or x[columns[e]]
// where there are columns. U inputs share a reduction, the rest has one each.
template <int H, int U, int NV, class A, class I>
void dot_inputs(const I* columns, Int e, Int end, Int outputs, const A* x, const A* dy, A* sums, bool first) {
    constexpr int n = lanes<A>;
    const auto input = [&](Int i) { return x + (columns ? Int(columns[i]) : i) * (NV * n); };
    for (; e + U <= end; e += U) {
        Vector<A> acc[U * H] = {};
        const A* rows[U];
#pragma GCC unroll 16
        for (int u = 0; u < U; ++u) {
            rows[u] = input(e + u);
            ask<NV>(input(std::min(e + 2 * U + u, end - 1)));
        }
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
#pragma GCC unroll 16
            for (int i = 0; i < U * H; ++i) acc[i] += load<n>(rows[i / H] + v * n) * load<n>(dy + (i % H * NV + v) * n);
        }
        const Vector<A, U * H> found = sum_lanes<A, U * H>(acc);
        Vector<A, H> each[U];
        std::memcpy(each, &found, sizeof found);
        if (outputs == H) {
            add_or_set<U * H>(sums + e * H, found, first);
        } else {
            for (int u = 0; u < U; ++u) add_or_set<H>(sums + (e + u) * outputs, each[u], first);
        }
    }
    if constexpr (U > 1) dot_inputs<H, 1, NV>(columns, e, end, outputs, x, dy, sums, first);
}

// The same for H outputs of units j0..j1.
template <int H, int NV, class A, class I>
void dots(const Units<I>& w, Int j0, Int j1, const A* x, const A* dy, A* sums, bool first) {
    constexpr int U = lanes<A> / H;
    if (w.inputs == 1) return dot_inputs<H, U, NV>(w.columns, j0, j1, w.outputs, x, dy, sums, first);
    const I* const in_order = nullptr;
    for (Int j = j0; j < j1; ++j) {
        const Int feature = Int(w.columns[j]) * w.inputs;
        A* target = sums + j * w.inputs * w.outputs;
        dot_inputs<H, U, NV>(in_order, 0, w.inputs, w.outputs, x + feature * (NV * lanes<A>), dy, target, first);
    }
}

}  // namespace units
}  // namespace REGROW_ISA
}  // namespace regrow
