//! The devices that tests run on beside the CPU.

use std::io::Write;
use std::sync::OnceLock;

use flowtape_engine::Device;
use flowtape_gpu::DeviceReport;

/// A backend of devices, by its name before the colon in `--device`.
const KINDS: [&str; 2] = ["cuda", "wgpu"];

/// Every GPU that can be used, opened once: CUDA's first device and all of wgpu's adapters. Without an NVIDIA driver the
/// emulated machine takes its place. What is missing is said; `FLOWTAPE_REQUIRE=cuda,wgpu` makes it a failure, and the
/// emulated machine is no device then.
///
/// # Panics
/// When a required device is missing.
pub fn gpus() -> &'static [Device] {
    static FOUND: OnceLock<Vec<Device>> = OnceLock::new();
    FOUND.get_or_init(|| KINDS.iter().flat_map(|kind| open(kind)).collect())
}

/// Those of one backend.
pub fn gpus_of(kind: &str) -> Vec<Device> {
    gpus().iter().filter(|d| kind_of(d) == kind).cloned().collect()
}

/// What `--device` calls the backend of a device.
pub fn kind_of(device: &Device) -> &str {
    if device.backend().name().starts_with("cuda") { "cuda" } else { "wgpu" }
}

/// Whether a device is the emulated machine, which is slow: tests give it less to do, unless `FLOWTAPE_EMULATE=all`.
pub fn is_slow(device: &Device) -> bool {
    let all = std::env::var("FLOWTAPE_EMULATE").is_ok_and(|v| v == "all");
    !all && device.backend().name().contains("emulated")
}

fn open(kind: &str) -> Vec<Device> {
    let required = std::env::var("FLOWTAPE_REQUIRE").is_ok_and(|r| r.split(',').any(|d| d == kind));
    let reports: Vec<DeviceReport> = match kind {
        "cuda" => {
            let emulated = flowtape_cuda_emulator::stand_in();
            assert!(!required || !emulated, "FLOWTAPE_REQUIRE=cuda, and there is no NVIDIA driver");
            flowtape_gpu::cuda::reports().into_iter().take(1).collect()
        }
        _ => flowtape_gpu::wgpu::reports(),
    };
    let mut found = Vec::new();
    for report in reports {
        match (&report.unusable, flowtape_gpu::device(&report.name)) {
            (None, Ok(device)) => found.push(device),
            (None, Err(error)) => say(format_args!("{}: {error}", report.name)),
            (Some(reason), _) => say(format_args!("{} {}: {reason}", report.name, report.title)),
        }
    }
    assert!(!required || !found.is_empty(), "FLOWTAPE_REQUIRE={kind}, and no device can be used");
    if found.is_empty() {
        say(format_args!("skipped: no {kind} device can be used"));
    }
    found
}

/// Straight to the terminal: the harness swallows what a passing test prints.
pub fn say(what: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stdout().lock(), "{what}");
}
