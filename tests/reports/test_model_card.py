"""The model card says what was trained, and how well it does."""

from typing import Any

import yaml

from minilora.config import load_config
from minilora.reports.model_card import render_model_card

AFTER = {
    "loss": 0.21,
    "accuracy": 0.91234,
    "f1": 0.905,
    "precision": 0.9,
    "recall": 0.91,
    "num_examples": 400,
    "confidence_intervals_95": {"accuracy": [0.88, 0.94]},
}


def card(results: dict[str, Any], *overrides: str, labelled: bool = True) -> str:
    return render_model_card(load_config(None, overrides).to_dict(), {"step": 120, "machine": {}, **results}, labelled)


def test_it_begins_with_the_metadata_of_the_hub() -> None:
    text = card({"test_before": None, "test": AFTER}, "model.name_or_path=Qwen/Qwen2.5-1.5B-Instruct")
    _, front, _ = text.split("---\n", 2)
    assert text.startswith("---\n")
    metadata = yaml.safe_load(front)
    assert metadata["base_model"] == "Qwen/Qwen2.5-1.5B-Instruct"
    assert metadata["library_name"] == "peft"
    assert "lora" in metadata["tags"]


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
    assert yaml.safe_load(text.split("---\n", 2)[1])["tags"] == ["lora", "qlora", "qwen2.5"]
    for part in ("评论", "正面", "review", "evaluate.py", "classification", "intervals"):
        assert part not in text
