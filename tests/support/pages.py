"""The pages of the documentation, and the fenced blocks in them."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("checkpoints/*/README.md"))
)
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """What stands between two fences, as ``docs/quickstart.md:42``."""

    page: str
    line: int
    language: str
    text: str
    follows_directly: bool
    """Nothing but a short sentence with a colon is between this block and the one before."""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_code(self) -> bool:
        """Whether a reader may run it; the others show output or files."""
        return self.language in ("sh", "python", "js")


def blocks(page: str, root: Path = ROOT) -> list[Block]:
    """The blocks of a page in their order."""
    text = (root / page).read_text(encoding="utf-8")
    found: list[Block] = []
    end = 0
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        between = text[end : match.start()].strip()
        follows = bool(found) and "\n" not in between and (not between or between.endswith(":"))
        found.append(Block(page, line, match[2], textwrap.dedent(match[3]), follows))
        end = match.end()
    return found
