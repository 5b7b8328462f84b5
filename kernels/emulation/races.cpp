// Who read and wrote what, thread by thread, while emulated kernels run. Kernels that are to be checked are compiled with
// -fsanitize=thread, which calls a function before each access to memory; the functions are here and not ThreadSanitizer's, which knows
// nothing of blocks and warps. This file is compiled without.
//
// Two accesses to a byte of shared memory, or of memory of the device, are a race when one of them writes, not both are atomic, and
// - they are of two blocks of one launch, or
// - of two warps of a block, and no barrier of the block stands between them, or
// - of two lanes of a warp, and neither that stands between them nor a barrier of the warp. Exchanges between lanes order no memory.
// So what is found does not depend on the order in which the threads happened to run, but for what they were led to read by it.
// Shared memory that is read must also have been written, by the same block.

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <unordered_map>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;

namespace {

// Where a thread was when it touched a byte. Intervals are counted over all launches; a barrier of a block ends one, and so does its end.
struct Touch {
    u32 interval;
    u16 thread;
    // Barriers of its warp since the interval began.
    u16 step;
};

struct Byte {
    Touch write, read;
    // Of the first read in this launch, of which `read` may be another.
    u32 first_read;
    bool atomic;
    // Since `read.interval` began, others have read, too: lanes of the warp in the same step, or other warps.
    bool lanes, warps;
};

constexpr u32 NOBODY = ~0u, MOST_WARPS = 32;

struct Range {
    u64 start = 0, bytes = 0;
    Byte* seen = nullptr;
};

struct State {
    const char* kernel = "";
    u32 block[3] = {};
    u32 thread = NOBODY;
    u32 interval = 0, launch_began = 1, block_began = 1;
    u16 steps[MOST_WARPS] = {};
    Range shared;
    // Memory of the device, by address; the last one that was met.
    const u64* ranges = nullptr;
    u64 count = 0;
    std::unordered_map<u64, Range> known;
    Range* last = nullptr;
    char found[400] = {};
    void (*stop)() = nullptr;
};

State& state() {
    static thread_local State one;
    return one;
}

void watch(Range& range, u64 start, u64 bytes) {
    if (range.seen) munmap(range.seen, range.bytes * sizeof(Byte));
    range = {start, bytes, nullptr};
    void* const at = mmap(nullptr, bytes * sizeof(Byte), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at != MAP_FAILED) range.seen = (Byte*)at;
}

Range* range_of(State& s, u64 at) {
    if (at - s.shared.start < s.shared.bytes) return &s.shared;
    if (s.last && at - s.last->start < s.last->bytes) return s.last;
    u64 low = 0, high = s.count;
    while (low < high) {
        const u64 middle = (low + high) / 2;
        if (s.ranges[2 * middle] <= at) low = middle + 1;
        else high = middle;
    }
    if (low == 0 || at - s.ranges[2 * low - 2] >= s.ranges[2 * low - 1]) return nullptr;
    Range& range = s.known[s.ranges[2 * low - 2]];
    if (range.bytes != s.ranges[2 * low - 1]) watch(range, s.ranges[2 * low - 2], s.ranges[2 * low - 1]);
    return s.last = &range;
}

void report(State& s, const Range& range, u64 at, const char* now, const char* before, const Touch& other) {
    const char* const where = &range == &s.shared ? "shared memory" : "an allocation";
    int n = snprintf(s.found, sizeof s.found, "kernel %s, block %u %u %u: thread %u %s byte %llu of %s (%llu bytes)", s.kernel, s.block[0],
                     s.block[1], s.block[2], s.thread, now, at - range.start, where, range.bytes);
    if (other.interval < s.block_began) {
        snprintf(s.found + n, sizeof s.found - n, ", which %s", before);
    } else {
        snprintf(s.found + n, sizeof s.found - n, ", which thread %u %s with no barrier between them", other.thread, before);
    }
    s.thread = NOBODY;
    s.stop();
}

// Whether nothing orders what was done before and what this thread does now.
bool beside(const State& s, const Touch& other) {
    if (other.interval < s.launch_began) return false;
    if (other.interval < s.block_began) return true;
    if (other.interval < s.interval || other.thread == s.thread) return false;
    return other.thread / 32 != s.thread / 32 || other.step == s.steps[s.thread / 32];
}

void access(u64 at, u64 bytes, bool writes, bool atomic) {
    State& s = state();
    if (s.thread == NOBODY) return;
    Range* const range = range_of(s, at);
    if (!range || !range->seen) return;
    const Touch now = {s.interval, (u16)s.thread, s.steps[s.thread / 32]};
    for (u64 i = at; i < at + bytes && i - range->start < range->bytes; i++) {
        Byte& byte = range->seen[i - range->start];
        const char* const does = atomic ? "adds to" : writes ? "writes" : "reads";
        if (range == &s.shared) {
            // Another block's.
            if (byte.write.interval < s.block_began) byte.write = {};
            if (byte.read.interval < s.block_began) byte.read = {}, byte.first_read = 0;
            if (!writes && byte.write.interval == 0) return report(s, *range, i, does, "nobody wrote", {});
        }
        if (!(atomic && byte.atomic) && beside(s, byte.write)) {
            return report(s, *range, i, does, byte.write.interval < s.block_began ? "another block wrote" : "wrote", byte.write);
        }
        Touch& read = byte.read;
        if (writes) {
            if (byte.first_read >= s.launch_began && byte.first_read < s.block_began) {
                return report(s, *range, i, does, "another block reads", {});
            }
            const bool same_warp = read.thread / 32 == s.thread / 32, others = read.interval == s.interval;
            if (beside(s, read) || (others && byte.warps) || (others && byte.lanes && same_warp && read.step == now.step)) {
                return report(s, *range, i, does, "or another one read", read);
            }
            byte.write = now;
            byte.atomic = atomic;
        } else {
            if (byte.first_read < s.launch_began) byte.first_read = s.interval;
            if (read.interval != s.interval) {
                byte.lanes = byte.warps = false;
            } else {
                byte.warps |= read.thread / 32 != s.thread / 32;
                byte.lanes = read.step == now.step && (byte.lanes || read.thread != s.thread);
            }
            read = now;
        }
    }
}

}  // namespace

extern "C" {

// A launch begins: `stop` leaves it once a race was found. `ranges`: address and bytes of what is reserved on the device, by address.
void tidemill_races_launch(const char* kernel, const u64* ranges, u64 count, void (*stop)()) {
    State& s = state();
    s.kernel = kernel;
    s.ranges = ranges;
    s.count = count;
    s.last = nullptr;
    s.launch_began = s.interval + 1;
    s.found[0] = 0;
    s.stop = stop;
}

void tidemill_races_block(u32 x, u32 y, u32 z, u64 shared, u64 bytes) {
    State& s = state();
    s.block[0] = x, s.block[1] = y, s.block[2] = z;
    s.block_began = ++s.interval;
    for (u16& step : s.steps) step = 0;
    if (s.shared.start != shared || s.shared.bytes != bytes) watch(s.shared, shared, bytes);
}

// From here on, this thread of the block runs; none of them: ~0.
void tidemill_races_thread(u32 thread) { state().thread = thread; }

void tidemill_races_block_barrier() {
    State& s = state();
    s.interval++;
    for (u16& step : s.steps) step = 0;
}

void tidemill_races_warp_barrier(u32 warp) { state().steps[warp]++; }

void tidemill_races_atomic(const void* at, u64 bytes) { access((u64)at, bytes, true, true); }

// What was found in the last launch; empty where nothing was.
const char* tidemill_races_found() { return state().found; }

// What the compiler calls.
#define SIZE(n)                                                                       \
    void __tsan_read##n(void* at) { access((u64)at, n, false, false); }               \
    void __tsan_write##n(void* at) { access((u64)at, n, true, false); }               \
    void __tsan_unaligned_read##n(void* at) { access((u64)at, n, false, false); }     \
    void __tsan_unaligned_write##n(void* at) { access((u64)at, n, true, false); }
SIZE(1)
SIZE(2)
SIZE(4)
SIZE(8)
SIZE(16)
// Of Clang, in the place of the functions that copy and fill.
void* __tsan_memcpy(void* to, const void* from, u64 bytes) {
    access((u64)from, bytes, false, false);
    access((u64)to, bytes, true, false);
    return memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, u64 bytes) {
    access((u64)from, bytes, false, false);
    access((u64)to, bytes, true, false);
    return memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, u64 bytes) {
    access((u64)to, bytes, true, false);
    return memset(to, value, bytes);
}
void __tsan_read_range(void* at, u64 bytes) { access((u64)at, bytes, false, false); }
void __tsan_write_range(void* at, u64 bytes) { access((u64)at, bytes, true, false); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

}
