// Products of few rows with a weight matrix: out [rows, n] = x [rows, k] · wᵀ; see `few_rows.cuh`. And for those of many rows, which a
// library makes, the matrix as it reads it.

struct Linear {
    // bf16 [rows, stride], its padding zero.
    const u16* x;
    Weights w;
    // Null where there is none.
    const float* bias;
    float* out;
    u32 rows;
    // 1 adds to `out`, 0 replaces it.
    u32 add;
};

// TILES: groups of 8 rows of x. Shared memory: 8 · 16 · 8 TILES floats. Grid [ceil(n / 16)].
template <u32 FORM, u32 TILES>
DEVICE void linear(const Linear& p) {
    SHARED(scratch);
    float* const all = (float*)scratch;
    const u32 g = threadIdx.x % 32 / 4, first = blockIdx.x * 16;
    u32 rows[TILES];
    for (u32 tile = 0; tile < TILES; tile++) rows[tile] = smaller(tile * 8 + g, p.rows - 1);
    few_rows<FORM, TILES>(p.w, first, p.x, rows, all);
    for (u32 i = threadIdx.x; i < 8 * TILES * 16; i += blockDim.x) {
        const u32 row = i / 16, feature = first + i % 16;
        if (row >= p.rows || feature >= p.w.n) continue;
        float sum = few_rows_sum<FORM, TILES>(p.w, feature, all, i);
        if (p.bias) sum += p.bias[feature];
        float* const out = p.out + (u64)row * p.w.n + feature;
        *out = p.add ? *out + sum : sum;
    }
}

#define LINEAR(form, FORM, rows, TILES) \
    KERNEL(linear_##form##_##rows, 256, Linear) { linear<FORM, TILES>(p); }
LINEAR(bf16, FORM_BF16, 8, 1)
LINEAR(bf16, FORM_BF16, 16, 2)
LINEAR(int8, FORM_INT8, 8, 1)
LINEAR(int8, FORM_INT8, 16, 2)
LINEAR(int8, FORM_INT8, 32, 4)
LINEAR(fp8, FORM_FP8, 8, 1)
LINEAR(fp8, FORM_FP8, 16, 2)
LINEAR(fp8, FORM_FP8, 32, 4)
LINEAR(int4, FORM_INT4, 8, 1)
LINEAR(int4, FORM_INT4, 16, 2)
// Left alone these take so many registers that no second block fits beside one.
KERNEL_PAIR(linear_int8_64, 256, Linear) { linear<FORM_INT8, 8>(p); }
KERNEL_PAIR(linear_fp8_64, 256, Linear) { linear<FORM_FP8, 8>(p); }
KERNEL_PAIR(linear_int4_32, 256, Linear) { linear<FORM_INT4, 4>(p); }
KERNEL_PAIR(linear_int4_64, 256, Linear) { linear<FORM_INT4, 8>(p); }

struct LinearF32 {
    const float* x;
    Weights w;
    const float* bias;
    float* out;
    u32 rows;
    u32 add;
};

// Weights in f32, for exactness: a warp for each output feature, grid [rows, ceil(n / 8)].
KERNEL(linear_f32, 256, LinearF32) {
    const u32 feature = blockIdx.y * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (feature >= p.w.n) return;
    const u64 row = blockIdx.x;
    const float* const x = p.x + row * p.w.k;
    const float* const w = (const float*)p.w.data + (u64)feature * p.w.stride;
    float sum = 0;
    for (u32 i = lane; i < p.w.k; i += 32) sum += x[i] * w[i];
    sum = warp_sum(sum);
    if (lane != 0) return;
    if (p.bias) sum += p.bias[feature];
    float* const out = p.out + row * p.w.n + feature;
    *out = p.add ? *out + sum : sum;
}

struct Widen {
    Weights from;
    u16* to;
};

// A quantised matrix as bf16 [n, stride]. The matrix is taken as one row of eights, whatever its own rows are: a thread has four of them,
// a block apart from each other, so that a warp writes 512 contiguous bytes at once (which is most of the traffic), and all that a thread
// reads is under way before any of it is unpacked. Grid [ceil(n stride / 8192)].
template <u32 FORM>
DEVICE void widen(const Widen& p) {
    constexpr u32 EIGHTS = 4;
    const u32 each = p.from.stride / 8;
    const u64 first = (u64)blockIdx.x * EIGHTS * 256 + threadIdx.x, end = (u64)p.from.n * each;
    Stretch<FORM> eights[EIGHTS];
    [[maybe_unused]] float scales[EIGHTS];
#pragma unroll
    for (u32 i = 0; i < EIGHTS; i++) {
        const u64 at = first + i * 256;
        if (at >= end) break;
        if constexpr (FORM == FORM_INT4) {
            eights[i].raw.x[0] = ((const u32*)p.from.data)[at];
            eights[i].both = ((const u32*)p.from.scales)[at / 4];
        } else {
            const u64 both = ((const u64*)p.from.data)[at];
            eights[i].raw = {(u32)both, (u32)(both >> 32)};
            // A division of 64 bits is many instructions; no matrix has so many eights.
            scales[i] = ((const float*)p.from.scales)[(u32)at / each];
        }
    }
#pragma unroll
    for (u32 i = 0; i < EIGHTS; i++) {
        const u64 at = first + i * 256;
        if (at >= end) break;
        Quad wide;
        eights[i].take(wide.x);
        if constexpr (FORM != FORM_INT4) {
#pragma unroll
            for (u32 j = 0; j < 4; j++) wide.x[j] = pack_bf16(scales[i] * low_bf16(wide.x[j]), scales[i] * high_bf16(wide.x[j]));
        }
        ((Quad*)p.to)[at] = wide;
    }
}

KERNEL(widen_int8, 256, Widen) { widen<FORM_INT8>(p); }
KERNEL(widen_fp8, 256, Widen) { widen<FORM_FP8>(p); }
KERNEL(widen_int4, 256, Widen) { widen<FORM_INT4>(p); }
