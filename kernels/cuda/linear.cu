// Products of few rows with a weight matrix, bound by reading the weights: out [rows, n] = x [rows, k] · wᵀ.
//
// A block takes 16 output features; its 8 warps take turns along k and add up in shared memory at the end. A warp multiplies on
// matrix units with the weights as the left operand, so that up to 8 rows of x cost one instruction. Elements of k are given to
// the places of the operands so that a lane reads 16 contiguous bytes of each of its two weight rows (see `multiply`): no
// detour over shared memory, and 8 lines of 64 bytes or more for each read of a warp.
//
// A row's sum is made in an order that depends on k alone: it is the same whatever else is in the batch.

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

// The weights that a lane has of one row in one stretch of k, as bf16: 4 words for every 8.
template <u32 FORM>
struct Stretch;

template <>
struct Stretch<FORM_BF16> {
    static constexpr u32 EACH = 8;
    Quad raw = {};

    DEVICE_MEMBER void load(const Weights& w, u64 row, u32 at) { raw = load_once((const u16*)w.data + row * w.stride + at); }
    DEVICE_MEMBER void words(u32 part, u32 (&to)[4]) const {
        for (u32 i = 0; i < 4; i++) to[i] = raw.x[i];
    }
};

template <>
struct Stretch<FORM_INT8> {
    static constexpr u32 EACH = 16;
    Quad raw = {};

    DEVICE_MEMBER void load(const Weights& w, u64 row, u32 at) { raw = load_once(w.data + row * w.stride + at); }
    // Whole numbers up to 128 are exact in bf16; the row's scale is applied to the sum.
    DEVICE_MEMBER void words(u32 part, u32 (&to)[4]) const {
        for (u32 i = 0; i < 4; i++) {
            const u32 bytes = raw.x[part * 2 + i / 2] >> i % 2 * 16;
            to[i] = pack_bf16((float)(i8)(bytes & 255), (float)(i8)(bytes >> 8 & 255));
        }
    }
};

template <>
struct Stretch<FORM_FP8> {
    static constexpr u32 EACH = 16;
    Quad raw = {};

    DEVICE_MEMBER void load(const Weights& w, u64 row, u32 at) { raw = load_once(w.data + row * w.stride + at); }
    // Exact in bf16; the row's scale is applied to the sum.
    DEVICE_MEMBER void words(u32 part, u32 (&to)[4]) const {
        for (u32 i = 0; i < 4; i++) to[i] = from_e4m3(raw.x[part * 2 + i / 2] >> i % 2 * 16);
    }
};

template <>
struct Stretch<FORM_INT4> {
    static constexpr u32 EACH = 32;
    Quad raw = {};
    float scale = 0, minimum = 0;

    // A lane's 32 are one group.
    DEVICE_MEMBER void load(const Weights& w, u64 row, u32 at) {
        const u64 group = (row * w.stride + at) / 32;
        raw = load_once(w.data + group * 16);
        const u32 both = ((const u32*)w.scales)[group];
        scale = from_f16((u16)both);
        minimum = from_f16((u16)(both >> 16));
    }
    DEVICE_MEMBER void words(u32 part, u32 (&to)[4]) const {
        for (u32 i = 0; i < 4; i++) {
            const u32 pair = raw.x[part] >> i * 8;
            to[i] = pack_bf16(scale * (float)(pair & 15) + minimum, scale * (float)(pair >> 4 & 15) + minimum);
        }
    }
};

constexpr u32 LINEAR_WARPS = 8;

// TILES: groups of 8 rows of x. Shared memory: 8 · 16 · 8 TILES floats. Grid [ceil(n / 16)].
template <u32 FORM, u32 TILES>
DEVICE void linear(const Linear& p) {
    SHARED(scratch);
    // Stretches that are read ahead; with many rows of x there is enough to do meanwhile.
    constexpr u32 EACH = Stretch<FORM>::EACH, ROWS = 8 * TILES, BATCH = TILES <= 2 ? 4 : TILES == 4 ? 2 : 1;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 first = blockIdx.x * 16;
    const u64 upper = smaller(first + g, p.w.n - 1), lower = smaller(first + g + 8, p.w.n - 1);
    const u16* x[TILES];
    for (u32 tile = 0; tile < TILES; tile++) x[tile] = p.x + (u64)smaller(tile * 8 + g, p.rows - 1) * p.w.stride;

    float sums[TILES][4] = {};
    constexpr u32 EVERY = LINEAR_WARPS * 4 * EACH;
    for (u32 at = warp * 4 * EACH; at < p.w.stride; at += EVERY * BATCH) {
        // All reads of weights first: what is under way at once is what hides how far away the memory is.
        Stretch<FORM> above[BATCH], below[BATCH];
#pragma unroll
        for (u32 i = 0; i < BATCH; i++) {
            const u32 mine = at + i * EVERY + t * EACH;
            if (mine >= p.w.stride) break;
            above[i].load(p.w, upper, mine);
            below[i].load(p.w, lower, mine);
        }
#pragma unroll
        for (u32 i = 0; i < BATCH; i++) {
            const u32 mine = at + i * EVERY + t * EACH;
            if (mine >= p.w.stride) break;
#pragma unroll
            for (u32 part = 0; part < EACH / 8; part++) {
                u32 a[4], b[4];
                above[i].words(part, a);
                below[i].words(part, b);
                const u32 even[4] = {a[0], b[0], a[1], b[1]}, odd[4] = {a[2], b[2], a[3], b[3]};
#pragma unroll
                for (u32 tile = 0; tile < TILES; tile++) {
                    const Quad right = *(const Quad*)(x[tile] + mine + part * 8);
                    multiply(sums[tile], even, right.x[0], right.x[1]);
                    multiply(sums[tile], odd, right.x[2], right.x[3]);
                }
            }
        }
    }

    // [warp][row of x][feature]
    float* const all = (float*)scratch;
    for (u32 tile = 0; tile < TILES; tile++) {
        for (u32 i = 0; i < 4; i++) {
            all[(warp * ROWS + tile * 8 + 2 * t + i % 2) * 16 + g + i / 2 * 8] = sums[tile][i];
        }
    }
    block_barrier();
    for (u32 i = threadIdx.x; i < ROWS * 16; i += blockDim.x) {
        const u32 row = i / 16, feature = first + i % 16;
        if (row >= p.rows || feature >= p.w.n) continue;
        float sum = 0;
        for (u32 from = 0; from < LINEAR_WARPS; from++) sum += all[from * ROWS * 16 + i];
        if (FORM == FORM_INT8 || FORM == FORM_FP8) sum *= ((const float*)p.w.scales)[feature];
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
