//! The devices that tests run on beside the CPU.

use std::io::Write;
use std::sync::OnceLock;

use flowtape_engine::Device;
use flowtape_gpu::wgpu::Wgpu;

/// Every GPU that can be used, opened once. One that is missing is said; `FLOWTAPE_REQUIRE=wgpu` makes it a failure.
///
/// # Panics
/// When a required device is missing.
pub fn gpus() -> &'static [Device] {
    static FOUND: OnceLock<Vec<Device>> = OnceLock::new();
    FOUND.get_or_init(open)
}

fn open() -> Vec<Device> {
    let mut found = Vec::new();
    for report in flowtape_gpu::wgpu::reports() {
        let index = report.name.strip_prefix("wgpu:").and_then(|i| i.parse().ok());
        match (index, &report.unusable) {
            (Some(index), None) => match Wgpu::device(Some(index)) {
                Ok(device) => found.push(device),
                Err(error) => say(format_args!("{}: {error}", report.name)),
            },
            (_, reason) => say(format_args!("{} {}: {reason:?}", report.name, report.title)),
        }
    }
    let required = std::env::var("FLOWTAPE_REQUIRE").is_ok_and(|r| r.split(',').any(|d| d == "wgpu"));
    assert!(!required || !found.is_empty(), "FLOWTAPE_REQUIRE=wgpu, and no adapter can be used");
    if found.is_empty() {
        say(format_args!("skipped: no wgpu adapter can be used"));
    }
    found
}

/// Straight to the terminal: the harness swallows what a passing test prints.
pub fn say(what: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stdout().lock(), "{what}");
}
