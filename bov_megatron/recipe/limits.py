"""Limits that a field of a recipe must keep: each raises RecipeError with the field, the value and the remedy."""

from __future__ import annotations

import difflib
import typing

from bov_megatron.errors import RecipeError


def nearest(key: str, known: typing.Iterable[str], prefix: str = "") -> str:
    """`; did you mean 'x'?` where a known name is close, else `; known: …`. For the end of an error message."""
    known = list(known)
    close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    listing = f"known: {', '.join(known)}"
    return f"; did you mean '{prefix}{close[0]}'? ({listing})" if close else f"; {listing}"


def at_least(name: str, value: float, least: float, why: str = "") -> None:
    if value < least:
        raise RecipeError(f"{name}={value}: must be at least {least}" + (f" ({why})" if why else ""))


def above_zero(name: str, value: float) -> None:
    if not value > 0:
        raise RecipeError(f"{name}={value}: must be greater than 0")


def within(name: str, value: float, end: float, open_end: bool = False) -> None:
    if not (0 <= value < end or (value == end and not open_end)):
        raise RecipeError(f"{name}={value}: must lie between 0 and {end}" + (" (exclusive)" if open_end else ""))


def one_of(name: str, value: str, known: typing.Sequence[str], more: str = "") -> None:
    if value not in known:
        raise RecipeError(f"{name}={value!r} is unknown{nearest(value, known)}" + (f" {more}" if more else ""))


def divides(whole: tuple[str, int], part: tuple[str, int], why: str) -> None:
    """Raise unless part's value divides whole's; the message offers the values of `part` that would."""
    (name, size), (divisor_name, divisor) = whole, part
    if size % divisor:
        fitting = ", ".join(map(str, divisors(size)[:12]))
        raise RecipeError(
            f"{name}={size} is not divisible by {divisor_name}={divisor}: {why}. {divisor_name} can be {fitting}"
        )


def divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]
