"""Types of arguments, and the line that each mistake gives."""

import argparse
import re
from collections.abc import Callable
from typing import Any

import pytest

from flaxnets.cli.arguments import (
    ArgumentParser,
    check_choice,
    checkpoint_every,
    positive,
    process_group,
    whole_numbers,
    words,
)
from flaxnets.errors import InputError
from flaxnets.training import CheckpointEvery

pytestmark = pytest.mark.unit


def test_what_comes_after_two_dashes_is_no_option():
    parser = ArgumentParser()
    parser.add_argument("--best", action="store_true")
    parser.add_argument("images", nargs="+")
    assert parser.parse(["--best", "--", "--odd.jpg"]).images == ["--odd.jpg"]
    with pytest.raises(InputError, match=r"unknown argument --bset; did you mean --best\?"):
        parser.parse(["--bset", "--", "--odd.jpg"])


def test_lists_are_parsed() -> None:
    assert whole_numbers("18,34,56") == [18, 34, 56]
    assert words("plain, residual") == ["plain", "residual"]
    assert checkpoint_every("500s") == CheckpointEvery(seconds=500.0)
    assert checkpoint_every("2000steps") == CheckpointEvery(steps=2000)
    assert process_group("10.0.0.1:1234,4,3") == ("10.0.0.1:1234", 4, 3)
    assert process_group("") == (None, None, None)
    assert positive(int)("3") == 3
    assert positive(float)("1e-3") == 0.001


@pytest.mark.parametrize(
    ("parse", "texts", "message"),
    [
        (whole_numbers, ("", "18,", "1.5", "18;34", "x"), "is not a list of whole numbers"),
        (positive(int), ("0", "-1", "1.5", "x", ""), "is not a whole number above 0"),
        (positive(float), ("0", "-1", "nan", "inf", "x", ""), "is not a number above 0"),
        (
            checkpoint_every,
            ("5", "0s", "-5s", "infs", "0steps", "1.5steps", "s", "steps", ""),
            "is not a time or a number of steps",
        ),
        (
            process_group,
            (
                "host,2,0",
                "host:x,2,0",
                "host:1234,2",
                "host:1234,2,2",
                "host:1234,2,-1",
                "h:1,2,0 ",
            ),
            "is not HOST:PORT,PROCESSES,INDEX",
        ),
    ],
)
def test_anything_else_is_refused(
    parse: Callable[[str], Any], texts: tuple[str, ...], message: str
) -> None:
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{re.escape(repr(text))} {message}"):
            parse(text)


@pytest.mark.parametrize(
    ("text", "example"),
    [("0-3", "0,1,2,3"), ("3:5", "3,4,5"), ("3..5", "3,4,5"), ("5-3", "18,34,56")],
)
def test_a_range_is_written_out(text: str, example: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"such as {example}$"):
        whole_numbers(text)


def test_a_mistake_is_one_line_that_names_its_argument() -> None:
    parser = ArgumentParser()
    parser.add_argument("--epochs", type=positive(int))
    parser.add_argument("--learning-rate", type=positive(float), required=True)
    with pytest.raises(InputError, match=r"--epochs: '0' is not a whole number above 0 \(--help"):
        parser.parse(["--epochs", "0", "--learning-rate", "1"])
    # An unknown option is named before a missing one, of which it may be a misspelling.
    with pytest.raises(InputError, match="--learning_rate; did you mean --learning-rate"):
        parser.parse(["--learning_rate=1"])
    with pytest.raises(InputError, match="required: --learning-rate"):
        parser.parse([])
    with pytest.raises(InputError, match="unknown argument surplus"):
        parser.parse(["--learning-rate", "1", "surplus"])
    with pytest.raises(InputError, match="unknown argument --learn; did you mean --learning-rate"):
        parser.parse(["--learn", "1"])  # no abbreviations


def test_choices() -> None:
    check_choice("--family", "cifar", ("cifar", "imagenet"))
    with pytest.raises(InputError) as refused:
        check_choice("--kinds", "plane", ("plain", "residual"), " or module:function")
    assert str(refused.value) == (
        "--kinds must be one of plain, residual or module:function, not 'plane'; "
        "did you mean plain?"
    )
