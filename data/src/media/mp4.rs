//! Films in MP4 and QuickTime files, of H.264: what phones, cameras and editors write.

use h264_reader::nal::sps::SeqParameterSet;
use h264_reader::nal::{Nal, RefNal};
use image::RgbImage;
use image::imageops::{rotate90, rotate180, rotate270};
use re_mp4::{Mp4, StsdBoxContent, Track, TrackKind};
use rusty_h264_decoder::Decoder;

use super::Picture;
use super::film::{Any, See};
use super::picture::check_size;

/// What ffmpeg makes of a film that is of another kind.
const ADVICE: &str =
    "ask for --ffmpeg, or make it one: ffmpeg -i FILM -c:v libx264 -pix_fmt yuv420p -vf yadif=deint=1 NEW.mp4";
/// What stands before a unit of the stream that the decoder takes.
const START: [u8; 4] = [0, 0, 0, 1];
/// The kind of a unit from which decoding can begin: a slice that refers to nothing before it.
const IDR: u8 = 5;

/// Shows the frames that are wanted, in the order in which they are seen, and gives how many there are and how many seconds they
/// take. Parts of the film that hold none of them are not decoded, and what is decoded together lies between two frames from which
/// decoding can begin.
pub(super) fn walk(bytes: &[u8], upright: bool, see: &mut See<'_>) -> Any<(usize, Option<f64>)> {
    let mp4 = Mp4::read_bytes(bytes).map_err(|error| format!("not a whole MP4 file: {error}"))?;
    let track = mp4.tracks().values().find(|track| track.kind == Some(TrackKind::Video) && !track.samples.is_empty());
    let Some(track) = track else { return Ok((0, None)) };
    let trak = mp4
        .moov
        .traks
        .iter()
        .find(|trak| trak.tkhd.track_id == track.track_id)
        .ok_or("a track without a description")?;
    let StsdBoxContent::Avc1(description) = &trak.mdia.minf.stbl.stsd.contents else {
        let codec = trak.mdia.minf.stbl.stsd.contents.codec_string().unwrap_or_else(|| "unknown".into());
        return Err(format!("its codec is {codec}, and H.264 (avc1) alone is read: {ADVICE}").into());
    };
    check_size((track.width.into(), track.height.into()))?;
    let config = &description.avcc;
    let parameters = config.sequence_parameter_sets.iter().chain(&config.picture_parameter_sets);
    let parameters: Vec<u8> = parameters.flat_map(|unit| START.iter().chain(&unit.bytes)).copied().collect();
    let colours = config.sequence_parameter_sets.first().map_or_else(Colours::default, |unit| Colours::of(&unit.bytes));
    let turn = if upright { turn(trak.tkhd.matrix.a, trak.tkhd.matrix.b) } else { 0 };
    let samples = Samples { bytes, track, length: usize::from(config.length_size_minus_one) + 1 };
    let mut starts = Vec::new();
    for i in 0..track.samples.len() {
        if i == 0 || samples.units(i)?.iter().any(|unit| unit.first().is_some_and(|first| first & 31 == IDR)) {
            starts.push(i);
        }
    }
    starts.push(track.samples.len());
    for part in starts.windows(2) {
        let (from, to) = (part[0], part[1]);
        if !(from..to).any(|i| see.wants(i)) {
            continue;
        }
        let mut stream = parameters.clone();
        for i in from..to {
            samples.units(i)?.iter().for_each(|unit| stream.extend(START.iter().chain(*unit)));
        }
        let decoded = Decoder::new().decode_stream(&stream);
        let decoded =
            decoded.map_err(|error| format!("its frames from {from} on can't be decoded ({error:?}): {ADVICE}"))?;
        if decoded.len() != to - from {
            return Err(format!("{} of its frames {from} to {to} can be decoded", decoded.len()).into());
        }
        for (i, frame) in (from..to).zip(decoded) {
            if see.wants(i) {
                check_size((u32::try_from(frame.width)?, u32::try_from(frame.height)?))?;
                see.show(
                    i,
                    turned(colours.picture(&frame.y, [&frame.u, &frame.v], frame.width, frame.height)?, turn)?,
                )?;
            }
        }
    }
    let units: u64 = track.samples.iter().map(|sample| sample.duration).fold(0, u64::saturating_add);
    let seconds = (units > 0 && track.timescale > 0).then(|| units as f64 / track.timescale as f64);
    Ok((track.samples.len(), seconds))
}

/// The coded pictures of a track, in the order of decoding.
struct Samples<'a> {
    bytes: &'a [u8],
    track: &'a Track,
    /// Bytes of the length before each unit.
    length: usize,
}

impl<'a> Samples<'a> {
    /// The units of a picture.
    fn units(&self, index: usize) -> Any<Vec<&'a [u8]>> {
        let sample = self.track.samples[index];
        let end = sample.offset.checked_add(sample.size).ok_or("a sample beyond all files")?;
        let (from, to) = (usize::try_from(sample.offset)?, usize::try_from(end)?);
        let mut rest =
            self.bytes.get(from..to).ok_or_else(|| format!("cut short: frame {index} lies beyond its end"))?;
        let mut units = Vec::new();
        while !rest.is_empty() {
            let (length, behind) = rest.split_at_checked(self.length).ok_or("a damaged frame")?;
            let length = length.iter().fold(0usize, |length, byte| length << 8 | usize::from(*byte));
            let (unit, behind) = behind.split_at_checked(length).ok_or("a damaged frame")?;
            units.push(unit);
            rest = behind;
        }
        Ok(units)
    }
}

/// Quarter turns to the right that a track's matrix asks for, as phones write it.
fn turn(a: i32, b: i32) -> u8 {
    match (a.signum(), b.signum()) {
        (0, 1) => 1,
        (-1, 0) => 2,
        (0, -1) => 3,
        _ => 0,
    }
}

fn turned(picture: Picture, quarters: u8) -> Any<Picture> {
    if quarters == 0 {
        return Ok(picture);
    }
    let (width, height) = (u32::try_from(picture.width)?, u32::try_from(picture.height)?);
    let image = RgbImage::from_raw(width, height, picture.rgb).ok_or("a frame of another size")?;
    let image = match quarters {
        1 => rotate90(&image),
        2 => rotate180(&image),
        _ => rotate270(&image),
    };
    let (width, height) = (image.width() as usize, image.height() as usize);
    Ok(Picture { width, height, rgb: image.into_raw() })
}

/// How brightness and differences of colour become red, green and blue.
struct Colours {
    /// The shares of red and blue in brightness.
    shares: [f32; 2],
    /// Whether levels go from 0 to 255, not from 16 to 235 (240 for colours).
    full: bool,
}

impl Default for Colours {
    /// What ffmpeg takes where nothing is said: ITU-R BT.601.
    fn default() -> Self {
        Self { shares: [0.299, 0.114], full: false }
    }
}

impl Colours {
    /// As the stream's parameters say.
    fn of(parameters: &[u8]) -> Self {
        let parsed = SeqParameterSet::from_bits(RefNal::new(parameters, &[], true).rbsp_bits());
        let signal = parsed.ok().and_then(|parsed| parsed.vui_parameters?.video_signal_type);
        let Some(signal) = signal else { return Self::default() };
        let shares = match signal.colour_description.map(|colours| colours.matrix_coefficients) {
            Some(1) => [0.2126, 0.0722],
            Some(9 | 10) => [0.2627, 0.0593],
            _ => Self::default().shares,
        };
        Self { shares, full: signal.video_full_range_flag }
    }

    /// A picture of planes whose colours have half the sides.
    fn picture(&self, brightness: &[u8], colours: [&[u8]; 2], width: usize, height: usize) -> Any<Picture> {
        let across = width.div_ceil(2);
        if brightness.len() < width * height || colours.iter().any(|plane| plane.len() < across * height.div_ceil(2)) {
            return Err("a frame that is not whole".into());
        }
        let [red, blue] = self.shares;
        let (black, range, colour_range) = if self.full { (0.0, 255.0, 255.0) } else { (16.0, 219.0, 224.0) };
        let mut rgb = Vec::with_capacity(width * height * 3);
        for y in 0..height {
            for x in 0..width {
                let at = y / 2 * across + x / 2;
                let [cb, cr] = colours.map(|plane| (f32::from(plane[at]) - 128.0) * 255.0 / colour_range);
                let level = (f32::from(brightness[y * width + x]) - black) * 255.0 / range;
                let (r, b) = (level + 2.0 * (1.0 - red) * cr, level + 2.0 * (1.0 - blue) * cb);
                let g = (level - red * r - blue * b) / (1.0 - red - blue);
                rgb.extend([r, g, b].map(|value| value.round().clamp(0.0, 255.0) as u8));
            }
        }
        Ok(Picture { width, height, rgb })
    }
}
