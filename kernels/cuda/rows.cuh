// Rows of f32, four elements to a thread at a time: a card has few threads for how far away its memory is, so each asks for 16 bytes, and
// for all that it will need, before it waits for any of it.

struct alignas(16) Four {
    float x[4];
};

// Eight bytes: four bf16, or eight weights of a byte.
struct alignas(8) Pair {
    u32 x[2];
};

// Threads of a block whose threads have four elements each, and elements of such a block.
constexpr u32 FOURS = 256, FOURS_WIDTH = 4 * FOURS;

// Where in its row a thread of such a block begins. Grid [rows, ceil(width / 1024)]: along y there are 65,535 blocks at most, and more
// rows of experts than that.
DEVICE u32 fours_at() { return blockIdx.y * FOURS_WIDTH + threadIdx.x * 4; }

// Whether elements `i` to `i + 3` lie in a row of `width`, and as 16 bytes can: of a row whose width divides by 4, and whose buffer
// begins where memory that was reserved does, all are.
DEVICE bool whole(const float* row, u32 i, u32 width) { return i + 4 <= width && (u64)row % 16 == 0; }

// Elements `i` to `i + 3` of a row, where `i` divides by 4. Those beyond its end are 0.
DEVICE Four load_four(const float* row, u32 i, u32 width) {
    if (whole(row, i, width)) return *(const Four*)(row + i);
    Four four = {};
#pragma unroll
    for (u32 e = 0; e < 4; e++) {
        if (i + e < width) four.x[e] = row[i + e];
    }
    return four;
}

DEVICE void store_four(float* row, u32 i, u32 width, const Four& four) {
    if (whole(row, i, width)) {
        *(Four*)(row + i) = four;
        return;
    }
#pragma unroll
    for (u32 e = 0; e < 4; e++) {
        if (i + e < width) row[i + e] = four.x[e];
    }
}

// In bf16. The rows of copies are whole numbers of 16 bytes apart; what lies behind a row's end stays zero.
DEVICE void store_halves(u16* row, u32 i, u32 width, const Four& four) {
    const Pair halves = {pack_bf16(four.x[0], four.x[1]), pack_bf16(four.x[2], four.x[3])};
    if (i + 4 <= width) {
        *(Pair*)(row + i) = halves;
        return;
    }
#pragma unroll
    for (u32 e = 0; e < 3; e++) {
        if (i + e < width) row[i + e] = (u16)(halves.x[e / 2] >> e % 2 * 16);
    }
}

// Leaves four elements of `out [rows, width]`, and their copy where there are copies.
template <class P>
DEVICE void put(const P& p, u64 row, u32 i, const Four& four) {
    store_four(p.out + row * p.width, i, p.width, four);
    if (p.half) store_halves(p.half + row * p.half_stride, i, p.width, four);
}

// What a thread of a block holds of the block's row: of all fours those that are so many threads apart, as far as `COUNT` go. Of wider
// rows the rest is read again, each time that it is needed.
template <u32 COUNT>
struct Held {
    Four fours[COUNT];

    DEVICE_MEMBER void load(const float* row, u32 width) {
#pragma unroll
        for (u32 i = 0; i < COUNT; i++) fours[i] = load_four(row, place(i), width);
    }
    // Where the `i`th begins.
    DEVICE_MEMBER static u32 place(u32 i) { return (i * blockDim.x + threadIdx.x) * 4; }
};
