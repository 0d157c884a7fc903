"""Backbones for 32x32 pictures, registered with timm: `timm.create_model("cifar_resnet18")` after importing this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

default_cfgs = generate_default_cfgs(
    {
        # mean 0 and std 1: the paper feeds pixels in [0,1] as they are.
        "cifar_resnet18.untrained": {
            "input_size": (3, 32, 32),
            "pool_size": (4, 4),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.0, 0.0, 0.0),
            "std": (1.0, 1.0, 1.0),
            "num_classes": 10,
            "first_conv": "conv1",
            "classifier": "fc",
        }
    }
)


class CifarResNet(ResNet):
    """timm's ResNet with the CIFAR stem: one 3x3 convolution of stride 1 as wide as the first stage, no pooling."""

    def __init__(
        self,
        block: type[BasicBlock],
        layers: tuple[int, ...],
        channels: Sequence[int] = (64, 128, 256, 512),
        zero_init_last: bool = False,
        **kwargs: Any,
    ) -> None:
        # timm widens a plain stem to 64 whatever the stages are; its deep stem, replaced here, follows stem_width.
        super().__init__(
            cast("BasicBlock", block),  # timm's annotation means the class
            layers,
            channels=tuple(channels),
            stem_type="deep",
            stem_width=channels[0] // 2,
            zero_init_last=zero_init_last,
            **kwargs,
        )
        self.conv1 = nn.Conv2d(self.in_chans, 2 * (channels[0] // 2), 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()
        for i, stage in enumerate(self.feature_info):
            stage["reduction"] = 2 ** max(i - 1, 0)


@register_model
def cifar_resnet18(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-18 for 32x32 pictures, 11.17 M parameters; `channels` makes it narrower.

    The last BatchNorm of a block starts at weight 1, not at timm's 0: the paper taps it, and a feature that is zero has
    no direction to align.
    """
    return build_model_with_cfg(
        CifarResNet, "cifar_resnet18", pretrained, block=BasicBlock, layers=(2, 2, 2, 2), **kwargs
    )
