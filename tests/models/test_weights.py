from __future__ import annotations

import hashlib
import pickle
import threading
from argparse import Namespace
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torchvision.models import ResNet18_Weights

from cifar10_tl.config.errors import UserError
from cifar10_tl.models.backbone import Backbone
from cifar10_tl.models.lit_classifier import LitClassifier
from cifar10_tl.models.weights import check_weights, load_backbone, load_safely, read_weights

NAMES = ["ant", "bee", "wasp"]


@pytest.fixture(scope="module")
def resnet() -> torch.nn.Module:
    """torchvision's own ResNet18 with random weights, BatchNorm statistics included."""
    torch.manual_seed(1)
    net = torchvision.models.resnet18(weights=None)
    for name, buffer in net.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return net.eval()


@torch.inference_mode()
def check_same(weights: str, resnet: torch.nn.Module) -> None:
    """Check that a backbone with these weights gives the features that torchvision's own network pools."""
    backbone = Backbone("resnet18").eval()
    load_backbone(backbone, read_weights("resnet18", weights), weights)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(resnet.fc(backbone(images).mean((2, 3))), resnet(images), rtol=1e-5, atol=1e-5)


def robust_checkpoint(state: dict[str, torch.Tensor], *prefixes: str) -> dict[str, object]:
    """Return the content of a checkpoint of https://github.com/MadryLab/robustness."""
    tensors = {f"{prefix}{key}": value for prefix in prefixes for key, value in state.items()}
    for normalizer in ("module.normalizer", "module.attacker.normalize"):
        tensors |= {f"{normalizer}.new_{name}": torch.zeros(3, 1, 1) for name in ("mean", "std")}
    return {"model": tensors, "optimizer": {"param_groups": []}, "epoch": 90, "nat_prec1": torch.tensor(60.0)}


# those of timm are like whole.pth and whole.safetensors
@pytest.mark.parametrize(
    "kind", ["whole.pth", "trunk.pth", "whole.safetensors", "nested.pth", "robust.ckpt", "attacker.ckpt"]
)
def test_a_file_gives_the_features_of_torchvision(resnet, tmp_path: Path, kind: str) -> None:
    state, path = resnet.state_dict(), tmp_path / kind
    if kind == "whole.safetensors":
        save_file(state, path)
    elif kind == "robust.ckpt":
        other = {key: torch.zeros_like(value) for key, value in state.items()}
        content = robust_checkpoint(state, "module.model.")
        content["model"] |= robust_checkpoint(other, "module.attacker.model.")["model"]
        torch.save(content, path)
    elif kind == "attacker.ckpt":
        torch.save(robust_checkpoint(state, "module.attacker.model."), path)
    elif kind == "trunk.pth":
        torch.save({k: v for k, v in state.items() if "num_batches" not in k and not k.startswith("fc.")}, path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}} if "nested" in kind else state, path)
    check_same(str(path), resnet)


@pytest.fixture
def published(resnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """torchvision's IMAGENET1K_V1, served from this machine: the requests made, and the file's path in the cache."""
    folder = tmp_path / "served"
    folder.mkdir()
    torch.save(resnet.state_dict(), folder / "weights.pth")
    digest = hashlib.sha256((folder / "weights.pth").read_bytes()).hexdigest()[:8]
    file = (folder / "weights.pth").rename(folder / f"resnet18-{digest}.pth")
    requests: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, *args: object) -> None:
            requests.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    entry = ResNet18_Weights.IMAGENET1K_V1
    url = f"http://127.0.0.1:{server.server_address[1]}/{file.name}"
    monkeypatch.setattr(entry, "_value_", replace(entry.value, url=url))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    yield requests, tmp_path / "torch" / "hub" / "checkpoints" / file.name
    server.shutdown()
    server.server_close()


def test_published_weights_are_downloaded_once(published, resnet) -> None:
    requests, cached = published
    for _ in range(2):
        check_same("IMAGENET1K_V1", resnet)
    assert len(requests) == 1
    cached.write_bytes(b"truncated")
    with pytest.raises(UserError, match="not the file that torchvision published: delete it"):
        read_weights("resnet18", "IMAGENET1K_V1")


def test_a_failed_download_names_the_file_and_what_to_do(published, monkeypatch) -> None:
    _, cached = published
    gone, entry = f"http://127.0.0.1:9/{cached.name}", ResNet18_Weights.IMAGENET1K_V1
    monkeypatch.setattr(entry, "_value_", replace(entry.value, url=gone))
    with pytest.raises(UserError) as caught:
        read_weights("resnet18", "IMAGENET1K_V1")
    for part in (gone, str(cached), "model.weights=null"):
        assert part in str(caught.value)
    assert not cached.exists()


def test_tensors_that_do_not_fit_are_named(resnet) -> None:
    state = dict(resnet.state_dict())
    del state["layer1.0.conv1.weight"]
    state |= {"layer9.weight": torch.zeros(1), "conv1.weight": torch.zeros(64, 3, 3, 3)}
    with pytest.raises(UserError, match=r"odd\.pth does not fit this backbone") as caught:
        load_backbone(Backbone("resnet18"), state, "odd.pth")
    for name in ("layer1.0.conv1.weight", "layer9.weight", "conv1.weight"):
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_stem_of_other_resnets_is_explained(resnet) -> None:
    state = {key: value for key, value in resnet.state_dict().items() if key != "conv1.weight"}
    state |= {f"conv1.{i}.weight": torch.zeros(1) for i in (0, 1, 3, 4, 6)}  # timm's resnet18d
    with pytest.raises(UserError, match=r"model\.weights=odd\.pth: its stem has several .* such as timm's resnet50"):
        load_backbone(Backbone("resnet18"), state, "model.weights=odd.pth")


def test_names_of_weights_are_checked() -> None:
    for name in ("IMAGENET1K_V1", None):
        check_weights("resnet50", name)
    for name in ("IMAGENET1K_V3", "DEFAULT", "/no/such/file.pth"):
        with pytest.raises(UserError, match=r"choose IMAGENET1K_V1, IMAGENET1K_V2, a file or null \(random weights\)"):
            check_weights("resnet50", name)
    with pytest.raises(UserError, match=r"model\.weights=IMAGENET1K_V2: choose a file or null"):
        check_weights("resnet10", "IMAGENET1K_V2")


class Harmful:
    """Object that creates a file when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("harmed"),))


def test_files_that_are_broken_or_would_run_code_are_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "hyper_parameters": Harmful()}, "harmful.pth")
    torch.save(torch.zeros(1000), "whole.pth")
    whole, text, pickled = Path("whole.pth").read_bytes(), b"a text", pickle.dumps(Harmful())
    files = {"cut.pth": whole[:2000], "changed.pth": whole[:2000] + b"x" + whole[2001:], "pickle.pth": pickled}
    files |= {"text.pth": text, "text.safetensors": text, "empty.pth": b""}
    for name, content in files.items():
        Path(name).write_bytes(content)
    for name in ("harmful.pth", *files):
        with pytest.raises(UserError, match=f"{name} is damaged, not a checkpoint, or would execute code: .+"):
            load_safely(Path(name))
    assert not Path("harmed").exists()


def test_a_checkpoint_with_objects_is_explained_with_the_call_that_extracts_its_tensors(tmp_path: Path) -> None:
    path, tensors = tmp_path / "robust.ckpt", {"conv1.weight": torch.ones(2)}
    torch.save({"model": tensors, "args": Namespace(lr=0.1)}, path)
    with pytest.raises(UserError, match=r"would execute code: argparse\.Namespace\. If you trust") as caught:
        load_safely(path)
    call = str(caught.value).partition(", for example with ")[2].replace("weights.pth", str(tmp_path / "weights.pth"))
    exec(call)
    assert torch.equal(load_safely(tmp_path / "weights.pth")["conv1.weight"], tensors["conv1.weight"])


def test_init_from_loads_the_head_only_for_the_same_classes_and_shapes(tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    source, path = LitClassifier(NAMES, "resnet18", image_size=32), tmp_path / "source.ckpt"
    expected = source.network.state_dict()
    torch.save({"state_dict": source.state_dict(), "hyper_parameters": dict(source.hparams)}, path)
    for names, options, outcome in (
        (NAMES, {"weights": "IMAGENET1K_V1"}, "loaded backbone and head"),
        (["ant", "bee", "cat"], {}, "its classes differ"),
        (NAMES, {"head": {"name": "linear"}}, "its head has other layers"),
    ):
        other = LitClassifier(names, "resnet18", image_size=32, **options)
        other.load_weights_from(path)
        assert outcome in caplog.records[-1].message
        state = other.network.state_dict()
        same = {name for name, value in state.items() if name in expected and torch.equal(value, expected[name])}
        assert {name for name in state if name.startswith("backbone.")} <= same
        assert ("head.layers.0.weight" in same) == (outcome == "loaded backbone and head")
    with pytest.raises(UserError, match=r"model\.weights=.* of this project; start from it with init_from=FILE"):
        load_backbone(Backbone("resnet18"), read_weights("resnet18", str(path)), f"model.weights={path}")
    with pytest.raises(UserError, match=r"init_from=.* does not fit this backbone"):
        LitClassifier(NAMES, "resnet18", image_size=32, stem="cifar").load_weights_from(path)
