"""The commands of README.md and docs/, typed one after the other as they stand there, with tiny
recipes.

Each has to work after those before it: one that trains in a directory of theirs may be refused.
"""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from flaxnets.cli.main import run_command
from flaxnets.data import datasets
from flaxnets.training import RECIPES
from tests.conftest import load_script
from tests.pages import TEXTS, block

COMMAND = re.compile(r"python experiments/(\w+)\.py([^`#\n]*)|\$ rm (\S+)")
# Depths that compile quickly stand for those of the pages.
DEPTHS = {"18": "8", "34": "10", "56": "12"}
# They compare with other libraries for minutes, or need a second machine.
NOT_TYPED = {"benchmark", "benchmark_stream", "count_kernels", "torch_study", "digits_grid"}
# What would take long, and is looked at without training.
PLANNED = ("--dataset cifar10", "--image-size 96")


def shrink(script, arguments):
    for depth, small in DEPTHS.items():
        arguments = re.sub(rf"\b{depth}\b", small, arguments)
    arguments = re.sub(r"--epochs \d+", "--epochs 1", arguments)
    arguments = re.sub(r"--steps \d+", "--steps 2", arguments)
    arguments = re.sub(r"--validation \d+", "--validation 20", arguments)
    words = shlex.split(arguments)
    if any(part in arguments for part in PLANNED):
        words.append("--dry-run")
    if script == "train" and "mnist" in arguments:
        words += ["--image-size", "28"]  # which its images have, and the digits in their place not
    if script == "diagnostics":
        words += ["--images", "32", "--batch", "16", "--epochs", "1"]
    return words


@pytest.fixture
def place(tmp_path, monkeypatch, data_dir, digits):
    """An empty working directory, with what a reader would have: pictures, and other data sets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    for name, recipe in RECIPES.items():
        if recipe.schedule != "plateau":
            small = replace(recipe, steps=2, epochs=None, batch_size=64, image_size=None)
            monkeypatch.setitem(RECIPES, name, small)
    find = datasets._builder

    def builder(name, *rest):
        return find("digits" if name in ("cifar10", "mnist", "fashion_mnist") else name, *rest)

    monkeypatch.setattr(datasets, "_builder", builder)
    images, labels = digits.train
    for folder, classes in (("pictures", 3), ("two", 2)):
        for label in range(classes):
            directory = tmp_path / folder / f"{label}"
            directory.mkdir(parents=True)
            for i, image in enumerate(images[labels == label]):
                Image.fromarray(image[..., 0]).convert("RGB").save(directory / f"{i}.png")
    (tmp_path / "pictures" / "2").rename(tmp_path / "pictures" / "dog")
    Image.fromarray(images[0, ..., 0]).save(tmp_path / "ship.jpg")
    (tmp_path / "my_nets.py").write_text(block("def build("))
    return tmp_path


@pytest.mark.slow
def test_every_command_works_after_those_before_it(place, capsys):
    typed, broken = [], Path("pictures/dog/broken.jpg")
    for script, arguments, removed in COMMAND.findall("\n".join(TEXTS.values())):
        if removed:
            Path(removed).unlink()
            continue
        if script in NOT_TYPED or "--distributed" in arguments or ".pth" in arguments:
            continue
        if "fashion_mnist" in arguments:  # the last one before a picture is shown to be broken
            broken.write_bytes(b"GIF89a")
        words = shrink(script, arguments)
        status = run_command(load_script(script).main, words)
        err = capsys.readouterr().err
        refused = broken.exists() and "folder:pictures" in words
        assert status == (2 if refused else 0), (script, words, err)
        assert ("broken.jpg (not a JPEG, PNG, WebP or BMP picture)" in err) == refused
        typed.append(script)
    assert len(typed) >= 15
    assert {"diagnostics", "report", "evaluate", "predict", "show"} < set(typed)
