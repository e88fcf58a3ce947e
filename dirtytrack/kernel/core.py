# SPDX-License-Identifier: MIT
"""The C core, loaded at first use; buffers and memory as it sees them."""

from __future__ import annotations

import sys
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from mmap import PAGESIZE as PAGE_BYTES
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedKernel
from .abi import Address

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import ModuleType

    from . import _taking
    from ._core import _FFI, _Lib

    CData = Any  # a C value; its type is known to the C compiler, which checked it

    ffi: _FFI
    lib: _Lib
    taking = _taking

__all__ = ["PAGE_BYTES", "address_of", "give_back", "load", "new_set", "pin", "pointer_to", "view_of"]

_INSTALL = (
    "Install dirtytrack on Linux (x86-64 or arm64) from a wheel, or from source with a C compiler and the Python "
    "headers (pip install dirtytrack)."
)

_loaded = False


def load() -> None:
    """Load the C core, once; every entry point calls this first.

    Raises:
        UnsupportedKernel: on a platform other than Linux, or where the extension module is missing.
        ImportError: in a sub-interpreter.
    """
    global _loaded, ffi, lib, taking
    if _loaded:
        return
    if not sys.platform.startswith("linux"):
        raise UnsupportedKernel(
            f"dirtytrack tracks writes with Linux's userfaultfd and PAGEMAP_SCAN; this is {sys.platform}. {_INSTALL}",
            feature="Linux",
        )
    if _in_subinterpreter():
        raise ImportError("dirtytrack does not work in a sub-interpreter: use it in the main one, or in a process each")
    try:
        from . import _core
    except ImportError as error:
        raise UnsupportedKernel(
            f"dirtytrack's extension module cannot be loaded ({error}). {_INSTALL}", feature="dirtytrack.kernel._core"
        ) from error
    ffi, lib = _core.ffi, _core.lib
    taking = _other_module("dirtytrack.kernel._taking", _core)
    _loaded = True


def _other_module(name: str, extension: ModuleType) -> Any:
    """A module of another name in the file of an extension: Python calls the ``PyInit_`` of that name."""
    path = str(extension.__file__)
    loader = ExtensionFileLoader(name, path)
    module = loader.create_module(ModuleSpec(name, loader, origin=path))
    loader.exec_module(module)
    return module


def _in_subinterpreter() -> bool:
    modules: Iterable[str] = ("_interpreters", "_xxsubinterpreters")  # CPython 3.13, and before
    for name in modules:
        try:
            module = __import__(name)
        except ImportError:
            continue
        return bool(module.get_current() != module.get_main())
    return False


# ---- buffers


def pin(buffer: Any, *, writable: bool) -> CData:
    """Hold a buffer: it can be neither resized nor freed while the result lives.

    Raises:
        TypeError, BufferError, ValueError: as the buffer's type says no.
    """
    # SAFETY: never released by hand: a C call in another thread may hold the last other reference.
    return ffi.from_buffer("uint8_t[]", buffer, require_writable=writable)


def address_of(pinned: CData) -> Address:
    """Where a pinned buffer's bytes are. The caller keeps the pin."""
    return Address(int(ffi.cast("uintptr_t", pinned)))


def pointer_to(address: int) -> CData:
    """Raw memory, which nobody holds."""
    return ffi.cast("uint8_t *", address)


def view_of(memory: CData, nbytes: int) -> memoryview:
    """The first bytes of a pinned buffer, of raw memory or of a C array; keeps it."""
    return memoryview(ffi.buffer(memory, nbytes)).cast("B")


def new_failure() -> CData:
    return ffi.new("dt_failure *")


def new_set() -> CData:
    """An empty dt_set; what a call puts into it is freed, or given back to its listener, with it."""
    return ffi.gc(ffi.new("dt_set *"), lib.dt_set_clear)


def give_back(cset: CData) -> None:
    """Clear a set that was not delivered: its pages go back to their listener now, whoever still holds the object."""
    cset.delivered = 0
    lib.dt_set_clear(cset)
