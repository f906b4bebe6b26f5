"""A second stage of training begins with an adapter: its weights and shape, a new optimizer, step 0."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minilora.build import take_adapter
from minilora.data import hub
from minilora.errors import UserError
from minilora.planning.dry_run import print_plan
from minilora.runs.checkpoint import read_state
from minilora.system.files import json_bytes, sha256
from minilora.system.signals import Interrupted
from tests.runs.conftest import (
    Fit,
    flip_bit,
    lasting,
    load_no_model,
    make_config,
    raise_at,
    read,
    remove_folders,
    rewrite,
)

FIRST = {"lora.r": 3, "lora.target_modules": "[q_proj, up_proj]", "lora.use_rslora": True, "lora.bias": "lora_only"}


@pytest.fixture
def adapter(run: Fit, tmp_path: Path) -> Path:
    """The final adapter of a first stage."""
    return run(**FIRST, **{"train.output_dir": tmp_path / "first", "train.load_best_model_at_end": False})


def test_a_stage_begins_where_the_adapter_ended(adapter: Path, run: Fit) -> None:
    first = read(adapter / "metrics.json")
    final = run(**{"model.adapter": adapter, "train.max_steps": 1, "train.load_best_model_at_end": False})
    results = read(final / "metrics.json")
    before, uncalibrated = results["test_before"], first["test"].pop("uncalibrated")
    for name in ("log_loss", "expected_calibration_error"):  # before a stage there is no temperature yet
        assert before.pop(name) == pytest.approx(uncalibrated[name], rel=1e-12)
    assert before.pop("confidence_intervals_95").items() <= first["test"].pop("confidence_intervals_95").items()
    assert before.items() <= first["test"].items()
    assert results["step"] == 1
    assert results["adapter_sha256"] == {"adapter_model.safetensors": sha256(adapter / "adapter_model.safetensors")}
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, final))
    assert old.keys() == new.keys()
    assert any(not torch.equal(old[name], new[name]) for name in old)
    assert all((old[name] - new[name]).abs().max() < 0.02 for name in old)  # a step of AdamW at 0.01
    shapes = [read(folder / "adapter_config.json") for folder in (adapter, final)]
    assert shapes[0] == shapes[1]
    card = (final / "README.md").read_text("utf-8")
    assert "beginning with the adapter " in card
    assert str(adapter) not in card  # a folder's path is nobody else's business


def test_a_stage_resumes_to_the_bit_also_where_the_adapter_has_moved(
    adapter: Path, run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(**{"model.adapter": adapter, "train.output_dir": tmp_path / "whole"})
    with monkeypatch.context() as patch:
        raise_at(patch, 3, Interrupted(15))
        with pytest.raises(Interrupted, match="saved step 2"):
            run(**{"model.adapter": adapter})
    moved = adapter.rename(tmp_path / "moved")
    final = run(**{"model.adapter": moved})
    for name in ("adapter_model.safetensors", "metrics.json"):
        assert (final / name).read_bytes() == (whole / name).read_bytes()
    assert lasting(tmp_path / "run") == lasting(tmp_path / "whole")
    assert run(**{"model.adapter": moved}) == final


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_stage_does_not_resume_with_another_adapter_or_none(
    adapter: Path, run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_finished: bool
) -> None:
    final = run(**{"model.adapter": adapter})
    other = Path(shutil.copytree(adapter.with_name("step-000002"), tmp_path / "other"))
    if not is_finished:
        remove_folders(final)
    load_no_model(monkeypatch)
    with pytest.raises(UserError, match=r"another model\.adapter \(.+other\) \(SHA-256 of adapter_model"):
        run(**{"model.adapter": other})
    with pytest.raises(UserError, match=r"another model\.adapter \(None\)"):
        run(**FIRST)


def test_the_adapters_shape_is_taken_and_said(
    adapter: Path, data: Path, tmp_path: Path, tiny_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = take_adapter(make_config(data, tmp_path / "run", **{"model.adapter": adapter, "lora.dropout": 0.2}))
    assert (config.lora.r, config.lora.target_modules, config.lora.bias) == (3, ["q_proj", "up_proj"], "lora_only")
    assert config.lora.dropout == 0.2
    assert "model.adapter: as it is, lora.r=3, " in capsys.readouterr().out
    assert take_adapter(config) == config
    assert capsys.readouterr().out == ""
    print_plan(config, tiny_checkpoint())
    planned = capsys.readouterr().out
    small = take_adapter(make_config(data, tmp_path / "run", **FIRST))
    print_plan(small, tiny_checkpoint())
    line = [next(x for x in text.splitlines() if "AdamW" in x) for text in (planned, capsys.readouterr().out)]
    assert line[0] == line[1]


def test_an_adapter_that_is_damaged_or_none_is_refused_before_a_step(adapter: Path, run: Fit, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.adapter: .+first holds no adapter_config\.json"):
        run(**{"model.adapter": tmp_path / "first"})
    with pytest.raises(UserError, match=r"model\.adapter: .+ train\.output_dir; choose another one"):
        run(**{"model.adapter": adapter, "train.output_dir": tmp_path / "first"})
    flip_bit(adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"final: is damaged \(adapter_model\.safetensors has SHA-256"):
        run(**{"model.adapter": adapter})
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_the_folder_of_the_run_names_its_adapters_and_a_pickle_is_named(
    adapter: Path, run: Fit, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "outputs" / "checkpoints" / "final"))
    with pytest.raises(UserError, match=r"model\.adapter: .+outputs holds no .+; checkpoints/final in it do"):
        run(**{"model.adapter": tmp_path / "outputs"})
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin is a pickle; convert it to safetensors"):
        run(**{"model.adapter": folder})


def test_an_adapter_may_be_a_name_on_the_hub(adapter: Path, run: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(hub, "download_snapshot", lambda _, name, *__, **___: asked.append(name) or adapter)
    final = run(**{"model.adapter": "somebody/adapter"})
    assert set(asked) == {"somebody/adapter"}
    assert "beginning with the adapter somebody/adapter:" in (final / "README.md").read_text("utf-8")
    assert run(**{"model.adapter": adapter}) == final  # the same, by its SHA-256


def test_an_adapter_of_another_base_is_noted(adapter: Path, run: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    results = read(adapter / "metrics.json")
    results["model_sha256"]["model.safetensors"] = "0" * 64
    rewrite(adapter, "metrics.json", json_bytes(results))
    run(**{"model.adapter": adapter})
    assert (
        f"note: {adapter}: was trained on another base model (SHA-256 of model.safetensors)" in capsys.readouterr().err
    )


def test_a_run_that_is_asked_late_for_its_first_scores_has_none(adapter: Path, run: Fit) -> None:
    final = run(**{"model.adapter": adapter, "train.do_predict": False})
    remove_folders(final)
    results = read(run(**{"model.adapter": adapter}) / "metrics.json")
    assert results["test_before"] is None
    assert results["test"] is not None


def test_a_checkpoint_of_before_there_were_stages_is_read(run: Fit) -> None:
    final = run()
    remove_folders(final)
    newest = final.with_name("step-000004")
    state = read(newest / "state.json")
    del state["adapter_sha256"]
    del state["config"]["model"]["adapter"]
    rewrite(newest, "state.json", json.dumps(state).encode())
    assert read_state(newest).adapter_sha256 == {}
    assert run() == final
