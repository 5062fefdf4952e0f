// Threads and scratch memory, shared by all instruction sets (compiled once, in parallel.cpp).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
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

// Waits until there(): at first without giving the core away, since another process would keep it for milliseconds.
template <class F>
void until(F&& there) {
    for (int tries = 0; !there(); ++tries) {
        if (tries > 4000) {
            std::this_thread::yield();
        } else {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    }
}

// Tasks 0..count that threads take one by one, whoever is free: one that another process holds up costs its share and no more.
class Tasks {
public:
    explicit Tasks(std::int64_t count) : count(count) {}

    // Runs f(task) until none is left.
    template <class F>
    void take(F&& f) {
        for (std::int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
            f(task);
            done.fetch_add(1, std::memory_order_release);
        }
    }
    // Until all are done, also those that others have taken.
    void wait() const {
        until([&] { return done.load(std::memory_order_acquire) == count; });
    }
    template <class F>
    void finish(F&& f) {
        take(f);
        wait();
    }

private:
    const std::int64_t count;
    std::atomic<std::int64_t> next{0}, done{0};
};

// Memory of this thread that is kept from call to call, because fresh pages cost as much as a sparse product: at least
// `bytes`, 64-byte aligned, contents undefined. One block per slot; a later call for the same slot replaces it.
enum Slot { INPUTS, GRADIENTS, TOTALS, PRIVATE, VALUES, SLOTS };
void* scratch(Slot slot, std::size_t bytes);

}  // namespace regrow
