"""Take a recorded run up again at one of its sites, without computing what comes before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from .neurons import Site, Visitor, refuse_inference_mode, response, run, tensors_of


class Rerun:
    """A run whose intermediate results are kept, so that it can be repeated from any site on.

    Calls before the site return what they returned in the recorded run, calls after it are computed anew. Where that
    would be wrong, because the network later overwrites an early result, the whole network runs instead: the answer
    is the same in either case. Holds every intermediate result of the run, as training does.

    Args:
        model: a network in eval mode.
        x: images ``(B, ...)``.

    Attributes:
        sites: the :class:`pathwaylib.neurons.Site` of each activation call.
        post: activations of the recorded run, ``(B, ...)`` per site.
        logits: response of the recorded run, ``(B, K)``.

    Raises:
        PathwayError: as :func:`pathwaylib.observe`.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> rerun = Rerun(net, torch.rand(5, 2))
        >>> halved = rerun(0, rerun.post[0] / 2)
        >>> torch.allclose(halved - net[2].bias, (rerun.logits - net[2].bias) / 2, atol=1e-6)
        True
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        refuse_inference_mode()
        self.model = model
        self.x = x.detach()
        sites: list[Site] = []
        post: list[Tensor] = []
        self._recording = _Recording()

        def note(site: Site, z: Tensor) -> Tensor:
            a = site.function(z)
            sites.append(site)
            post.append(a)
            self._recording.start_site()
            return a.clone()  # the network may overwrite its own

        with torch.no_grad():
            self.logits = run(model, self.x, note, within=self._recording)
        # The backward pass of an activation needs its result: where the network overwrites one, it gets a copy.
        self._private = self._recording.overwrites_activations()
        self._overwritten = [self._recording.overwritten_at(site) for site in range(len(sites))]
        del self._recording.results[self._recording.site_calls[-1] :]  # nothing runs on from behind the last site
        self.sites = tuple(sites)
        self.post = tuple(post)

    def __call__(
        self,
        site: int,
        activation: Tensor,
        visitor: Visitor | None = None,
        within: AbstractContextManager[object] | None = None,
    ) -> Tensor:
        """Run on from ``site`` with ``activation`` in place of what was recorded there.

        Args:
            site: index of the site.
            activation: shaped like ``post[site]``; may carry a gradient graph or a tangent.
            visitor: called at the later sites; None lets them be.
            within: a context for what is computed anew, see :func:`pathwaylib.neurons.run`.

        Returns:
            The logits ``(B, K)``.
        """
        overwritten = self._overwritten[site]
        skipped = 0 if overwritten is None else site

        def replace(call: Site, z: Tensor) -> Tensor:
            index = call.index + skipped
            if index == site:
                return activation.clone()  # the network may overwrite its own
            a = visitor(call, z) if visitor and index > site else call.activate(z)
            return a.clone() if self._private else a

        @contextmanager
        def contexts() -> Iterator[None]:
            recalled = nullcontext() if overwritten is None else _Recalled(self._recording, site, overwritten)
            # The last mode entered is the first asked: what is recalled gets no further.
            with within or nullcontext(), recalled:
                yield

        return run(self.model, self.x, replace, within=contexts())

    def gradient(self, site: int, activation: Tensor, targets: Tensor) -> Tensor:
        """Return the gradient of each input's response by a site's activation, there; see :meth:`__call__`.

        Args:
            site: index of the site.
            activation: shaped like ``post[site]``.
            targets: class of each input's response, ``(B,)``.

        Example:
            >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
            >>> rerun = Rerun(net, torch.rand(1, 2))
            >>> bool((rerun.gradient(0, rerun.post[0], torch.tensor([1])) == net[2].weight[1]).all())
            True
        """
        with torch.enable_grad():
            leaf = activation.detach().requires_grad_()
            return torch.autograd.grad(response(self(site, leaf), targets).sum(), leaf, materialize_grads=True)[0]


class _Recording(TorchFunctionMode):
    """Keep what every torch function of a run returns, and the last call that changed each piece of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Any] = []
        self.site_calls: list[int] = []
        self.changed: dict[int, int] = {}

    def start_site(self) -> None:
        """Note that the call under way is a site's."""
        self.site_calls.append(len(self.results))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [(tensor, tensor._version) for tensor in tensors_of((args, kwargs))]
        result = func(*args, **(kwargs or {}))
        for tensor, version in given:
            if tensor._version != version:
                self.changed[_memory(tensor)] = len(self.results)
        self.results.append(result)
        return result

    def overwrites_activations(self) -> bool:
        """Tell whether the network changed what an activation call had returned."""
        return any(self.changed.get(_memory(self.results[call]), -1) > call for call in self.site_calls)

    def overwritten_at(self, site: int) -> dict[int, Tensor] | None:
        """Return, by identity, the earlier result that a site in place overwrites; None if no run can go on there.

        That takes that all computed before the site still held its value when the run ended.
        """
        call = self.site_calls[site]
        early = [tensor for result in self.results[:call] for tensor in tensors_of(result)]
        if any(self.changed.get(_memory(tensor), -1) > call for tensor in early):
            return None
        overwritten = {id(tensor): tensor for tensor in early if self.changed.get(_memory(tensor), -1) == call}
        # Right for the very tensor the site was given, but a view of it would keep the old graph.
        return overwritten if len(overwritten) <= 1 else None


class _Recalled(TorchFunctionMode):
    """Give recorded results back up to a site; compute from there on."""

    def __init__(self, recording: _Recording, site: int, overwritten: dict[int, Tensor]) -> None:
        super().__init__()
        self.results = recording.results
        self.until = recording.site_calls[site]
        self.calls = 0
        # What a site in place overwrites is handed out as a copy: later sites still need what was recorded.
        self.copies = {identity: tensor.clone() for identity, tensor in overwritten.items()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.calls == self.until:
            return func(*args, **(kwargs or {}))
        result = self.results[self.calls]
        self.calls += 1
        # What is overwritten may be one of several results, as the values of `max` are.
        return _pytree.tree_map_only(Tensor, lambda tensor: self.copies.get(id(tensor), tensor), result)


def _memory(tensor: Tensor) -> int:
    """Name the memory that a tensor shares with its views."""
    return tensor.untyped_storage().data_ptr()
