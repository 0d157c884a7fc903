"""What an evaluation asks: all that decides its verdicts, and the label of the folder that they are kept in."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from arat_dist.config import EvalConfig
from arat_dist.evaluation.corruptions import Corruption
from arat_dist.models.classifier import Classifier
from arat_dist.models.split_norm import Branch
from arat_dist.targets import Weights

FORMAT = 1
"""Changes when the same question would get other verdicts: then older answers are not found any more."""


@dataclass(frozen=True)
class Question:
    """One evaluation's.

    Attributes:
        target: as it was named.
        weights: which of a run's; None for a net that no run made.
        step: steps that they were trained for.
        branch: the one that is measured.
        fingerprint: of the net.
        data: the set.
        data_sha256: of the set, from its manifest.
        cut: how its pictures are cut: side, centre crop, loader.
        samples: indices, ascending.
        config: attack, norm, eps, seed, precision and batch size, the default one too.
        transfer_from: the net that adversarial pictures are made on, as it was named; None: the target itself.
        source_fingerprint: of that net.
        corruptions: further questions.
    """

    target: str
    weights: Weights | None
    branch: Branch
    fingerprint: str
    data: str
    data_sha256: str
    cut: tuple[Any, ...]
    samples: tuple[int, ...]
    config: EvalConfig
    transfer_from: str | None = None
    source_fingerprint: str | None = None
    corruptions: tuple[Corruption, ...] = ()
    step: int | None = None

    @property
    def label(self) -> str:
        """Readable, then eight digits of a hash: the same question finds its folder again, another one doesn't."""
        config = self.config
        words = [config.attack.replace(",", "+")]
        if config.restarts:
            words.append(f"x{config.restarts}")
        if config.attack != "none":
            words += [str(config.norm), radius(config)]
        words += [] if config.precision == "fp32" else [config.precision]
        words += [self.weights] if self.weights else []
        words += ["clean-branch"] if self.branch == "clean" else []
        words += ["from", slug(self.transfer_from)] if self.transfer_from else []
        words += ["corruptions"] if self.corruptions else []
        words += [str(len(self.samples)), Path(self.data).stem, self._hash()[:8]]
        return re.sub(r"[^A-Za-z0-9._+-]", "_", "-".join(words))

    def _hash(self) -> str:
        assert self.config.batch_size is not None
        config = self.config.model_dump(
            mode="json", include={"norm", "eps", "restarts", "precision", "batch_size", "seed"}
        )
        decides = {
            "format": FORMAT,
            "attacks": self.config.attack_names,
            "config": config,
            "net": [self.fingerprint, self.branch, self.source_fingerprint],
            "data": [self.data_sha256, *self.cut],
            "samples": self.samples,
            "corruptions": [asdict(each) for each in self.corruptions],
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def radius(config: EvalConfig) -> str:
    """Eps in a file's name: 8_255, or a decimal."""
    assert config.eps is not None
    parts = config.eps * 255
    return f"{round(parts)}_255" if config.norm == "linf" and abs(parts - round(parts)) < 1e-6 else f"{config.eps:g}"


def slug(target: str) -> str:
    """A target in a file's name."""
    name = target if ":" in target else "-".join(Path(target).parts[-2:])
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name.rpartition("//")[2]).strip("-.") or "target"


def fingerprint(classifier: Classifier) -> str:
    """SHA-256 of all that a net computes with: its weights and buffers, and its pixels' mean and std."""
    digest = hashlib.sha256()
    state = {**classifier.state_dict(), "mean": classifier.mean, "std": classifier.std}
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
