"""The command line: ``python -m pathwaylib extract``, ``summarise`` and ``explain``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, cast

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from .commandline import run_app
from .data import CIFAR10_CLASSES, ImageSet, cifar10, planted
from .errors import PathwayError, require_choice
from .evaluation import confidence
from .explainers import explain, explainers, pathway_gradient
from .extraction import Engine, extract
from .files import atomic_write
from .generator import load_generator
from .neurons import targets_of
from .photographs import load_image
from .plots import show_attributions
from .pretrained import PRETRAINED, imagenet_labels
from .pruning import DistillationGuidedRouting, GreedyPruning
from .selectors import ActiveNeurons, NeuronIntGrad, NeuronMCT, RandomSelection, Selector
from .summary import summarise
from .zoo import load_model, model_card

SELECTORS = {
    "neuron-mct": NeuronMCT,
    "neuron-intgrad": NeuronIntGrad,
    "greedy": GreedyPruning,
    "distillation-guided-routing": DistillationGuidedRouting,
    "random": RandomSelection,
}
"""Selectors by the name the command line takes, each made from a sparsity; ``active`` and ``generator`` need none."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # joins the lines of a paragraph
    help="Critical pathways of neural networks.",
)

_Model = Annotated[str, typer.Option(help="A network by name, such as cifar10-vgg or imagenet-efficientnet-lite0.")]
_Selector = Annotated[str, typer.Option(help=f"One of {', '.join([*SELECTORS, 'active', 'generator'])}.")]
_Sparsity = Annotated[
    float | None,
    typer.Option(help="Share of the neurons to remove, in [0, 1); else 0.9. `active` and `generator` take none."),
]
_Device = Annotated[str, typer.Option(help="Where to run the network: cpu, cuda, cuda:1.")]


@app.command("extract")
def extract_command(
    model: _Model,
    images: Annotated[str, typer.Option(help="A folder of images, or cifar10 (its test split), or cifar10-train.")],
    out: Annotated[Path, typer.Option(help="Folder to write to; a run that was stopped there is taken up.")],
    selector: _Selector = "neuron-mct",
    sparsity: _Sparsity = None,
    limit: Annotated[int | None, typer.Option(help="Take only as many images, the first ones.")] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Text file with the names of the network's classes, a line each; else its own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images to run at once.")] = 64,
    shard_size: Annotated[int, typer.Option(help="Images per Parquet file.")] = 1024,
    readers: Annotated[int, typer.Option(help="Threads that read image files.")] = 4,
    engine: Annotated[str, typer.Option(help="local, or ray for many processes or machines.")] = "local",
    workers: Annotated[int | None, typer.Option(help="With ray: files in work at a time; else as many as fit.")] = None,
    device: _Device = "cpu",
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Write the pathway of every image of a data set to Parquet files.

    The first folder on an image's path is its label. Images are cropped to the largest centred square and scaled to
    the size the network takes. What cannot be read is listed at the end, and left out.
    """
    network = _network(model, device)
    try:
        found = extract(
            network,
            _images(images),
            _selector(selector, sparsity, model, device),
            out,
            size=_size(model),
            limit=limit,
            classes=_class_names(model) if classes is None else _lines(classes),
            name=model,
            batch_size=batch_size,
            shard_size=shard_size,
            readers=readers,
            engine=cast(Engine, engine),
            workers=workers,
            progress=progress,
        )
    except KeyboardInterrupt:
        _print(f"Stopped. What is whole in {out} stays: give the same command again to go on")
        raise
    if found.remarks:
        rows = [(str(r.images), r.what, r.outcome, r.example) for r in found.remarks]
        _print_table("Odd images", ("images", "what", "outcome", "for example"), rows)
    megabytes = sum(file.stat().st_size for file in found.files) / 1e6
    _print(f"{found.images} pathways in {len(found.files)} files of {out} ({megabytes:.1f} MB)")


@app.command("summarise")
def summarise_command(
    path: Annotated[Path, typer.Argument(help="Folder that extract has written.")],
    sample: Annotated[int | None, typer.Option(help="Images to compare for the overlap; else at most 500.")] = None,
    share: Annotated[float, typer.Option(help="Share of a class's pathways that keep a class-relevant neuron.")] = 0.3,
) -> None:
    """Print what an extraction says: by class, by site, and how far pathways of one class agree."""
    found = summarise(path, sample=sample, share=share)
    settings = found.extraction.settings
    chosen = ", ".join(f"{key}={value}" for key, value in settings["selector"].items() if key != "name")
    _print(
        f"{found.extraction.images} pathways of {settings['model']['name']}, {settings['selector']['name']}({chosen})"
    )
    _print_table(
        f"Predicted classes (dead: share of the neurons kept; shared: neurons that {share:.0%} of the pathways keep)",
        ("class", "images", "accuracy", "confidence", "kept", "dead", "shared"),
        [
            (
                str(row["class"]),
                str(row.images),
                _number(row.accuracy),
                _number(row.confidence),
                f"{row.kept:.1f}",
                _number(row.dead_share),
                str(row.class_relevant),
            )
            for _, row in found.classes.iterrows()
        ],
    )
    overlaps = [
        [str(found.overlap[site].within), str(found.overlap[site].between)] if found.overlap else ["-", "-"]
        for site in [*found.sites["site"], "all"]
    ]
    kept = [*found.sites["kept"], found.sites["kept"].sum()]
    neurons = [*found.sites["neurons"], found.sites["neurons"].sum()]
    _print_table(
        f"Sites, and IoU of {found.sampled} images with 95 % intervals",
        ("site", "neurons", "kept", "IoU within classes", "IoU between classes"),
        [
            (site, str(count), f"{mean:.1f}", *overlap)
            for site, count, mean, overlap in zip([*found.sites["site"], "all"], neurons, kept, overlaps, strict=True)
        ],
    )
    if not found.overlap:
        _print("The sample holds too few images of a class to compare; give a larger --sample.")
    if found.extraction.missing:
        _print(f"{found.extraction.missing} images are still to be done: give the extract command again.")


@app.command("explain")
def explain_command(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    model: _Model,
    selector: _Selector = "neuron-mct",
    sparsity: _Sparsity = None,
    target: Annotated[int | None, typer.Option(help="Class to explain, from 0; else the one predicted.")] = None,
    out: Annotated[Path | None, typer.Option(help="Figure to write, such as cat.png or cat.svg.")] = None,
    device: _Device = "cpu",
) -> None:
    """Draw what an image's pathway says of its pixels, beside the plain gradient."""
    network = _network(model, device)
    chosen = _selector(selector, sparsity, model, device)
    x = load_image(image, _size(model)).to(device)
    targets = targets_of(network, x, target)
    maps = {
        "gradient": explain(explainers()["gradient"], network, x, targets),
        "pathway gradient": explain(pathway_gradient(chosen), network, x, targets),
    }
    title = f"{_class_names(model)[int(targets)]}\n{float(confidence(network, x, target=targets)):.1%}"
    figure = show_attributions(x, maps, titles=[title], size=2.5)
    out = Path(f"{image.stem}-explained.png") if out is None else out
    kinds = figure.canvas.get_supported_filetypes()
    if out.suffix[1:].lower() not in kinds:
        raise PathwayError(f"out is {str(out)!r}; give a file name that ends in .{', .'.join(sorted(kinds))}")
    with atomic_write(out) as temporary:
        figure.savefig(temporary, dpi=150)
    _print(f"{out}: {title.replace(chr(10), ' ')}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error that the user can mend ends it with exit code 2 and no traceback."""
    run_app(app, "python -m pathwaylib", arguments)


def _network(name: str, device: str) -> nn.Module:
    try:
        float(torch.zeros((), device=device))  # fails on `meta`, where networks load, but nothing can be computed
        return load_model(name, device=device)
    except (AssertionError, RuntimeError) as error:  # PyTorch's, for a device that it does not have
        reason = str(error).splitlines()[0]
        raise PathwayError(
            f"device is {device!r}, which cannot be used ({reason}); give another, such as cpu"
        ) from error


def _selector(name: str, sparsity: float | None, model: str, device: str) -> Selector:
    require_choice("selector", name, [*SELECTORS, "active", "generator"])
    if name in SELECTORS:
        chosen: Selector = SELECTORS[name](0.9 if sparsity is None else sparsity)
        return chosen
    if sparsity is not None:
        raise PathwayError(f"sparsity is {sparsity}, but {name!r} keeps what it finds; leave it out")
    return ActiveNeurons() if name == "active" else load_generator(f"{model}-generator", device=device)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise PathwayError(f"{path} is no text in UTF-8 ({error}); save it as UTF-8") from error


def _images(images: str) -> ImageSet | str:
    if images == "cifar10":
        return cifar10("test")
    return cifar10("train") if images == "cifar10-train" else images


def _size(model: str) -> int:
    return int(model_card(model).get("size", 32))


def _class_names(model: str) -> tuple[str, ...]:
    if model in PRETRAINED:
        return imagenet_labels()
    return CIFAR10_CLASSES if model.startswith("cifar10") else planted(1).classes


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _print(line: str) -> None:
    Console(soft_wrap=True).print(line, markup=False, highlight=False)


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table, markup=False)


if __name__ == "__main__":
    main()
