"""What a sample of a data set is that cannot be read."""

from grpo.config import UserError


class UnreadableImage(UserError):
    """One image, or what it asks for, that is missing or damaged."""
