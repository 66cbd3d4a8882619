"""What a page is made of, and its HTML by the template `page.html`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells of text; the first `texts` columns are words, the others numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing, `<svg>` or `<img>`, and what it shows."""

    caption: str
    content: Markup


@dataclass(frozen=True, kw_only=True)
class Fold:
    """A long text that is read on demand."""

    summary: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with what is under it, in this order; one without anything is left out."""

    title: str
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    documents: Sequence[Markup] = ()
    """HTML of whole documents."""
    folds: Sequence[Fold] = ()

    @property
    def is_empty(self) -> bool:
        """Nothing would stand under the heading."""
        return not (self.tables or self.figures or self.documents or self.folds)


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole page; `facts` are its main figures, by name, and `notes` say what is left out of it."""

    title: str
    subtitle: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    notes: Sequence[str] = ()


def render(page: Page) -> str:
    """The page as HTML: one file that refers to no other."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html").render(page=page)
