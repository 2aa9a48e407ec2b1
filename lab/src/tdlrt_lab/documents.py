"""Generated sections of Markdown documents."""

from collections.abc import Sequence
from pathlib import Path

__all__ = ["fill_section"]


def fill_section(document: Path, name: str, lines: Sequence[str]) -> None:
    """Replace the text between `<!-- name -->` and `<!-- end of name -->` by these lines."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, rest = document.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    document.write_text(f"{before}{begin}{chr(10).join(lines)}\n{end}{after}", encoding="utf-8")
