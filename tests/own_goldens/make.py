"""Makes the goldens beside this script with the real diffusers: python tests/own_goldens/make.py."""

import json
import pathlib
import shutil

import torch
import transformers
from diffusers import (
    AutoencoderKL, ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler, ZImagePipeline,
    ZImageTransformer2DModel,
)
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).resolve().parent
GOLDENS = HERE.parent / "goldens"
PROMPT = "A photo of a red fox sleeping in fresh snow"
RUNS = {"guidance": dict(num_inference_steps=4, guidance_scale=4.0, negative_prompt="blurry"), "plain": dict(num_inference_steps=3)}


def config(step, **changes):
    """The configuration of a golden step, with the widths of other parts."""
    values = json.loads((GOLDENS / step / "config.json").read_text())
    return {key: value for key, value in values.items() if not key.startswith("_")} | changes


def make(name, pipeline, latents, plain, length):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(folder / "pipeline")
    for note in folder.rglob("README.md"):
        note.unlink()
    # Where a part came from says nothing to others.
    for path in folder.rglob("config.json"):
        kept = {key: value for key, value in json.loads(path.read_text()).items() if key != "_name_or_path"}
        path.write_text(json.dumps(kept, indent=2) + "\n")
    inputs, outputs, asked = {}, {}, {}
    for run, options in RUNS.items():
        asked[run] = dict(prompt=PROMPT, height=64, width=96, max_sequence_length=length, **options)
        asked[run].setdefault("guidance_scale", plain)
        noise = torch.randn(latents, generator=torch.Generator().manual_seed(5))
        steps = []

        def seen(_, __, ___, tensors):
            steps.append(tensors["latents"].clone())
            return tensors

        image = pipeline(latents=noise.clone(), output_type="pt", callback_on_step_end=seen, **asked[run]).images
        inputs[f"{run}/latents"] = noise
        outputs |= {f"{run}/latents_after_step.{i}": step.contiguous() for i, step in enumerate(steps)}
        outputs[f"{run}/image"] = image.contiguous()
        outputs[f"{run}/uint8"] = (image.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).contiguous()
        outputs[f"{run}/sigmas"] = pipeline.scheduler.sigmas.contiguous()
        outputs[f"{run}/timesteps"] = pipeline.scheduler.timesteps.contiguous()
    save_file(inputs, folder / "inputs.safetensors")
    save_file(outputs, folder / "outputs.safetensors")
    bounds = {"prompt tensors": 2e-5, "latents_after_step": 2e-4, "image": "2e-4 absolute", "uint8": "at most 1"}
    case = dict(what=name, pipeline_class=type(pipeline).__name__, runs=asked, tolerance=bounds)
    (folder / "case.json").write_text(json.dumps(case, indent=1) + "\n")


torch.set_num_threads(1)
torch.manual_seed(0)
flux, klein = GOLDENS / "pipe_flux/pipeline", GOLDENS / "pipe_flux2_klein/pipeline"
vae = AutoencoderKL.from_pretrained(flux / "vae")
channels = vae.config.latent_channels

qwen = transformers.Qwen3ForCausalLM.from_pretrained(klein / "text_encoder")
transformer = ZImageTransformer2DModel(**config("z_image_step", cap_feat_dim=qwen.config.hidden_size, in_channels=channels))
for parameter in transformer.parameters():
    if parameter.dim() < 2:
        torch.nn.init.normal_(parameter, 0.0, 0.3)
z_image = ZImagePipeline(
    scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, text_encoder=qwen,
    tokenizer=transformers.AutoTokenizer.from_pretrained(klein / "tokenizer"), transformer=transformer,
)
make("pipe_z_image", z_image, (1, channels, 8, 12), 0.0, 128)

prepared = ChromaPipeline._prepare_attention_mask


def boolean(self, *words, **named):
    mask = prepared(self, *words, **named)
    return None if mask is None else mask.bool()


ChromaPipeline._prepare_attention_mask = boolean
t5 = transformers.T5EncoderModel.from_pretrained(flux / "text_encoder_2")
widths = dict(joint_attention_dim=t5.config.d_model, in_channels=4 * channels, out_channels=None)
chroma = ChromaPipeline(
    scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), vae=vae, text_encoder=t5,
    tokenizer=transformers.T5TokenizerFast.from_pretrained(flux / "tokenizer_2"),
    transformer=ChromaTransformer2DModel(**config("chroma_step", **widths)),
)
make("pipe_chroma", chroma, (1, 4 * 6, 4 * channels), 1.0, 64)
