//! `environment.json`.

use std::collections::BTreeMap;

use flowtape_engine::files::write_whole;
use flowtape_engine::platform::{SystemTime, UNIX_EPOCH};
use serde_json::{Value, json};

use crate::Result;
use crate::error::io;
use crate::hooks::{Begin, Event, Hook, Preview};
use crate::train::Session;

/// Writes down with what a run goes on, when it begins: the program, the machine, the data.
#[derive(Clone, Debug)]
pub struct Environment {
    prompts: Vec<String>,
    seed: u64,
}

impl Environment {
    /// With what its sample grids show.
    pub fn new(preview: &Preview) -> Self {
        let mut prompts = preview.prompts.clone();
        prompts.dedup();
        Self { prompts, seed: preview.seed }
    }

    fn told(&self, begin: &Begin, run: &Session<'_>) -> Value {
        let trainer = run.trainer();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let (samples, buckets) = buckets(run);
        json!({
            "flowtape": env!("CARGO_PKG_VERSION"),
            "began": now,
            "from_step": begin.from,
            "device": trainer.recipe().device,
            "device_memory_bytes": trainer.device().backend().capacity(),
            "processor": processor(),
            "threads": rayon::current_num_threads(),
            "system": format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            "model": trainer.model().config()["_class_name"],
            "parameters": begin.parameters,
            "samples": samples,
            "buckets": buckets,
            "prompts": self.prompts,
            "samples_seed": self.seed,
        })
    }
}

/// Samples that are trained on, and how many there are of each size, the most frequent first.
fn buckets(run: &Session<'_>) -> (usize, Vec<Value>) {
    let source = &run.trainer().data().source;
    let mut counts: BTreeMap<Vec<usize>, u64> = BTreeMap::new();
    for header in (0..source.len()).filter_map(|index| source.header(index).ok()) {
        *counts.entry(header.dims).or_default() += 1;
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    (source.len(), counts.into_iter().map(|(dims, samples)| json!({ "dims": dims, "samples": samples })).collect())
}

/// What the processor's maker calls it, where the system tells.
fn processor() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let name = text.lines().find_map(|line| line.strip_prefix("model name"))?;
    Some(name.trim_start_matches([' ', '\t', ':']).to_owned())
}

impl Hook for Environment {
    fn on(&mut self, event: &Event<'_>, run: &mut Session<'_>) -> Result<()> {
        if let Event::Begin(begin) = event {
            let (path, text) = (run.folder().environment_path(), format!("{:#}\n", self.told(begin, run)));
            let written = write_whole(&path, |partial| std::fs::write(partial, text).map_err(io(&path)));
            if let Err(error) = written {
                tracing::warn!("{error}; the run goes on without");
            }
        }
        Ok(())
    }
}
