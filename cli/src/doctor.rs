//! `flowtape doctor`.

use std::fs::File;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use flowtape_engine::{DType, Device, Tensor, cpu};
use flowtape_gpu::DeviceReport;
use flowtape_trainer::plan::gigabytes;
use flowtape_trainer::start::hub_cache;
use serde::Serialize;

use crate::terminal::{delivered, say};

/// How to tell.
#[derive(Args)]
pub struct Doctor {
    /// Print one JSON array.
    #[arg(long)]
    json: bool,
}

/// How something is.
#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Health {
    Good,
    /// It works, but not as well as it could; or what is not there may not be wanted.
    Note,
    /// Training here fails, or a device that is there can't be used.
    Bad,
}

/// What was looked at.
#[derive(Serialize)]
struct Finding {
    what: String,
    health: Health,
    found: String,
    /// What mends it.
    fix: Option<String>,
}

impl Finding {
    fn new(what: impl Into<String>, health: Health, found: impl Into<String>) -> Self {
        Self { what: what.into(), health, found: found.into(), fix: None }
    }

    fn fix(self, fix: impl Into<String>) -> Self {
        Self { fix: Some(fix.into()), ..self }
    }
}

/// Memory below which even the digits are tight, and disk below which checkpoints of small models are, in bytes.
const LITTLE_MEMORY: u64 = 2 << 30;
const LITTLE_DISK: u64 = 5 << 30;
/// What PCI calls NVIDIA.
const NVIDIA: &str = "0x10de";

/// Looks at the machine. It ends with 1 where something is in the way of training.
pub fn run(args: &Doctor) -> Result<ExitCode> {
    let mut all = vec![processor(), memory()];
    all.extend(flowtape_gpu::reports().iter().skip(1).map(device));
    if !cfg!(feature = "cuda") {
        let fix = "build it with the feature cuda (the default)";
        all.push(Finding::new("cuda", Health::Note, "this binary was built without it").fix(fix));
    }
    all.extend([works("cpu"), disk(), folder(), hub()]);
    if args.json {
        say!("{}", serde_json::to_string(&all)?);
    } else {
        for Finding { what, health, found, fix } in &all {
            let mark = match health {
                Health::Good => "ok",
                Health::Note => "note",
                Health::Bad => "BAD",
            };
            say!("{mark:<5} {what:<10} {found}");
            if let Some(fix) = fix {
                say!("{:<16} -> {fix}", "");
            }
        }
    }
    let bad = all.iter().any(|finding| finding.health == Health::Bad);
    if bad { Ok(ExitCode::FAILURE) } else { delivered() }
}

fn processor() -> Finding {
    let (set, threads) = (cpu::instruction_set(), std::thread::available_parallelism().map_or(1, usize::from));
    let found = format!("{}, kernels for {set}, {threads} threads", std::env::consts::ARCH);
    if cfg!(target_arch = "x86_64") && set == "portable" {
        let fix = "a processor with AVX2 and FMA is several times faster; in a virtual machine, pass the host's model through";
        return Finding::new("processor", Health::Note, found).fix(fix);
    }
    Finding::new("processor", Health::Good, found)
}

fn memory() -> Finding {
    match Device::cpu().backend().capacity() {
        Some(bytes) if bytes < LITTLE_MEMORY => {
            let fix = "raise the limit of the container or job, or use smaller batches; `flowtape check RECIPE` says what it takes";
            Finding::new("memory", Health::Note, format!("{} for this process", gigabytes(bytes))).fix(fix)
        }
        Some(bytes) => Finding::new("memory", Health::Good, format!("{} for this process", gigabytes(bytes))),
        None => Finding::new("memory", Health::Note, "its size is not known here"),
    }
}

/// A device that is not the CPU.
fn device(report: &DeviceReport) -> Finding {
    let DeviceReport { name, title, details, unusable } = report;
    let Some(reason) = unusable else {
        let works = works(name);
        let software = details.iter().any(|(key, value)| key == "kind" && value.contains("software"));
        if works.health == Health::Good && software {
            let found = format!("{title}: it works, in software; the device cpu is faster");
            return Finding::new(name, Health::Note, found);
        }
        return Finding { found: format!("{title}: {}", works.found), ..works };
    };
    if !name.starts_with("cuda") {
        return Finding::new(name, Health::Note, format!("{title}: {reason}"));
    }
    if !nvidia_is_there() {
        return Finding::new(name, Health::Note, "no NVIDIA GPU in this machine, or none that is passed through to it");
    }
    let found = Finding::new(name, Health::Bad, format!("{title}: {reason}"));
    if !Path::new("/proc/driver/nvidia/version").exists() {
        return found.fix(
            "install NVIDIA's driver, of CUDA 12.0 or newer (Debian: apt-get install nvidia-driver), and restart",
        );
    }
    if !Path::new("/dev/nvidiactl").exists() {
        return found
            .fix("start the container with the GPU: docker run --gpus all, or a resource request of nvidia.com/gpu");
    }
    found.fix("the driver is loaded: make its library libcuda.so.1 of the same version visible to this process")
}

/// Whether there is an NVIDIA GPU, whatever drives it. Where that can't be told, there may be one.
fn nvidia_is_there() -> bool {
    let Ok(devices) = std::fs::read_dir("/sys/bus/pci/devices") else { return true };
    let read = |path: &Path, file| std::fs::read_to_string(path.join(file)).unwrap_or_default();
    // Class 3 is displays and what computes as they do.
    devices
        .flatten()
        .map(|device| device.path())
        .any(|device| read(&device, "vendor").trim() == NVIDIA && read(&device, "class").trim().starts_with("0x03"))
}

/// Whether a device gives the right numbers: a product, of which every element is the same whole number.
fn works(name: &str) -> Finding {
    const N: usize = 96;
    let computed = || -> Result<bool> {
        let device = flowtape_gpu::device(name)?;
        let twos = Tensor::full(&[N, N], 2.0, DType::F32, &device)?;
        let product = twos.matmul(&twos)?.to_vec::<f32>()?;
        Ok(product.iter().all(|value| *value == 4.0 * N as f32))
    };
    let what = if name == "cpu" { "product" } else { name };
    match computed() {
        Ok(true) => Finding::new(what, Health::Good, "it computes a product of matrices right"),
        Ok(false) => Finding::new(what, Health::Bad, "a product of matrices came out wrong")
            .fix("update its driver; if that does not help, please report it with the output of `flowtape devices`"),
        Err(error) => Finding::new(what, Health::Bad, format!("a product of matrices failed: {error:#}"))
            .fix("see `flowtape devices`; another process may hold its memory"),
    }
}

fn disk() -> Finding {
    let free = |bytes: u64| format!("{} free here", gigabytes(bytes));
    match fs4::available_space(".") {
        Ok(bytes) if bytes < LITTLE_DISK => Finding::new("disk", Health::Note, free(bytes))
            .fix("set run_dir to a larger disk: checkpoints of a model take several times its size"),
        Ok(bytes) => Finding::new("disk", Health::Good, free(bytes)),
        Err(error) => Finding::new("disk", Health::Note, format!("its free space is not known: {error}")),
    }
}

/// Whether runs can be kept in the working directory.
fn folder() -> Finding {
    let here = std::env::current_dir().map_or_else(|_| ".".into(), |path| path.display().to_string());
    let tried = tempfile::NamedTempFile::new_in(".")
        .map_err(|error| (Health::Bad, format!("{here} can't be written: {error}")));
    let locked = tried.and_then(|file| {
        let again = File::open(file.path()).map_err(|error| (Health::Bad, format!("{here}: {error}")))?;
        let unlocked = |what: String| (Health::Note, format!("{here} is writable, but has no locks: {what}"));
        file.as_file().try_lock().map_err(|error| unlocked(error.to_string()))?;
        match again.try_lock() {
            Ok(()) => Err(unlocked("two processes got the same one".into())),
            Err(_) => Ok(()),
        }
    });
    match locked {
        Ok(()) => Finding::new("folder", Health::Good, format!("{here} is writable, and has locks")),
        Err((Health::Bad, found)) => {
            Finding::new("folder", Health::Bad, found).fix("run it in a folder of yours, or set run_dir to one")
        }
        Err((health, found)) => {
            Finding::new("folder", health, found).fix("see to it yourself that only one process trains in a run folder")
        }
    }
}

/// Models of the hub that are here.
fn hub() -> Finding {
    let cache = hub_cache();
    let names = std::fs::read_dir(&cache).map(|entries| {
        let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter_map(|name| name.strip_prefix("models--").map(|name| name.replace("--", "/"))).collect::<Vec<_>>()
    });
    match names {
        Ok(names) if !names.is_empty() => {
            Finding::new("hub", Health::Good, format!("{} models in {}", names.len(), cache.display()))
        }
        _ => Finding::new("hub", Health::Note, format!("no models in {}", cache.display())).fix(
            "only for names such as black-forest-labs/FLUX.1-dev: `hf download NAME`, or set HF_HOME to where they lie",
        ),
    }
}
