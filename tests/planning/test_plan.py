"""The micro-batches that a plan counts are those that a run makes."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora.build import build_prompt, read_split
from minilora.config import load_config
from minilora.data.prepare import epoch_order
from minilora.data.sampler import split_into_micro_batches
from minilora.planning import plan
from minilora.planning.memory import CONTEXT_BYTES
from minilora.planning.plan import (
    ANSWER_TOKENS,
    BatchShape,
    count_config,
    epoch_batches,
    estimate_config_memory,
    estimate_run_memory,
    largest_batch,
    uniform_batch,
)
from minilora.planning.sizes import SIZES
from minilora.qlora.batch import pack
from minilora.qlora.prompt import ChatTokenizer, Example
from minilora.weights.bnb_checkpoint import save_quantized
from minilora.weights.load import load_model


def test_the_process_is_measured_as_a_run_does_before_anything_is_read(
    tiny_checkpoint: Callable[..., Path],
    processed_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    size = 10**9

    def growing(folder: Path) -> ChatTokenizer:
        nonlocal size
        size += 10**9
        return ChatTokenizer(folder)

    monkeypatch.setattr(plan, "ChatTokenizer", growing)
    monkeypatch.setattr(plan, "peak_memory_bytes", lambda _: size)
    plan.print_plan(load_config(None, [f"data.dir={processed_data}", "model.device=cpu"]), tiny_checkpoint())
    assert re.search(r"Python and PyTorch themselves \(measured\) +1000\.0 MB", capsys.readouterr().out)
    assert size == 2 * 10**9


@pytest.fixture
def examples(tiny_checkpoint: Callable[..., Path], processed_data: Path) -> list[Example]:
    config = load_config(None, [f"data.dir={processed_data}"])
    return read_split(config, build_prompt(config, ChatTokenizer(tiny_checkpoint())), "train").examples


@pytest.mark.parametrize("rows", ["null", "100"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_the_largest_micro_batch_is_that_of_all_epochs_of_a_run(
    examples: list[Example], rows: str, epochs: int
) -> None:
    keys = [f"train.max_tokens_per_micro_batch={rows}", f"train.num_train_epochs={epochs}"]
    config = load_config(None, [*keys, "train.per_device_train_batch_size=3", "train.gradient_accumulation_steps=2"])
    batches = []
    for epoch in range(epochs):
        order = epoch_order(len(examples), config.train.seed, epoch)
        for start in range(0, len(order), 6):
            step = [examples[place] for place in order[start : start + 6]]
            batches += [pack(part) for part in split_into_micro_batches(step, 3, None if rows == "null" else 100)]
    assert largest_batch(config, examples) == BatchShape(
        max(len(batch.input_ids) for batch in batches),
        max(batch.num_supervised for batch in batches),
        max(len(example.input_ids) for example in examples) - 1,
    )


def test_a_run_that_is_counted_in_steps_is_as_long_as_they_say(examples: list[Example]) -> None:
    def shape(*keys: str) -> BatchShape:
        return largest_batch(load_config(None, ["train.per_device_train_batch_size=5", *keys]), examples)

    assert len(examples) == 48
    assert shape("train.max_steps=21", "train.num_train_epochs=1") == shape("train.num_train_epochs=3")
    assert shape("train.max_steps=2") == shape("train.num_train_epochs=1")


def test_every_example_of_an_epoch_is_in_one_micro_batch(examples: list[Example]) -> None:
    config = load_config(None, ["train.per_device_train_batch_size=7"])
    found = [example for batch in epoch_batches(config, examples, 2) for example in batch]
    assert sorted(map(id, found)) == sorted(map(id, examples))


@pytest.mark.parametrize("length", [16, 100, 333])
@pytest.mark.parametrize("count", [1, 5, 8])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("rows", [None, 16, 300, 1000, 5000])
def test_examples_of_one_length_are_cut_as_real_ones_are(
    length: int, count: int, accumulation: int, rows: int | None
) -> None:
    keys = [f"train.per_device_train_batch_size={count}", f"train.gradient_accumulation_steps={accumulation}"]
    config = load_config(None, [*keys, f"train.max_tokens_per_micro_batch={'null' if rows is None else rows}"])
    flags = [False] * (length - ANSWER_TOKENS) + [True] * ANSWER_TOKENS
    # Ids that differ from the first on, so that nothing is shared.
    step = [Example([number] * length, flags) for number in range(count * accumulation)]
    batches = [pack(part) for part in split_into_micro_batches(step, count, rows)]
    assert uniform_batch(config, length) == BatchShape(
        max(len(batch.input_ids) for batch in batches), max(batch.num_supervised for batch in batches), length - 1
    )


def test_a_configuration_is_counted_without_memory_for_its_weights() -> None:
    numbers = count_config(load_config(None, ["lora.r=64"]), SIZES["72B"])
    assert numbers.projections + numbers.dense == 72_706_203_648
    assert sum(numbers.trained) == 8 * sum(count_config(load_config(None, ["lora.r=8"]), SIZES["72B"]).trained)


def total_bytes(*keys: str, rows: int = 1024) -> int:
    config = load_config(None, [*keys])
    numbers = count_config(config, SIZES["7B"])
    return estimate_config_memory(config, numbers, BatchShape(rows, 4, 512), torch.bfloat16, "cuda", None).total_bytes


@pytest.mark.parametrize(
    ("key", "is_smaller"),
    [
        ("model.quantization=none", False),
        ("model.double_quantization=false", False),
        ("model.cache_dequantized=true", False),
        ("train.gradient_checkpointing=true", True),
        ("train.optim=adamw_bnb_8bit", True),
        ("train.optim=paged_adamw_8bit", True),
        ("lora.r=4", True),
        ("lora.target_modules=[q_proj]", True),
    ],
)
def test_every_key_that_memory_depends_on_reaches_the_ledger(key: str, is_smaller: bool) -> None:
    changed, plain = total_bytes(key), total_bytes()
    assert changed != plain
    assert (changed < plain) == is_smaller


def test_offloading_reaches_the_ledger() -> None:
    checkpointing = "train.gradient_checkpointing=true"
    kept = total_bytes(checkpointing, rows=8192)
    offloaded = total_bytes(checkpointing, "train.offload_checkpoints=true", rows=8192)
    # The inputs of all layers but one; what is left is so little that a step is fullest with the gradients, in float32.
    gradients = 4 * sum(count_config(load_config(), SIZES["7B"]).trained)
    assert kept - offloaded == 27 * 8192 * 3584 * 2 - gradients


def test_a_runs_ledger_is_for_its_device_and_its_own_examples(
    examples: list[Example], tiny_checkpoint: Callable[..., Path]
) -> None:
    config = load_config(None, ["model.device=cpu"])
    found = estimate_run_memory(config, tiny_checkpoint(), examples, torch.float32, 1_000_000)
    rows = largest_batch(config, examples).rows
    assert f"activations of {rows} rows" in found.parts
    assert found.parts["Python and PyTorch themselves (measured)"] == 1_000_000
    assert not any(value == CONTEXT_BYTES for value in found.parts.values())


def test_projections_that_a_4_bit_checkpoint_holds_in_full_are_counted_in_full(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source, folder = tiny_checkpoint(), tmp_path / "quantized"
    save_quantized(load_model(source, torch.bfloat16), source, folder)
    config = load_config()
    assert count_config(config, SIZES["0.5B"], folder).in_full == 0
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(name)}
    save_file({**kept, name: load_file(source / "model.safetensors")[name]}, folder / "model.safetensors")
    assert count_config(config, SIZES["0.5B"], folder).in_full == 4864 * 896
    dense = Path(shutil.copytree(source, tmp_path / "dense"))
    assert "quantization_config" not in json.loads((dense / "config.json").read_text("utf-8"))
    assert count_config(config, SIZES["0.5B"], dense).in_full == 0
