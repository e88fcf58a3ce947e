# SPDX-License-Identifier: MIT
"""Every file operation of a store, one method each: the one seam where tests fail, record and replay them."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from typing import TYPE_CHECKING, Any, NewType

from ..errors import PermissionDenied, StoreFailed
from ..kernel.packing import begin_writing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..kernel.packing import Xxh64

__all__ = ["Directory", "File", "Files", "failure"]

Directory = NewType("Directory", int)
"""A descriptor of an open directory."""
File = NewType("File", int)
"""A descriptor of an open file."""

_COMMON = os.O_CLOEXEC | os.O_NOFOLLOW
_ABOUT = {
    errno.ENOSPC: "free some space, or prune older generations",
    errno.EDQUOT: "free some of the quota, or prune older generations",
    errno.EROFS: "mount it writable",
    errno.EIO: "look at the kernel's log and at the disk",
    errno.ENOENT: "the store's directory went away: give it back, or open the store again",
    errno.ESTALE: "the store's directory went away: open the store again",
    errno.EMFILE: "raise the limit of descriptors (ulimit -n), or close some",
    errno.ENFILE: "raise the sysctl fs.file-max, or close some descriptors",
    errno.ENOLCK: "keep the store on a file system that has locks",
    errno.EINVAL: "the file system cannot do what a store needs: keep it on a local one, as ext4, xfs, btrfs or tmpfs",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or keep the store on another file system",
    errno.ELOOP: "a store's own files are never symbolic links: look who put one there",
}


def failure(error: OSError, doing: str) -> StoreFailed | PermissionDenied:
    """The named error for a failed operation.

    Args:
        error: of the operating system.
        doing: what was being done, to which file, as in "write the manifest runs/a/manifests/…".
    """
    message = f"cannot {doing}: {error.strerror or error}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return PermissionDenied(f"{message}. The store belongs to who made it: run as that user", errno=error.errno)
    advice = _ABOUT.get(error.errno or 0)
    return StoreFailed(f"{message}{'. What helps: ' + advice if advice else ''}", errno=error.errno)


_locked = set[int]()


def _forget_locks() -> None:
    """In a child: a lock is its parent's, and must not outlive it. Closing a copy of the descriptor does not unlock."""
    for file in tuple(_locked):
        os.close(file)
    _locked.clear()


os.register_at_fork(after_in_child=_forget_locks)


class Files:
    """The operating system's files, as a store uses them. Names are single components, never paths.

    Methods raise `OSError` as the system does; who calls them names it by `failure`. All may be called from any thread.
    """

    def open_directory(self, path: str, within: Directory | None = None) -> Directory:
        """Open a directory; as a part of a store (``within``) it is no symbolic link."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if within is None else os.O_NOFOLLOW)
        return Directory(os.open(path, flags, dir_fd=within))

    def make_directory(self, path: str, within: Directory | None = None) -> None:
        """Make a directory that only its owner can enter."""
        os.mkdir(path, 0o700, dir_fd=within)

    def names(self, directory: Directory) -> list[str]:
        """What is in a directory, in no order."""
        # Opened anew: os.listdir() of a descriptor duplicates it, and two threads would share the place where they are.
        again = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
        try:
            return os.listdir(again)  # noqa: PTH208 - of a descriptor
        finally:
            os.close(again)

    def create(self, directory: Directory, name: str) -> File:
        """Create a file that only its owner can read; it must not be there yet."""
        return File(os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | _COMMON, 0o600, dir_fd=directory))

    def open(self, directory: Directory, name: str) -> File:
        """Open a file to be read; a regular one."""
        file = File(os.open(name, os.O_RDONLY | os.O_NONBLOCK | _COMMON, dir_fd=directory))
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise OSError(errno.EISDIR, "it is no regular file")
        return file

    def open_lock(self, directory: Directory, name: str) -> File:
        """Open a file that is there to be locked; it is made where it is not there."""
        return File(os.open(name, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | _COMMON, 0o600, dir_fd=directory))

    def nbytes(self, file: File) -> int:
        """Of a file, by its end."""
        return os.lseek(file, 0, os.SEEK_END)

    def pwrite(self, file: File, data: Any, offset: int) -> int:
        """Write some of these bytes, at least one; how many."""
        return os.pwrite(file, data, offset)

    def begin_writing(self, file: File, offset: int, nbytes: int) -> None:
        """Have the disk begin with these bytes of a file; nothing is waited for."""
        begin_writing(file, offset, nbytes)

    def preadv(self, file: File, buffers: Sequence[Any], offset: int) -> int:
        """Read into these buffers, one behind the other; how many bytes, 0 at the file's end."""
        return os.preadv(file, buffers, offset)

    def read_adding(self, file: File, room: Any, offset: int, checksum: Xxh64) -> int:
        """Read until a buffer is full or the file ends, and add what came to a checksum; how many bytes."""
        return checksum.add_read(file, room, offset)

    def sync(self, file: File) -> None:
        """Wait until a file's bytes are durable."""
        os.fsync(file)

    def sync_directory(self, directory: Directory) -> None:
        """Wait until a directory's entries are durable."""
        os.fsync(directory)

    def link(self, directory: Directory, old: str, new: str) -> None:
        """Give a file a second name, which must not be there yet."""
        os.link(old, new, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)

    def rename(self, directory: Directory, old: str, new: str) -> None:
        """Give a file another name."""
        os.rename(old, new, src_dir_fd=directory, dst_dir_fd=directory)

    def unlink(self, directory: Directory, name: str) -> None:
        """Remove a name."""
        os.unlink(name, dir_fd=directory)

    def lock(self, file: File, *, exclusive: bool, wait: bool) -> bool:
        """Lock a file by flock(2), whoever else opened it; False where it is locked and that is not waited for.

        In a child that is forked meanwhile it is closed.
        """
        how = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.flock(file, how)
        except BlockingIOError:
            return False
        _locked.add(file)
        return True

    def unlock(self, file: File) -> None:
        """Unlock a file."""
        fcntl.flock(file, fcntl.LOCK_UN)

    def release(self, file: File) -> None:
        """Unlock and close a file, whatever becomes of that."""
        try:
            self.unlock(file)
        except OSError:
            pass
        try:
            self.close(file)
        except OSError:
            pass

    def holder(self, file: File) -> int | None:
        """The process that has the exclusive lock on a file, where /proc/locks tells."""
        about = os.fstat(file)
        ours = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}:{about.st_ino}"
        try:
            with open("/proc/locks", encoding="ascii") as locks:
                rows = [line.split() for line in locks]
        except OSError:
            return None
        found = [row for row in rows if row[1] == "FLOCK" and row[3] == "WRITE"]
        # Behind some file systems (overlay, btrfs) the device is another: then the inode alone tells, if only one does.
        same = [row for row in found if row[5] == ours] or [
            row for row in found if row[5].rpartition(":")[2] == str(about.st_ino)
        ]
        return int(same[0][4]) if len(same) == 1 and int(same[0][4]) > 0 else None

    def close(self, file: File | Directory) -> None:
        """Close a file or a directory."""
        _locked.discard(file)
        os.close(file)
