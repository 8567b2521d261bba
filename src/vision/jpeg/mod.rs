//! Decoding of JPEGs to RGB pixels. One rule holds for files and camera frames: a JPEG is complete when the data of every block
//! is there, with or without an end marker.

mod completeness;
mod structure;

use std::borrow::Cow;
use std::io::Cursor;
use std::sync::OnceLock;

use image::codecs::jpeg::JpegEncoder;
use image::metadata::Orientation;
use image::{DynamicImage, GrayImage, RgbImage};
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use super::decode::{TooLarge, check_size};
use structure::Structure;

/// An error of a JPEG.
#[derive(Debug, thiserror::Error)]
pub enum JpegError {
    /// Data of the image is missing.
    #[error("the JPEG is truncated: image data is missing")]
    Truncated,
    /// It has no frame or no scan.
    #[error("a JPEG without image data")]
    NoImage,
    /// Its coding is not supported; which.
    #[error("a JPEG with {0}, which is not supported; save it as a baseline or progressive JPEG")]
    Unsupported(&'static str),
    /// A part of it is invalid; which.
    #[error("invalid JPEG: {0}")]
    Invalid(&'static str),
    /// It exceeds a limit.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// It cannot be decoded; the decoder's message.
    #[error("invalid JPEG: {0}")]
    Decoder(String),
}

/// Decodes a JPEG. Returns its pixels, H×W×3 u8 RGB, as they are stored, and the orientation from its EXIF data. Bytes after the
/// image are ignored; without Huffman tables, those of ITU-T T.81, annex K.3 are used: some USB cameras omit them.
///
/// # Errors
/// If it is not complete, invalid, exceeds a limit, or its coding is not supported.
pub(super) fn decode(bytes: &[u8]) -> Result<(RgbImage, Option<Orientation>), JpegError> {
    let structure = Structure::parse(bytes)?;
    if structure.has_tables {
        return decode_complete(bytes, &structure);
    }
    let bytes = [&bytes[..2], standard_tables(), &bytes[2..]].concat();
    decode_complete(&bytes, &Structure::parse(&bytes)?)
}

fn decode_complete(bytes: &[u8], structure: &Structure<'_>) -> Result<(RgbImage, Option<Orientation>), JpegError> {
    let (width, height) = (structure.frame.width, structure.frame.height);
    check_size(width, height)?;
    completeness::check(structure)?;
    let image = &bytes[..structure.length];
    let image: Cow<'_, [u8]> = if structure.has_end { image.into() } else { [image, &[0xFF, 0xD9]].concat().into() };
    // zune-jpeg 0.5.15 decodes some of these to stripes.
    if structure.is_non_interleaved() {
        decode_non_interleaved(&image, width, height)
    } else {
        decode_interleaved(&image, width, height)
    }
}

fn decode_interleaved(bytes: &[u8], width: u32, height: u32) -> Result<(RgbImage, Option<Orientation>), JpegError> {
    let options = DecoderOptions::default()
        .jpeg_set_out_colorspace(ColorSpace::RGB)
        .set_max_width(width as usize)
        .set_max_height(height as usize);
    let mut decoder = zune_jpeg::JpegDecoder::new_with_options(Cursor::new(bytes), options);
    let failed = |e: zune_jpeg::errors::DecodeErrors| JpegError::Decoder(format!("{e:?}"));
    decoder.decode_headers().map_err(failed)?;
    // The decoder must see the frame whose size was checked.
    if decoder.dimensions() != Some((width as usize, height as usize)) {
        return Err(JpegError::Invalid("two frames of different sizes"));
    }
    let pixels = decoder.decode().map_err(failed)?;
    let orientation = decoder.exif().and_then(|exif| Orientation::from_exif_chunk(exif));
    let rgb = RgbImage::from_raw(width, height, pixels).ok_or(JpegError::Invalid("two frames of different sizes"))?;
    Ok((rgb, orientation))
}

fn decode_non_interleaved(bytes: &[u8], width: u32, height: u32) -> Result<(RgbImage, Option<Orientation>), JpegError> {
    let mut decoder = jpeg_decoder::Decoder::new(Cursor::new(bytes));
    let failed = |e: jpeg_decoder::Error| JpegError::Decoder(e.to_string());
    decoder.read_info().map_err(failed)?;
    let info = decoder.info().ok_or(JpegError::NoImage)?;
    if (u32::from(info.width), u32::from(info.height)) != (width, height) {
        return Err(JpegError::Invalid("two frames of different sizes"));
    }
    let pixels = decoder.decode().map_err(failed)?;
    let orientation = decoder.exif_data().and_then(Orientation::from_exif_chunk);
    let rgb = match info.pixel_format {
        jpeg_decoder::PixelFormat::RGB24 => RgbImage::from_raw(width, height, pixels),
        jpeg_decoder::PixelFormat::L8 => {
            GrayImage::from_raw(width, height, pixels).map(|grey| DynamicImage::ImageLuma8(grey).into_rgb8())
        }
        _ => return Err(JpegError::Unsupported("four components in scans of their own")),
    };
    Ok((rgb.ok_or(JpegError::Invalid("two frames of different sizes"))?, orientation))
}

/// Returns the DHT segments of the tables of ITU-T T.81, annex K.3, which the encoder uses.
fn standard_tables() -> &'static [u8] {
    static TABLES: OnceLock<Vec<u8>> = OnceLock::new();
    TABLES.get_or_init(|| {
        let mut jpeg = Vec::new();
        JpegEncoder::new(&mut jpeg).encode_image(&RgbImage::new(8, 8)).expect("an image is encoded in memory");
        let (mut tables, mut at) = (Vec::new(), 2);
        while let Some([0xFF, marker, high, low]) = jpeg.get(at..at + 4) {
            let end = at + 2 + usize::from(u16::from_be_bytes([*high, *low]));
            match *marker {
                0xC4 => tables.extend_from_slice(&jpeg[at..end]),
                0xDA => break,
                _ => {}
            }
            at = end;
        }
        tables
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vision::decode::tests::mean_difference;

    // One picture of 48×40 pixels, by libjpeg-turbo: cjpeg -quality 60, with -sample 2x2, and with -progressive, -restart 1 or
    // -arithmetic; the second from the first by jpegtran -scans, with a scan for each component.
    const INTERLEAVED: &[u8] = include_bytes!("fixtures/interleaved.jpg");
    const NON_INTERLEAVED: &[u8] = include_bytes!("fixtures/non_interleaved.jpg");
    const PROGRESSIVE: &[u8] = include_bytes!("fixtures/progressive.jpg");
    const RESTART: &[u8] = include_bytes!("fixtures/restart.jpg");
    const ARITHMETIC: &[u8] = include_bytes!("fixtures/arithmetic.jpg");

    fn pixels(jpeg: &[u8]) -> Result<RgbImage, JpegError> {
        decode(jpeg).map(|(pixels, _)| pixels)
    }

    #[test]
    fn components_in_scans_of_their_own_give_the_same_picture() {
        let expected = pixels(INTERLEAVED).unwrap();
        for (name, jpeg) in [("non-interleaved", NON_INTERLEAVED), ("progressive", PROGRESSIVE), ("restart", RESTART)] {
            let difference = mean_difference(&pixels(jpeg).unwrap(), &expected);
            // The decoders upsample chroma differently, and the picture with restart markers has the default sampling.
            assert!(difference < 4.0, "{name}: {difference}");
        }
    }

    #[test]
    fn a_jpeg_without_all_of_its_data_is_truncated_also_with_an_end_marker() {
        for (name, jpeg) in [
            ("interleaved", INTERLEAVED),
            ("non-interleaved", NON_INTERLEAVED),
            ("progressive", PROGRESSIVE),
            ("restart", RESTART),
        ] {
            let scan = jpeg.windows(2).position(|pair| pair == [0xFF, 0xDA]).unwrap();
            let header = usize::from(u16::from_be_bytes([jpeg[scan + 2], jpeg[scan + 3]]));
            // Between two scans of a progressive JPEG nothing is missing: it is coarser. Within each scan, something is.
            for scan in &Structure::parse(jpeg).unwrap().scans {
                let start = scan.data.as_ptr() as usize - jpeg.as_ptr() as usize;
                for end in [&[][..], &[0xFF, 0xD9]] {
                    let cut = [&jpeg[..start + scan.data.len() / 2], end].concat();
                    assert!(pixels(&cut).is_err(), "{name}: a scan of {} bytes at {start}", scan.data.len());
                }
            }
            let first = scan + 2 + header;
            let length = Structure::parse(jpeg).unwrap().scans[0].data.len();
            for cut in (first..first + length - 2).step_by(7) {
                for end in [&[][..], &[0xFF, 0xD9]] {
                    let error = pixels(&[&jpeg[..cut], end].concat()).unwrap_err();
                    assert!(
                        matches!(error, JpegError::Truncated | JpegError::Invalid(_)),
                        "{name} cut at {cut}: {error}"
                    );
                }
            }
            // A hole, as a lost packet leaves.
            let hole = [&jpeg[..first + length / 4], &jpeg[first + length / 2..]].concat();
            if name != "progressive" {
                assert!(pixels(&hole).is_err(), "{name}");
            }
            // The end marker alone is no data: Samsung's panoramas have a trailer instead, of any bytes.
            let trailers: [&[u8]; 4] =
                [b"SEFH\0\0\0\0SEFT", b"\xFF\xC3", b"a\xFF\xC4\0\x03\xFF\xFF\xDA\0\x04\x01\x02", b"\xFF\xE1\x7F"];
            for trailer in trailers {
                let image = [&jpeg[..jpeg.len() - 2], trailer].concat();
                assert_eq!(pixels(&image).unwrap(), pixels(jpeg).unwrap(), "{name} {trailer:?}");
            }
        }
    }

    #[test]
    fn a_second_frame_is_an_error() {
        // A frame of one component behind the scan of three, and a larger one that hides in a segment.
        let second = [0xFF, 0xC0, 0, 11, 8, 0, 16, 0, 16, 1, 1, 0x11, 0];
        let scan = INTERLEAVED.windows(2).position(|pair| pair == [0xFF, 0xDA]).unwrap();
        let before = [&INTERLEAVED[..scan], &second, &INTERLEAVED[scan..]].concat();
        assert!(matches!(pixels(&before), Err(JpegError::Invalid("two frames"))));
        let end = INTERLEAVED.len() - 2;
        let after = [&INTERLEAVED[..end], &second, &INTERLEAVED[end..]].concat();
        assert_eq!(pixels(&after).unwrap(), pixels(INTERLEAVED).unwrap());
        let end = PROGRESSIVE.len() - 2;
        let after = [&PROGRESSIVE[..end], &second, &PROGRESSIVE[end..]].concat();
        assert_eq!(pixels(&after).unwrap(), pixels(PROGRESSIVE).unwrap());
    }

    #[test]
    fn bytes_between_the_segments_are_skipped() {
        let table = INTERLEAVED.windows(2).position(|pair| pair == [0xFF, 0xDB]).unwrap();
        let stray = [&INTERLEAVED[..table], &[0, 0], &INTERLEAVED[table..]].concat();
        assert_eq!(pixels(&stray).unwrap(), pixels(INTERLEAVED).unwrap());
    }

    #[test]
    fn a_coding_that_is_not_supported_is_named() {
        let error = pixels(ARITHMETIC).unwrap_err().to_string();
        assert!(error.starts_with("a JPEG with arithmetic coding, which is not supported"), "{error}");
        let mut lossless = INTERLEAVED.to_vec();
        let frame = lossless.windows(2).position(|pair| pair == [0xFF, 0xC0]).unwrap();
        lossless[frame + 1] = 0xC3;
        assert!(pixels(&lossless).unwrap_err().to_string().contains("lossless coding"));
    }

    #[test]
    fn damaged_bytes_are_an_error_or_a_picture_and_never_a_panic() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        for jpeg in [INTERLEAVED, NON_INTERLEAVED, PROGRESSIVE, RESTART] {
            for _ in 0..500 {
                let mut damaged = jpeg.to_vec();
                for _ in 0..random.usize(1..6) {
                    let place = random.usize(2..damaged.len());
                    damaged[place] = random.u8(..);
                }
                // An error, too, is a result.
                let _ = pixels(&damaged);
            }
        }
    }
}
