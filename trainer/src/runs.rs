//! The runs that lie in a folder, and what became of each: their folders are the truth.

use std::fs::{File, TryLockError};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use flowtape_engine::files::exists;
use serde::Serialize;

use crate::error::io;
use crate::recipe::text_at;
use crate::run::{LOCK, RunFolder};
use crate::state::Stored;
use crate::train::{WINDOW, mean_of_finite};
use crate::{Result, StepRecord};

/// Bytes of the end of `metrics.jsonl` that are read: more than the lines of [`WINDOW`] steps.
const TAIL: u64 = 128 << 10;

/// What became of a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// A process trains in the folder.
    Training,
    /// All steps are done.
    Finished,
    /// It was asked to stop, with a checkpoint.
    Stopped,
    /// The process ended without having been asked to: it was killed, the machine went down, or a step failed.
    Crashed,
}

/// A run folder at a glance.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Run {
    /// The folder.
    pub path: PathBuf,
    /// What became of it.
    pub status: Status,
    /// Steps that are done, after the last line of `metrics.jsonl`.
    pub step: u64,
    /// Steps of the recipe.
    pub steps: Option<u64>,
    /// The step of the newest checkpoint, with which a run goes on.
    pub checkpoint: Option<u64>,
    /// The mean loss of the last steps.
    pub loss: Option<f64>,
    /// The newest sample grid.
    pub picture: Option<PathBuf>,
}

/// The runs in a folder, by name; that folder alone where it is one. Nothing is written.
///
/// # Errors
/// When the folder can't be read.
pub fn runs(folder: &Path) -> Result<Vec<Run>> {
    if is_run(folder)? {
        return Ok(vec![Run::of(folder)?]);
    }
    let entries = std::fs::read_dir(folder).map_err(io(folder))?;
    let mut paths = entries.map(|entry| Ok(entry.map_err(io(folder))?.path())).collect::<Result<Vec<_>>>()?;
    paths.sort_by_cached_key(|path| natural(path));
    paths.retain(|path| is_run(path).unwrap_or(false));
    paths.iter().map(|path| Run::of(path)).collect()
}

fn is_run(path: &Path) -> Result<bool> {
    Ok(exists(&RunFolder::at(path).recipe_path())?)
}

/// A name with its last number apart, so that `digits-10` comes after `digits-9`.
fn natural(path: &Path) -> (String, u64) {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    (stem.to_owned(), name[stem.len()..].parse().unwrap_or(0))
}

impl Run {
    fn of(path: &Path) -> Result<Self> {
        let folder = RunFolder::at(path);
        let recipe = std::fs::read(folder.recipe_path()).unwrap_or_default();
        let steps = text_at(&recipe, "step_scheduler.max_steps").and_then(|steps| steps.parse().ok());
        let newest = folder.checkpoints().newest().ok();
        let checkpoint = newest.and_then(|path| Stored::read(&path).ok()).map(|stored| stored.progress.step);
        let last = last_records(&folder.metrics_path());
        let step = last.last().map_or(0, |record| record.step).max(checkpoint.unwrap_or(0));
        let status = Status::of(&folder, step);
        let recent = &last[last.len().saturating_sub(WINDOW)..];
        let loss = (!recent.is_empty()).then(|| mean_of_finite(recent.iter().map(|record| record.loss)));
        Ok(Self { path: path.into(), status, step, steps, checkpoint, loss, picture: newest_picture(&folder) })
    }
}

impl Status {
    /// Of a run that has done so many steps.
    pub(crate) fn of(folder: &RunFolder, step: u64) -> Self {
        let done = folder.report().ok().flatten().is_some_and(|report| report.steps >= step);
        match holder(&folder.path().join(LOCK)) {
            Holder::Process => Self::Training,
            _ if done => Self::Finished,
            Holder::Gone => Self::Crashed,
            Holder::None => Self::Stopped,
        }
    }
}

/// Who has a lock.
enum Holder {
    /// A process that is there.
    Process,
    /// One that ended without letting go.
    Gone,
    /// Nobody.
    None,
}

fn holder(path: &Path) -> Holder {
    let Ok(mut file) = File::open(path) else { return Holder::None };
    let mut number = String::new();
    match file.read_to_string(&mut number) {
        // Who lets go takes the number away, so only a lock that names one needs to be tried.
        Ok(_) if number.trim().is_empty() => Holder::None,
        _ if matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)) => Holder::Process,
        _ => Holder::Gone,
    }
}

/// The whole lines at the end of `metrics.jsonl`.
fn last_records(path: &Path) -> Vec<StepRecord> {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        Ok(text)
    };
    let text = read().unwrap_or_default();
    String::from_utf8_lossy(&text).lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn newest_picture(folder: &RunFolder) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder.path().join("samples")).ok()?;
    let pictures = entries.flatten().map(|entry| entry.path());
    pictures.filter(|path| path.extension().is_some_and(|end| end == "png")).max_by_key(|path| step_of(path))
}

/// The step of `step_000500.png`; of one step the whole picture comes last, after its frames side by side.
fn step_of(path: &Path) -> (u64, bool) {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let number = stem.trim_start_matches("step_");
    let digits = number.bytes().take_while(u8::is_ascii_digit).count();
    (number[..digits].parse().unwrap_or(0), digits == number.len())
}
