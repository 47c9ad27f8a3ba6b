//! A folder of pictures with captions, as a list.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::captions::{Captions, MissingCaptions, entries};
use super::{is_film, is_picture};
use crate::{Error, Result};

/// Names that an error lists.
const LISTED: usize = 5;

/// A picture's file and its caption.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PictureItem {
    /// The file.
    pub path: PathBuf,
    /// Its path below the folder, with slashes.
    pub name: String,
    /// Its caption.
    pub caption: String,
    /// The pictures that it was made of, for models that edit.
    pub references: Vec<PathBuf>,
}

/// How a folder is read.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct FolderOptions {
    /// What stands for a caption that is missing.
    pub missing_captions: MissingCaptions,
    /// The field of captions in JSON and CSV; else `caption`, `text`, `prompt`, `description` or `internvl`.
    pub caption_field: Option<String>,
}

/// The pictures and films of a folder and those below it, sorted by path, with their captions. Files that are neither by their
/// names, hidden ones, and reference images of others without a caption of their own are passed over. A folder with a caption beside it is one film, whose frames are the pictures in it.
///
/// # Errors
/// When the folder can't be read, has no pictures, metadata is broken, or captions are missing; those are named together.
pub fn list_pictures(folder: &Path, options: &FolderOptions) -> Result<Vec<PictureItem>> {
    let field = options.caption_field.as_deref();
    let (mut captions, mut pictures) = (Captions::default(), Vec::new());
    walk(folder, field, &mut captions, &mut pictures)?;
    let refused = |what: String| Error::Open { name: folder.display().to_string(), what };
    if pictures.is_empty() {
        return Err(refused(
            "no pictures or films there (.png, .jpg, .webp, .gif, .bmp, .tiff, .mp4, .mov, ..)".into(),
        ));
    }
    let references = pictures.iter().map(|path| captions.references(path)).collect::<Result<Vec<_>>>()?;
    let referred: HashSet<PathBuf> = references.iter().flatten().cloned().collect();
    let (mut items, mut missing) = (Vec::with_capacity(pictures.len()), Vec::new());
    for (path, references) in pictures.into_iter().zip(references) {
        let below = path.strip_prefix(folder).unwrap_or(&path);
        let name = below.iter().map(|part| part.to_string_lossy()).collect::<Vec<_>>().join("/");
        let caption = match (captions.of(&path, field)?, options.missing_captions) {
            (Some(caption), _) => caption,
            (None, _) if referred.contains(&path) => continue,
            (None, MissingCaptions::Empty) => String::new(),
            (None, MissingCaptions::FileName) => {
                path.file_stem().unwrap_or_default().to_string_lossy().replace('_', " ")
            }
            (None, MissingCaptions::Error) => {
                missing.push(name);
                continue;
            }
        };
        items.push(PictureItem { path, name, caption, references });
    }
    if !missing.is_empty() {
        let more = if missing.len() > LISTED { ", .." } else { "" };
        let some = missing[..missing.len().min(LISTED)].join(", ");
        return Err(refused(format!(
            "{} of {} pictures have no caption: {some}{more}; write name.txt beside each, or a metadata.jsonl of \
             `file_name` and `text`, or ask for --missing-captions empty or filename",
            missing.len(),
            missing.len() + items.len()
        )));
    }
    Ok(items)
}

fn walk(folder: &Path, field: Option<&str>, captions: &mut Captions, pictures: &mut Vec<PathBuf>) -> Result<()> {
    captions.add_metadata(folder, field)?;
    for path in entries(folder)? {
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if hidden {
            continue;
        }
        if path.is_dir() && captions.of(&path, field)?.is_none() {
            walk(&path, field, captions, pictures)?;
        } else if path.is_dir() || is_picture(&path) || is_film(&path) {
            pictures.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
        folder
    }

    #[test]
    fn reference_images_are_found_and_are_no_samples_of_their_own() {
        let of = |files: &[(&str, &[u8])]| {
            let folder = folder(files);
            let items = list_pictures(folder.path(), &FolderOptions::default())?;
            let below = |path: &PathBuf| path.strip_prefix(folder.path()).unwrap().display().to_string();
            let all = items.iter().map(|item| (item.name.clone(), item.references.iter().map(below).collect()));
            Ok::<_, Error>(all.collect::<Vec<(String, Vec<String>)>>())
        };
        let found = of(&[
            ("a.png", b""),
            ("b.png", b""),
            ("c.png", b""),
            ("c.json", br#"{"caption": "c", "references": "sketch/a.png"}"#),
            ("d.png", b""),
            ("d.txt", b"d"),
            ("sketch/a.png", b""),
            ("sketch/b.png", b""),
            (
                "metadata.jsonl",
                br#"{"file_name": "a.png", "text": "a", "references": ["sketch/a.png", "d.png"]}
                    {"file_name": "b.png", "text": "b", "control_path_0": "sketch/b.png", "control_path_1": "sketch/a.png"}"#,
            ),
        ]);
        let list = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        let expected = [
            ("a.png".to_owned(), list(&["sketch/a.png", "d.png"])),
            ("b.png".to_owned(), list(&["sketch/b.png", "sketch/a.png"])),
            ("c.png".to_owned(), list(&["sketch/a.png"])),
            ("d.png".to_owned(), vec![]),
        ];
        assert_eq!(found.unwrap(), expected);
        let lost: &[(&str, &[u8])] =
            &[("a.png", b""), ("metadata.jsonl", br#"{"file_name": "a.png", "text": "a", "references": "b.png"}"#)];
        let error = of(lost).unwrap_err().to_string();
        assert!(error.contains("line 1") && error.contains("reference image b.png"), "{error}");
    }

    #[test]
    fn captions_are_found_wherever_they_are_written() {
        let files: &[(&str, &[u8])] = &[
            ("a.png", b""),
            ("a.txt", b"a text\n"),
            ("b.jpg", b""),
            ("b.caption", "\u{feff}a caption".as_bytes()),
            ("c.webp", b""),
            ("c.json", br#"{"caption": "a sidecar", "fps": 24}"#),
            ("d/e.PNG", b""),
            ("d/metadata.jsonl", b"{\"file_name\": \"e.PNG\", \"text\": \"a line\"}\n\n"),
            ("f/g.gif", b""),
            ("metadata.csv", b"file_name,text\nf/g.gif,\"a row, quoted\"\n"),
            ("h/i.bmp", b""),
            ("h/meta.json", br#"{"items": [{"file_name": "i.bmp", "caption": "an item"}]}"#),
            ("j/k.tiff", b""),
            ("j/x_internvl.json", br#"{"file_name": "k.tiff", "internvl": "by a model"}"#),
            (".hidden/l.png", b""),
            ("notes.md", b""),
        ];
        let items = list_pictures(folder(files).path(), &FolderOptions::default()).unwrap();
        let found: Vec<(&str, &str)> = items.iter().map(|item| (&*item.name, &*item.caption)).collect();
        let expected = [
            ("a.png", "a text"),
            ("b.jpg", "a caption"),
            ("c.webp", "a sidecar"),
            ("d/e.PNG", "a line"),
            ("f/g.gif", "a row, quoted"),
            ("h/i.bmp", "an item"),
            ("j/k.tiff", "by a model"),
        ];
        assert_eq!(found, expected);
    }

    #[cfg(feature = "parquet")]
    #[test]
    fn captions_and_references_of_parquet_are_read() {
        let parquet = include_bytes!("../../tests/captions/metadata.parquet");
        let files: &[(&str, &[u8])] = &[("a.png", b""), ("b.png", b""), ("metadata.parquet", parquet)];
        let folder = folder(files);
        let items = list_pictures(folder.path(), &FolderOptions::default()).unwrap();
        let found: Vec<(&str, usize)> = items.iter().map(|item| (&*item.caption, item.references.len())).collect();
        assert_eq!(found, [("a row", 1), ("ein Fuß, \"quoted\"", 0)]);
        assert_eq!(items[0].references, [folder.path().join("b.png")]);
        std::fs::write(folder.path().join("metadata.parquet"), &parquet[..900]).unwrap();
        let error = list_pictures(folder.path(), &FolderOptions::default()).unwrap_err().to_string();
        assert!(error.contains("metadata.parquet"), "{error}");
    }

    #[test]
    fn what_is_missing_or_broken_is_named() {
        let list = |files: &[(&str, &[u8])], missing_captions| {
            list_pictures(folder(files).path(), &FolderOptions { missing_captions, ..FolderOptions::default() })
        };
        let error = |files: &[(&str, &[u8])]| list(files, MissingCaptions::Error).unwrap_err().to_string();
        let bare: &[(&str, &[u8])] = &[("red_cat.png", b""), ("b.png", b""), ("b.txt", b"b")];
        let message = error(bare);
        assert!(message.contains("1 of 2") && message.contains("red_cat.png"), "{message}");
        assert_eq!(list(bare, MissingCaptions::Empty).unwrap()[1].caption, "");
        assert_eq!(list(bare, MissingCaptions::FileName).unwrap()[1].caption, "red cat");
        let message = error(&[("a.png", b""), ("a.txt", b"caf\xe9")]);
        assert!(message.contains("a.txt") && message.contains("byte 3") && message.contains("Latin-1"), "{message}");
        let message = error(&[("a.png", b""), ("metadata.jsonl", b"{\"file_name\": \"b.png\", \"text\": \"b\"}")]);
        assert!(message.contains("line 1") && message.contains("b.png"), "{message}");
        let [one, other] = ["one", "other"].map(|text| format!("{{\"file_name\": \"a.png\", \"text\": \"{text}\"}}\n"));
        let message = error(&[("a.png", b""), ("metadata.jsonl", format!("{one}{one}{other}").as_bytes())]);
        assert!(message.contains("line 3: a.png") && message.contains("line 1"), "{message}");
        let message = error(&[("a.png", b""), ("metadata.jsonl", b"{")]);
        assert!(message.contains("metadata.jsonl") && message.contains("line 1"), "{message}");
        assert!(error(&[("a.md", b"")]).contains("no pictures or films"));
    }
}
