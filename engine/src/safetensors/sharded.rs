//! Tensors that are spread over several files, with an index that says where each is.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{SafeTensors, format_error, save};
use crate::files::{exists, mistaken_for, write_whole};
use crate::{DType, Device, Error, Result, Tensor, printable};

/// What programs put before every key of a model: torch.compile, data parallel wrappers, the original files of published
/// models, and diffusers' pipelines.
const PREFIXES: [&str; 4] = ["_orig_mod.", "module.", WHOLE, "transformer."];
/// What stands before the transformer's keys in a file that also holds its autoencoder and text encoders.
const WHOLE: &str = "model.diffusion_model.";

/// The index, as transformers and diffusers write it.
#[derive(Debug, Serialize, Deserialize)]
struct Index {
    #[serde(default)]
    metadata: BTreeMap<String, serde_json::Value>,
    /// File of each tensor, beside the index.
    weight_map: BTreeMap<String, String>,
}

/// One or more open files as one set of tensors.
#[derive(Debug)]
pub struct Shards {
    path: PathBuf,
    files: Vec<Arc<SafeTensors>>,
    /// File of each tensor.
    at: BTreeMap<String, usize>,
    /// What stands before the names in the files.
    prefix: String,
    /// Names that stand for rows of a tensor.
    rows: BTreeMap<String, Rows>,
}

/// Rows of a stored tensor under a name of their own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rows {
    /// The stored tensor's name.
    pub of: String,
    /// The first row.
    pub start: usize,
    /// Sizes; the first is the number of rows. A whole tensor may have its elements in other sizes.
    pub dims: Vec<usize>,
    /// Whether the second half of them comes first.
    pub swapped: bool,
}

impl From<SafeTensors> for Shards {
    fn from(file: SafeTensors) -> Self {
        Self::part(&Arc::new(file), "")
    }
}

/// Whether a name is that of a file beside the one that has it: no path, neither up nor down.
fn is_beside(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
}

impl Shards {
    /// Those tensors of a file whose names begin with a prefix, without it.
    pub fn part(file: &Arc<SafeTensors>, prefix: &str) -> Self {
        let own = |name: String| Some((name.strip_prefix(prefix)?.to_owned(), 0));
        let at = file.names().into_iter().filter_map(own).collect();
        Self { path: file.path().into(), files: vec![file.clone()], at, prefix: prefix.into(), rows: BTreeMap::new() }
    }

    /// Opens the files that `<stem>.safetensors.index.json` of a folder lists or, where there is none, `<stem>.safetensors`:
    /// diffusers' order. Shards beside them that are of no use are said in a warning.
    ///
    /// # Errors
    /// When neither is there, a file is broken, a tensor is not where the index says, or the index is not that of the shards.
    pub fn open(folder: &Path, stem: &str) -> Result<Self> {
        let index = folder.join(index_name(stem));
        if !exists(&index)? {
            return Ok(SafeTensors::open(folder.join(single_name(stem)))?.into());
        }
        let text = std::fs::read(&index).map_err(|source| Error::Io { path: index.clone(), source })?;
        let parsed: Index = serde_json::from_slice(&text).map_err(|e| match mistaken_for(&text) {
            Some(what) => format_error(&index, what),
            None => format_error(&index, e),
        })?;
        let mut names: Vec<&String> = parsed.weight_map.values().collect();
        names.sort_unstable();
        names.dedup();
        if names.is_empty() {
            return Err(format_error(&index, "its weight_map lists no tensor: write the index again, or take it away"));
        }
        if let Some(outside) = names.iter().find(|name| !is_beside(name)) {
            return Err(format_error(&index, format!("expected names of files beside it, got {outside:?}")));
        }
        check_strays(folder, stem, &index, &names)?;
        let files =
            names.iter().map(|name| Ok(Arc::new(SafeTensors::open(folder.join(name))?))).collect::<Result<Vec<_>>>()?;
        let mut at = BTreeMap::new();
        for (tensor, file) in &parsed.weight_map {
            let number = names.binary_search(&file).unwrap_or_default();
            if files[number].dims(tensor).is_none() {
                let what = format!("no tensor {}, which {index:?} places here", printable(tensor));
                return Err(format_error(files[number].path(), what));
            }
            at.insert(tensor.clone(), number);
        }
        // What the index does not mention is there all the same, as for diffusers.
        for (number, file) in files.iter().enumerate() {
            for name in file.names() {
                at.entry(name).or_insert(number);
            }
        }
        Ok(Self { path: index, files, at, prefix: String::new(), rows: BTreeMap::new() })
    }

    /// The same without what other programs are known to put before every key of a model, such as `_orig_mod.` or
    /// `module.`, and of a file of several models the transformer alone. A warning says so.
    #[must_use]
    pub fn without_known_prefix(mut self) -> Self {
        if self.at.keys().any(|key| key.starts_with(WHOLE)) {
            let all = self.at.len();
            self.at.retain(|key, _| key.starts_with(WHOLE));
            if self.at.len() < all {
                let others = all - self.at.len();
                tracing::warn!("{}: {others} keys of other models are passed over", self.path.display());
            }
        }
        while let Some(prefix) = PREFIXES.into_iter().find(|prefix| self.all_begin_with(prefix)) {
            self = self.without_prefix(prefix);
        }
        if !self.prefix.is_empty() {
            tracing::warn!("{}: every key begins with `{}`, which is passed over", self.path.display(), self.prefix);
        }
        self
    }

    fn all_begin_with(&self, prefix: &str) -> bool {
        !self.at.is_empty() && self.at.keys().all(|key| key.starts_with(prefix))
    }

    /// The same without what stands before every key, where it does.
    #[must_use]
    pub fn without_prefix(mut self, prefix: &str) -> Self {
        if self.all_begin_with(prefix) {
            self.at = self.at.into_iter().map(|(key, number)| (key[prefix.len()..].to_owned(), number)).collect();
            self.prefix += prefix;
        }
        self
    }

    /// The same with names that stand for rows of tensors, in place of those tensors' own names.
    ///
    /// # Errors
    /// When a tensor is not there or has other sizes than the rows need.
    pub fn with_rows(mut self, rows: BTreeMap<String, Rows>) -> Result<Self> {
        let mut at = BTreeMap::new();
        for (name, rows) in &rows {
            let number = *self.at.get(&rows.of).ok_or_else(|| self.lacks(&rows.of))?;
            let fits = self.dims(&rows.of).is_some_and(|dims| {
                let end = rows.dims.first().and_then(|count| rows.start.checked_add(*count));
                let rows_of = dims.len() == rows.dims.len()
                    && end.is_some_and(|end| end <= dims[0])
                    && dims[1..] == rows.dims[1..];
                rows_of || (rows.start == 0 && elements(dims) == elements(&rows.dims))
            });
            if !fits {
                let what = format!("{} has sizes {:?}, no rows {rows:?}", printable(&rows.of), self.dims(&rows.of));
                return Err(format_error(&self.path, what));
            }
            at.insert(name.clone(), number);
        }
        for rows in rows.values() {
            self.at.remove(&rows.of);
        }
        self.at.extend(at);
        self.rows = rows;
        Ok(self)
    }

    /// The file, or the index of the files.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files.
    pub(crate) fn files(&self) -> &[Arc<SafeTensors>] {
        &self.files
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.at.keys().map(String::as_str)
    }

    /// The file of a tensor, and its name there.
    fn file<'a>(&self, name: &'a str) -> Option<(&SafeTensors, Cow<'a, str>)> {
        let number = *self.at.get(name)?;
        if let Some(rows) = self.rows.get(name) {
            return Some((&self.files[number], format!("{}{}", self.prefix, rows.of).into()));
        }
        let stored = if self.prefix.is_empty() { name.into() } else { format!("{}{name}", self.prefix).into() };
        Some((&self.files[number], stored))
    }

    /// The dims of a tensor, if there is one of that name.
    pub fn dims(&self, name: &str) -> Option<&[usize]> {
        if let Some(rows) = self.rows.get(name) {
            return Some(&rows.dims);
        }
        let (file, stored) = self.file(name)?;
        file.dims(&stored)
    }

    /// The dtype of a tensor as the file names it (such as `BF16`), if there is one of that name.
    pub fn dtype_name(&self, name: &str) -> Option<String> {
        let (file, stored) = self.file(name)?;
        file.dtype_name(&stored)
    }

    /// Bytes of a tensor in its file.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn bytes(&self, name: &str) -> Result<usize> {
        let share = |bytes: usize, all: usize| match self.rows.get(name) {
            Some(rows) => bytes / all.max(1) * elements(&rows.dims),
            None => bytes,
        };
        let bytes =
            self.file(name).and_then(|(file, stored)| Some(share(file.bytes(&stored)?, elements(file.dims(&stored)?))));
        bytes.ok_or_else(|| self.lacks(name))
    }

    /// A tensor, converted to `dtype` if one is given.
    ///
    /// # Errors
    /// Those of [`SafeTensors::get`].
    pub fn get(&self, name: &str, device: &Device, dtype: Option<DType>) -> Result<Tensor> {
        match self.file(name) {
            Some((file, stored)) => match self.rows.get(name) {
                Some(rows) => rows.take(&file.get(&stored, device, dtype)?),
                None => file.get(&stored, device, dtype),
            },
            None => Err(self.lacks(name)),
        }
    }

    /// Checks that a tensor is there and of a dtype that is read, without reading it.
    ///
    /// # Errors
    /// When it is not.
    pub fn check(&self, name: &str) -> Result<()> {
        self.file(name).map_or_else(|| Err(self.lacks(name)), |(file, stored)| file.check(&stored))
    }

    fn lacks(&self, name: &str) -> Error {
        format_error(&self.path, format!("no tensor {}", printable(name)))
    }
}

impl Rows {
    /// A copy of them, so that the whole is not kept.
    fn take(&self, whole: &Tensor) -> Result<Tensor> {
        if whole.dims().len() != self.dims.len() {
            return whole.reshape(&self.dims);
        }
        let copy = Tensor::empty(&self.dims, whole.dtype(), whole.device())?;
        let count = self.dims[0];
        let half = if self.swapped { count / 2 } else { 0 };
        for (to, from, len) in [(0, half, count - half), (count - half, 0, half)] {
            if len > 0 {
                copy.narrow(0, to, len)?.copy_from(&whole.narrow(0, self.start + from, len)?)?;
            }
        }
        Ok(copy)
    }
}

fn elements(dims: &[usize]) -> usize {
    dims.iter().product()
}

fn single_name(stem: &str) -> String {
    format!("{stem}.safetensors")
}

fn index_name(stem: &str) -> String {
    format!("{stem}.safetensors.index.json")
}

/// The `-of-00005.safetensors` of a shard's name, where it is one of `stem`.
fn set_of<'a>(name: &'a str, stem: &str) -> Option<&'a str> {
    let rest = name.strip_prefix(stem)?.strip_prefix('-')?;
    let (number, set) = rest.split_at_checked(rest.find("-of-")?)?;
    (number.bytes().all(|b| b.is_ascii_digit()) && set.ends_with(".safetensors")).then_some(set)
}

/// Looks for files of weights that an index does not name: one that is part of its set means that the index is not that of
/// these files; others are left over from another save.
fn check_strays(folder: &Path, stem: &str, index: &Path, named: &[&String]) -> Result<()> {
    let io = |source| Error::Io { path: folder.into(), source };
    let mut left_over = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let name = entry.map_err(io)?.file_name().to_string_lossy().into_owned();
        let set = set_of(&name, stem);
        if named.contains(&&name) || (set.is_none() && name != single_name(stem)) {
            continue;
        }
        if set.is_some_and(|set| named.iter().any(|other| set_of(other, stem) == Some(set))) {
            let what =
                format!("does not name {name:?}, a part of its set: take the index or the file from another save");
            return Err(format_error(index, what));
        }
        left_over.push(name);
    }
    if !left_over.is_empty() {
        tracing::warn!(
            "{}: passed over, since the index does not name them: {}",
            index.display(),
            left_over.join(", ")
        );
    }
    Ok(())
}

/// Writes tensors to `<stem>.safetensors` of a folder or, when they take more than `max_bytes`, to
/// `<stem>-00001-of-0000N.safetensors` and so on, with an index. Each file appears whole; files of an older checkpoint of
/// that stem go last.
///
/// # Errors
/// When the folder can't be written.
pub fn save_sharded(
    folder: &Path,
    stem: &str,
    tensors: &[(String, Tensor)],
    text: &BTreeMap<String, String>,
    max_bytes: u64,
) -> Result<()> {
    let bytes = |tensor: &Tensor| (tensor.numel() * tensor.dtype().size()) as u64;
    let mut shards: Vec<&[(String, Tensor)]> = Vec::new();
    let (mut start, mut filled) = (0, 0);
    for (i, (_, tensor)) in tensors.iter().enumerate() {
        if i > start && filled + bytes(tensor) > max_bytes {
            shards.push(&tensors[start..i]);
            (start, filled) = (i, 0);
        }
        filled += bytes(tensor);
    }
    shards.push(&tensors[start..]);
    let mut written = Vec::new();
    if let [all] = shards[..] {
        written.push(single_name(stem));
        save(folder.join(single_name(stem)), all, text)?;
    } else {
        let name = |i: usize| shard_name(stem, i, shards.len());
        let mut weight_map = BTreeMap::new();
        for (i, shard) in shards.iter().enumerate() {
            save(folder.join(name(i)), shard, text)?;
            weight_map.extend(shard.iter().map(|(tensor, _)| (tensor.clone(), name(i))));
            written.push(name(i));
        }
        let total: u64 = tensors.iter().map(|(_, t)| bytes(t)).sum();
        write_index(folder, stem, total, weight_map)?;
        written.push(index_name(stem));
    }
    let io = |source| Error::Io { path: folder.into(), source };
    let mut old = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let name = entry.map_err(io)?.file_name().to_string_lossy().into_owned();
        let ours = set_of(&name, stem).is_some() || name == single_name(stem) || name == index_name(stem);
        if ours && !written.contains(&name) {
            old.push(name);
        }
    }
    // An index goes first: without it, the new file is what is read.
    old.sort_by_key(|name| *name != index_name(stem));
    old.iter().try_for_each(|name| std::fs::remove_file(folder.join(name)).map_err(io))
}

/// Writes one of `count` files, which others write too, to be read as one when [`index_shards`] has named them all. Where there is
/// nothing to write, there is no file.
///
/// # Errors
/// When the folder can't be written.
pub fn save_shard(
    folder: &Path,
    stem: &str,
    (shard, count): (usize, usize),
    tensors: &[(String, Tensor)],
    text: &BTreeMap<String, String>,
) -> Result<()> {
    if tensors.is_empty() {
        return Ok(());
    }
    let path = folder.join(shard_name(stem, shard, count));
    save(&path, tensors, text)?;
    // Whoever names it may be another machine.
    std::fs::File::open(&path).and_then(|file| file.sync_all()).map_err(|source| Error::Io { path, source })
}

/// Makes the files of [`save_shard`] one, by an index.
///
/// # Errors
/// When one can't be read, or the folder can't be written.
pub fn index_shards(folder: &Path, stem: &str, count: usize) -> Result<()> {
    let (mut total, mut weight_map) = (0, BTreeMap::new());
    for name in (0..count).map(|shard| shard_name(stem, shard, count)) {
        if !exists(&folder.join(&name))? {
            continue;
        }
        let file = SafeTensors::open(folder.join(&name))?;
        for tensor in file.names() {
            total += file.bytes(&tensor).unwrap_or(0) as u64;
            weight_map.insert(tensor, name.clone());
        }
    }
    write_index(folder, stem, total, weight_map)
}

fn shard_name(stem: &str, shard: usize, count: usize) -> String {
    format!("{stem}-{:05}-of-{count:05}.safetensors", shard + 1)
}

fn write_index(folder: &Path, stem: &str, total: u64, weight_map: BTreeMap<String, String>) -> Result<()> {
    let index = Index { metadata: BTreeMap::from([("total_size".into(), total.into())]), weight_map };
    let path = folder.join(index_name(stem));
    let json = format!("{:#}\n", serde_json::json!(index));
    write_whole(&path, |partial| {
        std::fs::write(partial, json).map_err(|source| Error::Io { path: path.clone(), source })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_read_as_one_and_replace_older_ones() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let cpu = Device::cpu();
        let named = |i: usize| Ok((format!("t{i}"), Tensor::from_vec(vec![i as f32; 4], &[4], &cpu)?));
        let tensors: Vec<_> = (0..5).map(named).collect::<Result<_>>()?;
        let files = || {
            let entries = std::fs::read_dir(folder.path()).unwrap();
            let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        // 16 bytes each: two in a file.
        save_sharded(folder.path(), "m", &tensors, &BTreeMap::new(), 32)?;
        let shard = |i| format!("m-0000{i}-of-00003.safetensors");
        assert_eq!(files(), [shard(1), shard(2), shard(3), "m.safetensors.index.json".into()]);
        let shards = Shards::open(folder.path(), "m")?;
        assert_eq!(shards.names().collect::<Vec<_>>(), ["t0", "t1", "t2", "t3", "t4"]);
        assert_eq!(shards.get("t3", &cpu, Some(DType::F64))?.to_vec::<f64>()?, [3.0; 4]);
        assert_eq!((shards.dims("t4"), shards.dtype_name("t4").as_deref()), (Some(&[4][..]), Some("F32")));
        assert!(shards.get("t5", &cpu, None).is_err());
        // The same by several that know nothing of each other; one has nothing.
        for file in files() {
            std::fs::remove_file(folder.path().join(file)).unwrap();
        }
        for (i, own) in [&tensors[3..], &[], &tensors[..3]].into_iter().enumerate() {
            save_shard(folder.path(), "m", (i, 3), own, &BTreeMap::new())?;
        }
        index_shards(folder.path(), "m", 3)?;
        assert_eq!(files(), [shard(1), shard(3), "m.safetensors.index.json".into()]);
        let shards = Shards::open(folder.path(), "m")?;
        assert_eq!(shards.names().collect::<Vec<_>>(), ["t0", "t1", "t2", "t3", "t4"]);
        assert_eq!(shards.get("t3", &cpu, Some(DType::F64))?.to_vec::<f64>()?, [3.0; 4]);
        save_sharded(folder.path(), "m", &tensors, &BTreeMap::new(), 1000)?;
        assert_eq!(files(), ["m.safetensors"]);
        assert_eq!(Shards::open(folder.path(), "m")?.names().count(), 5);
        Ok(())
    }

    #[test]
    fn what_is_missing_or_outside_is_named() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let message = || Shards::open(folder.path(), "m").unwrap_err().to_string();
        assert!(message().contains("m.safetensors"));
        let index = folder.path().join("m.safetensors.index.json");
        std::fs::write(&index, r#"{"weight_map": {"a": "../b.safetensors"}}"#).unwrap();
        assert!(message().contains("files beside it"), "{}", message());
        std::fs::write(&index, r#"{"weight_map": {"a": "b.safetensors"}}"#).unwrap();
        assert!(message().contains("b.safetensors"), "{}", message());
        let tensor = Tensor::from_vec(vec![1f32], &[1], &Device::cpu())?;
        save(folder.path().join("b.safetensors"), &[("c".into(), tensor)], &BTreeMap::new())?;
        assert!(message().contains("no tensor a"), "{}", message());
        Ok(())
    }

    /// A file of one tensor, which tells the files apart.
    fn write(folder: &Path, file: &str, tensor: &str, value: f32) -> Result<()> {
        let tensor = (tensor.to_owned(), Tensor::from_vec(vec![value], &[1], &Device::cpu())?);
        save(folder.join(file), &[tensor], &BTreeMap::new())
    }

    #[test]
    fn the_index_wins_over_a_single_file_as_for_diffusers() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "m.safetensors", "a", 1.0)?;
        write(folder.path(), "m-00001-of-00001.safetensors", "a", 2.0)?;
        let read = || Shards::open(folder.path(), "m")?.get("a", &Device::cpu(), None)?.to_vec::<f32>();
        assert_eq!(read()?, [1.0]);
        let index = |text: &str| std::fs::write(folder.path().join("m.safetensors.index.json"), text).unwrap();
        index(r#"{"weight_map": {"a": "m-00001-of-00001.safetensors"}}"#);
        assert_eq!(read()?, [2.0]);
        // What is left over from another save is passed over, but a part of the same one is not.
        write(folder.path(), "m-00003-of-00003.safetensors", "a", 3.0)?;
        assert_eq!(read()?, [2.0]);
        write(folder.path(), "m-00002-of-00001.safetensors", "a", 4.0)?;
        assert!(read().unwrap_err().to_string().contains("m-00002-of-00001.safetensors"));
        for (text, what) in [(r#"{"weight_map": {}}"#, "no tensor"), ("<html></html>", "web page")] {
            index(text);
            let message = read().unwrap_err().to_string();
            assert!(message.contains("index.json") && message.contains(what), "{message}");
        }
        for outside in
            ["..", "/", ".", "", "/etc/m.safetensors", "../m.safetensors", "x/m.safetensors", "m.safetensors/"]
        {
            index(&serde_json::json!({"weight_map": {"a": outside}}).to_string());
            assert!(read().unwrap_err().to_string().contains("files beside it"), "{outside}");
        }
        Ok(())
    }

    #[test]
    fn a_tensor_that_the_index_forgot_is_read() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let one = |name: &str| Ok((name.to_owned(), Tensor::from_vec(vec![1f32], &[1], &Device::cpu())?));
        save(folder.path().join("b.safetensors"), &[one("a")?, one("c")?], &BTreeMap::new())?;
        std::fs::write(folder.path().join("m.safetensors.index.json"), r#"{"weight_map": {"a": "b.safetensors"}}"#)
            .unwrap();
        assert_eq!(Shards::open(folder.path(), "m")?.names().collect::<Vec<_>>(), ["a", "c"]);
        Ok(())
    }

    #[test]
    fn known_prefixes_of_all_keys_are_passed_over() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let named =
            |name: &str| Ok((name.to_owned(), Tensor::from_vec(vec![name.len() as f32], &[1], &Device::cpu())?));
        let open = |names: &[&str]| -> Result<Shards> {
            let tensors: Vec<_> = names.iter().map(|name| named(name)).collect::<Result<_>>()?;
            save(folder.path().join("m.safetensors"), &tensors, &BTreeMap::new())?;
            Ok(Shards::open(folder.path(), "m")?.without_known_prefix())
        };
        let wrapped = open(&["module._orig_mod.x.weight", "module._orig_mod.y"])?;
        assert_eq!(wrapped.names().collect::<Vec<_>>(), ["x.weight", "y"]);
        assert_eq!((wrapped.dims("y"), wrapped.bytes("y")?), (Some(&[1usize][..]), 4));
        assert_eq!(wrapped.get("y", &Device::cpu(), None)?.to_vec::<f32>()?, [18.0]);
        for prefix in PREFIXES {
            assert_eq!(
                open(&[&format!("{prefix}x"), &format!("{prefix}y.z")])?.names().collect::<Vec<_>>(),
                ["x", "y.z"]
            );
        }
        // One key without it, or a prefix of another kind: nothing is known.
        for names in [["module.x", "y"], ["net.x", "net.y"]] {
            assert_eq!(open(&names)?.names().collect::<Vec<_>>(), names);
        }
        Ok(())
    }

    #[test]
    fn what_cannot_be_looked_at_is_an_error_of_its_own() {
        #[cfg(unix)]
        {
            let folder = tempfile::tempdir().unwrap();
            let link = folder.path().join("loop");
            std::os::unix::fs::symlink(&link, &link).unwrap();
            assert!(matches!(Shards::open(&link, "m"), Err(Error::Io { .. })));
        }
    }
}
