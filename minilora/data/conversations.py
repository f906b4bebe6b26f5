"""The fields of a data file's record in, a conversation's turns out."""

from typing import Any

from minilora.errors import UserError, shown
from minilora.qlora.prompt import check_turns


def read_turns(where: str, fields: dict[str, Any]) -> tuple[tuple[str, str], ...] | None:
    """The (role, content) pairs of a record that is a conversation, None for any other.

    UserError: nothing can be learnt from it.
    """
    if "messages" in fields:
        return _turns(where, fields["messages"])
    if "prompt" in fields and "completion" in fields:
        pairs = (("user", fields["prompt"]), ("assistant", fields["completion"]))
        return _turns(where, [{"role": role, "content": content} for role, content in pairs])
    return None


def _turns(where: str, messages: Any) -> tuple[tuple[str, str], ...]:
    """A conversation's (role, content) pairs."""
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"{where}: messages is {shown(messages)}, expected a list of role and content; correct the record"
        )
    for message in messages:
        is_turn = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not is_turn:
            raise UserError(f"{where}: message {shown(message)} has no role and content as text; correct the record")
    turns = tuple((message["role"], message["content"]) for message in messages)
    check_turns(turns, where)
    return turns
