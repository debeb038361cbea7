"""Download CIFAR-10 and extract it, for example on a login node before training on nodes without a network.

--jpeg DIR also writes it as JPEG files of quality 75, for data=folder data.root=DIR (docs/results.md).
"""

import argparse
import logging
import sys
from pathlib import Path

from omegaconf import OmegaConf
from PIL import Image

from cifar10_tl.config import CONFIG_DIR
from cifar10_tl.config.errors import UserError
from cifar10_tl.data.sources import Cifar10


def write_jpeg(source: Cifar10, folder: Path) -> None:
    """Write the images to ``folder/<split>/<class>/NNNN.jpg``, numbered in the official order."""
    for split, (images, labels, _) in source.load().items():
        for label, name in enumerate(source.class_names):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for number, index in enumerate((labels == label).nonzero().flatten().tolist()):
                image = Image.fromarray(images[index].permute(1, 2, 0).numpy())
                image.save(folder / split / name / f"{number:04d}.jpg", quality=75)


def main() -> None:
    """Fill the folder; exit with status 2 after an error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="data", help="folder to fill (default: %(default)s)")
    parser.add_argument("--mirror", action="append", help="URL of cifar-10-python.tar.gz, may be repeated")
    parser.add_argument("--jpeg", type=Path, metavar="DIR", help="folder for JPEG files of quality 75")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = OmegaConf.load(CONFIG_DIR / "data" / "cifar10.yaml")
    try:
        source = Cifar10(arguments.root, arguments.mirror or config.mirrors, config.stall_seconds)
        source.prepare()
        if arguments.jpeg:
            write_jpeg(source, arguments.jpeg)
        print(f"CIFAR-10 is complete in {arguments.root}")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
