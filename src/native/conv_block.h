// Planes of images to and from packed blocks.
#pragma once

#include "conv_plan.h"

namespace regrow {
namespace REGROW_ISA {
namespace conv {

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
    for (const auto& chunk : route.chunks) {
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

}  // namespace conv
}  // namespace REGROW_ISA
}  // namespace regrow
