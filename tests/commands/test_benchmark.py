"""experiments/benchmark.py, as a user types it, and what its contenders compute."""

import importlib.util
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import flaxnets
from experiments.contenders import comparison, flax_example, inputs, ours
from experiments.contenders.pool import Contender, WorkerPool
from experiments.contenders.report import Hardware, Measurement, Report, Timing
from experiments.contenders.workload import EVALUATION_BATCHES, Workload
from flaxnets.cli.main import run_command
from flaxnets.decoding import encode
from flaxnets.reporting import figures
from flaxnets.reporting.figures import draw_benchmark
from tests.conftest import ROOT, load_script

TRAIN = "cifar_resnet8, train, 32x32, batch 128, float32"
SCRIPT = ROOT / "experiments" / "benchmark.py"
RESULTS = sorted((ROOT / "experiments" / "results" / "benchmark").glob("*.json"))
FAKE = """
import os
import time

import numpy as np


class Contender:
    device = "cpu"

    def __init__(self, data, seconds=0.01, **settings):
        self.seconds, self.settings, self.steps = seconds, settings, 0
        assert data["check_images"].dtype == np.float32
        self.batches = 1 if settings["task"] == "train" else len(data["images"]) / 10
        if "raises" in settings:
            raise RuntimeError("no compiler\\nand more")

    def save_weights(self, path):
        np.savez(path, weights=np.zeros(1))

    def loss(self):
        print("a library speaks")
        return self.settings.get("loss", 2.0)

    def run(self, steps):
        self.steps += steps
        if self.steps > self.settings.get("dies_after", 1e9):
            os.abort()
        time.sleep(steps * self.batches * self.seconds)

    def multiply_adds(self):
        return 1000

    def host_seconds(self, steps):
        return self.seconds / 10

    def make_matmul(self, size):
        return lambda: time.sleep(0.001)
"""


@pytest.fixture(scope="module")
def benchmark():
    return load_script("benchmark")


def import_torch_peer():
    pytest.importorskip("torch")
    from experiments.contenders import torch_peer

    return torch_peer


def run(benchmark, capsys, *arguments):
    status = run_command(benchmark.main, list(arguments))
    return status, *capsys.readouterr()


@pytest.fixture
def run_fakes(benchmark, capsys, tmp_path, monkeypatch):
    """Run the command with contenders that only sleep: name -> their settings."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run_fakes(fakes, *arguments):
        contenders = {name: Contender("fake", settings) for name, settings in fakes.items()}
        monkeypatch.setattr(benchmark, "CONTENDERS", contenders)
        monkeypatch.setattr(comparison, "SECONDS_A_ROUND", 0.04)
        against = ",".join(name for name in fakes if name != "ours")
        arguments = ["--against", against, "--out", str(tmp_path / "out"), *arguments]
        status, out, err = run(benchmark, capsys, "--models", "cifar_resnet8", *arguments)
        report = tmp_path / "out" / "benchmark.json"
        return status, out, err, json.loads(report.read_text()) if report.exists() else None

    return run_fakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "resnt50"], "did you mean resnet50?"),
        (["--models", "cifar_resnet9"], "even depths"),
        (["--models", "vgg16"], "ResNets of version 1"),
        (["--models", "cifar_resnet20v2"], "ResNets of version 1"),
        (["--models", "keras_resnet20v1", "--against", "flax-example"], "ResNets of version 1"),
        (["--against", "torhc"], "did you mean torch?"),
        (["--against", "ours"], "--against must be one of torch,"),
        (["--against", ""], "--against must be one of torch,"),
        (["--precision", "float16"], "--precision must be one of float32, bfloat16"),
        (["--task", "test"], "--task must be one of train, evaluate"),
        (["--batch-size", "0"], "above 0"),
        (["--image-size", "-1"], "above 0"),
        (["--rounds", "1.5"], "a whole number above 0"),
        (["--seconds", "inf"], "a number above 0"),
        (["--out", "/dev/null/out"], "Not a directory"),
        (["--model", "resnet50"], "did you mean --models?"),
    ],
)
def test_mistakes_are_one_line(benchmark, capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # as if torch were there
    status, out, err = run(benchmark, capsys, *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not out


def test_torch_is_asked_for_only_where_it_is_needed(benchmark, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, err = run(benchmark, capsys, "--against", "flax-example,torch", "--out", "/none/x")
    assert status == 2
    assert "pip install -e '.[benchmark]'" in err
    options = benchmark.parse_arguments(["--against", "flax-example", "--out", str(tmp_path)])
    assert options.against == ("flax-example",)
    code = f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}, run_name='benchmark')"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("cifar_resnet8", {}),
        ("cifar_plain8", {}),
        ("resnet50", {"stage_sizes": (1, 1), "width": 8}),
    ],
)
@pytest.mark.parametrize("task", ["train", "evaluate"])
def test_all_compute_the_same_loss(tmp_path, monkeypatch, name, overrides, task):
    torch_peer = import_torch_peer()

    def create_model(name, num_classes, **others):
        return flaxnets.create_model(name, num_classes, **overrides, **others)

    monkeypatch.setattr(inputs, "create_model", create_model)
    monkeypatch.setattr(ours, "create_model", create_model)
    data = inputs.make_data(Workload(name, image_size=8, batch_size=4, task=task))
    weights = str(tmp_path / "weights.npz")
    settings = {"data": data, "batch_size": 4, "bfloat16": False, "task": task}
    mine = ours.Contender(model=name, device=None, weights=None, **settings)
    mine.save_weights(weights)
    network = inputs.describe_architecture(name)
    settings |= {"model": network, "device": "cpu", "weights": weights}
    expected = mine.loss()
    for peer in (torch_peer, flax_example):
        contender = peer.Contender(**settings)
        assert contender.loss() == pytest.approx(expected, rel=1e-5)
        if task == "evaluate":
            assert contender.evaluate()[1] == pytest.approx(mine.evaluate()[1])
    # Also after a step.
    contender = torch_peer.Contender(**settings)
    contender.run(1)
    assert contender.loss() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("leaf", "initial"), [("mean", 0), ("var", 1)])
def test_one_wrong_running_statistic_is_noticed(tmp_path, leaf, initial):
    workload = Workload("cifar_resnet8", image_size=8, batch_size=4, task="evaluate")
    settings = {"data": inputs.make_data(workload), "batch_size": 4, "bfloat16": False}
    settings |= {"task": "evaluate", "device": "cpu"}
    mine = ours.Contender(model=workload.model, weights=None, **settings)
    weights = tmp_path / "weights.npz"
    mine.save_weights(str(weights))
    settings |= {"model": inputs.describe_architecture(workload.model), "weights": str(weights)}
    losses = {"ours": mine.loss(), "right": flax_example.Contender(**settings).loss()}
    comparison.check_losses(workload, losses)
    with np.load(weights) as stored:
        arrays = dict(stored)
    changed = f"batch_stats/stage3_block1/bn2/{leaf}"
    np.savez(weights, **(arrays | {changed: np.full_like(arrays[changed], initial)}))
    losses["wrong"] = flax_example.Contender(**settings).loss()
    with pytest.raises(comparison.DisagreementError, match="wrong computes a different function"):
        comparison.check_losses(workload, losses)


@pytest.mark.parametrize("augment", ["torch", "numpy"])
def test_peers_augment_as_ours_do(augment):
    """Each result is one of the 81 crops, mirrored or not; many are seen."""
    rng = np.random.default_rng(0)
    images = np.repeat(rng.integers(0, 256, (1, 6, 6, 3), np.uint8), 400, axis=0)
    if augment == "numpy":
        results = flax_example.augment(rng, images)
    else:
        torch_peer = import_torch_peer()
        torch = torch_peer.torch
        mean, std = torch.zeros(3), torch.ones(3)
        contender = torch_peer.Contender.__new__(torch_peer.Contender)
        contender._mean, contender._std = mean, std
        results = contender.prepare(torch.from_numpy(images)).permute(0, 2, 3, 1).numpy()
        results = np.round(255 * results).astype(np.uint8)
    padded = np.pad(images[0], ((4, 4), (4, 4), (0, 0)))
    crops = [padded[y : y + 6, x : x + 6] for y in range(9) for x in range(9)]
    expected = {crop.tobytes() for crop in (*crops, *(crop[:, ::-1] for crop in crops))}
    seen = {image.tobytes() for image in results}
    assert seen <= expected
    assert len(seen) > 100


def test_turns_are_timed_and_compared(run_fakes, tmp_path):
    fakes = {"ours": {}, "torch": {"seconds": 0.02}, "seeds-together": {"seeds": 4}}
    status, out, _, report = run_fakes(fakes, "--batch-size", "10", "--rounds", "3")
    assert status == 0
    model = report["measurements"][0]
    assert model["workload"] == encode(Workload("cifar_resnet8", batch_size=10))
    assert model["multiply_adds"] == 1000
    assert model["steps_per_round"] in (3, 4)
    entries = model["contenders"]
    assert list(entries) == ["ours", "torch", "seeds-together"]
    assert [len(entry["rounds"]) for entry in entries.values()] == [3, 3, 3]
    assert entries["ours"]["ours_over_this"] == 1
    assert 1.3 < entries["torch"]["ours_over_this"] < 3
    assert 0.1 < entries["seeds-together"]["ours_over_this"] < 0.5
    assert 500 < entries["ours"]["images_per_second"] <= 1000
    assert entries["ours"]["peak_bytes"] > 1e6
    assert model["host_share_of_step"] == pytest.approx(0.1, rel=0.5)
    assert "outside XLA" in out
    share = entries["ours"]["share_of_matmul_peak"] * model["matmul_flops_per_second"]
    assert share == pytest.approx(6 * 1000 * entries["ours"]["images_per_second"])
    assert (tmp_path / "out" / "benchmark.png").stat().st_size > 5000


def test_evaluation_is_one_forward_pass_over_eight_batches(run_fakes):
    fakes = {"ours": {}, "torch": {}}
    status, out, _, report = run_fakes(
        fakes, "--batch-size", "10", "--task", "evaluate", "--rounds", "2"
    )
    assert status == 0
    measured = report["measurements"][0]
    ours = measured["contenders"]["ours"]
    assert 500 < ours["images_per_second"] <= 1000  # 0.01 s for each batch of 10
    share = ours["share_of_matmul_peak"] * measured["matmul_flops_per_second"]
    assert share == pytest.approx(2 * 1000 * ours["images_per_second"])
    assert measured["host_seconds_per_step"] is None
    assert "outside XLA" not in out
    assert len(inputs.make_data(Workload("m", 8, 10, task="evaluate"))["labels"]) == (
        10 * EVALUATION_BATCHES
    )


def test_custom_workloads_replace_the_default_ones(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # as if torch were there

    def choose(*arguments):
        return benchmark.parse_arguments([*arguments, "--out", str(tmp_path)]).workloads

    assert choose("--rounds", "3") == benchmark.WORKLOADS
    assert len({workload.name for workload in benchmark.WORKLOADS}) == 9
    assert choose("--models", "resnet18") == (Workload("resnet18"),)
    expected = [Workload(model, image_size=8) for model in benchmark.MODELS]
    assert list(choose("--image-size", "8")) == expected
    chosen = choose("--models", "resnet18", "--task", "evaluate", "--precision", "bfloat16")
    assert chosen == (Workload("resnet18", precision="bfloat16", task="evaluate"),)


def test_table_and_figure_have_the_same_ratio(run_fakes, monkeypatch, benchmark):
    """The median of the rounds' ratios, which is not the ratio of the medians here."""
    rounds = {"ours": [10.0, 20.0, 60.0], "torch": [20.0, 10.0, 20.0]}
    monkeypatch.setattr(comparison, "run_rounds", lambda *arguments: rounds)
    drawn = []

    def keep(figure, path, title):
        drawn.append(figure)

    monkeypatch.setattr(figures, "write_figure", keep)
    status, out, _, report = run_fakes({"ours": {}, "torch": {}}, "--rounds", "3")
    assert status == 0
    torch = report["measurements"][0]["contenders"]["torch"]
    assert torch["ours_over_this"] == 2  # of 0.5, 2 and 3; the medians' ratio is 1
    assert "2.00" in next(line for line in out.splitlines() if " torch " in line and " - " in line)
    ax = drawn[0].axes[0]
    spread, point, *_ = ax.lines
    assert point.get_xdata() == [2]
    assert list(spread.get_xdata()) == [0.5, 3]
    assert [text.get_text() for text in ax.texts] == ["2.00"]
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend[0] == "torch"
    label = ax.get_yticklabels()[0].get_text()
    assert label == "cifar_resnet8, train\n32x32, batch 128, float32"


MEMORY = """
import resource

import numpy as np


class Contender:
    device = "cpu"

    def __init__(self, **settings):
        pass

    def faults(self):
        np.ones(16_000_000, np.float32)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(16_000_000, np.float32)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc")
def test_all_have_the_same_allocator_but_the_one_named_after_it(benchmark, tmp_path, monkeypatch):
    (tmp_path / "memory.py").write_text(MEMORY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    np.savez(tmp_path / "data.npz")
    contenders = {
        name: replace(contender, module="memory")
        for name, contender in benchmark.CONTENDERS.items()
    }
    with WorkerPool(contenders, tmp_path, math.inf) as pool:
        pool.call("start", data=str(tmp_path / "data.npz"))
        faults = pool.call("faults")
    default = faults.pop("torch-default-malloc")
    assert len(faults) == 6
    assert max(faults.values()) < 100
    assert default > 20 * max(1, *faults.values())


def test_who_fails_is_reported_and_the_rest_goes_on(run_fakes):
    fakes = {
        "ours": {},
        "raises": {"raises": True},
        "dies": {"dies_after": 0},
        "dies late": {"dies_after": 5},
        "torch": {},
    }
    status, out, _, report = run_fakes(fakes, "--rounds", "2")
    assert status == 0
    entries = report["measurements"][0]["contenders"]
    assert entries["raises"] == {"could_not_run": "RuntimeError: no compiler"}
    for name in ("dies", "dies late"):
        assert entries[name]["could_not_run"].startswith("it ended with signal 6")
        assert f"{TRAIN}: {name} could not run: it ended with signal 6" in out
    assert len(entries["torch"]["rounds"]) == 2


def test_without_ours_there_is_nothing_to_compare(run_fakes):
    status, out, _, report = run_fakes({"ours": {"raises": True}, "torch": {}})
    assert status == 1
    assert f"{TRAIN}: ours could not run: RuntimeError: no compiler" in out
    failed = report["measurements"][0]
    assert list(failed) == ["workload", "contenders"]
    assert "nothing to compare" in failed["contenders"]["torch"]["could_not_run"]


@pytest.mark.parametrize("loss", [2.01, float("nan")])
def test_another_function_is_not_timed(run_fakes, loss):
    status, out, err, _ = run_fakes({"ours": {}, "torch": {"loss": loss}})
    assert status == 1
    assert f"{TRAIN}: torch computes a different function: its loss is {loss:.6g}" in err
    assert err.count("\n") == 1
    assert "rounds" not in out
    status, *_ = run_fakes({"ours": {}, "torch": {"loss": 2.01}}, "--precision", "bfloat16")
    assert status == 0


def test_time_that_is_over(run_fakes):
    fakes = {"ours": {"seconds": 0.2}, "slow": {"seconds": 30}}
    status, out, _, report = run_fakes(
        fakes, "--models", "cifar_resnet8,cifar_resnet10", "--seconds", "4", "--rounds", "100"
    )
    assert status == 0
    entries = report["measurements"][0]["contenders"]
    assert "not ready" in entries["slow"]["could_not_run"]
    assert 1 <= len(entries["ours"]["rounds"]) < 100
    assert [workload["model"] for workload in report["left_out"]] == ["cifar_resnet10"]
    assert "left out, at the limit of 4 s: cifar_resnet10, train" in out


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_published_reports_have_the_layout_of_new_ones(tmp_path, path):
    """And their figures can be drawn again."""
    stored = json.loads(path.read_text())
    for measured in stored["measurements"]:
        measured["workload"] = Workload(**measured["workload"])
        for contender, timing in measured["contenders"].items():
            measured["contenders"][contender] = Timing(**timing)
    stored["measurements"] = [Measurement(**measured) for measured in stored["measurements"]]
    stored["hardware"] = Hardware(**stored["hardware"])
    report = Report(**stored)
    assert json.dumps(encode(report), indent=1) == path.read_text()
    draw_benchmark(report.ratios(), tmp_path / "figure.png", report.title())
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_ctrl_c_stops_all(tmp_path):
    command = [sys.executable, str(SCRIPT), "--models", "cifar_resnet8", "--image-size", "8"]
    command += ["--batch-size", "8", "--rounds", "10000", "--against", "flax-example"]
    command += ["--out", str(tmp_path)]
    # Jobs in the background of a shell ignore it, and so do their children.
    process = subprocess.Popen(
        command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    children = []
    while len(children) < 2:
        assert process.poll() is None
        time.sleep(0.1)
        children = listed.read_text().split()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    # One that was just being started ends by itself, when it finds nobody to listen to.
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{child}") for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "precision"),
    [("train", "float32"), ("train", "bfloat16"), ("evaluate", "float32")],
)
def test_real_contenders(benchmark, capsys, tmp_path, task, precision):
    pytest.importorskip("torch")
    against = ["torch", "torch-default-malloc", "flax-example"]
    status, out, err = run(
        benchmark,
        capsys,
        *("--models", "cifar_resnet8", "--image-size", "8", "--batch-size", "8", "--rounds", "2"),
        *("--task", task, "--precision", precision),
        *("--against", ",".join(against), "--out", str(tmp_path)),
    )
    assert status == 0, err
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert set(report) == {
        "command",
        "date",
        "hardware",
        "versions",
        "rounds",
        "measurements",
        "left_out",
    }
    assert report["hardware"]["cores"] >= 1
    assert {"python", "jax", "flax", "torch"} <= set(report["versions"])
    measured = report["measurements"][0]
    assert measured["workload"] == encode(Workload("cifar_resnet8", 8, 8, precision, task))
    assert (measured["host_share_of_step"] is None) == (task == "evaluate")
    assert measured["matmul_flops_per_second"] > 1e9
    assert list(measured["contenders"]) == ["ours", *against]
    losses = [entry["loss"] for entry in measured["contenders"].values()]
    assert np.ptp(losses) < (1e-3 if precision == "float32" else 3e-2)
    for name, entry in measured["contenders"].items():
        assert len(entry["rounds"]) == 2
        assert entry["slowest_round"] <= entry["images_per_second"] <= entry["fastest_round"]
        assert entry["first_step_seconds"] > 0
        assert 5e7 < entry["peak_bytes"] < 1e10
        assert 0 < entry["share_of_matmul_peak"] < 1
        assert name in out
    assert (tmp_path / "benchmark.png").stat().st_size > 5000
