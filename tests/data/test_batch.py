from __future__ import annotations

import pytest
import torch

from cifar10_tl.data.batch import CHUNK, BatchSampler, Split

IMAGES = torch.randint(0, 256, (2 * CHUNK + 40, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Store:
    """Images that are read when they are needed, and how many were read at once."""

    def __init__(self) -> None:
        self.shape, self.largest = IMAGES.shape, 0

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        self.largest = max(self.largest, len(rows))
        return IMAGES[rows]


def batches(sampler: BatchSampler, epoch: int = 0) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return [b.tolist() for b in sampler]


def test_training_takes_full_batches_in_a_new_order_each_epoch() -> None:
    sampler = BatchSampler(100, 32, shuffle=True, seed=3)
    first, second = batches(sampler, 0), batches(sampler, 1)
    assert [len(b) for b in first] == [32, 32, 32]
    assert len(sampler) == 3
    assert first != second
    assert len({i for b in first for i in b}) == 96
    assert first == batches(BatchSampler(100, 32, shuffle=True, seed=3), 0)
    assert first != batches(BatchSampler(100, 32, shuffle=True, seed=4), 0)


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_global_batch_is_the_same_for_any_number_of_processes(world_size: int, shuffle: bool) -> None:
    alone = batches(BatchSampler(101, 16, shuffle=shuffle), 5)
    ranks = [
        batches(BatchSampler(101, 16, shuffle=shuffle, rank=r, world_size=world_size), 5) for r in range(world_size)
    ]
    assert len({len(b) for b in ranks}) == 1, "or a rank would wait for the others"
    for step, whole in enumerate(alone):
        assert [whole[r::world_size] for r in range(world_size)] == [batches[step] for batches in ranks]


def test_seven_images_on_two_processes_stay_seven() -> None:
    seen = [i for r in (0, 1) for b in batches(BatchSampler(7, 4, shuffle=False, rank=r, world_size=2)) for i in b]
    assert sorted(seen) == list(range(7))
    # 9 images: the last global batch has one image, so that rank 1 gets an empty one
    assert [len(b) for b in batches(BatchSampler(9, 4, shuffle=False, rank=1, world_size=2))] == [2, 2, 0]


def test_resuming_inside_an_epoch_gives_its_remaining_batches() -> None:
    sampler = BatchSampler(100, 10, shuffle=True)
    sampler.set_epoch(2)
    iterator = iter(sampler)
    begun = [next(iterator).tolist() for _ in range(4)]
    state = sampler.state_dict()
    assert state == {"epoch": 2, "batches_done": 4}

    resumed = BatchSampler(100, 10, shuffle=True)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert begun + batches(resumed, 2) == batches(sampler, 2)
    assert len(batches(resumed, 2)) == 10, "only once"


def test_a_position_at_the_end_of_an_epoch_starts_the_next_at_its_first_batch() -> None:
    sampler = BatchSampler(100, 10, shuffle=True)
    whole = batches(sampler, 0)
    resumed = BatchSampler(100, 10, shuffle=True)
    resumed.load_state_dict(sampler.state_dict())
    assert len(whole) == len(batches(resumed, 1)) == 10


def test_stopped_iteration_does_not_shorten_the_next() -> None:
    sampler = BatchSampler(100, 10, shuffle=False)
    next(iter(sampler))
    assert len(batches(sampler)) == 10


def test_batch_size_that_cannot_be_divided_is_rejected() -> None:
    with pytest.raises(ValueError, match="batch_size=10 cannot be divided over 3"):
        BatchSampler(100, 10, shuffle=True, world_size=3)


def test_a_subset_refers_to_the_same_images() -> None:
    labels = torch.arange(len(IMAGES)) % 7
    for images in (IMAGES, Store()):
        whole = Split(images, labels, 2 * torch.arange(len(IMAGES)), paths=[f"{i}.png" for i in range(len(IMAGES))])
        some = whole.subset(torch.arange(1, len(IMAGES), 3)).subset(torch.arange(5, 60))  # images 16, 19, ..., 178
        assert some.store is images
        assert some.shape == (55, 3, 4, 4)
        batch = some[torch.tensor([3, 0])]
        assert torch.equal(batch.images, IMAGES[[25, 16]])
        assert batch.targets.tolist() == [25 % 7, 16 % 7]
        assert batch.indices.tolist() == [50, 32]
        assert torch.equal(some.by_index(torch.tensor([356, 38])), IMAGES[[178, 19]])
        assert some.paths_of(torch.tensor([38])) == ["19.png"]
        copy = some.to(torch.device("cpu"))
        assert torch.equal(copy.images, IMAGES[16:179:3])
        assert torch.equal(copy.images, some.images)
        assert torch.equal(copy[torch.tensor([3])].images, IMAGES[[25]])


def test_a_whole_split_is_read_in_chunks() -> None:
    store = Store()
    split = Split(store, torch.arange(len(IMAGES)))
    assert torch.equal(torch.cat([*split.chunks()]), IMAGES)
    assert torch.equal(split.to(torch.device("cpu")).images, IMAGES)
    assert store.largest == CHUNK
