"""Text from files, escaped for Markdown and LaTeX; the template of the page escapes HTML.

The texts are printable (`values.py`): they hold no line breaks and no control characters.
"""

import re

__all__ = ["latex", "markdown", "markdown_code", "shorten"]

# An underscore within a word means nothing in Markdown.
MARKDOWN = re.compile(r"[\\`*\[\]<>|~&$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")

LATEX = {letter: f"\\{letter}" for letter in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    # Behind the end of a row these would be arguments of it.
    "[": "{[}",
    "*": "{*}",
}


def markdown(text: str) -> str:
    r"""Text without meaning in GitHub's Markdown, HTML and formulas included.

    >>> markdown("a_b <i>|*c*")
    'a_b \\<i\\>\\|\\*c\\*'
    """
    return MARKDOWN.sub(lambda match: f"\\{match[0]}", text)


def markdown_code(text: str) -> str:
    """Text as code in Markdown, in more backquotes than it has in a row.

    >>> markdown_code("a"), markdown_code("a`b")
    ('`a`', '`` a`b ``')
    """
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{text}{space}{fence}"


def latex(text: str) -> str:
    r"""Text without commands of LaTeX, also within a comment, which ^^M would end.

    >>> latex("50 % of ^^M")
    '50 \\% of \\textasciicircum{}\\textasciicircum{}M'
    """
    return "".join(LATEX.get(letter, letter) for letter in text)


def shorten(text: str, letters: int) -> str:
    """The first letters of a text, and a mark where some are left out."""
    return text if len(text) <= letters else f"{text[: letters - 1]}…"
