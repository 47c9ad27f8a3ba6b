//! What the project may depend on: registries, licences, and no ML framework.

use std::process::Command;

use serde_json::Value;

const LICENSES: [&str; 10] = [
    "MIT",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-3-Clause",
    "BSD-2-Clause",
    "ISC",
    "Zlib",
    "Unicode-3.0",
    // Both give a work to the public.
    "CC0-1.0",
    "Unlicense",
];
/// The engine is ours, also in tests.
const FRAMEWORKS: [&str; 8] = ["candle-core", "burn", "tch", "ort", "dfdx", "tract-core", "torch-sys", "luminal"];

#[test]
fn dependencies_come_from_the_registry_under_free_licences_and_are_no_framework() {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml");
    let arguments = ["metadata", "--format-version", "1", "--locked", "--manifest-path", manifest];
    let output = Command::new(env!("CARGO")).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 20);
    for package in packages {
        let text = |key: &str| package[key].as_str().unwrap_or_default();
        let (name, license, source) = (text("name"), text("license"), text("source"));
        // One of the alternatives must do; old manifests write them with a slash.
        let free = license.replace('/', " OR ").replace(['(', ')'], "");
        let one = |part: &str| part.split(" AND ").all(|l| LICENSES.contains(&l.trim()));
        assert!(free.split(" OR ").any(one), "{name} has the licence {license:?}");
        assert!(source.is_empty() || source.starts_with("registry+"), "{name} comes from {source}");
        assert!(!FRAMEWORKS.contains(&name), "{name} is an ML framework");
    }
}
