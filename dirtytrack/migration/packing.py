# SPDX-License-Identifier: MIT
"""Compressed pages, where an extra is installed: zstd and LZ4."""

from __future__ import annotations

from typing import Any

from ..errors import ProtocolViolated
from .wire import Codec

__all__ = ["compressor", "decompress"]


def compressor(codec: Codec) -> Any:
    """bytes-like -> bytes, for one thread.

    Raises:
        ImportError: the package is not installed.
    """
    if codec is Codec.ZSTD:
        import zstandard

        return zstandard.ZstdCompressor(level=1).compress
    if codec is Codec.LZ4:
        import lz4.frame

        return lambda data: lz4.frame.compress(bytes(data), store_size=True)
    return None


def decompress(codec: Codec, data: Any, nbytes: int) -> Any:
    """Exactly so many bytes, never more in memory.

    Raises:
        ProtocolViolated: they are not so many, or no compressed data.
        ImportError: the package is not installed.
    """
    try:
        if codec is Codec.ZSTD:
            import zstandard

            params = zstandard.get_frame_parameters(bytes(data[:18]))
            if params.content_size != nbytes:
                raise ValueError(f"it has {params.content_size} bytes instead of {nbytes}")
            found = zstandard.ZstdDecompressor().decompress(bytes(data), max_output_size=nbytes)
        else:
            import lz4.frame

            made = lz4.frame.LZ4FrameDecompressor()
            found = made.decompress(bytes(data), max_length=nbytes + 1)
            if not made.eof or made.unused_data:
                raise ValueError("it does not end where it should")
    except (ValueError, RuntimeError, EOFError) as error:
        raise ProtocolViolated(f"what came is not what was compressed: {error}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("zstandard", "zstd", "lz4"):
            raise ProtocolViolated(f"what came is not what was compressed: {error}") from error
        raise
    if len(found) != nbytes:
        raise ProtocolViolated(f"what came is {len(found)} bytes, where {nbytes} were said")
    return found
