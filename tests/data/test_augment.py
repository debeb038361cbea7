from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import functional as tv

from cifar10_tl.data.augment import Augment, _beta, augment
from cifar10_tl.data.batch import Batch
from cifar10_tl.data.keyed_rng import KeyedRNG, hash32

EVERYTHING = Augment(
    horizontal_flip=True,
    random_crop_padding=4,
    random_resized_crop=(0.5, 1),
    trivial_augment=True,
    random_erasing=0.5,
    cutout=8,
    color_jitter=0.4,
)


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Batch(images, torch.arange(64) % 10, torch.arange(64) * 7 + 3)


def run(batch: Batch, settings: Augment, seed: int = 0, epoch: int = 0) -> Batch:
    return augment(batch, settings, seed=seed, epoch=epoch, num_classes=10)


def part(batch: Batch, positions: slice) -> Batch:
    return Batch(*(x[positions] for x in batch[:3]))


def test_augmentation_of_an_image_does_not_depend_on_its_batch(batch: Batch) -> None:
    before = batch.images.clone()
    whole = run(batch, EVERYTHING)
    for positions in (slice(0, 64, 2), slice(1, 64, 2), slice(40, 41)):
        some = run(part(batch, positions), EVERYTHING)
        assert torch.equal(some.images, whole.images[positions])
        assert torch.equal(some.boxes, whole.boxes[positions])
    run(batch, replace(EVERYTHING, mix="cutmix"))
    assert torch.equal(batch.images, before), "the input was changed"


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_each_random_number_is_used_once(batch: Batch, monkeypatch: pytest.MonkeyPatch, mix: Any) -> None:
    used: list[str] = []
    uniform = KeyedRNG.uniform

    def recorded(draw: KeyedRNG, name: str) -> Tensor:
        used.append(name)
        return uniform(draw, name)

    monkeypatch.setattr(KeyedRNG, "uniform", recorded)
    run(batch, replace(EVERYTHING, mix=mix))
    assert len(used) == len({*used}) > 15


class MetaOperations(TorchDispatchMode):
    """Counter of the operations on the device "meta", without views; on a GPU each of them is at least a kernel."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        on_meta = any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves((args, result)))
        self.count += on_meta and not function.is_view
        return result


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        (Augment(horizontal_flip=True, random_crop_padding=4), 4),
        (Augment(horizontal_flip="alternating", random_crop_padding=4, cutout=8), 8),
        (Augment(trivial_augment=True), 150),
        (Augment(random_resized_crop=(0.6, 1), mix="cutmix"), 25),
        (replace(EVERYTHING, mix="mixup"), 200),
    ],
)
def test_few_operations_run_on_the_device_and_none_waits_for_it(batch: Batch, settings: Augment, most: int) -> None:
    expected = run(batch, settings)
    batch = batch._replace(images=batch.images.to("meta"), targets=batch.targets.to("meta"))
    with MetaOperations() as operations:
        found = run(batch, settings)  # reading the value of a meta tensor is an error
    assert 0 < operations.count <= most
    assert (found.images.shape, found.images.device.type) == (expected.images.shape, "meta")
    assert found.boxes is None or found.boxes.is_meta


def test_seed_and_epoch_change_the_augmentation(batch: Batch) -> None:
    first = run(batch, EVERYTHING)
    assert torch.equal(first.images, run(batch, EVERYTHING).images)
    for other in (run(batch, EVERYTHING, seed=1), run(batch, EVERYTHING, epoch=1)):
        changed = (other.images != first.images).flatten(1).any(1)
        assert changed.float().mean() > 0.95


def test_flip_mirrors_about_half_of_the_images(batch: Batch) -> None:
    out = run(batch, Augment(horizontal_flip=True)).images
    mirrored = (out == batch.images.flip(3)).flatten(1).all(1)
    same = (out == batch.images).flatten(1).all(1)
    assert (mirrored ^ same).all()
    assert 20 <= mirrored.sum() <= 44


def test_alternating_flip_mirrors_each_image_in_every_second_epoch(batch: Batch) -> None:
    epochs = [run(batch, Augment(horizontal_flip="alternating"), epoch=epoch).images for epoch in range(4)]
    assert torch.equal(epochs[0], run(batch, Augment(horizontal_flip=True)).images), "the first epoch is random"
    assert torch.equal(epochs[1], epochs[0].flip(3))
    assert torch.equal(torch.stack(epochs[2:]), torch.stack(epochs[:2]))


@pytest.mark.parametrize("flip", [True, "alternating"])
def test_cached_features_are_mirrored_with_their_images(batch: Batch, flip: Any) -> None:
    views = torch.tensor([[0.0], [1.0]]).expand(64, -1, -1)  # plain and mirrored
    for epoch in (0, 1):
        images = run(batch, Augment(horizontal_flip=flip), epoch=epoch).images
        out = run(batch._replace(features=views), Augment(horizontal_flip=flip), epoch=epoch)
        assert torch.equal(out.images, images)
        assert torch.equal(out.features[:, 0] == 1, (images != batch.images).flatten(1).any(1))


def test_crop_is_any_window_of_the_image_with_reflected_border(batch: Batch) -> None:
    padded = F.pad(batch.images.float(), (2, 2, 2, 2), mode="reflect").byte()
    windows = torch.stack([padded[..., y : y + 32, x : x + 32] for y in range(5) for x in range(5)])
    seen = set()
    for epoch in range(8):
        out = run(batch, Augment(random_crop_padding=2), epoch=epoch).images
        matches = (windows == out).flatten(2).all(2)  # [25, N]
        assert (matches.sum(0) == 1).all()
        seen.update(matches.int().argmax(0).tolist())
    assert len(seen) == 25


def test_erase_fills_one_rectangle_of_2_to_33_percent_with_gray(batch: Batch) -> None:
    images = torch.zeros(2000, 3, 32, 32, dtype=torch.uint8)
    out = run(Batch(images, torch.zeros(2000).long(), torch.arange(2000)), Augment(random_erasing=0.3)).images
    assert set(out.unique().tolist()) == {0, 128}
    mask = (out == 128).all(1)
    erased = mask.flatten(1).any(1)
    assert 0.26 < erased.float().mean() < 0.34
    area = mask[erased].float().mean((1, 2))
    assert 0.01 < area.min() < 0.06
    assert 0.25 < area.max() < 0.36
    for m in mask[erased][:100]:
        assert torch.equal(m, m.any(1)[:, None] & m.any(0)[None]), "not a rectangle"


def test_cutout_is_a_gray_square_around_any_pixel_clipped_at_the_border() -> None:
    images = torch.zeros(4000, 3, 32, 32, dtype=torch.uint8)
    out = run(Batch(images, torch.zeros(4000).long(), torch.arange(4000)), Augment(cutout=8)).images
    assert set(out.unique().tolist()) == {0, 128}
    mask = (out == 128).all(1)
    rows, columns = mask.any(2).sum(1), mask.any(1).sum(1)
    assert torch.equal(mask.sum((1, 2)), rows * columns), "not a rectangle"
    for side, extent in ((rows, mask.any(2)), (columns, mask.any(1))):
        assert (side.min(), side.max()) == (4, 8)  # rows 0 to 3 for a center at 0
        clipped = extent[:, 0] | extent[:, 31]
        assert (side[~clipped] == 8).all()
        assert abs(float((side == 8).float().mean()) - 25 / 32) < 0.03  # centers from 4 to 28


def test_boxes_of_random_resized_crops_lie_inside_and_follow_the_range() -> None:
    batch = Batch(torch.zeros(5000, 3, 64, 64, dtype=torch.uint8), torch.zeros(5000).long(), torch.arange(5000))
    boxes = run(batch, Augment(random_resized_crop=[0.4, 0.9])).boxes
    assert torch.equal(boxes, boxes.round())
    assert boxes[:, :2].min() == 0
    assert (boxes[:, :2] + boxes[:, 2:]).max() == 64
    area, aspect = boxes[:, 2:].prod(1) / 64**2, boxes[:, 3] / boxes[:, 2]
    assert torch.allclose(torch.stack([area.min(), area.mean(), area.max()]), torch.tensor([0.4, 0.65, 0.9]), atol=0.02)
    assert torch.allclose(torch.stack([aspect.min(), aspect.max()]), torch.tensor([3 / 4, 4 / 3]), atol=0.05)
    assert abs(float(aspect.log().mean())) < 0.01
    large = area > 0.85
    assert aspect[large].log().abs().max() < 0.19  # -log(0.85) = 0.163, and whole pixels
    slack = 64 - boxes[:, 2:]
    relative = (boxes[:, :2] / slack.clamp_min(1))[slack > 8]
    assert abs(float(relative.mean()) - 0.5) < 0.02
    assert run(batch, EVERYTHING).boxes.shape == (5000, 4)
    assert run(batch, Augment(horizontal_flip=True)).boxes is None


def test_trivial_augment_draws_all_operations_levels_and_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[torch.Tensor]] = []
    record = lambda images, *draws: drawn.append(list(draws)) or images  # noqa: E731
    monkeypatch.setattr("cifar10_tl.data.augment.trivial_augment", record)
    count = 31 * 14 * 200
    run(Batch(torch.zeros(count, 1), torch.arange(count), torch.arange(count)), Augment(trivial_augment=True))
    operations, levels, signs = drawn[0]
    assert set(signs.tolist()) == {-1, 1}
    cells = torch.bincount((operations * 31 + levels) * 2 + (signs > 0), minlength=868)
    assert len(cells) == 868
    assert (cells - 100).abs().max() < 50, "not independent"  # 5 standard deviations


def test_mixing_ends_before_the_last_epochs() -> None:
    settings = Augment(mix="mixup", mix_off_last=0.25)
    assert [settings.in_epoch(epoch, 10).mix for epoch in range(10)] == ["mixup"] * 8 + ["none"] * 2
    assert [settings.in_epoch(epoch, 11).mix for epoch in range(11)] == ["mixup"] * 8 + ["none"] * 3
    assert settings.in_epoch(0, 1).mix == "mixup"  # rounded to none of the epochs
    assert settings.in_epoch(10**6, -1) == settings
    assert replace(settings, mix_off_last=0.0).in_epoch(9, 10).mix == "mixup"
    assert replace(settings, mix_off_last=1.0).in_epoch(0, 10).mix == "none"


def test_jitter_agrees_with_torchvision_for_the_same_factors(batch: Batch) -> None:
    out = run(batch, Augment(color_jitter=0.4)).images
    draw = KeyedRNG(0, 0, batch.indices)
    factors = [1 + 0.4 * (2 * draw.uniform(n) - 1) for n in ("brightness", "contrast", "saturation")]
    for i in range(8):
        x = batch.images[i].float() / 255
        brightness, contrast, saturation = (float(f[i]) for f in factors)
        assert 0.6 <= min(brightness, contrast, saturation) <= max(brightness, contrast, saturation) <= 1.4
        # torchvision clips between the steps; compare where that does not happen
        if brightness < 1:
            x = tv.adjust_contrast(tv.adjust_brightness(x, brightness), contrast)
            inside = ((x > 0) & (x < 1)).all(0)
            wanted = (tv.adjust_saturation(x, saturation) * 255).round()
            assert (out[i].float() - wanted)[:, inside].abs().max() <= 1


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_mixed_targets_are_fractions_and_pairs_are_the_same_on_two_processes(batch: Batch, mix: str) -> None:
    settings = Augment(horizontal_flip=True, mix=mix, mix_alpha=1.0)  # type: ignore[arg-type]
    whole = run(batch, settings)
    assert whole.targets.shape == (64, 10)
    assert torch.allclose(whole.targets.sum(1), torch.ones(64))
    partner = batch.targets.roll(-32)
    own = whole.targets[torch.arange(64), batch.targets]
    both = own + torch.where(partner == batch.targets, 0, whole.targets[torch.arange(64), partner])
    assert torch.allclose(both, torch.ones(64), atol=1e-6)
    for rank in (0, 1):
        shard = run(part(batch, slice(rank, 64, 2)), settings)
        assert torch.equal(shard.images, whole.images[rank::2])
        assert torch.equal(shard.targets, whole.targets[rank::2])


def test_fractions_of_mixed_images_are_those_of_their_pixels() -> None:
    images = torch.cat([torch.zeros(50, 3, 32, 32), torch.full((50, 3, 32, 32), 255.0)]).byte()
    labels = torch.tensor([0] * 50 + [1] * 50)
    batch = Batch(images, labels, torch.arange(100))
    out = run(batch, Augment(mix="mixup"))
    assert torch.allclose(out.targets[:, 1], out.images.float().mean((1, 2, 3)) / 255, atol=1 / 255)
    out = run(batch, Augment(mix="cutmix"))
    white = (out.images == 255).float().mean((1, 2, 3))
    assert torch.allclose(out.targets[:, 1], white, atol=1e-6)
    cropped = run(batch, Augment(mix="cutmix", random_resized_crop=[0.2, 0.6]))
    assert torch.equal(cropped.images, out.images)
    for image, target, (top, left, height, width) in zip(*cropped[:2], cropped.boxes.long().tolist(), strict=True):
        visible = image[0, top : top + height, left : left + width]
        assert float((visible == 255).float().mean()) == pytest.approx(float(target[1]), abs=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixing_fractions_follow_the_beta_distribution(alpha: float) -> None:
    fractions = _beta((torch.arange(20000) + 0.5) / 20000, alpha)
    wanted = torch.distributions.Beta(alpha, alpha)
    assert abs(float(fractions.mean()) - 0.5) < 1e-3
    assert abs(float(fractions.var()) - float(wanted.variance)) < 1e-3


def test_hash_is_uniform_and_depends_on_the_order_of_keys() -> None:
    bits = hash32(0, torch.arange(100_000))
    assert isinstance(bits, torch.Tensor)
    assert len(bits.unique()) > 99_990
    counts = torch.bincount(bits >> 28, minlength=16)
    assert counts.min() > 5900
    assert counts.max() < 6600
    assert hash32(1, 2) != hash32(2, 1)
    assert int(hash32(0, torch.tensor(5))) == hash32(0, 5)  # tensors and ints agree
