"""experiments/benchmark.py, as a user types it, and what its contenders compute."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import flaxnets
from experiments.contenders import comparison, flax_example, inputs, ours
from experiments.contenders.pool import Contender
from experiments.contenders.report import Hardware, Measurement, Report, Settings, Timing
from flaxnets.cli.main import run_command
from flaxnets.decoding import encode
from flaxnets.reporting.figures import draw_benchmark
from tests.conftest import ROOT, load_script

SCRIPT = ROOT / "experiments" / "benchmark.py"
FAKE = """
import os
import time

import numpy as np


class Contender:
    device = "cpu"

    def __init__(self, data, seconds=0.01, **settings):
        self.seconds, self.settings, self.steps = seconds, settings, 0
        assert data["check_images"].dtype == np.float32
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
        time.sleep(steps * self.seconds)

    def multiply_adds(self):
        return 1000

    def host_seconds(self, steps):
        return self.seconds / 10

    def matmul_flops(self):
        return 1e9
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
def test_all_compute_the_same_loss(tmp_path, monkeypatch, name, overrides):
    torch_peer = import_torch_peer()

    def create_model(name, num_classes, **others):
        return flaxnets.create_model(name, num_classes, **overrides, **others)

    monkeypatch.setattr(inputs, "create_model", create_model)
    monkeypatch.setattr(ours, "create_model", create_model)
    data = inputs.make_data(image_size=8, batch_size=4)
    weights = str(tmp_path / "weights.npz")
    settings = {"data": data, "batch_size": 4, "bfloat16": False}
    mine = ours.Contender(model=name, device=None, weights=None, **settings)
    mine.save_weights(weights)
    network = inputs.describe_architecture(name)
    settings |= {"model": network, "device": "cpu", "weights": weights}
    expected = mine.loss()
    for peer in (torch_peer, flax_example):
        contender = peer.Contender(**settings)
        assert contender.loss() == pytest.approx(expected, rel=1e-5)
    # Also after a step.
    contender = torch_peer.Contender(**settings)
    contender.run(1)
    assert contender.loss() == pytest.approx(expected, rel=1e-5)


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
    model = report["models"][0]
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
    assert (tmp_path / "out" / "benchmark.png").stat().st_size > 5000


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
    entries = report["models"][0]["contenders"]
    assert entries["raises"] == {"could_not_run": "RuntimeError: no compiler"}
    for name in ("dies", "dies late"):
        assert entries[name]["could_not_run"].startswith("it ended with signal 6")
        assert f"cifar_resnet8, {name}: could not run: it ended with signal 6" in out
    assert len(entries["torch"]["rounds"]) == 2


def test_without_ours_there_is_nothing_to_compare(run_fakes):
    status, out, _, report = run_fakes({"ours": {"raises": True}, "torch": {}})
    assert status == 1
    assert "cifar_resnet8, ours: could not run: RuntimeError: no compiler" in out
    assert list(report["models"][0]) == ["model", "contenders"]
    assert "nothing to compare" in report["models"][0]["contenders"]["torch"]["could_not_run"]


@pytest.mark.parametrize("loss", [2.01, float("nan")])
def test_another_function_is_not_timed(run_fakes, loss):
    status, out, err, _ = run_fakes({"ours": {}, "torch": {"loss": loss}})
    assert status == 1
    assert f"cifar_resnet8: torch computes a different function: its loss is {loss:.6g}" in err
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
    assert "not ready" in report["models"][0]["contenders"]["slow"]["could_not_run"]
    assert 1 <= len(report["models"][0]["contenders"]["ours"]["rounds"]) < 100
    assert report["left_out"] == ["cifar_resnet10"]
    assert "left out, at the limit of 4 s: cifar_resnet10" in out


@pytest.mark.parametrize("name", ["benchmark", "digits-size"])
def test_published_reports_have_the_layout_of_new_ones(tmp_path, name):
    """And their figures can be drawn again."""
    text = (ROOT / "experiments" / "results" / "benchmark" / f"{name}.json").read_text()
    stored = json.loads(text)
    for model in stored["models"]:
        for contender, timing in model["contenders"].items():
            model["contenders"][contender] = Timing(**timing)
    stored["models"] = [Measurement(**model) for model in stored["models"]]
    stored["hardware"] = Hardware(**stored["hardware"])
    stored["settings"] = Settings(**stored["settings"])
    report = Report(**stored)
    assert json.dumps(encode(report), indent=1) == text
    draw_benchmark(report.rates(), tmp_path / "figure.png", report.title())
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
def test_real_contenders(benchmark, capsys, tmp_path):
    pytest.importorskip("torch")
    status, out, err = run(
        benchmark,
        capsys,
        *("--models", "cifar_resnet8", "--image-size", "8", "--batch-size", "8", "--rounds", "2"),
        *("--against", "torch,flax-example", "--out", str(tmp_path)),
    )
    assert status == 0, err
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert set(report) == {
        "command",
        "date",
        "hardware",
        "versions",
        "settings",
        "models",
        "left_out",
    }
    assert report["hardware"]["cores"] >= 1
    assert {"python", "jax", "flax", "torch"} <= set(report["versions"])
    model = report["models"][0]
    assert model["model"] == "cifar_resnet8"
    assert model["host_share_of_step"] > 0
    assert model["matmul_flops_per_second"] > 1e9
    losses = [entry["loss"] for entry in model["contenders"].values()]
    assert len(losses) == 3
    assert np.ptp(losses) < 1e-3
    for name, entry in model["contenders"].items():
        assert len(entry["rounds"]) == 2
        assert entry["slowest_round"] <= entry["images_per_second"] <= entry["fastest_round"]
        assert entry["first_step_seconds"] > 0
        assert 5e7 < entry["peak_bytes"] < 1e10
        assert 0 < entry["share_of_matmul_peak"] < 1
        assert name in out
    assert (tmp_path / "benchmark.png").stat().st_size > 5000
