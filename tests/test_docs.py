"""The examples in the pages of `docs/` run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXAMPLES = [
    pytest.param(
        page, match, id=f"{page.name}:{page.read_text()[: match.start()].count(chr(10)) + 1}"
    )
    for page in sorted(DOCS.glob("*.md"))
    for match in BLOCK.finditer(page.read_text())
]


def test_op_pages_have_examples() -> None:
    pages = {example.values[0].name for example in EXAMPLES}
    assert pages >= {"attention.md", "modulation.md", "noise.md"}


@pytest.mark.parametrize(("page", "match"), EXAMPLES)
def test_example_runs(page: Path, match: re.Match[str]) -> None:
    lines_above = match.string[: match.start(1)].count("\n")
    # Errors then name the page and its line.
    exec(compile("\n" * lines_above + match[1], str(page), "exec"), {"__name__": "example"})
