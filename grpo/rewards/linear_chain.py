"""The head of two rewards: five linear layers without activations between them."""

from torch import Tensor, nn

WIDTHS = (1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)  # of the layers in the published files; between some of them stood dropout


class LinearChain(nn.Module):
    """Features [n, width] to scores [n, 1]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        linear = [nn.Linear(*pair) for pair in zip((width, *WIDTHS), WIDTHS, strict=False)]
        self.layers = nn.ModuleDict({str(place): layer for place, layer in zip(PLACES, linear, strict=True)})

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers.values():
            features = layer(features)
        return features
