"""The site's pages that lie outside docs/, and links to files of the repository.

The documents link each other by the repository's folders, so that they read well
there. mkdocs knows docs/ alone: here README.md becomes the first page, what a page
links outside docs/ comes along, and its links lead there. The menu is made here as
well: a page that no group names stands at its end.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# Pages from outside docs/: where they stand on the site.
PAGES = {
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "evals/README.md": "evals.md",
}
OTHERS = "files/"  # where everything else from outside docs/ stands
MENU = {
    "Use": "install use recipes faq refusals",
    "Long streams": "sessions pins chats",
    "Retrieval heads": "heads find_heads see_sinks",
    "Scale": "scaling ray speculation models",
    "How": "how results peers cpu performance testing soak evals",
    "Project": "security contributing changes",
}
LINK = re.compile(r'(!?)\[([^\[\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?(?: "[^"]*")?\)')


def site_path(path: str) -> str:
    """Where a file of the repository stands on the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PAGES.get(path, OTHERS + path)


def repository_path(path: str) -> str:
    """The inverse of :func:`site_path`."""
    for source, page in PAGES.items():
        if page == path:
            return source
    if path.startswith(OTHERS):
        return path.removeprefix(OTHERS)
    return f"docs/{path}"


def replace_links(text: str, source: str, target: Callable[[str], str]) -> str:
    """``text`` of the file ``source``, every link by ``target`` of the path it names.

    What names no file of the repository stays as it is; a folder becomes its name.
    """

    def replace(match: re.Match[str]) -> str:
        image, words, link, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        if (ROOT / path).is_dir():
            return words
        if path.startswith("..") or not (ROOT / path).is_file():
            return match[0]
        return f"{image}[{words}]({target(path)}{anchor or ''})"

    return LINK.sub(replace, text)


def on_config(config):
    left = {page.stem for page in (ROOT / "docs").glob("*.md")}
    left |= {Path(page).stem for page in PAGES.values()} - {"index"}
    nav: list = [{"vLLM-Sink": "index.md"}]
    for group, names in [*MENU.items(), ("More", " ".join(sorted(left)))]:
        pages = [f"{name}.md" for name in names.split() if name in left]
        left -= set(names.split())
        if pages:
            nav.append({group: pages})
    config.nav = nav
    return config


def on_files(files, config):
    """Adds every file that a page links outside docs/."""
    pages = [*PAGES, *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
    known = set(pages)

    def add(path: str) -> str:
        if path not in known and not path.startswith("docs/"):
            known.add(path)
            pages.append(path)
        return path

    for page in pages:  # grows as it is read
        if page.endswith(".md"):
            replace_links((ROOT / page).read_text(), page, add)
        if not page.startswith("docs/"):
            files.append(
                File.generated(config, site_path(page), abs_src_path=str(ROOT / page))
            )
    return files


def on_page_markdown(markdown, page, config, files):
    here = page.file.src_uri

    def relative(path: str) -> str:
        return posixpath.relpath(site_path(path), posixpath.dirname(here) or ".")

    return replace_links(markdown, repository_path(here), relative)
