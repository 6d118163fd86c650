"""What `make docs` changes on the way from this folder to the site (see mkdocs.yml).

GitHub shows README.md, CHANGELOG.md and others at the root of the repository, so they stay there. The site shows them
as pages too. Its first page is the README, and docs/index.md, the item index, becomes item_index.html. The notebook of
the tutorial becomes a page. Files of the source tree that pages link to are copied, so that the site has no dead link.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
# Page of the site -> file at the root of the repository.
PAGES = {
    "home.md": "README.md",
    "changes.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "tutorial.md": "docs/tutorial.ipynb",
}
# A link to another file, but not to an address: text before the path, the path, an anchor.
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and files from outside docs/, and gives the first page and the item index their addresses."""
    for page, source in PAGES.items():
        path = ROOT / source
        text = text_of_notebook(path) if path.suffix == ".ipynb" else path.read_text()
        # Links of a file at the root begin there, those of a page in docs/.
        up = posixpath.relpath(posixpath.dirname(source) or ".", "docs")
        text = LINK.sub(lambda link, up=up: f"{link[1]}{posixpath.join(up, link[2])}{link[3] or ''}", text)
        files.append(File.generated(config, page, content=text))
    addresses = {"home.md": "index.html", "index.md": "item_index.html"}
    for file in list(files.documentation_pages()):
        if file.src_uri in addresses:
            file.dest_uri = file.url = addresses[file.src_uri]
        for link in LINK.finditer(file.content_string):
            path = path_of(file.src_uri, link[2])
            if not path.startswith("docs/") and path not in PAGES.values() and (ROOT / path).is_file():
                copy = f"source/{path}"
                if files.get_file_from_path(copy) is None:
                    files.append(File.generated(config, copy, content=(ROOT / path).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to files of the repository into links to the pages and files of the site."""
    by_source = {source: name for name, source in PAGES.items()}

    def on_site(link: re.Match[str]) -> str:
        path = path_of(page.file.src_uri, link[2])
        target = by_source.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}")
        return f"{link[1]}{posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or '.')}{link[3] or ''}"

    return LINK.sub(on_site, markdown)


def path_of(page: str, link: str) -> str:
    """Returns the path of a linked file from the root of the repository. `page` is that of the page within docs/."""
    return posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))


def text_of_notebook(path: Path) -> str:
    """Returns a notebook as Markdown, with what its cells have printed."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = "".join(line for output in cell["outputs"] for line in output["text"]).rstrip()
        if printed:
            parts.append(f"```\n{printed}\n```")
    return "\n\n".join(parts) + "\n"
