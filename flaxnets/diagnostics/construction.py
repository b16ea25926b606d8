"""A deep plain network made from a shallow one and identities, then trained further."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from flaxnets.decoding import Count, Positive
from flaxnets.diagnostics.finding import MeasureOptions, NotPossibleError, TrainingPlan
from flaxnets.diagnostics.layers import Variables, watch_modules
from flaxnets.diagnostics.panels import WIDTH, Line, draw_lines
from flaxnets.diagnostics.study import (
    DiagnosedStudy,
    MeasuredNetwork,
    NetworkName,
    Setting,
    split_name,
)
from flaxnets.models.cost import count_cost
from flaxnets.models.resnet import ResNet
from flaxnets.parallel import data_mesh, replicate
from flaxnets.reporting.figures import STYLES, scale_errors, write_png_and_svg
from flaxnets.reporting.findings import Finding, Table
from flaxnets.training import RunResult, TrainSetup, TrainState, train_run
from flaxnets.training.config import InitFrom
from flaxnets.training.evaluation import compute_logits
from flaxnets.training.loop import EVAL_BATCH

EPSILON = 1e-5  # epsilon of `flaxnets.models.layers.batch_norm`
CONTINUED_EPOCHS = 20
CIRCLES = {"marker": "o", "ms": 5, "mfc": "white", "mew": 1.4}


def insert_identities(
    shallow: ResNet, variables: Variables, deep: ResNet, images: jax.Array
) -> dict[str, Any]:
    """Make variables with which the plain network `deep` computes the function of `shallow`.

    This is the argument of He et al. (2015), section 1, that a deeper network need not be worse:
    its extra blocks, at the end of each stage, are identities. Their kernels copy each channel.
    Their BatchNorms undo their own normalisation: running statistics are those of the signal on
    `images`, the scale is its standard deviation, the bias its mean. Rectified signals pass the
    rectifiers unchanged.

    Raises:
      ValueError: `deep` is not `shallow` with more two-convolution blocks.
    """
    sizes = (shallow.stage_sizes, deep.stage_sizes)
    alike = shallow.clone(stage_sizes=deep.stage_sizes) == deep
    more = all(few <= many for few, many in zip(*sizes, strict=False))
    if not alike or not more or deep.residual or deep.block != "basic" or deep.preactivation:
        raise ValueError(
            "identities can only be inserted between the blocks of plain networks of one family"
        )

    @jax.jit
    def stage_statistics(variables: Variables, images: jax.Array) -> list[tuple[Any, Any]]:
        # Statistics in bfloat16 would be too coarse to undo.
        seen = watch_modules(shallow.clone(dtype=jnp.float32), variables, images)
        ends = [
            seen[f"stage{stage}_block{size}"][1]
            for stage, size in enumerate(shallow.stage_sizes, 1)
        ]
        return [(end.mean((0, 1, 2)), end.var((0, 1, 2))) for end in ends]

    params, stats = dict(variables["params"]), dict(variables["batch_stats"])
    for stage, (mean, var) in enumerate(stage_statistics(variables, images), 1):
        width = len(mean)
        copy = jnp.zeros((3, 3, width, width)).at[1, 1].set(jnp.eye(width))
        scale = jnp.sqrt(var + EPSILON)
        for block in range(sizes[0][stage - 1] + 1, sizes[1][stage - 1] + 1):
            name = f"stage{stage}_block{block}"
            params[name] = {
                **{f"conv{i}": {"kernel": copy} for i in (1, 2)},
                **{f"bn{i}": {"scale": scale, "bias": mean} for i in (1, 2)},
            }
            stats[name] = {f"bn{i}": {"mean": mean, "var": var} for i in (1, 2)}
    # Copy every leaf: a buffer can be donated only once.
    return jax.tree.map(np.array, {"params": params, "batch_stats": stats})


@dataclass(frozen=True)
class History:
    """Training error in percent after each epoch of a run, at these updates."""

    steps: list[Count]
    train_error: list[float]

    @classmethod
    def from_rows(cls, rows: list[dict[str, Any]]) -> Self:
        return cls([row["step"] for row in rows], [row["train_error"] for row in rows])

    def make_line(self, name: NetworkName, label: str, **marks: Any) -> Line:
        """Make the line of the training error against epoch."""
        per_epoch = next((step for step in self.steps if step), 1)
        epochs = [step / per_epoch for step in self.steps]
        style = {**STYLES["training error"], **marks, "clip_on": False}
        return Line(name, epochs, self.train_error, style, f"{split_name(name)[1]} {label}")


@dataclass(frozen=True)
class Construction:
    """A deep network made from a shallow one.

    Attributes:
      shallow, deep: names of the networks.
      identities: number of blocks inserted.
      training_images: number of training images; logits and errors are those of all of them.
      largest_difference_of_logits: largest difference between the logits of the shallow network
        and of the construction.
      train_error_shallow, train_error_constructed, train_error_from_scratch: training errors in
        percent.
      status: status of the run that trains the construction.
      continued: rows of that run's `metrics.csv`.
      histories: training errors of the two networks trained from scratch.
    """

    study: Setting
    shallow: NetworkName
    deep: NetworkName
    identities: Count
    training_images: Positive
    largest_difference_of_logits: float
    train_error_shallow: float
    train_error_constructed: float
    train_error_from_scratch: float
    status: Literal["finished", "diverged"]
    continued: list[dict[str, float]]
    histories: dict[NetworkName, History]

    @classmethod
    def measure(cls, study: DiagnosedStudy, options: MeasureOptions) -> Self | None:
        plain = [network for network in study.of_kind("plain") if network.model.block == "basic"]
        if len(plain) < 2:
            raise NotPossibleError(
                "it needs plain networks of two-convolution blocks at two depths"
            )
        shallow, deep = plain[0], plain[-1]
        variables = insert_identities(
            shallow.model, shallow.variables, deep.model, study.train.images
        )
        logits = [
            exact_logits(network.model, values, study)
            for network, values in ((shallow, shallow.variables), (deep, variables))
        ]
        labels = study.dataset.train.labels
        errors = [100 * float((found.argmax(1) != labels).mean()) for found in logits]
        continued = continue_training(study, options, shallow, deep, variables)
        if continued.status == "unfinished":
            return None
        return cls(
            study=study.setting,
            shallow=shallow.name,
            deep=deep.name,
            identities=sum(deep.model.stage_sizes) - sum(shallow.model.stage_sizes),
            training_images=len(labels),
            largest_difference_of_logits=float(np.abs(logits[0] - logits[1]).max()),
            train_error_shallow=errors[0],
            train_error_constructed=errors[1],
            train_error_from_scratch=deep.run.result.final("train_error"),
            status=continued.status,
            continued=continued.evaluated,
            histories={
                network.name: History.from_rows(network.run.result.evaluated)
                for network in (shallow, deep)
            },
        )

    def draw(self, path: Path) -> None:
        """Draw training error against epoch: both networks from scratch, and the construction."""
        start = {"step": 0, "train_error": self.train_error_constructed}
        built = History.from_rows([start, *self.continued])
        lines = [
            *(history.make_line(name, "from scratch") for name, history in self.histories.items()),
            built.make_line(self.deep, f"made from {split_name(self.shallow)[1]}", **CIRCLES),
        ]
        figure = Figure(figsize=(WIDTH, 4.8), layout="constrained")
        ax = figure.subplots()
        scale_errors(ax, [error for line in lines for error in line.y], "training error")
        ax.set(xlim=(0, 1.05 * max(x for line in lines for x in line.x)), xlabel="epoch")
        draw_lines(ax, lines, self.study)
        ax.set_title("plain", fontsize="medium")
        title = f"{self.deep} made from {self.shallow} and {self.identities} identity blocks"
        write_png_and_svg(figure, path, f"{title}\n{self.study}")

    def describe(self) -> Finding:
        constructed, scratch = self.train_error_constructed, self.train_error_from_scratch
        largest = self.largest_difference_of_logits
        finite = math.isfinite(largest)
        difference = f"differ by at most {largest:.1e}" if finite else "are not all finite"
        steps, end = int(self.continued[-1]["step"]), f"{self.continued[-1]['train_error']:.2f}"
        diverged = self.status == "diverged"
        sentences = [
            f"{self.deep}, made from the trained {self.shallow} and {self.identities} identity "
            f"blocks, has a training error of {constructed:.2f} %; that of {self.shallow} is "
            f"{self.train_error_shallow:.2f} %.",
            f"On all {self.training_images:,} training images, their logits {difference}.",
            f"Trained from scratch, {self.deep} ended at {scratch:.2f} %"
            f"{compare_errors(scratch, constructed)}.",
            f"Trained further from the construction for {steps:,} updates, it "
            f"{'diverges' if diverged else f'ends at {end} %'} (seed {self.study.seed}).",
        ]
        built = f"{self.shallow} and identities"
        rows = [
            *(
                (name, "from scratch", f"{history.steps[-1]:,}", f"{history.train_error[-1]:.2f}")
                for name, history in self.histories.items()
            ),
            (self.deep, built, "0", f"{constructed:.2f}"),
            (self.deep, built, f"{steps:,}", "diverged" if diverged else end),
        ]
        headings = ("network", "start", "updates", "training error, %")
        title = "A deep network made from a shallow one"
        return Finding(title, " ".join(sentences), Table(headings, rows))


def exact_logits(model: ResNet, variables: dict[str, Any], study: DiagnosedStudy) -> np.ndarray:
    """Compute the logits of all training images in full float32."""
    data = study.dataset
    # Accelerators round float32 in convolutions unless told not to.
    with jax.default_matmul_precision("highest"):
        return compute_logits(
            model.clone(dtype=jnp.float32),
            variables,
            data.preprocess,
            data.train.images,
            EVAL_BATCH,
        )


def compare_errors(scratch: float, constructed: float) -> str:
    """Compare the error of training from scratch with the construction's, as they are printed."""
    gap = round(scratch, 2) - round(constructed, 2)
    if not math.isfinite(gap):
        return ""
    if abs(gap) < 0.005:
        return ", as low as that of the construction"
    if gap < 0:
        return f", {-gap:.2f} points lower than the construction"
    return (
        f", {gap:.2f} points higher: a better solution exists, and this training has not found it"
    )


def continue_training(
    study: DiagnosedStudy,
    options: MeasureOptions,
    shallow: MeasuredNetwork,
    deep: MeasuredNetwork,
    variables: dict[str, Any],
) -> RunResult:
    """Train a constructed network with the study's recipe, in a separate run directory.

    Raises:
      NotPossibleError: the recipe's batches do not fit this machine.
    """
    recipe = deep.run.config.recipe
    examples, devices = len(study.dataset.train.labels), jax.device_count()
    if not 0 < recipe.batch_size <= examples or recipe.batch_size % devices:
        raise NotPossibleError(
            f"batches of {recipe.batch_size} of {examples} images do not split evenly over the "
            f"{devices} devices of this machine"
        )
    study_epochs = recipe.total_steps(examples) // (examples // recipe.batch_size)
    epochs = options.epochs or max(1, min(study_epochs, CONTINUED_EPOCHS))
    recipe = replace(recipe, epochs=epochs, steps=None)
    mesh = data_mesh()
    model: Any = deep.restored.model
    setup = TrainSetup.create(model, deep.run.depth, recipe, study.dataset, mesh)
    images, seed = len(study.train.labels), deep.run.seed
    config = replace(
        deep.run.config,
        recipe=recipe,
        evaluate_every=setup.evaluate_every,
        total_steps=setup.total_steps,
        init_from=InitFrom(shallow.name, f"step {shallow.restored.step}, {images} images"),
    )

    def begin(state: TrainState) -> TrainState:
        return state.replace(**replicate(variables, mesh))

    name = f"{deep.name}-from-{shallow.name}"
    directory = study.out / name / f"{epochs}-epochs-{images}-images-seed-{seed}"
    work = float(count_cost(deep.model, setup.image_shape, study.dataset.num_classes).work)
    plan = TrainingPlan(name, work, setup.total_steps, setup.steps_per_epoch, recipe.batch_size)
    with options.watch(plan) as on_progress:
        return train_run(
            setup, seed, directory, on_progress, options.stop, config=config, begin=begin
        )
