"""A convolution whose backward products cost what the few entries of their seeds require."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from .piecewise import pair


class Convolution(torch.autograd.Function):
    """A 2-d convolution whose backward products take no longer than the few entries of their seeds require."""

    @staticmethod
    def forward(
        input: Tensor,  # noqa: A002
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> Tensor:
        """Convolve as ``torch.conv2d`` does."""
        result: Tensor = torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the backward pass needs."""
        ctx.weight = inputs[1]
        ctx.rest = (inputs[0].shape, *inputs[3:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient with respect to the input; parameters are frozen."""
        return (_ConvolutionBackward.apply(gradient, ctx.weight, *ctx.rest), None, None, None, None, None, None)


class _ConvolutionBackward(torch.autograd.Function):
    """The product of a convolution's Jacobian with a seed; of sparse seeds, when there are many at once."""

    @staticmethod
    def forward(gradient: Tensor, weight: Tensor, shape: torch.Size, *geometry: Any) -> Tensor:
        product: Tensor = conv2d_input(shape, weight, gradient, *geometry)
        return product

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing: no second derivatives are taken."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], gradient: Tensor, weight: Tensor, shape: torch.Size, *geometry: Any
    ) -> tuple[Tensor, int]:
        seeds = gradient.movedim(in_dims[0], 0)
        shape = torch.Size((len(seeds) * shape[0], *shape[1:]))
        flat = seeds.flatten(0, 1)
        if int(flat.count_nonzero()) * 32 > flat.numel():
            return conv2d_input(shape, weight, flat, *geometry).unflatten(0, seeds.shape[:2]), 0
        stride, padding, dilation, groups = geometry
        seed, channel, row, column = flat.nonzero(as_tuple=True)
        inputs, height, width = weight.shape[1:]
        # Where each weight of each seed's filter reads, in the padded input.
        sizes = [shape[axis + 2] + 2 * padding[axis] for axis in (0, 1)]
        across = torch.arange(inputs, device=flat.device)[:, None, None] * sizes[0]
        down = (across + torch.arange(height, device=flat.device)[:, None] * dilation[0]) * sizes[1]
        reads = down + torch.arange(width, device=flat.device) * dilation[1]
        first = channel // (len(weight) // groups) * inputs + seed * shape[1]
        first = (first * sizes[0] + row * stride[0]) * sizes[1] + column * stride[1]
        padded = flat.new_zeros(shape[0] * shape[1] * sizes[0] * sizes[1])
        values = weight[channel] * flat[seed, channel, row, column].view(-1, 1, 1, 1)
        padded.index_add_(0, (first.view(-1, 1, 1, 1) + reads).flatten(), values.flatten())
        maps = padded.view(*shape[:2], *sizes)
        maps = maps[:, :, padding[0] : padding[0] + shape[2], padding[1] : padding[1] + shape[3]]
        return maps.unflatten(0, seeds.shape[:2]), 0


def sparse_convolution(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Do what ``torch.conv2d`` does with these arguments; None where its backward products would not be ours."""
    call = (
        dict(zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args, strict=False)) | kwargs
    )
    if call["input"].ndim != 4 or isinstance(call.get("padding"), str):
        return None
    geometry = [
        tuple(pair(call.get(name, default))) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    ]
    found: Tensor = Convolution.apply(call["input"], call["weight"], call.get("bias"), *geometry, call.get("groups", 1))
    return found
