//! Pictures as people have them, and what is written beside them.
//!
//! | file | what it holds |
//! |---|---|
//! | `picture` | [`Picture`] and how files are read: formats, orientation, alpha, depth |
//! | `film`, `mp4`, `ffmpeg` | frames of films |
//! | `sound` | the sound of films, and sound to files |
//! | `resample` | resizing, bit for bit as Pillow's |
//! | `interpolate` | resizing as OpenCV's, for frames |
//! | `crop` | a picture at a bucket's size, as NeMo makes it |
//! | `processor`, `condition` | pictures as vision encoders take them, and as pipelines go by them |
//! | `captions` | captions beside pictures, and in a folder's metadata |
//! | `folder` | a folder of pictures as a list |
//! | `write` | pictures to files, with what made them |

mod captions;
mod condition;
mod crop;
mod ffmpeg;
mod film;
mod folder;
mod interpolate;
mod mp4;
mod picture;
mod processor;
mod resample;
mod sound;
mod write;

pub use captions::MissingCaptions;
pub use condition::{ConditionProcessor, EditAreas, condition_image, sides_of_area, sides_of_patches};
pub use crop::{Cropped, ResizeMode, center_crop, resize_and_crop, resize_and_crop_frame, resize_to};
pub use film::{evenly, is_film, read_film, read_film_at};
pub use folder::{FolderOptions, PictureItem, list_pictures};
pub use interpolate::{Interpolation, interpolate};
pub use picture::{Picture, ReadOptions, is_picture, read_picture};
pub use processor::{CLIPImageProcessor, PREPROCESSOR_CONFIG, Qwen2VLImageProcessor, SiglipImageProcessor, normalised};
pub use resample::{Filter, resize};
pub use sound::{SoundFormat, read_sound, resampled, sound_beside, write_wav};
pub use write::{grid, read_png_texts, write_film, write_png};
