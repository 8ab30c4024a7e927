"""What MkDocs does beyond turning `docs/*.md` into pages: the reference, the tutorials, links into the repository."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from notebooks import as_markdown, with_outputs
from reference import command_line, operation_pages, pipelines

ROOT = Path(__file__).resolve().parents[2]
EXECUTED = ROOT / "build" / "tutorials"
"""Where `make tutorials` leaves notebooks with their outputs."""
_LINK = re.compile(r"(?<=\]\()(?P<path>\.\.?/[^)#\s]+|[\w./-]+\.ipynb)(?P<anchor>#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made: of operations, pipelines, the command line, notebooks, and linked sources."""
    made = {f"reference/operations/{name}.md": page for name, page in operation_pages(ROOT / "protos").items()}
    made["reference/pipelines.md"] = pipelines()
    made["reference/command-line.md"] = command_line()
    for file in files:
        if file.src_uri.startswith("tutorials/") and file.src_uri.endswith(".ipynb"):
            source = Path(str(file.abs_src_path))
            notebook = with_outputs(source, EXECUTED / source.name)
            made[file.src_uri.removesuffix(".ipynb") + ".md"] = as_markdown(notebook, source.name)
    pages = {file.src_uri: file.content_string for file in files.documentation_pages()} | made
    for uri, markdown in pages.items():
        for path in _sources(uri, markdown):
            made[_source_page(path)] = _listing(path)
    for uri, markdown in made.items():
        files.append(File.generated(config, uri, content=markdown))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to notebooks to their pages, and links out of `docs/` to a page that shows the file."""
    folder = posixpath.dirname(page.file.src_uri)

    def lead(link: re.Match[str]) -> str:
        path, anchor = link["path"], link["anchor"] or ""
        outside = _in_repository(page.file.src_uri, path)
        if outside == "README.md":
            return posixpath.relpath("index.md", folder or ".") + anchor
        if outside is not None and (ROOT / outside).is_file():
            return posixpath.relpath(_source_page(outside), folder or ".") + anchor
        # A page's own notebook is there to be taken home.
        if path.endswith(".ipynb") and posixpath.join(folder, path) != page.file.src_uri[:-3] + ".ipynb":
            return path.removesuffix(".ipynb") + ".md" + anchor
        return link[0]

    return _LINK.sub(lead, markdown)


def _in_repository(uri: str, path: str) -> str | None:
    """The path from the repository's root, of a link that leads out of `docs/`."""
    target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(uri), path))
    return None if target == "docs" or target.startswith("docs/") else target


def _sources(uri: str, markdown: str) -> Iterator[str]:
    for link in _LINK.finditer(markdown):
        path = _in_repository(uri, link["path"])
        if path is not None and path != "README.md" and (ROOT / path).is_file():
            yield path


def _source_page(path: str) -> str:
    return f"source/{path}.md"


def _listing(path: str) -> str:
    """A page that shows a file of the repository."""
    language = {".py": "python", ".yaml": "yaml", ".proto": "protobuf"}.get(posixpath.splitext(path)[1], "text")
    text = (ROOT / path).read_text(encoding="utf-8")
    return f"---\nhide: [toc]\n---\n# {path}\n\n~~~~~~~~ {{ .{language} }}\n{text}~~~~~~~~\n"
