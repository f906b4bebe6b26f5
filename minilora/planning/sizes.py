"""The sizes of Qwen2.5 by name: what their config.json says, for whoever plans before anything is downloaded.

Base, Instruct, Coder and Math models of one size are alike in all that memory depends on. Source: the config.json files
of Qwen/Qwen2.5-{size}-Instruct.
"""

import re

from minilora.qlora.model import Qwen2Config


def _size(
    hidden_size: int, intermediate_size: int, layers: int, heads: int, kv_heads: int, vocab_size: int, tied: bool
) -> Qwen2Config:
    return Qwen2Config(vocab_size, hidden_size, intermediate_size, layers, heads, kv_heads, 1e-6, 1e6, tied)


SIZES = {
    "0.5B": _size(896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": _size(1536, 8960, 28, 12, 2, 151_936, True),
    "3B": _size(2048, 11008, 36, 16, 2, 151_936, True),
    "7B": _size(3584, 18944, 28, 28, 4, 152_064, False),
    "14B": _size(5120, 13824, 48, 40, 8, 152_064, False),
    "32B": _size(5120, 27648, 64, 40, 8, 152_064, False),
    "72B": _size(8192, 29568, 80, 64, 8, 152_064, False),
}
LONGEST = 32_768  # tokens that all of them were trained on


def hub_name(size: str) -> str:
    """The repository of a size's instruction-tuned model."""
    return f"Qwen/Qwen2.5-{size}-Instruct"


def size_of(name: str) -> str | None:
    """The size that the name of a repository says, None where it says none: "Qwen/Qwen2.5-Coder-7B" is a 7B."""
    found = re.search(r"qwen2\.5-(?:coder-|math-)?([0-9.]+b)(?![a-z0-9])", name.lower())
    size = found[1].upper() if found else None
    return size if size in SIZES else None


def next_smaller(architecture: Qwen2Config) -> str | None:
    """The largest size whose layers hold fewer numbers than those of `architecture`, None where it is the smallest."""
    smaller = [size for size, other in SIZES.items() if _layer_numbers(other) < _layer_numbers(architecture)]
    return smaller[-1] if smaller else None


def _layer_numbers(config: Qwen2Config) -> int:
    """About how many; enough to tell sizes apart."""
    return config.num_hidden_layers * config.hidden_size * (2 * config.hidden_size + 3 * config.intermediate_size)
