"""A virtual environment that holds one installed package and what it requires, and nothing else of ours."""

import os
import subprocess
import sys
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def bare_python(folder: Path, *packages: str) -> Path:
    """The interpreter of a new environment with these packages alone, linked from the one that runs the tests."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    held = closure(packages)
    strangers = {
        name for other in distributions() if canonicalize_name(other.name) not in held for name in top_level(other)
    }
    for one in held.values():
        for name in top_level(one):
            # Of a folder that packages share, such as google, only what is theirs.
            shared = name in strangers
            for path in [file for file in one.files or () if file.parts[0] == name] if shared else [Path(name)]:
                target = site / path
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.is_symlink():
                    target.symlink_to(Path(str(one.locate_file(path))))
    return folder / "bin" / "python"


def run_bare(python: Path, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run it with nothing of this process's environment that leads to our packages or to a network."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment |= {"HF_HUB_OFFLINE": "1", **variables}
    done = subprocess.run(
        [str(python), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def closure(packages: tuple[str, ...]) -> dict[str, Distribution]:
    """The packages and all that they require here, by canonical name."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(name) for name in packages]
    while waiting:
        requirement = waiting.pop()
        held = distribution(requirement.name)
        found[canonicalize_name(held.name)] = held
        for extra in ("", *requirement.extras):
            if (held.name, extra) in seen:
                continue
            seen.add((held.name, extra))
            needed = map(Requirement, held.requires or ())
            waiting += [each for each in needed if each.marker is None or each.marker.evaluate({"extra": extra})]
    return found


def top_level(held: Distribution) -> set[str]:
    """Names in site-packages that a distribution put there."""
    names = {file.parts[0] for file in held.files or ()}
    return names - {"..", "__pycache__", "bin"}
