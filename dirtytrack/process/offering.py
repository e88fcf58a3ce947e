# SPDX-License-Identifier: MIT
"""The cooperative way: a process offers its memory through a UNIX socket, and another tracks it. No ptrace."""

from __future__ import annotations

import array
import os
import socket
import struct
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ..errors import InvalidMemory, PermissionDenied, TargetGone
from ..kernel import core, targets
from .attaching import require_some
from .mappings import Filter, Pattern
from .tracker import ProcessTracker

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["accept", "offer"]

_GREETING = b"dirtytrack offer 1\n"
_NAMES = ("pidfd", "uffd", "pagemap", "maps", "mem")


def _peer(channel: socket.socket) -> int:
    """The user who connected the other end, by the kernel."""
    if channel.family != socket.AF_UNIX:
        raise InvalidMemory("memory is offered through a UNIX socket: no other passes descriptors and credentials")
    _pid, uid, _gid = struct.unpack("iII", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def _pid_of(pidfd: int) -> int:
    """As it is called here; 0 where it is not seen from here.

    Raises:
        InvalidMemory: it is no pidfd.
        TargetGone: the process has ended, and was waited for.
    """
    with open(f"/proc/self/fdinfo/{pidfd}") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    if "Pid" not in fields:
        raise InvalidMemory("what came through the socket is no offer: its first descriptor is no pidfd")
    pid = int(fields["Pid"])
    if pid < 0:
        raise TargetGone("the process that made this offer has ended")
    return pid


def _require_trusted(uid: int, trust: int | None, what: str) -> None:
    if uid in (os.geteuid(), trust):
        return
    raise PermissionDenied(
        f"the peer of this socket is user {uid}, and {what}. Pass trust={uid} where that user may",
        feature="SO_PEERCRED",
    )


def offer(channel: socket.socket, *, trust: int | None = None) -> None:
    """Let whoever is at the other end of a socket track this process's memory, and read it.

    Needs no privilege on either side, and works between containers that share the socket. What is offered is a
    userfaultfd of its own: memory that this process tracks itself is told as untracked at the other end. The offer ends
    when the other end detaches or ends.

    Args:
        channel: a connected UNIX socket.
        trust: the user that may track, beside this process's own: a userfaultfd can change what memory may be written,
            and with it go the process's bytes.

    Raises:
        PermissionDenied: the peer is another user, or this process may not open a userfaultfd.
        InvalidMemory: it is no UNIX socket.
        UnsupportedKernel: this kernel cannot track.
    """
    core.load()
    uid = _peer(channel)
    _require_trusted(uid, trust, "the offer would let it read and stop this process's memory")
    with ExitStack() as opened:
        fds = []
        for name in _NAMES:
            if name == "pidfd":
                fd = os.pidfd_open(os.getpid())
            elif name == "uffd":
                fd = targets.open_userfaultfd()
            else:
                fd = targets.open_in_proc(os.getpid(), name)
            opened.callback(os.close, fd)
            fds.append(fd)
        channel.sendmsg([_GREETING], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def accept(
    channel: socket.socket,
    *,
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] | None = None,
    trust: int | None = None,
) -> ProcessTracker:
    """Track the process at the other end of a socket, which calls `offer`. Waits for it.

    Args:
        channel: a connected UNIX socket.
        include, exclude: as for `attach`.
        trust: the user whose offer is accepted, beside one's own; root accepts each.

    Returns:
        A tracker. Its ``pid`` is 0 where the process is in a pid namespace that is not seen from here: all works but
        `ProcessTracker.frozen`.

    Raises:
        PermissionDenied: the peer is another user.
        InvalidMemory: what came is no offer, or the filters match nothing.
        TargetGone: the process has ended.
    """
    core.load()
    chosen = Filter(include, exclude)
    uid = _peer(channel)
    if os.geteuid() != 0:
        _require_trusted(uid, trust, "its descriptors may be about another process than it says")
    data, ancillary, _flags, _address = channel.recvmsg(
        len(_GREETING), socket.CMSG_SPACE(4 * len(_NAMES)), socket.MSG_CMSG_CLOEXEC
    )
    with ExitStack() as opened:
        fds = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content[: len(content) // 4 * 4])
        for fd in fds:
            opened.callback(os.close, fd)
        if data != _GREETING or len(fds) != len(_NAMES):
            raise InvalidMemory(
                f"what came through the socket is no offer of this version ({data[:20]!r}, {len(fds)} descriptors): "
                "call `process.offer(socket)` at the other end"
            )
        pidfd, uffd, pagemap, maps, memory = fds
        pid = _pid_of(pidfd)
        require_some(pid, maps, chosen)
        session = targets.adopt(pid, pidfd, uffd, pagemap, maps)
        opened.pop_all()
    try:
        return ProcessTracker(pid, session, chosen, pidfd, 0.0, memory=memory)
    except BaseException:
        os.close(memory)
        raise
