"""What other commands have left in a folder: their Markdown with its figures, and figures that no Markdown shows."""

import base64
from pathlib import Path

from markdown_it import MarkdownIt
from markupsafe import Markup, escape

from scripts.reporting.page import Figure, Section

_MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")


def left_sections(folder: Path) -> list[Section]:
    """A section for each Markdown file in the folder and one level below, and one for the other PNGs."""
    files = sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern) if not path.name.startswith("."))
    texts = [path for path in files if path.suffix == ".md"]
    shown: set[Path] = set()
    sections = [Section(title=str(path.relative_to(folder)), documents=[_document(path, shown)]) for path in texts]
    others = [path for path in files if path.suffix == ".png" and path.resolve() not in shown]
    figures = [Figure(caption=str(path.relative_to(folder)), content=_image(path)) for path in others]
    return [*sections, Section(title="More figures", figures=figures)]


def _document(path: Path, shown: set[Path]) -> Markup:
    """The HTML of a Markdown file, its tables in boxes that scroll and its local PNGs inside it; these are added to `shown`."""
    tokens = _MARKDOWN.parse(path.read_text(errors="replace"))
    for token in [child for block in tokens for child in block.children or ()]:
        source = path.parent / str(token.attrGet("src") or "")
        if token.type == "image" and source.suffix == ".png" and source.is_file():
            token.attrSet("src", _data(source))
            shown.add(source.resolve())
        elif token.type == "image":  # the page refers to no other file
            token.type, token.content = "text", f"[{token.content}]"
    html = _MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {})
    return Markup(html.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>"))


def _image(path: Path) -> Markup:
    return Markup(f'<img src="{_data(path)}" alt="{escape(path.name)}">')


def _data(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
