"""The attribution methods: each against Captum called directly or its formula written out, none leaving a trace."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from captum.attr import GuidedBackprop, GuidedGradCam, InputXGradient, IntegratedGradients, LayerGradCam, Saliency
from networks import small_network, unchanged
from torch import Tensor, nn
from torch.nn import functional as F

from pathwaylib import NeuronIntGrad, NeuronMCT, PathwayError, PathwayGradient
from pathwaylib.architectures import planted_cnn, resnet, vgg
from pathwaylib.explainers import explain, explainers, last_maps, pathway_gradient, times_input

METHODS = [
    "gradient",
    "input x gradient",
    "integrated gradients",
    "SmoothGrad",
    "guided backprop",
    "Grad-CAM",
    "guided Grad-CAM",
    "pathway gradient MCT 0.9",
    "pathway gradient IntGrad 0.9",
    "random",
    "centre",
]
DETERMINISTIC = [name for name in METHODS if name != "SmoothGrad"]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"captum\.")
        yield


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a network random weights and batch-norm statistics, in float64 and eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2, generator=generator)
            elif value.is_floating_point() and not name.endswith(("mean", "std")):
                value.normal_(0, 2 / value[0].numel() ** 0.5 if value.ndim > 1 else 0.5, generator=generator)
    return model.double().eval()


def small_vgg() -> nn.Module:
    return randomised(vgg((4, 6)))


def small_resnet() -> nn.Module:
    """Each block calls one in-place ReLU twice."""
    return randomised(resnet(8, width=4))


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cheap(**kwargs: object) -> dict[str, Callable[..., Tensor]]:
    return explainers(**({"n_steps": 4, "samples": 3} | kwargs))  # type: ignore[arg-type]


def out_of_place(model: nn.Module) -> nn.Module:
    """The same function, written without a module that is called twice or overwrites what it is given."""
    changed = copy.deepcopy(model)
    for block in changed:
        if hasattr(block, "conv1"):
            block.relu1, block.relu2 = nn.ReLU(), nn.ReLU()
            block.forward = _plain_block.__get__(block)
    return nn.Sequential(*(nn.ReLU() if isinstance(part, nn.ReLU) else part for part in changed)).eval()


def _plain_block(self: nn.Module, inputs: Tensor) -> Tensor:
    hidden = self.relu1(self.norm1(self.conv1(inputs)))
    return self.relu2(self.norm2(self.conv2(hidden)) + self.shortcut(inputs))


# --- Against Captum and formulas -------------------------------------------------------------------------------------


def test_the_names() -> None:
    assert list(explainers()) == METHODS
    more = list(explainers(sparsities=[0.8, 0.95]))
    assert [name for name in more if "pathway" in name] == [
        "pathway gradient MCT 0.8",
        "pathway gradient IntGrad 0.8",
        "pathway gradient MCT 0.95",
        "pathway gradient IntGrad 0.95",
    ]


@pytest.mark.parametrize("make", [small_vgg, small_resnet], ids=["vgg", "resnet"])
def test_methods_are_captums(make: Callable[[], nn.Module]) -> None:
    """Captum is called on a copy without in-place or shared activations, which it cannot bear."""
    model, x = make(), images(3)
    target = torch.tensor([4, 0, 9])
    plain = out_of_place(model)
    assert torch.equal(plain(x), model(x))
    layer = [part for part in plain if not isinstance(part, (nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear))][-1]

    def leaf() -> Tensor:
        return x.clone().requires_grad_()

    cam = LayerGradCam(plain, layer).attribute(leaf(), target, relu_attributions=True)
    black = torch.zeros_like(x)
    expected = {
        "gradient": Saliency(plain).attribute(leaf(), target, abs=False),
        "input x gradient": InputXGradient(plain).attribute(leaf(), target),
        "integrated gradients": IntegratedGradients(plain).attribute(
            leaf(), black, target, n_steps=4, method="riemann_middle"
        ),
        "guided backprop": GuidedBackprop(plain).attribute(leaf(), target),
        "Grad-CAM": F.interpolate(cam, size=(16, 16), mode="bilinear").expand_as(x) / 3,
        "guided Grad-CAM": GuidedGradCam(plain, layer).attribute(leaf(), target, interpolate_mode="bilinear"),
        "pathway gradient MCT 0.9": PathwayGradient(plain, NeuronMCT(0.9)).attribute(x, target),
        "pathway gradient IntGrad 0.9": PathwayGradient(plain, NeuronIntGrad(0.9, n_steps=4)).attribute(x, target),
    }
    methods = cheap()
    for name, maps in expected.items():
        assert bool((maps != 0).any()), name
        torch.testing.assert_close(methods[name](model, x, target), maps.detach(), rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("make", [small_vgg, small_resnet], ids=["vgg", "resnet"])
def test_guided_backprop_drops_what_comes_back_negative(make: Callable[[], nn.Module]) -> None:
    class Guided(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, z: Tensor) -> Tensor:
            ctx.save_for_backward(z > 0)
            return z.clamp(min=0)

        @staticmethod
        def backward(ctx: object, back: Tensor) -> Tensor:
            return back.clamp(min=0) * ctx.saved_tensors[0]

    class GuidedReLU(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return Guided.apply(z)

    model, x = make(), images(2)
    guided = out_of_place(model)
    for owner in list(guided.modules()):
        for name, part in owner.named_children():
            if isinstance(part, nn.ReLU):
                setattr(owner, name, GuidedReLU())
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(guided(leaf)[:, 3].sum(), leaf)
    found = explainers()["guided backprop"](model, x, torch.tensor([3, 3]))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("make", [small_vgg, small_resnet], ids=["vgg", "resnet"])
def test_grad_cam_written_out(make: Callable[[], nn.Module]) -> None:
    model, x = make(), images(2)
    target = torch.tensor([1, 7])
    split = next(index for index, part in enumerate(model) if isinstance(part, nn.AdaptiveAvgPool2d))
    maps = model[:split](x).detach().requires_grad_()
    (slopes,) = torch.autograd.grad(model[split:](maps).gather(1, target[:, None]).sum(), maps)
    coarse = (slopes.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).clamp(min=0)
    expected = F.interpolate(coarse.detach(), size=(16, 16), mode="bilinear")
    found = explainers()["Grad-CAM"](model, x, target)
    assert found.shape == x.shape
    torch.testing.assert_close(found.sum(1, keepdim=True), expected, rtol=1e-8, atol=1e-10)  # channels share it


def test_smooth_grad_averages_slopes_of_noisy_copies() -> None:
    model, x = small_vgg(), images(2)
    target = torch.tensor([1, 2])
    gradient, smooth = (
        explainers(samples=400, noise=0.05)["gradient"],
        explainers(samples=400, noise=0.05)["SmoothGrad"],
    )
    copies = torch.randn(400, *x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1)) * 0.05 + x
    maps = torch.stack([gradient(model, images_, target) for images_ in copies])
    error = (maps.std(0) ** 2 * 2 / 400).sqrt()  # of the difference of two such means
    assert float((((smooth(model, x, target) - maps.mean(0)) / error) ** 2).mean()) == pytest.approx(1, abs=0.25)
    still = explainers(samples=3, noise=0.0)["SmoothGrad"](model, x, target)
    torch.testing.assert_close(still, gradient(model, x, target), rtol=1e-8, atol=1e-10)


def test_integrated_gradients_are_complete_and_n_steps_reaches_them() -> None:
    model, x = small_vgg(), images(2)
    target = torch.tensor([1, 2])
    gained = (model(x) - model(torch.zeros_like(x))).gather(1, target[:, None])[:, 0].detach()
    errors = [
        float(
            (explain(explainers(n_steps=n)["integrated gradients"], model, x, target).sum((1, 2, 3)) - gained)
            .abs()
            .max()
        )
        for n in (2, 300)
    ]
    assert errors[1] < 0.02 * float(gained.abs().max()) < errors[0]


# --- Controls --------------------------------------------------------------------------------------------------------


def test_random_belongs_to_the_image_and_the_seed() -> None:
    model, x = small_vgg(), images(4)
    random = explainers(seed=1)["random"]
    target = torch.zeros(4, dtype=torch.long)
    maps = random(model, x, target)
    assert torch.equal(random(model, x.flip(0), target).flip(0), maps)
    assert torch.equal(random(small_resnet(), x, target + 3), maps)  # never looks at the network or the class
    assert not torch.equal(explainers(seed=2)["random"](model, x, target), maps)
    flat = maps.flatten(1)
    assert float(torch.corrcoef(flat).fill_diagonal_(0).abs().max()) < 5 / flat.shape[1] ** 0.5
    assert float(flat.mean()) == pytest.approx(0, abs=5 / flat.numel() ** 0.5)
    assert maps.dtype == x.dtype


def test_centre_falls_with_the_distance() -> None:
    model = small_vgg()
    x = torch.rand(2, 3, 15, 11, dtype=torch.float64)
    maps = explainers()["centre"](model, x, torch.zeros(2, dtype=torch.long))
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 15), torch.linspace(-1, 1, 11), indexing="ij")
    distance = (rows**2 + columns**2).flatten()
    order = distance.argsort()
    values = maps[0, 0].flatten()[order]
    assert bool((values[1:] <= values[:-1] + 1e-6).all())
    assert float(maps[0, 0, 7, 5]) == float(maps.max())
    # Not negative, or its absolute value would prefer the border.
    assert float(maps.min()) == pytest.approx(0, abs=1e-9)
    assert bool((maps == maps[0, 0]).all())


# --- explain ---------------------------------------------------------------------------------------------------------


NETWORKS = {"vgg": small_vgg, "resnet": small_resnet, "shared": lambda: small_network(spelling="F.relu_")}


@pytest.mark.parametrize(
    ("kind", "name"),
    # Captum's guided methods change ReLU modules, and a network of functional calls has none.
    [(kind, name) for kind in NETWORKS for name in METHODS if kind != "shared" or not name.startswith("guided")],
)
def test_nothing_changes(kind: str, name: str) -> None:
    model = NETWORKS[kind]()
    x = images(2)[..., :7, :7] if kind == "shared" else images(2)
    in_place = [getattr(part, "inplace", None) for part in model.modules()]
    for given in (x, x.clone().requires_grad_()):
        with unchanged(model, given):
            found = explain(cheap()[name], model, given)
        assert found.shape == x.shape
        assert found.dtype == x.dtype
        assert not found.requires_grad
    assert [getattr(part, "inplace", None) for part in model.modules()] == in_place
    with unchanged(model, x), torch.no_grad():
        assert torch.equal(explain(cheap()[name], model, x), found)  # the same at every call
    with unchanged(model, x), pytest.raises(PathwayError, match="classes 0 to"):
        explain(cheap()[name], model, x, 99)


@pytest.mark.parametrize("make", [small_vgg, small_resnet], ids=["vgg", "resnet"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_batch_is_the_loop(make: Callable[[], nn.Module], name: str) -> None:
    model, x = make(), images(5)
    together = explain(cheap()[name], model, x)
    in_batches = explain(cheap()[name], model, x, batch_size=2)
    torch.testing.assert_close(in_batches, together, rtol=1e-7, atol=1e-9)
    alone = torch.cat([explain(cheap()[name], model, x[index : index + 1]) for index in range(5)])
    torch.testing.assert_close(alone, together, rtol=1e-7, atol=1e-9)


def test_targets() -> None:
    model, x = small_vgg(), images(3)
    predicted = model(x).argmax(1)
    gradient = explainers()["gradient"]
    torch.testing.assert_close(explain(gradient, model, x), explain(gradient, model, x, predicted))
    torch.testing.assert_close(explain(gradient, model, x, 2), explain(gradient, model, x, [2, 2, 2]))
    assert not torch.equal(explain(gradient, model, x, 2), explain(gradient, model, x, 3))


def test_times_input_and_pathway_gradient() -> None:
    model, x = small_vgg(), images(3)
    target = torch.tensor([1, 2, 3])
    own = pathway_gradient(NeuronMCT(0.8))
    torch.testing.assert_close(own(model, x, target), PathwayGradient(model, NeuronMCT(0.8)).attribute(x, target))
    assert torch.equal(times_input(own)(model, x, target), own(model, x, target) * x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", METHODS)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    found = explain(cheap()[name], small_vgg().to(dtype), images(2).to(dtype), 0)
    assert found.dtype == dtype


def test_a_network_without_relu_has_a_gradient_too() -> None:
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    x = torch.rand(4, 3, 2, 2, requires_grad=True)
    found = explain(explainers()["gradient"], smooth, x, [0, 1, 2, 0], batch_size=3)
    response = smooth(x)[torch.arange(4), torch.tensor([0, 1, 2, 0])].sum()
    torch.testing.assert_close(found, torch.autograd.grad(response, x)[0])


def test_a_bar_over_batches(capsys: pytest.CaptureFixture[str]) -> None:
    model, x = small_vgg(), images(3)
    explain(explainers()["centre"], model, x)
    assert capsys.readouterr().err == ""
    explain(explainers()["centre"], model, x, batch_size=1, progress=True)
    assert "/3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("explainer", "x", "options", "message"),
    [
        (lambda model, x, target: x[:, :1], images(2), {}, r"returned \(2, 1, 16, 16\)"),
        (lambda model, x, target: x * torch.nan, images(2), {}, "NaN"),
        (explainers()["gradient"], images(2).float(), {}, "float32"),
        (explainers()["gradient"], images(2), {"batch_size": 0}, "batch_size is 0"),
        (explainers()["gradient"], images(2), {"target": [1]}, r"\(1,\) for 2"),
    ],
)
def test_bad_input(explainer: object, x: Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(PathwayError, match=message):
        explain(explainer, small_vgg(), x, **options)


def test_training_mode_is_refused() -> None:
    with pytest.raises(PathwayError, match="training mode"):
        explain(explainers()["gradient"], small_vgg().train(), images(1))


# --- Networks in place, what the guided methods cannot change, and memory ---------------------------------------------


class Calls(nn.Module):
    """Calls a function where other networks have a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("overwriting", "plain"),
    [(nn.ReLU(inplace=True), nn.ReLU()), (Calls(lambda x: x.sub_(0.5)), Calls(lambda x: x - 0.5))],
    ids=["relu", "sub_"],
)
@pytest.mark.parametrize("name", METHODS)
def test_a_network_may_overwrite_its_input(name: str, overwriting: nn.Module, plain: nn.Module) -> None:
    layers = list(small_vgg())
    model, expected = (nn.Sequential(first, *layers).eval() for first in (overwriting, plain))
    x, target = images(3) - 0.5, torch.tensor([4, 0, 9])
    with unchanged(model, x):
        found = cheap()[name](model, x, target)
    torch.testing.assert_close(found, cheap()[name](expected, x, target), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["guided backprop", "Grad-CAM", "guided Grad-CAM"])
def test_activations_whose_result_is_thrown_away_are_answered(name: str) -> None:
    class Careless(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            h = self[0](x)
            self[1](h)
            return self[2](h.mean((2, 3)))

    model = randomised(Careless(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Linear(4, 3)))
    x = images(2)
    with unchanged(model, x), pytest.raises(PathwayError, match=r"Careless answers otherwise once .* h = self.relu"):
        explain(cheap()[name], model, x)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")  # the spelling of old, with a hook
@pytest.mark.parametrize("name", METHODS)
def test_weights_that_a_hook_has_computed_with_a_graph(name: str) -> None:
    model, x, target = small_vgg(), images(2), torch.tensor([4, 0])
    expected = cheap()[name](model, x, target)
    nn.utils.weight_norm(model[next(index for index, part in enumerate(model) if isinstance(part, nn.Conv2d))])
    model(x)
    torch.testing.assert_close(cheap()[name](model, x, target), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("activation", "found"),
    [
        (nn.ReLU6(), "relu: 1, relu6: 1"),
        (nn.LeakyReLU(0.1), "relu: 1, leaky_relu: 1"),
        (Calls(F.relu), "relu: 2"),
        (Calls(torch.relu_), "relu: 2"),
    ],
)
@pytest.mark.parametrize("name", ["guided backprop", "guided Grad-CAM"])
def test_guided_methods_refuse_what_they_would_pass_over(name: str, activation: nn.Module, found: str) -> None:
    def network(second: nn.Module) -> nn.Module:
        layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), second, nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return randomised(nn.Sequential(*layers))

    model, x = network(activation), images(2)
    with (
        unchanged(model, x),
        pytest.raises(PathwayError, match=rf"only 1 of the activation calls of Sequential \({found}\)"),
    ):
        explain(explainers()[name], model, x)
    assert explain(explainers()[name], network(nn.ReLU()), x).shape == x.shape


@pytest.mark.parametrize(
    ("name", "size", "count", "most"),
    [
        ("integrated gradients", 16, 2, 64),
        ("integrated gradients", 16, 70, 70),
        ("integrated gradients", 512, 1, 5),  # of three quarters of a million numbers each
        ("integrated gradients", 512, 7, 7),
        ("SmoothGrad", 16, 2, 32),
        ("SmoothGrad", 512, 1, 5),
        ("SmoothGrad", 512, 2, 4),
        ("SmoothGrad", 512, 7, 7),
    ],
)
def test_few_large_images_run_at_once(name: str, size: int, count: int, most: int) -> None:
    batches = []
    model = nn.Sequential(nn.AvgPool2d(size), nn.Flatten(), nn.Linear(3, 2)).eval()
    model.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    explainer = explainers(samples=16, n_steps=64)[name]
    explainer(model, torch.rand(count, 3, size, size), torch.zeros(count, dtype=torch.long))
    assert max(batches) == most


# --- Where Grad-CAM looks --------------------------------------------------------------------------------------------


def test_the_layer_of_grad_cam() -> None:
    one = images(1)
    network = small_vgg()
    assert last_maps(network, one) is [part for part in network if isinstance(part, nn.ReLU)][-1]
    network = small_resnet()
    assert last_maps(network, one) is [part for part in network if hasattr(part, "conv1")][-1]
    network = randomised(planted_cnn(4))
    assert last_maps(network, one) is network[8]  # the last ReLU: max-poolings follow


def test_the_layer_of_grad_cam_in_unusual_networks() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.second(F.relu(self.first(x))))
            return self.head(h.mean((2, 3)))

    network = Functional().eval()
    assert last_maps(network, torch.rand(1, 3, 8, 8)) is network.second

    shared = nn.ReLU()
    network = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.Conv2d(4, 5, 3), shared, nn.AdaptiveAvgPool2d(1)).eval()
    assert last_maps(network, torch.rand(1, 3, 8, 8)) is network[2]  # the ReLU gives maps twice

    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 5, 1), nn.Flatten()).eval()
    assert last_maps(pooled, torch.rand(1, 3, 8, 8)) is pooled[0]  # a map of one pixel shows nothing

    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    x = torch.rand(1, 3, 2, 2)
    for refused in (lambda: last_maps(flat, x), lambda: explain(explainers()["Grad-CAM"], flat, x)):
        with unchanged(flat, x), pytest.raises(PathwayError, match="convolutional"):
            refused()


def test_hooks_are_removed_when_the_network_fails() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.layer(x)
            raise RuntimeError("out of memory")

    network, x = Fails().eval(), torch.rand(1, 3, 8, 8)
    with unchanged(network, x), pytest.raises(RuntimeError, match="out of memory"):
        last_maps(network, x)


@pytest.mark.cuda
def test_on_a_gpu() -> None:
    model, x = small_resnet(), images(2)
    here = {name: explain(cheap()[name], model, x) for name in DETERMINISTIC}
    model.cuda()
    for name, expected in here.items():
        found = explain(cheap()[name], model, x.cuda())
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-8)
