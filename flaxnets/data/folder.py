"""Data sets from folders of pictures, with a sub-folder for each class."""

import hashlib
import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flaxnets.data.checks import Check, cache_path, check_pictures
from flaxnets.data.stream import StreamedDataset
from flaxnets.errors import FallbackWarning, InputError
from flaxnets.files import write_cache

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TEST_FOLDERS = ("test", "val", "validation")
GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L")
# Pictures in other formats are not read, but they are counted in warnings and errors.
OTHER_SUFFIXES = (
    *(".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl"),
    *(".pgm", ".ppm", ".psd", ".svg", ".tga", ".tif", ".tiff"),
)
NAMED_IN_AN_ERROR = 10
NAMED_COPIES = 3

# Paths of pictures, relative to the data set's folder, by class.
Files = dict[str, list[str]]


@dataclass(frozen=True, eq=False, repr=False)
class FileSource:
    """A source of pictures in files.

    Attributes:
      root: folder of the pictures.
      names: paths of the pictures, relative to `root`.
      labels: int32 `(n,)`.
      digests: digests of their content, from when they were checked.
    """

    root: str
    names: tuple[str, ...]
    labels: np.ndarray
    digests: tuple[str, ...]

    def __repr__(self) -> str:
        return f"FileSource({len(self):,} pictures in {self.root!r})"

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        try:
            with open(self.name(index), "rb") as file:
                return file.read(), int(self.labels[index])
        except OSError as error:
            raise InputError(
                f"{self.name(index)} cannot be read ({error.strerror}); replace or remove it"
            ) from error

    def name(self, index: int) -> str:
        """Return the path of a picture."""
        return os.path.join(self.root, self.names[index])

    def fingerprint(self) -> str:
        """Return a sha256 over names, labels and the content that was checked.

        Raises:
          InputError: a file no longer exists.
        """
        digest = hashlib.sha256()
        entries = zip(self.names, self.labels, self.digests, strict=True)
        for index, (name, label, content) in enumerate(entries):
            if not os.path.exists(self.name(index)):
                raise InputError(f"{self.name(index)} is gone; rerun without it")
            digest.update(b"%s\0%d\0%s\0" % (os.fsencode(name), label, content.encode()))
        return digest.hexdigest()


def find_folder(
    path: str | Path,
    skip_unreadable: bool = False,
    test_fraction: float = 0.2,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> StreamedDataset:
    """Create a data set from the pictures in `path`, which has one of two layouts::

        path/train/<class>/*.jpg and path/test/<class>/*.jpg (or val, or validation)
        path/<class>/*.jpg

    JPEG, PNG, WebP and BMP files are read, with suffixes in either case. Other and hidden files are
    ignored. In the second layout `test_fraction` of each class becomes the test split, chosen by
    the files' names alone. Every picture is decoded once to check it, and again only when its size
    or modification time has changed. Warnings report pictures that are left out, and copies of
    training pictures in the test split.

    Args:
      skip_unreadable: skip pictures that cannot be read, and list them in `skipped`.
      on_progress: called now and then with the number of checked pictures and the total.

    Raises:
      InputError: the folder does not exist or has another layout, there are fewer than two classes,
        a class has no pictures, training and test have different classes, or pictures cannot be
        read.
    """
    root = Path(path)
    if not os.path.exists(root):
        raise InputError(f"there is no folder {path}; give one with a sub-folder for each class")
    if not os.path.isdir(root):
        raise InputError(f"{path} is a file; give a folder with a sub-folder for each class")
    if not 0 < test_fraction < 1:
        raise InputError(f"test_fraction must be above 0 and below 1, not {test_fraction}")

    test_folder = _test_folder(root)
    folders = ["."] if test_folder is None else ["train", test_folder]
    if test_folder is not None:
        _refuse_loose_pictures(root)
    splits = [_find_files(root, folder) for folder in folders]
    if test_folder is not None:
        _refuse_different_classes(root, test_folder, *splits)

    _warn_of_other_pictures(root, folders, splits)
    splits, checks, skipped = _check(root, splits, skip_unreadable, on_progress)
    train, test = splits if test_folder is not None else _divide(root, splits[0], test_fraction)
    _warn_of_copies(root, train, test, checks)
    grey = all(check.mode in GREY_MODES for check in checks.values() if not check.reason)
    return StreamedDataset(
        name=root.resolve().name,
        version="files",
        class_names=tuple(train),
        train=_source(root, train, checks),
        test=_source(root, test, checks),
        channels=1 if grey else 3,
        skipped=skipped,
    )


def _test_folder(root: Path) -> str | None:
    """Return the name of the test split's folder, or None if the class folders are in `root`."""
    folders = _sub_folders(root)
    # A class may be called train.
    if "train" not in folders or not _sub_folders(root / "train"):
        return None
    for name in TEST_FOLDERS:
        if name in folders:
            return name
    raise InputError(
        f"{root} has a folder train but none called {', '.join(TEST_FOLDERS[:-1])} or "
        f"{TEST_FOLDERS[-1]}; add one, or give {root / 'train'} to split it"
    )


def _find_files(root: Path, folder: str) -> Files:
    _refuse_loose_pictures(root / folder)
    names = _sub_folders(root / folder)
    if len(names) < 2:
        raise InputError(
            f"{root / folder} has {len(names) or 'no'} class folder{'s' * (len(names) != 1)} with "
            "pictures; give one with a sub-folder for each of at least two classes"
        )
    files = {}
    for name in names:
        place = root / folder / name
        pictures = _pictures(place)
        if not pictures:
            problem = f"the class folder {place} has no pictures in it ({', '.join(SUFFIXES)})"
            if other := _count_suffixes(place):
                raise InputError(f"{problem}, only {other}; convert them or remove it")
            if deeper := _folders_with_pictures(place):
                raise InputError(
                    f"{problem}, only in folders below it, such as {deeper[0]}; "
                    "move them up into the class folder"
                )
            raise InputError(f"{problem}; put some there or remove it")
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


def _check(
    root: Path,
    splits: list[Files],
    skip_unreadable: bool,
    on_progress: Callable[[int, int], None],
) -> tuple[list[Files], dict[str, Check], tuple[str, ...]]:
    """Return the readable files, the checks of all files, and the names of unreadable ones."""
    names = [name for files in splits for members in files.values() for name in members]
    checks = check_pictures(root, names, on_progress)
    unreadable = tuple(name for name in names if checks[name].reason)
    if unreadable:
        named = [f"{name} ({checks[name].reason})" for name in unreadable]
        problem = f"{len(named)} of {len(names)} pictures in {root} cannot be read"
        listed = ", ".join(named[:NAMED_IN_AN_ERROR])
        if len(named) > NAMED_IN_AN_ERROR:
            listed += f" and {len(named) - NAMED_IN_AN_ERROR} more"
            path = cache_path(root, "-unreadable.txt")
            if write_cache(path, b"".join(os.fsencode(line) + b"\n" for line in named)):
                listed += f" (all are listed in {path})"
        if not skip_unreadable:
            raise InputError(
                f"{problem}: {listed}; "
                "replace them, remove them, or skip them with --skip-unreadable"
            )
        warnings.warn(f"{problem} and are skipped: {listed}", FallbackWarning, stacklevel=3)
    readable = [
        {
            label: [name for name in members if not checks[name].reason]
            for label, members in files.items()
        }
        for files in splits
    ]
    for files in readable:
        for label, members in files.items():
            if not members:
                raise InputError(
                    f"none of the pictures of class {label} in {root} can be read; "
                    "replace them or remove the class"
                )
    return readable, checks, unreadable


def _warn_of_copies(root: Path, train: Files, test: Files, checks: dict[str, Check]) -> None:
    """Warn of training pictures in the test split, which make the test error too low."""
    seen = {checks[name].digest: name for names in train.values() for name in names}
    tested = [name for names in test.values() for name in names]
    copies = [(name, seen[checks[name].digest]) for name in tested if checks[name].digest in seen]
    unique = len({checks[name].digest for name in tested})
    if not copies and unique == len(tested):
        return
    found = []
    if copies:
        named = ", ".join(f"{name} is {other}" for name, other in copies[:NAMED_COPIES])
        also = "is also a training picture" if len(copies) == 1 else "are also training pictures"
        found.append(f"{len(copies)} of {len(tested)} test pictures {also} ({named})")
    if unique < len(tested):
        found.append(f"only {unique} of {len(tested)} test pictures are different files")
    warnings.warn(
        f"{root}: {'; '.join(found)}; remove the copies for an honest test error",
        FallbackWarning,
        stacklevel=3,
    )


def _divide(root: Path, files: Files, test_fraction: float) -> tuple[Files, Files]:
    """Split each class into training and test pictures, in the same proportion."""
    train, test = {}, {}
    for label, names in files.items():
        if len(names) < 2:
            raise InputError(
                f"{root} has 1 picture of class {label}, which cannot be split into training and "
                "test; add more pictures or remove the class"
            )
        # Hashes order the names independently of the other files and of the folder's location.
        order = sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
        count = min(max(round(test_fraction * len(names)), 1), len(names) - 1)
        test[label], train[label] = sorted(order[:count]), sorted(order[count:])
    return train, test


def _warn_of_other_pictures(root: Path, folders: list[str], splits: list[Files]) -> None:
    """Warn of pictures that are not read: other formats, or folders below class folders."""
    places = [
        root / folder / name
        for folder, files in zip(folders, splits, strict=True)
        for name in files
    ]
    left_out = []
    if other := _count_suffixes(*places):
        left_out.append(f"{other} (only {', '.join(SUFFIXES)} are read)")
    deeper = [place / name for place in places for name in _folders_with_pictures(place)]
    if deeper:
        left_out.append(f"those in folders below a class folder, such as {deeper[0]}")
    if left_out:
        warnings.warn(
            f"pictures in {root} are left out: {'; '.join(left_out)}",
            FallbackWarning,
            stacklevel=3,
        )


def _count_suffixes(*places: Path) -> str:
    """Count the pictures of other formats in these folders: `12 .gif, 3 .tif`."""
    suffixes = [
        os.path.splitext(entry.name)[1].lower() for place in places for entry in _entries(place)
    ]
    counts = Counter(suffix for suffix in suffixes if suffix in OTHER_SUFFIXES)
    return ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(counts.items()))


def _folders_with_pictures(place: Path) -> list[str]:
    return [name for name in _sub_folders(place) if _pictures(place / name)]


def _source(root: Path, files: Files, checks: dict[str, Check]) -> FileSource:
    names = [name for names in files.values() for name in names]
    labels = np.repeat(
        np.arange(len(files), dtype=np.int32), [len(names) for names in files.values()]
    )
    digests = tuple(checks[name].digest for name in names)
    return FileSource(os.path.abspath(root), tuple(names), labels, digests)


def _sub_folders(folder: Path) -> list[str]:
    # `entry.is_dir()` would raise on a link that leads to itself.
    return sorted(entry.name for entry in _entries(folder) if os.path.isdir(entry.path))


def _pictures(folder: Path) -> list[str]:
    return sorted(entry.name for entry in _entries(folder) if _is_picture(entry))


def _entries(folder: Path) -> list[os.DirEntry]:
    """List all entries but hidden ones."""
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
    except OSError:  # a broken link; reading it will raise
        return True
