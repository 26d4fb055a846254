"""Running ranks for the tests, started once for all that ask for them; the order in which tests run; and a CUDA driver
for machines that have none."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness import devices
from harness.launch.session import Session
from tests import ranks
from tests.side_by_side import (  # noqa: F401
    pytest_collection_finish,
    pytest_configure_node,
    pytest_xdist_make_scheduler,
)

#: what the tests state holds for ranks on the CPU, so that they pass on a machine with GPUs too; MOEBENCH_TEST_GPUS=1
#: leaves those in sight
if not os.environ.get("MOEBENCH_TEST_GPUS"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def moebench(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a command line -> exit status, stdout, stderr."""
    from harness import cli

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moebench", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return run


@pytest.fixture(scope="session")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Session]]:
    """``session(cluster or preset name)`` gives its open session; see ``ranks.Sessions``."""
    with contextlib.closing(ranks.Sessions(tmp_path_factory)) as sessions:
        yield sessions.get


@pytest.fixture(scope="session")
def fake_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a libcuda.so.1 that says what the environment tells it to."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the stand-in of the CUDA driver")
    folder = tmp_path_factory.mktemp("cuda")
    source = Path(__file__).with_name("fake_cuda.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", source], check=True)
    return folder


@pytest.fixture
def cards(fake_cuda: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
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
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that makes torch one that was built for CUDA, or for none."""
    import torch

    def build(version: str | None = "13.0", kernels: tuple[str, ...] = ("sm_75", "sm_80", "sm_90", "sm_100")) -> None:
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(kernels))

    return build


@pytest.fixture
def no_driver() -> None:
    """What holds on a machine without an NVIDIA driver cannot be seen on one that has it."""
    if devices.ask().found:
        pytest.skip("this machine has an NVIDIA driver")
