//! `flowtape web`: a page that trains the digits in a browser, served on loopback or written as one file.

use std::borrow::Cow;
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
/// A module of the folder that `web/build.sh` makes: WebAssembly, and what starts it.
#[derive(Clone)]
struct Module {
    wasm: Cow<'static, [u8]>,
    glue: Cow<'static, str>,
}

const WASM: &str = "flowtape_web_bg.wasm";
const GLUE: &str = "flowtape_web.js";
/// Where the folder has the module for several threads.
const THREADS: &str = "threads";

/// What this binary holds of the folder in `$folder` (`FLOWTAPE_WEB`, see `build.rs`); empty files stand for none.
macro_rules! built {
    ($folder:literal) => {
        Module {
            wasm: Cow::Borrowed(include_bytes!(concat!(env!("OUT_DIR"), "/web/", $folder, "/flowtape_web_bg.wasm"))),
            glue: Cow::Borrowed(include_str!(concat!(env!("OUT_DIR"), "/web/", $folder, "/flowtape_web.js"))),
        }
    };
}

impl Module {
    /// That of a folder.
    fn read(folder: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = folder.join(name);
            std::fs::read(&path).with_context(|| format!("{}: web/build.sh makes it", path.display()))
        };
        Ok(Self { wasm: read(WASM)?.into(), glue: String::from_utf8(read(GLUE)?)?.into() })
    }

    /// The script of a worker that runs it.
    fn worker(&self) -> String {
        format!("{}\n{WORKER}", self.glue)
    }
}

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
    let (module, threads) = match &args.module {
        Some(folder) => {
            let threads = folder.join(THREADS);
            (Module::read(folder)?, threads.exists().then(|| Module::read(&threads)).transpose()?)
        }
        None => (built!("."), Some(built!("threads")).filter(|threads| !threads.wasm.is_empty())),
    };
    if module.wasm.is_empty() {
        anyhow::bail!(
            "this binary was built without the page's WebAssembly: run web/build.sh in Flowtape's sources, then name its folder with \
             --module web/pkg (or build with FLOWTAPE_WEB=web/pkg)"
        );
    }
    if let Some(out) = &args.out {
        write(out, &page(&module, "file")?)?;
        say!("{}", out.display());
        return Ok(ExitCode::SUCCESS);
    }
    let page = page(&module, if threads.is_some() { "threads" } else { "served" })?;
    serve(args.port, |path| match (path, &threads) {
        ("", _) => Answer::of("text/html; charset=utf-8", page.clone().into_bytes()),
        ("threads.js", Some(threads)) => Answer::of("text/javascript; charset=utf-8", threads.worker().into_bytes()),
        ("threads.wasm", Some(threads)) => Answer::of("application/wasm", threads.wasm.to_vec()),
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

/// One HTML file with everything in it for one thread. Its policy lets no other script run and no request go anywhere, but to its own
/// server for the module for threads. `from` says whether it is a `file`, `served`, or served by one that has such `threads`.
fn page(module: &Module, from: &str) -> Result<String> {
    let mut packed = GzEncoder::new(Vec::new(), Compression::best());
    packed.write_all(&module.wasm)?;
    let packed = BASE64_STANDARD.encode(packed.finish()?);
    let script = format!("(() => {{\n\"use strict\";\n{UPLOT}\n{SCRIPT}\n}})();");
    let policy = format!(
        "default-src 'none'; script-src '{}' 'wasm-unsafe-eval'; worker-src blob:; connect-src {}; style-src 'unsafe-inline'; \
         img-src data:; base-uri 'none'; form-action 'none'",
        policy_hash(&script),
        if from == THREADS { "'self'" } else { "'none'" }
    );
    Ok(filled(
        HTML,
        &[
            ("{{policy}}", &policy),
            ("{{version}}", env!("CARGO_PKG_VERSION")),
            ("{{from}}", from),
            ("{{style}}", &format!("{UPLOT_STYLE}\n{STYLE}")),
            ("{{worker}}", &module.worker()),
            ("{{wasm}}", &packed),
            ("{{script}}", &script),
        ],
    ))
}
