"""How much people would prefer an image for the words that asked for it, as ImageReward learned it (arXiv 2304.05977).

The package `image-reward` cannot be used beside today's libraries (it insists on timm 0.6.13). Its network is a plain
vision transformer, which timm has, and BLIP's text encoder that looks at an image, which transformers has.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

from grpo.config import UserError, import_extra
from grpo.config.types import Wanted
from grpo.rewards.base import DecodedBatch, Reward, RewardContext
from grpo.rewards.clip_networks import clip_pixels
from grpo.rewards.linear_chain import LinearChain
from grpo.rewards.published_weights import load_strictly, numbered, read_published, sizes_of, under
from grpo.rewards.words import TextFeatures, WordsTable

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores of the published weights
HEAD_WIDTH = 64
MAX_TOKENS = 35  # of a text, padding included
UNUSED = ("vision_proj.", "text_proj.")  # of BLIP's other losses


class ImageGroundedText(nn.Module):
    """What BLIP's text encoder makes of a text when it looks at an image; all sizes show in the weights."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        vision, text = (
            import_extra(name, extra="rewards", wanted_by="ImageReward")
            for name in ("timm.models.vision_transformer", "transformers.models.blip.modeling_blip_text")
        )
        width, _, patch, _ = weights["visual_encoder.patch_embed.proj.weight"].shape
        self.size = patch * round((weights["visual_encoder.pos_embed"].shape[1] - 1) ** 0.5)
        vocabulary, text_width = weights["text_encoder.embeddings.word_embeddings.weight"].shape
        self.visual_encoder = vision.VisionTransformer(
            img_size=self.size,
            patch_size=patch,
            embed_dim=width,
            depth=len(numbered(weights, "visual_encoder.blocks")),
            num_heads=width // HEAD_WIDTH,
            num_classes=0,
            global_pool="",
        )
        config = text.BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=text_width,
            encoder_hidden_size=width,
            intermediate_size=len(weights["text_encoder.encoder.layer.0.intermediate.dense.weight"]),
            num_hidden_layers=len(numbered(weights, "text_encoder.encoder.layer")),
            num_attention_heads=text_width // HEAD_WIDTH,
            max_position_embeddings=len(weights["text_encoder.embeddings.position_embeddings.weight"]),
            is_decoder=True,  # which is what its cross-attention depends on; attention stays bidirectional
        )
        self.text_encoder = text.BlipTextModel(config, add_pooling_layer=False)

    def forward(self, pixels: Tensor, token_ids: Tensor, mask: Tensor) -> Tensor:
        """[n, 3, S, S], [n, 35], [n, 35] -> the first token's features [n, D]."""
        seen = self.visual_encoder(pixels)
        return self.text_encoder(token_ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state[:, 0]


class ImageReward(Reward):
    """ImageReward's score: of mean 0 and deviation 1 over the images that it was trained on."""

    class Settings(WordsTable):
        """Human preference score ImageReward-v1.0."""

        checkpoint: Annotated[str, Wanted("ImageReward.pt")]
        """`ImageReward.pt`, of ImageReward-v1.0."""
        tokenizer: Annotated[str, Wanted("the folder of bert-base-uncased, with vocab.txt")]
        """A folder with the vocabulary of `bert-base-uncased` (vocab.txt, or tokenizer.json)."""

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        self.settings, self.context = settings, context
        self.tokenizer = _load_tokenizer(settings.tokenizer)
        network, head = load_image_reward(settings.checkpoint)
        self.network, self.head = context.prepare(network), head.to(context.device).requires_grad_(False)
        self.networks = [self.network]
        self.texts = TextFeatures(self._tokenize)
        known, wanted = network.text_encoder.config.vocab_size, len(self.tokenizer)
        if wanted > known:
            raise UserError(f"tokenizer: {settings.tokenizer} has {wanted} words, {settings.checkpoint} knows {known}")

    def _tokenize(self, texts: Sequence[str]) -> Tensor:
        """-> [k, 2, 35] int64: ids of tokens, and the mask of those that are no padding."""
        limits = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS}
        found = self.tokenizer(list(texts), **limits, return_tensors="pt")
        return torch.stack([found["input_ids"], found["attention_mask"]], dim=1).to(self.context.device)

    def __call__(self, batch: DecodedBatch) -> Tensor:
        """-> [n] fp32."""
        token_ids, mask = self.texts(self.settings.texts(batch))[batch.image_of].unbind(1)
        pixels = clip_pixels(batch.images, self.network.size).to(self.context.dtype)
        scores = self.head(self.network(pixels, token_ids, mask).float()).squeeze(1)
        return (scores - MEAN) / STD


def load_image_reward(checkpoint: str) -> tuple[ImageGroundedText, LinearChain]:
    """The network and its head. Raises a UserError: no such file, or not ImageReward's weights."""
    weights = read_published(checkpoint)
    blip = {name: value for name, value in under(weights, "blip.").items() if not name.startswith(UNUSED)}
    with sizes_of(checkpoint, what="ImageReward-v1.0"):
        network = ImageGroundedText(blip)
        head = LinearChain(network.text_encoder.config.hidden_size)
    load_strictly(network, blip, checkpoint, what="ImageReward-v1.0")
    load_strictly(head, under(weights, "mlp."), checkpoint, what="ImageReward-v1.0")
    return network.eval(), head.eval()


def _load_tokenizer(folder: str):  # -> transformers.BertTokenizer
    transformers = import_extra("transformers", extra="rewards", wanted_by="ImageReward")
    names = ("vocab.txt", "tokenizer.json")
    if not any((Path(folder) / name).is_file() for name in names):
        raise UserError(f"tokenizer: {folder} has neither {names[0]} nor {names[1]} of bert-base-uncased")
    try:
        return transformers.BertTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"tokenizer: {folder} is not that of bert-base-uncased: {reason}") from error
