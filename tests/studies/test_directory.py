"""Directories of studies whose names and locks are not text."""

import fcntl
import os

import pytest

from flaxnets.errors import InputError
from flaxnets.studies.directory import check_output_dir, lock_directory

pytestmark = pytest.mark.unit


def test_a_path_that_is_not_utf8(tmp_path):
    with pytest.raises(InputError, match="need a path in UTF-8; give another directory"):
        check_output_dir(tmp_path / os.fsdecode(b"na\xefve"))


def test_a_lock_that_is_not_utf8(tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xff\xfe")
    with (tmp_path / ".lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused = pytest.raises(InputError, match="is in use by another process")
        with refused, lock_directory(tmp_path):
            pass
