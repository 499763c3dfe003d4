"""Documentation: strict build, links, and agreement with the code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest
from paths import ROOT

from glmd.config_sources import load
from glmd.convert.inspect import inspect

PAGES = sorted((ROOT / "docs").glob("**/*.md"))
COLOURS = re.compile(r"\x1b\[[\d;]*m")
UNCLEAR = re.compile(
    r"\b(anew|sign of life|one behind the other|held to a form|lest|what becomes of|nobody asks"
    r"|is its limit|on trial|guilty|innocent)\b",
    re.IGNORECASE,
)
ZENSICAL = Path(sys.executable).with_name("zensical")


def copy_sources(folder: Path) -> None:
    shutil.copytree(ROOT / "docs", folder / "docs")
    (folder / "deploy").mkdir()
    for name in ("zensical.toml", "CONTRIBUTING.md", "deploy/README.md"):
        shutil.copy(ROOT / name, folder / name)


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ZENSICAL), "build", "--strict"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    copy_sources(folder)
    done = build(folder)
    assert done.returncode == 0, COLOURS.sub("", done.stdout + done.stderr)
    return folder / "site"


class Page(HTMLParser):
    """Anchors, links and loaded resources of an HTML page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids.update(found[name] for name in ("id", "name") if name in found)
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") in ("stylesheet", "preload", "icon"):
            self.loaded.append(found["href"])
        elif "src" in found:
            self.loaded.append(found["src"])


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {file: Page(file) for file in site.rglob("*.html")}


def nav_pages(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        for value in entry.values():
            if isinstance(value, str):
                yield value
            else:
                yield from nav_pages(value)


def test_every_page_is_in_the_navigation_once() -> None:
    nav = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    existing = [str(page.relative_to(ROOT / "docs")) for page in PAGES]
    assert sorted(nav_pages(nav)) == existing, "Add the page to `nav` in zensical.toml."


def test_strict_build_fails_for_a_broken_link(tmp_path: Path, site: Path) -> None:
    copy_sources(tmp_path)
    with (tmp_path / "docs" / "index.md").open("a") as page:
        page.write("\n[nowhere](nowhere.md)\n")
    assert build(tmp_path).returncode != 0


def test_internal_links_and_anchors_exist(site: Path, pages: dict[Path, Page]) -> None:
    dead = []
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or file.name == "404.html":
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            anchors = {"", *(pages[target].ids if target in pages else ())}
            if not target.exists() or unquote(parts.fragment) not in anchors:
                dead.append(f"{file.name}: {link}")
    assert dead == []


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "SECURITY.md",
        "deploy/README.md",
        "demo/README.md",
    ],
)
def test_links_in_files_outside_the_docs_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        parts = urlsplit(target)
        if not parts.scheme and parts.path:
            assert ((ROOT / name).parent / parts.path).exists(), target


def test_pages_load_no_external_resources(pages: dict[Path, Page]) -> None:
    external = {name for page in pages.values() for name in page.loaded if urlsplit(name).netloc}
    assert external == set()


def test_included_files_are_rendered(site: Path) -> None:
    assert "one line per package" in (site / "contributing.html").read_text()
    assert "For the whole machine, on a Mac" in (site / "service.html").read_text()
    for file in site.glob("*.html"):
        assert "--8&lt;--" not in file.read_text(), file


@pytest.mark.parametrize("tool", ["book.py", "structured_output.py"])
def test_generated_pages_and_tables_are_current(tool: str) -> None:
    done = subprocess.run(
        [sys.executable, f"tools/{tool}", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_model_sizes_in_memory_md_match_the_conversion_plan() -> None:
    main = inspect(ROOT / "tests/fixtures/glm-4.7-flash/config.json").main
    text = " ".join((ROOT / "docs" / "memory.md").read_text().split())
    assert f"{main.bits_per_weight:.3f} bits per weight, {main.nbytes / 2**30:.2f} GiB" in text
    assert f"{2 * main.parameters / main.nbytes:.2f} times smaller than BF16" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_blocks_and_svg_pictures_are_valid(page: Path) -> None:
    text = page.read_text()
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        subprocess.run(["sh", "-n"], input=block, text=True, check=True)
    for picture in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert ElementTree.fromstring(picture).get("aria-labelledby")
        assert "http" not in picture


def test_example_configuration_file_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLMD_CONFIG", raising=False)
    example = re.search(r"```toml\n(.*?)```", (ROOT / "docs/settings.md").read_text(), re.DOTALL)
    assert example
    file = tmp_path / "config.toml"
    file.write_text(example[1])
    assert load({}, file).max_running == 16


def test_docs_and_code_avoid_unclear_phrases() -> None:
    files = [*PAGES, *ROOT.glob("*.md"), *(ROOT / "server" / "glmd").rglob("*.py")]
    found = [
        f"{file.relative_to(ROOT)}: {match[0]}"
        for file in files
        for match in UNCLEAR.finditer(" ".join(file.read_text(encoding="utf-8").split()))
    ]
    assert found == []
