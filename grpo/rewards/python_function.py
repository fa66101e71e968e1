"""A reward by a function of the user's own, in a file of theirs."""

import hashlib
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from grpo.config import RewardTable, UserError, read_bytes, reason
from grpo.rewards.base import DecodedBatch, Reward, RewardContext

OFFERED: dict[str, Callable[[DecodedBatch, Sequence[str]], Any]] = {
    "class_ids": lambda batch, names: batch.class_ids.clone(),
    "class_names": lambda batch, names: [names[i] for i in batch.class_ids.tolist()],
    "real_images": lambda batch, names: _real_images(batch),
    "tokens": lambda batch, names: batch.tokens.clone(),
    "prompts": lambda batch, names: [batch.captions[i] for i in batch.image_of.tolist()],
}
"""To a function that names them, from a batch and the names of all classes; it may write into all of it."""


def _real_images(batch: DecodedBatch) -> Tensor:
    if not batch.real_images.numel():
        raise UserError("real_images: the data set has none; leave the argument away or choose another data.name")
    return batch.real_images[batch.image_of].float()


class PythonFunction(Reward):
    """What the function returns for images [n, 3, H, W] fp32 in [-1, 1]: [n] numbers, NaN where it abstains.

    A function that raises or returns anything else is a `UserError` that names its file and line.
    """

    class Settings(RewardTable):
        """A function of your own."""

        path_keys = frozenset({"function"})

        function: str
        """FILE:NAME, such as "my_rewards.py:sharpness": the file, relative to the recipe's, and the function in it."""
        arguments: dict[str, Any] = Field(default_factory=dict)
        """Keyword arguments of the function."""
        sha256: str | None = None
        """SHA-256 of the file. A saved recipe has it, so that another version of the file is refused."""

        def resolved(self) -> Self:
            return self.model_copy(update={"sha256": hashlib.sha256(self.source()).hexdigest()})

        def source(self) -> bytes:
            """What is in the file, if that is what `sha256` is of."""
            file = self.function.rpartition(":")[0]
            if not file:
                raise UserError(f"function: must be FILE:NAME, not {self.function}")
            try:
                source = read_bytes(file)
            except (OSError, ValueError) as error:
                raise UserError(f"function: cannot read {file}: {reason(error)}") from error
            if self.sha256 not in (None, hashlib.sha256(source).hexdigest()):
                raise UserError(f"function: {file} has changed: bring back what sha256 says, or delete sha256")
            return source

    may_abstain = True

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        self.context, self.arguments = context, settings.arguments
        self.file, _, self.name = settings.function.rpartition(":")
        self.function = _load(self.file, settings.source(), self.name)
        self.place = _place(self.function, self.file)
        self.wanted = _wanted(self.function, settings, has_prompts=context.has_prompts)

    @classmethod
    def check(cls, settings: Settings, *, has_prompts: bool) -> None:
        file, _, name = settings.function.rpartition(":")
        _wanted(_load(file, settings.source(), name), settings, has_prompts=has_prompts)

    def __call__(self, batch: DecodedBatch) -> Tensor:
        """-> [n] fp32."""
        images = batch.images.float().clamp(-1, 1)
        offered = {name: OFFERED[name](batch, self.context.class_names) for name in self.wanted}
        try:
            returned = self.function(images, **offered, **self.arguments)
        except (torch.OutOfMemoryError, MemoryError, KeyboardInterrupt):
            raise  # the launcher has advice
        except BaseException as error:  # even one that is no `Exception` is the function's
            raise UserError(_tell(error, self.file, f"{self.name} raised ", place=self.place)) from error
        found = type(returned).__name__
        try:
            scores = torch.as_tensor(_unmasked(returned)).detach()
            found = f"{list(scores.shape)} of {str(scores.dtype).removeprefix('torch.')}"
            if scores.shape != (len(images),) or scores.is_complex():
                raise ValueError
            found += f" on {scores.device}"
            if scores.layout != torch.strided:
                found += f" in the layout {scores.layout}"
                raise ValueError
            return scores.to(self.context.device, torch.float32)
        except Exception as error:  # of many types, for as many things that are no numbers
            text = f"{self.place}: {self.name} must return {len(images)} numbers, one an image, not {found}"
            raise UserError(text) from error


def _load(file: str, source: bytes, name: str) -> Callable[..., Any]:
    """The function of this name in the file."""
    function = getattr(_module(file, source), name, None)
    if not callable(function):
        raise UserError(f"function: {file} has no function {name}")
    return function


def _place(function: Callable[..., Any], file: str) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else file


def _wanted(function: Callable[..., Any], settings: PythonFunction.Settings, *, has_prompts: bool) -> list[str]:
    """What it is given by name beside its own arguments. Raises a UserError: it cannot be called so."""
    none_of = ["class_ids", "class_names"] if has_prompts else ["prompts"]
    offered = [name for name in OFFERED if name not in none_of]
    file, _, called = settings.function.rpartition(":")
    try:
        signature = inspect.signature(function)
        wanted = [name for name in offered if name in signature.parameters and name not in settings.arguments]
        signature.bind("images", **dict.fromkeys(wanted), **settings.arguments)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"function: {_place(function, file)}: cannot call {called}: {error}. It gets the images, by name its "
            f"arguments and, if it names them, {', '.join(offered)}; this model has no {' and no '.join(none_of)}"
        ) from error
    return wanted


def _module(file: str, source: bytes) -> ModuleType:
    """The file as a module, once for all functions in it; its folder is not searched for other modules.

    It is not imported by its name, so that what runs is the `source` whose hash the recipe has.
    """
    name = f"_grpo_reward_{hashlib.sha256(file.encode() + source).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    module = sys.modules[name] = ModuleType(name)  # there, because dataclasses look for their module
    module.__file__ = file
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # scoring scripts like to switch it off for good
            exec(compile(source, file, "exec"), module.__dict__)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        del sys.modules[name]
        hint = "; modules beside the file are not found by themselves" if isinstance(error, ImportError) else ""
        raise UserError(f"function: {_tell(error, file)}{hint}") from error
    return module


def _unmasked(returned: Any) -> Any:
    """What torch can take of it: masked entries of numpy are NaN, and no array is reversed."""
    if isinstance(returned, np.ma.MaskedArray) and returned.dtype.kind in "biuf":
        return np.ma.filled(returned.astype(np.float64), np.nan)
    return returned.copy() if isinstance(returned, np.ndarray) else returned


def _tell(error: BaseException, file: str, what: str = "", *, place: str | None = None) -> str:
    """An error in a line that begins with the last line of the file that it passed through, or with `place`."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines.append(error.lineno)
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = f"{type(error).__name__}: {said}".removesuffix(": ")
    return f"{f'{file}:{lines[-1]}' if lines else place or file}: {what}{text}"
