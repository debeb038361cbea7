"""Download CIFAR-10 and extract it, for example on a login node before training on nodes without a network."""

import argparse
import logging
import sys

from omegaconf import OmegaConf

from cifar10_tl.config import CONFIG_DIR
from cifar10_tl.config.errors import UserError
from cifar10_tl.data.sources import Cifar10


def main() -> None:
    """Fill the folder; exit with status 2 after an error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="data", help="folder to fill (default: %(default)s)")
    parser.add_argument("--mirror", action="append", help="URL of cifar-10-python.tar.gz, may be repeated")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = OmegaConf.load(CONFIG_DIR / "data" / "cifar10.yaml")
    try:
        Cifar10(arguments.root, arguments.mirror or config.mirrors, config.md5, config.stall_seconds).prepare()
        print(f"CIFAR-10 is complete in {arguments.root}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
