"""The pages of the documentation: README.md and everything below docs/, in reading order."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _in_order(page: Path) -> list[Path]:
    """Return `page` and the pages that its tables of contents list, in order."""
    text = page.read_text()
    lists = re.findall(r"```\{toctree\}\n(.*?)```", text, re.DOTALL)
    names = [line for entries in lists for line in entries.split() if re.fullmatch(r"[\w/]+", line)]
    below = [page.parent / f"{name}.md" for name in names]
    return [page, *(found for each in below if each.exists() for found in _in_order(each))]


PAGES = [ROOT / "README.md", *_in_order(ROOT / "docs" / "index.md")]
TEXTS = {page: page.read_text() for page in PAGES}
# The same block may be on two pages.
BLOCKS = list(
    dict.fromkeys(
        code
        for text in TEXTS.values()
        for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    )
)


def block(marker: str) -> str:
    """Return the one block of Python code that contains `marker`."""
    (found,) = [code for code in BLOCKS if marker in code]
    return found
