// Products of a sparse matrix with dense activations, and the activations' transposition.
#pragma once

#include <algorithm>

#include "parallel.h"
#include "simd.h"

namespace regrow {
namespace REGROW_ISA {

// A matrix (rows, cols) in compressed rows; with `order`, entry j has the value values[order[j]].
template <class T, class I>
struct Sparse {
    Int rows, cols;
    const Int* starts;
    const I* columns;
    const I* order;
    T* values;
};

// Element (b, f) of a batch of feature vectors is at data + b * batch + f * feature; one of the strides is 1, or a size is.
template <class T>
struct Activations {
    T* data;
    Int batch, feature;
};

constexpr Int l2_bytes = Int(1) << 19;     // of the second-level cache, what a panel of packed activations may take
constexpr Int group_bytes = Int(1) << 23;  // packed activations held at a time, at least one tile
constexpr Int block_rows = 256;            // rows that walk the panels together: their sums stay in the second-level cache
constexpr Int packed_features = 2048;      // that a thread brings into a tile at a time
constexpr Int row_cost = 8;                // work of a row beside that of its entries, in entries
constexpr Int most_few = 8;                // batch elements for which packing is not worth while
constexpr Int inline_work = 10000;         // multiplications below which a second thread costs more than it brings

// Features first..last of batch elements b0..b0 + count as rows of `width` sums, whatever the layout of x:
// target[f - first][i] = x(b0 + i, f) for i < count, zero for count <= i < width.
template <int width, class T>
void pack(Activations<const T> x, Int batch_size, Int b0, Int count, Int first, Int last, Sum<T>* target) {
    using A = Sum<T>;
    constexpr int n = lanes<A>;
    if (x.batch == 1 || batch_size == 1) {
        for (Int f = first; f < last; ++f, target += width) {
            const T* source = x.data + b0 * x.batch + f * x.feature;
            for (Int i = 0; i < width; i += n) store<n>(target + i, load_first<n>(source + i, count - i));
        }
        return;
    }
    for (Int i = 0; i < width; i += n) {
        const Int here = std::max<Int>(0, std::min<Int>(n, count - i));
        const T* source = x.data + (b0 + i) * x.batch;
        for (Int f = first; f < last; f += n) {
            Vector<A> block[n];
            const Int features = last - f;
            if (here == n && features >= n) {
#pragma GCC unroll 16
                for (int k = 0; k < n; ++k) block[k] = load<n>(source + k * x.batch + f);
            } else {
                for (int k = 0; k < n; ++k) {
                    block[k] = k < here ? load_first<n>(source + k * x.batch + f, features) : Vector<A>{};
                }
            }
            transpose(block);
            A* rows = target + (f - first) * width + i;
            if (features >= n) {
#pragma GCC unroll 16
                for (int k = 0; k < n; ++k) store<n>(rows + k * width, block[k]);
            } else {
                for (Int k = 0; k < features; ++k) store<n>(rows + k * width, block[k]);
            }
        }
    }
}

// The reverse: y(b0 + i, f) = source[f - first][i] for i < count.
template <int width, class T>
void unpack(const Sum<T>* source, Int first, Int last, Activations<T> y, Int batch_size, Int b0, Int count) {
    using A = Sum<T>;
    constexpr int n = lanes<A>;
    if (y.batch == 1 || batch_size == 1) {
        for (Int f = first; f < last; ++f, source += width) {
            T* target = y.data + b0 * y.batch + f * y.feature;
            for (Int i = 0; i < count; i += n) store_first<n>(target + i, load<n>(source + i), count - i);
        }
        return;
    }
    for (Int i = 0; i < count; i += n) {
        const Int here = std::min<Int>(n, count - i);
        T* target = y.data + (b0 + i) * y.batch;
        for (Int f = first; f < last; f += n) {
            const Int features = last - f;
            const A* rows = source + (f - first) * width + i;
            Vector<A> block[n];
            if (features >= n) {
#pragma GCC unroll 16
                for (int k = 0; k < n; ++k) block[k] = load<n>(rows + k * width);
            } else {
                for (int k = 0; k < n; ++k) block[k] = k < features ? load<n>(rows + k * width) : Vector<A>{};
            }
            transpose(block);
            if (features >= n && here == n) {
#pragma GCC unroll 16
                for (int k = 0; k < n; ++k) store<n>(target + k * y.batch + f, block[k]);
            } else {
                for (Int k = 0; k < here; ++k) store_first<n>(target + k * y.batch + f, block[k], features);
            }
        }
    }
}

// Where part `part` starts when rows 0..rows are cut into `parts` ranges of about equal work.
inline Int cut(const Int* starts, Int rows, int parts, int part) {
    if (part >= parts) return rows;
    const Int target = (starts[rows] + rows * row_cost) / parts * part;
    Int low = 0, high = rows;
    while (low < high) {
        const Int middle = low + (high - low) / 2;
        if (starts[middle] + middle * row_cost < target) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

// The first position in begin..end whose column is `limit` or more.
template <class I>
inline Int advance(const I* columns, Int begin, Int end, Int limit) {
    constexpr Int stride = 16;
    if (begin == end || columns[end - 1] < limit) return end;
    while (begin + stride < end && columns[begin + stride] < limit) begin += stride;
    while (columns[begin] < limit) ++begin;
    return begin;
}

// Asks for the cache lines of elements begin..end.
template <class E>
inline void prefetch(const E* elements, Int begin, Int end) {
    constexpr Int line = 64 / sizeof(E);
    for (Int j = begin; j < end; j += line) __builtin_prefetch(elements + j);
}

// Calls f(r, from, to) for the entries from..to of rows r0..r1 in one panel of columns after the other, so that the activations
// of a panel stay in cache from row to row. That walk does not visit `columns` and `along` (an element per entry, counted from the
// first of row r0) in the order of memory, so the entries of the row after next are asked for ahead.
template <class I, class A, class F>
void for_panels(const Int* starts, const I* columns, const A* along, Int r0, Int r1, Int cols, Int panel, F&& f) {
    Int cursors[block_rows];
    for (Int r = r0; r < r1; ++r) cursors[r - r0] = starts[r];
    for (Int limit = panel; limit < cols + panel; limit += panel) {
        for (Int r = r0; r < r1; ++r) {
            const Int from = cursors[r - r0], to = advance(columns, from, starts[r + 1], limit);
            cursors[r - r0] = to;
            if (r + 2 < r1) {
                const Int next = cursors[r + 2 - r0], end = std::min(next + to - from, starts[r + 3]);
                prefetch(columns, next, end);
                prefetch(along, next - starts[r0], end - starts[r0]);
            }
            f(r, from, to);
        }
    }
}

// sums[0:width] += sum over entries of value * x[column][0:width], with x in rows of width = NV vectors, held in registers. Where
// the vectors are few, several entries are summed side by side, since each sum waits for the one before.
template <int NV, class A, class I>
void multiply_row(const I* columns, const A* values, Int count, const A* x, A* sums) {
    constexpr int n = lanes<A>;
    constexpr int chains = NV < 8 ? 8 / NV : 1;
    Vector<A> acc[chains][NV] = {};
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) acc[0][v] = load<n>(sums + v * n);
    Int j = 0;
    for (; j + chains <= count; j += chains) {
#pragma GCC unroll 8
        for (int k = 0; k < chains; ++k) {
            const A value = values[j + k];
            const A* row = x + Int(columns[j + k]) * (NV * n);
#pragma GCC unroll 16
            for (int v = 0; v < NV; ++v) acc[k][v] += value * load<n>(row + v * n);
        }
    }
    for (; j < count; ++j) {
        const A value = values[j];
        const A* row = x + Int(columns[j]) * (NV * n);
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) acc[0][v] += value * load<n>(row + v * n);
    }
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) {
#pragma GCC unroll 8
        for (int k = 1; k < chains; ++k) acc[0][v] += acc[k][v];
        store<n>(sums + v * n, acc[0][v]);
    }
}

// sums[j] = (first ? 0 : sums[j]) + the dot product of d and x[column of j], for G entries at a time that share a reduction, and
// then for the rest by halves of G.
template <int G, int NV, class A, class I>
inline void dot_groups(const I* columns, Int count, const A* x, const Vector<A>* d, A* sums, bool first) {
    constexpr int n = lanes<A>;
    Int j = 0;
    for (; j + G <= count; j += G) {
        Vector<A> dots[G];
#pragma GCC unroll 16
        for (int k = 0; k < G; ++k) {
            const A* row = x + Int(columns[j + k]) * (NV * n);
            dots[k] = d[0] * load<n>(row);
#pragma GCC unroll 16
            for (int v = 1; v < NV; ++v) dots[k] += d[v] * load<n>(row + v * n);
        }
        Vector<A, G> result = sum_lanes<A, G>(dots);
        if (!first) result += load<G>(sums + j);
        store<G>(sums + j, result);
    }
    if constexpr (G > 1) dot_groups<G / 2, NV>(columns + j, count - j, x, d, sums + j, first);
}

template <int NV, class A, class I>
void dot_row(const I* columns, Int count, const A* x, const A* dy, A* sums, bool first) {
    constexpr int n = lanes<A>;
    Vector<A> d[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) d[v] = load<n>(dy + v * n);
    dot_groups<n, NV>(columns, count, x, d, sums, first);
}

// Calls f with the number of vectors (1, 2, 4, ... up to `most`) that holds `batch` elements, or with `most`.
template <class A, int most, int NV = 1, class F>
void with_width(Int batch, F&& f) {
    if constexpr (NV < most) {
        if (batch > NV * lanes<A>) return with_width<A, most, 2 * NV>(batch, f);
    }
    f(std::integral_constant<int, NV>());
}

// How many tiles of so many bytes are held packed at a time.
inline Int tiles_in_group(Int tiles, Int bytes) { return std::max<Int>(1, std::min(tiles, group_bytes / std::max<Int>(1, bytes))); }

// Into how many ranges of at most `most` rows threads deal out a weight, so that a thread that is held up leaves most to others.
inline Int pieces_of(Int rows, Int most, int threads) {
    return threads == 1 ? 1 : std::min(rows, std::max<Int>(divide_up(rows, most), 4 * threads));
}

// The activations that a product reads, cut into tiles of `width` batch elements, some of which are packed side by side at a time.
// One tile that lies in memory as packing would leave it is used where it is.
template <class T, int width>
class Tiles {
public:
    using A = Sum<T>;
    const Int count;

    Tiles(Activations<const T> x, Int features, Int batch)
        : count(divide_up(batch, width)), x(x), features(features), batch(batch),
          in_place(std::is_same<T, A>::value && x.batch == 1 && x.feature == width && batch == width) {}
    Int first(Int tile) const { return tile * width; }
    Int size(Int tile) const { return std::min<Int>(width, batch - tile * width); }
    // Of a packed tile.
    Int elements() const { return features * width; }
    Int bytes() const { return elements() * Int(sizeof(A)); }
    // Where `tiles` of them are packed: memory of this thread.
    A* memory(Slot slot, Int tiles) const {
        if (in_place) return const_cast<A*>(reinterpret_cast<const A*>(x.data));
        return static_cast<A*>(scratch(slot, std::size_t(std::max<Int>(1, tiles * bytes()))));
    }
    // Packing goes in so many parts, of which this does one.
    Int parts(Int tiles) const { return in_place ? 0 : tiles * chunks(); }
    void pack(Int tile0, Int part, A* packed) const {
        const Int tile = part / chunks(), begin = part % chunks() * packed_features;
        const Int end = std::min(features, begin + packed_features);
        A* target = packed + tile * elements() + begin * width;
        regrow::REGROW_ISA::pack<width>(x, batch, first(tile0 + tile), size(tile0 + tile), begin, end, target);
    }
    static constexpr Int panel = l2_bytes / (width * Int(sizeof(A)));  // features

private:
    const Activations<const T> x;
    const Int features, batch;
    const bool in_place;

    Int chunks() const { return divide_up(features, packed_features); }
};

// A few activations only: memory for values and columns is the limit. N activations of a feature are side by side, and four
// entries are summed at a time.
template <int N, class T, class I>
void multiply_few(const Sparse<const T, I>& w, Int first, Int last, Int batch, const Sum<T>* x, const T* bias, Activations<T> y) {
    using A = Sum<T>;
    using V = std::conditional_t<N == 1, A, Vector<A, N == 1 ? 2 : N>>;
    const auto entry = [&](Int j) {
        V activations;
        std::memcpy(&activations, x + Int(w.columns[j]) * N, sizeof activations);
        return widen(w.order ? w.values[w.order[j]] : w.values[j]) * activations;
    };
    for (Int r = first; r < last; ++r) {
        V sums[4] = {};
        Int j = w.starts[r];
        const Int end = w.starts[r + 1];
        for (; j + 4 <= end; j += 4) {
            for (int k = 0; k < 4; ++k) sums[k] += entry(j + k);
        }
        for (; j < end; ++j) sums[0] += entry(j);
        const V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        A elements[N];
        std::memcpy(elements, &sum, sizeof sum);
        const A offset = bias ? widen(bias[r]) : A(0);
        for (Int b = 0; b < batch; ++b) y.data[b * y.batch + r * y.feature] = narrow<T>(elements[b] + offset);
    }
}

template <int N, class T, class I>
void spmm_few(int threads, const Sparse<const T, I>& w, Int batch, Activations<const T> x, const T* bias, Activations<T> y) {
    using A = Sum<T>;
    A* packed = static_cast<A*>(scratch(INPUTS, std::size_t(w.cols) * N * sizeof(A)));
    for (Int c = 0; c < w.cols; ++c) {
        for (Int b = 0; b < N; ++b) packed[c * N + b] = b < batch ? widen(x.data[b * x.batch + c * x.feature]) : A(0);
    }
    const int pieces = int(pieces_of(w.rows, w.rows, threads));
    Tasks rows(pieces);
    parallel(threads, [&](int) {
        rows.take([&](Int piece) {
            const Int first = cut(w.starts, w.rows, pieces, int(piece)), last = cut(w.starts, w.rows, pieces, int(piece) + 1);
            multiply_few<N>(w, first, last, batch, packed, bias, y);
        });
    });
}

// Rows `piece` of `pieces` of y = x W^t + bias, in tiles tile0..tile1, which lie packed.
template <int NV, class T, class I>
void multiply_rows(const Sparse<const T, I>& w, const Tiles<T, NV * lanes<Sum<T>>>& x, const Sum<T>* packed, Int tile0, Int tile1,
                   Int pieces, Int piece, Int batch, const T* bias, Activations<T> y) {
    using A = Sum<T>;
    constexpr int width = NV * lanes<A>;
    const Int last = cut(w.starts, w.rows, int(pieces), int(piece) + 1);
    A* sums = static_cast<A*>(scratch(PRIVATE, std::size_t(block_rows * width) * sizeof(A)));
    for (Int r0 = cut(w.starts, w.rows, int(pieces), int(piece)); r0 < last; r0 += block_rows) {
        const Int r1 = std::min(last, r0 + block_rows), begin = w.starts[r0], entries = w.starts[r1] - begin;
        const A* values;
        if (std::is_same<T, A>::value && !w.order) {
            values = reinterpret_cast<const A*>(w.values) + begin;
        } else {
            A* gathered = static_cast<A*>(scratch(VALUES, std::size_t(entries) * sizeof(A)));
            for (Int j = 0; j < entries; ++j) gathered[j] = widen(w.values[w.order ? Int(w.order[begin + j]) : begin + j]);
            values = gathered;
        }
        for (Int tile = tile0; tile < tile1; ++tile) {
            for (Int r = r0; r < r1; ++r) std::fill_n(sums + (r - r0) * width, width, bias ? widen(bias[r]) : A(0));
            for_panels(w.starts, w.columns, values, r0, r1, w.cols, x.panel, [&](Int r, Int from, Int to) {
                const A* activations = packed + (tile - tile0) * x.elements();
                multiply_row<NV>(w.columns + from, values + (from - begin), to - from, activations, sums + (r - r0) * width);
            });
            unpack<width>(sums, r0, r1, y, batch, x.first(tile), x.size(tile));
        }
    }
}

// y = x W^t + bias.
template <class T, class I>
void spmm(int threads, const Sparse<const T, I>& w, Int batch, Activations<const T> x, const T* bias, Activations<T> y) {
    using A = Sum<T>;
    if (batch == 0 || w.rows == 0) return;
    if (w.starts[w.rows] * batch < inline_work) threads = 1;
    if (batch == 1) return spmm_few<1>(threads, w, batch, x, bias, y);
    if (batch <= 4) return spmm_few<4>(threads, w, batch, x, bias, y);
    if (batch <= most_few) return spmm_few<8>(threads, w, batch, x, bias, y);

    with_width<A, accumulators / 2>(batch, [&](auto vectors) {
        constexpr int NV = decltype(vectors)::value;
        const Tiles<T, NV * lanes<A>> inputs(x, w.cols, batch);
        const Int group = tiles_in_group(inputs.count, inputs.bytes()), pieces = pieces_of(w.rows, block_rows, threads);
        A* packed = inputs.memory(INPUTS, group);
        for (Int tile0 = 0, tile1; tile0 < inputs.count; tile0 = tile1) {
            tile1 = std::min(inputs.count, tile0 + group);
            Tasks packing(inputs.parts(tile1 - tile0)), rows(pieces);
            parallel(threads, [&](int) {
                packing.finish([&](Int part) { inputs.pack(tile0, part, packed); });
                rows.take([&](Int piece) { multiply_rows<NV>(w, inputs, packed, tile0, tile1, pieces, piece, batch, bias, y); });
            });
        }
    });
}

// Rows `piece` of `pieces` of the sums of dy^t x at the entries of w, in tiles tile0..tile1, which lie packed.
template <int NV, class T, class I>
void sample_rows(const Sparse<T, I>& w, const Tiles<T, NV * lanes<Sum<T>>>& x, const Sum<T>* packed,
                 const Tiles<T, NV * lanes<Sum<T>>>& dy, const Sum<T>* gradients, Int tile0, Int tile1, Int pieces, Int piece,
                 Sum<T>* sums) {
    constexpr int width = NV * lanes<Sum<T>>;
    const Int last = cut(w.starts, w.rows, int(pieces), int(piece) + 1);
    for (Int r0 = cut(w.starts, w.rows, int(pieces), int(piece)); r0 < last; r0 += block_rows) {
        const Int r1 = std::min(last, r0 + block_rows);
        for (Int tile = tile0; tile < tile1; ++tile) {
            const Sum<T>*from_x = packed + (tile - tile0) * x.elements(), *from_dy = gradients + (tile - tile0) * dy.elements();
            for_panels(w.starts, w.columns, sums + w.starts[r0], r0, r1, w.cols, x.panel, [&](Int r, Int from, Int to) {
                dot_row<NV>(w.columns + from, to - from, from_x, from_dy + r * width, sums + from, tile == 0);
            });
        }
        if (!std::is_same<T, Sum<T>>::value && tile1 == x.count) {
            for (Int j = w.starts[r0]; j < w.starts[r1]; ++j) w.values[j] = narrow<T>(sums[j]);
        }
    }
}

// Values of w = the entries of dy^t x in its topology; and where there is `back`, the transposed weight, dx = dy back^t.
template <class T, class I>
void backward(int threads, const Sparse<T, I>& w, const Sparse<const T, I>* back, Int batch, Activations<const T> x,
              Activations<const T> dy, Activations<T> dx) {
    using A = Sum<T>;
    const Int entries = w.starts[w.rows];
    if (back && (batch <= most_few || entries == 0)) {
        spmm<T, I>(threads, *back, batch, dy, nullptr, dx);
        back = nullptr;
    }
    if (entries == 0) return;
    if (batch == 0) {
        std::memset(w.values, 0, std::size_t(entries) * sizeof(T));
        return;
    }
    if (entries * batch < inline_work) threads = 1;
    with_width<A, accumulators / 2>(batch, [&](auto vectors) {
        constexpr int NV = decltype(vectors)::value;
        const Tiles<T, NV * lanes<A>> inputs(x, w.cols, batch), gradients(dy, w.rows, batch);
        const Int group = tiles_in_group(inputs.count, inputs.bytes() + gradients.bytes());
        A *packed_x = inputs.memory(INPUTS, group), *packed_dy = gradients.memory(GRADIENTS, group);
        const Int pieces = pieces_of(w.rows, block_rows, threads), back_pieces = back ? pieces_of(w.cols, block_rows, threads) : 0;
        constexpr bool exact = std::is_same<T, A>::value;
        A* sums = exact ? reinterpret_cast<A*>(w.values) : static_cast<A*>(scratch(TOTALS, std::size_t(entries) * sizeof(A)));
        for (Int tile0 = 0, tile1; tile0 < inputs.count; tile0 = tile1) {
            tile1 = std::min(inputs.count, tile0 + group);
            const Int parts = gradients.parts(tile1 - tile0);
            Tasks packing(parts + inputs.parts(tile1 - tile0)), back_rows(back_pieces), rows(pieces);
            parallel(threads, [&](int) {
                packing.finish([&](Int part) {
                    part < parts ? gradients.pack(tile0, part, packed_dy) : inputs.pack(tile0, part - parts, packed_x);
                });
                back_rows.take([&](Int piece) {
                    multiply_rows<NV, T, I>(*back, gradients, packed_dy, tile0, tile1, back_pieces, piece, batch, nullptr, dx);
                });
                rows.take([&](Int piece) {
                    sample_rows<NV>(w, inputs, packed_x, gradients, packed_dy, tile0, tile1, pieces, piece, sums);
                });
            });
        }
    });
}

// target[c, r] = source[r, c].
template <class T>
void transpose(int threads, Int rows, Int cols, const T* source, Int source_ld, T* target, Int target_ld) {
    constexpr int n = sizeof(T) == 2 ? std::min(16, vector_bytes / 2) : lanes<T>;
    using E = std::conditional_t<sizeof(T) == 2, std::uint16_t, T>;
    const E* from = reinterpret_cast<const E*>(source);
    E* to = reinterpret_cast<E*>(target);
    if (rows * cols < inline_work) threads = 1;
    parallel(threads, [&](int part) {
        const Int blocks = (cols + n - 1) / n;
        const Int first = blocks * part / threads * n, last = std::min(cols, blocks * (part + 1) / threads * n);
        for (Int r = 0; r < rows; r += n) {
            for (Int c = first; c < last; c += n) {
                const Int high = std::min<Int>(n, rows - r), wide = std::min<Int>(n, last - c);
                Vector<E, n> block[n];
                if (high == n && wide == n) {
#pragma GCC unroll 16
                    for (int k = 0; k < n; ++k) block[k] = load<n>(from + (r + k) * source_ld + c);
                    transpose(block);
#pragma GCC unroll 16
                    for (int k = 0; k < n; ++k) store<n>(to + (c + k) * target_ld + r, block[k]);
                } else {
                    for (Int i = 0; i < wide; ++i) {
                        for (Int k = 0; k < high; ++k) to[(c + i) * target_ld + r + k] = from[(r + k) * source_ld + c + i];
                    }
                }
            }
        }
    });
}

// Counting sort by column; ascending rows within a column, because rows are walked in order.
template <class I>
void transpose_index(Int rows, Int cols, const Int* starts, const I* columns, Int* t_starts, I* t_rows, I* order) {
    const Int entries = starts[rows];
    std::fill(t_starts, t_starts + cols + 1, Int(0));
    for (Int j = 0; j < entries; ++j) ++t_starts[columns[j] + 1];
    for (Int c = 0; c < cols; ++c) t_starts[c + 1] += t_starts[c];
    Int* next = static_cast<Int*>(scratch(PRIVATE, std::size_t(cols + 1) * sizeof(Int)));
    std::copy(t_starts, t_starts + cols, next);
    for (Int r = 0; r < rows; ++r) {
        for (Int j = starts[r]; j < starts[r + 1]; ++j) {
            const Int place = next[columns[j]]++;
            t_rows[place] = I(r);
            order[place] = I(j);
        }
    }
}

}  // namespace REGROW_ISA
}  // namespace regrow
