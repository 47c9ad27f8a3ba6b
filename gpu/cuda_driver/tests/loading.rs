//! With no driver, with a fake one, and with functions of this process in its place. What answers is decided once in a
//! process, so each case is a process of its own: this test binary, started again.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

use std::ffi::{c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;

use cust::error::CudaError;
use cust_raw::CUresult;
use flowtape_cuda_driver::{driver, last_unlisted_error, provide, symbol};

/// The fake driver as `libcuda.so.1` in `folder`.
fn build_fake(folder: &Path) -> PathBuf {
    let (source, library) = (concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake_cuda.c"), folder.join("libcuda.so.1"));
    let mut cc = Command::new("cc");
    let built = cc.args(["-shared", "-fPIC", "-Wall", "-Werror", "-o"]).arg(&library).arg(source).status().unwrap();
    assert!(built.success());
    library
}

/// Runs one of the ignored tests below in a new process.
fn run(case: &str, environment: &[(&str, &str)]) {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", case, "--nocapture"]).env("FLOWTAPE_DRIVER_CASE", case);
    child.envs(environment.iter().copied());
    let output = child.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{case}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Whether this process was started for `case`.
fn is_child(case: &str) -> bool {
    std::env::var("FLOWTAPE_DRIVER_CASE").is_ok_and(|c| c == case)
}

#[test]
fn each_source_of_functions_in_a_process_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let fake = build_fake(folder.path());
    let empty = tempfile::tempdir().unwrap();
    let path = |p: &Path| p.to_str().unwrap().to_owned();
    run("without_a_driver", &[("FLOWTAPE_LIBCUDA", &path(&empty.path().join("libcuda.so.1")))]);
    run("with_a_fake_driver", &[("LD_LIBRARY_PATH", &path(folder.path()))]);
    run("with_a_fake_driver", &[("FLOWTAPE_LIBCUDA", &path(&fake))]);
    run("with_no_device", &[("FLOWTAPE_LIBCUDA", &path(&fake)), ("FAKE_CUDA_INIT", "100")]);
    run("with_functions_of_this_process", &[]);
}

#[test]
fn without_a_driver() {
    if !is_child("without_a_driver") {
        return;
    }
    assert!(driver().unwrap_err().contains("libcuda.so.1 can't be loaded"), "{:?}", driver());
    assert_eq!(cust::init(cust::CudaFlags::empty()), Err(CudaError::NoDevice));
    assert_eq!(cust::device::Device::num_devices(), Err(CudaError::NoDevice));
    // cust panics when an error has no text.
    assert!(CudaError::NoDevice.to_string().contains("no NVIDIA driver"));
    assert!(symbol("cuInit").is_none());
    // SAFETY: no function is given.
    assert!(!unsafe { provide(|_| std::ptr::null_mut()) }, "it is too late");
}

#[test]
fn with_a_fake_driver() {
    if !is_child("with_a_fake_driver") {
        return;
    }
    assert_eq!(driver(), Ok(()));
    assert_eq!(cust::init(cust::CudaFlags::empty()), Ok(()));
    let version = cust::CudaApiVersion::get().unwrap();
    assert_eq!((version.major(), version.minor()), (13, 0));
    let device = cust::device::Device::get_device(0).unwrap();
    assert_eq!((device.name(), device.total_memory()), (Ok("Fake GPU 0".into()), Ok(80 << 30)));
    assert_eq!(cust::device::Device::get_device(1), Err(CudaError::InvalidDevice));
    // A code that CUDA 11.4 does not know is no value of the enumeration: its number is kept beside it.
    assert_eq!(last_unlisted_error(), 0);
    let context = cust::context::Context::new(device);
    assert_eq!((context.err(), last_unlisted_error()), (Some(CudaError::UnknownError), 46));
    // SAFETY: the function does not exist: nothing is read.
    let code = unsafe { cust::sys::cuMemPoolTrimTo(std::ptr::null_mut(), 0) };
    assert_eq!(code, CUresult::CUDA_ERROR_NOT_FOUND);
    assert!(CudaError::UnknownError.to_string().contains("no text"));
    let newer = symbol("cuFakeAdd").unwrap();
    // SAFETY: the fake driver's function has this signature.
    let add = unsafe { std::mem::transmute::<*mut c_void, extern "C" fn(c_int, c_int) -> c_int>(newer) };
    assert_eq!(add(40, 2), 42);
    assert!(symbol("cuNoSuchFunction").is_none());
}

#[test]
fn with_no_device() {
    if !is_child("with_no_device") {
        return;
    }
    assert_eq!(driver(), Ok(()));
    assert_eq!(cust::init(cust::CudaFlags::empty()), Err(CudaError::NoDevice));
}

#[test]
fn with_functions_of_this_process() {
    if !is_child("with_functions_of_this_process") {
        return;
    }
    unsafe extern "C" fn version(out: *mut c_int) -> c_int {
        // SAFETY: as the driver's function: `out` is writable.
        unsafe { *out = 12_040 };
        0
    }
    fn table(name: &str) -> *mut c_void {
        if name == "cuDriverGetVersion" { version as *mut c_void } else { std::ptr::null_mut() }
    }
    // SAFETY: the one function has the signature of its name.
    assert!(unsafe { provide(table) });
    assert_eq!(cust::CudaApiVersion::get().map(|v| (v.major(), v.minor())), Ok((12, 4)));
    assert_eq!(cust::device::Device::num_devices(), Err(CudaError::NotFound));
}
