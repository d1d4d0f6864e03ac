"""The independent checker: derives the verdicts of a certificate file again, with its own code.

It may import `lipjax.formats` and nothing else of lipjax.
"""

from lipjax.check.checker import CannotCheck, check, describe, main, parser

__all__ = ["CannotCheck", "check", "describe", "main", "parser"]
