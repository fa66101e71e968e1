"""A scorer behind a server: a vision-language model, an object detector, text recognition.

The protocol, for anyone who writes such a server: the request is a POST whose body is an .npz with `images`
[n, H, W, 3] uint8 and `about`, the UTF-8 bytes (uint8) of a JSON object with `captions`, n texts that tell what was
asked for, `class_ids`, n numbers (null with prompts), and `arguments`, the table's own. The answer is a JSON object
with `scores`, n numbers, null where it has no opinion. No pickles, either way.
"""

import io
import json
import logging
import re
import threading
import time
from http.client import HTTPException
from typing import Annotated, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from pydantic import Field, FiniteFloat, field_validator
from torch import Tensor

from grpo.config import RewardTable, UserError
from grpo.config.types import Fraction, PositiveInt
from grpo.models import to_uint8
from grpo.rewards.base import DecodedBatch, Reward, RewardContext

logger = logging.getLogger(__name__)

LONGEST_ANSWER = 2**24  # bytes
LONGEST_PAUSE = 30.0  # seconds between two tries
Seconds = Annotated[FiniteFloat, Gt(0), Le(86400)]  # what a thread can wait for has a limit


class HTTPScorer(Reward):
    """What a server answers. A batch for which it cannot be reached, or fails, is one of no opinion."""

    class Settings(RewardTable):
        """The scores of a server of your own."""

        url: str
        """Where it answers, such as http://127.0.0.1:8000/score."""
        arguments: dict[str, Any] = Field(default_factory=dict)
        """Sent along with every request."""
        timeout: Seconds = 60.0
        """Seconds for a request, from the connection to the last byte of the answer."""
        retries: Annotated[int, Ge(0), Le(100)] = 3
        """Tries after the first has failed; the pause before each is twice as long as the one before."""
        retry_seconds: Seconds = 0.5
        """Seconds of the first pause between two tries."""
        max_failures: Fraction = 0.5
        """Share of a step's completions, over all ranks, that may be without an answer."""
        max_failed_steps: PositiveInt = 3
        """After so many steps in a row with more failures the run stops, with a checkpoint."""

        @field_validator("url")
        @classmethod
        def _check_url(cls, url: str) -> str:
            if problem := _problem_of(url):
                raise ValueError(f"{problem}, not {url!a}")
            return url

        @field_validator("arguments")
        @classmethod
        def _check_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
            for key, value in arguments.items():
                try:
                    json.dumps(value, allow_nan=False)
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{key} cannot be sent as JSON: {error}") from error
            return arguments

    may_abstain = True

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        self.settings, self.place = settings, settings.url
        self.most_abstained, self.bad_steps = settings.max_failures, settings.max_failed_steps
        self._is_down = False

    def __call__(self, batch: DecodedBatch) -> Tensor:
        """-> [n] fp32, NaN where there is no answer."""
        device, answer = batch.images.device, self._ask(_body(batch, self.settings.arguments))
        if answer is None:
            return torch.full((len(batch.images),), float("nan"), device=device)
        try:
            numbers = [_number(score) for score in _scores(answer)]
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
            text = f"{self.place}: must answer with a JSON object with scores, a list of n numbers or null"
            raise UserError(text) from error
        if len(numbers) != len(batch.images):
            raise UserError(f"{self.place}: has answered {len(numbers)} scores for {len(batch.images)} images")
        return torch.tensor(numbers, dtype=torch.float32, device=device)

    def _ask(self, body: bytes) -> bytes | None:
        """The answer; None where there is none after all tries. A server that was down is asked once only."""
        settings = self.settings
        pause, tries = settings.retry_seconds, 1 if self._is_down else 1 + settings.retries
        for left in reversed(range(tries)):
            try:
                content = _post(settings.url, body, seconds=settings.timeout)
                self._is_down = False
                return content
            except HTTPError as error:
                if 300 <= error.code < 400:
                    where = error.headers.get("Location", "nowhere")
                    raise UserError(f"{self.place}: redirects to {where}: set url to where the scorer is") from error
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


class _NoRedirects(HTTPRedirectHandler):
    """Another address would be asked by a GET, without the images."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _post(url: str, body: bytes, *, seconds: float) -> bytes:
    """The answer, whole after so many seconds or a `TimeoutError`.

    A socket's own timeout bounds only each of its reads, and nothing bounds the search for a name. So a thread does
    all of it, and is left behind when the time is over.
    """
    done: list[bytes | Exception] = []
    deadline = time.monotonic() + seconds

    def exchange() -> None:
        request = Request(url, data=body, headers={"Content-Type": "application/octet-stream"})
        try:
            with build_opener(_NoRedirects).open(request, timeout=seconds) as response:
                content = bytearray()
                while len(content) < LONGEST_ANSWER and time.monotonic() < deadline:
                    part = response.read1(LONGEST_ANSWER - len(content))
                    content += part
                    if not part and response.length:  # what is left of the Content-Length
                        raise HTTPException(f"the answer ended {response.length} bytes early")
                    if not part:
                        break
            done.append(bytes(content))
        except Exception as error:  # whatever it is, it is raised where the answer is awaited
            done.append(error)

    thread = threading.Thread(target=exchange, daemon=True)
    thread.start()
    thread.join(seconds)
    if not done or time.monotonic() > deadline:
        raise TimeoutError(f"no whole answer in {seconds:g} seconds")
    if isinstance(answer := done[0], Exception):
        raise answer
    return answer


def _scores(answer: bytes) -> list[Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    found = json.loads(answer, parse_constant=refuse)
    if not isinstance(found, dict) or not isinstance(found["scores"], list):
        raise TypeError("no list of scores")
    return found["scores"]


def _number(score: object) -> float:
    if score is None:
        return float("nan")
    if not isinstance(score, int | float) or isinstance(score, bool):
        raise TypeError("no number")
    return float(score)


def _problem_of(url: str) -> str | None:
    """What an address must be and is not; a request to a wrong one would look as if the server were down."""
    if not re.fullmatch(r"[!-~]+", url):
        return "must be of ASCII characters without spaces (write others as %XX)"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"must be an address ({error})"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "must begin with http:// or https:// and name a server"
    if "@" in parts.netloc:
        return "must have no user or password in it"
    labels = parts.hostname.removesuffix(".").split(".")
    is_name = len(parts.hostname) < 254 and all(re.fullmatch(r"[\w-]{1,63}", label) for label in labels)
    if port == 0 or not (is_name or ":" in parts.hostname):
        return "must name a server and a port that can be"
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
