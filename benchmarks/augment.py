"""RandAugment and colour jitter on a batch against torchvision's, picture by picture: milliseconds a batch.

    .venv/bin/python benchmarks/augment.py --batch-size 64 --image-size 224 --threads 2

Ours takes channels-last pictures as the loader gives them and returns such; torchvision's v2 transforms take pictures
whose channels lie apart, which is quicker for them. Rounds alternate, each with new draws. Wall time, and the time that
all threads together spent on a processor, which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from arat_dist.device_augment import ColorJitter, DeviceAugment, RandAugment


def main() -> None:
    """Print a line for each of them: medians, and the shortest times in brackets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    work = contestants(args.batch_size, args.image_size)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for i in range(args.repeats + 1):
        for name, run in work.items():
            wall, processor = time.perf_counter(), time.process_time()
            run(i)
            if i:  # the first round warms up
                seconds[name].append((time.perf_counter() - wall, time.process_time() - processor))
    for name, times in seconds.items():
        columns = (f"{1000 * statistics.median(t):7.1f} ({1000 * min(t):.1f})" for t in zip(*times, strict=True))
        print(f"{name:28} wall, processors: {', '.join(columns)} ms")


def contestants(batch_size: int, side: int) -> dict[str, Callable[[int], object]]:
    """What is timed, given the number of the round."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch_size, 3, 8, 8, generator=generator)
    noise = 20 * torch.randn(batch_size, 3, side, side, generator=generator)
    soft = F.interpolate(255 * coarse, size=(side, side), mode="bilinear")
    pictures = (soft + noise).clamp(0, 255).to(torch.uint8)
    images = pictures.contiguous(memory_format=torch.channels_last)
    ours = {
        "RandAugment": DeviceAugment((RandAugment(2, 9, seed=0),)),
        "jitter": DeviceAugment((ColorJitter(0.4, 0.4, 0.4, 0.1, seed=0),)),
    }
    theirs = {"RandAugment": v2.RandAugment(2, 27), "jitter": v2.ColorJitter(0.4, 0.4, 0.4, 0.1)}
    work: dict[str, Callable[[int], object]] = {}
    for name in ours:
        work[f"{name}, ours"] = lambda i, run=ours[name]: run(images, torch.arange(batch_size) + i * batch_size)
        work[f"{name}, torchvision"] = lambda _, run=theirs[name]: [run(picture) for picture in pictures]
    return work


if __name__ == "__main__":
    main()
