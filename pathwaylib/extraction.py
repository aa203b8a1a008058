"""Pathways of whole data sets: image by image into Parquet files, however many images there are.

Images → shards of consecutive images → one Parquet file each, written whole or not at all. A shard depends on nothing
but its own images, so a run that was stopped does the shards that are missing, and workers on many machines do them in
any order: the files are the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .contributions import Contributions, integrated_gradients, taylor
from .data import ImageSet
from .errors import PathwayError, require_at_least_one, require_choice
from .extracted import FORMAT, Extraction, agree, alone_in, read_extraction, schema_of, shard_in, shard_path
from .files import atomic_write, digest_of
from .neurons import input_like, observe
from .pathway import Pathway
from .pictures import Picture, UnreadableImage, printable
from .selectors import NeuronIntGrad, NeuronMCT, Selector
from .sources import Files, InMemory, noted

Engine = Literal["local", "ray"]

_HALF = torch.finfo(torch.float16).max


def extract(
    model: nn.Module,
    images: ImageSet | str | os.PathLike[str],
    selector: Selector,
    folder: str | os.PathLike[str],
    *,
    size: int | None = None,
    limit: int | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
    batch_size: int = 64,
    shard_size: int = 1024,
    readers: int = 4,
    engine: Engine = "local",
    workers: int | None = None,
    progress: bool = False,
) -> Extraction:
    """Select the pathway of every image of a data set and write it to Parquet files in a folder.

    One row per image, in the order of the ids, with the columns

    - ``id``: a file's path inside its folder, or the position in an image set, eight digits long;
    - ``label``: the image's class by name; of a file, the first folder on its path; null where there is none;
    - ``prediction``: the class predicted, counted from 0, and ``confidence``, its softmax probability;
    - ``dead``: how many of the pathway's neurons are dead on the image;
    - for each site, ``kept_relu_0`` and so on: the neurons kept, as ascending positions in the flattened site;
    - for each site, ``contribution_relu_0`` and so on: their signed contributions to the response of the predicted
      class, in float16: what NeuronIntGrad ranks by, for other selectors the first-order ones (:func:`taylor`).

    Each file's metadata says how it came about (``pathwaylib``: the selector, the SHA-256 of the network's weights and
    of its layers as they are printed, the shape of each site, versions) and which image files were odd (``remarks``).
    Files that cannot be read as an image are left out, see :func:`read_picture`; they never stop a run.

    A run that was stopped, even by ``kill -9``, is taken up by the same call: complete files are kept, and nothing is
    lost or written twice. A folder holds one run: a call with other settings, images or versions is refused. (Image
    files are told apart by name, size and time of change: to read a million of them would take hours.) The memory does
    not grow with the number of images.

    Args:
        model: a network in eval mode that takes float images ``(B, 3, H, W)`` in [0, 1], on any device.
        images: an image set, or a folder of image files, searched with all its subfolders.
        selector: any selector whose settings are plain values. One that draws at random draws anew for each batch,
            seeded by the id of the batch's first image; one that holds a generator of its own is refused, since its
            pathways would depend on where a run was stopped.
        folder: where to write; made if it is not there.
        size: height and width to which image files are brought: the largest centred square, scaled; 32 if left out. A
            file that has the size already is taken as it is, and images of an image set must have it.
        limit: take only as many images, the first ones.
        classes: names of the network's classes in the order of its logits; an image set's own if left out.
        name: of the network, to be noted with its hash.
        batch_size: images to run at once.
        shard_size: images per Parquet file: what a run that is stopped loses at most, per worker, and how many may wait
            in memory, at a byte per pixel and channel, where they are read faster than the network takes them.
        readers: threads that read image files ahead of the network.
        engine: ``"local"`` does one shard after another; ``"ray"`` spreads them as a Ray Data job over the machines of
            the Ray cluster that is reachable, else over this machine's processors. All must see the same folders.
            Every worker runs as many threads as this process (``torch.set_num_threads``), on a GPU if the network is
            on one; so on the CPU the files are byte for byte those of the local loop. (This process then holds the
            names of all files.)
        workers: shards at the same time with ``"ray"``; as many as fit if left out.
        progress: show a progress bar.

    Returns:
        An :class:`Extraction`.

    Raises:
        PathwayError: if an argument is out of range, the images do not fit the network, the folder holds another run
            or is being written by another process, or ``"ray"`` is not installed.

    Example:
        >>> import tempfile
        >>> from pathwaylib import load_model, planted
        >>> folder = Path(tempfile.mkdtemp())
        >>> found = extract(load_model("planted-cnn"), planted(20), NeuronMCT(0.95), folder)
        >>> found.images, [file.name for file in found.files]
        (20, ['part-000000.parquet'])
        >>> pq.read_table(found.files[0]).column_names[:6]
        ['id', 'label', 'prediction', 'confidence', 'dead', 'kept_relu_0']
    """
    optional = {"size": size, "limit": limit, "workers": workers}
    given = {key: value for key, value in optional.items() if value is not None}
    require_at_least_one(batch_size=batch_size, shard_size=shard_size, readers=readers, **given)
    require_choice("engine", engine, get_args(Engine))
    if workers is not None and engine != "ray":
        raise PathwayError(f"workers is {workers}, but engine is {engine!r}; give engine='ray', or leave workers out")
    folder = Path(folder)
    if printable(str(folder)) != str(folder):
        raise PathwayError(f"folder is {printable(str(folder))!r}, which is not valid text; give another name")
    source = (
        InMemory.of(images, size, limit)
        if isinstance(images, ImageSet)
        else Files.below(Path(images), folder, size or 32, limit)
    )
    fingerprint = source.fingerprint()
    sites, logits = _seen(model, source.shape())
    if classes is None and isinstance(images, ImageSet):
        classes = images.classes
    if isinstance(classes, str):
        raise PathwayError(f"classes is {classes!r}; give a list of names, one for each of {logits} logits")
    if classes is not None and len(classes) != logits:
        raise PathwayError(
            f"classes holds {len(classes)} names, the network gives {logits} logits; give a name for each"
        )
    settings = {
        "format": FORMAT,
        "model": {
            "name": name or type(model).__name__,
            "sha256": digest_of(model.state_dict()),
            "layers": hashlib.sha256(repr(model).encode()).hexdigest(),  # weights do not tell a ReLU from a GELU
            "device": input_like(model).device.type,
        },
        "selector": _described(selector),
        "images": fingerprint,
        "batch_size": batch_size,
        "shard_size": shard_size,
        "classes": list(classes) if classes is not None else None,
        "sites": sites,
        "versions": {package: version(package) for package in ("pathwaylib", "torch", "pillow", "pyarrow")},
    }
    job = _Job(model, source, selector, folder, batch_size, readers, schema_of(settings))
    with alone_in(folder):
        agree(folder, settings)
        count = fingerprint["count"]
        starts = range(0, count, shard_size)
        done = {number for number in range(len(starts)) if shard_in(shard_path(folder, number)) is not None}
        handed_out = hashlib.sha256()
        ids = noted(source.ids(), handed_out)
        todo = ((number, names) for number, names in enumerate(_chunks(ids, shard_size)) if number not in done)
        before = sum(min(shard_size, count - starts[number]) for number in done)
        with tqdm(total=count, initial=before, unit="image", disable=not progress) as bar:
            if engine == "ray":
                _run_with_ray(job, todo, bar.update, workers)
            else:
                for number, names in todo:
                    job.run(number, names, bar.update)
        if fingerprint != source.fingerprint() or fingerprint["ids"] != handed_out.hexdigest():
            raise PathwayError(f"{images} changed while it was read: remove {folder}, and extract from files at rest")
    return read_extraction(folder)


# --- from images to rows ---


class _Labelled(NamedTuple):
    """An image on its way to the network."""

    name: str
    label: str | None
    pixels: Tensor


@dataclass(frozen=True, eq=False)
class _Job:
    """All that a shard needs, wherever it is done."""

    model: nn.Module
    source: InMemory | Files
    selector: Selector
    folder: Path
    batch_size: int
    readers: int
    schema: pa.Schema

    def run(self, number: int, names: Sequence[str], advance: Callable[[int], object] = lambda images: None) -> None:
        """Write the Parquet file of one shard."""
        remarks: list[tuple[str, str, str]] = []
        kept = [field.name for field in self.schema if field.name.startswith("kept_")]
        with (
            atomic_write(shard_path(self.folder, number)) as temporary,
            pq.ParquetWriter(
                temporary,
                self.schema,
                compression="zstd",
                write_page_checksum=True,
                use_dictionary=["label"],
                # Ascending positions differ by little: a byte each instead of four.
                column_encoding={f"{column}.list.element": "DELTA_BINARY_PACKED" for column in kept},
            ) as writer,
            closing(self._readable(names, remarks, advance)) as readable,
        ):
            for images in _chunks(readable, self.batch_size):
                writer.write_batch(self._rows(images))
            writer.add_key_value_metadata({"remarks": json.dumps(remarks)})

    def _readable(
        self, names: Sequence[str], remarks: list[tuple[str, str, str]], advance: Callable[[int], object]
    ) -> Generator[_Labelled, None, None]:
        """Yield the images that can be read, in order; note what was odd about any."""

        def attempt(name: str) -> Picture | UnreadableImage:
            try:
                return self.source.read(name)
            except UnreadableImage as error:
                return error

        with warnings.catch_warnings(), ThreadPoolExecutor(self.readers) as pool:
            warnings.filterwarnings("ignore", module=r"PIL\.")  # of oddities of the files, which the remarks tell
            for name, found in zip(names, pool.map(attempt, names), strict=True):
                advance(1)
                if isinstance(found, UnreadableImage):
                    remarks.append((printable(name), found.reason, "skipped"))
                    continue
                if found.remark:
                    remarks.append((name, found.remark, "converted"))
                yield _Labelled(name, self.source.label(name), found.pixels)

    def _rows(self, images: Sequence[_Labelled]) -> pa.RecordBatch:
        like = input_like(self.model)
        x = torch.stack([image.pixels for image in images]).to(like) / 255
        found = _find(self.model, _seeded(self.selector, images[0].name), x)
        confidence, prediction = found.logits.double().softmax(1).max(1)
        columns: dict[str, pa.Array] = {
            "id": pa.array([image.name for image in images]),
            "label": pa.array([image.label for image in images], pa.string()),
            "prediction": pa.array(prediction.int().cpu().numpy()),
            "confidence": pa.array(confidence.float().cpu().numpy()),
            "dead": pa.array(found.dead.int().cpu().numpy()),
        }
        for site, mask, scores in zip(found.pathway.sites, found.pathway.masks, found.scores.scores, strict=True):
            kept, size = mask.flatten().nonzero()[:, 0], mask[0].numel()
            borders = torch.arange(len(mask) + 1, device=kept.device) * size
            ends = torch.searchsorted(kept, borders).int().cpu().numpy()
            neurons = (kept % size).int().cpu().numpy()
            values = scores.detach().flatten()[kept].clamp(-_HALF, _HALF).half().cpu().numpy()
            columns[f"kept_{site}"] = pa.ListArray.from_arrays(ends, pa.array(neurons))
            columns[f"contribution_{site}"] = pa.ListArray.from_arrays(ends, pa.array(values))
        return pa.RecordBatch.from_pydict(columns, self.schema)


class _Found(NamedTuple):
    """Pathways of a batch, and what else a row tells."""

    pathway: Pathway
    scores: Contributions
    logits: Tensor
    dead: Tensor


def _find(model: nn.Module, selector: Selector, x: Tensor) -> _Found:
    """Select pathways and score their neurons, with no run of the network more than that takes."""
    if type(selector) is NeuronMCT:
        scores = taylor(model, x)
        assert scores.logits is not None
        pathway = scores.top(selector.sparsity)
        return _Found(pathway, scores, scores.logits, torch.zeros(len(x)))  # a dead neuron scores 0 and is not kept
    with torch.no_grad():
        seen = observe(model, x)
    if type(selector) is NeuronIntGrad:
        scores = integrated_gradients(model, x, n_steps=selector.n_steps, batch_size=selector.batch_size)
        pathway = scores.top(selector.sparsity)
    else:
        pathway = selector(model, x)
        scores = taylor(model, x)
    return _Found(pathway, scores, seen.logits, (pathway & ~seen.active()).sizes)


def _seeded(selector: Selector, name: str) -> Selector:
    """Return a selector that draws at random with a seed of its own for an id; without, every batch draws the same."""
    drawing: Any = selector
    if "generator" not in {field.name for field in fields(drawing)}:
        return selector
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
    seeded: Selector = replace(drawing, generator=torch.Generator().manual_seed(seed))
    return seeded


# --- what a run is ---


def _seen(model: nn.Module, shape: tuple[int, ...]) -> tuple[dict[str, list[int]], int]:
    """Return the shape of each site for an image of a shape, and how many logits; raise where it is not taken."""
    x = torch.zeros(1, *shape).to(input_like(model))
    try:
        with torch.no_grad():
            seen = observe(model, x)
    except RuntimeError as error:
        raise PathwayError(
            f"the network does not take images of shape {shape} ({str(error).splitlines()[0]}); give the size it was "
            "trained on as size="
        ) from error
    return {site: list(a.shape[1:]) for site, a in zip(seen.sites, seen.post, strict=True)}, seen.logits.shape[1]


def _described(selector: Selector) -> dict[str, Any]:
    """Return a selector's name and settings."""
    kind: Any = type(selector)
    noted: dict[str, Any] = {"name": kind.__name__}
    if not is_dataclass(kind):
        raise PathwayError(f"the selector is a {noted['name']}; give a dataclass, whose settings can be noted")
    for field in fields(kind):
        value = getattr(selector, field.name)
        if isinstance(value, nn.Module):
            value = digest_of(value.state_dict())
        elif not isinstance(value, str | int | float | None):
            raise PathwayError(
                f"{field.name} of {noted['name']} is a {type(value).__name__}, with which a run that was stopped could "
                "not be taken up; leave it out"
            )
        noted[field.name] = value
    return noted


_Item = TypeVar("_Item")


def _chunks(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


# --- many workers ---


def _run_with_ray(
    job: _Job, todo: Iterable[tuple[int, list[str]]], advance: Callable[[int], object], workers: int | None
) -> None:
    """Do the shards as a Ray Data job, a task each."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise PathwayError("engine is 'ray', which is not installed; pip install 'pathwaylib[cluster]'") from error
    # As text: file names may hold bytes that Arrow's strings do not.
    shards = [{"number": number, "names": json.dumps(names)} for number, names in todo]
    if not shards:
        return
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False  # there is one already
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        stored, threads = ray.put(job), torch.get_num_threads()

        def work(shard: dict[str, Any]) -> dict[str, Any]:
            torch.set_num_threads(threads)
            names = json.loads(shard["names"])
            try:
                ray.get(stored).run(int(shard["number"]), names)
            except (PathwayError, OSError) as error:
                return {"images": 0, "error": str(error)}
            return {"images": len(names), "error": ""}

        processors = max(node["Resources"].get("CPU", 1) for node in ray.nodes())
        dataset = ray.data.from_items(shards, override_num_blocks=len(shards)).map(
            work,
            compute=ray.data.TaskPoolStrategy(size=workers),
            num_cpus=min(threads, processors),
            num_gpus=int(input_like(job.model).device.type == "cuda"),
        )
        for row in dataset.iter_rows():
            if row["error"]:
                raise PathwayError(f"a worker stopped: {row['error']}")
            advance(row["images"])
    finally:
        if started:
            ray.shutdown()
