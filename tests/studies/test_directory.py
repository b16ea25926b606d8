"""Directories that cannot hold a study, and their locks."""

import fcntl
import os
from pathlib import Path

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


def test_free_names_are_free(tmp_path):
    for name in ("s", "s-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").touch()
    with pytest.raises(InputError, match="something that is not a study") as raised:
        check_output_dir(tmp_path / "s")
    assert str(raised.value).endswith("s-3")


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").touch()
    for out in ("file", "file/below"):
        with pytest.raises(InputError, match="is a file"):
            check_output_dir(tmp_path / out)


def test_paths_that_cannot_be(tmp_path):
    with pytest.raises(InputError, match="too long"):
        check_output_dir(tmp_path / ("x" * 300))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="give a"):
        check_output_dir(tmp_path / "dangling")


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    # Asked of the system, because root may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match="cannot be written"):
        check_output_dir(tmp_path / "out")
