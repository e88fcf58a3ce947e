# SPDX-License-Identifier: MIT
"""What is done to a frame's bytes on their way to a segment and back: compressed, sealed, encrypted."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..errors import DamagedCheckpoint, InvalidCheckpoint, UnsupportedKernel
from ..kernel.packing import xxh64
from .segments import Codec

if TYPE_CHECKING:
    from collections.abc import Callable

    from .segments import Frame

__all__ = ["Decoder", "Encoded", "Encoder"]

_SEAL_NBYTES = 8
_MOST_WINDOW = 1 << 27


class Encoded(NamedTuple):
    """A frame's bytes as they are stored."""

    stored: Any
    codec: Codec
    encrypted: bool


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise UnsupportedKernel(
            "compressed checkpoints need the package zstandard, which is not installed: "
            "pip install dirtytrack[checkpoint], or save with compression=None",
            feature="zstandard",
        ) from error
    return zstandard


class Encoder:
    """Compresses and encrypts.

    Args:
        compression: ``"zstd"``, or None for none.
        level: of zstd.
        encrypt: a function from bytes to bytes, for each frame; it may be called from several threads at once.

    Raises:
        UnsupportedKernel: ``"zstd"``, and the package zstandard is not installed.
        InvalidCheckpoint: another compression, or a level that zstd does not have.

    Thread safety: everything may be called from any thread.
    """

    def __init__(
        self,
        compression: Literal["zstd"] | None = "zstd",
        level: int = 1,
        encrypt: Callable[[bytes], bytes] | None = None,
    ) -> None:
        if compression not in ("zstd", None):
            raise InvalidCheckpoint(f'compression= is "zstd" or None, not {compression!r}')
        self._zstandard = _zstandard() if compression else None
        if self._zstandard is not None and not (type(level) is int and level <= self._zstandard.MAX_COMPRESSION_LEVEL):
            raise InvalidCheckpoint(f"level= is a whole number up to {self._zstandard.MAX_COMPRESSION_LEVEL}")
        self._level, self._encrypt = level, encrypt
        self.is_plain = compression is None and encrypt is None
        """Whether bytes are stored as they are."""
        self._local = threading.local()  # a compressor is one thread's

    def encode(self, plain: Any) -> Encoded:
        """A frame's plain bytes as they are to be stored; as they are where compressing does not make them fewer.

        Raises:
            InvalidCheckpoint: ``encrypt`` gave no bytes.
        """
        stored, codec = plain, Codec.NONE
        if self._zstandard is not None:
            compressor = getattr(self._local, "compressor", None)
            if compressor is None:
                compressor = self._zstandard.ZstdCompressor(level=self._level, write_content_size=True)
                self._local.compressor = compressor
            compressed = compressor.compress(plain)
            if len(compressed) < memoryview(plain).nbytes:
                stored, codec = compressed, Codec.ZSTD
        if self._encrypt is None:
            return Encoded(stored, codec, False)
        sealed = self._encrypt(xxh64(plain).to_bytes(_SEAL_NBYTES, "little") + bytes(stored))
        if not isinstance(sealed, (bytes, bytearray, memoryview)):
            raise InvalidCheckpoint(f"encrypt= returns bytes, not {type(sealed).__name__}")
        return Encoded(bytes(sealed), codec, True)  # nobody changes those


class Decoder:
    """Decrypts and decompresses.

    Args:
        decrypt: undoes what ``encrypt`` did; it may be called from several threads at once.

    Thread safety: everything may be called from any thread.
    """

    def __init__(self, decrypt: Callable[[bytes], bytes] | None = None) -> None:
        self._decrypt = decrypt
        self._local = threading.local()

    def decode(self, frame: Frame, stored: Any) -> Any:
        """A frame's plain bytes, exactly as many as it says. Never more memory is taken than for those.

        Args:
            frame: what the index says.
            stored: its bytes as they are stored, whose checksum was found right.

        Raises:
            InvalidCheckpoint: it is encrypted, and no ``decrypt`` was given, or another key.
            DamagedCheckpoint: what comes out is not what went in.
            UnsupportedKernel: it is compressed, and the package zstandard is not installed.
        """
        seal = None
        if frame.encrypted:
            seal, stored = self._opened(frame, stored)
        plain = self._decompressed(frame, stored) if frame.codec == Codec.ZSTD else stored
        if memoryview(plain).nbytes != frame.plain_nbytes:
            raise self._wrong(frame, f"they are {memoryview(plain).nbytes} instead of {frame.plain_nbytes}")
        if seal is not None and xxh64(plain) != seal:
            raise self._wrong(frame, "their checksum is another")
        return plain

    def _opened(self, frame: Frame, stored: Any) -> tuple[int, memoryview]:
        if self._decrypt is None:
            raise InvalidCheckpoint("this checkpoint is encrypted: pass decrypt=, which undoes what encrypt= did")
        try:
            opened = self._decrypt(bytes(stored))
        except Exception as error:  # ciphers that notice another key have errors of their own
            told = f": {error}" if str(error) else ""
            raise InvalidCheckpoint(
                f"decrypt= refuses a frame ({type(error).__name__}{told}): is it another key?"
            ) from error
        if not isinstance(opened, (bytes, bytearray, memoryview)):
            raise InvalidCheckpoint(f"decrypt= returns bytes, not {type(opened).__name__}")
        view = memoryview(opened).cast("B")
        if view.nbytes < _SEAL_NBYTES:
            raise self._wrong(frame, f"they are {view.nbytes}")
        return int.from_bytes(view[:_SEAL_NBYTES], "little"), view[_SEAL_NBYTES:]

    def _decompressed(self, frame: Frame, stored: Any) -> Any:
        zstandard = _zstandard()
        decompressor = getattr(self._local, "decompressor", None)
        if decompressor is None:
            decompressor = self._local.decompressor = zstandard.ZstdDecompressor(max_window_size=_MOST_WINDOW)
        try:
            told = zstandard.get_frame_parameters(stored).content_size
            if told != frame.plain_nbytes:
                raise self._wrong(frame, f"their zstd frame says {told} instead of {frame.plain_nbytes}")
            return decompressor.decompress(stored, max_output_size=frame.plain_nbytes, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise self._wrong(frame, f"zstd says: {error}") from error

    @staticmethod
    def _wrong(frame: Frame, how: str) -> InvalidCheckpoint | DamagedCheckpoint:
        if frame.encrypted:
            return InvalidCheckpoint(
                f"what decrypt= made of a frame's bytes is not what went in ({how}): is it another key?"
            )
        damage = f"the bytes of the frame at {frame.offset} cannot be what was written: {how}"
        return DamagedCheckpoint(damage, damage=(damage,))
