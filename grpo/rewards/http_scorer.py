"""A scorer behind a server: a vision-language model, an object detector, text recognition.

The protocol, for anyone who writes such a server: the request is a POST whose body is an .npz with `images`
[n, H, W, 3] uint8 and `about`, the UTF-8 bytes (uint8) of a JSON object with `captions`, n texts that tell what was
asked for, `class_ids`, n numbers (null with prompts), and `arguments`, the table's own. The answer is a JSON object
with `scores`, n numbers, null where it has no opinion. No pickles, either way.
"""

import io
import json
import logging
import time
from http.client import HTTPException
from typing import Annotated, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
import torch
from annotated_types import Ge, Le
from pydantic import Field
from torch import Tensor

from grpo.config import RewardTable, UserError
from grpo.config.types import Fraction, PositiveFloat, PositiveInt
from grpo.models import to_uint8
from grpo.rewards.base import DecodedBatch, Reward, RewardContext

logger = logging.getLogger(__name__)

LONGEST_ANSWER = 2**24  # bytes
LONGEST_PAUSE = 30.0  # seconds between two tries


class HTTPScorer(Reward):
    """What a server answers. A batch for which it cannot be reached, or fails, is one of no opinion."""

    class Settings(RewardTable):
        """The scores of a server of your own."""

        url: str
        """Where it answers, such as http://127.0.0.1:8000/score."""
        arguments: dict[str, Any] = Field(default_factory=dict)
        """Sent along with every request."""
        timeout: PositiveFloat = 60.0
        """Seconds to wait for an answer."""
        retries: Annotated[int, Ge(0), Le(100)] = 3
        """Tries after the first has failed; the pause before each is twice as long as the one before."""
        retry_seconds: PositiveFloat = 0.5
        """The first of these pauses."""
        max_failures: Fraction = 0.5
        """Share of a step's completions, over all ranks, that may be without an answer."""
        max_failed_steps: PositiveInt = 3
        """After so many steps in a row with more, the run stops, with a checkpoint."""

    may_abstain = True

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        parts = urlsplit(settings.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"url: must begin with http:// or https:// and name a server, not {settings.url}")
        self.settings, self.place = settings, settings.url
        self.most_abstained, self.bad_steps = settings.max_failures, settings.max_failed_steps
        self._is_down = False

    def __call__(self, batch: DecodedBatch) -> Tensor:
        """-> [n] fp32, NaN where there is no answer."""
        device, answer = batch.images.device, self._ask(_body(batch, self.settings.arguments))
        if answer is None:
            return torch.full((len(batch.images),), float("nan"), device=device)
        try:
            numbers = [float("nan") if score is None else float(score) for score in json.loads(answer)["scores"]]
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise UserError(f"{self.place}: must answer with a JSON object with scores, n numbers or null") from error
        if len(numbers) != len(batch.images):
            raise UserError(f"{self.place}: has answered {len(numbers)} scores for {len(batch.images)} images")
        return torch.tensor(numbers, dtype=torch.float32, device=device)

    def _ask(self, body: bytes) -> bytes | None:
        """The answer; None where there is none after all tries. A server that was down is asked once only."""
        settings = self.settings
        pause, tries = settings.retry_seconds, 1 if self._is_down else 1 + settings.retries
        for left in reversed(range(tries)):
            try:
                request = Request(settings.url, data=body, headers={"Content-Type": "application/octet-stream"})
                with urlopen(request, timeout=settings.timeout) as response:
                    content = response.read(LONGEST_ANSWER)
                self._is_down = False
                return content
            except HTTPError as error:
                if error.code < 500 and error.code not in (408, 429):  # it is there, and the request is wrong
                    raise UserError(f"{self.place}: has refused the request: {error.code} {error.reason}") from error
                reason = f"{error.code} {error.reason}"
            except (URLError, HTTPException, OSError) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            if left:
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        if not self._is_down:
            logger.warning("%s: no answer after %d tries: %s; its completions count as without opinion", self.place,
                           tries, reason)  # fmt: skip
        self._is_down = True
        return None


def _body(batch: DecodedBatch, arguments: dict[str, Any]) -> bytes:
    class_ids = getattr(batch.condition, "class_ids", None)
    about = {
        "captions": [batch.captions[image] for image in batch.image_of.tolist()],
        "class_ids": None if class_ids is None else class_ids.tolist(),
        "arguments": arguments,
    }
    images = to_uint8(batch.images).permute(0, 2, 3, 1).cpu().numpy()
    np.savez(file := io.BytesIO(), images=images, about=np.frombuffer(json.dumps(about).encode(), np.uint8))
    return file.getvalue()
