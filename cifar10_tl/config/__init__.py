"""Settings of the commands, from the command line to a validated config."""

from pathlib import Path

PACKAGE_DIR = Path(__file__).resolve().parents[1]
#: The configs are inside the package in a wheel and beside it in a checkout.
CONFIG_DIR = next(d for d in (PACKAGE_DIR / "conf", PACKAGE_DIR.parent / "conf") if (d / "train.yaml").is_file())
