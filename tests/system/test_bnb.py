"""bitsandbytes counts as there only where its library can be called."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minilora.system import bnb


class ErrorHandlerMockBNBNativeLibrary:
    """As bitsandbytes 0.50 puts it in the place of a library that it could not load."""

    compiled_with_cuda = False
    error_msg = "libcudart.so.13: cannot open shared object file\nmore lines"


@pytest.mark.parametrize(
    ("library", "cuda", "reason"),
    [
        (ErrorHandlerMockBNBNativeLibrary(), True, "libcudart.so.13"),
        (ErrorHandlerMockBNBNativeLibrary(), False, "libcudart.so.13"),
        (SimpleNamespace(compiled_with_cuda=False), True, "no library for CUDA"),
    ],
)
def test_a_library_that_did_not_load_counts_as_absent(
    library: Any, cuda: bool, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    monkeypatch.setattr(functional, "lib", library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    bnb.functional.cache_clear()
    try:
        assert not bnb.is_available()
        assert reason in caplog.text
        assert "more lines" not in caplog.text
    finally:
        bnb.functional.cache_clear()


@pytest.mark.parametrize(("compiled_with_cuda", "cuda"), [(True, True), (False, False)])
def test_a_library_for_this_machine_counts(
    compiled_with_cuda: bool, cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    monkeypatch.setattr(functional, "lib", SimpleNamespace(compiled_with_cuda=compiled_with_cuda))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    bnb.functional.cache_clear()
    try:
        assert bnb.is_available()
    finally:
        bnb.functional.cache_clear()
