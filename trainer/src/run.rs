//! The run folder.
//!
//! | file | content |
//! |---|---|
//! | `recipe.yaml` | the resolved recipe |
//! | `metrics.jsonl` | a line a step |
//! | `samples/step_*.png` | sample grids; videos as animated PNGs, and their frames side by side in `step_*_frames.png` |
//! | `validation.jsonl` | a line a validation |
//! | `loss.svg` | the loss curve |
//! | `replay/step_*/` | steps that were not finite, `_rank*` on another rank than the first: [`replay`](crate::replay) |
//! | `checkpoints/` | the newest checkpoints: [`Checkpoints`] |
//! | `environment.json` | with what it runs: the program, the machine, the data |
//! | `notices.jsonl` | warnings, a line each |
//! | `tensorboard/` | event files, one a process |
//! | `report.json` | the figures of the end |
//! | `report.html` | all of this as a page: [`page`](crate::page) |
//! | `.lock` | held by the process that writes here, and its number, which stays after a crash |

use std::fs::{File, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flowtape_engine::comm::Comm;
use flowtape_engine::files::{exists, write_whole};
use serde::de::DeserializeOwned;

use crate::checkpoints::{Checkpoints, Unfinished, remove};
use crate::error::io;
use crate::platform::process;
use crate::ranks::{is_first, shared_path};
use crate::record::StepRecord;
use crate::train::Summary;
use crate::trainer::Trainer;
use crate::{Error, Recipe, Result};

pub(crate) const LOCK: &str = ".lock";

/// A run folder that exists.
#[derive(Clone, Debug)]
pub struct RunFolder {
    path: PathBuf,
    /// Held as long as there is a clone.
    lock: Option<Arc<File>>,
}

impl RunFolder {
    /// A folder for a new run, locked and with the resolved recipe in it: `run_dir`, or the first free
    /// `runs/<name>-<number>`. A run that never got as far as a checkpoint is begun again.
    ///
    /// # Errors
    /// When [`RunFolder::check_free`] refuses `run_dir`, another process has it, or it can't be written.
    pub fn create(recipe: &Recipe) -> Result<Self> {
        let path = match &recipe.run_dir {
            Some(path) => {
                Self::check_free(path)?;
                std::fs::create_dir_all(path).map_err(io(path))?;
                path.clone()
            }
            None => numbered(&recipe.name)?,
        };
        let mut run = Self { path, lock: None };
        run.lock()?;
        // Another process may have been here until the folder was locked.
        Self::check_free(&run.path)?;
        let lines = [run.metrics_path(), run.validation_path(), run.notices_path()];
        let others = [run.report_path(), run.curve_path(), run.environment_path(), run.page_path()];
        for by_product in lines.into_iter().chain(others) {
            match std::fs::remove_file(&by_product) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(io(by_product)(e)),
                _ => {}
            }
        }
        remove(&run.tensorboard_path())?;
        run.write_recipe(recipe)?;
        run.make_samples_folder()?;
        Ok(run)
    }

    /// The same on several ranks: the first makes it, and the others know where it is.
    pub(crate) fn create_on_ranks(comm: &dyn Comm, recipe: &Recipe) -> Result<Self> {
        let own = if is_first(comm) { Some(Self::create(recipe)?) } else { None };
        let path = shared_path(comm, own.as_ref().map_or(Path::new(""), |run| &run.path))?;
        Ok(own.unwrap_or_else(|| Self::at(&path)))
    }

    /// Whether a new run may have the folder: it is not there, empty, or of a run without a checkpoint. Writes nothing.
    ///
    /// # Errors
    /// When it holds a run that can be resumed, or something else.
    pub fn check_free(path: &Path) -> Result<()> {
        let run = Self::at(path);
        if !exists(path)? {
            return Ok(());
        }
        if run.checkpoints().any()? {
            let what = format!(
                "holds a run already: resume it with `flowtape train --resume {}`, or choose another run_dir",
                quoted(path)
            );
            return run.error(what);
        }
        if exists(&run.recipe_path())? {
            return Ok(());
        }
        for entry in std::fs::read_dir(path).map_err(io(path))? {
            let name = entry.map_err(io(path))?.file_name();
            // All that a run may leave that was ended before its recipe was written.
            if name != LOCK && name != "recipe.yaml.partial" {
                let what = format!(
                    "is no run folder, and not empty (it holds {}): choose another run_dir",
                    Path::new(&name).display()
                );
                return run.error(what);
            }
        }
        Ok(())
    }

    /// A folder that may be one, to look at.
    pub(crate) fn at(path: &Path) -> Self {
        Self { path: path.into(), lock: None }
    }

    /// An existing folder and its recipe. It may be read while a run writes there.
    ///
    /// # Errors
    /// When it is not a run folder.
    pub fn open(path: &Path) -> Result<(Self, Recipe)> {
        Self::open_with(path, &[])
    }

    /// The same with overrides `a.b=value` of the recipe.
    ///
    /// # Errors
    /// When it is not a run folder, or an override does not fit.
    pub fn open_with(path: &Path, overrides: &[String]) -> Result<(Self, Recipe)> {
        let run = Self::at(path);
        if !exists(&run.recipe_path())? {
            return run.error("not a run folder (it has no recipe.yaml): name one that `flowtape train` made".into());
        }
        let recipe = Recipe::load(&run.recipe_path(), overrides)?;
        Ok((run, recipe))
    }

    /// Keeps other processes from writing here until all clones of this are gone; nothing happens where it is locked by this
    /// one. The system gives the lock back when a process ends, however it ends.
    ///
    /// # Errors
    /// When another process has it.
    pub fn lock(&mut self) -> Result<()> {
        if self.lock.is_some() {
            return Ok(());
        }
        let path = self.path.join(LOCK);
        let opened = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = opened.map_err(io(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let process = match file.read_to_string(&mut holder) {
                    Ok(_) if !holder.trim().is_empty() => format!("process {}", holder.trim()),
                    _ => "another process".into(),
                };
                return self
                    .error(format!("{process} trains in this folder: wait for its end, or choose another folder"));
            }
            Err(TryLockError::Error(e)) if e.kind() == ErrorKind::Unsupported => {
                tracing::warn!(
                    "{}: this file system has no locks: see to it that one process trains here",
                    path.display()
                );
            }
            Err(TryLockError::Error(e)) => return Err(io(path)(e)),
        }
        // The number is for people; on a full disk the lock holds without it.
        let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", process()));
        self.lock = Some(Arc::new(file));
        Ok(())
    }

    /// Takes this process's number out of the lock: the run ended as it should, and did not crash.
    pub(crate) fn leave(&self) {
        // What is left there makes a run look crashed, which is told and no more.
        let _ = self.lock.as_ref().map(|file| file.set_len(0));
    }

    fn error<T>(&self, what: String) -> Result<T> {
        Err(Error::Run { path: self.path.clone(), what })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn recipe_path(&self) -> PathBuf {
        self.path.join("recipe.yaml")
    }

    /// Writes the resolved recipe in place of the one that is there.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn write_recipe(&self, recipe: &Recipe) -> Result<()> {
        write_text(&self.recipe_path(), &recipe.to_yaml())
    }

    /// A picture of a step's samples; `kind` tells several of one step apart.
    pub fn samples_path(&self, step: u64, kind: &str) -> PathBuf {
        self.path.join("samples").join(format!("step_{step:06}{kind}.png"))
    }

    /// The folder of pictures of samples; made anew where it is gone.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn make_samples_folder(&self) -> Result<()> {
        let path = self.path.join("samples");
        std::fs::create_dir_all(&path).map_err(io(path))
    }

    /// The bundle of a step that was not finite, on a rank.
    pub fn replay_path(&self, step: u64, rank: u64) -> PathBuf {
        let rank = if rank == 0 { String::new() } else { format!("_rank{rank}") };
        self.path.join("replay").join(format!("step_{step:06}{rank}"))
    }

    /// The loss curve.
    pub fn curve_path(&self) -> PathBuf {
        self.path.join("loss.svg")
    }

    /// The report.
    pub fn report_path(&self) -> PathBuf {
        self.path.join("report.json")
    }

    /// What the run came to, where it is done.
    ///
    /// # Errors
    /// When the report is not one.
    pub fn report(&self) -> Result<Option<Summary>> {
        let path = self.report_path();
        let Ok(text) = std::fs::read(&path) else { return Ok(None) };
        let found = serde_json::from_slice(&text);
        found.map(Some).map_err(|e| Error::Run { path, what: format!("not a report: {e}; remove it to make another") })
    }
    /// Writes the report.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn write_report(&self, summary: &Summary) -> Result<()> {
        write_text(&self.report_path(), &format!("{:#}\n", serde_json::json!(summary)))
    }

    /// A line for each step.
    pub fn metrics_path(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    /// With what it runs.
    pub fn environment_path(&self) -> PathBuf {
        self.path.join("environment.json")
    }

    /// A line for each warning.
    pub fn notices_path(&self) -> PathBuf {
        self.path.join("notices.jsonl")
    }

    /// The folder of event files.
    pub fn tensorboard_path(&self) -> PathBuf {
        self.path.join("tensorboard")
    }

    /// The page.
    pub fn page_path(&self) -> PathBuf {
        self.path.join("report.html")
    }

    /// A line for each validation.
    pub fn validation_path(&self) -> PathBuf {
        self.path.join("validation.jsonl")
    }

    /// What the steps up to `step` came to, as far as it is there to be read: it is a by-product.
    pub fn history(&self, step: u64) -> Vec<StepRecord> {
        let lines = if step == 0 { Vec::new() } else { lines(&self.metrics_path(), |r: &StepRecord| r.step <= step) };
        lines.into_iter().map(|(record, _)| record).collect()
    }

    /// A file of lines for a run that goes on after `step` steps, with the lines of before that `keep` keeps: what an interrupted
    /// run wrote after its last checkpoint is cut off.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn begin_lines<T: DeserializeOwned>(&self, path: &Path, step: u64, keep: impl Fn(&T) -> bool) -> Result<File> {
        let kept = if step == 0 { Vec::new() } else { lines(path, keep) };
        let text: String = kept.iter().map(|(_, line)| format!("{line}\n")).collect();
        write_text(path, &text)?;
        File::options().append(true).open(path).map_err(io(path))
    }

    /// The checkpoints.
    pub fn checkpoints(&self) -> Checkpoints {
        Checkpoints::of(&self.path)
    }

    /// Writes the files of a checkpoint of where the trainer stands: it is one when it is finished.
    ///
    /// # Errors
    /// When they can't be written; the other checkpoints stay then.
    pub fn begin_save(&self, trainer: &Trainer) -> Result<Unfinished> {
        self.checkpoints().begin(trainer.state().progress.step, |folder| trainer.snapshot(folder))
    }
}

/// The first free `runs/<name>-<number>`, made.
fn numbered(name: &str) -> Result<PathBuf> {
    let runs = Path::new("runs");
    std::fs::create_dir_all(runs).map_err(io(runs))?;
    let mut number = 1u64;
    loop {
        let path = runs.join(format!("{name}-{number}"));
        match std::fs::create_dir(&path) {
            // Another process may be looking for a number, too: whoever makes the folder has it.
            Err(e) if e.kind() == ErrorKind::AlreadyExists => number += 1,
            made => return made.map(|()| path.clone()).map_err(io(path)),
        }
    }
}

/// A path as a shell takes it.
pub fn quoted(path: &Path) -> String {
    let text = path.to_string_lossy();
    shlex::try_quote(&text).map_or_else(|_| text.clone().into_owned(), |quoted| quoted.into_owned())
}

/// Readable lines that `keep` keeps, with their texts.
fn lines<T: DeserializeOwned>(path: &Path, keep: impl Fn(&T) -> bool) -> Vec<(T, String)> {
    let text = std::fs::read(path).unwrap_or_else(|error| {
        tracing::warn!("{}: {error}; it begins anew", path.display());
        Vec::new()
    });
    let text = String::from_utf8_lossy(&text);
    // The last line may be cut short; it is past the checkpoint then.
    let lines = text.lines().filter_map(|line| Some((serde_json::from_str::<T>(line).ok()?, line.into())));
    lines.filter(|(line, _)| keep(line)).collect()
}

fn write_text(path: &Path, text: &str) -> Result<()> {
    write_whole(path, |partial| std::fs::write(partial, text).map_err(io(path)))
}
