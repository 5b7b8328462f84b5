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
    const u16* x[TILES];
    for (u32 tile = 0; tile < TILES; tile++) x[tile] = p.x + (u64)smaller(tile * 8 + g, p.rows - 1) * p.w.stride;
    few_rows<FORM, TILES>(p.w, first, x, all);
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
LINEAR(int8, FORM_INT8, 64, 8)
LINEAR(fp8, FORM_FP8, 8, 1)
LINEAR(fp8, FORM_FP8, 16, 2)
LINEAR(fp8, FORM_FP8, 32, 4)
LINEAR(fp8, FORM_FP8, 64, 8)
LINEAR(int4, FORM_INT4, 8, 1)
LINEAR(int4, FORM_INT4, 16, 2)
LINEAR(int4, FORM_INT4, 32, 4)
LINEAR(int4, FORM_INT4, 64, 8)

struct LinearF32 {
    const float* x;
    Weights w;
    const float* bias;
    float* out;
    u32 rows;
    u32 add;
};

// Weights in f32, for exactness: a warp for each output feature, grid [ceil(n / 8), rows].
KERNEL(linear_f32, 256, LinearF32) {
    const u32 feature = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (feature >= p.w.n) return;
    const u64 row = blockIdx.y;
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
