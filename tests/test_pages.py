"""Every page of the documentation opens with what it answers."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", PAGES)
def test_a_page_opens_with_a_sentence_on_what_it_answers(page):
    title, opening, *_ = (DOCS / page).read_text(encoding="utf-8").split("\n\n")
    assert re.fullmatch("# .+", title)
    assert re.match(r"[\w`]", opening) and not opening.startswith("Written by")
    assert re.search(r"[.?](\s|$)", opening)
    assert not re.search(r"(?m)^(\||```|:::)", opening)
