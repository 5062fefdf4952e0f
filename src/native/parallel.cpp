#include "parallel.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

namespace regrow {

namespace {

// torch's OpenMP team, found by name at run time: a second pool of threads would fight it for the cores.
struct OpenMP {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
    int (*thread)();
    int (*threads)();

    OpenMP() {
        parallel = reinterpret_cast<decltype(parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        thread = reinterpret_cast<decltype(thread)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
        threads = reinterpret_cast<decltype(threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
    }
    bool found() const { return parallel && thread && threads; }
};

struct Job {
    const OpenMP& openmp;
    int parts;
    void (*call)(void*, int);
    void* data;
};

constexpr std::size_t huge_page = std::size_t(1) << 21;
constexpr std::size_t kept = std::size_t(1) << 26;  // a larger block goes back when half of it would do

struct Block {
    void* memory = nullptr;
    std::size_t size = 0;

    ~Block() { std::free(memory); }
    void* at_least(std::size_t bytes) {
        if (bytes > size || (size > kept && bytes < size / 2)) {
            std::free(memory);
            const std::size_t unit = bytes < huge_page ? 4096 : huge_page;
            size = (bytes + unit - 1) / unit * unit;
            memory = std::aligned_alloc(unit, size);
            if (!memory) {
                size = 0;
                throw std::bad_alloc();
            }
#ifdef MADV_HUGEPAGE
            if (unit == huge_page) madvise(memory, size, MADV_HUGEPAGE);
#endif
        }
        return memory;
    }
};

}  // namespace

void run_parts(int parts, void (*call)(void*, int), void* data) {
    static const OpenMP openmp;
    if (openmp.found()) {
        Job job{openmp, parts, call, data};
        openmp.parallel(
            [](void* argument) {
                const Job& job = *static_cast<Job*>(argument);
                const int team = job.openmp.threads();
                for (int part = job.openmp.thread(); part < job.parts; part += team) job.call(job.data, part);
            },
            &job, static_cast<unsigned>(parts), 0);
        return;
    }
    std::vector<std::thread> others;
    for (int part = 1; part < parts; ++part) others.emplace_back(call, data, part);
    call(data, 0);
    for (std::thread& other : others) other.join();
}

void* scratch(Slot slot, std::size_t bytes) {
    static thread_local Block blocks[SLOTS];
    return blocks[slot].at_least(bytes);
}

}  // namespace regrow
