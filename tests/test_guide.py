"""Every page of the guide runs as it stands, and prints what it shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = Path(__file__).parent.parent / "migration_guide"
PAGES = sorted(GUIDE.glob("**/*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = "<<<block {}>>>"


def blocks_of(page: Path) -> tuple[list[str], dict[int, str]]:
    """Return the Python blocks of a page, and the output shown for each by its number."""
    code: list[str] = []
    shown: dict[int, str] = {}
    for language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            code.append(text)
        elif language == "text":
            shown[len(code) - 1] = text.rstrip()
    return code, shown


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_each_block_runs_and_prints_what_the_page_shows(page: Path, tmp_path: Path) -> None:
    code, shown = blocks_of(page)
    if any("import tensorflow" in block for block in code):
        pytest.importorskip("tensorflow")
    marked = "\n".join(f"print({MARK.format(n)!r})\n{block}" for n, block in enumerate(code))
    program = tmp_path / "page.py"
    program.write_text(marked, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = re.split(r"<<<block \d+>>>\n", done.stdout)[1:]
    assert len(printed) == len(code)
    for number, text in enumerate(printed):
        assert text.rstrip() == shown.get(number, ""), f"block {number} of {page.name}"


def test_a_page_that_shows_something_else_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```text\n2\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="block 0"):
        test_each_block_runs_and_prints_what_the_page_shows(page, tmp_path)


@pytest.mark.parametrize("page", [*PAGES, GUIDE.parent / "README.md"], ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
