"""Opens what Flowtape writes with ComfyUI's own loader, and compares.

    python interop/comfyui.py path/to/ComfyUI --binary target/release/flowtape

For each class diffusers makes a small model, and `flowtape convert --layout original` a single file of it, which ComfyUI must take for
the right class, with no key missing or left over. `flowtape extract` makes a LoRA of all linear layers, of which ComfyUI's key maps must
know each key; the weights that ComfyUI makes of it are compared with those that `flowtape merge` folds it into. Every line says ok or
FAILED; the exit status is 1 where one failed. Everything runs on the CPU.
"""

import argparse
import ast
import logging
import pathlib
import subprocess
import sys
import tempfile

import diffusers
import torch
from safetensors.torch import load_file, save_file

from check import ROOT, WEIGHT, Report, flowtape, relative

BLACK_FOREST = dict(num_layers=1, num_single_layers=1, attention_head_dim=128, joint_attention_dim=32)
LTX = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24, audio_in_channels=4,
    audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=8, audio_cross_attention_dim=16, num_layers=2,
    caption_channels=20,
)
# What ComfyUI's class holds beside the transformer, and diffusers' pipelines in a part of its own.
ELSEWHERE = ("audio_embeddings_connector.", "video_embeddings_connector.")
# diffusers' class and its arguments, ComfyUI's class, and what ComfyUI takes for granted of the published models: there its models are
# made as narrow as ours.
MODELS = {
    "FLUX.1": (
        "FluxTransformer2DModel",
        dict(in_channels=64, num_attention_heads=2, pooled_projection_dim=32, guidance_embeds=True, **BLACK_FOREST),
        "Flux", {},
    ),
    "FLUX.2": ("Flux2Transformer2DModel", dict(in_channels=128, num_attention_heads=2, **BLACK_FOREST), "Flux2", {}),
    "Chroma": (
        "ChromaTransformer2DModel",
        dict(
            in_channels=64, num_attention_heads=2, approximator_num_channels=64, approximator_hidden_dim=32,
            approximator_layers=2, **BLACK_FOREST,
        ),
        "Chroma", dict(hidden_dim=32, n_layers=2, out_dim=256),
    ),
    "Qwen-Image": (
        "QwenImageTransformer2DModel",
        dict(in_channels=64, out_channels=16, num_layers=2, num_attention_heads=2, joint_attention_dim=32),
        "QwenImage", dict(num_attention_heads=2, joint_attention_dim=32),
    ),
    "Wan": (
        "WanTransformer3DModel",
        dict(num_attention_heads=2, in_channels=16, out_channels=16, text_dim=32, ffn_dim=64, num_layers=2),
        "WAN21", dict(text_dim=32),
    ),
    "Wan, image to video": (
        "WanTransformer3DModel",
        dict(
            num_attention_heads=2, in_channels=36, out_channels=16, text_dim=32, ffn_dim=64, num_layers=1, image_dim=1280,
            added_kv_proj_dim=256,
        ),
        "WAN21", dict(text_dim=32),
    ),
    "HunyuanVideo-1.5": (
        "HunyuanVideo15Transformer3DModel",
        dict(num_attention_heads=2, num_layers=1, num_refiner_layers=2, text_embed_dim=32),
        "HunyuanVideo15", {},
    ),
    "LTX-2": ("LTX2VideoTransformer3DModel", LTX, "LTXAV", {}),
    "LTX-2.3": (
        "LTX2VideoTransformer3DModel",
        dict(
            gated_attn=True, audio_gated_attn=True, cross_attn_mod=True, audio_cross_attn_mod=True, use_prompt_embeddings=False,
            **LTX,
        ),
        "LTXAV", {},
    ),
    "Lumina-Image 2.0": (
        "Lumina2Transformer2DModel",
        dict(
            hidden_size=384, num_layers=1, num_refiner_layers=2, num_attention_heads=3, num_kv_heads=1, in_channels=16,
            cap_feat_dim=32, axes_dim_rope=(32, 48, 48), axes_lens=(30, 20, 20),
        ),
        "Lumina2", dict(n_heads=3, n_kv_heads=1, axes_dims=[32, 48, 48], axes_lens=[30, 20, 20]),
    ),
    "Z-Image": (
        "ZImageTransformer2DModel",
        dict(in_channels=16, dim=1152, n_layers=1, n_refiner_layers=1, n_heads=9, n_kv_heads=9, cap_feat_dim=32),
        "Lumina2",
        dict(
            n_heads=9, n_kv_heads=9, n_refiner_layers=1, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512], ffn_dim_multiplier=8 / 3,
            z_image_modulation=True, pad_tokens_multiple=32,
        ),
    ),
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=pathlib.Path, help="a checkout of ComfyUI")
    parser.add_argument("--binary", default=ROOT / "target/release/flowtape")
    return parser.parse_args()


class Warnings(logging.Handler):
    """What ComfyUI says of keys: it goes on without those that it misses or does not know."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.told = []

    def emit(self, record):
        self.told.append(record.getMessage())


def missing(told):
    """Keys of the transformer that are missing, from what ComfyUI says."""
    keys = told.partition("unet missing: ")[2]
    return [key for key in ast.literal_eval(keys or "[]") if not key.startswith(ELSEWHERE)]


class ComfyUI:
    def __init__(self, folder):
        sys.path.insert(0, str(folder))
        from comfy.cli_args import args

        args.cpu = True
        import comfy.lora
        import comfy.lora_convert
        import comfy.model_detection
        import comfy.sd
        import comfy.utils

        self.comfy = comfy
        self.warnings = Warnings()
        logging.getLogger().handlers = [self.warnings]

    def open(self, file, fixed):
        """A single file's model, in f32, and what was said of its keys."""
        detection, self.warnings.told = self.comfy.model_detection, []
        detect = detection.detect_unet_config

        def narrow(*args, **kwargs):
            found = detect(*args, **kwargs)
            return found and {**found, **fixed}

        detection.detect_unet_config = narrow
        try:
            options = {"dtype": torch.float32}
            patcher = self.comfy.sd.load_diffusion_model(str(file), model_options=options, disable_dynamic=True)
        finally:
            detection.detect_unet_config = detect
        return patcher, [told for told in self.warnings.told if "unexpected" in told or missing(told)]

    def with_lora(self, patcher, file):
        """The weights that a LoRA makes of a model's, and what was said of its keys."""
        self.warnings.told = []
        lora = self.comfy.lora_convert.convert_lora(self.comfy.utils.load_torch_file(str(file), safe_load=True))
        patches = self.comfy.lora.load_lora(lora, self.comfy.lora.model_lora_keys_unet(patcher.model, {}))
        known = set(patcher.add_patches(patches, 1.0))
        told = [told for told in self.warnings.told if "not loaded" in told] + [f"no {key}" for key in patches if key not in known]
        weights = patcher.model.state_dict()
        changed = {
            key: self.comfy.lora.calculate_weight(patches, weights[key].clone(), key)
            for key, patches in patcher.patches.items()
        }
        return changed, told


def tuned(model, folder):
    """The model with a change of rank two of each linear layer."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            outputs, inputs = module.weight.shape
            change = torch.randn(outputs, 2) @ torch.randn(2, inputs)
            module.weight.data += change * (0.1 * module.weight.abs().max() / change.abs().max())
    model.save_pretrained(folder)


def subject(name, comfyui, binary, folder, report):
    kind, config, wanted, fixed = MODELS[name]
    torch.manual_seed(1)
    model = getattr(diffusers, kind)(**config)
    # What starts at zero or one would hide that it went elsewhere.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    base, whole = folder / "base", folder / "whole.safetensors"
    model.save_pretrained(base)
    flowtape(binary, "convert", base, "--out", whole, "--layout", "original")
    patcher, told = comfyui.open(whole, fixed)
    if patcher is None:
        return report.fail(f"{name}: single file", "ComfyUI finds no class for it")
    found = type(patcher.model).__name__
    if told or found != wanted:
        report.fail(f"{name}: single file as {found}", "; ".join(told)[:300])
    else:
        report.passed += 1
        print(f"ok      {name}: single file as {found}, {len(load_file(whole))} tensors", flush=True)

    tuned(model, folder / "tuned")
    flowtape(binary, "extract", base, folder / "tuned", "--rank", 2, "--format", "comfyui", "--out", folder)
    lora = folder / "comfyui_lora.safetensors"
    # Alphas are the ranks there: others tell whether they are read.
    save_file({key: 0.5 * part if key.endswith("alpha") else part for key, part in load_file(lora).items()}, lora)
    changed, told = comfyui.with_lora(patcher, lora)
    if told:
        report.fail(f"{name}: LoRA", "; ".join(told)[:300])
    before = {key: weight.clone() for key, weight in patcher.model.state_dict().items()}
    flowtape(binary, "merge", base, "--lora", lora, "--out", folder / "merged.safetensors", "--layout", "original")
    after = comfyui.open(folder / "merged.safetensors", fixed)[0].model.state_dict()
    ours = [key for key in before if not key.removeprefix("diffusion_model.").startswith(ELSEWHERE)]
    others = [key for key in ours if key not in changed and not torch.equal(before[key], after[key])]
    if others or not changed:
        return report.fail(f"{name}: LoRA", f"{len(others)} of ours change, and not with ComfyUI: {others[:3]}")
    # What counts is the change of the weights, not the weights; a difference of weights rounds as those do.
    scale = max(float(before[key].abs().max() / (after[key] - before[key]).abs().max()) for key in changed)
    worst = max(relative(changed[key] - before[key], after[key] - before[key]) for key in changed)
    report.compare(f"{name}: LoRA, {len(changed)} weights", worst, WEIGHT * max(1.0, scale))


def main():
    args = arguments()
    torch.set_num_threads(1)
    comfyui = ComfyUI(args.comfyui.resolve())
    commit = subprocess.run(["git", "-C", args.comfyui, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    from comfyui_version import __version__ as version

    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, ComfyUI {version} ({commit or 'no known commit'})")
    report = Report()
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            try:
                subject(name, comfyui, args.binary, pathlib.Path(folder), report)
            except Exception as error:  # what the other program says is the finding
                report.fail(name, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    print(f"{report.passed} passed, {report.failed} failed")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
