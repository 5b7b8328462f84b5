// Low-rank updates of adapters, out += scale · B (A x), each row by the factors of its own adapter, in two launches: A x into a room
// (lora_shrink), then the room times B (lora_expand), as the segmented kernels of Punica (Chen et al. 2023) and S-LoRA (Sheng et al. 2023).
//
// Both products are tiny beside the layer's own, so what counts is how long the longest chain of reads is: one block for a row would walk its
// inner dimension alone while the card idles. So the inner dimension is cut into slices of 512, which warps sum up one for each, all
// reads of one under way at once; they are added in their order by whoever reads them. The lengths are questions of the shapes alone, and no sum
// spans two rows, so a row's result does not depend on its company.
//
// The host sorts a step's rows by adapter and cuts them into tiles of up to 16 rows of one adapter, which share what is read of its
// factors. A tile of no rows, of a captured step, has nothing to do.

constexpr u32 TILE_ROWS = 16;
// Of A, that a warp multiplies with.
constexpr u32 RANKS = 4;
// Of the inner dimension, and elements that a lane reads of it at once, times 4.
constexpr u32 SLICE = 512, STEPS = SLICE / 128;
// Ranks of B that a thread holds at once.
constexpr u32 CHUNK = 32;

struct LoraPart {
    // [rank, n]: transposed, so that a warp reads neighbours.
    const float* b;
    u32 column;
    u32 n;
    u32 rank;
    // Where its ranks begin among the site's.
    u32 first_rank;
    float scale;
    u32 unused;
};

struct LoraSite {
    // [ranks, stride]: of all parts, one below the other. Rows are padded with zeros to whole Quads.
    const float* a;
    u32 first;
    u32 count;
    u32 ranks;
    u32 unused;
};

struct LoraTile {
    u32 slot;
    // In the list of rows.
    u32 first;
    u32 count;
};

struct Lora {
    const float* x;
    float* out;
    // [tiles, slices, 16, ranks]
    float* inner;
    // Rows of `x` and `out`, tile by tile.
    const u32* rows;
    const LoraTile* tiles;
    // [slots, sites_per_slot]
    const LoraSite* sites;
    const LoraPart* parts;
    u32 sites_per_slot;
    u32 site;
    u32 x_width;
    u32 out_width;
    // The most that an adapter has at this site, a multiple of 4.
    u32 ranks;
    u32 unused;
};

DEVICE u32 slices_of(const Lora& p) { return (p.x_width + SLICE - 1) / SLICE; }

// The slice's results are those of 16 rows, `ranks` of each.
DEVICE u64 inner_at(const Lora& p, u32 slice, u32 row) { return (((u64)blockIdx.x * slices_of(p) + slice) * TILE_ROWS + row) * p.ranks; }

// Four neighbours of a row, with zeros behind its end. Only rows of whole Quads begin where one may.
DEVICE Quad four_of(const float* row, u32 column, u32 width) {
    Quad four = {};
    if (width % 4 == 0) {
        if (column < width) four = *(const Quad*)(row + column);
        return four;
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        if (column + i < width) four.x[i] = as_bits(row[column + i]);
    }
    return four;
}

// inner = A x. A warp for each slice of four ranks, which holds its piece of A while the tile's rows pass by; the warps of a block
// have the same slice where they can, so a row comes from the second-level cache once. Grid [tiles, ceil(ranks / 4 · slices / 8)].
KERNEL(lora_shrink, 256, Lora) {
    const u32 lane = threadIdx.x % 32;
    const LoraTile tile = p.tiles[blockIdx.x];
    if (tile.count == 0) return;
    const LoraSite site = p.sites[(u64)tile.slot * p.sites_per_slot + p.site];
    const u32 groups = (site.ranks + RANKS - 1) / RANKS, item = blockIdx.y * 8 + threadIdx.x / 32;
    if (item >= groups * slices_of(p)) return;
    const u32 rank = item % groups * RANKS, slice = item / groups, column = slice * SLICE + lane * 4;
    const u32* const rows = p.rows + tile.first;
    Quad a[RANKS][STEPS], x[STEPS], next[STEPS] = {};
    const u32 stride = (p.x_width + 3) / 4 * 4;
#pragma unroll
    for (u32 r = 0; r < RANKS; r++) {
        // What is beyond the last is computed and not read.
        const float* const from = site.a + (u64)smaller(rank + r, site.ranks - 1) * stride;
#pragma unroll
        for (u32 i = 0; i < STEPS; i++) {
            a[r][i] = {};
            if (column + i * 128 < stride) a[r][i] = load_once(from + column + i * 128);
        }
    }
    const float* from = p.x + (u64)rows[0] * p.x_width;
#pragma unroll
    for (u32 i = 0; i < STEPS; i++) x[i] = four_of(from, column + i * 128, p.x_width);
    for (u32 row = 0; row < tile.count; row++) {
        if (row + 1 < tile.count) {
            from = p.x + (u64)rows[row + 1] * p.x_width;
#pragma unroll
            for (u32 i = 0; i < STEPS; i++) next[i] = four_of(from, column + i * 128, p.x_width);
        }
        float sums[RANKS] = {};
#pragma unroll
        for (u32 i = 0; i < STEPS; i++) {
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
#pragma unroll
                for (u32 r = 0; r < RANKS; r++) sums[r] += as_float(a[r][i].x[j]) * as_float(x[i].x[j]);
            }
            x[i] = next[i];
        }
        // Four sums over a warp in six exchanges: each of the first ones halves how many a lane still adds up. 8 lanes end with one.
        const bool upper = lane & 16, odd = lane & 8;
        const float low = (upper ? sums[2] : sums[0]) + shuffle_xor(upper ? sums[0] : sums[2], 16);
        const float high = (upper ? sums[3] : sums[1]) + shuffle_xor(upper ? sums[1] : sums[3], 16);
        float sum = (odd ? high : low) + shuffle_xor(odd ? low : high, 8);
        for (u32 mask = 4; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        if (lane % 8 == 0) p.inner[inner_at(p, slice, row) + rank + lane / 8] = sum;
    }
}

// out += scale · B inner. A thread for each column, whose factors it holds for all rows of the tile. Shared memory: 32 ranks of
// 16 rows. Grid [tiles, the sum of ceil(n / 256) over the parts].
KERNEL(lora_expand, 256, Lora) {
    SHARED(scratch);
    const LoraTile tile = p.tiles[blockIdx.x];
    if (tile.count == 0) return;
    const LoraSite site = p.sites[(u64)tile.slot * p.sites_per_slot + p.site];
    LoraPart part = {};
    u32 block = blockIdx.y, which = 0;
    for (;; which++) {
        if (which == site.count) return;
        part = p.parts[site.first + which];
        const u32 blocks = (part.n + 255) / 256;
        if (block < blocks) break;
        block -= blocks;
    }
    const u32 column = block * 256 + threadIdx.x;
    const bool mine = column < part.n;
    const float* const b = part.b + smaller(column, part.n - 1);
    float* const out = p.out + part.column + column;
    float before[TILE_ROWS], sums[TILE_ROWS] = {};
#pragma unroll
    for (u32 i = 0; i < TILE_ROWS; i++) {
        before[i] = 0;
        if (mine && i < tile.count) before[i] = out[(u64)p.rows[tile.first + i] * p.out_width];
    }
    const u32 slices = slices_of(p);
    for (u32 first = 0; first < part.rank; first += CHUNK) {
        const u32 ranks = smaller(CHUNK, part.rank - first);
        float factors[CHUNK];
#pragma unroll
        for (u32 r = 0; r < CHUNK; r++) factors[r] = r < ranks ? b[(u64)(first + r) * part.n] : 0.0f;
        if (first > 0) block_barrier();
        for (u32 i = threadIdx.x; i < TILE_ROWS * ranks; i += blockDim.x) {
            const u32 row = i / ranks, r = i % ranks;
            float sum = 0;
            if (row < tile.count) {
                const float* const inner = p.inner + inner_at(p, 0, row) + part.first_rank + first + r;
#pragma unroll 8
                for (u32 slice = 0; slice < slices; slice++) sum += inner[(u64)slice * TILE_ROWS * p.ranks];
            }
            ((u32*)scratch)[r * TILE_ROWS + row] = as_bits(part.scale * sum);
        }
        block_barrier();
#pragma unroll
        for (u32 r = 0; r < CHUNK; r++) {
            if (r >= ranks) break;
#pragma unroll
            for (u32 four = 0; four < TILE_ROWS / 4; four++) {
                if (four * 4 >= tile.count) break;
                const Quad inner = ((const Quad*)scratch)[r * TILE_ROWS / 4 + four];
#pragma unroll
                for (u32 i = 0; i < 4; i++) sums[four * 4 + i] += factors[r] * as_float(inner.x[i]);
            }
        }
    }
#pragma unroll
    for (u32 i = 0; i < TILE_ROWS; i++) {
        if (mine && i < tile.count) out[(u64)p.rows[tile.first + i] * p.out_width] = before[i] + sums[i];
    }
}
