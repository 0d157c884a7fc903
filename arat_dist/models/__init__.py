"""Backbones: from a timm name to a classifier that takes pixels in [0,1].

Importing this registers the project's own nets with timm.
"""

from arat_dist.models import cifar as cifar
