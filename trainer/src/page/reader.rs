//! A run folder as the page shows it.

use std::path::{Path, PathBuf};

use flowtape_engine::files::exists;
use serde_json::{Map, Value, json};

use super::curves::{Curves, short};
use super::settings::settings;
use super::tail::Tail;
use crate::recipe::schema;
use crate::run::RunFolder;
use crate::runs::Status;
use crate::validation::Validated;
use crate::{Error, Result};

/// The most pictures of one kind that are shown, spread evenly over the run.
const PICTURES: usize = 40;

/// Reads a run folder, and then what is new in it. Everything but the folder may be missing or damaged: it is left out.
#[derive(Clone, Debug)]
pub struct RunReader {
    folder: RunFolder,
    metrics: Tail,
    curves: Curves,
    validations: Tail,
    validated: Vec<Validated>,
    notices: Tail,
    noticed: Vec<Value>,
}

/// A picture of samples in a run folder.
struct Picture {
    step: u64,
    /// What tells several of one step apart; nothing for the first.
    kind: String,
    path: PathBuf,
}

impl RunReader {
    /// Of a run folder.
    ///
    /// # Errors
    /// When it is none: it has neither a recipe nor metrics.
    pub fn open(path: &Path) -> Result<Self> {
        let folder = RunFolder::at(path);
        if !exists(&folder.recipe_path())? && !exists(&folder.metrics_path())? {
            let what =
                "not a run folder (it has neither recipe.yaml nor metrics.jsonl): name one that `flowtape train` made";
            return Err(Error::Run { path: path.into(), what: what.into() });
        }
        let tail = |path| Tail::new(path);
        let (metrics, validations) = (tail(folder.metrics_path()), tail(folder.validation_path()));
        let notices = tail(folder.notices_path());
        let (curves, validated, noticed) = Default::default();
        Ok(Self { folder, metrics, curves, validations, validated, notices, noticed })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Reads what came since the last time.
    pub fn refresh(&mut self) {
        if self.metrics.begins_anew() {
            self.curves = Curves::default();
        }
        self.metrics.each(|record| self.curves.add(&record));
        if self.validations.begins_anew() {
            self.validated.clear();
        }
        self.validations.each(|validated| self.validated.push(validated));
        if self.notices.begins_anew() {
            self.noticed.clear();
        }
        self.notices.each(|notice| self.noticed.push(notice));
    }

    /// What became of the run, by what its folder says.
    pub fn status(&self) -> Status {
        Status::of(&self.folder, self.curves.last_step())
    }

    /// Everything that the page shows of the run, as far as it was read. `source` says where the page finds a picture; one for which
    /// there is no answer is left out.
    pub fn page(&self, status: Status, source: &mut dyn FnMut(&Path) -> Option<String>) -> Value {
        let mut problems = Vec::new();
        let recipe = RunFolder::open(self.path()).map(|(_, recipe)| recipe);
        let recipe = recipe.map_err(|error| problems.push(json!({ "text": error.to_string() }))).ok();
        let resolved = recipe.as_ref().map(crate::Recipe::to_json);
        let (pictures, left_out) = self.pictures();
        let pictures = pictures.iter().filter_map(|Picture { step, kind, path }| {
            source(path).map(|source| json!({ "step": step, "kind": kind, "source": source }))
        });
        let pictures: Vec<Value> = pictures.collect();
        problems.extend(self.noticed.iter().cloned());
        let name = self.path().file_name().unwrap_or(self.path().as_os_str());
        json!({
            "name": name.to_string_lossy(),
            "path": self.path().to_string_lossy(),
            "title": recipe.as_ref().map(|recipe| &recipe.name),
            "status": status,
            "step": self.curves.last_step(),
            "steps": recipe.as_ref().map(|recipe| recipe.step_scheduler.max_steps),
            "curves": self.curves.columns(),
            "validation": self.validation(),
            "pictures": pictures,
            "pictures_left_out": left_out,
            "settings": resolved.map_or(Vec::new(), |recipe| settings(&recipe, schema())),
            "environment": object(&self.folder.environment_path()),
            "figures": object(&self.folder.report_path()),
            "notices": problems,
        })
    }

    /// The path of a picture of samples by its file's name, where there is one: no other file has such a name.
    pub fn picture(&self, name: &str) -> Option<PathBuf> {
        let path = self.path().join("samples").join(Path::new(name).file_name()?);
        picture(path).map(|picture| picture.path).filter(|path| path.is_file())
    }

    /// Columns by name.
    fn validation(&self) -> Value {
        let of = |of: &dyn Fn(&Validated) -> f64| self.validated.iter().map(|v| short(of(v))).collect::<Vec<_>>();
        json!({
            "step": self.validated.iter().map(|v| v.step).collect::<Vec<_>>(),
            "raw": of(&|v| v.raw.loss),
            "ema": of(&|v| v.ema.as_ref().map_or(f64::NAN, |ema| ema.loss)),
            "sigma": self.validated.iter().map(|v| &v.ema.as_ref().unwrap_or(&v.raw).bins).collect::<Vec<_>>(),
        })
    }

    /// Those of the folder by kind and step, and how many more there are.
    fn pictures(&self) -> (Vec<Picture>, usize) {
        let entries = std::fs::read_dir(self.path().join("samples")).into_iter().flatten().flatten();
        let mut all: Vec<Picture> = entries.filter_map(|entry| picture(entry.path())).collect();
        all.sort_by(|a, b| (&a.kind, a.step).cmp(&(&b.kind, b.step)));
        let count = all.len();
        let mut kept = Vec::new();
        while let Some(kind) = all.first().map(|picture| picture.kind.clone()) {
            let rest = all.split_off(all.iter().take_while(|picture| picture.kind == kind).count());
            kept.extend(spread(std::mem::replace(&mut all, rest)));
        }
        let left_out = count - kept.len();
        (kept, left_out)
    }
}

/// By its name, `step_000250_i2v.png`.
fn picture(path: PathBuf) -> Option<Picture> {
    let name = path.file_name()?.to_str()?.strip_prefix("step_")?.strip_suffix(".png")?;
    let digits = name.len() - name.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (step, kind) = (name[..digits].parse().ok()?, name[digits..].trim_start_matches('_').to_owned());
    Some(Picture { step, kind, path })
}

/// The first, the last, and some between.
fn spread(all: Vec<Picture>) -> Vec<Picture> {
    let last = all.len().saturating_sub(1);
    let wanted: Vec<usize> = if all.len() <= PICTURES {
        (0..=last).collect()
    } else {
        (0..PICTURES).map(|i| i * last / (PICTURES - 1)).collect()
    };
    all.into_iter().enumerate().filter(|(place, _)| wanted.binary_search(place).is_ok()).map(|(_, p)| p).collect()
}

/// The object of a file; an empty one where there is none.
fn object(path: &Path) -> Map<String, Value> {
    std::fs::read(path).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
}
