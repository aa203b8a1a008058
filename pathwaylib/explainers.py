"""Attribution methods under one signature, so that one evaluation serves all: ``explainer(model, x, target)``.

Everything but the pathway gradient is Captum's; what is here gives each method the same shape of answer and leaves the
caller's network and random numbers as they were.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import cast

import torch
from captum.attr import (
    GuidedBackprop,
    GuidedGradCam,
    InputXGradient,
    IntegratedGradients,
    LayerAttribution,
    LayerGradCam,
    NoiseTunnel,
    Saliency,
)
from torch import Tensor, nn
from tqdm.auto import tqdm

from .attribution import PathwayGradient
from .errors import PathwayError, require_at_least_one
from .neurons import Site, Target, copied, leaf, run, targets_of
from .seeds import seeded
from .selectors import NeuronIntGrad, NeuronMCT, Selector

Explainer = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Takes a network, images ``(B, C, H, W)`` and targets ``(B,)``; returns attributions shaped like the images."""


def explain(
    explainer: Explainer,
    model: nn.Module,
    x: Tensor,
    target: Target = None,
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> Tensor:
    """Explain many images batch by batch.

    Args:
        explainer: such as one of :func:`explainers`.
        model: a network in eval mode.
        x: images ``(B, C, H, W)``.
        target: class or classes to explain; None: the class the network predicts.
        batch_size: images to explain at once.
        progress: show a progress bar over batches.

    Returns:
        Attributions shaped like ``x`` and of its type, without a gradient graph.

    Raises:
        PathwayError: if ``model`` or ``x`` cannot be used, a target is out of range, or the explainer returns another
            shape or numbers that are not finite.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
        >>> explain(explainers()["gradient"], net, torch.rand(4, 3, 2, 2)).shape
        torch.Size([4, 3, 2, 2])
    """
    require_at_least_one(batch_size=batch_size)
    targets = targets_of(model, x, target, batch_size)
    parts = zip(x.detach().split(batch_size), targets.split(batch_size), strict=True)
    bar = tqdm(parts, total=-(-len(x) // batch_size), disable=not progress, leave=False)
    # Captum answers half precision in single.
    found = torch.cat([explainer(model, images, chosen).detach().to(images) for images, chosen in bar])
    if found.shape != x.shape:
        raise PathwayError(f"the explainer returned {tuple(found.shape)} for images of shape {tuple(x.shape)}")
    if not bool(found.isfinite().all()):
        raise PathwayError("the explainer returned NaN or infinity")
    return found


def explainers(
    *,
    sparsities: Sequence[float] = (0.9,),
    n_steps: int = 32,
    samples: int = 16,
    noise: float = 0.1,
    seed: int = 0,
) -> dict[str, Explainer]:
    """Return the attribution methods the book compares, by name.

    ``gradient``, ``input x gradient``, ``integrated gradients`` (from black), ``SmoothGrad``, ``guided backprop``,
    ``Grad-CAM``, ``guided Grad-CAM``, the pathway gradient at each sparsity, and two controls that never look at the
    network: ``random`` and ``centre``.

    The two guided methods are for networks whose activations are ``nn.ReLU`` modules: these are what Captum changes.

    Args:
        sparsities: of the pathways behind the pathway gradients.
        n_steps: steps of integrated gradients, over the input and over neurons.
        samples: noisy copies for SmoothGrad.
        noise: standard deviation of SmoothGrad's noise, in pixel units.
        seed: of SmoothGrad's noise (the same for every batch) and of the random control (its own for every image).

    Example:
        >>> list(explainers(sparsities=[0.95]))[-4:]
        ['pathway gradient MCT 0.95', 'pathway gradient IntGrad 0.95', 'random', 'centre']
    """
    found: dict[str, Explainer] = {
        "gradient": lambda model, x, target: Saliency(_OnACopy(model)).attribute(leaf(x), target, abs=False),
        "input x gradient": lambda model, x, target: InputXGradient(_OnACopy(model)).attribute(leaf(x), target),
        "integrated gradients": lambda model, x, target: IntegratedGradients(_OnACopy(model)).attribute(
            leaf(x),
            target=target,
            n_steps=n_steps,
            method="riemann_middle",
            internal_batch_size=max(len(x), min(64, _at_once(x))),
        ),
        "SmoothGrad": lambda model, x, target: _smooth_grad(model, x, target, samples, noise, seed),
        "guided backprop": lambda model, x, target: GuidedBackprop(_OnACopy(_guidable(model, x))).attribute(
            leaf(x), target
        ),
        "Grad-CAM": _grad_cam,
        "guided Grad-CAM": _guided_grad_cam,
    }
    for sparsity in sparsities:
        found[f"pathway gradient MCT {sparsity:g}"] = pathway_gradient(NeuronMCT(sparsity))
        found[f"pathway gradient IntGrad {sparsity:g}"] = pathway_gradient(NeuronIntGrad(sparsity, n_steps=n_steps))
    found["random"] = lambda model, x, target: _random(x, seed)
    found["centre"] = lambda model, x, target: _centre(x)
    return found


def pathway_gradient(selector: Selector) -> Explainer:
    """Return the pathway gradient of a selector as an explainer.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3)).eval()
        >>> pathway_gradient(NeuronMCT(0.5))(net, torch.rand(2, 4), torch.tensor([0, 1])).shape
        torch.Size([2, 4])
    """
    return lambda model, x, target: cast(Tensor, PathwayGradient(model, selector).attribute(x, target))


def times_input(explainer: Explainer) -> Explainer:
    """Return an explainer whose answer is multiplied by the image, entry by entry.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3)).eval()
        >>> methods, x = explainers(), torch.rand(2, 4)
        >>> one = explain(times_input(methods["gradient"]), net, x)
        >>> bool(one.isclose(explain(methods["input x gradient"], net, x)).all())
        True
    """
    return lambda model, x, target: explainer(model, x, target) * x


class _OnACopy(nn.Module):
    """A network that runs on a copy of its input: it may overwrite it, and Captum differentiates by what it gave."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.model(x.clone()))


def _smooth_grad(model: nn.Module, x: Tensor, target: Tensor, samples: int, noise: float, seed: int) -> Tensor:
    # NoiseTunnel draws from the global generator, in single precision at least.
    with seeded(seed):
        return cast(
            Tensor,
            NoiseTunnel(Saliency(lambda noisy: _OnACopy(model)(noisy.to(x.dtype)))).attribute(
                leaf(x),
                target=target,
                nt_samples=samples,
                nt_samples_batch_size=max(1, min(samples, _at_once(x) // len(x))),
                stdevs=noise,
                abs=False,
            ),
        )


def _at_once(x: Tensor) -> int:
    """Return how many copies of one image to run at once: many small images or a few large ones."""
    return max(1, 2**22 // x[0].numel())


def _grad_cam(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    model = _out_of_place(model, x)
    cam = LayerGradCam(_OnACopy(model), last_maps(model, x)).attribute(leaf(x), target, relu_attributions=True)
    # Every channel gets its share, so that the sum over channels is the map.
    return cast(Tensor, LayerAttribution.interpolate(cam, x.shape[2:], "bilinear").expand_as(x) / x.shape[1])


def _guided_grad_cam(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    model = _guidable(model, x)
    explainer = GuidedGradCam(_OnACopy(model), last_maps(model, x))
    return cast(Tensor, explainer.attribute(leaf(x), target, interpolate_mode="bilinear"))


def _random(x: Tensor, seed: int) -> Tensor:
    # Seeded by the image itself: every image has its own map, the same one in whichever batch it comes.
    maps = [
        torch.randn(image.shape, generator=torch.Generator().manual_seed(zlib.crc32(image.numpy().tobytes(), seed)))
        for image in x.detach().cpu().float().contiguous()
    ]
    return torch.stack(maps).to(x)


def _centre(x: Tensor) -> Tensor:
    """Return the closeness of each pixel to the centre of the image: from 0 in the corners to 1."""
    rows, columns = (torch.linspace(-1, 1, size, device=x.device, dtype=x.dtype) for size in x.shape[2:])
    return (1 - torch.hypot(rows[:, None], columns) / 2**0.5).expand_as(x).clone()


def _out_of_place(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a copy whose activations overwrite nothing: Captum's hooks on modules cannot bear that.

    Raises:
        PathwayError: if the network goes on with what an activation has overwritten.
    """
    changed = copied(model)
    for module in changed.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    with torch.no_grad():
        given, found = (network(x[:1].clone()) for network in (model, changed))
    if not torch.allclose(given, found):
        raise PathwayError(
            f"{type(model).__name__} answers otherwise once its modules with inplace=True overwrite nothing, as "
            "Captum's hooks need it: it goes on with a tensor that one of them has overwritten; go on with what the "
            "module returns instead, as in h = self.relu(h)"
        )
    return changed


def _guidable(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a copy for Captum's guided methods, which change ``nn.ReLU`` modules and pass over all else in silence.

    Raises:
        PathwayError: if an activation of the network is not such a module.
    """
    changed = _out_of_place(model, x)
    modules: list[nn.Module] = []
    kinds: Counter[str] = Counter()

    def note(site: Site, z: Tensor) -> Tensor:
        kinds[site.kind] += 1
        return site.activate(z)

    handles = [
        module.register_forward_hook(lambda module, inputs, output: modules.append(module))
        for module in changed.modules()
        if isinstance(module, nn.ReLU)
    ]
    with torch.no_grad():
        run(changed, x[:1], note)
    for handle in handles:
        handle.remove()
    if len(modules) < kinds.total():
        raise PathwayError(
            f"guided methods change the backward pass of nn.ReLU modules, and only {len(modules)} of the activation "
            f"calls of {type(model).__name__} ({', '.join(f'{kind}: {count}' for kind, count in kinds.items())}) come "
            "from such modules, so that the result would be the plain gradient elsewhere; use another method, or "
            "write functional ReLUs as nn.ReLU modules"
        )
    return changed


_POOLINGS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout2d, nn.Dropout)


def last_maps(model: nn.Module, x: Tensor) -> nn.Module:
    """Return the last module of a network that gives maps of more than one pixel: where Grad-CAM looks.

    Poolings aside; in a ResNet it is the last block, in a VGG the last activation before the classifier's pooling.

    Raises:
        PathwayError: if no module gives maps ``(B, C, H, W)`` exactly once in a run.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> last_maps(net.eval(), torch.rand(1, 3, 8, 8))
        ReLU()
    """
    finished: list[nn.Module] = []

    def note(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output[0, 0].numel() > 1:
            finished.append(module)

    handles = [module.register_forward_hook(note) for module in model.modules() if not isinstance(module, _POOLINGS)]
    try:
        with torch.no_grad():
            model(x[:1].clone())
    finally:
        for handle in handles:
            handle.remove()
    # A module that is called in several places gives Captum several maps.
    once = [module for module in finished if sum(module is other for other in finished) == 1]
    if not once:
        raise PathwayError(
            f"no module of {type(model).__name__} gives maps (batch, channels, height, width) once per run; Grad-CAM "
            "needs a convolutional network"
        )
    return once[-1]
