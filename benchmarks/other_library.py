"""Verdicts of our APGD against those of torchattacks', sample by sample, on one net and its pictures.

torchattacks doesn't install beside this project's versions: a virtual environment of its own, with `pip install
--no-deps torchattacks`, that sees this project's packages, runs this script:

    python benchmarks/other_library.py runs/demo --limit 360
"""

import argparse
import json

import torch
import torchattacks

from arat_dist.data.loader import val_loader
from arat_dist.evaluate import subset
from arat_dist.evaluation.attacks import evaluation_attacks
from arat_dist.evaluation.net import attacked, fast_copy
from arat_dist.evaluation.stages import pixels_of
from arat_dist.evaluation.verdicts import predictions_of
from arat_dist.targets import open_target


def main() -> None:
    """Print a JSON object for APGD-CE and APGD-T."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--data")
    parser.add_argument("--limit", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    target = open_target(args.target, val=args.data)
    classifier, config = target.classifier, target.config.model_copy(update={"limit": args.limit})
    with val_loader(target.data, args.limit) as loader:
        batch = next(iter(loader.iterate([subset(loader.num_samples, config)])))
        pixels, labels, keys = pixels_of(batch.images, classifier.dtype), batch.labels.clone(), batch.keys.clone()
    right = predictions_of(classifier, pixels) == labels
    pixels, labels, keys = pixels[right], labels[right], keys[right]
    theirs = {
        "apgd-ce": torchattacks.APGD(
            classifier, norm="Linf", eps=config.eps, steps=100, n_restarts=1, seed=0, loss="ce"
        ),
        "apgd-t": torchattacks.APGDT(classifier, norm="Linf", eps=config.eps, steps=100, n_restarts=1, seed=0),
    }
    for name, attack in theirs.items():
        (own,) = evaluation_attacks(config.model_copy(update={"attack": name, "norm": "linf"}))
        with attacked(fast_copy(classifier, pixels[:4])) as net:
            ours = predictions_of(classifier, own(net, pixels, labels, keys)) == labels
        reference = predictions_of(classifier, attack(pixels.contiguous(), labels)) == labels
        figures = {
            "attack": name,
            "num_attacked": len(labels),
            "ours_standing": int(ours.sum()),
            "torchattacks_standing": int(reference.sum()),
            "agreement": float((ours == reference).float().mean()),
        }
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
