//! The adapters: what they are and what they can do.

use ::wgpu::{
    Adapter, AdapterInfo, Backend, Backends, DeviceDescriptor, DeviceType, DownlevelFlags, Features, Instance,
    InstanceDescriptor,
};
use flowtape_engine::{Error, Result};

use super::WgpuOptions;
use super::matmul::Cooperative;
use super::platform::wait;
use super::queue::{Abilities, Bounds, Gpu};
use super::tuning::{self, Tuning};
use crate::DeviceReport;

/// Features that kernels make use of where they are there, with their names in a report.
const WANTED: [(&str, Features); 5] = [
    ("f16", Features::SHADER_F16),
    ("subgroups", Features::SUBGROUP),
    ("cooperative matrices", Features::EXPERIMENTAL_COOPERATIVE_MATRIX),
    ("timestamps", Features::TIMESTAMP_QUERY),
    ("pipeline cache", Features::PIPELINE_CACHE),
];

/// All adapters, in wgpu's order. A browser gives one at most.
pub(super) fn adapters() -> Result<Vec<Adapter>> {
    let instance = Instance::new(InstanceDescriptor {
        backends: Backends::VULKAN | Backends::METAL | Backends::DX12 | Backends::BROWSER_WEBGPU,
        ..InstanceDescriptor::new_without_display_handle_from_env()
    });
    wait(instance.enumerate_adapters(Backends::all()))
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

fn unavailable(device: impl ToString, reason: impl ToString) -> Error {
    Error::Unavailable { device: device.to_string(), reason: reason.to_string() }
}

/// A device of adapter `index`; of the first that is usable, GPUs before software, if none is named.
pub(super) fn open(index: Option<usize>, options: WgpuOptions) -> Result<Gpu> {
    let found = adapters()?;
    let rank = |adapter: &Adapter| match adapter.get_info().device_type {
        DeviceType::DiscreteGpu => 0,
        DeviceType::IntegratedGpu | DeviceType::VirtualGpu => 1,
        DeviceType::Other => 2,
        DeviceType::Cpu => 3,
    };
    let best = || (0..found.len()).filter(|i| unusable(&found[*i]).is_none()).min_by_key(|i| rank(&found[*i]));
    let chosen = index.or_else(best).and_then(|i| Some((i, found.get(i)?)));
    let Some((index, adapter)) = chosen else {
        let (device, which) = index.map_or(("wgpu".to_owned(), ""), |i| (format!("wgpu:{i}"), " of that number"));
        let reason = format!("there is no usable adapter{which} among {}; `flowtape devices` lists them", found.len());
        return Err(unavailable(device, reason));
    };
    if let Some(reason) = unusable(adapter) {
        return Err(unavailable(format!("wgpu:{index} ({})", adapter.get_info().name), reason));
    }
    let info = adapter.get_info();
    let (device, queue) = request(adapter).map_err(|e| unavailable(format!("wgpu:{index} ({})", info.name), e))?;
    let mut bounds = Bounds::of(&adapter.limits());
    if let Some(size) = options.max_binding_size {
        bounds.binding.size = bounds.binding.size.min(size.max(1 << 10) / 16 * 16);
    }
    bounds.bindings = bounds.bindings.min(options.max_bindings.unwrap_or(usize::MAX).max(8));
    bounds.workgroups = bounds.workgroups.min(options.max_workgroups.unwrap_or(u32::MAX).max(1));
    let abilities = abilities(&info, &device, adapter);
    // What runs on the CPU is used for tests, and is slow to measure. A browser keeps nothing that was measured.
    let measures = info.device_type != DeviceType::Cpu && info.backend != Backend::BrowserWebGpu;
    let tune = options.tune.or_else(tuning::asked).unwrap_or(measures);
    let title = format!("{}, {}, {} {}", info.name, info.backend, info.driver, info.driver_info);
    let tuning = Tuning::new(tune, title.trim(), tuning::default_file());
    Gpu::new((device, queue), format!("wgpu:{index}"), bounds, abilities, tuning)
}

/// A device with all limits of its adapter, and with those features that kernels make use of.
fn request(adapter: &Adapter) -> Result<(::wgpu::Device, ::wgpu::Queue), String> {
    let ask = |features: Features| {
        let descriptor = DeviceDescriptor {
            required_limits: adapter.limits(),
            required_features: features & adapter.features(),
            // SAFETY: cooperative matrices are all that is experimental here. Their kernels are our own, and their
            // results are compared with the tiles' before they are used.
            experimental_features: unsafe { ::wgpu::ExperimentalFeatures::enabled() },
            ..DeviceDescriptor::default()
        };
        wait(adapter.request_device(&descriptor)).map_err(|e| e.to_string())?.map_err(|e| e.to_string())
    };
    let plain = Features::SUBGROUP | Features::SHADER_F16;
    ask(plain | Features::EXPERIMENTAL_COOPERATIVE_MATRIX).or_else(|_| ask(plain)).or_else(|_| ask(Features::empty()))
}

fn abilities(info: &AdapterInfo, device: &::wgpu::Device, adapter: &Adapter) -> Abilities {
    let has = |feature| device.features().contains(feature);
    let subgroups = has(Features::SUBGROUP);
    let cooperative = if subgroups && has(Features::EXPERIMENTAL_COOPERATIVE_MATRIX) {
        let lanes = (info.subgroup_min_size, info.subgroup_max_size);
        Cooperative::of(&adapter.cooperative_matrix_properties(), lanes, has(Features::SHADER_F16))
    } else {
        Vec::new()
    };
    let busy = if info.device_type == DeviceType::Cpu { 4 } else { 256 };
    Abilities { busy, subgroups, cooperative }
}

/// Bytes of the adapter's own memory, where its interface tells them.
#[cfg(any(windows, target_os = "linux", target_os = "android", target_os = "freebsd"))]
fn memory(adapter: &Adapter) -> Option<u64> {
    /// `VK_MEMORY_HEAP_DEVICE_LOCAL_BIT`.
    const DEVICE_LOCAL: u32 = 1;
    // SAFETY: the adapter is only read, and is not kept.
    let adapter = unsafe { adapter.as_hal::<::wgpu::hal::api::Vulkan>() }?;
    let instance = adapter.shared_instance().raw_instance();
    // SAFETY: the physical device is of this instance, which the adapter keeps alive.
    let found = unsafe { instance.get_physical_device_memory_properties(adapter.raw_physical_device()) };
    let heaps = found.memory_heaps.iter().take(found.memory_heap_count as usize);
    Some(heaps.filter(|h| h.flags.as_raw() & DEVICE_LOCAL != 0).map(|h| h.size).sum())
}

#[cfg(not(any(windows, target_os = "linux", target_os = "android", target_os = "freebsd")))]
fn memory(_: &Adapter) -> Option<u64> {
    None
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
    let lanes = if info.subgroup_min_size == info.subgroup_max_size {
        info.subgroup_max_size.to_string()
    } else {
        format!("{} to {}", info.subgroup_min_size, info.subgroup_max_size)
    };
    let there = WANTED.iter().filter(|(_, f)| adapter.features().contains(*f)).map(|(name, _)| *name);
    let details = [
        ("kind", kind.to_owned()),
        ("interface", info.backend.to_string()),
        ("driver", format!("{} {}", info.driver, info.driver_info).trim().to_owned()),
        ("memory", memory(adapter).map_or("not told by this interface".into(), mib)),
        ("largest buffer", mib(limits.max_buffer_size)),
        ("largest binding", mib(limits.max_storage_buffer_binding_size)),
        ("bindings", limits.max_storage_buffers_per_shader_stage.to_string()),
        ("workgroup memory", format!("{} KiB", limits.max_compute_workgroup_storage_size >> 10)),
        ("subgroups", lanes),
        ("workgroups", format!("{} per dimension", limits.max_compute_workgroups_per_dimension)),
        ("features", there.collect::<Vec<_>>().join(", ")),
    ];
    DeviceReport {
        name: format!("wgpu:{index}"),
        title: info.name.clone(),
        details: details.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        unusable: unusable(adapter)
            .or_else(|| request(adapter).err().map(|error| format!("it can't be opened: {error}"))),
    }
}

/// All adapters; one line that says so where there is none.
pub fn reports() -> Vec<DeviceReport> {
    let found = adapters().unwrap_or_default();
    if found.is_empty() {
        let reason = "install a driver with Vulkan, Metal or DirectX 12 (mesa-vulkan-drivers is one in software)";
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
        let (found, reports) = (adapters().unwrap(), reports());
        assert_eq!(reports.len(), found.len().max(1));
        for (index, (adapter, report)) in found.iter().zip(&reports).enumerate() {
            assert_eq!(report.name, format!("wgpu:{index}"));
            let binding = adapter.limits().max_storage_buffer_binding_size >> 20;
            assert!(report.to_string().contains(&format!("{binding} MiB")), "{report}");
        }
        let none = reports.iter().all(|r| r.unusable.is_some());
        let required = std::env::var("FLOWTAPE_REQUIRE").is_ok_and(|r| r.split(',').any(|r| r == "wgpu"));
        assert!(!none || !required, "{reports:?}");
    }
}
