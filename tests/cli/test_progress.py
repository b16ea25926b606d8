"""Progress of studies and runs."""

import pytest

from flaxnets.cli import progress as progress_module
from flaxnets.cli.progress import CheckProgress, StudyProgress, plain_console
from flaxnets.text import duration
from flaxnets.training import Progress
from tests.factories import make_run

pytestmark = pytest.mark.unit


class Clock:
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(progress_module.time, "perf_counter", lambda: self.now)


def test_compilation_is_not_taken_for_training(monkeypatch):
    """The time left of a study once began at 2:41:06 for one of two minutes."""
    clock = Clock(monkeypatch)
    progress = StudyProgress(plain_console(quiet=True), finished=0, unfinished=2, work=300.0)
    small = progress.start_run("small", 100.0, total_steps=100, steps_per_epoch=10, batch=8)
    large = progress.start_run("large", 200.0, total_steps=100, steps_per_epoch=10, batch=8)
    clock.now = 60.0
    small.update(Progress(1, 0.0, []))
    assert progress.time_left() == small.time_left() == "?"
    for step in range(2, 12):
        clock.now += 1.0
        small.update(Progress(step, 0.0, []))
    # A unit of work a second: 89 are left of this run, and 200 of the other.
    assert small.time_left() == "1:29"
    assert progress.time_left() == "4:49"
    # The other one is resumed: what it restores took no time.
    clock.now += 1.0
    large.update(Progress(51, 0.0, []))
    assert progress.time_left() == duration((300 - 11 - 102) / (12 / 11))


def test_the_loss_that_is_shown_is_that_of_training(monkeypatch):
    """Evaluation's is 1e5 in the first epochs of a deep plain network that is sound."""
    progress = StudyProgress(plain_console(quiet=True), 0, 1, 1.0)
    run = progress.start_run("plain-56", 1.0, total_steps=20, steps_per_epoch=10, batch=8)
    row = {"running_train_loss": 2.302, "train_loss": 356263.46, "train_error": 90.0}
    run.update(Progress(10, 0.0, [{**row, "test_error": 89.0}]))
    assert run.facts() == "epoch 2 of 2  running loss 2.302  train error 90.0 %  test error 89.0 %"


def test_the_errors_that_are_shown_are_those_of_the_last_evaluation():
    progress = StudyProgress(plain_console(quiet=True), 0, 1, 1.0)
    run = progress.start_run("plain-8", 1.0, total_steps=40, steps_per_epoch=10, batch=8)
    rows = make_run("plain", 8, 0, evaluate_every=4).result.rows[:3]
    run.update(Progress(30, 0.0, rows))
    assert run.facts() == "epoch 4 of 4  running loss 0.500  train error 80.0 %  test error 85.0 %"
    # Without a training split, the training error is the running one, which every epoch has.
    rows = [{k: v for k, v in row.items() if not k.startswith("train")} for row in rows]
    run.update(Progress(30, 0.0, rows))
    assert run.facts() == "epoch 4 of 4  running loss 0.500  train error 0.5 %  test error 85.0 %"


def test_long_checks_of_pictures_are_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    progress = CheckProgress()
    for now[0], done in ((9.0, 100), (11.0, 2000), (20.0, 3000), (30.0, 4000), (31.0, 4000)):
        progress(done, 4000)
    assert capsys.readouterr().err == "2,000 of 4,000 pictures decoded to check them\n"


def test_lines_of_a_run_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, unsaved = Clock(monkeypatch), set()
    progress = StudyProgress(plain_console(), finished=1, unfinished=1, work=1.0, unsaved=unsaved)
    with progress:
        run = progress.start_run("plain-8", 1.0, total_steps=20, steps_per_epoch=10, batch=8)
        assert not unsaved  # it compiles
        for step in range(1, 13):
            clock.now += 1.0
            run.update(Progress(step, 0.0, []))
        assert unsaved == {run}
        run.end("plain-8: 1.0 % train error")
    assert not unsaved
    first, later, last = capsys.readouterr().out.splitlines()
    assert first == "plain-8 (run 2 of 2)  compiling  - images/s  left: run ?, study ?"
    assert later == "plain-8 (run 2 of 2)  epoch 2 of 2  8 images/s  left: run 0:09, study 0:09"
    assert last == "plain-8: 1.0 % train error"
