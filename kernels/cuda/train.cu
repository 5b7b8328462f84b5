// Products and attention of training, forward and backward, on tiles in shared memory.
//
// What is multiplied is f32 in memory, but for frozen weights, which are bf16. On its way into shared memory it becomes the
// tile's element: bf16 (sums in f32, on matrix units), or f32 (plain multiplications, for exactness). Both have one shape of
// fragments, so a kernel is written once. A sum is made in an order that depends on the shapes alone.

// What a tile holds.
template <class E>
struct Element;
template <>
struct Element<u16> {
    DEVICE u16 of(float value) { return to_bf16(value); }
};
template <>
struct Element<float> {
    DEVICE float of(float value) { return value; }
};

// Elements that rows of a tile lie further apart than they are long: neighbouring rows start in other banks.
template <class E>
constexpr u32 APART = 16 / sizeof(E);

// [16, 16] of a left operand. ALONG: element (row, k) is at[row * stride + k], else at[k * stride + row].
template <class E, bool ALONG>
struct Left;
// [16, 8] of a right operand. ALONG: element (k, column) is at[column * stride + k], else at[k * stride + column].
template <class E, bool ALONG>
struct Right;

// Two neighbours along k.
template <bool ALONG>
DEVICE u32 neighbours(const u16* at, u32 stride, u32 line, u32 k) {
    if (ALONG) return *(const u32*)(at + line * stride + k);
    return (u32)at[k * stride + line] | (u32)at[(k + 1) * stride + line] << 16;
}

template <bool ALONG>
struct Left<u16, ALONG> {
    u32 x[4];
    DEVICE_MEMBER void load(const u16* at, u32 stride) {
        const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (u32 i = 0; i < 4; i++) x[i] = neighbours<ALONG>(at, stride, g + i % 2 * 8, 2 * t + i / 2 * 8);
    }
};

template <bool ALONG>
struct Right<u16, ALONG> {
    u32 x[2];
    DEVICE_MEMBER void load(const u16* at, u32 stride) {
        const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (u32 i = 0; i < 2; i++) x[i] = neighbours<ALONG>(at, stride, g, 2 * t + i * 8);
    }
};

template <bool ALONG>
struct Left<float, ALONG> {
    const float* at;
    u32 stride;
    DEVICE_MEMBER void load(const float* from, u32 apart) {
        at = from;
        stride = apart;
    }
    DEVICE_MEMBER float get(u32 row, u32 k) const { return ALONG ? at[row * stride + k] : at[k * stride + row]; }
};

template <bool ALONG>
struct Right<float, ALONG> {
    const float* at;
    u32 stride;
    DEVICE_MEMBER void load(const float* from, u32 apart) {
        at = from;
        stride = apart;
    }
    DEVICE_MEMBER float get(u32 k, u32 column) const { return ALONG ? at[column * stride + k] : at[k * stride + column]; }
};

// c += left right, over 16 of k. Places of c are those of `multiply`: rows g and g + 8, columns 2t and 2t + 1.
template <bool A, bool B>
DEVICE void multiply_add(float (&c)[4], const Left<u16, A>& left, const Right<u16, B>& right) {
    multiply(c, left.x, right.x[0], right.x[1]);
}

template <bool A, bool B>
DEVICE void multiply_add(float (&c)[4], const Left<float, A>& left, const Right<float, B>& right) {
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    // Not unrolled: this is for exactness, and what is read ahead takes registers.
#pragma unroll 1
    for (u32 k = 0; k < 16; k++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) c[i] += left.get(g + i / 2 * 8, k) * right.get(k, 2 * t + i % 2);
    }
}

struct TrainMatmul {
    const float* left;
    // f32 or bf16.
    const void* right;
    float* out;
    // Elements from one line to the next.
    u32 left_stride;
    u32 right_stride;
    u32 out_stride;
    u32 m;
    u32 n;
    u32 k;
    u32 right_half;
    // Four elements that start at a multiple of four may be read at once.
    u32 left_quads;
    u32 right_quads;
    // 1 adds to `out`, 0 replaces it.
    u32 add;
    float scale;
    u32 unused;
};

struct alignas(8) Halves {
    u32 x[2];
};

// Four elements of a line from `at` on, of which `valid` exist; zeros for the others.
DEVICE void load_four(const void* from, u64 at, i64 valid, bool half, bool quads, float (&to)[4]) {
    if (quads && valid >= 4) {
        if (half) {
            const Halves both = *(const Halves*)((const u16*)from + at);
            for (u32 i = 0; i < 4; i++) to[i] = i % 2 == 0 ? low_bf16(both.x[i / 2]) : high_bf16(both.x[i / 2]);
        } else {
            const Quad four = *(const Quad*)((const float*)from + at);
            for (u32 i = 0; i < 4; i++) to[i] = as_float(four.x[i]);
        }
        return;
    }
    for (u32 i = 0; i < 4; i++) {
        to[i] = 0;
        if ((i64)i < valid) to[i] = half ? from_bf16(((const u16*)from)[at + i]) : ((const float*)from)[at + i];
    }
}

// What a block multiplies: BLOCK rows by BLOCK columns, STEP of k at a time; a warp 32 rows by 64 columns.
constexpr u32 BLOCK = 128, STEP = 32;

// An operand's next tile on its way: [BLOCK, STEP] with k within a line (ALONG), or [STEP, BLOCK].
template <class E, bool ALONG>
struct Arriving {
    static constexpr u32 WIDTH = ALONG ? STEP : BLOCK, STRIDE = WIDTH + APART<E>, FOURS = BLOCK * STEP / 4 / 256;
    float four[FOURS][4];

    // `first`: of the lines across k; `many`: how many there are in all.
    DEVICE_MEMBER void load(const void* from, u32 stride, bool half, bool quads, u32 first, u32 many, u32 step, u32 k) {
#pragma unroll
        for (u32 i = 0; i < FOURS; i++) {
            const u32 index = threadIdx.x + i * 256, line = index / (WIDTH / 4), column = index % (WIDTH / 4) * 4;
            const u64 row = (u64)(ALONG ? first : step) + line, start = (u64)(ALONG ? step : first) + column;
            const bool exists = row < (ALONG ? many : k);
            load_four(from, row * stride + start, exists ? (i64)(ALONG ? k : many) - (i64)start : 0, half, quads, four[i]);
        }
    }

    DEVICE_MEMBER void store(E* to) const {
#pragma unroll
        for (u32 i = 0; i < FOURS; i++) {
            const u32 index = threadIdx.x + i * 256, line = index / (WIDTH / 4), column = index % (WIDTH / 4) * 4;
#pragma unroll
            for (u32 c = 0; c < 4; c++) to[line * STRIDE + column + c] = Element<E>::of(four[i][c]);
        }
    }
};

// out (+)= scale * left · right. Shared memory: two tiles. Grid [ceil(m / 128), ceil(n / 128)].
template <class E, bool LEFT_ALONG, bool RIGHT_ALONG>
DEVICE void train_matmul(const TrainMatmul& p) {
    SHARED(shared);
    typedef Arriving<E, LEFT_ALONG> Lefts;
    typedef Arriving<E, RIGHT_ALONG> Rights;
    E* const left = (E*)shared;
    E* const right = left + BLOCK * (STEP + APART<E>);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 first_row = blockIdx.x * BLOCK, first_column = blockIdx.y * BLOCK;
    const u32 row = warp % 4 * 32, column = warp / 4 * 64;
    // Pieces of the warp's part that exist.
    const u32 tall = first_row + row < p.m ? smaller((p.m - first_row - row + 15) / 16, 2) : 0;
    const u32 wide = first_column + column < p.n ? smaller((p.n - first_column - column + 7) / 8, 8) : 0;
    float sums[2][8][4] = {};
    Lefts lefts;
    Rights rights;
    lefts.load(p.left, p.left_stride, false, p.left_quads, first_row, p.m, 0, p.k);
    rights.load(p.right, p.right_stride, p.right_half, p.right_quads, first_column, p.n, 0, p.k);
    for (u32 step = 0; step < p.k; step += STEP) {
        lefts.store(left);
        rights.store(right);
        block_barrier();
        // The next tiles arrive while these are multiplied.
        if (step + STEP < p.k) {
            lefts.load(p.left, p.left_stride, false, p.left_quads, first_row, p.m, step + STEP, p.k);
            rights.load(p.right, p.right_stride, p.right_half, p.right_quads, first_column, p.n, step + STEP, p.k);
        }
#pragma unroll
        for (u32 k = 0; k < STEP; k += 16) {
            Left<E, LEFT_ALONG> a[2];
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                const u32 line = row + i * 16;
                a[i].load(left + (LEFT_ALONG ? line * Lefts::STRIDE + k : k * Lefts::STRIDE + line), Lefts::STRIDE);
            }
#pragma unroll
            for (u32 j = 0; j < 8; j++) {
                if (j >= wide) continue;
                const u32 line = column + j * 8;
                Right<E, RIGHT_ALONG> b;
                b.load(right + (RIGHT_ALONG ? line * Rights::STRIDE + k : k * Rights::STRIDE + line), Rights::STRIDE);
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    if (i < tall) multiply_add(sums[i][j], a[i], b);
                }
            }
        }
        block_barrier();
    }
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
#pragma unroll
        for (u32 j = 0; j < 8; j++) {
#pragma unroll
            for (u32 c = 0; c < 4; c++) {
                const u32 to_row = first_row + row + i * 16 + g + c / 2 * 8, to_column = first_column + column + j * 8 + 2 * t + c % 2;
                if (to_row >= p.m || to_column >= p.n) continue;
                float* const out = p.out + (u64)to_row * p.out_stride + to_column;
                *out = p.add ? *out + p.scale * sums[i][j][c] : p.scale * sums[i][j][c];
            }
        }
    }
}

#define TRAIN_MATMUL(name, E)                                                                      \
    KERNEL(train_matmul_##name##_nn, 256, TrainMatmul) { train_matmul<E, true, false>(p); }        \
    KERNEL(train_matmul_##name##_nt, 256, TrainMatmul) { train_matmul<E, true, true>(p); }         \
    KERNEL(train_matmul_##name##_tn, 256, TrainMatmul) { train_matmul<E, false, false>(p); }       \
    KERNEL(train_matmul_##name##_tt, 256, TrainMatmul) { train_matmul<E, false, true>(p); }
TRAIN_MATMUL(bf16, u16)
TRAIN_MATMUL(f32, float)

// Attention over packed segments. A row sees rows of its own segment up to itself and those of the segment's prefix: in both cases
// rows that do not come after it. Tiles and the runs of rows that they meet are planned on the host. Scores exist for a tile at a
// time and are made again on the way back, from log Σ exp of each row (Dao et al. 2022).

// Neighbouring rows of one segment, and the runs of rows that they see (queries) or are seen by (keys).
struct TrainTile {
    u32 first;
    u32 rows;
    u32 run_from;
    u32 run_to;
};

struct TrainRun {
    u32 first;
    u32 rows;
};

struct TrainAttention {
    // [rows, (heads + 2 kv_heads) * head_dim], queries and keys rotated.
    const float* qkv;
    // [rows, heads * head_dim]: written forward.
    float* out;
    // [rows, heads], written forward.
    float* lse;
    // As `out`.
    const float* dout;
    // [rows, heads]: Σ dout out.
    const float* inner;
    // As `qkv`.
    float* dqkv;
    const u32* positions;
    const TrainTile* tiles;
    const TrainRun* runs;
    u32 heads;
    u32 kv_heads;
    u32 head_dim;
    // 0: none.
    u32 window;
    float scale;
    u32 unused;
};

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

// How a block is made up for one element and one width of heads: WARPS of 16 rows each, which meet OTHERS rows at a time; results in
// pieces of PIECE columns, a block for each.
template <class E, u32 HEAD>
struct Shape {
    static constexpr u32 WARPS = sizeof(E) == 2 ? (HEAD <= 128 ? 4 : 2) : (HEAD <= 128 ? 2 : 1);
    static constexpr u32 OWN = WARPS * 16, OTHERS = sizeof(E) == 4 && HEAD > 128 ? 16 : 32;
    static constexpr u32 PIECE = HEAD <= 128 ? HEAD : 128, STRIDE = HEAD + APART<E>, WEIGHTS = OTHERS + APART<E>;
};

// Rows `first..` of one head to a tile of COUNT rows, zeros for what is beyond `rows` or `width`. By the whole block.
template <class E, u32 HEAD, u32 COUNT>
DEVICE void load_rows(E* to, const float* from, u64 stride, u32 first, u32 rows, u32 width) {
    for (u32 i = threadIdx.x; i < COUNT * HEAD; i += blockDim.x) {
        const u32 row = i / HEAD, column = i % HEAD;
        const bool exists = row < rows && column < width;
        to[row * Shape<E, HEAD>::STRIDE + column] = Element<E>::of(exists ? from[(u64)(first + row) * stride + column] : 0.0f);
    }
}

// Products of this warp's 16 rows with OTHERS rows over the width of a head.
template <class E, u32 HEAD>
DEVICE void meet(const E* own, const E* others, float (&s)[Shape<E, HEAD>::OTHERS / 8][4]) {
    typedef Shape<E, HEAD> S;
#pragma unroll
    for (u32 j = 0; j < S::OTHERS / 8; j++) {
        for (u32 c = 0; c < 4; c++) s[j][c] = 0;
    }
#pragma unroll 4
    for (u32 k = 0; k < HEAD; k += 16) {
        Left<E, true> a;
        a.load(own + k, S::STRIDE);
#pragma unroll
        for (u32 j = 0; j < S::OTHERS / 8; j++) {
            Right<E, true> b;
            b.load(others + j * 8 * S::STRIDE + k, S::STRIDE);
            multiply_add(s[j], a, b);
        }
    }
}

// sums += weights · rows: this warp's [16, OTHERS] with PIECE columns of [OTHERS, HEAD] from `rows` on.
template <class E, u32 HEAD>
DEVICE void collect(const E* weights, const E* rows, float (&sums)[Shape<E, HEAD>::PIECE / 8][4]) {
    typedef Shape<E, HEAD> S;
#pragma unroll
    for (u32 k = 0; k < S::OTHERS; k += 16) {
        Left<E, true> a;
        a.load(weights + k, S::WEIGHTS);
#pragma unroll
        for (u32 j = 0; j < S::PIECE / 8; j++) {
            Right<E, false> b;
            b.load(rows + k * S::STRIDE + j * 8, S::STRIDE);
            multiply_add(sums[j], a, b);
        }
    }
}

// Fragments to this warp's tile of weights. Lanes that read it have been at a barrier since: the one before the next rows were loaded.
template <class E, u32 HEAD>
DEVICE void put_weights(E* to, const float (&s)[Shape<E, HEAD>::OTHERS / 8][4]) {
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (u32 j = 0; j < Shape<E, HEAD>::OTHERS / 8; j++) {
#pragma unroll
        for (u32 c = 0; c < 4; c++) {
            to[(g + c / 2 * 8) * Shape<E, HEAD>::WEIGHTS + j * 8 + 2 * t + c % 2] = Element<E>::of(s[j][c]);
        }
    }
}

// Whether a query sees a key, both of one run and within it.
DEVICE bool visible(const TrainAttention& p, u32 query, u32 key) {
    return key <= query && (p.window == 0 || p.positions[query] - p.positions[key] < p.window);
}

// The first row of a run of keys that any query of a tile sees, and the end of those. Positions of a run are consecutive.
DEVICE void keys_of(const TrainAttention& p, const TrainTile& tile, const TrainRun& run, u32& from, u32& to) {
    from = run.first;
    to = smaller(run.first + run.rows, tile.first + tile.rows);
    if (p.window == 0 || run.rows == 0) return;
    const u32 earliest = p.positions[tile.first] + 1 > p.window ? p.positions[tile.first] + 1 - p.window : 0;
    if (earliest > p.positions[run.first]) from += earliest - p.positions[run.first];
}

// out and lse. Grid [tiles, heads, HEAD / PIECE].
template <class E, u32 HEAD>
DEVICE void train_attention(const TrainAttention& p) {
    typedef Shape<E, HEAD> S;
    SHARED(shared);
    const TrainTile tile = p.tiles[blockIdx.x];
    const u32 head = blockIdx.y, kv_head = head / (p.heads / p.kv_heads), piece = blockIdx.z * S::PIECE;
    const u32 warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const u64 stride = (u64)(p.heads + 2 * p.kv_heads) * p.head_dim;
    E* const queries = (E*)shared;
    E* const keys = queries + S::OWN * S::STRIDE;
    E* const values = keys + S::OTHERS * S::STRIDE;
    E* const weights = values + S::OTHERS * S::STRIDE + warp * 16 * S::WEIGHTS;
    load_rows<E, HEAD, S::OWN>(queries, p.qkv + head * p.head_dim, stride, tile.first, tile.rows, p.head_dim);

    float out[S::PIECE / 8][4] = {}, most[2] = {-INFINITE, -INFINITE}, sum[2] = {0, 0};
    const u32 own[2] = {tile.first + warp * 16 + g, tile.first + warp * 16 + g + 8};
    for (u32 index = tile.run_from; index < tile.run_to; index++) {
        u32 from, to;
        keys_of(p, tile, p.runs[index], from, to);
        for (u32 key = from; key < to; key += S::OTHERS) {
            block_barrier();
            const u32 count = to - key;
            load_rows<E, HEAD, S::OTHERS>(keys, p.qkv + (p.heads + kv_head) * p.head_dim, stride, key, count, p.head_dim);
            load_rows<E, HEAD, S::OTHERS>(values, p.qkv + (p.heads + p.kv_heads + kv_head) * p.head_dim, stride, key, count, p.head_dim);
            block_barrier();
            float s[S::OTHERS / 8][4], now[2] = {most[0], most[1]}, base[2];
            meet<E, HEAD>(queries + warp * 16 * S::STRIDE, keys, s);
#pragma unroll
            for (u32 j = 0; j < S::OTHERS / 8; j++) {
#pragma unroll
                for (u32 c = 0; c < 4; c++) {
                    const u32 at = key + j * 8 + 2 * t + c % 2, query = own[c / 2];
                    const bool sees = at < to && query < tile.first + tile.rows && visible(p, query, at);
                    s[j][c] = sees ? s[j][c] * p.scale * LOG2_E : -INFINITE;
                    now[c / 2] = fmaxf(now[c / 2], s[j][c]);
                }
            }
#pragma unroll
            for (u32 r = 0; r < 2; r++) {
                now[r] = fmaxf(now[r], shuffle_xor(now[r], 1));
                now[r] = fmaxf(now[r], shuffle_xor(now[r], 2));
                // A row that has seen no key yet.
                base[r] = now[r] == -INFINITE ? 0 : now[r];
                const float shrink = power_of_2(most[r] - base[r]);
                most[r] = now[r];
                sum[r] *= shrink;
#pragma unroll
                for (u32 j = 0; j < S::PIECE / 8; j++) {
                    out[j][2 * r] *= shrink;
                    out[j][2 * r + 1] *= shrink;
                }
            }
#pragma unroll
            for (u32 j = 0; j < S::OTHERS / 8; j++) {
#pragma unroll
                for (u32 c = 0; c < 4; c++) {
                    s[j][c] = power_of_2(s[j][c] - base[c / 2]);
                    sum[c / 2] += s[j][c];
                }
            }
            put_weights<E, HEAD>(weights, s);
            warp_barrier();
            collect<E, HEAD>(weights, values + piece, out);
        }
    }
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        sum[r] += shuffle_xor(sum[r], 1);
        sum[r] += shuffle_xor(sum[r], 2);
        if (own[r] >= tile.first + tile.rows) continue;
        if (t == 0 && piece == 0) p.lse[(u64)own[r] * p.heads + head] = most[r] * LN_2 + logf(sum[r]);
        float* const to = p.out + ((u64)own[r] * p.heads + head) * p.head_dim;
#pragma unroll
        for (u32 j = 0; j < S::PIECE / 8; j++) {
            for (u32 c = 0; c < 2; c++) {
                const u32 column = piece + j * 8 + 2 * t + c;
                if (column < p.head_dim) to[column] = out[j][2 * r + c] / sum[r];
            }
        }
    }
}

// Writes PIECE columns of this warp's 16 rows.
template <class E, u32 HEAD>
DEVICE void put_rows(const TrainAttention& p, const TrainTile& tile, u32 offset, u32 piece, float scale,
                     const float (&sums)[Shape<E, HEAD>::PIECE / 8][4]) {
    const u32 warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const u64 stride = (u64)(p.heads + 2 * p.kv_heads) * p.head_dim;
#pragma unroll
    for (u32 j = 0; j < Shape<E, HEAD>::PIECE / 8; j++) {
#pragma unroll
        for (u32 c = 0; c < 4; c++) {
            const u32 row = warp * 16 + g + c / 2 * 8, column = piece + j * 8 + 2 * t + c % 2;
            if (row < tile.rows && column < p.head_dim) p.dqkv[(tile.first + row) * stride + offset + column] = scale * sums[j][c];
        }
    }
}

// A probability made again, and the derivative along its score.
DEVICE void again(const TrainAttention& p, u32 query, u32 key, u32 head, bool exists, float& score, float& slope) {
    float weight = 0, along = 0;
    if (exists && visible(p, query, key)) {
        const u64 at = (u64)query * p.heads + head;
        weight = power_of_2((score * p.scale - p.lse[at]) * LOG2_E);
        along = weight * (slope - p.inner[at]);
    }
    score = weight;
    slope = along;
}

// The queries' part of dqkv. Grid [tiles, heads, HEAD / PIECE].
template <class E, u32 HEAD>
DEVICE void train_attention_queries(const TrainAttention& p) {
    typedef Shape<E, HEAD> S;
    SHARED(shared);
    const TrainTile tile = p.tiles[blockIdx.x];
    const u32 head = blockIdx.y, kv_head = head / (p.heads / p.kv_heads), piece = blockIdx.z * S::PIECE;
    const u32 warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const u64 stride = (u64)(p.heads + 2 * p.kv_heads) * p.head_dim;
    E* const queries = (E*)shared;
    E* const douts = queries + S::OWN * S::STRIDE;
    E* const keys = douts + S::OWN * S::STRIDE;
    E* const values = keys + S::OTHERS * S::STRIDE;
    E* const weights = values + S::OTHERS * S::STRIDE + warp * 16 * S::WEIGHTS;
    load_rows<E, HEAD, S::OWN>(queries, p.qkv + head * p.head_dim, stride, tile.first, tile.rows, p.head_dim);
    load_rows<E, HEAD, S::OWN>(douts, p.dout + head * p.head_dim, p.heads * p.head_dim, tile.first, tile.rows, p.head_dim);

    float sums[S::PIECE / 8][4] = {};
    for (u32 index = tile.run_from; index < tile.run_to; index++) {
        u32 from, to;
        keys_of(p, tile, p.runs[index], from, to);
        for (u32 key = from; key < to; key += S::OTHERS) {
            block_barrier();
            const u32 count = to - key;
            load_rows<E, HEAD, S::OTHERS>(keys, p.qkv + (p.heads + kv_head) * p.head_dim, stride, key, count, p.head_dim);
            load_rows<E, HEAD, S::OTHERS>(values, p.qkv + (p.heads + p.kv_heads + kv_head) * p.head_dim, stride, key, count, p.head_dim);
            block_barrier();
            float s[S::OTHERS / 8][4], slopes[S::OTHERS / 8][4];
            meet<E, HEAD>(queries + warp * 16 * S::STRIDE, keys, s);
            meet<E, HEAD>(douts + warp * 16 * S::STRIDE, values, slopes);
#pragma unroll
            for (u32 j = 0; j < S::OTHERS / 8; j++) {
#pragma unroll
                for (u32 c = 0; c < 4; c++) {
                    const u32 at = key + j * 8 + 2 * t + c % 2, row = warp * 16 + g + c / 2 * 8;
                    again(p, tile.first + row, at, head, at < to && row < tile.rows, s[j][c], slopes[j][c]);
                }
            }
            put_weights<E, HEAD>(weights, slopes);
            warp_barrier();
            collect<E, HEAD>(weights, keys + piece, sums);
        }
    }
    put_rows<E, HEAD>(p, tile, head * p.head_dim, piece, p.scale, sums);
}

// The keys' or the values' part of dqkv, collected from all heads that share them; both at once would not fit the registers.
// Grid [tiles, kv_heads, 2 HEAD / PIECE]: first the pieces of values.
template <class E, u32 HEAD>
DEVICE void train_attention_keys(const TrainAttention& p) {
    typedef Shape<E, HEAD> S;
    SHARED(shared);
    const TrainTile tile = p.tiles[blockIdx.x];
    const bool of_values = blockIdx.z < HEAD / S::PIECE;
    const u32 kv_head = blockIdx.y, group = p.heads / p.kv_heads, piece = blockIdx.z % (HEAD / S::PIECE) * S::PIECE;
    const u32 warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const u64 stride = (u64)(p.heads + 2 * p.kv_heads) * p.head_dim;
    const u32 key_offset = (p.heads + kv_head) * p.head_dim, value_offset = key_offset + p.kv_heads * p.head_dim;
    E* const keys = (E*)shared;
    E* const values = keys + S::OWN * S::STRIDE;
    E* const queries = values + S::OWN * S::STRIDE;
    E* const douts = queries + S::OTHERS * S::STRIDE;
    E* const weights = douts + S::OTHERS * S::STRIDE + warp * 16 * S::WEIGHTS;
    load_rows<E, HEAD, S::OWN>(keys, p.qkv + key_offset, stride, tile.first, tile.rows, p.head_dim);
    load_rows<E, HEAD, S::OWN>(values, p.qkv + value_offset, stride, tile.first, tile.rows, p.head_dim);

    float sums[S::PIECE / 8][4] = {};
    const u32 last = tile.first + tile.rows - 1;
    for (u32 index = tile.run_from; index < tile.run_to; index++) {
        const TrainRun run = p.runs[index];
        // Queries before the first key see none of them, and those too far behind the last one do not either.
        const u32 from = larger(run.first, tile.first);
        for (u32 query = from; query < run.first + run.rows; query += S::OTHERS) {
            if (p.window != 0 && p.positions[query] >= p.positions[last] + p.window) break;
            const u32 count = run.first + run.rows - query;
            for (u32 head = kv_head * group; head < (kv_head + 1) * group; head++) {
                block_barrier();
                load_rows<E, HEAD, S::OTHERS>(queries, p.qkv + head * p.head_dim, stride, query, count, p.head_dim);
                load_rows<E, HEAD, S::OTHERS>(douts, p.dout + head * p.head_dim, p.heads * p.head_dim, query, count, p.head_dim);
                block_barrier();
                float s[S::OTHERS / 8][4], slopes[S::OTHERS / 8][4] = {};
                meet<E, HEAD>(keys + warp * 16 * S::STRIDE, queries, s);
                if (!of_values) meet<E, HEAD>(values + warp * 16 * S::STRIDE, douts, slopes);
#pragma unroll
                for (u32 j = 0; j < S::OTHERS / 8; j++) {
#pragma unroll
                    for (u32 c = 0; c < 4; c++) {
                        const u32 at = j * 8 + 2 * t + c % 2, row = warp * 16 + g + c / 2 * 8;
                        again(p, query + at, tile.first + row, head, at < count && row < tile.rows, s[j][c], slopes[j][c]);
                        if (!of_values) s[j][c] = slopes[j][c];
                    }
                }
                put_weights<E, HEAD>(weights, s);
                warp_barrier();
                collect<E, HEAD>(weights, (of_values ? douts : queries) + piece, sums);
            }
        }
    }
    put_rows<E, HEAD>(p, tile, of_values ? value_offset : key_offset, piece, of_values ? 1.0f : p.scale, sums);
}

#define TRAIN_ATTENTION(name, E, HEAD, THREADS)                                                                      \
    KERNEL_ALONE(train_attention_##name##_##HEAD, THREADS, TrainAttention) { train_attention<E, HEAD>(p); }          \
    KERNEL_ALONE(train_attention_queries_##name##_##HEAD, THREADS, TrainAttention) { train_attention_queries<E, HEAD>(p); } \
    KERNEL_ALONE(train_attention_keys_##name##_##HEAD, THREADS, TrainAttention) { train_attention_keys<E, HEAD>(p); }
TRAIN_ATTENTION(bf16, u16, 64, 128)
TRAIN_ATTENTION(bf16, u16, 128, 128)
TRAIN_ATTENTION(bf16, u16, 256, 64)
TRAIN_ATTENTION(f32, float, 64, 64)
TRAIN_ATTENTION(f32, float, 128, 64)
TRAIN_ATTENTION(f32, float, 256, 32)
