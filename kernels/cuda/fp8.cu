// Products of 8-bit floats with 8-bit floats, before and after the library's: rows of activations are rounded with a scale of each, and what
// was multiplied gets the scales of its row and of its output feature.

struct Round {
    const float* x;
    // Floats of 8 bits [rows, stride], padded with zeros.
    u8* to;
    // [rows]
    float* scales;
    u32 width;
    u32 stride;
};

// A block for each row. Shared memory: a number for each warp.
KERNEL(round_rows, 256, Round) {
    SHARED(scratch);
    const u64 row = blockIdx.x;
    const float* const x = p.x + row * p.width;
    float most = 0;
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) most = fmaxf(most, as_float(as_bits(x[i]) & 0x7fffffffu));
    // Of numbers that are not negative, the larger has the larger bits.
    most = as_float((u32)block_largest(as_bits(most), (u64*)scratch));
    // Not 0, nor so little that its inverse is infinite.
    const float scale = fmaxf(most / 448.0f, 1e-30f), inverse = 1.0f / scale;
    if (threadIdx.x == 0) p.scales[row] = scale;
    for (u32 i = threadIdx.x; i < p.stride; i += blockDim.x) {
        p.to[row * p.stride + i] = i < p.width ? to_e4m3(x[i] * inverse) : (u8)0;
    }
}

struct Rescale {
    // [rows, n]; may be `out`.
    const float* products;
    // [rows], [n]
    const float* row_scales;
    const float* scales;
    // Null where there is none.
    const float* bias;
    float* out;
    u32 n;
    // 1 adds to `out`, 0 replaces it.
    u32 add;
};

// Grid [rows, ceil(n / 256)].
KERNEL(rescale, 256, Rescale) {
    const u32 feature = blockIdx.y * 256 + threadIdx.x;
    if (feature >= p.n) return;
    const u64 at = (u64)blockIdx.x * p.n + feature;
    float value = p.products[at] * p.row_scales[blockIdx.x] * p.scales[feature];
    if (p.bias) value += p.bias[feature];
    p.out[at] = p.add ? p.out[at] + value : value;
}
