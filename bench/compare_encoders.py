"""Autoencoders and a text encoder against diffusers' and transformers', both sides taking turns: medians of the runs and their ratios, and memory.

    python bench/compare_encoders.py --dtype f32 bf16 --rounds 3 [--only 512] [--threads 2]

The Python that runs this needs torch and diffusers; `cargo build --release` must have run. Shapes are those of `flowtape bench
encoders`: FLUX.1's autoencoder at 512 x 512 and 1024 x 1024 pixels, Wan 2.1's on 17 frames, four layers of T5-XXL on 512 tokens;
weights are random. Each run is a process of its own, in which something small runs before. Memory is ours of tensors and of the whole
process, PyTorch's of the process less what it takes before the first run; weights are in both.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
import time

from flowtape import binary

WORKS = [
    ("flux.1", "1x3x512x512"), ("flux.1", "1x3x1024x1024"), ("wan2.1", "1x3x17x256x256"), ("t5-xxl", "4x512"),
]


def own(title, dtype, threads):
    """What `flowtape bench encoders` measures of one run."""
    command = [binary(), "bench", "encoders", "--only", title, "--dtype", dtype, "--rounds", "1", "--json", "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def make(name, torch, dtype):
    try:
        import diffusers
    except ImportError:
        sys.exit("compare_encoders.py needs the Python package diffusers: pip install torch diffusers")
    torch.manual_seed(0)
    if name == "t5-xxl":
        import transformers

        config = transformers.T5Config(
            d_model=4096, d_kv=64, d_ff=10240, num_heads=64, num_layers=4, feed_forward_proj="gated-gelu", vocab_size=32128)
        return transformers.T5EncoderModel(config).to(dtype).eval()
    if name == "wan2.1":
        model = diffusers.AutoencoderKLWan()
    else:
        model = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            use_quant_conv=False, use_post_quant_conv=False)
    return model.to(dtype).eval()


def in_memory(key):
    """MiB that the system says this process has, or had at most."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split(key + ":")[1].split()[0]) / 1024


def run_peer(job, answer):
    """Seconds of a run in PyTorch, and MiB that the process grew by, with the weights."""
    import torch

    torch.set_num_threads(job["threads"])
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[job["dtype"]]
    name, way = job["name"].split()
    model = make(name, torch, dtype)
    dims = [int(size) for size in job["shape"].split("x")]
    text = name == "t5-xxl"
    if text:
        small, sizes = [1, 16], [1, dims[1]]
        run = lambda tokens: model(tokens).last_hidden_state
    else:
        small, sizes = [*dims[:-2], 64, 64], dims
        run = lambda x: model.encode(x).latent_dist.mean if way == "encode" else model.decode(x).sample

    def given(dims):
        if text:
            return torch.arange(dims[1])[None]
        if way == "decode":
            frames = [1 + (dims[2] - 1) // 4] if name == "wan2.1" else []
            dims = [1, 16, *frames, dims[-2] // 8, dims[-1] // 8]
        return torch.randn(dims).to(dtype)

    # What making the model took at most is forgotten.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = in_memory("VmRSS")
    with torch.no_grad():
        run(given(small))
        x = given(sizes)
        start = time.perf_counter()
        run(x)
        seconds = time.perf_counter() - start
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    answer.send((seconds, in_memory("VmHWM") - before + weights / 2**20))


def peer(job):
    """The same in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=run_peer, args=(job, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        sys.exit(f"PyTorch failed on {job['name']} {job['shape']}")
    finally:
        process.join()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=["f32", "bf16"], default=["f32", "bf16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", help="only what has this in its name or sizes")
    args = parser.parse_args()
    try:
        import torch  # noqa: F401
    except ImportError:
        sys.exit("compare_encoders.py needs the Python package torch: pip install torch diffusers")
    for dtype in args.dtype:
        print(f"\n{dtype}, {args.threads} threads, medians of {args.rounds}: seconds, Flowtape / PyTorch, their ratio (least to greatest); "
              "MiB of our tensors (process) / PyTorch's, the ratio of the tensors")
        for name, shape in WORKS:
            for way in ["encode"] if name == "t5-xxl" else ["encode", "decode"]:
                title = f"{name} {way} {shape}"
                if args.only and args.only not in title:
                    continue
                turns = []
                for _ in range(args.rounds):
                    line = own(title, dtype, args.threads)
                    turns.append((line, peer({**line, "dtype": dtype, "threads": args.threads})))
                ratios = sorted(line["s_min"] / seconds for line, (seconds, _) in turns)
                ours = statistics.median(line["s_min"] for line, _ in turns)
                theirs = statistics.median(seconds for _, (seconds, _) in turns)
                tensors, process = (max(line[key] for line, _ in turns) for key in ("tensors_mb", "process_mb"))
                memory = statistics.median(memory for _, (_, memory) in turns)
                print(f"{title:32} {ours:8.3f} / {theirs:8.3f}  {ours / theirs:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
                      f"   {tensors} ({process}) / {memory:.0f}  {tensors / memory:.2f}", flush=True)


if __name__ == "__main__":
    main()
