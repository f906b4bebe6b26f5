"""YAML in, plain values out: no duplicate keys, no aliases, and every bad value with its line."""

from pathlib import Path
from typing import Any

import yaml

from minilora.errors import UserError
from minilora.system.files import similar_path


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, of which YAML would keep the last one, and names every bad value.

    SafeLoader's own ValueErrors and the like (a month 13) say neither line nor value.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a few lines of them expand to gigabytes
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem=f"alias *{event.anchor} is not read", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    problem = f"key {key_node.value!r} is given twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError):
            problem = f"{node.value!r} cannot be read; quote it if it is text"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None


def parse_yaml(text: str) -> Any:
    """Content of a YAML text; YAMLError whatever is wrong with it."""
    try:
        return yaml.load(text, _StrictLoader)
    except RecursionError:
        raise yaml.YAMLError("brackets are nested too deep") from None


def read_yaml(path: Path) -> Any:
    """Content of the file that --config names; an empty one is an empty table."""
    try:
        content = parse_yaml(path.read_text("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check --config{similar_path(path)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not valid YAML; {' '.join(str(error).split())}") from None
    return {} if content is None else content
