//! Tensors that are spread over several files, with an index that says where each is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{SafeTensors, format_error, save};
use crate::files::write_whole;
use crate::{DType, Device, Error, Result, Tensor};

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
    files: Vec<SafeTensors>,
    /// File of each tensor.
    at: BTreeMap<String, usize>,
}

impl From<SafeTensors> for Shards {
    fn from(file: SafeTensors) -> Self {
        let at = file.names().into_iter().map(|name| (name, 0)).collect();
        Self { path: file.path().into(), files: vec![file], at }
    }
}

impl Shards {
    /// Opens `<stem>.safetensors` of a folder or, where there is none, the files that `<stem>.safetensors.index.json` lists.
    ///
    /// # Errors
    /// When neither is there, a file is broken, or a tensor is not where the index says.
    pub fn open(folder: &Path, stem: &str) -> Result<Self> {
        let (single, index) = (folder.join(single_name(stem)), folder.join(index_name(stem)));
        if single.exists() || !index.exists() {
            return Ok(SafeTensors::open(single)?.into());
        }
        let text = std::fs::read(&index).map_err(|source| Error::Io { path: index.clone(), source })?;
        let parsed: Index = serde_json::from_slice(&text).map_err(|e| format_error(&index, e))?;
        let mut names: Vec<&String> = parsed.weight_map.values().collect();
        names.sort_unstable();
        names.dedup();
        if let Some(outside) = names.iter().find(|n| Path::new(n).components().count() != 1) {
            return Err(format_error(&index, format!("expected names of files beside it, got {outside:?}")));
        }
        let files = names.iter().map(|name| SafeTensors::open(folder.join(name))).collect::<Result<Vec<_>>>()?;
        let mut at = BTreeMap::new();
        for (tensor, file) in &parsed.weight_map {
            let number = names.binary_search(&file).unwrap_or_default();
            if files[number].dims(tensor).is_none() {
                return Err(format_error(
                    files[number].path(),
                    format!("no tensor {tensor}, which {index:?} places here"),
                ));
            }
            at.insert(tensor.clone(), number);
        }
        Ok(Self { path: index, files, at })
    }

    /// The file, or the index of the files.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.at.keys().map(String::as_str)
    }

    fn file(&self, name: &str) -> Option<&SafeTensors> {
        self.at.get(name).map(|&number| &self.files[number])
    }

    /// The dims of a tensor, if there is one of that name.
    pub fn dims(&self, name: &str) -> Option<&[usize]> {
        self.file(name)?.dims(name)
    }

    /// The dtype of a tensor as the file names it (such as `BF16`), if there is one of that name.
    pub fn dtype_name(&self, name: &str) -> Option<String> {
        self.file(name)?.dtype_name(name)
    }

    /// Bytes of a tensor in its file.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn bytes(&self, name: &str) -> Result<usize> {
        let bytes = self.file(name).and_then(|file| file.bytes(name));
        bytes.ok_or_else(|| format_error(&self.path, format!("no tensor {name}")))
    }

    /// A tensor, converted to `dtype` if one is given.
    ///
    /// # Errors
    /// Those of [`SafeTensors::get`].
    pub fn get(&self, name: &str, device: &Device, dtype: Option<DType>) -> Result<Tensor> {
        match self.file(name) {
            Some(file) => file.get(name, device, dtype),
            None => Err(format_error(&self.path, format!("no tensor {name}"))),
        }
    }
}

fn single_name(stem: &str) -> String {
    format!("{stem}.safetensors")
}

fn index_name(stem: &str) -> String {
    format!("{stem}.safetensors.index.json")
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
    max_bytes: usize,
) -> Result<()> {
    let bytes = |tensor: &Tensor| tensor.numel() * tensor.dtype().size();
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
        let name = |i: usize| format!("{stem}-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        let mut weight_map = BTreeMap::new();
        for (i, shard) in shards.iter().enumerate() {
            save(folder.join(name(i)), shard, text)?;
            weight_map.extend(shard.iter().map(|(tensor, _)| (tensor.clone(), name(i))));
            written.push(name(i));
        }
        let total: usize = tensors.iter().map(|(_, t)| bytes(t)).sum();
        let index = Index { metadata: BTreeMap::from([("total_size".into(), total.into())]), weight_map };
        let path = folder.join(index_name(stem));
        let json = format!("{:#}\n", serde_json::json!(index));
        write_whole(&path, |partial| {
            std::fs::write(partial, json).map_err(|source| Error::Io { path: path.clone(), source })
        })?;
        written.push(index_name(stem));
    }
    let io = |source| Error::Io { path: folder.into(), source };
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let shard = name.strip_prefix(&format!("{stem}-")).is_some_and(|rest| rest.ends_with(".safetensors"));
        if (shard || name == single_name(stem) || name == index_name(stem)) && !written.contains(&name) {
            std::fs::remove_file(entry.path()).map_err(io)?;
        }
    }
    Ok(())
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
}
