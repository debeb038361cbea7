#!/usr/bin/env bash
# Two machines on one: two network namespaces with addresses of their own and a cable between them, a run across it by
# torchrun, the same run in one process, and what differs.      sudo scripts/two_machines.sh [FOLDER]
#
# Needs root and iproute2; PYTHON names the interpreter (default: .venv/bin/python). The trunk is frozen, for BatchNorm's
# statistics are those of each process: see docs/scaling.md.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
folder=${1:-$(mktemp -d)}
mkdir -p "$folder"
run=(experiment=quickstart model.backbone=resnet18 model.freeze=backbone model.head.dropout=0 data.train_size=700
    data.val_size=100 data.test_size=101 data.batch_size=64 trainer.max_epochs=2 trainer.precision=32-true
    trainer.deterministic=true trainer.enable_progress_bar=false)

for tool in ip; do
    command -v "$tool" > /dev/null || { echo "error: $tool is not there: install iproute2" >&2; exit 2; }
done
[[ $(id -u) == 0 ]] || { echo "error: network namespaces need root: use sudo" >&2; exit 2; }

names=(cifar-a-$$ cifar-b-$$)
trap 'for name in "${names[@]}"; do ip netns del "$name" 2> /dev/null || true; done' EXIT
for name in "${names[@]}"; do ip netns add "$name"; done
ip link add veth0 netns "${names[0]}" type veth peer name veth0 netns "${names[1]}"
for i in 0 1; do
    ip -n "${names[$i]}" address add "10.77.0.$((i + 1))/24" dev veth0
    ip -n "${names[$i]}" link set lo up
    ip -n "${names[$i]}" link set veth0 up
done

export PYTHONPATH=$root OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=veth0
pids=()
for i in 0 1; do
    ip netns exec "${names[$i]}" "$python" -m torch.distributed.run --nnodes=2 --nproc-per-node=1 --node-rank=$i \
        --master-addr=10.77.0.1 --master-port=29500 -m cifar10_tl.train "${run[@]}" trainer=ddp_cpu trainer.devices=1 \
        trainer.num_nodes=2 paths.output_dir="$folder/two" > "$folder/machine-$i.log" 2>&1 &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || { tail -n 30 "$folder"/machine-*.log >&2; exit 1; }; done
unset GLOO_SOCKET_IFNAME
"$python" -m cifar10_tl.train "${run[@]}" trainer.accelerator=cpu trainer.devices=1 \
    paths.output_dir="$folder/one" > "$folder/one.log" 2>&1 || { tail -n 30 "$folder/one.log" >&2; exit 1; }

"$python" - "$folder" << 'END'
import csv, json, sys
import torch

one, two = (f"{sys.argv[1]}/{name}" for name in ("one", "two"))
rows = [list(csv.DictReader(open(f"{run}/metrics.csv"))) for run in (one, two)]
keys = ("train/loss", "train/acc", "val/loss", "val/acc")
losses = max(abs(float(a[k]) - float(b[k])) for a, b in zip(*rows, strict=True) for k in keys)
states = [torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (one, two)]
weights = max(float((states[0][k].double() - states[1][k].double()).abs().max()) for k in states[0])
results = [json.load(open(f"{run}/results.json")) for run in (one, two)]
same = results[0]["confusion_matrix"] == results[1]["confusion_matrix"]
devices, count = results[1]["environment"]["devices"], results[1]["test"]["count"]
print(f"{devices} processes on two addresses, {count} test images; largest difference to one process:")
print(f"losses and accuracies {losses:.2e}, weights {weights:.2e}, confusion matrix {'the same' if same else 'ANOTHER'}")
sys.exit(0 if same and count == 101 and losses < 1e-4 and weights < 1e-4 else 1)
END
