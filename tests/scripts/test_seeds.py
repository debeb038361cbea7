from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY


@pytest.mark.slow
def test_seeds_script_starts_one_sweep_and_describes_it(tmp_path: Path) -> None:
    """A replacement for Python writes results instead of training."""
    fake_python = tmp_path / "python"
    fake_python.write_text(
        f"""#!{sys.executable}
import json, os, pathlib, sys
if sys.argv[1] == "-c":
    os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
print(sys.argv[1:])
folder = next(a.split("=")[1] for a in sys.argv if a.startswith("paths.output_dir="))
for job, acc in enumerate((0.9, 0.92, 0.94)):
    run = pathlib.Path(folder, str(job))
    run.mkdir(parents=True)
    (run / "results.json").write_text(json.dumps({{"test": {{"acc": acc}}, "config": {{"seed": job}}}}))
"""
    )
    fake_python.chmod(0o755)

    def seeds(*arguments: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "PYTHON": str(fake_python), "PYTHONPATH": str(REPOSITORY)}
        command = ["bash", str(REPOSITORY / "scripts" / "seeds.sh"), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    done = seeds("3", "optimizer.lr=1e-3")
    assert done.returncode == 0, done.stderr
    command = "'-m', 'cifar10_tl.train', '--multirun', 'optimizer.lr=1e-3', 'seed=0,1,2', 'paths.output_dir="
    assert command in done.stdout
    assert "3 runs: mean test acc 92.00%, standard deviation 2.00 points, 95% interval 87.03 to 96.97%" in done.stdout
    assert (tmp_path / "outputs" / "sweeps").is_dir()
    assert seeds("3", "paths.output_dir=mine").returncode == 0
    assert (tmp_path / "mine" / "2").is_dir()
    for arguments, message in (((), "N >= 1"), (("0",), "N >= 1"), (("2", "seed=4"), "leave seed out")):
        done = seeds(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
