"""Docstrings refer to names as ``:func:`name```, which Markdown does not know: the site shows ``name`` as code."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|meth|class|mod|attr|data):(`[^`]+`)")


class Roles(griffe.Extension):
    """Takes the role away from every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"\1", obj.docstring.value)
