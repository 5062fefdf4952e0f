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

constexpr Int l2_bytes = Int(1) << 19;     // what a kernel may count on of the second-level cache
#include <cstdlib>
inline Int tune(const char* n, Int d) { const char* v = getenv(n); return v ? atol(v) : d; }
const Int PD = tune("PD", 2);
constexpr Int group_bytes = Int(1) << 23;  // packed activations held at a time

// Sources of loads are copied feature by feature into rows of `width` sums; rows of batch elements are transposed on the way.
// target[f - first][i] = x(b0 + i, f) for i < count, zero for count <= i < width.
template <class T>
void pack(Activations<const T> x, Int batch_size, Int b0, Int count, Int first, Int last, Sum<T>* target, Int width) {
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
template <class T>
void unpack(const Sum<T>* source, Int width, Int first, Int last, Activations<T> y, Int batch_size, Int b0, Int count) {
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

// Cuts rows 0..rows into `parts` ranges of about equal work, an entry costing 1 and a row `per_row`; returns where `part` starts.
inline Int cut(const Int* starts, Int rows, int parts, int part, Int per_row) {
    if (part >= parts) return rows;
    const Int target = (starts[rows] + rows * per_row) / parts * part;
    Int low = 0, high = rows;
    while (low < high) {
        const Int middle = low + (high - low) / 2;
        if (starts[middle] + middle * per_row < target) {
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

// sums[0:width] += sum over entries of value * x[column][0:width], held in NV vectors from the first entry to the last.
template <class A, class I, int NV>
void multiply_row(const I* columns, const A* values, Int count, const A* x, Int x_stride, A* sums) {
    constexpr int n = lanes<A>;
    Vector<A> acc[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) acc[v] = load<n>(sums + v * n);
    for (Int j = 0; j < count; ++j) {
        const A value = values[j];
        const A* row = x + Int(columns[j]) * x_stride;
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) acc[v] += value * load<n>(row + v * n);
    }
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) store<n>(sums + v * n, acc[v]);
}

// sums[j] = (first ? 0 : sums[j]) + the dot product of d and x[column of j][0:width], for G entries that share a reduction, and
// then for the rest by halves of G.
template <int G, int NV, class A, class I>
inline void dot_groups(const I* columns, Int count, const A* x, Int x_stride, const Vector<A>* d, A* sums, bool first) {
    constexpr int n = lanes<A>;
    Int j = 0;
    for (; j + G <= count; j += G) {
        Vector<A> dots[G];
#pragma GCC unroll 16
        for (int k = 0; k < G; ++k) {
            const A* row = x + Int(columns[j + k]) * x_stride;
            dots[k] = d[0] * load<n>(row);
#pragma GCC unroll 16
            for (int v = 1; v < NV; ++v) dots[k] += d[v] * load<n>(row + v * n);
        }
        Vector<A, G> result = sum_lanes<A, G>(dots);
        if (!first) result += load<G>(sums + j);
        store<G>(sums + j, result);
    }
    if constexpr (G > 1) dot_groups<G / 2, NV>(columns + j, count - j, x, x_stride, d, sums + j, first);
}

template <class A, class I, int NV>
void dot_row(const I* columns, Int count, const A* x, Int x_stride, const A* dy, A* sums, bool first) {
    constexpr int n = lanes<A>;
    Vector<A> d[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) d[v] = load<n>(dy + v * n);
    dot_groups<n, NV>(columns, count, x, x_stride, d, sums, first);
}

// Asks for the cache lines of elements begin..end, which the walk by panels does not visit in the order of memory.
template <class E>
inline void prefetch(const E* elements, Int begin, Int end) {
    constexpr Int line = 64 / sizeof(E);
    for (Int j = begin; j < end; j += line) __builtin_prefetch(elements + j);
}

// Calls f with the number of vectors (1, 2, 4, ... up to `most`) that holds `batch` elements, or with `most`.
template <class A, int most, int NV = 1, class F>
void with_width(Int batch, F&& f) {
    if constexpr (NV < most) {
        if (batch > NV * lanes<A>) return with_width<A, most, 2 * NV>(batch, f);
    }
    f(std::integral_constant<int, NV>());
}

// The activations that a kernel reads: where they lie if feature-major rows of full vectors are there already, else packed.
template <class T>
bool in_place(Activations<const T> x, Int batch, Int width) {
    return std::is_same<T, Sum<T>>::value && x.batch == 1 && x.feature == width && batch == width;
}

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
    const A* rows;
    if (std::is_same<T, A>::value && batch == N && x.feature == N && (N == 1 || x.batch == 1)) {
        rows = reinterpret_cast<const A*>(x.data);
    } else {
        A* packed = static_cast<A*>(scratch(SHARED, std::size_t(w.cols) * N * sizeof(A)));
        for (Int c = 0; c < w.cols; ++c) {
            for (Int b = 0; b < N; ++b) packed[c * N + b] = b < batch ? widen(x.data[b * x.batch + c * x.feature]) : A(0);
        }
        rows = packed;
    }
    parallel(threads, [&](int part) {
        multiply_few<N>(w, cut(w.starts, w.rows, threads, part, 8), cut(w.starts, w.rows, threads, part + 1, 8), batch, rows, bias, y);
    });
}

template <class T, class I>
void spmm(int threads, const Sparse<const T, I>& w, Int batch, Activations<const T> x, const T* bias, Activations<T> y) {
    using A = Sum<T>;
    constexpr int n = lanes<A>;
    if (batch == 0 || w.rows == 0) return;
    if (w.starts[w.rows] * batch < 10000) threads = 1;
    if (batch == 1) return spmm_few<1>(threads, w, batch, x, bias, y);
    if (batch <= 4) return spmm_few<4>(threads, w, batch, x, bias, y);
    if (batch <= 8) return spmm_few<8>(threads, w, batch, x, bias, y);

    with_width<A, accumulators / 2>(std::min(batch, tune("WIDTH", 128)), [&](auto vectors) {
        constexpr int NV = decltype(vectors)::value;
        constexpr Int width = NV * n;
        const Int tiles = (batch + width - 1) / width;
        const Int tile_size = w.cols * width;
        const Int group = std::max<Int>(1, std::min<Int>(tiles, group_bytes / (tile_size * Int(sizeof(A)) + 1)));
        const bool ready = in_place(x, batch, width);
        A* packed = ready ? nullptr : static_cast<A*>(scratch(SHARED, std::size_t(group * tile_size) * sizeof(A)));
        const Int panel = std::max<Int>(1, tune("PANEL", l2_bytes) / (width * Int(sizeof(A))));
        const Int block_rows = tune("BLOCK", 256);

        for (Int tile0 = 0; tile0 < tiles; tile0 += group) {
            const Int tile1 = std::min(tiles, tile0 + group);
            if (!ready) {
                parallel(threads, [&](int part) {
                    const Int first = w.cols * part / threads, last = w.cols * (part + 1) / threads;
                    for (Int tile = tile0; tile < tile1; ++tile) {
                        pack(x, batch, tile * width, std::min(width, batch - tile * width), first, last,
                             packed + (tile - tile0) * tile_size + first * width, width);
                    }
                });
            }
            parallel(threads, [&](int part) {
                const Int first = cut(w.starts, w.rows, threads, part, 8), last = cut(w.starts, w.rows, threads, part + 1, 8);
                A* sums = static_cast<A*>(scratch(PRIVATE, block_rows * (width * sizeof(A) + sizeof(Int))));
                Int* cursors = reinterpret_cast<Int*>(sums + block_rows * width);
                for (Int r0 = first; r0 < last; r0 += block_rows) {
                    const Int r1 = std::min(last, r0 + block_rows);
                    const Int begin = w.starts[r0], end = w.starts[r1];
                    const A* values;
                    if (std::is_same<T, A>::value && !w.order) {
                        values = reinterpret_cast<const A*>(w.values) + begin;
                    } else {
                        A* gathered = static_cast<A*>(scratch(VALUES, std::size_t(end - begin) * sizeof(A)));
                        for (Int j = begin; j < end; ++j) gathered[j - begin] = widen(w.values[w.order ? w.order[j] : j]);
                        values = gathered;
                    }
                    for (Int tile = tile0; tile < tile1; ++tile) {
                        const A* source = ready ? reinterpret_cast<const A*>(x.data) : packed + (tile - tile0) * tile_size;
                        for (Int r = r0; r < r1; ++r) {
                            const A offset = bias ? widen(bias[r]) : A(0);
                            for (Int i = 0; i < width; ++i) sums[(r - r0) * width + i] = offset;
                            cursors[r - r0] = w.starts[r];
                        }
                        for (Int limit = panel; limit < w.cols + panel; limit += panel) {
                            for (Int r = r0; r < r1; ++r) {
                                const Int from = cursors[r - r0];
                                const Int to = advance(w.columns, from, w.starts[r + 1], limit);
                                cursors[r - r0] = to;
                                if (r + PD < r1) {
                                    const Int next = cursors[r + PD - r0], size = to - from;
                                    prefetch(w.columns, next, next + size);
                                    prefetch(values, next - begin, next - begin + size);
                                }
                                multiply_row<A, I, NV>(w.columns + from, values + (from - begin), to - from, source, width,
                                                       sums + (r - r0) * width);
                            }
                        }
                        unpack(sums, width, r0, r1, y, batch, tile * width, std::min(width, batch - tile * width));
                    }
                }
            });
        }
    });
}

template <class T, class I>
void sddmm(int threads, const Sparse<T, I>& w, Int batch, Activations<const T> x, Activations<const T> dy) {
    using A = Sum<T>;
    constexpr int n = lanes<A>;
    const Int entries = w.starts[w.rows];
    if (entries == 0) return;
    if (batch == 0) {
        std::memset(w.values, 0, std::size_t(entries) * sizeof(T));
        return;
    }
    if (entries * batch < 10000) threads = 1;
    with_width<A, accumulators / 2>(std::min(batch, tune("WIDTH", 128)), [&](auto vectors) {
        constexpr int NV = decltype(vectors)::value;
        constexpr Int width = NV * n;
        const Int tiles = (batch + width - 1) / width;
        const Int tile_size = w.cols * width;
        const Int group = std::max<Int>(1, std::min<Int>(tiles, group_bytes / (tile_size * Int(sizeof(A)) + 1)));
        const bool ready = in_place(x, batch, width);
        A* packed = ready ? nullptr : static_cast<A*>(scratch(SHARED, std::size_t(group * tile_size) * sizeof(A)));
        const Int panel = std::max<Int>(1, tune("PANEL", l2_bytes) / (width * Int(sizeof(A))));
        const Int block_rows = tune("BLOCK", 256);
        constexpr bool exact = std::is_same<T, A>::value;
        A* sums = exact ? reinterpret_cast<A*>(w.values) : static_cast<A*>(scratch(VALUES, std::size_t(entries) * sizeof(A)));

        for (Int tile0 = 0; tile0 < tiles; tile0 += group) {
            const Int tile1 = std::min(tiles, tile0 + group);
            if (!ready) {
                parallel(threads, [&](int part) {
                    const Int first = w.cols * part / threads, last = w.cols * (part + 1) / threads;
                    for (Int tile = tile0; tile < tile1; ++tile) {
                        pack(x, batch, tile * width, std::min(width, batch - tile * width), first, last,
                             packed + (tile - tile0) * tile_size + first * width, width);
                    }
                });
            }
            parallel(threads, [&](int part) {
                const Int first = cut(w.starts, w.rows, threads, part, 8), last = cut(w.starts, w.rows, threads, part + 1, 8);
                A* gradients = static_cast<A*>(scratch(PRIVATE, block_rows * (width * sizeof(A) + sizeof(Int))));
                Int* cursors = reinterpret_cast<Int*>(gradients + block_rows * width);
                for (Int r0 = first; r0 < last; r0 += block_rows) {
                    const Int r1 = std::min(last, r0 + block_rows);
                    for (Int tile = tile0; tile < tile1; ++tile) {
                        const A* source = ready ? reinterpret_cast<const A*>(x.data) : packed + (tile - tile0) * tile_size;
                        pack(dy, batch, tile * width, std::min(width, batch - tile * width), r0, r1, gradients, width);
                        for (Int r = r0; r < r1; ++r) cursors[r - r0] = w.starts[r];
                        for (Int limit = panel; limit < w.cols + panel; limit += panel) {
                            for (Int r = r0; r < r1; ++r) {
                                const Int from = cursors[r - r0];
                                const Int to = advance(w.columns, from, w.starts[r + 1], limit);
                                cursors[r - r0] = to;
                                if (r + PD < r1) {
                                    const Int next = cursors[r + PD - r0], size = to - from;
                                    prefetch(w.columns, next, next + size);
                                    prefetch(sums, next, next + size);
                                }
                                dot_row<A, I, NV>(w.columns + from, to - from, source, width, gradients + (r - r0) * width,
                                                  sums + from, tile == 0);
                            }
                        }
                    }
                    if (!exact && tile1 == tiles) {
                        for (Int j = w.starts[r0]; j < w.starts[r1]; ++j) w.values[j] = narrow<T>(sums[j]);
                    }
                }
            });
        }
    });
}

template <class T>
void transpose(int threads, Int rows, Int cols, const T* source, Int source_ld, T* target, Int target_ld) {
    constexpr int n = sizeof(T) == 2 ? std::min(16, vector_bytes / 2) : lanes<T>;
    using E = std::conditional_t<sizeof(T) == 2, std::uint16_t, T>;
    const E* from = reinterpret_cast<const E*>(source);
    E* to = reinterpret_cast<E*>(target);
    if (rows * cols < 10000) threads = 1;
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
