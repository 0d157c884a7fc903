"""What became of every sample: right or wrong on the clean picture, and after each attack that it stood."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from arat_dist.evaluation.attacks import EvaluationAttack, Net
from arat_dist.evaluation.stages import Runner, Samples, Stage, pixels_of


@dataclass(frozen=True)
class Nets:
    """The nets of an evaluation.

    Attributes:
        judge: the net that is measured: every verdict is its own.
        attacked: what attacks see: a faster copy of it, or the net that adversarial pictures are transferred from.
        dtype: of the pixels that they take.
    """

    judge: Net
    attacked: Net
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Attacked:
    """What an attack left.

    Attributes:
        name: the attack's.
        predictions: of each sample's adversarial picture; -1 where it wasn't attacked, being wrong already.
        wall_s: seconds that it took in this launch.
    """

    name: str
    predictions: Samples
    wall_s: float

    @property
    def num_attacked(self) -> int:
        """Samples that it was tried on."""
        return int((self.predictions >= 0).sum())


@dataclass
class Verdicts:
    """One evaluation's, sample by sample, ascending.

    Attributes:
        samples: indices in the set.
        labels: their classes.
        clean: predictions of the clean pictures.
        attacks: in order.
    """

    samples: Samples
    labels: Samples
    clean: Samples
    attacks: list[Attacked] = field(default_factory=list)

    @property
    def clean_right(self) -> NDArray[np.bool_]:
        """Who is right on the clean picture."""
        return self.clean == self.labels

    def standing(self, num_attacks: int | None = None) -> NDArray[np.bool_]:
        """Who is right on the clean picture and after the first so many attacks; after all by default."""
        stand = self.clean_right
        for attack in self.attacks[:num_attacks]:
            stand = stand & (attack.predictions == self.labels)
        return stand

    def to_parquet(self) -> bytes:
        """A table, a row for each sample: two models' can be compared row by row."""
        columns = {
            "sample": pa.array(self.samples, pa.int64()),
            "label": pa.array(self.labels, pa.int32()),
            "clean_prediction": pa.array(self.clean, pa.int32()),
            "clean_right": pa.array(self.clean_right),
        }
        for attack in self.attacks:
            unasked = attack.predictions < 0
            columns[f"right_{attack.name}"] = pa.array(attack.predictions == self.labels, mask=unasked)
            columns[f"prediction_{attack.name}"] = pa.array(attack.predictions, pa.int32(), mask=unasked)
        columns["robust"] = pa.array(self.standing(), mask=np.full(len(self.samples), not self.attacks))
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns), buffer)
        return buffer.getvalue()


def measure(nets: Nets, attacks: Sequence[EvaluationAttack], runner: Runner, samples: Samples) -> Verdicts:
    """Every rank calls it and gets the same verdicts; each attack is tried on what the ones before have left.

    Raises:
        StoppedError: see `Runner.run`.
    """
    costs = [1, *(attack.cost for attack in attacks)]
    about = {"num_samples": len(samples), "cost": 1, "later_cost": sum(costs[1:])}
    clean = runner.run(Stage("clean", samples, ("label", "prediction"), partial(classify, nets)), **about).columns
    verdicts = Verdicts(samples, clean["label"], clean["prediction"])
    for place, attack in enumerate(attacks, 1):
        stand = verdicts.standing()
        about = {"num_samples": int(stand.sum()), "cost": attack.cost, "later_cost": sum(costs[place + 1 :])}
        stage = Stage(attack.name, samples[stand], ("prediction",), partial(attack_and_classify, nets, attack))
        answer = runner.run(stage, **about)
        predictions = np.full_like(samples, -1)
        predictions[stand] = answer.columns["prediction"]
        verdicts.attacks.append(Attacked(attack.name, predictions, answer.wall_s))
    return verdicts


def classify(nets: Nets, images: Tensor, labels: Tensor, keys: Tensor) -> dict[str, Tensor]:  # noqa: ARG001
    """A `Compute`: labels, and predictions of the clean pictures."""
    return {"label": labels, "prediction": predictions_of(nets.judge, pixels_of(images, nets.dtype))}


def attack_and_classify(
    nets: Nets, attack: EvaluationAttack, images: Tensor, labels: Tensor, keys: Tensor
) -> dict[str, Tensor]:
    """A `Compute`: predictions of the adversarial pictures."""
    adversarial = attack(nets.attacked, pixels_of(images, nets.dtype), labels, keys, nets.judge)
    return {"prediction": predictions_of(nets.judge, adversarial)}


def predictions_of(net: Net, pixels: Tensor) -> Tensor:
    """The likeliest class of each picture, int64 [B]."""
    with torch.no_grad():
        return net(pixels).argmax(1)


def accuracies(verdicts: Verdicts) -> dict[str, Any]:
    """The figures of a result: clean and robust accuracy, and what each attack left, as fractions of all samples."""
    count = len(verdicts.samples)
    return {
        "clean_accuracy": float(verdicts.clean_right.sum() / count),
        "robust_accuracy": float(verdicts.standing().sum() / count) if verdicts.attacks else None,
        "attacks": [
            {
                "name": attack.name,
                "robust_accuracy": float(verdicts.standing(place).sum() / count),
                "num_attacked": attack.num_attacked,
                "wall_s": round(attack.wall_s, 2),
            }
            for place, attack in enumerate(verdicts.attacks, 1)
        ],
    }
