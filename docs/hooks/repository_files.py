"""MkDocs hook: files outside docs/ that belong to the site, and links that lead to them.

Pages are written for readers of the repository too: a link in them holds between files there.
CONTRIBUTING.md and CHANGELOG.md become pages. Any other file that a page links to is copied.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# File at the root of the repository -> the page that it becomes.
_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# The site's home page takes the place of the README.
_IN_SITE = _PAGES | {"README.md": "index.md"}
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages, and a copy of each file outside docs/ that a page links to."""
    root = Path(config.config_file_path).parent
    for source, page in _PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(root / source)))
    for file in list(files.documentation_pages()):
        for target in _LINK.findall(file.content_string):
            path = _in_repository(file.src_uri, target)
            inside = path in _IN_SITE or path.startswith(("docs/", "../"))
            if not inside and path not in files.src_uris and (root / path).is_file():
                files.append(File.generated(config, path, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the links of the repository into links of the site."""
    source = page.file.src_uri

    def in_site(link: re.Match[str]) -> str:
        path = _in_repository(source, link[1])
        path = _IN_SITE.get(path, path.removeprefix("docs/"))
        return posixpath.relpath(path, posixpath.dirname(source) or ".")

    return _LINK.sub(in_site, markdown)


def _in_repository(page: str, target: str) -> str:
    """The path, from the root of the repository, of what a page of the site links to."""
    source = {page: source for source, page in _PAGES.items()}.get(page, f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
