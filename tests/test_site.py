"""The site of the documentation: it builds without a warning, fetches nothing, has no dead link, and documents every public name."""

import importlib
import os
import re
import shlex
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from test_public_names import MODULES

from fastvae.models.registry import networks

NOT_INSTALLED = "the site's tools are not installed: pip install fastvae-kernels[docs]"
pytest.importorskip("mkdocs", reason=NOT_INSTALLED)
pytest.importorskip("material", reason=NOT_INSTALLED)
pytest.importorskip("griffe", reason=NOT_INSTALLED)

ROOT = Path(__file__).resolve().parent.parent
COMMAND = re.search(r"^docs: .*\n\t(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
# Elements whose addresses a browser fetches by itself.
FETCHED = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src"}


class Html(HTMLParser):
    """A page's anchors, its links, what it fetches, and its text without scripts and code."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.prose: list[str] = []
        self._inside: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag in FETCHED and values.get(FETCHED[tag]):
            self.fetched.append(values[FETCHED[tag]])
        if tag in ("script", "style", "pre", "code"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data):
        if not self._inside:
            self.prose.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built by the command of `make docs`, in a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    setting, *words = shlex.split(COMMAND.replace("$(RUN)", sys.executable))
    environment = os.environ | dict([setting.split("=")]) | {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [*words, "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    assert "WARNING" not in result.stdout, result.stdout
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Html]:
    found = {path: Html(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(found) > 40
    return found


def test_every_page_of_docs_is_in_the_site(site):
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file()


def test_nothing_is_fetched_from_elsewhere(pages):
    fetched = {address for page in pages.values() for address in page.fetched}
    assert fetched
    assert [address for address in fetched if re.match(r"(\w+:)?//", address)] == []


def test_links_and_pictures_lead_somewhere(pages):
    for path, page in pages.items():
        for address in (*page.links, *page.fetched):
            if re.match(r"\w+:", address):
                continue
            file, _, anchor = unquote(address).partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.is_file(), f"{path.name}: {address}"
            if anchor and target in pages:
                assert anchor in pages[target].anchors, f"{path.name}: {address}"


def test_no_markup_is_left_in_the_text(pages):
    """Roles and formulas of docstrings, entries that docstrings share, directives of mkdocstrings, and LaTeX."""
    for path, page in pages.items():
        text = "".join(page.prose)
        assert re.findall(r":(?:math|func|class|meth|mod|data):|^::: |\.\. math|\$\w+|\\[a-z]{2,}", text, re.MULTILINE) == [], path.name
        # Pages that show a file show its docstrings as they are.
        assert "source" in path.parts or "``" not in path.read_text(), path.name


def test_every_public_name_is_in_the_reference(site):
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    documented = {line.split()[0] for line in inventory.splitlines() if line}
    public = {f"{module}.{name}" for module in MODULES for name in importlib.import_module(module).__all__}
    ready_made = {f"fastvae.models.{name}" for name in networks() if name.startswith(("VAE.", "AE."))}
    assert (public | ready_made) - documented == set()


def test_the_reference_links_to_itself(site, pages):
    links = [link for path, page in pages.items() if path.parent == site / "api" for link in page.links]
    assert sum("#fastvae." in link and not link.startswith("#") for link in links) > 50
