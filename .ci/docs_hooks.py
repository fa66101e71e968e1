"""Hooks of mkdocs: README, CONTRIBUTING and CHANGELOG are pages too, and linked files outside of docs/ come along.

Pages are written so that their links work in the repository; here they are rewritten to where things are in the site.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages at the root of the repository, and what any page links to besides pages."""
    texts = {page.src_uri: page.content_string for page in files.documentation_pages()}
    for source, uri in PAGES.items():
        texts[uri] = _from_docs((ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, uri, content=texts[uri]))
    for text in texts.values():
        for target in re.findall(r"\]\(([^)#: ]+)", _from_docs(text)):
            path = ROOT / target
            if path.is_file() and not target.startswith("../") and files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """A page of docs/ as it is in the site, whose root is also the repository's."""
    return _from_docs(markdown)


def _from_docs(text: str) -> str:
    for source, uri in PAGES.items():
        text = re.sub(rf"\]\((\.\./)?{source}", f"]({uri}", text)
    return re.sub(r"\]\((\.\./|docs/)", "](", text)
