"""Makes the goldens beside this script with the real diffusers: python tests/own_goldens/make.py [NAME ...]."""

import json
import pathlib
import shutil
import sys

import numpy
import PIL.Image
import torch
import transformers
from diffusers import (
    AutoencoderKL, AutoencoderKLQwenImage, AutoencoderKLWan, ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline, Krea2Pipeline, Krea2Transformer2DModel, Lumina2Pipeline, Lumina2Transformer2DModel, UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel, ZImagePipeline,
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


def wanted(name):
    return not sys.argv[1:] or name in sys.argv[1:]


def picture(seed, width, height):
    """A few smooth colours."""
    noise = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic", align_corners=True).clamp(0, 1)
    return PIL.Image.fromarray((smooth[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())


def lively(model, seed):
    """Norms and other vectors that a new model starts at one or zero, drawn, so that they count."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make(name, pipeline, latents, plain, length, runs=RUNS, size=(64, 96), pictures=None, call=None, more=None):
    """Saves a pipeline and what it makes. Runs may name `images`; `call` is what makes films of them, if something else than the
    pipeline. `more` goes with what was made."""
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(folder / "pipeline")
    for note in folder.rglob("README.md"):
        note.unlink()
    # Where a part came from says nothing to others.
    for path in folder.rglob("config.json"):
        kept = {key: value for key, value in json.loads(path.read_text()).items() if key != "_name_or_path"}
        path.write_text(json.dumps(kept, indent=2) + "\n")
    for file, image in (pictures or {}).items():
        (folder / file).parent.mkdir(exist_ok=True)
        image.save(folder / file)
    inputs, outputs, asked = {}, dict(more or {}), {}
    for run, options in runs.items():
        asked[run] = dict(prompt=PROMPT, height=size[0], width=size[1], max_sequence_length=length, **options)
        asked[run].setdefault("guidance_scale", plain)
        noise = torch.randn(latents, generator=torch.Generator().manual_seed(5))
        steps = []

        def seen(_, __, ___, tensors):
            steps.append(tensors["latents"].clone())
            return tensors

        told = dict(asked[run])
        given = [pictures[file] for file in told.pop("images", [])]
        used = (call or pipeline) if given else pipeline
        if given and type(used) is WanImageToVideoPipeline:
            told |= dict(image=given[0], last_image=given[1] if given[1:] else None)
        elif given:
            told["image"] = given
        made = used(latents=noise.clone(), output_type="pt", callback_on_step_end=seen, **told)
        image = made.frames if hasattr(made, "frames") else made.images
        inputs[f"{run}/latents"] = noise
        outputs |= {f"{run}/latents_after_step.{i}": step.contiguous() for i, step in enumerate(steps)}
        outputs[f"{run}/image"] = image.contiguous()
        outputs[f"{run}/uint8"] = (image.movedim(-3, -1) * 255).round().to(torch.uint8).contiguous()
        outputs[f"{run}/sigmas"] = used.scheduler.sigmas.contiguous()
        outputs[f"{run}/timesteps"] = used.scheduler.timesteps.contiguous()
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
if wanted("pipe_z_image"):
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
if wanted("pipe_chroma"):
    make("pipe_chroma", chroma, (1, 4 * 6, 4 * channels), 1.0, 64)

# Text models of which no golden is elsewhere.
gemma_tokenizer = transformers.AutoTokenizer.from_pretrained(GOLDENS / "pipe_ltx2/pipeline/tokenizer")
torch.manual_seed(11)
gemma2 = lively(transformers.Gemma2Model(transformers.Gemma2Config(
    vocab_size=704, hidden_size=12, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    # Scores go up to the cap, and texts beyond the window.
    query_pre_attn_scalar=1, attn_logit_softcapping=2.0, sliding_window=16,
)), 11)
qwen_image = GOLDENS / "pipe_qwen_image/pipeline"
qwen_tokenizer = transformers.AutoTokenizer.from_pretrained(qwen_image / "tokenizer")
torch.manual_seed(12)
vocabulary = max(len(qwen_tokenizer), 360)
text_config = dict(
    vocab_size=vocabulary, hidden_size=24, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[2, 1, 1], mrope_interleaved=True),
)
vision_config = dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=1, patch_size=8, out_hidden_size=24, deepstack_visual_indexes=[0])
qwen3_vl = lively(transformers.Qwen3VLModel(transformers.Qwen3VLConfig(text_config=text_config, vision_config=vision_config)), 12)


def states(name, model, vocabulary):
    """All hidden states of two texts, one of which is padded on the right."""
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    ids = torch.randint(3, vocabulary, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    save_file({"right/input_ids": ids, "right/attention_mask": mask}, folder / "inputs.safetensors")
    save_file({f"right/hidden_states.{i}": state.contiguous() for i, state in enumerate(hidden)}, folder / "outputs.safetensors")
    (folder / "case.json").write_text(json.dumps(dict(what=name, **{"class": type(model).__name__}), indent=1) + "\n")


if wanted("text_gemma2"):
    states("text_gemma2", gemma2, 704)
if wanted("text_qwen3vl"):
    states("text_qwen3vl", qwen3_vl, vocabulary)
if wanted("pipe_lumina2"):
    torch.manual_seed(13)
    widths = dict(cap_feat_dim=12, in_channels=channels, axes_lens=[160, 64, 64])
    lumina2 = Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0), vae=vae, text_encoder=gemma2, tokenizer=gemma_tokenizer,
        transformer=lively(Lumina2Transformer2DModel(**config("lumina2_step", **widths)), 13),
    )
    make("pipe_lumina2", lumina2, (1, channels, 8, 12), 1.0, 128)
if wanted("pipe_krea2"):
    torch.manual_seed(14)
    qwen_vae = AutoencoderKLQwenImage.from_pretrained(qwen_image / "vae")
    packed = 4 * qwen_vae.config.z_dim
    krea2 = Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400), vae=qwen_vae,
        text_encoder=qwen3_vl, tokenizer=qwen_tokenizer, text_encoder_select_layers=(1, 2, 3),
        transformer=lively(Krea2Transformer2DModel(**config("krea2_step", in_channels=packed, text_hidden_dim=24)), 14),
    )
    make("pipe_krea2", krea2, (1, 4 * 6, packed), 0.0, 64)

# Reference images.
PICTURES = {"first.png": picture(1, 72, 90), "last.png": picture(2, 100, 66)}
if wanted("pipe_flux2_klein_edit"):
    edit = Flux2KleinPipeline.from_pretrained(klein)
    runs = {
        "two": dict(num_inference_steps=3, guidance_scale=4.0, images=list(PICTURES)),
        "one": dict(num_inference_steps=2, images=["last.png"]),
    }
    width = edit.transformer.config.in_channels
    # What a cache of edits holds.
    sides = [[side // 16 * 16 for side in image.size] for image in PICTURES.values()]
    made_ready = [edit.image_processor.preprocess(image, h, w, resize_mode="crop") for image, (w, h) in zip(PICTURES.values(), sides)]
    with torch.no_grad():
        more = {f"context_latents.{i}": edit._encode_vae_image(image, None).contiguous() for i, image in enumerate(made_ready)}
    make("pipe_flux2_klein_edit", edit, (1, width, 4, 6), 1.0, 64, runs, pictures=PICTURES, more=more)

# Films of given frames. As published, noise levels are UniPC's with those of flow matching.
wan = GOLDENS / "pipe_wan/pipeline"
scheduler = UniPCMultistepScheduler.from_pretrained(wan / "scheduler")
umt5 = transformers.UMT5EncoderModel.from_pretrained(wan / "text_encoder")
# Older files keep the table once.
umt5.encoder.embed_tokens.weight = umt5.shared.weight
texts = dict(text_encoder=umt5, tokenizer=transformers.T5TokenizerFast.from_pretrained(wan / "tokenizer"), scheduler=scheduler)
wan_vae = AutoencoderKLWan.from_pretrained(wan / "vae")
channels = wan_vae.config.z_dim


def wan_transformer(seed, step, **changes):
    torch.manual_seed(seed)
    return lively(WanTransformer3DModel(**config(step, text_dim=umt5.config.d_model, **changes)), seed)


FRAMES = {
    "first": dict(num_frames=9, num_inference_steps=3, guidance_scale=4.0, negative_prompt="blurry", images=["first.png"]),
    "both": dict(num_frames=5, num_inference_steps=2, guidance_scale=4.0, negative_prompt="blurry", images=list(PICTURES)),
}
# Length 512: the transformer takes what stands before the last 512 tokens for the picture's.
film = dict(plain=1.0, length=512, size=(32, 48), pictures=PICTURES)


def films(name, pipeline, runs, side=8, **changes):
    depth = {run: (FRAMES[run]["num_frames"] - 1) // 4 + 1 for run in runs}
    assert len(set(depth.values())) == 1, "a folder's runs have noise of one size"
    latents = (1, pipeline.vae.config.z_dim, depth[runs[0]], film["size"][0] // side, film["size"][1] // side)
    make(name, pipeline, latents, runs={run: FRAMES[run] for run in runs}, **(film | changes))


if wanted("pipe_wan22_i2v"):
    FRAMES["both"]["num_frames"] = 9
    both = [wan_transformer(seed, "wan22_i2v_step", in_channels=2 * channels + 4, out_channels=channels) for seed in (3, 4)]
    films("pipe_wan22_i2v", WanImageToVideoPipeline(vae=wan_vae, transformer=both[0], transformer_2=both[1], boundary_ratio=0.9, **texts), ["first", "both"])

torch.manual_seed(6)
clip = transformers.CLIPVisionConfig(
    hidden_size=14, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7, hidden_act="gelu",
)
image_encoder = lively(transformers.CLIPVisionModel(clip), 6)
sees = dict(
    image_encoder=image_encoder,
    image_processor=transformers.CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 28, "width": 28}),
)
of_clip = dict(in_channels=2 * channels + 4, out_channels=channels, image_dim=14)
FRAMES["both"]["num_frames"] = 5
if wanted("pipe_wan21_i2v"):
    transformer = wan_transformer(7, "wan_i2v_step", **of_clip)
    films("pipe_wan21_i2v", WanImageToVideoPipeline(vae=wan_vae, transformer=transformer, **texts, **sees), ["first"])
if wanted("pipe_wan_flf2v"):
    transformer = wan_transformer(8, "wan_i2v_step", pos_embed_seq_len=2 * 17, **of_clip)
    between = WanImageToVideoPipeline(vae=wan_vae, transformer=transformer, **texts, **sees)
    # What a cache of films holds that were cut already.
    frames = {f"film/{i}.png": picture(20 + i, 48, 32) for i in range(5)}
    first, last = frames["film/0.png"], frames["film/4.png"]
    pixels = [between.video_processor.preprocess(image, 32, 48) for image in (first, last)]
    with torch.no_grad():
        given = between.prepare_latents(pixels[0], 1, channels, 32, 48, 5, torch.float32, "cpu", last_image=pixels[1])[1]
        more = {
            "film/condition_latents": given[:, 4:].contiguous(),
            "film/image_embeds": between.encode_image([first, last], "cpu").flatten(0, 1).contiguous(),
        }
    films("pipe_wan_flf2v", between, ["both"], pictures=PICTURES | frames, more=more)
if wanted("pipe_wan_ti2v"):
    torch.manual_seed(9)
    residual = lively(AutoencoderKLWan(**config("vae_wan22")), 9)
    width = residual.config.z_dim
    parts = dict(vae=residual, transformer=wan_transformer(10, "wan_ti2v_step", in_channels=width, out_channels=width), **texts)
    of_text = WanPipeline(expand_timesteps=True, **parts)
    of_image = WanImageToVideoPipeline(expand_timesteps=True, **parts)
    FRAMES["text"] = dict(FRAMES["first"], images=[])
    film["size"] = (64, 96)
    films("pipe_wan_ti2v", of_text, ["first", "text"], side=16, call=of_image)

# CLIP's states of a picture, and how it is made ready.
if wanted("vision_clip"):
    folder = HERE / "vision_clip"
    shutil.rmtree(folder, ignore_errors=True)
    for part in sees.values():
        part.save_pretrained(folder)
    PICTURES["first.png"].save(folder / "picture.png")
    values = sees["image_processor"](images=PICTURES["first.png"], return_tensors="pt").pixel_values
    states = image_encoder(pixel_values=values, output_hidden_states=True).hidden_states
    save_file({f"hidden_states.{i}": state.detach().contiguous() for i, state in enumerate(states)}, folder / "outputs.safetensors")
    save_file({"pixel_values": values.contiguous()}, folder / "inputs.safetensors")
    (folder / "case.json").write_text(json.dumps(dict(what="CLIPVisionModel", picture="picture.png"), indent=1) + "\n")
