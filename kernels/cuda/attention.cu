// Paged attention of a ragged step: prefill in chunks and decode in one call.
//
// Query rows are packed: for one key-value head, packed row q of a sequence is its step row q / G and query head q % G of the G that
// share the head. A tile is 16 packed rows, so a decoded token with grouped heads fills one, and matrix units are used there, too.
// The host plans tiles once per step (`kernels/src/cuda/plan.rs`):
//   attention_few   16 packed rows; the 4 warps of a block take turns over the keys and join at the end. Long contexts are cut
//                   into parts of a fixed number of keys, joined by attention_join.
//   attention_many  64 packed rows, 16 for each warp, each over all its keys. Where a few new tokens follow a long context, it is cut
//                   into parts, too.
//   attention_plain a warp for each row and head, for every head width and for caches in f32.
//
// Keys and values of a block of 32 tokens and one head lie together: [block, kv_head, 32, head_dim]. Fragments are read from there
// into registers, 16 bytes a lane (8 of 8-bit floats): columns of k are given to the operands' places as it suits the reading (see `multiply`), and
// output columns, too: column g of output tile i of a piece of 64 is the actual column 8 g + i.
//
// Softmax is online (Milakov and Gimelshein 2018) in powers of 2. Parts have fixed borders, so a row's result does not depend on
// what else is in the step.

template <u32 HEAD>
struct Running {
    float out[HEAD / 8][4] = {};
    // Rows g and g + 8.
    float most[2] = {-INFINITE, -INFINITE};
    // Of this lane's columns.
    float sum[2] = {0, 0};
};

struct alignas(8) Words {
    u32 x[2];
};

// Puts 16 packed rows into shared memory as bf16 [16, HEAD], rows beyond the sequence's as 0. By THREADS threads, of which this is the
// `mine`th; they are to meet at a barrier before anybody reads.
template <u32 HEAD, u32 THREADS>
DEVICE void load_queries(const Attention& p, const Tile& tile, u32 packed, u32 kv_head, u32 mine, u16* to) {
    constexpr u32 FOURS = HEAD / 4, EACH = 16 * FOURS / THREADS, AT_ONCE = EACH < 4 ? EACH : 4;
    const u32 group = p.heads / p.kv_heads, width = (p.heads + 2 * p.kv_heads) * HEAD;
    for (u32 done = 0; done < EACH; done += AT_ONCE) {
        // All reads first: every thread of the block waits for them.
        Quad four[AT_ONCE];
#pragma unroll
        for (u32 n = 0; n < AT_ONCE; n++) {
            const u32 item = mine + (done + n) * THREADS, i = packed + item / FOURS, row = i / group;
            const float* const from = p.qkv + (u64)(tile.first_row + row) * width + (kv_head * group + i % group) * HEAD;
            four[n] = row < tile.rows ? *(const Quad*)(from + item % FOURS * 4) : Quad{};
        }
#pragma unroll
        for (u32 n = 0; n < AT_ONCE; n++) {
            const u32* const x = four[n].x;
            *(Words*)(to + (mine + (done + n) * THREADS) * 4) = {
                {pack_bf16(as_float(x[0]), as_float(x[1])), pack_bf16(as_float(x[2]), as_float(x[3]))}};
        }
    }
}

// 8 elements of a cache as bf16, from `at` on, which is a multiple of 8.
template <u32 CACHE>
DEVICE Quad eight(const void* cache, u64 at) {
    if (CACHE == CACHE_BF16) return *(const Quad*)((const u16*)cache + at);
    const Words words = *(const Words*)((const u8*)cache + at);
    Quad q;
    for (u32 i = 0; i < 4; i++) q.x[i] = from_e4m3(words.x[i / 2], i % 2);
    return q;
}

// The block of the cache that holds a key, which may be beyond `to`: then any.
DEVICE u32 block_of(const Attention& p, const Tile& tile, u32 key, u32 to) {
    return key < to ? p.blocks[tile.first_block + key / p.block_size] : 0;
}

// 16 keys, from `key` on, which is a multiple of 16 and in `block`; so are blocks' sizes, and all 16 lie in this one.
template <u32 HEAD, u32 CACHE>
DEVICE void attend(const Attention& p, const Tile& tile, u32 kv_head, const u16* queries, const u32 (&positions)[2],
                   const float (&slopes)[2], u32 key, u32 block, Running<HEAD>& running) {
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u64 start = (((u64)block * p.kv_heads + kv_head) * p.block_size + key % p.block_size) * HEAD;

    // Values of keys that nobody has written may be anything, and 0 times NaN is NaN. They are read all the same: a read without a
    // condition need not wait for one.
    const auto load_values = [&](u32 piece, Quad(&to)[4]) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) to[i] = eight<CACHE>(p.values, start + (i / 2 * 8 + 2 * t + i % 2) * HEAD + piece * 64 + g * 8);
    };
    const auto drop_unwritten = [&](Quad(&values)[4]) {
        if (key + 16 <= tile.context) return;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            if (key + i / 2 * 8 + 2 * t + i % 2 >= tile.context) values[i] = Quad{};
        }
    };
    // Read ahead of the scores where registers allow it.
    constexpr bool AHEAD = HEAD <= 128;
    Quad v[AHEAD ? HEAD / 64 : 1][4];
    if (AHEAD) {
#pragma unroll
        for (u32 piece = 0; piece < HEAD / 64; piece++) load_values(piece, v[AHEAD ? piece : 0]);
    }

    float s[2][4] = {};
#pragma unroll
    for (u32 c = 0; c < HEAD; c += 32) {
        const Quad above = *(const Quad*)(queries + g * HEAD + c + t * 8), below = *(const Quad*)(queries + (g + 8) * HEAD + c + t * 8);
        const u32 even[4] = {above.x[0], below.x[0], above.x[1], below.x[1]}, odd[4] = {above.x[2], below.x[2], above.x[3], below.x[3]};
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            const Quad k = eight<CACHE>(p.keys, start + (half * 8 + g) * HEAD + c + t * 8);
            multiply(s[half], even, k.x[0], k.x[1]);
            multiply(s[half], odd, k.x[2], k.x[3]);
        }
    }

    float most[2] = {running.most[0], running.most[1]};
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 at = key + half * 8 + 2 * t + i % 2;
            float value = score(p, s[half][i]);
            if (p.slopes) value += slopes[i / 2] * behind(positions[i / 2], at);
            // The comparison also drops what unwritten keys gave.
            s[half][i] = at < tile.to && sees(p, positions[i / 2], at) ? value : -INFINITE;
            most[i / 2] = fmaxf(most[i / 2], s[half][i]);
        }
    }
    float base[2], shrink[2];
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        most[r] = fmaxf(most[r], shuffle_xor(most[r], 1));
        most[r] = fmaxf(most[r], shuffle_xor(most[r], 2));
        // A row that has seen no key yet: exponents of -infinity less 0, not less -infinity.
        base[r] = most[r] == -INFINITE ? 0 : most[r];
        shrink[r] = power_of_2(running.most[r] - base[r]);
        running.most[r] = most[r];
        running.sum[r] *= shrink[r];
    }
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            s[half][i] = power_of_2(s[half][i] - base[i / 2]);
            running.sum[i / 2] += s[half][i];
        }
    }
    const u32 weights[4] = {pack_bf16(s[0][0], s[0][1]), pack_bf16(s[0][2], s[0][3]), pack_bf16(s[1][0], s[1][1]),
                            pack_bf16(s[1][2], s[1][3])};
#pragma unroll
    for (u32 piece = 0; piece < HEAD / 64; piece++) {
        Quad(&own)[4] = v[AHEAD ? piece : 0];
        if (!AHEAD) load_values(piece, own);
        drop_unwritten(own);
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            float(&out)[4] = running.out[piece * 8 + i];
#pragma unroll
            for (u32 c = 0; c < 4; c++) out[c] *= shrink[c / 2];
            // Element i of two keys' columns, next to each other.
            u32 pairs[2];
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                const u32 one = own[half * 2].x[i / 2], two = own[half * 2 + 1].x[i / 2];
                pairs[half] = i % 2 == 0 ? (one & 0xffffu) | two << 16 : one >> 16 | (two & 0xffff0000u);
            }
            multiply(out, weights, pairs[0], pairs[1]);
        }
    }
}

// Packed rows of a tile of few that exist: partial results are written and read of these alone.
DEVICE u32 rows_of(const Attention& p, const Tile& tile) { return smaller(tile.rows * (p.heads / p.kv_heads) - tile.packed, 16); }

// Grid [tiles, kv_heads]. Shared memory: 16 HEAD bf16 and 4 · 16 (HEAD + 2) floats.
template <u32 HEAD, u32 CACHE>
DEVICE void attention_few(const Attention& p) {
    SHARED(shared);
    const Tile tile = p.tiles[blockIdx.x];
    const u32 kv_head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    // One that pads a captured step.
    if (tile.rows == 0) return;
    u16* const queries = (u16*)shared;
    float* const joined = (float*)(shared + 16 * HEAD * 2);
    load_queries<HEAD, 128>(p, tile, tile.packed, kv_head, threadIdx.x, queries);
    block_barrier();

    u32 positions[2];
    positions_of(p, tile, tile.packed, positions);
    float slopes[2];
    slopes_of(p, tile.packed, kv_head, slopes);
    Running<HEAD> running;
    u32 key = first_key(p, tile, tile.packed) + warp * 16, block = block_of(p, tile, key, tile.to);
    while (key < tile.to) {
        attend<HEAD, CACHE>(p, tile, kv_head, queries, positions, slopes, key, block, running);
        key += 64;
        block = block_of(p, tile, key, tile.to);
    }

    // [warp][row][HEAD outputs, maximum, sum]
    constexpr u32 WIDTH = HEAD + 2;
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        float* const row = joined + (warp * 16 + g + 8 * r) * WIDTH;
        running.sum[r] += shuffle_xor(running.sum[r], 1);
        running.sum[r] += shuffle_xor(running.sum[r], 2);
#pragma unroll
        for (u32 i = 0; i < HEAD / 8; i++) {
            for (u32 c = 0; c < 2; c++) row[i / 8 * 64 + 8 * (2 * t + c) + i % 8] = running.out[i][2 * r + c];
        }
        if (t == 0) {
            row[HEAD] = running.most[r];
            row[HEAD + 1] = running.sum[r];
        }
    }
    block_barrier();
    for (u32 row = warp; row < rows_of(p, tile); row += 4) {
        float most = -INFINITE;
        for (u32 w = 0; w < 4; w++) most = fmaxf(most, joined[(w * 16 + row) * WIDTH + HEAD]);
        const float base = most == -INFINITE ? 0 : most;
        float sum = 0, factor[4];
        for (u32 w = 0; w < 4; w++) {
            factor[w] = power_of_2(joined[(w * 16 + row) * WIDTH + HEAD] - base);
            sum += factor[w] * joined[(w * 16 + row) * WIDTH + HEAD + 1];
        }
        float* const part = partial_of(p, tile.partial == WHOLE ? 0 : tile.partial + row, kv_head);
        for (u32 c = lane; c < HEAD; c += 32) {
            float value = 0;
            for (u32 w = 0; w < 4; w++) value += factor[w] * joined[(w * 16 + row) * WIDTH + c];
            if (tile.partial == WHOLE) {
                write(p, tile, tile.packed + row, kv_head, c, value / sum);
            } else {
                part[c] = value;
            }
        }
        if (tile.partial != WHOLE && lane == 0) {
            part[HEAD] = most;
            part[HEAD + 1] = sum;
        }
    }
}

// Grid [tiles, kv_heads]. Shared memory: 64 HEAD bf16.
template <u32 HEAD, u32 CACHE>
DEVICE void attention_many(const Attention& p) {
    SHARED(shared);
    const Tile tile = p.tiles[blockIdx.x];
    const u32 kv_head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 packed = tile.packed + warp * 16, group = p.heads / p.kv_heads;
    if (packed >= tile.rows * group) return;
    u16* const queries = (u16*)shared + warp * 16 * HEAD;
    load_queries<HEAD, 32>(p, tile, packed, kv_head, lane, queries);
    warp_barrier();

    u32 positions[2];
    positions_of(p, tile, packed, positions);
    float slopes[2];
    slopes_of(p, packed, kv_head, slopes);
    Running<HEAD> running;
    const u32 last = smaller((packed + 15) / group, tile.rows - 1), to = smaller(tile.to, tile.context - tile.rows + last + 1);
    u32 key = first_key(p, tile, packed), block = block_of(p, tile, key, to);
    while (key < to) {
        const u32 next = block_of(p, tile, key + 16, to);
        attend<HEAD, CACHE>(p, tile, kv_head, queries, positions, slopes, key, block, running);
        key += 16;
        block = next;
    }
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        float sum = running.sum[r];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        const u32 row = packed + g + 8 * r;
        if (row >= tile.rows * group) continue;
        const bool whole = tile.partial == WHOLE;
        float* const part = partial_of(p, whole ? 0 : tile.partial + row - tile.packed, kv_head);
#pragma unroll
        for (u32 i = 0; i < HEAD / 8; i++) {
            for (u32 c = 0; c < 2; c++) {
                const u32 column = i / 8 * 64 + 8 * (2 * t + c) + i % 8;
                const float value = running.out[i][2 * r + c];
                if (whole) {
                    write(p, tile, row, kv_head, column, value / sum);
                } else {
                    part[column] = value;
                }
            }
        }
        if (!whole && t == 0) {
            part[HEAD] = running.most[r];
            part[HEAD + 1] = sum;
        }
    }
}

#define ATTENTION(HEAD)                                                                           \
    KERNEL(attention_few_##HEAD, 128, Attention) { attention_few<HEAD, CACHE_BF16>(p); }          \
    KERNEL(attention_many_##HEAD, 128, Attention) { attention_many<HEAD, CACHE_BF16>(p); }        \
    KERNEL(attention_few_##HEAD##_fp8, 128, Attention) { attention_few<HEAD, CACHE_FP8>(p); }     \
    KERNEL(attention_many_##HEAD##_fp8, 128, Attention) { attention_many<HEAD, CACHE_FP8>(p); }
ATTENTION(64)
ATTENTION(128)
ATTENTION(256)

template <u32 HEAD>
DEVICE void join(const Attention& p) {
    constexpr u32 WIDTH = HEAD + 2;
    const Tile tile = p.tiles[blockIdx.x];
    const u32 kv_head = blockIdx.y, parts = tile.to, lane = threadIdx.x % 32;
    const u64 step = (u64)tile.from * p.kv_heads * WIDTH;
    for (u32 row = threadIdx.x / 32; row < rows_of(p, tile); row += 4) {
        const float* const first = partial_of(p, tile.partial + row, kv_head);
        float most = -INFINITE;
        for (u32 i = lane; i < parts; i += 32) most = fmaxf(most, first[i * step + HEAD]);
        for (u32 mask = 16; mask > 0; mask /= 2) most = fmaxf(most, shuffle_xor(most, mask));
        const float base = most == -INFINITE ? 0 : most;
        float sum = 0;
        for (u32 i = lane; i < parts; i += 32) sum += power_of_2(first[i * step + HEAD] - base) * first[i * step + HEAD + 1];
        sum = warp_sum(sum);
        float values[HEAD / 32] = {};
        // Several parts are read at once.
#pragma unroll 4
        for (u32 i = 0; i < parts; i++) {
            const float factor = power_of_2(first[i * step + HEAD] - base);
#pragma unroll
            for (u32 n = 0; n < HEAD / 32; n++) values[n] += factor * first[i * step + n * 32 + lane];
        }
#pragma unroll
        for (u32 n = 0; n < HEAD / 32; n++) write(p, tile, tile.packed + row, kv_head, n * 32 + lane, values[n] / sum);
    }
}

// Joins the parts of up to 16 packed rows: `tile.partial` is the first row's first part of `to`, which are `from` rows apart.
// Grid [tiles, kv_heads]; a warp for every fourth row.
KERNEL(attention_join, 128, Attention) {
    switch (p.head_dim) {
        case 64:
            return join<64>(p);
        case 128:
            return join<128>(p);
        default:
            return join<256>(p);
    }
}

DEVICE float cached(const Attention& p, const void* cache, u64 at) {
    switch (p.cache_form) {
        case CACHE_BF16:
            return from_bf16(((const u16*)cache)[at]);
        case CACHE_FP8:
            return low_bf16(from_e4m3(((const u8*)cache)[at]));
        default:
            return ((const float*)cache)[at];
    }
}

// A warp for each query head of each row: grid [tiles, heads]; a tile is one row.
// Shared memory: head_dim floats.
KERNEL(attention_plain, 32, Attention) {
    SHARED(shared);
    float* const out = (float*)shared;
    const Tile tile = p.tiles[blockIdx.x];
    const u32 head = blockIdx.y, lane = threadIdx.x, group = p.heads / p.kv_heads;
    const u32 position = tile.context - tile.rows + tile.packed;
    const u64 row = tile.first_row + tile.packed;
    const float* const query = p.qkv + row * (p.heads + 2 * p.kv_heads) * p.head_dim + head * p.head_dim;
    for (u32 c = lane; c < p.head_dim; c += 32) out[c] = 0;
    const float own = slope(p, head);
    float most = -INFINITE, sum = 0;
    const u32 first = p.window != 0 && position >= p.window ? position - p.window + 1 : 0;
    for (u32 key = first; key <= position; key++) {
        const u64 block = p.blocks[tile.first_block + key / p.block_size];
        const u64 at = ((block * p.kv_heads + head / group) * p.block_size + key % p.block_size) * p.head_dim;
        float product = 0;
        for (u32 c = lane; c < p.head_dim; c += 32) product += query[c] * cached(p, p.keys, at + c);
        const float s = score(p, warp_sum(product)) + own * behind(position, key), now = fmaxf(most, s);
        const float shrink = power_of_2(most - now), weight = power_of_2(s - now);
        sum = sum * shrink + weight;
        for (u32 c = lane; c < p.head_dim; c += 32) out[c] = out[c] * shrink + weight * cached(p, p.values, at + c);
        most = now;
    }
    for (u32 c = lane; c < p.head_dim; c += 32) {
        const u64 at = row * p.heads * p.head_dim + head * p.head_dim + c;
        p.out[at] = out[c] / sum;
        if (p.half) p.half[row * p.half_stride + head * p.head_dim + c] = to_bf16(out[c] / sum);
    }
}
