//! The page of runs: one HTML file with everything in it, for `flowtape report` and `flowtape watch`.
//!
//! | file | what it holds |
//! |---|---|
//! | `reader` | [`RunReader`]: a run folder, and what is new in it |
//! | `tail`, `curves` | lines that came since; curves of any number of steps in bounded memory |
//! | `settings` | the recipe beside its defaults |
//! | `assets/` | the page's HTML, CSS and JavaScript, and uPlot (MIT), which draws the curves |
//!
//! Whatever a run's files hold is data: it stands in the page as JSON without `<`, and the page's script puts it into the document as
//! text. The page's policy lets no other script run and no request go anywhere.

mod curves;
mod reader;
mod settings;
mod tail;

use std::path::Path;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use flowtape_engine::files::write_whole;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

pub use reader::RunReader;

use crate::Result;
use crate::error::io;
use crate::runs::Status;

const HTML: &str = include_str!("assets/page.html");
const STYLES: [&str; 2] = [UPLOT_STYLE, include_str!("assets/page.css")];
const SCRIPTS: [&str; 5] = [
    include_str!("assets/dom.js"),
    include_str!("assets/charts.js"),
    include_str!("assets/samples.js"),
    include_str!("assets/tables.js"),
    include_str!("assets/page.js"),
];
/// uPlot (MIT), which draws curves: the script, with its licence as its authors ask, and the style.
pub const UPLOT: &str =
    concat!("/* uPlot:\n", include_str!("assets/uPlot.LICENSE"), "*/\n", include_str!("assets/uPlot.iife.min.js"));
/// Its style.
pub const UPLOT_STYLE: &str = include_str!("assets/uPlot.min.css");
/// Bytes of pictures that a page holds at most, for all runs together.
const PICTURE_BYTES: usize = 32 << 20;

/// What a page's policy calls a script that it lets run.
pub fn policy_hash(script: &str) -> String {
    format!("sha256-{}", BASE64_STANDARD.encode(Sha256::digest(script.as_bytes())))
}

/// What [`RunReader::page`] says of runs, with names that tell them apart.
pub fn named(mut runs: Vec<Value>) -> Vec<Value> {
    let names: Vec<Value> = runs.iter().map(|run| run["name"].clone()).collect();
    for run in &mut runs {
        if names.iter().filter(|name| **name == run["name"]).count() > 1 {
            run["name"] = run["path"].clone();
        }
    }
    runs
}

/// The page of what [`RunReader::page`] says of each run. A live one asks for `data.json` beside it again and again.
pub fn html(runs: &[Value], live: bool) -> String {
    let script = format!("(() => {{\n\"use strict\";\n{UPLOT}\n{}\n}})();", SCRIPTS.join("\n"));
    let hash = policy_hash(&script);
    let connect = if live { "; connect-src 'self'" } else { "" };
    let pictures = if live { "'self' data:" } else { "data:" };
    let policy = format!(
        "default-src 'none'; img-src {pictures}; style-src 'unsafe-inline'; script-src '{hash}'; base-uri 'none'; \
         form-action 'none'{connect}"
    );
    let names: Vec<String> = runs.iter().map(|run| run["name"].as_str().unwrap_or_default().to_owned()).collect();
    let title = escaped(&format!("{} · Flowtape", names.join(", ")));
    let data = data(runs, live);
    let parts = [
        ("{{policy}}", &*policy),
        ("{{title}}", &title),
        ("{{style}}", &STYLES.join("\n")),
        ("{{data}}", &data),
        ("{{script}}", &script),
    ];
    filled(HTML, &parts)
}

/// What the page is given, as JSON that may stand in a document: no `<` in it ends an element.
pub fn data(runs: &[Value], live: bool) -> String {
    let all = json!({ "version": env!("CARGO_PKG_VERSION"), "live": live, "runs": runs });
    all.to_string().replace('<', "\\u003c")
}

/// A text with its places filled in one pass, so that what comes in is not looked at again.
pub fn filled(text: &str, parts: &[(&str, &str)]) -> String {
    let mut out = String::with_capacity(text.len() + parts.iter().map(|(_, part)| part.len()).sum::<usize>());
    let mut rest = text;
    while let Some(at) = rest.find("{{") {
        let (before, from) = rest.split_at(at);
        out.push_str(before);
        match parts.iter().find(|(name, _)| from.starts_with(name)) {
            Some((name, part)) => {
                out.push_str(part);
                rest = &from[name.len()..];
            }
            None => {
                out.push_str("{{");
                rest = &from[2..];
            }
        }
    }
    out + rest
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Writes the page of runs as they stand into one file, with their pictures in it.
///
/// # Errors
/// When the file can't be written.
pub fn write(runs: &mut [RunReader], out: &Path) -> Result<()> {
    runs.iter_mut().for_each(RunReader::refresh);
    let known: Vec<Status> = runs.iter().map(RunReader::status).collect();
    write_as(&runs.iter().zip(known).collect::<Vec<_>>(), out)
}

/// The same of one run, whose status is known better than its folder says.
pub(crate) fn write_one(run: &mut RunReader, status: Status, out: &Path) -> Result<()> {
    run.refresh();
    write_as(&[(run, status)], out)
}

fn write_as(runs: &[(&RunReader, Status)], out: &Path) -> Result<()> {
    let mut left = PICTURE_BYTES;
    let mut embed = |path: &Path| {
        let bytes = std::fs::read(path).ok().filter(|bytes| bytes.len() <= left)?;
        left -= bytes.len();
        Some(format!("data:image/png;base64,{}", BASE64_STANDARD.encode(bytes)))
    };
    let pages: Vec<Value> = runs.iter().map(|(run, status)| run.page(*status, &mut embed)).collect();
    let html = html(&named(pages), false);
    write_whole(out, |partial| std::fs::write(partial, html).map_err(io(out)))
}
