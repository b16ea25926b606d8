"""Sentences on what a study shows about training error and depth, for console and report."""

import math
from collections.abc import Sequence
from typing import Any

from flaxnets.studies.results import NetworkResults, Run, curves


def conclude(networks: Sequence[NetworkResults], updates: int | None) -> str:
    """Describe in sentences what the numbers show about training error and depth.

    `updates` is the length of a run, if known.
    """
    if not networks:
        return "No run has been started yet."
    clauses = []
    rises: dict[str, list[float]] = {"plain": [], "residual": []}  # in points, by curve
    for curve, members in curves(networks).items():
        done = [n for n in members if not math.isnan(n.mean("train_error"))]
        errors = [network.mean("train_error") for network in done]
        listed = ", ".join(f"{e:.1f} % at {n.depth}" for n, e in zip(done, errors, strict=True))
        verdict, rise = judge_errors(errors)
        clauses.append(f"that of {curve} {verdict} ({listed or 'none finished'})")
        if len(done) > 1:
            rises.setdefault(members[0].kind, []).append(rise)
    clauses[0] = clauses[0].replace("that", "the training error", 1)
    length = f"After {updates:,} updates" if updates else "Trained"
    finding = describe_rises(rises["plain"], rises["residual"])
    sentences = [f"{length} from {count_seeds(networks)}, {', '.join(clauses)}{finding}."]
    states = [run.result.status for network in networks for run in network.runs]
    lost = [f"{states.count(s)} {s}" for s in ("unfinished", "diverged") if s in states]
    if lost:
        sentences.append(f"Of {len(states)} runs, left out of the means: {', '.join(lost)}.")
    return " ".join([*sentences, *describe_convergence(networks)])


def judge_errors(errors: list[float]) -> tuple[str, float]:
    """Describe how errors in percent, ordered by depth, change; also return the rise in points.

    The rise is NaN if the highest error lies in between, which is neither a rise with depth nor
    the lack of one.
    """
    if len(errors) < 2:
        return "is known at too few depths to compare", math.nan
    rise = errors[-1] - errors[0]
    if rise < 1 and max(errors) >= max(errors[0], errors[-1]) + 1:
        return "is highest in between", math.nan
    if rise <= -1:
        return "falls with depth", rise
    if rise < 1:
        return "does not rise with depth", rise
    if errors == sorted(errors):
        return "rises with depth", rise
    return "is higher at the greatest depth than at the least, though not in order", rise


def describe_rises(plain: Sequence[float], residual: Sequence[float]) -> str:
    """Describe what the rises of training error with depth, in points, show, if anything."""
    if plain and max(plain) < 1:
        return ": no degradation in these numbers"
    if not plain or not min(plain) >= 1:
        return ""
    if residual and max(residual) < 1:
        return ": the degradation problem, and residual learning curing it"
    if residual and not any(map(math.isnan, residual)):
        return (
            f": the degradation problem, in both kinds, by {max(plain):.1f} points in plain "
            f"networks and by {max(residual):.1f} in residual ones"
        )
    return ": the degradation problem"


def describe_convergence(networks: Sequence[NetworkResults]) -> list[str]:
    """Describe in a sentence whether training error still moved when the finished runs ended."""
    movement = [(f"{n.kind}-{n.depth}", last_movement(run)) for n in networks for run in n.finished]
    moving = list(dict.fromkeys(name for name, points in movement if points >= 1))
    if moving:
        return [
            f"Not converged: over the last quarter the training error of {', '.join(moving)} moved "
            "by a point or more."
        ]
    if any(math.isnan(points) for _, points in movement):
        return ["Too few epochs to tell whether training has converged."]
    if movement:
        return ["Converged: no training error moved by a point over the last quarter."]
    return []


def count_seeds(networks: Sequence[NetworkResults]) -> str:
    """Format the number of seeds as `one seed`, `3 seeds` or `1 to 3 seeds`."""
    counts = sorted({len(network.runs) for network in networks})
    if counts == [1]:
        return "one seed"
    return f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seeds"


def last_movement(run: Run) -> float:
    """Return the points that training error moved over the last quarter of a run.

    It is NaN if the epochs that were evaluated do not tell: there is none from before that quarter,
    or the error may have moved by a point before it began.
    """
    rows = run.result.evaluated
    quarter = 0.75 * run.result.step
    before = [row for row in rows if row["step"] <= quarter][-1:]
    last = [row["train_error"] for row in rows if row["step"] > quarter]
    if not before:
        return math.nan
    inside = max(last, default=0.0) - min(last, default=0.0)
    longer = [*last, before[0]["train_error"]]
    movement = max(longer) - min(longer)
    steps: Any = (row["step"] for row in run.result.rows)
    later = any(before[0]["step"] < step <= quarter for step in steps)
    return math.nan if later and inside < 1 <= movement else movement
