"""Text for people: names of files and classes may be a stranger's, and hold anything."""


def printable(text: object) -> str:
    """One line of `text`, with `?` for what a terminal would obey or could not encode."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))


def shorten(text: str, most: int) -> str:
    """`text` in at most `most` characters, with `?` for any that cannot be printed or drawn."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= most else f"{text[: most - 1]}…"
