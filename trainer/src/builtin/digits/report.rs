//! What is shown and told of a run on digits, still or moving.

use flowtape_data::Result as DataResult;
use flowtape_engine::Philox;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{CAPTIONS, Digits, FirstFrame, Quality, judge, judge_first_frames, judge_videos};
use crate::builtin::moving_digits::VideoSize;
use crate::generate::{Request, Samples};
use crate::hooks::{Cause, Event, Hook, Preview};
use crate::recipe::ReportConfig;
use crate::train::Session;
use crate::{Recipe, Result};

/// Seeds of grids and report: the same in every run, so that pictures can be compared.
const GRID_SEED: u64 = 1;
const REPORT_SEED: u64 = 2;

/// Columns of a grid: samples of one class.
const COLUMNS: usize = 10;
/// The same for videos, which are larger.
const VIDEO_COLUMNS: usize = 4;

/// Each class `n` times.
fn by_class(n: usize) -> Vec<u8> {
    (0..10).flat_map(|class| std::iter::repeat_n(class, n)).collect()
}

fn prompts(classes: &[u8]) -> Vec<&'static str> {
    classes.iter().map(|class| CAPTIONS[usize::from(*class)]).collect()
}

/// First frames of videos of these classes, one after the other.
fn first_frames(digits: &Digits, video: &VideoSize, classes: &[u8], seed: u64) -> Vec<f32> {
    let mut random = Philox::new(seed);
    let mut frames = Vec::new();
    for class in classes {
        let of_class: Vec<usize> = (0..digits.labels.len()).filter(|i| digits.labels[*i] == *class).collect();
        let index = of_class[(random.next_f64() * of_class.len() as f64) as usize];
        frames.extend_from_slice(&video.animate(digits.image(index), &mut random)[..video.frame()]);
    }
    frames
}

/// Grids with a row a class.
///
/// # Errors
/// When the embedded digits are damaged.
pub fn preview(recipe: &Recipe) -> DataResult<Preview> {
    let columns = if recipe.data.video.is_some() { VIDEO_COLUMNS } else { COLUMNS };
    let classes = by_class(columns);
    let first_frames = match recipe.data.video.filter(|_| recipe.sampling.image_to_video) {
        Some(video) => Some(first_frames(&Digits::load()?, &video, &classes, GRID_SEED)),
        None => None,
    };
    Ok(Preview {
        every: recipe.sampling.every_steps,
        prompts: prompts(&classes).into_iter().map(str::to_owned).collect(),
        columns,
        first_frames,
        seed: GRID_SEED,
        pipeline: None,
        opened: None,
    })
}

/// Figures of videos that go on from a given first frame.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct ImageToVideo {
    /// Of all frames.
    #[serde(flatten)]
    pub quality: Quality,
    /// Of the first one.
    pub first_frame: FirstFrame,
}

/// Judges the samples of a finished run: the fields of [`Quality`]; `before`, those of the checkpoint that it started from; and
/// `image_to_video` ([`ImageToVideo`]) where the recipe asks for it.
#[derive(Debug)]
pub struct DigitsReport {
    digits: Digits,
    video: Option<VideoSize>,
    image_to_video: bool,
    classes: Vec<u8>,
}

impl DigitsReport {
    /// What a recipe asks for.
    ///
    /// # Errors
    /// When the embedded digits are damaged.
    pub fn new(recipe: &Recipe, config: &ReportConfig) -> DataResult<Self> {
        let (video, image_to_video) = (recipe.data.video, recipe.sampling.image_to_video);
        Ok(Self { digits: Digits::load()?, video, image_to_video, classes: by_class(config.samples_per_class) })
    }

    fn samples(&self, run: &Session<'_>, first_frames: Option<&[f32]>) -> Result<Option<Samples>> {
        let request = Request { prompts: &prompts(&self.classes), first_frames, seed: REPORT_SEED };
        run.trainer().generate(&request, run.stop())
    }

    fn judge(&self, samples: &[f32]) -> Quality {
        match &self.video {
            Some(size) => judge_videos(samples, size, &self.classes, &self.digits),
            None => judge(samples, &self.classes, &self.digits),
        }
    }
}

impl Hook for DigitsReport {
    fn on(&mut self, event: &Event<'_>, run: &mut Session<'_>) -> Result<()> {
        if !matches!(event, Event::Stopped(Cause::Finished)) {
            return Ok(());
        }
        run.emit(Event::Busy("sampling for the report"))?;
        let Some(samples) = self.samples(run, None)? else { return Ok(()) };
        run.figures.extend(fields(&self.judge(&samples.pixels)));
        let request = Request { prompts: &prompts(&self.classes), first_frames: None, seed: REPORT_SEED };
        if run.is_first()
            && let Some(before) = run.trainer().generate_from_start(&request, run.stop())?
        {
            run.figures.insert("before".into(), serde_json::json!(self.judge(&before.pixels)));
        }
        if let Some(size) = self.video.filter(|_| self.image_to_video) {
            let given = first_frames(&self.digits, &size, &self.classes, REPORT_SEED);
            let Some(samples) = self.samples(run, Some(&given))? else { return Ok(()) };
            let first_frame = judge_first_frames(&samples.pixels, &given, &size);
            let found = ImageToVideo { quality: self.judge(&samples.pixels), first_frame };
            run.figures.insert("image_to_video".into(), serde_json::json!(found));
        }
        Ok(())
    }
}

/// The fields of a struct, by name.
fn fields(figures: &impl Serialize) -> Map<String, Value> {
    match serde_json::json!(figures) {
        Value::Object(fields) => fields,
        other => Map::from_iter([("figures".to_owned(), other)]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_first_frame_is_a_digit_of_its_class() {
        let (digits, video) = (Digits::load().unwrap(), VideoSize { frames: 2, height: 12, width: 12, stride: 1 });
        let frames = first_frames(&digits, &video, &[3, 8], 5);
        for (frame, class) in frames.chunks_exact(video.frame()).zip([3, 8]) {
            let real = |crop: Vec<f32>| (0..digits.labels.len()).find(|i| digits.image(*i) == crop);
            let found = video.crops(frame).find_map(|c| real(c.pixels())).unwrap();
            assert_eq!(digits.labels[found], class);
        }
    }
}
