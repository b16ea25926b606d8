"""experiments/evaluate.py, as a user types it, and its pictures."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import flaxnets
from flaxnets.cli.main import run_command
from flaxnets.data import Preprocess, load_dataset
from flaxnets.data.folder import find_folder
from flaxnets.data.stream import load_in_memory
from flaxnets.reporting.evaluation_figures import draw_confusion, draw_contact_sheet, drop_copies
from flaxnets.reporting.evaluation_tables import write_confusion
from flaxnets.text import shorten
from flaxnets.training.evaluation import compute_logits, evaluate_logits
from flaxnets.training.manifest import write_manifest
from tests.conftest import load_script
from tests.helpers import random_variables

NAMES = tuple("0123456789")


@pytest.fixture(scope="module")
def evaluate():
    """The script."""
    return load_script("evaluate")


@pytest.fixture
def numbers_alone(evaluate, monkeypatch):
    """No pictures, which take most of the time."""
    for name in ("draw_confusion", "draw_mistakes"):
        monkeypatch.setattr(evaluate, name, lambda *_: None)


@pytest.fixture(scope="module")
def trained(study):
    """A finished run, not to be changed."""
    return study.out / "residual-8" / "seed-0"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    """A hundred digits as pictures, sixty to train and forty to test."""
    root = tmp_path_factory.mktemp("pictures")
    for split, rows in (("train", range(60)), ("test", range(60, 100))):
        for row in rows:
            place = root / split / f"{digits.test.labels[row]}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits.test.images[row, ..., 0]).save(place / f"{row:03}.png")
    return root


@pytest.fixture(scope="module")
def weights(trained, tmp_path_factory):
    """PyTorch's weights of the run's network, which takes one channel, and of one that takes
    three."""
    root = tmp_path_factory.mktemp("weights")
    flaxnets.save_torch(
        flaxnets.restore(trained).variables, "cifar_resnet8", root / "grey.safetensors"
    )
    colour = random_variables(flaxnets.create_model("cifar_resnet8"), np.zeros((1, 32, 32, 3)))
    flaxnets.save_torch(colour, "cifar_resnet8", root / "colour.safetensors")
    return root


def command(evaluate, capsys, *arguments):
    """Exit status, what is printed, and what is complained of."""
    status = run_command(evaluate.main, [str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def measured(evaluate, capsys, out, *arguments):
    """evaluation.json of a command that has to succeed."""
    status, _, err = command(evaluate, capsys, *arguments, "--out", out)
    assert (status, err) == (0, "")
    return json.loads((out / "evaluation.json").read_text())


def edit_config(run, **changes):
    """Change the config in the newest checkpoint and put its sha256 right, as a stranger could."""
    path = run / "checkpoints" / "22" / "config" / "metadata"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(config))
    write_manifest(path.parents[1])


def row_of(study, kind):
    with (study.out / "summary.csv").open() as file:
        return next(row for row in csv.DictReader(file) if row["kind"] == kind)


@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.usefixtures("numbers_alone")
def test_errors_are_those_of_the_summary(study, evaluate, capsys, data_dir, tmp_path, kind):
    run, row = study.out / f"{kind}-8" / "seed-0", row_of(study, kind)
    for split, images in (("test", 360), ("train", 1437)):
        out = tmp_path / split
        arguments = [run, "--data-dir", data_dir, "--split", split]
        result = measured(evaluate, capsys, out, *arguments)
        assert str(result["top1_error"]) == row[f"{split}_error"]
        assert result["loss"] == pytest.approx(float(row[f"{split}_loss"]), rel=1e-5)
        assert result["images"] == images
        assert (result["split"], result["dataset"]) == (split, "digits")
        assert (result["run"], result["step"]) == (str(run), 22)


def test_what_is_printed_and_written(evaluate, capsys, run, data_dir):
    status, out, err = command(evaluate, capsys, run, "--data-dir", data_dir)
    assert (status, err) == (0, "")
    place = run / "evaluation-test"
    assert out.splitlines()[0] == f"{run}, checkpoint 22, on digits (test), 360 images"
    assert out.splitlines()[-1].endswith(f"wrong.png: {place}")
    result = json.loads((place / "evaluation.json").read_text())
    lines = [line.split() for line in out.splitlines()]
    assert ["top-1", "error,", "%", f"{result['top1_error']:.2f}"] in lines
    assert ["top-5", "error,", "%", f"{result['top5_error']:.2f}"] in lines
    assert ["loss", f"{result['loss']:.4f}"] in lines
    for entry in result["classes"]:
        assert [entry["class"], str(entry["images"]), f"{entry['accuracy']:.2f}"] in lines

    with (place / "confusion.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["true", *NAMES]
    assert [row[0] for row in rows] == list(NAMES)
    confusion = np.array([row[1:] for row in rows], int)
    assert confusion.sum(1).tolist() == [entry["images"] for entry in result["classes"]]
    assert 100 * (360 - int(confusion.trace())) / 360 == result["top1_error"]
    for name in ("confusion.png", "wrong.png"):
        width, height = Image.open(place / name).size
        assert 500 < width < 3000
        assert 100 < height < 3000
    # Again, and nothing but these files.
    assert command(evaluate, capsys, run, "--data-dir", data_dir)[0] == 0
    assert sorted(path.name for path in place.iterdir()) == sorted(evaluate.FILES)


@pytest.mark.usefixtures("numbers_alone")
def test_the_best_state(evaluate, capsys, run, data_dir, tmp_path):
    shutil.copytree(run / "checkpoints" / "11", run / "best" / "11")
    result = measured(evaluate, capsys, tmp_path / "out", run, "--best", "--data-dir", data_dir)
    assert (result["step"], result["best"]) == (11, True)
    latest = measured(evaluate, capsys, tmp_path / "out", run, "--data-dir", data_dir)
    assert (latest["step"], latest["best"]) == (22, False)
    assert latest["loss"] != result["loss"]


@pytest.mark.usefixtures("numbers_alone")
def test_training_images_are_those_of_the_run(evaluate, capsys, run, data_dir, digits, tmp_path):
    """Of a part of them, and without those held out for validation."""
    part = load_dataset("digits", data_dir, 1000)
    edit_config(run, dataset={"train_examples": 1000, "sha256": part.fingerprint()})
    arguments = [run, "--split", "train", "--data-dir", data_dir]
    first = measured(evaluate, capsys, tmp_path / "out", *arguments)
    held_out = {"train_examples": 1037, "validation_examples": 400}
    edit_config(run, dataset={**held_out, "sha256": digits.fingerprint()})
    second = measured(evaluate, capsys, tmp_path / "out", *arguments)
    assert (first["images"], second["images"]) == (1000, 1037)
    counts = [entry["images"] for entry in second["classes"]]
    np.testing.assert_allclose(counts, np.bincount(digits.train.labels) * 1037 / 1437, atol=1)
    # Data that are named are taken whole.
    whole = measured(evaluate, capsys, tmp_path / "out", *arguments, "--dataset", "digits")
    assert whole["images"] == 1437


def measures(result):
    """Of what is written; the error alone would be the same for many networks."""
    return result["images"], result["top1_error"], pytest.approx(result["loss"], rel=1e-5)


def expected_measures(variables, preprocess, images, labels):
    # The command's own program, so that nothing is compiled twice; test_evaluation.py tests it.
    model = flaxnets.create_model("cifar_resnet8")
    evaluation = evaluate_logits(
        compute_logits(model, variables, preprocess, images, 256), np.asarray(labels)
    )
    return evaluation.count, evaluation.top1_error, evaluation.loss


@pytest.mark.usefixtures("numbers_alone")
def test_a_folder(evaluate, capsys, trained, run, folder, digits, data_dir, tmp_path):
    """Its pictures are the data set's images, so that numbers are those of the images."""
    restored = flaxnets.restore(trained)
    images, labels = digits.test.images[60:100], digits.test.labels[60:100]
    expected = expected_measures(restored.variables, restored.preprocess, images, labels)
    name = f"folder:{folder}"
    result = measured(evaluate, capsys, tmp_path / "out", trained, "--dataset", name)
    assert (result["dataset"], result["images"]) == (name, 40)
    assert measures(result) == expected
    arguments = [trained, "--dataset", name, "--split", "train"]
    assert measured(evaluate, capsys, tmp_path / "out", *arguments)["images"] == 60
    # As the run's own: in memory, streamed, and with pictures held out.
    source = find_folder(folder)
    own = {"name": name, "streamed": True, "sha256": source.fingerprint()}
    edit_config(run, dataset=own)
    result = measured(evaluate, capsys, tmp_path / "out", run)
    assert measures(result) == expected
    edit_config(run, dataset={"validation_examples": 10})
    arguments = [run, "--split", "train"]
    assert measured(evaluate, capsys, tmp_path / "out", *arguments)["images"] == 50
    in_memory = load_in_memory(source, 8, 1.0)
    edit_config(run, dataset={"streamed": False, "sha256": in_memory.fingerprint()})
    assert measures(measured(evaluate, capsys, tmp_path / "out", run)) == expected
    assert measured(evaluate, capsys, tmp_path / "out", *arguments)["images"] == 50
    (folder / "test" / "0").joinpath("new.png").write_bytes(
        next((folder / "test" / "1").iterdir()).read_bytes()
    )
    status, _, err = command(evaluate, capsys, run)
    (folder / "test" / "0" / "new.png").unlink()
    assert status == 2
    assert "is no longer the data this run was trained on" in err


@pytest.mark.usefixtures("numbers_alone")
def test_images_are_made_as_large_as_the_run_takes_them(
    evaluate, capsys, run, digits, data_dir, tmp_path
):
    shape = {"image_shape": [32, 32, 1], "size": 16}
    edit_config(run, preprocess=shape)
    arguments = [run, "--data-dir", data_dir]
    result = measured(evaluate, capsys, tmp_path / "out", *arguments)
    restored = flaxnets.restore(run)
    preprocess = Preprocess((8, 8, 1), restored.preprocess.mean, restored.preprocess.std, size=16)
    expected = expected_measures(restored.variables, preprocess, *digits.test)
    assert measures(result) == expected
    edit_config(run, preprocess={"size": None})
    status, _, err = command(evaluate, capsys, *arguments)
    assert status == 2
    assert "digits has images of 8x8x1, but the network takes 32x32x1" in err


@pytest.mark.usefixtures("numbers_alone")
def test_the_folder_of_a_run_is_named_before_it_is_read(
    evaluate, capsys, run, folder, tmp_path, monkeypatch
):
    """The run may be a stranger's; and by its absolute path, wherever the command is typed."""
    place = tmp_path / "moved"
    shutil.copytree(folder, place)
    fingerprint = find_folder(place).fingerprint()
    own = {"name": "folder:pictures", "path": str(place), "streamed": True}
    edit_config(run, dataset={**own, "sha256": fingerprint})
    read = []
    monkeypatch.setattr(
        "flaxnets.data.opening.find_folder",
        lambda *_, **kw: read.append(capsys.readouterr().out) or stop(),
    )

    def stop():
        raise flaxnets.InputError("enough")

    assert command(evaluate, capsys, run)[0] == 2
    assert read == [f"reading the folder that the run names: {place}\n"]
    monkeypatch.undo()
    place.rename(tmp_path / "elsewhere")
    status, out, err = command(evaluate, capsys, run)
    assert (status, out) == (2, "")
    assert f"trained on were in {place}, which is gone" in err
    assert "--dataset folder:NEW" in err


def test_names_in_a_spreadsheet(tmp_path):
    names = ("=cmd|' /C calc'!A0", "-1", "\x1b[2Jcat", "dog")
    write_confusion(tmp_path / "confusion.csv", np.eye(4, dtype=int), names)
    with (tmp_path / "confusion.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["true", "'=cmd|' /C calc'!A0", "'-1", "?[2Jcat", "dog"]
    assert [row[0] for row in rows] == header[1:]


def test_copies_of_a_picture_are_shown_once():
    images = np.zeros((5, 2, 2, 1), np.uint8)
    images[3], images[4] = 1, 2
    assert drop_copies(images, np.array([4, 2, 0, 1, 3]), 25).tolist() == [4, 2, 3]
    assert drop_copies(images, np.array([4, 2, 0, 1, 3]), 2).tolist() == [4, 2]
    assert drop_copies(images, np.array([], int), 2).tolist() == []


GREY = ((0.485 + 0.456 + 0.406) / 3,), ((0.229 + 0.224 + 0.225) / 3,)
COLOUR = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize(("name", "statistics"), [("grey", GREY), ("colour", COLOUR)])
def test_weights(
    evaluate, capsys, monkeypatch, weights, digits, data_dir, tmp_path, name, statistics
):
    monkeypatch.chdir(tmp_path)
    path = weights / f"{name}.safetensors"
    arguments = [path, "--model", "cifar_resnet8", "--dataset", "digits"]
    status, _, err = command(evaluate, capsys, *arguments, *from_(data_dir))
    assert (status, err) == (0, "")
    place = tmp_path / "runs" / "evaluate" / f"{name}-digits-test"
    assert sorted(file.name for file in place.iterdir()) == sorted(evaluate.FILES)
    result = json.loads((place / "evaluation.json").read_text())
    assert (result["weights"], result["model"]) == (str(path), "cifar_resnet8")
    _, variables = flaxnets.load_torch("cifar_resnet8", path)
    channels = len(statistics[0])
    preprocess = Preprocess((8, 8, channels), *statistics, size=32)
    images = np.repeat(digits.test.images, channels, axis=-1)
    expected = expected_measures(variables, preprocess, images, digits.test.labels)
    assert measures(result) == expected


def from_(data_dir):
    return ["--data-dir", data_dir]


@pytest.mark.usefixtures("numbers_alone")
def test_unreadable_pictures(evaluate, capsys, trained, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "test" / "3" / "text.png").write_text("no picture")
    arguments = [trained, "--dataset", f"folder:{copy}", "--out", tmp_path / "out"]
    status, _, err = command(evaluate, capsys, *arguments)
    assert status == 2
    assert "text.png" in err
    assert "--skip-unreadable" in err
    status, out, err = command(evaluate, capsys, *arguments, "--skip-unreadable")
    assert status == 0
    assert "40 images" in out
    assert f"1 of 101 pictures in {copy} cannot be read and are skipped: test/3/text.png (" in err
    assert err.startswith("warning: ")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("numbers_alone")
def test_weights_on_a_folder(evaluate, capsys, weights, folder, digits, tmp_path):
    """Seven eighths of each picture are looked at, in three channels where the network has them."""
    path = weights / "colour.safetensors"
    arguments = [path, "--model", "cifar_resnet8", "--dataset", f"folder:{folder}"]
    result = measured(evaluate, capsys, tmp_path / "out", *arguments)
    images = []
    for image in digits.test.images[60:100, ..., 0]:
        picture = Image.fromarray(image).convert("RGB")
        crop = picture.resize((32, 32), Image.Resampling.BILINEAR, box=(0.5, 0.5, 7.5, 7.5))
        images.append(np.asarray(crop))
    _, variables = flaxnets.load_torch("cifar_resnet8", path)
    preprocess = Preprocess((32, 32, 3), *COLOUR)
    expected = expected_measures(
        variables, preprocess, np.stack(images), digits.test.labels[60:100]
    )
    assert measures(result) == expected


def test_no_mistakes(evaluate, capsys, monkeypatch, trained, data_dir, digits, tmp_path):
    perfect = 50 * np.eye(10, dtype=np.float32)[digits.test.labels]
    monkeypatch.setattr(evaluate, "compute_logits", lambda *_: perfect)
    result = measured(evaluate, capsys, tmp_path / "out", trained, *from_(data_dir))
    assert (result["top1_error"], result["top5_error"], result["loss"]) == (0, 0, 0)
    assert Image.open(tmp_path / "out" / "wrong.png").size[1] < 200


def test_a_network_that_gives_nan(evaluate, capsys, monkeypatch, trained, data_dir, tmp_path):
    logits = np.full((360, 10), np.nan, np.float32)
    monkeypatch.setattr(evaluate, "compute_logits", lambda *_: logits)
    result = measured(evaluate, capsys, tmp_path / "out", trained, *from_(data_dir))
    assert (result["top1_error"], result["loss"], result["undecided"]) == (100, None, 360)
    status, out, _ = command(evaluate, capsys, trained, *from_(data_dir), "--out", tmp_path / "out")
    assert status == 0
    assert out.split("NaN logits")[1].split()[0] == "360"


def test_many_classes_are_the_worst_and_the_best(evaluate, capsys):
    """Class i of 30 has i of 30 images right, class 30 no image."""
    labels = np.repeat(np.arange(30), 30)
    logits = np.zeros((900, 31), np.float32)
    wrong = np.tile(np.arange(30), 30) >= labels
    logits[np.arange(900), np.where(wrong, (labels + 1) % 30, labels)] = 5
    evaluation = evaluate_logits(logits, labels)
    evaluate.print_evaluation(
        Console(width=80), evaluation, tuple(map("c{}".format, range(31))), ""
    )
    lines = [line.split() for line in capsys.readouterr()[0].splitlines()]
    rows = [line[0] for line in lines if line and line[0].startswith("c") and line[0] != "class"]
    assert rows == [f"c{i}" for i in (*range(10), *range(20, 30))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nowhere", "nowhere is not a run directory"),
        ("{study}", "its runs are"),
        ("{run} --best", "no best checkpoint"),
        ("{run} --split tset", "did you mean test?"),
        ("{run} --model resnet50", "--model is for weights files"),
        ("{run} --skip-unreadable", "--skip-unreadable is for --dataset folder:PATH"),
        ("{run} --dataset digts", "did you mean digits?"),
        ("{run} --dataset folder:/none", "there is no folder /none"),
        ("{run} --dataset folder:{two}", "has 2 classes, but the network has 10"),
        ("{run} --dataset folder:{other}", "'ten' as class 9, but the network has '9'"),
        ("{run} --out {run}/config.json", "config.json is a file"),
        ("{run} --out {run}/config.json/x", "config.json is a file"),
        ("{run} --bets", "unknown argument --bets; did you mean --best?"),
        ("{run}/config.json", "neither a run directory nor .safetensors"),
        ("", "required: RUN_DIR|WEIGHTS"),
        ("{grey}", "needs --model"),
        ("{grey} --model cifar_resnet8", "needs --dataset"),
        ("{grey} --model cifar_resnt8 --dataset digits", "unknown network"),
        ("{grey} --model cifar_resnet20 --dataset digits", "does not fit"),
        ("{grey} --model cifar_resnet8 --dataset digits --best", "--best is for runs"),
        ("none.pth --model resnet18 --dataset digits", "there is no file none.pth"),
        ("{grey} --model cifar_resnet8 --dataset folder:{two}", "2 classes, but {grey} has 10"),
    ],
)
def test_mistakes_are_one_line(
    evaluate, capsys, trained, study, weights, data_dir, digits, tmp_path, arguments, message
):
    for root, names in (("two", "ab"), ("other", (*NAMES[:-1], "ten"))):
        for number, name in enumerate(names):
            (tmp_path / root / name).mkdir(parents=True)
            for i in range(2):
                image = Image.fromarray(digits.test.images[2 * number + i, ..., 0])
                image.save(tmp_path / root / name / f"{i}.png")
    places = {
        "run": trained,
        "study": study.out,
        "grey": weights / "grey.safetensors",
        "two": tmp_path / "two",
        "other": tmp_path / "other",
    }
    if "--out" not in arguments:
        arguments += f" --out {tmp_path / 'out'}"
    words = arguments.format(**places).split()
    status, out, err = command(evaluate, capsys, *words, *from_(data_dir))
    assert status == 2
    assert message.format(**places) in err
    assert err.count("\n") == 1
    assert not out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": None},
        {"dataset": {"name": 7}},
        {"dataset": {"name": "huggingface:mnist"}},
        {"dataset": {"name": "digits\x1b[2J"}},
        {"dataset": {"train_examples": "all"}},
        {"dataset": {"validation_examples": -1}},
    ],
)
def test_a_strangers_config_names_no_data_set(evaluate, capsys, run, data_dir, changes):
    edit_config(run, **changes)
    status, _, err = command(evaluate, capsys, run, *from_(data_dir))
    assert status == 2
    assert err.count("\n") == 1
    assert "names no data set; give --dataset" in err or "its config is invalid (" in err
    assert not (run / "evaluation-test").exists()


def test_names_that_are_too_few(evaluate, capsys, run, folder, tmp_path):
    edit_config(run, class_names=["0", "1"])
    for split in ("train", "test"):
        for name in "01":
            shutil.copytree(folder / split / name, tmp_path / "two" / split / name)
    status, out, err = command(evaluate, capsys, run, "--dataset", f"folder:{tmp_path / 'two'}")
    assert (status, out) == (2, "")
    assert "has 10 classes, but its config names 2" in err


@pytest.mark.usefixtures("numbers_alone")
def test_other_images_than_it_was_trained_with(evaluate, capsys, run, data_dir):
    edit_config(run, dataset={"sha256": "0" * 64})
    status, _, err = command(evaluate, capsys, run, *from_(data_dir))
    assert status == 2
    assert "digits is no longer the data this run was trained on" in err
    assert "give --dataset digits" in err
    assert command(evaluate, capsys, run, *from_(data_dir), "--dataset", "digits")[0] == 0


def test_a_directory_that_cannot_be_written(evaluate, capsys, monkeypatch, trained):
    monkeypatch.setattr("os.access", lambda *_: False)
    status, _, err = command(evaluate, capsys, trained)
    assert status == 2
    assert f"{trained} cannot be written; give another directory" in err


# Pictures.


def confusion_of(classes, share=0.7, images=50):
    rng = np.random.default_rng(0)
    right = (share * images * np.eye(classes)).astype(int)
    wrong = rng.multinomial(images - right[0, 0], np.ones(classes) / classes, size=classes)
    return right + wrong


@pytest.mark.parametrize("classes", [1, 2, 10, 100, 1000])
def test_confusion_of_any_number_of_classes(classes, tmp_path):
    names = [f"class number {i}" for i in range(classes)]
    draw_confusion(confusion_of(classes), names, tmp_path / "c.png", f"{classes} classes")
    width, height = Image.open(tmp_path / "c.png").size
    assert 500 < width < 3000
    assert 400 < height < 3000


def test_names_may_be_anything(tmp_path):
    names = ["$x^{$", "\x1b[2J", "\0\n", "", "猫", "a" * 500, r"\frac", "{}", "%", "<b>"]
    draw_confusion(confusion_of(10), names, tmp_path / "confusion.png", "$x^{$" + 40 * " \x1b long")
    image = np.zeros((8, 8, 3), np.uint8)
    draw_contact_sheet([image] * 10, names, tmp_path / "wrong.png", "$x^{$")
    for name in ("confusion.png", "wrong.png"):
        assert Image.open(tmp_path / name).size[0] < 3000
    assert [shorten(name, 8) for name in names[:6]] == ["$x^{$", "?[2J", "??", "", "猫", "aaaaaaa…"]


def test_places_in_the_confusion_matrix(tmp_path):
    """All of the second class are taken for the first: the cell is below and on the left."""
    draw_confusion(np.array([[0, 0], [9, 0]]), ["a", "b"], tmp_path / "matrix.png", "")
    pixels = np.asarray(Image.open(tmp_path / "matrix.png").convert("RGB")).astype(int)
    dark = np.argwhere(pixels[..., 2] - pixels[..., 0] > 60)
    dark = dark[dark[:, 1] < 0.7 * pixels.shape[1]]  # without the scale's
    row, column = dark.mean(0) / pixels.shape[:2]
    assert 0.55 < row < 0.8
    assert 0.2 < column < 0.45


def test_places_on_the_contact_sheet(tmp_path):
    """Row by row, and upright: the second picture is red above and blue below."""
    pictures = np.full((7, 8, 8, 3), 255, np.uint8)
    pictures[1, :4] = 255, 0, 0
    pictures[1, 4:] = 0, 0, 255
    pictures[6] = 0, 255, 0
    draw_contact_sheet(list(pictures), ["a"] * 7, tmp_path / "sheet.png", "")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    height, width, _ = pixels.shape
    middles = {}
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255)), ("green", (0, 255, 0))):
        places = np.argwhere((pixels == colour).all(-1))
        assert len(places) > 1000
        middles[name] = places.mean(0) / (height, width)
    assert middles["red"][0] < middles["blue"][0] < 0.55 < middles["green"][0]
    assert [middles[name][1] for name in middles] == pytest.approx([0.3] * 3, abs=0.01)
