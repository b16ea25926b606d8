"""Why plain networks degrade: diagnostics of the finished runs of a study.

    python experiments/diagnostics.py runs/degradation/digits-cifar

Of each diagnostic it writes a figure, its numbers and a paragraph made from them into
STUDY_DIR/diagnostics, for plain and residual networks of one seed. Names for --only: gradients,
responses, residuals, construction, landscape, and gradient-log for runs trained with
--log-gradients.
"""

import signal

if __name__ == "__main__":
    # Importing takes seconds: until `run_command`, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxnets.config import DATASET_NAME
from flaxnets.console import (
    ArgumentParser,
    Interruption,
    StudyProgress,
    check_batch_size,
    check_choice,
    duration,
    plain_console,
    positive,
    run_command,
    words,
)
from flaxnets.data import Dataset, Split, load_dataset
from flaxnets.diagnostic_figures import Curve, Panel, draw_panels, draw_surfaces
from flaxnets.diagnostics import (
    gradient_norms,
    insert_identities,
    layer_names,
    layer_responses,
    lesion_errors,
    loss_surface,
    read_gradients,
    residual_ratios,
    without_batch_norm,
)
from flaxnets.errors import InputError
from flaxnets.evaluation import compute_logits
from flaxnets.files import explained, write_atomic
from flaxnets.memory import keep_memory
from flaxnets.models.cost import count_cost
from flaxnets.models.resnet import ResNet
from flaxnets.parallel import data_mesh, replicate
from flaxnets.restore import Restored, restore
from flaxnets.study import Run, lock_directory, read_runs, run_directory
from flaxnets.training import Program, Progress, Recipe, RunResult, TrainState, train_run
from flaxnets.training.loop import EVAL_BATCH
from flaxnets.training.steps import init_variables

# Of a rectangle of points around a network, along both directions.
OFFSETS = np.linspace(-1.0, 1.0, 15)
CONTINUED_EPOCHS = 20


@dataclass(frozen=True)
class Network:
    """A trained network of the study."""

    run: Run
    restored: Restored
    model: ResNet

    @property
    def name(self) -> str:
        return f"{self.run.kind}-{self.run.depth}"

    @property
    def variables(self) -> dict[str, Any]:
        return self.restored.variables


class Images(NamedTuple):
    """Normalised images on the devices, and their labels."""

    images: jax.Array
    labels: jax.Array


@dataclass(frozen=True)
class Study:
    """What the diagnostics work on."""

    networks: list[Network]
    dataset: Dataset
    train: Images  # fixed samples of the splits
    test: Images
    out: Path

    def of_kind(self, kind: str) -> list[Network]:
        return [network for network in self.networks if network.run.kind == kind]

    def twins(self) -> list[Network]:
        """Plain and residual network of the greatest depth that both kinds have."""
        depths = [{network.run.depth for network in self.of_kind(k)} for k in ("plain", "residual")]
        deepest = max(set.intersection(*depths), default=None)
        return [network for network in self.networks if network.run.depth == deepest]


class Finding(NamedTuple):
    """What a diagnostic has found, beside its figure."""

    title: str
    paragraph: str
    numbers: dict[str, Any]


class NotPossibleError(Exception):
    """The study has not what a diagnostic needs."""


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    keep_memory()
    console = plain_console()
    networks = read_networks(args.study, args.seed)
    dataset = load_images(networks[0], args.data_dir)
    out = args.study / "diagnostics"
    with explained(out, 0):
        out.mkdir(exist_ok=True)
    study = Study(
        networks,
        dataset,
        sample(networks[0], dataset.train, args.images),
        sample(networks[0], dataset.test, args.images),
        out,
    )
    seed = networks[0].run.seed
    names = ", ".join(network.name for network in networks)
    console.print(f"finished networks of seed {seed}: {names}", soft_wrap=True)
    command = shlex.join(["python", *sys.argv]) if arguments is None else "the same command"
    with Interruption(command) as interruption, lock_directory(out):
        for name in args.only or DIAGNOSTICS:
            start = time.perf_counter()
            figure = out / f"{name}.png"
            try:
                found = DIAGNOSTICS[name](study, args, figure, interruption)
            except NotPossibleError as reason:
                console.print(f"{name}: skipped, {reason}", soft_wrap=True)
                continue
            if found is None:
                interruption.say_how_to_continue()
                return interruption.exit_status
            found = found._replace(paragraph=f"{found.paragraph} Seed {seed}.")
            write_finding(out, name, found)
            took = duration(time.perf_counter() - start)
            console.print(f"\n{found.title} ({took})\n{found.paragraph}", soft_wrap=True)
            if interruption.requested():
                interruption.say_how_to_continue()
                return interruption.exit_status
    console.print(f"\nfigures and numbers: {out}", soft_wrap=True)
    return 0


# The diagnostics. Each draws its figure and says what it shows; None: interrupted.


def gradients(
    study: Study, args: argparse.Namespace, figure: Path, _: Interruption
) -> Finding | None:
    """At the start, with and without BatchNorm, and at the end."""
    batch = Images(*(array[: args.batch] for array in study.train))
    initial = {network.name: initial_variables(network) for network in study.networks}
    moments: dict[str, Callable[[Network], tuple[Any, Any]]] = {
        "at the start": lambda network: (network.model, initial[network.name]),
        "at the start, without BatchNorm": lambda network: (
            without_batch_norm(network.model),
            {"params": initial[network.name]["params"]},
        ),
        "at the end of training": lambda network: (network.model, network.variables),
    }
    panels, sentences = [], []
    numbers: dict[str, Any] = {}
    for moment, find in moments.items():
        norms = {network.name: gradient_norms(*find(network), *batch) for network in study.networks}
        curves = [
            curve_of(network, list(norms[network.name].values())[:-1]) for network in study.networks
        ]
        panels.append(Panel(moment, "convolution", "norm of the gradient", curves, log=True))
        numbers[moment] = norms
        clauses = []
        for network in study.networks:
            convolutions = list(norms[network.name].values())[:-1]
            clauses.append(f"in {network.name} {flow(convolutions)}")
        start = f"{moment[0].upper()}{moment[1:]}"
        sentences.append(f"{start}, the norm of a kernel's gradient goes {', '.join(clauses)}.")
    draw_panels(panels, figure, f"gradients of the layers' kernels, {describe_data(study)}")
    sentences.append(f"The loss is that of {len(batch.labels)} training images.")
    return Finding("Do gradients vanish?", " ".join(sentences), numbers)


def gradient_log(
    study: Study, args: argparse.Namespace, figure: Path, _: Interruption
) -> Finding | None:
    """Through training, from what the runs have logged."""
    logged = {}
    for network in study.networks:
        directory = run_directory(args.study, *network.run.key)
        if rows := read_gradients(directory, layer_names(network.variables["params"])):
            logged[network.name] = (network, rows)
    if not logged:
        raise NotPossibleError("no run has been trained with --log-gradients")
    panels, sentences = [], []
    places = {"first convolution": 0, "middle convolution": None, "last convolution": -2}
    for title, place in places.items():
        curves = []
        for network, rows in logged.values():
            names = layer_names(network.variables["params"])
            name = names[len(names) // 2 if place is None else place]
            x = [row["epoch"] for row in rows]
            curves.append(replace(curve_of(network, [row[name] for row in rows]), x=x))
        panels.append(Panel(title, "epoch", "norm of the gradient", curves, log=True, markers=True))
    for network, rows in logged.values():
        first = [row["conv1"] for row in rows]
        sentences.append(
            f"the gradient of the first layer of {network.name} is from {min(first):.3g} to "
            f"{max(first):.3g}"
        )
    draw_panels(panels, figure, f"gradients through training, {describe_data(study)}")
    paragraph = f"Over the epochs, the norm of {', '.join(sentences)}."
    numbers = {name: rows for name, (_, rows) in logged.items()}
    return Finding("Gradients through training", paragraph, numbers)


def responses(
    study: Study, args: argparse.Namespace, figure: Path, _: Interruption
) -> Finding | None:
    """Figure 7 of the paper."""
    spreads = {
        network.name: layer_responses(network.model, network.variables, study.test.images)
        for network in study.networks
    }
    values = {network.name: list(spreads[network.name].values()) for network in study.networks}
    panels = [
        Panel(
            title,
            "3x3 layer" if title == "in order" else "3x3 layer, sorted",
            "standard deviation of the response",
            [curve_of(network, arrange(values[network.name])) for network in study.networks],
        )
        for title, arrange in (
            ("in order", list),
            ("from the greatest to the least", lambda v: sorted(v, reverse=True)),
        )
    ]
    draw_panels(panels, figure, f"layer responses, {describe_data(study)}")
    means = {name: statistics.fmean(v) for name, v in values.items()}
    listed = ", ".join(f"{mean:.2f} in {name}" for name, mean in means.items())
    sentences = [
        f"On {len(study.test.labels)} test images the responses of 3x3 layers have a mean standard "
        f"deviation of {listed}."
    ]
    pairs = [
        (means[f"residual-{n.run.depth}"], means[n.name])
        for n in study.of_kind("plain")
        if f"residual-{n.run.depth}" in means
    ]
    if pairs:
        less = sum(residual < plain for residual, plain in pairs)
        sentences.append(
            f"Residual networks respond less than their plain twins at {less} of {len(pairs)} "
            "depths."
        )
    if all(abs(mean - 1) < 0.05 for mean in means.values()):
        sentences.append("All are about the 1 that BatchNorm starts with.")
    of_residual = [means[network.name] for network in study.of_kind("residual")]
    if len(of_residual) > 1:
        change = of_residual[-1] - of_residual[0]
        sentences.append(
            f"From the least to the greatest depth that of residual networks changes by "
            f"{change:+.2f}; in the paper (Figure 7) it falls, as each of more layers changes the "
            "signal less."
        )
    return Finding("How much layers respond", " ".join(sentences), {"spreads": spreads})


def residuals(
    study: Study, args: argparse.Namespace, figure: Path, _: Interruption
) -> Finding | None:
    """How much each block adds, and what is lost without it."""
    ratios = {
        network.name: residual_ratios(network.model, network.variables, study.test.images)
        for network in study.of_kind("residual")
    }
    lesions = {
        network.name: lesion_errors(network.model, network.variables, *study.test)
        for network in study.networks
    }
    panels = []
    if ratios:
        curves = [
            curve_of(network, list(ratios[network.name].values()))
            for network in study.of_kind("residual")
        ]
        panels.append(Panel("what blocks add", "block", "||F(x)|| / ||x||", curves, markers=True))
    curves = [
        curve_of(network, [v for k, v in lesions[network.name].items() if k])
        for network in study.networks
    ]
    error = f"error on {len(study.test.labels)} test images (%)"
    panels.append(Panel("without one block", "block taken out", error, curves, markers=True))
    draw_panels(panels, figure, f"residual functions and lesions, {describe_data(study)}")
    sentences = []
    if ratios:
        medians = [f"{statistics.median(r.values()):.2f} in {name}" for name, r in ratios.items()]
        sentences.append(f"||F(x)|| / ||x|| has the median {', '.join(medians)}.")
    for name, errors in lesions.items():
        others = [error for block, error in errors.items() if block]
        sentences.append(
            f"Without one of its blocks the error of {name} on {len(study.test.labels)} test "
            f"images is {statistics.median(others):.1f} % in the median and "
            f"{max(others):.1f} % at worst, against {errors[None]:.1f} % whole."
        )
    numbers = {
        "ratios": ratios,
        "lesions": {
            name: {block or "none": error for block, error in errors.items()}
            for name, errors in lesions.items()
        },
    }
    return Finding("Blocks one by one", " ".join(sentences), numbers)


def construction(
    study: Study, args: argparse.Namespace, figure: Path, interruption: Interruption
) -> Finding | None:
    """A deep plain network as good as a shallow one, made by hand, and trained on."""
    plain = [network for network in study.of_kind("plain") if network.model.block == "basic"]
    if len(plain) < 2:
        raise NotPossibleError("it needs plain networks of two-convolution blocks at two depths")
    shallow, deep = plain[0], plain[-1]
    variables = insert_identities(shallow.model, shallow.variables, deep.model, study.train.images)
    # Accelerators round float32 in convolutions unless told not to.
    with jax.default_matmul_precision("highest"):
        logits = [
            compute_logits(
                network.model.clone(dtype=jnp.float32),
                of,
                study.dataset.preprocess,
                study.dataset.train.images,
                EVAL_BATCH,
            )
            for network, of in ((shallow, shallow.variables), (deep, variables))
        ]
    difference = float(np.abs(logits[0] - logits[1]).max())
    labels = study.dataset.train.labels
    errors = [100 * float((found.argmax(1) != labels).mean()) for found in logits]

    continued = continue_training(study, args, shallow, deep, variables, interruption)
    if continued.status == "unfinished":
        return None
    rows = continued.rows
    built = f"{deep.name} from {shallow.name} and identities"
    start = {"step": 0, "train_error": errors[1]}
    curves = [
        history(shallow.name, shallow.run.depth, shallow.run.result.rows, dashed=True),
        history(deep.name, deep.run.depth, deep.run.result.rows, dashed=True),
        history(built, deep.run.depth, [start, *rows]),
    ]
    draw_panels(
        [Panel("training error", "epoch", "training error (%)", curves, markers=True)],
        figure,
        f"{deep.name} made of {shallow.name} and identities, {describe_data(study)}",
    )
    scratch = deep.run.result.final("train_error")
    inserted = sum(deep.model.stage_sizes) - sum(shallow.model.stage_sizes)
    if difference <= 1e-4:
        computes = "computes the same function"
    elif abs(errors[1] - errors[0]) < 1:
        computes = "computes nearly the same function"
    else:
        computes = "does not compute the same function"
    if scratch >= errors[1] + 1:
        compared = ": a better solution exists, and this training has not found it"
    elif scratch <= errors[1] - 1:
        compared = ", which is better than that"
    else:
        compared = ", within a point of that"
    sentences = [
        f"{deep.name} made of the trained {shallow.name} and {inserted} blocks that are identities "
        f"{computes}: its logits on all {len(labels):,} training images differ by at most "
        f"{difference:.1e}, and its training error is {errors[1]:.2f} %, that of "
        f"{shallow.name} {errors[0]:.2f} %.",
        f"Training from scratch ended at {scratch:.2f} %{compared}.",
        f"Trained on from the construction for {continued.step:,} updates ({shallow.name} had "
        f"had {shallow.run.result.step:,}), it "
        + (
            "diverges."
            if continued.status == "diverged"
            else f"is at {continued.final('train_error'):.2f} % training error."
        ),
    ]
    numbers = {
        "shallow": shallow.name,
        "deep": deep.name,
        "largest_difference_of_logits": difference,
        "train_error_shallow": errors[0],
        "train_error_constructed": errors[1],
        "train_error_from_scratch": scratch,
        "status": continued.status,
        "continued": [{k: v if math.isfinite(v) else None for k, v in row.items()} for row in rows],
    }
    return Finding("The solution exists", " ".join(sentences), numbers)


def history(label: str, depth: int, rows: list[dict[str, Any]], dashed: bool = False) -> Curve:
    per_epoch = next((row["step"] for row in rows if row["step"]), 1)
    epochs = [row["step"] / per_epoch for row in rows]
    return Curve(label, depth, epochs, [row["train_error"] for row in rows], dashed)


def continue_training(
    study: Study,
    args: argparse.Namespace,
    shallow: Network,
    deep: Network,
    variables: dict[str, Any],
    interruption: Interruption,
) -> RunResult:
    """Train a constructed network with the study's recipe, in a run directory of its own."""
    recipe = Recipe.from_config(deep.run.config.get("recipe"))
    examples = len(study.dataset.train.labels)
    check_batch_size(recipe.batch_size, examples)
    of_study = recipe.total_steps(examples) // (examples // recipe.batch_size)
    epochs = args.epochs or max(1, min(of_study, CONTINUED_EPOCHS))
    recipe = replace(recipe, epochs=epochs, steps=None)
    mesh = data_mesh()
    model: Any = deep.restored.model
    program = Program.create(model, deep.run.depth, recipe, study.dataset, mesh)
    name, seed = f"{deep.name}-from-{shallow.name}", deep.run.seed
    config = {
        **deep.run.config,
        "recipe": asdict(recipe),
        "total_steps": program.total_steps,
        "init_from": {
            "run": shallow.name,
            "step": shallow.restored.step,
            "images": len(study.train.labels),
        },
    }

    def begin(state: TrainState) -> TrainState:
        return state.replace(**replicate(variables, mesh))

    work = count_cost(deep.model, program.image_shape, study.dataset.num_classes).work
    with StudyProgress(plain_console(), 0, 1, float(work)) as progress:
        run = progress.start_run(
            name, work, program.total_steps, program.steps_per_epoch, recipe.batch_size
        )

        def on_progress(now: Progress) -> None:
            interruption.unsaved.add(name)
            run.update(now)

        result = train_run(
            program,
            seed,
            study.out / name / f"{epochs}-epochs-{len(study.train.labels)}-images-seed-{seed}",
            on_progress,
            interruption.requested,
            config=config,
            begin=begin,
        )
        interruption.unsaved.discard(name)
        run.end(f"{name}: {result.status} after {result.step} updates")
    return result


def landscape(
    study: Study, args: argparse.Namespace, figure: Path, _: Interruption
) -> Finding | None:
    """Of the deepest twins, on one set of training images and over one span."""
    twins = study.twins()
    if not twins:
        raise NotPossibleError("it needs a plain and a residual network of one depth")
    surfaces = {
        network.name: loss_surface(network.model, network.variables, *study.train, OFFSETS)
        for network in twins
    }
    draw_surfaces(
        list(surfaces.items()), OFFSETS, figure, f"loss around networks, {describe_data(study)}"
    )
    middle = len(OFFSETS) // 2
    sentences = []
    for name, surface in surfaces.items():
        centre = surface[middle, middle]
        rim = np.concatenate([surface[0], surface[-1], surface[1:-1, 0], surface[1:-1, -1]])
        lower = int((surface < centre).sum())
        sentences.append(
            f"At {name} the loss is {centre:.3g}; on the rim of the square it is "
            f"{np.median(rim):.3g} in the median, from {rim.min():.3g} to {rim.max():.3g}, and "
            f"{lower or 'none'} of the other {surface.size - 1} points "
            f"{'is' if lower < 2 else 'are'} lower than the network itself."
        )
    sentences.append(
        "Both squares reach as far as the kernels are long, filter by filter; the loss is that of "
        f"{len(study.train.labels)} training images in training mode."
    )
    numbers = {
        "offsets": OFFSETS.tolist(),
        "loss": {name: surface.tolist() for name, surface in surfaces.items()},
    }
    return Finding("Loss landscapes", " ".join(sentences), numbers)


DIAGNOSTICS: dict[str, Callable[..., Finding | None]] = {
    "gradients": gradients,
    "gradient-log": gradient_log,
    "responses": responses,
    "residuals": residuals,
    "construction": construction,
    "landscape": landscape,
}


# Words and lines made from numbers.


def flow(norms: list[float]) -> str:
    """From where the gradient comes to where it goes, and by what factor: no threshold, which would
    say another thing of 99 than of 101."""
    first, last = norms[0], norms[-1]
    ends = f"from {last:.3g} at the last convolution to {first:.3g} at the first"
    if not (math.isfinite(first) and math.isfinite(last)):
        return f"{ends} (not finite)"
    if min(first, last) <= 0:
        return ends
    factor = first / last
    return f"{ends} ({factor:.3g} times)" if factor >= 1 else f"{ends} (1/{1 / factor:.3g})"


def curve_of(network: Network, values: list[float]) -> Curve:
    numbered = list(range(1, len(values) + 1))
    return Curve(network.name, network.run.depth, numbered, values, network.run.kind == "plain")


def describe_data(study: Study) -> str:
    run = study.networks[0].run
    return f"{study.dataset.name}, {run.result.step:,} updates, seed {run.seed}"


def write_finding(out: Path, name: str, found: Finding) -> None:
    """Numbers of its own, and an entry in `diagnostics.json`, from which the report is made."""
    write_atomic(out / f"{name}.json", json.dumps(found.numbers, indent=1) + "\n")
    path = out / "diagnostics.json"
    try:
        entries = {entry["name"]: entry for entry in json.loads(path.read_text())}
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        entries = {}  # not there, or damaged
    entries[name] = {
        "name": name,
        "title": found.title,
        "paragraph": found.paragraph,
        "figure": f"{name}.png",
    }
    in_order = [entries[known] for known in DIAGNOSTICS if known in entries]
    write_atomic(path, json.dumps(in_order, indent=2) + "\n")


# What there is to look at.


def read_networks(path: Path, seed: int | None) -> list[Network]:
    """The finished plain and residual networks of one seed."""
    if not path.is_dir():
        raise InputError(f"{path} is not the directory of a study; train one with degradation.py")
    runs = [
        run
        for run in read_runs(path)
        if run.kind in ("plain", "residual") and run.result.status == "finished"
    ]
    seeds = sorted({run.seed for run in runs})
    if seed is None and seeds:
        finished = [run.seed for run in runs]
        seed = max(seeds, key=finished.count)  # the lowest of those with most networks
    chosen = [run for run in runs if run.seed == seed]
    if not chosen:
        if not seeds:
            raise InputError(
                f"{path} has no finished run of a plain or residual network; "
                "train some with python experiments/degradation.py --depths 18,34,56"
            )
        raise InputError(f"--seed is one of {', '.join(map(str, seeds))}, not {seed}")
    networks = []
    for run in chosen:
        restored = restore(run_directory(path, *run.key))
        model = restored.model
        if not isinstance(model, ResNet) or model.preactivation:
            raise InputError(f"{path}: {run.kind}-{run.depth} is no ResNet of version 1")
        # What `remat` computes again cannot be watched.
        networks.append(Network(run, restored, model.clone(remat=False)))
    return networks


def load_images(network: Network, data_dir: Path | None) -> Dataset:
    """What the study was trained on."""
    own: Any = network.run.config.get("dataset")
    known = isinstance(own, dict) and DATASET_NAME.fullmatch(str(own.get("name")))
    if not known or type(own.get("train_examples")) is not int:
        raise InputError(f"the config of {network.name} names no data set")
    dataset = load_dataset(own["name"], data_dir, own["train_examples"])
    dataset = dataset.resized(network.restored.preprocess.size)
    if dataset.fingerprint() != own.get("sha256"):
        raise InputError(
            f"{own['name']} is no longer what this study was trained with (another sha256)"
        )
    return dataset


def sample(network: Network, split: Split, count: int) -> Images:
    """The same images each time, normalised, in the order of the split."""
    rows = np.arange(len(split.labels))
    if count < len(rows):
        rows = np.sort(np.random.default_rng(0).choice(rows, count, replace=False))
    mesh = data_mesh()
    images = network.restored.preprocess(split.images[rows])
    return Images(*replicate((images, jnp.asarray(split.labels[rows])), mesh))


def initial_variables(network: Network) -> dict[str, Any]:
    """What the run began from: as `create_state`."""
    init_key, _ = jax.random.split(jax.random.key(network.run.seed))
    shape = network.restored.preprocess.input_shape
    return replicate(init_variables(network.model, init_key, shape), data_mesh())


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY_DIR", help="of experiments/degradation.py")
    add("--only", type=words, help="some of them, such as gradients,landscape")
    add("--seed", type=int, help="of the runs to look at (default: the lowest with most runs)")
    add("--images", type=positive(int), default=512, help="of each split (default: %(default)s)")
    add(
        "--batch",
        type=positive(int),
        default=128,
        help="images whose gradient is taken (default: %(default)s)",
    )
    epochs = f"that `construction` trains (default: the study's, at most {CONTINUED_EPOCHS})"
    add("--epochs", type=positive(int), help=epochs)
    add("--data-dir", type=Path, help="where TFDS keeps data sets (default: its own)")
    args = parser.parse(arguments)
    for name in args.only or ():
        check_choice("--only", name, tuple(DIAGNOSTICS))
    return args


if __name__ == "__main__":
    sys.exit(run_command(main))
