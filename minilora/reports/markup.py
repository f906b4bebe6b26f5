"""HTML from nested calls, in which text cannot become a tag.

    element("p", "loss < ", element("b", 0.3), class_="note")   ->   <p class="note">loss &lt; <b>0.3</b></p>

Whatever is not `Markup` is escaped where it is put into an element, so that a review, a path or a label word stays what
it is; nobody has to remember to escape it.
"""

import html
from collections.abc import Sequence

# Control characters that no HTML page may hold, and halves of a surrogate pair, which no encoding can write.
_FORBIDDEN = dict.fromkeys(
    (*range(9), 11, 12, *range(14, 32), *range(127, 160), *range(0xD800, 0xE000)), "\N{REPLACEMENT CHARACTER}"
)
_VOID = ("link", "meta", "wbr")  # elements that have no end


class Markup(str):
    """Text that is HTML already."""


def escaped(value: object) -> Markup:
    """A value as HTML shows it; `Markup` as it stands."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(str(value).translate(_FORBIDDEN)))


def joined(*children: object) -> Markup:
    """Several values one behind the other, None left out."""
    return Markup("".join(escaped(child) for child in children if child is not None))


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element with its children.

    Args:
        name: of the element.
        children: markup as it stands, anything else as text; None is left out.
        attributes: `class_` is class and `aria_label` aria-label; one that is None is left out.
    """
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    start = f"<{name}{shown}>"
    return Markup(start if name in _VOID else f"{start}{joined(*children)}</{name}>")


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[object]], class_: str | None = None) -> Markup:
    """A table whose first column names the rows; wider than the screen, it scrolls by itself."""
    head = element("tr", *(element("th", column, scope="col") for column in columns))
    body = (
        element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in rest))
        for first, *rest in rows
    )
    made = element("table", element("caption", caption), element("thead", head), element("tbody", *body), class_=class_)
    return element("div", made, class_="wide", role="region", tabindex=0, aria_label=caption)
