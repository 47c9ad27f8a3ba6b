//! Where `FLOWTAPE_WEB` names the folder that `web/build.sh` makes, the binary holds it, and `flowtape web` needs nothing else.

use std::path::PathBuf;

fn main() {
    println!("cargo::rustc-check-cfg=cfg(flowtape_web)");
    println!("cargo::rerun-if-env-changed=FLOWTAPE_WEB");
    let Some(folder) = std::env::var_os("FLOWTAPE_WEB").filter(|folder| !folder.is_empty()) else { return };
    // Cargo runs this in the crate's folder, its caller most often in the workspace's.
    let folder = PathBuf::from(folder);
    let found =
        [folder.clone(), PathBuf::from("..").join(&folder)].into_iter().find_map(|path| path.canonicalize().ok());
    let Some(folder) = found else {
        println!("cargo::error=FLOWTAPE_WEB: there is no folder {}; web/build.sh makes web/pkg", folder.display());
        return;
    };
    println!("cargo::rerun-if-changed={}", folder.display());
    println!("cargo::rustc-env=FLOWTAPE_WEB_FOLDER={}", folder.display());
    println!("cargo::rustc-cfg=flowtape_web");
}
