"""Limits on the fields of a recipe, given in their annotations. A check raises RecipeError."""

from __future__ import annotations

import difflib
import functools
import math
import typing
from dataclasses import dataclass

from bov_megatron.errors import RecipeError


@dataclass(frozen=True)
class AtLeast:
    least: float
    why: str = ""

    def __str__(self) -> str:
        return f"at least {self.least}"

    def check(self, name: str, value: float) -> None:
        if value < self.least:
            raise RecipeError(f"{name}={value}: must be {self}" + (f" ({self.why})" if self.why else ""))


@dataclass(frozen=True)
class AtMost:
    most: int

    def __str__(self) -> str:
        return f"at most {self.most:,}"

    def check(self, name: str, value: float) -> None:
        if value > self.most:
            raise RecipeError(f"{name}={value}: must be {self}")


@dataclass(frozen=True)
class AboveZero:
    def __str__(self) -> str:
        return "greater than 0"

    def check(self, name: str, value: float) -> None:
        if not value > 0:
            raise RecipeError(f"{name}={value}: must be {self}")


@dataclass(frozen=True)
class Within:
    """Between 0 and `end`."""

    end: float
    open_end: bool = False

    def __str__(self) -> str:
        return f"between 0 and {self.end}" + (" (exclusive)" if self.open_end else "")

    def check(self, name: str, value: float) -> None:
        if not (0 <= value < self.end or (value == self.end and not self.open_end)):
            raise RecipeError(f"{name}={value}: must lie {self}")


@dataclass(frozen=True, eq=False)
class OneOf:
    """Allowed values. Values of another type pass: they belong to another part of a union, which `more` describes."""

    known: typing.Collection
    more: str = ""

    def __str__(self) -> str:
        *others, last = (f"`{value}`" for value in self.known)
        return f"{', '.join(others)} or {last}" if not self.more else f"{', '.join([*others, last])}, {self.more}"

    def check(self, name: str, value: typing.Any) -> None:
        if value in self.known or type(value) is not type(next(iter(self.known))):
            return
        if not isinstance(value, str):
            raise RecipeError(f"{name}={value}: must be {str(self).replace('`', '')}")
        raise RecipeError(f"{name}={value!r} is unknown{nearest(value, self.known)}" + f" {self.more}".rstrip())


@functools.cache  # a study checks thousands of recipes
def field_limits(cls: type) -> dict[str, list]:
    """All limits of each field of a dataclass."""
    return {name: limits_of(hint) for name, hint in typing.get_type_hints(cls, include_extras=True).items()}


def limits_of(hint: typing.Any) -> list:
    """All limits in a field's annotation; a `Literal` becomes OneOf."""
    if typing.get_origin(hint) is typing.Literal:
        return [OneOf(typing.get_args(hint))]
    inner = [limit for part in typing.get_args(hint) for limit in limits_of(part)]
    return [*inner, *getattr(hint, "__metadata__", ())]


def nearest(key: str, known: typing.Iterable[str], prefix: str = "") -> str:
    """End of an error message: `; did you mean 'x'?` where a known name is close, else `; known: …`."""
    known = list(known)
    close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    listing = f"known: {', '.join(known)}"
    return f"; did you mean '{prefix}{close[0]}'? ({listing})" if close else f"; {listing}"


def divides(whole: tuple[str, int], part: tuple[str, int], why: str) -> None:
    """Raise RecipeError unless the value of `part` divides that of `whole`; both are (field name, value)."""
    (name, size), (divisor_name, divisor) = whole, part
    if size % divisor:
        fitting = ", ".join(map(str, divisors(size)[:12]))
        raise RecipeError(
            f"{name}={size} is not divisible by {divisor_name}={divisor}: {why}. {divisor_name} can be {fitting}"
        )


def divisors(number: int) -> list[int]:
    small = [i for i in range(1, math.isqrt(number) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})
