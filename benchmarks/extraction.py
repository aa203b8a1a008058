"""Time extraction against its floor, and measure its memory on data sets of different sizes.

One table from one run; speeds are ratios to the floor on the same images in the same minute, so that machines compare.

- *floor*: one plain forward run and one backward pass to the input for each batch, parameters frozen; nothing is kept.
- *from memory*: ``extract`` with NeuronMCT at sparsity 0.95, everything included: scores, selection, Parquet.
- *from files*: the same from PNG files in folders.

Memory is the most that a process of its own held beyond the network, while it extracted from files (on Linux). It
should not grow with the number of images.

Run: ``python benchmarks/extraction.py`` (``--images 64 --counts 100 200 --rounds 1`` for a trial).
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
from itertools import count
from pathlib import Path

import torch
from core import measure
from many_runs import megabytes
from PIL import Image
from torch import nn

from pathwaylib import ImageSet, NeuronMCT, cifar10, load_model
from pathwaylib.extraction import extract

SELECTOR, BATCH = NeuronMCT(0.95), 64


def floor(model: nn.Module, data: ImageSet, images: int) -> torch.Tensor:
    """Run forward and backward to the input, batch by batch."""
    for start in range(0, images, BATCH):
        x = data[start : min(start + BATCH, images)][0].requires_grad_()
        gradient = torch.autograd.grad(model(x).amax(1).sum(), x)[0]
    return gradient


def as_files(data: ImageSet, images: int, folder: Path) -> Path:
    """Write the first images as PNG files."""
    folder.mkdir()
    for index, image in enumerate(data.images[:images]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:06d}.png")
    return folder


def speed(network: str, data: ImageSet, folder: Path, images: int, rounds: int) -> None:
    """Print how fast images become rows, as a ratio to the floor."""
    model, number = load_model(network), count()
    written = []

    def extracted(source: ImageSet | Path) -> torch.Tensor:
        out = folder.with_name(f"out-{next(number)}")
        written.extend(extract(model, source, SELECTOR, out, limit=images, batch_size=BATCH).files)
        return torch.empty(0)

    seconds = measure(
        {
            "floor": lambda: floor(model, data, images),
            "from memory": lambda: extracted(data),
            "from files": lambda: extracted(folder),
        },
        rounds,
    )
    size = written[0].stat().st_size / min(images, 1024)
    print(f"{network}, {images} images, {size / 1000:.1f} kB per pathway")
    for method, times in seconds.items():
        ratios = sorted(base / time for base, time in zip(seconds["floor"], times, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{method:16}{images / statistics.median(times):>10.1f} images/s{spread:>24} of the floor's speed")


def peak_memory(network: str, folder: Path, images: int) -> None:
    """Print how many megabytes an extraction takes at most, in a process of its own."""
    model = load_model(network)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = megabytes("VmRSS")
    out = folder.with_name(f"memory-{images}")
    found = extract(model, folder, SELECTOR, out, limit=images, batch_size=BATCH, shard_size=256)
    print(f"{found.images:>16} images{megabytes('VmHWM') - before:>10} MB", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="cifar10-vgg")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--counts", type=int, nargs="*", default=[1_000, 10_000])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median (least to most)")
    data = cifar10("test")
    with tempfile.TemporaryDirectory() as name:
        folder = as_files(data, max(arguments.images, *arguments.counts, 0), Path(name) / "images")
        speed(arguments.model, data, folder, arguments.images, arguments.rounds)
        if not Path("/proc/self/clear_refs").exists():
            return
        for images in arguments.counts:
            task = (arguments.model, folder, images)
            process = multiprocessing.get_context("spawn").Process(target=peak_memory, args=task)
            process.start()
            process.join()


if __name__ == "__main__":
    main()
