"""The error model of floating-point arithmetic: of the bounds themselves (`outward`), and of the
function as executed (`executed`)."""

from lipjax.rounding.executed import (
    ARITHMETICS,
    Arithmetic,
    arithmetics_of,
    forward_error,
    least_precise,
)
from lipjax.rounding.outward import (
    DOUBLE,
    EXACT,
    FLOOR,
    LARGEST,
    OUTWARD,
    Exact,
    Outward,
    Rounding,
    gamma,
    terms_of,
    transposed_terms_of,
)

__all__ = [
    "ARITHMETICS",
    "DOUBLE",
    "EXACT",
    "FLOOR",
    "LARGEST",
    "OUTWARD",
    "Arithmetic",
    "Exact",
    "Outward",
    "Rounding",
    "arithmetics_of",
    "forward_error",
    "gamma",
    "least_precise",
    "terms_of",
    "transposed_terms_of",
]
