"""Backbones: from a timm name to a classifier that takes pixels in [0,1]."""
