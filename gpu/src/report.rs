//! What there is to compute on, for people: `flowtape devices`.

/// A device, found or not, and whether it can be used.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
pub struct DeviceReport {
    /// What `--device` calls it, such as `wgpu:0`.
    pub name: String,
    /// What its maker calls it.
    pub title: String,
    /// Properties by name, such as memory, limits and features.
    pub details: Vec<(String, String)>,
    /// Why it can't be used, where it can't.
    pub unusable: Option<String>,
}

impl std::fmt::Display for DeviceReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, title, details, unusable } = self;
        write!(f, "{name:<8} {title}")?;
        for (key, value) in details {
            write!(f, "\n         {key:<16} {value}")?;
        }
        match unusable {
            Some(reason) => write!(f, "\n         not usable       {reason}"),
            None => Ok(()),
        }
    }
}

/// The CPU, then the devices of all backends that are built in.
pub fn reports() -> Vec<DeviceReport> {
    #[cfg_attr(not(any(feature = "cuda", feature = "wgpu")), expect(unused_mut))] // no backend, nothing to add
    let mut all = vec![cpu()];
    #[cfg(feature = "cuda")]
    all.extend(crate::cuda::reports());
    #[cfg(feature = "wgpu")]
    all.extend(crate::wgpu::reports());
    all
}

fn cpu() -> DeviceReport {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let details = vec![("threads".to_owned(), threads.to_string()), ("features".to_owned(), cpu_features().join(" "))];
    DeviceReport { name: "cpu".into(), title: std::env::consts::ARCH.into(), details, unusable: None }
}

#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Vec<&'static str> {
    macro_rules! found {
        ($($name:tt),*) => {
            [$(($name, is_x86_feature_detected!($name))),*]
        };
    }
    let all = found!(
        "sse4.2",
        "avx",
        "avx2",
        "fma",
        "f16c",
        "avx512f",
        "avx512bw",
        "avx512dq",
        "avx512vl",
        "avx512vnni",
        "avx512bf16",
        "avx512fp16"
    );
    all.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_features() -> Vec<&'static str> {
    Vec::new()
}
