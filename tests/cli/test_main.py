"""Exit status and output of a command, where output goes wrong: closed, full, of few characters."""

import os
import subprocess
import sys

import pytest

from flaxnets.cli.main import run_command

# A command that prints, fails or is interrupted, as a real process of its own.
TINY = """
import sys
from flaxnets.cli.main import run_command
from flaxnets.cli.progress import plain_console
from flaxnets.errors import InputError

def main(arguments):
    for _ in range(2000):
        plain_console().print("0.07 ± 0.01 █")
    print("printed")
    print("to stderr ±", file=sys.stderr)
    if "bad" in sys.argv:
        raise InputError("bad ±")
    if "interrupted" in sys.argv:
        raise KeyboardInterrupt
    open("done", "w").close()
    return 0

sys.exit(run_command(main))
"""


def tiny(line, place, **environment):
    """Run a shell's line with the command in it: status, stdout, stderr."""
    (place / "tiny.py").write_text(TINY)
    command = f"{sys.executable} {place / 'tiny.py'}"
    finished = subprocess.run(
        ["bash", "-c", line.format(command)],
        cwd=place,
        env={**os.environ, **environment},
        capture_output=True,
        check=False,
    )
    return finished.returncode, finished.stdout.decode(), finished.stderr.decode()


@pytest.mark.parametrize(
    ("line", "status"),
    [
        pytest.param("{} > /dev/full 2>&1", 0, marks=pytest.mark.slow),
        ("{} >&- 2>&- <&-", 0),
        pytest.param("{} bad > /dev/full 2>&1", 2, marks=pytest.mark.slow),
        ("{} interrupted > /dev/full 2>&-", 130),
        pytest.param(
            "({}; echo $? > status) 2>&1 | true; exit $(cat status)", 0, marks=pytest.mark.slow
        ),
    ],
)
def test_no_failure_to_print_changes_the_exit_status(tmp_path, line, status):
    assert tiny(line, tmp_path) == (status, "", "")
    assert (tmp_path / "done").exists() == (status == 0)


def test_an_encoding_without_a_character(tmp_path):
    status, out, err = tiny("{}", tmp_path, PYTHONIOENCODING="ascii")
    assert (status, err) == (0, "to stderr ?\n")
    assert out == "0.07 ? 0.01 ?\n" * 2000 + "printed\n"


def test_platforms_that_are_not_there(monkeypatch, capsys):
    """As JAX_PLATFORMS=cuda has it, with and without a plugin."""
    import jax

    for error in (AssertionError(), RuntimeError("Unable to initialize backend 'cuda'")):

        def devices(error=error):
            raise error

        monkeypatch.setattr(jax, "devices", devices)
        assert run_command(lambda _: len(jax.devices()), []) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: JAX finds no device for JAX_PLATFORMS=")
        assert err.count("\n") == 1


def test_another_error_keeps_its_traceback():
    def main(_):
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run_command(main, [])
