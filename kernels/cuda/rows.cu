// Row by row: what is bound by reading and writing activations. A block for each row, unless said otherwise.
//
// Activations are f32. Where a linear reads a buffer next, its producer leaves a bf16 copy beside it (`half`, rows of `half_stride`
// elements whose padding stays zero), so that no pass of its own converts it.

// Leaves an element of `out [rows, width]`, and its copy where there are copies.
template <class P> DEVICE void put(const P& p, u64 row, u32 i, float value) {
    p.out[row * p.width + i] = value;
    if (p.half) p.half[row * p.half_stride + i] = to_bf16(value);
}

struct Embedding {
    Weights table;
    const u32* tokens;
    float* out;
    u16* half;
    u32 half_stride;
    u32 first;
};

// out[row] = table[tokens[row] - first]; zeros for a token that a part of a table does not have.
KERNEL(embedding, 256, Embedding) {
    const u64 row = blockIdx.x;
    // What lies before the part wraps around to beyond it.
    const u32 token = p.tokens[row] - p.first;
    for (u32 i = threadIdx.x; i < p.table.k; i += blockDim.x) {
        const float value = token < p.table.n ? element(p.table, token, i) : 0.0f;
        p.out[row * p.table.k + i] = value;
        if (p.half) p.half[row * p.half_stride + i] = to_bf16(value);
    }
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

// out = x / sqrt(mean(x²) + eps) * weight, or added to it
KERNEL(rms_norm, 256, Norm) {
    SHARED(scratch);
    const u64 row = blockIdx.x;
    const float* const x = p.x + row * p.width;
    float squares = 0;
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) squares += x[i] * x[i];
    const float mean = block_sum(squares, (float*)scratch) / (float)p.width;
    const float scale = 1.0f / sqrtf(mean + p.eps);
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) {
        float value = x[i] * scale * p.weight[i];
        if (p.add) value += p.out[row * p.width + i];
        put(p, row, i, value);
    }
}

// out = (x - mean(x)) / sqrt(var(x) + eps) * weight
KERNEL(layer_norm, 256, Norm) {
    SHARED(scratch);
    const u64 row = blockIdx.x;
    const float* const x = p.x + row * p.width;
    float sum = 0;
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) sum += x[i];
    const float mean = block_sum(sum, (float*)scratch) / (float)p.width;
    // Squares of differences: those of the numbers themselves would cancel where the mean is large.
    float squares = 0;
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) squares += (x[i] - mean) * (x[i] - mean);
    const float variance = block_sum(squares, (float*)scratch) / (float)p.width;
    const float scale = 1.0f / sqrtf(variance + p.eps);
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) {
        const float value = (x[i] - mean) * scale * p.weight[i];
        put(p, row, i, value);
    }
}

struct Clamp {
    float* x;
    u32 width;
    float limit;
};

// x = max(-limit, min(x, limit)); what is no number stays none. Grid [rows, ceil(width / 256)].
KERNEL(clamp, 256, Clamp) {
    const u32 i = blockIdx.y * blockDim.x + threadIdx.x;
    if (i >= p.width) return;
    float* const x = p.x + (u64)blockIdx.x * p.width + i;
    if (*x > p.limit) *x = p.limit;
    if (*x < -p.limit) *x = -p.limit;
}

struct Scale {
    float* x;
    u32 width;
    float factor;
};

// x *= factor. Grid [rows, ceil(width / 256)].
KERNEL(scale, 256, Scale) {
    const u32 i = blockIdx.y * blockDim.x + threadIdx.x;
    if (i < p.width) p.x[(u64)blockIdx.x * p.width + i] *= p.factor;
}

struct SoftCap {
    float* x;
    u32 width;
    float cap;
};

// x = cap tanh(x / cap). Grid [rows, ceil(width / 256)].
KERNEL(soft_cap, 256, SoftCap) {
    const u32 i = blockIdx.y * blockDim.x + threadIdx.x;
    if (i >= p.width) return;
    float* const x = p.x + (u64)blockIdx.x * p.width + i;
    *x = p.cap * tanhf(*x / p.cap);
}

struct SiluAndMul {
    const float* gate_up;
    float* out;
    u16* half;
    u32 width;
    u32 half_stride;
};

// out = silu(gate) * up. Grid [rows, ceil(width / 256)]: along y there are 65,535 blocks at most, and more rows of experts than that.
KERNEL(silu_and_mul, 256, SiluAndMul) {
    const u64 row = blockIdx.x;
    const u32 i = blockIdx.y * blockDim.x + threadIdx.x;
    if (i >= p.width) return;
    const float gate = p.gate_up[row * 2 * p.width + i], up = p.gate_up[row * 2 * p.width + p.width + i];
    const float value = gate / (1.0f + expf(-gate)) * up;
    put(p, row, i, value);
}

// out = gelu(gate) * up with gelu(g) = g / 2 (1 + tanh(√(2 / π) (g + 0.044715 g³))), by (1 + tanh(u)) / 2 = 1 / (1 + e^-2u). Grid as of
// silu_and_mul.
KERNEL(gelu_tanh_and_mul, 256, SiluAndMul) {
    const u64 row = blockIdx.x;
    const u32 i = blockIdx.y * blockDim.x + threadIdx.x;
    if (i >= p.width) return;
    const float gate = p.gate_up[row * 2 * p.width + i], up = p.gate_up[row * 2 * p.width + p.width + i];
    const float value = gate / (1.0f + expf(-1.5957691f * (gate + 0.044715f * gate * gate * gate))) * up;
    put(p, row, i, value);
}

struct Gelu {
    const float* x;
    float* out;
    u16* half;
    u32 width;
    u32 half_stride;
};

// out = x Φ(x), by the complement of the error function: where x is far below 0, 1 + erf(x) would be what rounding leaves of it.
// Grid [rows, ceil(width / 256)].
KERNEL(gelu, 256, Gelu) {
    const u64 row = blockIdx.x;
    const u32 i = blockIdx.y * blockDim.x + threadIdx.x;
    if (i >= p.width) return;
    const float x = p.x[row * p.width + i], value = 0.5f * x * erfcf(x * -0.707106781f);
    put(p, row, i, value);
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
KERNEL(gather, 256, Gather) {
    const u64 row = blockIdx.x, from = p.rows[row];
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) {
        const float value = p.x[from * p.width + i];
        put(p, row, i, value);
    }
}

struct Halve {
    const float* x;
    u16* half;
    u32 width;
    u32 half_stride;
};

// The bf16 copy of a buffer whose producer left none.
KERNEL(halve, 256, Halve) {
    const u64 row = blockIdx.x;
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) p.half[row * p.half_stride + i] = to_bf16(p.x[row * p.width + i]);
}

struct AddBias {
    const float* bias;
    float* out;
    u32 width;
};

// out += bias, after a matrix product by a library.
KERNEL(add_bias, 256, AddBias) {
    const u64 row = blockIdx.x;
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) p.out[row * p.width + i] += p.bias[i];
}

struct Widen {
    Weights from;
    u16* to;
};

// A quantised matrix as bf16 [n, stride], for products with many rows. A block for each row.
KERNEL(widen, 256, Widen) {
    const u64 row = blockIdx.x;
    for (u32 i = threadIdx.x; i < p.from.stride; i += blockDim.x) {
        p.to[row * p.from.stride + i] = i < p.from.k ? to_bf16(element(p.from, row, i)) : (u16)0;
    }
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
