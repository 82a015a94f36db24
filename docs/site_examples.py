"""Examples in docstrings as code: an extension of griffe, which reads docstrings."""

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^>>> .*?(?=\n\s*\n|\Z)", re.M | re.S)


class Examples(griffe.Extension):
    """Fences every block that begins with `>>>`, up to the next empty line."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            fenced = _EXAMPLE.sub("```pycon\n\\g<0>\n```", obj.docstring.value)
            obj.docstring.value = fenced
