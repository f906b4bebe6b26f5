"""The fields of a data file's record in, a conversation's turns out: every format by one path.

    messages, conversations, conversation      turns of role and content, or ShareGPT's from and value
    instruction, input -> output               Alpaca: a question and what it is about are joined by a newline
    prompt, query -> completion, response      texts, or lists of turns as trl has them: the prompt's are context
    system, history                            come before any of these

A list may also be the text of one (JSON, or Python's or numpy's as pandas writes it), a content a list of parts of
type text. Keys may begin with a capital letter.
`weight`, `train` or `loss` of 0 or false keeps an assistant's turn as context; on the record, all of them.

What changes the meaning of the text and is not learnt here (tool calls, images, reasoning apart from the answer,
preference pairs) is refused by its name. Any other key that has a value is listed as not read.
"""

import ast
import json
import re
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from minilora.errors import UserError, shown
from minilora.qlora.prompt import Turn, check_turns

MESSAGES = ("messages", "conversations", "conversation")
QUESTIONS, CONTEXTS = ("instruction", "prompt", "query", "question"), ("input", "context")
PAIRS = (("prompt", "completion"), ("instruction", "output"), ("query", "response"), ("question", "answer"))
ANSWERS = ("output", "response", "completion", "answer")
FORMS = f"messages with a role and a content each, or a question and its answer, as {' and '.join(PAIRS[0])}"
SYSTEM = ("system", "system_prompt")
SPEAKERS = ("user", "assistant")
EMPTY: tuple[Any, ...] = (None, "", [], {})
ROLE, CONTENT = ("role", "from"), ("content", "value")
TRAIN = ("weight", "train", "training", "loss", "loss_scale")
FLAGS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
ROLES = {
    **dict.fromkeys(("system", "developer", "系统"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "用户"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai", "助手"), "assistant"),
}
TOOL_ROLES = ("tool", "function", "observation", "ipython", "function_call", "tool_call", "tool_response")
PREFERENCES = (
    *("chosen", "rejected", "rejected_response", "rejected_messages"),
    *("preferred_output", "non_preferred_output"),
)
NO_TOOLS = "tool calls cannot be learnt here; remove the record, or the key where the text is complete without it"
NO_MEDIA = "only text can be learnt here; remove the record, or the key where the text is complete without it"
NO_REASONING = "reasoning apart from the answer cannot be learnt here; put it into the answer or remove it"
NO_PARTS = "parts of a turn cannot have weights of their own; remove the key, or give the turn a weight"
NO_PREFERENCE = "preferences cannot be learnt here; keep the better answer alone, as completion"
REFUSED = {  # by key of a record or a turn
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), NO_TOOLS),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), NO_MEDIA),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), NO_REASONING),
    **dict.fromkeys(("train_detail", "training_detail"), NO_PARTS),
    **dict.fromkeys((*PREFERENCES, "kto_tag"), NO_PREFERENCE),
}
KEYS = {*MESSAGES, *QUESTIONS, *CONTEXTS, *ANSWERS, *SYSTEM, *ROLE, *CONTENT, *TRAIN, *REFUSED, "history"}
QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""


class Conversation(NamedTuple):
    """What a record says."""

    turns: tuple[Turn, ...]
    unread: frozenset[str]  # its keys that have a value and are not read; "user.name" is a key of user turns


def read_turns(where: str, fields: dict[str, Any], is_labelled: bool = False) -> Conversation | None:
    """The conversation in a record's fields, None where there is none.

    Args:
        where: file and line, for messages.
        fields: values by column or key.
        is_labelled: they are a labelled text too, so that only a list of turns makes a conversation of them.

    Raises:
        UserError: nothing can be learnt from it, or not all that it says.
    """
    if is_labelled and not any(isinstance(fields.get(key), list) for key in MESSAGES):
        return None
    return _Reading(where, fields).conversation()


class _Reading:
    """One record while it is read."""

    def __init__(self, where: str, fields: dict[str, Any]):
        self.where = where
        self.fields = _spelled(fields)
        self.given = {key: value for key, value in self.fields.items() if value not in EMPTY}
        self.unread = set(filter(None, self.given))  # a CSV file's column of numbers has no name

    def conversation(self) -> Conversation | None:
        turns = self._find_turns()
        if turns is None:
            return None
        self._refuse(self.given)
        if str(self.given.get("label")).lower() in ("true", "false"):  # trl's and ms-swift's, for KTO
            raise self._error(f"label is {self.given['label']}: {NO_PREFERENCE}")
        turns = [*self._history(), *turns]
        turns = [*self._system(turns), *turns]
        if not self._is_trained(self.given):
            turns = [turn._replace(train=turn.role != "assistant") for turn in turns]
        self.unread -= {*TRAIN, *REFUSED}
        check_turns(turns, self.where)
        if any(turn.is_supervised and not turn.content.strip() for turn in turns):
            raise self._error("an answer is empty, which teaches to say nothing; write it, or give the turn weight 0")
        return Conversation(tuple(turns), frozenset(self.unread))

    def _find_turns(self) -> list[Turn] | None:
        """The turns without those of `system` and `history`."""
        listed = sorted((key for key in MESSAGES if key in self.fields), key=lambda key: key not in self.given)
        is_pair = all(not self.fields.keys().isdisjoint(keys) for keys in (ANSWERS, (*QUESTIONS, *CONTEXTS)))
        if listed and (listed[0] in self.given or not is_pair):
            return list(self._turns(listed[0], self._take(listed[0])))
        preferences = [key for key in PREFERENCES if key in self.given]
        if len(preferences) > 1:
            raise self._error(f"{preferences[0]}: {NO_PREFERENCE}")
        return self._pair() if is_pair else None

    def _pair(self) -> list[Turn]:
        """The question and the answer: those that belong together, else the only ones."""
        own = next((pair for pair in PAIRS if {*pair} <= self.given.keys()), None)
        asked, answered = ([own[0]], [own[1]]) if own else (self._one_of(QUESTIONS), self._one_of(ANSWERS))
        contexts = () if own == PAIRS[0] else CONTEXTS  # trl knows none
        parts = [key for key in (*asked, *contexts) if key in self.given]
        question = self._text_or_list(parts[0]) if len(parts) == 1 else "\n".join(map(self._text, parts))
        answer = (self._text_or_list(answered[0]) if answered else None) or ""
        lists = [_parsed(question), _parsed(answer)]
        if all(_is_list_of_turns(found) for found in lists):  # lists in a CSV file are text
            question, answer = lists
        before, after = (
            self._turns(role, value if isinstance(value, list) else [{"role": role, "content": value}])
            for role, value in zip(SPEAKERS, (question, answer), strict=True)
        )
        return [*(turn._replace(train=turn.role != "assistant") for turn in before), *after]

    def _history(self) -> Iterator[Turn]:
        """`history`: earlier pairs of question and answer, or turns."""
        history = _parsed(self._take("history") or [])
        if isinstance(history, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
            history = [{"role": role, "content": pair[i]} for pair in history for i, role in enumerate(SPEAKERS)]
        if history:
            yield from self._turns("history", history)

    def _system(self, turns: list[Turn]) -> Iterator[Turn]:
        """`system`, unless the turns begin with the same."""
        for key in self._one_of(SYSTEM):
            text = self._text(key)
            if turns[0].role == "system" and text.strip() and turns[0].content != text:
                raise self._error(
                    f"{key} is {shown(text)}, but the turns begin with {shown(turns[0].content)}; keep one of the two"
                )
            if turns[0].role != "system" and text.strip():
                yield Turn("system", text)

    def _turns(self, key: str, found: Any) -> Iterator[Turn]:
        """A list of turns, or the text of one."""
        entries = _parsed(found)
        if not isinstance(entries, list) or not entries:
            raise self._error(f"{key} is {shown(found)}, expected a list of role and content; correct the record")
        for entry in entries:
            if isinstance(entry, dict) and entry and all(str(name).lower() in ROLES for name in entry):
                yield from (self._turn({"role": role, "content": text}) for role, text in entry.items())  # ms-swift's
            else:
                yield self._turn(entry)

    def _turn(self, entry: Any) -> Turn:
        if not isinstance(entry, dict):
            raise self._error(f"message {shown(entry)} has no role and content as text; correct the record")
        entry = _spelled(entry)
        self._refuse(entry)
        role, content = (next((entry[key] for key in keys if key in entry), None) for keys in (ROLE, CONTENT))
        name = role.strip().lower() if isinstance(role, str) else ""
        role = ROLES.get(name, name)
        if role in TOOL_ROLES:
            raise self._error(f"role {role!r}: {NO_TOOLS}")
        if content is None and role == "assistant":
            content = ""
        if isinstance(content, list):
            content = "".join(map(self._part, content))
        if not role or not isinstance(content, str):
            raise self._error(f"message {shown(entry)} has no role and content as text; correct the record")
        is_trained = self._is_trained(entry)
        read = {*ROLE, *CONTENT, *REFUSED, *(TRAIN if role == "assistant" or not is_trained else ())}
        self.unread |= {f"{role}.{key}" for key, value in entry.items() if key not in read and value not in EMPTY}
        return Turn(role, content, role != "assistant" or is_trained)

    def _part(self, part: Any) -> str:
        """The text of a part of a content."""
        if isinstance(part, str):
            return part
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise self._error(f"content has the part {shown(part)}: {NO_MEDIA}")
        return str(part["text"])

    def _is_trained(self, entry: dict[str, Any]) -> bool:
        """Whether a turn's or the record's answers count in the loss."""
        flags = {key: FLAGS.get(str(entry[key]).lower()) for key in TRAIN if entry.get(key) not in EMPTY}
        for key, flag in flags.items():
            if flag is None:
                raise self._error(
                    f"{key} is {shown(entry[key])}, expected 0 or 1 (a turn counts or does not); correct it, or rename "
                    "the key if it says something else"
                )
        return all(flags.values())

    def _one_of(self, keys: tuple[str, ...]) -> list[str]:
        """The one of these keys that has a value, if any."""
        given = [key for key in keys if key in self.given]
        if len(given) > 1:
            raise self._error(f"{' and '.join(given)} are all there, expected one of them; remove or rename the others")
        return given

    def _take(self, key: str) -> Any:
        self.unread.discard(key)
        return self.fields.get(key)

    def _text(self, key: str) -> str:
        found = self._take(key)
        if not isinstance(found, str):
            raise self._error(f"{key} is {shown(found)}, expected text; correct the record")
        return found

    def _text_or_list(self, key: str) -> Any:
        found = self._take(key)
        return found if found is None or isinstance(found, list) else self._text(key)

    def _refuse(self, entry: dict[str, Any]) -> None:
        for key, value in entry.items():
            if key in REFUSED and value and value not in ("[]", "{}", "null"):
                raise self._error(f"{key}: {REFUSED[key]}")

    def _error(self, problem: str) -> UserError:
        return UserError(f"{self.where}: {problem}")


def _parsed(found: Any) -> Any:
    """A list that is given as text; anything else as it is."""
    if not isinstance(found, str) or not found.lstrip().startswith("["):
        return found
    for parse in (json.loads, ast.literal_eval, _without_commas):
        try:
            with warnings.catch_warnings():  # of Python about a backslash in the text
                warnings.simplefilter("ignore")
                return parse(found)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return found


def _without_commas(found: str) -> Any:
    """numpy's list of objects, as `to_csv` writes it: spaces between them, as nowhere else outside quotes."""
    return ast.literal_eval(re.sub(rf"({QUOTED})|\}}\s+\{{", lambda match: match[1] or "}, {", found))


def _spelled(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with the keys that are read here in lower case: `Question` is `question`."""
    if fields.keys() <= KEYS:
        return fields
    lower = {key: key.strip().lower() for key in fields if isinstance(key, str) and key not in KEYS}
    spelled = {key: low for key, low in lower.items() if low in KEYS and low not in fields}
    return {spelled.get(key, key): value for key, value in fields.items()} if spelled else fields


def _is_list_of_turns(found: Any) -> bool:
    """Whether it is a list of objects with a role each."""
    is_list = isinstance(found, list) and bool(found)
    return is_list and all(isinstance(entry, dict) and not entry.keys().isdisjoint(ROLE) for entry in found)
