// Enough of Metal to compile a kernel's source for a CPU and to run it.
//
// Each thread of a threadgroup is a fibre. Simdgroup functions and barriers wait, round robin, until
// all threads that take part have arrived, so threads are in lock step there and nowhere else.
// Threadgroup memory is filled with NaN before each threadgroup.
#pragma once
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <ucontext.h>
#include <vector>

#define device
#define constant
#define threadgroup static __attribute__((section("threadgroup_memory")))

typedef unsigned int uint;

struct uint3 {
    uint x, y, z;
    operator uint() const { return x; }
};

struct bfloat16_t {
    uint16_t bits;
    bfloat16_t() = default;
    explicit bfloat16_t(float value) {
        uint32_t word;
        std::memcpy(&word, &value, 4);
        bits = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    }
    operator float() const {
        uint32_t word = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &word, 4);
        return value;
    }
};

struct half {
    uint16_t bits;
    half() = default;
    explicit half(float value) {
        const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
        const float size = std::fabs(value);
        if (!(size < 65520.0f)) {
            bits = sign | (size != size ? 0x7e00 : 0x7c00);
            return;
        }
        int exponent = size ? std::max(std::ilogb(size), -14) : -14;
        const int fraction = int(std::nearbyint(std::ldexp(size, 10 - exponent)));
        bits = sign + ((exponent + 14) << 10) + fraction;
    }
    operator float() const {
        const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
        float value = exponent ? std::ldexp(float(1024 + fraction), exponent - 25)
                               : std::ldexp(float(fraction), -24);
        if (exponent == 31) {
            value = fraction ? NAN : INFINITY;
        }
        return bits & 0x8000 ? -value : value;
    }
};

namespace shim {

struct Barrier {
    int size = 0, count = 0, generation = 0;
};

struct Fibre {
    jmp_buf place;
    std::vector<char> stack;
    bool started, done;
};

constexpr int LANES = 32;
inline std::vector<Fibre> fibres;
inline std::vector<Barrier> simdgroups;
inline Barrier group;
inline std::vector<float> slots;  // [simdgroup][parity][lane][6]
inline std::vector<int> parity;   // of each thread
inline int current, step;         // the running thread; +1 or -1, the order in which they run
inline ucontext_t home;
inline void (*body)();

inline void next() {
    const int count = int(fibres.size());
    for (int tried = 0; tried < count; tried++) {
        current = (current + step + count) % count;
        if (fibres[current].done) {
            continue;
        }
        if (fibres[current].started) {
            _longjmp(fibres[current].place, 1);
        }
        fibres[current].started = true;
        ucontext_t context;
        getcontext(&context);
        context.uc_stack.ss_sp = fibres[current].stack.data();
        context.uc_stack.ss_size = fibres[current].stack.size();
        makecontext(&context, body, 0);
        setcontext(&context);
    }
    setcontext(&home);
}

inline void yield() {
    if (!_setjmp(fibres[current].place)) {
        next();
    }
}

inline void wait(Barrier& barrier) {
    const int generation = barrier.generation;
    if (++barrier.count == barrier.size) {
        barrier.count = 0;
        barrier.generation++;
        return;
    }
    while (barrier.generation == generation) {
        yield();
    }
}

inline int lane() { return current % LANES; }

// Give `count` values to the other threads of the simdgroup; returns all lanes' values.
inline const float* exchange(const float* values, int count) {
    const int simdgroup = current / LANES;
    int& side = parity[current];
    side = !side;
    float* all = &slots[(simdgroup * 2 + side) * LANES * 6];
    for (int i = 0; i < count; i++) {
        all[lane() * 6 + i] = values[i];
    }
    wait(simdgroups[simdgroup]);
    return all;
}

extern "C" char __start_threadgroup_memory[], __stop_threadgroup_memory[];
threadgroup __attribute__((used)) char not_empty;  // the linker drops empty sections

template <typename Kernel>
inline Kernel* running;

template <typename Kernel>
void run_group(Kernel kernel, int threads) {
    running<Kernel> = &kernel;
    body = [] {
        (*running<Kernel>)();
        fibres[current].done = true;
        next();
    };
    fibres.resize(threads);
    simdgroups.assign(threads / LANES, Barrier{LANES});
    group = Barrier{threads};
    slots.assign(simdgroups.size() * 2 * LANES * 6, 0);
    parity.assign(threads, 0);
    std::memset(__start_threadgroup_memory, 0xff,
                __stop_threadgroup_memory - __start_threadgroup_memory);
    for (Fibre& fibre : fibres) {
        fibre.stack.resize(64 << 10);
        fibre.started = fibre.done = false;
    }
    current = step > 0 ? threads - 1 : 0;
    volatile bool begun = false;
    getcontext(&home);
    if (!begun) {
        begun = true;
        next();
    }
}

}  // namespace shim

namespace metal {

using std::max;
using std::min;
inline float exp(float x) { return std::exp(x); }
inline float log(float x) { return std::log(x); }
inline float abs(float x) { return std::fabs(x); }
namespace precise {
inline float exp2(float x) { return std::exp2(x); }
inline float cos(float x) { return std::cos(x); }
inline float sin(float x) { return std::sin(x); }
inline float rsqrt(float x) { return 1 / std::sqrt(x); }
}  // namespace precise

enum class mem_flags { mem_threadgroup };
inline void threadgroup_barrier(mem_flags) { shim::wait(shim::group); }

inline float simd_sum(float value) {
    const float* all = shim::exchange(&value, 1);
    float sum = 0;
    for (int i = 0; i < shim::LANES; i++) {
        sum += all[i * 6];
    }
    return sum;
}

inline float simd_max(float value) {
    const float* all = shim::exchange(&value, 1);
    float most = all[0];
    for (int i = 1; i < shim::LANES; i++) {
        most = std::max(most, all[i * 6]);
    }
    return most;
}

// Of numbers that are exact in float32.
inline int simd_min(int value) { return int(-simd_max(-float(value))); }

// The lane's two elements of a matrix: in row y, columns x and x + 1.
template <typename U, int rows, int columns>
struct simdgroup_matrix {
    static_assert(rows == 8 && columns == 8);
    U elements[2];
    U (&thread_elements())[2] { return elements; }
    const U (&thread_elements() const)[2] { return elements; }
};

inline int row_of(int lane) { return ((lane / 4) & 4) + (lane / 2) % 4; }
inline int column_of(int lane) { return ((lane / 4) & 2) * 2 + (lane % 2) * 2; }

typedef simdgroup_matrix<float, 8, 8> matrix;

inline void simdgroup_multiply_accumulate(matrix& d, matrix a, matrix b, matrix c) {
    const float own[4] = {a.elements[0], a.elements[1], b.elements[0], b.elements[1]};
    const float* all = shim::exchange(own, 4);
    float left[8][8], right[8][8];
    for (int lane = 0; lane < shim::LANES; lane++) {
        for (int e = 0; e < 2; e++) {
            left[row_of(lane)][column_of(lane) + e] = all[lane * 6 + e];
            right[row_of(lane)][column_of(lane) + e] = all[lane * 6 + 2 + e];
        }
    }
    const int row = row_of(shim::lane()), column = column_of(shim::lane());
    for (int e = 0; e < 2; e++) {
        float sum = c.elements[e];
        for (int k = 0; k < 8; k++) {
            sum += left[row][k] * right[k][column + e];
        }
        d.elements[e] = sum;
    }
}

}  // namespace metal
