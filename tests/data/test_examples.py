"""What is said and made of the labels of a split."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from minilora.data.examples import Examples, build_examples, class_weights, tell_of_class_weights
from minilora.data.records import Record
from minilora.errors import UserError
from minilora.qlora.prompt import ChatTokenizer, ClassificationPrompt, Turn

WORDS = ("差", "中", "好")


@pytest.fixture
def prompt(tiny_tokenizer: Path) -> ClassificationPrompt:
    return ClassificationPrompt(ChatTokenizer(tiny_tokenizer), "s", "评论：", WORDS, max_length=64)


def of_classes(prompt: ClassificationPrompt, labels: Sequence[int], chats: int = 0) -> Examples:
    turns = (Turn("user", "问"), Turn("assistant", "答"))
    records = [Record(f"train.jsonl:{line}", "房间", label) for line, label in enumerate(labels, start=1)]
    return build_examples([*records, *(Record("train.jsonl:9", messages=turns) for _ in range(chats))], prompt)


def test_balanced_classes_weigh_the_same_in_all_and_1_in_the_mean(prompt: ClassificationPrompt) -> None:
    labels = [0] * 6 + [1] * 2 + [2]
    weights = class_weights("balanced", of_classes(prompt, labels), WORDS)
    assert weights == {"差": 9 / 18, "中": 9 / 6, "好": 9 / 3}  # N / (K n)
    assert np.mean([weights[WORDS[label]] for label in labels]) == pytest.approx(1, rel=1e-15)


def test_a_class_without_examples_has_no_balanced_weight_and_changes_no_other(prompt: ClassificationPrompt) -> None:
    assert class_weights("balanced", of_classes(prompt, [0, 0, 0, 2]), WORDS) == {"差": 4 / 6, "好": 4 / 2}


def test_a_table_is_taken_as_it_is_in_the_order_of_the_labels(prompt: ClassificationPrompt) -> None:
    weights = class_weights({"好": 3.0, "差": 1.0, "中": 2.0}, of_classes(prompt, [0]), WORDS)
    assert list(weights.items()) == [("差", 1.0), ("中", 2.0), ("好", 3.0)]
    assert class_weights("none", of_classes(prompt, [0]), WORDS) == {}


def test_a_class_that_weighs_more_than_a_step_is_said(
    prompt: ClassificationPrompt, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = of_classes(prompt, [0] * 19 + [2])
    weights = class_weights("balanced", trained, WORDS)
    for in_step, noted in ((9, True), (10, False)):  # 10 = 20 / (2 x 1)
        tell_of_class_weights(weights, trained, WORDS, in_step)
        printed = capsys.readouterr()
        assert printed.out == "train.class_weights: 差 0.5263, 好 10\n"
        assert ("most steps of 9 examples have none of 好, and" in printed.err) == noted
    tell_of_class_weights({}, trained, WORDS, 1)
    tell_of_class_weights({"差": 1e-3, "中": 9, "好": 1e-3}, trained, WORDS, 1)  # none is 中
    assert capsys.readouterr().err == ""


def test_conversations_have_no_class_to_weigh(prompt: ClassificationPrompt) -> None:
    mixed = of_classes(prompt, [0, 1], chats=3)
    assert class_weights("none", mixed, WORDS) == {}
    for chosen in ("balanced", dict.fromkeys(WORDS, 1.0)):
        with pytest.raises(UserError, match=r"^train\.class_weights: 3 of 5 training records .+ use none$"):
            class_weights(chosen, mixed, WORDS)
