"""Tiny checkpoints, made once for all parity tests."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minilora.qlora.prompt import ChatTokenizer, Example
from tests.parity.reference import build_examples, write_reference


@pytest.fixture(autouse=True)
def _let_peft_use_an_old_name() -> None:
    """peft asks transformers 5.23 for a property under the name that it is about to lose."""
    warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)


@pytest.fixture(scope="session")
def reference_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function: `write_reference`'s keyword arguments -> a folder, made once for equal arguments.

    Folders are shared between tests: copy one before you change it.
    """
    made: dict[str, Path] = {}

    def make(**arguments: Any) -> Path:
        key = repr(sorted(arguments.items()))
        if key not in made:
            made[key] = write_reference(tmp_path_factory.mktemp("reference"), **arguments)
        return made[key]

    return make


@pytest.fixture(scope="session")
def examples(chat_tokenizer: ChatTokenizer) -> list[Example]:
    """Classification examples of several lengths that share a prefix."""
    return build_examples(chat_tokenizer)
