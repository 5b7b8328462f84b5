// A mixture of experts: which experts a token goes to (moe_top_k), the order of the experts' rows (moe_align), the products of each
// expert's rows with its weights (expert_linear_*), and a token's share of them (moe_combine).
//
// The host knows how many routed rows there are (tokens times experts of each) and bounds how many tiles they make; which expert has how
// many is only known here, so a block of a product looks its tile up and ends when there is none. So a captured step replays whatever the
// routing. Rows that only pad a captured step are routed nowhere.
//
// Tiles have 8, 16 or 64 rows of one expert (`kernels/src/cuda/experts.rs` chooses): up to 16 they are bound by reading weights and
// computed as in `linear.cu`; with 64, weights and rows meet in shared memory, where weights are as bf16.

constexpr u32 NOWHERE = 0xffffffffu;

struct ExpertTile {
    u32 expert;
    // Routed rows.
    u32 first;
    u32 rows;
    u32 unused;
};

struct TopK {
    // [rows, experts]
    const float* logits;
    // How many rows do not pad.
    const u32* tokens;
    // [rows, each] experts, likeliest first, and their weights.
    u32* chosen;
    float* weights;
    u32 rows;
    u32 experts;
    u32 each;
    // Weights are shares of the chosen ones.
    u32 normalised;
};

// A warp for each row; grid [ceil(rows / 8)].
KERNEL(moe_top_k, 256, TopK) {
    const u32 lane = threadIdx.x % 32;
    const u64 row = blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= p.rows) return;
    u32* const chosen = p.chosen + row * p.each;
    if (row >= *p.tokens) {
        for (u32 i = lane; i < p.each; i += 32) chosen[i] = NOWHERE;
        return;
    }
    const float* const logits = p.logits + row * p.experts;
    float* const weights = p.weights + row * p.each;
    u64 last = ~0ull;
    float most = 0, sum = 0;
    for (u32 i = 0; i < p.each; i++) {
        // A logit as a number of the same order, the smaller expert first among equals; no two are equal, and none is 0 or `last`'s start.
        u64 best = 0;
        for (u32 expert = lane; expert < p.experts; expert += 32) {
            const u32 bits = as_bits(logits[expert]);
            const u64 key = (u64)(bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u)) << 32 | (0xfffffffeu - expert);
            if (key < last && key > best) best = key;
        }
        last = warp_largest(best);
        const u32 expert = 0xfffffffeu - (u32)last;
        const float logit = logits[expert];
        if (i == 0) most = logit;
        const float power = expf(logit - most);
        if (p.normalised) sum += power;
        if (lane == 0) {
            chosen[i] = expert;
            weights[i] = power;
        }
    }
    if (!p.normalised) {
        for (u32 expert = lane; expert < p.experts; expert += 32) sum += expf(logits[expert] - most);
        sum = warp_sum(sum);
    }
    warp_barrier();
    for (u32 i = lane; i < p.each; i += 32) weights[i] /= sum;
}

struct Align {
    const u32* chosen;
    // [entries] the entry of `chosen` that a routed row is for, and the row of an entry.
    u32* rows;
    u32* places;
    ExpertTile* tiles;
    u32* tile_count;
    u32 entries;
    u32 experts;
    // Rows of a tile.
    u32 height;
    u32 unused;
};

// Of the choices of a step each thread takes so many at a time, a block apart from each other, and asks for the next before it does anything
// with them.
constexpr u32 CHOICES = 4;

DEVICE void load_choices(const Align& p, u32 from, u32 (&chosen)[CHOICES]) {
#pragma unroll
    for (u32 i = 0; i < CHOICES; i++) {
        const u32 entry = from + i * blockDim.x + threadIdx.x;
        chosen[i] = entry < p.entries ? p.chosen[entry] : NOWHERE;
    }
}

// Sorts by expert; rows of one expert keep the order of their tokens. A block for each expert; shared memory: 4 bytes for each expert, for
// each warp and choice at the least, and 64.
KERNEL(moe_align, 256, Align) {
    SHARED(scratch);
    u64* const sums = (u64*)scratch;
    u32* const counts = (u32*)(scratch + 64);
    const u32 mine = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 all = CHOICES * blockDim.x, warps = blockDim.x / 32;
    u32 ahead[CHOICES];
    load_choices(p, 0, ahead);
    for (u32 i = threadIdx.x; i < p.experts; i += blockDim.x) counts[i] = 0;
    block_barrier();
    for (u32 from = 0; from < p.entries; from += all) {
        u32 chosen[CHOICES];
#pragma unroll
        for (u32 i = 0; i < CHOICES; i++) chosen[i] = ahead[i];
        load_choices(p, from + all, ahead);
#pragma unroll
        for (u32 i = 0; i < CHOICES; i++) {
            if (chosen[i] != NOWHERE) add_atomically(&counts[chosen[i]], 1);
        }
    }
    load_choices(p, 0, ahead);
    block_barrier();
    // Rows and tiles of the experts before, in one number.
    u64 before = 0;
    for (u32 i = threadIdx.x; i < mine; i += blockDim.x) before += (u64)((counts[i] + p.height - 1) / p.height) << 32 | counts[i];
    before = block_sum(before, sums);
    const u32 first = (u32)before, first_tile = (u32)(before >> 32), rows = counts[mine];
    const u32 tiles = (rows + p.height - 1) / p.height;
    for (u32 i = threadIdx.x; i < tiles; i += blockDim.x) {
        const u32 from = i * p.height;
        p.tiles[first_tile + i] = {mine, first + from, smaller(p.height, rows - from), 0};
    }
    if (mine == p.experts - 1 && threadIdx.x == 0) *p.tile_count = first_tile + tiles;
    if (rows == 0) return;

    u32 next = first;
    for (u32 from = 0; from < p.entries; from += all) {
        u32 votes[CHOICES], is_mine = 0;
#pragma unroll
        for (u32 i = 0; i < CHOICES; i++) {
            votes[i] = ballot(ahead[i] == mine);
            is_mine |= (u32)(ahead[i] == mine) << i;
        }
        load_choices(p, from + all, ahead);
        block_barrier();
        if (lane == 0) {
#pragma unroll
            for (u32 i = 0; i < CHOICES; i++) counts[i * warps + warp] = count_bits(votes[i]);
        }
        block_barrier();
#pragma unroll
        for (u32 i = 0; i < CHOICES; i++) {
            u32 place = next + count_bits(votes[i] & ((1u << lane) - 1));
            for (u32 other = 0; other < warps; other++) {
                const u32 count = counts[i * warps + other];
                if (other < warp) place += count;
                next += count;
            }
            if (!(is_mine >> i & 1)) continue;
            const u32 entry = from + i * blockDim.x + threadIdx.x;
            p.rows[place] = entry;
            p.places[entry] = place;
        }
    }
}

struct ExpertLinear {
    // bf16 [.., stride], padding zero; for f32 weights f32 [.., k].
    const void* x;
    // [experts], all of one form and size.
    const Weights* experts;
    // The entry that a routed row is for, where `x` has a row for each `each` of them; null where it has one for each.
    const u32* entries;
    const ExpertTile* tiles;
    const u32* tile_count;
    // [routed rows, n]
    float* out;
    u32 n;
    u32 each;
};

DEVICE u64 row_of_x(const ExpertLinear& p, const ExpertTile& tile, u32 row) {
    const u32 routed = tile.first + smaller(row, tile.rows - 1);
    return p.entries ? p.entries[routed] / p.each : routed;
}

// TILES: groups of 8 rows of a tile. Shared memory: 8 · 16 · 8 TILES floats. Grid [ceil(n / 16), tiles].
template <u32 FORM, u32 TILES>
DEVICE void expert_linear(const ExpertLinear& p) {
    SHARED(scratch);
    if (blockIdx.y >= *p.tile_count) return;
    float* const all = (float*)scratch;
    const ExpertTile tile = p.tiles[blockIdx.y];
    const Weights w = p.experts[tile.expert];
    const u32 g = threadIdx.x % 32 / 4, first = blockIdx.x * 16;
    u32 rows[TILES];
    for (u32 i = 0; i < TILES; i++) rows[i] = (u32)row_of_x(p, tile, i * 8 + g);
    few_rows<FORM, TILES>(w, first, p.x, rows, all);
    for (u32 i = threadIdx.x; i < 8 * TILES * 16; i += blockDim.x) {
        const u32 row = i / 16, feature = first + i % 16;
        if (row >= tile.rows || feature >= w.n) continue;
        p.out[(u64)(tile.first + row) * w.n + feature] = few_rows_sum<FORM, TILES>(w, feature, all, i);
    }
}

constexpr u32 BLOCK_ROWS = 64, BLOCK_FEATURES = 128, BLOCK_K = 64;

// Where the part of 8 elements at `column` of a row lies among rows of shared memory: [k / 32][row][32], so that a read of 8 rows by a warp
// meets every bank once. In the second half neighbours change places, so that a write of a row does, too.
DEVICE u32 part_at(u32 rows, u32 row, u32 column) { return (column / 32 * rows + (row ^ column / 32)) * 4 + column % 32 / 8; }

// 64 rows by 128 features for each block of 8 warps, 32 by 32 for each warp. Shared memory: two stretches of 64 elements of both, 48 KiB.
// Grid [ceil(n / 128), tiles].
template <u32 FORM>
DEVICE void expert_block(const ExpertLinear& p) {
    SHARED(scratch);
    if (blockIdx.y >= *p.tile_count) return;
    const ExpertTile tile = p.tiles[blockIdx.y];
    const Weights w = p.experts[tile.expert];
    constexpr u32 EACH = Stretch<FORM>::EACH, ACROSS = BLOCK_K / EACH, READS = BLOCK_FEATURES * ACROSS / 256;
    constexpr u32 X_PARTS = BLOCK_ROWS * BLOCK_K / 8, W_PARTS = BLOCK_FEATURES * BLOCK_K / 8;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 first = blockIdx.x * BLOCK_FEATURES, my_row = warp % 2 * 32, my_feature = warp / 2 * 32;
    Quad* const shared = (Quad*)scratch;
    // Of x, a thread brings the same 8 columns of two rows; of the weights, `EACH` elements of `READS` rows.
    const u32 x_row = threadIdx.x / 8, x_column = threadIdx.x % 8 * 8;
    const u16* const x[2] = {(const u16*)p.x + row_of_x(p, tile, x_row) * w.stride + x_column,
                             (const u16*)p.x + row_of_x(p, tile, x_row + 32) * w.stride + x_column};
    Quad rows[2];
    Stretch<FORM> weights[READS];
    const auto load = [&](u32 k) {
#pragma unroll
        for (u32 i = 0; i < 2; i++) rows[i] = *(const Quad*)(x[i] + k);
#pragma unroll
        for (u32 i = 0; i < READS; i++) {
            const u32 item = threadIdx.x + i * 256;
            weights[i].load(w, smaller(first + item / ACROSS, w.n - 1), k + item % ACROSS * EACH);
        }
    };
    const auto store = [&](u32 half) {
        Quad* const to_x = shared + half * (X_PARTS + W_PARTS);
        Quad* const to_w = to_x + X_PARTS;
#pragma unroll
        for (u32 i = 0; i < 2; i++) to_x[part_at(BLOCK_ROWS, x_row + i * 32, x_column)] = rows[i];
#pragma unroll
        for (u32 i = 0; i < READS; i++) {
            const u32 item = threadIdx.x + i * 256;
#pragma unroll
            for (u32 part = 0; part < EACH / 8; part++) {
                u32 words[4];
                weights[i].take(words);
                const u32 at = part_at(BLOCK_FEATURES, item / ACROSS, item % ACROSS * EACH + part * 8);
                to_w[at] = {words[0], words[1], words[2], words[3]};
            }
        }
    };

    float sums[2][4][4] = {};
    load(0);
    store(0);
    block_barrier();
    for (u32 k = 0, half = 0; k < w.stride; k += BLOCK_K, half ^= 1) {
        const bool more = k + BLOCK_K < w.stride;
        if (more) load(k + BLOCK_K);
        const Quad* const from_x = shared + half * (X_PARTS + W_PARTS);
        const Quad* const from_w = from_x + X_PARTS;
#pragma unroll
        for (u32 column = 0; column < BLOCK_K; column += 32) {
            Quad right[4];
#pragma unroll
            for (u32 j = 0; j < 4; j++) right[j] = from_x[part_at(BLOCK_ROWS, my_row + j * 8 + g, column + t * 8)];
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                const Quad a = from_w[part_at(BLOCK_FEATURES, my_feature + i * 16 + g, column + t * 8)];
                const Quad b = from_w[part_at(BLOCK_FEATURES, my_feature + i * 16 + 8 + g, column + t * 8)];
                const u32 even[4] = {a.x[0], b.x[0], a.x[1], b.x[1]}, odd[4] = {a.x[2], b.x[2], a.x[3], b.x[3]};
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    multiply(sums[i][j], even, right[j].x[0], right[j].x[1]);
                    multiply(sums[i][j], odd, right[j].x[2], right[j].x[3]);
                }
            }
        }
        // Nobody reads the other half any more: all were done with it before the last barrier.
        if (more) store(half ^ 1);
        block_barrier();
    }

#pragma unroll
    for (u32 i = 0; i < 2; i++) {
#pragma unroll
        for (u32 lower = 0; lower < 2; lower++) {
            const u32 feature = first + my_feature + i * 16 + lower * 8 + g;
            if (feature >= w.n) continue;
            const float scale = FORM == FORM_INT8 || FORM == FORM_FP8 ? ((const float*)w.scales)[feature] : 1.0f;
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
#pragma unroll
                for (u32 odd = 0; odd < 2; odd++) {
                    const u32 row = my_row + j * 8 + 2 * t + odd;
                    if (row < tile.rows) p.out[(u64)(tile.first + row) * w.n + feature] = sums[i][j][lower * 2 + odd] * scale;
                }
            }
        }
    }
}

#define EXPERT_LINEAR(form, FORM) \
    KERNEL(expert_linear_##form##_8, 256, ExpertLinear) { expert_linear<FORM, 1>(p); } \
    KERNEL(expert_linear_##form##_16, 256, ExpertLinear) { expert_linear<FORM, 2>(p); } \
    KERNEL_PAIR(expert_linear_##form##_64, 256, ExpertLinear) { expert_block<FORM>(p); }
EXPERT_LINEAR(bf16, FORM_BF16)
EXPERT_LINEAR(int8, FORM_INT8)
EXPERT_LINEAR(fp8, FORM_FP8)
EXPERT_LINEAR(int4, FORM_INT4)

// A warp for each feature, which takes the tile's rows one after the other; grid [ceil(n / 8), tiles].
KERNEL(expert_linear_f32, 256, ExpertLinear) {
    const u32 feature = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (feature >= p.n || blockIdx.y >= *p.tile_count) return;
    const ExpertTile tile = p.tiles[blockIdx.y];
    const Weights w = p.experts[tile.expert];
    const float* const weights = (const float*)w.data + (u64)feature * w.stride;
    for (u32 row = 0; row < tile.rows; row++) {
        const float* const x = (const float*)p.x + row_of_x(p, tile, row) * w.k;
        float sum = 0;
        for (u32 i = lane; i < w.k; i += 32) sum += x[i] * weights[i];
        sum = warp_sum(sum);
        if (lane == 0) p.out[(u64)(tile.first + row) * w.n + feature] = sum;
    }
}

struct Combine {
    // [routed rows, width]
    const float* x;
    // [rows, each]
    const float* weights;
    const u32* places;
    const u32* tokens;
    float* out;
    u32 width;
    u32 each;
    // 1 adds to `out`, 0 replaces it.
    u32 add;
    u32 unused;
};

// Grid [rows, ceil(width / 256)].
KERNEL(moe_combine, 256, Combine) {
    const u64 row = blockIdx.x;
    const u32 i = blockIdx.y * blockDim.x + threadIdx.x;
    if (i >= p.width) return;
    float sum = p.add ? p.out[row * p.width + i] : 0.0f;
    if (row >= *p.tokens) {
        // Nothing comes to a row that pads. It may be summed up over ranks, layer after layer.
        p.out[row * p.width + i] = sum;
        return;
    }
    for (u32 choice = 0; choice < p.each; choice++) {
        const u64 entry = row * p.each + choice;
        sum += p.weights[entry] * p.x[(u64)p.places[entry] * p.width + i];
    }
    p.out[row * p.width + i] = sum;
}

struct GateRows {
    // [rows]
    const float* gate;
    float* x;
    u16* half;
    u32 width;
    u32 half_stride;
};

// x *= sigmoid(gate); grid [rows, ceil(width / 256)].
KERNEL(gate_rows, 256, GateRows) {
    const u64 row = blockIdx.x;
    const u32 i = blockIdx.y * blockDim.x + threadIdx.x;
    if (i >= p.width) return;
    const float value = p.x[row * p.width + i] / (1.0f + expf(-p.gate[row]));
    p.x[row * p.width + i] = value;
    if (p.half) p.half[row * p.half_stride + i] = to_bf16(value);
}
