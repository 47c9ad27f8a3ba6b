//! The checkpoints of a run.
//!
//! ```text
//! checkpoints/
//!   step_000500/    config.json, diffusion_pytorch_model.safetensors: as diffusers' from_pretrained opens them
//!                   optimizer.safetensors, state.json: what training goes on with
//!                   manifest.json: size and SHA-256 of each of these files, written last
//!   step_001000/    of ranks that each write their own: diffusion_pytorch_model-00001-of-00004.safetensors and so on with
//!                   diffusion_pytorch_model.safetensors.index.json, as diffusers writes what is large, and optimizer-* likewise
//!   BEST            a link to the one of the least validation loss, where the run validates
//!   LATEST          a link to the newest one (where there are no links, a file with its name)
//! ```
//!
//! One is written under another name and renamed when it is whole and on the disk, so a run may be killed at any moment. What
//! was cut short or altered all the same is told by its hashes, and the one before it is taken.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::{Path, PathBuf};

use flowtape_engine::files::write_whole;
use flowtape_engine::safetensors::Snapshot;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::io;
use crate::{Error, Result};

const LATEST: &str = "LATEST";
const BEST: &str = "BEST";
const MANIFEST: &str = "manifest.json";
/// What a name ends in as long as it is not whole.
const PARTIAL: &str = ".partial";

/// How checkpoints are kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// How many are kept, beside the best one: should the newest be damaged, there is the one before.
    #[schemars(range(min = 1))]
    pub max_recent_checkpoints: usize,
    /// Where ranks share out the parameters (`fsdp`): which checkpoints the first rank gathers and writes (NeMo's key). In the others each
    /// rank writes what it has, into one folder, which all must reach: nothing is sent, and no rank has to hold all. Both are opened by
    /// diffusers, and gone on from by any number of ranks.
    pub save_consolidated: Consolidated,
}

/// Which checkpoints the first rank writes alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Consolidated {
    /// All.
    #[default]
    True,
    /// All.
    Every,
    /// That of the last step.
    Final,
    /// None.
    False,
}

impl Consolidated {
    /// Whether one is, of the last step or another.
    pub(crate) fn holds(self, last: bool) -> bool {
        match self {
            Self::True | Self::Every => true,
            Self::Final => last,
            Self::False => false,
        }
    }
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { max_recent_checkpoints: 2, save_consolidated: Consolidated::default() }
    }
}

/// The folder of a run's checkpoints.
#[derive(Clone, PartialEq, Debug)]
pub struct Checkpoints(PathBuf);

impl Checkpoints {
    /// Those of a run folder; there may be none yet.
    pub fn of(run: &Path) -> Self {
        Self(run.join("checkpoints"))
    }

    /// The folder of a step's checkpoint, whether there is one or not.
    pub fn path(&self, step: u64) -> PathBuf {
        self.0.join(format!("step_{step:06}"))
    }

    /// The folder of a step's checkpoint before it is whole.
    pub(crate) fn begun(&self, step: u64) -> PathBuf {
        partial(&self.path(step))
    }

    /// The newest one: that of `LATEST` where there is such, else that of the last step. Its content is not looked at.
    ///
    /// # Errors
    /// When there is none, or the folder can't be read.
    pub fn newest(&self) -> Result<PathBuf> {
        self.candidates()?.into_iter().next().ok_or_else(|| self.error("there is no checkpoint yet".into()))
    }

    /// The newest one that is whole and unaltered by its hashes. Those that are not are named in warnings.
    ///
    /// # Errors
    /// When there is none, or the folder can't be read.
    pub fn newest_whole(&self) -> Result<PathBuf> {
        let mut refused = None;
        for path in self.candidates()? {
            match Manifest::check(&path) {
                Ok(()) => return Ok(path),
                Err(error) => {
                    tracing::warn!("{error}; the checkpoint before it is taken");
                    refused.get_or_insert(error);
                }
            }
        }
        Err(refused.unwrap_or_else(|| self.error("there is no checkpoint yet".into())))
    }

    /// Whether something was ever saved here, whole or not.
    ///
    /// # Errors
    /// When the folder can't be read.
    pub fn any(&self) -> Result<bool> {
        Ok(!self.candidates()?.is_empty())
    }

    /// Has `write` write the checkpoint of a step into an empty folder, and puts that in its place when it is whole and on the
    /// disk. Then all but the newest `keep` are removed (at least one stays).
    ///
    /// # Errors
    /// Those of `write` and of the file system; the other checkpoints stay then.
    pub fn save(&self, step: u64, keep: usize, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        self.begin(step, |folder| write(folder).map(|()| Snapshot::default()))?.finish(keep, false)
    }

    /// The first half of [`Checkpoints::save`]: the files are written, or copies of what goes into them are taken, but nothing is hashed
    /// or on the disk for certain. So training may go on while another thread finishes.
    ///
    /// # Errors
    /// Those of `write` and of the file system.
    pub fn begin(&self, step: u64, write: impl FnOnce(&Path) -> Result<Snapshot>) -> Result<Unfinished> {
        self.make_folder()?;
        let partial = self.begun(step);
        remove(&partial)?;
        std::fs::create_dir(&partial).map_err(io(&partial))?;
        let snapshot = write(&partial)?;
        Ok(Unfinished { checkpoints: self.clone(), step, snapshot })
    }

    /// Marks the checkpoint of a step as the best one: it is kept until another one is.
    ///
    /// # Errors
    /// When the folder can't be written.
    pub fn mark_best(&self, step: u64) -> Result<()> {
        self.link(BEST, &self.path(step))
    }

    /// The best one, where one was marked.
    ///
    /// # Errors
    /// When the folder can't be read.
    pub fn best(&self) -> Result<Option<PathBuf>> {
        self.linked(BEST)
    }

    fn make_folder(&self) -> Result<()> {
        let link = self.0.symlink_metadata().is_ok_and(|found| found.is_symlink());
        if link && !self.0.is_dir() {
            return Err(self.error("a link that leads to no folder: make that folder, or take the link away".into()));
        }
        std::fs::create_dir_all(&self.0).map_err(io(&self.0))
    }

    /// Checkpoints in the order in which they are to be tried.
    fn candidates(&self) -> Result<Vec<PathBuf>> {
        let mut steps = self.steps()?;
        steps.sort_unstable_by_key(|step| std::cmp::Reverse(*step));
        let all = |steps: Vec<u64>| steps.into_iter().map(|step| self.path(step));
        let Some(latest) = self.linked(LATEST)? else { return Ok(all(steps).collect()) };
        // Later ones than LATEST are not what is asked for.
        let at = step_of(&latest).unwrap_or(u64::MAX);
        steps.retain(|step| *step < at);
        Ok([latest].into_iter().chain(all(steps)).collect())
    }

    /// Steps of which there are folders.
    fn steps(&self) -> Result<Vec<u64>> {
        let entries = match std::fs::read_dir(&self.0) {
            Err(e) if e.kind() == ErrorKind::NotFound && self.0.symlink_metadata().is_err() => return Ok(Vec::new()),
            found => found.map_err(io(&self.0))?,
        };
        let paths = entries.map(|entry| Ok(entry.map_err(io(&self.0))?.path())).collect::<Result<Vec<_>>>()?;
        Ok(paths.iter().filter_map(|path| step_of(path)).collect())
    }

    /// What a link names.
    fn linked(&self, name: &str) -> Result<Option<PathBuf>> {
        let path = self.0.join(name);
        match std::fs::read_link(&path) {
            Ok(target) => return Ok(Some(self.0.join(target))),
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            // No link: a file.
            Err(_) => {}
        }
        let name = std::fs::read_to_string(&path).map_err(io(&path))?;
        Ok(Some(self.0.join(name.trim_end())))
    }

    fn link(&self, link: &str, path: &Path) -> Result<()> {
        let (link, name) = (self.0.join(link), path.file_name().unwrap_or_default());
        #[cfg(unix)]
        {
            let new = partial(&link);
            remove(&new)?;
            std::os::unix::fs::symlink(name, &new).map_err(io(&new))?;
            std::fs::rename(&new, &link).map_err(io(&link))?;
            sync(&self.0)
        }
        #[cfg(not(unix))]
        write_whole(&link, |partial| std::fs::write(partial, name.as_encoded_bytes()).map_err(io(&link)))
    }

    /// Removes what was begun and not ended, and checkpoints but for the newest.
    fn clean(&self, keep: usize) -> Result<()> {
        let mut steps = self.steps()?;
        steps.sort_unstable();
        steps.truncate(steps.len().saturating_sub(keep.max(1)));
        let stay = [self.linked(LATEST)?, self.linked(BEST)?];
        for path in
            steps.into_iter().map(|step| self.path(step)).filter(|path| !stay.iter().flatten().any(|p| p == path))
        {
            // A folder that is half removed must not look whole.
            let going = partial(&path);
            remove(&going)?;
            std::fs::rename(&path, &going).map_err(io(&path))?;
        }
        for entry in std::fs::read_dir(&self.0).map_err(io(&self.0))? {
            let path = entry.map_err(io(&self.0))?.path();
            if path.to_string_lossy().ends_with(PARTIAL) {
                remove(&path)?;
            }
        }
        Ok(())
    }

    fn error(&self, what: String) -> Error {
        Error::Run { path: self.0.clone(), what }
    }
}

/// A checkpoint that is not yet one which a run goes on from.
#[derive(Debug)]
#[must_use]
pub struct Unfinished {
    checkpoints: Checkpoints,
    step: u64,
    /// What of it is still to be written.
    snapshot: Snapshot,
}

impl Unfinished {
    /// Writes what is left to be written, hashes the files, brings them to the disk and puts them in their place; `best` marks them as the best ones so far. Then all but
    /// the newest `keep` checkpoints are removed.
    ///
    /// # Errors
    /// Those of the file system; the other checkpoints stay then.
    pub fn finish(self, keep: usize, best: bool) -> Result<()> {
        let Self { checkpoints, step, snapshot } = self;
        snapshot.write()?;
        let (path, partial) = (checkpoints.path(step), partial(&checkpoints.path(step)));
        Manifest::write(&partial)?;
        // There is one of this step already where a run went on from an earlier one.
        remove(&path)?;
        std::fs::rename(&partial, &path).map_err(io(&path))?;
        sync(&checkpoints.0)?;
        checkpoints.link(LATEST, &path)?;
        if best {
            checkpoints.mark_best(step)?;
        }
        checkpoints.clean(keep)
    }
}

/// The step of a checkpoint's folder, by its name.
fn step_of(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix("step_")?.parse().ok()
}

/// The name of what is not whole yet.
pub(crate) fn partial(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(PARTIAL);
    name.into()
}

/// Takes away a file, a folder or a link, if it is there.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let removed = match path.symlink_metadata() {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Ok(found) if found.is_dir() => std::fs::remove_dir_all(path),
        _ => std::fs::remove_file(path),
    };
    removed.map_err(io(path))
}

/// Brings a folder's names to the disk, where folders can be opened.
pub(crate) fn sync(folder: &Path) -> Result<()> {
    if cfg!(unix) { File::open(folder).and_then(|f| f.sync_all()).map_err(io(folder)) } else { Ok(()) }
}

/// What a checkpoint's files must be.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    files: BTreeMap<String, Content>,
}

/// What a file must be.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct Content {
    bytes: u64,
    /// In hexadecimal digits, as `sha256sum` prints it.
    pub(crate) sha256: String,
}

impl Manifest {
    /// Brings all files of a folder to the disk, and then the manifest that names them.
    fn write(folder: &Path) -> Result<()> {
        let mut files = BTreeMap::new();
        let mut folders = vec![(folder.to_owned(), String::new())];
        while let Some((path, prefix)) = folders.pop() {
            for entry in std::fs::read_dir(&path).map_err(io(&path))? {
                let path = entry.map_err(io(&path))?.path();
                let name = format!("{prefix}{}", path.file_name().unwrap_or_default().to_string_lossy());
                if path.is_dir() {
                    folders.push((path, format!("{name}/")));
                } else {
                    File::open(&path).and_then(|f| f.sync_all()).map_err(io(&path))?;
                    files.insert(name, Content::of(&path)?);
                }
            }
            sync(&path)?;
        }
        let (path, text) = (folder.join(MANIFEST), format!("{:#}\n", serde_json::json!(Self { files })));
        write_whole(&path, |partial| std::fs::write(partial, text).map_err(io(&path)))?;
        sync(folder)
    }

    /// Whether all files are there and unaltered.
    fn check(folder: &Path) -> Result<()> {
        let wrong = |name: &str, what: &str| Err(Error::Run { path: folder.join(name), what: what.into() });
        let text = match std::fs::read(folder.join(MANIFEST)) {
            Err(e) if e.kind() == ErrorKind::NotFound => {
                return wrong(MANIFEST, "missing: the checkpoint was cut short, or is not one");
            }
            text => text.map_err(io(folder.join(MANIFEST)))?,
        };
        let Ok(Self { files }) = serde_json::from_slice(&text) else { return wrong(MANIFEST, "damaged") };
        for (name, expected) in files {
            let path = folder.join(&name);
            // Sizes first: what was cut short is found without reading it.
            let bytes = match path.metadata() {
                Err(e) if e.kind() == ErrorKind::NotFound => return wrong(&name, "missing"),
                found => found.map_err(io(&path))?.len(),
            };
            if bytes != expected.bytes {
                return wrong(
                    &name,
                    &format!("it is {bytes} bytes long instead of the {} it was saved with", expected.bytes),
                );
            }
            if Content::of(&path)? != expected {
                return wrong(&name, "altered since it was saved, by its SHA-256");
            }
        }
        Ok(())
    }
}

impl Content {
    pub(crate) fn of(path: &Path) -> Result<Self> {
        let mut reader = BufReader::with_capacity(1 << 20, File::open(path).map_err(io(path))?);
        let (mut hash, mut bytes) = (Sha256::new(), 0);
        loop {
            let part = reader.fill_buf().map_err(io(path))?;
            if part.is_empty() {
                break;
            }
            hash.update(part);
            let read = part.len();
            bytes += read as u64;
            reader.consume(read);
        }
        let sha256 = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { bytes, sha256 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A checkpoint of a file in a folder of its own, and one beside that.
    fn save(checkpoints: &Checkpoints, step: u64, keep: usize) {
        let write = |folder: &Path| {
            std::fs::create_dir(folder.join("ema")).unwrap();
            std::fs::write(folder.join("ema/weights"), format!("mean {step}")).unwrap();
            std::fs::write(folder.join("weights"), format!("step {step}")).map_err(io(folder))
        };
        checkpoints.save(step, keep, write).unwrap();
    }

    #[test]
    fn the_newest_whole_one_is_found_whatever_happened_to_others() {
        type Damage = fn(&Path);
        let damages: [(Damage, &str); 6] = [
            (|at| std::fs::write(at.join("weights"), "step 9").unwrap(), "SHA-256"),
            (|at| std::fs::write(at.join("weights"), "step").unwrap(), "instead of the 6"),
            (|at| std::fs::remove_file(at.join("ema/weights")).unwrap(), "missing"),
            (|at| std::fs::remove_file(at.join(MANIFEST)).unwrap(), "cut short"),
            (|at| std::fs::write(at.join(MANIFEST), "{").unwrap(), "damaged"),
            (|at| std::fs::remove_dir_all(at).unwrap(), "cut short"),
        ];
        for (damage, what) in damages {
            let folder = tempfile::tempdir().unwrap();
            let checkpoints = Checkpoints::of(folder.path());
            assert!(!checkpoints.any().unwrap());
            assert!(checkpoints.newest().unwrap_err().to_string().contains("no checkpoint yet"));
            save(&checkpoints, 2, 2);
            save(&checkpoints, 4, 2);
            assert_eq!(checkpoints.newest_whole().unwrap(), checkpoints.path(4));
            damage(&checkpoints.path(4));
            assert!(Manifest::check(&checkpoints.path(4)).unwrap_err().to_string().contains(what));
            assert_eq!(checkpoints.newest_whole().unwrap(), checkpoints.path(2));
            // It is written again from there.
            save(&checkpoints, 4, 2);
            assert_eq!(checkpoints.newest_whole().unwrap(), checkpoints.path(4));
            damage(&checkpoints.path(2));
            damage(&checkpoints.path(4));
            assert!(checkpoints.newest_whole().unwrap_err().to_string().contains(what));
        }
    }

    #[test]
    fn so_many_are_kept_and_nothing_half_written_stays() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::of(folder.path());
        save(&checkpoints, 1, 3);
        let broken = checkpoints.save(2, 3, |folder| Err(Error::Run { path: folder.into(), what: "full".into() }));
        assert!(broken.is_err() && checkpoints.newest_whole().unwrap() == checkpoints.path(1));
        (3..8).for_each(|step| save(&checkpoints, step, 3));
        let mut names: Vec<_> = std::fs::read_dir(folder.path().join("checkpoints")).unwrap().collect();
        names.sort_by_key(|entry| entry.as_ref().unwrap().file_name());
        let names: Vec<_> = names.into_iter().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        assert_eq!(names, ["LATEST", "step_000005", "step_000006", "step_000007"]);
        let text = std::fs::read_to_string(folder.path().join("checkpoints/LATEST/weights")).unwrap();
        assert_eq!(text, "step 7");
        checkpoints.mark_best(6).unwrap();
        (8..11).for_each(|step| save(&checkpoints, step, 1));
        assert_eq!(checkpoints.best().unwrap(), Some(checkpoints.path(6)));
        assert!(checkpoints.path(6).join("weights").exists() && !checkpoints.path(9).exists());
        // The values that the standard's authors give for "abc".
        let path = folder.path().join("abc");
        std::fs::write(&path, "abc").unwrap();
        let sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad".into();
        assert_eq!(Content::of(&path).unwrap(), Content { bytes: 3, sha256 });
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_and_stay() {
        use std::os::unix::fs::symlink;
        let folder = tempfile::tempdir().unwrap();
        let [run, elsewhere] = ["run", "elsewhere"].map(|name| folder.path().join(name));
        [&run, &elsewhere].into_iter().for_each(|path| std::fs::create_dir(path).unwrap());
        let (checkpoints, link) = (Checkpoints::of(&run), run.join("checkpoints"));
        symlink(&elsewhere, &link).unwrap();
        save(&checkpoints, 2, 2);
        save(&checkpoints, 4, 2);
        assert!(link.is_symlink() && elsewhere.join("step_000004/weights").exists());
        assert_eq!(checkpoints.newest_whole().unwrap(), link.join("step_000004"));
        // A person chooses an earlier one.
        std::fs::remove_file(elsewhere.join(LATEST)).unwrap();
        symlink("step_000002", elsewhere.join(LATEST)).unwrap();
        assert_eq!(checkpoints.newest_whole().unwrap(), link.join("step_000002"));
        // A link that leads nowhere is no empty folder.
        std::fs::rename(&elsewhere, folder.path().join("moved")).unwrap();
        assert!(checkpoints.any().is_err() && checkpoints.newest().is_err());
        let error = checkpoints.save(6, 2, |_| Ok(())).unwrap_err().to_string();
        assert!(error.contains("leads to no folder") && link.is_symlink(), "{error}");
    }
}
