"""The generator's settings, copied beside its input: Sphinx with MyST-NB, nothing executed, nothing fetched."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from docutils import nodes

SITE = json.loads(Path(__file__).with_name("site.json").read_text(encoding="utf-8"))

project = SITE["title"]
html_title = f"Lab notes, {SITE['profile']}"
language = "en"
extensions = ["myst_nb"]
exclude_patterns = ["lab_notes", "fragments", "files"]
nb_execution_mode = "off"
nb_output_stderr = "remove"  # libraries' warnings, which name the machine's folders
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
nb_ipywidgets_js: dict[str, Any] = {}  # their default is a CDN
myst_enable_extensions: list[str] = []
smartquotes = True
html_theme = "lab_notes"
html_theme_path = [str(Path(__file__).parent)]
html_extra_path = ["files"]
html_context = {"site": SITE}
html_copy_source = html_show_sourcelink = html_use_index = html_show_copyright = False
html_show_search_summary = False  # it fetches pages, which a browser refuses for file://; see excerpts.js
html_permalinks_icon = "#"
pygments_style = "default"

EXCERPTS: dict[str, list[list[str]]] = {}  # per page: anchor, heading, text of every section


def collect(app: Any, doctree: nodes.document, name: str) -> None:
    """Keep every section's own text, so that search results can show where a word stands without fetching."""
    sections = EXCERPTS.setdefault(name, [])
    for section in doctree.findall(nodes.section):
        heading = section.next_node(nodes.title)
        parts = [_text(child) for child in section.children if not isinstance(child, nodes.section | nodes.title)]
        text = re.sub(r"\s+", " ", " ".join(parts)).strip()
        sections.append([section["ids"][0], heading.astext() if heading else "", text])


def _text(node: nodes.Node) -> str:
    if isinstance(node, nodes.raw):
        if node["format"] != "html":
            return ""
        text = re.sub(r"<style.*?</style>|<[^>]+>", " ", node.astext(), flags=re.DOTALL)
        return text.replace("&lt;", "<").replace("&gt;", ">").replace("&#39;", "'").replace("&amp;", "&")
    if isinstance(node, nodes.literal_block):
        return ""  # code is found by its page
    if not node.children:
        return node.astext()
    return " ".join(_text(child) for child in node.children)


def write_excerpts(app: Any, exception: Exception | None) -> None:
    """Write the sections' text as a script: scripts load from file://, data does not."""
    if exception is None:
        text = json.dumps(EXCERPTS, ensure_ascii=False, sort_keys=True)
        (Path(app.outdir) / "excerpts.js").write_text(f"var EXCERPTS = {text};\n", encoding="utf-8")


def setup(app: Any) -> None:
    """Connect."""
    app.connect("doctree-resolved", collect)
    app.connect("build-finished", write_excerpts)
