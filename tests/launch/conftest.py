"""A CUDA driver for machines that have none."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

H100 = "NVIDIA H100 80GB HBM3|9.0"
V100 = "Tesla V100-SXM2-32GB|7.0"


@pytest.fixture(scope="session")
def fake_cuda(tmp_path_factory):
    """Folder of a libcuda.so.1 that says what the environment tells it to."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the stand-in of the CUDA driver")
    folder = tmp_path_factory.mktemp("cuda")
    source = Path(__file__).with_name("fake_cuda.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", source], check=True)
    return folder


@pytest.fixture
def cards(fake_cuda, monkeypatch):
    """A function that puts cards into this machine."""

    def insert(*names: str, cuda: int = 13000, mask: str | None = None, fails: int | None = None) -> None:
        folders = [str(fake_cuda), os.environ.get("LD_LIBRARY_PATH", "")]
        monkeypatch.setenv("LD_LIBRARY_PATH", os.pathsep.join(filter(None, folders)))
        monkeypatch.setenv("FAKE_CUDA_CARDS", ";".join(names))
        monkeypatch.setenv("FAKE_CUDA_VERSION", str(cuda))
        if fails is not None:
            monkeypatch.setenv("FAKE_CUDA_INIT", str(fails))
        if mask is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)

    return insert


@pytest.fixture
def cuda_build(monkeypatch):
    """A function that makes torch one that was built for CUDA."""
    import torch

    def build(version: str = "13.0", kernels: tuple[str, ...] = ("sm_75", "sm_80", "sm_90", "sm_100")) -> None:
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(kernels))

    return build
