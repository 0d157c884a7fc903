"""Guards against overstated robustness: from figures to warnings with their reason; pure functions.

The signs are those of Athalye 2018 (arXiv 1802.00420) and Carlini 2019 (arXiv 1902.06705): an attack that the net only
hides from fails for reasons that show. Counts are of samples; a difference counts from two of them and 5 % on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class ProbeFigures:
    """What cheap attacks left of a few samples, all of them right on the clean picture: counts.

    Attributes:
        num_samples: how many there were.
        measured: left by the attacks of the evaluation itself.
        single_step: left by one step of eps (FGSM).
        few_steps: left by PGD-10.
        many_steps: left by PGD-50 from two starts.
        black_box: left by 500 queries of Square, which asks for no gradient.
        zero_gradients: samples whose loss has a gradient of zero at the clean picture.
        other_branch: left by PGD-10 on the branch that is not measured; None for a net with one branch.
    """

    num_samples: int
    measured: int
    single_step: int
    few_steps: int
    many_steps: int
    black_box: int
    zero_gradients: int
    other_branch: int | None = None

    @property
    def slack(self) -> float:
        """Differences below it are left to chance."""
        return max(2.0, 0.05 * self.num_samples)


def probe_warnings(figures: ProbeFigures) -> list[str]:
    """Why the evaluation may overstate the net, one line each; none for an honest one."""
    return [*_gradient_warnings(figures), *_strength_warnings(figures)]


def _gradient_warnings(figures: ProbeFigures) -> Iterator[str]:
    count = figures.num_samples
    if figures.zero_gradients >= max(1.0, 0.05 * count):
        yield (
            f"gradients vanish: the loss of {figures.zero_gradients} of {count} pictures has a gradient of zero, so "
            "attacks by gradients can't move them; square, or logits without saturation, would be right"
        )
    if figures.few_steps - figures.single_step >= figures.slack:
        yield (
            f"one step beats ten: FGSM leaves {figures.single_step} of {count} pictures, PGD-10 {figures.few_steps}: "
            "gradients inside the ball mislead (gradient masking)"
        )
    if min(figures.measured, figures.many_steps) - figures.black_box >= figures.slack:
        yield (
            f"black box beats white box: 500 queries without gradients leave {figures.black_box} of {count} pictures, "
            f"PGD-50 {figures.many_steps}, the evaluation's own attack {figures.measured}: gradients are masked"
        )


def _strength_warnings(figures: ProbeFigures) -> Iterator[str]:
    count = figures.num_samples
    if figures.measured - figures.many_steps >= figures.slack:
        yield (
            f"more steps keep helping: PGD-50 from two starts leaves {figures.many_steps} of {count} pictures, the "
            f"evaluation's own attack {figures.measured}: a stronger one, such as autoattack, would be right"
        )
    if figures.other_branch is not None and figures.other_branch - figures.few_steps >= figures.slack:
        yield (
            f"branches look swapped: PGD-10 leaves {figures.few_steps} of {count} pictures on the branch that was "
            f"measured and {figures.other_branch} on the other one"
        )


def square_warnings(standing: list[tuple[str, int]], num_samples: int) -> list[str]:
    """Whether Square, at the end of a suite, breaks what attacks by gradients have left (its authors' check).

    Args:
        standing: samples left by each attack, in order.
        num_samples: of the evaluation.
    """
    for (before, left), (name, least) in pairwise(standing):
        if name == "square" and left - least > max(1.0, 0.002 * num_samples):
            return [
                f"black box beats white box: Square breaks {left - least} of the {left} pictures that the attacks up "
                f"to {before} left: gradients may be masked; more queries, or an adaptive attack, would be right"
            ]
    return []


def branch_warnings(branch: str, *, is_split: bool) -> list[str]:
    """Whether the branch of clean pictures was measured, which is not the one that is exported."""
    if not is_split or branch == "adv":
        return []
    return ["the clean branch was measured: it was never attacked in training; exports hold the adv branch"]


def notes_warnings(
    noted: Mapping[str, object], *, clean_accuracy: float, robust_accuracy: float | None, num_samples: int
) -> list[str]:
    """Whether an export behaves unlike what its own notes say of it: the other branch, or other weights, perhaps.

    Args:
        noted: clean_accuracy and robust_accuracy in its config.json, where known.
        clean_accuracy: as measured.
        robust_accuracy: as measured; None without an attack.
        num_samples: of the evaluation.
    """
    found = []
    for name, measured in (("clean_accuracy", clean_accuracy), ("robust_accuracy", robust_accuracy)):
        before = noted.get(name)
        if not isinstance(before, float) or measured is None:
            continue
        # Four standard errors of a share, and some room for another set or a stronger attack.
        room = 4 * (max(before * (1 - before), 0.01) / num_samples) ** 0.5 + (
            0.1 if name == "robust_accuracy" else 0.05
        )
        if before - measured > room:
            found.append(
                f"{name} is {measured:.3f}, the export's own notes say {before:.3f}: other pictures, or not the "
                "weights or the branch that was measured then"
            )
    return found
