"""Features as LlamaGen's `extract_t5_feature.py` writes them: one .npy a caption, by its place in a list."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from grpo.config import reading, require_regular

MAGIC = b"\x93NUMPY"


class LlamaGenFeatures:
    """Files LIST/NUMBER.npy [1, L, C] of the captions in the lines of LIST.jsonl, the first of which is number 0."""

    def __init__(self, folder: str | Path, *, rows: int, width: int) -> None:
        self.folder, self.rows, self.width = Path(folder), rows, width  # P and C

    def row(self, name: str, number: int) -> Tensor:
        """[L, C] fp32, L at most P. Raises a UserError: no such file, or not such features."""
        file = self.folder / name / f"{number}.npy"
        with reading(f"{file} cannot be read"):
            require_regular(file)
            with file.open("rb") as opened:
                if opened.read(len(MAGIC)) != MAGIC:  # numpy would unpack an archive too
                    raise ValueError("it is no .npy")
            features = np.load(file, mmap_mode="r", allow_pickle=False)
            if features.ndim != 3 or len(features) != 1 or features.dtype.kind != "f":
                raise ValueError(
                    f"it is {features.dtype} {list(features.shape)}, expected numbers [1, L, {self.width}]"
                )
            if features.shape[2] != self.width:
                raise ValueError(f"its features have width {features.shape[2]}, model.caption_dim is {self.width}")
            if not features.shape[1]:
                raise ValueError("it has no token")
            kept = features[0, : self.rows].astype(np.float32)
            if not np.isfinite(kept).all():
                raise ValueError("its features are not finite")
        return torch.from_numpy(kept)
