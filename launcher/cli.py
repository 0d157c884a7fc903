"""The `arat` command: parse, call one function, print. Progress goes to stderr, results to stdout."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from rich.logging import RichHandler

from arat_dist.config import ATTACKS
from arat_dist.errors import ClusterError, SearchError, StoppedError, TrackingError, UserError, WorkersError
from arat_dist.recipe import iter_keys
from launcher import verbs
from launcher.submit import JobError

BAD_INPUT = 2
FAILED = 1

_TAKE_OVERRIDES = ("train", "tune", "demo", "bench", "track")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0 done, 1 the work failed, 2 bad usage or bad input."""
    args, extra = _parser().parse_known_args(argv)
    _set_up_logging()
    args.stdout = sys.stdout
    try:
        result = _run(args, extra)
    except UserError as error:
        print(f"arat: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        goes_on = "goes on where it stopped" if args.verb in ("train", "tune", "demo", "eval") else "starts anew"
        print(f"arat: interrupted; the same command {goes_on}", file=sys.stderr)
        return FAILED
    except StoppedError as error:
        where = " before the workers ran" if error.step is None else f" at step {error.step}"
        print(
            f"arat: stopped{'' if args.verb in ('eval', 'tune') else where}; the same command goes on", file=sys.stderr
        )
        return FAILED
    except (ClusterError, SearchError) as error:
        print(f"arat: {error}", file=sys.stderr)
        return FAILED
    except FloatingPointError as error:
        print(f"arat: the training broke down: {error}", file=sys.stderr)
        return FAILED
    except JobError as error:
        print(f"arat: {error}", file=sys.stderr)
        return error.status
    except TrackingError as error:
        print(f"arat: {error}; the same command later goes on", file=sys.stderr)
        return FAILED
    except WorkersError as error:
        print(f"{error.tracebacks}\narat: {error}", file=sys.stderr)
        return FAILED
    except Exception as error:
        logging.getLogger("arat").exception("the work failed")
        print(f"arat: the work failed: {type(error).__name__}: {error}", file=sys.stderr)
        return FAILED
    if args.json and result is not None:
        print(json.dumps(result))
    return 0


def _run(args: argparse.Namespace, extra: Sequence[str]) -> dict[str, Any] | None:
    """Call the verb. Libraries print, and so does Ray what its workers print: stdout is for results alone."""
    with redirect_stdout(sys.stderr):
        try:
            args.overrides = _overrides(extra, allowed=args.verb in _TAKE_OVERRIDES)
            if args.verb == "submit":
                args.inner, extra = _parser().parse_known_args(args.command)
                args.inner.overrides = _overrides(extra, allowed=args.inner.verb in _TAKE_OVERRIDES)
            return args.run(args)
        finally:
            if "ray" in sys.modules:
                from launcher.cluster import disconnect

                disconnect()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="arat", description="Adversarially robust image classifiers: train, evaluate, export.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = _verb(commands, "demo", verbs.demo, "the main job on handwritten digits, in minutes")
    verb.epilog = "Recipe keys can be overridden, as in --train.seed 1."

    data = commands.add_parser("data", help="write and check data sets").add_subparsers(
        dest="data_verb", required=True, metavar="VERB"
    )
    verb = _verb(data, "write", verbs.data_write, "write pictures as a .beton with its manifest")
    verb.add_argument("source", metavar="SOURCE", help="folder:PATH | torchvision:CIFAR10:PATH | digits:train|val")
    verb.add_argument("out", metavar="OUT.beton", type=Path)
    verb.add_argument("--labels", help="for a flat folder: a list of NAME LABEL lines, or LOC_val_solution.csv")
    verb.add_argument("--classes-from", metavar="TRAIN.beton", help="for a flat folder: the set whose classes it has")
    verb.add_argument("--max-side", type=_side, default=500, help="shrink longer pictures to this side (500)")
    verb.add_argument("--jpeg-quality", type=_percent, default=90, help="of pictures stored as JPEG (90)")
    verb.add_argument(
        "--raw-below",
        metavar="PIXELS",
        type=_count,
        default=128 * 128,
        help="store pictures of fewer pixels as they are: larger, faster to load (16384)",
    )
    verb.add_argument("--processes", type=_positive, default=os.cpu_count() or 1, help="that encode (all cores)")
    verb.add_argument(
        "--on-error",
        choices=["fail", "skip"],
        default="fail",
        help="at an unreadable picture: end, or leave it out and list it in the manifest (fail)",
    )
    verb = _verb(data, "check", verbs.data_check, "compare a .beton with its manifest, the SHA-256 included")
    verb.add_argument("file", metavar="FILE.beton", type=Path)
    verb.add_argument("--deep", action="store_true", help="decode every picture as well")

    verb = _verb(commands, "train", verbs.train, "train a recipe, or go on with an unfinished run")
    verb.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    verb.add_argument("--name", help="the run's folder under cluster.storage (default: the recipe's name)")
    verb.add_argument(
        "--workers",
        type=_workers,
        metavar="N|MIN:MAX",
        help="cluster.workers; MIN:MAX: as many as there is room for; 0: in this process, without Ray",
    )
    verb.add_argument("--address", help="cluster.address")
    verb.add_argument("--max-steps", type=int, help="train.max_steps")
    verb.add_argument("--print-config", action="store_true", help="print the resolved recipe and stop")
    verb.formatter_class = argparse.RawDescriptionHelpFormatter
    verb.epilog = "Any recipe key can be overridden with --SECTION.KEY VALUE:\n\n" + "\n".join(
        f"  --{key} (default: {default})\n        {doc}" for key, default, doc in iter_keys()
    )

    verb = _verb(commands, "tune", verbs.tune, "search over recipe keys, or go on with an unfinished search")
    verb.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    verb.add_argument("--search", metavar="SEARCH.yaml", required=True, help="a file, or the name of a shipped one")
    verb.add_argument("--trials", type=_positive, help="their number, in place of the file's")
    verb.add_argument("--name", help="the search's folder under cluster.storage (default: the search file's name)")
    verb.add_argument("--workers", type=_workers, metavar="N|MIN:MAX", help="cluster.workers of each trial")
    verb.add_argument("--address", help="cluster.address")
    verb.epilog = "Recipe keys can be overridden for all trials, as in --train.seed 1."

    verb = _verb(commands, "eval", verbs.evaluate, "measure clean and robust accuracy")
    verb.add_argument("target", metavar="RUN|EXPORT_DIR|timm:ARCH[:WEIGHTS_FILE]")
    verb.add_argument(
        "--weights", choices=["raw", "ema", "swa"], help="of a run (default: the last of these that it keeps)"
    )
    verb.add_argument("--branch", choices=["adv", "clean"], default="adv", help="of a net with split norms (adv)")
    verb.add_argument("--attack", help=f"{ATTACKS}, or several with commas between them (default: the recipe's)")
    verb.add_argument("--norm", help="linf, l2 or l1 (default: the recipe's)")
    verb.add_argument("--eps", help="radius in pixel units, such as 8/255 (default: the recipe's)")
    verb.add_argument("--restarts", type=_positive, help="starts of pgdN, apgd and apgd-ce (1; APGD in l1: 5)")
    verb.add_argument("--transfer-from", metavar="TARGET", help="make the adversarial pictures on this other net")
    verb.add_argument("--corruptions", metavar="all|NAME,...", help="accuracy under common corruptions as well")
    verb.add_argument("--severity", type=_severity, help="of the corruptions, 1 to 5 (all five)")
    verb.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="of the passes (fp32)")
    verb.add_argument("--data", metavar="FILE.beton", help="what to evaluate on (default: the recipe's data.val)")
    verb.add_argument("--samples", metavar="FILE", help="a line for each sample to evaluate: its index or its name")
    verb.add_argument("--limit", type=_positive, help="only so many pictures, evenly spaced")
    verb.add_argument("--seed", type=_count, help="of the attacks' random numbers (the recipe's)")
    verb.add_argument("--workers", type=_count, default=0, help="Ray workers that share the work; 0: this process (0)")
    verb.add_argument("--threads", type=_positive, help="that torch uses in each worker (the cores, shared out)")
    verb.add_argument(
        "--batch-size", type=_positive, help="most pictures of a pass (128; on a GPU by their size, up to 1,024)"
    )
    verb.add_argument("--out", metavar="DIR", help="for the results (default: RUN/evaluations, or evaluations/TARGET)")
    verb.epilog = "What is finished is kept: the same command goes on after an interruption, and answers at once later."

    bench = commands.add_parser("bench", help="measure the speed of the parts").add_subparsers(
        dest="bench_verb", required=True, metavar="VERB"
    )
    verb = _verb(
        bench, "step", verbs.bench_step, "time ARAT's step against the least that it costs and against plain code"
    )
    verb.add_argument("--model", default="resnet50", help="a timm architecture (resnet50)")
    verb.add_argument("--image-size", type=_positive, default=224, help="side of the pictures, in pixels (224)")
    verb.add_argument("--num-classes", type=_positive, default=1000, help="(1000)")
    verb.add_argument("--batch-size", type=_positive, default=16, help="pictures of a step (16)")
    verb.add_argument("--attack-steps", type=_positive, default=3, help="steps of PGD (3)")
    verb.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="bf16", help="of the step (bf16)")
    verb.add_argument("--compile", action="store_true", help="train.compile")
    verb.add_argument("--threads", type=_positive, help="that torch uses (torch's own choice)")
    verb.add_argument("--repeats", type=_positive, default=5, help="rounds, of which medians are taken (5)")
    verb.epilog = "Recipe keys can be overridden, as in --model.args '{channels: [16, 32, 64, 128]}'."
    verb = _verb(bench, "data", verbs.bench_data, "pictures a second of the loaders, of FFCV's own and of torchvision")
    verb.add_argument(
        "folder", metavar="FOLDER", type=Path, help="pictures in class folders, six batches a core at least"
    )
    verb.add_argument("--image-size", type=_positive, default=224, help="side of the crops, in pixels (224)")
    verb.add_argument("--batch-size", type=_positive, default=64, help="(64)")
    verb.add_argument("--cores", type=_positive, default=os.cpu_count() or 1, help="that everything may use (all)")
    verb.add_argument("--repeats", type=_positive, default=5, help="rounds, of which medians are taken (5)")
    verb = _verb(bench, "train", verbs.bench_train, "train a recipe in this process and tell what the loop costs")
    verb.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    verb.epilog = "Recipe keys can be overridden, as in --train.max_steps 100."

    verb = _verb(
        bench, "eval", verbs.bench_eval, "APGD against its authors' code, and workers that share an evaluation"
    )
    verb.add_argument("target", metavar="RUN|EXPORT_DIR|timm:ARCH[:WEIGHTS_FILE]")
    verb.add_argument("--data", metavar="FILE.beton", help="(default: the recipe's data.val)")
    verb.add_argument("--norm", help="linf, l2 or l1 (default: the recipe's)")
    verb.add_argument("--eps", help="radius in pixel units, such as 8/255 (default: the recipe's)")
    verb.add_argument("--limit", type=_positive, default=128, help="pictures, evenly spaced (128)")
    verb.add_argument("--threads", type=_positive, help="that torch uses for APGD (torch's own choice)")
    verb.add_argument("--repeats", type=_positive, default=5, help="rounds, of which medians are taken (5)")
    verb.add_argument("--workers", type=_several, help="also time so many workers of one thread against one of them")
    verb.add_argument("--attack", default="autoattack", help="that the workers share (autoattack)")

    verb = _verb(bench, "engine", verbs.bench_engine, "what a rank holds under DDP and each stage of DeepSpeed ZeRO")
    _step_options(verb, batch_size=16, attack_steps=1)
    verb = _verb(bench, "scale", verbs.bench_scale, "workers of one thread against one worker with as many threads")
    _step_options(verb, batch_size=64, attack_steps=10)
    verb.add_argument("--engine", choices=["ddp", "zero0", "zero1", "zero2", "zero3"], default="ddp", help="(ddp)")
    verb.add_argument("--steps", type=_positive, default=1, help="of each worker group's turn (1)")

    verb = _verb(
        commands, "export", verbs.export, "write a run's adv branch as a plain timm or ONNX net, with a model card"
    )
    verb.add_argument("target", metavar="RUN")
    verb.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    verb.add_argument("--weights", choices=["raw", "ema", "swa"], help="(default: the last of these that it keeps)")
    verb.add_argument(
        "--format",
        choices=["timm", "onnx"],
        default="timm",
        help="timm: a folder for timm and the Hugging Face hub; onnx: model.onnx, pixels in [0,1] to logits (timm)",
    )

    verb = _verb(commands, "report", verbs.report, "show runs on one page: what they reached, and how")
    verb.add_argument("targets", metavar="RUN", nargs="+")
    verb.add_argument("--out", metavar="DIR", required=True, help="for report.html and its plots as PNG files")
    verb.add_argument("--pictures", type=_count, default=8, help="that are shown of each run, with their attack (8)")
    verb.add_argument(
        "--limit",
        type=_count,
        default=256,
        help="pictures of each run that are attacked for the report, in this process; 0: none (256)",
    )

    verb = _verb(commands, "submit", verbs.submit, "run a verb as a job in a Ray cluster, and follow its log")
    verb.add_argument("--address", metavar="URL", required=True, help="of the cluster's dashboard: http://HOST:8265")
    verb.add_argument("--no-wait", action="store_true", help="print the job's id and leave")
    verb.add_argument("command", metavar="-- VERB ...", nargs="+", help="as on the command line, behind a --")
    verb.epilog = "The token is read from RAY_AUTH_TOKEN or ~/.ray/auth_token. The cluster's image holds this package."

    track = commands.add_parser("track", help="MLflow's copy of the metrics").add_subparsers(
        dest="track_verb", required=True, metavar="VERB"
    )
    verb = _verb(track, "sync", verbs.track_sync, "deliver to MLflow what it lacks of a run that isn't training now")
    verb.add_argument("target", metavar="RUN")
    verb.epilog = "Keys of the recipe's section track can be overridden, as in --track.uri http://HOST:5000."
    return parser


def _step_options(verb: argparse.ArgumentParser, *, batch_size: int, attack_steps: int) -> None:
    """What the benches of several workers have in common."""
    verb.add_argument("--model", default="cifar_resnet18", help="a timm architecture (cifar_resnet18)")
    verb.add_argument("--image-size", type=_positive, default=32, help="side of the pictures, in pixels (32)")
    verb.add_argument("--num-classes", type=_positive, default=10, help="(10)")
    verb.add_argument(
        "--global-batch-size", type=_positive, default=batch_size, help=f"of all workers together ({batch_size})"
    )
    verb.add_argument("--attack-steps", type=_positive, default=attack_steps, help=f"steps of PGD ({attack_steps})")
    verb.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="of the step (bf16)")
    verb.add_argument("--workers", type=_several, default=2, help="processes on this machine (2)")
    verb.add_argument("--device", choices=["cuda", "cpu"], help="a GPU each, or the CPU (GPUs where there are any)")
    verb.add_argument("--repeats", type=_positive, default=5, help="rounds, of which medians are taken (5)")
    verb.epilog = "Recipe keys can be overridden, as in --model.args '{channels: [16, 32, 64, 128]}'."


def _verb(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    """A verb's parser, with what all verbs have."""
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    parser.set_defaults(run=run)
    return parser


def _overrides(extra: Sequence[str], *, allowed: bool) -> list[tuple[str, str]]:
    """--SECTION.KEY VALUE and --SECTION.KEY=VALUE, as pairs (UserError)."""
    pairs, rest = [], list(extra)
    while rest:
        option = rest.pop(0)
        if not allowed or not option.startswith("--"):
            raise UserError(f"{option}: unknown argument; `arat VERB --help` lists them")
        key, has_value, value = option[2:].partition("=")
        if not has_value:
            if not rest:
                raise UserError(f"{option}: a value is missing")
            value = rest.pop(0)
        pairs.append((key, value))
    return pairs


def _in_range(text: str, least: int, most: float = math.inf) -> int:
    value = int(text)
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text}: at least {least}" + (f", at most {most}" if most < math.inf else ""))
    return value


def _workers(text: str) -> int | list[int]:
    """N, or MIN:MAX as a list."""
    sizes = [int(size) for size in text.split(":")]
    if len(sizes) > 2:
        raise argparse.ArgumentTypeError(f"{text}: N or MIN:MAX")
    return sizes if len(sizes) == 2 else sizes[0]


_positive = partial(_in_range, least=1)
_several = partial(_in_range, least=2)
_count = partial(_in_range, least=0)
_percent = partial(_in_range, least=1, most=100)
_severity = partial(_in_range, least=1, most=5)
_side = partial(_in_range, least=1, most=65_500)  # libjpeg's limit


def _set_up_logging() -> None:
    from launcher.progress import console

    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    logging.getLogger("arat_dist").setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
