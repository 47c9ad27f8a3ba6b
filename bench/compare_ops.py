"""Matrix products and attention against PyTorch's, operation by operation, both sides taking turns: ratios of the fastest calls.

    python bench/compare_ops.py --dtype f32 bf16 --threads 1 2 --rounds 3 [--only attention]

The Python that runs this needs torch; `cargo build --release` must have run. Shapes are those of `flowtape bench ops`. PyTorch's
attention is the faster of its fused and its plain one.
"""

import argparse
import json
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowtape import binary

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def fastest(call, seconds):
    """Seconds of the fastest of many calls."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def product(layout, shape, dtype):
    rows, width, out = shape
    x, w, dy = torch.randn(rows, width), torch.randn(out, width), torch.randn(rows, out)
    x, w, dy = (t.to(dtype) for t in (x, w, dy))
    a, b = {"NT": (x, w.t()), "NN": (dy, w), "TN": (dy.t(), x)}[layout]
    result = torch.mm(a, b)
    return [lambda: torch.mm(a, b, out=result)]


def attention(backward, shape, dtype):
    q, k, v, grad = (torch.randn(shape).to(dtype) for _ in range(4))

    def path(backend):
        def forward():
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        if not backward:
            return forward
        inputs = [t.requires_grad_() for t in (q, k, v)]
        o = forward()
        return lambda: torch.autograd.grad(o, inputs, grad, retain_graph=True)

    return [path(SDPBackend.FLASH_ATTENTION), path(SDPBackend.MATH)]


def torch_seconds(op, shape, dtype, seconds):
    shape = [int(size) for size in shape.split("x")]
    if op.startswith("matmul"):
        paths = product(op.split()[1], shape, dtype)
    else:
        paths = attention(op.endswith("backward"), shape, dtype)
    with torch.set_grad_enabled(op.endswith("backward")):
        return min(fastest(path, seconds / len(paths)) for path in paths)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=list(TYPES), default=["f32", "bf16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=["matmul", "attention"], default=["matmul", "attention"])
    parser.add_argument("--seconds", type=float, default=0.3, help="for each operation and round")
    args = parser.parse_args()
    for dtype in args.dtype:
        for threads in args.threads:
            torch.set_num_threads(threads)
            ours, theirs = {}, {}
            for only in args.only * args.rounds:
                command = [binary(), "bench", "ops", "--only", only, "--dtype", dtype, "--threads", str(threads), "--json"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode != 0:
                    sys.exit(done.stderr)
                for line in map(json.loads, done.stdout.splitlines()):
                    key = line["op"], line["shape"]
                    if key not in ours or line["s_min"] < ours[key]["s_min"]:
                        ours[key] = line
                    seconds = torch_seconds(*key, TYPES[dtype], args.seconds)
                    theirs[key] = min(theirs.get(key, seconds), seconds)
            print(f"\n{dtype}, {threads} threads: GFLOP/s, Flowtape / PyTorch, and the ratio of times")
            for (op, shape), line in ours.items():
                peer = line["gflops"] * line["s_min"] / theirs[op, shape]
                print(f"{op:20} {shape:16} {line['gflops']:7.1f} ({100 * line['fraction']:3.0f} % of peak) / {peer:7.1f}"
                      f"   {line['s_min'] / theirs[op, shape]:.2f}", flush=True)


if __name__ == "__main__":
    main()
