import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flaxnets import InputError
from flaxnets.data.folder import find_folder


def save(path: Path, colour=(200, 30, 90), size=(9, 7), mode="RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)
    return path


def make_classes(folder: Path, classes=("cat", "dog", "eel"), number=10, **options) -> Path:
    for label in classes:
        for i in range(number):
            save(folder / label / f"{i}.png", **options)
    return folder


def make_splits(folder: Path, test="test", **options) -> Path:
    make_classes(folder / "train", **options)
    make_classes(folder / test, **options | {"number": 2})
    return folder


@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_a_folder_with_a_split(tmp_path, test):
    dataset = find_folder(make_splits(tmp_path / "pets", test))
    assert dataset.name == "pets"
    assert dataset.class_names == ("cat", "dog", "eel")
    assert dataset.num_classes == 3
    assert dataset.channels == 3
    assert dataset.skipped == ()
    assert (len(dataset.train), len(dataset.test)) == (30, 6)
    assert dataset.train.labels.dtype == np.int32
    assert dataset.train.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
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
    assert np.bincount(dataset.train.labels).tolist() == [16, 16, 1]
    assert np.bincount(dataset.test.labels).tolist() == [4, 4, 1]
    assert not set(dataset.train.names) & set(dataset.test.names)
    assert len(find_folder(tmp_path, test_fraction=0.5).test) == 21


def test_the_division_depends_on_names_alone(tmp_path):
    first = find_folder(make_classes(tmp_path / "first"))
    moved = find_folder(make_classes(tmp_path / "second", colour=(1, 2, 3)))
    assert moved.test.names == first.test.names
    # Of another class nothing depends on.
    make_classes(tmp_path / "first", ("fox",))
    larger = find_folder(tmp_path / "first")
    assert set(first.test.names) < set(larger.test.names)
    # Fixed for ever: runs are continued with it.
    assert first.test.names == (
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
    names = [Path(name).name for name in find_folder(tmp_path).train.names if "cat" in name]
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
        InputError, match=r"bad09.png \(it is empty\) and 15 more; replace"
    ) as caught:
        find_folder(tmp_path)
    assert "bad10" not in str(caught.value)


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
        (one_class, "has 1 class folder .*for each of two classes or more"),
        (lambda root: None, "has no class folders .*for each of two classes or more"),
        (
            empty_class,
            r"the class folder .*fox has no pictures in it .*put some there or remove it",
        ),
        (loose, "has pictures outside of class folders, such as a.png"),
        (loose_in_train, "train has pictures outside of class folders"),
        (loose_beside_train, "has pictures outside of class folders"),
        (no_test, "a folder train but none called test, val or validation; add one"),
        (no_train, "has 1 class folder with pictures in"),
        (
            other_classes,
            r"only train has fox; only test has gnu, hen; give both the same class folders",
        ),
        (single_picture, "1 picture of class fox, which cannot be divided"),
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
        with pytest.raises(InputError, match="test_fraction is above 0 and below 1"):
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
