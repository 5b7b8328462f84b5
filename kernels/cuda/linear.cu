// Products of few rows with a weight matrix: out [rows, n] = x [rows, k] · wᵀ; see `few_rows.cuh`.

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
