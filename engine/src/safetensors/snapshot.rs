//! Copies of tensors on the host, to be written while the tensors themselves change.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::save_sharded;
use crate::{Device, Error, Result, Tensor};

/// Files of tensors on their way to the disk. Leaving a GPU takes little time, writing takes long: so a snapshot is taken where
/// training waits, and written by a thread beside it.
#[derive(Debug, Default)]
#[must_use]
pub struct Snapshot(Vec<Files>);

/// What [`save_sharded`] is given.
#[derive(Debug)]
struct Files {
    folder: PathBuf,
    stem: String,
    tensors: Vec<(String, Tensor)>,
    text: BTreeMap<String, String>,
    max_bytes: u64,
}

impl Snapshot {
    /// Takes copies of tensors for the files of [`save_sharded`]. Where they are on the host already, or it has no room for copies,
    /// they are written at once: a copy would take as long, or can't be had.
    ///
    /// # Errors
    /// When a device fails, or what is written at once can't be.
    pub fn add(
        &mut self,
        folder: &Path,
        stem: &str,
        tensors: Vec<(String, Tensor)>,
        text: BTreeMap<String, String>,
        max_bytes: u64,
    ) -> Result<()> {
        let copy = |(name, tensor): &(String, Tensor)| Ok((name.clone(), tensor.to_device(&Device::cpu())?));
        let copies = if tensors.iter().all(|(_, tensor)| tensor.device().backend().is_host()) {
            None
        } else {
            match tensors.iter().map(copy).collect::<Result<Vec<_>>>() {
                Err(Error::OutOfMemory { .. }) => None,
                copies => Some(copies?),
            }
        };
        match copies {
            Some(tensors) => self.0.push(Files { folder: folder.into(), stem: stem.into(), tensors, text, max_bytes }),
            None => save_sharded(folder, stem, &tensors, &text, max_bytes)?,
        }
        Ok(())
    }

    /// Writes the files.
    ///
    /// # Errors
    /// When a folder can't be written.
    pub fn write(self) -> Result<()> {
        // Each is given back before the next one is written.
        self.0.into_iter().try_for_each(|files| {
            let Files { folder, stem, tensors, text, max_bytes } = files;
            save_sharded(&folder, &stem, &tensors, &text, max_bytes)
        })
    }
}
