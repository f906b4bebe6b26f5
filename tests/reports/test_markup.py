"""What is put into an element is text, whatever it looks like."""

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.reports.markup import Markup, element, escaped, joined, table


class Texts(HTMLParser):
    """Collects the text between tags, and the names of the tags."""

    def __init__(self, page: str):
        super().__init__()
        self.text, self.tags = "", []
        self.feed(page)
        self.close()

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))


def test_an_element_holds_its_children_in_order_and_leaves_out_none() -> None:
    made = element("p", "a", None, element("b", 3), "c", class_="note", id=None, aria_label="x")
    assert made == '<p class="note" aria-label="x">a<b>3</b>c</p>'
    assert joined("<", None, Markup("<br>")) == "&lt;<br>"


def test_an_element_without_content_has_no_end() -> None:
    assert element("meta", charset="utf-8") == '<meta charset="utf-8">'
    assert element("td") == "<td></td>"


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "&lt;", "'--><!--"])
def test_text_stays_text_in_elements_and_attributes(text: str) -> None:
    for value in (text, Markup(text)):  # in an attribute, markup is text too
        page = Texts(element("p", text, title=value))
        assert page.tags == [("p", {"title": text})]
        assert page.text == text


@given(st.text())
def test_any_text_comes_out_as_it_went_in_but_for_what_no_page_may_hold(text: str) -> None:
    page = Texts(element("p", text))
    assert page.tags == [("p", {})]
    assert len(page.text) == len(text)
    for before, after in zip(text, page.text, strict=True):
        assert after == before or after == "\N{REPLACEMENT CHARACTER}"
    escaped(text).encode()  # half of a surrogate pair would raise


@pytest.mark.parametrize("character", ["\0", "\b", "\x1b", "\x7f", "\x85", "\ud800"])
def test_a_character_that_no_page_may_hold_is_replaced(character: str) -> None:
    assert escaped(f"a{character}b\n\t好") == "a\N{REPLACEMENT CHARACTER}b\n\t好"


def test_a_tables_first_column_names_its_rows() -> None:
    made = table("All", ("label", "<b>"), [("负面", 3), (Markup("<i>x</i>"), 4)], "prose")
    assert '<table class="prose"><caption>All</caption>' in made
    assert '<th scope="col">label</th><th scope="col">&lt;b&gt;</th>' in made
    assert '<tr><th scope="row">负面</th><td>3</td></tr><tr><th scope="row"><i>x</i></th><td>4</td></tr>' in made
    assert made.startswith('<div class="wide" role="region" tabindex="0" aria-label="All">')
