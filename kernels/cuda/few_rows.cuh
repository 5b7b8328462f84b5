// Products of few rows with a weight matrix, as `linear.cu` and `moe.cu` make them: bound by reading the weights.
//
// A block takes 16 output features; its 8 warps take turns along k and add up in shared memory at the end. A warp multiplies on
// matrix units with the weights as the left operand, so that up to 8 rows of x cost one instruction. Elements of k are given to
// the places of the operands so that a lane reads 16 contiguous bytes of each of its two weight rows (see `multiply`): no
// detour over shared memory, and 8 lines of 64 bytes or more for each read of a warp.
//
// A row's sum is made in an order that depends on k alone: it is the same whatever else is in the batch.

// The weights that a lane has of one row in one stretch of k. `take` makes 4 words of bf16 of the next 8.
template <u32 FORM>
struct Stretch;

template <>
struct Stretch<FORM_BF16> {
    static constexpr u32 EACH = 8;
    Quad raw = {};

    DEVICE_MEMBER void load(const Weights& w, u64 row, u32 at) { raw = load_once((const u16*)w.data + row * w.stride + at); }
    DEVICE_MEMBER void take(u32 (&to)[4]) {
        for (u32 i = 0; i < 4; i++) to[i] = raw.x[i];
    }
};

template <>
struct Stretch<FORM_INT8> {
    static constexpr u32 EACH = 16;
    Quad raw = {};

    DEVICE_MEMBER void load(const Weights& w, u64 row, u32 at) { raw = load_once(w.data + row * w.stride + at); }
    // Whole numbers up to 128 are exact in bf16; the row's scale is applied to the sum. A byte and 128 are the lowest bits of 2^23 as a
    // float: conversions of numbers have an eighth of the rate of additions, too few for how fast the weights come.
    DEVICE_MEMBER void take(u32 (&to)[4]) {
        for (u32 i = 0; i < 4; i++) {
            const u32 bytes = raw.x[i / 2] ^ 0x80808080u, first = 0x7440 + i % 2 * 2;
            const float low = as_float(choose_bytes(bytes, 0x4b000000u, first));
            const float high = as_float(choose_bytes(bytes, 0x4b000000u, first + 1));
            to[i] = pack_bf16(low - 8388736.0f, high - 8388736.0f);
        }
        raw = {raw.x[2], raw.x[3]};
    }
};

template <>
struct Stretch<FORM_FP8> {
    static constexpr u32 EACH = 16;
    Quad raw = {};

    DEVICE_MEMBER void load(const Weights& w, u64 row, u32 at) { raw = load_once(w.data + row * w.stride + at); }
    // Exact in bf16; the row's scale is applied to the sum.
    DEVICE_MEMBER void take(u32 (&to)[4]) {
        for (u32 i = 0; i < 4; i++) to[i] = from_e4m3(raw.x[i / 2], i % 2);
        raw = {raw.x[2], raw.x[3]};
    }
};

template <>
struct Stretch<FORM_INT4> {
    static constexpr u32 EACH = 32;
    Quad raw = {};
    u32 both = 0;

    // A lane's 32 are one group.
    DEVICE_MEMBER void load(const Weights& w, u64 row, u32 at) {
        const u64 group = (row * w.stride + at) / 32;
        raw = load_once(w.data + group * 16);
        both = ((const u32*)w.scales)[group];
    }
    // A nibble at bits p to p + 3 of a float from 1 on makes it nibble · 2^(p − 23) larger than 1: with the scale as much larger and the
    // minimum less by what the 1 gives, one multiplication and addition makes a weight of it. At bits 12 or 16 that is off by 2^-13 of
    // the scale at most. A shift for two weights, a mask for each, and no conversion of numbers, as above.
    DEVICE_MEMBER void take(u32 (&to)[4]) {
        const float scale = from_f16((u16)both), minimum = from_f16((u16)(both >> 16));
        const u32 shifted[4] = {raw.x[0] << 12, raw.x[0] << 4, raw.x[0] >> 4, raw.x[0] >> 12};
        float weights[8];
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            const u32 place = i % 2 == 0 ? 12 : 16;
            const float large = scale * (float)(1u << (23 - place));
            weights[i] = fmaf(large, as_float(choose_bits(shifted[i / 2], 15u << place, 0x3f800000u)), minimum - large);
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++) to[i] = pack_bf16(weights[2 * i], weights[2 * i + 1]);
        raw = {raw.x[1], raw.x[2], raw.x[3]};
    }
};

constexpr u32 LINEAR_WARPS = 8;

// The products of features `first` to `first + 15` with the rows of `x` that the lane's eighth of each group of 8 has in `rows`, not added
// up yet: [warp][row][feature] in shared memory, 8 · 16 · 8 TILES floats, when all threads are out. TILES: groups of 8 rows.
template <u32 FORM, u32 TILES>
DEVICE void few_rows(const Weights& w, u32 first, const void* x, const u32 (&rows)[TILES], float* all) {
    // Stretches that are under way at once, which is what hides how far away the memory is: as one is multiplied, the one that is this
    // many further on is asked for. Registers bound them.
    constexpr u32 EACH = Stretch<FORM>::EACH, ROWS = 8 * TILES, BATCH = TILES <= 2 ? 4 : TILES == 4 || EACH < 32 ? 2 : 1;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u64 upper = smaller(first + g, w.n - 1), lower = smaller(first + g + 8, w.n - 1);
    // With 64 rows, what would be read ahead of x takes the registers of a second block.
    [[maybe_unused]] constexpr u32 UNROLLED = TILES == 8 ? 1 : EACH / 8;
    // In 16 bytes, of which 32 bits count 64 GiB: pointers would take twice the registers.
    u32 starts[TILES];
    for (u32 tile = 0; tile < TILES; tile++) starts[tile] = rows[tile] * (w.stride / 8);
    float sums[TILES][4] = {};
    constexpr u32 EVERY = LINEAR_WARPS * 4 * EACH;
    Stretch<FORM> above[BATCH], below[BATCH];
    // Conditions are the warp's and not the lane's: a stretch of a warp is 128 elements or a divisor of it, as a stride is a multiple.
    const auto load = [&](u32 i, u32 from) {
        if (from >= w.stride) return;
        above[i].load(w, upper, from + t * EACH);
        below[i].load(w, lower, from + t * EACH);
    };
#pragma unroll
    for (u32 i = 0; i < BATCH; i++) load(i, warp * 4 * EACH + i * EVERY);
    for (u32 at = warp * 4 * EACH; at < w.stride; at += EVERY * BATCH) {
#pragma unroll
        for (u32 i = 0; i < BATCH; i++) {
            if (at + i * EVERY >= w.stride) break;
            const u32 mine = at + i * EVERY + t * EACH;
#pragma unroll UNROLLED
            for (u32 part = 0; part < EACH / 8; part++) {
                u32 a[4], b[4];
                above[i].take(a);
                below[i].take(b);
                const u32 even[4] = {a[0], b[0], a[1], b[1]}, odd[4] = {a[2], b[2], a[3], b[3]};
#pragma unroll
                for (u32 tile = 0; tile < TILES; tile++) {
                    const Quad right = ((const Quad*)x)[starts[tile] + mine / 8 + part];
                    multiply(sums[tile], even, right.x[0], right.x[1]);
                    multiply(sums[tile], odd, right.x[2], right.x[3]);
                }
            }
            load(i, at + (BATCH + i) * EVERY);
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
