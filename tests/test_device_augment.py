"""Which operation a picture draws and by how much: torchvision's ranges, even chances, the same in any batch."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference
from toys import Sets, toy_recipe

from arat_dist.config import DataConfig
from arat_dist.data.loader import Batch
from arat_dist.device_augment import (
    ColorJitter,
    DeviceAugment,
    RandAugment,
    amount_ranges,
    apply_ops_,
    build_device_augment,
)
from arat_dist.engine import Rank
from arat_dist.objectives import build_objective
from arat_dist.picture_ops import PICTURE_OPS
from arat_dist.step import micro_batches

BOTH = DeviceAugment((ColorJitter(0.4, 0.4, 0.4, 0.1, seed=3), RandAugment(2, 9, seed=3)))
JITTER_REFERENCES = {
    "brightness": reference.adjust_brightness,
    "contrast": reference.adjust_contrast,
    "saturation": reference.adjust_saturation,
    "hue": reference.adjust_hue,
}


def batch(count: int, side: int = 17) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    return images.contiguous(memory_format=torch.channels_last), torch.arange(count) * 7 + 10**10


# Ranges -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("magnitude", range(11))
def test_randaugments_ranges_are_torchvisions(magnitude):
    """Theirs has 31 bins where the paper, and ours, counts from 0 to 10."""
    names = {"Color": "saturation", "AutoContrast": "autocontrast"}
    ours = amount_ranges(magnitude, 224, 160)
    space = v2.RandAugment._AUGMENTATION_SPACE
    assert len(space) == len(ours) == 14
    for their_name, (levels, is_signed) in space.items():
        name = names.get(their_name) or re.sub(r"(?<=[a-z])(?=[XY])", "_", their_name).lower()
        middle, spread = ours[name]
        table = levels(31, 224, 160)
        level = 0.0 if table is None else float(table[3 * magnitude])
        expected = {
            "rotate": (0, np.sin(np.deg2rad(level))),
            "translate_x": (0, int(level)),
            "translate_y": (0, int(level)),
            "posterize": (2 ** (8 - int(level)), 0),
            "solarize": (255 * level, 0),
        }.get(name, (1 if name in ("brightness", "saturation", "contrast", "sharpness") else 0, level))
        assert (middle, spread) == pytest.approx(expected, rel=1e-6, abs=1e-5), name
        assert is_signed or spread == 0, name
        assert name == "identity" or name in PICTURE_OPS


def test_randaugment_draws_operations_and_signs_evenly():
    keys = torch.arange(20_000)
    first, second = RandAugment(2, 5, seed=1).rounds(keys, 32, 32)
    names = list(amount_ranges(5, 32, 32))
    counts = np.array([[(first.ops == a).sum() for a in names], [(second.ops == a).sum() for a in names]])
    assert all(stats.chisquare(row).pvalue > 1e-3 for row in counts)
    # Neither operation nor sign knows of the other round's.
    pairs = np.array([[((first.ops == a) & (second.ops == b)).sum() for a in names] for b in names])
    expected = counts[1][:, None] * counts[0][None, :] / 20_000
    assert stats.chisquare(pairs.ravel(), expected.ravel(), ddof=26).pvalue > 1e-3  # 14 + 14 - 2 fitted
    for drawn in (first, second):
        for name in ("shear_x", "rotate", "brightness"):
            amounts = drawn.amounts[drawn.ops == name]
            middle, spread = amount_ranges(5, 32, 32)[name]
            assert set(amounts.tolist()) == {np.float32(middle - spread), np.float32(middle + spread)}
            assert stats.binomtest(int((amounts > middle).sum()), len(amounts)).pvalue > 1e-3


def test_jitter_draws_amounts_and_orders_evenly():
    rounds = list(ColorJitter(0.4, 2.0, 0.1, 0.2, seed=1).rounds(torch.arange(20_000), 32, 32))
    ops, amounts = np.array([r.ops for r in rounds]), np.array([r.amounts for r in rounds])
    orders, counts = np.unique(ops.T, axis=0, return_counts=True)
    assert len(orders) == 24
    assert stats.chisquare(counts).pvalue > 1e-3
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0, 3),
        ("saturation", 0.9, 1.1),
        ("hue", -0.2, 0.2),
    ):
        drawn = amounts[ops == name].astype(np.float64)
        assert len(drawn) == 20_000
        assert stats.kstest(drawn, stats.uniform(low, high - low).cdf).pvalue > 1e-3, name


def test_a_part_of_zero_is_left_out():
    rounds = list(ColorJitter(0, 0.3, 0, 0, seed=1).rounds(torch.arange(64), 32, 32))
    assert {name for r in rounds for name in r.ops} == {"identity", "contrast"}
    images, keys = batch(8)
    assert torch.equal(DeviceAugment((ColorJitter(0, 0, 0, 0, seed=1),))(images, keys), images)


# Pictures -----------------------------------------------------------------------------------------------------------


def test_jitter_is_torchvisions_part_after_part():
    images, keys = batch(12)
    jitter = ColorJitter(0.4, 0.4, 0.4, 0.1, seed=3)
    ours = DeviceAugment((jitter,))(images, keys)
    rounds = list(jitter.rounds(keys, 17, 17))
    for i, picture in enumerate(images):
        for ops, amounts in rounds:
            picture = JITTER_REFERENCES[ops[i]](picture, float(amounts[i]))
        difference = (ours[i].int() - picture.int()).abs()
        # A level a part, widened by the factors of those after it; noise has the steepest hues.
        assert difference.max() <= 8
        assert difference.float().mean() < 0.8


@pytest.mark.parametrize("side", [5, 16, 33])
def test_a_picture_is_augmented_alike_in_any_batch_order_and_memory(side):
    images, keys = batch(60, side)
    before, whole = images.clone(), BOTH(images, keys)
    assert torch.equal(images, before)
    assert (whole.dtype, whole.shape) == (torch.uint8, images.shape)
    assert whole.is_contiguous(memory_format=torch.channels_last)
    for size in (1, 7, 32):
        parts = [BOTH(*part) for part in zip(images.split(size), keys.split(size), strict=True)]
        assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    assert torch.equal(BOTH(images[order], keys[order]), whole[order])
    assert torch.equal(BOTH(images.contiguous(), keys), whole)


def test_it_differs_by_seed_and_by_visit():
    images, keys = batch(40)
    for policy in (RandAugment(2, 9, seed=0), ColorJitter(0.4, 0.4, 0.4, 0.1, seed=0)):
        first = DeviceAugment((policy,))(images, keys)
        for seed, later in ((1, keys), (0, keys + 10**6)):
            other = DeviceAugment((replace(policy, seed=seed),))(images, later)
            assert (other != first).flatten(1).any(1).float().mean() > 0.5


def test_neither_threads_nor_the_size_of_a_call_change_a_picture(monkeypatch):
    images, keys = batch(60, 40)
    whole = BOTH(images, keys)
    torch.set_num_threads(2)
    assert torch.equal(BOTH(images, keys), whole)
    monkeypatch.setattr("arat_dist.device_augment._num_at_once", lambda pictures: 3)
    assert torch.equal(BOTH(images, keys), whole)


def test_every_picture_gets_what_is_named_for_it():
    images, _ = batch(6)
    pictures = images.contiguous()
    ops = np.array(["solarize", "identity", "translate_x", "solarize", "equalize", "identity"])
    amounts = np.array([100, 0, 3, 200, 0, 0], dtype=np.float32)
    apply_ops_(pictures, ops, amounts)
    for i, name in enumerate(ops):
        expected = images[i : i + 1].contiguous()
        if name != "identity":
            expected = PICTURE_OPS[name](expected, torch.full((1, 1, 1, 1), float(amounts[i])))
        assert torch.equal(pictures[i], expected[0])


# In a step ----------------------------------------------------------------------------------------------------------


def section(**keys: object) -> DataConfig:
    return DataConfig.model_validate({"train": "t", "val": "v", "num_classes": 3, "image_size": 16, **keys})


def test_a_recipe_says_which():
    assert build_device_augment(section(), 5) is None
    both = build_device_augment(section(color_jitter=[0.4, 0.3, 0.2, 0.1], rand_augment=[2, 9]), 5)
    assert both == DeviceAugment((ColorJitter(0.4, 0.3, 0.2, 0.1, 5), RandAugment(2, 9, 5)))
    assert build_device_augment(section(rand_augment=[1, 4.5]), 5) == DeviceAugment((RandAugment(1, 4.5, 5),))


def test_parts_and_ranks_of_a_step_hold_the_same_pictures():
    images, keys = batch(24)
    labels, expected = torch.zeros(24, dtype=torch.int64), BOTH(images, keys)
    for world_size, num_parts in ((1, 1), (1, 5), (2, 1), (3, 2)):
        seen = []
        for i in range(world_size):
            rank = Rank(i, world_size, torch.device("cpu"))
            share = Batch(*(t.chunk(world_size)[i] for t in (images, labels, keys)))
            seen += [part.images for part in micro_batches(share, num_parts, 24, rank, BOTH)]
        assert torch.equal(torch.cat(seen), expected)


def test_the_attack_begins_at_the_augmented_picture(sets: Sets):
    """What the net sees of a step lies in the ball around it, and off the loader's picture."""
    recipe = toy_recipe(sets, objective={"name": "at"}, attack={"eps": "2/255", "steps": 1})
    objective = build_objective(recipe).train()
    images, keys = batch(8, 16)
    augment = DeviceAugment((RandAugment(2, 10, seed=1),))
    (part,) = micro_batches(
        Batch(images, torch.zeros(8, dtype=torch.int64), keys), 1, 8, Rank(0, 1, torch.device("cpu")), augment
    )
    seen = []
    objective.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    objective(*part)
    assert seen
    for pixels in seen:
        assert (pixels - augment(images, keys) / 255).abs().max() <= 2 / 255 + 1e-6
        assert (pixels - images / 255).abs().max() > 0.1
