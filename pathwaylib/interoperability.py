"""Our explanations in the form that other libraries ask for.

Captum needs nothing: :class:`pathwaylib.PathwayGradient` is one of its attributions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from .explainers import Explainer, explain, pathway_gradient
from .neurons import input_like
from .selectors import NeuronMCT


def quantus_explain(
    model: nn.Module,
    inputs: ArrayLike,
    targets: ArrayLike,
    *,
    explainer: Explainer | None = None,
    batch_size: int = 64,
    device: str | None = None,
) -> NDArray[Any]:
    """Explain in the way that the metrics of Quantus call for: ``explain_func(model, inputs, targets, **kwargs)``.

    Hand it to a metric as ``explain_func=quantus_explain``, its options as ``explain_func_kwargs``. The network stays
    in the mode and where it is; a network that Quantus has randomised is explained as it then is.

    Args:
        model: a network in eval mode.
        inputs: images ``(B, C, H, W)``; converted to the network's own type and device.
        targets: one class per image.
        explainer: such as one of :func:`pathwaylib.explainers`; the pathway gradient of NeuronMCT at sparsity 0.9 if
            left out.
        batch_size: images to explain at once.
        device: Quantus passes its own; the network's is used.

    Returns:
        Attributions as an array shaped like ``inputs``, of the network's type; in float32 where NumPy has no such type
        (bfloat16).

    Raises:
        PathwayError: as :func:`pathwaylib.explain`.

    Source: Hedström et al., *Quantus: An Explainable AI Toolkit for Responsible Evaluation of Neural Network
    Explanations and Beyond* (JMLR 2023).

    Example:
        >>> import numpy as np
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
        >>> maps = quantus_explain(net, np.zeros((4, 3, 2, 2)), np.array([0, 1, 2, 0]))
        >>> type(maps).__name__, maps.shape
        ('ndarray', (4, 3, 2, 2))
    """
    x = _tensor(inputs).to(input_like(model))
    maps = explain(explainer or pathway_gradient(NeuronMCT()), model, x, _tensor(targets), batch_size=batch_size).cpu()
    found: NDArray[Any] = (maps.float() if maps.dtype == torch.bfloat16 else maps).numpy()
    return found


def _tensor(values: ArrayLike) -> Tensor:
    # PyTorch takes no reversed array, hence the order.
    return values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values, order="C"))
