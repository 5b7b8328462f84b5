// Products of few rows with a weight matrix, as `linear.cu` and `moe.cu` make them: bound by reading the weights.
//
// A block takes 16 output features; its 8 warps take turns along k and add up in shared memory at the end. A warp multiplies on
// matrix units with the weights as the left operand, so that up to 8 rows of x cost one instruction. Elements of k are given to
// the places of the operands so that a lane reads 16 contiguous bytes of each of its two weight rows (see `multiply`): no
// detour over shared memory, and 8 lines of 64 bytes or more for each read of a warp.
//
// A row's sum is made in an order that depends on k alone: it is the same whatever else is in the batch.

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

// The products of features `first` to `first + 15` with the rows that the lane's eighth of each group of 8 has in `x`, not added up yet:
// [warp][row][feature] in shared memory, 8 · 16 · 8 TILES floats, when all threads are out. TILES: groups of 8 rows.
template <u32 FORM, u32 TILES>
DEVICE void few_rows(const Weights& w, u32 first, const u16* const (&x)[TILES], float* all) {
    // Stretches that are read ahead; with many rows of x there is enough to do meanwhile.
    constexpr u32 EACH = Stretch<FORM>::EACH, ROWS = 8 * TILES, BATCH = TILES <= 2 ? 4 : TILES == 4 ? 2 : 1;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u64 upper = smaller(first + g, w.n - 1), lower = smaller(first + g + 8, w.n - 1);
    float sums[TILES][4] = {};
    constexpr u32 EVERY = LINEAR_WARPS * 4 * EACH;
    for (u32 at = warp * 4 * EACH; at < w.stride; at += EVERY * BATCH) {
        // All reads of weights first: what is under way at once is what hides how far away the memory is.
        Stretch<FORM> above[BATCH], below[BATCH];
#pragma unroll
        for (u32 i = 0; i < BATCH; i++) {
            const u32 mine = at + i * EVERY + t * EACH;
            if (mine >= w.stride) break;
            above[i].load(w, upper, mine);
            below[i].load(w, lower, mine);
        }
#pragma unroll
        for (u32 i = 0; i < BATCH; i++) {
            const u32 mine = at + i * EVERY + t * EACH;
            if (mine >= w.stride) break;
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

    for (u32 tile = 0; tile < TILES; tile++) {
        for (u32 i = 0; i < 4; i++) {
            all[(warp * ROWS + tile * 8 + 2 * t + i % 2) * 16 + g + i / 2 * 8] = sums[tile][i];
        }
    }
    block_barrier();
}

// What the warps have of `i`, a row and a feature.
template <u32 FORM, u32 TILES>
DEVICE float few_rows_sum(const Weights& w, u32 feature, const float* all, u32 i) {
    float sum = 0;
    for (u32 from = 0; from < LINEAR_WARPS; from++) sum += all[from * 8 * TILES * 16 + i];
    return FORM == FORM_INT8 || FORM == FORM_FP8 ? sum * ((const float*)w.scales)[feature] : sum;
}
