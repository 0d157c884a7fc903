"""Adversarially robust image classifiers at ImageNet scale: ARAT on timm backbones."""

__version__ = "0.1.0"
