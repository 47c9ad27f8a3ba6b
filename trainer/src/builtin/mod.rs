//! Data that comes with the trainer, and what is shown and told of a run on it.

pub mod digits;
pub mod moving_digits;
pub mod pictures;
mod word_table;

use std::sync::Arc;

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
    if let Some(folder) = &config.folder {
        return folder.data(config.num_workers, device);
    }
    let text = WordTable::new(&digits::CAPTIONS, config.text_dim);
    Ok(match (config.builtin, config.video) {
        (Some(SourceName::MovingDigits), Some(size)) => {
            Data::of_pixels(Arc::new(moving_digits::MovingDigits::new(size)?), text)
        }
        _ => Data::of_pixels(Arc::new(digits::Digits::load()?), text),
    })
}

/// What a recipe's grids show.
///
/// # Errors
/// When the embedded samples are damaged.
pub fn preview(recipe: &Recipe) -> Result<Preview> {
    match &recipe.data.folder {
        Some(folder) => folder.preview(recipe),
        None => Ok(digits::preview(recipe)?),
    }
}

/// What judges the samples of a finished run, where the recipe asks for it.
///
/// # Errors
/// When the embedded samples are damaged.
pub fn report(recipe: &Recipe) -> Result<Option<Box<dyn Hook>>> {
    let Some(config) = &recipe.report else { return Ok(None) };
    Ok(Some(match &recipe.data.folder {
        Some(folder) => Box::new(pictures::PictureReport::new(folder, config)),
        None => Box::new(digits::DigitsReport::new(recipe, config)?),
    }))
}
