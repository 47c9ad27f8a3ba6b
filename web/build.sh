#!/usr/bin/env bash
# Builds what the page of `flowtape web` runs: web/pkg/flowtape_web.js and flowtape_web_bg.wasm.
#
# It takes a Rust that has the target wasm32-unknown-unknown (`rustup target add wasm32-unknown-unknown`), or else Debian's, which builds
# the standard library itself: apt-get install rustc-web cargo-web rust-web-src lld-22.
set -euo pipefail
cd "$(dirname "$0")"
target=wasm32-unknown-unknown
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$(cd .. && pwd)/target}/web
build() {
    cargo build --quiet --release --target $target "$@"
}
export CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUSTFLAGS='-C target-feature=+simd128 --cfg getrandom_backend="wasm_js"'
if [ -d "$(rustc --print target-libdir --target $target)" ]; then
    build
else
    PATH=/usr/bin:$PATH RUSTC_BOOTSTRAP=1 CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER=wasm-ld-22 build -Zbuild-std=std,panic_abort
fi
cargo run --quiet --package flowtape-web-bindgen -- "$CARGO_TARGET_DIR/$target/release/flowtape_web.wasm" pkg
ls -l pkg
