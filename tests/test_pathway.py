"""Pathways: set algebra, storage that survives only whole, indexing."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pathwaylib import Pathway, PathwayError

SHAPES = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 9)),
        st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    ),
    min_size=1,
    max_size=4,
)


def random_pathway(
    shapes: list[tuple[int, ...]], batch: int, seed: int, share: float = 0.5, targets: bool = False
) -> Pathway:
    generator = torch.Generator().manual_seed(seed)
    masks = tuple(torch.rand((batch, *shape), generator=generator) < share for shape in shapes)
    labels = torch.randint(10, (batch,), generator=generator) if targets else None
    return Pathway(masks, tuple(f"relu_{index}" for index in range(len(shapes))), labels)


def same(a: Pathway, b: Pathway) -> bool:
    return a.sites == b.sites and all(torch.equal(p, q) for p, q in zip(a.masks, b.masks, strict=True))


@st.composite
def pathways(draw: st.DrawFn, count: int = 1) -> tuple[Pathway, ...]:
    shapes, batch = draw(SHAPES), draw(st.integers(1, 4))
    return tuple(
        random_pathway(shapes, batch, draw(st.integers(0, 999)), draw(st.sampled_from([0.0, 0.2, 0.8, 1.0])))
        for _ in range(count)
    )


# --- algebra ---


@given(pathways(3))
def test_set_algebra(drawn: tuple[Pathway, ...]) -> None:
    a, b, c = drawn
    assert same(~(a & b), ~a | ~b)
    assert same(~(a | b), ~a & ~b)
    assert same(~~a, a)
    assert same(a & (b | c), (a & b) | (a & c))
    assert same(a & b, b & a)
    assert same(a | (a & b), a)
    assert not (a & ~a).sizes.any()
    assert ((a | ~a).sizes == a.neurons).all()
    assert torch.equal((a | b).sizes + (a & b).sizes, a.sizes + b.sizes)


@given(pathways(2), st.booleans())
def test_intersection_over_union(drawn: tuple[Pathway, ...], per_site: bool) -> None:
    a, b = drawn
    found = a.iou(b, per_site=per_site)
    assert found.shape == ((len(a), len(a.sites)) if per_site else (len(a),))
    assert ((found >= 0) & (found <= 1)).all()
    assert torch.equal(found, b.iou(a, per_site=per_site))
    assert (a.iou(a, per_site=per_site) == 1).all()
    if not per_site:
        for index in range(len(a)):
            p, q = (set(side.flatten()[index].nonzero()[:, 0].tolist()) for side in (a, b))
            expected = len(p & q) / len(p | q) if p | q else 1.0
            assert float(found[index]) == pytest.approx(expected, rel=1e-6)


@given(pathways())
def test_sizes_and_frequency_by_counting(drawn: tuple[Pathway, ...]) -> None:
    (a,) = drawn
    rows = a.flatten().tolist()
    assert a.sizes.tolist() == [sum(row) for row in rows]
    assert a.neurons == len(rows[0])
    assert a.site_sizes.sum(1).tolist() == a.sizes.tolist()
    assert a.sparsity.tolist() == pytest.approx([1 - sum(row) / len(row) for row in rows], abs=1e-6)
    for frequency, mask in zip(a.frequency(), a.masks, strict=True):
        assert frequency.shape == mask.shape[1:]
        assert torch.equal(frequency, mask.double().sum(0).div(len(a)).float())
    assert f"{len(a)} inputs" in repr(a)


def test_operations_change_neither_side() -> None:
    a, b = random_pathway([(5,), (2, 3, 3)], 3, 0), random_pathway([(5,), (2, 3, 3)], 3, 1)
    before = [mask.clone() for mask in (*a.masks, *b.masks)]
    _ = (a & b, a | b, ~a, a.iou(b), a.frequency(), a[0], a.flatten())
    assert all(torch.equal(p, q) for p, q in zip(before, (*a.masks, *b.masks), strict=True))


def test_one_pathway_against_many() -> None:
    many, one = random_pathway([(6,), (2, 2, 2)], 4, 0), random_pathway([(6,), (2, 2, 2)], 1, 1)
    assert torch.equal(many.iou(one), torch.cat([many[index].iou(one) for index in range(4)]))
    assert torch.equal(one.iou(many), many.iou(one))
    assert len(one & many) == 4


# --- indexing ---


def test_indexing_keeps_the_batch_dimension() -> None:
    a = random_pathway([(3, 4, 4), (7,)], 5, 0, targets=True)
    for index, rows in [
        (2, [2]),
        (-1, [4]),
        (np.int64(3), [3]),
        (torch.tensor(1), [1]),
        (slice(1, 4), [1, 2, 3]),
        ([4, 0], [4, 0]),
        (torch.tensor([3, 3]), [3, 3]),
        (torch.tensor([True, False, False, True, False]), [0, 3]),
    ]:
        part = a[index]
        assert len(part) == len(rows)
        assert torch.equal(part.flatten(), a.flatten()[rows])
        assert part.targets.tolist() == a.targets[rows].tolist()
        assert [mask.shape[1:] for mask in part.masks] == [mask.shape[1:] for mask in a.masks]
    none = a[torch.zeros(5, dtype=torch.bool)]
    assert none.neurons == a.neurons
    assert repr(none).startswith("Pathway(0 inputs")
    assert len(list(a)) == 5
    with pytest.raises(IndexError):
        a[5]


def test_to() -> None:
    a = random_pathway([(3,)], 2, 0, targets=True)
    moved = a.to("meta")
    assert moved.masks[0].device.type == moved.targets.device.type == "meta"
    assert same(a.to("cpu"), a)
    assert a.masks[0].device.type == "cpu"


def test_frozen() -> None:
    a = random_pathway([(3,)], 2, 0)
    for name in ("masks", "sites", "targets"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(a, name, ())
    masks = [torch.ones(1, 2, dtype=torch.bool)]
    b = Pathway(masks, ["relu_0"])
    masks.append(masks[0])  # a list given is not the list kept
    assert len(b.masks) == 1
    assert isinstance(b.sites, tuple)


@pytest.mark.parametrize(
    ("masks", "sites", "targets", "message"),
    [
        ((), (), None, "at least one"),
        ((torch.ones(1, 2, dtype=torch.bool),), (), None, "1 masks for 0 sites"),
        ((torch.ones(1, 2),), ("relu_0",), None, r"'relu_0'.*float32.*bool"),
        ((torch.ones(2, dtype=torch.bool),), ("relu_0",), None, r"\(2,\).*batch"),
        ((torch.ones(1, 2, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool)), ("a", "b"), None, r"\[1, 2\]"),
        ((torch.ones(2, 2, dtype=torch.bool),), ("relu_0",), torch.tensor([1]), r"\(1,\) for 2 inputs"),
        ((torch.ones(2, 2, dtype=torch.bool),), ("relu_0",), torch.tensor([1.0, 2.0]), r"float32.*integers"),
        ((torch.ones(2, 2, dtype=torch.bool),), ("relu_0",), torch.tensor([True, False]), r"bool.*integers"),
    ],
)
def test_parts_that_do_not_fit(masks: object, sites: object, targets: object, message: str) -> None:
    with pytest.raises(PathwayError, match=message):
        Pathway(masks, sites, targets)


def test_pathways_of_different_networks() -> None:
    a = random_pathway([(3,), (4,)], 2, 0)
    others = [random_pathway([(3,)], 2, 0), random_pathway([(3,), (5,)], 2, 0), Pathway(a.masks, ("relu6_0", "relu_1"))]
    for other in others:
        for operation in (lambda p, q: p & q, lambda p, q: p | q, lambda p, q: p.iou(q)):
            with pytest.raises(PathwayError, match=r"different networks.*relu_0\(3,\)"):
                operation(a, other)
    with pytest.raises(PathwayError, match=r"2 and 3 inputs"):
        a & random_pathway([(3,), (4,)], 3, 0)
    with pytest.raises(TypeError, match=r"int"):
        a & 1


# --- storage ---


@given(drawn=pathways(), seed=st.integers(0, 99), targets=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip(drawn: tuple[Pathway, ...], seed: int, targets: bool, tmp_path: Path) -> None:
    (a,) = drawn
    labels = torch.randint(1000, (len(a),), generator=torch.Generator().manual_seed(seed)) if targets else None
    stored = Pathway(a.masks, tuple(f"{site} é“" for site in a.sites), labels)
    path = tmp_path / "some folder" / "pathway.safetensors"
    stored.save(path)
    loaded = Pathway.load(str(path))
    assert same(loaded, stored)
    assert (loaded.targets is None) == (labels is None)
    assert labels is None or torch.equal(loaded.targets, labels)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_targets_of_any_integer_type_are_stored(tmp_path: Path) -> None:
    a = random_pathway([(3,)], 2, 0)
    Pathway(a.masks, a.sites, torch.tensor([1, 0], dtype=torch.int32)).save(tmp_path / "p")
    assert torch.equal(Pathway.load(tmp_path / "p").targets, torch.tensor([1, 0]))


def test_one_bit_per_neuron(tmp_path: Path) -> None:
    a = random_pathway([(64, 32, 32)], 4, 0)
    a.save(tmp_path / "p.safetensors")
    assert (tmp_path / "p.safetensors").stat().st_size < a.neurons * len(a) / 8 + 500


def test_views_and_channels_last_are_stored_by_value(tmp_path: Path) -> None:
    a = random_pathway([(4, 3, 5)], 3, 0)
    odd = Pathway((a.masks[0].to(memory_format=torch.channels_last),), a.sites)
    odd.save(tmp_path / "odd")
    assert same(Pathway.load(tmp_path / "odd"), a)
    strided = Pathway((a.masks[0][::2, :, :, 1::2],), a.sites, torch.arange(6)[::3])
    strided.save(tmp_path / "strided")
    loaded = Pathway.load(tmp_path / "strided")
    assert same(loaded, strided)
    assert loaded.targets.tolist() == [0, 3]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = random_pathway([(9,)], 2, 0), random_pathway([(9,)], 2, 1)
    path = tmp_path / "p.safetensors"
    a.save(path)

    def fails(name: Path, content: bytes) -> int:
        with name.open("wb") as file:
            file.write(content[:9])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", fails)
    with pytest.raises(OSError, match=r"no space"):
        b.save(path)
    assert same(Pathway.load(path), a)
    assert list(tmp_path.iterdir()) == [path]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Pathway.load(tmp_path / "nothing.safetensors")


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    random_pathway([(9,), (2, 3, 3)], 2, 0, targets=True).save(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(PathwayError, match=r"p\.safetensors.*(damaged|not a pathway)"):
            Pathway.load(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(PathwayError):
        Pathway.load(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04\x95pickle", bytes(100), b"PK\x03\x04" + bytes(50)])
def test_foreign_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(PathwayError, match=r"foreign"):
        Pathway.load(path)


def test_weights_are_not_a_pathway(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(PathwayError, match=r"not a pathway file.*Pathway\.save"):
        Pathway.load(tmp_path / "weights.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {"sites": "not json"},
        {"sites": "5"},
        {"sites": "[]"},
        {"sites": '["relu_0", "relu_1"]'},
        {"shapes": "[[2, 900]]"},  # more bits than there are
        {"shapes": "[[2, 1]]"},  # fewer
        {"shapes": "[[-1, 9]]"},
        {"shapes": "[[2, 9], [2, 9]]"},
        {"shapes": "[18]"},
        {"shapes": "[[18]]"},
        {"shapes": '[["2", "9"]]'},
        {"shapes": "[[2.0, 9.0]]"},
        {"shapes": "{}"},
        {"format": "pathwaylib-pathway-0"},
    ],
)
def test_metadata_that_does_not_fit(changes: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    random_pathway([(9,)], 2, 0).save(path)
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    header["__metadata__"].update(changes)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
    with pytest.raises(PathwayError, match=r"p\.safetensors"):
        Pathway.load(path)


@given(position=st.integers(0, 10_000), change=st.integers(1, 255))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_changed_byte_gives_a_pathway_or_a_clear_error(position: int, change: int, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    a = random_pathway([(9,), (2, 3, 3)], 2, 0, targets=True)
    a.save(path)
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= change
    path.write_bytes(content)
    try:
        loaded = Pathway.load(path)
    except PathwayError:
        return
    assert same(loaded, a)  # what was changed is of no account, such as the checksum's name


def test_cat_puts_batches_together_and_refuses_others() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = Pathway(
        (torch.rand(5, 3, generator=generator) > 0.5, torch.rand(5, 2, 2, generator=generator) > 0.5),
        ("relu_0", "relu_1"),
        torch.arange(5),
    )
    together = Pathway.cat([whole[:2], whole[2:3], whole[3:]])
    assert torch.equal(together.flatten(), whole.flatten())
    assert torch.equal(together.targets, whole.targets)
    assert Pathway.cat([whole, ~whole]).targets is None  # a complement explains no class
    with pytest.raises(PathwayError, match="no pathways"):
        Pathway.cat([])
    with pytest.raises(PathwayError, match="different networks"):
        Pathway.cat([whole, Pathway(whole.masks[:1], whole.sites[:1])])
