"""The final folder: written as trained or not at all, refused where it is not what is asked for; report and plot."""

import itertools
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load, save

from minilora.adapters.peft_files import CALIBRATION, adapter_files
from minilora.errors import UserError
from minilora.runs import finish as finish_module
from minilora.runs import setup
from minilora.runs.load_run import load_run
from minilora.runs.train import fit
from minilora.system import console
from minilora.system.files import json_bytes
from minilora.system.manifest import add_file, verify_folder
from tests.runs.conftest import (
    STEPS,
    Fit,
    change_best_step,
    contents,
    flip_bit,
    make_config,
    read,
    remove_folders,
)


def test_quiet_leaves_the_result(run: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    console.set_quiet(True)
    try:
        final = run()
    finally:
        console.set_quiet(False)
    step = read(final / "metrics.json")["step"]
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("test after training:  loss ")
    assert second == f"final adapter (step {step}): {final}"


@pytest.mark.parametrize(
    ("key", "value"),
    [("save_format", "bin"), ("save_dtype", "bfloat16"), ("do_predict", False), ("load_best_model_at_end", False)],
)
def test_what_only_the_final_folder_shows_is_not_ignored_on_a_finished_run(
    final: Path, run: Fit, key: str, value: object
) -> None:
    with pytest.raises(UserError, match=rf"train\.{key}: {value!r} .+ move that folder away"):
        run(**{f"train.{key}": value})
    final.rename(final.with_name("moved"))
    run(**{f"train.{key}": value})
    assert read(final / "training_args.json")["train"][key] == value


def test_a_best_checkpoint_that_is_lost_on_the_way_is_named(
    final: Path, run: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_folders(final)
    change_best_step(final.with_name(f"step-{STEPS:06d}"), 2)
    flip_bit(final.with_name("step-000002") / "adapter_model.safetensors")
    find, calls = setup.check_best, itertools.count()  # at the beginning it is there
    monkeypatch.setattr(setup, "check_best", lambda *given: find(*given) if next(calls) else None)
    with pytest.raises(UserError, match=r"step-000002: .+adapter_model\.\w+ has SHA-256 .+load_best_model_at_end"):
        run()
    assert not final.exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "training_args.json", "metrics.json", "manifest.json"])
def test_a_damaged_final_folder_is_refused_and_written_again_once_it_is_away(final: Path, run: Fit, name: str) -> None:
    expected = contents(final)
    flip_bit(final / name)
    with pytest.raises(UserError, match=r"final: is damaged \(.+\); move that folder away"):
        run()
    shutil.rmtree(final)
    assert contents(run()) == expected


def test_the_base_models_place_may_be_corrected_by_hand_and_counts(
    final: Path, run: Fit, tiny_checkpoint: Callable[..., Path]
) -> None:
    path = final / "adapter_config.json"
    content = {**read(path), "base_model_name_or_path": str(tiny_checkpoint())}
    path.write_bytes(json_bytes(content))
    assert run() == final
    assert load_run(final, None, []).model_folder == tiny_checkpoint()
    path.write_bytes(json_bytes({**content, "lora_alpha": 1}))
    with pytest.raises(UserError, match=r"final: is damaged \(adapter_config\.json has SHA-256"):
        run()


def test_the_model_card_knows_the_bases_licence_and_the_language_of_the_texts(
    tiny_checkpoint: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "base"))
    (base / "LICENSE").write_text("Apache License\nVersion 2.0, January 2004\n", "utf-8")
    config = make_config(data, tmp_path / "run", **{"model.name_or_path": base, "train.max_steps": 1})
    final = fit(config, base)
    metadata = yaml.safe_load((final / "README.md").read_text("utf-8").split("---\n")[1])
    assert (metadata["license"], metadata["language"]) == ("apache-2.0", "zh")
    assert metadata["model-index"][0]["name"] == "run"
    assert read(final / "metrics.json")["labelled"] is True


def test_a_model_card_may_be_changed_by_hand(final: Path, run: Fit) -> None:
    (final / "README.md").write_text("mine", "utf-8")
    assert run() == final
    assert (final / "README.md").read_text("utf-8") == "mine"


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[min(tensors)]


def perturb(tensors: dict[str, torch.Tensor]) -> None:
    tensors[min(tensors)].view(-1)[-1] *= 1.01


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    tensors[min(tensors)].view(-1)[-1] = math.nan


def write_changed(monkeypatch: pytest.MonkeyPatch, file: str, change: Callable[[bytes], bytes]) -> None:
    """Changes a file of the final adapter before it is written and hashed: no checksum can notice."""

    def files(*arguments: Any, **more: Any) -> Iterator[tuple[str, bytes]]:
        for name, content in adapter_files(*arguments, **more):
            yield name, change(content) if name == file else content

    monkeypatch.setattr(finish_module, "adapter_files", files)


@pytest.mark.parametrize("save_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("damage", [drop, perturb, spoil])
def test_a_final_adapter_that_cannot_be_read_back_as_it_was_is_not_put_in_place(
    run: Fit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save_dtype: str,
    damage: Callable[[dict[str, torch.Tensor]], None],
) -> None:
    def change(content: bytes) -> bytes:
        tensors = load(content)
        damage(tensors)
        return save(tensors)

    write_changed(monkeypatch, "adapter_model.safetensors", change)
    checkpoints = tmp_path / "run" / "checkpoints"
    with pytest.raises(UserError, match=r"\.writing-final: read back.+\n.*lora_A\.weight"):
        run(**{"train.save_dtype": save_dtype})
    assert not (checkpoints / "final").exists()
    monkeypatch.undo()
    assert (run(**{"train.save_dtype": save_dtype}) / "adapter_model.safetensors").is_file()  # as the message says
    assert not (checkpoints / ".writing-final").exists()


def test_a_scale_that_was_lost_on_the_way_to_the_file_is_noticed(run: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor arrives as it was; with half of alpha in adapter_config.json they are another adapter."""
    write_changed(monkeypatch, "adapter_config.json", lambda text: text.replace(b'alpha": 16', b'alpha": 8'))
    with pytest.raises(UserError, match=r"read back.+\n.*adapter_config\.json"):
        run()


@pytest.mark.parametrize("save_format", ["safetensors", "bin"])
def test_a_portable_adapter_is_read_back_in_either_format(run: Fit, save_format: str) -> None:
    keys = {"train.portable": True, "lora.use_rslora": True, "train.save_format": save_format}
    assert verify_folder(run(**keys)) is None


def report_of(final: Path) -> str:
    return (final.parent.parent / "report.html").read_text("utf-8")


@pytest.mark.usefixtures("with_plots")
def test_the_report_shows_the_run_and_is_written_again_with_the_final_folder(final: Path, run: Fit) -> None:
    metrics, page = read(final / "metrics.json"), report_of(final)
    for name in ("test_before", "test"):
        assert f"{metrics[name]['f1']:.4f}" in page
    for digest in (*metrics["data_sha256"].values(), *metrics["model_sha256"].values()):
        assert digest in page
    remove_folders(final)
    (final.parent.parent / "report.html").unlink()
    run()
    measured = re.compile("<section.aria-labelledby=.(?:memory|skipped-steps).>")  # memory is measured anew
    assert measured.split(report_of(final))[::2] == measured.split(page)[::2]


@pytest.mark.usefixtures("with_plots")
def test_a_finished_run_that_lacks_report_or_plot_writes_them(final: Path, run: Fit) -> None:
    folder, before, page = final.parent.parent, contents(final), report_of(final)
    plot = (folder / "loss.png").read_bytes()
    for name in ("report.html", "loss.png"):
        (folder / name).unlink()
        run()
    measured = re.compile("<section.aria-labelledby=.(?:memory|skipped-steps).>")
    assert measured.split(report_of(final))[::2] == measured.split(page)[::2]
    assert (folder / "loss.png").read_bytes() == plot
    assert contents(final) == before


@pytest.mark.usefixtures("with_plots")
@pytest.mark.parametrize("is_there", [True, False])
def test_a_report_written_later_is_at_the_temperature_of_the_runs_own_figures(
    final: Path, run: Fit, is_there: bool
) -> None:
    """calibration.json was fitted anew meanwhile, or is gone."""
    path, page, own = final / CALIBRATION, report_of(final), read(final / "metrics.json")["test"]["temperature"]
    content = {**read(path), "temperature": 7.5}
    path.unlink()
    if is_there:
        add_file(final, CALIBRATION, json_bytes(content))
    (final.parent.parent / "report.html").unlink()
    run()
    bins = re.compile("The bins that are not empty.*?</table>", re.DOTALL)
    assert bins.findall(report_of(final)) == bins.findall(page) != []
    assert f"Temperature {own:.4g}, fitted at the end of training." in report_of(final)
    assert "7.5" not in report_of(final).split("<h2")[0]


@pytest.mark.parametrize("kept", [[], [1]], ids=["no checkpoint", "an earlier checkpoint"])
def test_a_finished_run_without_its_checkpoint_says_how_to_get_a_report(
    run: Fit, capsys: pytest.CaptureFixture[str], kept: list[int]
) -> None:
    final = run(**{"train.load_best_model_at_end": False})
    for path in [path for path in final.parent.glob("step-*") if int(path.name[5:]) not in kept]:
        shutil.rmtree(path)
    (final.parent.parent / "report.html").unlink()
    assert run(**{"train.load_best_model_at_end": False}) == final
    assert "evaluate.py --output_dir" in capsys.readouterr().err
    assert not (final.parent.parent / "report.html").exists()


@pytest.mark.usefixtures("with_plots")
def test_a_matplotlib_that_fails_costs_a_run_its_pictures_only(
    run: Fit, break_package: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    break_package("matplotlib", "raise AttributeError('_ARRAY_API not found')")
    final = run()
    out, err = capsys.readouterr()
    assert [line for line in (out + err).splitlines() if "matplotlib is" in line] == [
        "loss.png and the report's curves are left out: matplotlib is installed and fails (AttributeError: "
        "_ARRAY_API not found); pip install --upgrade matplotlib"
    ]
    assert "No curves: matplotlib" in report_of(final)
    assert "_ARRAY_API not found" in report_of(final)


def test_without_a_test_set_the_report_says_so_whatever_was_scored_before(final: Path, run: Fit) -> None:
    remove_folders(final)
    run(**{"train.do_predict": False})
    assert "train.do_predict=false" in report_of(final)
    assert "Worst mistakes" not in report_of(final)


@pytest.mark.usefixtures("with_plots")
@pytest.mark.parametrize("name", ["report.html", "loss.png"])
def test_a_report_or_a_plot_that_cannot_be_written_does_not_cost_the_run(
    run: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = tmp_path / "run" / name
    path.mkdir(parents=True)
    final = run()
    assert f"note: {path} " in capsys.readouterr().err
    assert verify_folder(final) is None
    other = path.with_name({"report.html": "loss.png", "loss.png": "report.html"}[name])
    assert other.stat().st_size > 10_000
    assert not list(path.parent.glob(".writing-*"))


def test_without_matplotlib_a_run_says_what_it_leaves_out(
    run: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "run" / "loss.png").exists()
