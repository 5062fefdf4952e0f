// How a convolution is cut up, whatever the weight: tiles of images, lanes of blocks, panels of channels.
//
// A block holds as many images as a vector has lanes (or pieces of images, where there are few), packed with its image
// innermost and padded with zeros, so a connection (o, c, i, j) is an offset into it and one multiply-add serves a register
// tile of output positions of all images of the block. All products share this: they differ in what a connection does
// with the tile. Channels of the source are taken in panels that stay in cache while every row of the weight goes over them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels.h"
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

// Source channels [begin, end), which rows [first_row, last_row) of the result read; `opens` if they are those rows' first.
struct Panel {
    Int begin, end, first_row, last_row;
    bool opens;
};

// What a weight asks of its panels: source channels that no boundary parts, and connections of a row for which a panel is worth
// while. With fewer, loading and storing the tile costs more than the first-level cache saves.
struct Whole {
    Int channels, connections;
};
constexpr Whole single{1, 6};

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

    Plan(Axis v, Axis h, Int images, Int channels, Int rows, Int groups, double density, Int element, Whole whole = single)
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
        choose_panels(density, element, whole);
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

    void choose_panels(double density, Int element, Whole whole) {
        const Int taps = Int(vertical.taps.size() * horizontal.taps.size());
        const Int footprint = Slots(vertical, sub_rows).size() * Slots(horizontal, sub_columns).size() * N * element;
        const double per_channel = std::max(1e-9, density * double(taps) / double(phases()));
        Int most = std::max(level1_bytes / footprint, Int(double(whole.connections) / per_channel));
        most = std::min(most, level2_bytes / (plane() * N * element));
        most = std::max(whole.channels, most / whole.channels * whole.channels);
        const auto add = [&](Int begin, Int end, bool opens) {
            const Int first = begin / group_channels(), last = (end - 1) / group_channels() + 1;
            for (Int c = begin; c < end; ++c) panel_of[c] = Int(panels.size());
            panels.push_back({begin, end, first * group_rows(), last * group_rows(), opens});
        };
        if (group_channels() <= most) {
            const Int step = most / group_channels() * group_channels();
            for (Int c = 0; c < channels; c += step) add(c, std::min(c + step, channels), true);
        } else {
            const Int step = round_up(divide_up(group_channels(), divide_up(group_channels(), most)), whole.channels);
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

    Int phase_of(Int sub) const { return sub / (subs() / phases()); }
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

}  // namespace conv
}  // namespace REGROW_ISA
}  // namespace regrow
