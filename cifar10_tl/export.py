"""Write the network of a checkpoint as a model file that runs without this project, and prove that it is the same.

python -m cifar10_tl.export checkpoint=outputs/runs/<stamp>/checkpoints/best.ckpt                    ONNX
python -m cifar10_tl.export checkpoint=best.ckpt format=torch_export output=model.pt2    torch.export

The file takes ``images``, uint8 [N, 3, S, S] as they are (S: the native size, N: any number), and gives ``logits``,
float32 [N, K]; resizing and normalising happen inside. Its metadata tells the class names and where it came from.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig

from cifar10_tl import __version__
from cifar10_tl.config.errors import UserError
from cifar10_tl.config.launcher import run_command
from cifar10_tl.io import atomic_write

if TYPE_CHECKING:  # seconds to import: only once the settings are known to be good
    import torch
    from torch import Tensor

    from cifar10_tl.models.lit_classifier import LitClassifier


log = logging.getLogger(__name__)


#: Logits may differ by this much, and by this share of the largest logit more. Float32 sums in another order differ by
#: 1e-6 to 3e-4, as much as float32 and float64 do. Another resize makes 1e-2 and more in a network that has learned.
TOLERANCE, RELATIVE_TOLERANCE = 1e-3, 1e-4


#: The compared images go through the file in batches of these sizes, so that one with a fixed N is found out.
BATCH_SIZES = (1, 7, *7 * [8])


#: Said by torch while it exports an LSTM; none of it is about the file.
_CHATTER = (
    r"The tensor attributes .*_flat_weights.* were assigned during export.*",
    r"_check_is_size will be removed in a future PyTorch release.*",
    r"No complete tensor found in the group!.*",
)


#: From images, uint8 [N, 3, S, S], to logits, float32 [N, K].
Model = Callable[["Tensor"], "Tensor"]


@dataclass(frozen=True)
class Parity:
    """How near the logits of the file come to those of the checkpoint.

    Attributes:
        largest_difference: of any logit.
        allowed: the largest that may pass.
        count: of images.
        agreeing: images that both put in the same class.
        contradicted: those of the others whose two largest logits are further apart than ``allowed``: no mere ties.
    """

    largest_difference: float
    allowed: float
    count: int
    agreeing: int
    contradicted: int

    @property
    def good(self) -> bool:
        """Whether the file may pass for the checkpoint; differences that are no number do not."""
        return self.largest_difference <= self.allowed and not self.contradicted

    def __str__(self) -> str:
        return (
            f"largest difference of a logit {self.largest_difference:.1e} ({self.allowed:.1e} allowed), "
            f"same class for {self.agreeing} of {self.count} images"
        )


def export(cfg: DictConfig) -> Parity:
    """Write the file that ``cfg`` asks for.

    Raises:
        UserError: the checkpoint cannot be read, a package is missing, the network cannot be written in this format,
            or the file gives other logits than the checkpoint. Whatever the output was before is then still there.
    """
    output = output_file(cfg)
    check_installed(cfg.format)

    from cifar10_tl.engine.checkpoints import restore
    from cifar10_tl.engine.hardware import quiet_libraries

    quiet_libraries()
    quiet_exporter()
    module = restore(Path(cfg.checkpoint))
    images, origin = comparison_images(cfg.compare_on, Path(cfg.checkpoint), module.hparams["native_size"])
    parity = write_verified(output, cfg.format, module, provenance(module, cfg.checkpoint), images)
    log.info("%s", summary(output, module, parity, origin))
    return parity


def output_file(cfg: DictConfig) -> Path:
    """Where to write.

    Raises:
        UserError: the name has another ending than such files have; it may well be a slip, such as the checkpoint's.
    """
    suffix = FORMATS[cfg.format].suffix
    output = Path(cfg.output or Path(cfg.paths.output_dir) / f"model{suffix}")
    if output.suffix != suffix or output.is_dir():
        raise UserError(f"output={output}: should be a file that ends in {suffix}, for format={cfg.format}")
    return output


def check_installed(format_name: str) -> None:
    """Complain of missing packages before any work is done.

    Raises:
        UserError: it names the extra that brings them.
    """
    if missing := [p for p in FORMATS[format_name].packages if find_spec(p) is None]:
        raise UserError(
            f"format={format_name} needs {', '.join(missing)}: pip install 'cifar10_tl[export]', "
            "or use format=torch_export, which needs nothing more"
        )


def quiet_exporter() -> None:
    """Keep back, by name, what the exporters say of their own work; other warnings are shown as ever."""
    for pattern in _CHATTER:
        warnings.filterwarnings("ignore", message=pattern)
    for name in ("onnxscript", "onnx_ir"):  # how many nodes each pass removed
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("torch._export.serde.serialize").setLevel(logging.ERROR)  # symbols that an LSTM's graph lost


def provenance(module: LitClassifier, checkpoint: str) -> dict[str, Any]:
    """What travels in the file: the class names in the order of the logits, the size of the images, its origin."""
    import torch

    return {
        "class_names": module.class_names,
        "native_size": module.hparams["native_size"],
        "checkpoint": checkpoint,
        "epoch": module.restored_epoch,
        "cifar10_tl": __version__,
        "torch": torch.__version__,
    }


def summary(output: Path, module: LitClassifier, parity: Parity, origin: str) -> str:
    """The closing words."""
    size, classes = module.hparams["native_size"], module.class_names
    shown = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
    return "\n".join(
        [
            "",
            f"  model   {output} ({output.stat().st_size / 1e6:.1f} MB)",
            f"  input   images uint8 [N, 3, {size}, {size}], RGB, N free",
            f"  output  logits float32 [N, {len(classes)}]: {shown}",
            f"  parity  {parity} {origin}",
        ]
    )


def write_onnx(network: torch.nn.Module, example: Tensor, metadata: Mapping[str, Any], file: IO[bytes]) -> None:
    """Write ``network`` as ONNX; the metadata_props hold ``metadata``, what is no text as JSON."""
    import torch

    batch = {0: torch.export.Dim("N")}
    program: Any = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=(batch,),
        verbose=False,
    )
    program.model.metadata_props.update({k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()})
    file.write(program.model_proto.SerializeToString())


def read_onnx(file: IO[bytes]) -> Model:
    """The model in an ONNX file, run by ONNX Runtime on the CPU."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.read(), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def write_torch_export(network: torch.nn.Module, example: Tensor, metadata: Mapping[str, Any], file: IO[bytes]) -> None:
    """Write ``network`` as torch.export does; the extra file metadata.json holds ``metadata``."""
    import torch

    program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("N")},))
    torch.export.save(program, file, extra_files={"metadata.json": json.dumps(metadata)})


def read_torch_export(file: IO[bytes]) -> Model:
    """The model in a file of :func:`write_torch_export`."""
    import torch

    return torch.export.load(file).module()


class Format(NamedTuple):
    """A kind of model file."""

    suffix: str
    packages: tuple[str, ...]  # that this project can do without otherwise
    write: Callable[[torch.nn.Module, Tensor, Mapping[str, Any], IO[bytes]], None]
    read: Callable[[IO[bytes]], Model]


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxruntime", "onnxscript"), write_onnx, read_onnx),
    "torch_export": Format(".pt2", (), write_torch_export, read_torch_export),
}


def write_verified(
    output: Path, format_name: str, module: LitClassifier, metadata: Mapping[str, Any], images: Tensor
) -> Parity:
    """Write ``output``, which takes its name only after it was read back and agreed with ``module`` on ``images``.

    Args:
        output: replaced if it exists; left as it is on an error.
        format_name: one of ``FORMATS``.
        module: in eval mode.
        metadata: plain values.
        images: uint8 [n, 3, S, S], see :func:`comparison_images`.

    Raises:
        UserError: the network cannot be written in this format, or the logits differ.
        OSError: the folder cannot be written, or the disk is full.
    """
    import torch

    chosen, network = FORMATS[format_name], module.network
    example = torch.zeros_like(images[:2])  # torch.export keeps it in the file: nobody's picture, then
    with torch.no_grad():
        logits = in_batches(network, images)  # before the exporter has had its hands on the network
        with atomic_write(output) as file:
            try:
                chosen.write(network, example, metadata, file)
                file.seek(0)
                parity = compare(logits, in_batches(chosen.read(file), images))
            except OSError:
                raise
            except Exception as error:  # each library has many of its own
                reason = (str(error).strip() or "no reason given").splitlines()[0]
                raise UserError(
                    f"this network cannot be exported as format={format_name}: {type(error).__name__}: {reason}"
                ) from error
            if not parity.good:
                raise UserError(
                    f"{output} was not written: it gives other logits than the checkpoint; {parity}. "
                    "Try the other format, or newer versions of torch and onnxscript"
                )
    return parity


def in_batches(model: Model, images: Tensor) -> Tensor:
    """Logits float32 [n, K] of ``images`` uint8 [n, 3, S, S], which go through ``model`` in ``BATCH_SIZES``."""
    import torch

    return torch.cat([model(batch) for batch in torch.split(images, list(BATCH_SIZES))])


def compare(expected: Tensor, logits: Tensor) -> Parity:
    """How near ``logits`` come to the ``expected`` ones, both float [n, K]."""
    difference = float((logits - expected).abs().max())
    allowed = TOLERANCE + RELATIVE_TOLERANCE * float(expected.abs().max())
    differing = logits.argmax(1) != expected.argmax(1)
    largest, second = expected.topk(2).values.unbind(1)
    contradicted = differing & (largest - second > allowed)
    count = len(expected)
    return Parity(difference, allowed, count, count - int(differing.sum()), int(contradicted.sum()))


def comparison_images(folder: str | None, checkpoint: Path, size: int) -> tuple[Tensor, str]:
    """Images uint8 [sum(BATCH_SIZES), 3, size, size], and a word on where they come from.

    They are from the user's folder, or else from the data that the checkpoint was trained on, if they are had without
    a download, or else drawn.

    Raises:
        UserError: the user's folder holds no picture, or a broken one.
    """
    from cifar10_tl.data.shapes import draw_shapes

    if folder is not None:
        return read_pictures(Path(folder), size), f"of {folder}"
    images, source = own_images(checkpoint, size)
    if images is not None:
        return images, f"of the data it was trained on ({source})"
    log.info("the data it was trained on (%s) is not here; compare_on=FOLDER compares on real images", source)
    return draw_shapes(sum(BATCH_SIZES), seed=0, image_size=size)[0], "of the built-in shapes"


def own_images(checkpoint: Path, size: int) -> tuple[Tensor | None, str]:
    """Test images of the data that ``checkpoint`` was trained on, None where they are not here; and its source."""
    from cifar10_tl.data.datamodule import CIFAR10DataModule
    from cifar10_tl.data.sources import Folder
    from cifar10_tl.engine.checkpoints import read_checkpoint

    settings = read_checkpoint(checkpoint).get("datamodule_hyper_parameters", {})
    name = settings.get("source", "unknown")
    try:
        source = CIFAR10DataModule(**settings).source
        if isinstance(source, Folder):  # not load(): it would decode every picture, and write a cache
            images = read_pictures(source.root / "test", size)
        else:
            images = spread(source.load()["test"].images)
    except (UserError, OSError, RuntimeError, TypeError):  # RuntimeError: torchvision's word for a missing file
        return None, name
    return images, name


def read_pictures(folder: Path, size: int) -> Tensor:
    """Pictures from anywhere in ``folder``: uint8 [sum(BATCH_SIZES), 3, size, size].

    Raises:
        UserError: there is none, or one is broken.
    """
    import numpy as np
    import torch

    from cifar10_tl.data.images import IMAGE_SUFFIXES, BadImageError, decode_image

    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"{folder}: no picture ({', '.join(sorted(IMAGE_SUFFIXES))}) lies there")
    pictures = []
    for place in spread(torch.arange(len(files))).tolist():
        try:
            pictures.append(decode_image(files[place], size))
        except BadImageError as error:
            raise UserError(f"{files[place]}: {error}") from error
    return torch.from_numpy(np.stack(pictures))


def spread(items: Tensor) -> Tensor:
    """As many of ``items`` [n, ...] as are compared, evenly from first to last; some twice if there are fewer."""
    import torch

    return items[torch.linspace(0, len(items) - 1, sum(BATCH_SIZES)).long()]


def main() -> None:
    """Entry of ``python -m cifar10_tl.export``."""
    run_command("export", export)


if __name__ == "__main__":
    main()
