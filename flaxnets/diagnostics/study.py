"""Networks and images of a study, as the diagnostics measure them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from flaxnets.data import Dataset, Split
from flaxnets.decoding import Count, Positive
from flaxnets.errors import InputError
from flaxnets.models.resnet import ResNet
from flaxnets.parallel import data_mesh, replicate
from flaxnets.reporting.figures import colour_depths
from flaxnets.studies.directory import run_directory
from flaxnets.studies.own_data import open_own_dataset
from flaxnets.studies.restore import Restored, restore
from flaxnets.studies.results import Run, read_runs

# Kind and depth, such as `plain-56`.
NetworkName = Annotated[str, msgspec.Meta(pattern=r"^(plain|residual)-[0-9]{1,4}\Z")]

# Values of layers or blocks, in the order of the signal.
Layers = Annotated[dict[str, float], msgspec.Meta(min_length=1)]
ByNetwork = Annotated[dict[NetworkName, Layers], msgspec.Meta(min_length=1)]


def split_name(name: NetworkName) -> tuple[str, int]:
    """Return kind and depth of a network; these tuples sort plain networks first."""
    kind, depth = name.split("-")
    return kind, int(depth)


def deepest_of_each_kind(names: Iterable[NetworkName]) -> list[NetworkName]:
    """Return the deepest plain network and the deepest residual one, if any."""
    return list({split_name(name)[0]: name for name in sorted(names, key=split_name)}.values())


@dataclass(frozen=True)
class Setting:
    """Facts that all numbers of a study share; figures take their titles and colours from them.

    Attributes:
      dataset: name of the data set.
      updates: number of updates of a run.
      seed: seed of the networks that were measured.
      depths: all depths of the study, of any kind and seed; each has its colour.
    """

    dataset: str
    updates: Count
    seed: Count
    depths: tuple[Positive, ...]

    def __str__(self) -> str:
        return f"{self.dataset}, {self.updates:,} updates, seed {self.seed}"

    def colour(self, name: NetworkName) -> str:
        """Return the colour of a network's depth.

        Raises:
          ValueError: it is not a network of the study.
        """
        depth = split_name(name)[1]
        if depth not in self.depths:
            raise ValueError(f"{name} is not of the study's depths")
        return colour_depths(self.depths)[depth]


@dataclass(frozen=True)
class MeasuredNetwork:
    """A trained network of the study; `model` computes every layer only once, without `remat`."""

    run: Run
    restored: Restored
    model: ResNet

    @property
    def name(self) -> NetworkName:
        return f"{self.run.kind}-{self.run.depth}"

    @property
    def variables(self) -> dict[str, Any]:
        return self.restored.variables


class Images(NamedTuple):
    """Normalised images on the devices, and their labels."""

    images: jax.Array
    labels: jax.Array


@dataclass(frozen=True)
class DiagnosedStudy:
    """Finished plain and residual networks of one seed, which the diagnostics measure.

    Attributes:
      path: directory of the study.
      networks: plain ones first, each kind in the order of depth.
      depths: all depths of the study, of any kind and seed.
      train, test: fixed samples of the two splits.
    """

    path: Path
    networks: list[MeasuredNetwork]
    depths: tuple[int, ...]
    dataset: Dataset
    train: Images
    test: Images

    @property
    def setting(self) -> Setting:
        run = self.networks[0].run
        return Setting(self.dataset.name, run.result.step, run.seed, self.depths)

    @property
    def out(self) -> Path:
        """Directory of the findings."""
        return self.path / "diagnostics"

    def of_kind(self, kind: str) -> list[MeasuredNetwork]:
        return [network for network in self.networks if network.run.kind == kind]

    def twins(self) -> list[MeasuredNetwork]:
        """Return the plain and residual network of the greatest depth that both kinds have."""
        depths = [{network.run.depth for network in self.of_kind(k)} for k in ("plain", "residual")]
        deepest = max(set.intersection(*depths), default=None)
        return [network for network in self.networks if network.run.depth == deepest]


def read_study(
    path: Path,
    seed: int | None,
    num_images: int,
    data_dir: Path | None,
    on_folder: Callable[[str], None] = lambda folder: None,
) -> DiagnosedStudy:
    """Restore the finished plain and residual networks of one seed, and sample their images.

    Args:
      seed: None for the seed that most networks have, the lowest if there are several.
      num_images: number of images to sample from each split.
      data_dir: TFDS data directory, None for the default one.
      on_folder: called with the folder of pictures that the runs name before it is read.

    Raises:
      InputError: `path` has no such networks, or the data set is not the one they were trained on.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a study directory; train one with degradation.py")
    runs = read_runs(path)
    networks = [_restore_network(path, run) for run in _choose_runs(path, runs, seed)]
    dataset = _load_images(networks[0], data_dir, on_folder)
    train, test = (
        _sample(networks[0], split, num_images) for split in (dataset.train, dataset.test)
    )
    depths = tuple(sorted({run.depth for run in runs}))
    return DiagnosedStudy(path, networks, depths, dataset, train, test)


def _choose_runs(path: Path, runs: list[Run], seed: int | None) -> list[Run]:
    kinds = ("plain", "residual")
    finished = [run for run in runs if run.kind in kinds and run.result.status == "finished"]
    seeds = sorted(run.seed for run in finished)
    if not seeds:
        raise InputError(
            f"{path} has no finished run of a plain or residual network; "
            "train some with python experiments/degradation.py --depths 18,34,56"
        )
    if seed is None:
        seed = max(seeds, key=seeds.count)
    if seed not in seeds:
        known = ", ".join(map(str, sorted(set(seeds))))
        raise InputError(f"--seed must be one of {known}, not {seed}")
    return [run for run in finished if run.seed == seed]


def _restore_network(path: Path, run: Run) -> MeasuredNetwork:
    restored = restore(run_directory(path, *run.key))
    model = restored.model
    if not isinstance(model, ResNet) or model.preactivation:
        raise InputError(f"{path}: {run.kind}-{run.depth} is not a version 1 ResNet")
    # Values that `remat` recomputes cannot be captured.
    return MeasuredNetwork(run, restored, model.clone(remat=False))


def _load_images(
    network: MeasuredNetwork, data_dir: Path | None, on_folder: Callable[[str], None]
) -> Dataset:
    """Load the data set that the study was trained on."""
    if not network.run.config.dataset.can_be_opened:
        raise InputError(
            f"{network.name} was trained on a data set that has no name to open it by; "
            "diagnostics need one"
        )
    name, dataset = open_own_dataset(network.restored, network.name, data_dir, on_folder)
    expected = network.run.config.dataset.sha256
    if not isinstance(dataset, Dataset) or dataset.fingerprint() != expected:
        raise InputError(f"{name} is not the data this study was trained on (sha256 differs)")
    return dataset.resized(network.restored.preprocess.size)


def _sample(network: MeasuredNetwork, split: Split, num_images: int) -> Images:
    """Draw a fixed sample of images, normalised, in the order of the split."""
    rows = np.arange(len(split.labels))
    if num_images < len(rows):
        rows = np.sort(np.random.default_rng(0).choice(rows, num_images, replace=False))
    images = network.restored.preprocess(split.images[rows])
    return Images(*replicate((images, jnp.asarray(split.labels[rows])), data_mesh()))
