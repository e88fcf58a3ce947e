# SPDX-License-Identifier: MIT
"""What all exports have in common: a folder that appears whole or not at all, and a generation read piece by piece."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import (
    DamagedCheckpoint,
    DirtyTrackError,
    InvalidCheckpoint,
    PermissionDenied,
    StoreFailed,
    UnsupportedKernel,
)
from ..coding import Decoder
from ..joining import generation_of as any_generation_of
from ..reading import HeldFrames, Window, letting_go
from ..segments import FRAME_NBYTES
from ..store import open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from ..crew import Crew
    from ..joining import AnyGeneration
    from ..manifests import Manifest, RegionEntry
    from ..protocols import Store
    from ..reading import Target

__all__ = [
    "Reading",
    "appearing",
    "failed",
    "generation_of",
    "imported",
    "of_a_whole_revision",
    "require_options",
    "require_representable",
]

_LEAST_MEMORY = 8 * FRAME_NBYTES
_ABOUT = {
    errno.ENOSPC: "make room, or export to another disk",
    errno.EDQUOT: "the quota is used up: make room, or export to another disk",
    errno.EROFS: "export to a file system that can be written to",
    errno.ENAMETOOLONG: "choose a shorter path",
}


def imported(name: str, extra: str) -> Any:
    """A package that an extra of ours brings.

    Raises:
        UnsupportedKernel: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UnsupportedKernel(
            f"this export needs the package {package}, which cannot be imported ({error}): "
            f'pip install "dirtytrack[{extra}]"',
            feature=package,
        ) from error


def require_options(names: Any, memory_bytes: Any, threads: Any) -> None:
    """Refuse less memory than reading takes, and what is no list of names or no number.

    Raises:
        InvalidCheckpoint.
    """
    if isinstance(names, str):
        raise InvalidCheckpoint(f"names= is a list of names, not {names!r}")
    if type(memory_bytes) is not int or memory_bytes < _LEAST_MEMORY:
        raise InvalidCheckpoint(f"memory_bytes= is a number from {_LEAST_MEMORY} on, not {memory_bytes!r}")
    if threads is not None and (type(threads) is not int or threads < 1):
        raise InvalidCheckpoint(f"threads= is a whole number from 1 on, not {threads!r}")


def require_representable(unknown: Sequence[RegionEntry], format: str) -> None:
    """Refuse buffers of types that a format does not have.

    Raises:
        InvalidCheckpoint: there are any; all are named.
    """
    if unknown:
        named = ", ".join(f"{region.name!r} ({region.dtype})" for region in unknown[:8])
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        raise InvalidCheckpoint(
            f"{format} has no type for {named}{more}: pass as_bytes=True (--as-bytes) to write such buffers as bytes, "
            "with their type and shape told beside them, or names= (--name) for those to export"
        )


# ---- where to


def failed(error: OSError, target: str) -> DirtyTrackError:
    """The named error for a target that cannot be written to."""
    why = f"{target} cannot be written: {error.strerror or error}"
    if isinstance(error, PermissionError):
        return PermissionDenied(f"{why}. Export to where this user may write", errno=error.errno)
    advice = _ABOUT.get(error.errno or 0)
    return StoreFailed(f"{why}{'. What helps: ' + advice if advice else ''}", errno=error.errno)


@contextmanager
def appearing(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder beside the target, which gets the target's name at the end, durably, with all that is in it by then.

    It is removed where anything fails. Whoever kills the process leaves a folder ``.NAME.PID-….new``, and no target.

    Raises:
        InvalidCheckpoint: the target is there, and no empty folder.
        PermissionDenied, StoreFailed: it cannot be written.
    """
    path = Path(os.path.abspath(target))  # noqa: PTH100 - resolve() would follow links
    if "://" in str(target):
        raise InvalidCheckpoint(
            f"{target} is no path of this machine: for zarr, open a store there and pass that; for PyTorch, export to "
            "a folder and copy it"
        )
    beside = path.parent / f".{path.name[:200]}.{os.getpid()}-{os.urandom(4).hex()}.new"
    try:
        _require_free(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir(mode=0o700)
        yield beside
        _make_durable(beside)
        try:
            beside.rename(path)  # over an empty folder too; over nothing else
        except OSError:
            _require_free(path)  # somebody made it meanwhile
            raise
        _sync(path.parent)
    except OSError as error:
        if isinstance(error, DirtyTrackError):
            raise
        raise failed(error, str(error.filename or path)) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _require_free(path: Path) -> None:
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise InvalidCheckpoint(
            f"{path} is there already, and nothing is overwritten: export to a path that is not there yet, or to an "
            "empty folder"
        )


def _make_durable(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            _sync(Path(parent, name))
        _sync(Path(parent))


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


# ---- what is read


def of_a_whole_revision(
    store: Store | str | os.PathLike[str], generation: int | None, export: Callable[[Store, Manifest], object]
) -> Manifest:
    """Export the highest revision of a generation that is whole: all are the same, as other segments have it.

    Args:
        store: it, or its path; nothing of it is removed meanwhile.
        generation: which; None: the newest.
        export: called with each revision until one is exported; it leaves nothing behind where it fails.

    Returns:
        The manifest of the one that was.
    """
    with letting_go(), open_store(store) as opened, opened.reading():
        number = opened.manifest(generation).generation
        problem: DamagedCheckpoint | None = None
        for kept in sorted((kept for kept in opened.catalog() if kept.generation == number), reverse=True):
            try:
                manifest = opened.manifest(*kept)
                export(opened, manifest)
            except DamagedCheckpoint as error:
                problem = problem or error
                continue
            return manifest
        assert problem is not None, "it has a revision"
        raise problem


def generation_of(
    store: Store, manifest: Manifest, names: Collection[str] | None, decrypt: Callable[[bytes], bytes] | None
) -> AnyGeneration:
    """A generation, or some of its buffers; close it.

    Raises:
        InvalidCheckpoint: it has no buffer of such a name.
    """
    known = [region.name for region in manifest.regions]
    for name in names if names is not None else ():
        if name not in known:
            there = ", ".join(map(repr, known[:8])) + (", …" if len(known) > 8 else "")
            raise InvalidCheckpoint(f"generation {manifest.generation} has no buffer {name!r}; it has {there}")
    return any_generation_of(store, manifest, None if names is None else set(names), Decoder(decrypt))


class Reading:
    """The bytes of a generation's regions, some at a time, each of them checked.

    Args:
        found: which.
        crew: who read.
        memory_bytes: that frames may take which the next piece needs too.
        progress: told of the bytes that are done and those that there are.

    Thread safety: one thread at a time.
    """

    def __init__(
        self, found: AnyGeneration, crew: Crew, memory_bytes: int, progress: Callable[[int, int], object] | None
    ) -> None:
        self._found, self._crew, self._memory_bytes, self._progress = found, crew, memory_bytes, progress
        self._region: RegionEntry | None = None
        self._held = HeldFrames(memory_bytes)
        self._done, self._total = 0, sum(region.nbytes for region in found.regions)

    def read(self, region: RegionEntry, low: int, target: Target) -> bool:
        """Put the bytes [low, low + target.nbytes) of a region there.

        Returns:
            False where nothing but zeros was ever stored of them; nothing was put there then.
        """
        high = low + target.nbytes
        if not self._found.touched(region.number, low, high, but_zeros=True):
            return False
        if region is not self._region:
            self._region, self._held = region, HeldFrames(self._memory_bytes)
        self._found.read([Window(region, low, target)], self._crew, self._held)
        return True

    def count(self, nbytes: int) -> None:
        """So many bytes more are where they go."""
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)
