"""Image-classification data: sets by name, records on disk, and the pipeline that feeds
training."""

from lipjax.data.sets import (
    DataError,
    Dataset,
    Splits,
    described,
    fingerprint,
    listed,
    load,
    load_test,
)

__all__ = [
    "DataError",
    "Dataset",
    "Splits",
    "described",
    "fingerprint",
    "listed",
    "load",
    "load_test",
]
