"""Training: interrupted equals uninterrupted, and it learns."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pathwaylib import PathwayError, planted, training
from pathwaylib.architectures import planted_cnn, resnet
from pathwaylib.checkpoints import resume_checkpoint, store_checkpoint
from pathwaylib.data import ImageSet
from pathwaylib.files import digest_of
from pathwaylib.training import Recipe, accuracy, augment, initialise, predictions, train_classifier

RECIPE = Recipe(epochs=3, batch_size=16, peak_lr=0.05, crop_padding=2, seed=5)
DATA = planted(40, seed=0)


def network() -> nn.Module:
    return planted_cnn(width=4)


def train(
    checkpoint: Path | str | None = None, recipe: Recipe = RECIPE, model: nn.Module | None = None
) -> tuple[nn.Module, list]:
    model = model or network()
    return model, train_classifier(model, DATA, recipe, checkpoint=checkpoint, progress=False, bfloat16=False)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_training_is_determined_by_its_recipe() -> None:
    first, second = network(), initialise(network(), 99)  # it starts anew whatever the weights were
    before = torch.get_rng_state()
    _, log = train(model=first)
    _, again = train(model=second)
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(first, second)
    assert log == again
    other, _ = train(recipe=replace(RECIPE, seed=6))
    assert not equal(first, other)
    assert not first.training
    assert all(p.grad is None and p.requires_grad for p in first.parameters())


@pytest.mark.parametrize("epochs_before", [1, 2])
@pytest.mark.parametrize("with_norms", [False, True])
def test_resumed_is_uninterrupted_bit_for_bit(
    epochs_before: int, with_norms: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fresh() -> nn.Module:
        return resnet(8, width=4, classes=4) if with_norms else network()

    whole, log = train(tmp_path / "whole.pt", model=fresh())
    path = tmp_path / "interrupted.pt"
    store, stored = training.store_checkpoint, []

    def store_and_die(*arguments: object, **options: object) -> None:
        store(*arguments, **options)
        stored.append(arguments)
        if len(stored) == epochs_before:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "store_checkpoint", store_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(path, model=fresh())
    resumed, resumed_log = train(path, model=fresh())
    assert equal(whole, resumed)
    assert resumed_log == log
    assert [row["epoch"] for row in log] == [1, 2, 3]
    assert path.with_suffix(".csv").read_text() == (tmp_path / "whole.csv").read_text()


def test_killed_in_the_middle_of_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = train()
    path, cut = tmp_path / "run.pt", training.augment
    batches = 0

    def dies_in_the_second_epoch(*arguments: object, **options: object) -> Tensor:
        nonlocal batches
        batches += 1
        if batches == 4:
            raise RuntimeError("the power went out")
        return cut(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training, "augment", dies_in_the_second_epoch)
        with pytest.raises(RuntimeError, match=r"power"):
            train(path)
    resumed, log = train(path)
    assert equal(whole, resumed)
    assert len(log) == 3


def test_finished_run_is_not_run_again(tmp_path: Path) -> None:
    whole, log = train(tmp_path / "run.pt")
    modified = (tmp_path / "run.pt").stat().st_mtime_ns
    again, same_log = train(tmp_path / "run.pt")
    assert equal(whole, again)
    assert log == same_log
    assert (tmp_path / "run.pt").stat().st_mtime_ns == modified


def test_log_on_disk(tmp_path: Path) -> None:
    _, log = train(tmp_path / "run.pt")
    with (tmp_path / "run.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    for row, logged in zip(rows, log, strict=True):
        assert float(row["loss"]) == pytest.approx(logged["loss"], abs=1e-4)
        assert float(row["accuracy"]) == pytest.approx(logged["accuracy"], abs=1e-4)
        assert 0 <= logged["accuracy"] <= 1
    assert {path.name for path in tmp_path.iterdir()} == {"run.pt", "run.csv"}


@pytest.mark.parametrize("change", [{"epochs": 4}, {"seed": 0}, {"peak_lr": 0.1}, {"batch_size": 8}])
def test_checkpoint_of_another_recipe_is_refused(change: dict[str, float], tmp_path: Path) -> None:
    train(tmp_path / "run.pt")
    content = (tmp_path / "run.pt").read_bytes()
    with pytest.raises(PathwayError, match=r"run\.pt holds a run of another recipe"):
        train(tmp_path / "run.pt", replace(RECIPE, **change))
    assert (tmp_path / "run.pt").read_bytes() == content


def test_warm_restart_goes_on_from_the_weights_given() -> None:
    still = replace(RECIPE, peak_lr=1e-30, epochs=1)  # steps too small to change a float32
    model, before = initialise(network(), 77), initialise(network(), 77)
    train_classifier(model, DATA, still, fresh=False, progress=False, bfloat16=False)
    assert equal(model, before)
    train_classifier(model, DATA, still, progress=False, bfloat16=False)
    assert equal(model, initialise(network(), RECIPE.seed))


@pytest.mark.parametrize("change", ["images", "labels", "bfloat16", "fresh", "initial weights"])
def test_checkpoint_of_another_training_is_refused(change: str, tmp_path: Path) -> None:
    """What decides a training besides the recipe: or the log of another run would be returned, and nothing trained."""
    path, fresh = tmp_path / "run.pt", change not in ("fresh", "initial weights")
    given = {"fresh": fresh, "bfloat16": False, "checkpoint": path, "progress": False}
    train_classifier(initialise(network(), 1), DATA, RECIPE, **given)
    train_classifier(initialise(network(), 1), DATA, RECIPE, **given)  # the same again is none
    content = path.read_bytes()
    data, seed = DATA, 1
    if change == "images":
        data = replace(DATA, images=255 - DATA.images)
    elif change == "labels":
        data = replace(DATA, labels=DATA.labels.flip(0))
    elif change == "initial weights":
        seed = 2
    else:
        given[change] = not given[change]
    named = "data" if change in ("images", "labels") else change
    with pytest.raises(PathwayError, match=rf"run\.pt holds a run of another recipe .*{named}: .* there, .* here"):
        train_classifier(initialise(network(), seed), data, RECIPE, **given)
    assert path.read_bytes() == content


@pytest.mark.parametrize("fresh", [False, True])
def test_a_refused_checkpoint_leaves_the_network_as_it_was(fresh: bool, tmp_path: Path) -> None:
    """Networks that differ in their last layer alone: the first ones would fit."""
    path = tmp_path / "run.pt"
    model, before = (initialise(planted_cnn(width=4, classes=5), 77).eval() for _ in range(2))
    store_checkpoint(path, {"model": network()}, {}, [{"epoch": 1}])
    with pytest.raises(PathwayError, match=r"run\.pt is of another network \(.* differ\)"):
        resume_checkpoint(path, {"model": model}, {})
    path.unlink()
    given = {"fresh": fresh, "checkpoint": path, "bfloat16": False, "progress": False}
    train_classifier(network(), DATA, RECIPE, **given)
    with pytest.raises(PathwayError, match=r"of another"):
        train_classifier(model, DATA, RECIPE, **given)
    assert equal(model, before)
    assert not model.training


def test_a_part_that_is_missing_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    model, before, path = initialise(network(), 1), initialise(network(), 1), tmp_path / "run.pt"
    store_checkpoint(path, {"model": network()}, {}, [{"epoch": 1}])
    with pytest.raises(PathwayError, match=r"of another network \('draws'\)"):
        resume_checkpoint(path, {"model": model, "draws": torch.Generator()}, {})
    assert equal(model, before)


def test_names_with_a_dot_have_logs_of_their_own(tmp_path: Path) -> None:
    for index, name in enumerate(("gradient-0.3", "gradient-0.7", "run.pt")):
        store_checkpoint(tmp_path / name, {"model": network()}, {}, [{"epoch": index}])
    logs = {path.name: path.read_text() for path in tmp_path.glob("*.csv")}
    assert logs == {"gradient-0.3.csv": "epoch\n0\n", "gradient-0.7.csv": "epoch\n1\n", "run.csv": "epoch\n2\n"}
    with pytest.raises(PathwayError, match=r"run\.csv has the name of a log; give the checkpoint another, .* run\.pt"):
        store_checkpoint(tmp_path / "run.csv", {"model": network()}, {}, [{"epoch": 1}])
    assert (tmp_path / "run.csv").read_text() == "epoch\n2\n"


def test_checkpoint_may_be_a_string(tmp_path: Path) -> None:
    whole, log = train()
    for _ in range(2):
        model, found = train(str(tmp_path / "run.pt"))
        assert equal(model, whole)
        assert found == log


def test_dropout_is_drawn_from_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reproducible, the same after an interruption, and nothing of it touches the caller's draws."""

    def dropping() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 32 * 32, 4))

    before = torch.get_rng_state()
    whole, log = train(model=dropping())
    torch.manual_seed(1)
    again, same_log = train(model=dropping())
    assert equal(whole, again)
    assert log == same_log
    assert not equal(whole, train(recipe=replace(RECIPE, seed=6), model=dropping())[0])

    def store_and_die(*arguments: object) -> None:
        store_checkpoint(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    path = tmp_path / "run.pt"
    with monkeypatch.context() as patch:
        patch.setattr(training, "store_checkpoint", store_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(path, model=dropping())
    assert equal(train(path, model=dropping())[0], whole)
    torch.set_rng_state(before)
    model = dropping()
    before = torch.get_rng_state()
    train(model=model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": -1}, "epochs is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"peak_lr": 0.0}, r"peak_lr is 0\.0; give a number above 0"),
        ({"peak_lr": float("nan")}, "peak_lr is nan"),
        ({"peak_lr": float("inf")}, "peak_lr is inf"),
        ({"warmup": 1.1}, r"warmup is 1\.1; give a share of the steps in \[0, 1\]"),
        ({"warmup": float("nan")}, "warmup is nan"),
        ({"momentum": 0.0}, r"momentum is 0\.0"),
        ({"momentum": 1.0}, r"momentum is 1\.0"),
        ({"weight_decay": -1e-4}, r"weight_decay is -0\.0001"),
        ({"label_smoothing": 1.0}, r"label_smoothing is 1\.0"),
        ({"label_smoothing": -0.1}, r"label_smoothing is -0\.1"),
        ({"crop_padding": -1}, "crop_padding is -1; give whole pixels, or 0"),
        ({"crop_padding": 1.5}, r"crop_padding is 1\.5"),
        ({"cutout": -1}, "cutout is -1"),
    ],
    ids=str,
)
def test_recipes_out_of_range_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(PathwayError, match=message):
        replace(RECIPE, **change)


def test_crops_that_the_images_are_too_small_for() -> None:
    with pytest.raises(PathwayError, match=r"crop_padding is 32, the images have 32x32 pixels; give fewer"):
        train(recipe=replace(RECIPE, crop_padding=32))


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path: Path) -> None:
    with pytest.raises(PathwayError, match=r"the loss is (nan|inf) after epoch 1; lower peak_lr, which is 1e\+30"):
        train(tmp_path / "run.pt", replace(RECIPE, peak_lr=1e30))
    assert not list(tmp_path.iterdir())


def test_predictions_refuse_what_cannot_be_counted() -> None:
    model = resnet(8, width=4, classes=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PathwayError, match=r"training mode"):
        accuracy(model, DATA)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(PathwayError, match=r"batch_size is 0"):
        predictions(model.eval(), DATA, batch_size=0)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(PathwayError, match=r"logits that are not finite"):
        predictions(model, DATA)


def test_predictions_of_a_network_in_double_precision() -> None:
    model = network().eval()
    assert torch.equal(predictions(model, DATA), predictions(model.double(), DATA))


def test_too_few_images() -> None:
    with pytest.raises(PathwayError, match=r"40 images are fewer than a batch of 41"):
        train(recipe=replace(RECIPE, batch_size=41))


def test_it_learns() -> None:
    # Two colours, which a network must tell apart within seconds.
    labels = torch.arange(128) % 2
    images = (labels.view(-1, 1, 1, 1) * 120 + 40).expand(-1, 3, 12, 12).to(torch.uint8)
    data = ImageSet(images.contiguous(), labels, ("dark", "bright"))
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))
    log = train_classifier(
        model, data, Recipe(epochs=12, batch_size=16, peak_lr=0.1, crop_padding=0), progress=False, bfloat16=False
    )
    assert accuracy(model, data) == 1
    assert log[-1]["loss"] < log[0]["loss"]


def test_accuracy_counts() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.answer = nn.Parameter(torch.tensor([0.0, 3.0, 1.0, 2.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.answer.expand(len(x), -1)

    for batch_size in (1, 7, 500):
        assert accuracy(Constant().eval(), DATA, batch_size=batch_size) == pytest.approx(
            float((DATA.labels == 1).float().mean())
        )


# --- augmentation ---


def test_augmentation_shifts_and_mirrors_and_nothing_else() -> None:
    padding = 2
    images = torch.arange(2 * 3 * 6 * 6).view(2, 3, 6, 6).float().repeat(100, 1, 1, 1)
    kept = images.clone()
    found = augment(images, padding, torch.Generator().manual_seed(0))
    assert torch.equal(images, kept)
    padded = torch.nn.functional.pad(images[:2], [padding] * 4, mode="reflect")
    seen = set()
    for index, image in enumerate(found):
        options = {}
        for mirrored in (False, True):
            source = padded[index % 2].flip(2) if mirrored else padded[index % 2]
            for dy in range(2 * padding + 1):
                for dx in range(2 * padding + 1):
                    options[mirrored, dy, dx] = source[:, dy : dy + 6, dx : dx + 6]
        matches = [key for key, option in options.items() if torch.equal(option, image)]
        assert matches  # all channels moved together, every pixel from where it should be
        seen.update(matches)
    assert {mirrored for mirrored, _, _ in seen} == {False, True}
    assert {dy for _, dy, _ in seen} == {dx for _, _, dx in seen} == set(range(5))


def test_cutout_covers_a_square_and_every_pixel_equally_often() -> None:
    side, size, count = 3, 8, 20_000
    images = torch.full((count, 3, size, size), 0.25)
    covered = augment(images, 1, torch.Generator().manual_seed(0), cutout=side) != 0.25
    assert (covered == covered[:, :1]).all()  # in all channels
    covered = covered[:, 0]
    rows, columns = covered.any(2), covered.any(1)
    assert torch.equal(covered, rows[:, :, None] & columns[:, None, :])
    assert (rows.sum(1) <= side).all()
    assert (covered.sum((1, 2)) == side**2).any()
    share = (side / (size + side - 1)) ** 2
    error = (share * (1 - share) / count) ** 0.5
    assert float((covered.float().mean(0) - share).abs().max()) < 5 * error
    grey = augment(images, 1, torch.Generator().manual_seed(0), cutout=side)
    assert set(grey.unique().tolist()) == {0.25, 0.5}


def test_augmentation_keeps_the_set_of_values_and_draws_from_its_generator() -> None:
    images = torch.rand(8, 3, 6, 6)
    before = torch.get_rng_state()
    first = augment(images, 2, torch.Generator().manual_seed(1))
    second = augment(images, 2, torch.Generator().manual_seed(1))
    third = augment(images, 2, torch.Generator().manual_seed(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    for image, changed in zip(images, first, strict=True):
        assert set(changed.flatten().tolist()) <= set(image.flatten().tolist())


def test_cutout_needs_no_crops() -> None:
    recipe = replace(RECIPE, crop_padding=0, cutout=4)
    images, _ = next(training._batches(DATA, recipe, torch.Generator().manual_seed(0)))
    whole, _ = next(training._batches(DATA, replace(recipe, cutout=0), torch.Generator().manual_seed(0)))
    covered = (images != whole).any(1)
    assert covered.any((1, 2)).all()
    assert (images.movedim(1, 3)[covered] == 0.5).all()


def test_augmentation_draws_what_it_drew_when_the_networks_were_trained() -> None:
    # A digest of its values and of the generator's next one, so that a recipe gives the same network again.
    generator = torch.Generator().manual_seed(0)
    found = augment(torch.arange(4 * 3 * 8 * 8).view(4, 3, 8, 8) / 1000, 2, generator, cutout=3)
    following = torch.rand(1, generator=generator)
    assert digest_of({"images": found, "following": following})[:16] == "8c1b2e037ecdfdf3"


def test_initial_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    a = initialise(network(), 3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    b = network()
    state = torch.get_rng_state()
    initialise(b, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(before, state)
    assert equal(a, b)
    assert not equal(a, initialise(network(), 4))


def test_cutout_covers_one_square_and_no_more_than_it() -> None:
    """On black images nothing but the grey square shows; inside the border it has its whole size."""
    covered = training.augment(torch.zeros(200, 3, 16, 16), 2, torch.Generator().manual_seed(0), cutout=5) == 0.5
    assert (covered.all(1) == covered.any(1)).all()  # all channels alike
    sizes = covered[:, 0].flatten(1).sum(1)
    assert sizes.max() == 25
    assert sizes.min() >= 1
    rows, columns = covered[:, 0].any(2).sum(1), covered[:, 0].any(1).sum(1)
    assert (rows * columns == sizes).all()  # a rectangle


def test_warm_restart_goes_on_from_the_weights_it_finds() -> None:
    """Without ``fresh`` steps too small to count leave the weights; with it they are drawn anew."""
    recipe = training.Recipe(epochs=1, batch_size=32, peak_lr=1e-30, crop_padding=0)
    for fresh in (False, True):
        model = planted_cnn()
        before = [parameter.clone() for parameter in model.parameters()]
        training.train_classifier(model, planted(64), recipe, fresh=fresh, bfloat16=False, progress=False)
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same is not fresh
