"""Lines on the terminal of a running job."""

import sys

from tqdm import tqdm


def say(text: str) -> None:
    """Print one line to stderr, above any progress bar."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def warn(text: str) -> None:
    say(f"WARNING: {text}")
