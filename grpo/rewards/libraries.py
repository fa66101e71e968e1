"""Third-party libraries that only some rewards need, imported when a recipe asks for one."""

from importlib import import_module
from types import ModuleType

from grpo.config import UserError


def library(module: str, distribution: str | None = None) -> ModuleType:
    """The module. Raises a UserError that names the command which installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        command = "pip install 'autoregressive-grpo[rewards]'"
        raise UserError(f"the package {distribution or module} cannot be imported ({error}); {command}") from error
