"""The hand-off without timm: a trained net as model.onnx, from pixels to logits, and what model.json says of it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from arat_dist.errors import UserError
from arat_dist.export import MAX_LOGIT_DIFFERENCE, METADATA_KEY, Handover
from arat_dist.models.classifier import Classifier
from arat_dist.models.split_norm import AttackMode

MODEL = "model.onnx"
PIXELS, LOGITS = "pixels", "logits"
BATCH_SIZES = (1, 2, 5)
"""Batches that an ONNX file is compared on; it was traced with another."""

_NEEDED = ("onnx", "onnxruntime", "onnxscript")

_ONE_FILE_BYTES = 2**30
"""Weights beyond this go into model.onnx.data: a protobuf message can't be larger than 2 GiB."""


def check_onnx() -> None:
    """Refuse (UserError) to begin without the libraries that ONNX files are written and checked with."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f"--format: onnx: not installed: {', '.join(missing)}; pip install {' '.join(missing)}")


def write_onnx(folder: Path, backbone: nn.Module, about: Handover) -> None:
    """Write model.onnx, which takes pixels in [0,1] and any batch, and model.json.

    Raises:
        UserError: the architecture does what ONNX can't say.
    """
    net = Classifier(backbone, about.mean, about.std).eval()
    side = about.image_size
    # A batch of one would be traced as a constant.
    example = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, about itself
            program = torch.onnx.export(
                net,
                (example,),
                input_names=[PIXELS],
                output_names=[LOGITS],
                dynamic_shapes={PIXELS: {0: torch.export.Dim("batch")}},
                dynamo=True,
                verbose=False,
            )
    except (RuntimeError, NotImplementedError, torch.onnx.errors.OnnxExporterError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--format: onnx: torch can't write this net ({reason}); timm would be right") from error
    assert program is not None
    model = program.model
    _forget_sources(model)
    notes = _notes(about, model.opset_imports[""])
    model.metadata_props.update({key: json.dumps(value) for key, value in notes.items()})
    num_bytes = sum(value.numel() * value.element_size() for value in net.state_dict().values())
    program.save(folder / MODEL, external_data=num_bytes > _ONE_FILE_BYTES)
    (folder / "model.json").write_text(json.dumps(notes, indent=2) + "\n")


def verify_onnx(folder: Path, classifier: Classifier, side: int) -> float:
    """Run model.onnx with onnxruntime and compare it with the net that it came from, on random pixels.

    Args:
        folder: holds model.onnx.
        classifier: the trained net; its adv branch is compared.
        side: of the pictures, in pixels.

    Returns:
        The largest absolute difference of the logits over batches of several sizes.

    Raises:
        RuntimeError: it is above MAX_LOGIT_DIFFERENCE (of the largest logit, where that is above 1).
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / MODEL, options, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch_size in BATCH_SIZES:
        pixels = torch.rand(batch_size, 3, side, side, generator=generator)
        with torch.no_grad(), AttackMode(classifier)("running"), classifier.branch("adv"):
            logits = classifier(pixels.to(classifier.mean.device, classifier.dtype)).float().cpu()
        (found,) = session.run([LOGITS], {PIXELS: pixels.numpy()})
        difference = (torch.from_numpy(found) - logits).abs().max().item()
        # Written so that a NaN fails too.
        if not difference <= MAX_LOGIT_DIFFERENCE * max(1.0, logits.abs().max().item()):
            raise RuntimeError(
                f"{folder / MODEL}: its logits differ by {difference:g} from the trained net's, batch {batch_size}"
            )
        largest = max(largest, difference)
    return largest


def _forget_sources(model: Any) -> None:
    """Drop what the exporter notes at each node: lines of source with this machine's paths, and nothing to run by."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)


def _notes(about: Handover, opset: int) -> Mapping[str, Any]:
    """What model.json says; each key is also one of model.onnx' metadata, as JSON."""
    side = about.image_size
    return {
        "opset": opset,
        "input": {
            "name": PIXELS,
            "dtype": "float32",
            "shape": ["batch", 3, side, side],
            "layout": "NCHW",
            "channels": "RGB",
            "range": [0, 1],
            "normalisation": {"inside": True, "mean": list(about.mean), "std": list(about.std)},
            "interpolation": about.interpolation,
            "crop_pct": about.crop_pct,
        },
        "output": {"name": LOGITS, "dtype": "float32", "shape": ["batch", about.num_classes], "softmax": False},
        "label_names": None if about.class_names is None else list(about.class_names),
        METADATA_KEY: dict(about.metadata),
    }
