"""From pathways to pixels: the pathway gradient, in Captum's interface."""

from __future__ import annotations

from typing import cast

import torch
from captum.attr import GradientAttribution
from captum.log import log_usage
from torch import Tensor, nn

from .errors import PathwayError
from .neurons import Target, check_batch, check_gradient, check_model, frozen, leaf, masked, response, targets_of
from .selectors import NeuronMCT, Selector


class PathwayGradient(GradientAttribution):
    """Gradient of the response inside the pathway network: the linear map the pathway applies to the image.

    The pathway is selected anew at every call, so methods that perturb or repeat the input (Captum's
    ``NoiseTunnel``, ``infidelity``, ``sensitivity_max``) explain each variant by its own pathway.

    Args:
        model: a network in eval mode that takes one tensor.
        selector: any selector; ``NeuronMCT(sparsity=0.9)`` if left out.

    Equation: ∇_x Φ_P,t(x), with P the pathway of x for target t.

    Source: Khakzar et al., *Neural Response Interpretation through the Lens of Critical Pathways* (CVPR 2021),
    section 5.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3)).eval()
        >>> explainer = PathwayGradient(net, NeuronMCT(sparsity=0.5))
        >>> explainer.attribute(torch.rand(2, 4), target=0).shape
        torch.Size([2, 4])
    """

    def __init__(self, model: nn.Module, selector: Selector | None = None) -> None:
        super().__init__(model)
        self.model = model
        self.selector: Selector = NeuronMCT() if selector is None else selector

    @log_usage(part_of_slo=True)
    def attribute(self, inputs: Tensor | tuple[Tensor], target: Target = None) -> Tensor | tuple[Tensor]:
        """Return the pathway gradient of each input.

        Args:
            inputs: images ``(B, ...)``, or a tuple that holds them.
            target: class or classes to explain; None means the class the *full* network predicts.

        Returns:
            Attributions in units of the response per unit of the input, shaped like ``inputs`` (a tuple for a
            tuple), without a gradient graph.

        Raises:
            PathwayError: as the selector, and if more than one input tensor is given.
        """
        if isinstance(inputs, tuple):
            if len(inputs) != 1:
                raise PathwayError(f"{len(inputs)} input tensors were given; pathways are defined for networks of one")
            return (cast(Tensor, self.attribute.__wrapped__(self, inputs[0], target)),)
        check_model(self.model, inputs)
        x = inputs.detach()
        pathway = self.selector(self.model, x, target)
        check_batch(x, pathway)
        # A selector knows which class it explained, so that None does not cost another forward run.
        if target is None and pathway.targets is not None:
            target = pathway.targets.expand(len(x))
        elif target is None:
            target = targets_of(self.model, x)
        x = leaf(x)
        with torch.enable_grad(), frozen(self.model):
            with masked(pathway, runs=1):
                logits = self.model(x.clone())  # a network may change its input in place
            check_gradient(self.model, logits)
            return torch.autograd.grad(response(logits, target).sum(), x)[0]

    def has_convergence_delta(self) -> bool:
        """Return False: a gradient does not add up to the response."""
        return False
