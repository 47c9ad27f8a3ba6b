"""One training step of a flux-style transformer on CPU with PyTorch and diffusers: the peer of `flowtape bench step`.

Prints one JSON object: median seconds per step, phases, GFLOP/s, peak memory. docs/BENCHMARKS.md describes the work.
"""

import argparse
import json
import os
import resource
import statistics
import time
from contextlib import nullcontext

import diffusers
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel

# image: packed token grid, text: text tokens, channels: of an image token, joint and pooled: widths of the text
CONFIGS = {
    "s": dict(batch=16, image=(8, 8), text=16, heads=4, double=4, single=4, joint=256, pooled=256),
    "m": dict(batch=2, image=(16, 16), text=64, heads=12, double=6, single=12, joint=768, pooled=768),
    "l": dict(batch=1, image=(16, 16), text=64, heads=16, double=6, single=12, joint=1024, pooled=768),
    "digits": dict(batch=64, image=(4, 4), text=2, heads=4, double=2, single=2, joint=32, pooled=32,
                   channels=4, head_dim=32, axes=(8, 12, 12)),
}


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", choices=CONFIGS, default="s")
    parser.add_argument("--dtype", choices=["f32", "bf16", "mixed"], default="f32",
                        help="bf16: weights, gradients and moments too; mixed: f32 weights and moments, autocast")
    parser.add_argument("--compile", action="store_true", help="compile each kind of block once")
    parser.add_argument("--lora", type=int, help="train peft's LoRA of this rank beside all linear layers")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0)
    return parser.parse_args()


def main():
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = dict(channels=64, head_dim=64, axes=(16, 24, 24)) | CONFIGS[args.config]
    channels, heads, head_dim = config["channels"], config["heads"], config["head_dim"]
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    model = FluxTransformer2DModel(
        in_channels=channels, num_layers=config["double"], num_single_layers=config["single"],
        attention_head_dim=head_dim, num_attention_heads=heads, joint_attention_dim=config["joint"],
        pooled_projection_dim=config["pooled"], guidance_embeds=False, axes_dims_rope=config["axes"],
    ).to(dtype)
    model.train()
    if args.lora:
        import peft

        adapter = peft.LoraConfig(r=args.lora, lora_alpha=args.lora, target_modules="all-linear")
        # peft would keep adapters of bf16 weights in f32.
        model = peft.get_peft_model(model, adapter, autocast_adapter_dtype=False).to(dtype)
    batch, (height, width), text_len = config["batch"], config["image"], config["text"]
    params = sum(p.numel() for p in model.parameters())

    # Matrix products: every linear layer counts 2 x rows x in x out forward, twice that backward.
    linear = 0

    def count(module, inputs, _):
        nonlocal linear
        linear += 2 * (inputs[0].numel() // module.in_features) * module.in_features * module.out_features

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, torch.nn.Linear)]

    image_ids = torch.zeros(height, width, 3)
    image_ids[..., 1] = torch.arange(height)[:, None]
    image_ids[..., 2] = torch.arange(width)[None, :]
    image_ids = image_ids.reshape(height * width, 3)
    text_ids = torch.zeros(text_len, 3)
    latents = torch.randn(batch, channels // 4, 2 * height, 2 * width)
    text = torch.randn(batch, text_len, config["joint"], dtype=dtype)
    pooled = torch.randn(batch, config["pooled"], dtype=dtype)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], fused=True, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
    )

    def pack(x):
        b, c, h, w = x.shape
        return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, (h // 2) * (w // 2), c * 4)

    def forward():
        x1 = pack(latents)
        x0 = torch.randn_like(x1)
        t = torch.rand(batch)
        x_t = ((1 - t)[:, None, None] * x1 + t[:, None, None] * x0).to(dtype)
        autocast = torch.autocast("cpu", dtype=torch.bfloat16) if args.dtype == "mixed" else nullcontext()
        with autocast:
            v = model(
                hidden_states=x_t, encoder_hidden_states=text, pooled_projections=pooled, timestep=t.to(dtype),
                img_ids=image_ids, txt_ids=text_ids, return_dict=False,
            )[0]
        return F.mse_loss(v.float(), x0 - x1)

    with torch.no_grad():
        forward()
    for hook in hooks:
        hook.remove()
    tokens = height * width + text_len
    attention = 4 * batch * heads * head_dim * tokens**2 * (config["double"] + config["single"])
    flops = 3 * (linear + attention)
    if args.compile:
        model.compile_repeated_blocks(fullgraph=True)

    rss_before = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
    forwards, backwards, updates, totals, losses = [], [], [], [], []
    for step in range(args.warmup + args.steps):
        if step == args.warmup:
            cpu, wall = time.process_time(), time.perf_counter()
        t0 = time.perf_counter()
        loss = forward()
        t1 = time.perf_counter()
        loss.backward()
        t2 = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        t3 = time.perf_counter()
        losses.append(float(loss.detach()))
        if step == 0:
            first = t3 - t0
        if step >= args.warmup:
            forwards.append(t1 - t0)
            backwards.append(t2 - t1)
            updates.append(t3 - t2)
            totals.append(t3 - t0)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    s_step = statistics.median(totals)
    print(json.dumps(dict(
        peer="torch-compile" if args.compile else "torch-eager", torch=torch.__version__,
        diffusers=diffusers.__version__, config=args.config, dtype=args.dtype, threads=torch.get_num_threads(),
        params=params, gflop=round(flops / 1e9, 2), s_step=round(s_step, 5), s_min=round(min(totals), 5),
        s_max=round(max(totals), 5), s_fwd=round(statistics.median(forwards), 5),
        s_bwd=round(statistics.median(backwards), 5), s_opt=round(statistics.median(updates), 5),
        gflops=round(flops / s_step / 1e9, 1), cpu_per_wall=round(cpu / wall, 2), first_step_s=round(first, 2),
        peak_rss_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        rss_before_mb=round(rss_before / 2**20), loss_first=round(losses[0], 4), loss_last=round(losses[-1], 4),
    )))


if __name__ == "__main__":
    main()
