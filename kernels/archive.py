# SPDX-License-Identifier: MIT
"""Debian's kernels: found and fetched through apt, with lists and settings of our own, so that nothing is installed."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .plan import Wanted

__all__ = ["Archive", "Kernel", "NotThere"]

_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_A_DAY = 24 * 3600


class NotThere(Exception):
    """The archive has nothing like it, or cannot be reached."""


class Kernel(NamedTuple):
    """A kernel on this disk."""

    version: str
    """As `uname -r` will say it."""
    architecture: str
    package: str
    """With its version."""
    image: Path
    home: Path
    """The package, unpacked."""


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _series(version: str) -> list[int]:
    return _numbers(version)[:2]


class Archive:
    """A private apt below a folder.

    Args:
        folder: for lists, packages and kernels; what is there already is not fetched again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._apt = folder / "apt"
        for name in ("state/lists/partial", "cache/archives/partial"):
            (self._apt / name).mkdir(parents=True, exist_ok=True)
        (self._apt / "status").touch()
        self._sources = self._apt / "sources.list"

    def _run(self, *command: str, cwd: Path | None = None) -> str:
        settings = {
            "Dir::Etc::sourcelist": self._sources,
            "Dir::Etc::sourceparts": "-",
            "Dir::State": self._apt / "state",
            "Dir::State::status": self._apt / "status",
            "Dir::Cache": self._apt / "cache",
            "APT::Sandbox::User": "root",
            "APT::Architectures": "amd64,arm64",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
        }
        options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
        done = subprocess.run(
            [command[0], *options, *command[1:]], cwd=cwd, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise NotThere(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def update(self, all_wanted: Iterable[Wanted]) -> None:
        """Have the lists of the suites of these, all that were ever wanted, not older than a day."""
        words = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
        known = sorted(set(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()))
        debian = [uri for uri in known if uri.rstrip("/").endswith("/debian")]
        security = [uri for uri in known if uri.rstrip("/").endswith("/debian-security")]
        if not debian:
            raise NotThere("apt knows no mirror of Debian's here (after `apt-get update`): kernels come from there")
        lines = set(self._sources.read_text().splitlines()) if self._sources.exists() else set[str]()
        before = frozenset(lines)
        for _, suite, architecture, _ in all_wanted:
            which = f"[signed-by={_KEYRING} arch={architecture}]"
            lines.add(f"deb {which} {debian[0]} {suite} main")
            if security and "-" not in suite:
                lines.add(f"deb {which} {security[0]} {suite}-security main")
        stamp = self._apt / "updated"
        if lines > before or not stamp.exists() or time.time() - stamp.stat().st_mtime > _A_DAY:
            self._sources.write_text("".join(f"{line}\n" for line in sorted(lines)))
            self._run("apt-get", "update", "-q")
            stamp.touch()

    def _versions(self, wanted: Wanted) -> dict[str, str]:
        """Package by version of the kernel."""
        pattern = rf"^linux-(image|binary)-([0-9]+[.][0-9]+[.][0-9].*)-cloud-{wanted.architecture}$"
        found: dict[str, str] = {}
        for line in self._run("apt-cache", "search", "-n", pattern).splitlines():
            name = line.split(" ", 1)[0]
            match = re.match(pattern, name)
            # Since 7.1 the image is empty, and depends on `binary`, which has it.
            if match and (match[1] == "binary" or match[2] not in found):
                found[match[2]] = name
        return found

    def choose(self, wanted: Wanted) -> tuple[str, str]:
        """The version there is that is wanted, or the nearest of its series; and its package."""
        found = self._versions(wanted)
        inside = [version for version in found if _series(version) == _series(wanted.version)]
        if not inside:
            raise NotThere(f"the archive has no {wanted.version} for {wanted.architecture}")
        if "*" in wanted.version:
            of_suite = [version for version in inside if fnmatch.fnmatch(version, wanted.version)]
            best = max(of_suite or inside, key=_numbers)
        else:
            goal = _numbers(wanted.version)
            best = min(inside, key=lambda v: [abs(a - b) for a, b in zip(_numbers(v), goal, strict=False)])
        return best, found[best]

    def fetch(self, wanted: Wanted) -> Kernel:
        """Have a kernel's image."""
        version, package = self.choose(wanted)
        home = self._folder / f"{version}-{wanted.architecture}"
        label = home / "package"
        if not label.exists():
            debs = home / "debs"
            debs.mkdir(parents=True, exist_ok=True)
            self._run("apt-get", "download", "-q", f"{package}:{wanted.architecture}", cwd=debs)
            (deb,) = debs.glob("*.deb")
            subprocess.run(["dpkg-deb", "-x", deb, home], check=True)
            about = subprocess.run(["dpkg-deb", "-f", deb, "Version"], capture_output=True, text=True, check=True)
            deb.unlink()
            label.write_text(f"{package} {about.stdout.strip()}")
        (image,) = (path for path in home.rglob("vmlinu*") if path.is_file())  # in boot, or beside its modules
        release = re.sub("^linux-(image|binary)-", "", package)
        return Kernel(release, wanted.architecture, label.read_text(), image, home)

    def unpack(self, package: str, architecture: str, into: Path) -> None:
        """Have a package's files below a folder."""
        if into.exists():
            return
        debs = self._apt / "cache" / f"{package}-{architecture}"
        debs.mkdir(parents=True, exist_ok=True)
        self._run("apt-get", "download", "-q", f"{package}:{architecture}", cwd=debs)
        (deb,) = debs.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", deb, into.with_suffix(".part")], check=True)
        into.with_suffix(".part").rename(into)
