"""Two habits of the docstrings that mkdocstrings does not know: several parameters in one line, and
a colon before code."""

import re

import griffe

SPACE = "\N{NO-BREAK SPACE}"


class Names(griffe.Extension):
    """``lower, upper: ...`` is shown as it is, not as a name and a type; ``::`` in front of code
    becomes a colon."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        """Rewrites a docstring before it is parsed."""
        if obj.docstring:
            text = re.sub(r"::$", ":", obj.docstring.value, flags=re.MULTILINE)
            names = re.compile(r"^( +\w+(?:, \w+)+): ", re.MULTILINE)
            obj.docstring.value = names.sub(
                lambda found: found[0].replace(", ", "," + SPACE)[:-1] + " ", text
            )
