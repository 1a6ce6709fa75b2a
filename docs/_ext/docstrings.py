"""Docstrings as reStructuredText, by the few rules that hsrjax's keep to.

What stands in backticks is code, and a link where it names something public; shapes
such as f[B, T, H] are code too. All else is plain text: no star, bar or angle bracket
means anything. `Args:` and the like are lists of `name: text`, `Returns:`, `Cost:` and
`Source:` are text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

Link = Callable[[str], str | None]
"""Full name of what a piece of code names, or None."""

_SECTION = re.compile(r"(Args|Returns|Raises|Attributes|Cost|Example|Source):(.*)")
_ITEM = re.compile(r"(\S.*?): +(.*)")
_SHAPE = re.compile(r"(?:\b(?:bool|[fiu]\d*))?\[(?:\*?[A-Z1]|\.\.\.)[^][]*\]")
_LISTS = {"Args": "Arguments", "Raises": "Raises"}


def render(lines: list[str], link: Link = lambda code: None) -> list[str]:
    """A docstring in reStructuredText.

    Args:
        lines: without the indentation of the code.
        link: says what code names.

    Returns:
        Lines: the text, and then a list of fields.
    """
    text: list[str] = []
    fields: list[str] = []
    for name, block in _sections(lines):
        if not name:
            text += _paragraphs(block, link)
        elif name == "Attributes":
            for attribute, about in _items(block):
                about = inline(_sentence(about), link)
                text += [f".. attribute:: {attribute}", "", f"   {about}", ""]
        elif name == "Example":
            fields += [":Example:", "", *(f"   {line}" for line in block), ""]
        elif name in _LISTS:
            fields += [f":{_LISTS[name]}:", ""]
            for item, about in _items(block):
                fields.append(f"   - **{_plain(item)}**: {inline(about, link)}")
            fields.append("")
        else:
            words = _sentence(" ".join(block))
            fields += [f":{name}: {inline(words, link)}", ""]
    return [*text, *fields, ""]


def inline(text: str, link: Link = lambda code: None) -> str:
    """Text with code in backticks, and nothing else that means anything."""
    pieces = re.split(r"`+([^`]+)`+", text)
    made = [
        _plain(piece) if i % 2 == 0 else _code(piece, link)
        for i, piece in enumerate(pieces)
    ]
    return "".join(made).removeprefix(r"\ ").removesuffix(r"\ ")


def _sentence(text: str) -> str:
    """With a capital letter, where it begins with a word."""
    word = re.match(r"(?!bool\b)[a-z](?=[a-z]*[ ,.:;])", text)
    return text.capitalize()[:1] + text[1:] if word else text


def _code(code: str, link: Link) -> str:
    """Code, with the marks that let it stand next to a letter."""
    target = link(code)
    if target is None:
        return rf"\ ``{code}``\ "
    return rf"\ :py:obj:`{code} <{target}>`\ "


def _plain(text: str) -> str:
    escape = lambda words: re.sub(r"([\\*|_<>])", r"\\\1", words)
    made, end = [], 0
    for shape in _SHAPE.finditer(text):
        made += [escape(text[end : shape.start()]), rf"\ ``{shape[0]}``\ "]
        end = shape.end()
    return "".join([*made, escape(text[end:])])


def _sections(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Names and lines of sections, "" for text between them.

    A section goes on while lines are indented, or, where it began behind its name, up
    to an empty line.
    """
    name, block, opened = "", [], False
    for line in lines:
        begins = _SECTION.fullmatch(line)
        goes_on = line.startswith(" ") or not line or (opened and block[-1])
        if begins or (name and not goes_on):
            yield name, _dedented(block)
            name, block, opened = "", [], False
        if begins:
            name, opened = begins[1], bool(begins[2])
            line = begins[2].strip()
        block.append(line)
    yield name, _dedented(block)


def _dedented(block: list[str]) -> list[str]:
    """Without empty lines at either end, and without shared indentation."""
    while block and not block[0]:
        block = block[1:]
    while block and not block[-1]:
        block = block[:-1]
    indents = [len(line) - len(line.lstrip()) for line in block if line]
    least = min(indents, default=0)
    return [line[least:] for line in block]


def _items(block: list[str]) -> Iterator[tuple[str, str]]:
    """`name: text`, whose further lines are indented more."""
    found: list[list[str]] = []
    for line in block:
        if line.startswith(" ") and found:
            found[-1].append(line.strip())
        elif line:
            found.append([line])
    for first, *rest in found:
        item = _ITEM.fullmatch(first)
        if item is None:
            raise ValueError(f"no 'name: text' in a docstring: {first!r}")
        yield item[1], " ".join([item[2], *rest])


def _paragraphs(block: list[str], link: Link) -> Iterator[str]:
    """Text; a paragraph that is indented is a list of `name: text`."""
    for paragraph in "\n".join(block).split("\n\n"):
        lines = paragraph.splitlines()
        if lines and all(line.startswith(" ") for line in lines):
            for name, about in _items(_dedented(lines)):
                yield f"- ``{name}``: {inline(about, link)}"
        else:
            yield inline(" ".join(lines), link)
        yield ""
