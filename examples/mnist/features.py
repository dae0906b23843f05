"""The extractors of the study: networks from images (B, 1, 28, 28) to states (B, 64) in (-1, 1)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["DIM", "EXTRACTORS", "ConvFeatures", "Features", "fold"]

DIM = 64


class Residual(nn.Module):
    """Two 3x3 convolutions beside a 1x1 shortcut; halves the image."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H/2, W/2)."""
        return relu(self.main(x) + self.shortcut(x))


class _ChannelsLast(nn.Sequential):
    """A stack that works in the memory format which is a quarter faster on a CPU."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 1, 28, 28) to states (B, 64)."""
        return super().forward(x.contiguous(memory_format=torch.channels_last))


class Features(_ChannelsLast):
    """An 8-layer ResNet; `widths` are the channels of its three stages."""

    def __init__(self, widths: tuple[int, int, int]) -> None:
        first, second, third = widths
        super().__init__(
            nn.Conv2d(1, first, 3, padding=1, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(inplace=True),
            Residual(first, first),
            Residual(first, second),
            Residual(second, third),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * third, DIM),
            nn.Tanh(),
        )


class ConvFeatures(_ChannelsLast):
    """Two strided 4x4 convolutions and a dense layer, without batch statistics; `widths` are those of the three.

    The net of Wong, Rice and Kolter, "Fast is better than free" (ICLR 2020), there with (16, 32, 100). A step costs a
    fraction of the ResNet's, which adversarial training spends on more of them.
    """

    def __init__(self, widths: tuple[int, int, int]) -> None:
        first, second, third = widths
        super().__init__(
            nn.Conv2d(1, first, 4, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(first, second, 4, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(7 * 7 * second, third),
            nn.ReLU(inplace=True),
            nn.Linear(third, DIM),
            nn.Tanh(),
        )


def fold(net: nn.Module) -> None:
    """Fold every batch normalisation of a net in evaluation mode into the convolution before it, in place.

    The same map to rounding, a fifth faster forwards and backwards; for nets that are not trained on.
    """
    for part in net.modules():
        if isinstance(part, nn.Sequential):
            for i, (layer, after) in enumerate(pairwise(part)):
                if isinstance(layer, nn.Conv2d) and isinstance(after, nn.BatchNorm2d):
                    part[i], part[i + 1] = fuse_conv_bn_eval(layer, after), nn.Identity()


EXTRACTORS: dict[str, Callable[[tuple[int, int, int]], nn.Module]] = {"resnet": Features, "conv": ConvFeatures}
