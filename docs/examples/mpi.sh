#!/usr/bin/env bash
# Ranks on CPUs, by MPI: two processes a node with half of its cores each. Needs a binary with MPI:
#   apt-get install libopenmpi-dev openmpi-bin libclang-dev
#   cargo build --release -p flowtape --features mpi
set -eu
exec mpirun -n "${RANKS:-4}" --map-by ppr:2:node --bind-to none \
    flowtape train "${RECIPE:-digits}" --device cpu --threads "${THREADS:-16}"
