from __future__ import annotations

import hashlib
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.models import ResNet50_Weights

from cifar10_tl.config.errors import UserError
from cifar10_tl.models.backbone import Backbone
from cifar10_tl.models.weights import check_weights, fetch_weights, load_weights, normalisation


@pytest.fixture(scope="module")
def resnet() -> torch.nn.Module:
    """torchvision's own ResNet50 with random weights, BatchNorm statistics included."""
    torch.manual_seed(1)
    net = torchvision.models.resnet50(weights=None)
    for name, buffer in net.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return net.eval()


@pytest.fixture(scope="module")
def feature_map(resnet: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """An input, and what torchvision's own network makes of it in front of its pooling."""
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    got: list[torch.Tensor] = []
    hook = resnet.avgpool.register_forward_pre_hook(lambda module, args: got.append(args[0]))
    with torch.inference_mode():
        resnet(x)
    hook.remove()
    return x, got[0]


def check_same(backbone: Backbone, feature_map: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, wanted = feature_map
    with torch.inference_mode():
        got = backbone.eval()(x)
    assert got.shape == wanted.shape == (2, 2048, 2, 2)
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["whole.pth", "trunk.pth", "whole.safetensors", "nested.pth"])
def test_a_file_gives_the_feature_map_of_torchvision(resnet, feature_map, tmp_path: Path, kind: str) -> None:
    state = resnet.state_dict()
    path = tmp_path / kind
    if kind == "trunk.pth":
        state = {k: v for k, v in state.items() if not k.startswith("fc.")}
    if kind.endswith(".safetensors"):
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}} if "nested" in kind else state, path)
    backbone = Backbone("resnet50")
    load_weights(backbone, "resnet50", str(path))
    check_same(backbone, feature_map)


@pytest.fixture
def published(resnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """torchvision's IMAGENET1K_V2, served from this machine: the requests made, and the file's path in the cache."""
    folder = tmp_path / "served"
    folder.mkdir()
    torch.save(resnet.state_dict(), folder / "weights.pth")
    digest = hashlib.sha256((folder / "weights.pth").read_bytes()).hexdigest()[:8]
    name = f"resnet50-{digest}.pth"
    (folder / "weights.pth").rename(folder / name)
    requests: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, *args: object) -> None:
            requests.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/{name}"
    weights = ResNet50_Weights.IMAGENET1K_V2
    monkeypatch.setattr(weights, "_value_", replace(weights.value, url=url))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    yield requests, tmp_path / "torch" / "hub" / "checkpoints" / name
    server.shutdown()
    server.server_close()


def test_published_weights_come_by_http_once_and_give_the_feature_map(published, feature_map) -> None:
    requests, cached = published
    fetch_weights("resnet50", "IMAGENET1K_V2")
    for _ in range(2):
        backbone = Backbone("resnet50")
        load_weights(backbone, "resnet50", "IMAGENET1K_V2")
        check_same(backbone, feature_map)
    assert len(requests) == 1
    assert cached.is_file()


def test_a_failed_download_names_the_file_its_place_and_a_way_on(published, monkeypatch) -> None:
    _, cached = published
    weights = ResNet50_Weights.IMAGENET1K_V2
    gone = f"http://127.0.0.1:9/{cached.name}"
    monkeypatch.setattr(weights, "_value_", replace(weights.value, url=gone))
    with pytest.raises(UserError) as caught:
        fetch_weights("resnet50", "IMAGENET1K_V2")
    for part in (gone, str(cached), "model.weights=null"):
        assert part in str(caught.value)
    assert not cached.exists()


def test_a_changed_file_in_the_cache_is_refused(published) -> None:
    _, cached = published
    cached.parent.mkdir(parents=True)
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), cached)
    with pytest.raises(UserError, match="not the file that torchvision published"):
        fetch_weights("resnet50", "IMAGENET1K_V2")
    cached.write_bytes(b"cut off")
    with pytest.raises(UserError, match="delete it and start again"):
        fetch_weights("resnet50", "IMAGENET1K_V2")


def test_keys_that_do_not_fit_are_named(resnet, tmp_path: Path) -> None:
    state = dict(resnet.state_dict())
    del state["layer1.0.conv1.weight"]
    state["layer9.weight"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    torch.save(state, tmp_path / "odd.pth")
    backbone = Backbone("resnet50")
    before = backbone.conv1.weight.clone()
    with pytest.raises(UserError) as caught:
        load_weights(backbone, "resnet50", str(tmp_path / "odd.pth"))
    for part in (
        "1 missing: layer1.0.conv1.weight",
        "1 unexpected: layer9.weight",
        "conv1.weight (64, 3, 3, 3) for (64, 3, 7, 7)",
    ):
        assert part in str(caught.value)
    assert torch.equal(backbone.conv1.weight, before)


class _Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("harmed"),))


def test_a_pickle_that_would_run_code_is_refused_and_does_not(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(_Harmful(), tmp_path / "harmful.pth")
    with pytest.raises(UserError, match="cannot be read safely"):
        load_weights(Backbone("resnet18"), "resnet18", str(tmp_path / "harmful.pth"))
    assert not (tmp_path / "harmed").exists()


def test_names_of_weights_are_checked() -> None:
    check_weights("resnet50", None)
    check_weights("resnet50", "IMAGENET1K_V1")
    for wrong in ("IMAGENET1K_V3", "DEFAULT", "/no/such/file.pth"):
        with pytest.raises(UserError, match=r"neither a file nor one of IMAGENET1K_V1, IMAGENET1K_V2"):
            check_weights("resnet50", wrong)
    with pytest.raises(UserError, match="one of IMAGENET1K_V1;"):
        check_weights("resnet18", "IMAGENET1K_V2")


def test_normalisation_is_the_weights_own() -> None:
    assert normalisation("resnet50", "IMAGENET1K_V2") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert normalisation("resnet18", None) == normalisation("resnet18", "IMAGENET1K_V1")
