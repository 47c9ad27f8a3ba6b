//! Where `FLOWTAPE_WEB` names the folder that `web/build.sh` makes, the binary holds it, and `flowtape web` needs nothing else.

use std::path::PathBuf;

/// What the binary holds of it: the page's module for one thread, and that for several. Files that are not there are empty.
const FILES: [&str; 4] =
    ["flowtape_web.js", "flowtape_web_bg.wasm", "threads/flowtape_web.js", "threads/flowtape_web_bg.wasm"];

fn main() -> std::io::Result<()> {
    println!("cargo::rerun-if-env-changed=FLOWTAPE_WEB");
    let folder = std::env::var_os("FLOWTAPE_WEB").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    // Cargo runs this in the crate's folder, its caller most often in the workspace's.
    let found = folder.as_ref().and_then(|folder| {
        [folder.clone(), PathBuf::from("..").join(folder)].into_iter().find_map(|path| path.canonicalize().ok())
    });
    match (&folder, &found) {
        (Some(folder), None) => {
            println!("cargo::error=FLOWTAPE_WEB: there is no folder {}; web/build.sh makes web/pkg", folder.display());
        }
        (_, Some(found)) => println!("cargo::rerun-if-changed={}", found.display()),
        (None, None) => {}
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default()).join("web");
    std::fs::create_dir_all(out.join("threads"))?;
    for file in FILES {
        let held = found.as_ref().and_then(|found| std::fs::read(found.join(file)).ok());
        std::fs::write(out.join(file), held.unwrap_or_default())?;
    }
    Ok(())
}
