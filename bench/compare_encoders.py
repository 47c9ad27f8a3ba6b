"""Autoencoders and a text encoder against diffusers' and transformers', both sides taking turns: ratios of the fastest runs, and of the memory.

    python bench/compare_encoders.py --dtype f32 bf16 --rounds 3 [--only 512] [--threads 2]

The Python that runs this needs torch and diffusers; `cargo build --release` must have run. Shapes are those of `flowtape bench
encoders`: FLUX.1's autoencoder at 512 x 512 and 1024 x 1024 pixels, Wan 2.1's on 17 frames, four layers of T5-XXL on 512 tokens;
weights are random. Memory is that of a
process of its own for each measurement: ours of tensors, PyTorch's of the process less what it takes before the first run.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import resource
import subprocess
import sys
import time

FLOWTAPE = pathlib.Path(__file__).resolve().parent.parent / "target" / "release" / "flowtape"

WORKS = [
    ("flux.1", "1x3x512x512"), ("flux.1", "1x3x1024x1024"), ("wan2.1", "1x3x17x256x256"), ("t5-xxl", "4x512"),
]


def own(title, dtype, args):
    """What `flowtape bench encoders` measures of one run."""
    command = [FLOWTAPE, "bench", "encoders", "--only", title, "--dtype", dtype, "--rounds", str(args.rounds), "--json",
               "--threads", str(args.threads)]
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


def timed(run, model, rounds):
    """Seconds of the fastest of some runs, and MiB that the process grew by, with the weights."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return best, peak / 1024 + weights / 2**20


def peer(job, answer):
    """Seconds of the fastest run in PyTorch, and MiB that the process took for it."""
    import torch

    torch.set_num_threads(job["threads"])
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[job["dtype"]]
    name, way = job["name"].split()
    model = make(name, torch, dtype)
    dims = [int(size) for size in job["shape"].split("x")]
    with torch.no_grad():
        if name == "t5-xxl":
            tokens = torch.arange(dims[1])[None]
            return answer.send(timed(lambda: model(tokens).last_hidden_state, model, job["rounds"]))
        if way == "decode":
            frames = [1 + (dims[2] - 1) // 4] if name == "wan2.1" else []
            dims = [1, 16, *frames, dims[-2] // 8, dims[-1] // 8]
        x = torch.randn(dims).to(dtype)
        run = (lambda: model.encode(x).latent_dist.mean) if way == "encode" else (lambda: model.decode(x).sample)
        answer.send(timed(run, model, job["rounds"]))


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
    if not FLOWTAPE.exists():
        sys.exit(f"{FLOWTAPE} is not there: run cargo build --release")
    spawn = multiprocessing.get_context("spawn")
    for dtype in args.dtype:
        print(f"\n{dtype}, {args.threads} threads: seconds and MiB, Flowtape / PyTorch, and the ratios")
        for name, shape in WORKS:
            for way in ["encode"] if name == "t5-xxl" else ["encode", "decode"]:
                title = f"{name} {way} {shape}"
                if args.only and args.only not in title:
                    continue
                line = own(title, dtype, args)
                ours, theirs = spawn.Pipe()
                job = {**line, "dtype": dtype, "threads": args.threads, "rounds": args.rounds}
                process = spawn.Process(target=peer, args=(job, theirs))
                process.start()
                theirs.close()
                try:
                    seconds, memory = ours.recv()
                except EOFError:
                    process.join()
                    sys.exit(f"PyTorch failed on {title}")
                process.join()
                print(f"{title:32} {line['s_min']:8.3f} / {seconds:8.3f}  {line['s_min'] / seconds:.2f}"
                      f"   {line['tensors_mb']:6} / {memory:6.0f}  {line['tensors_mb'] / memory:.2f}", flush=True)


if __name__ == "__main__":
    main()
