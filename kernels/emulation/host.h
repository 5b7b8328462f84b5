// A GPU's blocks on a processor, to test kernels where there is no card. Every thread of a block is a fiber; a barrier, a shuffle
// or a matrix product switches fibers. Shared memory is poisoned with NaN before each block and ends at a guard page. What this
// shows: wrong indices, masks, ragged edges, reductions, barriers and exchanges that not all threads reach together. Threads and blocks
// run in an order that is asked for: forwards, backwards, or drawn anew for every stretch between barriers. With TIDEMILL_CHECKED
// and `races.cpp`, accesses are told apart by barriers, which finds races in any order. What this cannot show: speed.

#define TIDEMILL_HOST 1

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif

typedef uint8_t u8;
typedef int8_t i8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef int32_t i32;
typedef unsigned long long u64;
typedef long long i64;

namespace emulation {

struct Dimensions {
    u32 x, y, z;
};

enum State : u8 { READY, AT_BLOCK_BARRIER, AT_WARP_BARRIER, AT_EXCHANGE, DONE };

#ifdef __x86_64__
struct Context {
    void* stack = nullptr;
};
#else
struct Context {
    ucontext_t context;
};
#endif

// Where a barrier or an exchange stands in the source. All threads that meet in one must be at the same.
struct Site {
    const char* file;
    u32 line;

    bool operator!=(const Site& other) const { return line != other.line || (file != other.file && strcmp(file, other.file) != 0); }
};
// Takes the caller's.
#define TIDEMILL_SITE const char *file = __builtin_FILE(), u32 line = __builtin_LINE()

struct Fiber {
    Context context;
    State state = DONE;
    u32 exchanges = 0;
    Site site = {};
    Dimensions thread = {};
};

// What lanes hand each other; two sets, so that one barrier for each exchange is enough.
struct Warp {
    u32 words[2][32][8];
};

constexpr size_t STACK = 128 << 10;

// Memory that ends where a page without access begins.
struct Guarded {
    u8* base = nullptr;
    size_t mapped = 0;
    size_t size = 0;

    u8* start() const { return base + mapped - (size + 127) / 128 * 128; }

    void resize(size_t bytes) {
        if (base && bytes == size) return;
        if (base) munmap(base, mapped + getpagesize());
        const size_t page = getpagesize();
        mapped = (bytes + 127) / page * page + page;
        size = bytes;
        base = (u8*)mmap(nullptr, mapped + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED) abort();
        mprotect(base + mapped, page, PROT_NONE);
    }
};

// An order of things: 0 as they are, 1 backwards, else drawn from a number that goes on from call to call.
inline void arrange(std::vector<u32>& all, u32 order, u64& drawn) {
    for (u32 i = 0; i < all.size(); i++) all[i] = order == 1 ? (u32)all.size() - 1 - i : i;
    if (order < 2) return;
    for (u32 i = (u32)all.size(); i > 1; i--) {
        drawn = drawn * 6364136223846793005ull + 1442695040888963407ull;
        std::swap(all[i - 1], all[(drawn >> 33) % i]);
    }
}

struct Runner {
    std::vector<Fiber> fibers;
    std::vector<u32> order_of_threads, order_of_blocks;
    u32 order = 0;
    u64 drawn = 0;
    // A race was found.
    bool stopped = false;
    // A barrier that is passed as if it were not there, to see that its absence is found.
    Site left_out = {};
    std::vector<Warp> warps;
    Guarded shared;
    u8* stacks = nullptr;
    size_t stacks_for = 0;
    Context home;
    u32 current = 0;
    Dimensions block = {}, grid = {};
    // How many were run.
    u64 blocks = 0;
    u32 threads = 0;
    void (*body)(const void*) = nullptr;
    const void* params = nullptr;
};

inline Runner& runner() {
    static thread_local Runner one;
    return one;
}

#ifdef __x86_64__
extern "C" void tidemill_switch(Context* from, Context* to);
// The registers that a callee must keep, and the stack.
asm(R"(
    .text
    .weak tidemill_switch
    .type tidemill_switch, @function
tidemill_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size tidemill_switch, .-tidemill_switch
)");
#else
inline void tidemill_switch(Context* from, Context* to) { swapcontext(&from->context, &to->context); }
#endif

#ifdef TIDEMILL_CHECKED
extern "C" {
void tidemill_races_launch(const char* kernel, const u64* ranges, u64 count, void (*stop)());
void tidemill_races_block(u32 x, u32 y, u32 z, u64 shared, u64 bytes);
void tidemill_races_thread(u32 thread);
void tidemill_races_block_barrier();
void tidemill_races_warp_barrier(u32 warp);
void tidemill_races_atomic(const void* at, u64 bytes);
// From now on the barrier at this line is passed by; null ends it.
void tidemill_leave_out(const char* file, u32 line);
}
#else
inline void tidemill_races_launch(const char*, const u64*, u64, void (*)()) {}
inline void tidemill_races_block(u32, u32, u32, u64, u64) {}
inline void tidemill_races_thread(u32) {}
inline void tidemill_races_block_barrier() {}
inline void tidemill_races_warp_barrier(u32) {}
inline void tidemill_races_atomic(const void*, u64) {}
#endif

inline void leave(State state, Site site = {}) {
    Runner& r = runner();
    Fiber& fiber = r.fibers[r.current];
    if (site.line != 0 && site.line == r.left_out.line && !(site != r.left_out)) return;
    fiber.state = state;
    fiber.site = site;
    tidemill_switch(&fiber.context, &r.home);
}

#ifdef TIDEMILL_CHECKED
extern "C" void tidemill_leave_out(const char* file, u32 line) { runner().left_out = {file, file ? line : 0}; }
#endif

inline void stop() {
    runner().stopped = true;
    leave(DONE);
}

inline void enter() {
    Runner& r = runner();
    r.body(r.params);
    leave(DONE);
    abort();
}

inline void prepare(Runner& r, u32 index) {
    Fiber& fiber = r.fibers[index];
    fiber.state = READY;
    fiber.exchanges = 0;
    fiber.thread = {index, 0, 0};
    u8* const stack = r.stacks + index * STACK;
#ifdef __x86_64__
    // As if `enter` had been called: the stack is 8 bytes off a multiple of 16 at its first instruction.
    void** top = (void**)(stack + STACK - 16);
    *--top = nullptr;
    *--top = (void*)enter;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber.context.stack = top;
#else
    getcontext(&fiber.context.context);
    fiber.context.context.uc_stack.ss_sp = stack;
    fiber.context.context.uc_stack.ss_size = STACK;
    fiber.context.context.uc_link = nullptr;
    makecontext(&fiber.context.context, enter, 0);
#endif
}

[[noreturn]] inline void fail(const char* kernel, const char* what) {
    const Runner& r = runner();
    fprintf(stderr, "emulated kernel %s, block %u %u %u: %s\n", kernel, r.block.x, r.block.y, r.block.z, what);
    abort();
}

inline void run_block(const char* kernel) {
    Runner& r = runner();
    r.blocks++;
    memset(r.shared.start(), 0xff, r.shared.size);
    tidemill_races_block(r.block.x, r.block.y, r.block.z, (u64)r.shared.start(), r.shared.size);
    for (u32 i = 0; i < r.threads; i++) prepare(r, i);
    arrange(r.order_of_threads, r.order, r.drawn);
    for (;;) {
        bool moved = false;
        u32 live = 0, at_block = 0;
        for (u32 i : r.order_of_threads) {
            if (r.fibers[i].state == READY) {
                r.current = i;
                tidemill_races_thread(i);
                tidemill_switch(&r.home, &r.fibers[i].context);
                moved = true;
                if (r.stopped) return;
            }
        }
        tidemill_races_thread(~0u);
        const Fiber* first_at_block = nullptr;
        for (u32 i = 0; i < r.threads; i++) {
            live += r.fibers[i].state != DONE;
            if (r.fibers[i].state != AT_BLOCK_BARRIER) continue;
            at_block++;
            if (first_at_block && r.fibers[i].site != first_at_block->site) fail(kernel, "threads are at different barriers of the block");
            first_at_block = &r.fibers[i];
        }
        if (live == 0) return;
        // Threads that have ended count as arrived at a barrier of the block; a warp's exchange needs all its lanes.
        if (at_block == live) {
            for (Fiber& f : r.fibers)
                if (f.state == AT_BLOCK_BARRIER) f.state = READY;
            tidemill_races_block_barrier();
            if (r.order > 1) arrange(r.order_of_threads, r.order, r.drawn);
            moved = true;
        }
        for (u32 first = 0; first < r.threads; first += 32) {
            u32 waiting = 0;
            for (u32 i = first; i < first + 32; i++) waiting += r.fibers[i].state == AT_WARP_BARRIER || r.fibers[i].state == AT_EXCHANGE;
            if (waiting != 32) continue;
            const Fiber& lane = r.fibers[first];
            if (lane.state == AT_WARP_BARRIER) tidemill_races_warp_barrier(first / 32);
            for (u32 i = first; i < first + 32; i++) {
                if (r.fibers[i].site != lane.site || r.fibers[i].exchanges != lane.exchanges) {
                    fail(kernel, "lanes of a warp are at different barriers or exchanges");
                }
                r.fibers[i].state = READY;
            }
            moved = true;
        }
        if (!moved) fail(kernel, "threads wait for others that never come: a barrier or an exchange that not all reach");
    }
}

// `ranges`: address and bytes of memory of the device, `count` of them by address.
inline void run(const char* kernel, u32 bound, const u32* grid, u32 threads, u64 shared, u32 order, const u64* ranges, u64 count,
                void (*body)(const void*), const void* params) {
    Runner& r = runner();
    r.grid = {grid[0], grid[1], grid[2]};
    r.threads = threads;
    r.body = body;
    r.params = params;
    r.order = order;
    r.drawn = order;
    r.stopped = false;
    if (threads % 32 != 0 || threads > bound) fail(kernel, "threads are no whole warps, or more than the kernel is bound to");
    r.fibers.resize(threads);
    r.warps.resize(threads / 32);
    r.order_of_threads.resize(threads);
    r.shared.resize(shared);
    if (r.stacks_for < threads) {
        if (r.stacks) munmap(r.stacks, r.stacks_for * STACK);
        r.stacks = (u8*)mmap(nullptr, threads * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (r.stacks == MAP_FAILED) abort();
        r.stacks_for = threads;
    }
    tidemill_races_launch(kernel, ranges, count, stop);
    r.order_of_blocks.resize((size_t)grid[0] * grid[1] * grid[2]);
    arrange(r.order_of_blocks, order, r.drawn);
    for (u32 index : r.order_of_blocks) {
        r.block = {index % grid[0], index / grid[0] % grid[1], index / grid[0] / grid[1]};
        run_block(kernel);
        if (r.stopped) return;
    }
}

// Every lane gives `count` words; the result is what all lanes of the warp gave.
inline const u32 (*exchange(const u32* words, u32 count, Site site))[8] {
    Runner& r = runner();
    Fiber& fiber = r.fibers[r.current];
    auto& set = r.warps[r.current / 32].words[fiber.exchanges++ % 2];
    memcpy(set[r.current % 32], words, 4 * count);
    leave(AT_EXCHANGE, site);
    return set;
}

inline u64 from_lane(u64 value, u32 lane, Site site) {
    const u32 words[2] = {(u32)value, (u32)(value >> 32)};
    const u32(*all)[8] = exchange(words, 2, site);
    return (u64)all[lane][1] << 32 | all[lane][0];
}

inline u32 lane() { return runner().current % 32; }

}  // namespace emulation

#define DEVICE static inline
#define DEVICE_MEMBER inline
#define KERNEL(name, bound, Params)                                                                                              \
    static void name##_body(const Params& p);                                                                                    \
    extern "C" const u64 name##_params = sizeof(Params);                                                                         \
    extern "C" void name(const u32* grid, u32 threads, u64 shared, u32 order, const u64* ranges, u64 count, const void* params) { \
        auto body = [](const void* given) { name##_body(*(const Params*)given); };                                               \
        emulation::run(#name, bound, grid, threads, shared, order, ranges, count, body, params);                                 \
    }                                                                                                                            \
    static void name##_body(const Params& p)
#define KERNEL_ALONE(name, bound, Params) KERNEL(name, bound, Params)
#define KERNEL_PAIR(name, bound, Params) KERNEL(name, bound, Params)
#define SHARED(name) u8* const name = emulation::runner().shared.start()
#define threadIdx (emulation::runner().fibers[emulation::runner().current].thread)
#define blockIdx (emulation::runner().block)
#define blockDim (emulation::Dimensions{emulation::runner().threads, 1, 1})
#define gridDim (emulation::runner().grid)
#define INFINITE INFINITY
#define __restrict__

struct alignas(16) Quad {
    u32 x[4];
};

DEVICE float as_float(u32 bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

DEVICE u32 as_bits(float value) {
    u32 bits;
    memcpy(&bits, &value, 4);
    return bits;
}

DEVICE u32 round_to_bf16(float value) {
    const u32 bits = as_bits(value);
    if (value != value) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

DEVICE u32 pack_bf16(float low, float high) { return round_to_bf16(high) << 16 | round_to_bf16(low); }

DEVICE float from_f16(u16 half) {
    const u32 sign = (u32)(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 0x3ff;
    if (exponent == 31) return as_float(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) return as_float(sign | as_bits(ldexpf((float)mantissa, -24)));
    return as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

DEVICE u32 multiply_pairs(u32 a, u32 b) {
    const float low = as_float(a << 16) * as_float(b << 16), high = as_float(a & 0xffff0000u) * as_float(b & 0xffff0000u);
    return pack_bf16(low, high);
}

DEVICE float power_of_2(float x) { return exp2f(x); }
DEVICE Quad load_once(const void* at) { return *(const Quad*)at; }

DEVICE u64 shuffle_xor(u64 value, u32 mask, TIDEMILL_SITE) {
    return emulation::from_lane(value, emulation::lane() ^ mask, {file, line});
}
DEVICE float shuffle_xor(float value, u32 mask, TIDEMILL_SITE) {
    return as_float((u32)shuffle_xor((u64)as_bits(value), mask, file, line));
}

DEVICE u64 shuffle_up(u64 value, u32 lanes, TIDEMILL_SITE) {
    const u32 lane = emulation::lane();
    return emulation::from_lane(value, lane < lanes ? lane : lane - lanes, {file, line});
}

DEVICE u32 ballot(bool vote, TIDEMILL_SITE) {
    const u32 word = vote;
    const u32(*all)[8] = emulation::exchange(&word, 1, {file, line});
    u32 votes = 0;
    for (u32 lane = 0; lane < 32; lane++) votes |= all[lane][0] << lane;
    return votes;
}

DEVICE u32 count_bits(u32 bits) { return (u32)__builtin_popcount(bits); }
DEVICE u32 leading_zeros(u64 bits) { return bits == 0 ? 64 : (u32)__builtin_clzll(bits); }

DEVICE void warp_barrier(TIDEMILL_SITE) {
    emulation::leave(emulation::AT_WARP_BARRIER, {file, line});
}
DEVICE void block_barrier(TIDEMILL_SITE) { emulation::leave(emulation::AT_BLOCK_BARRIER, {file, line}); }

// Not seen by `races.cpp` but for what it is told here.
__attribute__((no_sanitize("thread"))) DEVICE u32 add_atomically(u32* to, u32 value) {
    emulation::tidemill_races_atomic(to, sizeof(u32));
    const u32 before = *to;
    *to += value;
    return before;
}

DEVICE u32 choose_bits(u32 from, u32 mask, u32 others) { return (from & mask) | others; }

DEVICE u32 choose_bytes(u32 low, u32 high, u32 which) {
    const u64 from = (u64)high << 32 | low;
    u32 chosen = 0;
    for (u32 i = 0; i < 4; i++) chosen |= (u32)(from >> (which >> 4 * i & 7) * 8 & 255) << 8 * i;
    return chosen;
}

DEVICE void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, TIDEMILL_SITE) {
    const u32 given[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const u32(*all)[8] = emulation::exchange(given, 6, {file, line});
    const u32 g = emulation::lane() / 4, t = emulation::lane() % 4;
    for (u32 i = 0; i < 4; i++) {
        const u32 row = g + i / 2 * 8, column = 2 * t + i % 2;
        double sum = 0;
        for (u32 k = 0; k < 16; k++) {
            const u32 left = all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], right = all[column * 4 + k % 8 / 2][4 + k / 8];
            const u32 shift = k % 2 * 16;
            sum += (double)as_float((left >> shift & 0xffff) << 16) * (double)as_float((right >> shift & 0xffff) << 16);
        }
        c[i] += (float)sum;
    }
}
