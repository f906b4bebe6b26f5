"""What a script sets for its process is set while the block runs, and the user's own settings win."""

import ctypes
import os

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
