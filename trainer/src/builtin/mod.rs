//! Data that comes with the trainer, and what is shown and told of a run on it.

pub mod digits;
pub mod moving_digits;
pub mod pictures;
mod word_table;

use std::path::Path;
use std::sync::Arc;

use flowtape_data::Chain;
use flowtape_engine::Device;

use crate::data::Data;
use crate::hooks::{Hook, Preview};
use crate::recipe::{DataConfig, SourceName};
use crate::{Recipe, Result};

pub use word_table::WordTable;

/// The data of a recipe. What encodes it runs on the device.
///
/// # Errors
/// When the embedded samples are damaged, or a folder's can't be encoded.
pub fn data(config: &DataConfig, device: &Device) -> Result<Data> {
    let data = once(config, device)?;
    if config.repeats == 1 {
        return Ok(data);
    }
    Ok(Data { source: Arc::new(Chain::new(vec![(data.source, config.repeats)])), ..data })
}

/// The same before it is repeated.
fn once(config: &DataConfig, device: &Device) -> Result<Data> {
    if let Some(folder) = &config.folder {
        return folder.data(config.num_workers, device);
    }
    if let Some(cache) = &config.cache_dir {
        return pictures::cached(&[(cache, 1)], config.pipeline.as_deref(), device);
    }
    if !config.caches.is_empty() {
        let caches: Vec<(&Path, usize)> = config.caches.iter().map(|cache| (&*cache.path, cache.repeats)).collect();
        return pictures::cached(&caches, config.pipeline.as_deref(), device);
    }
    let text = WordTable::new(&digits::CAPTIONS, config.text_dim);
    Ok(match (config.builtin, config.video) {
        (Some(SourceName::MovingDigits), Some(size)) => {
            Data::of_pixels(Arc::new(moving_digits::MovingDigits::new(size)?), text)
        }
        _ => {
            let all = digits::Digits::load()?;
            let chosen = config.classes.as_ref().map_or(all.clone(), |classes| all.of_classes(classes));
            Data::of_pixels(Arc::new(chosen), text)
        }
    })
}

/// What a recipe's grids show.
///
/// # Errors
/// When the embedded samples are damaged.
pub fn preview(recipe: &Recipe) -> Result<Preview> {
    match (&recipe.data.folder, &recipe.data.builtin) {
        (Some(folder), _) => folder.preview(recipe),
        (None, Some(_)) => Ok(digits::preview(recipe)?),
        (None, None) => Ok(pictures::preview_of(recipe, recipe.sampling.prompts.clone())),
    }
}

/// What judges the samples of a finished run, where the recipe asks for it.
///
/// # Errors
/// When the embedded samples are damaged.
pub fn report(recipe: &Recipe) -> Result<Option<Box<dyn Hook>>> {
    let Some(config) = &recipe.report else { return Ok(None) };
    Ok(match (&recipe.data.folder, &recipe.data.builtin) {
        (Some(folder), _) => Some(Box::new(pictures::PictureReport::new(folder, config))),
        (None, Some(_)) => Some(Box::new(digits::DigitsReport::new(recipe, config)?)),
        // Of a cache the pictures are not at hand.
        (None, None) => None,
    })
}
