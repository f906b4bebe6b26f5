"""A run opens at its newest sound checkpoint, and refuses what it cannot train on before the model is loaded."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minilora.build import SharedBase
from minilora.errors import UserError
from minilora.qlora.prompt import Example
from minilora.runs import run as run_module
from minilora.runs import setup
from minilora.runs.checkpoint import list_checkpoints
from minilora.runs.metrics_log import read_metrics
from minilora.runs.train import fit
from minilora.system import manifest
from minilora.system.distributed import Ranks
from minilora.system.manifest import verify_folder
from tests.conftest import copy_with_system
from tests.runs.conftest import (
    CONSTANT,
    STEPS,
    Fit,
    change_best_step,
    contents,
    flip_bit,
    lasting,
    load_no_model,
    make_config,
    raise_at,
    read,
    remove_folders,
)


def test_a_best_checkpoint_that_is_gone_is_named_at_once_and_the_last_one_can_be_taken(
    final: Path, run: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_best_step(final.with_name(f"step-{STEPS:06d}"), 2)
    remove_folders(final, 2)
    with monkeypatch.context() as patch:
        load_no_model(patch)
        with pytest.raises(UserError, match=r"step-000002: .+ train\.load_best_model_at_end=false"):
            run()
    assert not final.exists()
    run(**{"train.load_best_model_at_end": False})
    assert read(final / "metrics.json")["step"] == STEPS


def test_a_resumed_run_hashes_each_checkpoint_that_it_reads_once(
    final: Path, run: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_best_step(final.with_name("step-000003"), 2)
    remove_folders(final, 4)
    hashed: Counter[str] = Counter()
    plain = manifest.hash_file

    def count(path: Path) -> str:
        hashed[f"{path.parent.name}/{path.name}"] += 1
        return plain(path)

    monkeypatch.setattr(manifest, "hash_file", count)
    run()
    files = ("adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json")
    # That the run resumes from, and that it writes and reads back.
    for folder in ("step-000003", ".writing-step-000004"):
        assert [hashed[f"{folder}/{name}"] for name in files] == [1] * 4
    assert hashed["step-000004/adapter_model.safetensors"] == 0
    # The best one when the run begins, so that a loss shows before hours of computing, and when it is loaded.
    assert [hashed[f"step-000002/{name}"] for name in files] == [2] * 4
    assert hashed[".writing-final/adapter_model.safetensors"] == 1
    assert hashed["final/adapter_model.safetensors"] == 0


def test_a_limit_that_auto_has_found_is_that_of_the_whole_run(run: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = {"train.max_tokens_per_micro_batch": "auto"}
    limits: list[int | None] = []
    plain = run_module.split_into_micro_batches

    def noting(examples: list[Example], size: int, limit: int | None) -> list[list[Example]]:
        limits.append(limit)
        return plain(examples, size, limit)

    monkeypatch.setattr(run_module, "split_into_micro_batches", noting)
    monkeypatch.setattr(setup, "resolve_token_limit", lambda *_, **__: 64)
    final = run(**auto)
    remove_folders(final, 4, 3)
    monkeypatch.setattr(setup, "resolve_token_limit", lambda *_, **__: pytest.fail("was found before"))
    assert run(**auto) == final
    assert limits == [64] * (STEPS + 2)
    remove_folders(final, 4)
    assert run(**{"train.max_tokens_per_micro_batch": 80}) == final
    assert limits[STEPS + 2 :] == [80]


def test_auto_that_is_asked_for_in_the_middle_of_a_run_is_resolved_then(
    final: Path, run: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_folders(final, 4)
    monkeypatch.setattr(setup, "resolve_token_limit", lambda *_, **__: 64)
    assert run(**{"train.max_tokens_per_micro_batch": "auto"}) == final
    assert read(final.with_name("step-000004") / "state.json")["auto_tokens"] == 64


@pytest.mark.parametrize(("own", "others", "expected"), [(64, [48, 80], 48), (32, [48], 32), (None, [None], None)])
def test_auto_is_what_fits_the_gpu_of_each_rank(
    own: int | None, others: list[int | None], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranks, "all_gather", lambda _, value: [value, *others])
    assert setup._least_limit(Ranks(), lambda: own) == expected


def test_auto_changes_nothing_on_a_cpu(final: Path, run: Fit, tmp_path: Path) -> None:
    output = tmp_path / "auto"
    found = run(**{"train.max_tokens_per_micro_batch": "auto", "train.output_dir": output})
    weights = "adapter_model.safetensors"
    assert (found / weights).read_bytes() == (final / weights).read_bytes()


@pytest.mark.parametrize("name", ["state.json", "adapter_model.safetensors", "optimizer.safetensors", "manifest.json"])
@pytest.mark.parametrize("how", ["flipped bit", "missing", "cut off"])
def test_a_damaged_checkpoint_is_set_aside_and_the_run_resumes_from_the_one_before_it(
    final: Path, run: Fit, capsys: pytest.CaptureFixture[str], name: str, how: str
) -> None:
    expected = contents(final)
    log = lasting(final.parent.parent)
    remove_folders(final)
    newest = final.with_name(f"step-{STEPS:06d}")
    before = final.with_name(f"step-{STEPS - 1:06d}")
    if how == "missing":
        (newest / name).unlink()
    elif how == "cut off":
        (newest / name).write_bytes((newest / name).read_bytes()[:-1])
    else:
        flip_bit(newest / name)
    capsys.readouterr()
    assert contents(run()) == expected
    printed = capsys.readouterr()
    assert f"{newest}: is damaged (" in printed.err
    assert f"damaged-{newest.name}-1" in printed.err
    assert name in printed.err.partition(f"{newest}: is damaged (")[2]
    assert f"resuming from {before}\n" in printed.out
    assert newest.with_name(f"damaged-{newest.name}-1").is_dir()
    assert verify_folder(newest) is None
    assert lasting(final.parent.parent) == log


def test_where_no_checkpoint_is_sound_the_run_does_not_begin_anew_by_itself(final: Path, run: Fit) -> None:
    remove_folders(final)
    steps = list_checkpoints(final.parent)
    for checkpoint in steps:
        flip_bit(checkpoint / "state.json")
    names = ", ".join(f"damaged-{checkpoint.name}-1" for checkpoint in steps)
    for _ in range(2):  # the second time they have been set aside already
        with pytest.raises(UserError, match="--restart") as caught:
            run()
        assert names in str(caught.value)
    assert read_metrics(final.parent.parent)


def test_a_run_with_a_constant_rate_may_become_longer(run: Fit, tmp_path: Path) -> None:
    run(**CONSTANT, **{"train.output_dir": tmp_path / "whole", "train.max_steps": 6})
    final = run(**CONSTANT)
    with pytest.raises(UserError, match=r"train\.max_steps: 6 comes too late"):
        run(**CONSTANT, **{"train.max_steps": 6})
    remove_folders(final)
    final = run(**CONSTANT, **{"train.max_steps": 6})
    assert read(final / "training_args.json")["train"]["max_steps"] == 6
    whole = tmp_path / "whole" / "checkpoints" / "final"
    for name in ("adapter_model.safetensors", "metrics.json"):
        assert (final / name).read_bytes() == (whole / name).read_bytes()
    assert lasting(tmp_path / "run") == lasting(tmp_path / "whole")


def test_a_run_is_not_shorter_than_what_is_done(run: Fit) -> None:
    remove_folders(run(**CONSTANT))
    with pytest.raises(UserError, match=r"step-000004: has 4 steps .+ asks for 3; .*train\.max_steps"):
        run(**CONSTANT, **{"train.max_steps": 3})


@pytest.mark.parametrize("eval_steps", [3, 100])
def test_a_run_becomes_as_short_as_what_is_done_only_where_that_was_validated(
    run: Fit, monkeypatch: pytest.MonkeyPatch, eval_steps: int
) -> None:
    keys = {**CONSTANT, "train.eval_steps": eval_steps}
    with monkeypatch.context() as patch:
        raise_at(patch, 4, ZeroDivisionError())
        with pytest.raises(ZeroDivisionError):
            run(**keys, **{"train.max_steps": 6})
    if eval_steps == 3:
        assert read(run(**keys, **{"train.max_steps": 3}) / "metrics.json")["step"] == 3
    else:
        with pytest.raises(UserError, match=r"step-000003: has 3 steps .+ asks for 3"):
            run(**keys, **{"train.max_steps": 3})
        assert read(run(**keys, **{"train.max_steps": 4}) / "metrics.json")["step"] == 4


KINDS: dict[str, dict[str, Any]] = {
    "dora and biases": {"lora.use_dora": True, "lora.bias": "all", "train.loraplus_lr_ratio": 8},
    "patterns": {
        "lora.rank_pattern": "{q_proj: 1, 'layers.1.mlp.*': 3}",
        "lora.alpha_pattern": "{down_proj: 5}",
        "lora.layers_to_transform": "[1]",
        "train.portable": True,
    },
    "pissa": {"lora.init_lora_weights": "pissa", "lora.dropout": 0, "train.save_dtype": "bfloat16"},
    "loftq, 8-bit moments": {"lora.init_lora_weights": "loftq", "train.optim": "adamw_bnb_8bit"},
    "gaussian, portable": {"lora.init_lora_weights": "gaussian", "lora.use_rslora": True, "train.portable": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_any_kind_is_trained_saved_and_resumed_to_the_bit(run: Fit, tmp_path: Path, kind: str) -> None:
    """`finish` has read the adapter back by then, and compared its tensors."""
    final = run(**KINDS[kind])
    losses = [entry["train_loss"] for entry in lasting(tmp_path / "run")]
    assert len(set(losses)) == STEPS
    whole, log = contents(final), lasting(tmp_path / "run")
    remove_folders(final, 3, 4)
    assert contents(run(**KINDS[kind])) == whole
    assert lasting(tmp_path / "run") == log


def test_a_run_with_the_models_own_system_turn_says_which_and_resumes(
    tiny_checkpoint: Callable[..., Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_with_system(tiny_checkpoint(), tmp_path / "math", "Please reason step by step.")
    config = make_config(data, tmp_path / "run", **{"prompt.system": "model"})
    final = fit(config, folder)
    assert read(final / "training_args.json")["prompt"]["system"] == "Please reason step by step."
    assert "    system: Please reason step by step.\n" in (final / "README.md").read_text("utf-8")
    assert "prompt.system" not in capsys.readouterr().err
    shutil.rmtree(final)
    assert fit(config, folder) == final
    fit(make_config(data, tmp_path / "other"), folder)
    assert "prompt.system=model takes that" in capsys.readouterr().err


def test_the_memory_estimate_of_a_sweeps_later_run_does_not_count_the_earlier_ones(
    tiny_checkpoint: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    base = SharedBase()
    base.process_bytes = 123_000_000
    opened = setup.open_run(make_config(data, tmp_path / "run"), tiny_checkpoint(), base=base)
    assert opened.process_bytes == 123_000_000
    assert 123_000_000 in opened.memory_estimate.parts.values()
