"""Whether a difference between two networks is more than one lucky seed."""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
from scipy import stats

from flaxnets.studies.study import Network

ENOUGH_SEEDS = 5  # for an interval


def paired_differences(shallow: Network, deep: Network, metric: str) -> list[float]:
    """A final metric of `deep` less that of `shallow`, of each seed that both have finished.

    Runs of one seed share batches and augmentation, so that they are compared with each other.
    """
    before = {run.seed: run.result.final(metric) for run in shallow.finished}
    return [
        run.result.final(metric) - before[run.seed] for run in deep.finished if run.seed in before
    ]


def depth_pairs(networks: list[Network]) -> list[tuple[Network, Network]]:
    """Neighbouring depths, and the least with the greatest."""
    pairs = list(pairwise(networks))
    return [*pairs, (networks[0], networks[-1])] if len(networks) > 2 else pairs


def bootstrap_interval(differences: list[float]) -> tuple[float, float]:
    """95 % interval of the mean: percentiles over 10,000 resamples, the same each time.

    Of as few as five seeds it is too narrow: there it covers about 84 % (of normal differences).
    """
    result = stats.bootstrap(
        (np.asarray(differences),),
        np.mean,
        n_resamples=10_000,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def compare_depths(curves: Iterable[list[Network]], metric: str) -> list[tuple[str, list[float]]]:
    """`plain 18 to 34` and the paired differences, for the depths of each curve that have any."""
    compared = [
        (f"{deep.kind} {shallow.depth} to {deep.depth}", paired_differences(shallow, deep, metric))
        for networks in curves
        for shallow, deep in depth_pairs(networks)
    ]
    return [(name, differences) for name, differences in compared if differences]


def describe_differences(differences: list[float]) -> str:
    """Each of them; from five on their mean and its interval."""
    if len(differences) < ENOUGH_SEEDS:
        return ", ".join(f"{difference:+.2f}" for difference in differences)
    low, high = bootstrap_interval(differences)
    return (
        f"{sum(differences) / len(differences):+.2f} in the mean of {len(differences)} seeds, "
        f"95 % bootstrap interval {low:+.2f} to {high:+.2f}"
    )
