// Products of a weight made of units with dense activations.
//
// Row r of units covers outputs r * outputs to (r + 1) * outputs. Its units are starts[r] .. starts[r + 1], their columns ascend.
// Threads share out tiles of the batch first, and within a tile rows of units, or columns for the input gradient. Every sum is
// taken in the same order however that is done, so results do not depend on the number of threads.
#pragma once

#include <numeric>

#include "linear.h"
#include "unit_loops.h"

namespace regrow {
namespace REGROW_ISA {
namespace units {

// rows x cols units of outputs x inputs.
template <class T, class I>
struct Weight {
    Int rows, cols, outputs, inputs;
    const Int* starts;
    const I* columns;
    T* values;

    Int count() const { return starts[rows]; }
    Int size() const { return outputs * inputs; }
    Int row_features() const { return rows * outputs; }
    Int col_features() const { return cols * inputs; }
};

constexpr Int reach = Int(1) << 20;  // bytes of a packed tile that a row of units reaches into at a time

// Calls f(r, from, to) for the units of rows r0..r1 that lie in columns c0..c1, one panel of columns after the other.
template <class T, class I, class F>
void for_segments(const Weight<T, I>& w, Int r0, Int r1, Int c0, Int c1, Int panel, F&& f) {
    Int cursors[block_rows];
    for (Int r = r0; r < r1; ++r) {
        const I *begin = w.columns + w.starts[r], *end = w.columns + w.starts[r + 1];
        cursors[r - r0] = (c0 ? std::lower_bound(begin, end, I(c0)) : begin) - w.columns;
    }
    for (Int limit = c0; limit < c1;) {
        limit = std::min(c1, limit + panel);
        for (Int r = r0; r < r1; ++r) {
            const Int from = cursors[r - r0], to = advance(w.columns, from, w.starts[r + 1], limit);
            cursors[r - r0] = to;
            if (to > from) f(r, from, to);
        }
    }
}

// Rows of units that walk the panels together, and columns in a panel.
template <class T, class I>
Int rows_of_block(const Weight<T, I>& w) {
    return std::max<Int>(1, block_rows / w.outputs);
}
template <int width, class T, class I>
Int cols_of_panel(const Weight<T, I>& w, Int bytes) {
    return std::max<Int>(1, bytes / (w.inputs * width * Int(sizeof(Sum<T>))));
}

// Rows of `width` sums for features first..last, each beginning with the bias where there is one.
template <int width, class T>
void fill(const T* bias, Int first, Int last, Sum<T>* sums) {
    for (Int f = first; f < last; ++f, sums += width) std::fill_n(sums, width, bias ? widen(bias[f]) : Sum<T>(0));
}

// The values of rows r0..r1 as they are summed.
template <class T, class I>
const Sum<T>* summands(const Weight<const T, I>& w, Int r0, Int r1) {
    using A = Sum<T>;
    const T* values = w.values + w.starts[r0] * w.size();
    if constexpr (std::is_same<T, A>::value) {
        return values;
    } else {
        const Int count = (w.starts[r1] - w.starts[r0]) * w.size();
        A* wide = static_cast<A*>(scratch(VALUES, std::size_t(count) * sizeof(A)));
        for (Int i = 0; i < count; ++i) wide[i] = widen(values[i]);
        return wide;
    }
}

// What one thread does of a product at a time: the tiles tile0..tile1 of the batch, and of these the part `part` of `parts`.
template <class A>
struct Share {
    Int tile0, tile1;
    int part, parts;
    const A* packed;  // of tile0, the next ones after it
};

// Packs activations in tiles of `width` batch elements, as many at a time as fit in group_bytes, and calls work(share) on every
// thread for `step` of its tiles after the other. A thread that owns whole tiles packs them just before, so that they are in its
// core's cache, and waits for nobody. `by_tiles` says whether threads may own tiles.
template <int width, class T, class F>
void for_shares(int threads, Activations<const T> x, Int features, Int batch, bool by_tiles, Int step, F&& work) {
    using A = Sum<T>;
    const Int size = features * width, tiles = (batch + width - 1) / width;
    const Int fit = group_bytes / (size * Int(sizeof(A)) + 1), several = std::max<Int>(1, fit / threads * threads);
    A* packed = static_cast<A*>(scratch(SHARED, std::size_t(std::min(tiles, several) * size) * sizeof(A)));
    for (Int tile0 = 0; tile0 < tiles; tile0 += several) {
        const Int count = std::min(several, tiles - tile0);
        // Equal shares, whatever the numbers: as many teams as divide both, and the threads of a team divide the weight.
        const int teams = by_tiles ? int(std::gcd(count, Int(threads))) : 1, parts = threads / teams;
        const auto pack_tiles = [&](Int begin, Int end, int part, A* target) {
            const Int first = features * part / parts, last = features * (part + 1) / parts;
            for (Int tile = begin; tile < end; ++tile, target += size) {
                pack<width>(x, batch, tile * width, std::min<Int>(width, batch - tile * width), first, last, target + first * width);
            }
        };
        const auto run = [&](int thread, bool packs, bool works) __attribute__((noinline)) {  // large, and called in four places
            const Int team = thread / parts, begin = count * team / teams, end = count * (team + 1) / teams;
            const int part = thread % parts;
            if (!works) return pack_tiles(tile0 + begin, tile0 + end, part, packed + begin * size);
            for (Int first = begin; first < end; first += step) {
                const Int last = std::min(end, first + step);
                A* target = packed + (packs ? begin : first) * size;
                if (packs) pack_tiles(tile0 + first, tile0 + last, part, target);
                work(Share<A>{tile0 + first, tile0 + last, part, parts, target});
            }
        };
        if (parts == 1) {
            parallel(threads, [&](int thread) { run(thread, true, true); });
        } else {
            parallel(threads, [&](int thread) { run(thread, true, false); });
            parallel(threads, [&](int thread) { run(thread, false, true); });
        }
    }
}

// How many tiles each block of rows goes through. What is read anew is all of the weight for each run of tiles, or a tile for each
// block of rows: where the weight is the smaller, one tile after the other.
template <int width, class T, class I>
Int tiles_at_a_time(const Weight<T, I>& w, Int rows, Int batch) {
    const Int weight_bytes = w.count() * (w.size() * Int(sizeof(T)) + Int(sizeof(I)));
    const Int tile_bytes = w.col_features() * width * Int(sizeof(Sum<T>)), blocks = (w.rows + rows - 1) / rows;
    return weight_bytes < blocks * tile_bytes ? 1 : (batch + width - 1) / width;
}

// y = x W^t + bias.
template <int NV, class T, class I>
void forward(int threads, const Weight<const T, I>& w, Int batch, Activations<const T> x, const T* bias, Activations<T> y) {
    using A = Sum<T>;
    constexpr int width = NV * lanes<A>;
    const Units<I> units{w.columns, w.count() - 1, w.outputs, w.inputs};
    const Int rows = rows_of_block(w), outputs = w.outputs, panel = cols_of_panel<width>(w, reach);
    const int held = together(outputs, most_held<NV>);
    decltype(&gather<1, NV, true, A, I>) inner = nullptr;
    with_held<most_held<NV>>(held, [&](auto H) {
        constexpr int h = decltype(H)::value;
        inner = w.inputs == 1 ? gather<h, NV, true, A, I> : gather<h, NV, false, A, I>;
    });
    const Int step = tiles_at_a_time<width>(w, rows, batch);
    for_shares<width>(threads, x, w.col_features(), batch, true, step, [&](const Share<A>& s) {
        A* sums = static_cast<A*>(scratch(PRIVATE, std::size_t(rows * outputs * width) * sizeof(A)));
        const Int begin = cut(w.starts, w.rows, s.parts, s.part), end = cut(w.starts, w.rows, s.parts, s.part + 1);
        for (Int r0 = begin; r0 < end; r0 += rows) {
            const Int r1 = std::min(end, r0 + rows);
            const A* values = summands(w, r0, r1);
            for (Int tile = s.tile0; tile < s.tile1; ++tile) {
                const A* packed = s.packed + (tile - s.tile0) * w.col_features() * width;
                fill<width>(bias, r0 * outputs, r1 * outputs, sums);
                for_segments(w, r0, r1, 0, w.cols, panel, [&](Int r, Int from, Int to) {
                    for (Int o = 0; o < outputs; o += held) {
                        const A* here = values + (from - w.starts[r0]) * w.size() + o;
                        inner(units, from, to, here, packed, sums + ((r - r0) * outputs + o) * width);
                    }
                });
                unpack<width>(sums, r0 * outputs, r1 * outputs, y, batch, tile * width, std::min<Int>(width, batch - tile * width));
            }
        }
    });
}

// dx = dy W + bias.
template <int NV, class T, class I>
void input_gradient(int threads, const Weight<const T, I>& w, Int batch, Activations<const T> dy, const T* bias, Activations<T> dx) {
    using A = Sum<T>;
    constexpr int width = NV * lanes<A>;
    const Units<I> units{w.columns, w.count() - 1, w.outputs, w.inputs};
    const Int rows = rows_of_block(w), outputs = w.outputs, panel = cols_of_panel<width>(w, reach);
    const int held = together(outputs, most_held<NV>);
    decltype(&scatter<1, NV, true, A, I>) inner = nullptr;
    with_held<most_held<NV>>(held, [&](auto H) {
        constexpr int h = decltype(H)::value;
        inner = w.inputs == 1 ? scatter<h, NV, true, A, I> : scatter<h, NV, false, A, I>;
    });
    for_shares<width>(threads, dy, w.row_features(), batch, true, 1, [&](const Share<A>& s) {
        const Int c0 = w.cols * s.part / s.parts, c1 = w.cols * (s.part + 1) / s.parts, f0 = c0 * w.inputs, f1 = c1 * w.inputs;
        // Of all columns, so that a column is its own place: pages of other threads' columns are never touched and cost nothing.
        A* sums = static_cast<A*>(scratch(PRIVATE, std::size_t(w.col_features() * width) * sizeof(A)));
        for (Int tile = s.tile0; tile < s.tile1; ++tile) {
            const A* packed = s.packed + (tile - s.tile0) * w.row_features() * width;
            fill<width>(bias, f0, f1, sums + f0 * width);
            for (Int r0 = 0; r0 < w.rows; r0 += rows) {
                const Int r1 = std::min(w.rows, r0 + rows);
                const A* values = summands(w, r0, r1);
                for_segments(w, r0, r1, c0, c1, panel, [&](Int r, Int from, Int to) {
                    for (Int o = 0; o < outputs; o += held) {
                        const A* here = values + (from - w.starts[r0]) * w.size() + o;
                        inner(units, from, to, here, packed + (r * outputs + o) * width, sums);
                    }
                });
            }
            unpack<width>(sums + f0 * width, f0, f1, dx, batch, tile * width, std::min<Int>(width, batch - tile * width));
        }
    });
}

// Values of w = the entries of dy^t x in w's units.
template <int NV, class T, class I>
void value_gradient(int threads, const Weight<T, I>& w, Int batch, Activations<const T> x, Activations<const T> dy) {
    using A = Sum<T>;
    constexpr int width = NV * lanes<A>;
    constexpr bool exact = std::is_same<T, A>::value;
    const Units<I> units{w.columns, w.count() - 1, w.outputs, w.inputs};
    const Int rows = rows_of_block(w), outputs = w.outputs, size = w.size(), panel = cols_of_panel<width>(w, 2 * reach);
    const int held = together(outputs, lanes<A>);
    decltype(&dots<1, NV, A, I>) inner = nullptr;
    with_held<lanes<A>>(held, [&](auto H) { inner = dots<decltype(H)::value, NV, A, I>; });
    A* sums = exact ? reinterpret_cast<A*>(w.values) : static_cast<A*>(scratch(VALUES, std::size_t(w.count() * size) * sizeof(A)));
    for_shares<width>(threads, x, w.col_features(), batch, false, tiles_at_a_time<width>(w, rows, batch), [&](const Share<A>& s) {
        A* gradients = static_cast<A*>(scratch(PRIVATE, std::size_t(rows * outputs * width) * sizeof(A)));
        const Int end = cut(w.starts, w.rows, s.parts, s.part + 1);
        for (Int r0 = cut(w.starts, w.rows, s.parts, s.part); r0 < end; r0 += rows) {
            const Int r1 = std::min(end, r0 + rows);
            for (Int tile = s.tile0; tile < s.tile1; ++tile) {
                const A* packed = s.packed + (tile - s.tile0) * w.col_features() * width;
                const Int count = std::min<Int>(width, batch - tile * width);
                pack<width>(dy, batch, tile * width, count, r0 * outputs, r1 * outputs, gradients);
                for_segments(w, r0, r1, 0, w.cols, panel, [&](Int r, Int from, Int to) {
                    for (Int o = 0; o < outputs; o += held) {
                        inner(units, from, to, packed, gradients + ((r - r0) * outputs + o) * width, sums + o, tile == 0);
                    }
                });
            }
            if (!exact && s.tile1 * width >= batch) {
                for (Int i = w.starts[r0] * size; i < w.starts[r1] * size; ++i) w.values[i] = narrow<T>(sums[i]);
            }
        }
    });
}

// H outputs of row r from output o on, for N activations of each feature side by side. A vector holds what an input sends to all H.
template <int H, int N, class T, class I>
void multiply_few(const Weight<const T, I>& w, Int r, Int o, Int batch, const Sum<T>* x, const T* bias, Activations<T> y) {
    using A = Sum<T>;
    using V = Vector<A, H == 1 ? 2 : H>;  // there are no vectors of one lane: the other one is not used
    constexpr int chains = 4 / N;
    V sums[chains][N] = {};
    const auto add = [&](Int j, V(&to)[N]) {
        const T* values = w.values + j * w.size() + o;
        const A* in = x + Int(w.columns[j]) * w.inputs * N;
        for (Int i = 0; i < w.inputs; ++i, values += w.outputs, in += N) {
            V value;
            if constexpr (H == 1) {
                value = V{} + widen(*values);
            } else {
                value = load<H>(values);
            }
#pragma GCC unroll 4
            for (int b = 0; b < N; ++b) to[b] += value * in[b];
        }
    };
    Int j = w.starts[r];
    for (; j + chains <= w.starts[r + 1]; j += chains) {
#pragma GCC unroll 4
        for (int c = 0; c < chains; ++c) add(j + c, sums[c]);
    }
    for (; j < w.starts[r + 1]; ++j) add(j, sums[0]);
    for (int b = 0; b < N && b < batch; ++b) {
        for (int c = 1; c < chains; ++c) sums[0][b] += sums[c][b];
        for (int h = 0; h < H; ++h) {
            const Int f = r * w.outputs + o + h;
            y.data[b * y.batch + f * y.feature] = narrow<T>(sums[0][b][h] + (bias ? widen(bias[f]) : A(0)));
        }
    }
}

// y = x W^t + bias for a few activations: memory for values is the limit.
template <int N, class T, class I>
void forward_few(int threads, const Weight<const T, I>& w, Int batch, Activations<const T> x, const T* bias, Activations<T> y) {
    using A = Sum<T>;
    A* packed = static_cast<A*>(scratch(SHARED, std::size_t(w.col_features() * N) * sizeof(A)));
    for (Int f = 0; f < w.col_features(); ++f) {
        for (Int b = 0; b < N; ++b) packed[f * N + b] = b < batch ? widen(x.data[b * x.batch + f * x.feature]) : A(0);
    }
    const int held = together(w.outputs, 16);
    decltype(&multiply_few<1, N, T, I>) inner = nullptr;
    with_held<16>(held, [&](auto H) { inner = multiply_few<decltype(H)::value, N, T, I>; });
    parallel(threads, [&](int part) {
        const Int end = cut(w.starts, w.rows, threads, part + 1);
        for (Int r = cut(w.starts, w.rows, threads, part); r < end; ++r) {
            for (Int o = 0; o < w.outputs; o += held) inner(w, r, o, batch, packed, bias, y);
        }
    });
}

// y = x W^t + bias, or y = x W + bias when `transposed`.
template <class T, class I>
void spmm(int threads, const Weight<const T, I>& w, bool transposed, Int batch, Activations<const T> x, const T* bias,
          Activations<T> y) {
    using A = Sum<T>;
    if (batch == 0) return;
    if (w.count() * w.size() * batch < inline_work) threads = 1;
    if (!transposed && batch == 1) return forward_few<1>(threads, w, batch, x, bias, y);
    if (!transposed && batch <= 4) return forward_few<4>(threads, w, batch, x, bias, y);
    // Wider tiles where units leave registers for them.
    const int most = std::min(4, accumulators / together(w.outputs, most_held<1>));
    with_width<A, 4>(std::min<Int>(batch, most * lanes<A>), [&](auto vectors) {
        constexpr int NV = decltype(vectors)::value;
        transposed ? input_gradient<NV>(threads, w, batch, x, bias, y) : forward<NV>(threads, w, batch, x, bias, y);
    });
}

template <class T, class I>
void sddmm(int threads, const Weight<T, I>& w, Int batch, Activations<const T> x, Activations<const T> dy) {
    const Int entries = w.count() * w.size();
    if (batch == 0) std::memset(w.values, 0, std::size_t(entries) * sizeof(T));
    if (batch == 0 || entries == 0) return;
    if (entries * batch < inline_work) threads = 1;
    with_width<Sum<T>, accumulators / 2>(batch, [&](auto vectors) {
        value_gradient<decltype(vectors)::value>(threads, w, batch, x, dy);
    });
}

}  // namespace units
}  // namespace REGROW_ISA
}  // namespace regrow
