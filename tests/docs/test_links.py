"""Links lead somewhere, the page of commands is complete, and the README has figures of other pages only."""

import re
from pathlib import Path

import pytest

from wadi.cli import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = sorted({ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "src").rglob("*.md")})


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_the_page_of_commands_has_every_command():
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if not re.search(rf"\bwadi {name}\b", text)] == []


def test_figures_in_the_tables_of_the_readme_stand_in_a_page_of_docs():
    rows = re.findall(r"^\|.*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    figures = {figure for row in rows for figure in re.findall(r"\d+\.\d+", row)}
    docs = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    assert figures
    assert figures - set(re.findall(r"\d+\.\d+", docs)) == set()
