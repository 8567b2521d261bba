//! Converts a photograph to a raw frame for a virtual camera, resized without keeping its aspect ratio:
//! `yuyv PHOTO WIDTH HEIGHT >FRAME`. The format is [`bloomcast::frame::Layout::Yuyv`]: 4:2:2, BT.601, limited range.

use std::io::{self, Write};

use image::imageops::{FilterType, resize};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [photo, width, height] = &arguments[..] else { panic!("usage: yuyv PHOTO WIDTH HEIGHT") };
    let [width, height] = [width, height].map(|pixels| pixels.parse().expect("WIDTH and HEIGHT are numbers of pixels"));
    let photo = image::open(photo).expect("PHOTO is a readable image").into_rgb8();
    let pixels = resize(&photo, width, height, FilterType::Triangle);
    let frame: Vec<u8> = pixels.as_raw().chunks_exact(6).flat_map(yuyv).collect();
    io::stdout().write_all(&frame).expect("standard output is writable");
}

/// Converts two adjacent RGB pixels to Y0 U Y1 V, with the coefficients of ITU-R BT.601-7 and 8-bit limited range (Y
/// 16–235, U and V 16–240).
fn yuyv(rgb: &[u8]) -> [u8; 4] {
    let [r0, g0, b0, r1, g1, b1] = std::array::from_fn(|index| f32::from(rgb[index]) / 255.0);
    let luma = |r: f32, g: f32, b: f32| 0.299 * r + 0.587 * g + 0.114 * b;
    let (y0, y1) = (luma(r0, g0, b0), luma(r1, g1, b1));
    let (y, r, b) = (y0.midpoint(y1), r0.midpoint(r1), b0.midpoint(b1));
    [16.0 + 219.0 * y0, 128.0 + 224.0 * (b - y) / 1.772, 16.0 + 219.0 * y1, 128.0 + 224.0 * (r - y) / 1.402]
        .map(|value| value.round().clamp(0.0, 255.0) as u8)
}
