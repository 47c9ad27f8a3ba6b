//! Makes `flowtape_web.js` and `flowtape_web_bg.wasm` of what the compiler made: the arguments are its file and the folder to write to.

use std::process::ExitCode;

use wasm_bindgen_cli_support::Bindgen;

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
    let [_, module, folder] = &std::env::args().collect::<Vec<_>>()[..] else {
        return Err("expected a module and the folder to write to".into());
    };
    // A script for a worker that stands in a page, which has no modules.
    Bindgen::new().input_path(module).no_modules(true)?.typescript(false).generate(folder)?;
    Ok(())
}
