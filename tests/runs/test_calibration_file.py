"""calibration.json is written with the final adapter, the same however the run went, and used only where it fits."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from minilora.adapters.peft_files import CALIBRATION, damage_of_adapter
from minilora.errors import UserError
from minilora.evaluation.calibration import fit_temperature
from minilora.runs import finish as finish_module
from minilora.runs import scoring
from minilora.runs.calibration_file import Calibration, read_calibration, usable_calibration
from minilora.runs.load_run import load_run
from minilora.system.files import json_bytes, sha256
from minilora.system.manifest import MANIFEST, read_manifest
from tests.runs.conftest import STEPS, Fit, contents, flip_bit, read, remove_folders

Usable = Callable[..., Calibration | None]


@pytest.fixture
def usable(tiny_checkpoint: Callable[..., Path]) -> Usable:
    """`usable_calibration` of a folder, with overrides of its configuration."""

    def find(folder: Path, *overrides: str, raw: bool = False) -> Calibration | None:
        return usable_calibration(load_run(folder, str(tiny_checkpoint()), list(overrides)), raw)

    return find


def test_a_finished_run_has_the_temperature_of_its_validation_split(
    run: Fit, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], usable: Usable
) -> None:
    fitted = []
    monkeypatch.setattr(
        finish_module, "fit_temperature", lambda *given: fitted.append(given) or fit_temperature(*given)
    )
    final = run()
    ((labels, probabilities),) = fitted
    found, fit = read_calibration(final), fit_temperature(labels, probabilities)
    assert found is not None
    assert (found.temperature, found.log_loss_after) == (fit.temperature, fit.log_loss_after)
    assert found.num_examples == len(probabilities) == 12
    assert found.data_sha256 == {"validation.jsonl": sha256(data / "validation.jsonl")}
    assert CALIBRATION in read_manifest(final)["files"]
    assert found.is_fitted_on([data / "validation.jsonl"])
    assert not found.is_fitted_on([data / "test.jsonl"])
    assert f"temperature of the label probabilities: {fit.temperature:.4g}" in capsys.readouterr().out
    assert usable(final) == found


def test_validation_is_not_scored_twice_and_a_resumed_run_gets_the_same_bytes(
    run: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = []
    score_split = scoring.score_split
    monkeypatch.setattr(
        scoring, "score_split", lambda run, name, *more: scored.append(name) or score_split(run, name, *more)
    )
    final = run()
    assert "validation" not in scored
    expected = contents(final)
    remove_folders(final)
    run()
    assert scored.count("validation") == 1  # its probabilities were in the memory of the other process
    assert contents(final) == expected


def test_without_the_best_checkpoint_it_is_that_of_the_last_step(run: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    find = finish_module.validation_scores
    monkeypatch.setattr(finish_module, "validation_scores", lambda run, step: steps.append(step) or find(run, step))
    run(**{"train.load_best_model_at_end": False})
    assert steps == [STEPS]


def test_metrics_of_the_test_set_are_at_the_temperature_with_those_without_beside_them(run: Fit) -> None:
    final = run()
    test, calibration = read(final / "metrics.json")["test"], read_calibration(final)
    assert calibration is not None
    assert test["temperature"] == calibration.temperature
    assert test["uncalibrated"].keys() == test["change"].keys()
    assert test["change"]["log_loss"] == pytest.approx(test["log_loss"] - test["uncalibrated"]["log_loss"])
    assert "temperature" not in read(final / "metrics.json")["test_before"]


@pytest.fixture
def adapter(run: Fit, tmp_path: Path) -> Path:
    """A final adapter as another program would have it: without a manifest."""
    folder = Path(shutil.copytree(run(), tmp_path / "adapter"))
    (folder / MANIFEST).unlink()
    return folder


def test_other_weights_are_not_calibrated_and_a_note_says_so(
    adapter: Path, capsys: pytest.CaptureFixture[str], usable: Usable
) -> None:
    assert usable(adapter) is not None
    assert "calibrated, temperature" in capsys.readouterr().err
    path = adapter / "adapter_model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    assert usable(adapter) is None
    said = capsys.readouterr().err
    assert "fitted for other weights of the adapter; evaluate.py --calibrate FILE" in said


@pytest.mark.parametrize("override", ["prompt.instruction=别的：", "prompt.labels=[差, 好]", "prompt.system=x"])
def test_another_prompt_is_not_calibrated_and_a_note_says_so(
    adapter: Path, override: str, capsys: pytest.CaptureFixture[str], usable: Usable
) -> None:
    assert usable(adapter, override) is None
    assert "fitted for another prompt" in capsys.readouterr().err


def test_another_quantisation_is_not_calibrated_unless_the_file_is_too_old_to_know(
    adapter: Path, capsys: pytest.CaptureFixture[str], usable: Usable
) -> None:
    assert usable(adapter, "model.quantization=none") is None
    assert "fitted for model.quantization=nf4; evaluate.py --calibrate FILE" in capsys.readouterr().err
    content = read(adapter / CALIBRATION)
    del content["quantization"]
    (adapter / CALIBRATION).write_bytes(json_bytes(content))
    assert usable(adapter, "model.quantization=none") is not None


def test_another_base_model_is_not_calibrated(
    adapter: Path, capsys: pytest.CaptureFixture[str], usable: Usable
) -> None:
    found = read_calibration(adapter)
    assert found is not None
    (adapter / CALIBRATION).write_bytes(replace(found, model_sha256={"config.json": "ab"}).to_bytes())
    assert usable(adapter) is None
    assert "another base model" in capsys.readouterr().err


def test_raw_and_an_adapter_without_the_file_say_so(
    adapter: Path, capsys: pytest.CaptureFixture[str], usable: Usable
) -> None:
    assert usable(adapter, raw=True) is None
    assert "not calibrated (--raw)" in capsys.readouterr().err
    (adapter / CALIBRATION).unlink()
    assert usable(adapter) is None
    assert "not calibrated (no calibration.json; evaluate.py --calibrate FILE" in capsys.readouterr().err


def test_a_damaged_file_is_named_and_the_adapter_is_sound_without(run: Fit, usable: Usable) -> None:
    final = run()
    flip_bit(final / CALIBRATION)
    assert damage_of_adapter(final) is None
    assert run() == final
    with pytest.raises(UserError, match=r"calibration\.json: is not as it was written .+--raw.+--calibrate"):
        usable(final)
    assert usable(final, raw=True) is None
    (final / CALIBRATION).unlink()
    assert usable(final) is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[]", "is not a JSON object"),
        ("{", "is not JSON"),
        ("{}", "has no temperature"),
        ('"temperature": 0', "temperature is 0.+more than 0"),
        ('"temperature": "1"', "temperature is '1', expected a number"),
        ('"temperature": NaN', "is not JSON"),
        ('"num_examples": 1.5', "num_examples"),
        ('"labels": "a"', "labels"),
        ('"data_sha256": {"a": 3}', "data_sha256"),
        ('"temperature_interval_95": ["a"]', "temperature_interval_95"),
    ],
)
def test_what_is_no_calibration_is_one_message(adapter: Path, text: str, problem: str) -> None:
    content = read(adapter / CALIBRATION)
    if text.startswith('"'):
        name = text.split('"')[1]
        content.pop(name)
        text = json.dumps(content)[:-1] + f", {text}}}"
    (adapter / CALIBRATION).write_text(text, "utf-8")
    with pytest.raises(UserError, match=rf"calibration\.json: .*{problem}.*--raw.*--calibrate"):
        read_calibration(adapter)


def test_what_is_written_is_read_back_and_described() -> None:
    fit = fit_temperature(np.array([0, 1, 0, 0] * 30), np.array([[0.9, 0.1]] * 120))
    assert fit.interval_95 is not None
    found = Calibration(
        fit.temperature, 120, 0.6, 0.5, {"a.tsv": "x"}, "w", {}, ("a", "b"), "i", "s", fit.interval_95, fit.note
    )
    assert json.loads(found.to_bytes()) == json.loads(json_bytes(found.__dict__))
    assert f"Temperature {fit.temperature:.4g} (95 % interval " in found.describe()
    assert "fitted on 120 examples of a.tsv, where log loss goes from 0.6000 to 0.5000." in found.describe()
