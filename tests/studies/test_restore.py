import csv
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import flaxnets
from flaxnets.errors import DamageWarning
from flaxnets.studies.results import read_runs
from flaxnets.training.manifest import write_manifest

SCRIPT = """
import sys
import numpy as np
import flaxnets
run = flaxnets.restore(sys.argv[1])
images, labels = np.load(sys.argv[2]), np.load(sys.argv[3])
logits = run.model.apply(run.variables, run.preprocess(images), train=False)
print(100 * int((np.argmax(logits, -1) != labels).sum()) / len(labels), run.step, run.class_names)
"""


def edit_json(path, edit):
    """Change a file of a checkpoint and put its sha256 right, as a stranger could."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    write_manifest(path.parents[1])


def table(study):
    with (study.out / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_fresh_process_gives_the_tables_test_error(study, digits, tmp_path):
    np.save(tmp_path / "images.npy", digits.test.images)
    np.save(tmp_path / "labels.npy", digits.test.labels)
    row = next(row for row in table(study) if row["kind"] == "residual")
    run = study.out / "residual-8" / "seed-0"
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, run, tmp_path / "images.npy", tmp_path / "labels.npy"],
        capture_output=True,
        text=True,
        check=True,
    )
    error, rest = finished.stdout.split(" ", 1)
    assert error == row["test_error"]
    assert rest.strip() == f"22 {tuple('0123456789')}"


def test_runs_are_read_back(study):
    runs = read_runs(study.out)
    names = [(run.kind, run.depth, run.seed) for run in runs]
    assert names == [("plain", 8, 0), ("residual", 8, 0)]
    assert {run.result.status for run in runs} == {"finished"}
    assert {run.config.parameters for run in runs} == {75_002}


def test_what_is_restored(study):
    run = flaxnets.restore(study.out / "plain-8" / "seed-0")
    assert run.config.recipe.name == "digits"
    assert run.model == flaxnets.create_model("cifar_plain8", num_classes=10)
    assert run.preprocess.image_shape == (8, 8, 1)
    assert run.step == 22
    expected = "Restored(plain-8 of seed 0, step 22, 75,002 parameters, 10 classes)"
    assert repr(run) == expected


def test_a_study_directory_names_its_runs(study):
    with pytest.raises(flaxnets.InputError, match=r"is not a run directory; its runs are .*seed-0"):
        flaxnets.restore(study.out)


def test_a_networks_directory_names_its_runs(study):
    with pytest.raises(flaxnets.InputError, match=r"its runs are .*plain-8/seed-0$"):
        flaxnets.restore(study.out / "plain-8")


def test_no_epoch_has_been_measured_yet(study, tmp_path):
    """In the first epoch of a run with validation there is a checkpoint and no best state."""
    run = shutil.copytree(study.out / "plain-8" / "seed-0", tmp_path / "run")
    with pytest.raises(flaxnets.InputError, match="it was trained without --validation"):
        flaxnets.restore(run, which="best")
    newest = run / "checkpoints" / "22"
    path = newest / "config" / "metadata"
    config = json.loads(path.read_text())
    config["dataset"]["validation_examples"] = 100
    path.write_text(json.dumps(config))
    write_manifest(newest)
    with pytest.raises(flaxnets.InputError, match="no best checkpoint yet: no epoch"):
        flaxnets.restore(run, which="best")


def test_not_a_run(tmp_path):
    with pytest.raises(flaxnets.InputError, match=r"no config\.json"):
        flaxnets.restore(tmp_path / "nowhere")


def test_no_checkpoint_yet(study, tmp_path):
    shutil.copy(study.out / "plain-8" / "seed-0" / "config.json", tmp_path)
    with pytest.raises(flaxnets.InputError, match="no checkpoint yet"):
        flaxnets.restore(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(flaxnets.InputError, match="no checkpoint yet"):
        flaxnets.restore(tmp_path)


def test_a_damaged_checkpoint_is_not_used(study, tmp_path):
    run = shutil.copytree(study.out / "plain-8" / "seed-0", tmp_path / "run")
    older = shutil.copytree(run, tmp_path / "older")
    shutil.rmtree(older / "checkpoints" / "22")
    arrays = max(
        (run / "checkpoints" / "22" / "variables").rglob("*"), key=lambda path: path.stat().st_size
    )
    data = bytearray(arrays.read_bytes())
    data[len(data) // 2] ^= 1
    arrays.write_bytes(data)
    with pytest.warns(DamageWarning, match=rf"22 .*{arrays.name} has been .*checkpoint 11 is used"):
        restored = flaxnets.restore(run)
    assert restored.step == 11
    expected = flaxnets.restore(older).variables
    jax.tree.map(np.testing.assert_array_equal, restored.variables, expected)
    (run / "checkpoints" / "11" / "commit_success.txt").unlink()
    message = rf"no good checkpoint: .*22.*{arrays.name}.*; .*11.*commit_success.txt is missing"
    with pytest.raises(flaxnets.InputError, match=message):
        flaxnets.restore(run)
    assert len(list((run / "checkpoints").iterdir())) == 2  # reading mends nothing


def test_config_is_that_of_the_checkpoint(study, tmp_path):
    """A changed digit of the mean in config.json would give wrong numbers."""
    run = shutil.copytree(study.out / "plain-8" / "seed-0", tmp_path / "run")
    expected = flaxnets.restore(run).preprocess
    (run / "config.json").write_text((run / "config.json").read_text().replace("0.3", "0.4"))
    assert flaxnets.restore(run).preprocess == expected
    (run / "config.json").write_bytes(b"\0")
    assert flaxnets.restore(run).preprocess == expected


def test_a_network_of_ones_own_is_built_by_the_caller_alone(study, tmp_path):
    """Nothing a file names is imported: the same run, said to be built by a module that is not."""
    run = tmp_path / "run"
    shutil.copytree(study.out / "plain-8" / "seed-0", run)
    edit_json(
        run / "checkpoints" / "22" / "config" / "metadata",
        lambda config: config.update(model={"build": "my_nets:build", "num_classes": 10}),
    )
    with pytest.raises(flaxnets.InputError, match=r"my_nets:build.*build="):
        flaxnets.restore(run)

    def build(depth, num_classes, dtype):
        return flaxnets.create_model(f"cifar_plain{depth}", num_classes=num_classes, dtype=dtype)

    assert flaxnets.restore(run, build=build).step == 22
