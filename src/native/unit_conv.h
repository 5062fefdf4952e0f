// Convolution with a weight made of units: `outputs` filters in a row share one tap of one channel, all active or none.
//
// Blocks, tiles and panels are those of conv.h. Where a connection by itself serves a register tile of positions, a unit serves
// H filters x P positions at a time, whose sums (or, in the input gradient, whose gradients) stay in registers: one load of a
// position serves H multiply-adds.
//
//   forward          as conv.h goes: connections by row of units, the sums of its filters in registers.
//   input gradient   units by row and tap. The gradients of the row's filters, moved by the tap, stay in registers; each channel's
//                    sums are loaded, added to and stored. A tile of sums belongs to one thread, as in the forward product.
//   value gradient   U units x H filters = one vector's number of sums over the tile stay in registers, as in unit_loops.h.
#pragma once

#include "conv.h"
#include "unit_loops.h"

namespace regrow {
namespace REGROW_ISA {
namespace conv {

// Row r of units has the filters r * outputs to (r + 1) * outputs, and units starts[r] to starts[r + 1]; groups end with a row.
template <class T, class I>
struct Units {
    Int outputs;
    const Int* starts;
    const I* columns;
    T* values;

    Int rows(const Geometry& g) const { return g.filters / outputs; }
    Int count(const Geometry& g) const { return starts[rows(g)]; }
};

constexpr int most_held = std::min(8, accumulators / 2);  // filters of a unit that are computed together
template <int H>
constexpr int together_with = tile_size / H;  // positions
// Units of a row for which a panel is worth while: a load serves several filters, so the first-level cache saves less.
constexpr Int worthwhile = 24;

// Position k of a register tile, of those that are `stride` apart from one group of tile_columns to the next.
template <int N>
inline Int place(int k, Int stride) {
    return k / tile_columns * stride + k % tile_columns * N;
}

// Of H filters in one register tile: results[0:H] = (opens ? bias : themselves) + units times packed[offset].
template <int H, int N, class A>
void gather(const std::int32_t* offsets, Int count, const A* values, Int outputs, const A* packed, Int stride, const A* bias,
            bool opens, A* results) {
    constexpr int P = together_with<H>;
    for (int k = 0; k < tile_size; k += P) {
        Vector<A> sums[H][P];
        if (opens) {
#pragma GCC unroll 16
            for (int i = 0; i < H * P; ++i) sums[i / P][i % P] = Vector<A>{} + (bias ? bias[i / P] : A(0));
        } else {
#pragma GCC unroll 16
            for (int i = 0; i < H * P; ++i) sums[i / P][i % P] = load<N>(results + (i / P * tile_size + k + i % P) * N);
        }
        const A *here = packed + place<N>(k, stride), *value = values;
        for (Int j = 0; j < count; ++j, value += outputs) {
            const A* x = here + offsets[j];
            Vector<A> positions[P];
#pragma GCC unroll 16
            for (int p = 0; p < P; ++p) positions[p] = load<N>(x + place<N>(p, stride));
#pragma GCC unroll 16
            for (int i = 0; i < H * P; ++i) sums[i / P][i % P] += value[i / P] * positions[i % P];
        }
#pragma GCC unroll 16
        for (int i = 0; i < H * P; ++i) store<N>(results + (i / P * tile_size + k + i % P) * N, sums[i / P][i % P]);
    }
}

// results[channel] += units times the gradients of H filters, which are `filter` apart.
template <int H, int N, class A>
void scatter(const std::int32_t* channels, Int count, const A* values, Int outputs, const A* gradients, Int filter, Int stride,
             A* results) {
    constexpr int P = together_with<H>;
    for (int k = 0; k < tile_size; k += P) {
        const A* here = gradients + place<N>(k, stride);
        Vector<A> held[H][P];
#pragma GCC unroll 16
        for (int i = 0; i < H * P; ++i) held[i / P][i % P] = load<N>(here + i / P * filter + place<N>(i % P, stride));
        const A* value = values;
        for (Int j = 0; j < count; ++j, value += outputs) {
            A* result = results + channels[j] + k * N;
            Vector<A> sums[P];
#pragma GCC unroll 16
            for (int p = 0; p < P; ++p) sums[p] = load<N>(result + p * N);
#pragma GCC unroll 16
            for (int i = 0; i < H * P; ++i) sums[i % P] += value[i / P] * held[i / P][i % P];
#pragma GCC unroll 16
            for (int p = 0; p < P; ++p) store<N>(result + p * N, sums[p]);
        }
    }
}

// sums[j][0:H] += the dot products of the gradients of H filters with packed[offset], U units at a time, then one by one.
template <int H, int U, int N, class A>
void dots(const std::int32_t* offsets, Int j, Int count, Int outputs, const A* packed, Int stride, const A* gradients, A* sums) {
    for (; j + U <= count; j += U) {
        Vector<A> acc[U * H] = {};
        const A* x[U];
#pragma GCC unroll 16
        for (int u = 0; u < U; ++u) x[u] = packed + offsets[j + u];
#pragma GCC unroll 16
        for (int k = 0; k < tile_size; ++k) {
#pragma GCC unroll 16
            for (int i = 0; i < U * H; ++i) {
                acc[i] += load<N>(x[i / H] + place<N>(k, stride)) * load<N>(gradients + (i % H * tile_size + k) * N);
            }
        }
        const Vector<A, U * H> found = sum_lanes<A, U * H>(acc);
        Vector<A, H> each[U];
        std::memcpy(each, &found, sizeof found);
        for (int u = 0; u < U; ++u) units::add_or_set<H>(sums + (j + u) * outputs, each[u], false);
    }
    if constexpr (U > 1) dots<H, 1, N>(offsets, j, count, outputs, packed, stride, gradients, sums);
}

// Where each unit finds its channel and tap in a packed panel, and with which unit each panel begins in each row.
template <int N>
struct Reads {
    std::unique_ptr<std::int32_t[]> offsets;
    std::vector<Int> begins;
    Int panels;

    template <class T, class I>
    Reads(const Geometry& g, const Plan<N>& plan, const Units<T, I>& w, int threads)
        : offsets(new std::int32_t[std::size_t(w.count(g))]), panels(Int(plan.panels.size())) {
        const Offsets<N> known(plan, g.kernel_height, g.kernel_width);
        const Int taps = g.kernel_size(), rows = w.rows(g);
        begins.resize(std::size_t(rows * (panels + 1)));
        const int parts = w.count(g) < 4096 ? 1 : threads;
        parallel(parts, [&](int part) {
            for (Int r = rows * part / parts; r < rows * (part + 1) / parts; ++r) {
                const Int base = r * w.outputs / g.group_filters() * g.group_channels();
                Int* begin = begins.data() + r * (panels + 1);
                Int p = 0;
                for (Int j = w.starts[r]; j < w.starts[r + 1]; ++j) {
                    const Int c = base + Int(w.columns[j]) / taps;
                    while (p <= plan.panel_of[std::size_t(c)]) begin[p++] = j;
                    offsets[std::size_t(j)] = known.of_channel[std::size_t(c)] + known.of_tap[std::size_t(Int(w.columns[j]) % taps)];
                }
                while (p <= panels) begin[p++] = w.starts[r + 1];
            }
        });
    }

    Int begin(Int row, Int panel) const { return begins[std::size_t(row * (panels + 1) + panel)]; }
};

// Values as they are summed.
template <class T>
const Sum<T>* summands(const T* values, Int count, std::vector<Sum<T>>& wide) {
    if constexpr (std::is_same<T, Sum<T>>::value) {
        return values;
    } else {
        wide.resize(std::size_t(count));
        for (Int i = 0; i < count; ++i) wide[std::size_t(i)] = widen(values[i]);
        return wide.data();
    }
}

template <class T, class I>
void forward(int threads, const Geometry& geometry, const Units<const T, I>& w, const T* x, const T* bias, T* y) {
    using A = Sum<T>;
    constexpr int N = lanes<A>;
    const Geometry g = unrolled(geometry);
    const Int outputs = w.outputs, entries = w.count(g) * outputs;
    const auto plan = forward_plan<N>(g, entries, sizeof(A), Whole{1, worthwhile});
    const Reads<N> reads(g, plan, w, threads);
    std::vector<A> wide, offset;
    const A *values = summands(w.values, entries, wide), *start = bias ? summands(bias, g.filters, offset) : nullptr;
    const int held = units::together(outputs, most_held);
    decltype(&gather<1, N, A>) inner = nullptr;
    units::with_held<most_held>(held, [&](auto H) { inner = gather<decltype(H)::value, N, A>; });
    const auto run = [&](Int p, Int, Int first, Int last, const A* packed, A* results) {
        for (Int r = first / outputs; r < last / outputs; ++r) {
            const Int from = reads.begin(r, p), count = reads.begin(r, p + 1) - from;
            if (!count && !plan.panels[p].opens) continue;
            for (Int f = r * outputs; f < (r + 1) * outputs; f += held) {
                inner(reads.offsets.get() + from, count, values + (from - r) * outputs + f, outputs, packed, plan.stride() * N,
                      start ? start + f : nullptr, plan.panels[p].opens, results + f * tile_size * N);
            }
        }
    };
    deal(threads, Convolve<T, N, decltype(run)>(plan, threads, outputs, x, y, run));
}

// Units by row and tap: the place of each channel's sums among the results, and its values.
template <int N, class A>
struct Sends {
    std::vector<Int> begins;
    std::unique_ptr<std::int32_t[]> channels;
    std::unique_ptr<A[]> values;
    Int taps;

    template <class T, class I>
    Sends(const Geometry& g, const Units<const T, I>& w, int threads)
        : begins(std::size_t(w.rows(g) * g.kernel_size() + 1)), channels(new std::int32_t[std::size_t(w.count(g))]),
          values(new A[std::size_t(w.count(g) * w.outputs)]), taps(g.kernel_size()) {
        const Int rows = w.rows(g);
        const int parts = w.count(g) < 4096 ? 1 : threads;
        parallel(parts, [&](int part) {
            for (Int r = rows * part / parts; r < rows * (part + 1) / parts; ++r) {
                const Int base = r * w.outputs / g.group_filters() * g.group_channels();
                std::vector<Int> next(std::size_t(taps) + 1);
                for (Int j = w.starts[r]; j < w.starts[r + 1]; ++j) ++next[std::size_t(Int(w.columns[j]) % taps + 1)];
                next[0] = w.starts[r];
                for (Int t = 0; t < taps; ++t) {
                    next[std::size_t(t + 1)] += next[std::size_t(t)];
                    begins[std::size_t(r * taps + t)] = next[std::size_t(t)];
                }
                for (Int j = w.starts[r]; j < w.starts[r + 1]; ++j) {
                    const Int column = Int(w.columns[j]), at = next[std::size_t(column % taps)]++;
                    channels[std::size_t(at)] = std::int32_t((base + column / taps) * tile_size * N);
                    for (Int o = 0; o < w.outputs; ++o) values[std::size_t(at * w.outputs + o)] = widen(w.values[j * w.outputs + o]);
                }
            }
        });
        begins.back() = w.count(g);
    }
};

// Calls use(product) with dx from dy.
template <class T, class I, class F>
void with_input_gradient(int threads, const Geometry& geometry, const Units<const T, I>& w, const T* dy, T* dx, F&& use) {
    using A = Sum<T>;
    constexpr int N = lanes<A>;
    const Geometry g = unrolled(geometry);
    const Int outputs = w.outputs, taps = g.kernel_size();
    const auto plan = backward_plan<N>(g, w.count(g) * outputs, sizeof(A), Whole{outputs, worthwhile});
    const Offsets<N> offsets(plan, g.kernel_height, g.kernel_width);
    const Sends<N, A> sends(g, w, threads);
    const int held = units::together(outputs, most_held);
    decltype(&scatter<1, N, A>) inner = nullptr;
    units::with_held<most_held>(held, [&](auto H) { inner = scatter<decltype(H)::value, N, A>; });
    const Int filter = plan.plane() * N;
    const auto run = [&](Int p, Int sub, Int first, Int last, const A* packed, A* results) {
        const Panel& panel = plan.panels[p];
        if (panel.opens) std::fill(results + first * tile_size * N, results + last * tile_size * N, A(0));
        const auto low = std::int32_t(first * tile_size * N), high = std::int32_t(last * tile_size * N);
        const bool all = first == panel.first_row && last == panel.last_row;
        for (Int r = panel.begin / outputs; r < panel.end / outputs; ++r) {
            for (Int t = 0; t < taps; ++t) {
                if (plan.tap_phase(t / g.kernel_width, t % g.kernel_width) != plan.phase_of(sub)) continue;
                const std::int32_t *channels = sends.channels.get(), *from = channels + sends.begins[std::size_t(r * taps + t)],
                                   *to = channels + sends.begins[std::size_t(r * taps + t + 1)];
                if (!all) from = std::lower_bound(from, to, low), to = std::lower_bound(from, to, high);
                if (from == to) continue;
                for (Int f = r * outputs; f < (r + 1) * outputs; f += held) {
                    const A* gradients = packed + offsets.of_channel[std::size_t(f)] + offsets.of_tap[std::size_t(t)];
                    inner(from, to - from, sends.values.get() + (from - channels - r) * outputs + f, outputs, gradients, filter,
                          plan.stride() * N, results);
                }
            }
        }
    };
    use(Convolve<T, N, decltype(run)>(plan, threads, 1, dy, dx, run));
}

// Calls use(product) with the values of w from x and dy.
template <class T, class I, class F>
void with_value_gradient(int threads, const Geometry& geometry, const Units<T, I>& w, const T* x, const T* dy, F&& use) {
    using A = Sum<T>;
    constexpr int N = lanes<A>;
    const Geometry g = unrolled(geometry);
    const Int outputs = w.outputs;
    const auto plan = forward_plan<N>(g, w.count(g) * outputs, sizeof(A), Whole{1, worthwhile});
    const Reads<N> reads(g, plan, w, threads);
    constexpr int sums_held = std::min(accumulators, N), most = std::min(most_held, sums_held);
    const int held = units::together(outputs, most);
    decltype(&dots<1, N, N, A>) inner = nullptr;
    units::with_held<most>(held, [&](auto H) { inner = dots<decltype(H)::value, sums_held / decltype(H)::value, N, A>; });
    const auto run = [&](Int p, Int, Int first, Int last, const A* packed, const A* gradients, A* sums) {
        for (Int r = first / outputs; r < last / outputs; ++r) {
            const Int from = reads.begin(r, p), count = reads.begin(r, p + 1) - from;
            for (Int o = 0; count && o < outputs; o += held) {
                inner(reads.offsets.get() + from, 0, count, outputs, packed, plan.stride() * N,
                      gradients + (r * outputs + o) * tile_size * N, sums + from * outputs + o);
            }
        }
    };
    use(Correlate<T, N, decltype(run)>(plan, threads, w.starts, outputs, x, dy, w.values, run));
}

}  // namespace conv
}  // namespace REGROW_ISA
}  // namespace regrow
