"""Download and unpack CIFAR-10, to fill a folder ahead of training (on a login node, say).

python scripts/download.py [--root data] [--mirror URL ...]
"""

import argparse
import logging
import sys
from pathlib import Path

from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for a checkout that is not installed

from cifar10_tl.config.errors import UserError
from cifar10_tl.config.run_dir import CONFIG_DIR
from cifar10_tl.data.sources import prepare_cifar10


def main() -> int:
    """Run the command; the exit status: 0, 2 after a one-line `error:`, 130 when interrupted."""
    parser = argparse.ArgumentParser(description="Download and unpack CIFAR-10 (170 MB).")
    parser.add_argument("--root", default="data", help="folder to fill (default: %(default)s)")
    parser.add_argument(
        "--mirror",
        action="append",
        metavar="URL",
        help="address of cifar-10-python.tar.gz; repeat for more (default: those of conf/data/cifar10.yaml)",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = OmegaConf.load(CONFIG_DIR / "data" / "cifar10.yaml")
    mirrors = arguments.mirror or list(config.mirrors)
    try:
        folder = prepare_cifar10(arguments.root, mirrors, config.md5, config.stall_seconds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing half done is left", file=sys.stderr)
        return 130
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
