"""Which linear layers get an adapter, and of which rank: paths and peft's keys in, a list of targets out.

    target_modules       names ("q_proj", "layers.3.mlp.up_proj"), "all-linear", or a regular expression for whole paths
    layers_to_transform  numbers of layers, for names alone; layers_pattern says what numbered modules are called
    rank_pattern         another rank, and alpha_pattern another alpha, for paths that end in a name or an expression

A regular expression comes out of a file that somebody else wrote, and one such as `(a+)+b` can keep Python busy for
years. Those that can match in several ways are tried in a process that is given up after MATCH_TIMEOUT_S.

Source: peft 0.21, src/peft/tuners/tuners_utils.py (check_target_module_exists), utils/other.py (get_pattern_key).
Left out: exclude_modules, target_parameters.
"""

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minilora.config import LoraConfig
from minilora.errors import UserError

MATCH_TIMEOUT_S = 10.0
_MATCH = """\
import json, re, sys
pattern, paths = json.load(sys.stdin)
json.dump([path for path in paths if re.fullmatch(pattern, path)], sys.stdout)
"""


@dataclass(frozen=True)
class Target:
    """A linear layer that gets an adapter.

    Attributes:
        path: in the model.
        r: rank.
        alpha: numerator of the scaling.
    """

    path: str
    r: int
    alpha: float


def choose_targets(candidates: Sequence[str], lora_config: LoraConfig) -> list[Target]:
    """The chosen ones of `candidates`, the paths of all linear layers that may have an adapter, in their order.

    Raises:
        UserError: something that matches no linear layer, or no regular expression.
    """
    target_modules = lora_config.target_modules
    paths = _choose_paths(candidates, target_modules)
    if lora_config.layers_to_transform is not None:
        if isinstance(target_modules, str) and target_modules != "all-linear":
            raise UserError(
                f"lora.layers_to_transform: goes with names in lora.target_modules, which is {target_modules!r}; "
                "put the layers' numbers into the expression"
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
        matched = _matching("lora.target_modules", target_modules, candidates)
        if matched:
            return matched
        # A single name reads as a regular expression that matches no whole path: take it as the name it is.
        target_modules = [target_modules]
    missing = [t for t in target_modules if not any(_is_named(path, t) for path in candidates)]
    if missing or not target_modules:
        head = {"lm_head", "embed_tokens"} & set(missing)
        reason = "; head and embedding cannot be adapted (they are one matrix in tied models)" if head else ""
        raise UserError(f"lora.target_modules: {missing} match no linear layer; {choices}{reason}")
    return [path for path in candidates if any(_is_named(path, t) for t in target_modules)]


def _is_named(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _in_layers(
    paths: Sequence[str], layers_to_transform: int | Sequence[int], layers_pattern: str | Sequence[str] | None
) -> list[str]:
    """Those of `paths` that stand in one of the numbered layers."""
    wanted = {layers_to_transform} if isinstance(layers_to_transform, int) else set(layers_to_transform)
    called = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or [])
    numbered = re.compile(rf"(?:.*?\.)?({'|'.join(map(re.escape, called)) or '[^.]*'})\.(\d+)\.")
    found: dict[int, list[str]] = {}
    for path in paths:
        match = numbered.match(path)
        if match is not None:
            found.setdefault(int(match[2]), []).append(path)
    missing = sorted(wanted - set(found))
    if missing or not wanted:
        expected = f"expected numbers from {min(found)} to {max(found)}" if found else "the targets stand in none"
        raise UserError(f"lora.layers_to_transform: no target stands in layers {missing}; {expected}")
    chosen = {path for number in wanted for path in found[number]}
    return [path for path in paths if path in chosen]


def _read_pattern(name: str, pattern: Mapping[str, float], candidates: Sequence[str]) -> dict[str, float]:
    """`rank_pattern` or `alpha_pattern` as a value by path."""
    values: dict[str, float] = {}
    for expression, value in pattern.items():
        matched = _matching(f"lora.{name}", rf"(?:.*\.)?(?:{expression})", candidates, expression)
        if not matched:
            raise UserError(f"lora.{name}: {expression!r} matches no linear layer; correct or remove it")
        values = dict.fromkeys(matched, value) | values
    return values


def _matching(key: str, pattern: str, paths: Sequence[str], shown: str | None = None) -> list[str]:
    """The paths that a regular expression matches as a whole.

    Raises:
        UserError: it is none, or does not come to an end.
    """
    shown = pattern if shown is None else shown
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # "[[": Python does not yet say what it will mean
            compiled = re.compile(pattern)
    except (re.error, FutureWarning, OverflowError, RecursionError) as error:
        raise UserError(f"{key}: {shown!r} is not a regular expression ({error})") from None
    if not set("*+?{|") & set(shown):  # there is one way to match it
        return [path for path in paths if compiled.fullmatch(path)]
    try:
        answer = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH],
            input=json.dumps([pattern, list(paths)]),
            capture_output=True,
            text=True,
            timeout=MATCH_TIMEOUT_S,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{key}: {shown!r} is an expression that takes for ever to match; write it without a repetition within a "
            "repetition"
        ) from None
    return list(json.loads(answer.stdout))
