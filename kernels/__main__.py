# SPDX-License-Identifier: MIT
"""Boot kernels, run the tests there, keep the results."""

from __future__ import annotations

import argparse
import lzma
import shutil
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

from . import archive, disk, machine, results
from .plan import ASKING, SMOKE, WANTED, Wanted

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "kernels"
CROSS = "aarch64-linux-gnu-gcc"
PACKAGES = "qemu-system-x86 busybox-static e2fsprogs gcc libc6-dev"
PACKAGES_ARM64 = "qemu-system-arm gcc-aarch64-linux-gnu libc6-dev-arm64-cross"


def lacks(arm64: bool) -> list[str]:
    """What is not on this machine."""
    needed = ["qemu-system-x86_64", "busybox", "mke2fs", "gcc", "dpkg-deb"]
    if arm64:
        needed += ["qemu-system-aarch64", CROSS]
    return [name for name in needed if shutil.which(name) is None]


def c_tests(compiler: str, into: Path, only: Collection[str] = ()) -> list[Path]:
    """The C core's tests, static: all, or those of these names."""
    into.mkdir(parents=True, exist_ok=True)
    core = sorted((ROOT / "dirtytrack/kernel/csrc").glob("*.c"))
    flags = ["-std=gnu11", "-O2", "-pthread", f"-I{core[0].parent}"]
    subprocess.run([compiler, *flags, "-c", *map(str, core)], cwd=into, check=True)
    objects = [f"{path.stem}.o" for path in core]
    tests = [path for path in sorted((ROOT / "tests/c").glob("*.c")) if not only or path.stem in only]
    for test in tests:
        command = [compiler, *flags, "-D_GNU_SOURCE=", "-static", str(test), *objects, "-o", test.stem]
        subprocess.run(command, cwd=into, check=True)
    return [into / test.stem for test in tests]


def modules(kernels: list[archive.Kernel]) -> Path:
    """The one module that tests need: overlays. From 7.1 on it comes in another package, which is not fetched."""
    folder = BUILD / "modules"
    for kernel in kernels:
        for packed in kernel.home.rglob("overlay.ko.xz"):
            (folder / kernel.version).mkdir(parents=True, exist_ok=True)
            (folder / kernel.version / packed.stem).write_bytes(lzma.decompress(packed.read_bytes()))
    return folder


def make_disk(
    architecture: str, source: archive.Archive, kernels: list[archive.Kernel], given: list[str] | None
) -> None:
    """Make the disk for machines of an architecture. ``given``: as `disk.make` takes it, for our own architecture."""
    image = BUILD / f"disk-{architecture}"
    if architecture == "amd64":
        tests = c_tests("gcc", BUILD / "c-amd64", ASKING)
        disk.make(image, tests, Path(shutil.which("busybox") or ""), modules(kernels), given)
    else:
        source.unpack("busybox-static", architecture, BUILD / "busybox-arm64")
        (busybox,) = (BUILD / "busybox-arm64").rglob("bin/busybox")
        disk.make(image, c_tests(CROSS, BUILD / "c-arm64"), busybox, None, None)


def run(wanted: Wanted, kernel: archive.Kernel, args: argparse.Namespace) -> results.Result:
    """Boot one kernel, or take what it printed before, and return what came of it."""
    accelerator = machine.ACCELERATOR if wanted.architecture == "amd64" else "tcg"
    slow = 1 if accelerator == "kvm" else 6
    choice = "smoke" if args.smoke else "given" if args.tests else "all"
    pytest_seconds = args.pytest_seconds or (900 if choice == "all" else 60) * slow
    limit = pytest_seconds + 400 * slow
    name = kernel.version if choice == "all" else f"{kernel.version}-{choice}"
    log, image = BUILD / f"{name}.log", BUILD / f"disk-{wanted.architecture}"
    if not args.judge:
        asked = {"TESTS": choice, "C_SECONDS": 60 * slow, "PYTEST_SECONDS": pytest_seconds, "C_ARGUMENT": "asking"}
        machine.boot(kernel, image, log, limit, asked)
    steps = machine.steps_of((BUILD / f"{name}.out").read_text(errors="replace"))
    result = results.result_of(kernel, accelerator, steps, why=wanted.why)
    if wanted.architecture == "amd64" and choice != "smoke" and result["python"] is None:
        result["problems"].append("the Python tests did not run")
    if choice == "all":
        results.keep(result, steps)
    return result


def arguments() -> argparse.Namespace:
    """What the command was told."""
    parser = argparse.ArgumentParser(prog="python -m kernels", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="one kernel, its C tests; results are not kept")
    parser.add_argument("--only", default="", help="kernels whose version and architecture contain this")
    parser.add_argument("--pytest-seconds", type=int, default=0, help="for pytest in each machine")
    parser.add_argument("--tests", nargs="+", default=[], help="only these, as pytest takes them; results are not kept")
    parser.add_argument("--same-disk", action="store_true", help="with the disks made before")
    parser.add_argument("--judge", action="store_true", help="boot nothing: judge again what was printed before")
    return parser.parse_args()


def main() -> int:
    """Return 1 where a test failed, 2 where something lacks."""
    args = arguments()
    chosen = [SMOKE] if args.smoke else [w for w in WANTED if args.only in f"{w.version} {w.architecture}"]
    architectures = {wanted.architecture for wanted in chosen}
    missing = lacks("arm64" in architectures)
    if missing:
        packages = PACKAGES + (f" {PACKAGES_ARM64}" if "arm64" in architectures else "")
        print(f"Missing: {' '.join(missing)}. On Debian, as root:", file=sys.stderr)
        print(f"    apt-get install --no-install-recommends {packages}", file=sys.stderr)
        return 2
    BUILD.mkdir(parents=True, exist_ok=True)
    source = archive.Archive(BUILD)
    source.update(chosen if args.smoke else WANTED)
    kernels = [source.fetch(wanted) for wanted in chosen]
    for architecture in sorted(architectures):
        if not (args.judge or args.same_disk):
            make_disk(architecture, source, kernels, None if args.smoke else args.tests)
    bad = 0
    for wanted, kernel in zip(chosen, kernels, strict=True):
        began = time.monotonic()
        result = run(wanted, kernel, args)
        print(f"{results.one_line(result)} ({time.monotonic() - began:.0f} s)", flush=True)
        for problem in result["problems"]:
            print(f"    {problem}", flush=True)
        bad += bool(result["problems"])
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
