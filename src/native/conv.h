// Convolution with a sparse weight, its input gradient and its value gradients.
#pragma once

#include <atomic>
#include <memory>

#include "conv_block.h"
#include "parallel.h"

namespace regrow {
namespace REGROW_ISA {
namespace conv {

// What the connections of a product do, in the order in which it is done: by phase, panel and row of the result.
template <class A>
struct Step {
    std::int32_t offset;
    A value;
};
struct Offset {
    std::int32_t offset;
};

template <class E, int N>
struct Program {
    const Plan<N>& plan;
    std::vector<std::int64_t> begins;
    std::unique_ptr<E[]> steps;

    // `visit(part, parts, f)` calls f(phase, panel, row, make) for every connection of its part, always in the same order;
    // all connections of a row are in the same part. make() gives the step.
    template <class Visit>
    Program(const Plan<N>& plan, int threads, Int count, Visit&& visit)
        : plan(plan),
          begins(std::size_t(plan.phases() * Int(plan.panels.size()) * plan.rows) + 1),
          steps(new E[std::size_t(count)]) {
        const int parts = count < 4096 ? 1 : threads;
        const Int phases = plan.phases(), panels = Int(plan.panels.size());
        // Counters lie by row, because connections come by row.
        std::vector<std::int64_t> next(begins.size() - 1);
        const auto counter = [&](Int phase, Int panel, Int row) -> std::int64_t& {
            return next[std::size_t((row * phases + phase) * panels + panel)];
        };
        parallel(parts, [&](int part) {
            visit(part, parts, [&](Int phase, Int panel, Int row, auto&&) { ++counter(phase, panel, row); });
        });
        std::int64_t sum = 0;
        for (Int phase = 0; phase < phases; ++phase) {
            for (Int panel = 0; panel < panels; ++panel) {
                for (Int row = 0; row < plan.rows; ++row) {
                    begins[std::size_t(bin(phase, panel, row))] = sum;
                    sum += std::exchange(counter(phase, panel, row), sum);
                }
            }
        }
        begins.back() = sum;
        parallel(parts, [&](int part) {
            visit(part, parts, [&](Int phase, Int panel, Int row, auto&& make) {
                steps[std::size_t(counter(phase, panel, row)++)] = make();
            });
        });
    }

    Int bin(Int phase, Int panel, Int row) const { return (phase * Int(plan.panels.size()) + panel) * plan.rows + row; }
    const std::int64_t* of(Int phase, Int panel) const { return begins.data() + bin(phase, panel, 0); }
};

// Rows [first, last) of the results of one register tile, from one panel: results[row] (+)= sum of value * packed[offset].
template <class A, int N, bool Opens>
inline void accumulate(const Step<A>* steps, const std::int64_t* begins, Int first, Int last, const A* packed, Int stride,
                       const A* bias, A* results) {
    using V = Vector<A, N>;
    for (Int row = first; row < last; ++row) {
        const Step<A>*step = steps + begins[row], *end = steps + begins[row + 1];
        if (!Opens && step == end) continue;
        A* result = results + row * tile_size * N;
        V sum[tile_size];
        if constexpr (Opens) {
            const V start = V{} + (bias ? bias[row] : A(0));
#pragma GCC unroll 16
            for (int k = 0; k < tile_size; ++k) sum[k] = start;
        } else {
#pragma GCC unroll 16
            for (int k = 0; k < tile_size; ++k) sum[k] = load<N>(result + k * N);
        }
        for (; step != end; ++step) {
            const A* x = packed + step->offset;
            const V value = V{} + step->value;
#pragma GCC unroll 16
            for (int r = 0; r < tile_rows; ++r) {
#pragma GCC unroll 16
                for (int c = 0; c < tile_columns; ++c) sum[r * tile_columns + c] += value * load<N>(x + r * stride + c * N);
            }
        }
#pragma GCC unroll 16
        for (int k = 0; k < tile_size; ++k) store<N>(result + k * N, sum[k]);
    }
}

// Where there are too few blocks to occupy all threads, each is done in several shares of its rows.
inline Int shares_of_rows(Int blocks, int threads, Int rows) {
    return blocks == 0 || blocks >= 2 * threads ? 1 : std::min(divide_up(2 * threads, blocks), rows);
}

// The forward product and the input gradient: `target` is fully written. run(p, sub, first, last, packed, results) adds what rows
// [first, last) of register tile `sub` get from panel p; or begins these sums, where the panel opens. Shares of rows begin at
// multiples of `whole`.
template <class T, int N, class F>
class Convolve {
public:
    Convolve(const Plan<N>& plan, int threads, Int whole, const T* source, T* target, F run)
        : plan(plan), whole(whole), rows(plan.rows / whole), shares(shares_of_rows(plan.blocks(), threads, rows)), source(source),
          target(target), run(std::move(run)) {}

    Int tasks() const { return plan.blocks() * shares; }
    // What a thread does tasks with.
    auto worker() const {
        return [this, block = Block<N, T, T>(plan)](Int task) mutable {
            using A = Sum<T>;
            A* packed = static_cast<A*>(scratch(PRIVATE, (plan.panel_size() + plan.result_size()) * sizeof(A)));
            A* results = packed + plan.panel_size();
            const Int share = task % shares, low = rows * share / shares * whole, high = rows * (share + 1) / shares * whole;
            block.open(task / shares);
            for (Int p = 0; p < Int(plan.panels.size()); ++p) {
                const Panel& panel = plan.panels[p];
                const Int first = std::max(low, panel.first_row), last = std::min(high, panel.last_row);
                if (first >= last) continue;
                block.pack_source(source, panel.begin, panel.end, packed);
                for (Int sub = 0; sub < plan.subs(); ++sub) {
                    run(p, sub, first, last, packed + plan.sub_origin(sub) * N, results + sub * plan.rows * tile_size * N);
                }
            }
            block.unpack_target(results, low, high, target);
        };
    }

private:
    const Plan<N>& plan;
    const Int whole, rows, shares;
    const T* source;
    T* target;
    const F run;
};

// The same for connections one by one.
template <class T, int N>
auto convolve_entries(const Plan<N>& plan, const Program<Step<Sum<T>>, N>& program, int threads, const T* source,
                      const Sum<T>* bias, T* target) {
    using A = Sum<T>;
    const auto run = [&plan, &program, bias](Int p, Int sub, Int first, Int last, const A* packed, A* results) {
        const auto add = plan.panels[p].opens ? accumulate<A, N, true> : accumulate<A, N, false>;
        add(program.steps.get(), program.of(plan.phase_of(sub), p), first, last, packed, plan.stride() * N, bias, results);
    };
    return Convolve<T, N, decltype(run)>(plan, threads, 1, source, target, run);
}

// Offsets in a packed panel: of a channel by its number, of a tap by its place in the kernel.
template <int N>
struct Offsets {
    std::vector<std::int32_t> of_channel, of_tap;

    Offsets(const Plan<N>& plan, Int kernel_height, Int kernel_width) {
        for (Int c = 0; c < plan.channels; ++c)
            of_channel.push_back(std::int32_t((c - plan.panels[plan.panel_of[c]].begin) * plan.plane() * N));
        for (Int i = 0; i < kernel_height; ++i) {
            for (Int j = 0; j < kernel_width; ++j) of_tap.push_back(std::int32_t(plan.tap_slot(i, j) * N));
        }
    }
};

// A kernel of one position without stride or padding does not see rows: images become one long row.
inline Geometry unrolled(Geometry g) {
    if (g.kernel_size() == 1 && g.stride_height * g.stride_width == 1 && g.padding_height + g.padding_width == 0) {
        g.width *= g.height;
        g.height = 1;
    }
    return g;
}

template <int N>
Plan<N> forward_plan(const Geometry& g, Int count, Int element, Whole whole = single) {
    const double density = double(count) / double(g.filters * g.columns());
    auto vertical = Axis::forward(g.height, g.output_height(), g.kernel_height, g.stride_height, g.padding_height, g.dilation_height);
    auto horizontal = Axis::forward(g.width, g.output_width(), g.kernel_width, g.stride_width, g.padding_width, g.dilation_width);
    return Plan<N>(std::move(vertical), std::move(horizontal), g.images, g.channels, g.filters, g.groups, density, element, whole);
}

template <int N>
Plan<N> backward_plan(const Geometry& g, Int count, Int element, Whole whole = single) {
    const double density = double(count) / double(g.filters * g.columns());
    auto vertical = Axis::backward(g.output_height(), g.height, g.kernel_height, g.stride_height, g.padding_height, g.dilation_height);
    auto horizontal = Axis::backward(g.output_width(), g.width, g.kernel_width, g.stride_width, g.padding_width, g.dilation_width);
    return Plan<N>(std::move(vertical), std::move(horizontal), g.images, g.filters, g.channels, g.groups, density, element, whole);
}

// Visits the connections by row, for a Program; make(offset, j) becomes the step of connection j.
template <int N, class I, class Make>
auto by_row(const Geometry& g, const Plan<N>& plan, const std::int64_t* starts, const I* columns, Make make) {
    // Of a column, relative to the group's first channel; panels of a group are panels of the first one, moved.
    struct Place {
        std::int32_t channel, tap;
    };
    auto places = std::make_shared<std::vector<Place>>();
    for (Int c = 0; c < g.group_channels(); ++c) {
        for (Int t = 0; t < g.kernel_size(); ++t) places->push_back({std::int32_t(c), std::int32_t(t)});
    }
    auto offsets = std::make_shared<Offsets<N>>(plan, g.kernel_height, g.kernel_width);
    return [&g, &plan, starts, columns, make, places, offsets](int part, int parts, auto&& f) {
        for (Int row = g.filters * part / parts; row < g.filters * (part + 1) / parts; ++row) {
            const Int base = row / g.group_filters() * g.group_channels();
            for (Int j = starts[row]; j < starts[row + 1]; ++j) {
                const Place place = (*places)[columns[j]];
                const Int c = base + place.channel;
                f(0, plan.panel_of[c], row, [&] { return make(offsets->of_channel[c] + offsets->of_tap[place.tap], j); });
            }
        }
    };
}

template <class T, class I>
void forward(int threads, const Geometry& geometry, const std::int64_t* starts, const I* columns, const T* values, const T* x,
             const T* bias, T* y) {
    using A = Sum<T>;
    constexpr int N = lanes<A>;
    const Geometry g = unrolled(geometry);
    const Int count = starts[g.filters];
    const auto plan = forward_plan<N>(g, count, sizeof(A));
    const Program<Step<A>, N> program(plan, threads, count, by_row(g, plan, starts, columns, [&](std::int32_t offset, Int j) {
                                          return Step<A>{offset, widen(values[j])};
                                      }));
    std::vector<A> wide;
    if (bias) {
        for (Int row = 0; row < g.filters; ++row) wide.push_back(widen(bias[row]));
    }
    deal(threads, convolve_entries<T, N>(plan, program, threads, x, bias ? wide.data() : nullptr, y));
}

// Calls use(product) with dx from dy, from the transposed index.
template <class T, class I, class F>
void with_input_gradient(int threads, const Geometry& geometry, const std::int64_t* starts, const I* rows, const I* order,
                         const T* values, const T* dy, T* dx, F&& use) {
    using A = Sum<T>;
    constexpr int N = lanes<A>;
    const Geometry g = unrolled(geometry);
    const Int count = starts[g.columns()];
    const auto plan = backward_plan<N>(g, count, sizeof(A));
    const Offsets<N> offsets(plan, g.kernel_height, g.kernel_width);
    const auto visit = [&](int part, int parts, auto&& f) {
        const Int channels = g.group_channels();
        for (Int c = channels * part / parts; c < channels * (part + 1) / parts; ++c) {
            for (Int t = 0; t < g.kernel_size(); ++t) {
                const Int column = c * g.kernel_size() + t, phase = plan.tap_phase(t / g.kernel_width, t % g.kernel_width);
                const std::int32_t tap = offsets.of_tap[t];
                for (Int j = starts[column]; j < starts[column + 1]; ++j) {
                    const Int o = rows[j], row = (g.groups == 1 ? 0 : o / g.group_filters() * channels) + c;
                    f(phase, plan.panel_of[o], row, [&] {
                        return Step<A>{offsets.of_channel[o] + tap, widen(values[order[j]])};
                    });
                }
            }
        }
    };
    const Program<Step<A>, N> program(plan, threads, count, visit);
    use(convolve_entries<T, N>(plan, program, threads, dy, nullptr, dx));
}

// Swaps the lanes of `a` that have bit H in their number with those of `b` that lack it.
template <int H, class V, int... K>
inline void exchange(V& a, V& b, std::integer_sequence<int, K...>) {
    constexpr int n = sizeof...(K);
    const V lower = shuffle(a, b, std::integer_sequence<int, (K & H ? n + K - H : K)...>());
    b = shuffle(a, b, std::integer_sequence<int, (K & H ? n + K : K + H)...>());
    a = lower;
}

// Elements of the first `count` lanes only, in whole halves, quarters, ...

// The sums over lanes of Count dot products of a register tile, repeated in all lanes: lane k holds number k % Count.
template <class A, int N, int First, int Count>
inline __attribute__((always_inline)) Vector<A, N> dots(const Vector<A, N>* tile, const Offset* steps, const A* packed,
                                                        Int stride) {
    using V = Vector<A, N>;
    if constexpr (Count == 1) {
        const A* x = packed + steps[First].offset;
        V even{}, odd{};
#pragma GCC unroll 16
        for (int r = 0; r < tile_rows; ++r) {
#pragma GCC unroll 16
            for (int c = 0; c < tile_columns; c += 2) {
                even += tile[r * tile_columns + c] * load<N>(x + r * stride + c * N);
                odd += tile[r * tile_columns + c + 1] * load<N>(x + r * stride + (c + 1) * N);
            }
        }
        return even + odd;
    } else {
        V a = dots<A, N, First, Count / 2>(tile, steps, packed, stride);
        V b = dots<A, N, First + Count / 2, Count / 2>(tile, steps, packed, stride);
        exchange<Count / 2>(a, b, std::make_integer_sequence<int, N>());
        return a + b;
    }
}

// Lane k of the result holds the sum of all lanes that equal k modulo Count.
template <int H, int Count, class V, int... K>
inline void add_halves(V& a, std::integer_sequence<int, K...> lane) {
    if constexpr (H >= Count) {
        a += shuffle(a, a, std::integer_sequence<int, (K ^ H)...>());
        add_halves<H / 2, Count>(a, lane);
    }
}

template <class A, int N, int Count>
inline __attribute__((always_inline)) void add_dots(const Vector<A, N>* tile, const Offset* steps, const A* packed, Int stride,
                                                    A* sums) {
    auto dot = dots<A, N, 0, Count>(tile, steps, packed, stride);
    add_halves<N / 2, Count>(dot, std::make_integer_sequence<int, N>());
    for (int k = 0; k < Count; ++k) sums[k] += dot[k];
}

// Rows [first, last) of one register tile, from one panel: adds what it gives to sums[places[row]] and those behind.
template <class A, int N>
inline void correlate_rows(const Offset* steps, const std::int64_t* begins, const std::int64_t* places, Int first, Int last,
                      const A* packed, Int stride, const A* gradients, A* sums) {
    using V = Vector<A, N>;
    constexpr int most = std::min(N, 4);
    for (Int row = first; row < last; ++row) {
        const Offset *step = steps + begins[row], *end = steps + begins[row + 1];
        if (step == end) continue;
        A* sum = sums + places[row];
        const A* gradient = gradients + row * tile_size * N;
        V tile[tile_size];
#pragma GCC unroll 16
        for (int k = 0; k < tile_size; ++k) tile[k] = load<N>(gradient + k * N);
        for (; step + most <= end; step += most, sum += most) add_dots<A, N, most>(tile, step, packed, stride, sum);
        for (; step != end; ++step, ++sum) add_dots<A, N, 1>(tile, step, packed, stride, sum);
    }
}

// The gradients of values: run(p, sub, first, last, packed, gradients, sums) adds to `sums`, a number per value, what rows
// [first, last) of register tile `sub` give with panel p. Row r of the weight spans `whole` rows of the plan and has values
// starts[r] * whole to starts[r + 1] * whole.
template <class T, int N, class F>
class Correlate {
public:
    using A = Sum<T>;

    Correlate(const Plan<N>& plan, int threads, const std::int64_t* starts, Int whole, const T* x, const T* dy, T* dvalues, F run)
        : plan(plan), runs(std::min<Int>(plan.blocks(), 32)), whole(whole), rows(plan.rows / whole), count(starts[rows] * whole),
          shares(shares_of_rows(runs, threads, rows)), starts(starts), x(x), dy(dy), dvalues(dvalues), run(std::move(run)),
          total(new A[std::size_t(count)]()), added(new std::atomic<Int>[std::size_t(shares)]) {
        for (Int share = 0; share < shares; ++share) added[std::size_t(share)] = 0;
    }

    // Each run of blocks is summed by itself, then added to the total in order, whichever thread had it: no result depends on
    // the number of threads.
    Int tasks() const { return runs * shares; }
    // What a thread does tasks with; it takes them in ascending order.
    auto worker() const {
        return [this, block = Block<N, T, T>(plan), sums = std::unique_ptr<A[]>(new A[std::size_t(count)])](Int task) mutable {
            A* packed = static_cast<A*>(scratch(PRIVATE, (plan.panel_size() + plan.result_size()) * sizeof(A)));
            A* gradients = packed + plan.panel_size();
            A* own = sums.get();
            const Int run_of_blocks = task / shares, share = task % shares;
            const Int r0 = rows * share / shares, r1 = rows * (share + 1) / shares, low = r0 * whole, high = r1 * whole;
            std::fill(own + starts[r0] * whole, own + starts[r1] * whole, A(0));
            for (Int b = plan.blocks() * run_of_blocks / runs; b < plan.blocks() * (run_of_blocks + 1) / runs; ++b) {
                block.open(b);
                block.pack_target(dy, low, high, gradients);
                for (Int p = 0; p < Int(plan.panels.size()); ++p) {
                    const Panel& panel = plan.panels[p];
                    const Int first = std::max(low, panel.first_row), last = std::min(high, panel.last_row);
                    if (first >= last) continue;
                    block.pack_source(x, panel.begin, panel.end, packed);
                    for (Int sub = 0; sub < plan.subs(); ++sub) {
                        run(p, sub, first, last, packed + plan.sub_origin(sub) * N, gradients + sub * plan.rows * tile_size * N,
                            own);
                    }
                }
            }
            std::atomic<Int>& done = added[std::size_t(share)];
            until([&] { return done.load(std::memory_order_acquire) == run_of_blocks; });
            for (Int j = starts[r0] * whole; j < starts[r1] * whole; ++j) total[std::size_t(j)] += own[j];
            done.store(run_of_blocks + 1, std::memory_order_release);
        };
    }
    // Once all tasks are done.
    void finish() const {
        for (Int j = 0; j < count; ++j) dvalues[j] = narrow<T>(total[std::size_t(j)]);
    }

private:
    const Plan<N>& plan;
    const Int runs, whole, rows, count, shares;
    const std::int64_t* starts;
    const T *x, *dy;
    T* dvalues;
    const F run;
    const std::unique_ptr<A[]> total;
    const std::unique_ptr<std::atomic<Int>[]> added;
};

// Does all tasks of a product.
template <class P>
void deal(int threads, const P& product) {
    Tasks tasks(product.tasks());
    parallel(int(std::min<Int>(threads, std::max<Int>(product.tasks(), 1))), [&](int) { tasks.take(product.worker()); });
}

// Does all tasks of two products of the same images in step: what one has read is still in cache for the other.
template <class P, class Q>
void deal(int threads, const P& first, const Q& second) {
    const Int firsts = first.tasks(), all = firsts + second.tasks();
    Tasks tasks(all);
    parallel(int(std::min<Int>(threads, std::max<Int>(all, 1))), [&](int) {
        auto work_first = first.worker();
        auto work_second = second.worker();
        tasks.take([&](Int task) {
            const Int before = task * firsts / all;  // firsts among the tasks before this one
            (task + 1) * firsts / all > before ? work_first(before) : work_second(task - before);
        });
    });
}

// Calls use(product) with dvalues from x and dy.
template <class T, class I, class F>
void with_value_gradient(int threads, const Geometry& geometry, const std::int64_t* starts, const I* columns, const T* x, const T* dy,
                         T* dvalues, F&& use) {
    using A = Sum<T>;
    constexpr int N = lanes<A>;
    const Geometry g = unrolled(geometry);
    const Int count = starts[g.filters];
    const auto plan = forward_plan<N>(g, count, sizeof(A));
    const auto only_offset = [](std::int32_t offset, Int) { return Offset{offset}; };
    const Program<Offset, N> program(plan, threads, count, by_row(g, plan, starts, columns, only_offset));
    // Within a row, panels ascend as its columns do.
    std::vector<std::int64_t> places(program.begins.size() - 1);
    for (Int row = 0; row < plan.rows; ++row) {
        Int place = starts[row];
        for (Int p = 0; p < Int(plan.panels.size()); ++p) {
            places[std::size_t(program.bin(0, p, row))] = place;
            place += program.of(0, p)[row + 1] - program.of(0, p)[row];
        }
    }

    const auto add = [&](Int p, Int, Int first, Int last, const A* packed, const A* gradients, A* sums) {
        correlate_rows<A, N>(program.steps.get(), program.of(0, p), places.data() + program.bin(0, p, 0), first, last, packed,
                             plan.stride() * N, gradients, sums);
    };
    use(Correlate<T, N, decltype(add)>(plan, threads, starts, 1, x, dy, dvalues, add));
}

}  // namespace conv
}  // namespace REGROW_ISA
}  // namespace regrow
