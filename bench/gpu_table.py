#!/usr/bin/env python3
"""Our figures on a GPU beside PyTorch's: the lines of `flowtape bench --json` and of peer/torch_gpu_step.py as Markdown.

    gpu_table.py figures.jsonl [peer.jsonl]
"""
import json, os, sys


def lines(path):
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file if line.startswith("{")]


def cell(value, digits=1):
    return "" if value is None else f"{value:,.{digits}f}"


def ratio(ours, theirs):
    """How many times as long, or as fast, as the better of the peer's."""
    return "" if not ours or not theirs else f"{ours / theirs:.2f}"


def table(head, rows):
    print("| " + " | ".join(head) + " |\n|---|" + "--:|" * (len(head) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def steps(ours, peers):
    for step in ours:
        times = {p["peer"]: p["s_step"] for p in peers if p["config"].upper() == step["config"].upper()}
        ms = {name: 1e3 * t for name, t in times.items()}
        yield [step["config"].upper(), cell(1e3 * step["s_step"]), cell(ms.get("torch-eager")), cell(ms.get("torch-compile")),
               ratio(step["s_step"], min(times.values(), default=None)), cell(step["gflop"] / step["s_step"] / 1e3)]


def operations(ours, limits):
    gemms, sdpa = limits.get("gemm_tflops", {}), limits.get("sdpa", {})
    copy, peak = limits.get("copy_tb_s"), limits.get("gemm_bf16_tflops")
    for op in ours:
        if op.get("gflops"):
            rate = op["gflops"] / 1e3
            yield [f"{op['op']} {op['shape']}", cell(rate) + " TFLOP/s", cell(peak), ratio(rate, peak)]
        else:
            rate = op["gb_s"] / 1e3
            yield [f"{op['op']} {op['shape']}", cell(rate, 2) + " TB/s", cell(copy, 2), ratio(rate, copy)]
    # The peer's single figures, to read beside ours.
    for shape, rates in gemms.items():
        for name, rate in rates.items():
            yield [f"peer: matmul {shape} {name}", "", cell(rate), ""]
    for shape, rates in sdpa.items():
        if isinstance(rates, dict):
            text = f"{cell(rates['fwd_tflops'])} forward, {cell(rates['fwd_bwd_tflops'])} with backward"
            yield [f"peer: attention {shape}", "", text, ""]


def main():
    ours = lines(sys.argv[1])
    peers = lines(sys.argv[2]) if len(sys.argv) > 2 else []
    devices = {line["device"] for line in ours if "device" in line}
    print("On " + ", ".join(sorted(devices)) + ", bf16.\n")
    table(["step", "ours, ms", "torch eager, ms", "torch compile, ms", "ours / the better", "our TFLOP/s"],
          steps([o for o in ours if "s_step" in o], [p for p in peers if "s_step" in p]))
    measured = [o for o in ours if "op" in o]
    limits = next((p for p in peers if "copy_tb_s" in p), {})
    if measured or limits:
        table(["operation", "ours", "torch's 8192 matmul, or copy", "ours / that"], operations(measured, limits))


if __name__ == "__main__":
    main()
