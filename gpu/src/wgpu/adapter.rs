//! The adapters: what they are and what they can do.

use ::wgpu::{Adapter, Backends, DeviceDescriptor, DeviceType, DownlevelFlags, Features, Instance, InstanceDescriptor};
use flowtape_engine::{Error, Result};

use super::WgpuOptions;
use super::queue::{Bounds, Gpu};
use crate::DeviceReport;

/// Features that kernels make use of where they are there, with their names in a report.
const WANTED: [(&str, Features); 5] = [
    ("f16", Features::SHADER_F16),
    ("subgroups", Features::SUBGROUP),
    ("cooperative matrices", Features::EXPERIMENTAL_COOPERATIVE_MATRIX),
    ("timestamps", Features::TIMESTAMP_QUERY),
    ("pipeline cache", Features::PIPELINE_CACHE),
];

/// All adapters, in wgpu's order.
pub(super) fn adapters() -> Vec<Adapter> {
    let instance = Instance::new(InstanceDescriptor {
        backends: Backends::VULKAN | Backends::METAL | Backends::DX12,
        ..InstanceDescriptor::new_without_display_handle_from_env()
    });
    pollster::block_on(instance.enumerate_adapters(Backends::all()))
}

/// Why an adapter can't run our kernels, if it can't.
pub(super) fn unusable(adapter: &Adapter) -> Option<String> {
    if !adapter.get_downlevel_capabilities().flags.contains(DownlevelFlags::COMPUTE_SHADERS) {
        return Some("it has no compute shaders".into());
    }
    let limits = adapter.limits();
    let needs = [
        ("storage buffers of a kernel", limits.max_storage_buffers_per_shader_stage.into(), 8),
        ("threads of a workgroup", limits.max_compute_invocations_per_workgroup.into(), 256),
        ("bytes of workgroup memory", limits.max_compute_workgroup_storage_size.into(), 16 << 10),
        ("bytes of a binding", limits.max_storage_buffer_binding_size, 1 << 20),
    ];
    let lacking = needs.into_iter().find(|(_, has, needed)| has < needed);
    lacking.map(|(what, has, needed)| format!("it has {has} {what}, {needed} are needed"))
}

fn missing(expected: impl ToString, got: impl ToString) -> Error {
    Error::Device { op: "wgpu", expected: expected.to_string(), got: got.to_string() }
}

/// A device of adapter `index`; of the first that is usable, GPUs before software, if none is named.
pub(super) fn open(index: Option<usize>, options: WgpuOptions) -> Result<Gpu> {
    let found = adapters();
    let rank = |adapter: &Adapter| match adapter.get_info().device_type {
        DeviceType::DiscreteGpu => 0,
        DeviceType::IntegratedGpu | DeviceType::VirtualGpu => 1,
        DeviceType::Other => 2,
        DeviceType::Cpu => 3,
    };
    let best = || (0..found.len()).filter(|i| unusable(&found[*i]).is_none()).min_by_key(|i| rank(&found[*i]));
    let chosen = index.or_else(best).and_then(|i| Some((i, found.get(i)?)));
    let Some((index, adapter)) = chosen else {
        let expected = index.map_or("a usable adapter".to_owned(), |i| format!("adapter {i}"));
        return Err(missing(expected, format!("{} adapters; `flowtape devices` lists them", found.len())));
    };
    if let Some(reason) = unusable(adapter) {
        return Err(missing("a usable adapter", format!("{}: {reason}", adapter.get_info().name)));
    }
    let descriptor = DeviceDescriptor { required_limits: adapter.limits(), ..DeviceDescriptor::default() };
    let (device, queue) =
        pollster::block_on(adapter.request_device(&descriptor)).map_err(|e| missing(&adapter.get_info().name, e))?;
    let mut bounds = Bounds::of(&adapter.limits());
    if let Some(size) = options.max_binding_size {
        bounds.binding.size = bounds.binding.size.min(size.max(1 << 10) / 4 * 4);
    }
    bounds.bindings = bounds.bindings.min(options.max_bindings.unwrap_or(usize::MAX).max(8));
    bounds.workgroups = bounds.workgroups.min(options.max_workgroups.unwrap_or(u32::MAX).max(1));
    Ok(Gpu::new(device, queue, format!("wgpu:{index}"), bounds))
}

fn report(index: usize, adapter: &Adapter) -> DeviceReport {
    let (info, limits) = (adapter.get_info(), adapter.limits());
    let kind = match info.device_type {
        DeviceType::DiscreteGpu => "discrete GPU",
        DeviceType::IntegratedGpu => "integrated GPU",
        DeviceType::VirtualGpu => "virtual GPU",
        DeviceType::Cpu => "software on the CPU",
        DeviceType::Other => "another kind",
    };
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    let there = WANTED.iter().filter(|(_, f)| adapter.features().contains(*f)).map(|(name, _)| *name);
    let details = [
        ("kind", kind.to_owned()),
        ("interface", info.backend.to_string()),
        ("driver", format!("{} {}", info.driver, info.driver_info).trim().to_owned()),
        ("largest buffer", mib(limits.max_buffer_size)),
        ("largest binding", mib(limits.max_storage_buffer_binding_size)),
        ("bindings", limits.max_storage_buffers_per_shader_stage.to_string()),
        ("workgroup memory", format!("{} KiB", limits.max_compute_workgroup_storage_size >> 10)),
        ("workgroups", format!("{} per dimension", limits.max_compute_workgroups_per_dimension)),
        ("features", there.collect::<Vec<_>>().join(", ")),
    ];
    DeviceReport {
        name: format!("wgpu:{index}"),
        title: info.name.clone(),
        details: details.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        unusable: unusable(adapter),
    }
}

/// All adapters; one line that says so where there is none.
pub fn reports() -> Vec<DeviceReport> {
    let found = adapters();
    if found.is_empty() {
        let reason =
            "no adapter: install a driver with Vulkan, Metal or DirectX 12 (mesa-vulkan-drivers is one in software)";
        return vec![DeviceReport {
            name: "wgpu".into(),
            title: "no adapter".into(),
            details: Vec::new(),
            unusable: Some(reason.into()),
        }];
    }
    found.iter().enumerate().map(|(index, adapter)| report(index, adapter)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_adapter_is_reported_once_with_its_limits() {
        let (found, reports) = (adapters(), reports());
        assert_eq!(reports.len(), found.len().max(1));
        for (index, (adapter, report)) in found.iter().zip(&reports).enumerate() {
            assert_eq!(report.name, format!("wgpu:{index}"));
            let binding = adapter.limits().max_storage_buffer_binding_size >> 20;
            assert!(report.to_string().contains(&format!("{binding} MiB")), "{report}");
        }
        let none = reports.iter().all(|r| r.unusable.is_some());
        assert!(!none || std::env::var_os("FLOWTAPE_REQUIRE").is_none_or(|r| r != "wgpu"), "{reports:?}");
    }
}
