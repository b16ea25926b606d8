"""What is said to the user is one line, whatever a stranger called his files."""

import os
import pickle

import pytest

from flaxnets.errors import DamageWarning, FallbackWarning, InputError, StorageError, nearest

pytestmark = pytest.mark.unit

NAME = "a\x1b[2Jb\n" + os.fsdecode(b"\xff") + ".png"


@pytest.mark.parametrize("kind", [InputError, StorageError, FallbackWarning, DamageWarning])
def test_a_message_is_one_printable_line(kind):
    error = kind(f"{NAME} cannot be read")
    assert str(error) == "a?[2Jb ?.png cannot be read"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    str(error).encode()


@pytest.mark.parametrize(
    ("word", "suggestion"),
    [
        ("--lr", "--learning-rate"),
        ("--learning_rate", "--learning-rate"),
        ("--depth", "--depths"),
        ("--Batch-Size", "--batch-size"),
        ("--bs", "--batch-size"),
        ("--xyz", None),
        ("---", None),
    ],
)
def test_what_is_meant_is_suggested(word, suggestion):
    flags = ["--help", "--list-recipes", "--depths", "--learning-rate", "--batch-size"]
    assert nearest(word, flags) == (f"; did you mean {suggestion}?" if suggestion else "")
