"""The pages of docs/: links lead somewhere, code runs, and the site is made of them without a warning."""

import html
import io
import re
import warnings
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import ROOT, run_ddpm
from pages import DOCS, PAGES, anchors, blocks, is_notebook, links, run_blocks

OWN_PARTS = ROOT / "docs/own_parts.md"
WITH_CODE = [
    page for page in DOCS
    if page != OWN_PARTS and blocks(page.read_text(), "python") and not is_notebook(page.read_text())
]  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text()
    for path, anchor in links(text):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert target.resolve().is_relative_to(ROOT), f"{path} leads out of the repository"
        assert not anchor or anchor in anchors(target.read_text()), f"{path}#{anchor}"
    for path in re.findall(r"`((?:configs|scripts|docs)/[\w/.]+\.\w+)`", text):
        assert (ROOT / path).is_file(), path


def test_links_and_headings_are_seen() -> None:
    text = "# One `two`, *three*!\n[a](b.md#c) ![d](e.png) `[z](w)`\n```bash\n# none [x](y)\n```\n## Same\n## Same"
    assert anchors(text) == {"one-two-three", "same", "same-1"}
    assert links(text) == [("b.md", "c"), ("e.png", "")]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda path: path.name)
def test_python_of_a_page_runs(page: Path) -> None:
    assert run_blocks(blocks(page.read_text(), "python"), page.name)


@pytest.mark.cli
def test_parts_of_your_own_are_trained_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a reader's folder: the page's file and configuration, its checks, and its commands with less training."""
    page = OWN_PARTS.read_text()
    code = blocks(page, "python")
    mine = [block for block in code if block.startswith("# mine.py\n")]
    assert len(mine) == 4 < len(code)
    (tmp_path / "mine.py").write_text("\n".join(mine))
    (config,) = blocks(page, "yaml")
    (tmp_path / "mine.yaml").write_text(config)
    run_blocks(code, OWN_PARTS.name)
    printed = ""
    for command in "".join(blocks(page, "bash")).splitlines():
        for name, value in re.findall(r"^(\w+)=(\S+) ", command):
            monkeypatch.setenv(name, value)
        words = re.sub(r"^\w+=\S+ ", "", command).replace("max_steps 500", "max_steps 2").split()
        assert words[0] == "ddpm"
        printed += run_ddpm(*words[1:], cwd=tmp_path)
    assert "SmallNet" in printed and "on Bars (640 training images)" in printed and "T = 50" in printed
    assert (tmp_path / "runs/mine/samples.png").is_file()


def made_site(folder: Path) -> dict[Path, str]:
    """The pages of the site, made as scripts/docs.sh makes it, but for the notebooks, which are not executed."""
    from sphinx.application import Sphinx

    options, printed = {"nb_execution_mode": "off"}, io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)  # what Sphinx says to its extensions
        docs = ROOT / "docs"
        app = Sphinx(docs, docs, folder, folder / ".doctrees", "html", options, status=None, warning=printed)
        app.build()
    assert printed.getvalue() == ""
    return {path: path.read_text() for path in sorted(folder.rglob("*.html")) if "_modules" not in path.parts}


def dead_links(pages: dict[Path, str]) -> list[str]:
    """What leads nowhere, or out of the site, of all that the pages name."""
    ids = {path: {*re.findall(r'\bid="([^"]+)"', text)} for path, text in pages.items()}
    dead = []
    for page, text in pages.items():
        for link in re.findall(r'<(?:a|img|link|script)\b[^>]*? (?:href|src)="([^"]+)"', text):
            path, _, anchor = unquote(html.unescape(link)).partition("#")
            target = (page.parent / path.partition("?")[0]).resolve() if path else page
            outside = "://" in path or path.startswith(("data:", "mailto:"))
            if not outside and (not target.exists() or (anchor and anchor not in ids.get(target, {anchor}))):
                dead.append(f"{page.name}: {link}")
    return dead


def test_the_site_is_made_without_a_warning_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("myst_nb", reason="pip install 'ddpm-lightning[docs]'")
    pages = made_site(tmp_path)
    assert len(pages) > len(DOCS) and dead_links(pages) == []
    process = pages[tmp_path / "api/process.html"]
    assert r"\tilde\beta" in process and 'id="ddpm_lightning.process.DiffusionModel"' in process
    sources = {
        url
        for text in pages.values()
        for url in re.findall(r'<(?:script|link|img)\b[^>]* (?:src|href)="([^"]+)"', text)
    }
    assert any(url.partition("?")[0].endswith("mathjax/tex-chtml.js") for url in sources)
    assert not [url for url in sources if "://" in url]
    assert (tmp_path / "_static/mathjax/tex-chtml.js").is_file()


def test_dead_links_are_seen(tmp_path: Path) -> None:
    page, other = tmp_path / "a.html", tmp_path / "b.html"
    other.touch()
    text = '<a href="b.html#x">, <img alt="" src="c.png">, <a class="d" href="#y">, <a href="b.html">, <a href="https://e.f">'
    assert dead_links({page: text, other: ""}) == ["a.html: b.html#x", "a.html: c.png", "a.html: #y"]
    assert dead_links({page: text, other: '<p id="x">'}) == ["a.html: c.png", "a.html: #y"]
