from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import TrivialAugmentWide

from cifar10_tl.data.trivial_augment import LEVELS, OPERATIONS, trivial_augment

NAMES = list(TrivialAugmentWide._AUGMENTATION_SPACE)
IMAGES = (torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) ** 2 * 200 + 30).byte()
IMAGES[4] = 77


def reference(image: Tensor, *draws: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Return torchvision's result for an operation, a level, and 0 or 1 for a negative or positive sign."""
    operation, level, sign = draws
    integers = iter((operation, level))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", lambda *_: torch.tensor(next(integers)))
        patch.setattr(torch, "rand", lambda *_: torch.tensor(float(sign)))
        return TrivialAugmentWide()(image)


@pytest.mark.parametrize("operation", range(len(OPERATIONS)), ids=NAMES)
def test_each_operation_agrees_with_torchvision(operation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [(level, sign) for level in range(LEVELS) for sign in (0, 1)]
    images = IMAGES[torch.arange(len(cases)) % 5]
    levels, signs = (torch.tensor(values) for values in zip(*cases, strict=True))
    ours = trivial_augment(images, torch.full_like(levels, operation), levels, 2 * signs - 1)
    assert ours.dtype == torch.uint8
    if NAMES[operation] != "Identity":
        assert not torch.equal(ours, images)
    for image, out, (level, sign) in zip(images, ours, cases, strict=True):
        expected = reference(image, operation, level, sign, monkeypatch=monkeypatch)
        difference = (out.int() - expected.int()).abs().amax(0)
        if NAMES[operation] == "Rotate" and level in (10, 30):  # 45 and 135 degrees: half pixels on the diagonals
            difference = difference.masked_fill((torch.eye(32) + torch.eye(32).flip(0)).bool(), 0)
        tolerance = 1 if NAMES[operation] in ("Brightness", "Color", "Contrast", "Sharpness") else 0
        assert difference.max() <= tolerance, (level, sign)


def test_the_result_of_an_image_does_not_depend_on_the_others() -> None:
    images = IMAGES.repeat(len(OPERATIONS), 1, 1, 1)
    operations = torch.arange(len(OPERATIONS)).repeat_interleave(5)
    levels, signs = torch.arange(len(images)) % LEVELS, 1 - 2 * (torch.arange(len(images)) % 2)
    together = trivial_augment(images, operations, levels, signs)
    for i in range(len(images)):
        alone = trivial_augment(*(x[i : i + 1] for x in (images, operations, levels, signs)))
        assert torch.equal(alone[0], together[i]), (i, NAMES[operations[i]])
