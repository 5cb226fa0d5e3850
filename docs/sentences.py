"""Mean length of the sentences of Markdown pages, in words; fails where a page's mean reaches 18.

    python docs/sentences.py                 # README.md, CONTRIBUTING.md and every page below docs/
    python docs/sentences.py docs/data.md

Code, tables, headings, formulas, comments and images do not count. An item of a list ends a sentence; inline code is
one word.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 18
NOT_PROSE = re.compile(
    r"""^```(?s:.*?)^```    # code, directives
    | <!--(?s:.*?)-->
    | ^\ *\|.*$             # tables
    | ^\#.*$                # headings
    | ^(-\ )?\*\*[^*]+\.\*\*  # headings of a paragraph
    | ^\ {4}[^ ].*$(?=\n\n)  # a formula: one indented line
    | !\[.*?\]\(.*?\)       # images""",
    re.MULTILINE | re.VERBOSE,
)


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def sentences(markdown: str) -> list[list[str]]:
    """The words of each sentence of prose."""
    markdown = NOT_PROSE.sub("\n", markdown)
    markdown = re.sub(r"`[^`]+`", "code", markdown)
    markdown = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", markdown)  # links: their text
    paragraphs = re.split(r"\n\s*\n|^\s*(?:[-*]|\d+\.) ", markdown, flags=re.MULTILINE)
    ends = (re.split(r"(?<=[.!?])[*_)\"]*\s+", " ".join(paragraph.split())) for paragraph in paragraphs)
    found = [[word for word in end.split() if re.search(r"\w", word)] for group in ends for end in group]
    return [words for words in found if words]


def main(paths: list[Path]) -> int:
    too_long = []
    for path in paths:
        found = sentences(path.read_text())
        if not found:
            continue
        mean, longest = sum(map(len, found)) / len(found), max(found, key=len)
        print(f"{path.relative_to(ROOT)}: {len(found)} sentences, mean {mean:.1f}, longest {len(longest)}")
        print(f"    {' '.join(longest)}")
        if mean >= LIMIT:
            too_long.append(path)
    return bool(too_long)


if __name__ == "__main__":
    sys.exit(main([Path(name).resolve() for name in sys.argv[1:]] or pages()))
