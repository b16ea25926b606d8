"""Run a command: its exit status, and its errors and warnings in one line each."""

import io
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import tensorflow_datasets as tfds
from absl import logging as absl_logging

from flaxnets.errors import FallbackWarning, InputError, StorageError
from flaxnets.text import printable


class _LenientFile(io.FileIO):
    """A standard stream whose failures are ignored: a full disk below a log, a reader that has
    left or a vanished terminal must not end work of hours."""

    def write(self, data: Any) -> int:
        try:
            # A non-blocking stream that is full returns None.
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def _make_output_safe() -> None:
    """Let no failure to print, nor a character that the encoding lacks, end this process."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # Closed. The next file to be opened would get this number, and all that is printed.
            os.open(os.devnull, os.O_RDWR)
        if name == "stdin":
            continue
        stream = getattr(sys, name)
        file = io.BufferedWriter(_LenientFile(number, "w", closefd=False))
        encoding = stream.encoding if stream is not None else "utf-8"
        safe = io.TextIOWrapper(file, encoding, errors="replace", line_buffering=True)
        setattr(sys, name, safe)


def _check_devices() -> None:
    """Refuse a JAX_PLATFORMS that this machine does not have."""
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # the former without a plugin for it
        platforms = os.environ.get("JAX_PLATFORMS", "")
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"JAX finds no device for JAX_PLATFORMS={platforms}; unset it, or set JAX_PLATFORMS=cpu"
            + (f" ({reason})" if reason else "")
        ) from error


def run_command(main: Callable[[list[str] | None], int], arguments: list[str] | None = None) -> int:
    """Run `main` and give the process's exit status: the user's mistakes are one line and 2.

    Without `arguments` the process is the command's own, with its output and signals.
    """
    if arguments is None:
        _make_output_safe()
        # Scripts leave it to the system while they import.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # TFDS and Orbax tell of their own inner life; what goes wrong there is raised as well.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _show_unraisable
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    tfds.disable_progress_bar()
    warnings.showwarning = partial(_show_warning, set())
    warnings.simplefilter("always", FallbackWarning)
    try:
        try:
            return main(arguments)
        except (AssertionError, RuntimeError):
            if not jax.distributed.is_initialized():
                _check_devices()  # where there are none, every use of them fails in its own way
            raise
    except InputError as error:
        _print_error(error)
        return 2
    except StorageError as error:
        _print_error(error)
    except KeyboardInterrupt:  # before there was anything to save
        return 130
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        if not isinstance(error, jax.errors.JaxRuntimeError) and "Gloo" not in str(error):
            traceback.print_exc()
        _print_error(
            f"process {jax.process_index()} of {jax.process_count()} cannot go on: {error}"
        )
        print(
            "when another process is lost, start all of them again to continue from the newest "
            "checkpoint",
            file=sys.stderr,
        )
    if arguments is None or jax.distributed.is_initialized():
        # An orderly end would wait for other processes, which may be gone or wait for this one,
        # and for Orbax's threads, which tell at length of what has just been said in a line.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    return 1


def _show_unraisable(event: Any) -> None:
    """All but what Orbax's tasks say when their loop has ended with an error."""
    if str(event.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(event)


def _print_error(error: Exception | str) -> None:
    print(f"error: {printable(error)}", file=sys.stderr)


def _show_warning(
    shown: set[str], message: Warning | str, category: type[Warning], *place: Any, **_: Any
) -> None:
    """The library's own warnings in a line each, once; others as Python shows them."""
    text = warnings.formatwarning(message, category, place[0], place[1])
    if issubclass(category, FallbackWarning):
        text = f"warning: {printable(message)}\n"
        if text in shown:
            return
        shown.add(text)
    sys.stderr.write(text)
