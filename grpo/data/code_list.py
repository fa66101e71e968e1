"""A data set of codes alone: what `grpo encode` or LlamaGen has written, without the images."""

from collections.abc import Iterable
from pathlib import Path

from grpo.config import Data, UserError
from grpo.data.code_files import ABOUT, CodeFolder
from grpo.data.dataset import ImageDataset
from grpo.data.llamagen_codes import LlamaGenCodes


class CodeList(ImageDataset):
    """Codes with labels in `data.path`. Its images are empty, [3, 0, 0]."""

    has_images = False

    def __init__(self, *, data: Data) -> None:
        if not Path(data.place).is_dir():
            raise UserError(f"data.path {data.path} is not a folder: give the folder of the codes")
        codes: CodeFolder | LlamaGenCodes = (
            CodeFolder(data.place) if (Path(data.place) / ABOUT).exists() else LlamaGenCodes(data)
        )
        super().__init__(codes.labels, codes.class_names, data=data)
        self.codes = codes

    def identify(self) -> Iterable[bytes]:
        assert self.codes is not None
        return self.codes.identify()

    def describe(self, index: int) -> str:
        return f"image {index} of {self.codes}"
