#!/usr/bin/env bash
# How much of a result is luck: train with N seeds, and tell mean, standard deviation and 95 % interval of the accuracy.
#
#   scripts/seeds.sh 5 experiment=quickstart optimizer.lr=3e-4
#
# The runs lie in one sweep folder, outputs/sweeps/<time> (or what paths.output_dir= says). PYTHON= names another python.
set -euo pipefail

count=${1:-}
if ! [[ $count =~ ^[1-9][0-9]*$ ]]; then
    echo "error: scripts/seeds.sh N [key=value ...]: N should be a whole number from 1 on" >&2
    exit 2
fi
shift

python=${PYTHON:-python}
sweep=outputs/sweeps/$(date +%Y-%m-%d_%H-%M-%S)_$$
for override in "$@"; do
    case $override in
        paths.output_dir=*) sweep=${override#*=} ;;
        seed=*) echo "error: $override: scripts/seeds.sh chooses the seeds, 0 to N - 1" >&2 && exit 2 ;;
    esac
done

"$python" -m cifar10_tl.train --multirun "$@" "seed=$(seq -s, 0 $((count - 1)))" "paths.output_dir=$sweep"
"$python" - "$sweep" <<'END'
import sys
from pathlib import Path
from cifar10_tl.engine.comparison import describe_sweep
print(describe_sweep(Path(sys.argv[1])))
END
