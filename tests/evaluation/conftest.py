"""A small net that is robust to some degree, on handwritten digits of 8x8."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from robust_net import DigitNet, digit_batch

from arat_dist.attacks import PGD
from arat_dist.models.classifier import Classifier


@pytest.fixture(scope="session")
def robust() -> Classifier:
    """A classifier of ten classes, trained on attacked digits for some seconds: float32, eval mode, frozen."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    classifier = Classifier(DigitNet(), [0.3, 0.3, 0.3], [0.4, 0.4, 0.4])
    pixels, labels = digit_batch(0, 1280)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    attack = PGD("linf", 0.12, 0.06, 3)
    for step in range(160):
        at = torch.randint(0, len(pixels), (64,), generator=torch.Generator().manual_seed(step))
        x, y = pixels[at], labels[at]

        def loss(moved: Any, y: Any = y) -> Any:
            return F.cross_entropy(classifier(moved), y, reduction="none")

        moved = attack(loss, x, at + 10_000 * step)
        optimizer.zero_grad()
        loss(moved).mean().backward()
        optimizer.step()
    return classifier.eval().requires_grad_(False)
