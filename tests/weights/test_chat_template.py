"""The system turn that a model's own template puts first, and templates that are broken or hostile."""

import json
from pathlib import Path

import pytest

from minilora.weights.chat_template import default_system

MATH = "Please reason step by step, and put your final answer within \\boxed{}."


def template(system: str) -> str:
    """Qwen2.5's, without tools."""
    return (
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
        "{%- else %}\n"
        f"    {{{{- '<|im_start|>system\\n{system}<|im_end|>\\n' }}}}\n"
        "{%- endif %}\n"
        "{%- for message in messages %}\n"
        "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
        "{%- endfor %}\n"
    )


def folder_with(folder: Path, content: object) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": content}), "utf-8")
    return folder


def test_the_system_turn_is_found_wherever_the_template_is(tmp_path: Path) -> None:
    text = template(MATH.replace("\\", "\\\\"))
    assert default_system(folder_with(tmp_path, text)) == MATH
    named = [{"name": "tool_use", "template": template("x")}, {"name": "default", "template": text}]
    assert default_system(folder_with(tmp_path, named)) == MATH
    (tmp_path / "chat_template.jinja").write_text(template("You are a helpful assistant."), "utf-8")
    assert default_system(tmp_path) == "You are a helpful assistant."


@pytest.mark.parametrize(
    "content",
    [
        None,
        3,
        [],
        "",
        "{% if %}",
        "{{ messages[7].content }}",
        "{{ raise_exception('no system') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}<|im_start|>system\nx<|im_end|>",
        "{% for i in range(10 ** 12) %}x{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}<|im_start|>{% endfor %}{% endfor %}",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    ],
    ids=str,
)
def test_a_template_without_one_or_that_fails_has_none(content: object, tmp_path: Path) -> None:
    assert default_system(folder_with(tmp_path, content)) is None


def test_a_folder_without_a_template_has_none(tmp_path: Path) -> None:
    assert default_system(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("not json", "utf-8")
    assert default_system(tmp_path) is None


def test_what_comes_behind_the_first_turn_is_never_run(tmp_path: Path) -> None:
    endless = template("s") + "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    assert default_system(folder_with(tmp_path, endless)) == "s"
