"""The templates of launcher/clusters: Ray's own schema, the fields of KubeRay's API, and a Slurm job with stand-ins."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli import _overrides, _parser

CLUSTERS = Path(__file__).parent.parent / "launcher/clusters"

# From kuberay's docs/reference/api.md: the fields of each object that the template uses; a name after the colon is the
# object that a field holds, + a list of them, * what Kubernetes itself defines.
KUBERAY = {
    "RayJob": "apiVersion kind metadata:* spec:RayJobSpec",
    "RayJobSpec": "entrypoint runtimeEnvYAML backoffLimit shutdownAfterJobFinishes "
    "ttlSecondsAfterFinished submissionMode rayClusterSpec:RayClusterSpec",
    "RayClusterSpec": "rayVersion authOptions:AuthOptions enableInTreeAutoscaling autoscalerOptions:AutoscalerOptions "
    "headGroupSpec:GroupSpec workerGroupSpecs:+GroupSpec",
    "AuthOptions": "mode",
    "AutoscalerOptions": "idleTimeoutSeconds upscalingMode version resources:* env:*",
    "GroupSpec": "groupName replicas minReplicas maxReplicas numOfHosts idleTimeoutSeconds rayStartParams:* template:*",
}


def check_fields(value: dict[str, Any], kind: str) -> None:
    """Every key is a field of the object, down to what Kubernetes defines."""
    fields = {name: held for name, _, held in (field.partition(":") for field in KUBERAY[kind].split())}
    assert value.keys() <= fields.keys(), kind
    for key, inner in value.items():
        held = fields[key]
        if held.startswith("+"):
            for each in inner:
                check_fields(each, held[1:])
        elif held and held != "*":
            check_fields(inner, held)


def parsed(command: list[str]) -> tuple[Any, dict[str, str]]:
    """A command of ours as our own command line takes it: its arguments and the recipe's keys."""
    assert command[0] == "arat"
    args, extra = _parser().parse_known_args(command[1:])
    return args, dict(_overrides(extra, allowed=True))


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / "kuberay-rayjob.yaml").read_text())


def test_the_rayjob_has_no_field_that_kuberay_doesnt_know(job):
    check_fields(job, "RayJob")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    with pytest.raises(AssertionError, match="RayJobSpec"):
        check_fields({"spec": {"entryPoint": ""}}, "RayJob")


def test_the_rayjob_asks_for_what_its_training_uses(job):
    from arat_dist.recipe import iter_keys, load_recipe

    args, keys = parsed(shlex.split(job["spec"]["entrypoint"].removeprefix("exec ")))
    assert (args.verb, args.address, args.name is not None) == ("train", "auto", True)
    assert keys.keys() <= {key for key, _, _ in iter_keys()}
    load_recipe(args.recipe)
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    gpus = int(limits["nvidia.com/gpu"])
    assert yaml.safe_load(keys["cluster.workers"]) == [gpus * group["minReplicas"], gpus * group["maxReplicas"]]
    assert gpus * int(keys["cluster.cpus_per_worker"]) <= int(limits["cpu"])
    assert container["resources"]["requests"] == limits
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert keys["data.stage_to"] in mounts
    volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert set(mounts.values()) == volumes.keys()


def test_the_rayjobs_notices_are_what_ray_takes_and_leave_time(job):
    from ray.scripts.scripts import drain_node

    spec = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    line = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    drain, _, sleep = line.partition("; ")
    options = drain_node.make_context("drain-node", shlex.split(drain)[2:]).params
    assert options["deadline_remaining_seconds"] == int(sleep.split()[1]) < spec["terminationGracePeriodSeconds"]
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"].keys() == {"RAY_JOB_STOP_WAIT_TIME_S"}


def test_ray_takes_the_cloud_cluster():
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((CLUSTERS / "cloud.yaml").read_text())
    full = prepare_config(config)
    full["cluster_synced_files"] = full.get("cluster_synced_files", [])
    validate_config(full)
    assert full["available_node_types"]["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    with pytest.raises(ValidationError):
        validate_config(full | {"max_wrokers": 1})


@pytest.mark.parametrize("name", ["cloud.yaml", "kuberay-rayjob.yaml", "slurm.sh"])
def test_every_command_in_a_comment_is_one_of_ours(name):
    text = re.sub(r"\\\n#? *", "", (CLUSTERS / name).read_text())
    for line in re.findall(r"^#  +(arat .*)$", text, re.MULTILINE):
        args, _ = parsed(shlex.split(line))
        if args.verb == "submit":
            parsed(["arat", *args.command])


# Slurm ---------------------------------------------------------------------------------------------------------------

STANDINS = {
    "scontrol": """
        #!/bin/sh
        case $1 in
            show) echo 127.0.0.1 ;;
            requeue) echo "$2" >"$WORK/requeued" ;;
        esac
    """,
    "srun": """
        #!/bin/sh
        while [ "${1#--}" != "$1" ]; do shift; done
        exec "$@"
    """,
    "arat": f"""
        #!{sys.executable}
        import os, signal, sys, time
        import ray
        def stop(*_):
            time.sleep(1)
            open(os.environ["WORK"] + "/checkpoint", "w").close()
            os._exit(1)
        ray.init(sys.argv[sys.argv.index("--address") + 1])
        assert len(ray.nodes()) == 1 and ray.cluster_resources()["CPU"] == 2
        signal.signal(signal.SIGTERM, stop)
        with open(os.environ["WORK"] + "/arguments", "w") as file:
            file.write("\\0".join(sys.argv))
        time.sleep(600 if os.environ["ENDING"] == "stopped" else 0)
        sys.exit(3 if os.environ["ENDING"] == "failed" else 0)
    """,
}


def test_the_slurm_script_is_a_shell_script():
    script = str(CLUSTERS / "slurm.sh")
    subprocess.run(["bash", "-n", script], check=True)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, script], check=True)


@pytest.mark.parametrize(
    ("ending", "status", "requeued"), [("well", 0, False), ("failed", 3, False), ("stopped", 1, True)]
)
def test_a_slurm_job_runs_ray_for_real_and_passes_sigterm_on(ending, status, requeued, tmp_path):
    """On one machine, with stand-ins for Slurm; in namespaces of its own, for `ray stop` ends all that it finds."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, text in STANDINS.items():
        (bin_folder / name).write_text(textwrap.dedent(text).lstrip())
        (bin_folder / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{bin_folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "WORK": str(tmp_path),
        "ENDING": ending,
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_ID": "17",
        "SLURM_CPUS_ON_NODE": "2",
    }
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "SLURM_GPUS_ON_NODE"):
        environment.pop(name, None)
    inner = (
        "ip link set lo up; ip addr add 10.9.0.1/24 dev lo; "  # names are looked up where there is an address
        'mount -t tmpfs tmpfs /dev/shm; export RAY_TMPDIR=$(mktemp -d /dev/shm/r.XXX); bash "$0" & job=$!; '
        'if [ "$ENDING" = stopped ]; then '
        'while [ ! -e "$WORK/arguments" ] && kill -0 $job; do sleep 0.2; done; kill -TERM $job; fi; wait $job'
    )
    unshare = ["unshare", "--pid", "--net", "--mount", "--mount-proc", "--fork", "--kill-child"]
    if os.getuid() != 0:
        unshare += ["--map-root-user"]
    done = subprocess.run(
        [*unshare, "bash", "-c", inner, str(CLUSTERS / "slurm.sh")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    args, keys = parsed(["arat", *(tmp_path / "arguments").read_text().split("\0")[1:]])
    assert (args.verb, args.address, keys["cluster.workers"]) == ("train", "127.0.0.1:6379", "1")
    assert (keys["cluster.gpus_per_worker"], keys["cluster.cpus_per_worker"]) == ("0", "2")
    assert (tmp_path / "checkpoint").exists() == requeued
    assert (tmp_path / "requeued").exists() == requeued
