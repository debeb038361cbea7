from __future__ import annotations

import multiprocessing
import os
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from callbacks.small_fit import SPLIT, small_fit
from helpers import write_png

from cifar10_tl.config.errors import OneProcessError, UserError
from cifar10_tl.data.batch import BatchLoader, BatchSampler, Split
from cifar10_tl.data.files import FileImages
from cifar10_tl.data.images import decode_image


@pytest.fixture
def files(tmp_path: Path) -> Split:
    """Return the images of ``SPLIT``, each in a file; those with odd numbers are wider than high."""
    write_png(tmp_path / "wide", F.pad(SPLIT.images, (4, 4)))
    write_png(tmp_path / "square", SPLIT.images)
    paths = [f"{'wide' if i % 2 else 'square'}/{i:02d}.png" for i in range(len(SPLIT))]
    return Split(FileImages(tmp_path, paths, 32, "crop"), SPLIT.labels)


@pytest.fixture
def two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert multiprocessing.active_children() == [], "workers have outlived an earlier test"
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)


def loader(split: Split, epoch: int = 0) -> BatchLoader:
    """Return six batches of two images."""
    sampler = BatchSampler(len(split), 2, shuffle=True, seed=3)
    sampler.set_epoch(epoch)
    return BatchLoader(split, sampler)


def test_images_are_decoded_to_the_pixels_of_the_file(files: Split, tmp_path: Path) -> None:
    assert files.shape == (12, 3, 32, 32)
    assert torch.equal(files.take(torch.tensor([7, 2])), SPLIT.images[[7, 2]])
    assert files.take(torch.tensor([], dtype=torch.long)).shape == (0, 3, 32, 32)
    squeezed, cropped = (FileImages(tmp_path, ["wide/05.png"], 8, fit) for fit in ("squeeze", "crop"))
    image = squeezed.take(torch.tensor([0]))
    assert np.array_equal(image[0].numpy(), decode_image(tmp_path / "wide" / "05.png", 8, "squeeze"))
    assert not torch.equal(image, cropped.take(torch.tensor([0])))


@pytest.mark.usefixtures("two_workers")
def test_workers_give_the_same_batches(files: Split) -> None:
    with_workers, without, pids = loader(files), loader(SPLIT), set()
    assert (with_workers.num_workers, without.num_workers) == (2, 0)
    for epoch in range(2):
        for one in (with_workers, without):
            one.sampler.set_epoch(epoch)
        ahead, expected, start = iter(with_workers), iter(without), time.perf_counter()
        for batch in ahead:
            assert start <= with_workers.requested_at <= time.perf_counter()
            same = next(expected)
            assert torch.equal(batch.images, same.images)
            assert torch.equal(batch.targets, same.targets)
            assert torch.equal(batch.indices, same.indices)
            assert with_workers.state_dict() == without.state_dict(), "batches that were read ahead do not count"
            pids |= {child.pid for child in multiprocessing.active_children()}
            start = time.perf_counter()
        assert len([*expected]) == 0
    assert len(pids) == 2, "workers were started again"


@pytest.mark.usefixtures("two_workers")
@pytest.mark.parametrize("done", [1, 4])
def test_resuming_inside_an_epoch_gives_its_remaining_batches(files: Split, done: int) -> None:
    stopped, resumed = loader(files, epoch=5), loader(files, epoch=5)
    whole = [batch.indices.tolist() for batch in loader(SPLIT, epoch=5)]
    begun = [batch.indices.tolist() for batch in islice(stopped, done)]
    state = stopped.state_dict()
    assert state == {"epoch": 5, "batches_done": done}
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    rest = []
    for batch in resumed:
        rest.append(batch.indices.tolist())
        assert resumed.state_dict() == {"epoch": 5, "batches_done": done + len(rest)}
    assert begun + rest == whole
    assert [len([*one]) for one in (stopped, resumed)] == [6, 6], "a new iteration is complete"


@pytest.mark.usefixtures("two_workers")
def test_a_file_that_becomes_unreadable_is_named_in_one_line(files: Split, tmp_path: Path) -> None:
    path = tmp_path / "wide" / "05.png"
    path.write_bytes(b"no image")
    message = f"{path} cannot be read (not an image format that Pillow can read): restore it, then start or resume"
    for read in (lambda: files.images, lambda: small_fit(tmp_path, split=files)):
        with pytest.raises(OneProcessError) as raised:
            read()
        assert str(raised.value) == f"{message} again"
    assert multiprocessing.active_children() == [], "workers end with the fit"
    path.unlink()
    with pytest.raises(UserError, match=r"05\.png cannot be read \(No such file or directory\)"):
        files.image(5)


@pytest.mark.usefixtures("two_workers")
def test_workers_do_not_receive_the_signals_of_a_terminal(files: Split) -> None:
    """It sends Ctrl-C to a whole process group, and the run continues to the end of the step or of the epoch."""
    batches = iter(loader(files))
    assert len([next(batches), next(batches)]) == 2  # one from each
    pids = [child.pid or 0 for child in multiprocessing.active_children()]
    assert [os.getpgid(pid) for pid in pids] == pids
    assert os.getpgrp() not in pids


@pytest.mark.usefixtures("two_workers")
def test_training_is_the_same_as_on_images_in_memory(files: Split, tmp_path: Path) -> None:
    weights = [small_fit(tmp_path, split=split)[1].state_dict() for split in (files, SPLIT)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert multiprocessing.active_children() == [], "workers end with the fit"
