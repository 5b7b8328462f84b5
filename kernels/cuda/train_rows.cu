// Training, row by row: norms, rotation, gated activation, dropout, gathering, what the walk over the vocabulary does to a row of
// logits; each with its derivative. Formulas stand beside the processor's bodies (kernels/src/train/rows.rs, cross_entropy.rs).
//
// A piece is a whole row or a head: `count` of `width` elements from `offset` on in rows `stride` apart.

struct Pieces {
    u32 rows;
    u32 stride;
    u32 offset;
    u32 count;
    u32 width;
};

// Where this warp's piece starts; none beyond the last. A block is 8 warps.
DEVICE bool piece_of(const Pieces& p, u64& piece, u64& start) {
    piece = (u64)blockIdx.x * 8 + threadIdx.x / 32;
    start = piece / p.count * p.stride + p.offset + piece % p.count * p.width;
    return piece < (u64)p.rows * p.count;
}

struct TrainNorm {
    const float* x;
    const float* weight;
    float* out;
    // [rows, count]: 1 / sqrt(mean(x²) + eps).
    float* inverse;
    Pieces at;
    float eps;
};

// Grid [ceil(rows count / 8)].
KERNEL(train_norm, 256, TrainNorm) {
    u64 piece, start;
    if (!piece_of(p.at, piece, start)) return;
    const u32 lane = threadIdx.x % 32;
    float squares = 0;
    for (u32 i = lane; i < p.at.width; i += 32) squares += p.x[start + i] * p.x[start + i];
    const float inverse = 1.0f / sqrtf(warp_sum(squares) / (float)p.at.width + p.eps);
    for (u32 i = lane; i < p.at.width; i += 32) p.out[start + i] = p.x[start + i] * inverse * p.weight[i];
    if (lane == 0) p.inverse[piece] = inverse;
}

struct TrainNormBack {
    const float* x;
    const float* weight;
    const float* inverse;
    const float* dy;
    float* dx;
    Pieces at;
    // 1 adds to `dx`, 0 replaces it.
    u32 add;
};

// Grid as train_norm.
KERNEL(train_norm_back, 256, TrainNormBack) {
    u64 piece, start;
    if (!piece_of(p.at, piece, start)) return;
    const u32 lane = threadIdx.x % 32;
    const float inverse = p.inverse[piece];
    float along = 0;
    for (u32 i = lane; i < p.at.width; i += 32) along += p.dy[start + i] * p.weight[i] * p.x[start + i];
    along = warp_sum(along) / (float)p.at.width * inverse * inverse * inverse;
    for (u32 i = lane; i < p.at.width; i += 32) {
        const float value = inverse * p.dy[start + i] * p.weight[i] - p.x[start + i] * along;
        p.dx[start + i] = p.add ? p.dx[start + i] + value : value;
    }
}

struct TrainSums {
    const float* dy;
    // Null: sums of dy alone.
    const float* x;
    const float* inverse;
    // [parts, width]
    float* out;
    Pieces at;
    // 1 adds to `out`, 0 replaces it.
    u32 add;
};

// out[part, column] = Σ over the pieces of a part of dy x inverse: the derivative along a norm's weight; without x that along a bias. A block
// for every 32 columns of each part; its warps take turns over the pieces. Heads are few columns of many pieces: without parts, a few blocks
// would read everything. Shared memory: 8 · 32 floats. Grid [ceil(width / 32), parts].
KERNEL(train_sums, 256, TrainSums) {
    SHARED(scratch);
    float(*const sums)[32] = (float(*)[32])scratch;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = blockIdx.x * 32 + lane;
    float sum = 0;
    if (column < p.at.width) {
        const u64 all = (u64)p.at.rows * p.at.count, each = (all + gridDim.y - 1) / gridDim.y;
        const u64 first = blockIdx.y * each + warp, end = first - warp + each < all ? first - warp + each : all;
        // A division of 64 bits for each piece would be most of the work.
        u64 row = first / p.at.count;
        u32 within = (u32)(first % p.at.count);
        const u32 rows = 8 / p.at.count, rest = 8 % p.at.count;
#pragma unroll 4
        for (u64 piece = first; piece < end; piece += 8) {
            const u64 at = row * p.at.stride + p.at.offset + (u64)within * p.at.width + column;
            sum += p.x ? p.dy[at] * p.x[at] * p.inverse[piece] : p.dy[at];
            const bool next = within + rest >= p.at.count;
            row += rows + next;
            within += next ? rest - p.at.count : rest;
        }
    }
    sums[warp][lane] = sum;
    block_barrier();
    if (warp != 0 || column >= p.at.width) return;
    for (u32 other = 1; other < 8; other++) sum += sums[other][lane];
    float* const out = p.out + (u64)blockIdx.y * p.at.width + column;
    *out = p.add ? *out + sum : sum;
}

struct TrainRotate {
    float* x;
    // [positions, half]
    const float* cosines;
    const float* sines;
    const u32* positions;
    Pieces at;
    u32 half;
    // 1 rotates by the opposite angle, which is the derivative.
    u32 back;
    u32 unused;
};

// Grid as train_norm.
KERNEL(train_rotate, 256, TrainRotate) {
    u64 piece, start;
    if (!piece_of(p.at, piece, start)) return;
    const u64 angle = (u64)p.positions[piece / p.at.count] * p.half;
    for (u32 i = threadIdx.x % 32; i < p.half; i += 32) {
        const float c = p.cosines[angle + i], s = p.back ? -p.sines[angle + i] : p.sines[angle + i];
        const float a = p.x[start + i], b = p.x[start + i + p.half];
        p.x[start + i] = a * c - b * s;
        p.x[start + i + p.half] = b * c + a * s;
    }
}

struct TrainGate {
    // [rows, 2 width]
    const float* gate_up;
    // Null forward.
    const float* dy;
    // Forward [rows, width], else [rows, 2 width].
    float* out;
    u32 width;
    // 1: gelu by the formula with tanh, 0: silu. Both are g / (1 + e^-v(g)).
    u32 gelu;
};

constexpr float GELU_SLOPE = 1.5957691f, GELU_CUBE = 0.044715f;

// gelu(gate) up, or silu(gate) up. Grid [rows].
KERNEL(train_gate, 256, TrainGate) {
    const u64 row = blockIdx.x;
    const float* const gate = p.gate_up + row * 2 * p.width;
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) {
        const float g = gate[i], v = p.gelu ? GELU_SLOPE * (g + GELU_CUBE * g * g * g) : g;
        p.out[row * p.width + i] = g / (1.0f + expf(-v)) * gate[p.width + i];
    }
}

// Its derivative. Grid [rows].
KERNEL(train_gate_back, 256, TrainGate) {
    const u64 row = blockIdx.x;
    const float* const gate = p.gate_up + row * 2 * p.width;
    float* const out = p.out + row * 2 * p.width;
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) {
        float g = gate[i], v = g, slope = 1;
        if (p.gelu) {
            // Beyond this the sigmoid is 0 or 1, and g³ would come to be infinite.
            g = fminf(fmaxf(g, -30.0f), 30.0f);
            v = GELU_SLOPE * (g + GELU_CUBE * g * g * g);
            slope = GELU_SLOPE * (1.0f + 3.0f * GELU_CUBE * g * g);
        }
        const float s = 1.0f / (1.0f + expf(-v)), dy = p.dy[row * p.width + i];
        out[i] = dy * gate[p.width + i] * (s + g * s * (1.0f - s) * slope);
        out[p.width + i] = dy * gate[i] * s;
    }
}

// Philox4x32-10 (Salmon et al. 2011), as kernels/src/random.rs.
DEVICE void philox(u32 (&c)[4], u32 low, u32 high) {
    for (u32 round = 0; round < 10; round++) {
        const u64 a = 0xd2511f53ull * c[0], b = 0xcd9e8d57ull * c[2];
        const u32 first = (u32)(b >> 32) ^ c[1] ^ low, third = (u32)(a >> 32) ^ c[3] ^ high;
        c[0] = first;
        c[1] = (u32)b;
        c[2] = third;
        c[3] = (u32)a;
        low += 0x9e3779b9u;
        high += 0xbb67ae85u;
    }
}

struct TrainDropout {
    const float* x;
    float* out;
    u64 count;
    u64 key;
    // Of 65,536 elements.
    u32 dropped;
    float scale;
    // 1 adds to `out`, 0 replaces it.
    u32 add;
    u32 unused;
};

// The mask is a function of the key and an element's place; eight elements a thread.
KERNEL(train_dropout, 256, TrainDropout) {
    const u64 block = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (block * 8 >= p.count) return;
    u32 words[4] = {(u32)block, (u32)(block >> 32), 0, 0};
    philox(words, (u32)p.key, (u32)(p.key >> 32));
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
        const u64 at = block * 8 + i;
        if (at >= p.count) return;
        const float kept = (words[i / 2] >> (16 * (i % 2)) & 0xffffu) < p.dropped ? 0.0f : p.x[at] * p.scale;
        p.out[at] = p.add ? p.out[at] + kept : kept;
    }
}

struct TrainCopy {
    const float* from;
    float* to;
    u64 count;
    // 1 adds to `to`, 0 replaces it.
    u32 add;
    u32 unused;
};

KERNEL(train_copy, 256, TrainCopy) {
    const u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at < p.count) p.to[at] = p.add ? p.to[at] + p.from[at] : p.from[at];
}

struct TrainScatter {
    // [picked, width]
    const float* x;
    // [rows + 1]: where in `picks` those of a row start.
    const u32* starts;
    const u32* picks;
    // [rows, width]
    float* out;
    u32 width;
    u32 unused;
};

// The derivative of a gathering: a row's sum over the places that it was put in, in their order. Grid [rows].
KERNEL(train_scatter, 256, TrainScatter) {
    const u64 row = blockIdx.x;
    const u32 from = p.starts[row], to = p.starts[row + 1];
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) {
        float sum = 0;
        for (u32 pick = from; pick < to; pick++) sum += p.x[(u64)p.picks[pick] * p.width + i];
        p.out[row * p.width + i] = sum;
    }
}

struct TrainInner {
    const float* a;
    const float* b;
    // [rows, heads]
    float* out;
    u32 rows;
    u32 width;
};

// Inner products of rows: a warp for each, grid [ceil(rows / 8)].
KERNEL(train_inner, 256, TrainInner) {
    const u64 row = (u64)blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= p.rows) return;
    float sum = 0;
    for (u32 i = threadIdx.x % 32; i < p.width; i += 32) sum += p.a[row * p.width + i] * p.b[row * p.width + i];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) p.out[row] = sum;
}

// The largest over a block, in every thread; nobody has used `scratch` since the last barrier.
DEVICE float block_most(float value, float* scratch) {
    for (u32 mask = 16; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    block_barrier();
    for (u32 warp = 0; warp < blockDim.x / 32; warp++) value = fmaxf(value, scratch[warp]);
    return value;
}

struct TrainLogSum {
    // [rows, stride]: logits of tokens `first .. first + n`.
    float* logits;
    // [rows]
    const u32* tokens;
    // [rows]: the logit of the row's token, the largest so far, Σ exp relative to it.
    float* chosen;
    float* largest;
    float* totals;
    // [rows, width] of what collects relative to the largest logit, or null.
    float* slopes;
    u32 stride;
    u32 n;
    u32 first;
    u32 width;
};

// A row's piece of the vocabulary; where slopes are wanted, its logits become exponentials relative to the largest so far.
// Shared memory: a float for each warp. Grid [rows].
KERNEL(train_log_sum, 256, TrainLogSum) {
    SHARED(scratch);
    const u64 row = blockIdx.x;
    float* const logits = p.logits + row * p.stride;
    const float before = p.first == 0 ? -INFINITE : p.largest[row], total = p.first == 0 ? 0 : p.totals[row];
    const u32 token = p.tokens[row];
    float most = before;
    for (u32 i = threadIdx.x; i < p.n; i += blockDim.x) {
        most = fmaxf(most, logits[i]);
        if (p.first + i == token) p.chosen[row] = logits[i];
    }
    most = block_most(most, (float*)scratch);
    float sum = 0;
    for (u32 i = threadIdx.x; i < p.n; i += blockDim.x) {
        const float exponential = expf(logits[i] - most);
        sum += exponential;
        if (p.slopes) logits[i] = exponential;
    }
    sum = block_sum(sum, (float*)scratch);
    const float shrink = p.first == 0 ? 0 : expf(before - most);
    if (p.slopes && p.first != 0 && most > before) {
        for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) p.slopes[row * p.width + i] *= shrink;
    }
    if (threadIdx.x == 0) {
        p.largest[row] = most;
        p.totals[row] = sum + total * shrink;
    }
}

struct TrainLogProbs {
    const u32* tokens;
    // [rows]: the token's logit, which becomes its log-probability.
    float* out;
    // [rows]: the largest logit, which becomes log Σ exp.
    float* largest;
    const float* totals;
    // [rows, width], or null.
    float* slopes;
    // [vocabulary, width], f32 or bf16.
    const void* head;
    u32 width;
    u32 half;
    float scale;
    u32 unused;
};

// The end of the walk. Grid [rows].
KERNEL(train_log_probs, 256, TrainLogProbs) {
    const u64 row = blockIdx.x;
    const float total = p.totals[row];
    if (p.slopes) {
        const u64 own = (u64)p.tokens[row] * p.width;
        for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) {
            const float head = p.half ? from_bf16(((const u16*)p.head)[own + i]) : ((const float*)p.head)[own + i];
            float* const slope = p.slopes + row * p.width + i;
            *slope = p.scale * (head - *slope / total);
        }
    }
    if (threadIdx.x == 0) {
        const float sum = p.largest[row] + logf(total);
        p.largest[row] = sum;
        p.out[row] -= sum;
    }
}

struct TrainSoftmaxBack {
    // [rows, stride]: logits of tokens `first .. first + n`.
    float* logits;
    const u32* tokens;
    // [rows]: log Σ exp.
    const float* sums;
    const float* dout;
    u32 stride;
    u32 n;
    u32 first;
    float scale;
};

// Logits become the derivatives along them before scaling: scale dout (1{token} − p). Grid [rows].
KERNEL(train_softmax_back, 256, TrainSoftmaxBack) {
    const u64 row = blockIdx.x;
    const float factor = p.scale * p.dout[row];
    for (u32 i = threadIdx.x; i < p.n; i += blockDim.x) {
        float* const logit = p.logits + row * p.stride + i;
        *logit = (p.first + i == p.tokens[row] ? factor : 0.0f) - factor * expf(*logit - p.sums[row]);
    }
}

struct TrainScale {
    float* x;
    // [rows]
    const float* factors;
    u32 width;
    u32 unused;
};

// A factor for each row. Grid [rows].
KERNEL(train_scale, 256, TrainScale) {
    const u64 row = blockIdx.x;
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) p.x[row * p.width + i] *= p.factors[row];
}
