"""How many queries and keys a block of the Triton attention has: what fits a GPU's shared memory. Needs no triton."""

from __future__ import annotations

BLOCKS = (64, 32, 16)  # products take no fewer than 16


def padded_depth(depth: int) -> int:
    """A head's depth as the kernels hold it: a power of two, at least 16."""
    return max(16, 1 << (depth - 1).bit_length())


def shared_bytes(depth: int, itemsize: int, block: int, major: int) -> int:
    """At most so many bytes of shared memory does a program of the kernels take, forward and backward, with heads of
    ``depth`` values of ``itemsize`` bytes on a GPU of compute capability ``major``.x: tiles of a block of rows (five;
    eight where Hopper's products of warp groups take their operands from shared memory), what products of two blocks
    are passed on in, and ages. Fitted to what Triton 3.7 compiles for sm_80 and sm_90 in its three stages."""
    tiles = 8 if major >= 9 and itemsize == 2 and block == 64 else 5
    return tiles * block * padded_depth(depth) * itemsize + 10 * block * block + 4 * block


def block_size(depth: int, itemsize: int, major: int, shared_memory: int) -> int | None:
    """The largest block whose program fits ``shared_memory`` bytes (of a block of threads, opted in: 99 KiB on L4 and
    A10, 163 KiB on A100, 227 KiB on H100); None where none does."""
    fits = (block for block in BLOCKS if shared_bytes(depth, itemsize, block, major) <= shared_memory)
    return next(fits, None)
