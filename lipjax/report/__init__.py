"""The page of a certification: what was proved, in pictures and tables."""

from lipjax.report.of_certificate import write
from lipjax.report.page import NAME, ReportError, activation_layers, build
from lipjax.report.pictures import GROUPS, SHOWN, gallery, proved_radii, select
from lipjax.report.reproduction import check_command

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
    "write",
]
