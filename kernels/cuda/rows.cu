// Row by row: what is bound by reading and writing activations. Four elements of a row for each thread, as `rows.cuh` has them, unless
// said otherwise.
//
// Activations are f32. Where a linear reads a buffer next, its producer leaves a bf16 copy beside it (`half`, rows of `half_stride`
// elements whose padding stays zero), so that no pass of its own converts it.

// Four elements of a row, which has padding.
DEVICE Four four_elements(const Weights& w, u64 row, u32 column) {
    const u64 at = row * w.stride + column;
    Four four;
    switch (w.form) {
        case FORM_F32:
            four = ((const Four*)w.data)[at / 4];
            break;
        case FORM_BF16: {
            const Pair two = ((const Pair*)w.data)[at / 4];
            four = {low_bf16(two.x[0]), high_bf16(two.x[0]), low_bf16(two.x[1]), high_bf16(two.x[1])};
            break;
        }
        case FORM_INT8: {
            const u32 bytes = ((const u32*)w.data)[at / 4];
            const float scale = ((const float*)w.scales)[row];
#pragma unroll
            for (u32 e = 0; e < 4; e++) four.x[e] = scale * (float)(i8)(bytes >> 8 * e);
            break;
        }
        case FORM_FP8: {
            const u32 bytes = ((const u32*)w.data)[at / 4];
            const float scale = ((const float*)w.scales)[row];
            const u32 lower = from_e4m3(bytes, 0), upper = from_e4m3(bytes, 1);
            four = {scale * low_bf16(lower), scale * high_bf16(lower), scale * low_bf16(upper), scale * high_bf16(upper)};
            break;
        }
        default: {
            const u32 nibbles = ((const u16*)w.data)[at / 4], both = ((const u32*)w.scales)[at / 32];
            const float scale = from_f16((u16)both), minimum = from_f16((u16)(both >> 16));
#pragma unroll
            for (u32 e = 0; e < 4; e++) four.x[e] = scale * (float)(nibbles >> 4 * e & 15) + minimum;
        }
    }
    return four;
}

struct Embedding {
    Weights table;
    const u32* tokens;
    float* out;
    u16* half;
    u32 half_stride;
    u32 first;
    u32 width;
    u32 unused;
};

// out[row] = table[tokens[row] - first]; zeros for a token that a part of a table does not have.
KERNEL(embedding, FOURS, Embedding) {
    const u64 row = blockIdx.x;
    const u32 i = fours_at();
    if (i >= p.width) return;
    // What lies before the part wraps around to beyond it.
    const u32 token = p.tokens[row] - p.first;
    put(p, row, i, token < p.table.n ? four_elements(p.table, token, i) : Four{});
}

struct Norm {
    const float* x;
    const float* weight;
    float* out;
    u16* half;
    u32 width;
    u32 half_stride;
    float eps;
    u32 add;
};

// The sum over a row of its elements, or of the squares of what they are beyond `mean`, in every thread of the row's block.
template <bool SQUARES>
DEVICE float row_sum(const float* x, u32 width, const Held<2>& held, float mean, float* scratch) {
    float sum = 0;
    const auto add = [&](const Four& four, u32 i) {
#pragma unroll
        for (u32 e = 0; e < 4; e++) {
            const float value = four.x[e] - mean;
            if (i + e < width) sum += SQUARES ? value * value : value;
        }
    };
#pragma unroll
    for (u32 i = 0; i < 2; i++) add(held.fours[i], held.place(i));
    for (u32 i = held.place(2); i < width; i += 4 * blockDim.x) add(load_four(x, i, width), i);
    return block_sum(sum, scratch);
}

// out = (x - mean) / sqrt(mean((x - mean)²) + eps) * weight, or added to it, where the mean is that of x, or 0 if x is not CENTRED. A
// block for each row, of as many threads as have two fours each of it, 1,024 at most: sums are made in an order that depends on the
// width alone, and where there is one row, all of it is under way at once, and the weights with it. Shared memory: a float for each warp.
// Grid [rows].
template <bool CENTRED>
DEVICE void norm(const Norm& p) {
    SHARED(scratch);
    const u64 row = blockIdx.x;
    const float* const x = p.x + row * p.width;
    float* const out = p.out + row * p.width;
    Held<2> held, weights, before = {};
    held.load(x, p.width);
    weights.load(p.weight, p.width);
    if (p.add) before.load(out, p.width);
    const float mean = CENTRED ? row_sum<false>(x, p.width, held, 0.0f, (float*)scratch) / (float)p.width : 0.0f;
    // Squares of differences: those of the numbers themselves would cancel where the mean is large.
    const float variance = row_sum<true>(x, p.width, held, mean, (float*)scratch) / (float)p.width;
    const float scale = 1.0f / sqrtf(variance + p.eps);
    const auto give = [&](const Four& four, const Four& weight, const Four& before, u32 i) {
        Four value;
#pragma unroll
        for (u32 e = 0; e < 4; e++) value.x[e] = (four.x[e] - mean) * scale * weight.x[e] + before.x[e];
        put(p, row, i, value);
    };
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        if (held.place(i) < p.width) give(held.fours[i], weights.fours[i], before.fours[i], held.place(i));
    }
    for (u32 i = held.place(2); i < p.width; i += 4 * blockDim.x) {
        const Four four = load_four(x, i, p.width), weight = load_four(p.weight, i, p.width);
        give(four, weight, p.add ? load_four(out, i, p.width) : Four{}, i);
    }
}

KERNEL(rms_norm, 1024, Norm) { norm<false>(p); }
KERNEL(layer_norm, 1024, Norm) { norm<true>(p); }

// Four elements of each thread become others, where they are.
template <class P, class F>
DEVICE void change(const P& p, F changed) {
    float* const x = p.x + (u64)blockIdx.x * p.width;
    const u32 i = fours_at();
    if (i >= p.width) return;
    Four four = load_four(x, i, p.width);
#pragma unroll
    for (u32 e = 0; e < 4; e++) four.x[e] = changed(four.x[e]);
    store_four(x, i, p.width, four);
}

struct Clamp {
    float* x;
    u32 width;
    float limit;
};

// x = max(-limit, min(x, limit)); what is no number stays none.
KERNEL(clamp, FOURS, Clamp) {
    change(p, [&](float x) { return x > p.limit ? p.limit : x < -p.limit ? -p.limit : x; });
}

struct Scale {
    float* x;
    u32 width;
    float factor;
};

// x *= factor.
KERNEL(scale, FOURS, Scale) {
    change(p, [&](float x) { return x * p.factor; });
}

struct SoftCap {
    float* x;
    u32 width;
    float cap;
};

// x = cap tanh(x / cap).
KERNEL(soft_cap, FOURS, SoftCap) {
    change(p, [&](float x) { return p.cap * tanhf(x / p.cap); });
}

struct SiluAndMul {
    const float* gate_up;
    float* out;
    u16* half;
    u32 width;
    u32 half_stride;
};

// out = activated(gate) * up.
template <class F>
DEVICE void gate(const SiluAndMul& p, F activated) {
    const u64 row = blockIdx.x;
    const u32 i = fours_at();
    if (i >= p.width) return;
    const float* const both = p.gate_up + row * 2 * p.width;
    const Four gate = load_four(both, i, p.width), up = load_four(both + p.width, i, p.width);
    Four value;
#pragma unroll
    for (u32 e = 0; e < 4; e++) value.x[e] = activated(gate.x[e]) * up.x[e];
    put(p, row, i, value);
}

// With silu(g) = g / (1 + e^-g).
KERNEL(silu_and_mul, FOURS, SiluAndMul) {
    gate(p, [](float g) { return g / (1.0f + expf(-g)); });
}

// With gelu(g) = g / 2 (1 + tanh(√(2 / π) (g + 0.044715 g³))), by (1 + tanh(u)) / 2 = 1 / (1 + e^-2u).
KERNEL(gelu_tanh_and_mul, FOURS, SiluAndMul) {
    gate(p, [](float g) { return g / (1.0f + expf(-1.5957691f * (g + 0.044715f * g * g * g))); });
}

struct Gelu {
    const float* x;
    float* out;
    u16* half;
    u32 width;
    u32 half_stride;
};

// out = x Φ(x), by the complement of the error function: where x is far below 0, 1 + erf(x) would be what rounding leaves of it.
KERNEL(gelu, FOURS, Gelu) {
    const u64 row = blockIdx.x;
    const u32 i = fours_at();
    if (i >= p.width) return;
    Four four = load_four(p.x + row * p.width, i, p.width);
#pragma unroll
    for (u32 e = 0; e < 4; e++) four.x[e] = 0.5f * four.x[e] * erfcf(four.x[e] * -0.707106781f);
    put(p, row, i, four);
}

struct Gather {
    const float* x;
    const u32* rows;
    float* out;
    u16* half;
    u32 width;
    u32 half_stride;
};

// out[i] = x[rows[i]]
KERNEL(gather, FOURS, Gather) {
    const u64 row = blockIdx.x;
    const u32 i = fours_at();
    if (i >= p.width) return;
    put(p, row, i, load_four(p.x + (u64)p.rows[row] * p.width, i, p.width));
}

struct Halve {
    const float* x;
    u16* half;
    u32 width;
    u32 half_stride;
};

// The bf16 copy of a buffer whose producer left none.
KERNEL(halve, FOURS, Halve) {
    const u64 row = blockIdx.x;
    const u32 i = fours_at();
    if (i < p.width) store_halves(p.half + row * p.half_stride, i, p.width, load_four(p.x + row * p.width, i, p.width));
}

struct AddBias {
    const float* bias;
    float* out;
    u32 width;
};

// out += bias, after a matrix product by a library.
KERNEL(add_bias, FOURS, AddBias) {
    float* const out = p.out + (u64)blockIdx.x * p.width;
    const u32 i = fours_at();
    if (i >= p.width) return;
    Four four = load_four(out, i, p.width);
    const Four bias = load_four(p.bias, i, p.width);
#pragma unroll
    for (u32 e = 0; e < 4; e++) four.x[e] += bias.x[e];
    store_four(out, i, p.width, four);
}

struct CopyBlock {
    u8* cache;
    u64 from;
    u64 to;
    u64 layer_bytes;
    u32 block_bytes;
};

// A block of the cache to another, in all layers: grid [pieces, layers]; 16 bytes a thread.
KERNEL(copy_block, 256, CopyBlock) {
    const u64 at = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 16;
    if (at >= p.block_bytes) return;
    u8* const layer = p.cache + blockIdx.y * p.layer_bytes;
    const u64 rest = p.block_bytes - at;
    if (rest >= 16) {
        *(Quad*)(layer + p.to * p.block_bytes + at) = *(const Quad*)(layer + p.from * p.block_bytes + at);
    } else {
        for (u64 i = at; i < p.block_bytes; i += 4) {
            *(u32*)(layer + p.to * p.block_bytes + i) = *(const u32*)(layer + p.from * p.block_bytes + i);
        }
    }
}

struct Carry {
    u32* tokens;
    const u32* drawn;
    // Row, entry of `drawn`.
    const u32* pairs;
    u32 count;
    // Of an entry of `drawn`; the first is the token.
    u32 words;
};

// Rows that carry on from what the step before drew get its tokens. A thread for each.
KERNEL(carry, 256, Carry) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < p.count) p.tokens[p.pairs[2 * i]] = p.drawn[(u64)p.pairs[2 * i + 1] * p.words];
}

struct RopeCache {
    float* qkv;
    const float* q_norm;
    const float* k_norm;
    // [positions, half] cosines and sines, times the magnitude.
    const float* cosines;
    const float* sines;
    const u32* positions;
    const i64* slots;
    // This layer's keys and values, [block, kv_head, 32, head_dim].
    void* keys;
    void* values;
    u32 heads;
    u32 kv_heads;
    u32 head_dim;
    u32 half;
    u32 block_size;
    u32 cache_form;
    float eps;
};

// A warp for each head of each row: grid [rows, ceil((heads + 2 kv_heads) / 4)].
KERNEL(rope_cache, 128, RopeCache) {
    const u32 head = blockIdx.y * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    const u64 row = blockIdx.x;
    if (head >= p.heads + 2 * p.kv_heads) return;
    float* const x = p.qkv + (row * (p.heads + 2 * p.kv_heads) + head) * p.head_dim;
    const bool is_query = head < p.heads, is_value = head >= p.heads + p.kv_heads;
    if (!is_value) {
        const float* const weight = is_query ? p.q_norm : p.k_norm;
        float scale = 1;
        if (weight) {
            float squares = 0;
            for (u32 i = lane; i < p.head_dim; i += 32) squares += x[i] * x[i];
            scale = 1.0f / sqrtf(warp_sum(squares) / (float)p.head_dim + p.eps);
            // Elements are read by one lane above and written by another below; an exchange orders no memory.
            warp_barrier();
        }
        const u64 angle = (u64)p.positions[row] * p.half;
        for (u32 i = lane; i < p.half; i += 32) {
            const float a = weight ? x[i] * scale * weight[i] : x[i];
            const float b = weight ? x[i + p.half] * scale * weight[i + p.half] : x[i + p.half];
            const float c = p.cosines[angle + i], s = p.sines[angle + i];
            x[i] = a * c - b * s;
            x[i + p.half] = b * c + a * s;
        }
        if (weight) {
            for (u32 i = 2 * p.half + lane; i < p.head_dim; i += 32) x[i] *= scale * weight[i];
        }
    }
    const i64 slot = p.slots[row];
    if (is_query || slot < 0) return;
    warp_barrier();
    const u32 kv_head = (head - p.heads) % p.kv_heads;
    const u64 block = (u64)slot / p.block_size, offset = (u64)slot % p.block_size;
    const u64 at = ((block * p.kv_heads + kv_head) * p.block_size + offset) * p.head_dim;
    void* const cache = is_value ? p.values : p.keys;
    for (u32 i = lane; i < p.head_dim; i += 32) {
        switch (p.cache_form) {
            case CACHE_BF16:
                ((u16*)cache)[at + i] = to_bf16(x[i]);
                break;
            case CACHE_FP8:
                ((u8*)cache)[at + i] = to_e4m3(x[i]);
                break;
            default:
                ((float*)cache)[at + i] = x[i];
        }
    }
}
