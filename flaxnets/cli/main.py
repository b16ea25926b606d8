"""Running a command: exit status, one-line errors and warnings."""

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
    """Standard stream that ignores failures.

    A log on a full disk, a closed pipe or a vanished terminal must not end hours of work.
    """

    def write(self, data: Any) -> int:
        try:
            # A non-blocking stream that is full returns None.
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def _make_output_safe() -> None:
    """Keep failures to print and characters outside the encoding from ending the process."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # Closed: the next opened file would get this number, and all that is printed.
            os.open(os.devnull, os.O_RDWR)
        if name == "stdin":
            continue
        stream = getattr(sys, name)
        file = io.BufferedWriter(_LenientFile(number, "w", closefd=False))
        encoding = stream.encoding if stream is not None else "utf-8"
        safe = io.TextIOWrapper(file, encoding, errors="replace", line_buffering=True)
        setattr(sys, name, safe)


def _check_devices() -> None:
    """Raise an `InputError` if this machine lacks the platforms in JAX_PLATFORMS."""
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # AssertionError without a plugin
        platforms = os.environ.get("JAX_PLATFORMS", "")
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"JAX finds no device for JAX_PLATFORMS={platforms}; unset it, or set JAX_PLATFORMS=cpu"
            + (f" ({reason})" if reason else "")
        ) from error


def run_command(main: Callable[[list[str] | None], int], arguments: list[str] | None = None) -> int:
    """Run `main` and return the exit status; a user's mistake prints one line and returns 2.

    Without `arguments`, the command owns the process, with its output and signals.
    """
    if arguments is None:
        _make_output_safe()
        # While they import, scripts leave SIGINT to the system.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Silence TFDS and Orbax logging; real failures still raise.
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
                _check_devices()  # without devices, each use fails differently
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
        _print_error(f"process {jax.process_index()} of {jax.process_count()} failed: {error}")
        print(
            "if another process is lost, restart all of them to resume from the newest checkpoint",
            file=sys.stderr,
        )
    if arguments is None or jax.distributed.is_initialized():
        # A normal exit would wait for other processes, which may be gone or waiting for this one,
        # and Orbax's threads would log the same error again.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    return 1


def _show_unraisable(event: Any) -> None:
    """Show unraisable errors, except those of Orbax's tasks after their event loop has failed."""
    if str(event.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(event)


def _print_error(error: Exception | str) -> None:
    print(f"error: {printable(error)}", file=sys.stderr)


def _show_warning(
    shown: set[str], message: Warning | str, category: type[Warning], *place: Any, **_: Any
) -> None:
    """Show the library's own warnings once, in one line each, and others as Python does."""
    text = warnings.formatwarning(message, category, place[0], place[1])
    if issubclass(category, FallbackWarning):
        text = f"warning: {printable(message)}\n"
        if text in shown:
            return
        shown.add(text)
    sys.stderr.write(text)
