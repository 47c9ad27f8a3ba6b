//! Films and sound, to files and back.
#![allow(clippy::unwrap_used)] // a test

use std::path::Path;

use flowtape_data::media::{
    FolderOptions, Picture, ReadOptions, SoundFormat, evenly, list_pictures, read_film, read_film_at, read_picture,
    read_png_texts, read_sound, resampled, write_film, write_wav,
};
use flowtape_engine::{Device, Tensor};
use image::Frame;

#[test]
fn frames_are_taken_evenly() {
    assert_eq!(evenly(7, 3), [0, 3, 6]);
    assert_eq!(evenly(10, 4), [0, 3, 6, 9]);
    assert_eq!(evenly(2, 5), [0, 0, 0, 0, 1]);
    assert_eq!(evenly(5, 1), [0]);
}

#[test]
fn animations_are_read_frame_by_frame_and_stills_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let frame = |level: u8| Picture { width: 2, height: 3, rgb: vec![level; 18] };
    let film: Vec<Picture> = (0..7).map(|i| frame(i * 30)).collect();
    let path = folder.path().join("film.png");
    write_film(&path, &film, 8.0, &[]).unwrap();
    let read = |path: &Path| read_film(path, 3, &ReadOptions::default(), false);
    assert_eq!(read(&path).unwrap(), [frame(0), frame(90), frame(180)]);
    let gif = folder.path().join("film.gif");
    let mut encoder = image::codecs::gif::GifEncoder::new(std::fs::File::create(&gif).unwrap());
    for level in [0u8, 128, 255] {
        let buffer = image::RgbaImage::from_pixel(4, 2, image::Rgba([level, level, level, 255]));
        encoder.encode_frame(Frame::new(buffer)).unwrap();
    }
    drop(encoder);
    let levels: Vec<u8> = read(&gif).unwrap().iter().map(|frame| frame.rgb[0]).collect();
    assert_eq!(levels, [0, 128, 255]);
    let still = folder.path().join("still.png");
    write_film(&still, &film[2..3], 8.0, &[]).unwrap();
    assert_eq!(read(&still).unwrap(), vec![frame(60); 3]);
    let broken = folder.path().join("broken.gif");
    std::fs::write(&broken, b"GIF89a").unwrap();
    assert!(read(&broken).unwrap_err().to_string().contains("broken.gif"));
}

/// An error with its causes.
fn told(error: &dyn std::error::Error) -> String {
    error.source().map_or(error.to_string(), |source| format!("{error}: {}", told(source)))
}

fn clips() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clips")
}

/// The largest difference of the frames 0, 11 and 23 from those that ffmpeg made of a clip (`clips/make.sh`), after three decoded
/// parts with frames that refer forward and back.
fn off(name: &str) -> (usize, usize, u8) {
    let frames = read_film(&clips().join(format!("{name}.mp4")), 3, &ReadOptions::default(), false).unwrap();
    let mut most = 0;
    for (i, frame) in frames.iter().enumerate() {
        let want = read_picture(&clips().join(format!("{name}-{}.png", i + 1)), &ReadOptions::default()).unwrap();
        assert_eq!((frame.width, frame.height), (want.width, want.height), "{name}");
        most = frame.rgb.iter().zip(&want.rgb).map(|(a, b)| a.abs_diff(*b)).max().unwrap().max(most);
    }
    (frames[0].width, frames[0].height, most)
}

#[test]
fn frames_of_h264_are_those_of_ffmpeg() {
    // ffmpeg computes with integers of some more bits than eight.
    let (width, height, most) = off("clip");
    assert!((width, height) == (96, 64) && most <= 2, "{width} x {height}, {most}");
    // As a phone writes what it films upright.
    let (width, height, most) = off("turned");
    assert!((width, height) == (64, 96) && most <= 2, "{width} x {height}, {most}");
    let more = read_film(&clips().join("clip.mp4"), 24, &ReadOptions::default(), false).unwrap();
    assert!(more.windows(2).all(|pair| pair[0] != pair[1]));
}

#[test]
fn films_that_are_not_read_are_told_and_ffmpeg_reads_them() {
    let folder = tempfile::tempdir().unwrap();
    let hevc = clips().join("hevc.mp4");
    let read = |path: &Path, ffmpeg| read_film(path, 3, &ReadOptions::default(), ffmpeg);
    let error = told(&read(&hevc, false).unwrap_err());
    assert!(["hevc.mp4", "hev1", "H.264", "--ffmpeg", "libx264"].iter().all(|part| error.contains(part)), "{error}");
    let bytes = std::fs::read(clips().join("clip.mp4")).unwrap();
    let cut = folder.path().join("cut.mp4");
    for length in [9, 100, bytes.len() / 2] {
        std::fs::write(&cut, &bytes[..length]).unwrap();
        assert!(told(&read(&cut, false).unwrap_err()).contains("cut.mp4"));
    }
    let other = folder.path().join("film.webm");
    std::fs::write(&other, b"\x1a\x45\xdf\xa3").unwrap();
    assert!(told(&read(&other, false).unwrap_err()).contains("--ffmpeg"));
    if std::process::Command::new("ffmpeg").arg("-version").output().is_err() {
        assert!(told(&read(&hevc, true).unwrap_err()).contains("ffmpeg can't be started"));
        println!("skipped: no ffmpeg on the PATH");
        return;
    }
    let frames = read(&hevc, true).unwrap();
    assert!(frames.len() == 3 && frames[0].width == 96 && frames[0] != frames[2]);
    // What is read here is the same with ffmpeg allowed.
    let clip = clips().join("clip.mp4");
    assert_eq!(read(&clip, true).unwrap(), read(&clip, false).unwrap());
    assert!(told(&read(&other, true).unwrap_err()).contains("film.webm"));
}

/// Files that strangers wrote, or a disk damaged: an error or frames, never a panic.
#[test]
fn damaged_films_are_errors_or_films() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("film.mp4");
    let bytes = std::fs::read(clips().join("clip.mp4")).unwrap();
    let mut random = flowtape_engine::Philox::new(1);
    let mut below = |n: usize| (random.next_f64() * n as f64) as usize;
    let mut read = 0;
    for _ in 0..400 {
        let mut changed = bytes.clone();
        for _ in 0..=below(6) {
            let at = below(changed.len());
            changed[at] = below(256) as u8;
        }
        std::fs::write(&path, &changed).unwrap();
        read += usize::from(read_film(&path, 2, &ReadOptions::default(), false).is_ok());
    }
    assert!((100..400).contains(&read), "{read} of 400 still read");
}

#[test]
fn a_folder_with_a_caption_is_a_film_of_its_pictures() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    std::fs::create_dir(&run).unwrap();
    let frame = |level: u8| Picture { width: 2, height: 3, rgb: vec![level; 18] };
    for i in 0..5u8 {
        write_film(&run.join(format!("{i:03}.png")), &[frame(i * 10)], 1.0, &[]).unwrap();
    }
    std::fs::write(folder.path().join("run.txt"), "a man runs").unwrap();
    std::fs::copy(clips().join("clip.mp4"), folder.path().join("clip.mp4")).unwrap();
    std::fs::write(folder.path().join("clip.txt"), "a test").unwrap();
    let items = list_pictures(folder.path(), &FolderOptions::default()).unwrap();
    let found: Vec<(&str, &str)> = items.iter().map(|item| (&*item.name, &*item.caption)).collect();
    assert_eq!(found, [("clip.mp4", "a test"), ("run", "a man runs")]);
    let read = || read_film(&run, 3, &ReadOptions::default(), false);
    assert_eq!(read().unwrap(), [frame(0), frame(20), frame(40)]);
    let other = Picture { width: 1, height: 1, rgb: vec![0; 3] };
    write_film(&run.join("004.png"), &[other], 1.0, &[]).unwrap();
    assert!(told(&read().unwrap_err()).contains("004.png: 1 x 1"));
    (0..5).for_each(|i| std::fs::remove_file(run.join(format!("{i:03}.png"))).unwrap());
    assert!(told(&read().unwrap_err()).contains("without frames"));
}

#[test]
fn channels_take_turns_and_what_is_too_loud_is_cut_off() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.wav");
    let wave = Tensor::from_vec(vec![0.0f32, 1.0, 2.0, -1.0, 0.5, -3.0], &[2, 3], &Device::cpu()).unwrap();
    write_wav(&path, &wave, 24_000).unwrap();
    let mut reader = hound::WavReader::open(&path).unwrap();
    assert_eq!((reader.spec().channels, reader.spec().sample_rate), (2, 24_000));
    let samples: Vec<i16> = reader.samples().map(|sample| sample.unwrap()).collect();
    assert_eq!(samples, [0, -32767, 32767, 16384, 32767, -32767]);
    assert!(write_wav(&path, &wave.flatten(0, 1).unwrap(), 24_000).is_err());
}

#[test]
fn a_film_has_its_frames_their_time_and_its_texts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("film.png");
    let frame = |level: u8| Picture { width: 2, height: 1, rgb: vec![level; 6] };
    write_film(&path, &[frame(3), frame(200), frame(7)], 16.0, &[("seed", "7".to_owned())]).unwrap();
    let mut reader =
        png::Decoder::new(std::io::BufReader::new(std::fs::File::open(&path).unwrap())).read_info().unwrap();
    assert_eq!(reader.info().animation_control().unwrap().num_frames, 3);
    let mut rgb = vec![0; 6];
    for level in [3, 200, 7] {
        reader.next_frame(&mut rgb).unwrap();
        assert_eq!(rgb, [level; 6]);
    }
    let control = reader.info().frame_control().unwrap();
    assert_eq!(f64::from(control.delay_num) / f64::from(control.delay_den), 1.0 / 16.0);
    assert_eq!(read_png_texts(&path).unwrap(), [("seed".to_owned(), "7".to_owned())]);
    let other = Picture { width: 1, height: 1, rgb: vec![0; 3] };
    assert!(write_film(&path, &[frame(1), other], 16.0, &[]).is_err() && write_film(&path, &[], 16.0, &[]).is_err());
}

#[test]
fn frames_of_films_with_sound_keep_their_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("film.png");
    let frame = |level: u8| Picture { width: 2, height: 3, rgb: vec![level; 18] };
    let film: Vec<Picture> = (0..9).map(frame).collect();
    let levels = |path: &Path, frames, fps| {
        let read = read_film_at(path, frames, fps, &ReadOptions::default(), false);
        read.map(|frames| frames.iter().map(|frame| frame.rgb[0]).collect::<Vec<u8>>())
    };
    // Python's round(i * 12 / 24) and round(i * 30 / 24).
    for (own, expected) in [(12.0, [0, 0, 1, 2, 2]), (30.0, [0, 1, 2, 4, 5]), (24.0, [0, 1, 2, 3, 4])] {
        write_film(&path, &film, own, &[]).unwrap();
        assert_eq!(levels(&path, 5, 24.0).unwrap(), expected, "{own}");
    }
    assert_eq!(levels(&path, 9, 24.0).unwrap().len(), 9);
    let error = told(&levels(&path, 10, 24.0).unwrap_err());
    assert!(error.contains("film.png") && error.contains("0.38") && error.contains("0.42"), "{error}");
    // Pictures in a folder have no times: one for each moment.
    let frames = folder.path().join("frames");
    std::fs::create_dir(&frames).unwrap();
    (0..3u8).for_each(|i| write_film(&frames.join(format!("{i}.png")), &[frame(i)], 1.0, &[]).unwrap());
    assert_eq!(levels(&frames, 3, 24.0).unwrap(), [0, 1, 2]);
    assert!(told(&levels(&frames, 4, 24.0).unwrap_err()).contains("0.17"));
    // The clip has 8 frames a second, so every other one.
    let clip = clips().join("clip.mp4");
    let every = read_film_at(&clip, 12, 4.0, &ReadOptions::default(), false).unwrap();
    let all = read_film(&clip, 24, &ReadOptions::default(), false).unwrap();
    assert!(every.iter().zip(all.iter().step_by(2)).all(|(a, b)| a == b));
}

/// A wave of one frequency, from the first sample on.
fn tone(hertz: f64, rate: usize, samples: usize) -> Vec<f32> {
    let turn = 2.0 * std::f64::consts::PI * hertz / rate as f64;
    (0..samples).map(|i| (turn * i as f64).sin() as f32).collect()
}

#[test]
fn sound_at_another_rate_is_the_same_sound() {
    // At its ends silence is heard, too.
    let off = |got: &[f32], want: &[f32]| {
        let inner = got.len() / 4..got.len() * 3 / 4;
        got[inner.clone()].iter().zip(&want[inner]).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max)
    };
    for (from, to) in [(48_000, 16_000), (44_100, 16_000), (8_000, 16_000), (11_025, 16_000)] {
        let got = resampled(&tone(1000.0, from, from / 4), from, to);
        assert_eq!(got.len(), (from / 4 * to).div_ceil(from));
        let worst = off(&got, &tone(1000.0, to, got.len()));
        assert!(worst < 1e-3, "{from} to {to}: {worst}");
    }
    // What the lower rate can't hold is gone, not mirrored.
    let got = resampled(&tone(9000.0, 48_000, 12_000), 48_000, 16_000);
    let worst = off(&got, &vec![0.0; got.len()]);
    assert!(worst < 1e-3, "{worst}");
}

#[test]
fn the_sound_of_a_film_lies_beside_it_or_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let format = SoundFormat { channels: 2, sampling_rate: 16_000 };
    let film = folder.path().join("film.mov");
    std::fs::copy(clips().join("clip.mp4"), &film).unwrap();
    let read = |seconds, ffmpeg| read_sound(&film, seconds, format, ffmpeg);
    let values = |sound: Option<Tensor>| sound.unwrap().to_vec::<f32>().unwrap();
    assert!(read(0.5, false).unwrap().is_none());
    // One channel is heard on both sides, and what is missing is silence.
    let wav = folder.path().join("film.wav");
    let wave = tone(440.0, 16_000, 6_000);
    write_wav(&wav, &Tensor::from_vec(wave.clone(), &[1, 6_000], &Device::cpu()).unwrap(), 16_000).unwrap();
    let sound = read(0.5, false).unwrap();
    assert_eq!(sound.as_ref().unwrap().dims(), [2, 8_000]);
    let sound = values(sound);
    assert!(sound[..8_000] == sound[8_000..] && sound[6_000..8_000].iter().all(|sample| *sample == 0.0));
    assert!(sound.iter().zip(&wave).all(|(a, b)| (a - b).abs() < 1e-4));
    assert_eq!(values(read(0.25, false).unwrap())[..4_000], sound[..4_000]);
    if std::process::Command::new("ffmpeg").arg("-version").output().is_ok() {
        std::fs::remove_file(&wav).unwrap();
        assert!(read(0.5, true).unwrap().is_none());
        let other = folder.path().join("other.wav");
        write_wav(&other, &Tensor::from_vec(wave.repeat(2), &[2, 6_000], &Device::cpu()).unwrap(), 16_000).unwrap();
        let status = std::process::Command::new("ffmpeg")
            .args(["-v", "error", "-y", "-i"])
            .args([clips().join("clip.mp4").as_os_str(), "-i".as_ref(), other.as_os_str()])
            .args(["-map", "0:v", "-map", "1:a", "-c:v", "copy", "-c:a", "pcm_s16le"])
            .arg(&film)
            .status();
        assert!(status.unwrap().success());
        assert_eq!(values(read(0.5, true).unwrap()), sound);
    } else {
        println!("skipped: no ffmpeg on the PATH");
    }
    std::fs::write(&wav, "no sound").unwrap();
    assert!(told(&read(0.5, false).unwrap_err()).contains("film.wav"));
    let many = Tensor::zeros(&[6, 100], flowtape_engine::DType::F32, &Device::cpu()).unwrap();
    write_wav(&wav, &many, 48_000).unwrap();
    let error = told(&read(0.5, false).unwrap_err());
    assert!(error.contains("6 channels") && error.contains("film.wav"), "{error}");
}
