"""Links and file names in the pages for people lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "glue_scripts/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
NAME = re.compile(r"(?:tests|benchmarks|glue_scripts|examples|docs|hf_maskselect)/[\w/.-]*\w")


def anchors(page):
    """Return the anchors of a page's headings, as GitHub and the built pages make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_file_names_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    missing = [name for name in set(NAME.findall(text)) if not (ROOT / name).exists()]
    assert missing == []


def test_the_contributing_page_names_what_exists():
    """The guided tour names a file and something in it."""
    tour = re.findall(r"`([\w/]+\.py)`, `(?:(\w+)\.)?(\w+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(tour) >= 6
    for file, owner, name in tour:
        text = (ROOT / "hf_maskselect" / file).read_text()
        assert (not owner or f"class {owner}" in text) and re.search(rf"(def|class) {name}\b", text), (file, name)


def test_quoted_sections_of_the_benchmarks_exist():
    headings = set(re.findall(r"^#+ (.*)$", (ROOT / "benchmarks" / "RESULTS.md").read_text(), re.M))
    pages = "\n".join(page.read_text() for page in PAGES)
    quoted = re.findall(r'RESULTS\.md`, "([^"]+)"', pages)
    table = (ROOT / "docs" / "results.md").read_text().partition("| question | section there |")[2]
    missing = {*quoted, *re.findall(r'"([^"]+)"', table)} - headings
    assert missing == set()
