//! How near generated pictures are to those that were trained on.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use flowtape_data::Buckets;
use flowtape_data::media::PictureItem;
use flowtape_engine::Philox;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::FolderConfig;
use crate::Result;
use crate::generate::Request;
use crate::hooks::{Cause, Event, Hook};
use crate::recipe::ReportConfig;
use crate::train::Session;

/// The seed of the report's samples: another than that of grids.
const REPORT_SEED: u64 = 2;

/// How often the nearest picture in pixels is the caption's own, or of its group; and the same with captions shuffled, which is
/// what chance reaches.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Nearest {
    /// Generated pictures.
    pub samples: usize,
    /// Share whose nearest picture has the caption.
    pub own: f64,
    /// Share whose nearest picture is of the caption's group.
    pub group: f64,
    /// `own` with captions shuffled.
    pub own_shuffled: f64,
    /// `group` with captions shuffled.
    pub group_shuffled: f64,
}

/// Judges the pictures of a finished run: [`Nearest`], under `nearest`.
#[derive(Debug)]
pub struct PictureReport {
    folder: FolderConfig,
    samples_per_class: usize,
}

impl PictureReport {
    /// What a recipe asks for: so many pictures of each caption.
    pub fn new(folder: &FolderConfig, config: &ReportConfig) -> Self {
        Self { folder: folder.clone(), samples_per_class: config.samples_per_class }
    }
}

impl Hook for PictureReport {
    fn on(&mut self, event: &Event<'_>, run: &mut Session<'_>) -> Result<()> {
        if !matches!(event, Event::Stopped(Cause::Finished)) {
            return Ok(());
        }
        run.emit(Event::Busy("sampling for the report"))?;
        let (items, preprocess) = (self.folder.items()?, self.folder.preprocess(1)?);
        let dims = run.trainer().sample_dims()?;
        let mut real = Vec::new();
        let mut kept: Vec<Kept> = Vec::new();
        let buckets = Buckets::new(self.folder.quantization, self.folder.max_pixels)?;
        let mut groups = Groups::default();
        for item in &items {
            let (_, pixels) = preprocess.pixels(item, &buckets)?;
            // Pictures of other sizes than the first can't be compared.
            if pixels.dims() == dims {
                real.push(pixels.to_vec::<f32>()?);
                kept.push(Kept { caption: item.caption.clone(), group: groups.of(item) });
            }
        }
        let asked: Vec<usize> = (0..kept.len()).flat_map(|i| std::iter::repeat_n(i, self.samples_per_class)).collect();
        let prompts: Vec<&str> = asked.iter().map(|i| &*kept[*i].caption).collect();
        let request = Request { prompts: &prompts, first_frames: None, seed: REPORT_SEED };
        let Some(samples) = run.trainer().generate(&request, run.stop())? else { return Ok(()) };
        let size: usize = dims.iter().product();
        let found: Vec<usize> = samples.pixels.chunks_exact(size).map(|sample| nearest(sample, &real)).collect();
        let figures = judge(&asked, &found, &kept);
        run.figures.insert("nearest".into(), serde_json::json!(figures));
        Ok(())
    }
}

/// A picture that samples are compared with.
struct Kept {
    caption: String,
    group: Option<String>,
}

/// The field `group` of the lines of `metadata.jsonl`, by folder and file.
#[derive(Default)]
struct Groups(BTreeMap<PathBuf, BTreeMap<String, String>>);

impl Groups {
    /// The group of a picture, where its metadata state one.
    fn of(&mut self, item: &PictureItem) -> Option<String> {
        let (folder, name) = (item.path.parent()?, item.path.file_name()?.to_str()?);
        let read = |folder: &Path| {
            let text = std::fs::read_to_string(folder.join("metadata.jsonl")).unwrap_or_default();
            let line = |line: &str| {
                let line: Value = serde_json::from_str(line).ok()?;
                Some((line["file_name"].as_str()?.to_owned(), line["group"].as_str()?.to_owned()))
            };
            text.lines().filter_map(line).collect()
        };
        self.0.entry(folder.to_owned()).or_insert_with(|| read(folder)).get(name).cloned()
    }
}

/// The picture with the least squared distance.
fn nearest(sample: &[f32], real: &[Vec<f32>]) -> usize {
    let distance =
        |other: &Vec<f32>| -> f32 { sample.iter().zip(other).map(|(a, b)| (a.clamp(-1.0, 1.0) - b).powi(2)).sum() };
    let distances: Vec<f32> = real.iter().map(distance).collect();
    (0..distances.len()).min_by(|a, b| distances[*a].total_cmp(&distances[*b])).unwrap_or(0)
}

/// The shares of samples whose nearest picture is what was asked for.
fn judge(asked: &[usize], found: &[usize], items: &[Kept]) -> Nearest {
    let share = |asked: &[usize], same: &dyn Fn(&Kept, &Kept) -> bool| {
        let hits = asked.iter().zip(found).filter(|(a, b)| same(&items[**a], &items[**b])).count();
        hits as f64 / found.len().max(1) as f64
    };
    let own = |a: &Kept, b: &Kept| a.caption == b.caption;
    let group = |a: &Kept, b: &Kept| a.group.is_some() && a.group == b.group;
    let mut shuffled = asked.to_vec();
    let mut random = Philox::new(REPORT_SEED);
    for i in (1..shuffled.len()).rev() {
        shuffled.swap(i, (random.next_f64() * (i + 1) as f64) as usize);
    }
    Nearest {
        samples: found.len(),
        own: share(asked, &own),
        group: share(asked, &group),
        own_shuffled: share(&shuffled, &own),
        group_shuffled: share(&shuffled, &group),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_counts_as_own_or_of_the_group_by_its_nearest_picture() {
        let real = vec![vec![0.0, 0.0], vec![1.0, 1.0], vec![-1.0, 0.5]];
        assert_eq!([[0.1, -0.2], [7.0, 0.9], [-0.9, 0.4]].map(|s| nearest(&s, &real)), [0, 1, 2]);
        let item =
            |caption: &str, group: Option<&str>| Kept { caption: caption.into(), group: group.map(str::to_owned) };
        let items = [item("a", Some("x")), item("b", Some("x")), item("c", None)];
        let judged = judge(&[0, 1, 2, 2], &[0, 0, 2, 1], &items);
        assert_eq!((judged.samples, judged.own, judged.group), (4, 0.5, 0.5));
    }
}
