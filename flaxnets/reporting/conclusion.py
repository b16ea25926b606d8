"""Sentences on what a study shows about training error and depth, for console and report."""

import math
from collections.abc import Sequence

from flaxnets.studies.results import Network, Run, curves


def conclude(networks: Sequence[Network], updates: int | None) -> str:
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
        rise = errors[-1] - errors[0] if errors else 0.0
        # Neither a rise with depth nor the lack of one.
        peak = rise < 1 and bool(errors) and max(errors) >= max(errors[0], errors[-1]) + 1
        if len(done) < 2:
            verdict = "is known at too few depths to compare"
        elif peak:
            verdict = "is highest in between"
        elif rise <= -1:
            verdict = "falls with depth"
        elif rise < 1:
            verdict = "does not rise with depth"
        elif errors == sorted(errors):
            verdict = "rises with depth"
        else:
            verdict = "is higher at the greatest depth than at the least, though not in order"
        clauses.append(f"that of {curve} {verdict} ({listed or 'none finished'})")
        if len(done) > 1:
            rises.setdefault(members[0].kind, []).append(math.nan if peak else rise)
    finding = ""
    if rises["plain"] and max(rises["plain"]) < 1:
        finding = ": no degradation in these numbers"
    elif rises["plain"] and min(rises["plain"]) >= 1:
        finding = ": the degradation problem"
        if rises["residual"] and max(rises["residual"]) < 1:
            finding += ", and residual learning curing it"
        elif rises["residual"] and not any(map(math.isnan, rises["residual"])):
            points = {kind: max(rises[kind]) for kind in ("plain", "residual")}
            finding += (
                f", in both kinds, by {points['plain']:.1f} points in plain networks and by "
                f"{points['residual']:.1f} in residual ones"
            )
    clauses[0] = clauses[0].replace("that", "the training error", 1)
    length = f"After {updates:,} updates" if updates else "Trained"
    sentences = [f"{length} from {count_seeds(networks)}, {', '.join(clauses)}{finding}."]

    states = [run.result.status for network in networks for run in network.runs]
    lost = [f"{states.count(s)} {s}" for s in ("unfinished", "diverged") if s in states]
    if lost:
        sentences.append(f"Of {len(states)} runs, left out of the means: {', '.join(lost)}.")
    movement = [(f"{n.kind}-{n.depth}", last_movement(run)) for n in networks for run in n.finished]
    moving = list(dict.fromkeys(name for name, points in movement if points >= 1))
    if moving:
        sentences.append(
            f"Not converged: over the last quarter the training error of {', '.join(moving)} moved "
            "by a point or more."
        )
    elif any(math.isnan(points) for _, points in movement):
        sentences.append("Too few epochs to tell whether training has converged.")
    elif movement:
        sentences.append("Converged: no training error moved by a point over the last quarter.")
    return " ".join(sentences)


def count_seeds(networks: Sequence[Network]) -> str:
    """Format the number of seeds as `one seed`, `3 seeds` or `1 to 3 seeds`."""
    counts = sorted({len(network.runs) for network in networks})
    if counts == [1]:
        return "one seed"
    return f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seeds"


def last_movement(run: Run) -> float:
    """Return the points that training error moved over the last quarter of a run.

    It is NaN if the run has no row from before that quarter.
    """
    rows = run.result.rows
    quarter = 0.75 * run.result.step
    before = [row["train_error"] for row in rows if row["step"] <= quarter][-1:]
    last = [row["train_error"] for row in rows if row["step"] > quarter] + before
    return max(last) - min(last) if before else math.nan
