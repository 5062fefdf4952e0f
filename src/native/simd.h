// Vectors of one instruction set: loads and stores that convert, interleaving, transposition, sums over lanes.
// Everything lives in a namespace of the instruction set, so that objects compiled for several can be linked together.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace regrow {
namespace REGROW_ISA {

using Int = std::int64_t;

inline Int divide_up(Int n, Int by) { return (n + by - 1) / by; }

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

// How many vectors a kernel may keep as accumulators, leaving a few registers for operands.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int accumulators = 16;
#else
constexpr int accumulators = 8;
#endif

struct bfloat16 {
    std::uint16_t bits;
};

// The type that a product of elements of type T is summed in.
template <class T>
struct SumOf {
    using type = T;
};
template <>
struct SumOf<bfloat16> {
    using type = float;
};
template <class T>
using Sum = typename SumOf<T>::type;

template <class A>
constexpr int lanes = vector_bytes / int(sizeof(A));

template <class A, int N>
struct VectorOf {
    typedef A type __attribute__((vector_size(N * sizeof(A))));
};
template <class A, int N = lanes<A>>
using Vector = typename VectorOf<A, N>::type;

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) {
    const std::uint32_t bits = std::uint32_t(x.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// Sum<T> to T; bfloat16 is rounded to the nearest, ties to even, and NaN stays NaN.
template <class T>
inline T narrow(Sum<T> x) {
    return x;
}
template <>
inline bfloat16 narrow<bfloat16>(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return {0x7fc0};
    return {std::uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// N elements from memory, as sums are held; store() rounds as narrow() does.
template <int N, class T>
inline Vector<Sum<T>, N> load(const T* source) {
    if constexpr (std::is_same<T, bfloat16>::value) {
        Vector<std::uint16_t, N> bits;
        std::memcpy(&bits, source, sizeof bits);
        return (Vector<float, N>)(__builtin_convertvector(bits, Vector<std::uint32_t, N>) << 16);
    } else {
        Vector<T, N> result;
        std::memcpy(&result, source, sizeof result);
        return result;
    }
}
template <int N, class T>
inline void store(T* target, Vector<Sum<T>, N> x) {
    if constexpr (std::is_same<T, bfloat16>::value) {
        using Bits = Vector<std::uint32_t, N>;
        const Bits bits = (Bits)x, nan = (Bits)(x != x);
        const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        const auto result = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Vector<std::uint16_t, N>);
        std::memcpy(target, &result, sizeof result);
    } else {
        std::memcpy(target, &x, sizeof x);
    }
}

// The first `count` lanes, zero in the others; `count` may be N or more.
template <int N, class T>
inline Vector<Sum<T>, N> load_first(const T* source, Int count) {
    if (count >= N) return load<N>(source);
    T padded[N] = {};
    for (Int i = 0; i < count; ++i) padded[i] = source[i];
    return load<N>(padded);
}
template <int N, class T>
inline void store_first(T* target, Vector<Sum<T>, N> x, Int count) {
    if (count >= N) {
        store<N>(target, x);
    } else {
        T padded[N];
        store<N>(padded, x);
        for (Int i = 0; i < count; ++i) target[i] = padded[i];
    }
}

template <class V, int... I>
inline V shuffle(V a, V b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, I...);
#else
    using Index = std::conditional_t<sizeof(a[0]) == 2, std::int16_t, std::conditional_t<sizeof(a[0]) == 4, std::int32_t, std::int64_t>>;
    return __builtin_shuffle(a, b, Vector<Index, sizeof...(I)>{I...});
#endif
}
template <bool upper, class V, int... I>
inline V interleave(V a, V b, std::integer_sequence<int, I...>) {
    constexpr int n = sizeof...(I);
    return shuffle(a, b, std::integer_sequence<int, (I % 2 * n + I / 2 + (upper ? n / 2 : 0))...>());
}
// a0 b0 a1 b1 ... of the lower halves or of the upper halves.
template <bool upper, class V>
inline V interleave(V a, V b) {
    return interleave<upper>(a, b, std::make_integer_sequence<int, int(sizeof(V) / sizeof(a[0]))>());
}

// N vectors of N lanes as the rows of a square matrix.
template <int N, class V>
inline void transpose(V (&rows)[N]) {
#pragma GCC unroll 8
    for (int stage = 1; stage < N; stage *= 2) {
        V next[N];
#pragma GCC unroll 16
        for (int i = 0; i < N / 2; ++i) {
            next[2 * i] = interleave<false>(rows[i], rows[i + N / 2]);
            next[2 * i + 1] = interleave<true>(rows[i], rows[i + N / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) rows[i] = next[i];
    }
}

// Adds halves until G lanes are left.
template <int G, int N, class A>
inline Vector<A, G> fold(Vector<A, N> x) {
    if constexpr (G == N) {
        return x;
    } else {
        Vector<A, N / 2> halves[2];
        std::memcpy(halves, &x, sizeof x);
        return fold<G, N / 2, A>(halves[0] + halves[1]);
    }
}

// Lane i of the result is the sum over the lanes of vector i.
template <class A, int G>
inline Vector<A, G> sum_lanes(Vector<A> (&vectors)[G]) {
#pragma GCC unroll 8
    for (int count = G / 2; count > 0; count /= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < count; ++i) {
            vectors[i] = interleave<false>(vectors[i], vectors[i + count]) + interleave<true>(vectors[i], vectors[i + count]);
        }
    }
    return fold<G, lanes<A>, A>(vectors[0]);
}

}  // namespace REGROW_ISA
}  // namespace regrow
