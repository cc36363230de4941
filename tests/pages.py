"""The README and the pages of docs/, and what is on them: links, headings, blocks of code."""

import re

from processes import ROOT

__all__ = ["DOCS", "PAGES", "anchors", "blocks", "is_notebook", "links", "run_blocks"]

DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]

_FENCE = re.compile(r"^(```+|~~~+)(.*?)\n(.*?)^\1", flags=re.DOTALL | re.MULTILINE)


def blocks(text: str, language: str) -> list[str]:
    """The code of the fenced blocks of a language, in order."""
    return [code for _, name, code in _FENCE.findall(text) if name.strip() == language]


def is_notebook(text: str) -> bool:
    """True for a page that is executed when the site is built: one with a kernel in its head."""
    return text.startswith("---\n") and "kernelspec:" in text.partition("\n---")[0]


def run_blocks(code: list[str], name: str) -> dict[str, object]:
    """Run blocks one after another in one namespace, as a reader would type them, and return the names they made.

    A model that takes long to train or to sample from is replaced by a small one.
    """
    names: dict[str, object] = {}
    for block in code:
        for written, run in {"runs/mnist": str(ROOT / "tests/data/run_of_0_1"), "steps=50": "steps=10"}.items():
            block = block.replace(written, run)
        exec(compile(block, name, "exec"), names)
    return names


def _prose(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text))


def links(text: str) -> list[tuple[str, str]]:
    """Targets of the links and pictures that lead to a file of the repository, or to a heading: (path, anchor)."""
    targets = re.findall(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)", _prose(text))
    return [(path, anchor) for path, _, anchor in (target.partition("#") for target in targets if "://" not in target)]


def anchors(text: str) -> set[str]:
    """What GitHub and the site call the headings of a page."""
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", _FENCE.sub("", text), flags=re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.append(re.sub(r"[^\w\- ]", "", words).replace(" ", "-"))
    return {name if k == 0 else f"{name}-{k}" for name in found for k in range(found.count(name))}
