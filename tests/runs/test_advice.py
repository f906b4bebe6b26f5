"""Messages name where a run stopped, what is saved, and the keys that help."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from minilora.errors import UserError
from minilora.qlora.batch import MicroBatch
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.step import StepResult, StepSettings, TrainState
from minilora.runs.checkpoint import list_checkpoints
from minilora.runs.metrics_log import read_metrics
from tests.runs.conftest import Fit, change_steps, raise_at, read, saved_steps, spoil_steps

NO_MEMORY = RuntimeError(
    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nmore"
)


@pytest.mark.parametrize(
    ("keys", "shown", "hidden"),
    [
        (
            {},
            [
                "to resume from {newest}, run the same command with train.max_tokens_per_micro_batch=",
                " (and, if need be, train.gradient_checkpointing=true); or begin anew with --restart",
                "data.max_length=256\n",
            ],
            "model.quantization=nf4",
        ),
        (
            {"train.gradient_checkpointing": True, "train.per_device_train_batch_size": 1},
            ["(not enough memory); begin anew with --restart and"],
            "resume from",
        ),
        ({"model.cache_dequantized": True}, [", model.cache_dequantized=false); or"], "=nf4"),
        (
            {"model.quantization": "none", "lora.r": 32, "train.gradient_checkpointing": True},
            ["train.max_tokens_per_micro_batch=", "; or begin", "model.quantization=nf4, train.optim=adamw_bnb_8bit"],
            "cache_dequantized",
        ),
    ],
)
@pytest.mark.parametrize("error", [NO_MEMORY, MemoryError()], ids=["PyTorch", "Python"])
def test_a_lack_of_memory_says_what_the_run_takes_and_which_keys_help(
    run: Fit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    keys: dict[str, Any],
    shown: list[str],
    hidden: str,
) -> None:
    raise_at(monkeypatch, 2, error)
    with pytest.raises(UserError) as caught:
        run(**keys)
    reason = str(error).partition("\n")[0] or "MemoryError"
    message = str(caught.value).replace(reason, "not enough memory")
    assert message.startswith("after step 1: memory ran out in training (")
    assert "more" not in message.partition(")")[0]  # the first line of PyTorch's message is enough
    newest = tmp_path / "run" / "checkpoints" / "step-000001"
    for part in shown:
        assert part.format(newest=newest) in message
    assert hidden not in message
    assert re.search(r"\n  projections \(.+\n  total +\d+\.\d MB$", message, re.DOTALL)
    assert list_checkpoints(newest.parent) == [newest]


def limit_tokens(monkeypatch: pytest.MonkeyPatch, most: int, scoring: bool) -> None:
    """Lets larger forward passes, of training or of scoring, run out of memory."""
    plain = Qwen2ForCausalLM.forward

    def forward(model: Qwen2ForCausalLM, batch: MicroBatch, *cache: Any) -> torch.Tensor:
        if len(batch.input_ids) > most and bool(cache) == scoring:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(model, batch, *cache)

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", forward)


@pytest.mark.parametrize("is_begun", [True, False])
def test_the_first_remedy_resumes_the_run_with_steps_that_are_cut_finer(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_begun: bool
) -> None:
    keys = {"train.do_predict": False, "train.eval_steps": 9}
    if is_begun:
        with monkeypatch.context() as patch:
            raise_at(patch, 2, ZeroDivisionError())
            with pytest.raises(ZeroDivisionError):
                run(**keys)
    limit_tokens(monkeypatch, 75, scoring=False)  # an example has some 50 tokens, four have some 90
    with pytest.raises(UserError) as caught:
        run(**keys)
    message = str(caught.value)
    assert [words in message for words in ("--restart", "to resume from")] == [is_begun, is_begun]
    ((name, value),) = re.findall(r"the same command with (train\.\w+)=(\d+) ", message)
    assert name == "train.max_tokens_per_micro_batch"
    run(**keys, **{name: value})
    assert [entry["step"] for entry in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_where_a_validation_runs_out_of_memory_the_remedy_is_a_smaller_pass_that_resumes(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {"train.do_predict": False, "train.save_steps": 99}
    whole = run(**keys, **{"train.output_dir": tmp_path / "whole"})
    limit_tokens(monkeypatch, 80, scoring=True)  # three reviews have some 70 tokens
    for size in (6, 3):  # of 12
        with pytest.raises(UserError, match="memory ran out in scoring the validation set") as caught:
            run(**keys)
        newest = tmp_path / "run" / "checkpoints" / "step-000002"
        remedy = f"to resume from {newest}, run the same command with train.per_device_eval_batch_size={size}; or"
        assert remedy in str(caught.value)
        keys["train.per_device_eval_batch_size"] = size
    found = read(run(**keys) / "metrics.json")["validation"]
    assert found == pytest.approx(read(whole / "metrics.json")["validation"])


def test_a_lack_of_memory_while_the_model_is_loaded_names_the_model(run: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("minilora.runs.setup.build_model", fail)
    with pytest.raises(UserError, match=r"memory ran out .*--dry-run.*model\.quantization=nf4"):
        run()


def test_another_error_of_pytorch_is_not_taken_for_a_lack_of_memory(run: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    raise_at(monkeypatch, 1, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run()


@pytest.mark.parametrize("save_steps", [1, 100])
def test_too_many_non_finite_steps_in_a_row_stop_the_run(run: Fit, tmp_path: Path, save_steps: int) -> None:
    keys = {"train.learning_rate": 1e30, "train.warmup_ratio": 0, "train.eval_steps": 100, "train.max_skipped_steps": 3}
    with pytest.raises(UserError) as caught:
        run(**keys, **{"train.max_steps": 9, "train.save_steps": save_steps})
    message = str(caught.value)
    entries = read_metrics(tmp_path / "run")
    skipped = [entry.get("skipped", False) for entry in entries]
    last_sound = len(skipped) - 3
    assert last_sound >= 1
    assert skipped == [False] * last_sound + [True] * 3
    assert entries[-1]["epoch"] == pytest.approx(4 * len(entries) / 48, abs=1e-4)
    assert message.startswith(f"step {last_sound + 3}: ")
    for part in ("non-finite", "3 steps in a row", "--restart", "train.learning_rate (it is 1e+30)", "compute_dtype"):
        assert part in message
    assert "train.max_skipped_steps (it is 3) and resume" in message
    assert f"{tmp_path / 'data' / 'train.jsonl'}:" in message
    left = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert left[-1].name == f"step-{last_sound + 2:06d}"  # with the skipped steps that were not too many
    assert message.endswith(f": {left[-1]}")


def test_of_many_records_the_first_few_are_named(run: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_steps(monkeypatch, 1, 2, 3)
    with pytest.raises(UserError, match=r"train\.jsonl:\d+ and 4 more\)"):
        run(**{"train.gradient_accumulation_steps": 3, "train.max_skipped_steps": 2})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_adapter_is_not_saved(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    def spoil(state: TrainState, settings: StepSettings) -> StepResult | None:
        if settings.step != 3:
            return None
        state.optimizer.param_groups[0]["params"][0].data.view(-1)[0] = value
        return StepResult(0.5, 1.0, True)

    change_steps(monkeypatch, spoil)
    checkpoints = tmp_path / "run" / "checkpoints"
    with pytest.raises(UserError) as caught:
        run()
    for part in ("step 3: ", "non-finite", "--restart", "train.learning_rate", str(checkpoints / "step-000002")):
        assert part in str(caught.value)
    assert saved_steps(checkpoints / "final") == [1, 2]


def test_a_non_finite_validation_loss_stops_the_run(run: Fit) -> None:
    with pytest.raises(UserError, match=r"step \d: the validation loss is nan.*--restart.*train\.learning_rate"):
        run(**{"train.learning_rate": 1e30, "train.eval_steps": 1})
