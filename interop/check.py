"""Opens what Flowtape writes in the real diffusers and peft, and compares.

    python interop/check.py --binary target/release/flowtape [--goldens tests/goldens]

For each golden step whose model Flowtape has, `flowtape convert` writes the checkpoint anew, diffusers' own class opens it, and
what its last layer makes of the recorded inputs is compared with the recorded one. Then `flowtape train` trains a LoRA on a
golden recipe; peft and diffusers' `load_lora_weights` open it, and the weights that they make of it are compared with those of
`flowtape merge`. Every line says ok or FAILED; the exit status is 1 where one failed.
"""

import argparse
import inspect
import json
import pathlib
import subprocess
import sys
import tempfile

import diffusers
import peft
import torch
from safetensors.torch import load_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
# The goldens' bound of a prediction, of its largest element.
PREDICTION = 1e-4
# Of a weight: what adding a product of f32 in another order rounds to.
WEIGHT = 1e-6
# Classes whose arguments or last layers are called otherwise than in the recorded steps: what they hold is compared.
WEIGHTS_ALONE = {
    "ChromaTransformer2DModel", "Krea2Transformer2DModel", "Lumina2Transformer2DModel", "QwenImage21Transformer2DModel",
    "ZImageTransformer2DModel",
}
# What NeMo's adapters call otherwise than the models.
ARGUMENTS = {"latents": "hidden_states", "timesteps": "timestep"}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=ROOT / "target/release/flowtape")
    parser.add_argument("--goldens", type=pathlib.Path, default=ROOT / "tests/goldens")
    return parser.parse_args()


class Report:
    def __init__(self):
        self.failed = 0
        self.passed = 0

    def compare(self, what, deviation, bound):
        ok = deviation <= bound
        self.passed += ok
        self.failed += not ok
        print(f"{'ok' if ok else 'FAILED':<8}{what:<64}{deviation:9.1e}  bound {bound:.0e}", flush=True)

    def fail(self, what, why):
        self.failed += 1
        print(f"FAILED  {what:<64}{why}", flush=True)


def relative(got, want):
    """max |a - b| / max |b|; not finite where the shapes differ."""
    if got.shape != want.shape:
        return float("inf")
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())


def flowtape(binary, *words):
    done = subprocess.run([str(binary), *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
    return done.stdout


def inputs(step, case, model):
    """What the model is called with."""
    known = inspect.signature(model.forward).parameters
    prepared = {ARGUMENTS.get(name, name): tensor for name, tensor in load_file(step / "prepared.safetensors").items()}
    dtypes = {name: about.get("reference_dtype") for name, about in case.get("prepared_tensors", {}).items()}
    for name, tensor in prepared.items():
        kind = dtypes.get(name)
        if kind and hasattr(torch, kind.removeprefix("torch.")):
            prepared[name] = tensor.to(getattr(torch, kind.removeprefix("torch.")))
        elif name.endswith("mask"):
            prepared[name] = tensor.to(torch.int64)
    others = case["prepared_non_tensors"]
    others = others if isinstance(others, dict) else {}
    return {name: value for name, value in {**others, **prepared}.items() if name in known}


def model_step(step, binary, folder, report):
    """A checkpoint that Flowtape wrote, in diffusers' class."""
    case = json.loads((step / "case.json").read_text())
    name = step.name
    try:
        flowtape(binary, "convert", step, "--out", folder)
    except RuntimeError as error:
        if "_class_name" in str(error):
            print(f"none    {name:<64}Flowtape has no such model", flush=True)
        else:
            report.fail(f"{name}: convert", error)
        return
    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    model, how = opened(getattr(diffusers, kind), folder)
    if kind in WEIGHTS_ALONE:
        stored = load_file(folder / "diffusion_pytorch_model.safetensors")
        report.compare(f"{name}: {kind}.{how}, weights alone", worst(model.state_dict(), stored), 0.0)
        return
    seen = []
    model.proj_out.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        model(**inputs(step, case, model))
    wanted = load_file(step / "intermediates.safetensors")["proj_out"]
    report.compare(f"{name}: {kind}.{how}", relative(seen[0], wanted), PREDICTION)


def opened(kind, folder):
    """diffusers' model of a folder. Two goldens narrow layers whose width its class fixes: there the layers are narrowed too."""
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    model = kind.from_config(kind.load_config(folder))
    own = model.state_dict()
    fixed = {name for name in weights if name in own and own[name].shape != weights[name].shape}
    if not fixed:
        return kind.from_pretrained(folder, torch_dtype=torch.float32).eval(), "from_pretrained"
    for path in sorted({name.rpartition(".")[0] for name in fixed}):
        weight = weights[f"{path}.weight"]
        narrow = torch.nn.Linear(*weight.shape[::-1]) if weight.dim() == 2 else torch.nn.LayerNorm(weight.shape)
        model.set_submodule(path, narrow)
    model.load_state_dict(weights)
    return model.eval(), "load_state_dict"


def merged(binary, base, adapter, folder):
    flowtape(binary, "merge", base, "--lora", adapter, "--out", folder)
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def worst(got, want):
    missing = want.keys() - got.keys()
    if missing:
        raise RuntimeError(f"no {sorted(missing)[0]}")
    return max(relative(got[name], want[name]) for name in want)


def adapters(recipe, binary, folder, report):
    """A LoRA that Flowtape trained, in peft and in diffusers."""
    case = json.loads((recipe / "case.json").read_text())
    base = (recipe / case["model"]).resolve()
    run = folder / "run"
    settings = {
        "model.pretrained_model_name_or_path": base,
        "data.dataloader.cache_dir": recipe / "cache",
        "checkpoint.checkpoint_dir": run,
        "peft.save_formats": "[peft, diffusers]",
        "sampling.every_steps": 0,
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    flowtape(binary, "train", recipe / "config.yaml", *words)
    saved = (run / "checkpoints" / "LATEST").resolve()
    ours = merged(binary, base, saved, folder / "merged")
    kind = getattr(diffusers, json.loads((base / "config.json").read_text())["_class_name"])
    plain = load_file(base / "diffusion_pytorch_model.safetensors")
    changed = [name for name in plain if not torch.equal(plain[name], ours[name])]
    if not changed:
        report.fail(f"{recipe.name}: merge", "changes nothing")
    # What counts is the change of the weights, not the weights.
    changes = {name: ours[name] - plain[name] for name in changed}

    def compare(what, state):
        same = all(torch.equal(plain[name], state[name]) for name in plain if name not in changed)
        if not same:
            report.fail(f"{recipe.name}: {what}", "changes other weights")
        got = {name: state[name] - plain[name] for name in changed}
        # A change is a difference of weights, which rounds as those do.
        scale = max(float(plain[name].abs().max() / changes[name].abs().max()) for name in changed)
        report.compare(f"{recipe.name}: {what}", worst(got, changes), WEIGHT * max(1.0, scale))

    # NeMo calls every adapter one of a language model, and so do we; peft would look for a vocabulary.
    config = peft.PeftConfig.from_pretrained(saved)
    config.task_type = None
    model = peft.PeftModel.from_pretrained(kind.from_pretrained(base, torch_dtype=torch.float32), saved, config=config)
    compare("PeftModel.from_pretrained", model.merge_and_unload().state_dict())
    transformer = kind.from_pretrained(base, torch_dtype=torch.float32)
    parts = {name: None for name in ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")}
    pipeline = diffusers.FluxPipeline(transformer=transformer, **parts)
    pipeline.load_lora_weights(saved, weight_name="pytorch_lora_weights.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    compare("FluxPipeline.load_lora_weights", transformer.state_dict())


def golden_class(name):
    """The class of a golden step's model, and its arguments."""
    config = json.loads((ROOT / f"tests/goldens/{name}_step/config.json").read_text())
    return config["_class_name"], {key: value for key, value in config.items() if not key.startswith("_")}


# diffusers' readers of the layouts of FLUX.1, Chroma and Lumina 2 know the published widths alone.
SINGLE_FILES = {
    "FluxTransformer2DModel": dict(
        in_channels=64, num_layers=1, num_single_layers=1, num_attention_heads=24, attention_head_dim=128,
        joint_attention_dim=64, pooled_projection_dim=32, guidance_embeds=True,
    ),
    "WanTransformer3DModel": dict(
        num_attention_heads=2, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=32, freq_dim=32,
        ffn_dim=64, num_layers=2,
    ),
    "ChromaTransformer2DModel": dict(
        in_channels=64, num_layers=1, num_single_layers=1, num_attention_heads=24, attention_head_dim=128,
        joint_attention_dim=64, approximator_num_channels=64, approximator_hidden_dim=32, approximator_layers=2,
    ),
    "Lumina2Transformer2DModel": dict(
        hidden_size=2304, num_layers=1, num_refiner_layers=2, num_attention_heads=24, num_kv_heads=8, in_channels=4,
        cap_feat_dim=32, multiple_of=64, axes_dim_rope=(32, 32, 32), axes_lens=(30, 20, 20),
    ),
    "LTX2VideoTransformer3DModel": dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=2, caption_channels=16,
    ),
    **dict(map(golden_class, ("flux3", "qwen_image_21", "krea2"))),
}


def single_file(name, binary, folder, report):
    """A checkpoint in its authors' layout, and one of eight bits, in diffusers' `from_single_file` and in PyTorch's own cast."""
    torch.manual_seed(1)
    kind = getattr(diffusers, name)
    model = kind(**SINGLE_FILES[name]).to(torch.bfloat16)
    model.save_pretrained(folder / "whole")
    want = model.state_dict()
    file, small = folder / "original.safetensors", folder / "fp8.safetensors"
    flowtape(binary, "convert", folder / "whole", "--out", file, "--layout", "original")
    got = kind.from_single_file(str(file), config=str(folder / "whole"), torch_dtype=torch.bfloat16).state_dict()
    report.compare(f"{name}.from_single_file", worst(got, want), 0.0)
    flowtape(binary, "convert", folder / "whole", "--out", small, "--dtype", "fp8")
    got = load_file(small)
    cast = {key: tensor.to(torch.float8_e4m3fn) if tensor.dim() > 1 else tensor for key, tensor in want.items()}
    other = [key for key in cast if got[key].dtype != cast[key].dtype]
    if other:
        report.fail(f"{name}: fp8", f"{other[0]} is {got[other[0]].dtype}")
    report.compare(f"{name}: fp8", max(relative(got[key].float(), cast[key].float()) for key in cast), 0.0)


def main():
    args = arguments()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, peft {peft.__version__}")
    report = Report()
    work = [(model_step, step) for step in sorted(args.goldens.glob("*_step"))]
    work += [(adapters, recipe) for recipe in sorted(args.goldens.glob("recipe_*_lora"))]
    work += [(single_file, name) for name in SINGLE_FILES]
    for check, subject in work:
        with tempfile.TemporaryDirectory() as folder:
            try:
                check(subject, args.binary, pathlib.Path(folder), report)
            except Exception as error:  # what the other library says is the finding
                report.fail(getattr(subject, "name", subject), f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    print(f"{report.passed} passed, {report.failed} failed")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
