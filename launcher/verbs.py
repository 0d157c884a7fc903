"""What each verb of the `arat` command does: call one function, print what it found."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from arat_dist.errors import UserError
from arat_dist.recipe import load_recipe, parse_recipe

if TYPE_CHECKING:
    from arat_dist.config import Recipe
    from arat_dist.data.manifest import Manifest
    from arat_dist.search.search import Search

# Each imports what it runs when it runs: `arat --help` and a mistyped recipe answer without torch and Ray.


def demo(args: argparse.Namespace) -> dict[str, Any]:
    """`arat demo`."""
    from arat_dist.export import loading_code
    from launcher.demo import demo as run_demo
    from launcher.progress import results_table

    summary = run_demo(args.overrides)
    standard = summary | {
        "clean_accuracy": summary["standard_clean_accuracy"],
        "robust_accuracy": summary["standard_robust_accuracy"],
    }
    _print_unless_json(
        args,
        results_table("Handwritten digits, trained for as long", [("ARAT", summary), ("standard", standard)]),
        f"took {summary['wall_s']:.0f} s; a plain timm checkpoint is in {summary['export']}\n"
        f"  {loading_code(summary['export'])}",
    )
    return summary


def data_write(args: argparse.Namespace) -> dict[str, Any]:
    """`arat data write`."""
    from arat_dist.data.beton_writer import write_beton
    from arat_dist.data.manifest import manifest_path
    from arat_dist.data.sources import open_source
    from launcher.progress import console

    source = open_source(args.source, labels=args.labels, classes_from=args.classes_from)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"writing {args.out}", total=len(source))
        manifest = write_beton(
            source,
            args.out,
            max_side=args.max_side,
            jpeg_quality=args.jpeg_quality,
            raw_below=args.raw_below,
            on_error=args.on_error,
            num_workers=args.processes,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if manifest.skipped:
        console.print(
            f"{args.out}: {len(manifest.skipped)} of {len(source)} pictures couldn't be read and were left out; "
            f"{manifest_path(args.out).name} lists them",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
    _print_unless_json(args, f"{args.out}: {manifest.num_samples} pictures of {manifest.num_classes} classes")
    return manifest.model_dump(mode="json")


def data_check(args: argparse.Namespace) -> dict[str, Any]:
    """`arat data check`."""
    from arat_dist.data.manifest import check_beton, check_figures

    manifest = check_beton(args.file, hash=True)
    check_figures(args.file, manifest)
    if args.deep:
        _decode_all(args.file, manifest)
    _print_unless_json(
        args,
        f"{args.file}: whole, {manifest.num_samples} pictures of {manifest.num_classes} classes, SHA-256 agrees"
        + (", every picture decodes" if args.deep else ""),
    )
    return manifest.model_dump(mode="json")


def _decode_all(file: Path, manifest: Manifest) -> None:
    """The part of `arat data check` that --deep adds."""
    from arat_dist.data.deep_check import check_samples
    from launcher.progress import console

    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"decoding {file}", total=manifest.num_samples)
        check_samples(
            file, manifest, threads=os.cpu_count() or 1, on_progress=lambda done: bar.update(task, completed=done)
        )


def train(args: argparse.Namespace) -> dict[str, Any] | None:
    """`arat train`."""
    recipe = load_recipe(args.recipe, args.overrides + _shorthands(args))
    if args.print_config:
        print(recipe.to_yaml(), end="", file=args.stdout)
        return None
    from arat_dist.run import Run
    from launcher.fit import fit
    from launcher.progress import console, results_table

    name = _run_name(args)
    run = Run(recipe.cluster.storage, name)
    run.check(recipe)
    if finished := run.summary():
        console.print(f"{name}: finished already; another --name would train again", highlight=False)
        summary = finished
    else:
        summary = fit(recipe, name)
    _print_unless_json(args, results_table(name, [(summary["objective"], summary)]))
    return summary


def tune(args: argparse.Namespace) -> dict[str, Any]:
    """`arat tune`."""
    search = _search(args)
    from launcher.search_progress import search_tables
    from launcher.tune import tune as run_search

    summary = run_search(search)
    _print_unless_json(args, *search_tables(summary), f"recipes of the best and all trials: {search.run.folder.uri}")
    return summary


def _search(args: argparse.Namespace) -> Search:
    """The search that `arat tune` and the submission of one are about."""
    from arat_dist.search.config import parse_search, read_search

    config = read_search(args.search)
    if args.trials is not None:
        config = parse_search(config.model_dump(mode="json") | {"trials": args.trials})
    recipe = load_recipe(args.recipe, args.overrides + _shorthands(args))
    name = Path(args.search).stem if args.name is None else args.name
    from arat_dist.search.search import Search

    return Search.of(config, recipe, name, source=args.search)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """`arat eval`."""
    from launcher.evaluate import Wanted, evaluate_target
    from launcher.progress import console, evaluation_tables

    keys = ("attack", "norm", "eps", "limit", "batch_size", "restarts", "precision", "seed")
    wanted = Wanted(
        args.target,
        weights=args.weights,
        branch=args.branch,
        val=args.data,
        changes={key: getattr(args, key) for key in keys if getattr(args, key) is not None},
        samples=args.samples,
        transfer_from=args.transfer_from,
        corruptions=args.corruptions,
        severity=args.severity,
        out=args.out,
    )
    result = evaluate_target(wanted, args.workers, args.threads)
    for warning in result["warnings"]:
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True, markup=False)
    _print_unless_json(args, *evaluation_tables(result))
    return result


def export(args: argparse.Namespace) -> dict[str, Any]:
    """`arat export`."""
    from arat_dist.export import loading_code
    from arat_dist.export_run import export_run
    from arat_dist.run import Run

    exported = export_run(Run.at(args.target), args.out_dir, args.weights, ("onnx",) if args.format == "onnx" else None)
    lines = [
        f"{exported.folder}: loads with {loading_code(exported.folder)}; "
        f"its logits differ by at most {exported.max_difference:.1e}; README.md is its model card"
    ]
    if exported.formats == ("timm", "onnx"):
        lines.append(
            f"timm alone doesn't know this architecture, so {exported.folder}/model.onnx is there as well, which needs "
            "onnxruntime and nothing else"
        )
    _print_unless_json(args, *lines)
    return {
        "export": str(exported.folder),
        "formats": list(exported.formats),
        "max_difference": exported.max_difference,
    }


def report(args: argparse.Namespace) -> dict[str, Any]:
    """`arat report`."""
    from arat_dist.report.build import write_report
    from launcher.work_progress import WorkProgress

    with WorkProgress("attacking pictures") as show:
        result = write_report(args.targets, args.out, limit=args.limit, num_pictures=args.pictures, on_progress=show)
    missing = "".join(f"\n  left out: {line}" for line in result["left_out"])
    _print_unless_json(args, f"{result['report']}, and {len(result['plots'])} plots beside it{missing}")
    return result


def track_sync(args: argparse.Namespace) -> dict[str, Any]:
    """`arat track sync`."""
    from arat_dist.run import Run
    from arat_dist.search.search import Search
    from arat_dist.search.sync import sync_search
    from arat_dist.tracking import sync

    for key, _ in args.overrides:
        if not key.startswith("track."):
            raise UserError(f"--{key}: a key of the section track, such as --track.uri, would be right")
    if search := Search.find(args.target):
        result = sync_search(search, args.overrides)
    else:
        run = Run.at(args.target)
        result = sync(run, parse_recipe(run.recipe().model_dump(mode="json"), args.overrides))
    _print_unless_json(
        args,
        f"{args.target}: {result['metrics_sent']} metrics sent, now {result['status']} as "
        f"{result['mlflow_run_id']} at {result['mlflow_tracking_uri']}",
    )
    return result


def bench_step(args: argparse.Namespace) -> dict[str, Any]:
    """`arat bench step`."""
    import torch

    from arat_dist.bench.step import bench_step as measure
    from arat_dist.bench.step import step_recipe
    from launcher.progress import console, step_table

    changes = [("train.compile", True)] if args.compile else []
    recipe = step_recipe(
        args.model,
        image_size=args.image_size,
        num_classes=args.num_classes,
        batch_size=args.batch_size,
        attack_steps=args.attack_steps,
        precision=args.precision,
        overrides=[*changes, *args.overrides],
    )
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with console.status("building") as status:
        result = measure(recipe, device, repeats=args.repeats, on_progress=status.update)
    _print_unless_json(args, step_table(result))
    return result


def bench_data(args: argparse.Namespace) -> dict[str, Any]:
    """`arat bench data`."""
    from arat_dist.bench.data import bench_data as measure
    from launcher.progress import console, data_table

    with console.status("reading") as status:
        result = measure(
            args.folder,
            image_size=args.image_size,
            batch_size=args.batch_size,
            cores=args.cores,
            repeats=args.repeats,
            on_progress=status.update,
        )
    _print_unless_json(args, data_table(result))
    return result


def bench_train(args: argparse.Namespace) -> dict[str, Any]:
    """`arat bench train`."""
    from launcher.bench import bench_train as measure

    result = measure(load_recipe(args.recipe, args.overrides))
    _print_unless_json(
        args,
        f"{result['images_per_second']:.1f} pictures/s over {result['steps']} steps; {result['overhead_fraction']:.2%} "
        f"of the time went to what is not the step, {result['loader_wait_fraction']:.2%} to waiting for pictures, "
        f"{result['checkpoint_fraction']:.2%} to taking checkpoints",
    )
    return result


def bench_eval(args: argparse.Namespace) -> dict[str, Any]:
    """`arat bench eval`."""
    import torch

    from arat_dist.bench.evaluation import bench_attacks, bench_workers
    from launcher.evaluate import Wanted, open_wanted
    from launcher.progress import console

    changes = {key: getattr(args, key) for key in ("norm", "eps", "limit", "attack") if getattr(args, key) is not None}
    target, config = open_wanted(Wanted(args.target, val=args.data, changes=changes))
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with console.status("building") as status:
        result = bench_attacks(target, config, device, repeats=args.repeats, on_progress=status.update)
        if args.workers:
            result["scale"] = bench_workers(
                target, config, workers=args.workers, repeats=args.repeats, on_progress=status.update
            )
    lines = [
        f"{name}: {each['ours_s']:.2f} s, its authors' code {each['theirs_s']:.2f} s: {each['speedup']:.2f} x; leave "
        f"{each['ours_robust']:.4f} and {each['theirs_robust']:.4f} of {each['num_attacked']} pictures, "
        f"agree on {each['agreement']:.2%}"
        for name, each in result.items()
        if name != "scale"
    ]
    if scale := result.get("scale"):
        lines.append(
            f"{scale['attack']}: {scale['workers']} workers of a thread {scale['ratio']:.2f} x as fast as one "
            f"({scale[f'{args.workers}x1_s']:.1f} s, {scale['1x1_s']:.1f} s)"
        )
    _print_unless_json(args, *lines)
    return result


def submit(args: argparse.Namespace) -> dict[str, Any]:
    """`arat submit`."""
    from launcher.submit import JobCommand, Jobs, train_command, tune_command

    inner, command = args.inner, JobCommand(args.command)
    if inner.verb == "submit":
        raise UserError("--: submit: a verb that works, such as train, would be right")
    if inner.verb == "train":
        recipe = load_recipe(inner.recipe, inner.overrides + _shorthands(inner))
        command = train_command(recipe, _run_name(inner))
    if inner.verb == "tune":
        command = tune_command(_search(inner))
    args.json = args.json or inner.json
    if args.json:
        command = replace(command, arguments=[*(each for each in command.arguments if each != "--json"), "--json"])
    jobs = Jobs(args.address)
    job = jobs.start(command)
    if args.no_wait:
        _print_unless_json(args, job)
        return {"job": job}
    return jobs.follow(job)


def _run_name(args: argparse.Namespace) -> str:
    return Path(args.recipe).stem if args.name is None else args.name


def bench_engine(args: argparse.Namespace) -> dict[str, Any]:
    """`arat bench engine`."""
    from arat_dist.bench.engine import bench_engine as measure
    from arat_dist.bench.ranks import ranks_device
    from launcher.progress import console, engine_table

    device = ranks_device(args.device, args.workers)
    recipe = _ranks_recipe(args)
    with console.status("building") as status:
        result = measure(recipe, workers=args.workers, device=device, repeats=args.repeats, on_progress=status.update)
    _print_unless_json(args, engine_table(result))
    return result


def bench_scale(args: argparse.Namespace) -> dict[str, Any]:
    """`arat bench scale`."""
    from arat_dist.bench.engine import ENGINES
    from arat_dist.bench.ranks import ranks_device
    from arat_dist.bench.scale import bench_scale as measure
    from launcher.progress import console

    device = ranks_device(args.device, args.workers)
    recipe = _ranks_recipe(args).model_copy(update={"engine": ENGINES[args.engine]})
    with console.status("building") as status:
        result = measure(
            recipe,
            workers=args.workers,
            device=device,
            steps=args.steps,
            repeats=args.repeats,
            on_progress=status.update,
        )
    speeds = ", ".join(f"{name}: {speed:.1f} pictures/s" for name, speed in result["images_per_second"].items())
    _print_unless_json(args, f"workers x threads: {speeds}; ratio {result['ratio']:.3f}")
    return result


def _ranks_recipe(args: argparse.Namespace) -> Recipe:
    """ARAT's step as the benches of several workers take it."""
    from arat_dist.bench.step import step_recipe
    from arat_dist.errors import UserError

    if args.global_batch_size < 2 * args.workers:
        raise UserError(f"--global-batch-size: {args.global_batch_size}: at least 2 a worker ({args.workers})")
    return step_recipe(
        args.model,
        image_size=args.image_size,
        num_classes=args.num_classes,
        batch_size=args.global_batch_size,
        attack_steps=args.attack_steps,
        precision=args.precision,
        overrides=args.overrides,
    )


def _shorthands(args: argparse.Namespace) -> list[tuple[str, Any]]:
    max_steps = getattr(args, "max_steps", None)  # a search's trials have none
    given = {"cluster.workers": args.workers, "cluster.address": args.address, "train.max_steps": max_steps}
    return [(key, value) for key, value in given.items() if value is not None]


def _print_unless_json(args: argparse.Namespace, *parts: Any) -> None:
    if not args.json:
        console = Console(file=args.stdout)
        for part in parts:
            console.print(part, highlight=False, soft_wrap=isinstance(part, str))
