#!/usr/bin/env bash
# Builds what the page of `flowtape web` runs: web/pkg/flowtape_web.js and flowtape_web_bg.wasm.
#
#     web/build.sh            the module for one thread
#     web/build.sh threads    that for several, in web/pkg/threads, which a page takes that `flowtape web` serves
#
# It takes a Rust that has the target wasm32-unknown-unknown (`rustup target add wasm32-unknown-unknown`), or else Debian's, which builds
# the standard library itself: apt-get install rustc-web cargo-web rust-web-src lld-22. For threads the standard library is built in any
# case, since none comes with them: with rustup that takes `rustup component add rust-src`.
set -euo pipefail
cd "$(dirname "$0")"
target=wasm32-unknown-unknown
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$(cd .. && pwd)/target}/web
build() {
    cargo build --quiet --release --target $target "$@"
}
features=+simd128 link= pkg=pkg std=
if [ "${1-}" = threads ]; then
    # Workers share a memory that is given to each, and know their own part of it.
    features+=,+atomics,+bulk-memory,+mutable-globals pkg=pkg/threads std=-Zbuild-std=std,panic_abort
    for argument in --shared-memory --import-memory --max-memory=$((1 << 30)) --export=__{wasm_init_tls,tls_size,tls_align,tls_base}; do
        link+=" -C link-arg=$argument"
    done
    export RUSTC_BOOTSTRAP=1
fi
export CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUSTFLAGS="-C target-feature=$features$link"' --cfg getrandom_backend="wasm_js"'
if [ -d "$(rustc --print target-libdir --target $target)" ]; then
    build $std
else
    PATH=/usr/bin:$PATH RUSTC_BOOTSTRAP=1 CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER=wasm-ld-22 build -Zbuild-std=std,panic_abort
fi
cargo run --quiet --package flowtape-web-bindgen -- "$CARGO_TARGET_DIR/$target/release/flowtape_web.wasm" $pkg
ls -l $pkg
