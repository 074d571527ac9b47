"""Hooks of MkDocs: formulas become MathML, and links to files outside of docs/ lead to pages of the site.

The pages of docs/ are also read on a code host, where ``../examples/tokenizers.py`` leads to the file. In the site that file becomes a page
of its own, a Markdown file is a page like those of docs/, and a picture is copied.
"""

import posixpath
import re
from pathlib import Path

import ziamath
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
# Pages of the site's navigation that are not in docs/.
PAGES = (ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md")
# The font of formulas: most systems bring one, Linux often none.
FONT = "STIXTwoMath-Regular.ttf"
LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".cu": "cuda", ".yaml": "yaml"}

# LaTeX that latex2mathml 3.81 does not know (arg), makes as high as its neighbours (norms), or sets without a space (log p).
CORRECTIONS = (
    (r"\\arg\b", r"\\operatorname{arg}"),
    (r"\\[lr]Vert\b", r"\\|"),
    (r"\\lvert\b", r"\\left|"),
    (r"\\rvert\b", r"\\right|"),
    (r"\\log(?= *[0-9A-Za-z\\])", r"\\log\\,"),
    (r"(?<=[\w})]) *\\log\b", r"\\,\\log"),
)
# A relation that it takes for a letter, and a bar that Chromium does not stretch over what is below it.
CORRECTED_ELEMENTS = (
    ("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>"),
    ('<mo accent="true">&#x02015;</mo>', '<mo accent="true" stretchy="true">&#x0203E;</mo>'),
)

_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
_CODE_IN_TABLE = re.compile(r"`[^`\n]*`")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    formulas = {"name": "math", "class": "formula"}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [{**formulas, "format": formula_block}]}
    config.mdx_configs["pymdownx.inlinehilite"] = {"custom_inline": [{**formulas, "format": formula}]}
    return config


def formula(source: str, *_) -> str:
    """The MathML of a formula in a line."""
    return mathml(source, "inline")


def formula_block(source: str, *_, **__) -> str:
    """The MathML of a formula on lines of its own. It scrolls where the screen is narrower."""
    return f'<div class="formula">{mathml(source, "block")}</div>'


def mathml(source: str, display: str) -> str:
    """The MathML of LaTeX."""
    for pattern, replacement in CORRECTIONS:
        source = re.sub(pattern, replacement, source)
    found = convert(source, display=display)
    for element, replacement in CORRECTED_ELEMENTS:
        found = found.replace(element, replacement)
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    font = Path(ziamath.__file__).parent / "fonts" / FONT
    files.append(File.generated(config, FONT, abs_src_path=str(font)))
    for path in sorted(outside(config)):
        uri = site_uri(path)
        options = {"inclusion": InclusionLevel.INCLUDED if path in PAGES else InclusionLevel.NOT_IN_NAV}
        if path.suffix in LANGUAGES:
            files.append(File.generated(config, uri, content=source_page(path), **options))
        else:
            files.append(File.generated(config, uri, abs_src_path=str(path), **options))
    return files


def outside(config: MkDocsConfig) -> set[Path]:
    """The files outside of docs/ that a page links to, and pages among them."""
    found, unread = set(PAGES), [*Path(config.docs_dir).rglob("*.md"), *PAGES]
    while unread:
        page = unread.pop()
        linked = {target for link in _LINK.finditer(page.read_text()) if (target := target_of(page, link[1]))}
        new = {target for target in linked if not is_in_docs(target)} - found
        unread += [target for target in new if target.suffix == ".md"]
        found |= new
    return found


def target_of(page: Path, link: str) -> Path | None:
    """The file of the repository that a link of a page leads to."""
    target = (page.parent / link).resolve()
    return target if target.is_file() and target.is_relative_to(ROOT) else None


def is_in_docs(path: Path) -> bool:
    return path.is_relative_to(ROOT / "docs")


def site_uri(path: Path) -> str:
    """Where a file of the repository is in the site, as the path of a source."""
    if is_in_docs(path):
        return path.relative_to(ROOT / "docs").as_posix()
    relative = path.relative_to(ROOT).as_posix()
    if path.suffix == ".md":
        return relative.lower()
    return f"source/{relative}.md" if path.suffix in LANGUAGES else f"source/{relative}"


def source_page(path: Path) -> str:
    """A page that shows a file. Searches do not find it: they would find the same words in the pages that explain it."""
    fence = "`" * 6
    heading = f"---\nsearch:\n  exclude: true\n---\n\n# {path.relative_to(ROOT)}\n\n"
    return f"{heading}{fence} {LANGUAGES[path.suffix]}\n{path.read_text()}{fence}\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.src_uri.startswith("source/"):
        return markdown
    original = next((path for path in PAGES if site_uri(path) == page.file.src_uri), Path(config.docs_dir) / page.file.src_uri)
    folder = posixpath.dirname(page.file.src_uri)

    def in_site(link: re.Match) -> str:
        target = target_of(original, link[1])
        uri = posixpath.relpath(site_uri(target), folder or ".") if target else link[1]
        return f"]({uri}{link[2] or ''})"

    return "\n".join(unescaped(line) for line in _LINK.sub(in_site, markdown).split("\n"))


def unescaped(line: str) -> str:
    r"""A row of a table in which ``\|`` within code is a bar, as it is on a code host."""
    return _CODE_IN_TABLE.sub(lambda code: code[0].replace(r"\|", "|"), line) if line.startswith("|") else line
