//! Event files of TensorBoard: protocol buffers in records with masked CRC-32C checksums
//! (`tensorflow/core/util/event.proto`, `tensorflow/core/framework/summary.proto`, `tensorflow/core/lib/io/record_writer.h`).

use std::fs::File;
use std::io::{self, Cursor, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crc::{CRC_32_ISCSI, Crc};
use image::{ImageFormat, RgbImage};
use prost::Message;

/// The file name prefix that TensorBoard searches for.
pub const PREFIX: &str = "events.out.tfevents.";

/// CRC-32C (Castagnoli).
const CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
    #[prost(message, optional, tag = "4")]
    image: Option<Image>,
}

#[derive(Clone, PartialEq, Message)]
struct Image {
    #[prost(int32, tag = "1")]
    height: i32,
    #[prost(int32, tag = "2")]
    width: i32,
    /// 3: RGB.
    #[prost(int32, tag = "3")]
    colorspace: i32,
    /// A PNG file.
    #[prost(bytes = "vec", tag = "4")]
    encoded_image_string: Vec<u8>,
}

/// Appends events to a file.
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Creates a file in `folder`, named by the time `created_at`.
    ///
    /// # Errors
    /// Fails if the file cannot be written.
    pub fn create(folder: &Path, created_at: SystemTime) -> io::Result<Self> {
        let seconds = created_at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let path = folder.join(format!("{PREFIX}{seconds}.bloomcast"));
        let mut events = EventWriter { file: File::create(&path)?, path };
        events.write(0, Some("brain.Event:2".into()), None)?;
        Ok(events)
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes tagged values.
    ///
    /// # Errors
    /// Fails if the file cannot be written.
    pub fn write_scalars(&mut self, step: usize, scalars: &[(&str, f64)]) -> io::Result<()> {
        let value =
            |(tag, value): &(&str, f64)| Value { tag: (*tag).into(), simple_value: Some(*value as f32), image: None };
        self.write(step, None, Some(Summary { value: scalars.iter().map(value).collect() }))
    }

    /// Writes an image as PNG.
    ///
    /// # Errors
    /// Fails if the image cannot be encoded or the file cannot be written.
    pub fn write_image(&mut self, step: usize, tag: &str, image: &RgbImage) -> io::Result<()> {
        let mut png = Cursor::new(Vec::new());
        image.write_to(&mut png, ImageFormat::Png).map_err(io::Error::other)?;
        let image = Image {
            height: image.height() as i32,
            width: image.width() as i32,
            colorspace: 3,
            encoded_image_string: png.into_inner(),
        };
        let value = Value { tag: tag.into(), simple_value: None, image: Some(image) };
        self.write(step, None, Some(Summary { value: vec![value] }))
    }

    fn write(&mut self, step: usize, file_version: Option<String>, summary: Option<Summary>) -> io::Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        let event = Event { wall_time: now, step: step as i64, file_version, summary }.encode_to_vec();
        self.file.write_all(&record(&event))
    }
}

/// Returns a record: length, checksum of the length, data, checksum of the data; little-endian.
fn record(bytes: &[u8]) -> Vec<u8> {
    let length = (bytes.len() as u64).to_le_bytes();
    [&length[..], &masked_crc(&length).to_le_bytes(), bytes, &masked_crc(bytes).to_le_bytes()].concat()
}

/// Returns the CRC rotated and offset, because the CRC of data that contains CRCs is weak
/// (`tensorflow/core/lib/hash/crc32c.h`).
fn masked_crc(bytes: &[u8]) -> u32 {
    CRC.checksum(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decodes the events of a file and checks all checksums.
    fn read(bytes: &[u8]) -> Vec<Event> {
        let (mut at, mut events) = (0, Vec::new());
        let crc = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        while at < bytes.len() {
            let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
            assert_eq!(crc(at + 8), masked_crc(&bytes[at..at + 8]));
            let event = &bytes[at + 12..at + 12 + length];
            assert_eq!(crc(at + 12 + length), masked_crc(event));
            events.push(Event::decode(event).unwrap());
            at += 16 + length;
        }
        events
    }

    #[test]
    fn the_checksum_is_crc_32c() {
        // RFC 3720, B.4: zeros, ones, ascending and descending bytes.
        let ascending: Vec<u8> = (0..32).collect();
        let descending: Vec<u8> = (0..32).rev().collect();
        let vectors: [(&[u8], u32); 4] = [
            (&[0; 32], 0x8a91_36aa),
            (&[0xff; 32], 0x62a8_ab43),
            (&ascending, 0x46dd_794e),
            (&descending, 0x113f_db5c),
        ];
        for (bytes, expected) in vectors {
            assert_eq!(CRC.checksum(bytes), expected);
        }
        // The mask of a TFRecord: rotated right by 15 bits, plus a constant.
        assert_eq!(masked_crc(&[0; 32]), 0x0fd7_fffa);
    }

    #[test]
    fn written_events_can_be_decoded() {
        let dir = tempfile::tempdir().unwrap();
        let mut events = EventWriter::create(dir.path(), UNIX_EPOCH + std::time::Duration::from_secs(17)).unwrap();
        events.write_scalars(3, &[("loss/train", 0.5), ("loss/val", 0.25)]).unwrap();
        events.write_image(3, "confusion", &RgbImage::new(4, 2)).unwrap();
        assert_eq!(events.path(), dir.path().join("events.out.tfevents.17.bloomcast"));
        let read = read(&std::fs::read(events.path()).unwrap());
        assert_eq!(read[0].file_version.as_deref(), Some("brain.Event:2"));
        let scalars = &read[1].summary.as_ref().unwrap().value;
        assert_eq!((read[1].step, scalars[1].tag.as_str(), scalars[1].simple_value), (3, "loss/val", Some(0.25)));
        let image = read[2].summary.as_ref().unwrap().value[0].image.clone().unwrap();
        assert_eq!((image.width, image.height), (4, 2));
        assert_eq!(image::load_from_memory(&image.encoded_image_string).unwrap().to_rgb8(), RgbImage::new(4, 2));
    }
}
