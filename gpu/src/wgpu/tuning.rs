//! Choices that were measured, kept on disk: one JSON file, by adapter with its driver, then by what was chosen for.
//!
//! The file lies in the user's cache folder (`FLOWTAPE_CACHE` names another). It is only ever a saving of time: one that
//! can't be read is begun anew, one that can't be written is done without, and all choices give the same bits.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use etcetera::BaseStrategy;

/// Counts changes of kernels that make old measurements worthless.
const KERNELS: u32 = 1;

/// By adapter, then by what was chosen for.
type Table = BTreeMap<String, BTreeMap<String, String>>;

/// The choices of a device.
#[derive(Debug)]
pub(super) struct Tuning {
    on: bool,
    adapter: String,
    file: Option<PathBuf>,
    choices: Mutex<Option<BTreeMap<String, String>>>,
}

/// The file in the cache folder: `$FLOWTAPE_CACHE`, else `flowtape` in the system's place for such.
pub(super) fn default_file() -> Option<PathBuf> {
    let folder = match std::env::var_os("FLOWTAPE_CACHE") {
        Some(folder) => PathBuf::from(folder),
        None => etcetera::choose_base_strategy().ok()?.cache_dir().join("flowtape"),
    };
    Some(folder.join("wgpu-tuning.json"))
}

/// Whether the environment asks for measurements or forbids them: `FLOWTAPE_TUNE` is `1` or `0`.
pub(super) fn asked() -> Option<bool> {
    match std::env::var("FLOWTAPE_TUNE").ok()?.as_str() {
        "1" | "on" | "true" => Some(true),
        "0" | "off" | "false" => Some(false),
        other => {
            tracing::warn!("FLOWTAPE_TUNE is 1 or 0, not {other:?}: ignored");
            None
        }
    }
}

impl Tuning {
    /// `adapter` says all that a measurement depends on: name, interface, driver.
    pub(super) fn new(on: bool, adapter: &str, file: Option<PathBuf>) -> Self {
        let adapter = format!("{adapter}, kernels {KERNELS}");
        Self { on, adapter, file, choices: Mutex::new(None) }
    }

    pub(super) fn is_on(&self) -> bool {
        self.on
    }

    /// What was chosen for `what`, else what `measure` finds, which is kept.
    pub(super) fn choice(&self, what: &str, measure: impl FnOnce() -> Option<String>) -> Option<String> {
        let mut choices = self.choices.lock().unwrap_or_else(PoisonError::into_inner);
        let choices = choices.get_or_insert_with(|| {
            let mut all = self.file.as_deref().map(load).unwrap_or_default();
            all.remove(&self.adapter).unwrap_or_default()
        });
        if let Some(known) = choices.get(what) {
            return Some(known.clone());
        }
        let found = measure()?;
        tracing::debug!("{what}: {found}");
        choices.insert(what.into(), found.clone());
        if let Some(file) = &self.file
            && let Err(error) = self.save(file, choices)
        {
            tracing::warn!("{}: {error}; measurements are not kept", file.display());
        }
        Some(found)
    }

    /// Adds to what others wrote meanwhile, beside the file, and puts it in its place.
    fn save(&self, file: &Path, choices: &BTreeMap<String, String>) -> std::io::Result<()> {
        let folder = file.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder)?;
        let mut all = load(file);
        all.entry(self.adapter.clone()).or_default().extend(choices.clone());
        let builder = &mut tempfile::Builder::new();
        // The rights of any new file: the umask takes away what it must.
        #[cfg(unix)]
        let builder = builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let mut new = builder.tempfile_in(folder)?;
        serde_json::to_writer_pretty(&mut new, &all)?;
        new.write_all(b"\n")?;
        new.persist(file)?;
        Ok(())
    }
}

/// What a file holds; nothing, with a warning, where it is damaged.
fn load(file: &Path) -> Table {
    match std::fs::read(file) {
        Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
            tracing::warn!("{}: {error}; measurements are made anew", file.display());
            Table::new()
        }),
        Err(error) => {
            if error.kind() != std::io::ErrorKind::NotFound {
                tracing::warn!("{}: {error}; measurements are made anew", file.display());
            }
            Table::new()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(tuning: &Tuning, what: &str, found: &str) -> Option<String> {
        tuning.choice(what, || Some(found.into()))
    }

    #[test]
    fn choices_come_back_for_their_adapter_alone() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a/b.json");
        let tuning = |adapter: &str| Tuning::new(true, adapter, Some(file.clone()));
        let (one, other) = (tuning("one"), tuning("other"));
        assert_eq!(choose(&one, "x", "fast").as_deref(), Some("fast"));
        // What cannot be measured is not kept.
        assert_eq!(one.choice("y", || None), None);
        // Opened before `one` wrote more: nothing of that is lost.
        assert_eq!(choose(&other, "x", "slow").as_deref(), Some("slow"));
        assert_eq!(choose(&one, "z", "wide").as_deref(), Some("wide"));
        for (adapter, what, expected) in [("one", "x", "fast"), ("one", "z", "wide"), ("other", "x", "slow")] {
            assert_eq!(tuning(adapter).choice(what, || panic!("measured again")).as_deref(), Some(expected));
        }
    }

    #[test]
    fn a_damaged_file_is_begun_anew() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("b.json");
        for damage in ["{\"one\": {\"x\"", "[1, 2]", "\u{0}", ""] {
            std::fs::write(&file, damage).unwrap();
            let (found, warnings) = warned(|| choose(&Tuning::new(true, "one", Some(file.clone())), "x", "fast"));
            assert_eq!(found.as_deref(), Some("fast"));
            assert!(warnings.contains("measurements are made anew") && warnings.contains("b.json"), "{warnings}");
            assert_eq!(load(&file).len(), 1);
        }
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_no_error() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        let tuning = Tuning::new(true, "one", Some(file.join("b.json")));
        let (found, warnings) = warned(|| choose(&tuning, "x", "fast"));
        assert_eq!(found.as_deref(), Some("fast"));
        assert!(warnings.contains("not kept"), "{warnings}");
        assert_eq!(tuning.choice("x", || panic!("measured again")).as_deref(), Some("fast"));
    }

    /// What `work` logs.
    fn warned<R>(work: impl FnOnce() -> R) -> (R, String) {
        #[derive(Clone, Default)]
        struct Log(std::sync::Arc<Mutex<Vec<u8>>>);
        impl Write for Log {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0.lock().unwrap().extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let log = Log::default();
        let to = log.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || to.clone()).finish();
        let result = tracing::subscriber::with_default(subscriber, work);
        let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        (result, text)
    }
}
