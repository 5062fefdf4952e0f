"""What the documentation says is tested is tested: every test and option that it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.cases import tables

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"
CASES = tables("CASES")


def named(page: str) -> list[str]:
    """What the last column of a page's tables names."""
    rows = [line for line in (DOCS / page).read_text().splitlines() if line.startswith("|")]
    cells = [row.removesuffix("|").rpartition("|")[2] for row in rows]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


CLAIMS = [(page, name) for page in ("bugs.md", "coming-from.md", "step.md") for name in dict.fromkeys(named(page))]


@pytest.mark.parametrize(("page", "name"), CLAIMS, ids=[name for _, name in CLAIMS])
def test_what_a_page_names_exists(page: str, name: str) -> None:
    file, found, function = name.partition("::")
    if found:
        assert f"def {function}(" in (TESTS / file).read_text()
    else:
        method, _, option = name.partition(": ")
        assert CASES[method][option]


def test_the_pages_name_much() -> None:
    assert len(CLAIMS) > 50
