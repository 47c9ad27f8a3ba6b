//! TensorBoard's event files: records of the protocol buffer `tensorflow.Event`, each with checksums.
//!
//! Sources: `tensorflow/core/lib/io/record_writer.h` (the frame), `tensorflow/core/util/event.proto` and
//! `tensorflow/core/framework/summary.proto` (the messages, of which these are the fields that are written).

use std::fs::File;
use std::io::Write;
use std::path::Path;

use flowtape_engine::platform::{SystemTime, UNIX_EPOCH};

use crate::platform::process;

/// What a step is told with: one value by its tag.
#[derive(Clone)]
pub(super) enum Summary {
    /// A number.
    Scalar(f64),
    /// How often something lies in each of equal parts of 0 to 1.
    Histogram(Vec<f64>),
    /// The bytes of a PNG.
    Picture(Vec<u8>),
}

/// An event file that is written, record by record.
#[derive(Debug)]
pub(super) struct EventFile {
    file: File,
}

impl EventFile {
    /// A new file in a folder, of a run that goes on after so many steps: what other files say of later ones no longer counts.
    pub fn create(folder: &Path, from: u64) -> std::io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        // Files are read in the order of their names, and one second may have seen two processes.
        let name = format!("events.out.tfevents.{:010}.{}.flowtape", now() as u64, process());
        let mut out = Self { file: File::create(folder.join(name))? };
        out.record(&event(0).bytes(3, b"brain.Event:2"))?;
        let started = Message::default().varint(1, 1);
        out.record(&event(from + 1).message(7, &started))?;
        Ok(out)
    }

    /// What a step came to.
    pub fn add(&mut self, step: u64, values: &[(String, Summary)]) -> std::io::Result<()> {
        let mut summary = Message::default();
        for (tag, value) in values {
            let tagged = Message::default().bytes(1, tag.as_bytes());
            let tagged = match value {
                Summary::Scalar(value) => tagged.float(2, *value as f32),
                Summary::Picture(png) => tagged.message(4, &picture(png)),
                Summary::Histogram(parts) => tagged.message(5, &histogram(parts)),
            };
            summary = summary.message(1, &tagged);
        }
        self.record(&event(step).message(5, &summary))
    }

    /// The length, its checksum, the bytes, their checksum.
    fn record(&mut self, message: &Message) -> std::io::Result<()> {
        let length = (message.0.len() as u64).to_le_bytes();
        let frame = [&length[..], &masked(&length), &message.0, &masked(&message.0)].concat();
        self.file.write_all(&frame)
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// An `Event` of a step.
fn event(step: u64) -> Message {
    Message::default().double(1, now()).varint(2, step)
}

/// A `Summary.Image`: sizes and colours stand in a PNG's first chunk.
fn picture(png: &[u8]) -> Message {
    let word = |at: usize| png.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes);
    let channels = if png.get(25) == Some(&0) { 1 } else { 3 };
    let sizes = Message::default().varint(1, word(20).into()).varint(2, word(16).into());
    sizes.varint(3, channels).bytes(4, png)
}

/// A `HistogramProto` of equal parts of 0 to 1, whose sums are those of the parts' middles.
fn histogram(parts: &[f64]) -> Message {
    let n = parts.len() as f64;
    let middle = |i: usize| (i as f64 + 0.5) / n;
    let sum = |power: i32| parts.iter().enumerate().map(|(i, part)| part * middle(i).powi(power)).sum::<f64>();
    let limits: Vec<f64> = (1..=parts.len()).map(|i| i as f64 / n).collect();
    let range = Message::default().double(1, 0.0).double(2, 1.0);
    range.double(3, sum(0)).double(4, sum(1)).double(5, sum(2)).doubles(6, &limits).doubles(7, parts)
}

/// CRC-32C, turned and shifted, so that a checksum of what holds checksums is no special one.
fn masked(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// A protocol buffer that grows field by field.
#[derive(Debug, Default)]
struct Message(Vec<u8>);

impl Message {
    /// A field's number and how its value is written.
    fn key(mut self, field: u64, wire: u64) -> Self {
        self.push(field << 3 | wire);
        self
    }

    fn push(&mut self, mut value: u64) {
        while value > 0x7f {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn varint(self, field: u64, value: u64) -> Self {
        let mut out = self.key(field, 0);
        out.push(value);
        out
    }

    fn double(self, field: u64, value: f64) -> Self {
        let mut out = self.key(field, 1);
        out.0.extend(value.to_le_bytes());
        out
    }

    fn float(self, field: u64, value: f32) -> Self {
        let mut out = self.key(field, 5);
        out.0.extend(value.to_le_bytes());
        out
    }

    fn bytes(self, field: u64, value: &[u8]) -> Self {
        let mut out = self.key(field, 2);
        out.push(value.len() as u64);
        out.0.extend_from_slice(value);
        out
    }

    fn message(self, field: u64, value: &Self) -> Self {
        self.bytes(field, &value.0)
    }

    fn doubles(self, field: u64, values: &[f64]) -> Self {
        self.bytes(field, &values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
    }
}
