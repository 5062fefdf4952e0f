// Convolution with a sparse weight, its input gradient and its value gradients.
//
// A block holds as many images as a vector has lanes (or pieces of images, where there are few), packed with its image
// innermost and padded with zeros, so a connection (o, c, i, j) is an offset into it and one multiply-add serves a register
// tile of output positions of all images of the block. All three products share this: they differ in what a connection does
// with the tile. Channels of the source are taken in panels that stay in the first-level cache while every row of the
// weight goes over them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace regrow {
namespace REGROW_ISA {
namespace conv {

// A register tile is tile_rows x tile_columns output positions; where images have one row, all of them lie in it.
constexpr int tile_columns = 4;
constexpr int tile_rows = accumulators / tile_columns;
constexpr int tile_size = tile_rows * tile_columns;

constexpr Int level1_bytes = 32 << 10;
constexpr Int level2_bytes = 512 << 10;
constexpr Int widest = 48;  // tile; wider ones would leave no room for rows

inline Int round_up(Int n, Int multiple) { return (n + multiple - 1) / multiple * multiple; }
inline Int divide_up(Int n, Int by) { return (n + by - 1) / by; }
inline Int floor_divide(Int n, Int by) { return n >= 0 ? n / by : -((by - 1 - n) / by); }

// One spatial axis of a product. Step q computes the destinations target_step * q + phase, one per phase; tap i gives its phase
// the source source_step * q + shift. One of the two strides is 1. In a packed block, sources of equal residue modulo
// source_step lie side by side, and those that no tap reads are left out: for every tap, neighbouring steps are neighbours.
struct Axis {
    struct Tap {
        Int phase, shift;
    };

    Int source, target, source_step = 1, target_step = 1;
    std::vector<Tap> taps;

    static Axis forward(Int source, Int target, Int kernel, Int stride, Int padding, Int dilation) {
        Axis axis{source, target, stride, 1, {}};
        for (Int i = 0; i < kernel; ++i) axis.taps.push_back({0, i * dilation - padding});
        return axis;
    }

    static Axis backward(Int source, Int target, Int kernel, Int stride, Int padding, Int dilation) {
        Axis axis{source, target, 1, stride, {}};
        for (Int i = 0; i < kernel; ++i) {
            const Int reach = i * dilation - padding;
            const Int phase = reach - stride * floor_divide(reach, stride);
            axis.taps.push_back({phase, (phase - reach) / stride});
        }
        return axis;
    }

    Int steps() const { return divide_up(target, target_step); }
};

// Where the sources of `tile` steps lie in a packed block: `source` of each slot, relative to source_step * first step, and the
// slot of the first step for each tap.
struct Slots {
    std::vector<Int> source, of_tap;

    Slots() = default;
    Slots(const Axis& axis, Int tile) : of_tap(axis.taps.size()) {
        for (Int residue = 0; residue < axis.source_step; ++residue) {
            Int low = INT64_MAX, high = INT64_MIN;
            const auto each = [&](auto&& act) {
                for (std::size_t i = 0; i < axis.taps.size(); ++i) {
                    const Int quotient = floor_divide(axis.taps[i].shift, axis.source_step);
                    if (axis.taps[i].shift - quotient * axis.source_step == residue) act(i, quotient);
                }
            };
            each([&](std::size_t, Int quotient) {
                low = std::min(low, quotient);
                high = std::max(high, quotient);
            });
            if (low > high) continue;
            each([&](std::size_t i, Int quotient) { of_tap[i] = Int(source.size()) + quotient - low; });
            for (Int q = low; q < high + tile; ++q) source.push_back(q * axis.source_step + residue);
        }
    }

    Int size() const { return Int(source.size()); }
};

// The way of one plane of an image (its `chunks` of neighbouring positions) to and from the slots of a packed block.
template <int N>
struct Route {
    struct Chunk {
        Int position;
        Int count;
        std::int32_t slot[N];
    };

    std::vector<Chunk> chunks;
    std::vector<std::int32_t> zeros;

    void clear() {
        chunks.clear();
        zeros.clear();
    }
};

// Swaps the lanes of `a` that have bit H in their number with those of `b` that lack it.
template <int H, class V, int... K>
inline void exchange(V& a, V& b, std::integer_sequence<int, K...>) {
    constexpr int n = sizeof...(K);
    const V lower = shuffle(a, b, std::integer_sequence<int, (K & H ? n + K - H : K)...>());
    b = shuffle(a, b, std::integer_sequence<int, (K & H ? n + K : K + H)...>());
    a = lower;
}

// Elements of the first `count` lanes only, in whole halves, quarters, ...
template <int N, class T>
inline Vector<Sum<T>, N> load_some(const T* source, Int count) {
    using A = Sum<T>;
    if (count >= N) return load<N>(source);
    A padded[N] = {};
    Int at = 0;
    if constexpr (N >= 16) {
        if (count - at >= 8) store<8>(padded + at, load<8>(source + at)), at += 8;
    }
    if constexpr (N >= 8) {
        if (count - at >= 4) store<4>(padded + at, load<4>(source + at)), at += 4;
    }
    for (; at < count; ++at) padded[at] = widen(source[at]);
    return load<N>(padded);
}
template <int N, class T>
inline void store_some(T* target, Vector<Sum<T>, N> x, Int count) {
    if (count >= N) return store<N>(target, x);
    Sum<T> padded[N];
    store<N>(padded, x);
    Int at = 0;
    if constexpr (N >= 16) {
        if (count - at >= 8) store<8>(target + at, load<8>(padded + at)), at += 8;
    }
    if constexpr (N >= 8) {
        if (count - at >= 4) store<4>(target + at, load<4>(padded + at)), at += 4;
    }
    for (; at < count; ++at) target[at] = narrow<T>(padded[at]);
}

template <class T, int N>
inline void pack(const T* const* planes, Int offset, const Route<N>& route, Sum<T>* packed) {
    using A = Sum<T>;
    using V = Vector<A, N>;
    for (const auto slot : route.zeros) store<N>(packed + Int(slot) * N, V{});
    const Int count = Int(route.chunks.size());
    for (Int at = 0; at < count; ++at) {
        const auto& chunk = route.chunks[at];
        // Images are often a power of two apart, where no prefetching of the processor's own helps.
        const Int coming = route.chunks[std::min(at + 2, count - 1)].position;
#pragma GCC unroll 16
        for (int lane = 0; lane < N; ++lane) __builtin_prefetch(planes[lane] + offset + coming);
        V rows[N];
        if (chunk.count == N) {
#pragma GCC unroll 16
            for (int lane = 0; lane < N; ++lane) rows[lane] = load<N>(planes[lane] + offset + chunk.position);
        } else {
            for (int lane = 0; lane < N; ++lane) rows[lane] = load_some<N>(planes[lane] + offset + chunk.position, chunk.count);
        }
        transpose(rows);
        if (chunk.count == N) {
#pragma GCC unroll 16
            for (int k = 0; k < N; ++k) store<N>(packed + Int(chunk.slot[k]) * N, rows[k]);
        } else {
            for (int k = 0; k < chunk.count; ++k) store<N>(packed + Int(chunk.slot[k]) * N, rows[k]);
        }
    }
}

template <class T, int N>
inline void unpack(const Sum<T>* packed, const Route<N>& route, T* const* planes, Int offset) {
    using A = Sum<T>;
    using V = Vector<A, N>;
    for (const auto& chunk : route.chunks) {
        V rows[N];
#pragma GCC unroll 16
        for (int k = 0; k < N; ++k) rows[k] = load<N>(packed + Int(chunk.slot[k]) * N);
        transpose(rows);
        if (chunk.count == N) {
#pragma GCC unroll 16
            for (int lane = 0; lane < N; ++lane) store<N>(planes[lane] + offset + chunk.position, rows[lane]);
        } else {
            for (int lane = 0; lane < N; ++lane) store_some<N>(planes[lane] + offset + chunk.position, rows[lane], chunk.count);
        }
    }
}

// The same for a single lane.
template <class T, int N>
inline void pack_lane(const T* plane, const Route<N>& route, int lane, Sum<T>* packed) {
    for (const auto slot : route.zeros) packed[Int(slot) * N + lane] = 0;
    for (const auto& chunk : route.chunks) {
        for (Int k = 0; k < chunk.count; ++k) packed[Int(chunk.slot[k]) * N + lane] = widen(plane[chunk.position + k]);
    }
}

template <class T, int N>
inline void unpack_lane(const Sum<T>* packed, const Route<N>& route, int lane, T* plane) {
    for (const auto& chunk : route.chunks) {
        for (Int k = 0; k < chunk.count; ++k)
            plane[chunk.position + k] = narrow<T>(packed[Int(chunk.slot[k]) * N + lane]);
    }
}

// Source channels [begin, end), which rows [first_row, last_row) of the result read; `opens` if they are those rows' first.
struct Panel {
    Int begin, end, first_row, last_row;
    bool opens;
};

// How a product is cut up: tiles of each image, blocks of lanes, panels of channels. The number of threads has no part in it.
template <int N>
struct Plan {
    Axis vertical, horizontal;
    Int images, channels, rows, groups;
    Int sub_rows, sub_columns;            // steps in a register tile
    Int tile_height = 0, tile_width = 0;  // steps in a tile of an image
    Slots down, across;
    std::vector<Panel> panels;
    std::vector<Int> panel_of;            // by source channel

    Plan(Axis v, Axis h, Int images, Int channels, Int rows, Int groups, double density, Int element)
        : vertical(std::move(v)),
          horizontal(std::move(h)),
          images(images),
          channels(channels),
          rows(rows),
          groups(groups),
          sub_rows(vertical.steps() == 1 ? 1 : tile_rows),
          sub_columns(vertical.steps() == 1 ? tile_size : tile_columns),
          panel_of(std::size_t(channels)) {
        choose_tile(element);
        down = Slots(vertical, tile_height);
        across = Slots(horizontal, tile_width);
        choose_panels(density, element);
    }

    Int phases() const { return vertical.target_step * horizontal.target_step; }
    Int tiles_down() const { return divide_up(vertical.steps(), tile_height); }
    Int tiles_across() const { return divide_up(horizontal.steps(), tile_width); }
    Int tiles() const { return tiles_down() * tiles_across(); }
    Int whole_groups() const { return images / N; }
    Int blocks() const { return whole_groups() * tiles() + divide_up(images % N * tiles(), N); }
    Int subs_down() const { return tile_height / sub_rows; }
    Int subs_across() const { return tile_width / sub_columns; }
    Int subs() const { return phases() * subs_down() * subs_across(); }
    Int pitch() const { return across.size(); }
    Int plane() const { return down.size() * across.size() + 1; }  // one slot for positions that no tap reads
    Int source_size() const { return vertical.source * horizontal.source; }
    Int target_size() const { return vertical.target * horizontal.target; }
    Int group_channels() const { return channels / groups; }
    Int group_rows() const { return rows / groups; }
    Int panel_channels() const {
        Int most = 0;
        for (const auto& panel : panels) most = std::max(most, panel.end - panel.begin);
        return most;
    }

    void choose_tile(Int element) {
        // Results of all rows over a tile wait in the second-level cache for the next panel.
        const Int positions = std::max<Int>(tile_size, level2_bytes / (rows * phases() * N * element));
        const auto most = [](Int steps, Int sub, Int room) {
            return std::min(round_up(steps, sub), std::max(sub, room / sub * sub));
        };
        tile_width = most(horizontal.steps(), sub_columns, std::min(widest, positions / sub_rows));
        tile_height = most(vertical.steps(), sub_rows, positions / tile_width);
        const auto scarce = [&] { return images * tiles() < 4 * N; };
        while (scarce() && tile_height > sub_rows) tile_height = round_up(tile_height / 2, sub_rows);
        while (scarce() && tile_width > sub_columns) tile_width = round_up(tile_width / 2, sub_columns);
    }

    void choose_panels(double density, Int element) {
        const Int taps = Int(vertical.taps.size() * horizontal.taps.size());
        const Int footprint = Slots(vertical, sub_rows).size() * Slots(horizontal, sub_columns).size() * N * element;
        // With few connections per row, loading and storing the tile costs more than the first-level cache saves.
        const double per_channel = std::max(1e-9, density * double(taps) / double(phases()));
        Int most = std::max(level1_bytes / footprint, Int(6 / per_channel));
        most = std::max<Int>(1, std::min(most, level2_bytes / (plane() * N * element)));
        const auto add = [&](Int begin, Int end, bool opens) {
            const Int first = begin / group_channels(), last = (end - 1) / group_channels() + 1;
            for (Int c = begin; c < end; ++c) panel_of[c] = Int(panels.size());
            panels.push_back({begin, end, first * group_rows(), last * group_rows(), opens});
        };
        if (group_channels() <= most) {
            const Int step = most / group_channels() * group_channels();
            for (Int c = 0; c < channels; c += step) add(c, std::min(c + step, channels), true);
        } else {
            const Int step = divide_up(group_channels(), divide_up(group_channels(), most));
            for (Int g = 0; g < channels; g += group_channels()) {
                for (Int c = 0; c < group_channels(); c += step) add(g + c, g + std::min(c + step, group_channels()), c == 0);
            }
        }
    }

    // Image and tile of a lane; an image of -1 where the last block has a lane too many.
    std::pair<Int, Int> piece(Int block, int lane) const {
        const Int whole = whole_groups() * tiles();
        if (block < whole) return {block / tiles() * N + lane, block % tiles()};
        const Int index = (block - whole) * N + lane;
        if (index >= images % N * tiles()) return {-1, 0};
        return {whole_groups() * N + index / tiles(), index % tiles()};
    }

    void cut(std::vector<std::pair<Int, Int>>& places, Int positions, std::int32_t unread, bool writes, Route<N>& route) const {
        // `places` are (position, slot). Chunks may overlap and, in reading, cover positions without a slot.
        std::sort(places.begin(), places.end());
        std::size_t at = 0;
        while (at < places.size()) {
            std::size_t end = at + 1;
            if (writes) {
                while (end < places.size() && places[end].first == places[end - 1].first + 1) ++end;
            } else {
                end = places.size();
            }
            const Int stop = writes ? places[end - 1].first + 1 : positions, start = writes ? places[at].first : 0;
            Int done = -1;
            for (std::size_t p = at; p < end; ++p) {
                if (places[p].first <= done) continue;
                const Int position = std::max(start, std::min(places[p].first, stop - N));
                typename Route<N>::Chunk chunk;
                chunk.position = position;
                chunk.count = std::min<Int>(N, stop - position);
                std::fill(chunk.slot, chunk.slot + N, unread);
                std::size_t q = p;
                while (q > at && places[q - 1].first >= position) --q;
                for (; q < end && places[q].first < position + chunk.count; ++q)
                    chunk.slot[places[q].first - position] = std::int32_t(places[q].second);
                route.chunks.push_back(chunk);
                done = position + chunk.count - 1;
            }
            at = end;
        }
    }

    void source_route(Int tile, Route<N>& route) const {
        const Int top = tile / tiles_across() * tile_height * vertical.source_step;
        const Int left = tile % tiles_across() * tile_width * horizontal.source_step;
        std::vector<std::pair<Int, Int>> places;
        route.clear();
        for (Int r = 0; r < down.size(); ++r) {
            const Int h = top + down.source[r];
            for (Int c = 0; c < across.size(); ++c) {
                const Int w = left + across.source[c], slot = r * pitch() + c;
                if (h >= 0 && h < vertical.source && w >= 0 && w < horizontal.source) {
                    places.push_back({h * horizontal.source + w, slot});
                } else {
                    route.zeros.push_back(std::int32_t(slot));
                }
            }
        }
        cut(places, source_size(), std::int32_t(plane() - 1), false, route);
    }

    // Results wait as (register tile, row, position in the register tile); slots are those of row 0.
    void target_route(Int tile, Route<N>& route) const {
        const Int top = tile / tiles_across() * tile_height, left = tile % tiles_across() * tile_width;
        std::vector<std::pair<Int, Int>> places;
        route.clear();
        for (Int r = 0; r < tile_height; ++r) {
            for (Int c = 0; c < tile_width; ++c) {
                for (Int phase = 0; phase < phases(); ++phase) {
                    const Int h = (top + r) * vertical.target_step + phase / horizontal.target_step;
                    const Int w = (left + c) * horizontal.target_step + phase % horizontal.target_step;
                    const Int sub = (phase * subs_down() + r / sub_rows) * subs_across() + c / sub_columns;
                    const Int slot = sub * rows * tile_size + r % sub_rows * sub_columns + c % sub_columns;
                    if (h < vertical.target && w < horizontal.target) {
                        places.push_back({h * horizontal.target + w, slot});
                    } else {
                        route.zeros.push_back(std::int32_t(slot));
                    }
                }
            }
        }
        cut(places, target_size(), 0, true, route);
    }

    // Where a register tile starts in a packed plane.
    Int sub_origin(Int sub) const {
        sub %= subs_down() * subs_across();
        return sub / subs_across() * sub_rows * pitch() + sub % subs_across() * sub_columns;
    }
    // From one group of tile_columns positions of a register tile to the next.
    Int stride() const { return sub_rows == 1 ? tile_columns : pitch(); }
    Int tap_slot(Int i, Int j) const { return down.of_tap[i] * pitch() + across.of_tap[j]; }
    Int tap_phase(Int i, Int j) const {
        return vertical.taps[i].phase * horizontal.target_step + horizontal.taps[j].phase;
    }
    std::size_t result_size() const { return std::size_t(subs() * rows * tile_size * N); }
    std::size_t panel_size() const { return std::size_t(panel_channels() * plane() * N); }
};

// The images and tiles of one block, and their routes.
template <int N, class S, class D>
struct Block {
    const Plan<N>& plan;
    std::pair<Int, Int> pieces[N];
    bool uniform = false;
    Int uniform_tile = -1;
    Route<N> source[N], target[N];

    explicit Block(const Plan<N>& plan) : plan(plan) {}

    void open(Int block) {
        for (int lane = 0; lane < N; ++lane) pieces[lane] = plan.piece(block, lane);
        uniform = block < plan.whole_groups() * plan.tiles();
        if (uniform && pieces[0].second == uniform_tile) return;
        uniform_tile = uniform ? pieces[0].second : -1;
        for (int lane = 0; lane < (uniform ? 1 : N); ++lane) {
            plan.source_route(pieces[lane].second, source[lane]);
            plan.target_route(pieces[lane].second, target[lane]);
        }
    }

    // Channels [begin, end) of the source to `packed`.
    void pack_source(const S* x, Int begin, Int end, Sum<S>* packed) const {
        const Int size = plan.source_size(), step = plan.plane() * N;
        if (uniform) {
            const S* planes[N];
            for (int lane = 0; lane < N; ++lane) planes[lane] = x + pieces[lane].first * plan.channels * size;
            for (Int c = begin; c < end; ++c) pack<S, N>(planes, c * size, source[0], packed + (c - begin) * step);
            return;
        }
        for (int lane = 0; lane < N; ++lane) {
            for (Int c = begin; c < end; ++c) {
                Sum<S>* at = packed + (c - begin) * step;
                if (pieces[lane].first >= 0) {
                    pack_lane<S, N>(x + (pieces[lane].first * plan.channels + c) * size, source[lane], lane, at);
                } else {
                    for (Int slot = 0; slot < plan.plane(); ++slot) at[slot * N + lane] = 0;
                }
            }
        }
    }

    void unpack_target(const Sum<D>* results, Int first_row, Int last_row, D* y) const {
        const Int size = plan.target_size();
        if (uniform) {
            D* planes[N];
            for (int lane = 0; lane < N; ++lane) planes[lane] = y + pieces[lane].first * plan.rows * size;
            for (Int row = first_row; row < last_row; ++row)
                unpack<D, N>(results + row * tile_size * N, target[0], planes, row * size);
            return;
        }
        for (int lane = 0; lane < N; ++lane) {
            if (pieces[lane].first < 0) continue;
            for (Int row = first_row; row < last_row; ++row) {
                D* plane = y + (pieces[lane].first * plan.rows + row) * size;
                unpack_lane<D, N>(results + row * tile_size * N, target[lane], lane, plane);
            }
        }
    }

    // The gradient of the target, laid out as results are.
    void pack_target(const D* dy, Int first_row, Int last_row, Sum<D>* packed) const {
        const Int size = plan.target_size();
        if (uniform) {
            const D* planes[N];
            for (int lane = 0; lane < N; ++lane) planes[lane] = dy + pieces[lane].first * plan.rows * size;
            for (Int row = first_row; row < last_row; ++row)
                pack<D, N>(planes, row * size, target[0], packed + row * tile_size * N);
            return;
        }
        for (int lane = 0; lane < N; ++lane) {
            for (Int row = first_row; row < last_row; ++row) {
                Sum<D>* at = packed + row * tile_size * N;
                if (pieces[lane].first >= 0) {
                    pack_lane<D, N>(dy + (pieces[lane].first * plan.rows + row) * size, target[lane], lane, at);
                } else {
                    for (Int sub = 0; sub < plan.subs(); ++sub) {
                        for (int k = 0; k < tile_size; ++k) at[(sub * plan.rows * tile_size + k) * N + lane] = 0;
                    }
                }
            }
        }
    }
};

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

// The forward product and the input gradient: `target` is fully written.
template <class S, class D, int N>
void convolve(const Plan<N>& plan, const Program<Step<Sum<S>>, N>& program, int threads, const S* source, const Sum<S>* bias,
              D* target) {
    using A = Sum<S>;
    const Int blocks = plan.blocks();
    const Int shares = shares_of_rows(blocks, threads, plan.rows);
    const Int tasks = blocks * shares;
    std::atomic<Int> next{0};
    parallel(int(std::min<Int>(threads, std::max<Int>(tasks, 1))), [&](int) {
        A* packed = static_cast<A*>(scratch(PRIVATE, (plan.panel_size() + plan.result_size()) * sizeof(A)));
        A* results = packed + plan.panel_size();
        Block<N, S, D> block(plan);
        for (Int task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
            const Int share = task % shares, low = plan.rows * share / shares, high = plan.rows * (share + 1) / shares;
            block.open(task / shares);
            for (Int p = 0; p < Int(plan.panels.size()); ++p) {
                const Panel& panel = plan.panels[p];
                const Int first = std::max(low, panel.first_row), last = std::min(high, panel.last_row);
                if (first >= last) continue;
                block.pack_source(source, panel.begin, panel.end, packed);
                for (Int sub = 0; sub < plan.subs(); ++sub) {
                    const auto run = panel.opens ? accumulate<A, N, true> : accumulate<A, N, false>;
                    run(program.steps.get(), program.of(sub / (plan.subs() / plan.phases()), p), first, last,
                        packed + plan.sub_origin(sub) * N, plan.stride() * N, bias, results + sub * plan.rows * tile_size * N);
                }
            }
            block.unpack_target(results, low, high, target);
        }
    });
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
Plan<N> forward_plan(const Geometry& g, Int count, Int element) {
    const double density = double(count) / double(g.filters * g.columns());
    auto vertical = Axis::forward(g.height, g.output_height(), g.kernel_height, g.stride_height, g.padding_height, g.dilation_height);
    auto horizontal = Axis::forward(g.width, g.output_width(), g.kernel_width, g.stride_width, g.padding_width, g.dilation_width);
    return Plan<N>(std::move(vertical), std::move(horizontal), g.images, g.channels, g.filters, g.groups, density, element);
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
    convolve<T, T, N>(plan, program, threads, x, bias ? wide.data() : nullptr, y);
}

template <class T, class I>
void input_gradient(int threads, const Geometry& geometry, const std::int64_t* starts, const I* rows, const I* order,
                    const T* values, const T* dy, T* dx) {
    using A = Sum<T>;
    constexpr int N = lanes<A>;
    const Geometry g = unrolled(geometry);
    const Int count = starts[g.columns()];
    const double density = double(count) / double(g.filters * g.columns());
    auto vertical = Axis::backward(g.output_height(), g.height, g.kernel_height, g.stride_height, g.padding_height, g.dilation_height);
    auto horizontal = Axis::backward(g.output_width(), g.width, g.kernel_width, g.stride_width, g.padding_width, g.dilation_width);
    const Plan<N> plan(std::move(vertical), std::move(horizontal), g.images, g.filters, g.channels, g.groups, density, sizeof(A));
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
    convolve<T, T, N>(plan, program, threads, dy, nullptr, dx);
}

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
inline void correlate(const Offset* steps, const std::int64_t* begins, const std::int64_t* places, Int first, Int last,
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

template <class T, class I>
void value_gradient(int threads, const Geometry& geometry, const std::int64_t* starts, const I* columns, const T* x, const T* dy,
                    T* dvalues) {
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

    // Each run of blocks is summed by itself, then added to the total in order, whichever thread had it: no result depends on
    // the number of threads.
    const Int blocks = plan.blocks(), runs = std::min<Int>(blocks, 32);
    const Int shares = shares_of_rows(runs, threads, plan.rows);
    const int parts = int(std::min<Int>(threads, std::max<Int>(runs * shares, 1)));
    const std::unique_ptr<A[]> sums(new A[std::size_t((parts + 1) * count)]);
    A* const total = sums.get() + parts * count;
    std::fill(total, total + count, A(0));
    const std::unique_ptr<std::atomic<Int>[]> added(new std::atomic<Int>[std::size_t(shares)]);
    for (Int share = 0; share < shares; ++share) added[share] = 0;
    std::atomic<Int> next{0};
    parallel(parts, [&](int part) {
        A* packed = static_cast<A*>(scratch(PRIVATE, (plan.panel_size() + plan.result_size()) * sizeof(A)));
        A* gradients = packed + plan.panel_size();
        A* own = sums.get() + part * count;
        Block<N, T, T> block(plan);
        for (Int task; (task = next.fetch_add(1, std::memory_order_relaxed)) < runs * shares;) {
            const Int run = task / shares, share = task % shares;
            const Int low = plan.rows * share / shares, high = plan.rows * (share + 1) / shares;
            std::fill(own + starts[low], own + starts[high], A(0));
            for (Int b = blocks * run / runs; b < blocks * (run + 1) / runs; ++b) {
                block.open(b);
                block.pack_target(dy, low, high, gradients);
                for (Int p = 0; p < Int(plan.panels.size()); ++p) {
                    const Panel& panel = plan.panels[p];
                    const Int first = std::max(low, panel.first_row), last = std::min(high, panel.last_row);
                    if (first >= last) continue;
                    block.pack_source(x, panel.begin, panel.end, packed);
                    for (Int sub = 0; sub < plan.subs(); ++sub)
                        correlate<A, N>(program.steps.get(), program.of(0, p), places.data() + program.bin(0, p, 0), first, last,
                                        packed + plan.sub_origin(sub) * N, plan.stride() * N,
                                        gradients + sub * plan.rows * tile_size * N, own);
                }
            }
            while (added[share].load(std::memory_order_acquire) != run) std::this_thread::yield();
            for (Int j = starts[low]; j < starts[high]; ++j) total[j] += own[j];
            added[share].store(run + 1, std::memory_order_release);
        }
    });
    for (Int j = 0; j < count; ++j) dvalues[j] = narrow<T>(total[j]);
}

}  // namespace conv
}  // namespace REGROW_ISA
}  // namespace regrow
