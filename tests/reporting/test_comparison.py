import io

import numpy as np
import pytest
from rich.console import Console

from flaxnets.reporting.comparison import bootstrap_interval, depth_pairs, paired_differences
from flaxnets.reporting.tables import differences_table
from flaxnets.studies.results import group_runs
from flaxnets.training.result import Status
from tests.factories import make_run

pytestmark = pytest.mark.unit


def networks(errors, status: Status = "finished"):
    """Plain networks: depth -> final training error of each seed."""
    runs = [
        make_run("plain", depth, seed, status, errors=(90.0, error))
        for depth, finals in errors.items()
        for seed, error in enumerate(finals)
    ]
    return group_runs(runs)


def printed(curves):
    text = io.StringIO()
    Console(width=100, file=text).print(differences_table(curves))
    return text.getvalue()


def test_seeds_are_paired():
    shallow, deep = networks({8: [1.0, 2.0, 5.0], 14: [4.0, 3.0]})
    assert paired_differences(shallow, deep, "train_error") == [3.0, 1.0]
    deep.runs[0] = make_run("plain", 14, 0, "diverged")
    assert paired_differences(shallow, deep, "train_error") == [1.0]


def test_depths_are_compared_with_their_neighbours_and_over_the_whole_range():
    one, two, three = networks({8: [1.0], 14: [4.0], 20: [4.0]})
    assert depth_pairs([one, two, three]) == [(one, two), (two, three), (one, three)]
    assert depth_pairs([one, two]) == [(one, two)]
    assert depth_pairs([one]) == []


def test_an_interval_of_the_mean():
    rng = np.random.default_rng(0)
    differences = list(rng.normal(3.0, 2.0, 400))
    low, high = bootstrap_interval(differences)
    mean, error = np.mean(differences), np.std(differences) / 20
    assert low == pytest.approx(mean - 1.96 * error, abs=0.03)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.03)
    assert bootstrap_interval(differences) == (low, high)
    assert bootstrap_interval([0.0] * 5) == (0.0, 0.0)
    low, high = bootstrap_interval([0.0, 0.0, 0.0, 0.0, 5.0])
    assert 0.0 == low < high <= 5.0  # no mean of resamples lies beyond them


def test_how_often_an_interval_of_five_seeds_holds_the_mean():
    """What the docstring and the README say of it."""
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(list(rng.normal(size=5))) for _ in range(500)]
    assert np.mean([low <= 0 <= high for low, high in intervals]) == pytest.approx(0.84, abs=0.04)


def test_few_seeds_are_shown_one_by_one_and_many_as_an_interval():
    few = printed([networks({8: [1.0, 2.0], 14: [4.0, 1.5]})])
    assert "plain 8 to 14" in few
    assert "+3.00, -0.50" in few
    many = printed([networks({8: [1.0] * 5, 14: [2.0, 3.0, 4.0, 5.0, 6.0]})])
    assert "+3.00 on average over 5 seeds, 95 % bootstrap interval +" in many


def test_one_depth_is_not_compared():
    assert differences_table([networks({8: [1.0, 2.0]})]) is None
    assert differences_table([networks({8: [1.0], 14: [2.0]}, "diverged")]) is None
