"""LlamaGen's VQ image tokenizer (VQGAN with a small l2-normalised codebook), for a single device.

Module names and numerics are LlamaGen's own (https://arxiv.org/abs/2406.06525, from https://arxiv.org/abs/2012.09841
and, for the normalised codebook, https://arxiv.org/abs/2110.04627), so its released weights load strictly.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CODES_REMEMBERED = 65536  # length of LlamaGen's window for the codebook's usage; part of its state dict


@dataclass(frozen=True, kw_only=True)
class VQConfig:
    """Sizes of a tokenizer, and settings of its training, which do not count in a comparison.

    Raises a ValueError if the sizes do not fit together.
    """

    codebook_size: int = 16384  # codes K, the GPT's vocabulary
    codebook_embed_dim: int = 8  # dimensions C of one code
    ch: int = 128  # channels of the first level
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)  # of each level, in `ch`; every level but the last halves the image
    z_channels: int = 256  # between encoder and codebook
    num_res_blocks: int = 2  # residual blocks of one encoder level; a decoder level has one more
    norm_groups: int = 32  # of every group normalisation
    patch_size: int = 1  # side of the squares of pixels folded into channels around the convolutions
    patch_encoder: bool = False  # each code is of its own patch alone; LlamaGen's encoder sees the whole image
    dropout: float = field(default=0.0, compare=False)  # in the residual blocks, in train mode only
    commit_weight: float = field(default=0.25, compare=False)  # factor of the commitment loss

    def __post_init__(self) -> None:
        if self.ch % self.norm_groups:
            raise ValueError(f"ch {self.ch} must be a multiple of norm_groups {self.norm_groups}")
        if self.patch_encoder and len(self.ch_mult) > 1:
            raise ValueError(f"patch_encoder takes one level, whose patches are the codes, not {len(self.ch_mult)}")

    @property
    def downsample_size(self) -> int:
        """Pixels along each side of one code."""
        return self.patch_size * 2 ** (len(self.ch_mult) - 1)

    @property
    def pixel_channels(self) -> int:
        """Channels of the folded image."""
        return 3 * self.patch_size**2

    def group_norm(self, channels: int) -> nn.GroupNorm:
        return nn.GroupNorm(self.norm_groups, channels, eps=1e-6)


def normalize(pixels: Tensor) -> Tensor:
    """Pixels uint8 0..255 to fp32 in [-1, 1], same shape."""
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to the nearest of 0..255, uint8 of the same shape; values outside are clamped."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)


class ResnetBlock(nn.Module):
    """Two normalised convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, config: VQConfig) -> None:
        super().__init__()
        self.norm1 = config.group_norm(inputs)
        self.conv1 = _conv(inputs, outputs)
        self.norm2 = config.group_norm(outputs)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = _conv(outputs, outputs)
        self.nin_shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Self-attention of one head over all positions of the feature map."""

    def __init__(self, channels: int, config: VQConfig) -> None:
        super().__init__()
        self.norm = config.group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, kernel_size=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).mT.contiguous()  # [B, hw, channels]
        queries, keys, values = (_pointwise(conv, pixels) for conv in (self.q, self.k, self.v))
        # Plain products: a head this wide is beyond flash attention on GPUs, whose CPU version trains more slowly.
        attention = torch.softmax(queries @ keys.mT * queries.shape[-1] ** -0.5, dim=-1)
        return x + _pointwise(self.proj_out, attention @ values).mT.reshape_as(x)


def _pointwise(conv: nn.Conv2d, pixels: Tensor) -> Tensor:
    """The 1x1 convolution `conv` of `pixels` [B, hw, channels]."""
    return F.linear(pixels, conv.weight.flatten(1), conv.bias)


class Level(nn.Module):
    """`count` residual blocks of one resolution, with or without attention after each; then half or double the size."""

    def __init__(
        self, inputs: int, outputs: int, count: int, config: VQConfig, *, attention: bool, down: bool, up: bool
    ) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * count
        self.res = nn.ModuleList(ResnetBlock(*pair, config) for pair in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(outputs, config) for _ in self.res if attention)
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()
        if down:
            conv = nn.Conv2d(outputs, outputs, kernel_size=3, stride=2)
            self.downsample = nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv))
        if up:
            conv = _conv(outputs, outputs)
            self.upsample = nn.Sequential(OrderedDict(enlarge=nn.Upsample(scale_factor=2.0), conv=conv))

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        return self.upsample(self.downsample(x))


def fold_upsampling(decoder: "Decoder") -> None:
    """Make each enlargement and its convolution one transposed convolution, in place; for decoders that are not saved.

    Pixels that are doubled and then convolved 3 x 3 are, at each of the four places of a pixel, a 2 x 2 convolution of
    the small map with sums of the taps: 4/9 of the operations, and no enlarged map in memory.
    """
    for level in decoder.conv_blocks:
        assert isinstance(level, Level)
        if isinstance(level.upsample, nn.Identity):
            continue
        conv = level.upsample.conv
        assert isinstance(conv, nn.Conv2d)
        weight = conv.weight.data.double().transpose(0, 1)  # [inputs, outputs, 3, 3]
        for dim in (2, 3):
            before, middle, after = weight.unbind(dim)
            weight = torch.stack([after, middle + after, before + middle, before], dim=dim)
        folded = nn.ConvTranspose2d(conv.in_channels, conv.out_channels, 4, stride=2, padding=1, device="meta")
        folded.weight, folded.bias = nn.Parameter(weight.to(conv.weight), False), conv.bias
        level.upsample = folded


def _middle(width: int, config: VQConfig) -> nn.Sequential:
    return nn.Sequential(ResnetBlock(width, width, config), AttnBlock(width, config), ResnetBlock(width, width, config))


class Encoder(nn.Module):
    """Folded image [B, 3 p², H / p, W / p] to features [B, z_channels, h, w]."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.ch * multiple for multiple in (1, *config.ch_mult)]
        self.conv_in = _conv(config.pixel_channels, config.ch)
        last = len(config.ch_mult) - 1
        self.conv_blocks = nn.Sequential()
        for index, pair in enumerate(pairwise(widths)):
            level = Level(*pair, config.num_res_blocks, config, attention=index == last, down=index != last, up=False)
            self.conv_blocks.append(level)
        self.mid = _middle(widths[-1], config)
        self.norm_out = config.group_norm(widths[-1])
        self.conv_out = _conv(widths[-1], config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_blocks(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class PatchEncoder(nn.Module):
    """Folded image [B, 3 p², h, w] to features [B, z_channels, h, w], each of its own patch alone.

    Where most of an image is one plain ground, an encoder that sees all of it hides what is elsewhere in the codes of
    the ground, and a generator must learn them; here equal patches have equal codes, and the decoder sees them all.
    """

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.pixel_channels, 4 * config.ch, 4 * config.ch, config.z_channels]
        first, second, third = (nn.Conv2d(*pair, kernel_size=1) for pair in pairwise(widths))
        self.layers = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Decoder(nn.Module):
    """Features [B, z_channels, h, w] to the folded image [B, 3 p², H / p, W / p]."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.ch * multiple for multiple in (config.ch_mult[-1], *reversed(config.ch_mult))]
        self.conv_in = _conv(config.z_channels, widths[0])
        self.mid = _middle(widths[0], config)
        last = len(config.ch_mult) - 1
        self.conv_blocks = nn.Sequential()
        for index, pair in enumerate(pairwise(widths)):
            level = Level(*pair, config.num_res_blocks + 1, config, attention=index == 0, down=False, up=index != last)
            self.conv_blocks.append(level)
        self.norm_out = config.group_norm(widths[-1])
        self.conv_out = _conv(widths[-1], config.pixel_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_blocks(self.mid(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class VectorQuantizer(nn.Module):
    """The codebook: unit vectors, compared with unit latents.

    `embedding.weight` [K, C] is an ordinary parameter that need not be of unit length; a trainer may overwrite it, as
    an exponential moving average does. `codebook_used` holds the last codes of training.
    """

    codebook_used: Tensor  # [CODES_REMEMBERED], the last codes of training

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_embed_dim)
        nn.init.normal_(self.embedding.weight)  # every direction alike
        with torch.no_grad():
            self.embedding.weight.copy_(self.codebook())
        self.register_buffer("codebook_used", torch.zeros(CODES_REMEMBERED))

    def codebook(self) -> Tensor:
        """The code vectors, [K, C], of unit length."""
        return F.normalize(self.embedding.weight, dim=-1)

    def nearest(self, vectors: Tensor) -> Tensor:
        """Index of the code with the smallest angle to each of `vectors` [N, C]; [N] int64.

        Compared in fp32 whatever the autocast, in slices that bound the memory for the [N, K] similarities.
        """
        with torch.autocast(vectors.device.type, enabled=False):
            vectors, codebook = F.normalize(vectors.float(), dim=-1), self.codebook().float()
            return torch.cat([(rows @ codebook.T).argmax(-1) for rows in vectors.split(8192)])

    @torch.no_grad()
    def remember(self, codes: Tensor) -> None:
        """Push `codes` into the window of the last codes used."""
        codes = codes.flatten()[-CODES_REMEMBERED:].to(self.codebook_used)
        self.codebook_used.copy_(torch.cat([self.codebook_used, codes])[-CODES_REMEMBERED:])

    def usage(self) -> float:
        """Share of the codebook among the last codes of training."""
        return len(self.codebook_used.unique()) / self.config.codebook_size

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Code vectors [B, C, h, w] of latents [B, C, h, w], with the gradient of the unit latents (straight-through);
        then the two losses and the codes as in `VQModel.forward`."""
        unit = F.normalize(latents.float(), dim=1).permute(0, 2, 3, 1)  # [B, h, w, C]
        codes = self.nearest(unit.detach().flatten(0, 2))
        quantized = self.codebook()[codes].view_as(unit)
        if self.training:
            self.remember(codes)
        vq_loss = F.mse_loss(quantized, unit.detach())
        commit_loss = self.config.commit_weight * F.mse_loss(unit, quantized.detach())
        quantized = unit + (quantized - unit).detach()
        return quantized.permute(0, 3, 1, 2), vq_loss, commit_loss, codes.view(len(latents), -1)


class VQModel(nn.Module):
    """Image tokenizer: images [B, 3, H, W] in [-1, 1] to codes [B, T] and back, T = (H / p) * (W / p) in row order."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = PatchEncoder(config) if config.patch_encoder else Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_embed_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(config.codebook_embed_dim, config.z_channels, kernel_size=1)

    @property
    def layers(self) -> tuple[nn.Module, nn.Module]:
        """The two large parts, units of compilation and sharding as the GPT's blocks."""
        return self.encoder, self.decoder

    def encode_latents(self, images: Tensor) -> Tensor:
        """Latents before quantisation, [B, C, h, w], of any length. Raises a ValueError if the images do not fit."""
        factor = self.config.downsample_size
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(f"images must be [B, 3, H, W] with sides that {factor} divides, not {[*images.shape]}")
        return self.quant_conv(self.encoder(F.pixel_unshuffle(images, self.config.patch_size)))

    def encode(self, images: Tensor) -> Tensor:
        """Codes of `images`, [B, T] int64. Raises as `encode_latents`."""
        latents = self.encode_latents(images)
        return self.quantize.nearest(latents.permute(0, 2, 3, 1).flatten(0, 2)).view(len(images), -1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Unit code vectors [B, C, h, w] of the codes [B, T] of square images; a ValueError if T is no square."""
        side = round(codes.shape[-1] ** 0.5)
        if codes.ndim != 2 or side**2 != codes.shape[1]:
            raise ValueError(f"codes must be [B, T] with a square T, not {[*codes.shape]}")
        return self.quantize.codebook()[codes].unflatten(1, (side, side)).permute(0, 3, 1, 2)

    def decode_latents(self, vectors: Tensor) -> Tensor:
        """Images [B, 3, H, W] of unit vectors [B, C, h, w], quantised or not."""
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(vectors)), self.config.patch_size)

    def decode(self, codes: Tensor) -> Tensor:
        """Images [B, 3, H, W], about in [-1, 1], of codes [B, T]. Raises as `lookup`."""
        return self.decode_latents(self.lookup(codes))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Reconstruct `images`, for training.

        Returns the reconstruction [B, 3, H, W]; the codebook loss, which pulls the codes to the latents, and the
        weighted commitment loss, which pulls the latents to the codes, both 0-dim; the codes [B, T].
        """
        quantized, vq_loss, commit_loss, codes = self.quantize(self.encode_latents(images))
        return self.decode_latents(quantized), vq_loss, commit_loss, codes
