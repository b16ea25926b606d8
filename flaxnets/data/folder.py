"""Folders of pictures, a sub-folder for each class, as a data set."""

import hashlib
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flaxnets.data.images import open_image
from flaxnets.data.stream import StreamedDataset
from flaxnets.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TEST_FOLDERS = ("test", "val", "validation")
GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L")
NAMED_IN_AN_ERROR = 10
READ_AT_ONCE = 16

# The paths of pictures in the data set's folder, by class.
Files = dict[str, list[str]]


@dataclass(frozen=True, eq=False)
class FileSource:
    """Pictures in files.

    Attributes:
      root: the folder they are in.
      names: their paths in it.
      labels: int32 `(n,)`.
    """

    root: str
    names: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        try:
            with open(self.name(index), "rb") as file:
                return file.read(), int(self.labels[index])
        except OSError as error:
            raise InputError(
                f"{self.name(index)} cannot be read ({error.strerror}); replace it or take it away"
            ) from error

    def name(self, index: int) -> str:
        """The path of a picture."""
        return os.path.join(self.root, self.names[index])

    def fingerprint(self) -> str:
        """sha256 over names, sizes in bytes and labels.

        Raises:
          InputError: a file is no longer there.
        """
        digest = hashlib.sha256()
        for index, (name, label) in enumerate(zip(self.names, self.labels, strict=True)):
            try:
                size = os.stat(self.name(index)).st_size
            except OSError as error:
                raise InputError(
                    f"{self.name(index)} is gone ({error.strerror}); begin again without it"
                ) from error
            digest.update(b"%s\0%d\0%d\0" % (os.fsencode(name), size, label))
        return digest.hexdigest()


def find_folder(
    path: str | Path, skip_unreadable: bool = False, test_fraction: float = 0.2
) -> StreamedDataset:
    """A data set of the pictures in `path`, which has one of two layouts.

        path/train/<class>/*.jpg and path/test/<class>/*.jpg (or val, or validation)
        path/<class>/*.jpg

    JPEG, PNG, WebP and BMP files count, with suffixes in either case; other and hidden files are
    ignored. In the second layout `test_fraction` of each class becomes the test split, chosen by
    the files' names alone. Only the headers are read: damage behind them shows when a picture is
    decoded.

    Args:
      skip_unreadable: leave out pictures that cannot be read, and list them in `skipped`.

    Raises:
      InputError: no such folder, another layout, fewer than two classes, a class without pictures,
        different classes in training and test, or pictures that cannot be read.
    """
    root = Path(path)
    if not os.path.exists(root):
        raise InputError(f"there is no folder {path}; give one with a sub-folder for each class")
    if not os.path.isdir(root):
        raise InputError(f"{path} is a file; give a folder with a sub-folder for each class")
    if not 0 < test_fraction < 1:
        raise InputError(f"test_fraction is above 0 and below 1, not {test_fraction}")

    test_folder = _test_folder(root)
    folders = ["."] if test_folder is None else ["train", test_folder]
    if test_folder is not None:
        _refuse_loose_pictures(root)
    splits = [_find_files(root, folder) for folder in folders]
    if test_folder is not None:
        _refuse_different_classes(root, test_folder, *splits)

    splits, grey, skipped = _read_headers(root, splits, skip_unreadable)
    train, test = splits if test_folder is not None else _divide(root, splits[0], test_fraction)
    return StreamedDataset(
        name=root.resolve().name,
        version="files",
        class_names=tuple(train),
        train=_source(root, train),
        test=_source(root, test),
        channels=1 if grey else 3,
        skipped=skipped,
    )


def _test_folder(root: Path) -> str | None:
    """The name of the test split's folder, or None where classes have their folders in `root`."""
    folders = _sub_folders(root)
    # A class may be called train.
    if "train" not in folders or not _sub_folders(root / "train"):
        return None
    for name in TEST_FOLDERS:
        if name in folders:
            return name
    raise InputError(
        f"{root} has a folder train but none called {', '.join(TEST_FOLDERS[:-1])} or "
        f"{TEST_FOLDERS[-1]}; add one, or give {root / 'train'} to have it divided"
    )


def _find_files(root: Path, folder: str) -> Files:
    _refuse_loose_pictures(root / folder)
    names = _sub_folders(root / folder)
    if len(names) < 2:
        raise InputError(
            f"{root / folder} has {len(names) or 'no'} class folder{'s' * (len(names) != 1)} with "
            "pictures in; give one with a sub-folder for each of two classes or more"
        )
    files = {}
    for name in names:
        pictures = _pictures(root / folder / name)
        if not pictures:
            raise InputError(
                f"the class folder {root / folder / name} has no pictures in it "
                f"({', '.join(SUFFIXES)}); put some there or remove it"
            )
        files[name] = [os.path.normpath(os.path.join(folder, name, file)) for file in pictures]
    return files


def _refuse_loose_pictures(folder: Path) -> None:
    loose = _pictures(folder)
    if loose:
        raise InputError(
            f"{folder} has pictures outside of class folders, such as {loose[0]}; "
            "move each into a folder named after its class"
        )


def _refuse_different_classes(root: Path, test_folder: str, train: Files, test: Files) -> None:
    differences = [
        f"only {folder} has {', '.join(sorted(classes))}"
        for folder, classes in (
            ("train", set(train) - set(test)),
            (test_folder, set(test) - set(train)),
        )
        if classes
    ]
    if differences:
        raise InputError(
            f"{root} has different classes in train and {test_folder}: {'; '.join(differences)}; "
            "give both the same class folders"
        )


def _read_headers(
    root: Path, splits: list[Files], skip_unreadable: bool
) -> tuple[list[Files], bool, tuple[str, ...]]:
    """The readable files, whether all of them are grey, and the names of the unreadable ones."""
    readable: list[Files] = []
    grey = True
    unreadable: dict[str, str] = {}
    total = 0
    with ThreadPoolExecutor(READ_AT_ONCE) as executor:
        for files in splits:
            readable.append({})
            for label, names in files.items():
                # A class at a time, so that Ctrl-C need not wait for all of them.
                headers = executor.map(_read_header, (root / name for name in names))
                kept = readable[-1][label] = []
                for name, (mode, reason) in zip(names, headers, strict=True):
                    if reason:
                        unreadable[name] = reason
                        continue
                    kept.append(name)
                    grey = grey and mode in GREY_MODES
                total += len(names)
    if unreadable and not skip_unreadable:
        named = [f"{name} ({reason})" for name, reason in unreadable.items()]
        more = len(named) - NAMED_IN_AN_ERROR
        raise InputError(
            f"{len(named)} of {total} pictures in {root} cannot be read: "
            f"{', '.join(named[:NAMED_IN_AN_ERROR])}{f' and {more} more' if more > 0 else ''}; "
            "replace them, take them away, or leave them out with --skip-unreadable"
        )
    for files in readable:
        for label, names in files.items():
            if not names:
                raise InputError(
                    f"none of the pictures of class {label} in {root} can be read; "
                    "replace them or remove the class"
                )
    return readable, grey, tuple(unreadable)


def _read_header(path: Path) -> tuple[str, str]:
    """Pillow's mode of a picture, or why it has none."""
    try:
        if not path.stat().st_size:
            return "", "it is empty"
        with open_image(path) as image:
            return image.mode, ""
    except OSError as error:
        return "", error.strerror or "it cannot be opened"
    except ValueError as error:
        return "", str(error)


def _divide(root: Path, files: Files, test_fraction: float) -> tuple[Files, Files]:
    """Training and test split, the same share of each class."""
    train, test = {}, {}
    for label, names in files.items():
        if len(names) < 2:
            raise InputError(
                f"{root} has 1 picture of class {label}, which cannot be divided into training and "
                "test; add more of them or remove the class"
            )
        # In an order that no other file, nor the place of the folder, has a part in.
        order = sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
        count = min(max(round(test_fraction * len(names)), 1), len(names) - 1)
        test[label], train[label] = sorted(order[:count]), sorted(order[count:])
    return train, test


def _source(root: Path, files: Files) -> FileSource:
    names = [name for names in files.values() for name in names]
    labels = np.repeat(
        np.arange(len(files), dtype=np.int32), [len(names) for names in files.values()]
    )
    return FileSource(os.path.abspath(root), tuple(names), labels)


def _sub_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in _entries(folder) if entry.is_dir())


def _pictures(folder: Path) -> list[str]:
    return sorted(entry.name for entry in _entries(folder) if _is_picture(entry))


def _entries(folder: Path) -> list[os.DirEntry]:
    """All but hidden ones."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be read: {error.strerror}") from error


def _is_picture(entry: os.DirEntry) -> bool:
    if not entry.name.lower().endswith(SUFFIXES):
        return False
    if not entry.is_symlink():
        return entry.is_file()
    try:
        return stat.S_ISREG(entry.stat().st_mode)
    except OSError:  # it leads nowhere, and reading it will say so
        return True
