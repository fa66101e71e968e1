"""What this machine has for training: versions, GPUs, NCCL, disk, optional parts; and what is missing for what.

grpo doctor [--dir FOLDER]

--dir FOLDER   where runs will be written (runs)

Nothing is changed but one small file that is written into FOLDER and removed. The exit code is 0 if a recipe can be
trained here, on a GPU or on the CPU, and 2 if something that every run needs is broken.
"""

if __name__ == "__main__":  # before the imports, so that --help does without torch
    from grpo.__main__ import run_job

    run_job("doctor")

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

from grpo.config import UserError
from grpo.environment import environment
from grpo.kernels import token_log_probs
from grpo.parallel import GIB

DISTRIBUTION = "autoregressive-grpo"
EXTRAS = {
    "rewards": "the rewards clip, hps_v2, pick_score, image_reward, and networks of timm",
    "evaluation": "Inception features of torch-fidelity",
    "text": "features of texts by a T5 (grpo encode-text)",
    "low-bit": "8-bit AdamW",
    "demo": "the page of grpo demo",
    "s3": 'checkpoint.dir = "s3://..."',
    "tensorboard": "metrics.tensorboard",
}
COLOURS = {"ok": "green", "note": "yellow", "broken": "bold red"}
LITTLE_DISK, LITTLE_SHARED = 20 * GIB, GIB


class Finding(NamedTuple):
    """One line of the table. `state` is ok, note (works, with a limit), or broken."""

    part: str
    state: str
    what: str


def main(arguments: Sequence[str]) -> None:
    """Print the table, and end with code 2 if something is broken."""
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False, add_help=False)
    parser.add_argument("--dir", default="runs")
    try:
        own, rest = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}") from error
    if rest:
        raise UserError(f"{rest[0]}: unknown flag; doctor takes --dir")
    findings = [*packages(), *devices(), *kernels(), *processes(), *folder(Path(own.dir)), *extras(), *tracking()]
    console = Console(soft_wrap=True, highlight=False)
    for part, state, what in findings:
        console.print(Text.assemble((f"{state:<8}", COLOURS[state]), f"{part:<12}{what}"))
    broken = [finding.part for finding in findings if finding.state == "broken"]
    if broken:
        raise UserError(f"cannot train here until this is mended: {', '.join(broken)}")
    where = "on this GPU" if torch.cuda.is_available() else "on this CPU: small models only"
    console.print(f"\nReady to train {where}. Try: grpo train --config debug", markup=False)


def packages() -> Iterator[Finding]:
    """The packages that every run needs, beside what the distribution asks for."""
    yield Finding("python", "ok", f"{sys.version.split()[0]}, {sys.executable}")
    found = environment()["versions"]
    names = ("torch", "torchvision", "triton", "numpy")
    yield Finding("packages", "ok", ", ".join(f"{name} {found[name]}" for name in names if name in found))
    for requirement in _requirements(extra=""):
        yield from (Finding("packages", "broken", problem) for problem in _missing(requirement))


def devices() -> Iterator[Finding]:
    """GPUs, with what training on them uses."""
    yield Finding("cpu", "ok", environment()["hardware"]["cpu"])
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch is built for CUDA {built} but finds no GPU or driver" if built else "torch is built without CUDA"
        yield Finding("gpu", "note", f"none: {why}; runs use the CPU")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16, no bf16"
        taken = "" if free > 0.9 * total else f"; {(total - free) / GIB:.1f} GiB are taken by other programs"
        what = f"{index}: {properties.name}, {total / GIB:.0f} GiB, {half}{taken}"
        yield Finding("gpu", "note" if taken else "ok", what)
    yield Finding("cuda", "ok", f"{torch.version.cuda}, driver for {_driver()}")


def _driver() -> str:
    number = torch._C._cuda_getDriverVersion()
    return f"CUDA {number // 1000}.{number % 1000 // 10}"


def kernels() -> Iterator[Finding]:
    """Whether fused kernels run here; a compiler is what is missing most often."""
    if not torch.cuda.is_available():
        yield Finding("kernels", "ok", "plain torch (Triton's are for GPUs)")
        return
    logits, tokens = torch.randn(2, 64, device="cuda"), torch.zeros(2, 1, dtype=torch.long, device="cuda")
    try:
        token_log_probs(logits, tokens, impl="triton")
    except Exception as error:
        yield Finding("kernels", "broken", f"Triton cannot compile: {' '.join(str(error).split())[:200]}")
    else:
        yield Finding("kernels", "ok", "Triton compiles and runs")


def processes() -> Iterator[Finding]:
    """What several ranks on this host need."""
    gpus = torch.cuda.device_count()
    if gpus:
        has = dist.is_nccl_available()
        what = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if has else "torch is built without NCCL"
        yield Finding("ranks", "ok" if has else "broken" if gpus > 1 else "note", what)
    else:
        yield Finding("ranks", "ok" if dist.is_gloo_available() else "broken", "gloo")
    if Path("/dev/shm").is_dir():
        size = shutil.disk_usage("/dev/shm").total
        advice = "; workers of the data set may fail: docker run --ipc=host" if size < LITTLE_SHARED else ""
        yield Finding("/dev/shm", "note" if advice else "ok", f"{size / GIB:.1f} GiB{advice}")


def folder(path: Path) -> Iterator[Finding]:
    """Whether runs can be written, and how much room there is."""
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if os.path.isdir(parent))
    if path.absolute() != there and os.path.lexists(there / path.absolute().relative_to(there).parts[0]):
        yield Finding("disk", "broken", f"{path} is no folder; choose metrics.run_dir")
        return
    try:
        with tempfile.NamedTemporaryFile(dir=there) as file:
            file.write(b"grpo")
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(there).free
    except OSError as error:
        yield Finding("disk", "broken", f"{there} cannot be written: {error.strerror}; choose metrics.run_dir")
        return
    advice = "; a checkpoint of GPT-XXL, weights and moments in fp32, takes about 16 GiB" if free < LITTLE_DISK else ""
    yield Finding("disk", "note" if advice else "ok", f"{free / GIB:.0f} GiB free at {there}{advice}")


def extras() -> Iterator[Finding]:
    """The optional parts."""
    if not _requirements(extra=""):
        yield Finding("extras", "note", f"{DISTRIBUTION} is not installed here (a checkout?): its needs are unknown")
        return
    for extra, purpose in EXTRAS.items():
        problems = [problem for requirement in _requirements(extra) for problem in _missing(requirement)]
        if problems:
            install = f"pip install '{DISTRIBUTION}[{extra}]'"
            yield Finding(extra, "note", f"not installed ({'; '.join(problems)}): {install}, for {purpose}")
        else:
            yield Finding(extra, "ok", f"installed, for {purpose}")


def tracking() -> Iterator[Finding]:
    """Weights & Biases, for metrics.wandb."""
    logged_in = "WANDB_API_KEY" in os.environ or "api.wandb.ai" in _text(Path.home() / ".netrc")
    offline = os.environ.get("WANDB_MODE", "online") != "online"
    what = "logged in" if logged_in else f"WANDB_MODE is {os.environ['WANDB_MODE']}" if offline else ""
    advice = "not logged in: `wandb login`, or WANDB_MODE=offline, before metrics.wandb"
    yield Finding("wandb", "ok" if what else "note", what or advice)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _requirements(extra: str) -> list[Requirement]:
    """What the installed distribution asks for: plainly, or by an extra."""
    try:
        texts = requires(DISTRIBUTION) or []
    except PackageNotFoundError:  # a checkout that is not installed
        return []
    parsed = [Requirement(text) for text in texts]
    plain = {str(item) for item in parsed if item.marker is None or item.marker.evaluate({"extra": ""})}
    if not extra:
        return [item for item in parsed if str(item) in plain]
    return [item for item in parsed if str(item) not in plain and item.marker.evaluate({"extra": extra})]


def _missing(requirement: Requirement) -> Iterator[str]:
    """A line if the package is not installed, or not in a version that will do."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        yield f"{requirement.name} is missing"
        return
    if not requirement.specifier.contains(found, prereleases=True):
        yield f"{requirement.name} is {found}, wanted {requirement.specifier}"
