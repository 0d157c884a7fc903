"""The net that every objective trains: any timm backbone, from pixels in [0,1] to logits and pooled features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from arat_dist.config import ModelConfig
from arat_dist.errors import UserError
from arat_dist.models.backbone import create_backbone, load_checkpoint, pretrained_cfg
from arat_dist.models.split_norm import AttackMode, Branch, Switch, split_norms
from arat_dist.models.taps import Recorder, automatic_taps, check_taps


class Classifier(nn.Module):
    """A timm backbone that normalises its pixels itself, with taps and, if its norms are split, two branches.

    Args:
        backbone: a timm net that maps normalised pictures to logits.
        mean: mean of the pixels in [0,1] per channel.
        std: standard deviation of the pixels in [0,1] per channel.
        switch: the switch of the backbone's split norms, None if it has none.
        taps: names of the backbone's modules whose pooled outputs `forward_with_taps` returns.
        tap_dims: number of features of each tap.

    Attributes:
        recorder: what fills the taps.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        switch: Switch | None = None,
        taps: tuple[str, ...] = (),
        tap_dims: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.taps = taps
        self.tap_dims = tap_dims
        self._switch = switch
        self.recorder = Recorder(backbone, taps)
        self._stand_in: Callable[[Tensor], Tensor] | None = None
        self._is_normalised = all(m == 0 for m in mean) and all(s == 1 for s in std)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    @property
    def is_split(self) -> bool:
        """Whether the net's norms have two branches."""
        return self._switch is not None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the pixels that the net takes."""
        return self.mean.dtype

    @property
    def current_branch(self) -> Branch:
        """The branch that a pass would run now."""
        return self._switch.branch if self._switch is not None else "adv"

    def branch(self, name: Branch) -> AbstractContextManager[None]:
        """Run the adv or the clean branch inside the context; a net that isn't split has one for both."""
        return self._switch.use(name) if self._switch is not None else nullcontext()

    @contextmanager
    def running(self, run: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Run this, a compiled version of `run_backbone`, in its place inside the context."""
        self._stand_in = run
        try:
            yield
        finally:
            self._stand_in = None

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels float [B,3,H,W] in [0,1] -> logits [B,num_classes]."""
        return (self._stand_in or self.run_backbone)(pixels)

    def run_backbone(self, pixels: Tensor) -> Tensor:
        """The same, never compiled."""
        return self.backbone(self.normalise(pixels))

    def forward_with_taps(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pixels float [B,3,H,W] in [0,1] -> logits [B,num_classes] and the pooled features [B,d_l] of each tap."""
        with self.recorder.recording() as features:
            logits = self(pixels)
        return logits, [feature for (feature,) in features]

    def forward_with_penultimate(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels float [B,3,H,W] in [0,1] -> logits [B,num_classes] and the features [B,d] before the last layer."""
        net: Any = self.backbone
        features = net.forward_features(self.normalise(pixels))
        penultimate = net.forward_head(features, pre_logits=True)
        return net.get_classifier()(penultimate), penultimate

    def normalise(self, pixels: Tensor) -> Tensor:
        """Subtract the mean and divide by the standard deviation, [B,3,H,W]."""
        return pixels if self._is_normalised else (pixels - self.mean).div_(self.std)


def build_classifier(
    model: ModelConfig,
    *,
    num_classes: int,
    image_size: int,
    split: Literal["batch", "layer", "none"],
    taps: Literal["auto"] | tuple[str, ...] | None,
) -> Classifier:
    """The net that a recipe names, on the CPU, in training mode.

    Args:
        model: the backbone and the weights that it starts from; both branches get them.
        num_classes: number of logits.
        image_size: side of the square pictures, in pixels.
        split: norm layers that get two branches.
        taps: module names whose features are aligned, auto for the last stage's blocks, None for no taps.

    Raises:
        UserError: one line that names the key of the recipe that can't work.
    """
    backbone = create_backbone(model, num_classes=num_classes, image_size=image_size)
    if model.checkpoint is not None:
        load_checkpoint(backbone, model.checkpoint)
    cfg = pretrained_cfg(backbone)
    names = automatic_taps(backbone) if taps == "auto" else tuple(taps or ())
    switch = None if split == "none" else split_norms(backbone, split)
    check_taps(backbone, names)
    classifier = Classifier(backbone, model.mean or cfg["mean"], model.std or cfg["std"], switch=switch, taps=names)
    classifier.tap_dims = _probe(classifier, model.name, image_size)
    return classifier


def check_penultimate(classifier: Classifier, name: str, image_size: int) -> None:
    """Refuse (UserError) a net that has no one vector of features before its last layer."""
    pixels = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad(), AttackMode(classifier)("running"):
            logits, features = classifier.forward_with_penultimate(pixels)
            fits = features.ndim == 2 and torch.allclose(logits, classifier(pixels), rtol=1e-3, atol=1e-4)
    except (AttributeError, RuntimeError, TypeError):
        fits = False
    if not fits:
        raise UserError(f"objective.name: arrest: {name} has no single layer behind its pooled features; arat would do")


def check_side(classifier: Classifier, name: str, side: int, key: str) -> None:
    """Refuse (UserError) a side of pictures, in pixels and given by a key of the recipe, that the net can't take."""
    try:
        with torch.no_grad(), AttackMode(classifier)("running"):
            classifier(_random_picture(side))
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{key}: {side}: {name} can't take {side}x{side}: {reason}") from error


def _random_picture(side: int) -> Tensor:
    """Float [1,3,side,side] in [0,1], not black: features could be zero by chance. The global generator stays."""
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))


def _probe(classifier: Classifier, name: str, image_size: int) -> tuple[int, ...]:
    """Number of features of each tap, from one random picture; UserError if that fails."""
    check_side(classifier, name, image_size, "data.image_size")
    pixels = _random_picture(image_size)
    try:
        with torch.no_grad(), AttackMode(classifier)("running"), classifier.recorder.recording() as features:
            classifier(pixels)
    except ValueError as error:
        raise UserError(f"objective.taps: {list(classifier.taps)}: {error}") from error
    for tap, calls in zip(classifier.taps, features, strict=True):
        if len(calls) != 1:
            raise UserError(f"objective.taps: {tap}: runs {len(calls)} times in one forward pass, a tap runs once")
        if not calls[0].any():
            # The cosine of a zero vector has a gradient of 1e8 and more.
            raise UserError(
                f"objective.taps: {tap}: all its features are zero at the start, so they have no direction; another "
                "tap, or model.args: {zero_init_last: false} in a ResNet, would be right"
            )
    return tuple(calls[0].shape[1] for calls in features)
