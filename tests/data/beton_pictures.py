"""Pictures for the tests of this folder."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass
class Pictures:
    """A source in memory; pictures may differ in size."""

    pictures: list[NDArray[np.uint8]]
    labels: list[int]
    class_names: Sequence[str] = ("ant", "bee", "cow")
    description: str = "test"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return self.pictures[index], self.labels[index]

    def name_of(self, index: int) -> str:
        return f"picture-{index}"


def smooth_picture(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """A picture that JPEG keeps nearly as it is: planes of different slopes in each channel."""
    rows, columns = np.mgrid[0:height, 0:width] / max(height, width)
    slopes = rng.uniform(-1, 1, (3, 2))
    planes = [128 + 120 * (a * rows + b * columns) / 2 for a, b in slopes]
    return np.clip(np.stack(planes, axis=-1), 0, 255).astype(np.uint8)
