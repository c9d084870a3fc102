"""Split a prompt line into its words and options, and find text that only looks like an option."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# Characters that word processors, chats and phones substitute for one or two hyphens.
_DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"
_OPTION = re.compile(r"(?:^|\s)--([A-Za-z]\w*)(?:(?=\s|$)|=)")
_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u201e": "\u201c", "\u201d": "\u201d", "\u2018": "\u2019"} | {
    "\u00ab": "\u00bb",
    "\u300c": "\u300d",
}


@dataclass(frozen=True)
class Given:
    """An option as the user wrote it: its name and the text of its value."""

    name: str
    text: str


@dataclass(frozen=True)
class Line:
    """The words of a prompt line and its options in order, each `--name value` or `--name=value`."""

    words: str
    options: tuple[Given, ...]


def split_line(line: str) -> Line:
    """Split a line, removing quotes that enclose the whole line, the words or a value."""
    line = unquoted(line)
    marks = list(_OPTION.finditer(line))
    starts = [mark.start() for mark in marks] + [len(line)]
    options = (
        Given(mark[1].lower(), unquoted(line[mark.end() : end])) for mark, end in zip(marks, starts[1:], strict=True)
    )
    return Line(unquoted(line[: starts[0]]), tuple(options))


def unquoted(text: str) -> str:
    """Return the text without surrounding blanks, and without quotes if one pair encloses all of it."""
    text = text.strip()
    closing = _QUOTES.get(text[:1], "")
    inside = text[1:-1]
    if len(text) < 2 or not text.endswith(closing or text) or text[0] in inside or closing in inside:
        return text
    return inside.strip()


def lookalikes(text: str, known: Iterable[str], *, is_line: bool) -> Iterator[str]:
    """Yield parts of a text that look like a known option but are not parsed as one.

    They have another dash, a single hyphen, or no space before them. `--name` is an option in a prompt line
    (`is_line`), and a lookalike in any other text.
    """
    names = "|".join(map(re.escape, known))
    pattern = re.compile(rf"(?<![{_DASHES}])([{_DASHES}]+)({names})(?=[\s=:]|$)(?:[\s=:]+(\S+))?", re.IGNORECASE)
    read = {mark.end(1) for mark in _OPTION.finditer(text)} if is_line else set()
    for match in pattern.finditer(text):
        glued = text[: match.start()][-1:].isalnum()
        number = (match[3] or "")[:1].isdigit()
        # semi-d and A-D are words, unless they have two hyphens or a number follows.
        if match.end(2) not in read and not (glued and len(match[1]) == 1 and (match[1] == "-" or not number)):
            yield match[0].strip()
