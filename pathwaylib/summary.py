"""What an extraction says: by class, by site, and how far pathways of one class agree. Read by DuckDB, file by file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import torch

from .errors import PathwayError, require_at_least_one
from .evaluation import ClassOverlap, class_overlap
from .extracted import Extraction, read_extraction, schema_of
from .pathway import Pathway

_COLUMNS = ["id", "label", "prediction", "confidence", "dead"]
_SAMPLE_BYTES = 200_000_000


@dataclass(frozen=True, eq=False)
class Summary:
    """What :func:`summarise` found.

    Attributes:
        extraction: what was summarised.
        classes: a row per predicted class, from 0 as ``prediction`` and by name as ``class``: how many ``images``;
            ``accuracy`` over those whose label is a class of the network; mean ``confidence``; neurons ``kept`` in the
            mean; ``dead_share``, the share of all kept neurons that are dead on their image; ``class_relevant``, how
            many neurons at least a share τ of the class's pathways keep.
        sites: a row per site: its ``neurons``, and how many an image keeps in the mean.
        overlap: IoU within and between predicted classes, by site and for ``"all"``, from a sample of the images;
            empty where the sample holds too few images of a class.
        sampled: how many images the sample holds.
    """

    extraction: Extraction
    classes: pd.DataFrame
    sites: pd.DataFrame
    overlap: dict[str, ClassOverlap]
    sampled: int


def summarise(folder: str | os.PathLike[str], *, sample: int | None = None, share: float = 0.3) -> Summary:
    """Summarise an extraction, a stopped one too: class frequency, dead share, overlap within and between classes.

    The rows stay in their files. Only for the overlap, which compares every two images, a sample is read: images
    evenly spread over the ids, so that the same ones are taken every time.

    Args:
        folder: written by :func:`extract`.
        sample: images to compare; as many as 200 MB hold at a byte per neuron, at most 500, if left out.
        share: τ, in (0, 1].

    Raises:
        PathwayError: if the folder holds no extraction, no row, or a damaged file; if an argument is out of range.

    Example:
        >>> import tempfile
        >>> from pathwaylib import NeuronMCT, load_model, planted
        >>> from pathwaylib.extraction import extract
        >>> folder = tempfile.mkdtemp()
        >>> _ = extract(load_model("planted-cnn"), planted(40), NeuronMCT(0.95), folder)
        >>> found = summarise(folder)
        >>> found.classes["class"].tolist(), int(found.classes["images"].sum())
        (['cross', 'square', 'saltire', 'tee'], 40)
        >>> float(found.classes["dead_share"].max())
        0.0
        >>> found.sampled, list(found.overlap)
        (40, ['relu_0', 'relu_1', 'relu_2', 'relu_3', 'all'])
    """
    if not 0 < share <= 1:
        raise PathwayError(f"share is {share}; give the share of a class's pathways that must keep a neuron, in (0, 1]")
    extraction = _extraction(folder)
    sites = {site: int(np.prod(shape)) for site, shape in extraction.settings["sites"].items()}
    if sample is None:
        sample = max(2, min(500, _SAMPLE_BYTES // sum(sites.values())))
    require_at_least_one(sample=sample)
    with _rows(extraction) as connection:
        classes = _classes(connection, extraction.settings["classes"], list(sites), share)
        means = ", ".join(f"avg(len({_kept(site)}))" for site in sites)
        kept = connection.execute(f"select {means} from pathways").fetchall()[0]
    chosen, pathway = _load(extraction, _spread(extraction, sample))
    try:
        overlap = class_overlap(pathway, torch.tensor(chosen["prediction"].to_numpy()))
    except PathwayError:  # a class of one image, or one class
        overlap = {}
    table = pd.DataFrame({"site": list(sites), "neurons": list(sites.values()), "kept": kept})
    return Summary(extraction, classes, table, overlap, len(chosen))


def load_pathways(folder: str | os.PathLike[str], ids: Sequence[str] | None = None) -> tuple[pd.DataFrame, Pathway]:
    """Read pathways of an extraction back.

    Args:
        folder: written by :func:`extract`.
        ids: of which images, each once; all if left out, at a byte per neuron and image.

    Returns:
        A table with ``id``, ``label``, ``prediction``, ``confidence`` and ``dead``, in the order in which the ids are
        given, and the pathways in the same order, with the predicted classes as targets.

    Raises:
        PathwayError: if the folder holds no extraction or a damaged file, there is no row with an id, or no id is
            given or one twice.

    Example:
        >>> import tempfile
        >>> from pathwaylib import NeuronMCT, load_model, planted
        >>> from pathwaylib.extraction import extract
        >>> folder, net, data = tempfile.mkdtemp(), load_model("planted-cnn"), planted(4)
        >>> _ = extract(net, data, NeuronMCT(0.95), folder)
        >>> table, pathway = load_pathways(folder, ["00000001", "00000003"])
        >>> bool(pathway.iou(NeuronMCT(0.95)(net, data[[1, 3]][0])).min() == 1)
        True
    """
    extraction = _extraction(folder)
    if ids is not None and not 0 < len(set(ids)) == len(ids):
        raise PathwayError(f"ids holds {len(ids)} ids, of which {len(set(ids))} differ; give at least one, each once")
    table, pathway = _load(extraction, ids)
    if ids is None:
        return table, pathway
    if unknown := set(ids) - set(table["id"]):
        raise PathwayError(f"{folder} has no row {min(unknown)!r}; ids are such as {_spread(extraction, 1)[0]!r}")
    order = pd.Index(table["id"]).get_indexer(pd.Index(ids))
    return table.iloc[order].reset_index(drop=True), pathway[torch.from_numpy(order)]


def _load(extraction: Extraction, ids: Sequence[str] | None) -> tuple[pd.DataFrame, Pathway]:
    """Read the table and the pathways of the images there are among these, or of all."""
    shapes: dict[str, list[int]] = extraction.settings["sites"]
    kept = {site: f"kept_{site}" for site in shapes}
    rows = _read(extraction, [*_COLUMNS, *kept.values()], ids)
    masks = tuple(_mask(rows[kept[site]].combine_chunks(), shape) for site, shape in shapes.items())
    table = rows.select(_COLUMNS).to_pandas()
    return table, Pathway(masks, tuple(shapes), torch.tensor(table["prediction"].to_numpy()).long())


def _extraction(folder: str | os.PathLike[str]) -> Extraction:
    """Return an extraction that has rows."""
    extraction = read_extraction(folder)
    if not extraction.images:
        raise PathwayError(f"the extraction in {folder} has no row; see its remarks, or run it again")
    return extraction


def _dataset(extraction: Extraction) -> pyarrow.dataset.Dataset:
    """Return the rows, of the columns and kinds that they should be, checked as they are read."""
    scanned = pyarrow.dataset.ParquetFragmentScanOptions(page_checksum_verification=True)
    columns = [field for field in schema_of(extraction.settings) if not field.name.startswith("contribution_")]
    return pyarrow.dataset.dataset(
        list(map(str, extraction.files)),
        schema=pa.schema(columns),
        format=pyarrow.dataset.ParquetFileFormat(default_fragment_scan_options=scanned),
    )


def _read(extraction: Extraction, columns: list[str], ids: Sequence[str] | None = None) -> pa.Table:
    """Read some columns, of all rows or of some, in the order of the ids."""
    wanted = None if ids is None else pyarrow.dataset.field("id").isin(list(ids))
    try:
        rows = _dataset(extraction).to_table(columns, filter=wanted)
        for name in set(columns) - {"label"}:
            if rows[name].null_count:
                raise pa.ArrowInvalid(f"{name} is missing in {rows[name].null_count} rows")
        if "prediction" in columns and len(rows) and pc.min(rows["prediction"]).as_py() < 0:
            raise pa.ArrowInvalid("a prediction is negative")
        return rows
    except (OSError, pa.ArrowException) as error:
        raise _damaged(error) from error


def _damaged(error: Exception) -> PathwayError:
    line = str(error).splitlines()[0]
    return PathwayError(f"a file of the extraction is damaged ({line}); remove it, and extract again")


def _spread(extraction: Extraction, sample: int) -> list[str]:
    """Return the ids of images evenly spread over all."""
    ids = _read(extraction, ["id"])["id"]
    count = min(sample, len(ids))
    return [ids[place * len(ids) // count].as_py() for place in range(count)]


def _mask(kept: pa.ListArray, shape: Sequence[int]) -> torch.Tensor:
    """Return bits ``(B, ...)`` from lists of positions."""
    counts = kept.value_lengths().to_numpy(zero_copy_only=False)
    size, neurons = math.prod(shape), kept.flatten()
    if neurons.null_count or (len(neurons) and not 0 <= pc.min(neurons).as_py() <= pc.max(neurons).as_py() < size):
        raise _damaged(pa.ArrowInvalid(f"a neuron that is kept is none of the {size} of its site"))
    bits = np.zeros((len(kept), size), dtype=bool)
    bits[np.repeat(np.arange(len(kept)), counts), neurons.to_numpy()] = True
    return torch.from_numpy(bits).view(len(kept), *shape)


@contextmanager
def _rows(extraction: Extraction) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open the rows as the view ``pathways``."""
    with duckdb.connect() as connection:
        connection.execute("set enable_progress_bar = false")  # in a notebook it would stay in the output
        try:
            # Through Arrow, which looks at the checksums.
            connection.register("pathways", _dataset(extraction))
            yield connection
        except (duckdb.Error, OSError, pa.ArrowException) as error:
            raise _damaged(error) from error


def _kept(site: str) -> str:
    """Return the column of a site as SQL has names; a stranger's site may be called anything."""
    return '"' + f"kept_{site}".replace('"', '""') + '"'


def _classes(
    connection: duckdb.DuckDBPyConnection, names: Sequence[str] | None, sites: Sequence[str], share: float
) -> pd.DataFrame:
    kept = " + ".join(f"len({_kept(site)})" for site in sites)
    neurons = " union all ".join(
        f"select prediction, {place} as site, unnest({_kept(site)}) as neuron from pathways"
        for place, site in enumerate(sites)
    )
    found: pd.DataFrame = connection.execute(
        f"""
        with named as (
            select *, {kept} as kept,
                case when $names is null then prediction::varchar else $names[prediction + 1] end as class
            from pathways
        ), by_class as (
            select prediction, class, count(*) as images,
                avg((label = class)::int) filter (list_contains($names, label)) as accuracy,
                avg(confidence) as confidence, avg(kept) as kept, sum(dead) / greatest(sum(kept), 1) as dead_share
            from named group by all
        ), frequencies as (
            select prediction, site, neuron, count(*) as pathways from ({neurons}) group by all
        ), relevant as (
            select prediction, count(*) as class_relevant
            from frequencies join by_class using (prediction)
            where frequencies.pathways >= $share * images group by all
        )
        select by_class.*, coalesce(class_relevant, 0) as class_relevant
        from by_class left join relevant using (prediction) order by prediction
        """,
        {"names": list(names) if names is not None else None, "share": share},
    ).df()
    return found
