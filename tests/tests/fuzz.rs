//! Mutated real files of every kind that is read: each gives a value or an error, in time, and in memory that its size bounds.
//!
//! `FLOWTAPE_FUZZ=100000 cargo test --release --test fuzz` mutates each kind so often; a plain run has fewer.
#![allow(clippy::unwrap_used)] // a test

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use flowtape_data::NemoCache;
use flowtape_engine::Philox;
use flowtape_engine::safetensors::Shards;
use flowtape_tests::fuzz::TARGETS;

/// Counts what is allocated.
struct Counting;

static USED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is handed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(USED.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        USED.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that reading may take whatever the file, and for each byte of it.
const BASE: usize = 1 << 20;
const FACTOR: usize = 64;
/// What one file may take on a busy machine.
const LONG: Duration = Duration::from_secs(10);

/// Mutations of each kind of file.
fn count() -> u64 {
    let default = if cfg!(debug_assertions) { 400 } else { 100_000 };
    std::env::var("FLOWTAPE_FUZZ").ok().and_then(|count| count.parse().ok()).unwrap_or(default)
}

/// What numbers, names and brackets may be instead.
const TOKENS: &[&[u8]] = &[
    b"18446744073709551615",
    b"9223372036854775807",
    b"-1",
    b"0",
    b"1e308",
    b"NaN",
    b"null",
    b"true",
    b"[]",
    b"{}",
    b"[",
    b"{",
    b"\"",
    b"'",
    b"&a ",
    b"*a",
    b"<<: ",
    b"\n",
    b"\t",
    b"#",
    b": ",
    b"../",
    b"/etc/hostname",
    b"..",
    b"\0",
    b"\xff\xff\xff\xff",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\0\0\0\x80",
    b"(",
    b"t",
    b"R",
    b"Q",
    b"q\0",
    b"h\0",
    b"ctorch\nFloatStorage\n",
    b"\xef\xbb\xbf",
    b"\xe2\x80\xa8",
    b"\r\n",
];

/// One real file, changed in one to four places.
fn mutated(seed: &[u8], other: &[u8], random: &mut Philox) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    let mut below = |n: usize| (random.next_f64() * n.max(1) as f64) as usize;
    for _ in 0..=below(4) {
        let at = below(bytes.len() + 1);
        let len = [1, 2, 4, 8, 16, 64, 512][below(7)].min(bytes.len() - at);
        match below(9) {
            0 if at < bytes.len() => bytes[at] ^= 1 << below(8),
            1 if at < bytes.len() => bytes[at] = below(256) as u8,
            2 => drop(bytes.drain(at..at + len)),
            3 => {
                let copy = bytes[at..at + len].to_vec();
                let to = below(bytes.len() + 1);
                bytes.splice(to..to, copy);
            }
            4 => {
                let token = TOKENS[below(TOKENS.len())];
                bytes.splice(at..at, token.iter().copied());
            }
            5 => {
                // A token in place of a word or number.
                let word = |byte: &u8| byte.is_ascii_alphanumeric() || b"_.-".contains(byte);
                let start = bytes[..at].iter().rposition(|byte| !word(byte)).map_or(0, |before| before + 1);
                let end = bytes[at..].iter().position(|byte| !word(byte)).map_or(bytes.len(), |end| at + end);
                let token = TOKENS[below(TOKENS.len())];
                bytes.splice(start..end, token.iter().copied());
            }
            6 => bytes.truncate(at),
            7 => {
                let from = below(other.len() + 1);
                let end = other.len().min(from + len.max(1) * 8);
                bytes.splice(at..at + len, other[from..end].iter().copied());
            }
            _ => {
                // The same many times: depth, and repetition.
                let part = bytes[at..at + len.min(8)].repeat(1 + below(200));
                bytes.splice(at..at, part);
            }
        }
    }
    bytes
}

#[test]
fn every_file_gives_a_value_or_an_error() {
    std::panic::set_hook(Box::new(|_| {}));
    let mut wrong = Vec::new();
    for target in TARGETS {
        let seeds = (target.seeds)().unwrap();
        // Tables are made once; and real files are read, but for a recipe whose model is elsewhere.
        let unread = seeds.iter().position(|seed| !(target.read)(seed));
        if target.name != "recipe" {
            assert_eq!(unread, None, "{}: a real file can't be read", target.name);
        }
        let (mut slowest, mut greediest, mut whole) = (Duration::ZERO, 0.0_f64, 0u64);
        for number in 0..count() {
            let mut random = Philox::new(number).fork(7);
            let pick = |random: &mut Philox| &seeds[(random.next_f64() * seeds.len() as f64) as usize];
            let (seed, other) = (pick(&mut random), pick(&mut random));
            let bytes = mutated(seed, other, &mut random);
            let before = USED.load(Relaxed);
            PEAK.store(before, Relaxed);
            let started = Instant::now();
            let read = catch_unwind(AssertUnwindSafe(|| (target.read)(&bytes)));
            let (took, peak) = (started.elapsed(), PEAK.load(Relaxed).saturating_sub(before));
            slowest = slowest.max(took);
            greediest = greediest.max(peak as f64 / (bytes.len() + BASE / FACTOR) as f64);
            let what = match read {
                Err(panic) => {
                    let text = panic.downcast_ref::<String>().cloned();
                    Some(format!("panics: {}", text.unwrap_or_else(|| format!("{:?}", panic.downcast_ref::<&str>()))))
                }
                _ if took > LONG => Some(format!("takes {took:?}")),
                _ if peak > BASE + FACTOR * bytes.len() => Some(format!("takes {peak} bytes")),
                Ok(read) => {
                    whole += u64::from(read);
                    None
                }
            };
            if let Some(what) = what {
                wrong.push(format!(
                    "{} {number} ({} bytes): {what}\n{}",
                    target.name,
                    bytes.len(),
                    bytes[..bytes.len().min(600)].escape_ascii()
                ));
                if wrong.len() > 5 {
                    break;
                }
            }
        }
        println!(
            "{:<16} {} files, {whole} still read; slowest {slowest:?}; {greediest:.1} bytes a byte at most",
            target.name,
            count()
        );
    }
    let _ = std::panic::take_hook();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What lies outside a folder is not read because an index inside says so.
#[test]
fn no_index_leads_out_of_its_folder() {
    let outer = tempfile::tempdir().unwrap();
    let folder = outer.path().join("inner");
    std::fs::create_dir_all(folder.join("64x64")).unwrap();
    let golden = flowtape_tests::goldens();
    let weights = outer.path().join("m.safetensors");
    std::fs::copy(golden.join("lora_flux/adapter_model.safetensors"), &weights).unwrap();
    let mut samples = Vec::new();
    for entry in std::fs::read_dir(golden.join("data/image_cache")).unwrap() {
        let bucket = entry.unwrap().path();
        if bucket.is_dir() {
            samples.extend(std::fs::read_dir(bucket).unwrap().map(|file| file.unwrap().path()));
        }
    }
    let sample = outer.path().join("a.pt");
    std::fs::copy(&samples[0], &sample).unwrap();
    let name = "base_model.model.single_transformer_blocks.0.attn.to_q.lora_A.weight";
    for outside in ["../m.safetensors", weights.to_str().unwrap(), "64x64/../../m.safetensors", "./m.safetensors/.."] {
        let index = serde_json::json!({ "weight_map": { name: outside } });
        std::fs::write(folder.join("m.safetensors.index.json"), index.to_string()).unwrap();
        let error = Shards::open(&folder, "m").unwrap_err().to_string();
        assert!(error.contains("beside it"), "{error}");
    }
    std::fs::write(folder.join("metadata.json"), "{\"shards\": [\"shard.json\"]}").unwrap();
    // The last is beside the root: an absolute path of one name.
    let root = std::path::Path::new("/").read_dir().unwrap().flatten().find(|entry| entry.path().is_file());
    let root = root.map_or("/none".into(), |entry| entry.path().display().to_string());
    for outside in ["../a.pt", sample.to_str().unwrap(), "64x64/../../a.pt", "/etc/hostname", &root] {
        let item = serde_json::json!([{ "cache_file": outside, "bucket_resolution": [64, 64] }]);
        std::fs::write(folder.join("shard.json"), item.to_string()).unwrap();
        let error = NemoCache::open(&folder).unwrap_err().to_string();
        assert!(error.contains("outside"), "{outside}: {error}");
    }
}
