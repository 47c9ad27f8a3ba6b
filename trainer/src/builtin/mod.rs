//! Data that comes with the trainer, and what is shown and told of a run on it.

pub mod digits;
pub mod moving_digits;
mod word_table;

use std::sync::Arc;

use crate::data::Data;
use crate::hooks::{Hook, Preview};
use crate::recipe::{DataConfig, SourceName};
use crate::{Recipe, Result};

pub use word_table::WordTable;

/// The data of a recipe.
///
/// # Errors
/// When the embedded samples are damaged.
pub fn data(config: &DataConfig) -> Result<Data> {
    let text = WordTable::new(&digits::CAPTIONS, config.text_dim);
    Ok(match (config.builtin, config.video) {
        (SourceName::MovingDigits, Some(size)) => {
            Data::of_pixels(Arc::new(moving_digits::MovingDigits::new(size)?), text)
        }
        (SourceName::Digits | SourceName::MovingDigits, _) => {
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
    Ok(digits::preview(recipe)?)
}

/// What judges the samples of a finished run, where the recipe asks for it.
///
/// # Errors
/// When the embedded samples are damaged.
pub fn report(recipe: &Recipe) -> Result<Option<Box<dyn Hook>>> {
    let Some(config) = &recipe.report else { return Ok(None) };
    Ok(Some(Box::new(digits::DigitsReport::new(recipe, config)?)))
}
