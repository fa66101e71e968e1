"""On what a run ran."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("autoregressive-grpo", "torch", "torchvision", "triton", "numpy", "pillow", "torch-fidelity")


def environment() -> dict[str, dict[str, str]]:
    """{"versions": {package: version}, "hardware": {part: description}}, for results and reports.

    Reads the installed packages' metadata, so that none of them is imported for it.
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    hardware = {"cpu": f"{cpu}, {os.cpu_count()} cores"}
    if torch.cuda.is_available():
        versions["cuda"] = str(torch.version.cuda)
        hardware["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return {"versions": versions, "hardware": hardware}


@cache
def code_commit() -> str | None:
    """The commit of the checkout that this code runs from, `2209e31 and changes`; None where it is no checkout.

    It is looked at once, for a run goes on with the code that it began with.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(root), *what], capture_output=True, text=True, timeout=5, check=True
            ).stdout
            for what in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):  # no git, or not a folder of it
        return None
    return commit.strip() + (" and changes" if changes else "")
