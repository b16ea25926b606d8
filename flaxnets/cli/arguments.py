"""Command-line arguments; mistakes in them raise one-line `InputError`s.

tyro prints mistakes as boxes of several lines, with no hook to change them, and separates the
numbers of a list by spaces, so argparse stays.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from flaxnets.errors import InputError, nearest
from flaxnets.training.loop import CheckpointEvery


class ArgumentParser(argparse.ArgumentParser):
    """Argument parser that raises one-line `InputError`s and suggests the nearest known flag."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the options)")

    def parse(self, arguments: list[str] | None) -> argparse.Namespace:
        flags = [name for action in self._actions for name in action.option_strings]
        given = sys.argv[1:] if arguments is None else arguments
        # Report unknown flags before missing ones, which may only be misspelt.
        options = given[: given.index("--")] if "--" in given else given
        unknown = [argument.split("=")[0] for argument in options if argument.startswith("--")]
        unknown = [flag for flag in unknown if flag not in flags]
        if not unknown:
            known, rest = self.parse_known_args(given)
            unknown = [argument.split("=")[0] for argument in rest]
            if not unknown:
                return known
        self.error(f"unknown argument {unknown[0]}{nearest(unknown[0], flags)}")


def whole_numbers(text: str) -> list[int]:
    """Parse an argument such as `18,34,56`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        example = "18,34,56"
        if found := re.fullmatch(r"(\d{1,9})(?:-|:|\.\.)(\d{1,9})", text):
            first, last = map(int, found.groups())
            if first < last < first + 100:
                example = ",".join(map(str, range(first, last + 1)))
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of whole numbers such as {example}"
        ) from None


def words(text: str) -> list[str]:
    """Parse an argument such as `plain,residual`."""
    return [part.strip() for part in text.split(",")]


def positive(number: type) -> Callable[[str], Any]:
    """Return an argument type: a finite `number` (int or float) above 0."""

    def parse(text: str) -> Any:
        try:
            value = number(text)
        except ValueError:
            value = math.nan
        if not (0 < value < math.inf):
            what = "a whole number" if number is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} above 0")
        return value

    return parse


def checkpoint_every(text: str) -> CheckpointEvery:
    """Parse an argument such as `500s` or `2000steps`."""
    try:
        if text.endswith("steps"):
            return CheckpointEvery(steps=positive(int)(text.removesuffix("steps")))
        if text.endswith("s"):
            return CheckpointEvery(seconds=positive(float)(text.removesuffix("s")))
    except argparse.ArgumentTypeError:
        pass
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a time or a number of steps, such as 500s or 2000steps"
    )


def process_group(text: str) -> tuple[str | None, int | None, int | None]:
    """Parse an argument such as `10.0.0.1:1234,4,0`; if empty, the cluster provides it."""
    if not text:
        return None, None, None
    found = re.fullmatch(r"(\S+:\d+),(\d+),(\d+)", text)
    if not found or int(found[3]) >= int(found[2]):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not HOST:PORT,PROCESSES,INDEX, such as 10.0.0.1:1234,4,0"
        )
    return found[1], int(found[2]), int(found[3])


def check_choice(flag: str, value: str, choices: tuple[str, ...], more: str = "") -> None:
    """Raise an `InputError` if `value` is not one of `choices`, suggesting the nearest."""
    if value not in choices:
        raise InputError(
            f"{flag} must be one of {', '.join(choices)}{more}, "
            f"not {value!r}{nearest(str(value), choices)}"
        )
