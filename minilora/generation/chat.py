"""A conversation: what a user says in, the answer's text out, piece by piece as the model finds it.

    <|im_start|>system\\n{system}<|im_end|>\\n                                   before the first turn
    <|im_start|>user\\n{text}<|im_end|>\\n<|im_start|>assistant\\n{answer}      each turn; <|im_end|>\\n before the next

Turns are rendered by `prompt.ChatTokenizer`, so nothing that is typed becomes a control token. All that was said stays
in one `generate.Context`: a turn costs its own ids and those of its answer.

How an answer is drawn is the model's affair where its generation_config.json says so. Where it is silent, the defaults
here hold, which are those of Qwen2.5's larger Instruct models.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from minilora.errors import UserError
from minilora.generation.decode import Context, generate
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.prompt import ChatTokenizer
from minilora.system.files import read_json
from minilora.system.memory import is_out_of_memory
from minilora.system.schema import limits, read_fields

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class GenerationConfig:
    """The fields of generation_config.json that are read, under their own names; see `generate` for what they mean."""

    do_sample: bool = True
    temperature: float = field(default=0.7, metadata=limits(minimum=0, maximum=100))
    top_p: float = field(default=0.8, metadata=limits(above=0, maximum=1))
    top_k: int = field(default=20, metadata=limits(minimum=0))
    repetition_penalty: float = field(default=1.05, metadata=limits(above=0, maximum=100))
    max_new_tokens: int = field(default=1024, metadata=limits(minimum=1))
    eos_token_id: list[int] | int | None = None


def read_generation_config(folder: Path) -> GenerationConfig:
    """What a model's folder says about generating; the defaults where it says nothing.

    Raises:
        UserError: the file is damaged, or holds an impossible value.
    """
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return GenerationConfig()
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected an object; download it again")
    return read_fields(GenerationConfig, content, str(path), "correct it or download it again")


class Conversation:
    """Turns of a user and a model.

    Attributes:
        system: text of the system turn; a change takes effect with the next `reset`.
        cut_off: why the last answer is not complete, None if it is.
        num_tokens: ids of the last answer, as far as it came.
    """

    def __init__(
        self,
        model: Qwen2ForCausalLM,
        tokenizer: ChatTokenizer,
        system: str,
        settings: GenerationConfig,
        generator: torch.Generator | None = None,
    ):
        """A conversation in which nothing has been said yet.

        Args:
            model: in evaluation mode.
            tokenizer: the model's.
            system: text of the system turn.
            settings: how an answer is drawn.
            generator: on the model's device; the same state leads to the same answers.
        """
        self.system = system
        self.cut_off: str | None = None
        self.num_tokens = 0
        self._model = model
        self._tokenizer = tokenizer
        self._settings = settings
        self._generator = generator
        eos = settings.eos_token_id
        self._stop_ids = {tokenizer.im_end, *([] if eos is None else [eos] if isinstance(eos, int) else eos)}
        self._context = Context(model)

    def reset(self) -> None:
        """Forgets all that was said."""
        self._context = Context(self._model)

    def recompute(self) -> None:
        """Tells that the model is another one, with its adapter off or on: it reads all that was said anew."""
        self._context.recompute()

    def answer(self, text: str) -> Iterator[str]:
        """The model's answer to `text` in pieces. One that the caller leaves or interrupts stays as far as it came.

        Raises:
            UserError: the conversation is too long, memory ran out, or the model computes no numbers; what was said
                before stays.
        """
        context, settings, before = self._context, self._settings, len(self._context.ids)
        turn = self._render(text)
        length, most = before + len(turn), self._model.config.max_position_embeddings
        limit = settings.max_new_tokens if most is None else min(settings.max_new_tokens, most - length)
        self.cut_off, self.num_tokens = None, 0
        if limit < 1:
            raise UserError(
                f"conversation: {length:,} tokens with this turn, the model takes {most:,} with its answer; say less, "
                "or begin anew (/reset)"
            )
        context.ids += turn
        tokens = generate(
            context,
            limit,
            stop_ids=self._stop_ids,
            temperature=settings.temperature if settings.do_sample else 0.0,
            top_k=settings.top_k,
            top_p=settings.top_p,
            repetition_penalty=settings.repetition_penalty,
            generator=self._generator,
        )
        try:
            yield from self._tokenizer.iter_text(self._counted(tokens))
        except FloatingPointError:
            context.cut(before)
            raise UserError(
                "conversation: the model computes NaN, expected numbers; use model.compute_dtype=float32, or an "
                "adapter from before its run went astray"
            ) from None
        except (RuntimeError, MemoryError) as error:
            context.cut(before)
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"conversation: {length:,} tokens with this turn do not fit into memory; say less, begin anew "
                "(/reset), or use model.cache_dequantized=false"
            ) from None
        if self.num_tokens == limit:
            own = limit == settings.max_new_tokens
            reason = f"--max-new-tokens {limit:,}" if own else f"the model takes no more than {most:,} tokens"
            self.cut_off = f"the answer is cut off: {reason}"

    def _render(self, text: str) -> list[int]:
        """Ids from the end of what was said to the beginning of the answer."""
        tokenizer = self._tokenizer
        begin = [] if self._context.ids else tokenizer.open_turn("system", self.system)
        return [
            *begin,
            *tokenizer.close_turn(),
            *tokenizer.open_turn("user", text),
            *tokenizer.close_turn(),
            *tokenizer.open_turn("assistant"),
        ]

    def _counted(self, tokens: Iterator[int]) -> Iterator[int]:
        for token in tokens:
            self.num_tokens += 1
            yield token
