"""A conversation: a user's text in, the answer's text out in pieces, as the model generates it.

    <|im_start|>system\\n{system}<|im_end|>\\n                                   before the first turn
    <|im_start|>user\\n{text}<|im_end|>\\n<|im_start|>assistant\\n{answer}      each turn; <|im_end|>\\n before the next

`prompt.ChatTokenizer` renders the turns, so typed text never becomes a control token.

The model's generation_config.json decides how tokens are sampled. For what it leaves out, `GenerationConfig` has the
defaults of Qwen2.5's larger Instruct models.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from minilora.errors import UserError
from minilora.generation.decode import DecodeState, GenerationConfig, generate
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.prompt import ChatTokenizer
from minilora.system.files import read_json
from minilora.system.memory import is_out_of_memory
from minilora.system.schema import read_fields


def read_generation_config(folder: Path) -> GenerationConfig:
    """generation_config.json of a model's folder; the defaults where there is none."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return GenerationConfig()
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected an object; download it again")
    return read_fields(GenerationConfig, content, str(path), "correct it or download it again")


class Conversation:
    """Turns of a user and a model."""

    def __init__(
        self,
        model: Qwen2ForCausalLM,
        tokenizer: ChatTokenizer,
        system: str,
        config: GenerationConfig,
        generator: torch.Generator | None = None,
    ):
        """An empty conversation with a model in evaluation mode; `generator` is on its device."""
        self.system = system  # text of the system turn; a change takes effect with the next `reset`
        self.cut_off: str | None = None  # why the last answer is not complete
        self.num_tokens = 0  # of the last answer so far
        self._model = model
        self._tokenizer = tokenizer
        self._config = config
        self._generator = generator
        eos = config.eos_token_id
        self._stop_ids = {tokenizer.im_end, *([] if eos is None else [eos] if isinstance(eos, int) else eos)}
        self._state = DecodeState(model)

    def reset(self) -> None:
        """Starts an empty conversation."""
        self._state = DecodeState(self._model)

    def recompute(self) -> None:
        """Drops the KV cache, because the model's adapter was switched off or on."""
        self._state.recompute()

    def answer(self, text: str) -> Iterator[str]:
        """The model's answer to `text` in pieces; an interrupted answer is kept as far as it came.

        UserError where the conversation is too long, memory ran out, or a logit is NaN; the turns before it are kept.
        """
        state, before = self._state, len(self._state.ids)
        turn = self._render(text)
        length = before + len(turn)
        limit = self._max_new_tokens(length)
        self.cut_off, self.num_tokens = None, 0
        state.ids += turn
        config = replace(self._config, max_new_tokens=limit)
        tokens = generate(state, config, stop_ids=self._stop_ids, generator=self._generator)
        try:
            yield from iter_text(self._tokenizer, self._counted(tokens))
        except FloatingPointError:
            state.truncate(before)
            raise UserError(
                "conversation: a logit is NaN; use model.compute_dtype=float32, or an adapter from before its run "
                "diverged"
            ) from None
        except (RuntimeError, MemoryError) as error:
            state.truncate(before)
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"conversation: {length:,} tokens with this turn do not fit into memory; say less, start a new one "
                "(/reset), or use model.cache_dequantized=false"
            ) from None
        if self.num_tokens == limit:
            is_own_limit = limit == self._config.max_new_tokens
            reason = f"--max-new-tokens {limit:,}" if is_own_limit else f"the model takes {length + limit:,} tokens"
            self.cut_off = f"the answer is cut off: {reason}"

    def _max_new_tokens(self, length: int) -> int:
        """How long an answer may be after `length` tokens."""
        most = self._model.config.max_position_embeddings
        if most is not None and length >= most:
            raise UserError(
                f"conversation: {length:,} tokens with this turn, the model takes {most:,} with its answer; say less, "
                "or start a new one (/reset)"
            )
        own = self._config.max_new_tokens
        return own if most is None else min(own, most - length)

    def _render(self, text: str) -> list[int]:
        """Ids from the end of the conversation to the beginning of the answer."""
        tokenizer = self._tokenizer
        begin = [] if self._state.ids else tokenizer.open_turn("system", self.system)
        turn = [*tokenizer.close_turn(), *tokenizer.open_turn("user", text)]
        return [*begin, *turn, *tokenizer.close_turn(), *tokenizer.open_turn("assistant")]

    def _counted(self, tokens: Iterator[int]) -> Iterator[int]:
        for token in tokens:
            self.num_tokens += 1
            yield token


def iter_text(tokenizer: ChatTokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text of ids that come one by one, in whole characters; what never becomes one is U+FFFD at the end."""
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        text = tokenizer.decode(waiting)
        if not text.endswith("\ufffd"):
            waiting = []
            yield text
    if waiting:
        yield tokenizer.decode(waiting)
