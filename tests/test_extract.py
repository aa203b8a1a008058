"""Extraction: each row is what the library answers for that image, and no accident loses or doubles one."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock
from hypothesis import example, given
from hypothesis import strategies as st
from networks import unchanged
from PIL import Image
from torch import Tensor, nn

from pathwaylib import (
    ActiveNeurons,
    DistillationGuidedRouting,
    GreedyPruning,
    ImageSet,
    NeuronIntGrad,
    NeuronMCT,
    Pathway,
    PathwayError,
    RandomSelection,
    Selector,
    class_overlap,
    class_pathways,
    dead_share,
    integrated_gradients,
    load_model,
    observe,
    planted,
    taylor,
)
from pathwaylib.__main__ import SELECTORS, main
from pathwaylib.extracted import read_extraction
from pathwaylib.extraction import extract
from pathwaylib.pictures import UnreadableImage, files_below, read_picture
from pathwaylib.summary import load_pathways, summarise

SITES = ("relu_0", "relu_1", "relu_2", "relu_3")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_model("planted-cnn")


@pytest.fixture(scope="module")
def data() -> ImageSet:
    return planted(30, seed=4)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, data: ImageSet) -> Path:
    """The images as files, in a folder per class; the same names in every folder."""
    root = tmp_path_factory.mktemp("photos")
    for index, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
        path = root / data.classes[int(label)] / f"{index // 4:03d}-{index % 4}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return root


def rows_of(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(file) for file in read_extraction(folder).files])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*.parquet"))}


# --- what a row says ---


def first_order(model: nn.Module, x: Tensor) -> Sequence[Tensor]:
    return taylor(model, x).scores


def as_drawn(selector: Selector, first: str) -> Selector:
    """Seed what draws at random as an extraction does for the batch that begins with an image."""
    if not isinstance(selector, RandomSelection):
        return selector
    seed = int.from_bytes(hashlib.sha256(first.encode()).digest()[:4])
    return replace(selector, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("selector", "scores"),
    [
        (NeuronMCT(0.95), first_order),
        (NeuronIntGrad(0.9, n_steps=4), lambda model, x: integrated_gradients(model, x, n_steps=4).scores),
        (GreedyPruning(0.9, steps=3, revive=True), first_order),
        (ActiveNeurons(), first_order),
        (RandomSelection(0.9), first_order),
    ],
    ids=lambda value: type(value).__name__,
)
def test_rows_are_what_the_library_answers(
    tmp_path: Path,
    model: nn.Module,
    data: ImageSet,
    selector: Selector,
    scores: Callable[[nn.Module, Tensor], Sequence[Tensor]],
) -> None:
    few = ImageSet(data.images[:11], data.labels[:11], data.classes)
    found = extract(model, few, selector, tmp_path, batch_size=4, shard_size=6)
    assert (found.images, found.missing, found.remarks) == (11, 0, ())
    rows = rows_of(tmp_path).to_pydict()
    assert rows["id"] == [f"{index:08d}" for index in range(11)]
    assert rows["label"] == [data.classes[label] for label in few.labels.tolist()]
    # Batches of four inside shards of six.
    for part in (slice(0, 4), slice(4, 6), slice(6, 10), slice(10, 11)):
        x = few[part][0]
        logits = model(x)
        assert rows["prediction"][part] == logits.argmax(1).tolist()
        assert rows["confidence"][part] == pytest.approx(logits.softmax(1).amax(1).tolist(), abs=1e-6)
        pathway = as_drawn(selector, rows["id"][part.start])(model, x)
        dead = dead_share(pathway, observe(model, x)) * pathway.sizes
        assert rows["dead"][part] == dead.round().int().tolist()
        contributions = scores(model, x)
        for site, mask, values in zip(pathway.sites, pathway.masks, contributions, strict=True):
            for index, (bits, score) in enumerate(zip(mask.flatten(1), values.flatten(1), strict=True), part.start):
                assert rows[f"kept_{site}"][index] == bits.nonzero()[:, 0].tolist()
                assert rows[f"contribution_{site}"][index] == score[bits].half().tolist()


# Steps so small that the gates stay as they were drawn.
UNTRAINED = DistillationGuidedRouting(0.9, iterations=1, learning_rate=1e-6, start="random")


@pytest.mark.parametrize(
    "selector",
    [RandomSelection(0.9), RandomSelection(0.9, active_only=True), UNTRAINED],
    ids=("random", "random active", "routing"),
)
def test_what_is_drawn_is_drawn_anew_for_every_image(
    tmp_path: Path, model: nn.Module, data: ImageSet, selector: Selector
) -> None:
    extract(model, data, selector, tmp_path / "out", batch_size=4, shard_size=10)
    _, pathway = load_pathways(tmp_path / "out")
    # Were it the same for every batch, each image would meet its like three images on.
    drawn = pathway.flatten().double().corrcoef().fill_diagonal_(0)
    assert float(drawn.max()) < 0.99
    before = files_of(tmp_path / "out")
    (tmp_path / "out" / "part-000001.parquet").unlink()
    extract(model, data, selector, tmp_path / "out", batch_size=4, shard_size=10)
    assert files_of(tmp_path / "out") == before


def test_greedy_with_revival_keeps_dead_neurons_which_are_counted(tmp_path: Path, model: nn.Module) -> None:
    # Else the comparison above would compare zeros.
    extract(model, planted(4), GreedyPruning(0.9, steps=3, revive=True), tmp_path)
    assert min(rows_of(tmp_path)["dead"].to_pylist()) > 0


def test_columns_and_metadata(tmp_path: Path, model: nn.Module, data: ImageSet) -> None:
    found = extract(model, data, NeuronMCT(0.95), tmp_path, name="planted-cnn")
    schema = pq.read_schema(found.files[0])
    assert schema.names[:5] == ["id", "label", "prediction", "confidence", "dead"]
    for site in SITES:
        assert schema.field(f"kept_{site}").type.value_type == pa.int32()
        assert schema.field(f"contribution_{site}").type.value_type == pa.float16()
    noted = json.loads(schema.metadata[b"pathwaylib"])
    assert noted == found.settings == json.loads((tmp_path / "run.json").read_text())
    assert noted["selector"] == {"name": "NeuronMCT", "sparsity": 0.95}
    assert noted["model"]["name"] == "planted-cnn"
    assert noted["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert noted["sites"]["relu_3"] == [32, 16, 16]


def test_the_hash_is_of_the_weights(tmp_path: Path, data: ImageSet) -> None:
    def noted(model: nn.Module, folder: str) -> str:
        return str(extract(model, data, NeuronMCT(0.95), tmp_path / folder).settings["model"]["sha256"])

    model = load_model("planted-cnn")
    before = noted(model, "a")
    assert noted(load_model("planted-cnn"), "b") == before
    with torch.no_grad():
        next(model.parameters())[0, 0, 0, 0] += 1e-3
    assert noted(model, "c") != before


def test_contributions_beyond_half_precision_stay_finite(tmp_path: Path, data: ImageSet) -> None:
    model = load_model("planted-cnn")
    with torch.no_grad():
        model[-1].weight.mul_(1e9)
    extract(model, data, NeuronMCT(0.99), tmp_path)
    values = np.concatenate([np.concatenate(rows_of(tmp_path)[f"contribution_{site}"].to_pylist()) for site in SITES])
    assert np.isfinite(values).all()
    assert np.abs(values).max() == 65504


def test_the_caller_s_network_and_images_stay_as_they_were(tmp_path: Path, model: nn.Module, data: ImageSet) -> None:
    before = data.images.clone()
    with unchanged(model):
        extract(model, data, NeuronMCT(0.95), tmp_path)
    assert torch.equal(data.images, before)


# --- files as images ---


def test_files_give_the_rows_of_their_pixels(tmp_path: Path, model: nn.Module, data: ImageSet, photos: Path) -> None:
    extract(model, data, NeuronMCT(0.95), tmp_path / "memory", batch_size=1)
    extract(model, photos, NeuronMCT(0.95), tmp_path / "files", batch_size=1, classes=data.classes)
    rows, files = rows_of(tmp_path / "memory").to_pylist(), rows_of(tmp_path / "files").to_pylist()
    names = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    assert [row["id"] for row in files] == names
    by_content = {json.dumps([row["label"], row["kept_relu_0"], row["contribution_relu_2"]]) for row in rows}
    assert {json.dumps([row["label"], row["kept_relu_0"], row["contribution_relu_2"]]) for row in files} == by_content
    assert len(by_content) == len(data)


def test_a_limit_takes_the_first_images(tmp_path: Path, model: nn.Module, data: ImageSet, photos: Path) -> None:
    extract(model, data, NeuronMCT(0.95), tmp_path / "memory", limit=7, batch_size=4)
    assert rows_of(tmp_path / "memory")["id"].to_pylist() == [f"{index:08d}" for index in range(7)]
    found = extract(model, photos, NeuronMCT(0.95), tmp_path / "files", limit=7, shard_size=4)
    assert (found.images, found.missing) == (7, 0)
    assert rows_of(tmp_path / "files")["id"].to_pylist() == list(files_below(photos))[:7]
    assert extract(model, data, NeuronMCT(0.95), tmp_path / "more", limit=99).images == len(data)


def test_a_label_below_0_is_none(tmp_path: Path, model: nn.Module, data: ImageSet) -> None:
    extract(model, ImageSet(data.images[:3], torch.tensor([1, -1, 0]), data.classes), NeuronMCT(0.95), tmp_path)
    assert rows_of(tmp_path)["label"].to_pylist() == [data.classes[1], None, data.classes[0]]


def test_images_outside_folders_have_no_label(tmp_path: Path, model: nn.Module) -> None:
    for name in ("top.png", "dog/one.png", "dog/deep/two.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (40, 40), "red").save(path)
    extract(model, str(tmp_path / "images"), NeuronMCT(0.95), tmp_path / "out")
    rows = rows_of(tmp_path / "out").to_pydict()
    assert dict(zip(rows["id"], rows["label"], strict=True)) == {
        "dog/deep/two.png": "dog",
        "dog/one.png": "dog",
        "top.png": None,
    }


# Only what a file system allows as a name.
PATHS = st.lists(
    st.lists(st.text("ab.-é ", min_size=1, max_size=3).filter(lambda part: part.strip(".")), min_size=1, max_size=3),
    max_size=12,
)


@example(paths=[["a", "1"], ["a.b", "1"], ["a-", "1", "2"], ["a b"], ["ab", "1"], ["a", "b"]])
@given(paths=PATHS)
def test_files_come_in_the_order_of_their_paths(
    tmp_path_factory: pytest.TempPathFactory, paths: list[list[str]]
) -> None:
    root = tmp_path_factory.mktemp("walk")
    made = set()
    for parts in paths:
        path = root.joinpath(*parts)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError:  # there is a file of that name
            continue
        if not path.is_dir():
            path.touch()
            made.add("/".join(parts))
    assert list(files_below(root)) == sorted(made)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG that claims this size."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = struct.pack(">I", 1000) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data


COLOUR = Image.fromarray(planted(1).images[0].permute(1, 2, 0).numpy())
# What a file holds; what is told of it ("" for nothing) and whether it has a row.
ODD = {
    "plain.png": (encoded(COLOUR, "PNG"), "", True),
    "no suffix": (encoded(COLOUR, "JPEG"), "", True),
    "truncated.jpg": (encoded(COLOUR, "JPEG")[:-50], "damaged", False),
    "truncated.png": (encoded(COLOUR, "PNG")[:500], "damaged", False),
    "header.jpg": (encoded(COLOUR, "JPEG")[:300], "damaged", False),
    "header.gif": (b"GIF89a", "not an image of a known format", False),
    "grey.png": (encoded(COLOUR.convert("L"), "PNG"), "greyscale", True),
    "bits.png": (encoded(COLOUR.convert("1"), "PNG"), "greyscale", True),
    "clear.png": (encoded(COLOUR.convert("RGBA"), "PNG"), "transparency", True),
    "grey_clear.png": (encoded(COLOUR.convert("LA"), "PNG"), "greyscale, transparency", True),
    "print.jpg": (encoded(COLOUR.convert("CMYK"), "JPEG"), "CMYK", True),
    "print.tif": (encoded(COLOUR.convert("CMYK"), "TIFF"), "CMYK", True),
    "deep.png": (
        encoded(Image.fromarray(np.full((40, 40), 32896, np.uint16)), "PNG"),
        "greyscale, 16 bits per channel",
        True,
    ),
    "float.tif": (encoded(COLOUR.convert("F"), "TIFF"), "32 bits per channel; convert it to 8 bits", False),
    "film.gif": (
        encoded(Image.new("RGB", (8, 8), "red"), "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8))]),
        "several frames",
        True,
    ),
    "dot.png": (encoded(Image.new("RGB", (1, 1), "red"), "PNG"), "", True),
    "line.png": (encoded(Image.new("RGB", (3000, 1), "red"), "PNG"), "", True),
    "huge.png": (png_header(9_500, 9_500), "more than 89 million pixels", False),
    "bomb.png": (png_header(60_000, 60_000), "more than 89 million pixels", False),
    "empty.png": (b"", "empty file", False),
    "notes.txt": (b"Not an image at all.", "not an image of a known format", False),
    # Pillow would hand PostScript to another program.
    "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format", False),
    "one/same.png": (encoded(COLOUR, "PNG"), "", True),
    "two/same.png": (encoded(COLOUR, "PNG"), "", True),
}


@pytest.fixture
def odd(tmp_path: Path) -> tuple[Path, dict[str, tuple[str, bool]]]:
    """A folder of odd images; what is to be told of each, and whether it is to have a row."""
    root = tmp_path / "odd"
    told = {}
    for name, (content, what, kept) in ODD.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        told[name] = (what, kept)
    (root / "link.png").symlink_to("plain.png")
    told["link.png"] = ("", True)
    (root / "lost.png").symlink_to("nowhere.png")
    told["lost.png"] = ("link to nothing", False)
    (root / "around").symlink_to(root, target_is_directory=True)
    told["around"] = ("link to a folder, which is not followed", False)
    if hasattr(os, "mkfifo"):
        os.mkfifo(root / "pipe.png")
        told["pipe.png"] = ("not a regular file", False)
    try:
        Path(os.fsdecode(os.fsencode(root) + b"/gr\xfcn.png")).write_bytes(encoded(COLOUR, "PNG"))
        told["gr\\udcfcn.png"] = ("name that is not valid text; rename the file", False)
    except OSError:  # some file systems refuse such a name
        pass
    return root, told


def test_odd_images_are_told_and_never_stop_a_run(
    tmp_path: Path, model: nn.Module, odd: tuple[Path, dict[str, tuple[str, bool]]]
) -> None:
    root, told = odd
    found = extract(model, root, NeuronMCT(0.95), tmp_path / "out", batch_size=4, shard_size=7)
    assert found.missing == 0
    assert rows_of(tmp_path / "out")["id"].to_pylist() == sorted(name for name, (_, kept) in told.items() if kept)
    expected = Counter((what, "converted" if kept else "skipped") for what, kept in told.values() if what)
    counted: Counter[tuple[str, str]] = Counter()
    for remark in found.remarks:
        what = remark.what.partition(":")[0]  # Pillow's own words on the damage come after it
        counted[what, remark.outcome] += remark.images
        assert told[remark.example][0] == what
    assert counted == expected
    assert [remark.images for remark in found.remarks] == sorted(map(attrgetter("images"), found.remarks), reverse=True)
    # All copies of one image have one pathway.
    rows = {row["id"]: row["kept_relu_1"] for row in rows_of(tmp_path / "out").to_pylist()}
    assert rows["plain.png"] == rows["link.png"] == rows["one/same.png"] == rows["two/same.png"] == rows["clear.png"]
    assert rows["plain.png"] != rows["grey.png"]


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("L", (9, 9), 77), "PNG", (77, 77, 77)),
        (Image.new("RGBA", (9, 9), (255, 0, 0, 51)), "PNG", (255, 204, 204)),
        (Image.new("LA", (9, 9), (10, 0)), "PNG", (255, 255, 255)),
        (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        (Image.fromarray(np.full((9, 9), 257 * 100, np.uint16)), "PNG", (100, 100, 100)),
        (Image.fromarray(np.full((9, 9), 65535, np.uint16)), "TIFF", (255, 255, 255)),
    ],
)
def test_converted_pixels(tmp_path: Path, image: Image.Image, kind: str, expected: tuple[int, int, int]) -> None:
    path = tmp_path / "image"
    image.save(path, kind)
    pixels = read_picture(path, 9).pixels
    assert pixels.flatten(1).unique(dim=1).tolist() == [[value] for value in expected]


def test_a_photo_is_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (9, 9), "blue")
    image.paste("red", (0, 0, 9, 4))  # above; lies on the left where the file says that it was turned
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it
    image.save(tmp_path / "image.png", exif=exif)
    pixels = read_picture(tmp_path / "image.png", 9).pixels
    assert torch.equal(pixels[0], torch.rot90(torch.from_numpy(np.array(image))[:, :, 0], -1))
    assert pixels[0, 0].tolist() == [0] * 5 + [255] * 4


def test_an_image_of_the_size_is_taken_as_it_is(tmp_path: Path, data: ImageSet) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(data.images[0].permute(1, 2, 0).numpy()).save(path)
    assert torch.equal(read_picture(path, 32).pixels, data.images[0])


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
@given(places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=5))
def test_damaged_files_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, kind: str, places: list[tuple[float, int]]
) -> None:
    content = bytearray(encoded(COLOUR, kind))
    for place, byte in places:
        content[int(place * len(content))] = byte
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    try:
        assert read_picture(path, 8).pixels.shape == (3, 8, 8)
    except UnreadableImage as error:
        assert error.reason  # noqa: PT017
        assert str(path) in str(error)  # noqa: PT017


# --- runs that are stopped ---


@dataclass(frozen=True)
class Stopping:
    """NeuronMCT that is interrupted when its budget of calls is spent."""

    sparsity: float = 0.95
    budget: ClassVar[int] = 0

    def __call__(self, model: nn.Module, x: Tensor, target: object = None) -> Pathway:
        if not Stopping.budget:
            raise KeyboardInterrupt
        Stopping.budget -= 1
        return NeuronMCT(self.sparsity)(model, x)


def test_a_stopped_run_goes_on_where_it_was(
    tmp_path: Path, model: nn.Module, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: str, budget: int) -> int:
        monkeypatch.setattr(Stopping, "budget", budget)
        extract(model, photos, Stopping(), tmp_path / folder, batch_size=2, shard_size=6)
        return budget - Stopping.budget

    assert run("whole", 100) == 15  # five shards of three batches
    with pytest.raises(KeyboardInterrupt):
        run("stopped", 7)  # in the third shard
    assert list(files_of(tmp_path / "stopped")) == ["part-000000.parquet", "part-000001.parquet"]
    assert not list((tmp_path / "stopped").glob(".part*"))
    found = read_extraction(tmp_path / "stopped")
    assert (found.images, found.missing) == (12, 18)
    before = {path: path.stat().st_mtime_ns for path in found.files}
    assert run("stopped", 100) == 9
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    assert run("stopped", 100) == 0


def test_killed_run_loses_and_doubles_nothing(tmp_path: Path, photos: Path) -> None:
    arguments = ["extract", "--model", "planted-cnn", "--images", str(photos), "--selector", "neuron-intgrad"]
    arguments += ["--shard-size", "2", "--batch-size", "2", "--out"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", "pathwaylib", *arguments, str(killed)],
        env=environment,
        cwd=Path(__file__).parents[1],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(files_of(killed)) < 2 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 2 <= len(files_of(killed)) < 15
    # What a process that dies while it writes leaves behind.
    (killed / ".part-000007-abcdefgh.parquet").write_bytes(b"half of a fi")
    for folder in (killed, whole):
        with pytest.raises(SystemExit, match="0"):
            main([*arguments, str(folder)])
    assert files_of(killed) == files_of(whole)
    assert len(files_of(whole)) == 15
    ids = rows_of(killed)["id"].to_pylist()
    assert ids == sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    assert not list(killed.glob(".part*"))


@pytest.mark.parametrize("damage", ["truncated", "empty", "gone"])
def test_a_damaged_file_is_done_again(tmp_path: Path, model: nn.Module, data: ImageSet, damage: str) -> None:
    def run() -> dict[str, bytes]:
        extract(model, data, NeuronMCT(0.95), tmp_path, shard_size=10)
        return files_of(tmp_path)

    whole = run()
    path = tmp_path / "part-000001.parquet"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[path.name][:1000] if damage == "truncated" else b"")
    assert read_extraction(tmp_path).missing == 10
    assert run() == whole


def test_a_full_disk_leaves_no_half_file(
    tmp_path: Path, model: nn.Module, data: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "add_key_value_metadata", full)
        with pytest.raises(OSError, match="No space left"):
            extract(model, data, NeuronMCT(0.95), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "run.json"]
    assert extract(model, data, NeuronMCT(0.95), tmp_path).images == 30


def test_a_folder_holds_one_run(tmp_path: Path, model: nn.Module, data: ImageSet, photos: Path) -> None:
    fewer = ImageSet(data.images[:20], data.labels[:20], data.classes)
    extract(model, fewer, NeuronMCT(0.95), tmp_path)
    before = files_of(tmp_path)
    other = load_model("planted-shortcut")
    for call, key in (
        (lambda: extract(model, fewer, NeuronMCT(0.9), tmp_path), "selector was .*0.95.*now .*0.9"),
        (lambda: extract(model, fewer, NeuronIntGrad(0.95), tmp_path), "selector was .*NeuronMCT.*NeuronIntGrad"),
        (lambda: extract(other, fewer, NeuronMCT(0.95), tmp_path), "model was"),
        (lambda: extract(model, data, NeuronMCT(0.95), tmp_path), "images was .*20.*now .*30"),
        (lambda: extract(model, photos, NeuronMCT(0.95), tmp_path, classes=data.classes), "images was"),
        (lambda: extract(model, fewer, NeuronMCT(0.95), tmp_path, batch_size=8), "batch_size was 64, now 8"),
        (lambda: extract(model, fewer, NeuronMCT(0.95), tmp_path, shard_size=8), "shard_size was 1024, now 8"),
    ):
        with pytest.raises(PathwayError, match=f"holds another run: {key}.*Give another folder"):
            call()
    assert files_of(tmp_path) == before


def test_an_image_that_changed_makes_another_run(tmp_path: Path, model: nn.Module) -> None:
    root = tmp_path / "images"
    root.mkdir()
    Image.new("RGB", (40, 40), "red").save(root / "a.bmp")
    size = (root / "a.bmp").stat().st_size
    extract(model, root, NeuronMCT(0.95), tmp_path / "out")
    for side, larger in ((90, True), (40, False)):  # other pixels, and no byte more
        Image.new("RGB", (side, side), "blue").save(root / "a.bmp")
        assert ((root / "a.bmp").stat().st_size > size) == larger
        with pytest.raises(PathwayError, match="holds another run: images was"):
            extract(model, root, NeuronMCT(0.95), tmp_path / "out")


@dataclass(frozen=True)
class Adding:
    """NeuronMCT during which somebody puts one more file beside the images."""

    folder: str

    def __call__(self, model: nn.Module, x: Tensor, target: object = None) -> Pathway:
        (Path(self.folder) / "more.png").touch()
        return NeuronMCT(0.95)(model, x)


def test_images_that_change_during_a_run_are_noticed(tmp_path: Path, model: nn.Module) -> None:
    root = tmp_path / "images"
    root.mkdir()
    Image.new("RGB", (40, 40), "red").save(root / "a.png")
    with pytest.raises(PathwayError, match="changed while it was read"):
        extract(model, root, Adding(str(root)), tmp_path / "out")


@dataclass(frozen=True)
class ComingAndGoing:
    """NeuronMCT during which a file appears, at its first call, and is gone again at its second."""

    image: str
    passing: str

    def __call__(self, model: nn.Module, x: Tensor, target: object = None) -> Pathway:
        passing = Path(self.passing)
        passing.unlink() if passing.exists() else shutil.copy(self.image, passing)
        return NeuronMCT(0.95)(model, x)


def test_files_that_pass_by_cost_no_image(tmp_path: Path, model: nn.Module) -> None:
    root = tmp_path / "images"
    for name in ("a/1.png", "b/1.png"):
        (root / name).parent.mkdir(parents=True)
        Image.new("RGB", (40, 40), "red").save(root / name)
    selector = ComingAndGoing(str(root / "a" / "1.png"), str(root / "b" / "0.png"))
    # The file that passes is taken for the second of two; what there is at the end is what there was.
    with pytest.raises(PathwayError, match="changed while it was read"):
        extract(model, root, selector, tmp_path / "out", shard_size=1)


def test_one_process_at_a_time(tmp_path: Path, model: nn.Module, data: ImageSet) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(PathwayError, match="another process is writing to"):
        extract(model, data, NeuronMCT(0.95), tmp_path)


# --- what cannot be done ---


def test_what_cannot_be_extracted(tmp_path: Path, model: nn.Module, data: ImageSet, photos: Path) -> None:
    mct = NeuronMCT(0.95)
    (tmp_path / "file").touch()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "other.parquet").touch()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text('{"format": ')
    drawing = RandomSelection(0.9, generator=torch.Generator())
    images, labels = data.images[:2], data.labels[:2]
    floats, lone = ImageSet(images / 255, labels, data.classes), ImageSet(images, labels[:1], data.classes)
    none, beyond = ImageSet(images[:0], labels[:0], data.classes), ImageSet(images, labels * 0 + 4, data.classes)
    out = tmp_path / "out"
    for call, message in (
        (lambda: extract(model, tmp_path / "absent", mct, out), "images is '.*absent', which is no folder"),
        (lambda: extract(model, tmp_path / "file", mct, out), "images is '.*file', which is no folder"),
        (lambda: extract(model, tmp_path / "nothing", mct, out), "there is no file in .*nothing"),
        (lambda: extract(model, photos, mct, photos / "out"), "lies inside"),
        (lambda: extract(model, photos, mct, photos), "lies inside"),
        (lambda: extract(model, data, mct, tmp_path / "file"), "file is a file; give a folder"),
        (lambda: extract(model, data, mct, tmp_path / "strange"), "Parquet files of unknown origin"),
        (lambda: extract(model, data, mct, tmp_path / "damaged"), r"run\.json is damaged"),
        (lambda: extract(model, data, drawing, out), "generator of RandomSelection is a Generator"),
        (lambda: extract(model, data, lambda *_: None, out), "the selector is a function"),
        (lambda: extract(model, data, mct, out, batch_size=0), "batch_size is 0"),
        (lambda: extract(model, data, mct, out, shard_size=0), "shard_size is 0"),
        (lambda: extract(model, photos, mct, out, size=0), "size is 0"),
        (lambda: extract(model, photos, mct, out, readers=0), "readers is 0"),
        (lambda: extract(model, data, mct, out, workers=0), "workers is 0"),
        (lambda: extract(model, data, mct, out, limit=0), "limit is 0"),
        (lambda: extract(model, data, mct, out, engine="spark"), "engine is 'spark'; choose 'local' or 'ray'"),
        (lambda: extract(model, data, mct, out, workers=2), "workers is 2, but engine is 'local'"),
        (lambda: extract(model, data, mct, out, size=64), "images of 32 x 32 pixels, size is 64; give images of that"),
        (lambda: extract(model, data, mct, out, classes=data.classes[:3]), "3 names, the network gives 4 logits"),
        (lambda: extract(model, photos, mct, out, classes="abcd"), "classes is 'abcd'; give a list of names"),
        (
            lambda: extract(model, floats, mct, out),
            r"holds torch.float32 \(2, 3, 32, 32\) and 2 labels; give images as",
        ),
        (lambda: extract(model, lone, mct, out), r"holds torch.uint8 \(2, 3, 32, 32\) and 1 labels"),
        (lambda: extract(model, none, mct, out), r"holds torch.uint8 \(0, 3, 32, 32\) and 0 labels"),
        (lambda: extract(model, beyond, mct, out), "holds the label 4 and names 4 classes"),
        (lambda: extract(model, photos, mct, out, size=2), r"does not take images of shape \(3, 2, 2\).*size="),
        (lambda: extract(load_model("planted-cnn").train(), data, mct, out), "training mode"),
        (lambda: load_pathways(tmp_path), "holds no extraction"),
        (lambda: summarise(tmp_path / "absent"), "holds no extraction"),
    ):
        with pytest.raises(PathwayError, match=message):
            call()
    assert not out.exists()


def test_a_folder_without_one_readable_image(tmp_path: Path, model: nn.Module) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "notes.txt").write_text("text")
    found = extract(model, tmp_path / "images", NeuronMCT(0.95), tmp_path / "out")
    assert (found.images, found.missing) == (0, 0)
    assert [remark.example for remark in found.remarks] == ["notes.txt"]
    for call in (summarise, load_pathways):
        with pytest.raises(PathwayError, match="has no row"):
            call(tmp_path / "out")


# --- reading it back ---


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory, model: nn.Module, data: ImageSet) -> Path:
    folder = tmp_path_factory.mktemp("a [strange] name*") / "out"
    extract(model, data, GreedyPruning(0.9, steps=3, revive=True), folder, batch_size=30, shard_size=30)
    return folder


def test_pathways_come_back(extracted: Path, model: nn.Module, data: ImageSet) -> None:
    expected = GreedyPruning(0.9, steps=3, revive=True)(model, data[:][0])
    table, pathway = load_pathways(extracted)
    assert table["id"].tolist() == [f"{index:08d}" for index in range(30)]
    assert pathway.sites == expected.sites
    assert all(torch.equal(one, other) for one, other in zip(pathway.masks, expected.masks, strict=True))
    assert torch.equal(pathway.targets, expected.targets)
    table, some = load_pathways(extracted, ["00000017", "00000002"])
    assert table["id"].tolist() == ["00000017", "00000002"]
    assert table.index.tolist() == [0, 1]
    assert torch.equal(some.flatten(), expected[[17, 2]].flatten())
    assert torch.equal(some.targets, expected.targets[[17, 2]])
    for ids in ([], ["00000002", "00000017", "00000002"]):
        with pytest.raises(PathwayError, match=f"ids holds {len(ids)} ids, of which .* give at least one, each once"):
            load_pathways(extracted, ids)
    with pytest.raises(PathwayError, match="has no row '7'; ids are such as '00000000'"):
        load_pathways(extracted, ["00000002", "7"])


def test_summary_against_the_pathways_themselves(extracted: Path, model: nn.Module, data: ImageSet) -> None:
    x, labels = data[:]
    pathway = GreedyPruning(0.9, steps=3, revive=True)(model, x)
    predicted = pathway.targets
    found = summarise(extracted, share=0.5)
    table = found.classes.set_index("class")
    assert list(table.index) == list(data.classes)
    probability = model(x).softmax(1).amax(1)
    dead = dead_share(pathway, observe(model, x)) * pathway.sizes
    for index, name in enumerate(data.classes):
        members = predicted == index
        row = table.loc[name]
        assert row["images"] == int(members.sum())
        assert row["accuracy"] == pytest.approx(float((labels == predicted)[members].double().mean()))
        assert row["confidence"] == pytest.approx(float(probability[members].mean()), abs=1e-6)
        assert row["kept"] == pytest.approx(float(pathway.sizes[members].double().mean()))
        assert row["dead_share"] == pytest.approx(float(dead[members].sum() / pathway.sizes[members].sum()), abs=1e-6)
        frequencies = tuple(mask[members].double().mean(0)[None] for mask in pathway.masks)
        assert row["class_relevant"] == int(class_pathways(frequencies, pathway.sites, share=0.5).sizes)
    assert found.sites["neurons"].tolist() == [mask[0].numel() for mask in pathway.masks]
    np.testing.assert_allclose(found.sites["kept"], pathway.site_sizes.double().mean(0))
    assert found.sampled == 30
    assert found.overlap == class_overlap(pathway, predicted)


def test_a_sample_is_spread_over_the_images(extracted: Path, data: ImageSet, model: nn.Module) -> None:
    found = summarise(extracted, sample=15)
    every_second = list(range(0, 30, 2))
    expected = GreedyPruning(0.9, steps=3, revive=True)(model, data[:][0])[every_second]
    assert found.sampled == 15
    assert found.overlap["all"].within.value == pytest.approx(
        class_overlap(expected, expected.targets)["all"].within.value
    )
    assert summarise(extracted, sample=1).overlap == {}


@pytest.mark.parametrize("inside", [".", "tee"])  # images with a label, and without one
def test_classes_without_names(tmp_path: Path, model: nn.Module, photos: Path, inside: str) -> None:
    extract(model, photos / inside, NeuronMCT(0.95), tmp_path)
    table = summarise(tmp_path).classes
    assert set(table["class"]) <= {"0", "1", "2", "3"}
    assert table["accuracy"].isna().all()
    assert table["images"].sum() == len(list((photos / inside).rglob("*.png")))


def test_a_damaged_body_is_an_error_of_ours(tmp_path: Path, model: nn.Module, data: ImageSet) -> None:
    found = extract(model, data, NeuronMCT(0.95), tmp_path)
    content = bytearray(found.files[0].read_bytes())
    content[100 : len(content) // 2] = bytes(len(content) // 2 - 100)  # the end, which says where all is, stays
    found.files[0].write_bytes(content)
    for call in (summarise, load_pathways):
        with pytest.raises(PathwayError, match=r"is damaged.*extract again"):
            call(tmp_path)


# --- the command line ---


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_commands(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    code, shown, _ = run(
        capsys, "extract", "--model", "planted-cnn", "--images", photos, "--sparsity", 0.95, "--out", out
    )
    assert code == 0
    assert f"30 pathways in 1 files of {out}" in shown
    assert read_extraction(out).settings["classes"] == ["cross", "square", "saltire", "tee"]
    code, shown, _ = run(capsys, "summarise", out)
    assert code == 0
    assert "30 pathways of planted-cnn, NeuronMCT(sparsity=0.95)" in shown
    assert all(word in shown for word in ("saltire", "relu_3", "all"))
    figure = tmp_path / "figure.png"
    image = next(photos.rglob("*.png"))
    code, shown, _ = run(capsys, "explain", image, "--model", "planted-cnn", "--out", figure)
    assert code == 0
    assert f"{figure}: {image.parent.name} 100.0%" in shown
    with Image.open(figure) as drawn:
        assert min(drawn.size) > 100


def test_folders_whose_name_is_not_text(tmp_path: Path, photos: Path) -> None:
    strange = tmp_path / os.fsdecode(b"gr\xfcn")
    command = [sys.executable, "-m", "pathwaylib", "extract", "--model", "planted-cnn", "--no-progress"]
    shutil.copytree(photos / "tee", strange / "tee")

    def run(images: Path, out: Path) -> subprocess.CompletedProcess[str]:
        arguments = [*command, "--images", str(images), "--out", str(out)]
        return subprocess.run(arguments, capture_output=True, text=True, check=False)

    done = run(strange, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert read_extraction(tmp_path / "out").images == len(list((photos / "tee").iterdir()))
    refused = run(photos, strange / "out")  # Arrow cannot open it
    assert refused.returncode == 2
    assert "which is not valid text; give another name" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_an_interrupted_command_says_how_to_go_on(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("extract", "--model", "planted-cnn", "--images", photos, "--limit", 20, "--shard-size", 8, "--out")
    monkeypatch.setitem(SELECTORS, "neuron-mct", Stopping)
    monkeypatch.setattr(Stopping, "budget", 2)
    code, shown, errors = run(capsys, *command, tmp_path / "out")
    assert code == 130
    assert f"What is whole in {tmp_path / 'out'} stays: give the same command again" in shown
    assert "Traceback" not in errors
    assert read_extraction(tmp_path / "out").missing == 4
    monkeypatch.setattr(Stopping, "budget", 1)
    assert run(capsys, *command, tmp_path / "out")[0] == 0
    assert read_extraction(tmp_path / "out").missing == 0


def test_the_table_of_odd_images(
    tmp_path: Path, odd: tuple[Path, dict[str, tuple[str, bool]]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, _ = run(
        capsys, "extract", "--model", "planted-cnn", "--images", odd[0], "--out", tmp_path / "out", "--no-progress"
    )
    assert code == 0
    for line in ("greyscale, transparency", "link to nothing", "empty file", "skipped", "converted"):
        assert line in shown


def test_bad_input_is_told_with_exit_code_2(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)
    extraction = ("extract", "--model", "planted-cnn", "--images", photos, "--out", tmp_path / "out")
    explanation = ("explain", "--model", "planted-cnn")
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "latin.txt").write_bytes("Mäuse".encode("latin-1"))
    image = next(photos.rglob("*.png"))
    cases: list[tuple[tuple[object, ...], str]] = [
        ((*extraction, "--model", "no-such"), "there is no model 'no-such'; choose one of cifar10-vgg"),
        ((*extraction, "--images", "absent"), "images is 'absent', which is no folder"),
        ((*extraction, "--selector", "mct"), "selector is 'mct'; choose 'neuron-mct' or"),
        ((*extraction, "--selector", "generator"), "there is no generator 'planted-cnn-generator'"),
        ((*extraction, "--sparsity", 1.5), "sparsity is 1.5; give a number in [0, 1)"),
        ((*extraction, "--batch-size", 0), "batch_size is 0; give a whole number"),
        ((*extraction, "--engine", "spark"), "engine is 'spark'; choose 'local' or 'ray'"),
        ((*extraction, "--device", "nonsense"), "device is 'nonsense', which cannot be used"),
        ((*extraction, "--classes", "absent.txt"), "absent.txt"),
        ((*extraction, "--classes", "latin.txt"), "latin.txt is no text in UTF-8"),
        ((*extraction, "--classes", "notes.txt"), "classes holds 1 names, the network gives 4 logits"),
        ((*extraction, "--selector", "active", "--sparsity", 0.9), "sparsity is 0.9, but 'active' keeps what it finds"),
        ((*extraction, "--workers", 2), "workers is 2, but engine is 'local'"),
        ((*extraction, "--device", "meta"), "device is 'meta', which cannot be used"),
        ((*explanation, image, "--device", "meta"), "device is 'meta', which cannot be used"),
        ((*explanation, image, "--selector", "generator", "--sparsity", 0.5), "'generator' keeps what it finds"),
        (("summarise", tmp_path), "holds no extraction"),
        ((*explanation, "notes.txt"), "notes.txt cannot be read as an image: not an image of a known format"),
        ((*explanation, "absent.png"), "absent.png cannot be read as an image: there is no such file"),
        ((*explanation, image, "--target", 99), "target [99] is out of range"),
        ((*explanation, image, "--out", "figure.xyz"), "out is 'figure.xyz'; give a file name that ends in"),
        (("extract", "--model", "planted-cnn"), "Missing option"),
        ((*extraction, "--sparsity", "much"), "Invalid value for '--sparsity'"),
        (("extrakt",), "No such command"),
    ]
    for arguments, message in cases:
        code, _, errors = run(capsys, *arguments)
        assert code == 2, arguments
        assert message in errors
        assert "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latin.txt", "notes.txt"]


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, _ = run(capsys, "--help")
    assert code == 0
    assert all(command in shown for command in ("extract", "summarise", "explain"))


# --- many workers ---

# A selector of the main module reaches the workers by value. It notes every process it runs in, and in a worker waits
# until there is a second one.
RAY_SCRIPT = """
import os, sys, time
from dataclasses import dataclass
from pathlib import Path
import torch
from pathwaylib import NeuronMCT, load_model
from pathwaylib.extraction import extract

@dataclass(frozen=True)
class Noting:
    notes: str
    first: int

    def __call__(self, model, x, target=None):
        (Path(self.notes) / str(os.getpid())).touch()
        end = time.monotonic() + 60
        while os.getpid() != self.first and len(os.listdir(self.notes)) < 3 and time.monotonic() < end:
            time.sleep(0.05)
        return NeuronMCT(0.95)(model, x)

torch.set_num_threads(1)
images, out, notes = sys.argv[1:]
for engine in ("local", "ray"):
    extract(load_model("planted-cnn"), images, Noting(notes, os.getpid()), Path(out) / engine, batch_size=4,
            shard_size=6, engine=engine, workers=2 if engine == "ray" else None)
"""


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: the extra `cluster`")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="there is one processor")
def test_ray_s_workers_write_the_same_files(tmp_path: Path, photos: Path) -> None:
    script, notes = tmp_path / "script.py", tmp_path / "notes"
    script.write_text(RAY_SCRIPT)
    notes.mkdir()
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, script, photos, tmp_path / "out", notes], check=True, env=environment)
    assert len(list(notes.iterdir())) >= 3  # this process and two workers
    local, ray = files_of(tmp_path / "out" / "local"), files_of(tmp_path / "out" / "ray")
    assert len(local) == 5
    assert ray == local


def test_ray_is_asked_for_where_it_is_not_installed(
    tmp_path: Path, model: nn.Module, data: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PathwayError, match=r"not installed; pip install 'pathwaylib\[cluster\]'"):
        extract(model, data, NeuronMCT(0.95), tmp_path, engine="ray")
