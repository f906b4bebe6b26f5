"""The micro-batches that a plan counts are those that a run makes."""

import json
import re
import shutil
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora.build import build_prompt, read_split
from minilora.config import Config, LoraConfig, load_config
from minilora.data.sampler import epoch_order, split_into_micro_batches
from minilora.data.token_store import ENTRY, TokenStore
from minilora.evaluation.score import ScoringOptions, iter_batches, score
from minilora.planning import dry_run, plan
from minilora.planning.memory import CONTEXT_BYTES, BatchShape, Machine, count_parameters, estimate_memory
from minilora.planning.plan import (
    ANSWER_TOKENS,
    SIZES,
    epoch_batches,
    estimate_run_memory,
    hub_name,
    largest_batch,
    next_smaller,
    size_of,
    uniform_batch,
)
from minilora.qlora.batch import common_prefix, pack
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.prompt import ChatTokenizer, Example
from minilora.weights.bnb_checkpoint import write_quantized
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

    monkeypatch.setattr(dry_run, "ChatTokenizer", growing)
    monkeypatch.setattr(dry_run, "peak_memory_bytes", lambda _: size)
    dry_run.print_plan(load_config(None, [f"data.dir={processed_data}", "model.device=cpu"]), tiny_checkpoint())
    assert re.search(r"Python and PyTorch themselves \(measured\) +1000\.0 MB", capsys.readouterr().out)
    assert size == 2 * 10**9


@pytest.fixture
def examples(tiny_checkpoint: Callable[..., Path], processed_data: Path) -> TokenStore:
    config = load_config(None, [f"data.dir={processed_data}"])
    return read_split(config, build_prompt(config, ChatTokenizer(tiny_checkpoint())), "train").examples


def scored_in_a_pass(config: Config, examples: Sequence[Example]) -> int:
    """T of the largest pass that scores examples."""
    prefix = common_prefix(examples)
    lengths = [len(example.input_ids) for example in examples]
    passes = iter_batches(lengths, ScoringOptions(config.train.per_device_eval_batch_size))
    return max(len(pack([examples[i] for i in indices], cached_prefix=prefix).input_ids) for indices in passes)


@pytest.mark.parametrize("tokens", ["null", "100"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_the_largest_micro_batch_is_that_of_all_epochs_of_a_run(examples: TokenStore, tokens: str, epochs: int) -> None:
    keys = [f"train.max_tokens_per_micro_batch={tokens}", f"train.num_train_epochs={epochs}"]
    config = load_config(None, [*keys, "train.per_device_train_batch_size=3", "train.gradient_accumulation_steps=2"])
    batches = []
    for epoch in range(epochs):
        order = epoch_order(len(examples), config.train.seed, epoch)
        for start in range(0, len(order), 6):
            step = [examples[index] for index in order[start : start + 6]]
            batches += [pack(part) for part in split_into_micro_batches(step, 3, None if tokens == "null" else 100)]
    found = largest_batch(config, examples)
    largest = [batch for batch in batches if len(batch.input_ids) == found.tokens]
    longest = max(len(example.input_ids) for example in examples) - 1
    padded = {max(g.keys.numel() * g.num_keys for g in batch.groups) / (found.tokens * longest) for batch in largest}
    assert found.padding in {max(1.0, padding) for padding in padded}
    assert replace(found, padding=1.0) == BatchShape(
        max(len(batch.input_ids) for batch in batches),
        max(batch.num_supervised for batch in batches),
        longest,
        scored_in_a_pass(config, examples),
    )


def test_what_finds_the_largest_takes_a_few_bytes_an_example() -> None:
    config, count = load_config(None, ["train.per_device_train_batch_size=32", "train.max_steps=1"]), 320_000
    entries = np.zeros(count, ENTRY)
    entries["tokens"], entries["spans"] = 8 * np.arange(1, count + 1), np.arange(1, count + 1)
    tokens, spans = np.arange(8, dtype=np.uint32), np.array([[6, 8]], np.uint32)
    arrays = {"tokens": np.tile(tokens, count), "spans": np.tile(spans, (count, 1)), "entries": entries}
    tracemalloc.start()
    try:
        shape = largest_batch(config, TokenStore(arrays, {}))
        assert tracemalloc.get_traced_memory()[1] < 32 * count
    finally:
        tracemalloc.stop()
    assert (shape.tokens, shape.supervised_positions, shape.longest) == (72, 64, 7)


def test_the_largest_scoring_pass_has_the_label_words(
    examples: TokenStore, tiny_model: Callable[..., Qwen2ForCausalLM], tiny_checkpoint: Callable[..., Path]
) -> None:
    config = load_config(None, ["train.per_device_eval_batch_size=5", "prompt.labels=[差评, 好评, 好评论, 好]"])
    prompt = build_prompt(config, ChatTokenizer(tiny_checkpoint()))
    tokens: list[int] = []
    model = tiny_model()
    model.model.layers[0].register_forward_hook(lambda _, inputs, __: tokens.append(len(inputs[0])))
    score(model, list(examples), prompt, ScoringOptions(5))
    shape = largest_batch(config, examples, words=prompt.scored_ids)
    assert shape.label_tokens == len({tuple(ids[:d]) for ids in prompt.scored_ids for d in range(1, len(ids))}) > 3
    assert shape.scored_tokens == max(tokens[1:])  # the first is of the common prefix


def test_a_run_that_is_counted_in_steps_is_as_long_as_they_say(examples: TokenStore) -> None:
    def shape(*keys: str) -> BatchShape:
        return largest_batch(load_config(None, ["train.per_device_train_batch_size=5", *keys]), examples)

    assert len(examples) == 48
    assert shape("train.max_steps=21", "train.num_train_epochs=1") == shape("train.num_train_epochs=3")
    assert shape("train.max_steps=2") == shape("train.num_train_epochs=1")


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_example_of_an_epoch_is_in_one_micro_batch(examples: TokenStore, ranks: int) -> None:
    config = load_config(None, ["train.per_device_train_batch_size=7"])
    found = [example for batch in epoch_batches(config, examples, 2, ranks) for example in batch]
    assert sorted(found, key=repr) == sorted(examples, key=repr)


def test_the_plan_of_several_ranks_counts_their_steps(
    processed_data: Path, tiny_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(
        None,
        [
            f"data.dir={processed_data}",
            "model.device=cpu",
            "model.compute_dtype=float32",
            "train.per_device_train_batch_size=4",
        ],
    )
    dry_run.print_plan(config, tiny_checkpoint(), ranks=3)
    printed = capsys.readouterr().out
    assert "an epoch: 4 steps of 12 examples on 3 ranks; " in printed
    assert " in 12 micro-batches" in printed
    assert "float32, each of 3 ranks, largest micro-batch of the run)" in printed
    dry_run.print_plan(config, tiny_checkpoint())
    assert "an epoch: 12 steps of 4 examples; " in capsys.readouterr().out


@pytest.mark.parametrize("length", [16, 100, 333])
@pytest.mark.parametrize("count", [1, 5, 8])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("tokens", [None, 16, 300, 1000, 5000])
def test_examples_of_one_length_are_split_as_real_ones_are(
    length: int, count: int, accumulation: int, tokens: int | None
) -> None:
    keys = [f"train.per_device_train_batch_size={count}", f"train.gradient_accumulation_steps={accumulation}"]
    keys.append(f"data.max_length={length}")
    config = load_config(None, [*keys, f"train.max_tokens_per_micro_batch={'null' if tokens is None else tokens}"])
    flags = [False] * (length - ANSWER_TOKENS) + [True] * ANSWER_TOKENS
    # Ids that differ from the first on, so that nothing is shared.
    step = [Example([number] * length, flags) for number in range(count * accumulation)]
    batches = [pack(part) for part in split_into_micro_batches(step, count, tokens)]
    assert uniform_batch(config) == BatchShape(
        max(len(batch.input_ids) for batch in batches),
        max(batch.num_supervised for batch in batches),
        length - 1,
        scored_in_a_pass(config, [Example([number] * length, flags) for number in range(32)]),
    )


def test_a_configuration_is_counted_without_memory_for_its_weights() -> None:
    counts, smaller = (count_parameters(SIZES["72B"], LoraConfig(r=r)) for r in (64, 8))
    assert counts.projections + counts.dense == 72_706_203_648
    assert sum(counts.trainable) == 8 * sum(smaller.trainable)


def total_bytes(*keys: str, tokens: int = 1024) -> int:
    config = load_config(None, [*keys])
    counts = count_parameters(SIZES["7B"], config.lora)
    return estimate_memory(config, counts, BatchShape(tokens, 4, 512), Machine("cuda", torch.bfloat16)).total_bytes


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
def test_every_key_that_memory_depends_on_reaches_the_estimate(key: str, is_smaller: bool) -> None:
    changed, plain = total_bytes(key), total_bytes()
    assert changed != plain
    assert (changed < plain) == is_smaller


def test_offloading_reaches_the_estimate() -> None:
    checkpointing = "train.gradient_checkpointing=true"
    kept = total_bytes(checkpointing, tokens=8192)
    offloaded = total_bytes(checkpointing, "train.offload_checkpoints=true", tokens=8192)
    # The inputs of all layers but one; what is left is so little that a step is fullest with the gradients, in float32.
    gradients = 4 * sum(count_parameters(SIZES["7B"], LoraConfig()).trainable)
    assert kept - offloaded == 27 * 8192 * 3584 * 2 - gradients


def test_a_runs_estimate_is_for_its_device_and_its_own_examples(
    examples: TokenStore, tiny_checkpoint: Callable[..., Path]
) -> None:
    config = load_config(None, ["model.device=cpu"])
    shape = largest_batch(config, examples)
    found = estimate_run_memory(config, tiny_checkpoint(), shape, dtype=torch.float32, process_bytes=1_000_000)
    assert f"activations of {shape.tokens} tokens" in found.parts
    assert found.parts["Python and PyTorch themselves (measured)"] == 1_000_000
    assert not any(value == CONTEXT_BYTES for value in found.parts.values())


def test_projections_that_a_4_bit_checkpoint_holds_unquantised_are_counted_so(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source, folder = tiny_checkpoint(), tmp_path / "quantized"
    write_quantized(load_model(source, torch.bfloat16), source, folder, {})
    assert count_parameters(SIZES["0.5B"], LoraConfig(), folder).unquantized == 0
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(name)}
    save_file({**kept, name: load_file(source / "model.safetensors")[name]}, folder / "model.safetensors")
    assert count_parameters(SIZES["0.5B"], LoraConfig(), folder).unquantized == 4864 * 896
    dense = Path(shutil.copytree(source, tmp_path / "dense"))
    assert "quantization_config" not in json.loads((dense / "config.json").read_text("utf-8"))
    assert count_parameters(SIZES["0.5B"], LoraConfig(), dense).unquantized == 0


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    # metadata.total_size of model.safetensors.index.json, in bfloat16; of the 0.5B, which has none, the tensors' bytes.
    [("0.5B", 988_065_536), ("3B", 6_171_877_376), ("7B", 15_231_233_024)],
)
def test_a_size_has_as_many_parameters_as_its_checkpoint(size: str, num_bytes: int) -> None:
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
def test_the_size_is_read_from_a_repositorys_name(name: str, size: str | None) -> None:
    assert size_of(name) == size


def test_each_size_but_the_first_has_a_smaller_one() -> None:
    names = list(SIZES)
    assert [next_smaller(SIZES[size]) for size in names] == [None, *names[:-1]]


def test_the_padding_of_a_group_is_that_of_its_scores() -> None:
    lengths = [60, 70, 80, 90, 100]
    examples = [Example([number] * (length + 1), [False] * length + [True]) for number, length in enumerate(lengths)]
    tokens, padding = plan._size(examples, 100)
    assert tokens == 400
    assert padding == 5 * 100 * 100 / (400 * 100)
    assert plan._size(examples[:2], 100)[1] == 1
