"""Label words behind a question in one pass: as one whole pass for each word, whatever their length and number."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.evaluation.label_trie import LabelTrie, log_normalizers
from minilora.evaluation.score import LabelWords, Prefix, ScoringOptions, label_probabilities, score
from minilora.qlora import attention, loss
from minilora.qlora.batch import FUSED_KEYS, pack
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.prompt import ChatTokenizer, ClassificationPrompt, Example
from tests.planning.test_memory import allocated_peak

LoadModel = Callable[..., Qwen2ForCausalLM]
# Words of one token and of several, that share tokens, and that begin others.
WORDS = ("好评", "好", "差评", "好评论", "负面", "差评论", "非常好", "非常差", "一般", "一般般", "酒店")
REVIEWS = ["早餐好。", "这台电脑很糟糕，不推荐。", "差", "", "快递让人满意，下次再来，价格是120元。" * 2, "一般"]


def build(tokenizer: ChatTokenizer, words: Sequence[str] = WORDS) -> tuple[ClassificationPrompt, list[Example]]:
    prompt = ClassificationPrompt(tokenizer, "s", "评论：", tuple(words), 1024)
    return prompt, prompt.examples(REVIEWS, [index % len(words) for index in range(len(REVIEWS))])


def a_pass_for_each_word(
    model: Qwen2ForCausalLM, prefix: Prefix, examples: Sequence[Example], prompt: ClassificationPrompt
) -> np.ndarray:
    """The slow way: every question once more with each word as its answer, the logits of its tokens in float32."""
    scores = torch.empty(len(examples), len(prompt.labels), dtype=torch.float64)
    for column, word in enumerate(prompt.scored_ids):
        answered = []
        for example in examples:
            question = example.input_ids[: example.answer_start]
            answered.append(Example(question + word, [False] * len(question) + [True] * len(word)))
        batch = pack(answered, cached_prefix=prefix.num_tokens)
        with torch.inference_mode():
            hidden, head = model(batch, prefix.cache), model.head_weight
            log_p = (hidden.to(torch.float32) @ head.to(torch.float32).T).log_softmax(1)
        of_targets = log_p.gather(1, batch.targets[:, None]).squeeze(1).double()
        scores[:, column] = torch.zeros(len(examples)).double().index_add_(0, batch.example_indices, of_targets)
    return scores.softmax(-1).numpy()


# float32 sums in another order; in bfloat16 hidden states are rounded to 0.4 %, by other kernels for other shapes.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.2}


def assert_same(found: np.ndarray | None, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    """Of logarithms: words of many tokens have tiny probabilities, whose errors would not be seen."""
    assert found is not None
    assert np.log(expected).min() < -20
    np.testing.assert_allclose(np.log(found), np.log(expected), rtol=0, atol=tolerance)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("has_prefix", [True, False])
def test_probabilities_equal_those_of_a_pass_for_each_word(
    tiny_model: LoadModel, chat_tokenizer: ChatTokenizer, *, dtype: torch.dtype, tie: bool, has_prefix: bool
) -> None:
    model = tiny_model(dtype=dtype, tie=tie).eval()
    prompt, examples = build(chat_tokenizer)
    prefix = Prefix.of(model, prompt.prefix if has_prefix else [])
    found = label_probabilities(model, prefix, examples, prompt, ScoringOptions(4))
    expected = a_pass_for_each_word(model, prefix, examples, prompt)
    assert 0.2 < expected.max() < 0.99
    assert_same(found, expected, TOLERANCES[dtype])
    validated = score(model, examples, prompt, ScoringOptions(3)).probabilities
    assert_same(validated, expected, TOLERANCES[dtype])


def test_words_behind_reviews_that_fused_attention_computes(
    tiny_model: LoadModel, chat_tokenizer: ChatTokenizer
) -> None:
    model = tiny_model().eval()
    prompt, _ = build(chat_tokenizer)
    examples = prompt.examples(["早餐好。" * 200, "差" * 900, "差"], [0, 1, 2])
    prefix = Prefix.of(model, prompt.prefix)
    assert max(group.num_keys for group in pack(examples, cached_prefix=prefix.num_tokens).groups) > FUSED_KEYS
    found = label_probabilities(model, prefix, examples, prompt, ScoringOptions())
    assert_same(found, a_pass_for_each_word(model, prefix, examples, prompt))


def test_attention_in_pieces_does_not_change_a_probability(
    tiny_model: LoadModel, chat_tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model().eval()
    prompt, examples = build(chat_tokenizer)
    prefix = Prefix.of(model, prompt.prefix)
    expected = a_pass_for_each_word(model, prefix, examples, prompt)
    for elements in (300, 3000):  # some queries of one example, some examples
        monkeypatch.setattr(attention, "MAX_SCORES_BYTES", elements * 4 * 4)
        pieces = label_probabilities(model, prefix, examples, prompt, ScoringOptions())
        assert_same(pieces, expected)
    monkeypatch.setattr(attention, "MAX_MASK", 0)  # masks are made in each layer
    pieces = label_probabilities(model, prefix, examples, prompt, ScoringOptions())
    assert_same(pieces, expected)


def test_words_with_too_many_tokens_for_a_pass_have_several(
    tiny_model: LoadModel, chat_tokenizer: ChatTokenizer
) -> None:
    model = tiny_model().eval()
    prompt, examples = build(chat_tokenizer)
    words = LabelWords.of(prompt.scored_ids, 24)
    assert len(words.parts) > 1
    assert words.num_tokens <= 8
    assert sorted(index for indices, _ in words.parts for index in indices) == list(range(len(WORDS)))
    together, apart = (score(model, examples, prompt, ScoringOptions(max_tokens=tokens)) for tokens in (4096, 24))
    assert together.loss == pytest.approx(apart.loss, rel=1e-5)
    assert together.probabilities is not None
    assert_same(apart.probabilities, together.probabilities)


def test_a_review_runs_once_and_a_token_that_words_share_too(
    tiny_model: LoadModel, chat_tokenizer: ChatTokenizer
) -> None:
    model = tiny_model().eval()
    prompt, examples = build(chat_tokenizer)
    prefix = Prefix.of(model, prompt.prefix)
    inner = {tuple(word[:depth]) for word in prompt.scored_ids for depth in range(1, len(word))}
    assert len(inner) < sum(len(word) - 1 for word in prompt.scored_ids)
    tokens: list[int] = []
    hook = model.model.layers[0].register_forward_hook(lambda _, inputs, __: tokens.append(len(inputs[0])))
    label_probabilities(model, prefix, examples, prompt, ScoringOptions())
    hook.remove()
    needed = sum(example.answer_start - prefix.num_tokens + len(inner) for example in examples)
    assert needed <= sum(tokens) < 1.04 * needed  # rounded up to five bits
    assert len(tokens) == 1


def test_a_pass_has_no_more_tokens_than_it_may(tiny_model: LoadModel, chat_tokenizer: ChatTokenizer) -> None:
    prompt, examples = build(chat_tokenizer)
    tokens: list[int] = []
    model = tiny_model()
    hook = model.model.layers[0].register_forward_hook(lambda _, inputs, __: tokens.append(len(inputs[0])))
    longest = max(len(example.input_ids) for example in examples)
    score(model, examples, prompt, ScoringOptions(max_tokens=2 * longest))
    hook.remove()
    assert max(tokens) <= 2 * longest
    assert len(tokens) > 2


def test_the_closing_token_is_scored_only_where_a_word_begins_another(chat_tokenizer: ChatTokenizer) -> None:
    prompt, _ = build(chat_tokenizer, ["好", "好评", "差评"])
    assert prompt.scored_ids == [[*prompt.label_ids[0], chat_tokenizer.im_end], *prompt.label_ids[1:]]


def test_a_word_that_begins_another_can_win(tiny_model: LoadModel, chat_tokenizer: ChatTokenizer) -> None:
    model = tiny_model(tie=False).eval()
    prompt, examples = build(chat_tokenizer, ["好评", "好"])
    (long, *_), (short, _) = prompt.scored_ids
    assert long == short
    before = score(model, examples, prompt, ScoringOptions()).probabilities
    with torch.no_grad():  # behind the first token the end is nearly certain now
        model.lm_head.weight[chat_tokenizer.im_end] = 20 * hidden_after(model, examples[0], short)
    after = score(model, examples, prompt, ScoringOptions()).probabilities
    assert before is not None
    assert after is not None
    assert after[0].argmax() == 1
    assert after[0, 1] > max(0.9, before[0, 1])


def hidden_after(model: Qwen2ForCausalLM, example: Example, token: int) -> torch.Tensor:
    """The hidden state behind a question and this first token of an answer, (C,) of length 1."""
    question = example.input_ids[: example.answer_start]
    with torch.no_grad():
        states = model(pack([Example([*question, token, 0], [*[False] * len(question), False, True])]))
    return torch.nn.functional.normalize(states[0], dim=0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=12, unique_by=tuple),
    st.integers(1, 9),
)
def test_parts_have_every_word_once_and_few_nodes(words: list[list[int]], max_nodes: int) -> None:
    parts = list(LabelTrie(words).parts(max_nodes))
    assert sorted(index for indices, _ in parts for index in indices) == list(range(len(words)))
    for indices, trie in parts:
        assert trie.words == [tuple(words[index]) for index in indices]
        inner = {word[:depth] for word in trie.words for depth in range(1, len(word))}
        assert len(trie.inner_tokens) == len(inner)
        assert len(inner) <= max_nodes or len(indices) == 1


@pytest.mark.parametrize("positions", [1, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_normalizers_equal_logsumexp(positions: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(loss, "LOGITS_BYTES", {"cpu": 4 * (positions + 8) * 7})  # pieces of 7 tokens
    hidden, head = torch.randn(positions, 8, dtype=dtype), torch.randn(30, 8, dtype=dtype)
    expected = (hidden.double() @ head.double().T).logsumexp(1)
    # All but the largest 5 of 30 logits are rounded to 0.4 % in bfloat16, the whole sum less.
    tolerance = {torch.bfloat16: 0.006}.get(dtype, 3e-6)
    np.testing.assert_allclose(log_normalizers(hidden, head), expected, rtol=0, atol=tolerance)


def test_a_certain_token_does_not_have_bfloat16s_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(loss, "LOGITS_BYTES", {"cpu": 400_000})
    hidden, head = torch.randn(70, 64).bfloat16(), torch.randn(20_000, 64).bfloat16()
    hidden[:, 0], head[123, 0] = 9.0, 9.0  # one logit of about 81, whose step is 0.5
    wide = hidden.double() @ head.double().T
    expected = wide.logsumexp(1)
    assert (wide.argmax(1) == 123).float().mean() > 0.9
    np.testing.assert_allclose(log_normalizers(hidden, head), expected, rtol=0, atol=2e-3)
    peak = allocated_peak(lambda: log_normalizers(hidden, head))
    assert peak < 4 * head.numel() / 4
