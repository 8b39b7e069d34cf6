"""mkdocs: links that leave docs/ (../reports/..., ../benchmarks/...) work on the site as they do in the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = re.compile(r"(\]\()\.\./((?:reports|benchmarks|checkpoints)/[^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add every file outside docs/ that a page links to, under the path that it has in the repository."""
    pages = [file for file in files if file.is_documentation_page()]
    for target in sorted({match[2] for page in pages for match in OUTSIDE.finditer(page.content_string)}):
        if (ROOT / target).is_file():
            files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return OUTSIDE.sub(r"\1\2", markdown)
