"""The sizes of Qwen2.5 by name are the models on the hub."""

import pytest
import torch

from minilora.planning.sizes import SIZES, hub_name, next_smaller, size_of
from minilora.qlora.model import Qwen2ForCausalLM


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    # metadata.total_size of model.safetensors.index.json, in bfloat16; of the 0.5B, which has none, the tensors' bytes.
    [("0.5B", 988_065_536), ("3B", 6_171_877_376), ("7B", 15_231_233_024)],
)
def test_a_size_has_as_many_numbers_as_its_checkpoint(size: str, num_bytes: int) -> None:
    with torch.device("meta"):
        model = Qwen2ForCausalLM(SIZES[size])
    assert 2 * sum(parameter.numel() for parameter in model.parameters()) == num_bytes


@pytest.mark.parametrize(("size", "billions"), [("1.5B", 1.54), ("14B", 14.8), ("32B", 32.8), ("72B", 72.7)])
def test_the_others_have_as_many_as_their_pages_say(size: str, billions: float) -> None:
    with torch.device("meta"):
        model = Qwen2ForCausalLM(SIZES[size])
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((hub_name(size), size) for size in SIZES),
        ("Qwen/Qwen2.5-Coder-7B", "7B"),
        ("Qwen/Qwen2.5-Math-1.5B-Instruct", "1.5B"),
        ("unsloth/qwen2.5-7b-instruct-bnb-4bit", "7B"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", None),
        ("Qwen/Qwen2-7B", None),
        ("Qwen/Qwen2.5-1M", None),
        ("Qwen/Qwen2.5-9B", None),
        ("someone/Qwen2.5-7Bigger", None),
    ],
)
def test_a_repository_says_its_size(name: str, size: str | None) -> None:
    assert size_of(name) == size


def test_each_size_but_the_first_has_a_smaller_one() -> None:
    names = list(SIZES)
    assert [next_smaller(SIZES[size]) for size in names] == [None, *names[:-1]]
