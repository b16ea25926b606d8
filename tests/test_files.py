"""Atomic writes, and one clear line for each way in which they fail."""

import errno
import os
from pathlib import Path

import pytest

from flaxnets.errors import StorageError
from flaxnets.files import (
    cache_directory,
    set_aside,
    storage_errors,
    write_atomic,
    write_cache,
    write_csv,
)

pytestmark = pytest.mark.unit


def test_what_was_there_stays(tmp_path, monkeypatch):
    """Where no file system can be mounted: the system's own errors, made up."""
    path = tmp_path / "file"
    write_atomic(path, "old")
    for number, words in (
        (errno.ENOSPC, r"needs about 2\.0 MB, and .* is free"),
        (errno.EDQUOT, r"needs about 2\.0 MB"),
        (errno.EACCES, "no permission to write in"),
        (errno.EIO, "Input/output error"),
    ):

        def fail(_, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match=rf"{path} cannot be written: .*{words}"):
            write_atomic(path, "n" * 2_000_000)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]


def test_all_is_written_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"\xff\0")
    assert path.read_bytes() == b"\xff\0"
    seen = []

    def replace(temporary: Path, target: Path) -> None:
        seen.append((temporary.read_text(), target.read_bytes()))
        os.replace(temporary, target)

    monkeypatch.setattr(Path, "replace", replace)
    write_atomic(path, "café")
    assert seen == [("café", b"\xff\0")]
    assert path.read_bytes() == "café".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_no_link_is_written_through(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("other")
    (tmp_path / ".file.tmp").symlink_to(other)
    (tmp_path / "file").symlink_to(other)
    write_atomic(tmp_path / "file", "new")
    assert other.read_text() == "other"
    assert (tmp_path / "file").read_text() == "new"
    assert not (tmp_path / "file").is_symlink()


def test_a_directory_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(StorageError, match=r"file cannot be written: Is a directory$"):
        write_atomic(tmp_path / "file", "content")


def test_a_directory_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"the directory {tmp_path}/gone is gone$"):
        write_atomic(tmp_path / "gone" / "file", "content")


def test_libraries_bury_the_reason_in_text(tmp_path: Path) -> None:
    for text, words in (
        ("cannot flush (OS error 28)", "it needs about 1.0 kB"),
        ("cannot open (OS error 13)", "no permission to write in"),
        ("No space left on device", "it needs about 1.0 kB"),
    ):
        with (
            pytest.raises(StorageError, match=f"array cannot be written: {words}"),
            storage_errors(tmp_path / "array", 1000),
        ):
            raise ValueError(text)


def test_errors_with_another_cause_stay_as_they_are(tmp_path: Path) -> None:
    error = ValueError("a mistake of ours")
    with pytest.raises(ValueError, match="of ours") as raised, storage_errors(tmp_path / "file", 1):
        raise error
    assert raised.value is error


def test_the_outer_of_two_paths_is_reported(tmp_path: Path) -> None:
    """A checkpoint needs the space of all its files, not that of the last one."""
    with (
        pytest.raises(StorageError, match=r"checkpoint cannot be written: .*about 2\.0 MB"),
        storage_errors(tmp_path / "checkpoint", 2_000_000),
        storage_errors(tmp_path / "array", 1000),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_nothing_is_set_aside_over_another(tmp_path: Path) -> None:
    names = []
    for content in "abc":
        (tmp_path / "file").write_text(content)
        names.append(set_aside(tmp_path / "file", "damaged").name)
    assert names == ["file.damaged", "file.damaged-2", "file.damaged-3"]
    assert [(tmp_path / name).read_text() for name in names] == ["a", "b", "c"]
    (tmp_path / "file").touch()
    (tmp_path / "file.damaged-4").symlink_to(tmp_path / "nowhere")
    assert set_aside(tmp_path / "file", "damaged").name == "file.damaged-5"


def test_nothing_depends_on_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "flaxnets"
    assert write_cache(cache_directory() / "deep" / "file", "content")
    assert (tmp_path / "flaxnets" / "deep" / "file").read_text() == "content"
    assert not write_cache(cache_directory() / "deep" / "file" / "below", "content")


def test_tables_are_written_in_full_precision(tmp_path: Path) -> None:
    rows = [{"kind": "a,b", "error": 1 / 3}, {"kind": "é", "error": None}]
    write_csv(tmp_path / "table.csv", ("kind", "error"), rows)
    assert (tmp_path / "table.csv").read_bytes().decode() == (
        'kind,error\n"a,b",0.3333333333333333\né,\n'
    )
