"""What is said to the user is one line, whatever a stranger called his files."""

import os
import pickle

import pytest

from flaxnets.errors import DamageWarning, FallbackWarning, InputError, StorageError

NAME = "a\x1b[2Jb\n" + os.fsdecode(b"\xff") + ".png"


@pytest.mark.parametrize("kind", [InputError, StorageError, FallbackWarning, DamageWarning])
def test_a_message_is_one_printable_line(kind):
    error = kind(f"{NAME} cannot be read")
    assert str(error) == "a?[2Jb ?.png cannot be read"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    str(error).encode()
