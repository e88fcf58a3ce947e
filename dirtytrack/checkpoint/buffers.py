# SPDX-License-Identifier: MIT
"""Buffers by name: where their bytes are and what they mean; and from bytes back to arrays."""

from __future__ import annotations

import json
import math
import struct
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import InvalidMemory
from ..kernel import core
from ..memory import pin

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..memory import AnyBuffer, Memory
    from .manifests import RegionEntry

    Saveable = AnyBuffer | tuple[int, int] | Any  # a tensor of PyTorch has no buffer protocol

__all__ = ["Described", "array_of", "describe", "misfits", "numpy_dtype", "torch_dtype"]

_TORCH = "torch."
_LITTLE = "<" if sys.byteorder == "little" else ">"
_KINDS = dict.fromkeys("bhilqn", "i") | dict.fromkeys("BHILQN", "u") | dict.fromkeys("efd", "f") | {"?": "b"}
_FORMATS = {"i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"}
_FORMATS |= {"f2": "e", "f4": "f", "f8": "d", "b1": "?"}
_SAME_IN_NUMPY = {
    "bool": "b1",
    "uint8": "u1",
    "int8": "i1",
    **{f"{kind}int{8 * n}": f"{kind or 'i'}{n}" for kind in ("", "u") for n in (2, 4, 8)},
    **{f"float{8 * n}": f"f{n}" for n in (2, 4, 8)},
    **{f"complex{8 * n}": f"c{n}" for n in (8, 16)},
}


class Described(NamedTuple):
    """A buffer, as a checkpoint knows it."""

    name: str
    tracked: AnyBuffer | tuple[int, int]
    """What a tracker takes: the buffer, or a view of its bytes."""
    address: int
    nbytes: int
    hold: Any
    """Keeps the bytes where they are; None for a raw (address, nbytes)."""
    dtype: str | None
    """Of its elements: numpy's ``dtype.str`` (JSON for one with fields), or ``torch.`` and the tensor's type. None
    where they are bytes and nothing else is known."""
    shape: tuple[int, ...] | None
    memory: Memory | None
    """The `Memory` that it is, where it is one: that may be resized."""


def describe(name: object, buffer: Saveable) -> Described:
    """Find where a buffer's bytes are and what they mean.

    Args:
        name: a string, which is not empty.
        buffer: writable and C-contiguous: an array of NumPy without Python objects in it, a tensor of PyTorch on the
            CPU, whatever else has the buffer protocol, `multiprocessing.shared_memory.SharedMemory`, a `Memory`, or an
            (address, nbytes) pair, which cannot be held.

    Raises:
        InvalidMemory: it is none of these; the message names it and says why.
    """
    if not isinstance(name, str) or not 0 < len(name) <= 4096:
        raise InvalidMemory(f"a buffer's name is a string of 1 to 4096 characters, not {name!r:.80}")
    core.load()
    try:
        tracked, dtype, shape = _meaning(buffer)
        pinned = pin(tracked, what=f"buffer {name!r}")
    except InvalidMemory as error:
        if repr(name) in str(error):
            raise
        raise InvalidMemory(f"buffer {name!r}: {error}") from error
    if dtype is None and pinned.dtype not in (None, "B") and not _numpy_array(buffer):
        dtype, shape = _of_format(str(pinned.dtype)), pinned.shape
        shape = None if dtype is None else shape
    return Described(name, tracked, pinned.address, pinned.nbytes, pinned.hold, dtype, shape, pinned.memory)


def _meaning(buffer: Any) -> tuple[Any, str | None, tuple[int, ...] | None]:
    """What is tracked, dtype and shape."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(buffer, torch.Tensor):
        return _bytes_of_tensor(torch, buffer), str(buffer.dtype), tuple(buffer.shape)
    if _numpy_array(buffer):
        return buffer, _dtype_of(buffer), tuple(buffer.shape)
    return buffer, None, None


# ---- NumPy


def _numpy_array(buffer: object) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(buffer, numpy.ndarray)


def _dtype_of(array: Any) -> str:
    numpy = sys.modules["numpy"]
    dtype: Any = array.dtype
    masked = sys.modules.get("numpy.ma")
    if masked is not None and isinstance(array, masked.MaskedArray):
        raise InvalidMemory(
            "this is a masked array, which is two: pass its .data and its .mask under names of their own"
        )
    if dtype.hasobject:
        raise InvalidMemory(
            f"the elements of this array are Python objects ({dtype}), whose bytes are pointers: convert them to a "
            "type of fixed size"
        )
    if dtype.fields is not None:
        try:
            descr = import_module("numpy.lib.format").dtype_to_descr(dtype)
        except ValueError as error:
            raise InvalidMemory(
                f"the type of this array cannot be kept ({error}): pass a view of it as another one, or as bytes"
            ) from error
        return json.dumps(descr, separators=(",", ":"))
    told = str(dtype.str)
    return told if numpy.dtype(told) == dtype else str(dtype.name)  # bfloat16 of ml_dtypes calls itself V2


def _listed_to_descr(descr: Any) -> Any:
    """What JSON made lists of, as NumPy wants it."""
    if not isinstance(descr, list):
        return descr
    fields = []
    for field in descr:
        name, kind, *shape = field
        name = tuple(name) if isinstance(name, list) else name
        fields.append((name, _listed_to_descr(kind), *map(tuple, shape)))
    return fields


def _numpy_dtype(numpy: Any, dtype: str) -> Any:
    """None where this NumPy knows no such type."""
    try:
        if dtype.startswith("["):
            found = import_module("numpy.lib.format").descr_to_dtype(_listed_to_descr(json.loads(dtype)))
        else:
            found = numpy.dtype(dtype)
    except (TypeError, ValueError, SyntaxError, RecursionError):
        return None
    return None if found.hasobject else found


def numpy_dtype(dtype: str) -> Any:
    """The type of NumPy, which must be there, for one as `Described` has it; None where NumPy knows no such type."""
    plain = _plain_kind(dtype)
    return None if plain.startswith(_TORCH) else _numpy_dtype(import_module("numpy"), plain)


# ---- PyTorch


def _bytes_of_tensor(torch: Any, tensor: Any) -> Any:
    if tensor.device.type != "cpu":
        raise InvalidMemory(
            f"this tensor is on {tensor.device}, whose writes the kernel does not see: pass one on the CPU"
        )
    if tensor.layout is not torch.strided or not tensor.is_contiguous():
        raise InvalidMemory("this tensor is not contiguous: pass the one that owns the memory, or tensor.contiguous()")
    if tensor.is_conj() or tensor.is_neg():
        raise InvalidMemory("this tensor is a lazy conjugate or negation: pass tensor.resolve_conj().resolve_neg()")
    if not tensor.numel():
        raise InvalidMemory("this tensor is empty")
    # Through NumPy, which makes PyTorch refuse to resize it.
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def torch_dtype(torch: Any, dtype: str) -> Any:
    """The type of PyTorch for one as `Described` has it; None where PyTorch has none of these bytes."""
    plain = _plain_kind(dtype)
    kinds = {f"{'|' if kind.endswith('1') else _LITTLE}{kind}": name for name, kind in _SAME_IN_NUMPY.items()}
    found = getattr(torch, kinds.get(plain, plain.removeprefix(_TORCH)), None)  # bfloat16 is called so by both
    return found if isinstance(found, torch.dtype) else None


# ---- anything else


def _of_format(format: str) -> str | None:
    """NumPy's word for a format of the buffer protocol, where it has one."""
    order, kind = (format[0], format[1:]) if format[:1] in "<>=@!" else ("@", format)
    letter = _KINDS.get(kind)
    if letter is None:
        return None
    itemsize = struct.calcsize(format)
    if itemsize == 1:
        return f"|{letter}1"
    return f"{'>' if order in '>!' else '<' if order == '<' else _LITTLE}{letter}{itemsize}"


def _plain_kind(dtype: str) -> str:
    """The one word for types that mean the same bytes in NumPy and in PyTorch."""
    if dtype.startswith(_TORCH):
        same = _SAME_IN_NUMPY.get(dtype[len(_TORCH) :])
        if same is None:
            return dtype
        return f"|{same}" if same.endswith("1") else _LITTLE + same
    return dtype


def misfits(regions: Mapping[str, RegionEntry], buffers: Mapping[str, Described]) -> list[str]:
    """Why these buffers cannot take those regions, a sentence each; none where each fits.

    Lengths must be the same; types and shapes too where both are known. Buffers that are mere bytes take anything of
    their length.
    """
    problems = []
    for name in buffers.keys() - regions.keys():
        there = ", ".join(map(repr, list(regions)[:8])) or "none"
        problems.append(f"the checkpoint has no buffer {name!r}; it has {there}")
    for name, region in regions.items():
        given = buffers.get(name)
        if given is None:
            continue
        if given.nbytes != region.nbytes:
            problems.append(f"{name!r} has {given.nbytes} bytes, in the checkpoint {region.nbytes}")
        elif given.dtype is not None and region.dtype is not None:
            if _plain_kind(given.dtype) != _plain_kind(region.dtype):
                problems.append(f"{name!r} is of type {given.dtype}, in the checkpoint {region.dtype}")
            elif None not in (given.shape, region.shape) and given.shape != region.shape:
                problems.append(f"{name!r} has the shape {given.shape}, in the checkpoint {region.shape}")
    return sorted(problems)


def array_of(memory: Any, dtype: str | None, shape: tuple[int, ...] | None) -> Any:
    """The array that is in a writable buffer; copies nothing, and keeps the buffer.

    Args:
        memory: its bytes, exactly.
        dtype, shape: as `Described` has them.

    Returns:
        For a type of PyTorch, a tensor, where PyTorch can be imported and has that type. Else an array of NumPy, where
        that can be imported: of the type, or of bytes (``uint8``, in one dimension) where NumPy does not have it.
        Else a memoryview: of the type and shape, or of bytes.
    """
    view = memoryview(memory).cast("B")
    if dtype is not None and dtype.startswith(_TORCH):
        tensor = _tensor_of(view, dtype[len(_TORCH) :], shape)
        if tensor is not None:
            return tensor
        dtype = _plain_kind(dtype)
    try:
        import numpy as np
    except ImportError:
        return _viewed(view, dtype, shape)
    found = None if dtype is None or dtype.startswith(_TORCH) else _numpy_dtype(np, dtype)
    if found is None or not _fits(view.nbytes, found.itemsize, shape):
        return np.frombuffer(view, np.uint8)
    # Not frombuffer(): it takes no dtype of no bytes, and no bytes of some.
    return np.ndarray(shape if shape is not None else (view.nbytes // found.itemsize,), found, buffer=view)


def _fits(nbytes: int, itemsize: int, shape: tuple[int, ...] | None) -> bool:
    if not itemsize:
        return False
    return nbytes % itemsize == 0 if shape is None else itemsize * math.prod(shape) == nbytes


def _tensor_of(view: memoryview, kind: str, shape: tuple[int, ...] | None) -> Any:
    try:
        torch: Any = import_module("torch")
    except ImportError:
        return None
    dtype = getattr(torch, kind, None)
    if not isinstance(dtype, torch.dtype) or not _fits(view.nbytes, dtype.itemsize, shape):
        return None
    flat = torch.frombuffer(view, dtype=dtype)
    return flat if shape is None else flat.reshape(shape)


def _viewed(view: memoryview, dtype: str | None, shape: tuple[int, ...] | None) -> memoryview:
    kind = None
    if dtype is not None and dtype[:1] in (_LITTLE, "|"):
        kind = _FORMATS.get(dtype[1:])
    if kind is None or not _fits(view.nbytes, struct.calcsize(kind), shape):
        return view
    return view.cast(kind) if shape is None else view.cast(kind, shape)  # type: ignore[call-overload,no-any-return]
