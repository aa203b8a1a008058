"""Remove and retrain: exactly the right pixels go, scores survive an interruption, and the verdict is the right one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pathwaylib import ImageSet, PathwayError, explain, explainers, load_model, planted
from pathwaylib.architectures import planted_cnn
from pathwaylib.evaluation import roar
from pathwaylib.evaluation.roar import mean_colour, remove_and_retrain, remove_pixels, score_images
from pathwaylib.training import Recipe


def images_of(count: int, side: int, seed: int) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(1, 256, (count, 3, side, side), generator=generator).byte()  # none is 0, the fill below
    return ImageSet(pixels, torch.zeros(count).long(), ("a",))


BLACK = torch.zeros(3, dtype=torch.uint8)


@given(st.integers(1, 4), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99), st.booleans())
def test_exactly_the_most_relevant_pixels_are_removed(
    count: int, side: int, fraction: float, seed: int, ties: bool
) -> None:
    data = images_of(count, side, seed)
    scores = torch.randn(count, side, side, generator=torch.Generator().manual_seed(seed))
    scores = scores.round() if ties else scores
    before = data.images.clone()
    left = remove_pixels(data, scores, fraction, fill=BLACK)
    gone = (left.images == 0).all(1)
    assert torch.equal(data.images, before)
    assert torch.equal(left.images.permute(0, 2, 3, 1)[~gone], before.permute(0, 2, 3, 1)[~gone])
    assert gone.flatten(1).sum(1).tolist() == [round(fraction * side * side)] * count
    for score, removed in zip(scores, gone, strict=True):
        if removed.any() and not removed.all():
            assert score[removed].min() >= score[~removed].max()


def test_fraction_0_changes_nothing_and_1_leaves_nothing() -> None:
    data = images_of(3, 8, 0)
    scores = torch.rand(3, 8, 8)
    assert torch.equal(remove_pixels(data, scores, 0.0).images, data.images)
    assert (remove_pixels(data, scores, 1.0).images == mean_colour(data).view(1, 3, 1, 1)).all()


def test_ties_are_broken_at_random_by_the_seed() -> None:
    data = images_of(400, 8, 0)
    flat = torch.zeros(400, 8, 8)
    first, again, other = (remove_pixels(data, flat, 0.5, fill=BLACK, seed=seed).images for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # No place is preferred: of 400 images each pixel is removed in about half (the bound is 5 standard deviations).
    share = (first == 0).all(1).double().mean(0)
    assert float((share - 0.5).abs().max()) < 5 * 0.5 / 400**0.5


def test_mean_colour() -> None:
    data = images_of(50, 8, 3)
    assert torch.equal(mean_colour(data), data.images.double().mean((0, 2, 3)).round().byte())


@pytest.mark.parametrize(
    ("scores", "fraction"),
    [(torch.rand(2, 8, 8), 0.5), (torch.full((3, 8, 8), torch.nan), 0.5), (torch.rand(3, 8, 8), 1.5)],
)
def test_unusable_scores_and_fractions_are_refused(scores: Tensor, fraction: float) -> None:
    with pytest.raises(PathwayError):
        remove_pixels(images_of(3, 8, 0), scores, fraction)


@pytest.mark.parametrize(
    "fill",
    [
        torch.tensor([0.5, 0.5, 0.5]),  # would be black
        torch.tensor([300, 300, 300]),  # would wrap to 44
        torch.zeros(2, dtype=torch.uint8),
        torch.zeros(1, dtype=torch.uint8),
        torch.zeros(1, 3, dtype=torch.uint8),
        0,
    ],
)
def test_fills_that_are_no_colour_are_refused(fill: Tensor) -> None:
    with pytest.raises(PathwayError, match=r"fill is .*; give uint8 \(3,\) in 0 to 255, such as mean_colour\(data\)"):
        remove_pixels(images_of(3, 8, 0), torch.rand(3, 8, 8), 0.5, fill=fill)


def test_removal_keeps_everything_but_the_images() -> None:
    data = planted(n=4, shortcut=1.0)
    left = remove_pixels(data, torch.rand(4, 32, 32), 0.5)
    assert data.shortcut_masks is not None
    assert not torch.equal(left.images, data.images)
    for name in ("labels", "classes", "masks", "shortcut_masks", "shortcut_labels"):
        assert getattr(left, name) is getattr(data, name)


def test_a_checkpoint_of_another_fraction_is_refused(tmp_path: Path) -> None:
    data, recipe, path = planted(32), Recipe(epochs=1, batch_size=16, crop_padding=0), tmp_path / "run.pt"
    scores = torch.rand(32, 32, 32)

    def retrained(fraction: float) -> roar.Retrained:
        return remove_and_retrain(
            planted_cnn, data, data, (scores, scores), fraction, recipe, checkpoint=path, progress=False
        )

    log = retrained(0.1).log
    assert retrained(0.1).log == log
    with pytest.raises(PathwayError, match=r"run\.pt holds a run of another recipe \(data: "):
        retrained(0.9)


def test_scores_go_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roar, "_SHARD", 4)
    model, data, gradient = load_model("planted-cnn"), planted(n=10), explainers()["gradient"]
    seen: list[int] = []

    def interrupted(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(x))
        return gradient(model, x, target)

    with pytest.raises(KeyboardInterrupt):
        score_images(interrupted, model, data, folder=tmp_path, progress=False)
    seen.clear()
    found = score_images(interrupted, model, data, folder=tmp_path, progress=False)
    assert seen == [2]  # the last shard alone
    monkeypatch.undo()
    assert torch.equal(found, score_images(gradient, model, data, progress=False))
    maps = explain(gradient, model, data[:10][0]).abs().amax(1)
    assert torch.allclose(found.float(), maps / maps.amax((1, 2), keepdim=True), atol=1e-3)


@pytest.mark.parametrize("other", [planted(n=2, seed=1), planted(n=1)])
def test_scores_of_other_images_are_refused(other: ImageSet, tmp_path: Path) -> None:
    model, gradient = load_model("planted-cnn"), explainers()["gradient"]
    score_images(gradient, model, planted(n=2), folder=tmp_path, progress=False)
    with pytest.raises(PathwayError, match="scores of other images; remove it"):
        score_images(gradient, model, other, folder=tmp_path, progress=False)


def test_a_zero_map_has_scores_that_are_no_nan() -> None:
    nothing = score_images(lambda model, x, target: torch.zeros_like(x), load_model("planted-cnn"), planted(n=2))
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_without_the_glyph_nothing_can_be_learned() -> None:
    # Planted images: who removes the glyph leaves no information, who removes other pixels leaves all of it.
    def patches(count: int, seed: int) -> ImageSet:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(2, (count,), generator=generator)
        pixels = torch.randint(100, 156, (count, 3, 12, 12), generator=generator).byte()
        mask = torch.zeros(count, 12, 12, dtype=torch.bool)
        mask[:, 4:8, 4:8] = True
        pixels = torch.where(mask[:, None], (labels * 255).byte().view(-1, 1, 1, 1), pixels)
        return ImageSet(pixels, labels, ("dark", "bright"), mask)

    train, test = patches(512, 0), patches(256, 1)
    assert train.masks is not None
    assert test.masks is not None
    recipe = Recipe(epochs=4, batch_size=32, peak_lr=0.05, crop_padding=0)
    found = {}
    for name, sign in (("glyph", 1.0), ("rest", -1.0)):
        scores = (sign * train.masks.float(), sign * test.masks.float())
        retrained = remove_and_retrain(
            lambda: planted_cnn(width=4, classes=2), train, test, scores, 0.5, recipe, bfloat16=False, progress=False
        )
        found[name] = retrained.accuracy
        assert retrained.correct.double().mean() == retrained.accuracy
        assert len(retrained.log) == 4
    assert found["rest"] > 0.95
    assert found["glyph"] < 0.65
