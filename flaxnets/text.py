"""Text for people: names of files and classes may be a stranger's, and hold anything."""


def printable(text: object) -> str:
    """One line of `text`, with `?` for what a terminal would obey or could not encode."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))


def shorten(text: str, most: int) -> str:
    """`text` in at most `most` characters, with `?` for any that cannot be printed or drawn."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def plural(count: int, noun: str) -> str:
    """`1 run`, `2,000 runs`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def spreadsheet_text(text: str) -> str:
    """`text` that a spreadsheet takes for text, not for a formula, and a terminal can print."""
    text = shorten(text, 32_767)  # what a cell holds
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:10:00`."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


def megabytes(size: int) -> str:
    """`3.1 MB`."""
    return f"{size / 1e6:.1f} MB" if size >= 50_000 else f"{size / 1e3:.1f} kB"


def millions(count: int) -> str:
    """`0.20 M`."""
    return f"{count / 1e6:.2f} M"
