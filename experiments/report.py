"""Write the report of a study: figure, tables, diagnostics and configuration in one HTML file.

    python experiments/report.py runs/degradation/digits-cifar

The file needs neither network nor server. The study may still be training.
"""

import signal

if __name__ == "__main__":
    # Importing takes seconds: until `run_command`, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import os
import sys
from pathlib import Path

from flaxnets.cli.arguments import ArgumentParser
from flaxnets.cli.main import run_command
from flaxnets.cli.progress import plain_console
from flaxnets.errors import InputError
from flaxnets.files import write_atomic
from flaxnets.reporting.html_report import (
    make_report,
    read_diagnostics,
    read_environments,
    read_picture,
)
from flaxnets.studies.directory import RUN_FILES
from flaxnets.studies.results import read_runs


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    runs = read_runs(args.study)
    environments = read_environments(args.study)
    environments += [each for run in runs for each in run.environments if each not in environments]
    diagnostics = read_diagnostics(args.study)
    picture = read_picture(args.study / "degradation.png")
    write_atomic(args.out, make_report(runs, environments, diagnostics, picture))
    plain_console().print(f"report: {args.out}", soft_wrap=True)
    return 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "study", type=Path, metavar="STUDY_DIR", help="study directory written by degradation.py"
    )
    parser.add_argument(
        "--out", type=Path, help=".html file to write (default: STUDY_DIR/report.html)"
    )
    args = parser.parse(arguments)
    try:
        check_study_directory(args.study)
        args.out = args.out or args.study / "report.html"
        check_out(args.out)
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; give another path") from error
    return args


def check_study_directory(study: Path) -> None:
    if not study.exists():
        raise InputError(f"there is no directory {study}; give a study directory")
    if not study.is_dir():
        raise InputError(f"{study} is a file; give a study directory")
    if is_study(study):
        return
    if any((study / name).exists() for name in RUN_FILES):
        above = study.resolve().parents[1]
        advice = (
            f"give {study / '..' / '..'}, the study it belongs to"
            if is_study(above)
            else ("give a study directory, written by experiments/degradation.py")
        )
        raise InputError(f"{study} is a single run; {advice}")
    raise InputError(
        f"{study} is not a study (no study.json); give a directory written by degradation.py"
    )


def is_study(path: Path) -> bool:
    return (path / "study.json").exists() or any(path.glob("*-*/seed-*/config.json"))


def check_out(out: Path) -> None:
    if out.is_dir():
        raise InputError(f"--out {out} is a directory; give a file, such as {out / 'report.html'}")
    if out.suffix != ".html":
        raise InputError(f"--out {out} does not end in .html; give a name that does")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no directory {out.parent}; create it first")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise InputError(f"--out {out} cannot be written; give a writable path")


if __name__ == "__main__":
    sys.exit(run_command(main))
