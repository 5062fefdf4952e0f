// Products of a weight made of units with dense activations.
//
// Row r of units covers outputs r * outputs to (r + 1) * outputs. Its units are starts[r] .. starts[r + 1], their columns ascend.
// Threads take tiles of the batch first, and within a tile rows of units, or columns for the input gradient. Every sum is
// taken in the same order whoever takes it, so results do not depend on the number of threads.
#pragma once

#include <deque>

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

// Calls work(tile0, tile1, packed, piece) for every run of `step` packed tiles and each of `pieces` of it. A thread packs a run just
// before it goes through it, so that it is in its core's cache. When none is left it helps the others with theirs.
template <int width, class T, class F>
void for_runs(int threads, const Tiles<T, width>& tiles, Int step, Int pieces, F&& work) {
    struct Run {
        Int tile0, tile1;
        Tasks packing, rest;
        std::atomic<Sum<T>*> packed{nullptr};

        Run(Int tile0, Int tile1, Int parts, Int pieces) : tile0(tile0), tile1(tile1), packing(parts), rest(pieces) {}
    };
    std::deque<Run> runs;
    for (Int tile0 = 0, tile1; tile0 < tiles.count; tile0 = tile1) {
        tile1 = std::min(tiles.count, tile0 + step);
        runs.emplace_back(tile0, tile1, tiles.parts(tile1 - tile0), pieces);
    }
    std::atomic<std::size_t> next{0};
    parallel(threads, [&](int) {
        const auto go_through = [&](Run& run, Sum<T>* packed) {
            run.packing.finish([&](Int part) { tiles.pack(run.tile0, part, packed); });
            run.rest.take([&](Int piece) { work(run.tile0, run.tile1, packed, piece); });
        };
        Sum<T>* const memory = tiles.memory(INPUTS, step);
        const Run* before = nullptr;
        for (std::size_t r; (r = next.fetch_add(1)) < runs.size(); before = &runs[r]) {
            if (before) before->rest.wait();  // whoever helps with it still reads this memory
            runs[r].packed.store(memory, std::memory_order_release);
            go_through(runs[r], memory);
        }
        for (Run& run : runs) {
            until([&] { return run.packed.load(std::memory_order_acquire) != nullptr; });
            go_through(run, run.packed);
        }
    });
}

// How many tiles each block of rows goes through. What is read anew is all of the weight for each run of tiles, or a tile for each
// block of rows: where the weight is the smaller, one tile after the other; else each thread's share of them, if it has room.
template <int width, class T, class I>
Int tiles_at_a_time(const Weight<T, I>& w, Int rows, const Tiles<std::remove_const_t<T>, width>& tiles, int threads) {
    const Int weight_bytes = w.count() * (w.size() * Int(sizeof(T)) + Int(sizeof(I)));
    if (weight_bytes < divide_up(w.rows, rows) * tiles.bytes()) return 1;
    return tiles_in_group(divide_up(tiles.count, threads), tiles.bytes() * threads);
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
    const Tiles<T, width> tiles(x, w.col_features(), batch);
    const int pieces = int(pieces_of(w.rows, rows, threads));
    const Int step = tiles_at_a_time<width>(w, rows, tiles, threads);
    for_runs<width>(threads, tiles, step, pieces, [&](Int tile0, Int tile1, const A* packed, Int piece) {
        A* sums = static_cast<A*>(scratch(PRIVATE, std::size_t(rows * outputs * width) * sizeof(A)));
        const Int end = cut(w.starts, w.rows, pieces, int(piece) + 1);
        for (Int r0 = cut(w.starts, w.rows, pieces, int(piece)); r0 < end; r0 += rows) {
            const Int r1 = std::min(end, r0 + rows);
            const A* values = summands(w, r0, r1);
            for (Int tile = tile0; tile < tile1; ++tile) {
                fill<width>(bias, r0 * outputs, r1 * outputs, sums);
                for_segments(w, r0, r1, 0, w.cols, panel, [&](Int r, Int from, Int to) {
                    for (Int o = 0; o < outputs; o += held) {
                        const A* here = values + (from - w.starts[r0]) * w.size() + o;
                        const A* activations = packed + (tile - tile0) * tiles.elements();
                        inner(units, from, to, here, activations, sums + ((r - r0) * outputs + o) * width);
                    }
                });
                unpack<width>(sums, r0 * outputs, r1 * outputs, y, batch, tiles.first(tile), tiles.size(tile));
            }
        }
    });
}

// Columns `piece` of `pieces` of dx = dy W + bias, for `size` batch elements from b0 on, whose gradients are rows `stride` apart.
template <int NV, class T, class I>
void columns_of_input_gradient(const Weight<const T, I>& w, const Sum<T>* dy, Int stride, Int batch, Int b0, Int size, Int pieces,
                               Int piece, const T* bias, Activations<T> dx) {
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
    const Int c0 = w.cols * piece / pieces, c1 = w.cols * (piece + 1) / pieces, f0 = c0 * w.inputs, f1 = c1 * w.inputs;
    // Of all columns, so that a column is its own place: pages of other threads' columns are never touched and cost nothing.
    A* sums = static_cast<A*>(scratch(PRIVATE, std::size_t(w.col_features() * width) * sizeof(A)));
    fill<width>(bias, f0, f1, sums + f0 * width);
    for (Int r0 = 0; r0 < w.rows; r0 += rows) {
        const Int r1 = std::min(w.rows, r0 + rows);
        const A* values = summands(w, r0, r1);
        for_segments(w, r0, r1, c0, c1, panel, [&](Int r, Int from, Int to) {
            for (Int o = 0; o < outputs; o += held) {
                const A* here = values + (from - w.starts[r0]) * w.size() + o;
                inner(units, from, to, here, dy + (r * outputs + o) * stride, stride, sums);
            }
        });
    }
    unpack<width>(sums + f0 * width, f0, f1, dx, batch, b0, size);
}

// dx = dy W + bias.
template <int NV, class T, class I>
void input_gradient(int threads, const Weight<const T, I>& w, Int batch, Activations<const T> dy, const T* bias, Activations<T> dx) {
    constexpr int width = NV * lanes<Sum<T>>;
    const Tiles<T, width> tiles(dy, w.row_features(), batch);
    const Int pieces = divide_up(threads, tiles.count);
    for_runs<width>(threads, tiles, 1, pieces, [&](Int tile, Int, const Sum<T>* packed, Int piece) {
        columns_of_input_gradient<NV>(w, packed, width, batch, tiles.first(tile), tiles.size(tile), pieces, piece, bias, dx);
    });
}

// Values of w = the entries of dy^t x in its units; and where there is `back`, the weight, dx = dy back in tiles of BV vectors.
template <int NV, int BV, class T, class I>
void backward(int threads, const Weight<T, I>& w, const Weight<const T, I>* back, Int batch, Activations<const T> x,
              Activations<const T> dy, Activations<T> dx) {
    using A = Sum<T>;
    constexpr int width = NV * lanes<A>;
    constexpr Int back_width = BV * lanes<A>;
    constexpr bool exact = std::is_same<T, A>::value;
    const Units<I> units{w.columns, w.count() - 1, w.outputs, w.inputs};
    const Int rows = rows_of_block(w), outputs = w.outputs, size = w.size(), panel = cols_of_panel<width>(w, 2 * reach);
    const int held = together(outputs, lanes<A>);
    decltype(&dots<1, NV, A, I>) inner = nullptr;
    with_held<lanes<A>>(held, [&](auto H) { inner = dots<decltype(H)::value, NV, A, I>; });
    A* sums = exact ? reinterpret_cast<A*>(w.values) : static_cast<A*>(scratch(TOTALS, std::size_t(w.count() * size) * sizeof(A)));

    const Tiles<T, width> inputs(x, w.col_features(), batch), gradients(dy, w.row_features(), batch);
    const Int count = inputs.count, held_tiles = std::min<Int>(2, count);  // one is packed while another is gone through
    A *packed_x = inputs.memory(INPUTS, held_tiles), *packed_dy = gradients.memory(GRADIENTS, held_tiles);
    const int pieces = int(pieces_of(w.rows, rows, threads));
    const Int back_pieces = divide_up(2 * threads, divide_up(batch, back_width)), parts = gradients.parts(1);

    struct Stages {
        Tasks packing, columns, rows;
        Stages(Int packing, Int columns, Int rows) : packing(packing), columns(columns), rows(rows) {}
    };
    std::deque<Stages> stages;
    for (Int tile = 0; tile < count; ++tile) {
        const Int shares = back ? divide_up(inputs.size(tile), back_width) : 0;
        stages.emplace_back(parts + inputs.parts(1), shares * back_pieces, pieces);
    }
    parallel(threads, [&](int) {
        for (Int tile = 0; tile < count; ++tile) {
            Stages& now = stages[std::size_t(tile)];
            A *tile_x = packed_x + tile % 2 * inputs.elements(), *tile_dy = packed_dy + tile % 2 * gradients.elements();
            if (tile > 1) stages[std::size_t(tile - 2)].columns.wait();
            now.packing.finish([&](Int part) {
                part < parts ? gradients.pack(tile, part, tile_dy) : inputs.pack(tile, part - parts, tile_x);
            });
            now.columns.take([&](Int task) {
                const Int b0 = task / back_pieces * back_width;
                columns_of_input_gradient<BV, T, I>(*back, tile_dy + b0, width, batch, inputs.first(tile) + b0,
                                                    std::min(back_width, inputs.size(tile) - b0), back_pieces, task % back_pieces,
                                                    nullptr, dx);
            });
            if (tile > 0) stages[std::size_t(tile - 1)].rows.wait();  // what it adds comes first
            now.rows.take([&](Int piece) {
                const Int end = cut(w.starts, w.rows, pieces, int(piece) + 1);
                for (Int r0 = cut(w.starts, w.rows, pieces, int(piece)); r0 < end; r0 += rows) {
                    const Int r1 = std::min(end, r0 + rows);
                    for_segments(w, r0, r1, 0, w.cols, panel, [&](Int r, Int from, Int to) {
                        for (Int o = 0; o < outputs; o += held) {
                            inner(units, from, to, tile_x, tile_dy + (r * outputs + o) * width, sums + o, tile == 0);
                        }
                    });
                    if (!exact && tile + 1 == count) {
                        for (Int i = w.starts[r0] * size; i < w.starts[r1] * size; ++i) w.values[i] = narrow<T>(sums[i]);
                    }
                }
            });
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
    A* packed = static_cast<A*>(scratch(INPUTS, std::size_t(w.col_features() * N) * sizeof(A)));
    for (Int f = 0; f < w.col_features(); ++f) {
        for (Int b = 0; b < N; ++b) packed[f * N + b] = b < batch ? widen(x.data[b * x.batch + f * x.feature]) : A(0);
    }
    const int held = together(w.outputs, 16);
    decltype(&multiply_few<1, N, T, I>) inner = nullptr;
    with_held<16>(held, [&](auto H) { inner = multiply_few<decltype(H)::value, N, T, I>; });
    const int pieces = int(pieces_of(w.rows, w.rows, threads));
    Tasks rows(pieces);
    parallel(threads, [&](int) {
        rows.take([&](Int piece) {
            const Int end = cut(w.starts, w.rows, pieces, int(piece) + 1);
            for (Int r = cut(w.starts, w.rows, pieces, int(piece)); r < end; ++r) {
                for (Int o = 0; o < w.outputs; o += held) inner(w, r, o, batch, packed, bias, y);
            }
        });
    });
}

// Vectors in a tile of a product: more where units leave registers for them.
template <class A, class T, class I>
Int most_vectors(const Weight<T, I>& w) {
    return std::min(4, accumulators / together(w.outputs, most_held<1>));
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
    with_width<A, 4>(std::min<Int>(batch, most_vectors<A>(w) * lanes<A>), [&](auto vectors) {
        constexpr int NV = decltype(vectors)::value;
        transposed ? input_gradient<NV>(threads, w, batch, x, bias, y) : forward<NV>(threads, w, batch, x, bias, y);
    });
}

// Values of w = the entries of dy^t x in its units; and where there is `back`, the weight, dx = dy back.
template <class T, class I>
void backward(int threads, const Weight<T, I>& w, const Weight<const T, I>* back, Int batch, Activations<const T> x,
              Activations<const T> dy, Activations<T> dx) {
    using A = Sum<T>;
    const Int entries = w.count() * w.size();
    if (batch == 0) std::memset(w.values, 0, std::size_t(entries) * sizeof(T));
    if (back && entries == 0) spmm<T, I>(threads, *back, true, batch, dy, nullptr, dx);
    if (batch == 0 || entries == 0) return;
    if (entries * batch < inline_work) threads = 1;
    with_width<A, accumulators / 2>(batch, [&](auto vectors) {
        constexpr int NV = decltype(vectors)::value;
        with_width<A, std::min(4, NV)>(std::min<Int>(batch, most_vectors<A>(w) * lanes<A>), [&](auto narrower) {
            backward<NV, decltype(narrower)::value>(threads, w, back, batch, x, dy, dx);
        });
    });
}

}  // namespace units
}  // namespace REGROW_ISA
}  // namespace regrow
