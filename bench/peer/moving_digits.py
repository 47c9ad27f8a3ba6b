"""A moving-digits recipe with diffusers' own model on PyTorch: python bench/peer/moving_digits.py RECIPE [THREADS].

The same sizes, steps, schedule, sampler and report as `flowtape train RECIPE`; the random numbers are PyTorch's own.
Needs torch, diffusers, numpy and PyYAML. Prints one JSON line.
"""

import gzip
import json
import math
import random
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
import yaml

SIDE, SPEED = 8, 1
WORDS = "zero one two three four five six seven eight nine".split()

recipe = yaml.safe_load(open(sys.argv[1]))
torch.set_num_threads(int(sys.argv[2]) if len(sys.argv) > 2 else 2)
torch.manual_seed(recipe["seed"])
random.seed(recipe["seed"])
rng = np.random.default_rng(recipe["seed"])
csv = Path(__file__).parents[2] / "trainer/data/digits.csv.gz"
table = np.loadtxt(gzip.open(csv, "rt"), delimiter=",")
digits, labels = (table[:, :64] / 8 - 1).astype(np.float32), table[:, 64].astype(int)
video, flow = recipe["data"]["video"], recipe["flow_matching"]
frames, height, width, stride = video["frames"], video["height"], video["width"], video.get("stride", 1)
dim = recipe["data"]["text_dim"]
vectors = {w: torch.randn(dim) for w in ["a", "handwritten", *WORDS]}
i2v_prob = flow.get("i2v_prob", 0.0) if flow["adapter_type"] == "hunyuan" else 0.0


def bounce(position, room):
    folded = position % (2 * room)
    return 2 * room - folded if folded > room else folded


def animate(digit):
    room = [(side - SIDE) // stride for side in (height, width)]
    start = [rng.integers(r + 1) for r in room]
    velocity = (0, 0)
    while any(room) and not any(v and r for v, r in zip(velocity, room)):
        velocity = tuple(int(rng.integers(-SPEED, SPEED + 1)) for _ in room)
    out = np.full((frames, height, width), -1, np.float32)
    for t in range(frames):
        y, x = (stride * bounce(s + v * t, r) for s, v, r in zip(start, velocity, room))
        out[t, y : y + SIDE, x : x + SIDE] = digit.reshape(SIDE, SIDE)
    return out


def text(classes):
    """Embeddings of captions; None is a dropped one."""
    rows = [[vectors[w] for w in ("a", "handwritten", WORDS[c])] if c is not None else [torch.zeros(dim)] * 3 for c in classes]
    return torch.stack([torch.stack(r) for r in rows])


config = {k: v for k, v in recipe["model"].items() if k not in ("_class_name", "byt5_hidden_dim")}
model = getattr(diffusers, recipe["model"]["_class_name"])(**config)
if "byt5_hidden_dim" in recipe["model"]:  # hard-coded in diffusers
    inner = config["num_attention_heads"] * config["attention_head_dim"]
    embedder = type(model.context_embedder_2)
    model.context_embedder_2 = embedder(config["text_embed_2_dim"], recipe["model"]["byt5_hidden_dim"], inner)


def forward(noisy, sigma, embeddings, first):
    """The velocity; `first` holds clean videos to go on from, or None."""
    t = sigma * 1000
    if flow["adapter_type"] == "simple":
        return model(hidden_states=noisy, timestep=t, encoder_hidden_states=embeddings, return_dict=False)[0]
    b = len(noisy)
    condition = torch.zeros(b, 2, frames, height, width)
    if first is not None:
        condition[:, :1, 0], condition[:, 1, 0] = first[:, :, 0], 1
    mask = torch.ones(b, embeddings.shape[1])
    images = torch.zeros(b, *flow["adapter_kwargs"]["default_image_embed_shape"])
    return model(
        hidden_states=torch.cat([noisy, condition], 1), timestep=t, encoder_hidden_states=embeddings,
        encoder_attention_mask=mask, encoder_hidden_states_2=embeddings, encoder_attention_mask_2=mask,
        image_embeds=images, return_dict=False,
    )[0]


steps, batch = recipe["step_scheduler"]["max_steps"], recipe["step_scheduler"]["local_batch_size"]
lr, warmup = recipe["optimizer"]["lr"], min(1000, steps // 10)
optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=recipe["optimizer"]["weight_decay"])


def rate(step):
    low = 0.01 * lr
    if step < warmup:
        return 0.1 * lr + 0.9 * lr * step / warmup
    return low + (lr - low) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


# The average of the weights, of a power-function profile (https://arxiv.org/abs/2312.02696): its gamma, and what is kept.
sigma_rel = recipe.get("ema", {}).get("sigma_rel")
gamma = max(np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2]).real) if sigma_rel else None
average = {name: p.detach().clone() for name, p in model.named_parameters()} if sigma_rel else {}
autocast = torch.autocast("cpu", torch.bfloat16, enabled=recipe.get("dtype") == "mixed")

start, losses, order = time.perf_counter(), [], []
for step in range(steps):
    while len(order) < batch:
        order.extend(rng.permutation(len(digits)))
    chosen, order = order[:batch], order[batch:]
    clean = torch.from_numpy(np.stack([animate(digits[i]) for i in chosen]))[:, None]
    classes = [None if random.random() < recipe["data"]["caption_dropout_prob"] else labels[i] for i in chosen]
    uniform = random.random() < flow.get("mix_uniform_ratio", 0.1)
    sigma = torch.rand(batch) if uniform else torch.sigmoid(torch.randn(batch))
    first = clean if random.random() < i2v_prob else None
    noise = torch.randn_like(clean)
    s = sigma.view(-1, 1, 1, 1, 1)
    with autocast:
        prediction = forward((1 - s) * clean + s * noise, sigma, text(classes), first).float()
    loss = ((prediction - (noise - clean)) ** 2).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip_grad_norm"]["max_norm"])
    for group in optimizer.param_groups:
        group["lr"] = rate(step)
    optimizer.step()
    optimizer.zero_grad()
    for name, p in model.named_parameters() if average else []:
        average[name].lerp_(p.detach(), 1 - (1 - 1 / (step + 1)) ** (gamma + 1))
    losses.append(loss.item())
    if step % 50 == 0:
        print(step, sum(losses[-50:]) / len(losses[-50:]), f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
seconds = time.perf_counter() - start
model.load_state_dict(average, strict=False)


@torch.no_grad()
def sample(classes, first):
    model.eval()
    n, scale = recipe["sampling"]["num_inference_steps"], recipe["sampling"]["guidance_scale"]
    sigmas = [1 - i / n for i in range(n)] + [0.0]
    x = torch.randn(len(classes), 1, frames, height, width)
    positive, negative = text(classes), text([None] * len(classes))
    for now, then in zip(sigmas, sigmas[1:]):
        sigma = torch.full((len(x),), now)
        with autocast:
            v, u = (forward(x, sigma, words, first).float() for words in (positive, negative))
        x = x + (then - now) * (u + scale * (v - u))
    return x[:, 0].numpy()


def judge(videos, classes):
    right, distances = [], []
    for clip, c in zip(videos, classes):
        for frame in clip:
            crops = np.lib.stride_tricks.sliding_window_view(frame, (SIDE, SIDE)).reshape(-1, 64)
            d = (crops**2).sum(1)[:, None] - 2 * crops @ digits.T + (digits**2).sum(1)
            best = d[d.min(1).argmin()]
            near = np.argsort(best, kind="stable")[:3]
            a, b, e = labels[near]
            right.append((b if b == e else a) == c)
            distances.append(math.sqrt(max(best[near[0]], 0)))
    own = (digits**2).sum(1)[:, None] - 2 * digits @ digits.T + (digits**2).sum(1)
    np.fill_diagonal(own, np.inf)
    return {"accuracy": float(np.mean(right)), "distance_ratio": float(np.mean(distances) / np.sqrt(own.min(1)).mean())}


classes = [c for c in range(10) for _ in range(recipe["report"]["samples_per_class"])]
out = {"recipe": recipe["name"], "train_seconds": seconds, "final_loss": sum(losses[-100:]) / len(losses[-100:])}
out |= judge(sample(classes, None), classes)
if recipe["sampling"].get("image_to_video"):
    given = torch.from_numpy(np.stack([animate(digits[rng.choice(np.flatnonzero(labels == c))]) for c in classes]))[:, None]
    videos = sample(classes, given)
    frame = given[:, 0, 0].numpy()
    error = lambda target: float(((videos[:, 0] - target) ** 2).mean())
    first = {"error": error(frame), "error_shuffled": error(np.roll(frame, -1, 0))}
    out["image_to_video"] = judge(videos, classes) | {"first_frame": first}
print(json.dumps(out))
