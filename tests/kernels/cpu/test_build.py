"""Where compiled kernels come from, and what happens when they cannot be had."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

from kernels.cpu import build
from kernels.cpu.ops import CpuOps
from kernels.reference import ReferenceOps
from kernels.select import select_ops


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(build, "PREBUILT_DIR", tmp_path / "none")


@pytest.mark.usefixtures("no_compiler")
def test_without_compiler_and_cache_plain_torch_serves_and_one_line_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ops = select_ops("cpu", torch.float32)
    assert isinstance(ops, ReferenceOps)
    if build.best_variant() != "generic":
        assert [r.message for r in caplog.records if "no C++ compiler" in r.message]


@pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler: shows that a prebuilt library needs none")
def test_a_prebuilt_directory_serves_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "image"
    build.main(["--directory", str(directory)])
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert build.library_path(directory=directory).parent == directory
    assert CpuOps(num_threads=1, directory=directory).linear(
        torch.ones(1, 4), CpuOps(num_threads=1, directory=directory).pack_linear(torch.ones(3, 4))
    ).tolist() == [[4.0, 4.0, 4.0]]
    assert oct((directory).stat().st_mode & 0o777) == "0o700"


def test_a_library_that_does_not_load_leads_to_plain_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "PREBUILT_DIR", tmp_path / "none")
    monkeypatch.setattr("kernels.select.best_variant", lambda: "avx2")
    build.cache_dir().mkdir(parents=True, mode=0o700)
    (build.cache_dir() / build.library_name(build.best_variant())).write_bytes(b"not a library")
    with caplog.at_level(logging.WARNING):
        assert isinstance(select_ops("cpu", torch.float32), ReferenceOps)
    assert "cannot load" in caplog.text


def test_code_that_others_could_have_written_is_refused(tmp_path: Path) -> None:
    library = tmp_path / build.library_name(build.best_variant())
    library.write_bytes(b"not ours")
    library.chmod(0o644)
    os.chmod(tmp_path, 0o777)
    with pytest.raises(build.BuildError, match="writable by others"):
        build.library_path(directory=tmp_path)


@pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler: shows that its message reaches the log")
def test_a_failing_compiler_is_reported_with_its_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "sources"
    broken.mkdir()
    (broken / "pool.cpp").write_text("int broken(")
    monkeypatch.setattr(build, "SOURCE_DIR", broken)
    with pytest.raises(build.BuildError, match="could not build"):
        build.build("generic", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_the_variant_is_the_best_that_the_cpu_flags_allow() -> None:
    avx2 = frozenset({"avx2", "fma", "f16c", "bmi2"})
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}
    assert build.best_variant(frozenset({"sse2"})) == "generic"
    assert build.best_variant(avx2) == "avx2"
    assert build.best_variant(avx512) == "avx512"
    assert build.best_variant(avx512 | {"avx512_bf16"}) == "avx512"
    assert build.best_variant(avx512 | {"avx512_bf16", "avx512_vnni"}) == "avx512bf16"
    with pytest.raises(ValueError, match="sse9"):
        build.library_name("sse9")
