"""Guards: nets that only hide their gradients trip them, an honest one doesn't; each sign by its figures."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from robust_net import digit_batch
from test_stages import Pictures
from torch import Tensor, nn

from arat_dist.config import EvalConfig
from arat_dist.data.loader import Batch
from arat_dist.engine import Rank
from arat_dist.evaluation.attacks import evaluation_attacks
from arat_dist.evaluation.guards import (
    ProbeFigures,
    branch_warnings,
    notes_warnings,
    probe_warnings,
    square_warnings,
)
from arat_dist.evaluation.ledger import Ledger
from arat_dist.evaluation.probes import Probes, probe
from arat_dist.evaluation.stages import Runner
from arat_dist.evaluation.verdicts import Nets, Verdicts, measure
from arat_dist.models.classifier import Classifier

HONEST = ProbeFigures(
    num_samples=32, measured=20, single_step=24, few_steps=21, many_steps=20, black_box=25, zero_gradients=0
)


def test_honest_figures_pass():
    assert probe_warnings(HONEST) == []
    assert probe_warnings(replace(HONEST, other_branch=3)) == []


@pytest.mark.parametrize(
    ("changes", "sign"),
    [
        ({"single_step": 19, "few_steps": 21}, "one step beats ten: FGSM leaves 19 of 32 pictures, PGD-10 21"),
        ({"measured": 28, "many_steps": 20}, "more steps keep helping: PGD-50 from two starts leaves 20 of 32"),
        ({"black_box": 18}, "black box beats white box: 500 queries without gradients leave 18 of 32"),
        ({"zero_gradients": 2}, "gradients vanish: the loss of 2 of 32 pictures has a gradient of zero"),
        ({"other_branch": 23}, "branches look swapped: PGD-10 leaves 21 of 32 pictures on the branch that was"),
    ],
)
def test_each_sign_is_seen_by_itself(changes, sign):
    (warning,) = probe_warnings(replace(HONEST, **changes))
    assert warning.startswith(sign)
    assert "\n" not in warning


@pytest.mark.parametrize(
    "changes",
    [{"single_step": 20}, {"measured": 21}, {"black_box": 19}, {"zero_gradients": 1}, {"other_branch": 22}],
)
def test_one_sample_is_left_to_chance(changes):
    assert probe_warnings(replace(HONEST, **changes)) == []


def test_square_at_the_end_of_a_suite_is_watched():
    assert square_warnings([("apgd-ce", 50), ("fab-t", 48), ("square", 47)], 100) == []
    (warning,) = square_warnings([("apgd-ce", 50), ("fab-t", 48), ("square", 40)], 100)
    assert warning.startswith("black box beats white box: Square breaks 8 of the 48 pictures")
    assert square_warnings([("square", 40)], 100) == []
    assert square_warnings([("square", 40), ("apgd-ce", 10)], 100) == []


def test_the_clean_branch_is_announced():
    assert branch_warnings("adv", is_split=True) == branch_warnings("clean", is_split=False) == []
    (warning,) = branch_warnings("clean", is_split=True)
    assert "the clean branch was measured" in warning


def test_an_export_that_is_not_what_its_notes_say():
    noted = {"clean_accuracy": 0.95, "robust_accuracy": 0.6}
    assert notes_warnings(noted, clean_accuracy=0.94, robust_accuracy=0.55, num_samples=300) == []
    (warning,) = notes_warnings(noted, clean_accuracy=0.97, robust_accuracy=0.1, num_samples=300)
    assert warning.startswith("robust_accuracy is 0.100, the export's own notes say 0.600")
    assert notes_warnings({}, clean_accuracy=0.1, robust_accuracy=0.0, num_samples=300) == []
    assert notes_warnings({"clean_accuracy": None}, clean_accuracy=0.1, robust_accuracy=None, num_samples=9) == []


class Digits(Pictures):
    """A loader of the digits."""

    def iterate(self, shares: Any, side_at: Any = None) -> Any:
        pixels, labels = digit_batch(1300, 1500)
        for share in shares:
            yield Batch((pixels[share] * 255).round().to(torch.uint8), labels[share], torch.tensor(share))


def warnings_of(net: Any, eps: float = 0.12, attack: str = "pgd20") -> tuple[list[str], ProbeFigures]:
    """What an evaluation of 100 digits would warn of."""
    config = EvalConfig.model_validate({"attack": attack, "norm": "linf", "eps": eps})
    runner = Runner(Digits(), Ledger(None), Rank(0, 1, torch.device("cpu")), 64)
    nets = Nets(net, net)
    verdicts: Verdicts = measure(nets, evaluation_attacks(config), runner, np.arange(100))
    figures = probe(nets, None, Probes("linf", eps), runner, verdicts).figures
    return probe_warnings(figures), figures


class Quantised(nn.Module):
    """Rounds the pixels to 32 levels: right as before, and without any gradient."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * 31).round() / 31)


class Saturated(nn.Module):
    """Logits so large that the softmax is exactly one: the cross-entropy's gradient underflows to zero."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return 1e4 * self.net(x)


class Wavy(nn.Module):
    """A fast ripple on the pixels: its slope rules the gradient, its height hardly the logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.01 * torch.sin(1500 * x))


def test_an_honest_robust_net_passes(robust):
    warnings, figures = warnings_of(robust)
    assert warnings == []
    assert 5 < figures.measured < figures.num_samples == 32


@pytest.mark.parametrize("eps", [0.05, 0.2])
def test_an_honest_net_passes_at_other_radii(robust, eps):
    assert warnings_of(robust, eps)[0] == []


@pytest.mark.parametrize(
    ("mask", "signs"),
    [
        (Quantised, {"gradients vanish", "black box beats white box"}),
        (Saturated, {"gradients vanish", "black box beats white box"}),
        (Wavy, {"black box beats white box"}),
    ],
)
def test_masked_gradients_trip_the_guards(robust, mask, signs):
    masked = mask(robust)
    honest = warnings_of(robust)[1]
    warnings, figures = warnings_of(masked)
    assert figures.measured > honest.measured, "it looks more robust than it is"
    assert signs <= {warning.partition(":")[0] for warning in warnings}, figures


def test_swapped_branches_are_seen(robust):
    """A net whose measured branch was never attacked in training, and whose other one was."""
    torch.manual_seed(0)
    from robust_net import DigitNet

    plain = Classifier(DigitNet(), [0.3] * 3, [0.4] * 3)
    pixels, labels = digit_batch(0, 1280)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for step in range(80):
        at = torch.randint(0, len(pixels), (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(pixels[at]), labels[at]).backward()
        optimizer.step()
    plain.eval().requires_grad_(False)
    config = EvalConfig.model_validate({"attack": "pgd10", "norm": "linf", "eps": 0.12})
    runner = Runner(Digits(), Ledger(None), Rank(0, 1, torch.device("cpu")), 64)
    for measured, other, is_swapped in ((plain, robust, True), (robust, plain, False)):
        verdicts = measure(Nets(measured, measured), evaluation_attacks(config), runner, np.arange(100))
        figures = probe(Nets(measured, measured), other, Probes("linf", 0.12), runner, verdicts).figures
        assert any("branches look swapped" in each for each in probe_warnings(figures)) == is_swapped, figures
