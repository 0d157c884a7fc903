"""Everything about a recipe that can be found wrong before any worker starts."""

from __future__ import annotations

import torch

from arat_dist.averaging import swa_first_step
from arat_dist.config import ClusterConfig, DataConfig, Recipe
from arat_dist.data.loader import loader_class
from arat_dist.data.manifest import check_data
from arat_dist.devices import own_device, why_no_gpu
from arat_dist.engine import check_engine
from arat_dist.errors import UserError
from arat_dist.models.backbone import pretrained_cfg
from arat_dist.models.classifier import Classifier, check_side
from arat_dist.objectives import build_objective
from arat_dist.objectives.base import Objective
from arat_dist.train import num_steps, sample_order


def check_recipe(recipe: Recipe) -> None:
    """Check the data, the share of each rank, the machine, and that the net takes and gives what it should.

    Weights that timm has to download are downloaded here, once, before workers ask for them.

    Raises:
        UserError: one line that names the key, its value and what would be right.
    """
    check_engine(recipe)
    check_data(recipe.data)
    if recipe.cluster.address is None:  # else the machines that load are others
        loader_class(recipe.data)
    check_shares(recipe)
    check_averages(recipe)
    check_gpus(recipe.cluster)
    check_cuda_graph(recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)  # the very weights that training starts from
        objective = build_objective(recipe)
    check_image_sizes(objective, recipe.data)
    check_parameters(objective, recipe)


def check_image_sizes(objective: Objective, data: DataConfig) -> None:
    """Refuse sizes of training pictures beside data.image_size that one of the nets can't take (UserError)."""
    pairs = [list(pair) for pair in data.image_sizes_from]
    for net in objective.modules() if pairs else ():
        if isinstance(net, Classifier):
            cfg = pretrained_cfg(net.backbone)
            name = cfg.get("architecture", type(net.backbone).__name__)
            if cfg.get("fixed_input_size") and not getattr(net.backbone, "dynamic_img_size", False):
                raise UserError(
                    f"data.image_sizes_from: {pairs}: {name} is built for pictures of one size; data.image_size alone, "
                    "or another model.name, would be right"
                )
            for side in data.training_sizes:
                check_side(net, name, side, "data.image_sizes_from")


def check_parameters(objective: Objective, recipe: Recipe) -> None:
    """Refuse parameters without a dimension under DeepSpeed, which fails to hand them out as bytes (UserError)."""
    if recipe.engine.kind == "ddp":
        return
    if single := [name for name, parameter in objective.named_parameters() if parameter.ndim == 0]:
        raise UserError(
            f"engine.kind: deepspeed: can't train {recipe.model.name}, some of whose parameters are single numbers "
            f"({single[0].removeprefix('classifier.backbone.')}); ddp would be right"
        )


def check_averages(recipe: Recipe) -> None:
    """Refuse an SWA that would have nothing to average, and norm statistics of too few pictures (UserError)."""
    train, steps = recipe.train, num_steps(recipe)
    if train.swa_start_epoch is not None:
        first = swa_first_step(train.swa_start_epoch, sample_order(recipe).num_samples, train.global_batch_size)
        if first > steps:
            raise UserError(
                f"train.swa_start_epoch: {train.swa_start_epoch:g}: ends with step {first}, the run with step {steps} "
                "(train.epochs, train.max_steps); an earlier epoch would be right"
            )
    if train.norm_samples < 2 * recipe.world_size:
        raise UserError(f"train.norm_samples: {train.norm_samples}: at least 2 a worker ({recipe.world_size})")


def check_gpus(cluster: ClusterConfig) -> None:
    """Refuse more GPUs than this machine has, for which Ray would wait; those of another cluster pass (UserError)."""
    wanted = cluster.num_gpus * max(1, cluster.max_workers)
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cluster.address is not None or wanted <= found:
        return
    if not found:
        raise UserError(
            f"cluster.gpus_per_worker: {cluster.gpus_per_worker}: this machine has no GPU that torch can use "
            f"({why_no_gpu()}); 0, or the cluster.address of one that has, would be right"
        )
    raise UserError(
        f"cluster.workers: {cluster.workers}: with a GPU each, more than this machine has; at most {found}, or the "
        "cluster.address of one that has more, would be right"
    )


def check_cuda_graph(recipe: Recipe) -> None:
    """Refuse a CUDA graph where the run has no GPU (UserError); the recipe's own checks refuse what else forbids it."""
    cluster = recipe.cluster
    has_gpu = own_device(cluster).type == "cuda" if cluster.workers == 0 else bool(cluster.num_gpus)
    if recipe.train.cuda_graph and not has_gpu:
        remedy = f"this machine has none ({why_no_gpu()})" if cluster.workers == 0 else "cluster.gpus_per_worker: 1"
        raise UserError(f"train.cuda_graph: true: needs a GPU: {remedy}; false would be right on a CPU")


def check_shares(recipe: Recipe) -> None:
    """Refuse more ranks than every batch of the run can feed with two samples: BatchNorm needs them (UserError)."""
    smallest = sample_order(recipe).smallest_batch
    if smallest < 2 * recipe.world_size:
        raise UserError(
            f"cluster.workers: {recipe.cluster.workers}: a worker needs 2 pictures of every batch, and the smallest of "
            f"this run has {smallest} (train.global_batch_size {recipe.train.global_batch_size}); "
            f"at most {smallest // 2} would be right"
        )
