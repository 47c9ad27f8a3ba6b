#!/usr/bin/env bash
# The same run on every node, by torchrun: NODES and HEAD are the same everywhere, NODE counts from 0.
set -eu
exec torchrun --no-python --nnodes "${NODES:-1}" --node-rank "${NODE:-0}" --nproc-per-node "${GPUS:-8}" \
    --master-addr "${HEAD:-127.0.0.1}" --master-port "${PORT:-29500}" \
    flowtape train "${RECIPE:-my_recipe.yaml}" --device cuda
