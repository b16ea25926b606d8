import io
import json
import os
import pickle
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flaxnets import InputError
from flaxnets.data.checks import cache_path
from flaxnets.data.folder import FileSource, find_folder
from flaxnets.data.images import _check_pixels, check_picture
from flaxnets.data.stream import Source
from flaxnets.errors import FallbackWarning

pytestmark = pytest.mark.unit


def save(path: Path, colour=(200, 30, 90), size=(9, 7), mode="RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)
    return path


def make_classes(
    folder: Path, classes=("cat", "dog", "eel"), number=10, suffix=".png", **options: Any
) -> Path:
    for label in classes:
        for i in range(number):
            save(folder / label / f"{i}{suffix}", **options)
    return folder


def noise(size: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    return Image.fromarray(pixels)


def make_splits(folder: Path, test="test", **options: Any) -> Path:
    make_classes(folder / "train", **options)
    make_classes(folder / test, **{**options, "number": 2})
    return folder


def labels_of(source: Source) -> np.ndarray:
    assert source.labels is not None
    return source.labels


def names_of(source: Source) -> tuple[str, ...]:
    assert isinstance(source, FileSource)
    return source.names


@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_a_folder_with_a_split(tmp_path, test):
    dataset = find_folder(make_splits(tmp_path / "pets", test))
    assert dataset.name == "pets"
    assert dataset.class_names == ("cat", "dog", "eel")
    assert dataset.num_classes == 3
    assert dataset.channels == 3
    assert dataset.skipped == ()
    assert (len(dataset.train), len(dataset.test)) == (30, 6)
    assert labels_of(dataset.train).dtype == np.int32
    assert labels_of(dataset.train).tolist() == [0] * 10 + [1] * 10 + [2] * 10
    path = tmp_path / "pets" / test / "dog" / "1.png"
    assert dataset.test[3] == (path.read_bytes(), 1)
    assert dataset.test.name(3) == str(path)


def test_test_is_preferred_to_val(tmp_path):
    make_classes(make_splits(tmp_path) / "val", number=5)
    assert len(find_folder(tmp_path).test) == 6


def test_a_folder_without_a_split_is_divided(tmp_path):
    make_classes(tmp_path, ("b", "a"), 20)
    make_classes(tmp_path, ("c",), 2)
    dataset = find_folder(tmp_path)
    assert dataset.class_names == ("a", "b", "c")
    assert np.bincount(labels_of(dataset.train)).tolist() == [16, 16, 1]
    assert np.bincount(labels_of(dataset.test)).tolist() == [4, 4, 1]
    assert not set(names_of(dataset.train)) & set(names_of(dataset.test))
    assert len(find_folder(tmp_path, test_fraction=0.5).test) == 21


def test_the_division_depends_on_names_alone(tmp_path):
    first = find_folder(make_classes(tmp_path / "first"))
    moved = find_folder(make_classes(tmp_path / "second", colour=(1, 2, 3)))
    assert names_of(moved.test) == names_of(first.test)
    # Of another class nothing depends on.
    make_classes(tmp_path / "first", ("fox",))
    larger = find_folder(tmp_path / "first")
    assert set(names_of(first.test)) < set(names_of(larger.test))
    # Fixed for ever: runs are continued with it.
    assert names_of(first.test) == (
        "cat/0.png",
        "cat/8.png",
        "dog/5.png",
        "dog/7.png",
        "eel/1.png",
        "eel/7.png",
    )


def test_which_files_count(tmp_path):
    make_splits(tmp_path, number=1)
    cats = tmp_path / "train" / "cat"
    for name in ("a.JPG", "b.Jpeg", "c.webp", "d.BMP", "e e.png", "f\u00e9.png"):
        save(cats / name)
    save(cats / ".hidden.png")
    save(cats / "deeper" / "a.png")
    (cats / "notes.txt").write_text("no picture")
    (cats / "a.png").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "README").write_text("no picture")
    found = names_of(find_folder(tmp_path).train)
    names = [Path(name).name for name in found if "cat" in name]
    assert sorted(names) == sorted(
        ["0.png", "a.JPG", "b.Jpeg", "c.webp", "d.BMP", "e e.png", "f\u00e9.png"]
    )


def test_pipes_and_links(tmp_path):
    cats = make_classes(tmp_path) / "cat"
    expected = len(find_folder(tmp_path).train)
    os.mkfifo(cats / "pipe.png")
    (cats / "link-to-pipe.png").symlink_to("pipe.png")
    (cats / "folder.png").symlink_to(tmp_path)
    assert len(find_folder(tmp_path).train) == expected
    (tmp_path / "fox").symlink_to("dog")
    (cats / "linked.png").symlink_to("0.png")
    dataset = find_folder(tmp_path)
    assert dataset.class_names == ("cat", "dog", "eel", "fox")
    (cats / "broken.png").symlink_to("nothing.png")
    (cats / "endless.png").symlink_to("endless.png")
    with pytest.raises(InputError, match=r"2 of 43 pictures .*broken.png \(No such file"):
        find_folder(tmp_path)


@pytest.mark.parametrize(
    ("modes", "channels"), [(("L", "1"), 1), (("L", "LA"), 1), (("L", "P"), 3), (("L", "RGB"), 3)]
)
def test_channels(tmp_path, modes, channels):
    for label, mode in zip("ab", modes, strict=True):
        make_classes(tmp_path, (label,), 3, mode=mode)
    assert find_folder(tmp_path).channels == channels


def test_16_bits_are_grey(tmp_path):
    make_classes(tmp_path, number=2, mode="L")
    Image.fromarray(np.zeros((5, 5), np.uint16)).save(tmp_path / "cat" / "deep.png")
    assert find_folder(tmp_path).channels == 1


def damage(folder: Path) -> list[str]:
    cats = folder / "cat"
    (cats / "empty.png").touch()
    (cats / "text.jpg").write_text("no picture")
    data = save(cats / "header.jpg").read_bytes()
    (cats / "header.jpg").write_bytes(data[:30])
    save(cats / "tiff.png", format="tiff")
    return sorted(f"cat/{name}" for name in ("empty.png", "text.jpg", "header.jpg", "tiff.png"))


def test_unreadable_pictures_are_listed(tmp_path):
    damage(make_classes(tmp_path))
    with pytest.raises(InputError) as caught:
        find_folder(tmp_path)
    message = str(caught.value)
    assert message.startswith(
        f"4 of 34 pictures in {tmp_path} cannot be read: cat/empty.png (it is "
    )
    assert "cat/text.jpg (not a JPEG, PNG, WebP or BMP picture)" in message
    assert "--skip-unreadable" in message
    assert "\n" not in message


def test_unreadable_pictures_are_skipped(tmp_path):
    names = damage(make_classes(tmp_path))
    dataset = find_folder(tmp_path, skip_unreadable=True)
    assert sorted(dataset.skipped) == names
    assert len(dataset.train) + len(dataset.test) == 30


def test_a_long_list_is_cut(tmp_path):
    make_classes(tmp_path)
    for i in range(25):
        (tmp_path / "dog" / f"bad{i:02}.png").touch()
    with pytest.raises(
        InputError, match=r"bad09.png \(it is empty\) and 15 more \(all are .*; replace"
    ) as caught:
        find_folder(tmp_path)
    assert "bad10" not in str(caught.value)


def test_unreadable_pictures_are_all_listed_in_a_file(tmp_path):
    make_classes(tmp_path)
    for i in range(25):
        (tmp_path / "dog" / os.fsdecode(b"\xff%02d.png" % i)).touch()
    with pytest.raises(InputError) as caught:
        find_folder(tmp_path)
    path = re.search(r"all are listed in (\S+)\)", str(caught.value))
    assert path
    lines = Path(path[1]).read_bytes().splitlines()
    assert lines == [b"dog/\xff%02d.png (it is empty)" % i for i in range(25)]


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def half_and_zeros(data: bytes) -> bytes:
    return half(data) + bytes(len(data) - len(half(data)))


def few_rows(data: bytes) -> bytes:
    """A PNG in good order but for its height."""
    header = struct.pack(">II", 9, 13_000) + data[24:29]
    checksum = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return data[:16] + header + checksum + data[33:]


def other_pixel(data: bytes) -> bytes:
    """Pillow does not look at the checksum of a PNG's pixels."""
    place = data.index(b"IDAT") + 4
    length = int.from_bytes(data[place - 8 : place - 4], "big")
    pixels = bytearray(zlib.decompress(data[place : place + length]))
    pixels[5] ^= 255
    packed = zlib.compress(pixels)[:-4] + data[place + length - 4 : place + length]
    return data[: place - 8] + len(packed).to_bytes(4, "big") + b"IDAT" + packed + bytes(4) + END


END = b"\0\0\0\0IEND\xaeB`\x82"


@pytest.mark.parametrize(
    ("suffix", "damage", "options"),
    [
        ("jpg", half, {}),
        ("jpg", half_and_zeros, {}),
        ("jpg", half, {"progressive": True}),
        ("png", half, {}),
        ("png", few_rows, {}),
        ("png", other_pixel, {}),
        ("webp", half, {}),
        ("bmp", half, {}),
    ],
)
def test_damage_behind_the_header_is_found(tmp_path, suffix, damage, options):
    make_classes(tmp_path)
    noise = np.random.RandomState(0).randint(0, 256, (30, 40, 3)).astype(np.uint8)
    path = tmp_path / "cat" / f"noise.{suffix}"
    Image.fromarray(noise).save(path, **options)
    find_folder(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        InputError, match=rf"1 of 31 pictures in .* cat/noise.{suffix} \("
    ) as caught:
        find_folder(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.warns(FallbackWarning, match=r"cannot be read and are skipped: cat/noise"):
        assert find_folder(tmp_path, skip_unreadable=True).skipped == (f"cat/noise.{suffix}",)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 9), (33, 17)])
def test_whole_pngs_of_every_kind_are_taken(mode, size):
    noise = np.random.RandomState(0).randint(0, 256, (*size[::-1], 3)).astype(np.uint8)
    image = Image.fromarray(noise)
    image = image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)
    file = io.BytesIO()
    image.save(file, "png")
    check_picture(file.getvalue())


def test_interlaced_pngs(tmp_path):
    """Made here, since Pillow writes none: 5 x 9 grey pixels in seven parts."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    parts = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2))
    rows = b""
    for left, top, across, down in (*parts, (0, 1, 1, 2)):
        columns, lines = len(range(left, 5, across)), len(range(top, 9, down))
        rows += lines * (b"\0" + columns * b"x") if columns else b""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 9, 8, 0, 0, 0, 1))
    for pixels, whole in ((rows, True), (rows[:-1], False)):
        png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels)) + END
        if whole:
            check_picture(png)
        else:
            with pytest.raises(ValueError, match=r"it has only 9. % of its pixels"):
                _check_pixels(png)


def test_pictures_are_decoded_once(tmp_path, monkeypatch):
    decoded = []

    def check(data):
        decoded.append(data)
        return check_picture(data)

    monkeypatch.setattr("flaxnets.data.checks.check_picture", check)
    monkeypatch.setattr("flaxnets.data.checks.CHECKED_TOGETHER", 7)
    make_classes(tmp_path)
    done = []
    first = find_folder(tmp_path, on_progress=lambda *numbers: done.append(numbers))
    assert done == [(7, 30), (14, 30), (21, 30), (28, 30), (30, 30)]
    assert len(decoded) == 30
    again = find_folder(tmp_path)
    assert len(decoded) == 30
    assert again.fingerprint() == first.fingerprint()
    save(tmp_path / "cat" / "0.png", size=(90, 70))
    os.utime(tmp_path / "dog" / "0.png", ns=(0, 0))
    find_folder(tmp_path)
    assert len(decoded) == 32
    # Whatever is in the cache, and where it cannot be written.
    cache = cache_path(tmp_path, ".json")
    content = json.loads(cache.read_text())
    content["pictures"]["cat/0.png"][0] = None
    for damaged in (b"", b"[]", b"[" * 10**5, b"\xff", json.dumps(content).encode()):
        cache.write_bytes(damaged)
        decoded.clear()
        find_folder(tmp_path)
        assert len(decoded) == 30
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cat" / "0.png"))
    for _ in range(2):
        decoded.clear()
        find_folder(tmp_path)
        assert len(decoded) == 30


def test_an_interrupted_check_continues(tmp_path, monkeypatch):
    monkeypatch.setattr("flaxnets.data.checks.CHECKED_TOGETHER", 7)

    def interrupt(done, total):
        if done == 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_folder(make_classes(tmp_path), on_progress=interrupt)
    assert len(json.loads(cache_path(tmp_path, ".json").read_text())["pictures"]) == 14


def test_pictures_that_are_left_out_are_counted(tmp_path):
    make_classes(tmp_path, ("cat", "dog"))
    for name in ("a.gif", "b.GIF", "c.tif", "notes.txt", ".d.gif"):
        (tmp_path / "cat" / name).touch()
    save(tmp_path / "dog" / "deeper" / "a.png")
    with pytest.warns(FallbackWarning) as caught:
        find_folder(tmp_path)
    (message,) = (str(w.message) for w in caught if "left out" in str(w.message))
    assert "left out: 2 .gif, 1 .tif (only .jpg, .jpeg, .png, .webp, .bmp are read); " in message
    assert message.endswith(f"those in folders below a class folder, such as {tmp_path}/dog/deeper")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.gif", r"fox has no pictures in it .*, only 1 .gif; convert them or remove it"),
        ("deep/a.png", r"only in folders below it, such as deep; move them up into the class"),
    ],
)
def test_classes_of_other_pictures(tmp_path, name, message):
    path = make_classes(tmp_path) / "fox" / name
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(InputError, match=message):
        find_folder(tmp_path)


def test_copies_of_training_pictures_are_named(tmp_path):
    for split, colours in (("train", (1, 2)), ("test", (1, 3, 3))):
        for label in range(2):
            for i, colour in enumerate(colours):
                save(tmp_path / split / "ab"[label] / f"{i}.png", (colour, label, 0))
    with pytest.warns(FallbackWarning) as caught:
        find_folder(tmp_path)
    (warning,) = caught
    assert str(warning.message) == (
        f"{tmp_path}: 2 of 6 test pictures are also training pictures (test/a/0.png is "
        "train/a/0.png, test/b/0.png is train/b/0.png); only 4 of 6 test pictures are different "
        "files; remove the copies for an honest test error"
    )


def test_names_that_are_no_utf_8(tmp_path):
    """Of classes and of files."""
    make_classes(tmp_path, ("cat",))
    odd = make_classes(tmp_path, (os.fsdecode(b"d\xf6g"),)) / os.fsdecode(b"d\xf6g")
    os.rename(odd / "0.png", odd / os.fsdecode(b"\xff.png"))
    with pytest.warns(FallbackWarning, match=r"test pictures are also training pictures") as caught:
        first, again = find_folder(tmp_path), find_folder(tmp_path)
    assert all(str(warning.message).isprintable() for warning in caught)
    assert first.class_names == ("cat", "d\udcf6g")
    assert first.fingerprint() == again.fingerprint()


def test_a_class_of_unreadable_pictures(tmp_path):
    make_classes(tmp_path, ("cat", "dog"))
    (tmp_path / "eel").mkdir()
    (tmp_path / "eel" / "0.png").touch()
    with pytest.raises(InputError, match=r"none of the pictures of class eel .* can be read"):
        find_folder(tmp_path, skip_unreadable=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may read everything")
def test_forbidden_files_and_folders(tmp_path):
    make_classes(tmp_path)
    (tmp_path / "cat" / "0.png").chmod(0)
    with pytest.raises(InputError, match=r"cat/0.png \(Permission denied\)"):
        find_folder(tmp_path)
    (tmp_path / "cat").chmod(0)
    with pytest.raises(InputError, match="cat cannot be read: Permission denied"):
        find_folder(tmp_path)
    (tmp_path / "cat").chmod(0o700)


def no_class_folders(root):
    save(root / "a.png")


def one_class(root):
    make_classes(root, ("cat",))


def empty_class(root):
    make_classes(root)
    (root / "fox").mkdir()


def loose(root):
    make_classes(root)
    save(root / "a.png")


def loose_in_train(root):
    make_splits(root)
    save(root / "train" / "a.png")


def loose_beside_train(root):
    make_splits(root)
    save(root / "a.png")


def no_test(root):
    make_classes(root / "train")


def no_train(root):
    make_classes(root / "test")


def other_classes(root):
    make_splits(root)
    make_classes(root / "train", ("fox",))
    make_classes(root / "test", ("gnu", "hen"))


def single_picture(root):
    make_classes(root)
    save(root / "fox" / "0.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_class_folders, "has pictures outside of class folders, such as a.png; move each"),
        (one_class, "has 1 class folder .*for each of at least two classes"),
        (lambda root: None, "has no class folders .*for each of at least two classes"),
        (
            empty_class,
            r"the class folder .*fox has no pictures in it .*put some there or remove it",
        ),
        (loose, "has pictures outside of class folders, such as a.png"),
        (loose_in_train, "train has pictures outside of class folders"),
        (loose_beside_train, "has pictures outside of class folders"),
        (no_test, "a folder train but none called test, val or validation; add one"),
        (no_train, "has 1 class folder with pictures; give one"),
        (
            other_classes,
            r"only train has fox; only test has gnu, hen; give both the same class folders",
        ),
        (single_picture, "1 picture of class fox, which cannot be split"),
    ],
)
def test_other_layouts_are_refused(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        find_folder(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_other_paths_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"there is no folder .*nowhere; give one"):
        find_folder(tmp_path / "nowhere")
    with pytest.raises(InputError, match="there is no folder"):
        find_folder(tmp_path / (1000 * "long"))
    with pytest.raises(InputError, match=r"a.png is a file; give a folder"):
        find_folder(save(tmp_path / "a.png"))
    for fraction in (0, 1, -1, float("nan")):
        with pytest.raises(InputError, match="test_fraction must be above 0 and below 1"):
            find_folder(make_classes(tmp_path / "b"), test_fraction=fraction)


def test_a_class_may_be_called_train(tmp_path):
    dataset = find_folder(make_classes(tmp_path, ("boat", "train")))
    assert dataset.class_names == ("boat", "train")


def test_fingerprint(tmp_path):
    def fingerprint(folder=tmp_path / "a", **options):
        return find_folder(folder, **options).fingerprint()

    cats = make_classes(tmp_path / "a") / "cat"
    before = fingerprint()
    assert before == fingerprint(make_classes(tmp_path / "b"))  # wherever it is
    assert before != fingerprint(test_fraction=0.5)
    save(cats / "0.png", size=(90, 70))
    larger = fingerprint()
    assert larger != before
    (cats / "0.png").rename(cats / "10.png")
    renamed = fingerprint()
    assert renamed not in (before, larger)
    (tmp_path / "a" / "cat").rename(tmp_path / "a" / "kitten")
    assert fingerprint() not in (before, larger, renamed)


def test_files_that_are_gone_are_named(tmp_path):
    dataset = find_folder(make_splits(tmp_path))
    (tmp_path / "train" / "cat" / "0.png").unlink()
    with pytest.raises(InputError, match=r"train/cat/0.png cannot be read \(No such file"):
        dataset.train[0]
    with pytest.raises(InputError, match=r"train/cat/0.png is gone"):
        dataset.fingerprint()


def test_sources_can_be_pickled_and_do_not_follow_the_working_directory(tmp_path, monkeypatch):
    make_splits(tmp_path / "pets")
    monkeypatch.chdir(tmp_path)
    source = pickle.loads(pickle.dumps(find_folder("pets").train))
    monkeypatch.chdir("/")
    assert source[0][0] == (tmp_path / "pets/train/cat/0.png").read_bytes()


def test_other_pictures_of_equal_size_are_other_data(tmp_path):
    """A run may be resumed where its folder has moved, but not on other pictures."""
    one = find_folder(make_classes(tmp_path / "one", suffix=".bmp"))
    same = find_folder(make_classes(tmp_path / "same", suffix=".bmp"))
    other = find_folder(make_classes(tmp_path / "other", suffix=".bmp", colour=(1, 2, 3)))
    assert names_of(one.train) == names_of(other.train)
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_half_of_a_picture_of_a_phone(share):
    """MPO: a JPEG, and another one behind it."""
    picture, file = noise(64), io.BytesIO()
    picture.save(file, "MPO", save_all=True, append_images=[picture])
    data = file.getvalue()
    assert check_picture(data) == "RGB"
    end = int(share * len(data) / 2)
    with pytest.raises(ValueError, match="it ends before its last pixel"):
        check_picture(data[:end] + bytes(len(data) - end))


def test_a_png_of_an_unknown_kind():
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    png = bytearray(file.getvalue())
    png[25] = 5  # of the colours
    with pytest.raises(ValueError, match="its header is damaged"):
        _check_pixels(bytes(png))
