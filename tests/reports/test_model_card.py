"""The model card says what was trained, and how well it does."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from minilora.config import load_config
from minilora.reports.model_card import language_of, render_model_card

AFTER = {
    "loss": 0.21,
    "accuracy": 0.91234,
    "f1": 0.905,
    "precision": 0.9,
    "recall": 0.91,
    "num_examples": 400,
    "confidence_intervals_95": {"accuracy": [0.88, 0.94]},
}


def card(results: dict[str, Any], *overrides: str, labelled: bool = True, known: dict[str, str] | None = None) -> str:
    results = {"step": 120, "machine": {}, **results}
    return render_model_card(load_config(None, overrides).to_dict(), results, labelled, known)


def metadata_of(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text.split("---\n", 2)[1]))


def test_it_begins_with_the_metadata_of_the_hub() -> None:
    text = card({"test_before": None, "test": AFTER}, "model.name_or_path=Qwen/Qwen2.5-1.5B-Instruct")
    assert text.startswith("---\n")
    metadata = metadata_of(text)
    assert metadata["base_model"] == "Qwen/Qwen2.5-1.5B-Instruct"
    assert metadata["library_name"] == "peft"
    assert metadata["pipeline_tag"] == "text-generation"
    assert {"lora", "text-classification"} < set(metadata["tags"])
    assert metadata.keys().isdisjoint({"language", "license"})  # neither is known


def test_the_hub_reads_licence_language_and_figures_from_it() -> None:
    known = {"license": "other", "license_name": "qwen-research", "language": "zh"}
    keys = ("model.name_or_path=Qwen/Qwen2.5-3B-Instruct", "data.dir=data/hotels", "train.output_dir=outputs/hotels-3b")
    text = card({"test_before": None, "test": AFTER}, *keys, known=known)
    data = ModelCard(text).data  # which warns, an error here, of figures that it cannot read
    assert (data.license, data.license_name, data.language) == ("other", "qwen-research", "zh")
    assert data.license_link == "https://huggingface.co/Qwen/Qwen2.5-3B-Instruct/blob/main/LICENSE"
    assert data.model_name == "hotels-3b"
    assert data.eval_results is not None
    assert {(e.task_type, e.dataset_name, e.dataset_split) for e in data.eval_results} == {
        ("text-classification", "hotels", "test")
    }
    figures = ("accuracy", "precision", "recall", "f1", "loss")
    assert {e.metric_type: e.metric_value for e in data.eval_results} == {name: AFTER[name] for name in figures}


def test_a_folder_of_this_machine_is_named_nowhere(tmp_path: Path) -> None:
    for folder in (tmp_path / "base", tmp_path / "moved away", "~/models/base", "../models"):
        if folder == tmp_path / "base":
            folder.mkdir()
        keys = (f"model.name_or_path={folder}", f"model.adapter={tmp_path / 'first'}", f"data.dir={tmp_path / 'mine'}")
        text = card({"test_before": None, "test": AFTER}, *keys, f"train.output_dir={tmp_path / 'run'}")
        assert str(tmp_path) not in text
        assert "models/" not in text
        assert "base_model" not in metadata_of(text)
        assert f"# LoRA adapter for {Path(folder).name}\n" in text
        assert "beginning with the adapter first:" in text
        assert 'from_pretrained("path/to/the/base/model")' in text


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["房间很干净，WiFi 也快。", "差"], "zh"),
        (["The room was clean.", "bad"], None),
        (["とても良いホテルです。部屋が綺麗。"], None),
        (["방이 깨끗하고 직원이 친절합니다 大満足"], None),
        ([], None),
    ],
    ids=["Chinese", "English", "Japanese", "Korean", "none"],
)
def test_chinese_is_known_by_its_letters(texts: list[str], expected: str | None) -> None:
    assert language_of(texts) == expected


def test_it_names_how_it_was_made() -> None:
    text = card(
        {"test_before": None, "test": AFTER},
        "lora.r=4",
        "lora.target_modules=[q_proj, v_proj]",
        "train.gradient_accumulation_steps=3",
        "train.seed=7",
    )
    assert "nf4 base weights, LoRA r 4, alpha 16, dropout 0.05 on q_proj, v_proj" in text
    assert "learning rate 0.0002 (cosine), 24 examples a step, 120 steps, seed 7" in text


def test_it_names_the_weights_of_the_classes() -> None:
    results = {"test_before": None, "test": AFTER}
    text = card({**results, "class_weights": {"负面": 0.5833333, "正面": 3.5}})
    assert "seed 42;\nweights of the classes in the loss: 负面 0.5833, 正面 3.5.\n" in text
    assert "seed 42.\n" in card(results)


def test_the_examples_of_a_step_are_those_of_all_ranks() -> None:
    assert "32 examples a step" in card({"test_before": None, "test": None, "machine": {"ranks": 4}})


def test_it_shows_the_test_set_before_and_after() -> None:
    text = card({"test_before": {"accuracy": 0.5, "loss": 2.0}, "test": AFTER})
    assert "| accuracy | 0.5000 | 0.9123 (0.880 to 0.940) |" in text
    assert "| loss | 2.0000 | 0.2100 |" in text
    assert "| f1 | - | 0.9050 |" in text
    assert "Test set: 400 records; the intervals are" in text


def test_without_a_test_it_says_so() -> None:
    text = card({"test_before": None, "test": None})
    assert "| test set | not scored | not scored |" in text
    assert "Test set:" not in text
    assert "model-index" not in metadata_of(text)


def test_it_shows_the_prompt_that_the_adapter_expects() -> None:
    config = load_config(None, ["prompt.labels=[差评, 中评, 好评]"])
    text = card({"test_before": None, "test": None}, "prompt.labels=[差评, 中评, 好评]")
    assert "assistant: 差评 or 中评 or 好评" in text
    first, *rest = config.prompt.instruction.splitlines()
    assert f"    user: {first}\n" in text
    assert f"          {rest[-1]}<review>" in text


def test_braces_in_a_prompt_are_text() -> None:
    assert "user: 评论{x}：<review>" in card({"test_before": None, "test": None}, "prompt.instruction=评论{x}：")


def test_a_chat_adapters_card_says_nothing_of_labels() -> None:
    results = {"test_before": {"loss": 2.0, "num_examples": 4}, "test": {"loss": 1.5, "num_examples": 4}}
    text = card(results, "prompt.system=系统", labelled=False)
    assert "| loss | 2.0000 | 1.5000 |" in text
    assert "Test set: 4 records. `metrics.json`" in text
    assert "conversations, in ChatML. Those without a system turn began with\n\n    system: 系统\n" in text
    metadata = metadata_of(text)
    assert metadata["tags"] == ["lora", "qlora", "qwen2.5"]
    assert metadata["model-index"][0]["results"][0]["metrics"] == [{"type": "loss", "value": 1.5}]
    for part in ("评论", "正面", "review", "evaluate.py", "classification", "intervals"):
        assert part not in text
