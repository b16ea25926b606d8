"""A run or study directory from a stranger: nothing of it is run, and only documented errors come
out, whatever is in it."""

import json
import random
import shutil
import sys
import time
import warnings
from pathlib import Path

import pytest

import flaxnets
from flaxnets.errors import DamageWarning
from flaxnets.studies.directory import read_study_file
from flaxnets.studies.results import check_study, read_runs
from flaxnets.training.config import read_config
from flaxnets.training.manifest import MANIFEST, write_manifest
from tests.factories import make_study_config

# Orbax's tasks go on for a moment after an error that has been raised.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

HOSTILE = [
    "../../../../etc/passwd",
    "/etc/passwd",
    "os:system",
    "__import__('os').system('true')",
    "$x^{",
    "\ud800",
    "\x1b[2J",
    "\0",
    "",
    -1,
    0,
    1e308,
    float("nan"),
    2**63,
    True,
    None,
    [],
    {},
    [[[]]],
    {"build": "os:system", "num_classes": 10},
]


@pytest.fixture
def run(study, tmp_path):
    """A run directory with one checkpoint, to do harm to."""
    directory = shutil.copytree(study.out / "plain-8" / "seed-0", tmp_path / "run")
    shutil.rmtree(directory / "checkpoints" / "11")
    return directory


def sign(run):
    """Put every sha256 right, as a stranger could."""
    checkpoint = run / "checkpoints" / "22"
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    write_manifest(checkpoint)


def attempt(act):
    """Do it; a documented error is an answer. Everything else is a failure of the test."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", DamageWarning)
            return act()
    except flaxnets.InputError as error:
        return str(error)


def places(value, path=()):
    """Every place in a JSON value, as a path of keys."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def changed(value, path, new):
    """A copy with `new` at `path`."""
    value = json.loads(json.dumps(value))
    place = value
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = new
    return value


def test_every_field_of_a_config_may_be_anything(run, watched):
    """Only what restoring needs is looked at, and nothing outside the run is."""
    path = run / "checkpoints" / "22" / "config" / "metadata"
    config = json.loads(path.read_text())
    random_ = random.Random(0)
    fields = [p for p in places(config) if p[0] in ("model", "preprocess", "precision", "depth")]
    assert len(fields) > 12
    refused = 0
    for field in fields:
        for new in (random_.choice(HOSTILE), random_.choice(HOSTILE[:5])):
            path.write_text(json.dumps(changed(config, field, new)))
            sign(run)
            with watched(run):
                refused += isinstance(attempt(lambda: flaxnets.restore(run)), str)
    assert refused > len(fields)


def test_every_field_of_a_record_may_be_anything(run):
    """A run whose record is none is left out of its study."""
    study = run.parent / "study"
    moved = study / "plain-8" / "seed-0"
    shutil.move(run, moved)
    run = moved
    path = run / "checkpoints" / "22" / "progress" / "metadata"
    progress = json.loads(path.read_text())
    config = read_config(json.loads((run / "checkpoints/22/config/metadata").read_text()))
    runs = check_study(study, config.study, [])
    assert len(runs) == 1
    for field, new in (
        *((field, "no number") for field in places(progress) if field != ("diverged_step",)),
        *((("status",), new) for new in HOSTILE),
        (("step",), -1),
        (("rows", 0, "step"), 10**400),
        (("rows",), {}),
        (("rows", 0), {}),
        (("diverged_step",), "1"),
    ):
        path.write_text(json.dumps(changed(progress, field, new)))
        sign(run)
        with pytest.warns(DamageWarning, match="plain-8/seed-0 is left out"):
            assert check_study(study, config.study, []) == []


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "null", "", "{", '{"a": 1}', "\0"])
@pytest.mark.parametrize("item", ["config", "progress"])
def test_json_that_is_no_record(run, item, content):
    (run / "checkpoints" / "22" / item / "metadata").write_text(content)
    sign(run)
    if item == "config":
        with pytest.raises(flaxnets.InputError, match="checkpoint 22 of"):
            flaxnets.restore(run)
    study = run.parent / "study"
    shutil.copytree(run, study / "plain-8" / "seed-0")
    answer = attempt(lambda: check_study(study, make_study_config(), []))
    assert isinstance(answer, str) or not answer


@pytest.mark.parametrize("content", ["", "[]"])
def test_a_report_leaves_out_a_run_without_a_record(study, tmp_path, content):
    out = shutil.copytree(study.out, tmp_path / "out")
    run = out / "plain-8" / "seed-0"
    (run / "checkpoints" / "22" / "progress" / "metadata").write_text(content)
    sign(run)
    with pytest.warns(DamageWarning, match="plain-8/seed-0 is left out: "):
        assert [run.kind for run in read_runs(out)] == ["residual"]


@pytest.mark.parametrize("field", [("depth",), ("model", "name")])
def test_a_network_too_deep_to_build_is_refused_at_once(run, field):
    path = run / "checkpoints" / "22" / "config" / "metadata"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps(changed(config, field, 9998 if field == ("depth",) else "cifar_resnet9998"))
    )
    sign(run)
    began = time.perf_counter()
    with pytest.raises(flaxnets.InputError, match=rf"its config is invalid \(.*{field[0]}"):
        flaxnets.restore(run)
    assert time.perf_counter() - began < 2


def test_a_network_of_another_shape(run):
    path = run / "checkpoints" / "22" / "config" / "metadata"
    config = json.loads(path.read_text())
    for field, new in (
        (("model", "num_classes"), 2**40),
        (("model", "num_classes"), 11),
        (("preprocess", "image_shape"), [2**20, 2**20, 1]),
        (("model", "name"), "cifar_plain10"),
        (("model", "name"), "resnet18"),
        (("model", "name"), "cifar_plain1000000000"),
    ):
        path.write_text(json.dumps(changed(config, field, new)))
        sign(run)
        answer = attempt(lambda: flaxnets.restore(run))
        if "num_classes" in field or "name" in field:
            assert isinstance(answer, str), (field, new)
            assert any(
                text in answer for text in ("cannot be read", "cannot be built", "is invalid")
            )


def test_links_lead_nowhere(run, tmp_path):
    outside = shutil.copytree(run / "checkpoints" / "22", tmp_path / "outside")
    (run / "checkpoints" / "33").symlink_to(outside)
    assert flaxnets.restore(run).step == 22
    shutil.rmtree(run / "checkpoints" / "22")
    with pytest.raises(flaxnets.InputError, match="no checkpoint yet"):
        flaxnets.restore(run)


def mutate(data, random_):
    """Bytes with a few of them changed, lost, doubled or emptied."""
    data = bytearray(data)
    for _ in range(random_.randint(1, 4)):
        at = random_.randrange(len(data) + 1)
        kind = random_.randrange(4)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << random_.randrange(8)
        elif kind == 1:
            del data[at : at + random_.randint(1, 50)]
        elif kind == 2:
            data[at:at] = bytes(random_.randrange(256) for _ in range(random_.randint(1, 20)))
        else:
            del data[at:]
    return bytes(data)


def fuzz_restore(run, rounds, seed):
    random_ = random.Random(seed)
    files = sorted(path for path in (run / "checkpoints" / "22").rglob("*") if path.is_file())
    outcomes = []
    for _ in range(rounds):
        path = random_.choice(files)
        before = path.read_bytes()
        path.write_bytes(mutate(before, random_))
        if path.name != MANIFEST:
            sign(run)  # else every one of them would end at the manifest
        outcomes.append(isinstance(attempt(lambda: flaxnets.restore(run)), str))
        path.write_bytes(before)
        sign(run)
    assert any(outcomes)
    assert not isinstance(attempt(lambda: flaxnets.restore(run)), str)


def test_fuzzed_checkpoints(run):
    fuzz_restore(run, 30, seed=0)


@pytest.mark.slow
def test_more_fuzzed_checkpoints(run):
    fuzz_restore(run, 300, seed=1)


def test_fuzzed_studies(study, tmp_path):
    """config.json (of runs with and without a checkpoint), progress and study.json."""
    out = shutil.copytree(study.out, tmp_path / "out")
    shutil.rmtree(out / "residual-8" / "seed-0" / "checkpoints")
    stored = read_study_file(out)
    assert stored is not None
    plain = out / "plain-8" / "seed-0" / "checkpoints" / "22"
    files = [*out.glob("*.json"), *out.rglob("config.json")]
    files += [plain / "progress" / "metadata", plain / "config" / "metadata"]
    random_ = random.Random(0)
    for _ in range(150):
        path = random_.choice(files)
        before = path.read_bytes()
        path.write_bytes(mutate(before, random_))
        (plain / MANIFEST).unlink()
        write_manifest(plain)
        attempt(lambda: check_study(out, stored.study, []))
        path.write_bytes(before)


@pytest.fixture(scope="module")
def watched():
    """A context in which no file outside a directory is opened, and nothing is run or imported."""
    state = {"run": None, "seen": []}
    allowed = (sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev", str(Path(__file__).parents[2]))

    def hook(event, arguments):
        if state["run"] is None:
            return
        if event == "open" and isinstance(arguments[0], str):
            path = str(Path(arguments[0]).absolute())
            if not path.startswith((state["run"], *allowed)) and "flaxnets-tests" not in path:
                state["seen"].append((event, path))
        elif event in ("os.system", "subprocess.Popen", "os.exec", "os.spawn", "os.fork"):
            state["seen"].append((event, arguments))

    sys.addaudithook(hook)

    class Watched:
        def __init__(self, run):
            self.run = run

        def __enter__(self):
            state["run"] = str(self.run)

        def __exit__(self, *_):
            state["run"] = None
            assert state["seen"] == []

    return Watched
