"""The recipe schema: what a YAML recipe may say, typed, with its unit under each field.

A recipe is data: no class paths, no code. Unknown keys are refused. Every number may be written as a fraction, so that
`eps: 4/255` is what it looks like. Nothing here imports torch, so that a mistyped recipe is answered at once.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat

T = TypeVar("T")


def _fraction(value: object) -> object:
    """Turn "4/255" into a number and leave everything else to pydantic."""
    if isinstance(value, str) and value.count("/") == 1:
        numerator, denominator = value.split("/")
        try:
            return float(numerator) / float(denominator)
        except (ValueError, ZeroDivisionError):
            return value
    return value


def _not_a_switch(value: object) -> object:
    """Refuse true and yes, which pydantic would take for 1."""
    if isinstance(value, bool):
        raise ValueError("a number would be right")
    return value


def _scientific(value: object) -> object:
    """Read "5e-4": YAML 1.1 takes it for text without a dot, and a free argument has no type to say otherwise."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value) else value


def _absolute(value: str) -> str:
    """Refuse a folder that would be another one in each process."""
    if not value.startswith("/"):
        raise ValueError("an absolute path would be right: every machine makes this folder on a disk of its own")
    return value


AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The attacks of AutoAttack's standard version, in their order."""

ATTACKS = "none, pgdN (N steps), such as pgd20, apgd, apgdN, apgd-ce, apgd-t, fab-t, square, autoattack"
"""What an evaluation may be asked for, in words."""


def _attack_names(value: str) -> str:
    """Refuse what is neither "none", "autoattack" nor a list of attacks, each once."""
    names = value.split(",")
    known = r"pgd[1-9][0-9]{0,3}|apgd([1-9][0-9]{0,3}|-ce|-t)?|fab-t|square"
    is_list = all(re.fullmatch(known, name) for name in names) and len(set(names)) == len(names)
    if not is_list and value not in ("none", "autoattack"):
        raise ValueError(f"{ATTACKS}, or several attacks with commas between them, each once, would be right")
    return value


def _ascending(value: tuple[int, int]) -> tuple[int, int]:
    """Refuse a least number that is above the largest."""
    if value[0] > value[1]:
        raise ValueError("the least number first would be right")
    return value


Number = Annotated[FiniteFloat, BeforeValidator(_fraction), BeforeValidator(_not_a_switch)]
Integer = Annotated[int, BeforeValidator(_not_a_switch)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Decay = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[Integer, Field(ge=1)]
Side = Annotated[Integer, Field(ge=8)]
Triple = tuple[Number, Number, Number]


def last_begun(pairs: tuple[tuple[float, T], ...], epoch: float, before: T) -> T:
    """Value of the last of some pairs of an epoch and a value, ascending, that has begun; until the first, `before`."""
    begun = [value for begin, value in pairs if epoch >= begin]
    return begun[-1] if begun else before


class Section(BaseModel):
    """Base of every section: frozen, and closed to keys that it doesn't name."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DataConfig(Section):
    """What the pictures are and how they are cut for training."""

    train: str
    """Training set: a .beton written by `arat data write`."""
    val: str
    """Validation set: a .beton with the same classes."""
    num_classes: Count
    """Number of classes; must agree with both manifests."""
    image_size: Count
    """Side of the square picture that the net sees, in pixels."""
    image_sizes_from: tuple[tuple[NonNegative, Side], ...] = ()
    """Pairs of an epoch and the side of training pictures from its beginning on, in pixels; before the first pair, in
    evaluations and in the exported net, `image_size`."""
    augment: Literal["none", "pad_crop", "random_resized_crop"] = "none"
    """Training crop: none (centre), pad_crop (CIFAR), random_resized_crop (ImageNet)."""
    padding: Annotated[Integer, Field(ge=0)] = 4
    """Black border that pad_crop shifts within, in pixels."""
    crop_scale: tuple[Share, Share] = (0.08, 1.0)
    """Range of the area of random_resized_crop, as a fraction of the picture's area."""
    flip: bool = True
    """Mirror half of the training pictures left to right."""
    color_jitter: tuple[NonNegative, NonNegative, NonNegative, Annotated[Number, Field(ge=0, le=0.5)]] | None = None
    """Brightness, contrast, saturation and hue (at most 0.5) by up to so much, in any order, as torchvision's
    ColorJitter does it to training pictures; default: none."""
    rand_augment: tuple[Count, Annotated[Number, Field(ge=0, le=10)]] | None = None
    """RandAugment's operations a training picture and their magnitude, 0 to 10 (torchvision's bin over 3), such as
    [2, 9]; after the jitter. Default: none."""
    val_crop: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Side of the centre crop (validation, or augment none), as a fraction of the shorter side; default: timm's."""
    mixup: NonNegative = 0.0
    """Training pictures are blended in pairs, their labels too; alpha of the Beta distribution, 0: off."""
    cutmix: NonNegative = 0.0
    """Training pictures get a patch of their partner's, labels by area; alpha, 0: off. With mixup: half and half."""
    loader: Literal["ffcv", "torchvision"] = "ffcv"
    """What decodes: ffcv, or torchvision where FFCV does not build; same order and crops, pixels a little different."""
    loader_threads: Count = 1
    """Decoding threads (ffcv) or processes (torchvision) of each worker."""
    shuffle_block: Count = 1
    """Pictures that lie together on a slow disk and are read at about the same time; 1: a full shuffle."""
    shuffle_window: Count = 256
    """Blocks whose pictures are mixed with each other, where shuffle_block is above 1."""
    stage_to: Annotated[str, AfterValidator(_absolute)] | None = None
    """Folder on a disk of each machine: both sets are copied there once a machine, their SHA-256 checked, before
    training; `arat eval` with workers copies val. Copies stay. Default: read in place."""

    def image_size_at(self, epoch: float) -> int:
        """Side of the training pictures of a step that begins at an epoch, counted from 0, in parts of one."""
        return last_begun(self.image_sizes_from, epoch, self.image_size)

    @property
    def training_sizes(self) -> list[int]:
        """Every side of training pictures, ascending, in pixels."""
        first = self.image_size_at(0)
        return sorted({first, *(side for _, side in self.image_sizes_from)})


class ModelConfig(Section):
    """The timm backbone."""

    name: str
    """Name of a timm architecture, as timm.create_model takes it."""
    args: dict[str, Annotated[Any, BeforeValidator(_scientific)]] = {}
    """Further keyword arguments of the architecture (channels, stem, drop rates)."""
    pretrained: bool = False
    """Start from timm's clean-pretrained weights; both norm branches get them."""
    checkpoint: str | None = None
    """Start from this local weights file (.safetensors, .pth) instead; both norm branches get it."""
    mean: Triple | None = None
    """Mean of the pixels in [0,1] per channel, subtracted inside the net; default: timm's for the architecture."""
    std: tuple[Positive, Positive, Positive] | None = None
    """Standard deviation of the pixels in [0,1] per channel; default: timm's for the architecture."""


class MethodConfig(Section):
    """What every objective has."""

    label_smoothing: Share = 0.0
    """Mass of the target spread over all classes."""


class StandardConfig(MethodConfig):
    """Plain training on clean pictures: CE(f(x), y)."""

    name: Literal["standard"]
    """The method."""


class ATConfig(MethodConfig):
    """Adversarial training (Madry 2018): CE(f(x'), y)."""

    name: Literal["at"]
    """The method."""


class TRADESConfig(MethodConfig):
    """TRADES (Zhang 2019): CE(f(x), y) + beta KL(f(x) || f(x')); its attack climbs the KL term."""

    name: Literal["trades"]
    """The method."""
    beta: NonNegative = 6.0
    """Weight of the KL term."""


class MARTConfig(MethodConfig):
    """MART (Wang 2020): BCE(f(x'), y) + lambda KL(f(x) || f(x')) (1 - p_y(x))."""

    name: Literal["mart"]
    """The method."""
    kl_weight: NonNegative = 5.0
    """Weight lambda of the KL term: 5 in the authors' code, 6 in their paper."""


class LBGATConfig(MethodConfig):
    """LBGAT (Cui 2021): |f(x') - g(x)|^2 + CE(g(x), y) + beta KL(f(x) || f(x')), g a clean net trained along."""

    name: Literal["lbgat"]
    """The method."""
    beta: NonNegative = 0.0
    """Weight of the TRADES term: 0 or 6 in the paper."""
    teacher: ModelConfig | None = None
    """The clean net g; default: the model's own architecture."""


class ARRESTConfig(MethodConfig):
    """ARREST (Suzuki 2023, a reconstruction): adversarial fine-tuning that stays near a frozen clean-trained net.

    The net starts from model.pretrained or model.checkpoint; without either, a clean net is trained first.
    """

    name: Literal["arrest"]
    """The method."""
    angle_weight: NonNegative = 10.0
    """Weight of the angle between the features of x' and the frozen net's of x."""
    replay_angle: Share = 0.25
    """Pictures whose features have turned further than this, in units of pi, are replayed: noisy, not attacked."""
    clean_epochs: Count = 30
    """Length of the clean training that comes first where nothing else gives the start, in epochs."""


class ARATConfig(MethodConfig):
    """ARAT (Waseda 2025, arXiv 2402.14648); every part can be switched off alone."""

    name: Literal["arat"]
    """The method."""
    gamma: NonNegative = 30.0
    """Weight of the invariance loss, which is averaged over the taps."""
    taps: Literal["auto"] | tuple[str, ...] = "auto"
    """Module names whose pooled outputs are aligned; auto: the blocks of the last stage."""
    predictor: bool = True
    """Put a bottleneck MLP on the side that follows."""
    stop_gradient: bool = True
    """Keep the invariance loss from moving the side that is followed."""
    symmetric: bool = False
    """Average both directions, adv to clean and clean to adv."""
    distance: Literal["cosine", "mse"] = "cosine"
    """1 - cos(h(z'), z), or the mean squared difference."""
    split_norm: Literal["batch", "layer", "none"] = "batch"
    """Norm layers that get two branches: batch (BatchNorm and kin), layer (LayerNorm too), none."""
    balance: Literal["auto", "fixed"] = "auto"
    """auto: the weight of the adversarial term follows the clean branch's training accuracy of the last epoch."""
    adv_weight: Share = 0.5
    """Weight of the adversarial term, the clean one has 1 minus it; with balance auto, in the first epoch only."""


ObjectiveConfig = Annotated[
    StandardConfig | ATConfig | TRADESConfig | MARTConfig | LBGATConfig | ARRESTConfig | ARATConfig,
    Field(discriminator="name"),
]


class AttackConfig(Section):
    """The attack in training, inside the step. auto: as the objective's authors have it."""

    name: Literal["pgd", "fgsm", "nfgsm", "apgd"] = "pgd"
    """pgd; fgsm (one step from a random start); nfgsm (one step from strong noise, not projected); apgd."""
    norm: Literal["linf", "l2", "l1"] = "linf"
    """Norm of the ball around each picture."""
    eps: Positive = 8 / 255
    """Radius of the ball, in pixel units of [0,1]; the evaluation takes it over unless told otherwise."""
    eps_warmup_epochs: NonNegative = 0.0
    """Length of eps' rise from zero in a straight line, in epochs; the step size rises with it."""
    step_size: Positive | None = None
    """Length of one step, in pixel units of [0,1]; default: eps/4, fgsm 1.25 eps, nfgsm eps; apgd finds its own."""
    steps: Count | None = None
    """Number of gradient steps; default: 10, for fgsm and nfgsm 1."""
    steps_from: tuple[tuple[NonNegative, Count], ...] = ()
    """Pairs of an epoch and the number of steps from its beginning on; before the first pair, `steps`."""
    loss: Literal["auto", "ce", "kl", "dlr"] = "auto"
    """What it climbs: cross-entropy, KL from the clean prediction, or the difference of logits ratio."""
    targeted: bool = False
    """Climb towards a random other class instead of away from the right one; with ce or dlr."""
    start: Literal["auto", "uniform", "gaussian", "none"] = "auto"
    """A uniform point of the ball, the picture with Gaussian noise of 0.001, or the picture itself."""
    norm_stats: Literal["auto", "batch", "running"] = "auto"
    """Statistics that BatchNorm uses in the attack: the batch's own, or the running ones. Neither is changed."""


class OptimConfig(Section):
    """Optimizer and learning rate."""

    name: Literal["sgd", "adamw"] = "sgd"
    """The optimizer."""
    lr: Positive = 0.1
    """Peak learning rate, for the global batch as it is: nothing rescales it."""
    momentum: Decay = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov momentum for SGD."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of AdamW's moments."""
    weight_decay: NonNegative = 5e-4
    """Weight decay; norm layers and biases are kept out of it."""
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    """Course of the rate after the warm-up."""
    warmup_epochs: NonNegative = 0.0
    """Length of the linear rise from zero, in epochs."""
    milestones: tuple[Positive, ...] = ()
    """For step: epochs after which the rate is multiplied by decay_factor."""
    decay_factor: Positive = 0.1
    """For step: the factor."""
    min_lr: NonNegative = 0.0
    """For cosine: the rate at the end."""
    clip_grad_norm: Positive | None = None
    """Largest norm of the whole gradient; default: not clipped."""


class TrainConfig(Section):
    """The loop."""

    epochs: Count
    """Passes over the training set."""
    global_batch_size: Annotated[Integer, Field(ge=2)]
    """Pictures of one optimizer step, over all workers."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Compute precision of attack and training passes; master weights are fp32. fp16 scales losses and attacks."""
    compile: bool = False
    """Compile the net with torch.compile: minutes at the start. Of arrest, the attack's passes alone."""
    cuda_graph: bool = False
    """Replay each step as one CUDA graph: one launch in place of thousands of kernels'. Needs a GPU, one worker, DDP,
    and bf16 or fp32; not yet run on a GPU."""
    tf32: bool = False
    """Let fp32 convolutions and matrix products of the training use TF32 on GPUs: faster, with 10 bits of mantissa.
    Evaluations never use it."""
    deterministic: bool = False
    """Use algorithms on GPUs that give the same bits each time; slower, and refused by a few operations. Not yet run on
    a GPU; CPUs are deterministic anyway."""
    micro_batches: Count = 1
    """Parts that a worker's share of a step is worked off in, for less memory: one update and one all-reduce a step.
    Batch statistics are a part's own."""
    grad_checkpointing: bool = False
    """Activation checkpointing: every stage of the net keeps its input alone and runs again in backward passes."""
    seed: Annotated[Integer, Field(ge=0, lt=2**31)] = 0
    """Fixes weights at the start, sample order, augmentation, attack starts, dropout."""
    sync_norms: bool = False
    """Batch statistics of norms span all workers: training is then independent of their number, at two collectives a
    norm and pass. Off: per worker."""
    ema_decay: Annotated[Number, Field(gt=0, lt=1)] | None = None
    """Decay per step of the exponential moving average of the weights (EMA); default: none kept."""
    swa_start_epoch: NonNegative | None = None
    """Epoch from whose end on weights are averaged evenly (SWA); default: not at all."""
    swa_every: Count = 500
    """Steps between two weights that SWA averages."""
    norm_samples: Count = 10_000
    """Training pictures from which the averaged nets' norm statistics are measured at the end of the run."""
    log_every: Count = 50
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: Count | None = None
    """Steps between two checkpoints; default: once an epoch."""
    checkpoint_minutes: Positive | None = None
    """Longest time between two checkpoints, in minutes; default: no limit."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept; besides, the one with the best robust accuracy is (`eval.every`)."""
    max_skipped_steps: Count = 10
    """Steps in a row that may be skipped because their gradient is no number; then the run goes back to its newest
    checkpoint, and ends if that doesn't help."""
    max_steps: Count | None = None
    """Stop after this many steps; schedules still run over all epochs. Default: no limit."""


class EngineConfig(Section):
    """Data parallelism."""

    kind: Literal["ddp", "deepspeed"] = "ddp"
    """torch's DistributedDataParallel, or DeepSpeed ZeRO."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """For deepspeed: what ZeRO shards (1: optimizer state, 2: gradients too, 3: weights too)."""


class EvalConfig(Section):
    """The evaluation at the end of a run, and its default for `arat eval`."""

    attack: Annotated[str, AfterValidator(_attack_names)] = "pgd20"
    """none; pgdN: N steps of eps/4 from a uniform start; apgd or apgd-ce (N steps: apgdN, 100 if unsaid), apgd-t, fab-t
    and square as AutoAttack runs them; autoattack: its standard version, those four; or several of them with commas
    between, each on what the ones before have left. Eval mode, adv branch."""
    norm: Literal["linf", "l2", "l1"] | None = None
    """Norm of the ball; default: attack.norm."""
    eps: Positive | None = None
    """Radius of the ball in pixel units of [0,1]; default: attack.eps."""
    restarts: Count | None = None
    """Starts of pgdN, apgd and apgd-ce; default: 1, of APGD in l1 5."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the passes of an evaluation, whatever the training's: weights stay as they are, half precision by autocast."""
    batch_size: Count | None = None
    """Most pictures of one pass, per worker; a small set is cut into smaller batches, so that all workers get some.
    Default: 128 on a CPU; on a GPU 1,024 for pictures of up to 32 pixels a side and half as many for twice the side, a
    power of two and at least 64: 128 at 224."""
    limit: Count | None = None
    """Only so many pictures, evenly spaced over the set; default: all."""
    every: Count | None = None
    """Epochs between two evaluations in the course of training; default: none."""
    every_attack: Annotated[str, AfterValidator(_attack_names)] = "pgd10"
    """Their attack."""
    every_limit: Count | None = 1000
    """Their number of pictures, evenly spaced over the set; null: all."""
    seed: Annotated[Integer, Field(ge=0, lt=2**31)] = 0
    """Fixes the attacks' random numbers, per picture or per batch."""

    @property
    def attack_names(self) -> tuple[str, ...]:
        """The attacks one by one, in order."""
        if self.attack == "none":
            return ()
        return AUTOATTACK if self.attack == "autoattack" else tuple(self.attack.split(","))


class TrackConfig(Section):
    """MLflow beside metrics.jsonl."""

    mlflow: bool = True
    """Mirror metrics.jsonl to MLflow."""
    uri: str | None = None
    """MLflow tracking URI; default: sqlite in the storage folder, mlflow.db."""
    experiment: str = "arat"
    """MLflow experiment."""
    diagnostics_every: Count | None = None
    """Steps between two measurements of gradient conflict (with micro_batches, of a step's last part) and of the
    branches' distance; default: none."""


class ClusterConfig(Section):
    """The Ray worker group."""

    workers: Annotated[Integer, Field(ge=0)] | Annotated[tuple[Count, Count], AfterValidator(_ascending)] = 1
    """Number of workers, or the least and the most, as in [2, 4] (on the command line --workers 2:4): then as many as
    the cluster has room for, more and fewer in the course of the run; 0 runs in this process, without Ray."""
    placement: Literal["pack", "spread", "strict_spread"] = "pack"
    """Workers on few machines, on many, or each on a machine of its own."""
    resize_every_s: Positive = 60
    """Where workers is a pair: time between two looks whether there is room for more of them, in seconds. Then they
    write a checkpoint and are started anew, which takes as long as any start."""
    cpus_per_worker: Count = 1
    """Cores reserved for a worker and threads that torch uses in it."""
    gpus_per_worker: Annotated[Integer, Field(ge=0, le=1)] | None = None
    """GPUs of a worker: 0 trains on the CPU with gloo, 1 with nccl. Default: 0; without workers, the GPU that is
    there."""
    address: str | None = None
    """Ray cluster to join; default: one started on this machine."""
    max_failures: Annotated[Integer, Field(ge=0)] = 3
    """Times that the worker group is restarted from the newest checkpoint before the run fails."""
    start_timeout_s: Positive = 1800
    """Longest time to wait for machines that have room for the workers, in seconds, before the run fails; and longest
    time from the start of the workers to the end of their first step (copying of data and compilation included), before
    they are restarted."""
    step_timeout_s: Positive = 600
    """Longest time that a worker may take over a later step, in seconds; then the stacks of all go into the run's
    folder and they are restarted."""
    storage: str = "runs"
    """Folder or fsspec URI (s3://, gs://, file://) that holds the runs; every worker must reach it."""

    @property
    def min_workers(self) -> int:
        """The least number of workers."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """The largest number of workers."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def collective_timeout_s(self) -> float:
        """Longest time that a rank which is done with a step waits for the others, in seconds."""
        return max(self.start_timeout_s, self.step_timeout_s)

    @property
    def num_gpus(self) -> int:
        """GPUs that each worker is given by Ray."""
        return self.gpus_per_worker or 0


class Recipe(Section):
    """One result: a backbone, a data set, an objective, and how to train."""

    data: DataConfig
    model: ModelConfig
    objective: ObjectiveConfig
    attack: AttackConfig = AttackConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    engine: EngineConfig = EngineConfig()
    eval: EvalConfig = EvalConfig()
    track: TrackConfig = TrackConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def world_size(self) -> int:
        """Largest number of ranks that train: the workers, or this process alone."""
        return max(1, self.cluster.max_workers)

    def without_start(self) -> Recipe:
        """The recipe without the weights that the net starts from: they come from elsewhere."""
        nothing = {"pretrained": False, "checkpoint": None}
        recipe = self.model_copy(update={"model": self.model.model_copy(update=nothing)})
        if not isinstance(self.objective, LBGATConfig) or self.objective.teacher is None:
            return recipe
        teacher = self.objective.teacher.model_copy(update=nothing)
        objective = self.objective.model_copy(update={"teacher": teacher})
        return recipe.model_copy(update={"objective": objective})

    def sha256(self) -> str:
        """Hash of the resolved recipe, independent of its file's layout."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The resolved recipe as YAML that `load_recipe` reads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)
