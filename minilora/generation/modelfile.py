"""A Modelfile: what Ollama runs a GGUF file with, so that a conversation has there the ids that training used.

    FROM, ADAPTER    the GGUF files
    TEMPLATE         ChatML, as `qlora/prompt.py` renders it; Ollama does not run the model's own jinja template
    SYSTEM           the system turn of the run
    PARAMETER        the stop token, and how the model's generation_config.json samples

Source: https://docs.ollama.com/modelfile; Go's text/template.
"""

from minilora.errors import UserError
from minilora.generation.decode import GenerationConfig
from minilora.qlora.prompt import IM_END

# A last turn of the assistant is a beginning that the model continues. Where the system turn is empty, Ollama has none.
TEMPLATE = """\
{{ if not .System }}<|im_start|>system
<|im_end|>
{{ end }}{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}<|im_start|>{{ .Role }}
{{ .Content }}{{ if not (and $last (eq .Role "assistant")) }}<|im_end|>
{{ end }}{{ if and $last (ne .Role "assistant") }}<|im_start|>assistant
{{ end }}{{ end }}"""
QUOTES = '"""'


def render_modelfile(model: str, system: str, sampling: GenerationConfig, adapter: str | None = None) -> str:
    """The text of a Modelfile.

    Args:
        model: the GGUF file, or a folder of safetensors, from which Ollama makes one.
        system: text of the system turn. UserError for one that a Modelfile cannot hold.
        sampling: of the model.
        adapter: the GGUF file of an adapter.
    """
    if QUOTES in system:
        raise UserError(f"prompt.system: holds {QUOTES}, which a Modelfile cannot; give another prompt.system=...")
    lines = ["# ollama create NAME -f Modelfile", f"FROM {model}"]
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    lines.append(f"TEMPLATE {QUOTES}{TEMPLATE}{QUOTES}")
    if system:
        lines.append(f"SYSTEM {QUOTES}{system}{QUOTES}")
    parameters: dict[str, float | str] = {"stop": f'"{IM_END}"', "temperature": 0}
    if sampling.do_sample and sampling.temperature > 0:
        parameters |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    parameters["repeat_penalty"] = sampling.repetition_penalty
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    return "\n".join(lines) + "\n"
