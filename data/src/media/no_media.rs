//! In the place of `decode` and `mp4` where a program leaves out the formats of pictures and films.

use super::film::{Any, Length, See};
use super::{Picture, ReadOptions};

const LEFT_OUT: &str = "this program reads no pictures and films: it was built without the feature `media`";

pub(super) fn picture(_: &[u8], _: &ReadOptions) -> Any<Picture> {
    Err(LEFT_OUT.into())
}

pub(super) fn animation(_: &[u8], _: &ReadOptions, _: &mut See<'_>) -> Any<Option<Length>> {
    Err(LEFT_OUT.into())
}

pub(super) fn walk(_: &[u8], _: bool, _: &mut See<'_>) -> Any<(usize, Option<f64>)> {
    Err(LEFT_OUT.into())
}
