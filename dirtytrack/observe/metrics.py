# SPDX-License-Identifier: MIT
"""Metrics: what is observed, for Prometheus to fetch."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING, Any

from ..errors import InvalidRecording, KernelRefused, PermissionDenied, UnsupportedKernel
from ..process.mappings import named
from .arrays import np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from typing_extensions import Self

    from ..process.mappings import Mapping

__all__ = ["Metrics", "address_of"]

_LOOPBACK = "127.0.0.1"
_MOST_NAMES = 50  # each is a time series to Prometheus; what is written in others goes by this name:
_OTHERS = "[others]"


def address_of(words: str) -> tuple[str, int]:
    """Host and port of ``:9464``, ``9464``, ``host:9464`` or ``[::1]:9464``; the loopback where no host is named.

    Raises:
        ValueError: it is none of these.
    """
    host, _, port = words.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{words!r} is no address: write it as in :9464 or 0.0.0.0:9464")
    return host.strip("[]") or _LOOPBACK, int(port)


class Metrics:
    """Serves counters over HTTP, at ``/metrics``, until it is closed. By the package prometheus_client.

    Args:
        host, port: where it listens; the loopback unless said otherwise, since whoever can reach it learns the names of
            the mappings and how much is written. Port 0 takes a free one, which ``port`` tells.

    Raises:
        UnsupportedKernel: prometheus_client is not installed.
        PermissionDenied, KernelRefused: the port cannot be had.
        InvalidRecording: there is no such host.

    Thread safety: everything may be called from any thread.
    """

    def __init__(self, host: str = _LOOPBACK, port: int = 0) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            raise UnsupportedKernel(
                "metrics need the package prometheus-client, which is not installed: pip install dirtytrack[observe]",
                feature="prometheus-client",
            ) from error
        self._registry = registry = prometheus_client.CollectorRegistry()

        def counter(name: str, says: str, *labels: str) -> Any:
            return prometheus_client.Counter(f"dirtytrack_{name}", says, ["pid", *labels], registry=registry)

        def gauge(name: str, says: str) -> Any:
            return prometheus_client.Gauge(f"dirtytrack_{name}", says, ["pid"], registry=registry)

        self._epochs = counter("epochs", "Epochs collected.")
        self._pages = counter("dirty_pages", "Pages written, each once an epoch.")
        self._bytes = counter("dirty_bytes", "Bytes of those pages.")
        self._collecting = counter("collect_seconds", "Time that collects took.")
        self._by_mapping = counter("mapping_dirty_pages", "Pages written by name of the mapping.", "mapping")
        self._rate = gauge("dirty_bytes_per_second", "Bytes of pages written a second in the last epoch.")
        self._epoch_seconds = gauge("epoch_seconds", "How long the last epoch was.")
        self._mappings = gauge("mappings", "Mappings of the process, those left out included.")
        self._cpu = gauge("observer_cpu_seconds", "Processor time that the observer's thread took.")
        self._names: dict[int, set[str]] = {}
        self._lock = threading.Lock()
        try:
            self._server, self._thread = prometheus_client.start_http_server(port, addr=host, registry=registry)
        except PermissionError as error:
            raise PermissionDenied(
                f"{host}:{port} may not be listened at: {error.strerror}. Ports below 1024 take a privilege",
                errno=error.errno,
            ) from error
        except OSError as error:
            kind = InvalidRecording if isinstance(error, socket.gaierror) else KernelRefused
            raise kind(f"{host}:{port} cannot be listened at: {error.strerror}", errno=error.errno) from error

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_port)

    def observe(
        self,
        runs: memoryview,
        mappings: Sequence[Mapping],
        *,
        pid: int = 0,
        seconds: float,
        collect_seconds: float = 0.0,
        cpu_seconds: float | None = None,
        page_bytes: int = 4096,
    ) -> None:
        """Count an epoch.

        Args:
            runs: as `DirtySet.runs`.
            mappings: as of its end.
            pid: of the process.
            seconds: how long it lasted.
            collect_seconds: what its collect took.
            cpu_seconds: what the observer took of a processor so far.
            page_bytes: of a page.
        """
        edges = np.asarray(runs).reshape(-1, 2).astype(np.int64)
        nbytes = int((edges[:, 1] - edges[:, 0]).sum())
        label = str(pid)
        with self._lock:
            self._epochs.labels(label).inc()
            self._pages.labels(label).inc(nbytes // page_bytes)
            self._bytes.labels(label).inc(nbytes)
            self._collecting.labels(label).inc(collect_seconds)
            self._rate.labels(label).set(nbytes / seconds if seconds else 0.0)
            self._epoch_seconds.labels(label).set(seconds)
            self._mappings.labels(label).set(len(mappings))
            if cpu_seconds is not None:
                self._cpu.labels(label).set(cpu_seconds)
            for name, pages in self._written(edges, mappings, page_bytes).items():
                names = self._names.setdefault(pid, set())
                if name not in names and len(names) >= _MOST_NAMES:
                    name = _OTHERS
                names.add(name)
                self._by_mapping.labels(label, name).inc(pages)

    @staticmethod
    def _written(edges: Any, mappings: Sequence[Mapping], page_bytes: int) -> dict[str, int]:
        """Pages by name: what is below a mapping's end, less what is below its start."""
        if not len(edges) or not mappings:
            return {}
        starts, ends = edges[:, 0], edges[:, 1]
        before = np.concatenate(([0], np.cumsum(ends - starts)))
        bounds = np.array([(mapping.start, mapping.end) for mapping in mappings], np.int64).ravel()
        run = np.searchsorted(starts, bounds, "right")
        inside = np.where(run > 0, np.minimum(bounds, ends[run - 1]) - ends[run - 1], 0)
        below = (before[run] + inside).reshape(-1, 2)
        pages = (below[:, 1] - below[:, 0]) // page_bytes
        found = dict[str, int]()
        for i in np.flatnonzero(pages).tolist():
            name = named(mappings[i].name)
            found[name] = found.get(name, 0) + int(pages[i])
        return found

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
