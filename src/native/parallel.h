// Threads and scratch memory, shared by all instruction sets (compiled once, in parallel.cpp).
#pragma once

#include <cstddef>
#include <type_traits>

namespace regrow {

// Runs call(data, part) for part in 0..parts-1, each on a thread of its own where there are enough of them. A part that has
// the same number in two calls runs on the same thread, so what it left in its core's cache is still there.
void run_parts(int parts, void (*call)(void*, int), void* data);

template <class F>
void parallel(int parts, F&& f) {
    if (parts <= 1) {
        f(0);
    } else {
        run_parts(parts, [](void* data, int part) { (*static_cast<std::remove_reference_t<F>*>(data))(part); }, &f);
    }
}

// Memory of this thread that is kept from call to call, because fresh pages cost as much as a sparse product: at least
// `bytes`, 64-byte aligned, contents undefined. One block per slot; a later call for the same slot replaces it.
enum Slot { SHARED, PRIVATE, VALUES, SLOTS };
void* scratch(Slot slot, std::size_t bytes);

}  // namespace regrow
