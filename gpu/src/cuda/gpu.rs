//! A device: its context and stream, and its failures in words.

use std::ffi::CStr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize};

use cust::context::{Context, CurrentContext};
use cust::device::{Device, DeviceAttribute};
use cust::error::CudaError;
use cust::stream::{Stream, StreamFlags};
use cust::sys::{self, CUresult};
use cust::{CudaApiVersion, CudaFlags};
use flowtape_engine::{Error, Result};

use super::launch::Modules;
use crate::DeviceReport;

/// The oldest driver interface whose PTX has what kernels use: CUDA 12.0, of PTX ISA 8.0.
const OLDEST_DRIVER: (i32, i32) = (12, 0);
/// The oldest compute capability: Ampere, with bf16, `mma.sync` and `cp.async`.
const OLDEST_CAPABILITY: (i32, i32) = (8, 0);

/// What the driver answered instead of success.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    code: u32,
    text: String,
}

impl From<CudaError> for Failure {
    fn from(error: CudaError) -> Self {
        Self { code: error as u32, text: error.to_string().trim_matches('"').to_owned() }
    }
}

/// A code as a result.
pub(super) fn checked(code: CUresult) -> Result<(), Failure> {
    if code == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = c"an error without a text".as_ptr();
    // SAFETY: the function sets the pointer to a text that lives as long as the driver, or leaves it.
    let text = unsafe {
        sys::cuGetErrorString(code, &raw mut text);
        CStr::from_ptr(text)
    };
    Err(Failure { code: code as u32, text: text.to_string_lossy().into_owned() })
}

impl Failure {
    /// Whether the driver has no memory left.
    pub fn is_memory(&self) -> bool {
        self.code == 2
    }

    fn advice(&self) -> &'static str {
        match self.code {
            3 | 34 | 100 | 101 => "see `nvidia-smi` and `flowtape devices`; CUDA_VISIBLE_DEVICES may hide a device",
            200 | 209 | 218 | 222 => "the driver does not take the kernels: install one of CUDA 12.0 or newer",
            46 | 201 | 304 | 709 => "another process may hold the device: see `nvidia-smi`",
            214 | 220 | 226 => "the hardware reports errors: see `dmesg` and `nvidia-smi -q`",
            700..=702 | 710 | 714..=719 => {
                "a kernel before this failed, and the device takes no more work from this process: start it anew, the \
                 last checkpoint is good; `compute-sanitizer` names the kernel"
            }
            803 | 804 => "the driver's library and its kernel module differ: restart the machine or install one again",
            _ => "see `nvidia-smi` and the driver's log",
        }
    }

    /// In words, with what to do.
    fn told(&self) -> String {
        let raw = flowtape_cuda_driver::last_unlisted_error();
        let code = if self.code == 999 && raw != 0 { raw as u32 } else { self.code };
        format!("{} (CUDA error {code}); {}", self.text, self.advice())
    }
}

/// A device that is not there or can't be used, and why.
fn absent(ordinal: u32, why: String) -> Error {
    Error::Unavailable { device: format!("cuda:{ordinal}"), reason: why }
}

/// An opened device. All its work is on one stream, in order.
#[derive(Debug)]
pub(super) struct Gpu {
    pub stream: Stream,
    pub context: Context,
    /// What `--device` calls it, and its maker.
    pub name: String,
    pub total: usize,
    /// Whether memory is allocated in the stream's order.
    pub ordered: bool,
    pub modules: Modules,
    /// Launches so far, and the names of the last few: a failure is seen later than its cause.
    pub launches: AtomicUsize,
    pub recent: Mutex<Vec<String>>,
    /// Set once a failure was seen after which the device takes no work.
    pub lost: AtomicBool,
}

/// The driver, ready; or what is in the way and what to do.
fn driver() -> Result<(), String> {
    if let Err(reason) = flowtape_cuda_driver::driver() {
        return Err(format!("no NVIDIA driver: {reason}; install one of CUDA 12.0 or newer"));
    }
    let in_words = |e: CudaError| Failure::from(e).told();
    let version = CudaApiVersion::get().map_err(in_words)?;
    let found = (version.major(), version.minor());
    if found < OLDEST_DRIVER {
        let (major, minor) = found;
        return Err(format!("the driver is of CUDA {major}.{minor}; install one of CUDA 12.0 (525) or newer"));
    }
    cust::init(CudaFlags::empty()).map_err(in_words)
}

fn capability(device: Device) -> Result<(i32, i32), CudaError> {
    let major = device.get_attribute(DeviceAttribute::ComputeCapabilityMajor)?;
    Ok((major, device.get_attribute(DeviceAttribute::ComputeCapabilityMinor)?))
}

/// Why a device can't be used.
fn unusable((major, minor): (i32, i32)) -> Option<String> {
    let (least, _) = OLDEST_CAPABILITY;
    ((major, minor) < OLDEST_CAPABILITY)
        .then(|| format!("its compute capability is {major}.{minor}; {least}.0 (Ampere) is the least"))
}

impl Gpu {
    /// Opens device `ordinal`.
    pub fn open(ordinal: u32) -> Result<Self> {
        let label = format!("cuda:{ordinal}");
        driver().map_err(|why| absent(ordinal, why))?;
        let opened = || -> Result<_, Failure> {
            let device = Device::get_device(ordinal)?;
            let name = format!("{label} ({})", device.name()?);
            Ok((device, name, capability(device)?, device.total_memory()?))
        };
        let (device, name, capability, total) = opened().map_err(|f| absent(ordinal, f.told()))?;
        if let Some(why) = unusable(capability) {
            return Err(absent(ordinal, format!("{name}: {why}; `flowtape devices` lists others")));
        }
        let made = || -> Result<_, Failure> {
            let context = Context::new(device)?;
            CurrentContext::set_current(&context)?;
            let stream = Stream::new(StreamFlags::NON_BLOCKING, None)?;
            Ok((context, stream, keep_memory(device)?))
        };
        let (context, stream, ordered) = made().map_err(|f| absent(ordinal, f.told()))?;
        let (modules, launches, recent) = (Modules::default(), AtomicUsize::new(0), Mutex::default());
        Ok(Self { stream, context, name, total, ordered, modules, launches, recent, lost: AtomicBool::new(false) })
    }

    /// Makes the device current for this thread.
    pub fn enter(&self) -> Result<(), Failure> {
        Ok(CurrentContext::set_current(&self.context)?)
    }

    /// A failure as the engine's error; with what was launched last, where that may be the cause.
    pub fn failed(&self, op: &'static str, mut failure: Failure) -> Error {
        if (700..=719).contains(&failure.code) {
            self.lost.store(true, std::sync::atomic::Ordering::Relaxed);
            let recent = self.recent.lock().map(|r| r.join(", ")).unwrap_or_default();
            failure.text = format!("{}; launched last: {recent}", failure.text);
        }
        Error::DeviceFailed { device: self.name.clone(), what: format!("{op}: {}", failure.told()) }
    }

    /// Waits for all work.
    pub fn synchronize(&self) -> Result<(), Failure> {
        self.enter()?;
        Ok(self.stream.synchronize()?)
    }
}

/// Lets the driver keep freed memory; `false` where it has no stream-ordered allocation.
fn keep_memory(device: Device) -> Result<bool, Failure> {
    let mut supported = 0;
    let mut pool = std::ptr::null_mut();
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED;
    let mut threshold = u64::MAX;
    // SAFETY: each call writes to the variable it is given; the pool is the device's own.
    unsafe {
        checked(sys::cuDeviceGetAttribute(&raw mut supported, attribute, device.as_raw()))?;
        if supported == 0 {
            return Ok(false);
        }
        checked(sys::cuDeviceGetDefaultMemPool(&raw mut pool, device.as_raw()))?;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        checked(sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut threshold).cast()))?;
    }
    Ok(true)
}

/// The version of the driver itself, where the system says it.
fn release() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    release_in(&text)
}

fn release_in(text: &str) -> Option<String> {
    let is_version = |w: &&str| w.contains('.') && w.bytes().all(|b| b == b'.' || b.is_ascii_digit());
    text.lines().find(|l| l.starts_with("NVRM"))?.split_whitespace().find(is_version).map(str::to_owned)
}

fn report(ordinal: u32) -> Result<DeviceReport, CudaError> {
    let device = Device::get_device(ordinal)?;
    let (major, minor) = capability(device)?;
    let version = CudaApiVersion::get()?;
    let release = release().map_or(String::new(), |r| format!(" ({r})"));
    let details = [
        ("driver", format!("CUDA {}.{}{release}", version.major(), version.minor())),
        ("memory", format!("{} MiB", device.total_memory()? >> 20)),
        ("capability", format!("{major}.{minor}")),
        ("multiprocessors", device.get_attribute(DeviceAttribute::MultiprocessorCount)?.to_string()),
    ];
    Ok(DeviceReport {
        name: format!("cuda:{ordinal}"),
        title: device.name()?,
        details: details.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        unusable: unusable((major, minor)),
    })
}

/// All NVIDIA devices; one line that says what is in the way where there is none.
pub fn reports() -> Vec<DeviceReport> {
    let line = |name: String, reason: String| DeviceReport {
        name,
        title: "NVIDIA GPU".into(),
        details: Vec::new(),
        unusable: Some(reason),
    };
    if let Err(why) = driver() {
        return vec![line("cuda".into(), why)];
    }
    match Device::num_devices() {
        Ok(0) => vec![line("cuda".into(), "the driver has no device; CUDA_VISIBLE_DEVICES may hide one".into())],
        Ok(count) => {
            let one = |i| report(i).unwrap_or_else(|e| line(format!("cuda:{i}"), e.to_string()));
            (0..count).map(one).collect()
        }
        Err(error) => vec![line("cuda".into(), Failure::from(error).told())],
    }
}

#[cfg(test)]
mod tests {
    use super::release_in;

    #[test]
    fn the_drivers_version_is_read_from_what_the_system_says() {
        let closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version:  gcc 11.4.0";
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)";
        assert_eq!(release_in(closed).as_deref(), Some("535.129.03"));
        assert_eq!(release_in(open).as_deref(), Some("580.65.06"));
        assert_eq!(release_in("GCC version: 12.2.0"), None);
    }
}
