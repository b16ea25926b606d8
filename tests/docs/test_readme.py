"""What README.md and docs/ show runs as it stands there."""

import os
import re
import shutil
import subprocess
import sys

import pytest

import flaxnets
from tests.pages import BLOCKS, PAGES, ROOT, TEXTS, block

LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture
def run(data_dir, tmp_path):
    """Run a command in an empty directory, the digits where TFDS looks first."""

    def run(*command):
        environment = {**os.environ, "TFDS_DATA_DIR": str(data_dir)}
        return subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    return run


def test_every_block_is_tested_here():
    markers = ("def build(", "flaxnets.restore(", "make_train_step(", "list_models()")
    markers += ("num_classes=None", "load_torch(", '"runs/digits"', '"runs/short"')
    assert len(BLOCKS) == len(markers)
    assert len({block(marker) for marker in markers}) == len(markers)


def test_all_pages_are_listed():
    pages = {path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts}
    assert set(PAGES) == {ROOT / "README.md", *pages}


def anchors(text):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / ".github" / "CONTRIBUTING.md"],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_every_link_leads_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there.read_text()), target


def test_every_promise_is_kept_by_a_test():
    page = ROOT / "docs" / "guarantees.md"
    section = TEXTS[page].split("## What it promises")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| **")]
    assert len(rows) == 10
    last = ""
    for row in rows:
        for path, name in re.findall(r"\(\.\./(tests/\S+\.py)\)|`(test_\w+)`", row.split("|")[2]):
            last = path or last
            assert not name or f"def {name}(" in (ROOT / last).read_text(), (last, name)
        assert "`test_" in row.split("|")[2]


@pytest.mark.slow
def test_import_a_network(run):
    assert run("-c", block("list_models()")).splitlines()[-1] == "(2, 10)"


@pytest.mark.slow
def test_features(run):
    printed = run("-c", block("num_classes=None"))
    assert printed == "(2, 64) [(2, 32, 32, 16), (2, 16, 16, 32), (2, 8, 8, 64)]\n"


@pytest.mark.slow
def test_weights_from_and_to_pytorch(run, tmp_path):
    torch, safetensors_torch = map(pytest.importorskip, ("torch", "safetensors.torch"))
    from tests.reference import torchvision_network

    state = torchvision_network("resnet18").state_dict()
    safetensors_torch.save_file(state, tmp_path / "resnet18.safetensors")
    run("-c", block("load_torch("))
    again = safetensors_torch.load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(again[key], value) for key, value in state.items())


@pytest.mark.slow
def test_a_kind_of_ones_own(run, tmp_path):
    code = block("def build(")
    assert len(code.splitlines()) <= 15
    (tmp_path / "my_nets.py").write_text(code)
    arguments = ["--depths", "8", "--kinds", "my_nets:build", "--epochs", "1", "--out", "out"]
    assert "my_nets:build 8" in run(ROOT / "experiments" / "degradation.py", *arguments)


@pytest.mark.slow
def test_a_training_loop_of_ones_own(run):
    code = block("make_train_step(")
    assert sum(1 for line in code.splitlines() if line.strip()) <= 20
    last = run("-c", code).splitlines()[-1]
    epoch, _, error = last.split()
    assert epoch == "9"
    assert float(error) < 10


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(flaxnets, "Study"), reason="there is no flaxnets.Study")
@pytest.mark.parametrize("marker", ['"runs/digits"', '"runs/short"'])
def test_a_study_from_python(run, tmp_path, marker):
    pytest.importorskip("pandas")
    code = block(marker).replace("(18, 34, 56)", "(8, 10)").replace("(0, 1, 2)", "(0,)")
    assert "training error" in run("-c", code)
    assert (tmp_path / marker.strip('"') / "summary.csv").exists()


def test_restore(run, study, tmp_path):
    runs = tmp_path / "runs" / "degradation" / "digits-cifar"
    shutil.copytree(study.out / "residual-8", runs / "residual-18")
    printed = run("-c", block("flaxnets.restore("))
    assert re.fullmatch(r"\d+\.\d+ % of the test images are misclassified\n", printed)
