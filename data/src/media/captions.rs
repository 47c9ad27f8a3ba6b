//! Captions and reference images beside pictures: `name.txt`, `name.caption` and `name.json`, a folder's `metadata.jsonl`, `metadata.csv` and
//! `metadata.parquet` (Hugging Face's imagefolder), `meta.json` and `*_internvl.json` (NeMo's).

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{Error, Result};

/// Names of a caption's field, where none is named.
const FIELDS: [&str; 5] = ["caption", "text", "prompt", "description", "internvl"];

/// What stands for a caption that a picture has not.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum MissingCaptions {
    /// Nothing: it is an error that names the pictures.
    #[default]
    Error,
    /// An empty one.
    Empty,
    /// The file's name without its ending, underscores as spaces.
    FileName,
}

impl MissingCaptions {
    /// By its name on the command line.
    pub fn of_name(name: &str) -> Option<Self> {
        let all = [("error", Self::Error), ("empty", Self::Empty), ("filename", Self::FileName)];
        all.into_iter().find_map(|(known, way)| (known == name).then_some(way))
    }
}

/// What is written of a folder's pictures.
#[derive(Debug, Default)]
pub(super) struct Captions {
    captions: HashMap<PathBuf, String>,
    /// Pictures that a picture was made of.
    references: HashMap<PathBuf, Vec<PathBuf>>,
}

fn wrong(path: &Path, what: impl Into<String>) -> Error {
    Error::Open { name: path.display().to_string(), what: what.into() }
}

/// A text file, which must be UTF-8.
fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|error| wrong(path, error.to_string()))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        wrong(path, format!("not UTF-8 from byte {at} on; if it is Latin-1, write it again as UTF-8"))
    })?;
    Ok(text.strip_prefix('\u{feff}').unwrap_or(&text).to_owned())
}

/// The texts and lists in the rows of a file of Parquet; the pictures that a data set may hold itself are not looked at.
#[cfg(feature = "parquet")]
fn parquet_rows(path: &Path) -> Result<Vec<Map<String, Value>>> {
    use parquet::file::reader::{FileReader, SerializedFileReader};
    use parquet::record::{Field, Row};

    let rows = || -> parquet::errors::Result<Vec<Map<String, Value>>> {
        let reader = SerializedFileReader::new(std::fs::File::open(path)?)?;
        let object = |row: Row| {
            let read = |field: &Field| matches!(field, Field::Str(_) | Field::ListInternal(_));
            let columns = row.get_column_iter().filter(|(_, field)| read(field));
            columns.map(|(name, field)| (name.clone(), field.to_json_value())).collect()
        };
        reader.get_row_iter(None)?.map(|row| row.map(object)).collect()
    };
    // The crate panics at some broken files.
    let read = std::panic::catch_unwind(rows).map_err(|_| wrong(path, "not a whole file of Parquet"))?;
    read.map_err(|error| wrong(path, error.to_string()))
}

#[cfg(not(feature = "parquet"))]
fn parquet_rows(path: &Path) -> Result<Vec<Map<String, Value>>> {
    Err(wrong(path, "this build reads no Parquet (the feature `parquet`): write it as metadata.jsonl"))
}

/// The caption of an object of metadata, where it has one.
fn caption_of(object: &Map<String, Value>, field: Option<&str>) -> Option<String> {
    let named = |name: &str| object.get(name)?.as_str().map(String::from);
    match field {
        Some(field) => named(field),
        None => FIELDS.iter().find_map(|name| named(name)),
    }
}

/// The file of an object of metadata.
fn file_of(object: &Map<String, Value>) -> Option<&str> {
    ["file_name", "filename"].iter().find_map(|name| object.get(*name)?.as_str())
}

/// The files of reference images of an object of metadata: `references`, a name or a list of names, or as musubi-tuner has them
/// `control_path`, or `control_path_0`, `control_path_1`, and so on.
fn references_of(object: &Map<String, Value>) -> Vec<&str> {
    let numbered = (0..).map_while(|i| object.get(&format!("control_path_{i}")));
    let named = ["references", "control_path"].into_iter().filter_map(|key| object.get(key));
    named
        .chain(numbered)
        .flat_map(|value| value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice))
        .filter_map(Value::as_str)
        .filter(|name| !name.is_empty())
        .collect()
}

/// Their paths, which count from a folder.
fn reference_paths(
    folder: &Path,
    object: &Map<String, Value>,
    wrong: impl Fn(String) -> Error,
) -> Result<Vec<PathBuf>> {
    let path = |name: &str| match folder.join(name) {
        path if path.is_file() => Ok(path),
        _ => Err(wrong(format!("there is no reference image {name}"))),
    };
    references_of(object).into_iter().map(path).collect()
}

/// The object of a file `name.json` beside a picture, where there is one.
fn beside(picture: &Path) -> Result<Option<Map<String, Value>>> {
    let path = picture.with_extension("json");
    if !path.is_file() {
        return Ok(None);
    }
    serde_json::from_str(&read_text(&path)?).map_err(|error| wrong(&path, error.to_string()))
}

impl Captions {
    /// Reads the metadata of a folder: what it says of files there and below.
    pub fn add_metadata(&mut self, folder: &Path, field: Option<&str>) -> Result<()> {
        // Where a file said which caption and references of a picture.
        let mut said = HashMap::new();
        let mut add = |all: &mut Self, path: &Path, place: &str, object: &Map<String, Value>| {
            let file = file_of(object).ok_or_else(|| wrong(path, format!("{place}: no `file_name`")))?;
            let named = folder.join(file);
            if !named.exists() {
                return Err(wrong(path, format!("{place}: there is no file {file}")));
            }
            let references = reference_paths(folder, object, |what| wrong(path, format!("{place}: {what}")))?;
            let row = (caption_of(object, field), references.clone());
            let first = said.entry((path.to_owned(), named.clone())).or_insert_with(|| (place.to_owned(), row.clone()));
            if first.1 != row {
                let before = &first.0;
                let what =
                    format!("{place}: {file} has another caption, or other references, in {before}; keep one of them");
                return Err(wrong(path, what));
            }
            all.references.insert(named.clone(), references);
            if let Some(caption) = row.0 {
                all.captions.insert(named, caption);
            }
            Ok(())
        };
        for path in entries(folder)? {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            match name {
                "metadata.csv" => {
                    let text = read_text(&path)?;
                    let mut reader = csv::Reader::from_reader(text.as_bytes());
                    let rows = reader.deserialize::<HashMap<String, String>>();
                    for (i, row) in rows.enumerate() {
                        let row = row.map_err(|error| wrong(&path, error.to_string()))?;
                        let object = row.into_iter().map(|(key, value)| (key, Value::String(value))).collect();
                        add(self, &path, &format!("row {}", i + 1), &object)?;
                    }
                }
                "metadata.parquet" => {
                    for (i, row) in parquet_rows(&path)?.into_iter().enumerate() {
                        add(self, &path, &format!("row {}", i + 1), &row)?;
                    }
                }
                "meta.json" => {
                    let value: Value =
                        serde_json::from_str(&read_text(&path)?).map_err(|error| wrong(&path, error.to_string()))?;
                    let items = ["items", "data"].iter().find_map(|key| value.get(key)).unwrap_or(&value);
                    let items = items.as_array().ok_or_else(|| wrong(&path, "expected a list of objects"))?;
                    for (i, object) in items.iter().filter_map(Value::as_object).enumerate() {
                        add(self, &path, &format!("entry {}", i + 1), object)?;
                    }
                }
                lines if lines == "metadata.jsonl" || lines.ends_with("_internvl.json") => {
                    let text = read_text(&path)?;
                    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
                    for (i, line) in lines {
                        let place = format!("line {}", i + 1);
                        let object =
                            serde_json::from_str(line).map_err(|error| wrong(&path, format!("{place}: {error}")))?;
                        add(self, &path, &place, &object)?;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The caption of a picture: that of a file beside it, or of a folder's metadata.
    pub fn of(&self, picture: &Path, field: Option<&str>) -> Result<Option<String>> {
        for ending in ["txt", "caption"] {
            let beside = picture.with_extension(ending);
            if beside.is_file() {
                return Ok(Some(read_text(&beside)?.trim().to_owned()));
            }
        }
        if let Some(caption) = beside(picture)?.and_then(|object| caption_of(&object, field)) {
            return Ok(Some(caption));
        }
        Ok(self.captions.get(picture).cloned())
    }

    /// The pictures that a picture was made of: those of a file beside it, or of a folder's metadata.
    pub fn references(&self, picture: &Path) -> Result<Vec<PathBuf>> {
        let folder = picture.parent().unwrap_or(picture);
        let object = beside(picture)?.unwrap_or_default();
        let own = reference_paths(folder, &object, |what| wrong(&picture.with_extension("json"), what))?;
        Ok(if own.is_empty() { self.references.get(picture).cloned().unwrap_or_default() } else { own })
    }
}

/// What lies in a folder, sorted by name.
pub(super) fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let failed = |error: std::io::Error| wrong(folder, error.to_string());
    let mut paths = std::fs::read_dir(folder).map_err(failed)?.map(|entry| Ok(entry.map_err(failed)?.path()));
    let mut paths = paths.by_ref().collect::<Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}
