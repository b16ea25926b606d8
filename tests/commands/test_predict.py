"""experiments/predict.py, as a user types it."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import flaxnets
from flaxnets.cli.main import run_command
from flaxnets.decoding import encode
from flaxnets.training.manifest import write_manifest
from tests.conftest import load_script


@pytest.fixture(scope="module")
def predict():
    return load_script("predict")


@pytest.fixture(scope="module")
def trained(study):
    """A finished run, not to be changed."""
    return study.out / "residual-8" / "seed-0"


@pytest.fixture(scope="module")
def pictures(digits, tmp_path_factory):
    """Three test images as pictures: grey, in colour, and in the middle of a wide one."""
    root = tmp_path_factory.mktemp("pictures")
    first, second, third = (Image.fromarray(image[..., 0]) for image in digits.test.images[:3])
    first.save(root / "first.png")
    second.convert("RGB").save(root / "second.bmp")
    wide = Image.new("L", (16, 8))
    wide.paste(third, (4, 0))
    wide.save(root / "third.png")
    return [root / "first.png", root / "second.bmp", root / "third.png"]


def command(predict, capsys, *arguments):
    status = run_command(predict.main, [str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def parse(out):
    """{picture: [[class, probability], ...]} of what is printed."""
    found, rows = {}, []
    for line in out.splitlines():
        words = line.split()
        if len(words) == 1 and "." in line:
            rows = found[words[0]] = []
        elif len(words) == 2 and words[1] != "%" and "─" not in line:
            rows.append(words)
    return found


def probabilities_of(trained, images):
    run = flaxnets.restore(trained)
    logits = jax.jit(run.model.apply)(run.variables, run.preprocess(images))
    return 100 * np.asarray(jax.nn.softmax(logits))


def test_probabilities(predict, capsys, trained, pictures, digits):
    """Each picture is the data set's image again, and gets what the network gives that image."""
    status, out, err = command(predict, capsys, trained, *pictures)
    assert (status, err) == (0, "")
    found = parse(out)
    assert list(found) == [str(picture) for picture in pictures]
    expected = probabilities_of(trained, digits.test.images[:3])
    for rows, row in zip(found.values(), expected, strict=True):
        assert [int(name) for name, _ in rows] == np.argsort(-row)[:5].tolist()
        assert [float(p) for _, p in rows] == pytest.approx(np.sort(row)[::-1][:5], abs=0.006)


def test_as_much_of_a_picture_as_was_evaluated(predict, capsys, trained, digits, tmp_path):
    """Seven eighths after training on crops of streamed pictures."""
    run = shutil.copytree(trained, tmp_path / "run")
    config = flaxnets.restore(run).config
    edit_config(
        run,
        dataset={**encode(config.dataset), "streamed": True},
        recipe={**encode(config.recipe), "augment": "resized-crop"},
    )
    picture = Image.fromarray(digits.test.images[0, ..., 0]).resize((64, 64))
    picture.save(tmp_path / "large.png")
    status, out, err = command(predict, capsys, run, tmp_path / "large.png")
    assert status == 0, err
    seen = picture.resize((8, 8), Image.Resampling.BILINEAR, box=(4, 4, 60, 60))
    row = probabilities_of(trained, np.asarray(seen)[None, ..., None])[0]
    rows = parse(out)[str(tmp_path / "large.png")]
    assert [float(p) for _, p in rows] == pytest.approx(np.sort(row)[::-1][:5], abs=0.006)


def test_how_many_classes_are_shown(predict, capsys, trained, pictures):
    for top, shown in (("1", 1), ("3", 3), ("50", 10)):
        _, out, _ = command(predict, capsys, trained, pictures[0], "--top", top)
        assert len(parse(out)[str(pictures[0])]) == shown


def test_the_best_state(predict, capsys, trained, pictures, digits, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(run / "checkpoints" / "11", run / "best" / "11")
    status, out, _ = command(predict, capsys, run, pictures[0], "--best")
    assert status == 0
    shutil.rmtree(run / "checkpoints" / "22")
    row = probabilities_of(run, digits.test.images[:1])[0]
    rows = parse(out)[str(pictures[0])]
    assert [float(p) for _, p in rows] == pytest.approx(np.sort(row)[::-1][:5], abs=0.006)


@pytest.fixture
def unreadable(pictures, tmp_path):
    """No picture, half of one, a folder, one that is not there, and one that cannot be."""
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "half.png").write_bytes(pictures[0].read_bytes()[:60])
    (tmp_path / "folder").mkdir()
    return [*(tmp_path / name for name in ("text.png", "half.png", "folder", "gone.jpg")), "a\0b"]


def test_every_picture_that_cannot_be_read_is_named(predict, capsys, trained, unreadable):
    status, out, err = command(predict, capsys, trained, *unreadable)
    assert status == 2
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 5
    for line, path in zip(lines[:4], unreadable[:4], strict=True):
        assert line.startswith(f"error: {path} cannot be read: ")
    assert "not a JPEG, PNG, WebP or BMP picture" in lines[0]
    assert "directory" in lines[2]
    assert "No such file" in lines[3]
    assert lines[4].startswith("error: a?b cannot be read")


def test_readable_pictures_are_classified_beside_unreadable_ones(
    predict, capsys, trained, pictures, unreadable
):
    _, expected, _ = command(predict, capsys, trained, *pictures)
    first, second, third = pictures
    mixed = [unreadable[0], first, *unreadable[1:3], second, third, *unreadable[3:]]
    status, out, err = command(predict, capsys, trained, *mixed)
    assert status == 1
    assert out == expected
    assert [line.split(":")[0] for line in err.splitlines()] == ["error"] * 5


def test_help_lists_the_exit_statuses(predict, capsys):
    with pytest.raises(SystemExit, match="0"):
        predict.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("Classify pictures with a trained network.") == 1
    assert "1 if only some of the pictures could be read" in out


def edit_config(run, **changes):
    path = run / "checkpoints" / "22" / "config" / "metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    write_manifest(path.parents[1])


def test_names_that_are_too_few(predict, capsys, trained, pictures, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    edit_config(run, class_names=["a", "b"])
    status, out, err = command(predict, capsys, run, pictures[0])
    assert (status, out) == (2, "")
    assert "has 10 classes, but its config names 2" in err


def test_names_that_would_move_the_cursor(predict, capsys, trained, pictures, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    edit_config(run, class_names=[f"\x1b[{i}J\r" for i in range(10)])
    status, out, _ = command(predict, capsys, run, pictures[0])
    assert status == 0
    assert "\x1b" not in out
    assert "\r" not in out


def test_a_network_that_gives_nan(predict, capsys, monkeypatch, trained, pictures):
    logits = np.full((1, 10), np.nan)
    monkeypatch.setattr(predict, "compute_logits", lambda *_: logits)
    status, out, err = command(predict, capsys, trained, pictures[0])
    assert (status, out) == (2, "")
    assert "its training diverged" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "a.png"], "nowhere is not a run directory"),
        (["{run}"], "required: image"),
        ([], "required: RUN_DIR, image"),
        (["{run}", "a.png", "--top", "0"], "above 0"),
        (["{run}", "a.png", "--best"], "no best checkpoint"),
        (["{run}", "a.png", "--tpo", "3"], "did you mean --top?"),
    ],
)
def test_mistakes_are_one_line(predict, capsys, trained, arguments, message):
    arguments = [argument.format(run=trained) for argument in arguments]
    status, out, err = command(predict, capsys, *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not out
