"""Text for people. Names of files and classes are untrusted and may contain any character."""


def printable(text: object) -> str:
    """Return `text` on one line, with `?` for what a terminal would obey or could not encode."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))


def shorten(text: str, most: int) -> str:
    """Cut `text` to at most `most` characters, with `?` for any that cannot be printed."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def plural(count: int, noun: str) -> str:
    """Format a count with its noun: `1 run`, `2,000 runs`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def spreadsheet_text(text: str) -> str:
    """Make `text` printable, and keep a spreadsheet from reading it as a formula."""
    text = shorten(text, 32_767)  # the capacity of a cell
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def duration(seconds: float) -> str:
    """Format seconds: `0:42`, `12:05`, `3:10:00`."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


def megabytes(size: int) -> str:
    """Format a number of bytes: `3.1 MB`."""
    return f"{size / 1e6:.1f} MB" if size >= 50_000 else f"{size / 1e3:.1f} kB"


def millions(count: int) -> str:
    """Format a count in millions: `0.20 M`."""
    return f"{count / 1e6:.2f} M"
