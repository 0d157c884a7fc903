"""The small net of these tests, and its pictures."""

from typing import Any

import torch
from torch import Tensor, nn


class DigitNet(nn.Module):
    """Two convolutions with norms, pooled to 4x4; 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.fc = nn.Linear(32 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = nn.functional.avg_pool2d(self.norm2(self.conv2(x)).relu(), 2)
        return self.fc(x.flatten(1))


def digit_batch(start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Scikit-learn's digits from one index up to another: pixels in [0,1], float32 [B,3,8,8], and labels."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    grey = torch.tensor(digits.images[start:stop] / 16, dtype=torch.float32)
    return grey[:, None].repeat(1, 3, 1, 1), torch.tensor(digits.target[start:stop])
