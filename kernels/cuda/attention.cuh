// What the kernels of paged attention share, `attention.cu` and `attention_hopper.cu`: their structures, which query sees which key, and
// where an output goes.

struct Tile {
    // First row in the step, rows in the step, tokens in the cache: the sequence's.
    u32 first_row;
    u32 rows;
    u32 context;
    // First entry in the block table.
    u32 first_block;
    // First packed row.
    u32 packed;
    // Keys from, to. Of a tile that joins: packed rows from one part to the next, and parts.
    u32 from;
    u32 to;
    // Where the partial result of its first packed row is, those of the others follow; `WHOLE` when it is the whole.
    u32 partial;
};

constexpr u32 WHOLE = 0xffffffff;

struct Attention {
    const float* qkv;
    // This layer's.
    const void* keys;
    const void* values;
    const u32* blocks;
    const Tile* tiles;
    float* out;
    // A bf16 copy of `out`, or null.
    u16* half;
    // [partial, kv_head, 16, HEAD + 2]: outputs not divided, then the maximum and the sum.
    float* partials;
    // Of ALiBi, one for each query head; null: none.
    const float* slopes;
    u32 half_stride;
    u32 heads;
    u32 kv_heads;
    u32 head_dim;
    u32 block_size;
    // Used by attention_plain; the others are made for one.
    u32 cache_form;
    // 0: none.
    u32 window;
    // Of the scores, times log2 e (before a soft cap: without).
    float scale;
    // 0: none.
    float soft_cap;
};

constexpr float LOG2_E = 1.44269504f;

// A score in powers of 2.
DEVICE float score(const Attention& p, float product) {
    const float s = product * p.scale;
    return p.soft_cap > 0 ? p.soft_cap * tanhf(s / p.soft_cap) * LOG2_E : s * LOG2_E;
}

// What a query head adds to its scores for each position that a key lies behind the query, in powers of 2.
DEVICE float slope(const Attention& p, u32 head) { return p.slopes ? p.slopes[head] * LOG2_E : 0; }

// The same of packed rows g and g + 8 from `packed` on.
DEVICE void slopes_of(const Attention& p, u32 packed, u32 kv_head, float (&slopes)[2]) {
    const u32 group = p.heads / p.kv_heads, g = threadIdx.x % 32 / 4;
    for (u32 r = 0; r < 2; r++) slopes[r] = slope(p, kv_head * group + (packed + g + 8 * r) % group);
}

// Positions from the query to a key before it: 0 or less, and more for keys that it does not see.
DEVICE float behind(u32 position, u32 key) { return (float)(i32)(key - position); }

// Whether the query at a position sees a key.
DEVICE bool sees(const Attention& p, u32 position, u32 key) { return key <= position && (p.window == 0 || position - key < p.window); }

// Positions of packed rows g and g + 8 from `packed` on. Rows beyond the sequence's see nothing that matters.
DEVICE void positions_of(const Attention& p, const Tile& tile, u32 packed, u32 (&positions)[2]) {
    const u32 group = p.heads / p.kv_heads, g = threadIdx.x % 32 / 4;
    for (u32 r = 0; r < 2; r++) positions[r] = tile.context - tile.rows + smaller((packed + g + 8 * r) / group, tile.rows - 1);
}

// First key that any row from `packed` on sees, down to a multiple of 16.
DEVICE u32 first_key(const Attention& p, const Tile& tile, u32 packed) {
    const u32 position = tile.context - tile.rows + packed / (p.heads / p.kv_heads);
    const u32 first = p.window != 0 && position >= p.window ? position - p.window + 1 : 0;
    return larger(first, tile.from) / 16 * 16;
}

// The partial result of a packed row: its outputs not divided, then the maximum and the sum. Each row's are [kv_heads, head_dim + 2].
DEVICE float* partial_of(const Attention& p, u32 row, u32 kv_head) {
    return p.partials + ((u64)row * p.kv_heads + kv_head) * (p.head_dim + 2);
}

// Writes one output column of a packed row.
DEVICE void write(const Attention& p, const Tile& tile, u32 packed, u32 kv_head, u32 column, float value) {
    const u32 group = p.heads / p.kv_heads, row = packed / group;
    if (row >= tile.rows) return;
    const u32 at = (kv_head * group + packed % group) * p.head_dim + column;
    p.out[(u64)(tile.first_row + row) * p.heads * p.head_dim + at] = value;
    if (p.half) p.half[(u64)(tile.first_row + row) * p.half_stride + at] = to_bf16(value);
}
