"""Workloads of the benchmark: what all contenders do, a row of its table each."""

from dataclasses import dataclass

# Cost of a step's passes for each image, in forward passes: a backward pass costs two.
TASKS = {"train": 3, "evaluate": 1}
PRECISIONS = ("float32", "bfloat16")
EVALUATION_BATCHES = 8


@dataclass(frozen=True)
class Workload:
    """A network, its inputs, and what is done with it: `task`, one of `TASKS`.

    A step of training is one update. A step of evaluation is one pass over a split of
    `EVALUATION_BATCHES` batches, in evaluation mode, which ends with its loss and error.
    """

    model: str
    image_size: int = 32
    batch_size: int = 128
    precision: str = "float32"
    task: str = "train"

    @property
    def lines(self) -> tuple[str, str]:
        """Name in two lines."""
        size = f"{self.image_size}x{self.image_size}"
        return f"{self.model}, {self.task}", f"{size}, batch {self.batch_size}, {self.precision}"

    @property
    def name(self) -> str:
        return ", ".join(self.lines)

    @property
    def images_per_step(self) -> int:
        return self.batch_size * (EVALUATION_BATCHES if self.task == "evaluate" else 1)
