"""`flowtape preprocess` of the emoji against the same work in diffusers, both sides taking turns: medians of pictures a second.

    python bench/compare_preprocess.py [--rounds 5] [--threads 2] [--batch 8 32]

The Python that runs this needs torch, diffusers, transformers, Pillow and safetensors; `cargo build --release` must have run, or --flowtape
names the binary. Both read the 1,026 pictures of data/emoji, put them on white, and encode them with the pipeline's autoencoder (mean, f32) and
its text encoders (CLIP's pooled state, T5's states of 32 tokens) into files. Ours is the whole process, from its start to its end; theirs begins
when all is imported, and loads the same parts. Of several batch sizes the fastest counts for diffusers.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
PICTURES, PIPELINE = ROOT / "data/emoji/pictures", ROOT / "data/emoji/pipeline"


def own(args, out):
    """Seconds of our process."""
    command = [args.flowtape, "--threads", str(args.threads), "preprocess", PICTURES, "--model", PIPELINE, "--out", out, "--max-pixels", "4096",
               "--workers", str(args.threads)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        sys.exit(done.stderr)
    return seconds


def peer(batch, out):
    """The same with diffusers; prints its seconds."""
    import numpy
    import torch
    from diffusers import FluxPipeline
    from PIL import Image
    from safetensors.torch import save_file

    torch.set_num_threads(int(os.environ["THREADS"]))
    started = time.perf_counter()
    pipeline = FluxPipeline.from_pretrained(PIPELINE, transformer=None, torch_dtype=torch.float32)
    vae = pipeline.vae
    items = []
    for metadata in sorted(PICTURES.glob("*/metadata.jsonl")):
        lines = map(json.loads, metadata.read_text().splitlines())
        items += [(metadata.parent / line["file_name"], line["text"]) for line in lines]

    def pixels(path):
        picture = Image.open(path).convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture).convert("RGB")
        assert picture.size == (64, 64)
        return torch.from_numpy(numpy.asarray(picture)).permute(2, 0, 1).float() / 127.5 - 1

    with torch.inference_mode():
        for start in range(0, len(items), batch):
            group = items[start : start + batch]
            x = torch.stack([pixels(path) for path, _ in group])
            latents = (vae.encode(x).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
            states, pooled, _ = pipeline.encode_prompt([text for _, text in group], None, max_sequence_length=32)
            tensors = dict(latents=latents, states=states.to(torch.bfloat16), pooled=pooled.to(torch.bfloat16))
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, f"{out}/{start:05}.safetensors")
    print(time.perf_counter() - started, len(items))


def main():
    if sys.argv[1:2] == ["peer"]:
        return peer(int(sys.argv[2]), sys.argv[3])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--flowtape", type=pathlib.Path, default=ROOT / "target/release/flowtape")
    args = parser.parse_args()
    if not args.flowtape.exists():
        sys.exit(f"{args.flowtape} is not there: run cargo build --release")
    ours, theirs = [], {batch: [] for batch in args.batch}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as out:
            seconds = own(args, pathlib.Path(out) / "cache")
        for batch in args.batch:
            with tempfile.TemporaryDirectory() as out:
                done = subprocess.run([sys.executable, __file__, "peer", str(batch), out], capture_output=True, text=True,
                                      env=os.environ | {"THREADS": str(args.threads)})
            if done.returncode != 0:
                sys.exit(done.stderr)
            took, count = done.stdout.split()
            theirs[batch].append(int(count) / float(took))
        ours.append(int(count) / seconds)
        print(f"pictures a second: {ours[-1]:.1f}; diffusers", *(f"{speeds[-1]:.1f} by {batch}" for batch, speeds in theirs.items()), flush=True)
    best = max(statistics.median(speeds) for speeds in theirs.values())
    own_median = statistics.median(ours)
    print(f"{args.threads} threads, medians of {args.rounds}: {own_median:.1f} / {best:.1f} = {own_median / best:.2f}")


if __name__ == "__main__":
    main()
