"""A deep plain network made from a shallow one and identities, then trained further."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from flaxnets.diagnostics.finding import (
    Finding,
    Network,
    NotPossibleError,
    Options,
    Setting,
    Study,
    Table,
    TrainingPlan,
    split_name,
)
from flaxnets.diagnostics.layers import Variables, watch_modules
from flaxnets.diagnostics.panels import WIDTH
from flaxnets.models.cost import count_cost
from flaxnets.models.resnet import ResNet
from flaxnets.parallel import data_mesh, replicate
from flaxnets.reporting.figures import (
    STYLES,
    colour_depths,
    label_ends,
    scale_errors,
    style_axes,
    write_png_and_svg,
)
from flaxnets.training import Recipe, RunResult, TrainSetup, TrainState, train_run
from flaxnets.training.evaluation import compute_logits
from flaxnets.training.loop import EVAL_BATCH

EPSILON = 1e-5  # epsilon of `flaxnets.models.layers.batch_norm`
CONTINUED_EPOCHS = 20


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

    steps: list[int]
    train_error: list[float]

    @classmethod
    def from_rows(cls, rows: list[dict[str, Any]]) -> Self:
        return cls([row["step"] for row in rows], [row["train_error"] for row in rows])


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
    shallow: str
    deep: str
    identities: int
    training_images: int
    largest_difference_of_logits: float
    train_error_shallow: float
    train_error_constructed: float
    train_error_from_scratch: float
    status: str
    continued: list[dict[str, float]]
    histories: dict[str, History]

    def __post_init__(self) -> None:
        self.study.check_names([self.shallow, self.deep])
        if self.histories.keys() != {self.shallow, self.deep}:
            raise ValueError("its histories are not those of its networks")
        for history in self.histories.values():
            if not history.steps or len(history.steps) != len(history.train_error):
                raise ValueError("a history does not have an error for each epoch")
        if not self.continued or any(
            {"step", "train_error"} - row.keys() for row in self.continued
        ):
            raise ValueError("its rows are not those of a run")

    @classmethod
    def measure(cls, study: Study, options: Options) -> Self | None:
        plain = [network for network in study.of_kind("plain") if network.model.block == "basic"]
        if len(plain) < 2:
            raise NotPossibleError(
                "it needs plain networks of two-convolution blocks at two depths"
            )
        shallow, deep = plain[0], plain[-1]
        images = study.train.images
        variables = insert_identities(shallow.model, shallow.variables, deep.model, images)
        data = study.dataset
        # Accelerators round float32 in convolutions unless told not to.
        with jax.default_matmul_precision("highest"):
            logits = [
                compute_logits(
                    network.model.clone(dtype=jnp.float32),
                    values,
                    data.preprocess,
                    data.train.images,
                    EVAL_BATCH,
                )
                for network, values in ((shallow, shallow.variables), (deep, variables))
            ]
        labels = data.train.labels
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
            continued=continued.rows,
            histories={
                network.name: History.from_rows(network.run.result.rows)
                for network in (shallow, deep)
            },
        )

    def draw(self, path: Path) -> None:
        """Draw training error against epoch: both networks from scratch, and the construction."""
        colours = colour_depths(self.study.depths)
        depths = {name: split_name(name)[1] for name in (self.shallow, self.deep)}
        start = History([0], [self.train_error_constructed])
        rows = History.from_rows(self.continued)
        built = History(start.steps + rows.steps, start.train_error + rows.train_error)
        lines = [
            (self.histories[self.shallow], depths[self.shallow], "from scratch", {}),
            (self.histories[self.deep], depths[self.deep], "from scratch", {}),
            (
                built,
                depths[self.deep],
                f"made from {depths[self.shallow]}",
                {"marker": "o", "ms": 5, "mfc": "white", "mew": 1.4},
            ),
        ]
        figure = Figure(figsize=(WIDTH, 4.8), layout="constrained")
        ax = figure.subplots()
        scale_errors(
            ax, [e for history, *_ in lines for e in history.train_error], "training error"
        )
        ends = []
        for history, depth, label, marks in lines:
            per_epoch = next((step for step in history.steps if step), 1)
            epochs = [step / per_epoch for step in history.steps]
            style = {**STYLES["training error"], **marks, "color": colours[depth]}
            ax.plot(epochs, history.train_error, clip_on=False, **style)
            shown = [
                p for p in zip(epochs, history.train_error, strict=True) if math.isfinite(p[1])
            ]
            if shown:
                ends.append((*shown[-1], f"{depth} {label}", colours[depth]))
        ax.set_xlim(left=0)
        ax.set_xlabel("epoch")
        ax.set_title("plain", fontsize="medium")
        style_axes(ax)
        label_ends(ax, ends)
        title = f"{self.deep} made from {self.shallow} and {self.identities} identity blocks"
        write_png_and_svg(figure, path, f"{title}\n{self.study}")

    def describe(self) -> Finding:
        constructed, scratch = self.train_error_constructed, self.train_error_from_scratch
        if math.isfinite(self.largest_difference_of_logits):
            difference = f"differ by at most {self.largest_difference_of_logits:.1e}"
        else:
            difference = "are not all finite"
        gap = round(scratch, 2) - round(constructed, 2)
        if abs(gap) < 0.005:
            compared = ", as low as that of the construction"
        elif gap > 0:
            compared = (
                f", {gap:.2f} points higher: a better solution exists, and this training has not "
                "found it"
            )
        elif gap < 0:
            compared = f", {-gap:.2f} points lower than the construction"
        else:
            compared = ""
        steps = int(self.continued[-1]["step"])
        ends = f"ends at {self.continued[-1]['train_error']:.2f} %"
        sentences = [
            f"{self.deep} made from the trained {self.shallow} and {self.identities} blocks that "
            f"are identities has a training error of {constructed:.2f} % ({self.shallow} itself: "
            f"{self.train_error_shallow:.2f} %); the logits of the two on all "
            f"{self.training_images:,} training images {difference}.",
            f"Trained from scratch, {self.deep} ended at {scratch:.2f} %{compared}.",
            f"Trained on from the construction for {steps:,} updates, it "
            f"{'diverges' if self.status == 'diverged' else ends} (seed {self.study.seed}).",
        ]
        rows = [
            *(
                (name, "from scratch", f"{history.steps[-1]:,}", f"{history.train_error[-1]:.2f}")
                for name, history in self.histories.items()
            ),
            (self.deep, f"{self.shallow} and identities", "0", f"{constructed:.2f}"),
            (
                self.deep,
                f"{self.shallow} and identities",
                f"{steps:,}",
                "diverged"
                if self.status == "diverged"
                else f"{self.continued[-1]['train_error']:.2f}",
            ),
        ]
        headings = ("network", "start", "updates", "training error, %")
        title = "A deep network made from a shallow one"
        return Finding(title, " ".join(sentences), Table(headings, rows))


def continue_training(
    study: Study, options: Options, shallow: Network, deep: Network, variables: dict[str, Any]
) -> RunResult:
    """Train a constructed network with the study's recipe, in a separate run directory.

    Raises:
      NotPossibleError: the recipe's batches do not fit this machine.
    """
    recipe = Recipe.from_config(deep.run.config.get("recipe"))
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
    name, seed = f"{deep.name}-from-{shallow.name}", deep.run.seed
    config = {
        **deep.run.config,
        "recipe": asdict(recipe),
        "total_steps": setup.total_steps,
        "init_from": {
            "run": shallow.name,
            "step": shallow.restored.step,
            "images": len(study.train.labels),
        },
    }

    def begin(state: TrainState) -> TrainState:
        return state.replace(**replicate(variables, mesh))

    work = count_cost(deep.model, setup.image_shape, study.dataset.num_classes).work
    plan = TrainingPlan(
        name, float(work), setup.total_steps, setup.steps_per_epoch, recipe.batch_size
    )
    run = f"{epochs}-epochs-{len(study.train.labels)}-images-seed-{seed}"
    with options.watch(plan) as on_progress:
        return train_run(
            setup,
            seed,
            study.out / name / run,
            on_progress,
            options.stop,
            config=config,
            begin=begin,
        )
