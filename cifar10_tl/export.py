"""Export the network of a checkpoint as a model file that runs without this project.

python -m cifar10_tl.export checkpoint=outputs/runs/<time>/checkpoints/best.ckpt                    ONNX
python -m cifar10_tl.export checkpoint=best.ckpt format=torch_export output=model.pt2    torch.export

The model maps ``images``, raw uint8 [N, 3, S, S] (S: native size, N: any number), to ``logits``, float32 [N, K]. Its
metadata contains the class names. The file is kept only if its logits match those of the checkpoint.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from omegaconf import DictConfig

from cifar10_tl import __version__
from cifar10_tl.config.errors import UserError
from cifar10_tl.config.launcher import run_command
from cifar10_tl.io import atomic_write

if TYPE_CHECKING:  # slow to import, therefore imported by the functions that need them
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)

SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2"}

#: Largest difference of two logits, absolute and relative to the largest logit. Summing float32 in another order
#: changes logits by up to 3e-4; another resize changes them by 1e-2 and more.
ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE = 1e-3, 1e-4

#: Batches in which images are compared; several sizes, so that a model with a fixed N fails.
BATCH_SIZES = (1, 7, *7 * [8])


def export(cfg: DictConfig) -> Path:
    """Write the model file of ``cfg`` if its logits match those of the checkpoint, and return its path."""
    suffix = SUFFIXES[cfg.format]
    output = Path(cfg.output or Path(cfg.paths.output_dir) / f"model{suffix}")
    if output.suffix != suffix or output.is_dir():
        raise UserError(f"output={output}: format={cfg.format} needs a file name that ends in {suffix}")
    if cfg.format == "onnx" and not all(map(find_spec, ("onnx", "onnxruntime", "onnxscript"))):
        raise UserError("format=onnx: run pip install 'cifar10_tl[export]' first, or use format=torch_export")

    import torch

    from cifar10_tl.engine.checkpoints import restore
    from cifar10_tl.engine.hardware import quiet_libraries

    quiet_libraries()
    warnings.simplefilter("ignore")  # the exporters report on their own work
    for name in ("onnxscript", "onnx_ir", "torch._export", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    module = restore(Path(cfg.checkpoint))
    classes, size, fit = module.class_names, module.hparams["native_size"], module.hparams["fit"]
    origin = {"checkpoint": cfg.checkpoint, "epoch": module.restored_epoch}
    versions = {"cifar10_tl": __version__, "torch": torch.__version__}
    metadata = {"class_names": classes, "native_size": size, "fit": fit, **origin, **versions}
    parity = write_verified(output, module.network, metadata, comparison_images(cfg.compare_on, size, fit))
    log.info(
        f"\n\n  model   {output} ({output.stat().st_size / 1e6:.1f} MB)"
        f"\n  input   images uint8 [N, 3, {size}, {size}], RGB, any N"
        f"\n  output  logits float32 [N, {len(classes)}], one per class of the metadata"
        f"\n  parity  {parity}"
    )
    return output


def comparison_images(folder: str | None, size: int, fit: str) -> Tensor:
    """Return images from a folder, or built-in ones: uint8 [sum(BATCH_SIZES), 3, size, size]."""
    import numpy as np
    import torch

    from cifar10_tl.data.images import BadImageError, decode_image, list_files
    from cifar10_tl.data.shapes import draw_shapes

    if folder is None:
        return draw_shapes(sum(BATCH_SIZES), seed=0, image_size=size)[0]
    files, errors = list_files(Path(folder))
    if errors or not files:
        raise UserError(f"compare_on={folder}: {errors[0] if errors else 'no files in this folder'}")
    chosen = [files[i] for i in np.linspace(0, len(files) - 1, sum(BATCH_SIZES)).astype(int)]
    images = []
    for file in chosen:
        try:
            images.append(decode_image(file, size, fit))
        except BadImageError as error:
            raise UserError(f"compare_on={folder}: {file}: {error}") from error
    return torch.from_numpy(np.stack(images))


def write_verified(output: Path, network: torch.nn.Module, metadata: Mapping[str, Any], images: Tensor) -> str:
    """Write ``output`` if its logits of ``images`` match those of ``network``, and return how well they match."""
    import torch

    batches = torch.split(images, list(BATCH_SIZES))
    with torch.no_grad(), atomic_write(output) as file:
        expected = torch.cat([network(batch) for batch in batches])  # before the exporter can change the network
        try:
            model = write_model(network, torch.zeros_like(images[:2]), metadata, file, output.suffix)
            logits = torch.cat([model(batch) for batch in batches])
        except Exception as error:  # the libraries have no common class
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            raise UserError(f"cannot export this network to {output.suffix}: {reason}") from error
        matches, parity = compare(expected, logits)
        if not matches:
            raise UserError(f"{output} was not written because its logits differ from the checkpoint's: {parity}")
    return parity


def compare(expected: Tensor, logits: Tensor) -> tuple[bool, str]:
    """Return whether logits, float [n, K], match the expected ones, and a description of the differences."""
    difference = float((logits - expected).abs().max())
    tolerance = ABSOLUTE_TOLERANCE + RELATIVE_TOLERANCE * float(expected.abs().max())
    same = f"same class for {int((logits.argmax(1) == expected.argmax(1)).sum())} of {len(expected)} images"
    parity = f"largest difference of a logit {difference:.1e} (tolerance {tolerance:.1e}), {same}"
    return difference <= tolerance, parity


def write_model(
    network: torch.nn.Module, example: Tensor, metadata: Mapping[str, Any], file: IO[bytes], suffix: str
) -> Callable[[Tensor], Tensor]:
    """Write a .pt2 or .onnx file, and return the model that is read from it.

    Metadata is stored as metadata.json, or as ONNX properties (text, or else JSON).
    """
    import torch

    dynamic_shapes: Any = ({0: torch.export.Dim("N")},)
    if suffix == ".pt2":
        program = torch.export.export(network, (example,), dynamic_shapes=dynamic_shapes)
        torch.export.save(program, file, extra_files={"metadata.json": json.dumps(metadata)})
        file.seek(0)
        return torch.export.load(file).module()

    import onnxruntime

    options: Any = {"dynamo": True, "verbose": False, "input_names": ["images"], "output_names": ["logits"]}
    onnx: Any = torch.onnx.export(network, (example,), dynamic_shapes=dynamic_shapes, **options)
    onnx.model.metadata_props.update({k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()})
    file.write(onnx.model_proto.SerializeToString())
    file.seek(0)
    session = onnxruntime.InferenceSession(file.read(), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def main() -> None:
    """Run ``python -m cifar10_tl.export``."""
    run_command("export", export)


if __name__ == "__main__":
    main()
