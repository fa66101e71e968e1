"""Features of texts by a T5 encoder, as LlamaGen's `extract_t5_feature.py` computes them."""

import hashlib
import html
import json
from collections.abc import Iterable, Sequence, Set
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from grpo.config import UserError, import_extra, read_text, reading, shorten
from grpo.formats import read_weights
from grpo.texts.features import TextEncoder

AT_ONCE = 64  # texts in one forward
SAFE, SAFE_SHARDS, PICKLE = "model.safetensors", "model-*.safetensors", "pytorch_model.bin"
EMBEDDING, TIED = "shared.weight", "encoder.embed_tokens.weight"  # one tensor under two names


class T5Encoder(TextEncoder):
    """The encoder of a T5 in a folder of transformers': config.json, its tokenizer, its weights, of any size.

    A text is in lower case, without HTML's escapes and with white space collapsed; its first `max_tokens` tokens, the
    end of the text counted, are encoded. LlamaGen's cleaning of web captions (addresses, prices, file names taken out)
    is not done.

    Raises:
        UserError: the library is missing, or the folder does not hold a T5.
    """

    def __init__(
        self, folder: str | Path, *, rows: int, width: int | None, max_tokens: int, device: torch.device, precision: str
    ) -> None:
        transformers = import_extra("transformers", extra="text", wanted_by="text.path")
        self.folder, self.max_tokens, self.device = Path(folder), max_tokens, device
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        with reading(f"text.path {folder} is not a folder of transformers' T5"):
            config = json.loads(read_text(self.folder / "config.json"))
            if config.get("model_type") not in ("t5", "mt5"):
                raise ValueError(f"config.json is of model_type {config.get('model_type')!r}")
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            sizes = transformers.AutoConfig.for_model(**config)
            with torch.device("meta"):
                self.network = transformers.T5EncoderModel(sizes)
        self._load()
        super().__init__(rows=rows, width=sizes.d_model)
        if width not in (None, sizes.d_model):
            raise UserError(
                f"text.path {folder} has features of width {sizes.d_model}, and model.caption_dim is {width}: take the "
                "T5 that the model was trained with"
            )

    def _load(self) -> None:
        """Take over the weights of the encoder; those of a decoder beside it are not read where that can be."""
        expected = self.network.state_dict()
        weights = self._read({*expected, EMBEDDING, TIED})
        for name, other in ((EMBEDDING, TIED), (TIED, EMBEDDING)):
            if name in weights:
                weights.setdefault(other, weights[name])
        wrong = [
            name for name, tensor in expected.items() if name not in weights or weights[name].shape != tensor.shape
        ]
        if wrong:
            raise UserError(f"text.path {self.folder}: the weights are not those of its config.json ({wrong[0]})")
        self.network.load_state_dict({name: weights[name].to(self.dtype) for name in expected}, assign=True)
        self.network = self.network.to(self.device).eval().requires_grad_(False)

    def _read(self, names: Set[str]) -> dict[str, Tensor]:
        """The tensors of these names in the folder's files."""
        files = [file for file in [self.folder / SAFE] if file.is_file()] or sorted(self.folder.glob(SAFE_SHARDS))
        if not files and (self.folder / PICKLE).is_file():
            return read_weights(self.folder / PICKLE)
        if not files:
            raise UserError(f"text.path {self.folder} has no {SAFE}, no shards {SAFE_SHARDS} and no {PICKLE}")
        weights: dict[str, Tensor] = {}
        for file in files:
            with reading(f"{file} is not a readable .safetensors file"), safe_open(file, framework="pt") as opened:
                weights |= {name: opened.get_tensor(name).to(self.dtype) for name in names & {*opened.keys()}}
        return weights

    @cached_property
    def identity(self) -> dict[str, str | int]:
        """The last block tells weights apart, whatever their file; rounded, so that precision does not."""
        digest = hashlib.sha256()
        last = len(self.network.encoder.block) - 1
        for name, tensor in sorted(self.network.state_dict().items()):
            if name.startswith((f"encoder.block.{last}.", "encoder.final_layer_norm.")):
                digest.update(name.encode())
                digest.update(tensor.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
        digest.update(json.dumps(self.tokenizer("a small red dot, left of two blue squares").input_ids).encode())
        return {"encoder": "t5", "sha256": digest.hexdigest(), "width": self.width, "max_tokens": self.max_tokens}

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """k texts -> [L, C] of each, in the precision of the encoder, on the CPU. Raises a UserError: no numbers."""
        tokens = self.tokenizer(
            [_plain(text) for text in texts],
            max_length=self.max_tokens,
            padding=True,
            truncation=True,
            return_tensors="pt",
        )
        mask = tokens.attention_mask
        found = self.network(input_ids=tokens.input_ids.to(self.device), attention_mask=mask.to(self.device))
        features = found.last_hidden_state.cpu()
        kept = [rows[standing] for rows, standing in zip(features, mask.bool(), strict=True)]
        if bad := [text for text, rows in zip(texts, kept, strict=True) if not rows.isfinite().all()]:
            told = f"text.path {self.folder} gives features that are not finite of {shorten(bad[0])!r}"
            raise UserError(f"{told}: its weights are damaged, or of another precision than {self.dtype}")
        return kept

    def features(self, texts: Sequence[str]) -> list[Tensor]:
        parts = [self.encode(texts[start : start + AT_ONCE]) for start in range(0, len(texts), AT_ONCE)]
        return [rows.float() for part in parts for rows in part]


class StoreThenT5(TextEncoder):
    """Features from a folder where they are there, else by the encoder that made them."""

    def __init__(self, store: TextEncoder, encoder: T5Encoder) -> None:
        super().__init__(rows=store.rows, width=store.width)
        self.store, self.encoder = store, encoder
        if store.identity != encoder.identity:
            raise UserError(
                "text.features and text.path are of different encoders: give one, or encode the texts again"
            )

    @property
    def identity(self) -> dict[str, str | int]:
        return self.encoder.identity

    def missing(self, texts: Iterable[str]) -> list[str]:
        return []

    def features(self, texts: Sequence[str]) -> list[Tensor]:
        missing = self.store.missing(texts)
        made = dict(zip(missing, self.encoder.features(missing), strict=True))
        return [made[text] if text in made else self.store.features([text])[0] for text in texts]


def _plain(text: str) -> str:
    return " ".join(html.unescape(html.unescape(text)).lower().split())
