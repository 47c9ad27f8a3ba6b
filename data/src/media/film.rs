//! Films: animated GIF, PNG and WebP, MP4 with H.264, folders of frames, and what else ffmpeg reads.

use std::io::Cursor;
use std::path::{Path, PathBuf};

use image::codecs::gif::GifDecoder;
use image::codecs::png::PngDecoder;
use image::codecs::webp::WebPDecoder;
use image::{AnimationDecoder, Frame, ImageDecoder, ImageFormat, ImageReader};

use super::captions::entries;
use super::picture::{check_size, over};
use super::{Picture, ReadOptions, ffmpeg, is_picture, mp4, read_picture};
use crate::{Error, Result};

/// Most frames that are counted: an hour at 30 a second.
const MOST_FRAMES: usize = 108_000;
/// Endings of the names of films that are nothing else.
const ENDINGS: [&str; 6] = ["mp4", "m4v", "mov", "webm", "mkv", "avi"];

pub(super) type Any<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Whether a file's name is that of a film. Animated GIF, PNG and WebP have names of pictures.
pub fn is_film(path: &Path) -> bool {
    let ending = path.extension().and_then(|ending| ending.to_str()).map(str::to_ascii_lowercase);
    ending.is_some_and(|ending| ENDINGS.contains(&&*ending))
}

/// Which of `count` frames are taken so that there are `frames`, evenly from the first to the last: NeMo's `linspace`, cut off.
pub fn evenly(count: usize, frames: usize) -> Vec<usize> {
    let gap = count.saturating_sub(1) as f64 / frames.saturating_sub(1).max(1) as f64;
    (0..frames).map(|i| (i as f64 * gap) as usize).collect()
}

/// Which of a film's frames are the nearest to the moments 0, 1 / `fps`, 2 / `fps`, .., so that there are `frames`: NeMo's, for films with
/// sound. A film that does not say how long it takes has a frame for each moment.
///
/// # Errors
/// When it is too short: the error says by how much.
fn at_rate(length: Length, frames: usize, fps: f64) -> Any<Vec<usize>> {
    let per_second = length.seconds.map_or(fps, |seconds| length.frames as f64 / seconds.max(f64::MIN_POSITIVE));
    let (has, needs) = (length.frames as f64 / per_second, frames as f64 / fps);
    // Times of files are rounded.
    if has + 0.5 / fps < needs {
        return Err(format!("{has:.2} seconds long, of which {frames} frames at {fps} a second take {needs:.2}").into());
    }
    let nearest = |i: usize| (i as f64 * per_second / fps).round_ties_even() as usize;
    Ok((0..frames).map(|i| nearest(i).min(length.frames - 1)).collect())
}

/// How long a film is.
#[derive(Clone, Copy, Debug)]
struct Length {
    frames: usize,
    /// Where the film says it.
    seconds: Option<f64>,
}

/// Who looks at a film: which frames are wanted, and what becomes of them.
pub(super) struct See<'a> {
    wanted: &'a [usize],
    taken: &'a mut Vec<Picture>,
}

impl See<'_> {
    pub fn wants(&self, index: usize) -> bool {
        self.wanted.contains(&index)
    }

    /// Frames come in order.
    pub fn show(&mut self, index: usize, picture: Picture) -> Any<()> {
        let times = self.wanted.iter().filter(|wanted| **wanted == index).count();
        self.taken.extend(std::iter::repeat_n(picture, times));
        Ok(())
    }
}

/// Reads `frames` frames of a film, evenly from the first to the last; a folder's are the pictures in it, by name. What does not
/// move has one, which is repeated. What is not read here goes through ffmpeg, where that is asked for.
///
/// # Errors
/// When it can't be read, has no frames, or claims more pixels than memory should hold; the error names the file.
pub fn read_film(path: &Path, frames: usize, options: &ReadOptions, with_ffmpeg: bool) -> Result<Vec<Picture>> {
    read(path, frames, None, options, with_ffmpeg)
}

/// The same with frames from the first on, at `fps` a second, as films with sound are taken.
///
/// # Errors
/// As above, and when the film is too short.
pub fn read_film_at(
    path: &Path,
    frames: usize,
    fps: f64,
    options: &ReadOptions,
    with_ffmpeg: bool,
) -> Result<Vec<Picture>> {
    read(path, frames, Some(fps), options, with_ffmpeg)
}

fn read(
    path: &Path,
    frames: usize,
    fps: Option<f64>,
    options: &ReadOptions,
    with_ffmpeg: bool,
) -> Result<Vec<Picture>> {
    let named = |source| Error::Sample { sample: path.display().to_string(), source };
    let film = Film::open(path, fps, options, with_ffmpeg).map_err(named)?;
    let walk = |wanted: &[usize]| -> Any<(Option<Length>, Vec<Picture>)> {
        let mut taken = Vec::new();
        let length = film.walk(&mut See { wanted, taken: &mut taken })?;
        Ok((length, taken))
    };
    // Counted first: frames that are not taken are never held together.
    let Some(length) = walk(&[]).map_err(named)?.0 else {
        let still = read_picture(path, options)?;
        return Ok(vec![still; frames]);
    };
    if length.frames == 0 {
        return Err(named("a film without frames".into()));
    }
    let wanted = fps.map_or_else(|| Ok(evenly(length.frames, frames)), |fps| at_rate(length, frames, fps));
    let taken = wanted.and_then(|wanted| walk(&wanted)).map_err(named)?.1;
    if taken.len() != frames {
        return Err(named(format!("{} of {frames} frames could be read", taken.len()).into()));
    }
    Ok(taken)
}

/// Where frames come from.
struct Film<'a> {
    path: &'a Path,
    /// Frames a second that ffmpeg is asked for; else those of the film.
    fps: Option<f64>,
    options: &'a ReadOptions,
    held: Held,
}

enum Held {
    Animation(Vec<u8>),
    Mp4(Vec<u8>),
    Frames(Vec<PathBuf>),
    Ffmpeg,
}

impl<'a> Film<'a> {
    fn open(path: &'a Path, fps: Option<f64>, options: &'a ReadOptions, with_ffmpeg: bool) -> Any<Self> {
        let of = |held| Self { path, fps, options, held };
        if path.is_dir() {
            let frames = entries(path)?.into_iter().filter(|file| is_picture(file)).collect();
            return Ok(of(Held::Frames(frames)));
        }
        let bytes = std::fs::read(path)?;
        if bytes.is_empty() {
            return Err("the file is empty".into());
        }
        if mp4::is_mp4(&bytes) {
            let film = of(Held::Mp4(bytes));
            // What it is made of shows at the first frame.
            let unreadable = || film.walk(&mut See { wanted: &[0], taken: &mut Vec::new() }).is_err();
            return Ok(if with_ffmpeg && unreadable() { of(Held::Ffmpeg) } else { film });
        }
        if is_film(path) {
            let advice =
                "ask for --ffmpeg, or make it an MP4 with H.264: ffmpeg -i FILM -c:v libx264 -pix_fmt yuv420p NEW.mp4";
            return if with_ffmpeg { Ok(of(Held::Ffmpeg)) } else { Err(format!("not an MP4: {advice}").into()) };
        }
        Ok(of(Held::Animation(bytes)))
    }

    /// Shows the frames that are wanted, and gives how many there are; nothing for what does not move.
    fn walk(&self, see: &mut See<'_>) -> Any<Option<Length>> {
        let untimed = |frames| Length { frames, seconds: None };
        match &self.held {
            Held::Animation(bytes) => animation(bytes, self.options, see),
            Held::Mp4(bytes) => {
                let (frames, seconds) = mp4::walk(bytes, self.options.orientation, see)?;
                Ok(Some(Length { frames, seconds }))
            }
            Held::Ffmpeg => Ok(Some(untimed(ffmpeg::walk(self.path, self.fps, see)?))),
            Held::Frames(frames) => {
                for (i, path) in frames.iter().enumerate().filter(|(i, _)| see.wanted.contains(i)) {
                    let picture = read_picture(path, self.options)?;
                    let other = see
                        .taken
                        .first()
                        .filter(|first| [first.width, first.height] != [picture.width, picture.height]);
                    if let Some(Picture { width, height, .. }) = other {
                        let name = path.display();
                        let [w, h] = [picture.width, picture.height];
                        return Err(
                            format!("{name}: {w} x {h} pixels, where the first frame has {width} x {height}").into()
                        );
                    }
                    see.show(i, picture)?;
                }
                Ok(Some(untimed(frames.len())))
            }
        }
    }
}

/// The frames of an animation, each whole.
fn animation(bytes: &[u8], options: &ReadOptions, see: &mut See<'_>) -> Any<Option<Length>> {
    let format = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?.format();
    let frames = match format {
        Some(ImageFormat::Gif) => {
            let decoder = GifDecoder::new(Cursor::new(bytes))?;
            check_size(decoder.dimensions())?;
            decoder.into_frames()
        }
        Some(ImageFormat::Png) => {
            let decoder = PngDecoder::new(Cursor::new(bytes))?;
            check_size(decoder.dimensions())?;
            if !decoder.is_apng()? {
                return Ok(None);
            }
            decoder.apng()?.into_frames()
        }
        Some(ImageFormat::WebP) => {
            let decoder = WebPDecoder::new(Cursor::new(bytes))?;
            check_size(decoder.dimensions())?;
            if !decoder.has_animation() {
                return Ok(None);
            }
            decoder.into_frames()
        }
        _ => return Ok(None),
    };
    let (mut count, mut seconds) = (0, 0.0);
    for frame in frames {
        let frame = frame?;
        let (milliseconds, parts) = frame.delay().numer_denom_ms();
        seconds += f64::from(milliseconds) / f64::from(parts.max(1)) / 1000.0;
        if see.wants(count) {
            see.show(count, flat(&frame, options))?;
        }
        count += 1;
        if count > MOST_FRAMES {
            return Err(format!("more than {MOST_FRAMES} frames").into());
        }
    }
    Ok(Some(Length { frames: count, seconds: (seconds > 0.0).then_some(seconds) }))
}

/// A frame without transparency.
fn flat(frame: &Frame, options: &ReadOptions) -> Picture {
    let (width, height) = frame.buffer().dimensions();
    let rgba = frame.buffer().as_raw();
    let rgb = match options.background {
        Some(background) => over(rgba, background),
        None => rgba.as_chunks::<4>().0.iter().flat_map(|p| [p[0], p[1], p[2]]).collect(),
    };
    Picture { width: width as usize, height: height as usize, rgb }
}
