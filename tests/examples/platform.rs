//! What each platform must do, as one small program that is built for it (`bench/platforms.sh`):
//!
//!     platform goldens FOLDER…            every golden case, a line each; fails where one does
//!     platform write FILE                 a file of tensors, whose bytes are the same on every machine
//!     platform read FILE                  fails where such a file, from another machine, holds other values
//!     platform sets                       the instruction sets that this machine has, the best last
//!     platform train FOLDER [KEY=VALUE…]  trains the digits into a run folder, a line each step with loss and gradient norm
//!
//! Without the feature `trainer` it can do all but the last.
#![allow(clippy::print_stdout)] // a program for a terminal

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
#[cfg(feature = "trainer")]
use std::sync::atomic::AtomicBool;

use flowtape_engine::safetensors::{SafeTensors, save};
use flowtape_engine::{DType, Device, Philox, Tensor, cpu};
use flowtape_tests::suite;
#[cfg(feature = "trainer")]
use flowtape_trainer::{Recipe, hooks::on_step};

type Any<T> = Result<T, Box<dyn std::error::Error>>;

/// Debian's libc for WASI is older than what the standard library expects of it. That there are no threads is said as newer ones say it.
#[cfg(target_os = "wasi")]
mod missing {
    use std::ffi::c_char;

    const ENOSYS: i32 = 52;
    macro_rules! missing {
        ($($name:ident($($argument:ty),*) = $answer:expr;)*) => {$(
            #[unsafe(no_mangle)]
            extern "C" fn $name($(_: $argument),*) -> i32 {
                $answer
            }
        )*};
    }
    missing! {
        pthread_create(usize, usize, usize, usize) = ENOSYS;
        pthread_join(usize, usize) = ENOSYS;
        pthread_detach(usize) = ENOSYS;
        pthread_attr_init(usize) = 0;
        pthread_attr_destroy(usize) = 0;
        pthread_attr_setstacksize(usize, usize) = 0;
    }

    unsafe extern "C" {
        fn strdup(text: *const c_char) -> *mut c_char;
    }

    /// The path as it is: nobody asks it to write into memory of its own.
    #[unsafe(no_mangle)]
    extern "C" fn realpath(path: *const c_char, _: *mut c_char) -> *mut c_char {
        // SAFETY: the standard library hands over a C string, and frees the copy.
        unsafe { strdup(path) }
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments[..] {
        ["goldens", ref folders @ ..] if !folders.is_empty() => goldens(folders),
        ["write", file] => write(Path::new(file)),
        ["read", file] => read(Path::new(file)),
        #[cfg(feature = "trainer")]
        ["train", folder, ref settings @ ..] => train(folder, settings),
        ["sets"] => {
            println!("{}", cpu::instruction_sets().join(" "));
            Ok(())
        }
        _ => Err("usage: platform goldens FOLDER… | write FILE | read FILE | sets | train FOLDER [KEY=VALUE…]".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("failed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn goldens(folders: &[&str]) -> Any<()> {
    // Where the system names no folder for temporary files.
    if cfg!(target_os = "wasi") {
        tempfile::env::override_temp_dir(Path::new("/tmp"))
            .map_err(|before| format!("temporary files in {before:?}"))?;
    }
    let folders: Vec<&Path> = folders.iter().map(Path::new).collect();
    Ok(suite::report(&folders, |line| println!("{line}"))?)
}

/// Tensors of each dtype, of random numbers that are the same on every machine, bit for bit.
fn tensors() -> Any<Vec<(String, Tensor)>> {
    let (cpu, mut random) = (Device::cpu(), Philox::new(7));
    let bits = random.bits(&[5, 7], &cpu)?;
    let uniform = random.uniform(&[3, 11], &cpu)?;
    let floats = [DType::F32, DType::F64, DType::BF16, DType::F16].map(|dtype| Ok((dtype, uniform.to_dtype(dtype)?)));
    let floats = floats.into_iter().collect::<Any<Vec<_>>>()?;
    let named = floats.into_iter().map(|(dtype, tensor)| (dtype.name().to_owned(), tensor));
    // As many as show what functions one f32 in a hundred comes out otherwise of.
    let normal = random.normal(&[64, 256], &cpu)?;
    Ok(named.chain([("u32".to_owned(), bits), ("normal".to_owned(), normal)]).collect())
}

fn write(file: &Path) -> Any<()> {
    Ok(save(file, &tensors()?, &BTreeMap::from([("format".to_owned(), "pt".to_owned())]))?)
}

fn read(file: &Path) -> Any<()> {
    let read = SafeTensors::open(file)?;
    for (name, tensor) in tensors()? {
        let same = read.get(&name, &Device::cpu(), None)?.to_vec::<f64>()? == tensor.to_vec::<f64>()?;
        if !same {
            return Err(format!("{name} in {} holds other values", file.display()).into());
        }
    }
    Ok(())
}

/// All digits of each number, so that where they are the same the bits are.
#[cfg(feature = "trainer")]
fn train(folder: &str, settings: &[&str]) -> Any<()> {
    // Within the program, so that it needs no other file.
    let recipe = include_bytes!("../../recipes/digits.yaml");
    let mut settings: Vec<String> = settings.iter().map(|setting| (*setting).to_owned()).collect();
    settings.push(format!("run_dir={folder}"));
    let recipe = Recipe::from_yaml(Path::new("digits.yaml"), recipe, &settings)?;
    let told = on_step(|record| {
        println!(
            "step {} loss {:?} norm {:?} seconds {:.3}",
            record.step, record.loss, record.grad_norm, record.step_time
        );
    });
    flowtape_trainer::train::train(&recipe, vec![told], &AtomicBool::new(false))?;
    Ok(())
}
