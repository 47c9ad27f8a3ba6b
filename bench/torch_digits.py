"""The digits recipe's training step in PyTorch eager: python bench/torch_digits.py [STEPS] [THREADS]."""

import sys
import time

import torch
from diffusers import FluxTransformer2DModel

steps, threads = (int(v) for v in (sys.argv[1:] + ["40", "2"][len(sys.argv) - 1:])[:2])
torch.set_num_threads(threads)
model = FluxTransformer2DModel(
    in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=4,
    joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(8, 12, 12),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
batch, tokens, words = 64, 16, 3
image, text, pooled = torch.randn(batch, tokens, 4), torch.randn(batch, words, 32), torch.randn(batch, 32)
ids = torch.zeros(tokens, 3)
ids[:, 1], ids[:, 2] = torch.arange(tokens) // 4, torch.arange(tokens) % 4
times = []
for _ in range(steps):
    start = time.perf_counter()
    sigma = torch.sigmoid(torch.randn(batch))
    noise = torch.randn_like(image)
    noisy = (1 - sigma[:, None, None]) * image + sigma[:, None, None] * noise
    prediction = model(
        hidden_states=noisy, encoder_hidden_states=text, pooled_projections=pooled, timestep=sigma,
        img_ids=ids, txt_ids=torch.zeros(words, 3), guidance=torch.ones(batch), return_dict=False,
    )[0]
    loss = ((prediction - (noise - image)) ** 2).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    times.append(time.perf_counter() - start)
times.sort()
print(f"median {times[len(times) // 2]:.4f} s a step, minimum {times[0]:.4f}")
