"""How the rows of a loss fused with the last linear layer are cut into chunks: pure functions of shapes and dtypes."""

from typing import NamedTuple

import torch

# Bytes of a chunk's logits, and rows of a chunk at least: each chunk reads the weight and its gradient again. More rows gain
# nothing: on two cores, 2048 x 512 -> 32000 in float32 takes the same time from 128 rows a chunk to all at once.
CPU_BYTES, CPU_ROWS = 64 << 20, 256
GPU_BYTES, GPU_ROWS = 250_000_000, 2048


class Chunks(NamedTuple):
    """The rows that are not left out, and their chunks: all of one size but the last."""

    n_rows: int
    chunk_rows: int
    n_chunks: int


def chunks_of(n_rows: int, n_classes: int, dtype: torch.dtype, device_type: str, asked: int | None) -> Chunks:
    """asked: rows of a chunk that the caller wants."""
    if asked is None:
        n_bytes, least = (CPU_BYTES, CPU_ROWS) if device_type == "cpu" else (GPU_BYTES, GPU_ROWS)
        most = max(least, n_bytes // (max(1, n_classes) * dtype.itemsize))
        n_chunks = -(-n_rows // most)
        chunk_rows = -(-n_rows // max(1, n_chunks))  # the last as long as the others
    else:
        chunk_rows = min(asked, n_rows)
    return Chunks(n_rows, chunk_rows, -(-n_rows // max(1, chunk_rows)))
