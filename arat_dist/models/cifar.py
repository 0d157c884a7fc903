"""Backbones for 32x32 pictures, registered with timm: `timm.create_model("cifar_resnet18")` after importing this.

timm loads an export of one of them after the same import.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

from timm.layers.classifier import ClassifierHead
from timm.layers.create_conv2d import create_conv2d
from timm.layers.norm_act import BatchNormAct2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from timm.models.resnetv2 import ResNetV2
from torch import nn


def _cfg(pool_size: int, first_conv: str, classifier: str) -> dict[str, Any]:
    """What timm notes on a net for 32x32 pictures with 10 classes; `pool_size` is the side of its last map."""
    return {
        "input_size": (3, 32, 32),
        "pool_size": (pool_size, pool_size),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        # The paper feeds pixels in [0,1] as they are.
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "num_classes": 10,
        "first_conv": first_conv,
        "classifier": classifier,
    }


default_cfgs = generate_default_cfgs(
    {
        "cifar_resnet18.untrained": _cfg(4, "conv1", "fc"),
        "cifar_preact_resnet18.untrained": _cfg(4, "stem.conv", "head.fc"),
        "cifar_wrn_34_10.untrained": _cfg(8, "stem.conv", "head.fc"),
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


class CifarPreActResNet(ResNetV2):
    """timm's pre-activation ResNet of basic blocks with the CIFAR stem and a linear classifier.

    A block adds conv2(norm2(conv1(norm1(x)))) to x, or, where the shape changes, to a 1x1 convolution of norm1(x). Each
    norm is a BatchNorm with its ReLU in one module; one more of them follows the last stage.

    Args:
        layers: number of blocks of each stage; every stage but the first halves the map.
        channels: width of each stage, rounded to multiples of 8.
        stem_chs: width of the stem, likewise.
        kwargs: what timm's ResNetV2 takes besides.
    """

    def __init__(self, layers: Sequence[int], channels: Sequence[int], stem_chs: int, **kwargs: Any) -> None:
        super().__init__(
            list(layers),
            tuple(channels),
            stem_chs=stem_chs,
            basic=True,
            bottle_ratio=1.0,
            norm_layer=BatchNormAct2d,
            conv_layer=create_conv2d,
            **kwargs,
        )
        stem = nn.Conv2d(self.in_chans, self.feature_info[0]["num_chs"], 3, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        self.stem = nn.Sequential(OrderedDict(conv=stem))
        # timm's classifier here is a 1x1 convolution.
        pool_type = self.head.global_pool.pool_type
        self.head = ClassifierHead(self.num_features, self.num_classes, pool_type, self.drop_rate)
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


@register_model
def cifar_preact_resnet18(
    pretrained: bool = False, channels: Sequence[int] = (64, 128, 256, 512), **kwargs: Any
) -> CifarPreActResNet:
    """Pre-activation ResNet-18 (He 2016, arXiv 1603.05027) for 32x32 pictures, 11.17 M parameters.

    `channels` makes it narrower. As in the nets that adversarial training is compared on, the first block's shortcut
    carries the stem's output as it is.
    """
    return _build_preact(
        "cifar_preact_resnet18",
        pretrained,
        layers=(2, 2, 2, 2),
        channels=channels,
        stem_chs=channels[0],
        **kwargs,
    )


@register_model
def cifar_wrn_34_10(pretrained: bool = False, depth: int = 34, width: int = 10, **kwargs: Any) -> CifarPreActResNet:
    """WideResNet-34-10 (Zagoruyko & Komodakis 2016, arXiv 1605.07146) as TRADES has it, 46.16 M parameters.

    ARAT taps the ten ReLU outputs of the last stage, `stages.2.blocks.0.norm1`, `stages.2.blocks.0.norm2` up to
    `stages.2.blocks.4.norm2`, and the final average pool, `head.global_pool`.

    Args:
        pretrained: timm's; there are no weights.
        depth: number of layers, 6n + 4 for n blocks a stage.
        width: factor on the widths 16, 32, 64 of the stages.
        kwargs: what timm's ResNetV2 takes besides.

    Raises:
        ValueError: no such depth.
    """
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"depth: {depth}: 6n + 4, such as 16, 28 or 34, would be right")
    return _build_preact(
        "cifar_wrn_34_10",
        pretrained,
        layers=((depth - 4) // 6,) * 3,
        channels=(16 * width, 32 * width, 64 * width),
        stem_chs=16,
        **kwargs,
    )


def _build_preact(name: str, pretrained: bool, *, layers: tuple[int, ...], **kwargs: Any) -> CifarPreActResNet:
    """Build it as timm does; timm's `features_only` gives the stem and every stage."""
    features = {"flatten_sequential": True, "out_indices": tuple(range(len(layers) + 1))}
    return build_model_with_cfg(CifarPreActResNet, name, pretrained, feature_cfg=features, layers=layers, **kwargs)
