"""A stand-in for the GPU's driver; nothing here imports torch, which must come after it."""

import ctypes
import subprocess
import sys
from pathlib import Path

_loaded: list[ctypes.CDLL] = []


def compile_driver(folder: Path) -> Path:
    """The compiled driver (OSError: there is no cc; CalledProcessError: it fails)."""
    library = folder / "no_driver.so"
    source = Path(__file__).with_name("no_driver.c")
    command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True)
    return library


def load_driver(library: Path) -> None:
    """Put it in front of what torch is going to load."""
    assert "torch" not in sys.modules, "torch has looked for GPUs already"
    _loaded.append(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL))


def show_gpus() -> None:
    """Let torch see GPUs from now on: as many as its own stand-in for a device guard has."""
    (driver,) = _loaded
    ctypes.c_int.in_dll(driver, "num_fake_gpus").value = 8
