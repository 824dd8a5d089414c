r"""Text of any origin as literal text of each format: Markdown, LaTeX, CSV, HTML and JSON are escaped here alone.

All but JSON show characters that are obeyed or hidden instead of drawn as `console.visible` does; JSON has escapes of
its own, from which a reader gets the same text back.
"""

from __future__ import annotations

import html
import json
import os
import re
import unicodedata
from typing import Any
from urllib.parse import quote

from hcnet_cli.console import visible
from hcnet_cli.table import is_number

# What GitHub's Markdown reads as more than a letter: anywhere, before what makes it a tag, link or entity, or first.
# Nothing else is escaped: other Markdown shows the backslash of \< and \~.
MARKDOWN = re.compile(
    r"[|*`$\\]|<(?=[A-Za-z/!?])|(?<=[^\s~])~|~(?=~)|\[(?=\^)|\](?=[(\[:])|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])|^#(?=#{0,5}(?:\s|$))|^>|^[-+=](?=[-+=\s]|$)|(?<=^\d)[.)](?=\s|$)"
)
MARKDOWN_LINK = re.compile(rf"{MARKDOWN.pattern}|[][]")
ESCAPED = r"\\\g<0>"
LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "→": r"$\to$",
    "…": r"\ldots{}",
    "–": "--",
    "−": "$-$",
}
LATEX_LETTERS = frozenset("ßæÆœŒøØłŁı¡¿")  # beside ASCII and letters with ACCENTS
ACCENTS = frozenset("\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030b\u030c\u0327")
FORMULA = re.compile(r"[=+\-@＝＋－＠]")  # a spreadsheet runs a cell that begins so


def in_markdown(text: str) -> str:
    """For a line or a cell."""
    return MARKDOWN.sub(ESCAPED, visible(text).strip())


def from_markdown(text: str) -> str:
    """What `in_markdown` was given, as far as it was visible."""
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text.strip())


def markdown_code(text: str) -> str:
    """A code span. It cannot hold a backtick."""
    return f"`{visible(text).replace('`', chr(39))}`"


def markdown_link(text: str, path: str) -> str:
    """A link to a file, by a relative path."""
    return f"[{MARKDOWN_LINK.sub(ESCAPED, visible(text))}]({quote(os.fsencode(path))})"


def in_latex(text: str) -> str:
    """For a cell or a note; what pdfLaTeX's fonts may lack becomes its base letter or a question mark."""
    parts = re.split("(?<=-)(?=-)", visible(text).strip())  # -- would become a dash
    return "{}".join("".join(map(_latex_character, part)) for part in parts)


def _latex_character(char: str) -> str:
    if char in LATEX or char.isascii() or char in LATEX_LETTERS:
        return LATEX.get(char, char)
    letters = unicodedata.normalize("NFD", char)
    base, marks = letters[0], set(letters[1:])
    if base.isascii() and base.isalpha():
        return char if ord(char) < 0x180 and marks <= ACCENTS else base
    return "?"


def latex_line(text: str) -> str:
    r"""Escaped text as the beginning of a line: the \\ or \midrule before it takes no [, * or ( as its argument."""
    return "{}" * text.startswith(("[", "*", "(")) + text


def slug(text: str) -> str:
    """The small letters and digits of a text, with hyphens for all between them: for file names and labels."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:120]


def in_csv(value: Any) -> Any:
    """A cell. A text that a spreadsheet would run as a formula begins with an apostrophe; numbers stay as they are."""
    if not isinstance(value, str):
        return value
    text = visible(value)
    return f"'{text}" if FORMULA.match(text.lstrip()) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?%?", text, re.IGNORECASE | re.ASCII) is not None


def in_html(text: str) -> str:
    """For an element or an attribute, in SVG too."""
    return html.escape(visible(text))


def to_json(content: Any, indent: int | None = 1, separators: tuple[str, str] | None = None) -> str:
    """JSON of plain data: null for a number that JSON cannot hold, an escape for a character that is not drawn."""
    text = json.dumps(_finite(content), indent=indent, separators=separators, ensure_ascii=False, allow_nan=False)
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, int | float) and not isinstance(value, bool) and not is_number(value) else value
