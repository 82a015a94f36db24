"""Pages and texts of templates: one file each, without scripts or network access.

A page extends `page.html.j2`, which has the style of all, and fills its blocks `title`,
`header` and `content`; `macros.html.j2` has what pages share.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jinja2
from etils import epath

from mvc_jax.reporting import formats

TEMPLATES = epath.Path(__file__).parent / "templates"


def render(
    template: epath.Path,
    filters: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
    **values: Any,
) -> str:
    """What a template makes of values; it fails on one that it lacks.

    Args:
      template: its file; it may extend and include those of `TEMPLATES`.
      filters: beside those of `formats`.
      **values: by name.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=lambda name: name is None or ".html" in name,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update({**formats.FILTERS, **filters})
    return environment.get_template(template.name).render(**values)
