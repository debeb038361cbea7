"""Take the pictures of README and docs from a finished run: figures, report.html and the tabs of TensorBoard.

python -m cifar10_tl.train experiment=quickstart trainer.precision=32-true    (or make demo)
python scripts/screenshots.py outputs/runs/<time>                             writes docs/images/*.png

Requires the extra "docs" and Chromium: pip install 'cifar10_tl[docs]', apt-get install chromium chromium-driver
"""

import argparse
import io
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from PIL import Image
from selenium import webdriver

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
DESKTOP, PHONE = (1280, 860), (390, 860)
FIGURES = {"confusion_matrix": "confusion_matrix_test", "incorrect": "incorrect_test", "curves": "curves"}
#: Tabs of TensorBoard, and what they show of their contents.
TABS = {
    "scalars": "&tagFilter=^(train|val)&_smoothingWeight=0",
    "custom_scalars": "&_smoothingWeight=0",
    **dict.fromkeys(("images", "hparams", "text", "pr_curves", "projector"), ""),
}
#: Parts of the report, and the size and color scheme of their pictures.
PARTS = {"": (DESKTOP, "light"), "errors": (DESKTOP, "light"), "confusion": (PHONE, "dark")}


def main() -> None:
    """Write the pictures of the run on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run.resolve()
    for name, figure in FIGURES.items():
        save(name, (run / "figures" / f"{figure}.png").read_bytes())
    with browser() as window, tensorboard(run) as address:
        for part, (size, scheme) in PARTS.items():
            name = f"report_{part}".strip("_")
            save(name, screenshot(window, f"{(run / 'report.html').as_uri()}#{part}", size, scheme))
        for tab, options in TABS.items():
            page = f"{address}/?darkMode=false#{tab}{options}"
            save(f"tensorboard_{tab}", screenshot(window, page, DESKTOP, "light"))


def save(name: str, png: bytes) -> None:
    """Write a picture with at most 256 colors, which halves its size."""
    with Image.open(io.BytesIO(png)) as picture:
        file = IMAGES / f"{name}.png"
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file}: {picture.size[0]} x {picture.size[1]}, {file.stat().st_size / 1e3:.0f} kB")


@contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    """Start Chromium without a window, with WebGL in software for the projector."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "enable-unsafe-swiftshader", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    window = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield window
    finally:
        window.quit()


@contextmanager
def tensorboard(run: Path) -> Iterator[str]:
    """Serve a run and yield the address, as soon as the run is listed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "tensorboard.main", "--host", "localhost", "--port", port, "--logdir", run.name]
    command += ["--samples_per_plugin=images=1000"]
    with subprocess.Popen(command, cwd=run.parent, stderr=subprocess.DEVNULL) as server:  # the pages show --logdir
        try:
            while not is_listed(f"http://localhost:{port}/data/runs"):
                time.sleep(1)
            yield f"http://localhost:{port}"
        finally:
            server.terminate()


def is_listed(address: str) -> bool:
    try:
        return bool(json.load(urlopen(address)))  # noqa: S310
    except URLError:  # the server is starting
        return False


def screenshot(window: webdriver.Chrome, address: str, size: tuple[int, int], scheme: str) -> bytes:
    """Return a picture of a page as soon as it has not changed for three seconds, or after a minute."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    window.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    window.get("about:blank")  # else another #tab would not load the page
    window.get(address)
    seen, unchanged = b"", 0
    for _ in range(60):
        time.sleep(1)
        picture = window.get_screenshot_as_png()
        seen, unchanged = picture, unchanged + 1 if picture == seen else 0
        if unchanged == 3:
            break
    return seen


if __name__ == "__main__":
    main()
