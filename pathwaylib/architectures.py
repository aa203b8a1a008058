"""The subject networks of the book: small enough to train on two cores, large enough to be interesting.

Each takes images in ``[0, 1]`` and normalises them itself, so that gradients, attributions and radii come out in
pixel units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .errors import PathwayError

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


class Normalise(nn.Module):
    """Subtract a mean and divide by a standard deviation per channel: ``(x - mean) / std``.

    Args:
        mean: one value per channel, in pixel units.
        std: one value per channel, in pixel units.

    Example:
        >>> Normalise([0.5], [0.25])(torch.ones(1, 1, 2, 2)).unique()
        tensor([2.])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the normalised images, shaped as given."""
        return (images - self.mean) / self.std


def vgg(widths: Sequence[int] = (32, 64, 128, 256), classes: int = 10) -> nn.Sequential:
    """Build a VGG-style network for 32 x 32 images: two 3 x 3 convolutions a stage, max-pooling between stages.

    With the default widths it has 1.18 million parameters and eight ReLU sites of 122,880 neurons together.

    Args:
        widths: channels of each stage.
        classes: number of logits.

    Example:
        >>> vgg()(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    layers: list[nn.Module] = [Normalise(CIFAR10_MEAN, CIFAR10_STD)]
    previous = 3
    for stage, width in enumerate(widths):
        if stage:
            layers.append(nn.MaxPool2d(2))
        for _ in range(2):
            layers += [nn.Conv2d(previous, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            previous = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(previous, classes)]
    return nn.Sequential(*layers)


class _ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut; one in-place ReLU module serves both activations."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.relu(self.norm1(self.conv1(inputs)))
        return cast(Tensor, self.relu(self.norm2(self.conv2(hidden)) + self.shortcut(inputs)))


def resnet(depth: int, width: int = 16, classes: int = 10) -> nn.Sequential:
    """Build a CIFAR ResNet (He et al. 2016) of 6 n + 2 layers; every block reuses one in-place ReLU.

    Args:
        depth: 8, 14, 20, …: number of convolutions on the main path plus one.
        width: channels of the first stage; each later stage doubles them.
        classes: number of logits.

    Raises:
        PathwayError: if ``depth`` is not 6 n + 2.

    Source: He, Zhang, Ren, Sun, *Deep Residual Learning for Image Recognition* (CVPR 2016), section 4.2, with
    projection shortcuts.

    Example:
        >>> resnet(8)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    blocks, remainder = divmod(depth - 2, 6)
    if remainder or blocks < 1:
        raise PathwayError(f"depth is {depth}; a CIFAR ResNet has 8, 14, 20, 26, ... layers (6 n + 2)")
    layers: list[nn.Module] = [
        Normalise(CIFAR10_MEAN, CIFAR10_STD),
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]
    previous = width
    for stage in range(3):
        for block in range(blocks):
            layers.append(_ResidualBlock(previous, width * 2**stage, stride=2 if stage and not block else 1))
            previous = width * 2**stage
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(previous, classes)]
    return nn.Sequential(*layers)


def planted_cnn(width: int = 16, classes: int = 4) -> nn.Sequential:
    """Build the small network for :func:`pathwaylib.planted`: four convolutions, two max-poolings, no normalisation.

    Args:
        width: channels of the first convolution.
        classes: number of logits.

    Example:
        >>> planted_cnn()(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 4])
    """
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "cifar10-vgg": vgg,
    "cifar10-resnet20": lambda: resnet(20),
    "cifar10-resnet8": lambda: resnet(8),
    "planted-cnn": planted_cnn,
    "planted-shortcut": planted_cnn,
}
