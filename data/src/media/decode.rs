//! Pictures and animations out of their formats.

use std::io::Cursor;

use image::codecs::gif::GifDecoder;
use image::codecs::png::PngDecoder;
use image::codecs::webp::WebPDecoder;
use image::metadata::Orientation;
use image::{AnimationDecoder, ColorType, DynamicImage, Frame, ImageDecoder, ImageFormat, ImageReader};

use super::film::{Any, Length, See};
use super::picture::check_size;
use super::{Picture, ReadOptions};

/// Most frames that are counted: an hour at 30 a second.
const MOST_FRAMES: usize = 108_000;

/// A picture; of an animation its first frame.
pub(super) fn picture(bytes: &[u8], options: &ReadOptions) -> Any<Picture> {
    let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
    let mut decoder = reader.into_decoder()?;
    check_size(decoder.dimensions())?;
    let orientation = if options.orientation { decoder.orientation()? } else { Orientation::NoTransforms };
    let clipped = options.clip_grey16 && decoder.color_type() == ColorType::L16;
    let mut image = DynamicImage::from_decoder(decoder)?;
    image.apply_orientation(orientation);
    let (width, height) = (image.width() as usize, image.height() as usize);
    let rgb = if clipped {
        let grey = image.into_luma16().into_raw();
        grey.into_iter().flat_map(|value| [value.min(255) as u8; 3]).collect()
    } else {
        // Depths of 16 bits keep their upper half, as in Pillow.
        let image = match image {
            DynamicImage::ImageRgb16(deep) => DynamicImage::ImageRgb8(upper(deep)),
            DynamicImage::ImageRgba16(deep) => DynamicImage::ImageRgba8(upper(deep)),
            DynamicImage::ImageLuma16(deep) => DynamicImage::ImageLuma8(upper(deep)),
            DynamicImage::ImageLumaA16(deep) => DynamicImage::ImageLumaA8(upper(deep)),
            other => other,
        };
        match options.background {
            Some(background) if image.color().has_alpha() => over(&image.into_rgba8().into_raw(), background),
            _ => image.into_rgb8().into_raw(),
        }
    };
    Ok(Picture { width, height, rgb })
}

/// The upper halves of 16 bits.
fn upper<P, Q>(deep: image::ImageBuffer<P, Vec<u16>>) -> image::ImageBuffer<Q, Vec<u8>>
where
    P: image::Pixel<Subpixel = u16>,
    Q: image::Pixel<Subpixel = u8>,
{
    let (width, height) = deep.dimensions();
    let mut values = deep.into_raw().into_iter().map(|value| (value >> 8) as u8);
    let mut out = image::ImageBuffer::new(width, height);
    out.iter_mut().zip(&mut values).for_each(|(to, value): (&mut u8, u8)| *to = value);
    out
}

/// Pixels with alpha over a colour, as Pillow pastes them.
fn over(rgba: &[u8], background: [u8; 3]) -> Vec<u8> {
    let mixed = |value: u8, behind: u8, alpha: u8| {
        let sum = u32::from(value) * u32::from(alpha) + u32::from(behind) * u32::from(255 - alpha) + 128;
        (((sum >> 8) + sum) >> 8) as u8
    };
    let pixel = |p: &[u8; 4]| std::array::from_fn::<u8, 3, _>(|i| mixed(p[i], background[i], p[3]));
    rgba.as_chunks::<4>().0.iter().flat_map(pixel).collect()
}

/// The frames of an animation, each whole.
pub(super) fn animation(bytes: &[u8], options: &ReadOptions, see: &mut See<'_>) -> Any<Option<Length>> {
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
