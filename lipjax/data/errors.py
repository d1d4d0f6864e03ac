"""What goes wrong with data."""


class DataError(ValueError):
    """A data set is missing, damaged or not what it should be; the message says what to do."""
