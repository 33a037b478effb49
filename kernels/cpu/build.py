"""Compiles the C++ kernels of this folder with a plain C++ compiler and keeps the result in a private cache.

One source set, several variants of compiler flags; the file name holds a hash of sources and flags, so a stale build is
never loaded. Loading a shared library runs its code: a directory that others may write to is refused.

`python -m kernels.cpu.build [--all] [--directory DIR]` builds ahead of time, e.g. into a container image.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

SOURCE_DIR = Path(__file__).parent
PREBUILT_DIR = SOURCE_DIR / "prebuilt"
"""Looked at before the user's cache; a container image or package fills it."""

_COMMON = ("-std=c++17", "-O3", "-fPIC", "-pthread", "-fno-math-errno", "-ffp-contract=fast", "-fvisibility=default")
_QUIET = ("-Wall", "-Wextra", "-Wno-psabi", "-Wno-ignored-attributes")
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512cd", "-mprefer-vector-width=512")
VARIANTS: dict[str, tuple[str, ...]] = {
    "avx512bf16": (*_AVX512, "-mavx512bf16", "-mavx512vnni"),
    "avx512": _AVX512,
    "avx2": _AVX2,
    "generic": (),
}
"""Compiler flags of each variant, best first; `generic` is the architecture's baseline."""
_NEEDED_BY_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd", "fma", "bmi2"}
_NEEDED_FLAGS = {
    "avx512bf16": {*_NEEDED_BY_AVX512, "avx512_bf16", "avx512_vnni"},
    "avx512": _NEEDED_BY_AVX512,
    "avx2": {"avx2", "fma", "f16c", "bmi2"},
}


class BuildError(RuntimeError):
    """No compiled library can be had: there is no compiler, it failed, or no directory is safe to load from."""


def cpu_flags() -> frozenset[str]:
    """Feature flags of this machine's CPU as Linux names them; empty where it does not say."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


def best_variant(flags: frozenset[str] | None = None) -> str:
    """The fastest variant this CPU can run."""
    have = cpu_flags() if flags is None else flags
    return next((name for name, needed in _NEEDED_FLAGS.items() if needed <= have), "generic")


def library_name(variant: str) -> str:
    """File name of a variant's library: it changes with every source file and flag."""
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; supported are {', '.join(VARIANTS)}")
    digest = hashlib.sha256(repr((_COMMON, VARIANTS[variant], platform.machine())).encode())
    for source in sorted([*SOURCE_DIR.glob("*.cpp"), *SOURCE_DIR.glob("*.h")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return f"braid-cpu-{variant}-{digest.hexdigest()[:20]}.so"


def cache_dir() -> Path:
    """The user's private cache of built libraries (not created here); BuildError if there is no place for one."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "braid" / "kernels"
    except RuntimeError as error:  # a user without a home
        raise BuildError(f"no cache directory for the CPU kernels: {error}; set XDG_CACHE_HOME") from error


def find_compiler() -> str | None:
    """Path of a C++ compiler with GCC vector extensions ($CXX, g++, c++), or None."""
    names = [os.environ.get("CXX", ""), "g++", "c++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def library_path(variant: str | None = None, directory: Path | None = None) -> Path:
    """The library of a variant (default: the best for this CPU), built now if no cached one is found.

    directory  where to look and to build; default: the prebuilt directory, then the user's cache
    Raises     BuildError with the reason if there is none and none can be built.
    """
    name = library_name(variant or best_variant())
    for place in [directory] if directory else [PREBUILT_DIR, cache_dir()]:
        path = place / name
        if path.is_file():
            _check_private(place)
            _check_private(path)
            return path
    return build(variant or best_variant(), directory or cache_dir())


def build(variant: str, directory: Path) -> Path:
    """Compile one variant into `directory` and return the library's path; concurrent builds are safe."""
    name = library_name(variant)
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler found (looked for $CXX, g++, c++); install g++ or ship a prebuilt library")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(directory)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".build-") as work:
            _compile(compiler, variant, Path(work), Path(work) / name)
            os.replace(Path(work) / name, directory / name)
    except OSError as error:
        raise BuildError(f"cannot build the CPU kernels in {directory}: {error}") from error
    return directory / name


def _compile(compiler: str, variant: str, work: Path, output: Path) -> None:
    """All files at once, one compiler process each, then the link."""
    sources = sorted(SOURCE_DIR.glob("*.cpp"))
    flags = [*_COMMON, *_QUIET, *VARIANTS[variant]]
    commands = [[compiler, *flags, "-c", str(s), "-o", str(work / f"{s.stem}.o")] for s in sources]
    running = [subprocess.Popen(c, stderr=subprocess.PIPE, text=True) for c in commands]
    errors = [process.communicate()[1] for process in running]
    failed = [message for process, message in zip(running, errors, strict=True) if process.returncode]
    if not failed:
        objects = [str(work / f"{s.stem}.o") for s in sources]
        link = subprocess.run(
            [compiler, "-shared", "-pthread", *objects, "-o", str(output)], capture_output=True, text=True
        )
        failed = [link.stderr] if link.returncode else []
    if failed:
        raise BuildError(f"{compiler} could not build the {variant} kernels: {failed[0].strip()[:2000]}")
    output.chmod(0o755)


def _check_private(path: Path) -> None:
    """Refuse what another user could have written."""
    found = path.stat()
    if found.st_uid not in (0, os.getuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"{path} belongs to another user or is writable by others; its code will not be loaded")


def main(arguments: list[str] | None = None) -> None:
    """Command line: build this CPU's variant, or all of them."""
    parser = argparse.ArgumentParser(prog="python -m kernels.cpu.build", description=main.__doc__)
    parser.add_argument("--all", action="store_true", help="every variant this architecture has, not only this CPU's")
    parser.add_argument(
        "--directory", type=Path, help=f"where to put them (an image: {PREBUILT_DIR}); default: the cache"
    )
    chosen = parser.parse_args(arguments)
    x86 = platform.machine() in ("x86_64", "AMD64")
    variants = [v for v in VARIANTS if x86 or v == "generic"] if chosen.all else [best_variant()]
    for variant in variants:
        print(build(variant, chosen.directory or cache_dir()))  # noqa: T201


if __name__ == "__main__":
    main()
