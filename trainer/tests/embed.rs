//! The example of a program that trains by itself runs as it stands.
#![allow(clippy::unwrap_used)] // a test

#[path = "../examples/embed.rs"]
mod embed;

#[test]
fn the_example_trains_and_draws() {
    embed::main().unwrap();
}
