"""Writes a GGUF model in other weight formats.

    python requantize.py IN.gguf FORMAT OUT.gguf [FORMAT OUT.gguf …]

FORMAT is F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K or Q6_K. Every matrix is dequantised and quantised anew; a
matrix whose rows the format cannot hold (K formats need multiples of 256) becomes Q8_0. Metadata and vectors are copied.
The same input gives the same output, byte for byte. Needs numpy and gguf only.
"""

import sys
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

import kquants

# What a file says of itself (`general.file_type`), as llama.cpp numbers it.
FILE_TYPE = {
    "F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q4_0": "MOSTLY_Q4_0", "Q4_1": "MOSTLY_Q4_1", "Q5_0": "MOSTLY_Q5_0",
    "Q5_1": "MOSTLY_Q5_1", "Q8_0": "MOSTLY_Q8_0", "Q4_K": "MOSTLY_Q4_K_S", "Q5_K": "MOSTLY_Q5_K_S", "Q6_K": "MOSTLY_Q6_K",
}


def kind_for(rows: np.ndarray, wanted: Kind) -> Kind:
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if rows.shape[1] % block == 0 else Kind.Q8_0


def quantize(rows: np.ndarray, kind: Kind) -> np.ndarray:
    return kquants.quantize(rows, kind) if kind in kquants.FORMATS else gguf.quants.quantize(rows, kind)


def copy_metadata(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        item = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=item)


def write(reader: gguf.GGUFReader, matrices: dict[str, np.ndarray], wanted: str, target: Path) -> None:
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    copy_metadata(reader, writer)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPE[wanted]])
    for tensor in reader.tensors:
        if tensor.name in matrices:
            rows = matrices[tensor.name]
            kind = kind_for(rows, Kind[wanted])
            writer.add_tensor(tensor.name, quantize(rows, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def requantize(source: Path, targets: dict[str, Path]) -> None:
    """`targets` maps formats to the files to write; the source is read and dequantised once."""
    reader = gguf.GGUFReader(source)
    matrices = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        for tensor in reader.tensors
        if len(tensor.shape) > 1
    }
    for wanted, target in targets.items():
        write(reader, matrices, wanted, target)


if __name__ == "__main__":
    source, formats, files = sys.argv[1:2], sys.argv[2::2], sys.argv[3::2]
    if not source or not formats or len(formats) != len(files) or not FILE_TYPE.keys() >= set(formats):
        raise SystemExit(__doc__)
    requantize(Path(source[0]), {wanted: Path(file) for wanted, file in zip(formats, files)})
