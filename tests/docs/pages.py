"""What the pages hold: code blocks, commands, links, headings and names of files."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.commands import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

SHELL = ("", "bash", "sh")
STARTS_A_COMMAND = re.compile(r"(bft-megatron|make|python|sbatch|torchrun) [\w.-]")
MADE_BY_RUNS = {"runs", "models", "data", "logs", "hf", "checkpoints", "model", "tensorboard", "site", "", "~"}
"""First parts of paths that a command writes or a user brings."""


@dataclass(frozen=True)
class Page:
    """A page's text, and its parts."""

    path: Path
    text: str

    def blocks(self, *languages: str) -> list[str]:
        """Return the fenced code blocks in these languages."""
        found = re.findall(r"^```([^\n]*)\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL)
        return [code for language, code in found if language in languages]

    def prose(self) -> str:
        """Return the text without its fenced blocks."""
        return re.sub(r"^```.*?^```$", "", self.text, flags=re.MULTILINE | re.DOTALL)

    def inline(self) -> list[str]:
        """Return the code spans of the prose."""
        return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", self.prose())]

    def commands(self) -> list[list[str]]:
        """Return the commands of shell blocks and of code spans, as words, without variables set before them."""
        lines = [line for block in self.blocks(*SHELL) for line in block.replace("\\\n", " ").splitlines()]
        lines += [span for span in self.inline() if STARTS_A_COMMAND.match(span)]
        parts = [part for line in lines for part in re.sub(r"(^|\s)#.*", "", line).split("&&")]
        return [words for part in parts if (words := _without_variables(shlex.split(part)))]

    def links(self) -> list[str]:
        """Return the targets of links and images that are not on the web."""
        targets = re.findall(r"\]\(([^)\s]+)\)", self.prose())
        return [target for target in targets if not target.startswith("http")]

    def anchors(self) -> set[str]:
        """Return the anchors of the headings, as GitHub and MyST make them."""
        headings = re.findall(r"^#{1,6} (.+)$", self.prose(), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    def files(self) -> list[str]:
        """Return the paths inside this repository that code spans name."""
        paths = [span for span in self.inline() if re.fullmatch(r"[\w.~-]*(/[\w.*-]*)+", span)]
        return [path for path in paths if path.endswith(".py") or path.partition("/")[0] not in MADE_BY_RUNS]


def read(name: str) -> Page:
    """Return the page of this name, relative to the root."""
    return Page(ROOT / name, (ROOT / name).read_text())


def exists(path: str) -> bool:
    """Whether a path, or a glob, is in the repository, counted from its root or from the package."""
    return any(list(folder.glob(path.strip("/"))) for folder in (ROOT, ROOT / "bft_megatron"))


def _without_variables(words: list[str]) -> list[str]:
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words
