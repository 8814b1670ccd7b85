"""Lines on the terminal of a running job."""

import sys


def say(text: str) -> None:
    """Print one line to stderr, above any progress bar."""
    from tqdm import tqdm  # not at the head: signals are to be heard before it is imported

    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def warn(text: str) -> None:
    say(f"WARNING: {text}")
