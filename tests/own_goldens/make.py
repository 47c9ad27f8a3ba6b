"""Makes the goldens beside this script with the real diffusers: python tests/own_goldens/make.py [NAME ...]."""

import json
import pathlib
import shutil
import sys
import wave

import numpy
import PIL.Image
import torch
import transformers
from diffusers import (
    AutoencoderKL, AutoencoderKLHunyuanVideo15, AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video, AutoencoderKLQwenImage, AutoencoderKLWan, ChromaPipeline, ChromaTransformer2DModel, ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline, HunyuanVideo15ImageToVideoPipeline, HunyuanVideo15Transformer3DModel, Krea2Pipeline, Krea2Transformer2DModel, Lumina2Pipeline, Lumina2Transformer2DModel, UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel, ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15ByT5TextProjection
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

# A film of a first frame, whose size is that of the frame's shape. The model is told where each step ends.
class OfFirstFrame:
    """HunyuanVideo 1.5's pipeline with the arguments of the others."""

    def __init__(self, pipeline):
        self.pipeline, self.scheduler = pipeline, pipeline.scheduler

    def __call__(self, latents, callback_on_step_end, image, guidance_scale, height, width, max_sequence_length, own_size, **told):
        step = type(self.scheduler).step

        def seen(*args, **named):
            made = step(self.scheduler, *args, **named)
            callback_on_step_end(None, None, None, dict(latents=made[0]))
            return made

        self.scheduler.step = seen
        self.pipeline.guider = ClassifierFreeGuidance(guidance_scale=guidance_scale)
        assert max_sequence_length == self.pipeline.tokenizer_max_length
        made = self.pipeline(latents=latents, image=image[0], **told)
        assert made.frames.shape[-2:] == (height, width)
        return made


if wanted("pipe_hunyuan15_i2v"):
    torch.manual_seed(15)
    hunyuan = GOLDENS / "pipe_hunyuan15/pipeline"
    byt5 = transformers.T5EncoderModel.from_pretrained(hunyuan / "text_encoder_2")
    siglip = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(
        hidden_size=10, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7,
    ))
    values = json.loads((hunyuan / "transformer/config.json").read_text())
    values = {key: value for key, value in values.items() if not key.startswith("_")} | dict(task_type="i2v", use_meanflow=True)
    transformer = HunyuanVideo15Transformer3DModel(**values)
    # In diffusers 2048 wide, whatever the configuration.
    width = values["num_attention_heads"] * values["attention_head_dim"]
    transformer.context_embedder_2 = HunyuanVideo15ByT5TextProjection(byt5.config.d_model, 24, width)
    i2v = HunyuanVideo15ImageToVideoPipeline(
        vae=AutoencoderKLHunyuanVideo15.from_pretrained(hunyuan / "vae"),
        text_encoder=transformers.Qwen2_5_VLTextModel.from_pretrained(hunyuan / "text_encoder"),
        tokenizer=transformers.AutoTokenizer.from_pretrained(hunyuan / "tokenizer"),
        text_encoder_2=byt5, tokenizer_2=transformers.ByT5Tokenizer.from_pretrained(hunyuan / "tokenizer_2"),
        transformer=lively(transformer, 15), scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=ClassifierFreeGuidance(guidance_scale=6.0), image_encoder=lively(siglip, 16),
        feature_extractor=transformers.SiglipImageProcessorPil(size=dict(height=28, width=28)),
    )
    first = PICTURES["first.png"]
    sides = i2v.video_processor.calculate_default_height_width(first.height, first.width, i2v.target_size)
    with torch.no_grad():
        # What a cache of films holds that were cut already, and what its size would be for pictures of other shapes.
        frames = {f"film/{i}.png": picture(30 + i, sides[1], sides[0]) for i in range(5)}
        more = {"film/image_embeds": i2v.encode_image(frames["film/0.png"], 1, "cpu", torch.float32)[0].contiguous()}
    runs = {"first": dict(num_frames=5, num_inference_steps=3, guidance_scale=4.0, negative_prompt="blurry", images=["first.png"], own_size=True)}
    depth, ratio = 2, i2v.vae_scale_factor_spatial
    latents = (1, i2v.num_channels_latents, depth, sides[0] // ratio, sides[1] // ratio)
    pictures = {"first.png": first} | frames
    make("pipe_hunyuan15_i2v", i2v, latents, 6.0, 1000, runs, size=sides, pictures=pictures, more=more, call=OfFirstFrame(i2v))

# A film's sound as NeMo prepares it: sizes of a mel spectrogram's bands, and what LTX-2's autoencoder makes of their logarithms.
if wanted("ltx2_sound"):
    folder = HERE / "ltx2_sound"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    audio_vae = AutoencoderKLLTX2Audio.from_pretrained(GOLDENS / "pipe_ltx2/pipeline/audio_vae")
    frames, fps, rate, bands = 9, 24, audio_vae.config.sample_rate, audio_vae.config.mel_bins
    seconds = torch.arange(round(frames / fps * rate)) / rate
    tones = [[(220, 0.4), (1500, 0.2)], [(330, 0.3), (5000, 0.1)]]
    sides = torch.stack([sum(level * torch.sin(2 * torch.pi * tone * seconds) for tone, level in side) for side in tones])
    sides *= 0.5 + 0.5 * torch.cos(9 * seconds)
    stored = (sides * 32767).round().clamp(-32768, 32767).to(torch.int16)
    with wave.open(str(folder / "film.wav"), "wb") as file:
        file.setnchannels(2), file.setsampwidth(2), file.setframerate(rate)
        file.writeframes(stored.T.contiguous().numpy().tobytes())
    spectrum = torch.stft(stored / 32768, 1024, 160, window=torch.hann_window(1024), return_complex=True).abs()
    triangles = transformers.audio_utils.mel_filter_bank(513, bands, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney")
    mel = torch.einsum("cft,fm->ctm", spectrum, torch.from_numpy(triangles).float())
    with torch.no_grad():
        mean = audio_vae.encode(mel.clamp(min=1e-5).log().unsqueeze(0)).latent_dist.mode()
    packed = (mean.transpose(1, 2).flatten(2) - audio_vae.latents_mean) / audio_vae.latents_std
    latents = packed.unflatten(2, (mean.shape[1], mean.shape[3])).transpose(1, 2)
    save_file({"audio_latents": latents[0].contiguous()}, folder / "outputs.safetensors")
    case = dict(what="sound of pipe_ltx2's audio autoencoder", sound="film.wav", frames=frames, tolerance={"audio_latents": 2e-5})
    (folder / "case.json").write_text(json.dumps(case, indent=1) + "\n")

# Clips part by part, with tiles and without.
if wanted("vae_ltx2_frames"):
    folder, source = HERE / "vae_ltx2_frames", GOLDENS / "vae_ltx2_video"
    shutil.rmtree(folder, ignore_errors=True)
    vae = AutoencoderKLLTX2Video.from_pretrained(source)
    vae.save_pretrained(folder)
    space, time = vae.spatial_compression_ratio, vae.temporal_compression_ratio
    frames = dict(tile_sample_min_num_frames=2 * time, tile_sample_stride_num_frames=time)
    sides = {f"tile_sample_{name}_{side}": size * space for name, size in [("min", 2), ("stride", 1)] for side in ["height", "width"]}
    tilings = {
        "half": dict(framewise=True, tiled=False, enable_tiling=frames),
        "little": dict(framewise=True, tiled=False, enable_tiling=dict(tile_sample_min_num_frames=3 * time, tile_sample_stride_num_frames=2 * time)),
        "tiled": dict(framewise=True, tiled=True, enable_tiling=frames | sides),
    }
    inputs, outputs = {}, {}
    mean, std = (statistics.view(1, -1, 1, 1, 1) for statistics in (vae.latents_mean, vae.latents_std))
    for run, tiling in tilings.items():
        vae.enable_tiling(**tiling["enable_tiling"])
        vae.use_tiling, vae.use_framewise_decoding = tiling["tiled"], True
        generator = torch.Generator().manual_seed(17)
        size = (2, 3) if tiling["tiled"] else (1, 2)
        x = torch.rand(1, 3, 4 * time + 1, size[0] * space, size[1] * space, generator=generator) * 2 - 1
        normalised = torch.randn(1, vae.config.latent_channels, 5, *size, generator=generator)
        z = normalised * std / vae.config.scaling_factor + mean
        with torch.no_grad():
            posterior, decoded = vae.encode(x).latent_dist, vae.decode(z).sample
        inputs |= {f"{run}/x": x, f"{run}/z_normalised": normalised}
        made = dict(tiled_mean=posterior.mean, tiled_logvar=posterior.logvar, z=z, tiled_decoded=decoded)
        outputs |= {f"{run}/{name}": tensor.contiguous() for name, tensor in made.items()}
    save_file(inputs, folder / "inputs.safetensors")
    save_file(outputs, folder / "outputs.safetensors")
    bounds = json.loads((source / "case.json").read_text())["tolerance"]
    case = {"what": "AutoencoderKLLTX2Video in parts along time", "class": "AutoencoderKLLTX2Video", "runs": {}, "tiling": tilings, "tolerance": bounds}
    (folder / "case.json").write_text(json.dumps(case, indent=1) + "\n")

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
