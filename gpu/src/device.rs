//! Devices by name.

use flowtape_engine::{Device, Error, Result};

/// The device that `--device` and the recipe's key `device` name: `cpu`, `cuda` (the first NVIDIA GPU), `wgpu` (the first
/// usable adapter, GPUs before software), `cuda:1` or `wgpu:1` (the one of that number in [`reports`](crate::reports)).
///
/// # Errors
/// When the name is none of these, or there is no such device.
pub fn device(name: &str) -> Result<Device> {
    let unknown = || Error::argument("device", KNOWN, name);
    let (kind, number) = match name.split_once(':') {
        Some((kind, number)) => (kind, Some(number.parse::<usize>().map_err(|_| unknown())?)),
        None => (name, None),
    };
    match kind {
        "cpu" if number.is_none() => Ok(Device::cpu()),
        #[cfg(feature = "cuda")]
        "cuda" => crate::cuda::Cuda::device(u32::try_from(number.unwrap_or(0)).map_err(|_| unknown())?),
        #[cfg(feature = "wgpu")]
        "wgpu" => crate::wgpu::Wgpu::device(number),
        _ => Err(unknown()),
    }
}

const KNOWN: &str = match (cfg!(feature = "cuda"), cfg!(feature = "wgpu")) {
    (true, true) => "cpu, cuda, cuda:<number>, wgpu or wgpu:<number>; `flowtape devices` lists them",
    (true, false) => "cpu, cuda or cuda:<number>; `flowtape devices` lists them",
    (false, true) => "cpu, wgpu or wgpu:<number>; `flowtape devices` lists them",
    (false, false) => "cpu",
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_name_is_told_the_right_ones() {
        assert!(device("cpu").is_ok_and(|d| d.same(&Device::cpu())));
        for name in ["gpu", "cpu:0", "wgpu:x", ""] {
            assert!(device(name).unwrap_err().to_string().contains("expected cpu"), "{name}");
        }
        #[cfg(feature = "cuda")]
        for name in ["cuda:", "cuda:one", "cuda:-1", "cuda:99999999999"] {
            assert!(device(name).unwrap_err().to_string().contains("cuda:<number>"), "{name}");
        }
        #[cfg(feature = "wgpu")]
        assert!(device("wgpu:999").unwrap_err().to_string().contains("flowtape devices"));
    }
}
