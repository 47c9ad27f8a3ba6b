//! `flowtape web`: a page that trains the digits in a browser, served on loopback or written as one file.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use clap::Args;
use flate2::Compression;
use flate2::write::GzEncoder;
use flowtape_engine::files::write_whole;
use flowtape_trainer::page::{UPLOT, UPLOT_STYLE, filled, policy_hash};

use crate::loopback::{Answer, serve};
use crate::terminal::say;

const HTML: &str = include_str!("../../web/assets/page.html");
const STYLE: &str = include_str!("../../web/assets/page.css");
const SCRIPT: &str = include_str!("../../web/assets/page.js");
const WORKER: &str = include_str!("../../web/assets/worker.js");
/// The files of the folder that `web/build.sh` makes: WebAssembly, and what starts it.
const MODULE: &str = "flowtape_web_bg.wasm";
const GLUE: &str = "flowtape_web.js";
/// The same as this binary holds them, if it was built with them (`FLOWTAPE_WEB`, see `build.rs`).
#[cfg(flowtape_web)]
const BUILT: Option<(&[u8], &str)> = Some((
    include_bytes!(concat!(env!("FLOWTAPE_WEB_FOLDER"), "/flowtape_web_bg.wasm")),
    include_str!(concat!(env!("FLOWTAPE_WEB_FOLDER"), "/flowtape_web.js")),
));
#[cfg(not(flowtape_web))]
const BUILT: Option<(&[u8], &str)> = None;

/// The page that trains in a browser.
#[derive(Args)]
pub struct Web {
    /// The folder that `web/build.sh` made; needed where this binary was built without one.
    #[arg(long, value_name = "FOLDER")]
    module: Option<PathBuf>,
    /// Write the page into this file, which needs no server, and end.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// The port on this machine; a free one by default.
    #[arg(long, default_value_t = 0)]
    port: u16,
}

/// Writes the page, or serves it until it is ended.
pub fn run(args: &Web) -> Result<ExitCode> {
    let page = match (&args.module, BUILT) {
        (Some(folder), _) => {
            let read = |name: &str| {
                let path = folder.join(name);
                std::fs::read(&path).with_context(|| format!("{}: web/build.sh makes it", path.display()))
            };
            page(&read(MODULE)?, &String::from_utf8(read(GLUE)?)?)?
        }
        (None, Some((module, glue))) => page(module, glue)?,
        (None, None) => anyhow::bail!(
            "this binary was built without the page's WebAssembly: run web/build.sh in Flowtape's sources, then name its folder with \
             --module web/pkg (or build with FLOWTAPE_WEB=web/pkg)"
        ),
    };
    if let Some(out) = &args.out {
        write(out, &page)?;
        say!("{}", out.display());
        return Ok(ExitCode::SUCCESS);
    }
    serve(args.port, |path| match path {
        "" => Answer::of("text/html; charset=utf-8", page.clone().into_bytes()),
        _ => Answer::refused(404, "the page is all that there is"),
    })?;
    Ok(ExitCode::SUCCESS)
}

fn write(out: &Path, page: &str) -> Result<()> {
    write_whole(out, |partial| {
        let io = |source| flowtape_engine::Error::Io { path: out.into(), source };
        std::fs::write(partial, page).map_err(io)
    })?;
    Ok(())
}

/// One HTML file with everything in it. Its policy lets no other script run and no request go anywhere.
fn page(module: &[u8], glue: &str) -> Result<String> {
    let mut packed = GzEncoder::new(Vec::new(), Compression::best());
    packed.write_all(module)?;
    let packed = BASE64_STANDARD.encode(packed.finish()?);
    let script = format!("(() => {{\n\"use strict\";\n{UPLOT}\n{SCRIPT}\n}})();");
    let policy = format!(
        "default-src 'none'; script-src '{}' 'wasm-unsafe-eval'; worker-src blob:; style-src 'unsafe-inline'; img-src data:; \
         base-uri 'none'; form-action 'none'",
        policy_hash(&script)
    );
    Ok(filled(
        HTML,
        &[
            ("{{policy}}", &policy),
            ("{{version}}", env!("CARGO_PKG_VERSION")),
            ("{{style}}", &format!("{UPLOT_STYLE}\n{STYLE}")),
            ("{{worker}}", &format!("{glue}\n{WORKER}")),
            ("{{wasm}}", &packed),
            ("{{script}}", &script),
        ],
    ))
}
