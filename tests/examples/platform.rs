//! What each platform must do, as one small program that is built for it (`bench/platforms.sh`):
//!
//!     platform goldens FOLDER…            every golden case, a line each; fails where one does
//!     platform write FILE                 a file of tensors, whose bytes are the same on every machine
//!     platform read FILE                  fails where such a file, from another machine, holds other values
//!     platform steps FILE [KEY=VALUE…]    trains the digits, a line each step with loss and gradient norm; the weights go to the file
//!     platform sets                       the instruction sets that this machine has, the best last
#![allow(clippy::print_stdout)] // a program for a terminal

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use flowtape_engine::safetensors::{SafeTensors, save};
use flowtape_engine::{DType, Device, Philox, Tensor, cpu};
use flowtape_tests::suite;
use flowtape_trainer::{Recipe, Trainer};

type Any<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments[..] {
        ["goldens", ref folders @ ..] if !folders.is_empty() => goldens(folders),
        ["write", file] => write(Path::new(file)),
        ["read", file] => read(Path::new(file)),
        ["steps", file, ref settings @ ..] => steps(Path::new(file), settings),
        ["sets"] => {
            println!("{}", cpu::instruction_sets().join(" "));
            Ok(())
        }
        _ => Err("usage: platform goldens FOLDER… | write FILE | read FILE | steps FILE [KEY=VALUE…] | sets".into()),
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

/// Tensors of each dtype, of random bits that are the same on every machine.
fn tensors() -> Any<Vec<(String, Tensor)>> {
    let (cpu, mut random) = (Device::cpu(), Philox::new(7));
    let bits = random.bits(&[5, 7], &cpu)?;
    let uniform = random.uniform(&[3, 11], &cpu)?;
    let floats = [DType::F32, DType::F64, DType::BF16, DType::F16].map(|dtype| Ok((dtype, uniform.to_dtype(dtype)?)));
    let floats = floats.into_iter().collect::<Any<Vec<_>>>()?;
    let named = floats.into_iter().map(|(dtype, tensor)| (dtype.name().to_owned(), tensor));
    Ok(named.chain([("u32".to_owned(), bits)]).collect())
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
fn steps(file: &Path, settings: &[&str]) -> Any<()> {
    // Within the program, so that it needs no other file.
    let recipe = include_bytes!("../../recipes/digits.yaml");
    let settings: Vec<String> = settings.iter().map(|setting| (*setting).to_owned()).collect();
    let mut trainer = Trainer::new(&Recipe::from_yaml(Path::new("digits.yaml"), recipe, &settings)?)?;
    for _ in 0..trainer.recipe().step_scheduler.max_steps {
        let record = trainer.step()?;
        println!(
            "step {} loss {:?} norm {:?} seconds {:.3}",
            record.step, record.loss, record.grad_norm, record.step_time
        );
    }
    Ok(std::fs::write(file, trainer.weights_to_bytes()?)?)
}
