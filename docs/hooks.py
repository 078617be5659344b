"""What the documentation is built from beside the pages of this folder; MkDocs calls these functions.

Notebooks and model cards stay where they are in the repository, and are pages of the site under the same paths.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = ("notebooks/[0-9][0-9]-*.ipynb", "assets/*/README.md")
NO_PAGES = ("assets/samples/README.md",)  # of pictures, not of a model
# nbconvert's template loads MathJax and Mermaid from another host; no notebook uses them.
FOREIGN_SCRIPT = re.compile(r"<script(?:(?!</script>).)*https://(?:(?!</script>).)*</script>", re.DOTALL)
ROLE = re.compile(r":\w+:<code>~?([^<]*)</code>")


@event_priority(100)
def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie elsewhere; runs before the plugin that turns notebooks into pages."""
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            place = path.relative_to(ROOT).as_posix()
            if place not in NO_PAGES:
                files.append(File(place, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links from this folder to the rest of the repository, as they are on GitHub, to the pages here."""
    return markdown if "/" in page.file.src_uri else markdown.replace("](../", "](")


def on_page_content(html: str, **_: Any) -> str:
    """Take out scripts from other hosts, and what Sphinx would have made of the roles in docstrings."""
    return ROLE.sub(r"<code>\1</code>", FOREIGN_SCRIPT.sub("", html))
