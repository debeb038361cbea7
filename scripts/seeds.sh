#!/usr/bin/env bash
# Train with N seeds and print mean, standard deviation and 95% interval of the test accuracy.
#
#   scripts/seeds.sh 5 experiment=quickstart optimizer.lr=3e-4      (PYTHON=... selects another interpreter)
set -euo pipefail

[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || { echo "error: usage: scripts/seeds.sh N [key=value ...], N >= 1" >&2; exit 2; }
seeds=$(seq -s, 0 $(($1 - 1)))
seeds=${seeds%,} # macOS
shift
sweep=outputs/sweeps/$(date +%Y-%m-%d_%H-%M-%S)_$$
for override in "$@"; do
    [[ $override == paths.output_dir=* ]] && sweep=${override#*=}
    [[ $override != seed=* ]] || { echo "error: $override: the seeds are 0 to N - 1; leave seed out" >&2; exit 2; }
done
"${PYTHON:-python}" -m cifar10_tl.train --multirun "$@" "seed=$seeds" "paths.output_dir=$sweep"
"${PYTHON:-python}" -c '
import sys
from pathlib import Path
from cifar10_tl.config.errors import UserError
from cifar10_tl.engine.comparison import describe_sweep
try:
    print(describe_sweep(Path(sys.argv[1]).expanduser()))
except UserError as error:
    sys.exit(f"error: {error}")' "$sweep"
