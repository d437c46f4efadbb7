"""A page as one HTML document that needs nothing else: no script, no font, no file, no network.

Everything from outside is escaped. Only `Markup` counts as HTML, and templates are the only source of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.reports.page import Page
from rlhf_recipes.reports.style import DARK, LIGHT, css_variables
from rlhf_recipes.reports.svg import svg_chart

if TYPE_CHECKING:
    from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"


def page_html(page: Page) -> str:
    """Return a page as an HTML document."""
    from markupsafe import Markup

    return render_html(
        TEMPLATES / "page.html.jinja",
        page=page,
        charts={section.name: [svg_chart(chart) for chart in section.charts] for section in page.sections},
        light=Markup(css_variables(LIGHT)),
        dark=Markup(css_variables(DARK)),
        colours=list(LIGHT),
        css=Markup(page.css),
    )


def render_html(template: Path, **values: Any) -> Markup:
    """Fill in a template; every value is escaped unless it is `Markup`. A missing value is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return Markup(environment.get_template(template.name).render(values))
