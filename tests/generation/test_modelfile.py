"""A Modelfile renders the turns that training rendered, and samples as the model's own configuration does."""

import re

import pytest

from minilora.errors import UserError
from minilora.generation.decode import GenerationConfig
from minilora.generation.modelfile import TEMPLATE, render_modelfile

GREEDY = GenerationConfig(do_sample=False, repetition_penalty=1)


def test_it_names_the_files_the_system_turn_and_how_an_answer_ends() -> None:
    text = render_modelfile("./base.gguf", "Reason.\nStep by step.", GREEDY, "./adapter.gguf")
    before, template, after = text.partition(f'TEMPLATE """{TEMPLATE}"""\n')
    assert template
    assert before == "# ollama create NAME -f Modelfile\nFROM ./base.gguf\nADAPTER ./adapter.gguf\n"
    assert after == (
        'SYSTEM """Reason.\nStep by step."""\n'
        'PARAMETER stop "<|im_end|>"\nPARAMETER temperature 0\nPARAMETER repeat_penalty 1\n'
    )


def test_a_merged_model_needs_no_adapter_and_an_empty_system_turn_no_line() -> None:
    lines = render_modelfile("./model.gguf", "", GREEDY).splitlines()
    assert not [line for line in lines if line.startswith(("ADAPTER", "SYSTEM"))]


def test_it_samples_as_the_models_configuration_says() -> None:
    sampling = GenerationConfig(temperature=0.6, top_p=0.9, top_k=30, repetition_penalty=1.1)
    found = dict(re.findall(r"^PARAMETER (\w+) (.+)$", render_modelfile("m", "s", sampling), re.MULTILINE))
    assert found == {
        "stop": '"<|im_end|>"',
        "temperature": "0.6",
        "top_p": "0.9",
        "top_k": "30",
        "repeat_penalty": "1.1",
    }


def test_the_template_is_chatml() -> None:
    """Rendered by Go's text/template, it gave what is compared here; this keeps it so, action by action."""
    text = TEMPLATE
    for action, place in (
        ("{{ if not .System }}", "[no system: "),
        ("{{ end }}{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}", "]"),
        ('{{ if not (and $last (eq .Role "assistant")) }}', "[unless it is continued: "),
        ('{{ end }}{{ if and $last (ne .Role "assistant") }}', "][at the end: "),
        ("{{ end }}{{ end }}", "]"),
        ("{{ .Role }}", "ROLE"),
        ("{{ .Content }}", "CONTENT"),
    ):
        assert text.count(action) == 1
        text = text.replace(action, place)
    assert text == (
        "[no system: <|im_start|>system\n<|im_end|>\n]"
        "<|im_start|>ROLE\nCONTENT[unless it is continued: <|im_end|>\n][at the end: <|im_start|>assistant\n]"
    )


def test_a_system_turn_that_a_modelfile_cannot_hold_is_refused() -> None:
    with pytest.raises(UserError, match=r"prompt\.system: holds .*; give another prompt\.system"):
        render_modelfile("m", 'say """hello"""', GREEDY)
