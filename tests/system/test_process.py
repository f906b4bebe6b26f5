"""What a script sets for its process is set while the block runs, and the user's own settings win."""

import ctypes
import os
import platform
import sys

import pytest

from minilora.system.memory import trim_heap
from minilora.system.process import COMPILED_PRODUCTS, tuned_process


def test_compiled_products_are_bounded_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = COMPILED_PRODUCTS
    monkeypatch.delenv(first, raising=False)
    monkeypatch.setenv(second, "7")
    before = dict(os.environ)
    with tuned_process():
        assert (os.environ[first], os.environ[second]) == ("64", "7")
    assert dict(os.environ) == before


@pytest.mark.skipif(sys.platform != "linux", reason="only there PyTorch has them")
@pytest.mark.parametrize(
    ("kernel", "variable", "expected"),
    [
        ("6.8.0-45-generic", None, "expandable_segments:True"),
        ("6.8.0-45-generic", "PYTORCH_ALLOC_CONF", "mine"),
        ("6.8.0-45-generic", "PYTORCH_CUDA_ALLOC_CONF", None),
        ("6.18.33.2-microsoft-standard-WSL2", None, None),
        ("5.15.148-tegra", None, None),
    ],
)
def test_segments_grow_where_the_driver_takes_it(
    kernel: str, variable: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "mine")
    monkeypatch.setattr(platform, "release", lambda: kernel)
    with tuned_process():
        assert os.environ.get("PYTORCH_ALLOC_CONF") == expected


def test_the_environment_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in COMPILED_PRODUCTS:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(KeyError), tuned_process():
        raise KeyError
    assert not set(COMPILED_PRODUCTS) & set(os.environ)


def test_a_system_without_glibc_keeps_its_malloc(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: None) -> None:
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", fail)
    with tuned_process():
        trim_heap()
