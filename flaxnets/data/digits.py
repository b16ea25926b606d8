"""scikit-learn's digits as a TFDS data set that needs neither a download nor TensorFlow."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """1,797 real handwritten digits, 8x8 grey pixels, 10 classes; 1,437 to train, 360 to test.

    The test set of the UCI "Optical Recognition of Handwritten Digits" data (Alpaydin and Kaynak
    1998, doi:10.24432/C50P49), as scikit-learn bundles it; its 17 grey levels are spread over
    0..255. The split is stratified by class and always the same.
    """

    name = "digits"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(names=[str(i) for i in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        # Imported here because it takes a second, and digits are prepared only once.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits: Any = load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)
        train, test = train_test_split(
            np.arange(len(images)), test_size=0.2, stratify=digits.target, random_state=0
        )
        return {
            name: self._generate_examples(images[rows], digits.target[rows])
            for name, rows in (("train", train), ("test", test))
        }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            # Encoded here: TFDS would encode an array with TensorFlow.
            png = io.BytesIO()
            Image.fromarray(image).save(png, "png")
            png.seek(0)
            yield i, {"image": png, "label": int(label)}
