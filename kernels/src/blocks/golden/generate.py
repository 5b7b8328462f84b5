"""Writes blocks.txt: GGUF blocks and their values according to the `gguf` Python package of llama.cpp.

    pip install gguf==0.19.0 numpy && python generate.py > blocks.txt

`decode FORMAT BYTES VALUES`: random blocks with finite scales and what `gguf.quants.dequantize` makes of them.
`encode FORMAT VALUES BYTES`: a row and what `gguf.quants.quantize` makes of it. Bytes are hex, values hex of little-endian f32.
"""
import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import quants

rng = np.random.default_rng(7)
# Offsets of the f16 factors in a block.
formats = {
    T.Q4_0: (32, 18, [0]), T.Q4_1: (32, 20, [0, 2]), T.Q5_0: (32, 22, [0]), T.Q5_1: (32, 24, [0, 2]), T.Q8_0: (32, 34, [0]),
    T.Q4_K: (256, 144, [0, 2]), T.Q5_K: (256, 176, [0, 2]), T.Q6_K: (256, 210, [208]),
}
print("# gguf 0.19.0, generate.py")
for kind, (weights, size, factors) in formats.items():
    blocks = rng.integers(0, 256, (2, size), dtype=np.uint8)
    for at in factors:
        blocks[:, at:at + 2] = rng.normal(0, 0.05, 2).astype("<f2").view(np.uint8).reshape(2, 2)
    values = quants.dequantize(blocks.reshape(1, -1), kind).astype("<f4")
    print("decode", kind.name, blocks.tobytes().hex(), values.tobytes().hex())
for kind in (T.Q4_0, T.Q4_1, T.Q8_0):
    values = rng.normal(0, 0.05, (1, 96)).astype("<f4")
    values[0, 32:64] = 0
    print("encode", kind.name, values.tobytes().hex(), quants.quantize(values, kind).tobytes().hex())
