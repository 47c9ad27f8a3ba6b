//! Writes `capi/include/flowtape.h` anew; with `--check` it only says whether that is needed.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let capi = here.join("..");
    let config = cbindgen::Config::from_file(here.join("cbindgen.toml"))?;
    let mut made = Vec::new();
    let sources = ["lib", "call", "tensor", "trainer"].map(|name| capi.join("src").join(name).with_extension("rs"));
    let builder = sources.iter().fold(cbindgen::Builder::new().with_config(config), |builder, path| builder.with_src(path));
    builder.generate()?.write(&mut made);
    let path = capi.join("include/flowtape.h");
    if std::fs::read(&path).is_ok_and(|written| written == made) {
        return Ok(());
    }
    if std::env::args().any(|argument| argument == "--check") {
        return Err("capi/include/flowtape.h is not that of capi/src: run cargo run --manifest-path capi/header/Cargo.toml".into());
    }
    Ok(std::fs::write(path, made)?)
}
