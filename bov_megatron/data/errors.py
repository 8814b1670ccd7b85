"""The one exception of this package."""


class DataError(ValueError):
    """Data that can't be prepared or read. The message names what was asked for, what was found and the remedy."""
