"""A model's folder in, the system turn out that its own chat template puts where a conversation has none.

Qwen2.5's models differ there: Instruct says "You are Qwen, ...", the base "You are a helpful assistant.", Math "Please
reason step by step, ...". Whoever uses a model by its template gets that turn, whatever it was trained with.

A template is a program from elsewhere: it runs in jinja2's sandbox, with transformers' settings, and only as far as its
first turn. One that fails has no such turn.
"""

import re
from pathlib import Path
from typing import Any

from minilora.qlora.prompt import IM_END, IM_START
from minilora.system.files import read_json

LONGEST = 100_000  # characters of a system turn


def default_system(folder: Path) -> str | None:
    """Text of the system turn by default; None without one, or without a template that can be rendered."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        template = _read_template(folder)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        text = ""
        for piece in environment.from_string(template).generate(messages=[{"role": "user", "content": "x"}]):
            text += piece
            if IM_END in text or len(text) > LONGEST:
                break
    except Exception:  # whatever a template does
        return None
    found = re.match(rf"\s*{re.escape(IM_START)}system\n(.*?){re.escape(IM_END)}", text, re.DOTALL)
    return found[1] if found else None


def _read_template(folder: Path) -> str:
    """The template as transformers finds it: in a file of its own or in tokenizer_config.json, perhaps by name."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    template: Any = read_json(folder / "tokenizer_config.json")["chat_template"]
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}["default"]
    return str(template)
