//! Films and sound, to files and back.
#![allow(clippy::unwrap_used)] // a test

use std::path::Path;

use flowtape_data::media::{Picture, ReadOptions, evenly, read_film, read_png_texts, write_film, write_wav};
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
    let read = |path: &Path| read_film(path, 3, &ReadOptions::default());
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
