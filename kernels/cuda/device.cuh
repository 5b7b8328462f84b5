// What all kernels are written with. There are no includes: NVRTC compiles this text in front of each kernel file, so a machine
// needs a driver and NVRTC and no toolkit. On the host `emulation/host.h` comes first and defines TIDEMILL_HOST: what the hardware
// does is plain functions there, and the same kernels run as host C++ in the tests.
//
// A kernel takes one structure by value; `kernels/src/cuda/params.rs` has the same structures for the launching side.

#ifndef TIDEMILL_HOST

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__
#define KERNEL(name, threads, Params) extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Params p)
// One that gains nothing from a second block on its processor: it may have all registers.
#define KERNEL_ALONE(name, threads, Params) extern "C" __global__ void __launch_bounds__(threads, 1) name(const __grid_constant__ Params p)
// One of which two blocks are to fit on a processor.
#define KERNEL_PAIR(name, threads, Params) extern "C" __global__ void __launch_bounds__(threads, 2) name(const __grid_constant__ Params p)
// A block's shared memory, as much as was asked for at its launch.
extern __shared__ __align__(128) u8 tidemill_shared[];
#define SHARED(name) u8* const name = tidemill_shared
#define INFINITE __int_as_float(0x7f800000)

struct alignas(16) Quad {
    u32 x[4];
};

DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 as_bits(float value) { return __float_as_uint(value); }

// Two floats to bf16, rounded to nearest even; `low` in the lower half.
DEVICE u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

DEVICE float from_f16(u16 half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}

// The products of two pairs of bf16, each rounded once; what is less than normal is kept.
DEVICE u32 multiply_pairs(u32 a, u32 b) {
    u32 product;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
    return product;
}

// 2 to a power, to about 2 units in the last place; 0 for -infinity.
DEVICE float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Weights: read once, so they need not stay in the first-level cache.
DEVICE Quad load_once(const void* at) {
    Quad q;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(q.x[0]), "=r"(q.x[1]), "=r"(q.x[2]), "=r"(q.x[3])
        : "l"(at));
    return q;
}

DEVICE float shuffle_xor(float value, u32 mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE u64 shuffle_xor(u64 value, u32 mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE u64 shuffle_up(u64 value, u32 lanes) { return __shfl_up_sync(0xffffffffu, value, lanes); }
DEVICE u32 ballot(bool vote) { return __ballot_sync(0xffffffffu, vote); }
DEVICE u32 count_bits(u32 bits) { return (u32)__popc(bits); }
DEVICE u32 leading_zeros(u64 bits) { return (u32)__clzll((i64)bits); }
DEVICE void warp_barrier() { __syncwarp(); }
DEVICE void block_barrier() { __syncthreads(); }
// What was there before. (For 64 bits of shared memory there is no such instruction, but a loop that turns for every thread.)
DEVICE u32 add_atomically(u32* to, u32 value) { return atomicAdd(to, value); }
// Of the 8 bytes of `low` and `high`, counted from the lowest, those that the 4 digits of `which` name, the lowest digit first.
DEVICE u32 choose_bytes(u32 low, u32 high, u32 which) { return __byte_perm(low, high, which); }

// from & mask | others, in one instruction: with two constants the compiler makes two.
DEVICE u32 choose_bits(u32 from, u32 mask, u32 others) {
    u32 bits;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(bits) : "r"(from), "r"(mask), "r"(others));
    return bits;
}

// c += a b on matrix units, a [16, 16] and b [16, 8] in bf16. With g = lane / 4 and t = lane % 4, pairs of neighbours along k:
// a[0], a[2] hold row g, columns 2t and 8 + 2t; a[1], a[3] row g + 8; b[0], b[1] column g, rows 2t and 8 + 2t;
// c[0], c[1] row g, columns 2t and 2t + 1; c[2], c[3] row g + 8. Since a sum does not mind its order, kernels below give any
// 16 elements of k to these places, as long as a and b agree: so that every lane reads 16 contiguous bytes.
// All lanes of a warp must come here together. Volatile, or the compiler might move it under a condition that some of them do not meet.
DEVICE void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

DEVICE float from_bf16(u16 half) { return as_float((u32)half << 16); }
DEVICE float low_bf16(u32 packed) { return as_float(packed << 16); }
DEVICE float high_bf16(u32 packed) { return as_float(packed & 0xffff0000u); }
DEVICE u16 to_bf16(float value) { return (u16)pack_bf16(value, 0.0f); }

// The lower or the upper two of four floats of 8 bits, 4 of them exponent and 3 mantissa (kernels/src/e4m3.rs), to bf16, exactly. Moved to
// where bf16 has its exponent they are too small by 2^120, those that are less than normal, too. Every card can do this. There is no NaN
// among weights; one in a cache becomes 480.
DEVICE u32 from_e4m3(u32 four, u32 upper = 0) {
    const u32 high = choose_bytes(four, 0, upper ? 0x3424 : 0x1404);
    return multiply_pairs((high & 0x80008000u) | (high >> 4 & 0x07f007f0u), 0x7b807b80u);
}

// To nearest even; what is too large becomes the largest.
DEVICE u8 to_e4m3(float value) {
    const u32 bits = as_bits(value), sign = bits >> 24 & 0x80u;
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (u8)(sign | 0x7fu);
    const u32 scaled = as_bits(fminf(as_float(bits & 0x7fffffffu), 448.0f) * as_float(7u << 23));
    return (u8)(sign | (scaled + 0x7ffffu + (scaled >> 20 & 1u)) >> 20);
}

DEVICE u32 smaller(u32 a, u32 b) { return a < b ? a : b; }
DEVICE u32 larger(u32 a, u32 b) { return a > b ? a : b; }

DEVICE float warp_sum(float value) {
    for (u32 mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

DEVICE u64 warp_sum(u64 value) {
    for (u32 mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

DEVICE u64 warp_largest(u64 value) {
    for (u32 mask = 16; mask > 0; mask /= 2) {
        const u64 other = shuffle_xor(value, mask);
        value = other > value ? other : value;
    }
    return value;
}

// The sum over a block, in every thread; `scratch` holds a number per warp, and may be used again at once.
template <class T>
DEVICE T block_sum(T value, T* scratch) {
    value = warp_sum(value);
    block_barrier();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    block_barrier();
    T sum = 0;
    for (u32 warp = 0; warp < blockDim.x / 32; warp++) sum += scratch[warp];
    return sum;
}

// The largest over a block, in every thread; as `block_sum`.
DEVICE u64 block_largest(u64 value, u64* scratch) {
    value = warp_largest(value);
    block_barrier();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    block_barrier();
    u64 most = 0;
    for (u32 warp = 0; warp < blockDim.x / 32; warp++) most = scratch[warp] > most ? scratch[warp] : most;
    return most;
}

// How a weight matrix [n, k] is held; rows are padded with zeros to `stride` elements, a multiple of 128.
enum Form : u32 {
    FORM_F32 = 0,
    FORM_BF16 = 1,
    // Signed bytes, one f32 scale for each row.
    FORM_INT8 = 2,
    // Groups of 32 nibbles, the first in the lowest bits, and for each group two f16 in one word: w = scale * nibble + minimum.
    FORM_INT4 = 3,
    // Floats of 8 bits, one f32 scale for each row.
    FORM_FP8 = 4,
};

// What a cache holds.
enum Cache : u32 {
    CACHE_F32 = 0,
    CACHE_BF16 = 1,
    // Floats of 8 bits.
    CACHE_FP8 = 2,
};

struct Weights {
    const u8* data;
    // FORM_INT8, FORM_FP8: float [n]; FORM_INT4: u32 [n, stride / 32].
    const void* scales;
    u32 form;
    u32 n;
    u32 k;
    u32 stride;
};
