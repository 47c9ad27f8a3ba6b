//! Reading keeps up, and a large index stays small: `flowtape bench data` measures both at full size.
#![allow(clippy::unwrap_used)] // a test

use std::time::Duration;

use flowtape_benches::{Work, data};
use flowtape_engine::Device;

#[test]
fn a_large_index_opens_at_once_and_takes_little_memory() {
    let folder = tempfile::tempdir().unwrap();
    let index = data::index(folder.path(), 200_000).unwrap();
    println!("{index:?}");
    // A fifth of a million samples, in a process that does nothing else.
    assert!(index.s_open < 2.0 && index.peak_rss_mb < 200, "{index:?}");
}

#[test]
fn reading_is_hidden_behind_the_steps() {
    let work = Work { batch: 4, ..Work::s() };
    let loading = data::loading(&work, &Device::cpu(), Duration::from_millis(5), 7).unwrap();
    println!("{loading:?}");
    // On a busy machine steps differ by more than reading takes: at least it must not add up.
    let reading = loading.s_sample * loading.batch as f64;
    assert!(loading.s_step_slow < loading.s_step + 0.9 * reading, "{loading:?}");
    assert!(loading.s_step_waiting > reading, "{loading:?}");
}
