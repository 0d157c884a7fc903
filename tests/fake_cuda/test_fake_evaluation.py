"""Attacks of an evaluation on a GPU that isn't there: no mixed devices, and the host looks at the GPU now and then."""

import pytest
import torch
from fake_gpu import GPU
from toys import toy_batch, toy_classifier
from watch import Watch

from arat_dist.attacks import Norm
from arat_dist.evaluation.attacks import AutoPGD, EvaluationAttack, RestartedPGD
from arat_dist.evaluation.net import attacked
from arat_dist.evaluation.stages import pixels_of

STEPS_BETWEEN_LOOKS = 5
LOOKS_BESIDE = 3
"""Waits of an attempt beside those of its steps: who still stands, before the next one."""

LINF: tuple[Norm, float] = ("linf", 8 / 255)
L2: tuple[Norm, float] = ("l2", 0.5)
L1: tuple[Norm, float] = ("l1", 12.0)
ATTACKS: dict[str, EvaluationAttack] = {
    "pgd20": RestartedPGD(*LINF, steps=20),
    "pgd20, restarted": RestartedPGD(*LINF, steps=20, restarts=2),
    "apgd-ce": AutoPGD(*LINF, steps=20),
    "apgd-ce l2": AutoPGD(*L2, steps=20),
    "apgd-ce l1": AutoPGD(*L1, steps=20),
    "apgd-ce, restarted": AutoPGD(*LINF, steps=20, restarts=2),
    "apgd-ce for another net": AutoPGD(*LINF, steps=20, stops=False),
    "apgd-t": AutoPGD(*LINF, steps=20, num_targets=2),
}


def waits_of(name: str) -> list[str]:
    """Those of an attack on one batch."""
    with Watch():
        classifier = toy_classifier().float().to(GPU)
        images, labels, keys = (tensor.to(GPU) for tensor in toy_batch())
        pixels = pixels_of(images, torch.float32)
    with Watch() as watch, attacked(classifier) as net:
        ATTACKS[name](net, pixels, labels, keys)
    return watch.found.waits


@pytest.mark.parametrize("name", ATTACKS)
def test_the_host_looks_every_few_steps(on_fake_gpu, name):
    made = ATTACKS[name]
    num_attempts = max(getattr(made, "restarts", 1), getattr(made, "num_targets", 1))
    num_looks = made.steps // STEPS_BETWEEN_LOOKS + LOOKS_BESIDE
    waits = on_fake_gpu(waits_of, name)
    assert len(waits) <= num_attempts * num_looks
