// Paged attention of many rows on cards of compute capability 9.0: the same results as `attention_many` in `attention.cu`, from the same
// tiles, with products of warpgroups. Which of the two a card uses is found out by `kernels/src/cuda/trial.rs`.
//
// A tile is 128 packed rows, 64 for each of two warpgroups, all with the same keys. Keys and values come in stretches of KEYS, which begin at
// multiples of it, so a row's result does not depend on what else is in the step. While the matrix units have a stretch, the next one is on
// its way into the other half of shared memory, 16 bytes a copy: pages may be anywhere, tokens that are not there become zeros (values that
// nobody has written may be NaN, and 0 times NaN is NaN), and no map of the cache is to be made by the host as for bulk copies.
//
// Queries, keys and values are panels of 64 elements (see `in_panel`). Scores stay in registers: what a product gives is what
// the next one takes, two elements to a word. One warpgroup's powers run beside the other's products.

constexpr u32 KEYS = 128, ROWS = 128, PANEL = 128 * 128;

// Puts the tile's rows into shared memory, those beyond the sequence's as 0.
template <u32 HEAD>
DEVICE void load_queries(const Attention& p, const Tile& tile, u32 kv_head, u32 to) {
    const u32 group = p.heads / p.kv_heads, width = (p.heads + 2 * p.kv_heads) * HEAD;
    for (u32 i = threadIdx.x; i < ROWS * (HEAD / 8); i += 256) {
        const u32 place = i / (HEAD / 8), piece = i % (HEAD / 8), packed = tile.packed + place, row = packed / group;
        Quad q = {};
        if (row < tile.rows) {
            const float* const from = p.qkv + (u64)(tile.first_row + row) * width + (kv_head * group + packed % group) * HEAD + piece * 8;
            for (u32 c = 0; c < 4; c++) q.x[c] = pack_bf16(from[2 * c], from[2 * c + 1]);
        }
        store_16(to + piece / 8 * PANEL + in_panel(place, piece % 8), q);
    }
}

// Begins to copy the keys and values from `key` on: the panels of keys, then those of values.
template <u32 HEAD>
DEVICE void load_stretch(const Attention& p, const Tile& tile, u32 kv_head, u32 key, u32 to) {
    // Rows that the block's threads copy at once.
    constexpr u32 PIECES = HEAD / 8, EACH = 256 / PIECES;
    const u32 piece = threadIdx.x % PIECES, row = threadIdx.x / PIECES;
    const u32 place = to + piece / 8 * PANEL + in_panel(row, piece % 8);
    u32 page = (key + row) / p.block_size, offset = (key + row) % p.block_size;
#pragma unroll
    for (u32 i = 0; i < KEYS; i += EACH) {
        const bool there = key + row + i < tile.context;
        const u64 block = there ? p.blocks[tile.first_block + page] : 0;
        const u64 from = ((block * p.kv_heads + kv_head) * p.block_size + offset) * HEAD + piece * 8;
        copy_16(place + i * 128, (const u16*)p.keys + from, there);
        copy_16(place + i * 128 + HEAD / 64 * PANEL, (const u16*)p.values + from, there);
        for (offset += EACH; offset >= p.block_size; offset -= p.block_size) page++;
    }
}

// Products of 64 queries with KEYS keys to powers, sums and what is left of earlier sums. `from`: the first key; `packed`: the warp's first row.
DEVICE void soften(const Attention& p, u32 packed, u32 kv_head, const u32 (&positions)[2], u32 from, bool all_seen, float (&s)[KEYS / 2], float (&most)[2],
                   float (&sum)[2], float (&shrink)[2]) {
    const u32 t = threadIdx.x % 4;
    if (p.soft_cap > 0) {
#pragma unroll
        for (u32 i = 0; i < KEYS / 2; i++) s[i] = p.soft_cap * tanhf(s[i] * p.scale / p.soft_cap) * LOG2_E;
    } else {
        const float factor = p.scale * LOG2_E;
#pragma unroll
        for (u32 i = 0; i < KEYS / 2; i++) s[i] *= factor;
    }
    if (p.slopes) {
        // Read for each stretch: registers are scarce here.
        float slopes[2];
        slopes_of(p, packed, kv_head, slopes);
        const float first[2] = {behind(positions[0], from + 2 * t), behind(positions[1], from + 2 * t)};
#pragma unroll
        for (u32 i = 0; i < KEYS / 2; i++) s[i] += slopes[i % 4 / 2] * (first[i % 4 / 2] + (float)(i / 4 * 8 + i % 2));
    }
    if (!all_seen) {
#pragma unroll
        for (u32 i = 0; i < KEYS / 2; i++) {
            if (!sees(p, positions[i % 4 / 2], from + i / 4 * 8 + 2 * t + i % 2)) s[i] = -INFINITE;
        }
    }
    float now[2] = {most[0], most[1]};
#pragma unroll
    for (u32 i = 0; i < KEYS / 2; i++) now[i % 4 / 2] = fmaxf(now[i % 4 / 2], s[i]);
    float base[2];
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        now[r] = fmaxf(now[r], shuffle_xor(now[r], 1));
        now[r] = fmaxf(now[r], shuffle_xor(now[r], 2));
        // A row that has seen no key yet: exponents of -infinity less 0, not less -infinity.
        base[r] = now[r] == -INFINITE ? 0 : now[r];
        shrink[r] = power_of_2(most[r] - base[r]);
        most[r] = now[r];
        sum[r] *= shrink[r];
    }
#pragma unroll
    for (u32 i = 0; i < KEYS / 2; i++) {
        s[i] = power_of_2(s[i] - base[i % 4 / 2]);
        sum[i % 4 / 2] += s[i];
    }
}

// Grid [tiles, kv_heads]. Shared memory: 5 HEAD / 64 panels, and 1024 bytes to begin them at a multiple of as many.
template <u32 HEAD>
DEVICE void attention_hopper(const Attention& p) {
    SHARED(shared);
    constexpr u32 PANELS = HEAD / 64;
    // Tiles that see most keys begin first: they are a sequence's last.
    const Tile tile = p.tiles[gridDim.x - 1 - blockIdx.x];
    const u32 kv_head = blockIdx.y, group = p.heads / p.kv_heads, before = tile.context - tile.rows;
    const u32 queries = (shared_address(shared) + 1023) / 1024 * 1024, stretches = queries + PANELS * PANEL;
    // The warpgroup's rows, and keys that they see: those of its first and its last row.
    const u32 half = uniform(threadIdx.x / 128), packed = tile.packed + half * 64;
    const auto end_of = [&](u32 row) { return before + smaller(row / group, tile.rows - 1) + 1; };
    const bool idle = packed >= tile.rows * group;
    const u32 own_from = first_key(p, tile, packed), own_to = idle ? 0 : smaller(end_of(packed + 63), tile.to);
    const u32 to = smaller(end_of(tile.packed + ROWS - 1), tile.to);
    // The warp's.
    const u32 warp = packed + threadIdx.x / 32 % 4 * 16;
    u32 positions[2];
    positions_of(p, tile, warp, positions);

    float out[HEAD / 2] = {}, most[2] = {-INFINITE, -INFINITE}, sum[2] = {0, 0};
    u32 key = first_key(p, tile, tile.packed) / KEYS * KEYS, at = stretches;
    // A part may be of keys that nobody in the tile sees.
    if (key < to) load_stretch<HEAD>(p, tile, kv_head, key, at);
    end_copies();
    load_queries<HEAD>(p, tile, kv_head, queries);
    for (; key < to; key += KEYS) {
        wait_copies<0>();
        publish_shared();
        // From here on the stretch is there for all, and nobody uses the one before.
        block_barrier();
        const u32 next = at == stretches ? stretches + 2 * PANELS * PANEL : stretches;
        const auto load_next = [&] {
            if (key + KEYS < to) load_stretch<HEAD>(p, tile, kv_head, key + KEYS, next);
            end_copies();
        };
        if (key < own_to && key + KEYS > own_from) {
            float s[KEYS / 2] = {};
            hold(s);
            begin_products();
#pragma unroll
            for (u32 k = 0; k < HEAD; k += 16) {
                const u32 inside = k / 64 * PANEL + k % 64 * 2;
                multiply_shared(s, operand(queries + half * 64 * 128 + inside, 16, 1024), operand(at + inside, 16, 1024), k > 0);
            }
            end_products();
            load_next();
            wait_products();
            hold(s);
            const u32 last = end_of(warp + 15) - 1;
            const bool all_seen = key + KEYS <= end_of(warp) && (p.window == 0 || last - key < p.window);
            float shrink[2];
            soften(p, warp, kv_head, positions, key, all_seen, s, most, sum, shrink);
            u32 weights[KEYS / 16][4];
#pragma unroll
            for (u32 i = 0; i < KEYS / 16; i++) {
#pragma unroll
                for (u32 c = 0; c < 4; c++) weights[i][c] = pack_bf16(s[8 * i + 2 * c], s[8 * i + 2 * c + 1]);
            }
#pragma unroll
            for (u32 i = 0; i < HEAD / 2; i++) out[i] *= shrink[i % 4 / 2];
            hold(out);
            hold(weights);
            begin_products();
#pragma unroll
            for (u32 i = 0; i < KEYS / 16; i++) multiply_held(out, weights[i], operand(at + PANELS * PANEL + i * 2048, PANEL, 1024));
            end_products();
            wait_products();
            hold(out);
        } else {
            load_next();
        }
        at = next;
    }
    if (idle) return;
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        sum[r] += shuffle_xor(sum[r], 1);
        sum[r] += shuffle_xor(sum[r], 2);
        const u32 place = threadIdx.x % 32 / 4 + 8 * r;
        const u32 row = warp + place;
        if (row >= tile.rows * group) continue;
        const bool whole = tile.partial == WHOLE;
        float* const part = partial_of(p, whole ? 0 : tile.partial + row - tile.packed, kv_head);
#pragma unroll
        for (u32 i = 0; i < HEAD / 4; i++) {
            const u32 column = i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2;
            const float value = out[i / 2 * 4 + 2 * r + i % 2];
            if (whole) {
                write(p, tile, row, kv_head, column, value / sum[r]);
            } else {
                part[column] = value;
            }
        }
        if (!whole && threadIdx.x % 4 == 0) {
            part[HEAD] = most[r];
            part[HEAD + 1] = sum[r];
        }
    }
}

KERNEL_ALONE(attention_hopper_64, 256, Attention) { attention_hopper<64>(p); }
KERNEL_ALONE(attention_hopper_128, 256, Attention) { attention_hopper<128>(p); }
