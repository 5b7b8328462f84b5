"""A plain quantiser to GGUF's K formats, which the `gguf` package can only read.

Scales are chosen by minimum and maximum of each sub-block, without search: the blocks are valid, their quality is not
llama.cpp's. Layouts as documented by ggml (block_q4_K, block_q5_K, block_q6_K); `python kquants.py` checks each against
`gguf.quants.dequantize`.
"""

import gguf
import numpy as np

SUPER = 256


def _half(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounds [blocks] to float16; returns its bytes [blocks, 2] and the value as read back."""
    half = values.astype("<f2")
    return half.view(np.uint8).reshape(-1, 2), half.astype(np.float32)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros(np.broadcast(numerator, denominator).shape, np.float32), where=denominator != 0)


def _scales_and_minima(sub: np.ndarray, levels: int):
    """For [blocks, 8, 32]: w ≈ d·s·q − dmin·m with 6-bit s and m, q in 0..levels."""
    low = np.minimum(sub.min(axis=2), 0)
    step = (sub.max(axis=2) - low) / levels
    d_bytes, d = _half(step.max(axis=1) / 63)
    m_bytes, dmin = _half((-low).max(axis=1) / 63)
    scale = np.clip(np.rint(_ratio(step, d[:, None])), 0, 63).astype(np.uint8)
    minimum = np.clip(np.rint(_ratio(-low, dmin[:, None])), 0, 63).astype(np.uint8)
    weight_step = (d[:, None] * scale)[:, :, None]
    offset = (dmin[:, None] * minimum)[:, :, None]
    q = np.clip(np.rint(_ratio(sub + offset, weight_step)), 0, levels).astype(np.uint8)
    packed = np.empty((len(sub), 12), np.uint8)
    packed[:, 0:4] = scale[:, :4] | (scale[:, 4:] >> 4 << 6)
    packed[:, 4:8] = minimum[:, :4] | (minimum[:, 4:] >> 4 << 6)
    packed[:, 8:12] = (scale[:, 4:] & 15) | (minimum[:, 4:] & 15) << 4
    return d_bytes, m_bytes, packed, q


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    d, dmin, scales, q = _scales_and_minima(blocks.reshape(-1, 8, 32), 15)
    q = q.reshape(-1, 4, 2, 32)
    nibbles = (q[:, :, 0] | q[:, :, 1] << 4).reshape(-1, 128)
    return np.concatenate([d, dmin, scales, nibbles], axis=1)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    d, dmin, scales, q = _scales_and_minima(blocks.reshape(-1, 8, 32), 31)
    high = np.zeros((len(q), 32), np.uint8)
    for sub in range(8):
        high |= q[:, sub] >> 4 << sub
    q = (q & 15).reshape(-1, 4, 2, 32)
    nibbles = (q[:, :, 0] | q[:, :, 1] << 4).reshape(-1, 128)
    return np.concatenate([d, dmin, scales, high, nibbles], axis=1)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """w ≈ d·s·(q − 32), s a signed byte for each 16 weights."""
    sub = blocks.reshape(-1, 16, 16)
    largest = np.abs(sub).max(axis=2)
    d_bytes, d = _half(largest.max(axis=1) / 31 / 127)
    scale = np.clip(np.rint(_ratio(largest / 31, d[:, None])), 0, 127)
    q = np.clip(np.rint(_ratio(sub, (d[:, None] * scale)[:, :, None])), -32, 31).astype(np.int8) + 32
    q = q.astype(np.uint8).reshape(-1, 2, 4, 32)
    low = q & 15
    ql = np.stack([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=2).reshape(-1, 128)
    high = q >> 4
    qh = (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).reshape(-1, 64)
    return np.concatenate([ql, qh, scale.astype(np.int8).view(np.uint8), d_bytes], axis=1)


_PACK = {gguf.GGMLQuantizationType.Q4_K: _q4_k, gguf.GGMLQuantizationType.Q5_K: _q5_k, gguf.GGMLQuantizationType.Q6_K: _q6_k}
FORMATS = frozenset(_PACK)


def quantize(rows: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """float32 [rows, columns] to bytes [rows, bytes per row]; columns must be a multiple of 256."""
    if rows.shape[1] % SUPER:
        raise ValueError(f"{kind.name} needs rows of a multiple of {SUPER} weights, these have {rows.shape[1]}")
    return _PACK[kind](np.ascontiguousarray(rows, np.float32).reshape(-1, SUPER)).reshape(rows.shape[0], -1)


def main() -> None:
    random = np.random.default_rng(0)
    rows = random.normal(size=(64, 1024)).astype(np.float32) * random.uniform(0.01, 3, (64, 1)).astype(np.float32)
    rows[0] = 0
    rows[1, :256] = 1.5
    for kind, bits in [("Q4_K", 4), ("Q5_K", 5), ("Q6_K", 6)]:
        kind = gguf.GGMLQuantizationType[kind]
        back = gguf.quants.dequantize(quantize(rows, kind), kind)
        error = np.abs(back - rows).max(axis=1) / np.maximum(np.abs(rows).max(axis=1), 1e-9)
        print(kind.name, "largest error relative to the row's largest weight:", error.max())
        if error.max() > 1.5 / 2**bits:
            raise SystemExit(f"{kind.name} does not survive the round trip")


if __name__ == "__main__":
    main()
