"""Renders the templates of this folder by jinja2: what is put into an .html template is escaped, into a .md one not."""

import json
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

TEMPLATES = Environment(
    loader=PackageLoader("minilora.reports"),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)

# Control characters that no HTML page may hold, and surrogates, which no encoding can write.
FORBIDDEN = dict.fromkeys(
    (*range(9), 11, 12, *range(14, 32), *range(127, 160), *range(0xD800, 0xE000)), "\N{REPLACEMENT CHARACTER}"
)


def render(template: str, **values: Any) -> str:
    """The text of `templates/<template>` with `values`; an unknown name in it is an error."""
    text = TEMPLATES.get_template(template).render(values)
    return text.translate(FORBIDDEN) if template.endswith(".html") else text
