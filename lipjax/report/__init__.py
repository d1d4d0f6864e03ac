"""The page of a certification: what was proved, in pictures and tables."""

from lipjax.report.page import (
    GROUPS,
    NAME,
    SHOWN,
    ReportError,
    activation_layers,
    build,
    check_command,
    gallery,
    proved_radii,
    select,
)

__all__ = [
    "GROUPS",
    "NAME",
    "SHOWN",
    "ReportError",
    "activation_layers",
    "build",
    "check_command",
    "gallery",
    "proved_radii",
    "select",
]
