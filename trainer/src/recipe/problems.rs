//! What is wrong with a recipe, and where.

use std::fmt;
use std::sync::Arc;

use strsim::jaro;

/// Where something of a recipe stands.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum Place {
    /// In the file, both from 1.
    File {
        /// The line.
        line: usize,
        /// The column, in characters.
        column: usize,
    },
    /// In a setting of the command line, such as `optimizer.lr=fast`.
    Setting(Arc<str>),
    /// In neither: it was left out, or a program gave it.
    #[default]
    Nowhere,
}

/// One thing that is wrong with a recipe.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    /// Where.
    pub place: Place,
    /// What, with its key, what is expected and what is there.
    pub what: String,
}

impl Problem {
    /// Something wrong at a place.
    pub fn new(place: &Place, what: impl Into<String>) -> Self {
        Self { place: place.clone(), what: what.into() }
    }

    /// The line of an error about a file.
    pub(crate) fn line(&self, file: &dyn fmt::Display) -> String {
        match &self.place {
            Place::File { line, column } => format!("{file}:{line}:{column}: {}", self.what),
            Place::Setting(setting) => format!("--set {setting}: {}", self.what),
            Place::Nowhere => format!("{file}: {}", self.what),
        }
    }
}

/// `; did you mean ..?`, or what there is where no name is like the wrong one.
pub fn suggestion<'a>(wrong: &str, known: impl Iterator<Item = &'a str>) -> String {
    let known: Vec<&str> = known.collect();
    let likeness = |name: &str| jaro(&wrong.to_lowercase(), &name.to_lowercase());
    let nearest = known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    match nearest.filter(|name| likeness(name) > 0.7) {
        Some(name) => format!("; did you mean `{name}`?"),
        None if known.is_empty() => "; there are no keys here".into(),
        None => format!("; there is {}", known.join(", ")),
    }
}
