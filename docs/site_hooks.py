"""Hooks of mkdocs: the pages link to files of the repository outside docs/, of which the site gets copies."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
FOLDER = "repository"  # of the copies in the site
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)")  # a link out of docs/


def copy_of(path: str) -> str:
    """Where the site has a file of the repository; text is shown by a browser as it is."""
    return f"{FOLDER}/{path}{'.txt' if path.endswith(('.md', '.py')) else ''}"


def on_files(files: Files, config: Any) -> Files:
    linked = {path for page in files.documentation_pages() for path in OUTSIDE.findall(page.content_string)}
    for path in sorted(linked):
        if (ROOT / path).is_file():  # a broken link is left for the check of links
            files.append(File.generated(config, copy_of(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return OUTSIDE.sub(lambda link: f"]({copy_of(link[1])}" if (ROOT / link[1]).is_file() else link[0], markdown)
