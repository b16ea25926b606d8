"""The command that trains one network, as a user types it."""

import csv
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import flaxnets
from flaxnets.cli.main import run_command
from flaxnets.studies.single import plan_run
from flaxnets.training import RECIPES, checkpoints
from flaxnets.training.manifest import write_manifest
from tests.processes import ROOT, assert_same_run, finish, start

COMMAND = (sys.executable, ROOT / "experiments" / "train.py")
SMALL = (
    "--model",
    "cifar_resnet8",
    "--epochs",
    "3",
    "--augment",
    "none",
    "--checkpoint-every",
    "5steps",
)


@pytest.fixture(scope="session")
def pictures(digits, tmp_path_factory):
    """A folder of real digits, 0 to 2, as pictures of several sizes and kinds."""
    folder = tmp_path_factory.mktemp("pictures")
    for split, (images, labels), most in (("train", digits.train, 50), ("test", digits.test, 15)):
        for label in range(3):
            place = folder / split / f"class {label}"
            place.mkdir(parents=True)
            for i, image in enumerate(images[labels == label][:most]):
                picture = Image.fromarray(image[..., 0]).resize((16 + i % 5, 18), 2)
                picture.convert("RGB" if i % 2 else "L").save(
                    place / f"{i}.{('png', 'jpg', 'bmp')[i % 3]}", quality=95
                )
    return folder


@pytest.fixture
def command(train, data_dir, tmp_path, monkeypatch, capsys):
    """Run the command in this process, in an empty working directory: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = run_command(train.main, [*map(str, arguments), "--data-dir", str(data_dir)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def trained(train, data_dir, tmp_path_factory):
    """A finished run with validation. Not to be changed."""
    out = tmp_path_factory.mktemp("trained") / "out"
    arguments = [*SMALL, "--validation", "300", "--data-dir", str(data_dir), "--out", str(out)]
    assert run_command(train.main, arguments) == 0
    return out, arguments


def rows_of(out):
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run(trained, digits):
    out, _ = trained
    rows = rows_of(out)
    assert [row["step"] for row in rows] == ["8", "16", "24"]  # (1437 - 300) // 128 an epoch
    assert float(rows[-1]["test_error"]) < 60
    with Image.open(out / "errors.png") as figure:
        assert figure.size == (1024, 672)
    run = flaxnets.restore(out)
    assert run.step == 24
    images, labels = digits.test
    logits: Any = run.model.apply(run.variables, run.preprocess(images))
    wrong = int((np.argmax(logits, -1) != labels).sum())
    assert 100 * wrong / len(labels) == float(rows[-1]["test_error"])


def test_the_best_checkpoint_is_that_of_the_lowest_validation_error(trained, digits):
    out, _ = trained
    errors = [float(row["validation_error"]) for row in rows_of(out)]
    best = flaxnets.restore(out, which="best")
    assert best.step == 8 * (1 + int(np.argmin(errors)))
    # The very images that it was not trained on.
    config = json.loads((out / "config.json").read_text())
    assert config["dataset"]["validation_examples"] == 300
    from flaxnets.data.stream import hold_out

    _, rows = hold_out(digits.train.labels, 300)
    logits: Any = best.model.apply(best.variables, best.preprocess(digits.train.images[rows]))
    wrong = int((np.argmax(logits, -1) != digits.train.labels[rows]).sum())
    assert 100 * wrong / 300 == min(errors)


@pytest.fixture(scope="module")
def streamed(train, pictures, tmp_path_factory):
    """The same from pictures that are read anew each epoch, with crops, mirror images and noise."""
    out = tmp_path_factory.mktemp("streamed") / "out"
    arguments = ["--model", "cifar_resnet8", "--dataset", f"folder:{pictures}", "--stream"]
    arguments += ["--image-size", "16", "--batch-size", "16", "--validation", "20"]
    arguments += ["--augment", "resized-crop", "--colour-noise", "0.1", "--epochs", "3"]
    arguments += ["--checkpoint-every", "5steps", "--out", str(out)]
    assert run_command(train.main, arguments) == 0
    return out, arguments


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", ["trained", pytest.param("streamed", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_bit_for_bit(request, train, tmp_path, monkeypatch, kind):
    """Killed once its first and its second epoch have been measured."""
    import flaxnets.training.loop as loop

    out, arguments = request.getfixturevalue(kind)
    arguments = [*arguments[:-1], str(tmp_path / "out")]
    for epochs in (1, 2):
        with monkeypatch.context() as patch:
            write = loop.write_metrics

            def killed(directory, rows, columns, epochs=epochs, write=write):
                write(directory, rows, columns)
                if len(rows) == epochs:
                    raise Killed

            patch.setattr(loop, "write_metrics", killed)
            with pytest.raises(Killed):
                train.main(arguments)
    assert run_command(train.main, arguments) == 0
    assert_same_run(tmp_path / "out", out)
    best = [flaxnets.restore(place, which="best") for place in (out, tmp_path / "out")]
    assert best[0].step == best[1].step
    jax.tree.map(np.testing.assert_array_equal, *(run.variables for run in best))


def test_a_damaged_best_state_is_named_and_set_aside(trained, command, tmp_path):
    out = shutil.copytree(trained[0], tmp_path / "run")
    (state,) = (out / "best").iterdir()
    (state / "variables" / "_METADATA").write_text("changed")
    with pytest.raises(flaxnets.InputError, match=r"best.*variables/_METADATA has been changed"):
        flaxnets.restore(out, which="best")
    status, printed, err = command(*trained[1][:-4], "--out", out)
    assert status == 0
    assert "variables/_METADATA has been changed" in err
    assert "the state with the lowest validation error" in err
    assert "is lost" in err
    assert "(that state is lost); " in printed
    with pytest.raises(
        flaxnets.InputError, match=r"has lost its best state: best/ has no checkpoint"
    ):
        flaxnets.restore(out, which="best")
    assert (out / "best" / f"{state.name}.damaged" / "variables" / "_METADATA").exists()


def test_the_best_state_of_another_run_is_set_aside(trained, command, tmp_path):
    """Without its checkpoints a directory takes another seed, but not the old run's best state,
    though its step may be higher."""
    out = shutil.copytree(trained[0], tmp_path / "run")
    (state,) = (out / "best").iterdir()
    shutil.copytree(state, out / "best" / "old")
    shutil.rmtree(out / "checkpoints")
    status, _, err = command(*trained[1][:-4], "--out", out, "--seed", "1")
    assert status == 0
    assert f"{out}/best/{state.name} is set aside: its config is another run's" in err
    assert (out / "best" / f"{state.name}.other").is_dir()
    best = flaxnets.restore(out, which="best")
    assert best.config.seed == 1
    errors = [float(row["validation_error"]) for row in rows_of(out)]
    assert best.step == 8 * (1 + int(np.argmin(errors)))
    shutil.rmtree(out / "best" / str(best.step))
    (out / "best" / "old").rename(out / "best" / state.name)
    with pytest.raises(flaxnets.InputError, match=r"best.*its config is another run's"):
        flaxnets.restore(out, which="best")


def put_link(path):
    path.unlink()
    path.symlink_to("/etc/hostname")


def put_pipe(path):
    path.unlink()
    os.mkfifo(path)


HARMS = {
    "a bit": lambda path: path.write_bytes(
        bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]
    ),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "deleted": lambda path: path.unlink(),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "a link": put_link,
    "a pipe": put_pipe,
    "a neighbour": lambda path: path.with_name("more").touch(),
    "renamed": lambda path: path.rename(path.with_name("other")),
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS.keys())
def test_damage_to_any_file_of_the_best_state_is_found(trained, tmp_path, monkeypatch, harm):
    monkeypatch.setattr(checkpoints, "SECONDS_BETWEEN_LOOKS", 0)
    (state,) = (trained[0] / "best").iterdir()
    paths = sorted(path.relative_to(state) for path in state.rglob("*") if path.is_file())
    assert len(paths) > 20
    for path in paths:
        copy = shutil.copytree(state, tmp_path / "best" / state.name)
        harm(copy / path)
        with checkpoints.Checkpoints(tmp_path, read_only=True, name="best") as best:
            assert best.step is None, path
            assert f"best state {state.name} of {tmp_path} is damaged" in best.damage[0]
        shutil.rmtree(copy)


def other_record(best):
    """As if of another run of the same config, with its sha256 put right."""
    path = best / "progress" / "metadata"
    progress = json.loads(path.read_text())
    progress["rows"][0]["train_loss" if "train_loss" in progress["rows"][0] else "test_loss"] += 1
    path.write_text(json.dumps(progress))


def no_record(best):
    (best / "progress" / "metadata").write_text("[]")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_record, "its record is another run's"),
        (no_record, "its record of the run is invalid"),
    ],
)
def test_a_best_state_with_another_record_is_refused(trained, command, tmp_path, change, reason):
    out = shutil.copytree(trained[0], tmp_path / "run")
    (state,) = (out / "best").iterdir()
    change(state)
    write_manifest(state)
    with pytest.raises(flaxnets.InputError, match=reason):
        flaxnets.restore(out, which="best")
    status, printed, err = command(*trained[1][:-4], "--out", out)
    assert status == 0
    assert f"{state} is set aside: " in err
    assert reason in err
    assert "(that state is lost); " in printed
    assert [path.name for path in (out / "best").iterdir()] == [f"{state.name}.other"]


def test_a_finished_run_is_not_trained_again(trained, command, monkeypatch):
    out, arguments = trained
    (environment,) = json.loads((out / "environment.json").read_text())
    assert environment["device_count"] == 1
    monkeypatch.setenv("PJRT_NPROC", "99")
    before = (out / "metrics.csv").read_bytes()
    status, printed, _ = command(*arguments[:-4], "--out", out)
    assert status == 0
    assert "cifar_resnet8 seed 0: test error" in printed
    assert (out / "metrics.csv").read_bytes() == before
    assert json.loads((out / "environment.json").read_text()) == [environment]


def test_another_run_is_refused(trained, command):
    out, arguments = trained
    status, _, err = command(*arguments[:-4], "--out", out, "--learning-rate", "0.5")
    assert status == 2
    assert "recipe.learning_rate is 0.001 there and 0.5 here" in err
    assert f"use --out {out}-2" in err


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--in-memory", "--stream"])
def test_a_folder_of_pictures(pictures, command, tmp_path, how):
    """Trained, and then fine-tuned with one class fewer: the backbone is kept, the head is new."""
    arguments = (*SMALL, "--batch-size", "32", "--image-size", "16", how)
    status, printed, err = command(*arguments, "--dataset", f"folder:{pictures}", "--out", "first")
    assert status == 0, err
    assert "150 images" in printed
    assert "3 classes" in printed
    first = flaxnets.restore("first")
    assert first.class_names == ("class 0", "class 1", "class 2")
    assert len(rows_of(tmp_path / "first")) == 3

    two = tmp_path / "two"
    shutil.copytree(pictures, two)
    for split in ("train", "test"):
        shutil.rmtree(two / split / "class 1")
    status, printed, err = command(
        *arguments, "--dataset", f"folder:{two}", "--init-from", "first", "--freeze-backbone",
        "--out", "second",
    )  # fmt: skip
    assert status == 0, err
    second = flaxnets.restore("second")
    assert second.preprocess == first.preprocess
    assert second.variables["params"]["head"]["kernel"].shape == (64, 2)
    for name in ("params", "batch_stats"):
        for part in first.variables[name]:
            if part != "head":
                jax.tree.map(
                    np.testing.assert_array_equal,
                    first.variables[name][part],
                    second.variables[name][part],
                )


@pytest.mark.slow
def test_weights_to_start_from_that_are_gone_or_others(trained, command, tmp_path):
    """A run that has begun does not need them; another seed's of the same step are others."""
    shutil.copytree(trained[0], tmp_path / "source")
    arguments = (*SMALL[:2], "--steps", "1", "--init-from", "source", "--out", "out")
    assert command(*arguments)[0] == 0
    origin = json.loads((tmp_path / "out" / "config.json").read_text())["init_from"]
    assert re.fullmatch("[0-9a-f]{64}", origin["digest"])
    (tmp_path / "source").rename(tmp_path / "elsewhere")
    assert command(*arguments)[0] == 0
    shutil.copytree(trained[0], tmp_path / "source")
    checkpoint = tmp_path / "source" / "checkpoints" / "24"
    shutil.rmtree(checkpoint)  # an older one of the same run has other weights
    status, _, err = command(*arguments)
    assert status == 2
    assert "init_from.digest is" in err


@pytest.mark.slow
def test_pytorch_weights_are_a_start(command, tmp_path, data_dir):
    model = flaxnets.create_model("cifar_resnet8", num_classes=7)
    from tests.helpers import random_variables

    variables = random_variables(model, np.zeros((1, 8, 8, 1), np.float32))
    flaxnets.save_torch(variables, "cifar_resnet8", tmp_path / "w.safetensors", num_classes=7)
    status, _, err = command(*SMALL, "--steps", "1", "--epochs", "1", "--dry-run")
    assert status == 2
    assert "give either steps or epochs" in err
    status, _, err = command(
        "--model", "cifar_resnet8", "--steps", "1", "--init-from", "w.safetensors",
        "--freeze-backbone", "--out", "out",
    )  # fmt: skip
    assert status == 0, err
    run = flaxnets.restore("out")
    np.testing.assert_array_equal(
        run.variables["params"]["conv1"]["kernel"], variables["params"]["conv1"]["kernel"]
    )
    assert run.variables["params"]["head"]["bias"].shape == (10,)
    assert run.preprocess.mean == pytest.approx((0.449,))


@pytest.mark.slow
def test_early_stopping_and_a_plateau(command, tmp_path):
    """Training at a rate of almost nothing, errors do not fall after the first epoch; the rate is
    halved after each epoch without a lower loss."""
    status, printed, err = command(
        "--model", "cifar_resnet8", "--learning-rate", "1e-12", "--patience", "2", "--epochs", "9",
        "--augment", "none", "--weight-decay", "0", "--schedule", "plateau",
        "--plateau-patience", "1", "--decay-factor", "0.5", "--out", "out",
    )  # fmt: skip
    assert status == 0, err
    rows = rows_of(tmp_path / "out")
    errors = [float(row["validation_error"]) for row in rows]
    assert len(rows) == 3 + int(np.argmin(errors))
    assert len(rows) < 9
    assert "at the lowest validation error" in printed
    rate, lowest = 1e-12, np.inf
    for row in rows:
        assert float(row["learning_rate"]) == pytest.approx(rate, rel=1e-5, abs=0)
        loss = float(row["validation_loss"])
        rate, lowest = (rate, loss) if loss < lowest - 1e-4 else (rate / 2, lowest)
    assert rate < 1e-12
    best = flaxnets.restore("out", which="best")
    assert best.step == int(rows[int(np.argmin(errors))]["step"])
    assert best.step < int(rows[-1]["step"])


@pytest.mark.slow
def test_divergence(command):
    status, printed, _ = command(
        "--model", "cifar_plain8", "--optimizer", "sgd", "--learning-rate", "1e30", "--epochs", "2",
        "--validation", "100", "--out", "out", "--warmup", "0",
    )  # fmt: skip
    assert status == 0
    assert "diverged at step" in printed
    assert "try a lower --learning-rate" in printed


def test_depth_is_not_read_from_a_name(train, data_dir):
    """A warm-up for networks of depth 110 and more is not for AlexNet, of the year 2012."""
    arguments = ["--model", "alexnet2012", "--recipe", "he2015-cifar", "--image-size", "224"]
    options = train.parse_arguments([*arguments, "--data-dir", str(data_dir)])
    run = plan_run(options.settings, options.out)
    assert run.config.depth == 8
    schedule: Any = run.config.recipe.make_schedule(64_000, run.config.depth)
    assert float(schedule(0)) == pytest.approx(0.1)


def test_a_folder_that_has_moved(command, pictures, tmp_path, capsys):
    """Its run is the same, resumed or measured; what it was called then is no longer there."""
    shutil.copytree(pictures, tmp_path / "pictures")
    arguments = ["--model", "cifar_resnet8", "--image-size", "8", "--steps", "2"]
    arguments += ["--batch-size", "10", "--out", "run"]
    status, out, _ = command(*arguments, "--dataset", "folder:pictures", "--patience", "3")
    assert status == 0
    assert out.startswith(
        "cifar_resnet8, 0.07 M parameters, on folder:pictures (in memory): 3 classes, 135 images "
        "of 8x8x3 to train, 15 to validate (a tenth, by default), 45 to test; "
        "recipe adam, 2 updates of 10 images\n"
    )
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["dataset"]["path"] == str(tmp_path / "pictures")
    metrics = (tmp_path / "run" / "metrics.csv").read_bytes()

    (tmp_path / "pictures").rename(tmp_path / "elsewhere")
    status, _, err = command(*arguments, "--dataset", "folder:elsewhere", "--patience", "3")
    assert (status, err) == (0, "")
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == metrics
    next((tmp_path / "elsewhere" / "train" / "class 0").iterdir()).unlink()
    status, _, err = command(*arguments, "--dataset", "folder:elsewhere", "--patience", "3")
    assert status == 2
    assert "holds another run (dataset." in err


def test_help_says_what_each_field_of_a_recipe_is(command, capsys):
    with pytest.raises(SystemExit):
        command("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "fraction of the run spent on warm-up" in text
    assert "holds out a tenth of the training images" in text


def test_recipes_are_listed(command):
    status, printed, _ = command("--list-recipes")
    assert status == 0
    assert all(name in printed for name in RECIPES)
    assert "arXiv:1512.03385, section 4.2" in printed


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("", "--model is required"),
        ("--model resnet19", "has depths 18, 34"),
        ("--model cifar_resnet1204", "only networks of up to 1202 layers"),
        ("--model cifar_resnet8 --recipe he2015-cifer", "did you mean he2015-cifar?"),
        ("--model cifar_resnet8 --dataset folder:nowhere", "nowhere"),
        ("--model cifar_resnet8 --dataset mnits", "mnist"),
        ("--model cifar_resnet8 --optimizer lion", "--optimizer must be one of sgd, adam"),
        ("--model cifar_resnet8 --nesterov yes", "--nesterov must be one of true, false"),
        ("--model cifar_resnet8 --decay-at 0.5,x", "--decay-at '0.5,x' is not a number such as"),
        ("--model cifar_resnet8 --learning-rate -1", "learning_rate must be above 0"),
        ("--model cifar_resnet8 --learning-rate nan", "--learning-rate 'nan' is not a number"),
        ("--model cifar_resnet8 --epochs 0", "--epochs and --steps"),
        ("--model cifar_resnet8 --batch-size 2000", "more than the 1437 training images"),
        ("--model cifar_resnet8 --validation 1437", "there are 1437 training images"),
        ("--model cifar_resnet8 --evaluate-every 0", "not a whole number above 0"),
        (
            "--model cifar_resnet8 --evaluate-every 2 --validation 9",
            "--evaluate-every 2 is for runs without validation images",
        ),
        (
            "--model cifar_resnet8 --evaluate-every 2 --patience 3",
            "--evaluate-every 2 is for runs without validation images",
        ),
        (
            "--model cifar_resnet8 --evaluate-every 2 --schedule plateau",
            "--evaluate-every 2 is for runs without validation images",
        ),
        ("--model cifar_resnet8 --freeze-backbone", "--freeze-backbone needs --init-from"),
        ("--model cifar_resnet8 --init-from nowhere", "there is no such run directory or file"),
        ("--model cifar_resnet8 --stream --in-memory", "exclude each other"),
        ("--model cifar_resnet8 --skip-unreadable", "--skip-unreadable is for"),
        ("--model cifar_resnet8 --seed -1", "--seed must be"),
        ("--model cifar_resnet8 --lerning-rate 1", "did you mean --learning-rate?"),
        ("--model alexnet --image-size 20", "too small"),
        ("--model cifar_resnet8 --image-size 0", "image_size must be from 4"),
        ("--model cifar_resnet8 --decay-factor -1", "decay_factor must be above 0"),
        ("--model cifar_resnet8 --lr 0.1", "did you mean --learning-rate?"),
        ("--model resnet20", "did you mean cifar_resnet20?"),
        ("--model cifar_resnet8 --out .", "holds something that is not a run"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(command, tmp_path, arguments, problem):
    (tmp_path / "something").touch()
    status, _, err = command(*arguments.split())
    assert status == 2
    assert problem in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


def events(directory):
    """Every scalar in the event files as TensorBoard shows them: (name, step, value). A process
    that goes on says from which step those of earlier ones no longer count."""
    event_pb2: Any = pytest.importorskip("tensorboardX.proto.event_pb2")

    scalars = []
    for path in sorted(directory.glob("events*"), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            if event.session_log.status == event_pb2.SessionLog.START:
                scalars = [scalar for scalar in scalars if scalar[1] < event.step]
            scalars += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            data = data[12 + length + 4 :]
    return scalars


@pytest.mark.slow
def test_tensorboard_has_the_metrics(command, train, tmp_path, monkeypatch):
    """Of every epoch once, also of one that was not measured yet when its step was saved."""
    pytest.importorskip("tensorboardX")
    arguments = ("--model", "cifar_resnet8", "--steps", "22", "--out", "out", "--tensorboard")

    def stopped(self):
        return bool(self.unsaved) and steps[-1] == 22

    steps = [0]
    with monkeypatch.context() as patch:
        update = train.StudyProgress.start_run

        def start_run(self, *args):
            run = update(self, *args)
            see = run.update
            run.update = lambda now, **kw: (steps.append(now.step), see(now, **kw))
            return run

        patch.setattr(train.StudyProgress, "start_run", start_run)
        patch.setattr(train.Interruption, "requested", stopped)
        patch.setattr(train.Interruption, "exit_status", 130)
        command(*arguments)
    assert [row["step"] for row in rows_of(tmp_path / "out")] == ["11"]
    for _ in range(2):  # the second time, there is nothing left to train
        status, _, err = command(*arguments)
        assert status == 0, err
        rows = rows_of(tmp_path / "out")
        assert [row["step"] for row in rows] == ["11", "22"]
        scalars = events(tmp_path / "out" / "tensorboard")
        for name in ("test_error", "running_train_loss", "learning_rate"):
            found = [(step, value) for tag, step, value in scalars if tag == name]
            expected = [(int(row["step"]), float(row[name])) for row in rows]
            np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_with_worker_processes(streamed, tmp_path, number):
    """By a signal, with two processes that read pictures: nothing is left running, and the same
    command ends as the run that was left alone and read in threads."""
    out, arguments = streamed
    out2 = tmp_path / "out"
    command = [*COMMAND, *arguments[:-1], out2, "--data-workers", "2"]
    process = start(*command)
    while not (out2 / "metrics.csv").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert "stopped and saved; continue with: python" in err
    status, _, err = finish(*command)
    assert status == 0, err
    assert_same_run(out2, out)
    assert not subprocess.run(
        ["pgrep", "-f", str(out2)], capture_output=True, text=True, check=False
    ).stdout
