"""How drawn images lie in a folder: by number, or as published scorers of prompts read them."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from PIL import Image
from torch import Tensor

from grpo.config import Output, UserError, writing
from grpo.data import to_image
from grpo.evaluation.writing import save_image, save_pngs
from grpo.texts import Prompt

SaveImages = Callable[[Tensor, Tensor], None]  # images [B, 3, H, W] uint8, their numbers [B]
SIDE_BY_SIDE = 2  # images along a side of DPG-Bench's files


def build_layout(output: Output, prompts: Sequence[Prompt]) -> SaveImages:
    """What writes images into `output.folder`, whose numbers are those of `prompts` where the layout goes by these.

    In the layout dpg an image is written where three others were written before it: numbers must come whole, prompt by
    prompt, to one rank, as `output.images_per_prompt` divides the batch.
    """
    assert output.folder is not None, "the recipe was checked"
    folder = Path(output.folder)
    if output.layout == "geneval":
        return GenEvalLayout(folder, prompts, output.images_per_prompt)
    if output.layout == "dpg":
        return DPGLayout(folder, prompts)
    return partial(save_pngs, folder)


class GenEvalLayout:
    """GenEval's (arXiv 2310.11513): 00012/metadata.jsonl, the prompt's line, and 00012/samples/0000.png, ..."""

    def __init__(self, folder: Path, prompts: Sequence[Prompt], each: int) -> None:
        self.folder, self.prompts, self.each = folder, prompts, each
        for prompt in prompts:
            if "tag" not in prompt.about:
                raise UserError(
                    f'output.layout = "geneval" takes GenEval\'s prompts, a .jsonl of objects with tag, include and '
                    f"prompt; {prompt.text[:60]!r} has no tag"
                )

    def __call__(self, pixels: Tensor, row_ids: Tensor) -> None:
        for image, number in zip(pixels.cpu(), row_ids.tolist(), strict=True):
            self._write(to_image(image), number)

    def _write(self, image: Image.Image, number: int) -> None:
        place = self.folder / f"{number // self.each:05d}"
        with writing(place):
            (place / "samples").mkdir(parents=True, exist_ok=True)
            about = json.dumps(dict(self.prompts[number].about))
            (place / "metadata.jsonl").write_text(about, encoding="utf-8")
        save_image(image, place / "samples" / f"{number % self.each:04d}.png")


class DPGLayout:
    """DPG-Bench's (ELLA, arXiv 2403.05135): a prompt's four images as one PNG, 2 x 2, under the name of its file."""

    def __init__(self, folder: Path, prompts: Sequence[Prompt]) -> None:
        self.folder, self.prompts = folder, prompts
        self._begun: dict[int, dict[int, Image.Image]] = {}
        names = [prompt.name for prompt in prompts[:: SIDE_BY_SIDE**2]]
        if bad := [name for name in names if Path(name).name != name or name.startswith(".")]:
            raise UserError(f"{bad[0]!r} cannot be the name of a file")

    def __call__(self, pixels: Tensor, row_ids: Tensor) -> None:
        for image, number in zip(pixels.cpu(), row_ids.tolist(), strict=True):
            self._write(to_image(image), number)

    def _write(self, image: Image.Image, number: int) -> None:
        first = number - number % SIDE_BY_SIDE**2
        begun = self._begun.setdefault(first, {})
        begun[number - first] = image
        if len(begun) == SIDE_BY_SIDE**2:
            grid = Image.new("RGB", (image.width * SIDE_BY_SIDE, image.height * SIDE_BY_SIDE))
            for place, one in self._begun.pop(first).items():
                row, column = divmod(place, SIDE_BY_SIDE)
                grid.paste(one, (column * image.width, row * image.height))
            save_image(grid, self.folder / f"{self.prompts[number].name}.png")
