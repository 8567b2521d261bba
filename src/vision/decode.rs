//! Decoding of images to RGB pixels, within limits that are checked before a buffer is allocated.

use std::fs::File;
use std::io::{Cursor, Read};
use std::path::Path;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageReader, Limits, Rgb, RgbImage, Rgba};

use super::jpeg::{self, JpegError};
use crate::frame::{Layout, Picture, RawPicture};

/// Largest image file, in bytes.
pub const FILE_BYTES_MAX: u64 = 64 << 20;
/// Most pixels of an image.
pub const PIXELS_MAX: u64 = 64_000_000;
/// Largest width and height, in pixels.
pub const SIDE_MAX: u32 = 16_384;
/// Most bytes of a PNG's text chunk, decompressed.
const TEXT_BYTES_MAX: u64 = 256 << 10;

/// Most bytes of decoded pixels.
pub const DECODED_BYTES_MAX: u64 = PIXELS_MAX * 3;

/// Grey value of the background over which transparent pixels are composited, in training and on the device.
const BACKGROUND: u8 = 255;

/// The image has no pixels, more than [`PIXELS_MAX`], or a side longer than [`SIDE_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{width}×{height} pixels, expected 1 to {PIXELS_MAX}, at most {SIDE_MAX} per side")]
pub struct TooLarge {
    /// Width, in pixels.
    pub width: u32,
    /// Height, in pixels.
    pub height: u32,
}

/// An error of decoding an image.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The file cannot be opened or read.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// The file is larger than [`FILE_BYTES_MAX`]; its size in bytes.
    #[error("{0} bytes, more than the {FILE_BYTES_MAX} allowed")]
    FileTooLarge(u64),
    /// The image has too many pixels, or none.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// The pixels of an image need more than [`DECODED_BYTES_MAX`]: it has transparency or 16 bits a channel; width, height and
    /// the bytes needed.
    #[error(
        "{0}×{1} pixels with transparency or 16 bits a channel need {2} bytes, more than the {DECODED_BYTES_MAX} allowed"
    )]
    TooManyBytes(u32, u32, u64),
    /// The file has another format; its name.
    #[error("a {0} file, expected JPEG, PNG or WebP")]
    Unsupported(&'static str),
    /// The path is that of a folder.
    #[error("a folder, expected an image file")]
    Folder,
    /// The file is of an unknown format.
    #[error("unknown format, expected JPEG, PNG or WebP")]
    UnknownFormat,
    /// The file has no bytes.
    #[error("empty file")]
    Empty,
    /// A JPEG is truncated, invalid, or of a coding that is not supported.
    #[error(transparent)]
    Jpeg(#[from] JpegError),
    /// A file of another format is invalid, of an unknown format, or exceeds the decoder's limits.
    #[error("{0}")]
    Image(#[from] image::ImageError),
    /// The pixel data does not fit the size of the image, or a YUYV frame has an odd width.
    #[error("{got} bytes for {width}×{height} pixels, expected {expected}")]
    Length {
        /// Width, in pixels.
        width: u32,
        /// Height, in pixels.
        height: u32,
        /// Expected length, in bytes.
        expected: usize,
        /// Actual length, in bytes.
        got: usize,
    },
}

/// Decodes a JPEG, PNG or WebP file, detected by its content, and applies its EXIF orientation. out: H×W×3 u8 RGB.
///
/// # Errors
/// If the file cannot be read, exceeds a limit, or is not a valid image.
pub fn file(path: &Path) -> Result<RgbImage, DecodeError> {
    encoded(&read_file(path)?)
}

/// Reads an image file of at most [`FILE_BYTES_MAX`] bytes.
///
/// # Errors
/// If the file cannot be read or is too large.
pub fn read_file(path: &Path) -> Result<Vec<u8>, DecodeError> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_dir() {
        return Err(DecodeError::Folder);
    }
    let length = metadata.len();
    if length > FILE_BYTES_MAX {
        return Err(DecodeError::FileTooLarge(length));
    }
    let mut bytes = Vec::with_capacity(length as usize);
    // The length of a special file is not reliable: the limit holds for the read as well.
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Decodes a camera frame. out: H×W×3 u8 RGB.
///
/// # Errors
/// As [`encoded`], or if a raw frame has the wrong length.
pub fn picture(picture: &Picture) -> Result<RgbImage, DecodeError> {
    match picture {
        Picture::Encoded(bytes) => encoded(bytes),
        Picture::Raw(picture) => raw(picture),
    }
}

/// Decodes the bytes of a JPEG, PNG or WebP file, and applies its EXIF orientation. out: H×W×3 u8 RGB.
///
/// # Errors
/// If the image is empty, truncated or invalid, or exceeds a limit.
pub fn encoded(bytes: &[u8]) -> Result<RgbImage, DecodeError> {
    match bytes {
        [] => Err(DecodeError::Empty),
        [0xFF, 0xD8, ..] => {
            let (rgb, orientation) = jpeg::decode(bytes)?;
            Ok(with_orientation(rgb, orientation))
        }
        _ => decode_other(bytes),
    }
}

/// Checks the size of an image, before memory is allocated for it.
pub(super) fn check_size(width: u32, height: u32) -> Result<(), TooLarge> {
    let pixels = u64::from(width) * u64::from(height);
    if pixels == 0 || pixels > PIXELS_MAX || width.max(height) > SIDE_MAX {
        return Err(TooLarge { width, height });
    }
    Ok(())
}

fn decode_other(bytes: &[u8]) -> Result<RgbImage, DecodeError> {
    if let Some(format) = unsupported_format(bytes) {
        return Err(DecodeError::Unsupported(format));
    }
    let mut limits = Limits::default();
    limits.max_image_width = Some(SIDE_MAX);
    limits.max_image_height = Some(SIDE_MAX);
    limits.max_alloc = Some(DECODED_BYTES_MAX);
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
    reader.limits(limits);
    if reader.format().is_none() {
        return Err(DecodeError::UnknownFormat);
    }
    let mut decoder = reader.into_decoder()?;
    let (width, height) = decoder.dimensions();
    check_size(width, height)?;
    // 16-bit and alpha channels need more memory than RGB.
    if decoder.total_bytes() > DECODED_BYTES_MAX {
        return Err(DecodeError::TooManyBytes(width, height, decoder.total_bytes()));
    }
    let orientation = exif_orientation(bytes, decoder.exif_metadata().ok().flatten());
    Ok(with_orientation(composited(DynamicImage::from_decoder(decoder)?), orientation))
}

/// Returns the name of a picture's format that is recognised and not decoded.
fn unsupported_format(bytes: &[u8]) -> Option<&'static str> {
    match bytes {
        [_, _, _, _, b'f', b't', b'y', b'p', b'a', b'v', b'i', ..] => Some("AVIF"),
        [_, _, _, _, b'f', b't', b'y', b'p', b'h', b'e', b'i' | b'v', ..]
        | [_, _, _, _, b'f', b't', b'y', b'p', b'm', b'i' | b's', b'f', b'1', ..] => Some("HEIC"),
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => Some("MP4 or QuickTime"),
        [b'G', b'I', b'F', b'8', ..] => Some("GIF"),
        [b'B', b'M', ..] => Some("BMP"),
        [b'I', b'I', 42, 0, ..] | [b'M', b'M', 0, 42, ..] => Some("TIFF"),
        [0xFF, 0x0A, ..] | [0, 0, 0, 12, b'J', b'X', b'L', b' ', ..] => Some("JPEG XL"),
        _ => None,
    }
}

/// Returns the orientation of a PNG or WebP file. `exif` is the content of its EXIF chunk; many programs write the prefix of
/// JPEG's APP1 segment into it, and ImageMagick writes EXIF data of a PNG into a text chunk.
fn exif_orientation(bytes: &[u8], exif: Option<Vec<u8>>) -> Option<Orientation> {
    let exif = exif.or_else(|| png_text_exif(bytes))?;
    Orientation::from_exif_chunk(exif.strip_prefix(b"Exif\0\0").unwrap_or(&exif))
}

/// Returns the EXIF data of a PNG's text chunk "Raw profile type exif", or "APP1": after a line with its name and a line with
/// its length, hexadecimal digits in lines.
fn png_text_exif(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut rest = bytes.strip_prefix(b"\x89PNG\r\n\x1a\n")?;
    while let [a, b, c, d, kind @ ..] = rest {
        let length = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
        let (kind, data) = (kind.get(..4)?, kind.get(4..)?);
        let text = data.get(..length)?;
        rest = data.get(length + 4..)?;
        let keyword = |text: &[u8]| text.iter().position(|byte| *byte == 0);
        let is_exif = |keyword: &[u8]| matches!(keyword, b"Raw profile type exif" | b"Raw profile type APP1");
        let Some(end) = keyword(text).filter(|end| is_exif(&text[..*end])) else { continue };
        let profile = match kind {
            b"tEXt" => text[end + 1..].iter().take(TEXT_BYTES_MAX as usize).copied().collect(),
            b"zTXt" => {
                let mut profile = Vec::new();
                // Behind the byte of the compression method.
                flate2::read::ZlibDecoder::new(text.get(end + 2..)?)
                    .take(TEXT_BYTES_MAX)
                    .read_to_end(&mut profile)
                    .ok()?;
                profile
            }
            _ => continue,
        };
        let digits = profile.splitn(4, |byte| *byte == b'\n').nth(3)?;
        let digits: Vec<u8> =
            digits.iter().filter_map(|digit| (*digit as char).to_digit(16)).map(|digit| digit as u8).collect();
        let exif: Vec<u8> = digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect();
        // An APP1 profile may be XMP.
        if [&b"Exif"[..], b"II*\0", b"MM\0*"].iter().any(|start| exif.starts_with(start)) {
            return Some(exif);
        }
    }
    None
}

/// Returns an image as RGB, composited over a white background.
fn composited(image: DynamicImage) -> RgbImage {
    if !image.color().has_alpha() {
        return image.into_rgb8();
    }
    let rgba = image.into_rgba8();
    RgbImage::from_fn(rgba.width(), rgba.height(), |x, y| {
        let Rgba([r, g, b, alpha]) = *rgba.get_pixel(x, y);
        let alpha = u32::from(alpha);
        let over = |value: u8| ((u32::from(value) * alpha + u32::from(BACKGROUND) * (255 - alpha) + 127) / 255) as u8;
        Rgb([over(r), over(g), over(b)])
    })
}

/// Applies an EXIF orientation.
fn with_orientation(image: RgbImage, orientation: Option<Orientation>) -> RgbImage {
    match orientation {
        None | Some(Orientation::NoTransforms) => image,
        Some(orientation) => {
            let mut image = DynamicImage::ImageRgb8(image);
            image.apply_orientation(orientation);
            image.into_rgb8()
        }
    }
}

/// Converts a raw frame to RGB. out: H×W×3 u8 RGB.
fn raw(picture: &RawPicture) -> Result<RgbImage, DecodeError> {
    let RawPicture { width, height, stride, layout, ref bytes } = *picture;
    check_size(width, height)?;
    let row_bytes = picture.row_bytes();
    let expected = picture.bytes_min().unwrap_or(usize::MAX);
    // Rows may be padded, and some drivers omit the padding of the last row. Two pixels of YUYV share their chroma: the width is even.
    let padded = stride.saturating_mul(height as usize);
    let fits = stride >= row_bytes && (expected..=padded).contains(&bytes.len());
    if !fits || (layout == Layout::Yuyv && !width.is_multiple_of(2)) {
        return Err(DecodeError::Length { width, height, expected, got: bytes.len() });
    }
    let mut pixels = vec![0; width as usize * height as usize * 3];
    for (row, out) in bytes.chunks(stride).zip(pixels.chunks_exact_mut(width as usize * 3)) {
        let row = &row[..row_bytes];
        match layout {
            Layout::Rgb => out.copy_from_slice(row),
            Layout::Bgr => {
                let swapped = out.chunks_exact_mut(3).zip(row.chunks_exact(3));
                swapped.for_each(|(rgb, bgr)| rgb.copy_from_slice(&[bgr[2], bgr[1], bgr[0]]));
            }
            Layout::Yuyv => yuyv_to_rgb(row, out),
        }
    }
    Ok(RgbImage::from_raw(width, height, pixels).expect("the length was checked"))
}

/// Converts YUYV to RGB: BT.601, limited range, in 16.16 fixed point; Y 16–235 and U, V 16–240 become 0–255
/// (ITU-R BT.601-7; V4L2's default for YUYV). in: 4 bytes per two pixels; out: 6 bytes per two pixels.
fn yuyv_to_rgb(bytes: &[u8], out: &mut [u8]) {
    for (group, rgb) in bytes.chunks_exact(4).zip(out.chunks_exact_mut(6)) {
        let [y0, u, y1, v] = [group[0], group[1], group[2], group[3]].map(i32::from);
        let (u, v) = (u - 128, v - 128);
        // 1.164384, 1.596027, 0.391762, 0.812968, 2.017232 × 65536
        let red = 104_597 * v;
        let green = -25_675 * u - 53_279 * v;
        let blue = 132_201 * u;
        for (y, pixel) in [y0, y1].into_iter().zip(rgb.chunks_exact_mut(3)) {
            let luma = 76_309 * (y - 16) + (1 << 15);
            pixel[0] = ((luma + red) >> 16).clamp(0, 255) as u8;
            pixel[1] = ((luma + green) >> 16).clamp(0, 255) as u8;
            pixel[2] = ((luma + blue) >> 16).clamp(0, 255) as u8;
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use image::{ImageFormat, RgbaImage};

    use super::*;

    /// Returns an image whose red falls and blue rises from top to bottom, and whose green rises from left to right.
    pub(crate) fn gradient(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| {
            let (right, down) = (x * 255 / width, y * 255 / height);
            Rgb([255 - down as u8, right as u8, down as u8])
        })
    }

    pub(crate) fn encode(image: &RgbImage, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    /// Returns the CRC-32 of PNG (ISO 3309), computed bit by bit.
    fn crc32(bytes: &[u8]) -> u32 {
        let bit = |crc: u32, _| if crc & 1 == 1 { (crc >> 1) ^ 0xEDB8_8320 } else { crc >> 1 };
        !bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), bit))
    }

    /// Returns the mean absolute difference of two images, in grey levels.
    pub(crate) fn mean_difference(a: &RgbImage, b: &RgbImage) -> f64 {
        assert_eq!(a.dimensions(), b.dimensions());
        let sum: u64 = a.as_raw().iter().zip(b.as_raw()).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
        sum as f64 / a.as_raw().len() as f64
    }

    #[test]
    fn removes_the_padding_of_rows() {
        let pixels = [1, 2, 3, 4, 5, 6, 99, 99, 7, 8, 9, 10, 11, 12];
        let picture = |stride, bytes: &[u8]| RawPicture {
            width: 2,
            height: 2,
            stride,
            layout: Layout::Rgb,
            bytes: bytes.to_vec(),
        };
        let expected = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
        assert_eq!(raw(&picture(8, &pixels)).unwrap().as_raw(), &expected);
        let padded = [&pixels[..], &[99, 99]].concat();
        assert_eq!(raw(&picture(8, &padded)).unwrap().as_raw(), &expected);
        for wrong in [
            picture(8, &pixels[..13]),
            picture(8, &[&padded[..], &[0]].concat()),
            picture(5, &expected),
            picture(usize::MAX, &pixels),
        ] {
            assert!(matches!(raw(&wrong), Err(DecodeError::Length { .. })));
        }
    }

    #[test]
    fn decodes_png_webp_and_jpeg() {
        let image = gradient(61, 40);
        for (format, tolerance) in [(ImageFormat::Png, 0.0), (ImageFormat::WebP, 0.0), (ImageFormat::Jpeg, 4.0)] {
            let decoded = encoded(&encode(&image, format)).unwrap();
            let difference = mean_difference(&image, &decoded);
            assert!(difference <= tolerance, "{format:?}: {difference}");
        }
    }

    #[test]
    fn rejects_a_truncated_file_at_every_length() {
        for format in [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::WebP] {
            let whole = encode(&gradient(40, 30), format);
            for cut in [0, 1, 2, 20, whole.len() / 2, whole.len() - 1] {
                // PNG ends in an empty chunk of twelve bytes, JPEG in an end marker: without the last byte the image is complete.
                let harmless = format != ImageFormat::WebP && cut == whole.len() - 1;
                assert_eq!(encoded(&whole[..cut]).is_ok(), harmless, "{format:?} cut at {cut} of {}", whole.len());
            }
        }
        let jpeg = encode(&gradient(40, 30), ImageFormat::Jpeg);
        assert_eq!(encoded(&jpeg[..jpeg.len() - 2]).unwrap(), encoded(&jpeg).unwrap(), "all but the end marker");
        let error = encoded(&jpeg[..jpeg.len() - 12]).unwrap_err();
        assert!(matches!(error, DecodeError::Jpeg(JpegError::Truncated)), "{error}");
    }

    #[test]
    fn rejects_giant_dimensions_before_allocating() {
        let mut jpeg = encode(&gradient(16, 16), ImageFormat::Jpeg);
        // SOF0: FF C0, length, precision, height, width
        let sof = jpeg.windows(2).position(|w| w == [0xFF, 0xC0]).unwrap();
        jpeg[sof + 5..sof + 9].copy_from_slice(&[0x3F, 0xFF, 0x3F, 0xFF]);
        let too_large = |side| TooLarge { width: side, height: side };
        let error = encoded(&jpeg).unwrap_err();
        assert!(matches!(error, DecodeError::Jpeg(JpegError::TooLarge(size)) if size == too_large(16383)), "{error}");
        // A complete header of 16,000 × 16,000 pixels: IHDR, its CRC, and an empty IDAT.
        let png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x3e\x80\0\0\x3e\x80\x08\x02\0\0\0\x00\x00\x00\x00\0\0\0\0IDAT\x35\xaf\x06\x1e";
        let mut png = png.to_vec();
        let crc = crc32(&png[12..29]).to_be_bytes();
        png[29..33].copy_from_slice(&crc);
        assert!(matches!(encoded(&png), Err(DecodeError::TooLarge(size)) if size == too_large(16000)));
    }

    #[test]
    fn a_jpeg_without_huffman_tables_is_decoded_with_the_standard_ones() {
        let image = gradient(64, 48);
        let mut jpeg = encode(&image, ImageFormat::Jpeg);
        let whole = encoded(&jpeg).unwrap();
        while let Some(at) = jpeg.windows(2).position(|w| w == [0xFF, 0xC4]) {
            let length = usize::from(u16::from_be_bytes([jpeg[at + 2], jpeg[at + 3]]));
            jpeg.drain(at..at + 2 + length);
        }
        assert_eq!(encoded(&jpeg).unwrap(), whole);
    }

    #[test]
    fn applies_the_exif_orientation() {
        let jpeg = encode(&gradient(40, 24), ImageFormat::Jpeg);
        // APP1, "Exif", little-endian TIFF with one entry: orientation (0x0112) = 6, rotate by 90° clockwise.
        let exif: &[u8] = &[
            0xFF, 0xE1, 0, 34, b'E', b'x', b'i', b'f', 0, 0, b'I', b'I', 42, 0, 8, 0, 0, 0, 1, 0, 0x12, 1, 3, 0, 1, 0,
            0, 0, 6, 0, 0, 0, 0, 0, 0, 0,
        ];
        let rotated = encoded(&[&jpeg[..2], exif, &jpeg[2..]].concat()).unwrap();
        assert_eq!(rotated, image::imageops::rotate90(&encoded(&jpeg).unwrap()));
    }

    /// Returns the bytes of a PNG chunk.
    fn chunk(kind: &[u8], data: &[u8]) -> Vec<u8> {
        let content = [kind, data].concat();
        [&(data.len() as u32).to_be_bytes()[..], &content, &crc32(&content).to_be_bytes()].concat()
    }

    #[test]
    fn applies_the_orientation_of_webp_and_png() {
        // Little-endian TIFF with one entry: orientation (0x0112) = 6, rotate by 90° clockwise.
        let tiff: &[u8] = &[b'I', b'I', 42, 0, 8, 0, 0, 0, 1, 0, 0x12, 1, 3, 0, 1, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0];
        let app1 = [b"Exif\0\0", tiff].concat();
        let image = gradient(40, 24);
        let upright = image::imageops::rotate90(&image);
        for exif in [tiff, &app1] {
            let mut webp = Cursor::new(Vec::new());
            let mut encoder = image::codecs::webp::WebPEncoder::new_lossless(&mut webp);
            image::ImageEncoder::set_exif_metadata(&mut encoder, exif.to_vec()).unwrap();
            encoder.encode(&image, 40, 24, image::ExtendedColorType::Rgb8).unwrap();
            assert_eq!(encoded(&webp.into_inner()).unwrap(), upright);
        }
        let png = encode(&image, ImageFormat::Png);
        let hex: String = app1.iter().map(|byte| format!("{byte:02x}")).collect();
        let profile = format!("\nexif\n      {}\n{}\n{}\n", app1.len(), &hex[..20], &hex[20..]);
        let mut compressed = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
        std::io::Write::write_all(&mut compressed, profile.as_bytes()).unwrap();
        let keyword = b"Raw profile type exif\0";
        let chunks = [
            chunk(b"tEXt", &[&keyword[..], profile.as_bytes()].concat()),
            chunk(b"zTXt", &[&keyword[..], &[0], &compressed.finish().unwrap()].concat()),
            chunk(b"eXIf", tiff),
        ];
        for chunk in chunks {
            // Behind the signature and IHDR.
            let png = [&png[..33], &chunk, &png[33..]].concat();
            assert_eq!(encoded(&png).unwrap(), upright, "{}", String::from_utf8_lossy(&chunk));
        }
    }

    #[test]
    fn transparent_pixels_are_composited_over_white() {
        let pixels = [[0, 200, 0, 0], [0, 200, 0, 255], [10, 200, 0, 128]].concat();
        let image = RgbaImage::from_raw(3, 1, pixels).unwrap();
        for format in [ImageFormat::Png, ImageFormat::WebP] {
            let mut bytes = Cursor::new(Vec::new());
            image.write_to(&mut bytes, format).unwrap();
            let expected = [255, 255, 255, 0, 200, 0, 132, 227, 127];
            assert_eq!(encoded(&bytes.into_inner()).unwrap().as_raw(), &expected, "{format:?}");
        }
    }

    #[test]
    fn names_a_format_or_limit_that_is_the_reason() {
        let files: [(&[u8], &str); 5] = [
            (b"\0\0\0\x18ftypmp42", "a MP4 or QuickTime file"),
            (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC file, expected JPEG, PNG or WebP"),
            (b"GIF89a", "a GIF file"),
            (b"BM", "a BMP file"),
            (b"II*\0", "a TIFF file"),
        ];
        for (bytes, expected) in files {
            let error = encoded(bytes).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
        // The complete header of a PNG of 7,100 × 7,100 pixels with transparency: 50.4 million pixels.
        let header = [&7100u32.to_be_bytes()[..], &7100u32.to_be_bytes(), &[8, 6, 0, 0, 0]].concat();
        let png = [b"\x89PNG\r\n\x1a\n", &chunk(b"IHDR", &header)[..], &chunk(b"IDAT", &[])].concat();
        let error = encoded(&png).unwrap_err().to_string();
        let expected = "7100×7100 pixels with transparency or 16 bits a channel need 201640000 bytes, more than the 192000000 allowed";
        assert_eq!(error, expected);
    }

    #[test]
    fn raw_layouts_give_the_same_colours() {
        let (white, red) = ([235, 128, 235, 128], [81, 90, 81, 240]);
        let yuyv: Vec<u8> = [white, red].concat();
        let image = raw(&RawPicture::packed(4, 1, Layout::Yuyv, yuyv.clone())).unwrap();
        assert_eq!(image.get_pixel(1, 0), &Rgb([255, 255, 255]));
        let Rgb([r, g, b]) = *image.get_pixel(3, 0);
        assert!(r >= 253 && g <= 2 && b <= 2, "{r} {g} {b}");
        let packed =
            |width, height, layout, bytes: &[u8]| raw(&RawPicture::packed(width, height, layout, bytes.to_vec()));
        let bgr = packed(2, 1, Layout::Bgr, &[1, 2, 3, 4, 5, 6]).unwrap();
        assert_eq!(bgr.as_raw(), &[3, 2, 1, 6, 5, 4]);
        assert!(matches!(packed(2, 2, Layout::Rgb, &[0; 11]), Err(DecodeError::Length { expected: 12, got: 11, .. })));
        assert!(packed(0, 2, Layout::Rgb, &[]).is_err());
        assert!(packed(1, 1, Layout::Yuyv, &[0; 2]).is_err() && packed(3, 2, Layout::Yuyv, &[0; 12]).is_err());
    }
}
