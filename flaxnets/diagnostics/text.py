"""Wording of findings."""

import math
from collections.abc import Iterable, Sequence


def listed(words: Sequence[str]) -> str:
    """Join words as `a, b and c`."""
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)


def significant(value: float) -> str:
    """Format with three significant digits: `0.0238`, `641`, `1,360`, `5.71e-07`; `nan`, `inf`."""
    text = f"{value:#.3g}".rstrip(".")
    return f"{float(text):,.0f}" if "e+" in text and abs(value) < 1e7 else text


def finite(values: Iterable[float]) -> list[float]:
    """Return the finite values, or one NaN if there are none."""
    return [value for value in values if math.isfinite(value)] or [math.nan]


def span(values: Iterable[float]) -> str:
    """Format the lowest and the highest finite value as `0.250 to 0.450`."""
    values = list(values)
    shown = finite(values)
    if math.isnan(shown[0]):
        return "not finite"
    lost = f" ({len(values) - len(shown)} not finite)" if len(shown) < len(values) else ""
    return f"{significant(min(shown))} to {significant(max(shown))}{lost}"
