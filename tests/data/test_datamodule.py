from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import write_shapes
from lightning.pytorch.trainer.states import TrainerFn

from cifar10_tl.config.errors import UserError
from cifar10_tl.data.balance import RepeatedImages
from cifar10_tl.data.batch import Batch, ImageSet, Split
from cifar10_tl.data.datamodule import CIFAR10DataModule, planned_epochs, stratified
from cifar10_tl.data.images import decode_image
from cifar10_tl.data.keyed_rng import hash32
from cifar10_tl.data.sources import SOURCES

AUGMENT = {"horizontal_flip": True, "random_crop_padding": 4, "random_erasing": 0.3, "random_resized_crop": [0.5, 1]}


def datamodule(rank: int = 0, world_size: int = 1, epoch: int = 0, **options: Any) -> CIFAR10DataModule:
    sizes = {"train_size": 200, "test_size": 60, "val_size": 40, "batch_size": 32}
    data = CIFAR10DataModule(**{"source": "shapes", "augment": AUGMENT, **sizes, **options})
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank,
        world_size=world_size,
        training=True,
        current_epoch=epoch,
        max_epochs=4,
        max_steps=-1,
        state=SimpleNamespace(fn=TrainerFn.FITTING),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    data.setup()
    return data


def unequal(**options: Any) -> CIFAR10DataModule:
    """Return data with 16, 3 and 1 training images in the first three classes."""
    data = datamodule(batch_size=8, **options)
    split = data.splits["train"]
    kept = [(split.labels == label).nonzero().flatten()[:count] for label, count in enumerate((16, 3, 1))]
    data.splits["train"] = split.subset(torch.cat(kept).sort().values)
    return data


def training_batches(data: CIFAR10DataModule) -> list[Batch]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(data.trainer.current_epoch)  # type: ignore[union-attr]
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


def test_validation_is_stratified_disjoint_and_seeded() -> None:
    data = datamodule()
    train, val, test = (data.splits[s] for s in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (160, 40, 60)
    assert torch.bincount(val.labels).tolist() == [4] * 10
    assert sorted([*train.indices.tolist(), *val.indices.tolist()]) == list(range(200))
    assert torch.equal(val.indices, datamodule(seed=7).splits["val"].indices), "seed must not move the split"
    assert not torch.equal(val.indices, datamodule(split_seed=1).splits["val"].indices)


def test_paths_follow_their_images_into_each_split(tmp_path: Path) -> None:
    write_shapes(tmp_path / "images", num_classes=2, train=12, test=4)
    folder = {"source": "folder", "root": str(tmp_path / "images"), "cache_dir": str(tmp_path), "augment": None}
    data = CIFAR10DataModule(**folder, val_size=4, image_limit=8)
    data.setup()
    names = {f"train/class {label}/{i:02d}.png" for label in (0, 1) for i in range(12)}
    train, val, test = (data.splits[s] for s in ("train", "val", "test"))
    assert [len(s.paths or ()) for s in (train, val, test)] == [8, 4, 8]
    assert not {*train.paths} & {*val.paths}
    assert {*train.paths, *val.paths} <= names
    for split in (train, val, test, train.to(torch.device("cpu"))):
        for image, label, path in zip(split.images, split.labels, split.paths or (), strict=True):
            assert f"/class {int(label)}/" in path
            assert (decode_image(tmp_path / "images" / path, 32) == image.numpy()).all()
    chosen = val.indices[[2, 0]]
    assert val.paths_of(chosen) == [val.paths[2], val.paths[0]]
    assert datamodule().splits["val"].paths_of(torch.tensor([1, 2])) == [None, None]


def test_global_batches_are_the_same_pixel_for_pixel_on_one_and_two_processes() -> None:
    alone = training_batches(datamodule(epoch=3))
    ranks = [training_batches(datamodule(rank=r, world_size=2, epoch=3)) for r in (0, 1)]
    assert len(alone) == 5
    for step, whole in enumerate(alone):
        for rank in (0, 1):
            assert torch.equal(ranks[rank][step].images, whole.images[rank::2])
            assert torch.equal(ranks[rank][step].targets, whole.targets[rank::2])
            assert torch.equal(ranks[rank][step].boxes, whole.boxes[rank::2])


def test_each_epoch_has_its_own_order_and_augmentation() -> None:
    first, second = training_batches(datamodule(epoch=0)), training_batches(datamodule(epoch=1))
    assert not torch.equal(first[0].indices, second[0].indices)
    by_index = {int(i): image for b in first for i, image in zip(b.indices, b.images, strict=True)}
    same = [torch.equal(by_index[int(i)], x) for b in second for i, x in zip(b.indices, b.images, strict=True)]
    assert np.mean(same) < 0.1


def test_mixing_ends_with_the_epochs_of_the_trainer() -> None:
    augment = {"mix": "cutmix", "mix_off_last": 0.5}
    for epoch, max_epochs, mixed in ((1, 4, True), (2, 4, False), (2, 5, True), (3, 5, False), (9, -1, True)):
        data = datamodule(epoch=epoch, augment=augment)
        data.trainer.max_epochs = max_epochs  # type: ignore[union-attr]
        assert training_batches(data)[0].targets.is_floating_point() == mixed, (epoch, max_epochs)


@pytest.mark.parametrize(
    ("max_epochs", "max_steps", "planned"), [(4, -1, 4), (4, 7, 3), (4, 40, 4), (-1, 6, 2), (None, -1, -1)]
)
def test_the_planned_epochs_end_with_the_steps(max_epochs: int | None, max_steps: int, planned: int) -> None:
    trainer: Any = SimpleNamespace(max_epochs=max_epochs, max_steps=max_steps)
    trainer.num_training_batches, trainer.accumulate_grad_batches = 5, 2  # 3 steps per epoch
    assert planned_epochs(trainer) == planned


def test_resuming_inside_an_epoch_gives_the_same_batches() -> None:
    data = datamodule(epoch=2)
    whole = training_batches(data)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(2)
    iterator = iter(loader)
    next(iterator), next(iterator)
    fresh = datamodule(epoch=2)
    resumed = fresh.train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    resumed.sampler.set_epoch(2)
    rest = [fresh.on_after_batch_transfer(b, 0) for b in resumed]
    assert len(rest) == 3
    for a, b in zip(rest, whole[2:], strict=True):
        assert torch.equal(a.images, b.images)


@pytest.mark.parametrize("on_device", [True, False])
def test_indices_stay_on_the_cpu_where_random_numbers_are_drawn(on_device: bool) -> None:
    data, meta = datamodule(), torch.device("meta")
    data.hparams["on_device"] = on_device
    data.trainer.strategy.root_device = meta if on_device else torch.device("cpu")  # type: ignore[union-attr]
    batch = next(iter(data.train_dataloader()))
    moved = data.on_after_batch_transfer(data.transfer_batch_to_device(batch, meta, 0), 0)
    assert (batch.images.is_meta, moved.images.is_meta, moved.targets.is_meta) == (on_device, True, True)
    assert moved.features is None
    assert torch.equal(moved.indices, training_batches(datamodule())[0].indices)


def test_evaluation_images_are_not_augmented() -> None:
    data = datamodule()
    data.trainer.training = False  # type: ignore[union-attr]
    batches = [data.on_after_batch_transfer(b, 0) for b in data.val_dataloader()]
    assert torch.equal(torch.cat([b.images for b in batches]), data.splits["val"].images)
    assert {b.boxes for b in batches} == {None}
    assert sum(len(b.images) for b in data.test_dataloader()) == 60


def test_image_limit_applies_to_each_split_in_proportion() -> None:
    splits = datamodule(image_limit=30).splits
    assert [len(splits[s]) for s in ("train", "val", "test")] == [30, 30, 30]
    assert torch.bincount(splits["train"].labels).tolist() == [3] * 10
    assert set(splits["val"].indices.tolist()) < set(datamodule().splits["val"].indices.tolist())


def test_fewer_images_than_a_batch_are_one_batch() -> None:
    data = datamodule(image_limit=21, batch_size=64, rank=1, world_size=2)
    batches = training_batches(data)
    assert [len(b.images) for b in batches] == [10]


@pytest.mark.parametrize(
    ("val_size", "missing"), [(9, "training$"), (196, "missing: .*diamond"), (300, "missing: .*heart")]
)
def test_val_size_that_leaves_no_image_of_a_class_is_rejected(val_size: int, missing: str) -> None:
    with pytest.raises(UserError, match=rf"data.val_size={val_size} does not fit 200 .*{missing}"):
        datamodule(val_size=val_size)


def test_images_are_found_by_their_index() -> None:
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 2, 2)
    split = Split(images, torch.arange(5), torch.tensor([3, 8, 9, 20, 31]))
    assert split.by_index(torch.tensor([20, 3]))[:, 0, 0, 0].tolist() == [3, 0]


def test_stratified_takes_each_class_in_proportion() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    positions = stratified(labels, 15, seed=0)
    assert torch.bincount(labels[positions]).tolist() == [9, 5, 1], "of 4.5 and 1.5, the first is rounded up"
    assert positions.tolist() == sorted(set(positions.tolist()))
    assert len(stratified(labels, 100, seed=0)) == 100


def test_hyperparameters_are_plain_and_complete() -> None:
    data = datamodule(batch_size=16)
    again = CIFAR10DataModule(**data.hparams)
    assert again.hparams == data.hparams
    assert data.hparams["batch_size"] == 16
    assert data.hparams["train_size"] == 200
    assert data.hparams["augment"]["random_crop_padding"] == 4


def test_unknown_source_is_rejected() -> None:
    with pytest.raises(UserError, match="choose from cifar10, folder, shapes, or first import"):
        CIFAR10DataModule(source="mnist")


def test_partial_evaluation_sees_all_classes() -> None:
    data = datamodule(batch_size=20)
    split = data.splits["val"]
    data.splits["val"] = split.subset(split.labels.argsort(stable=True))  # in the order of a folder
    whole = torch.cat([b.targets for b in data.val_dataloader()])
    assert torch.equal(whole, data.splits["val"].labels)
    data.trainer.limit_val_batches = 1  # type: ignore[union-attr]
    first = next(iter(data.val_dataloader()))
    assert len(first.targets.unique()) >= 7  # the first 20 of 40 sorted images have 5 classes
    assert torch.equal(first.indices, next(iter(data.val_dataloader())).indices)


@pytest.mark.parametrize(
    ("images", "labels", "found"),
    [
        (torch.rand(4, 3, 8, 8), torch.arange(4) % 2, r"float32 \[4, 3, 8, 8\] and torch.int64"),
        (torch.zeros(4, 1, 8, 8).byte(), torch.arange(4) % 2, r"uint8 \[4, 1, 8, 8\]"),
        (torch.zeros(4, 3, 8, 8).byte(), torch.arange(4).int() % 2, r"uint8 \[4, 3, 8, 8\] and torch.int32"),
    ],
)
def test_images_of_another_type_are_refused(
    images: torch.Tensor, labels: torch.Tensor, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SimpleNamespace(class_names=("a", "b"), load=lambda: {"train": ImageSet(images, labels)})
    monkeypatch.setitem(SOURCES, "mine", lambda: source)
    with pytest.raises(UserError, match=rf"data\.source=mine: train: images must be uint8 .* they are torch\.{found}"):
        CIFAR10DataModule(source="mine").setup()


@pytest.mark.parametrize("change", [{"train_size": 210}, {"val_size": 30}, {"split_seed": 1}])
def test_changed_data_is_rejected_on_resume(change: dict[str, int]) -> None:
    state = datamodule().state_dict()
    datamodule().load_state_dict(state)
    datamodule().load_state_dict({})  # a checkpoint of an older version
    changed = datamodule(**change)
    with pytest.raises(UserError, match=r"the data has changed .*\(train, val\)"):
        changed.load_state_dict(state)
    changed.trainer.state.fn = TrainerFn.TESTING  # type: ignore[union-attr]
    changed.load_state_dict(state)


def test_exchanged_files_are_rejected_on_resume() -> None:
    data = datamodule()
    state, val = data.state_dict(), data.splits["val"]
    val.paths = ("another.png", *val.paths[1:])
    with pytest.raises(UserError, match=r"the data has changed .*\(val\)"):
        data.load_state_dict(state)


def test_the_only_image_of_a_class_is_used_for_training(caplog: pytest.LogCaptureFixture) -> None:
    data = datamodule(val_size=0.5)
    labels = torch.tensor([1] + [i for i in range(10) if i != 1] * 10)
    images = torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8)
    with caplog.at_level("WARNING"):
        train, val = data._split(Split(images, labels), "val_size", 0.5)
    assert "the only image of class ring is used for training" in caplog.text
    assert torch.bincount(train.labels).tolist() == [4, 1, *[5] * 8]
    assert torch.bincount(val.labels).tolist() == [6, 0, *[5] * 8]


def test_datamodule_works_without_a_trainer() -> None:
    data = CIFAR10DataModule(source="shapes", train_size=100, test_size=20, val_size=20, batch_size=40)
    data.setup()
    assert [len(batch.targets) for batch in data.train_dataloader()] == [40, 40]
    assert sum(len(batch.targets) for batch in data.val_dataloader()) == 20


def test_class_weights_are_those_of_the_training_split() -> None:
    assert unequal(balance="loss").class_weights()[:3].tolist() == pytest.approx([20 / 48, 20 / 9, 20 / 3])
    assert unequal(balance="sampler").class_weights() is unequal().class_weights() is None


def test_an_epoch_is_the_same_on_two_processes_and_each_repetition_is_augmented_anew() -> None:
    options: dict[str, Any] = {"balance": "sampler", "augment": {"random_crop_padding": 8, "random_erasing": 1.0}}
    alone = training_batches(unequal(epoch=3, **options))
    ranks = [training_batches(unequal(rank=r, world_size=2, epoch=3, **options)) for r in (0, 1)]
    assert [len(batch.images) for batch in alone] == [8, 8], "as many images as without balance"
    for step, whole in enumerate(alone):
        for rank in (0, 1):
            assert torch.equal(ranks[rank][step].images, whole.images[rank::2])
            assert torch.equal(ranks[rank][step].targets, whole.targets[rank::2])
    images, targets, keys = (torch.cat(parts) for parts in list(zip(*alone, strict=True))[:3])
    assert torch.bincount(targets, minlength=3).min() >= 4
    assert len(keys.unique()) == len((keys & 0xFFFFFFFF).unique()) == 16
    only = images[targets == 2]  # all of one image
    assert len(only.flatten(1).unique(dim=0)) == len(only)
    first = training_batches(unequal(epoch=3, augment=options["augment"]))
    plain = {int(i): x for b in first for i, x in zip(b.indices, b.images, strict=True)}
    both = [torch.equal(plain[int(i)], x) for i, x in zip(keys, images, strict=True) if int(i) in plain]
    assert len(both) >= 3
    assert all(both), "the first time an image is augmented as without balance"


def test_keys_of_a_class_of_one_image_among_a_million_differ() -> None:
    data = unequal(balance="sampler").train_dataloader().dataset
    positions = 3 + 20 * torch.tensor([0, 1, 2**16, 2**20, 10**6])
    keys = data[positions].indices
    assert RepeatedImages(SimpleNamespace(slow=True)).slow, "decoded in the workers of the loader"
    assert keys[0] == data.split.indices[3]
    assert len(hash32(7, keys).unique()) == 5


@pytest.mark.parametrize("on_device", [True, False])
def test_resuming_inside_a_balanced_epoch_gives_its_remaining_batches(on_device: bool) -> None:
    data = unequal(balance="sampler", epoch=2, on_device=on_device)
    whole = training_batches(data)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(2)
    next(iter(loader))
    fresh = unequal(balance="sampler", epoch=2)
    resumed = fresh.train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    resumed.sampler.set_epoch(2)
    (rest,) = [fresh.on_after_batch_transfer(batch, 0) for batch in resumed]
    assert torch.equal(rest.images, whole[1].images)
    assert torch.equal(rest.indices, whole[1].indices)


def test_cached_features_follow_their_images_and_each_repetition_chooses_a_view() -> None:
    data = unequal(balance="sampler", augment={"horizontal_flip": True})

    def features(name: str, images: Any, **_: Any) -> torch.Tensor:  # position and view
        grid = torch.cartesian_prod(torch.arange(len(images)), torch.arange(2))
        return grid.view(len(images), 2, 2, 1, 1).float()

    data.feature_cache = SimpleNamespace(features=features)  # type: ignore[assignment]
    split, views = data.splits["train"], set()
    for epoch in range(4):
        data.trainer.current_epoch = epoch  # type: ignore[union-attr]
        batch: Batch
        for batch in training_batches(data):
            positions, view = batch.features.flatten(1).long().unbind(1)
            assert torch.equal(split.labels[positions], batch.targets)
            views |= {(epoch, int(v)) for v, target in zip(view, batch.targets, strict=True) if target == 2}
            for position, mirrored, image in zip(positions, view, batch.images, strict=True):
                original = split.images[position]
                assert torch.equal(image, original.flip(-1) if mirrored else original)
    assert len(views) > 4, "in an epoch, the only image of a class is seen both ways"


def test_each_class_is_in_each_split() -> None:
    labels = torch.tensor([0] * 400 + [1] * 3)
    chosen = stratified(labels, 40, seed=0)
    assert torch.bincount(labels[chosen]).tolist() == [39, 1]
