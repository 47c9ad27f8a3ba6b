"""Flowtape's training step against PyTorch's, both sides taking turns: ratios of medians, round by round.

    python bench/compare.py --config s m --dtype f32 bf16 --rounds 5 [--compile] [--threads 2] [--out rounds.jsonl]

The Python that runs this needs torch and diffusers; `cargo build --release` must have run. With --compile the better of
PyTorch's eager and compiled steps counts. `others` is how many cores other processes kept busy meanwhile: a round with
much of that says little.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from flowtape import ROOT, binary

TICKS = os.sysconf("SC_CLK_TCK")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", choices=["s", "m", "l", "digits"], default=["s"])
    parser.add_argument("--dtype", nargs="+", choices=["f32", "bf16", "mixed"], default=["f32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--lora", type=int, help="train LoRA adapters of this rank alone, peft's on the other side")
    parser.add_argument("--compile", action="store_true", help="also run PyTorch with compiled blocks")
    parser.add_argument("--quiet", type=float, default=60, help="seconds to wait at most for a quiet machine")
    parser.add_argument("--out", help="append every measurement to this file, one JSON object a line")
    return parser.parse_args()


def busy():
    """Ticks that all cores were busy, and all ticks."""
    fields = [int(v) for v in open("/proc/stat").readline().split()[1:9]]
    return sum(fields) - fields[3] - fields[4], sum(fields)


def wait_until_quiet(seconds):
    deadline = time.time() + seconds
    while time.time() < deadline:
        before = busy()
        time.sleep(0.7)
        after = busy()
        if after[0] - before[0] <= 0.08 * max(1, after[1] - before[1]):
            return


def measure(command, quiet):
    wait_until_quiet(quiet)
    before, start, own = busy()[0], time.time(), os.times()
    done = subprocess.run(command, capture_output=True, text=True)
    after, end, own_after = busy()[0], time.time(), os.times()
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    mine = own_after.children_user - own.children_user + own_after.children_system - own.children_system
    result["others"] = round(((after - before) / TICKS - mine) / (end - start), 2)
    return result


def main():
    args = arguments()
    for config in args.config:
        for dtype in args.dtype:
            compare(args, config, dtype)


def compare(args, config, dtype):
    counts = ["--steps", str(args.steps), "--warmup", str(args.warmup), "--threads", str(args.threads)]
    what = ["--config", config, "--dtype", dtype, *counts, *(["--lora", str(args.lora)] if args.lora else [])]
    torch = [sys.executable, ROOT / "bench" / "torch_step.py", *what]
    sides = [[binary(), "bench", "step", *what, "--json"], torch]
    if args.compile:
        sides.append([*torch, "--compile"])
    rounds = []
    print(f"\n{config} {dtype}, {args.threads} threads")
    for number in range(args.rounds):
        results = [measure(side, args.quiet) for side in sides]
        if args.out:
            with open(args.out, "a") as out:
                out.writelines(json.dumps(r) + "\n" for r in results)
        ours, theirs = results[0], min(results[1:], key=lambda r: r["s_step"])
        assert ours["params"] == theirs["params"], "not the same model"
        row = dict(ours=ours["s_step"], theirs=theirs["s_step"], time=ours["s_step"] / theirs["s_step"],
                   memory=ours["peak_rss_mb"] / theirs["peak_rss_mb"])
        rounds.append(row)
        others = max(r["others"] for r in results)
        print(f"round {number + 1}: flowtape {row['ours']:.4f} s, {theirs['peer']} {row['theirs']:.4f} s, "
              f"ratio {row['time']:.3f}, memory {ours['peak_rss_mb']} / {theirs['peak_rss_mb']} MiB = "
              f"{row['memory']:.2f}, others {others:.2f}", flush=True)
    median = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
    print(f"median : flowtape {median['ours']:.4f} s, torch {median['theirs']:.4f} s, ratio {median['time']:.3f}, "
          f"memory ratio {median['memory']:.2f}")


if __name__ == "__main__":
    main()
