"""Which linear layers get an adapter, and of which rank: paths and a `LoraConfig` in, a list of targets out.

    target_modules       names ("q_proj", "layers.3.mlp.up_proj"), "all-linear", or a regular expression for whole paths
    layers_to_transform  indices of layers, with names only; layers_pattern is the name of the list of layers
    rank_pattern         another rank, and alpha_pattern another alpha, for paths that end in a name or an expression

A regular expression may come from a file that somebody else wrote, and one such as `(a+)+b` keeps Python busy for
years. So the ways in which an expression can match are counted first: at most MAX_WAYS, and no repetition of what can
itself match in several ways. The worst expression then takes ten seconds for the 560 paths of a model of 80 layers.

Source: peft 0.21, src/peft/tuners/tuners_utils.py (check_target_module_exists), utils/other.py (get_pattern_key).
Left out: exclude_modules, target_parameters.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minilora.config import LoraConfig
from minilora.errors import UserError

MAX_WAYS = 300_000
WAYS_OF_REPETITION = 16  # four `.*` split a path of 33 characters in 16^4 ways
NAME_START = re.compile(r"^|\.")  # ends where the path or a name in it begins
# An escape, a class, the beginning of a group, a quantifier, or a single character.
TOKENS = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\((?:\?(?:#|[a-zA-Z-]*))?|(?:[*+?]|\{\d*,?\d*\})[?+]?|.", re.DOTALL
)


@dataclass(frozen=True)
class Target:
    """A linear layer that gets an adapter: its path in the model, rank and alpha."""

    path: str
    r: int
    alpha: float


def choose_targets(candidates: Sequence[str], lora_config: LoraConfig) -> list[Target]:
    """The chosen ones of `candidates`, the paths of all linear layers that may have an adapter, in their order."""
    target_modules = lora_config.target_modules
    paths = _choose_paths(candidates, target_modules)
    if lora_config.layers_to_transform is not None:
        if isinstance(target_modules, str) and target_modules != "all-linear":
            raise UserError(
                f"lora.layers_to_transform: goes with names in lora.target_modules, which is {target_modules!r}; "
                "put the layers' indices into the expression"
            )
        paths = _in_layers(paths, lora_config.layers_to_transform, lora_config.layers_pattern)
    ranks = _read_pattern("rank_pattern", lora_config.rank_pattern, candidates)
    alphas = _read_pattern("alpha_pattern", lora_config.alpha_pattern, candidates)
    return [Target(p, int(ranks.get(p, lora_config.r)), alphas.get(p, lora_config.alpha)) for p in paths]


def _choose_paths(candidates: Sequence[str], target_modules: str | Sequence[str]) -> list[str]:
    names = sorted({path.rpartition(".")[2] for path in candidates})
    choices = f"expected some of {', '.join(names)}, 'all-linear', or a regular expression for the whole path"
    if target_modules == "all-linear":
        return list(candidates)
    if isinstance(target_modules, str):
        expression = _compile("lora.target_modules", target_modules)
        matched = [path for path in candidates if expression.fullmatch(path)]
        if matched:
            return matched
        target_modules = [target_modules]  # a single name
    named = {name: [path for path in candidates if f".{path}".endswith(f".{name}")] for name in target_modules}
    missing = [name for name, found in named.items() if not found]
    if missing or not target_modules:
        head = {"lm_head", "embed_tokens"} & set(missing)
        reason = "; head and embedding cannot be adapted (they are one matrix in tied models)" if head else ""
        raise UserError(f"lora.target_modules: {missing} match no linear layer; {choices}{reason}")
    return [path for path in candidates if any(path in found for found in named.values())]


def _in_layers(
    paths: Sequence[str], layers_to_transform: int | Sequence[int], layers_pattern: str | Sequence[str] | None
) -> list[str]:
    """Those of `paths` that are in one of the layers with these indices."""
    wanted = {layers_to_transform} if isinstance(layers_to_transform, int) else set(layers_to_transform)
    called = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or [])
    numbered = re.compile(rf"(?:.*?\.)?({'|'.join(map(re.escape, called)) or '[^.]*'})\.(\d+)\.")
    found = {path: int(match[2]) for path in paths if (match := numbered.match(path)) is not None}
    missing = sorted(wanted - set(found.values()))
    if missing or not wanted:
        numbers = sorted(found.values())
        known = f"indices from {numbers[0]} to {numbers[-1]}" if numbers else "targets in a list of layers"
        raise UserError(f"lora.layers_to_transform: no target is in layers {missing}; expected {known}")
    return [path for path in paths if found.get(path) in wanted]


def _read_pattern(name: str, pattern: Mapping[str, float], candidates: Sequence[str]) -> dict[str, float]:
    """`rank_pattern` or `alpha_pattern` as a value by path; of several expressions that match, the first counts."""
    values: dict[str, float] = {}
    for expression, value in pattern.items():
        compiled = _compile(f"lora.{name}", expression)
        matched = [p for p in candidates if any(compiled.fullmatch(p, start.end()) for start in NAME_START.finditer(p))]
        if not matched:
            raise UserError(f"lora.{name}: {expression!r} matches no linear layer; correct or remove it")
        values = dict.fromkeys(matched, value) | values
    return values


def _compile(key: str, expression: str) -> re.Pattern[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # "[[": Python does not yet say what it will mean
            compiled = re.compile(expression)
    except (re.error, FutureWarning, OverflowError, RecursionError) as error:
        raise UserError(f"{key}: {expression!r} is not a regular expression ({error})") from None
    try:
        count_ways(expression)
    except ValueError as error:
        raise UserError(
            f"{key}: {expression!r} {error}; use fewer repetitions, or list the names of the layers"
        ) from None
    return compiled


@dataclass
class _Group:
    """Ways of the alternatives before this one, of this one up to its last item, and of its last item."""

    before: int = 0
    sequence: int = 1
    item: int = 1

    @property
    def ways(self) -> int:
        ways = self.before + self.sequence * self.item
        if ways > MAX_WAYS:
            raise ValueError(f"can match in more than {MAX_WAYS:,} ways")
        return ways

    def add(self, item: int) -> None:
        self.sequence, self.item = self.ways - self.before, item


def count_ways(expression: str) -> int:
    """In how many ways a valid regular expression may match a path: an estimate, by its repetitions and alternatives.

    ValueError for more than MAX_WAYS, and for a repetition in another, which makes the ways exponential.
    """
    groups = [_Group()]
    for token in TOKENS.findall(expression):
        group = groups[-1]
        if token.startswith("("):
            if token.startswith("(?") and ("#" in token or "x" in token):
                raise ValueError("has a comment or the flag x, which are not read")
            groups.append(_Group())
        elif token == ")":
            groups.pop()
            groups[-1].add(group.ways)
        elif token == "|":
            groups[-1] = _Group(before=group.ways)
        elif token[0] == "?":
            group.item += 1
        elif token[0] in "*+" or (token[0] == "{" and len(token) > 1):
            if group.item > 1:
                raise ValueError("repeats what can itself match in several ways")
            group.item = WAYS_OF_REPETITION
        else:
            group.add(1)
    return groups[0].ways
