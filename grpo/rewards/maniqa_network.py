"""MANIQA (Yang et al., arXiv 2204.08958): a vision transformer's tokens, attention over channels, Swin blocks.

A network of our own in the released layout, because the library that has it, pyiqa, downloads weights when it is built
and brings twenty packages with it. All sizes but `scale` show in the weights.
"""

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grpo.config import import_extra
from grpo.rewards.published_weights import numbered, under

TAKEN = (6, 7, 8, 9)  # the transformer's blocks whose tokens are looked at; later ones are left out
HEAD_WIDTH = 64
UNUSED = r"vit\.(head|norm|fc_norm)\.|vit\.blocks\.\d\d+\.|swintransformer\d\.downsample\."


class ChannelAttention(nn.Module):
    """Attention among channels (the paper's transposed attention block), its output laid out as published."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.c_q, self.c_k, self.c_v = (nn.Linear(places, places) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:  # [n, C, N]
        seen = F.scaled_dot_product_attention(self.c_q(x), self.c_k(x), self.c_v(x))
        return x + seen.transpose(1, 2).reshape(x.shape)


class WindowAttention(nn.Module):
    """Attention within windows, with a bias by relative position."""

    relative_position_index: Tensor  # [w * w, w * w]

    def __init__(self, table: Tensor, index: Tensor, width: int) -> None:
        super().__init__()
        self.heads = table.shape[1]
        self.relative_position_bias_table = nn.Parameter(torch.empty_like(table))
        self.register_buffer("relative_position_index", torch.empty_like(index))  # [w * w, w * w]
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # [n, windows, w * w, D]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)  # [heads, w * w, w * w]
        bias = bias if mask is None else bias + mask[:, None].to(bias.dtype)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # [n, windows, heads, w * w, D / heads]
        return self.proj(seen.transpose(2, 3).flatten(3))


class Perceptron(nn.Module):
    """Two layers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """Attention within windows, moved by half a window where there is a mask, and a perceptron."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        index, mask = weights["attn.relative_position_index"], weights.get("attn_mask")
        hidden, width = weights["mlp.fc1.weight"].shape
        self.window = round(len(index) ** 0.5)
        self.shift = 0 if mask is None else self.window // 2
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = WindowAttention(weights["attn.relative_position_bias_table"], index, width)
        self.mlp = Perceptron(width, hidden)
        self.register_buffer("attn_mask", None if mask is None else torch.empty_like(mask))  # [windows, w * w, w * w]

    def forward(self, x: Tensor) -> Tensor:  # [n, h, w, D]
        count, size = x.shape[1] // self.window, self.window
        moved = self.norm1(x).roll((-self.shift, -self.shift), dims=(1, 2))
        windows = moved.unflatten(2, (count, size)).unflatten(1, (count, size)).transpose(2, 3)
        seen = self.attn(windows.flatten(3, 4).flatten(1, 2), self.attn_mask)
        seen = seen.unflatten(1, (count, count)).unflatten(3, (size, size)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        x = x + seen.roll((self.shift, self.shift), dims=(1, 2))
        return x + self.mlp(self.norm2(x))


class SwinLayer(nn.Module):
    """Blocks, then a convolution."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SwinBlock(block) for block in numbered(weights, "blocks"))
        width = len(weights["conv.weight"])
        self.conv = nn.Conv2d(width, width, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [n, D, h, w]
        x = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return F.relu(self.conv(x.permute(0, 3, 1, 2)))


class SwinStage(nn.Module):
    """Layers, each added to what went in with the factor `scale`."""

    def __init__(self, weights: dict[str, Tensor], scale: float) -> None:
        super().__init__()
        self.layers, self.scale = nn.ModuleList(SwinLayer(layer) for layer in numbered(weights, "layers")), scale

    def forward(self, x: Tensor) -> Tensor:  # [n, D, h, w]
        for layer in self.layers:
            x = x + self.scale * layer(x)
        return x


class MANIQA(nn.Module):
    """Crops [n, 3, S, S] in [-1, 1] to qualities [n]."""

    tablock1: nn.Sequential
    tablock2: nn.Sequential
    conv1: nn.Conv2d
    conv2: nn.Conv2d
    swintransformer1: SwinStage
    swintransformer2: SwinStage

    def __init__(self, weights: dict[str, Tensor], *, scale: float) -> None:
        super().__init__()
        width, _, patch, _ = weights["vit.patch_embed.proj.weight"].shape
        places = weights["vit.pos_embed"].shape[1] - 1
        self.side = round(places**0.5)
        self.size = patch * self.side
        self.vit = import_extra("timm", extra="rewards", wanted_by="MANIQA").models.VisionTransformer(
            img_size=self.size,
            patch_size=patch,
            embed_dim=width,
            depth=TAKEN[-1] + 1,
            num_heads=width // HEAD_WIDTH,
            num_classes=0,
        )
        self.vit.norm = nn.Identity()
        for stage, (inputs, outputs) in enumerate(((len(TAKEN) * width, width), (width, width // 2)), start=1):
            blocks = len(numbered(weights, f"tablock{stage}"))
            self.add_module(f"tablock{stage}", nn.Sequential(*(ChannelAttention(places) for _ in range(blocks))))
            self.add_module(f"conv{stage}", nn.Conv2d(inputs, outputs, kernel_size=1))
            self.add_module(f"swintransformer{stage}", SwinStage(under(weights, f"swintransformer{stage}."), scale))
        half = width // 2
        self.fc_score, self.fc_weight = (
            nn.Sequential(nn.Linear(half, half), nn.ReLU(), nn.Identity(), nn.Linear(half, 1), last)
            for last in (nn.ReLU(), nn.Sigmoid())
        )

    def forward(self, crops: Tensor) -> Tensor:
        taken = {"indices": list(TAKEN), "output_fmt": "NLC", "intermediates_only": True, "stop_early": True}
        tokens = self.vit.forward_intermediates(crops, **taken)  # of each block [n, N, D], the class token left out
        x = torch.cat(tokens, dim=2).transpose(1, 2)  # [n, 4 D, N]
        x = self.conv1(self.tablock1(x).unflatten(2, (self.side, self.side)))  # [n, D, h, w]
        x = self.swintransformer1(x).flatten(2)
        x = self.conv2(self.tablock2(x).unflatten(2, (self.side, self.side)))
        x = self.swintransformer2(x).flatten(2).transpose(1, 2)  # [n, N, D / 2]
        scores, weights = self.fc_score(x).float(), self.fc_weight(x).float()
        return (scores * weights).sum(dim=(1, 2)) / weights.sum(dim=(1, 2))


def without_unused(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a released file the network has."""
    return {name: value for name, value in weights.items() if not re.match(UNUSED, name)}
