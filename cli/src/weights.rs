//! `flowtape merge`, `flowtape convert` and `flowtape extract`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use flowtape_engine::DType;
use flowtape_trainer::weights::{self, MAX_SHARD_SIZE, SaveFormat, Written};

use crate::terminal::{note, say};

/// Where a checkpoint goes, and how.
#[derive(Args)]
pub struct Output {
    /// The folder of diffusers to write, or one file, whose name ends in .safetensors.
    #[arg(long)]
    out: PathBuf,
    /// The dtype of the weights; that of the checkpoint by default. fp8 (e4m3, the rest in bf16) is for one file.
    #[arg(long)]
    dtype: Option<Stored>,
    /// The names of the tensors: diffusers', or those of the model's authors, which ComfyUI ships (for one file).
    #[arg(long, default_value = "diffusers")]
    layout: Layout,
    /// About the most bytes of one file.
    #[arg(long, default_value_t = MAX_SHARD_SIZE)]
    max_shard_size: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Layout {
    Diffusers,
    Original,
}

/// How weights are stored.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Stored {
    F32,
    Bf16,
    F16,
    Fp8,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Dtype {
    F32,
    Bf16,
    F16,
}

impl From<Dtype> for DType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::Bf16 => Self::BF16,
            Dtype::F16 => Self::F16,
        }
    }
}

impl Output {
    fn written(&self) -> Written {
        let dtype = match self.dtype {
            Some(Stored::F32) => Some(DType::F32),
            Some(Stored::Bf16 | Stored::Fp8) => Some(DType::BF16),
            Some(Stored::F16) => Some(DType::F16),
            None => None,
        };
        let (float8, original) = (self.dtype == Some(Stored::Fp8), self.layout == Layout::Original);
        Written { dtype, float8, original, max_shard_size: self.max_shard_size }
    }
}

/// Adapters to fold into a checkpoint.
#[derive(Args)]
pub struct Merge {
    /// The checkpoint: a folder of diffusers, or a run folder.
    base: PathBuf,
    /// An adapter in any known form, and what its change is multiplied with, as in `style.safetensors=0.8`; may be repeated.
    #[arg(long = "lora", value_name = "PATH[=FACTOR]", required = true)]
    loras: Vec<String>,
    /// Pass over keys that the model has no use for.
    #[arg(long)]
    allow_unused: bool,
    #[command(flatten)]
    output: Output,
}

/// A checkpoint to write anew.
#[derive(Args)]
pub struct Convert {
    /// The checkpoint: a folder of diffusers, or a run folder.
    from: PathBuf,
    #[command(flatten)]
    output: Output,
}

/// Two checkpoints of one model.
#[derive(Args)]
pub struct Extract {
    /// The checkpoint to start from.
    base: PathBuf,
    /// The one that the adapter makes of it.
    tuned: PathBuf,
    /// The rank of the adapter.
    #[arg(long, default_value_t = 32)]
    rank: usize,
    /// The folder to write.
    #[arg(long)]
    out: PathBuf,
    /// Forms: peft, diffusers, comfyui.
    #[arg(long = "format", value_delimiter = ',', default_value = "peft")]
    formats: Vec<Form>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Form {
    Peft,
    Diffusers,
    Comfyui,
}

impl From<Form> for SaveFormat {
    fn from(form: Form) -> Self {
        match form {
            Form::Peft => Self::Peft,
            Form::Diffusers => Self::Diffusers,
            Form::Comfyui => Self::Comfyui,
        }
    }
}

/// A path, and the factor behind its last `=`.
pub(crate) fn with_factor(text: &str) -> Result<(PathBuf, f64)> {
    let Some((path, factor)) = text.rsplit_once('=') else { return Ok((text.into(), 1.0)) };
    match factor.parse::<f64>() {
        Ok(factor) if factor.is_finite() => Ok((path.into(), factor)),
        _ => bail!("--lora {text}: expected a number behind =, got {factor:?}"),
    }
}

/// Merges.
pub fn merge(args: &Merge) -> Result<ExitCode> {
    let loras = args.loras.iter().map(|text| with_factor(text)).collect::<Result<Vec<_>>>()?;
    let out = &args.output.out;
    let unused = weights::merge(&args.base, &loras, out, &args.output.written(), args.allow_unused)?;
    if !unused.is_empty() {
        note!("{} keys passed over", unused.len());
    }
    say!("{}", out.display());
    Ok(ExitCode::SUCCESS)
}

/// Converts.
pub fn convert(args: &Convert) -> Result<ExitCode> {
    weights::convert(&args.from, &args.output.out, &args.output.written())?;
    say!("{}", args.output.out.display());
    Ok(ExitCode::SUCCESS)
}

/// Extracts.
pub fn extract(args: &Extract) -> Result<ExitCode> {
    let forms: Vec<SaveFormat> = args.formats.iter().map(|form| (*form).into()).collect();
    let found = weights::extract(&args.base, &args.tuned, args.rank, &args.out, &forms)?;
    let kept = found.kept.values().sum::<f64>() / found.kept.len().max(1) as f64;
    say!("{}: {} layers, {:.1} % of their change", args.out.display(), found.kept.len(), 100.0 * kept);
    if !found.left_out.is_empty() {
        note!("{} parameters differ that no adapter holds, such as {}", found.left_out.len(), found.left_out[0]);
    }
    Ok(ExitCode::SUCCESS)
}
