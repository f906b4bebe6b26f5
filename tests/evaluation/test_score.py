"""Label probabilities against brute force, and what must not change them."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from minilora.adapters.attach import attach, iter_lora_weights
from minilora.config import LoraConfig
from minilora.evaluation.score import Scores, ScoringOptions, score
from minilora.qlora.batch import common_prefix, pack_segments
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.prompt import ChatTokenizer, ClassificationPrompt, Example, chat_example

LoadModel = Callable[..., Qwen2ForCausalLM]
SINGLE, SEVERAL, MIXED = ("负面", "正面"), ("差评", "好评"), ("负面", "好评", "一般般")
NESTED = ("好评论", "好", "差评", "好评", "负面", "差评论")
REVIEWS = [
    "早餐好。",
    "这台电脑很糟糕，不推荐。",
    "差",
    "",
    "快递让人满意，下次再来，价格是120元。" * 2,
    "一般",
    "前台的服务差得出乎意料！",
]
# float32 sums in another order (other batch, other padding): a few units in the seventh place of scores near 10.
ROUNDING = {"rtol": 1e-4, "atol": 1e-6}


def build(
    tokenizer: ChatTokenizer, labels: tuple[str, ...], count: int = 7
) -> tuple[ClassificationPrompt, list[Example]]:
    prompt = ClassificationPrompt(tokenizer, "s", "评论：", labels, 256)
    return prompt, prompt.examples(REVIEWS, [index % len(labels) for index in range(len(REVIEWS))])


def adapted(model: Qwen2ForCausalLM, dropout: float = 0.0) -> Qwen2ForCausalLM:
    attach(model, LoraConfig(r=4, alpha=8, dropout=dropout))
    torch.manual_seed(0)
    for _, layer in iter_lora_weights(model):
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    return model


def log_probabilities(model: Qwen2ForCausalLM, ids: list[int]) -> torch.Tensor:
    """log p(next id) at each of `ids`, the only example of its batch, from full logits: (n, V) float64."""
    positions = torch.arange(len(ids))
    with torch.no_grad():
        hidden = model.model(torch.tensor(ids), positions, pack_segments([len(ids)]))
    return (hidden.double() @ model.head_weight.double().T).log_softmax(-1)


def brute_force(model: Qwen2ForCausalLM, prompt: ClassificationPrompt, examples: list[Example]) -> np.ndarray:
    """Every review in a batch of its own with every label word, the word's tokens summed."""
    scores = torch.zeros(len(examples), len(prompt.labels), dtype=torch.float64)
    for row, example in enumerate(examples):
        question = example.input_ids[: example.answer_start]
        for column, word in enumerate(prompt.scored_ids):
            logs = log_probabilities(model, question + word)
            scores[row, column] = sum(logs[len(question) - 1 + i, token] for i, token in enumerate(word))
    return scores.softmax(-1).numpy()


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("labels", [SINGLE, SEVERAL, MIXED, NESTED])
def test_probabilities_equal_brute_force(
    tiny_model: LoadModel, chat_tokenizer: ChatTokenizer, labels: tuple[str, ...], tie: bool
) -> None:
    model = adapted(tiny_model(tie=tie))
    prompt, examples = build(chat_tokenizer, labels)
    found = score(model, examples, prompt, ScoringOptions(3)).probabilities
    expected = brute_force(model, prompt, examples)
    assert found is not None
    assert found.dtype == np.float64
    assert expected.std() > 0.01  # a model that says the same of every review would test nothing
    np.testing.assert_allclose(found, expected, **ROUNDING)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)


@pytest.mark.parametrize("labels", [SINGLE, SEVERAL])
def test_neither_batch_size_nor_order_changes_a_probability(
    tiny_model: LoadModel, chat_tokenizer: ChatTokenizer, labels: tuple[str, ...]
) -> None:
    model = tiny_model()
    prompt, examples = build(chat_tokenizer, labels)
    reference = score(model, examples, prompt, ScoringOptions(1))
    for batch_size in (2, 5, 100):
        scores = score(model, examples, prompt, ScoringOptions(batch_size))
        np.testing.assert_allclose(scores.probabilities, reference.probabilities, **ROUNDING)
        assert scores.loss == pytest.approx(reference.loss, rel=1e-5)
    backwards = score(model, examples[::-1], prompt, ScoringOptions(3))
    assert backwards.probabilities is not None
    np.testing.assert_allclose(backwards.probabilities[::-1], reference.probabilities, **ROUNDING)


def test_the_true_label_has_no_say_in_the_probabilities(tiny_model: LoadModel, chat_tokenizer: ChatTokenizer) -> None:
    model = tiny_model()
    for labels in (SINGLE, SEVERAL):
        prompt = ClassificationPrompt(chat_tokenizer, "s", "评论：", labels, 256)
        truth, lies = (
            score(model, prompt.examples(REVIEWS[:4], given), prompt, ScoringOptions(4))
            for given in ([0, 1, 0, 1], [1, 0, 1, 0])
        )
        np.testing.assert_allclose(truth.probabilities, lies.probabilities, **ROUNDING)
        assert truth.loss != lies.loss


@pytest.mark.parametrize("labels", [SINGLE, SEVERAL])
def test_loss_is_the_mean_over_all_supervised_tokens(
    tiny_model: LoadModel, chat_tokenizer: ChatTokenizer, labels: tuple[str, ...]
) -> None:
    model = adapted(tiny_model())
    prompt, examples = build(chat_tokenizer, labels)
    losses = []
    for example in examples:
        logs = log_probabilities(model, example.input_ids[:-1])
        losses += [-logs[i - 1, example.input_ids[i]].item() for i, counts in enumerate(example.supervised) if counts]
    assert score(model, examples, prompt, ScoringOptions(3)).loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_chat_has_a_loss_and_no_probabilities(tiny_model: LoadModel, chat_tokenizer: ChatTokenizer) -> None:
    model = tiny_model()
    turns = [("user", "问"), ("assistant", "答一"), ("user", "再问"), ("assistant", "答二二")]
    example = chat_example(chat_tokenizer, turns, max_length=256, where="f:1", default_system="s")
    scores = score(model, [example], None, ScoringOptions(4))
    logs = log_probabilities(model, example.input_ids[:-1])
    losses = [-logs[i - 1, example.input_ids[i]].item() for i, counts in enumerate(example.supervised) if counts]
    assert scores.probabilities is None
    assert scores.loss == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("labels", [SINGLE, SEVERAL])
def test_the_common_prefix_is_run_once_for_all_batches(
    tiny_model: LoadModel, chat_tokenizer: ChatTokenizer, labels: tuple[str, ...]
) -> None:
    model = tiny_model()
    prompt, examples = build(chat_tokenizer, labels)
    prefix = common_prefix(examples)
    rows: list[int] = []
    hook = model.model.layers[0].register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    score(model, examples, prompt, ScoringOptions(2))
    hook.remove()
    own = sum(len(example.input_ids) - 1 - prefix for example in examples)
    assert prefix > 3
    assert rows[0] == prefix
    behind = {tuple(ids[:depth]) for ids in prompt.label_ids for depth in range(1, len(ids))}
    computed = prefix + own + len(examples) * len(behind)
    assert computed <= sum(rows) <= computed + len(rows)  # a pass of less than 64 rows is rounded up by one at most


@pytest.mark.parametrize("training", [True, False])
def test_the_model_comes_back_in_the_mode_it_was_in(
    tiny_model: LoadModel, chat_tokenizer: ChatTokenizer, training: bool
) -> None:
    model = adapted(tiny_model(), dropout=0.5).train(training)
    prompt, examples = build(chat_tokenizer, SINGLE)
    seen = []
    hook = model.model.norm.register_forward_hook(lambda *_: seen.append(model.training))
    first, second = (score(model, examples, prompt, ScoringOptions(4)).probabilities for _ in range(2))
    hook.remove()
    assert not any(seen)
    assert np.array_equal(first, second)  # no dropout
    assert all(module.training == training for module in model.modules())
    with pytest.raises(IndexError):
        score(model, [Example([10**9, 1, 2], [False, False, True])], None, ScoringOptions(1))
    assert model.training == training


def test_scoring_leaves_the_model_trainable(tiny_model: LoadModel, chat_tokenizer: ChatTokenizer) -> None:
    model = adapted(tiny_model())
    prompt, examples = build(chat_tokenizer, SEVERAL)
    score(model, examples, prompt, ScoringOptions(4))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert parameters
    assert all(parameter.grad is None and not parameter.is_inference() for parameter in parameters)


def test_progress_counts_every_example(tiny_model: LoadModel, chat_tokenizer: ChatTokenizer) -> None:
    prompt, examples = build(chat_tokenizer, SINGLE)
    finished: list[int] = []
    score(tiny_model(), examples, prompt, ScoringOptions(3, on_progress=finished.append))
    assert finished == [3, 3, 1]


def test_long_examples_are_scored_in_smaller_passes(tiny_model: LoadModel, chat_tokenizer: ChatTokenizer) -> None:
    prompt, examples = build(chat_tokenizer, SINGLE)
    together = score(tiny_model(), examples, prompt, ScoringOptions(len(examples))).probabilities
    longest = max(len(example.input_ids) for example in examples)
    finished: list[int] = []
    options = ScoringOptions(max_tokens=2 * longest, on_progress=finished.append)
    apart = score(tiny_model(), examples, prompt, options).probabilities
    assert finished[0] == 2
    assert sum(finished) == len(examples)
    np.testing.assert_allclose(apart, together, **ROUNDING)


def test_bfloat16_labels_that_are_close_do_not_tie(tiny_model: LoadModel, chat_tokenizer: ChatTokenizer) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    prompt, examples = build(chat_tokenizer, SINGLE)
    words = [ids[0] for ids in prompt.label_ids]
    with torch.no_grad():  # the second word's row, one unit in the last place of one weight away from the first's
        row = model.head_weight[words[0]].clone()
        row[0] = row[0] * (1 + 2**-7)
        model.head_weight[words[1]] = row
    scores: Scores = score(model, examples, prompt, ScoringOptions(4))
    assert scores.probabilities is not None
    assert (scores.probabilities[:, 0] != scores.probabilities[:, 1]).all()
