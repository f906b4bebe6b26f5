"""What is said to fit fits, one more does not, and no option is taken where a cheaper one is enough."""

import itertools
import json
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.build import iter_chosen
from minilora.config import config_from_dict, load_config
from minilora.data.records import ReadOptions
from minilora.data.token_store import Piece, build_store
from minilora.errors import UserError
from minilora.planning import budget, plan
from minilora.planning.budget import (
    TOKENS_KEY,
    Option,
    Setup,
    advise,
    cheapest_that_fits,
    largest_batch_size,
    largest_micro_batch,
    largest_that_fits,
    least_memory_estimate,
    list_options,
    longest_example,
    merge_keys,
    read_bytes,
    resolve_token_limit,
    shapes_of_records,
    train_command,
)
from minilora.planning.memory import CONTEXT_BYTES, BatchShape, ParameterCounts
from minilora.planning.plan import LONGEST_TOKENS, SIZES, estimate_run_memory, largest_batch, uniform_batch
from minilora.qlora.prompt import ChatTokenizer, Example

GB = 10**9
COUNTED: dict[tuple[Any, ...], ParameterCounts] = {}  # so that each model is counted once


def setup_of(size: str, *keys: str, device_type: str = "cuda", process_bytes: int | None = None) -> Setup:
    return Setup(
        config=load_config(None, keys),
        architecture=SIZES[size],
        shape_of=uniform_batch,
        device_type=device_type,
        process_bytes=process_bytes,
        counted=COUNTED,
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12GB", 12 * GB),
        ("12 gb", 12 * GB),
        ("12G", 12 * GB),
        ("0.5GB", GB // 2),
        ("24564MiB", 24564 * 2**20),
        ("2Gi", 2**31),
        ("800MB", 800_000_000),
        ("1TB", 10**12),
        ("8e9", 8 * GB),
        ("5", 5),
        ("1kB", 1000),
    ],
)
def test_an_amount_of_memory_is_read(text: str, expected: int) -> None:
    assert read_bytes(text, "--budget") == expected


@pytest.mark.parametrize("text", ["", "GB", "12 apples", "-3GB", "0GB", "12iB", "1e30GB", "nan", "12GBit", "1,5GB"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--budget: got .*12GB"):
        read_bytes(text, "--budget")


@settings(max_examples=200, deadline=None)
@given(limit=st.integers(-1, 300), most=st.integers(0, 200))
def test_the_largest_that_fits_is_found_exactly(limit: int, most: int) -> None:
    asked: list[int] = []

    def fits(number: int) -> bool:
        asked.append(number)
        return number <= limit

    assert largest_that_fits(fits, most) == max(0, min(limit, most))
    assert len(asked) <= 20
    assert all(1 <= number <= most for number in asked)


@pytest.mark.parametrize("size", ["0.5B", "7B"])
@pytest.mark.parametrize(
    "keys",
    [
        (),
        ("train.gradient_checkpointing=true",),
        ("data.max_length=100", "model.quantization=none"),
        (f"{TOKENS_KEY}=512",),
    ],
)
def test_the_largest_batch_fits_and_one_more_does_not(size: str, keys: tuple[str, ...]) -> None:
    setup = setup_of(size, *keys)
    found = largest_batch_size(setup, 24 * GB)
    totals = [
        setup.with_keys([f"train.per_device_train_batch_size={n}", f"{TOKENS_KEY}=null"]).total_bytes
        for n in (found, found + 1)
    ]
    assert found > 1
    assert totals[0] <= 24 * GB < totals[1]
    assert largest_batch_size(setup, 24 * GB, most=5) == 5
    assert largest_batch_size(setup, GB) == 0


@pytest.mark.parametrize("keys", [(), ("train.gradient_checkpointing=true",), ("data.max_length=77",)])
def test_the_largest_micro_batch_fits_and_the_next_one_does_not(keys: tuple[str, ...]) -> None:
    setup = setup_of("7B", *keys)
    found = largest_micro_batch(setup, 16 * GB)
    step = 1 << (found.bit_length() - 5)
    assert found % step == 0, "rounded as micro-batches are"
    # As many examples as there may be: what the cap lets through is what fits.
    many = ("train.per_device_train_batch_size=64", "train.gradient_accumulation_steps=16")
    assert setup.with_keys([*many, f"{TOKENS_KEY}={found}"]).total_bytes <= 16 * GB
    longest = setup.shape.longest
    supervised = -(-setup.shape.supervised_positions * (found + step) // setup.shape.tokens)
    assert setup.estimate(BatchShape(found + step, supervised, longest)).total_bytes > 16 * GB


def test_where_only_one_example_at_a_time_fits_the_tokens_are_its_own() -> None:
    setup = setup_of("7B")
    one_example = setup.estimate(BatchShape(512, 2, 511)).total_bytes
    assert largest_micro_batch(setup, one_example) == 512
    assert largest_micro_batch(setup, one_example - 1) == 0


def test_auto_is_what_fits_a_gpus_free_memory_and_nothing_on_a_cpu(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, free = tiny_checkpoint(), CONTEXT_BYTES + 20_000_000

    def encode(append: Callable[[Piece], None]) -> dict[str, Any]:
        append([(number, Example([number] * 100, [False] * 98 + [True] * 2)) for number in range(64)])
        return {}

    examples = build_store(encode)
    config = load_config(
        None, [f"{TOKENS_KEY}=auto", "model.compute_dtype=float32", "train.per_device_train_batch_size=64"]
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * 10 // 9, 10**12))
    found = resolve_token_limit(config, folder, examples, torch.device("cuda"))
    assert found is not None
    assert found > 1000
    resolved = config_from_dict(config.to_dict(), [f"{TOKENS_KEY}={found}"], "a test")
    monkeypatch.setattr(plan, "choose_device", lambda _: torch.device("cuda"))
    shape = largest_batch(resolved, examples)
    estimate = estimate_run_memory(resolved, folder, shape, dtype=torch.float32, process_bytes=None)
    assert free - 5_000_000 < estimate.total_bytes <= free
    held = free // 2  # by the allocator, of a sweep's run before
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * 10 // 9 - held, 10**12))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: held)
    assert resolve_token_limit(config, folder, examples, torch.device("cuda")) == found
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 10**12))
    assert resolve_token_limit(config, folder, examples, torch.device("cuda")) == 16
    assert resolve_token_limit(config, folder, examples, torch.device("cpu")) is None
    assert resolve_token_limit(resolved, folder, examples, torch.device("cuda")) is None


def test_the_longest_example_fits_and_a_longer_one_does_not() -> None:
    setup = setup_of("7B")
    found = longest_example(setup, 16 * GB)
    one = ("train.per_device_train_batch_size=1",)
    totals = [setup.with_keys([*one, f"data.max_length={length}"]).total_bytes for length in (found, found + 1)]
    assert totals[0] <= 16 * GB < totals[1]
    assert longest_example(setup_of("0.5B"), 1000 * GB) == LONGEST_TOKENS
    assert longest_example(setup, GB) == 0


def test_every_option_saves_what_it_says_and_costs_something() -> None:
    setup = setup_of("7B", "model.quantization=none", "model.compute_dtype=float32", "lora.r=64")
    options = list_options(setup)
    for option in options:
        assert setup.with_keys(option.keys).total_bytes == option.total_bytes < setup.total_bytes
        assert option.cost
    assert [option.keys[-1] for option in options] == [
        f"{TOKENS_KEY}=512",
        "train.gradient_checkpointing=true",
        "train.offload_checkpoints=true",
        "train.optim=adamw_bnb_8bit",
        "train.optim=paged_adamw_8bit",
        "model.compute_dtype=bfloat16",
        "model.quantization=nf4",
        "lora.r=32",
        "lora.target_modules=[q_proj,k_proj,v_proj,o_proj]",
        "data.max_length=256",
    ]


def test_what_is_set_already_is_no_option() -> None:
    keys = ("train.gradient_checkpointing=true", "train.offload_checkpoints=true", "train.optim=paged_adamw_8bit")
    small = ("lora.r=1", "lora.target_modules=[q_proj]", "data.max_length=16", "train.per_device_train_batch_size=1")
    small += ("train.per_device_eval_batch_size=1",)
    assert list_options(setup_of("7B", *keys, *small)) == []


def test_on_a_cpu_nothing_is_offloaded_or_paged() -> None:
    options = list_options(setup_of("0.5B", "lora.r=256", device_type="cpu", process_bytes=1))
    keys = {key for option in options for key in option.keys}
    assert "train.gradient_checkpointing=true" in keys
    assert "train.optim=adamw_bnb_8bit" in keys
    assert not keys & {"train.offload_checkpoints=true", "train.optim=paged_adamw_8bit"}


def test_an_optimizer_whose_imports_take_more_than_it_saves_is_no_option() -> None:
    options = list_options(setup_of("0.5B", "lora.r=8", device_type="cpu", process_bytes=1))
    assert not any("optim" in key for option in options for key in option.keys)


def test_weights_in_4_bits_are_not_advised_to_go_there() -> None:
    options = list_options(setup_of("0.5B", "model.quantization=fp4", "model.double_quantization=false"))
    assert [option.keys for option in options if option.keys[-1].startswith("model.")] == [
        ("model.double_quantization=true",)
    ]


def test_keys_of_several_options_are_one_each() -> None:
    options = [Option(("a.x=1", "a.y=2"), "", 0), Option(("a.x=3",), "", 0)]
    assert merge_keys(options) == ["a.x=3", "a.y=2"]


@pytest.mark.parametrize("size", ["1.5B", "7B", "14B"])
def test_the_combination_is_the_cheapest_of_all_that_fit(size: str) -> None:
    setup = setup_of(size, "lora.r=64", "data.max_length=2048")
    options = list_options(setup)
    least, most = least_memory_estimate(setup).total_bytes, setup.total_bytes
    for share in (0.0, 0.02, 0.05, 0.1, 0.3, 0.7, 0.999):
        limit = int(least + share * (most - least))
        # Counting in binary over the options' order: an expensive one counts more than all cheaper ones together.
        expected = next(
            chosen
            for number in range(1, 1 << len(options))
            if setup.with_keys(
                merge_keys(chosen := [option for index, option in enumerate(options) if number >> index & 1])
            ).total_bytes
            <= limit
        )
        found = cheapest_that_fits(setup, options, limit)
        assert found is not None
        assert {key.split("=")[0] for key in found} == {key.split("=")[0] for key in merge_keys(expected)}
        assert setup.with_keys(found).total_bytes <= limit


def test_micro_batches_are_made_no_smaller_than_they_have_to_be() -> None:
    setup = setup_of("7B")
    found = cheapest_that_fits(setup, list_options(setup), 12 * GB)
    assert found == [f"{TOKENS_KEY}={largest_micro_batch(setup, 12 * GB)}"]


def test_where_nothing_fits_there_is_no_combination_but_a_floor_and_sizes_that_do() -> None:
    advice = advise(setup_of("72B"), 24 * GB)
    assert not advice["fits"]
    assert advice["combination"] is None
    assert (
        advice["per_device_train_batch_size"],
        advice["max_tokens_per_micro_batch"],
        advice["longest_example_tokens"],
    ) == (0, 0, 0)
    assert 41 * GB < advice["least_weight_bytes"] < advice["least_bytes"] < 44 * GB
    assert advice["fitting_sizes"] == ["0.5B", "1.5B", "3B", "7B", "14B", "32B"]


def test_where_it_fits_nothing_has_to_change() -> None:
    setup = setup_of("0.5B")
    advice = advise(setup, 24 * GB)
    assert advice["fits"]
    assert advice["combination"] == []
    assert advice["per_device_train_batch_size"] >= setup.config.train.per_device_train_batch_size
    assert advice["max_tokens_per_micro_batch"] >= setup.shape.tokens


def test_options_are_shown_by_what_they_save_and_the_next_smaller_model_is_one() -> None:
    advice = advise(setup_of("14B"), 24 * GB)
    totals = [option["total_bytes"] for option in advice["knobs"]]
    assert totals == sorted(totals)
    assert ("model.name_or_path=Qwen/Qwen2.5-7B-Instruct",) in [option["keys"] for option in advice["knobs"]]
    assert not any("name_or_path" in key for option in advise(setup_of("0.5B"), GB)["knobs"] for key in option["keys"])


def test_advice_for_machines_is_json() -> None:
    content = json.loads(json.dumps(advise(setup_of("7B"), 12 * GB)))
    assert content["total_bytes"] == sum(content["ledger"].values()) > content["budget_bytes"] == 12 * GB
    assert content["fits"] is False
    assert all(option["saves_bytes"] == content["total_bytes"] - option["total_bytes"] for option in content["knobs"])


def test_a_command_says_every_key_once_and_the_last_value_counts() -> None:
    command = train_command("my file.yaml", ["lora.r=64", "data.max_length=512"], ["lora.r=32", f"{TOKENS_KEY}=512"])
    assert shlex.split(command) == [
        "python",
        "scripts/train.py",
        "--config",
        "my file.yaml",
        "lora.r=32",
        "data.max_length=512",
        f"{TOKENS_KEY}=512",
    ]


@pytest.fixture
def real_setup(tiny_checkpoint: Callable[..., Path], processed_data: Path) -> Setup:
    """The reviews of `processed_data`, on a 0.5B."""
    path = processed_data / "train.jsonl"
    read = partial(iter_chosen, path, ReadOptions(), None)
    shape_of = shapes_of_records(path, read, ChatTokenizer(tiny_checkpoint()))
    return Setup(
        config=load_config(),
        architecture=SIZES["0.5B"],
        shape_of=shape_of,
        device_type="cuda",
        process_bytes=None,
        counted=COUNTED,
    )


def test_real_examples_are_cut_as_training_cuts_them(real_setup: Setup) -> None:
    shape = real_setup.shape
    assert shape.longest < 511
    shorter = real_setup.with_keys([f"data.max_length={shape.longest - 2}"]).shape
    assert shorter.longest == shape.longest - 3
    assert real_setup.with_keys(["train.per_device_train_batch_size=1"]).shape.tokens < shape.tokens


def test_all_real_examples_at_once_are_the_most_that_a_batch_can_hold(real_setup: Setup) -> None:
    assert advise(real_setup, 24 * GB, num_examples=48)["per_device_train_batch_size"] == 48


def test_a_length_that_leaves_no_room_for_a_text_is_no_option(real_setup: Setup) -> None:
    options = list_options(real_setup)  # behind the prompt's own 60 tokens no review fits into half the length
    assert not any("max_length" in key for option in options for key in option.keys)


@pytest.mark.parametrize(
    ("compute_dtype", "device_type", "expected"),
    [("auto", "cuda", "bfloat16"), ("float16", "cuda", "float16"), ("float32", "cpu", "float32")],
)
def test_a_gpu_that_is_not_here_is_planned_for(
    monkeypatch: pytest.MonkeyPatch, compute_dtype: str, device_type: str, expected: str
) -> None:
    monkeypatch.setattr(budget.torch.cuda, "is_available", lambda: False)
    setup = setup_of("0.5B", f"model.compute_dtype={compute_dtype}", device_type=device_type)
    assert str(setup.dtype) == f"torch.{expected}"


def test_every_size_and_length_has_an_answer_that_fits() -> None:
    """Nothing in the search depends on the budget being a reasonable one."""
    lengths, budgets = (16, 1000, 30_000), (GB // 100, 5 * GB, 2000 * GB)
    for length, limit in itertools.product(lengths, budgets):
        setup = setup_of("3B", f"data.max_length={length}")
        advice = advise(setup, limit)
        found: Any = advice["combination"]
        assert (found is None) == (advice["least_bytes"] > limit)
        if found is not None:
            assert setup.with_keys(found).total_bytes <= limit
