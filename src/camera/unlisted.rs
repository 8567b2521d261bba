//! Cameras that list no whole frame rates: HDMI grabbers and bridges, whose size and rate are those of what is plugged into
//! them, and cameras at 29.97 frames a second. nokhwa opens none of these; this is the library beneath it.

use std::io;
use std::time::{Duration, SystemTime};

use nix::time::{ClockId, clock_gettime};
use v4l::buffer::{Flags, Metadata, Type};
use v4l::frameinterval::FrameIntervalEnum;
use v4l::framesize::{FrameSize, FrameSizeEnum};
use v4l::io::traits::CaptureStream;
use v4l::prelude::MmapStream;
use v4l::video::Capture;
use v4l::{Device, FourCC};

use super::v4l2::picture;
use super::{CameraError, PixelFormat};
use crate::frame::{Frame, Layout};

/// Frames that lie in the driver at a time.
const BUFFERS: u32 = 4;

/// What can be read, best first; no layout is MJPEG.
const READABLE: [(&[u8; 4], PixelFormat, Option<Layout>); 4] = [
    (b"YUYV", PixelFormat::Yuyv, Some(Layout::Yuyv)),
    (b"RGB3", PixelFormat::Rgb, Some(Layout::Rgb)),
    (b"BGR3", PixelFormat::Rgb, Some(Layout::Bgr)),
    (b"MJPG", PixelFormat::Mjpeg, None),
];

/// A camera that gives what it gives now.
pub struct Unlisted {
    stream: MmapStream<'static>,
    path: String,
    layout: Option<Layout>,
    size: (u32, u32),
}

impl Unlisted {
    /// Opens the camera at its present size and rate. None: it lists whole rates, and is not for us.
    pub fn open(path: &str, asked: PixelFormat) -> Result<Option<Self>, CameraError> {
        let failed = |reason: String| CameraError::Open { path: path.into(), reason };
        let device = Device::with_path(path).map_err(|e| failed(e.to_string()))?;
        let opened = || -> io::Result<Result<Option<Self>, String>> {
            let formats = device.enum_formats()?;
            if formats.iter().any(|format| lists_whole_rates(&device, format.fourcc)) {
                return Ok(Ok(None));
            }
            let mut format = device.format()?;
            let wanted = |(_, kind, _): &&(_, PixelFormat, _)| asked == PixelFormat::Auto || asked == *kind;
            let is = |fourcc: FourCC| READABLE.iter().filter(wanted).find(|(code, ..)| fourcc == FourCC::new(code));
            if is(format.fourcc).is_none() {
                let offered = |(code, ..): &&(&[u8; 4], _, _)| formats.iter().any(|f| f.fourcc == FourCC::new(code));
                let Some((code, ..)) = READABLE.iter().filter(wanted).find(offered) else {
                    let offered: Vec<String> = formats.iter().map(|format| format.fourcc.to_string()).collect();
                    return Ok(Err(format!("it gives {} and nothing that was asked for", offered.join(", "))));
                };
                format.fourcc = FourCC::new(code);
                format = device.set_format(&format)?;
            }
            let Some((.., layout)) = is(format.fourcc) else {
                return Ok(Err(format!("it stays with the format {}", format.fourcc)));
            };
            let stream = MmapStream::with_buffers(&device, Type::VideoCapture, BUFFERS)?;
            let (layout, size) = (*layout, (format.width, format.height));
            Ok(Ok(Some(Unlisted { stream, path: path.into(), layout, size })))
        };
        opened().map_err(|e| failed(e.to_string()))?.map_err(failed)
    }

    /// Waits for the next frame.
    pub fn next(&mut self) -> Result<Frame, CameraError> {
        let failed = |reason: String| CameraError::Read { path: self.path.clone(), reason };
        let (bytes, about) = self.stream.next().map_err(|e| failed(e.to_string()))?;
        let length = bytes.len().min(about.bytesused as usize);
        let Some(picture) = picture(self.layout, self.size, &bytes[..length]) else {
            return Err(failed(format!("a frame of {length} bytes, too few for its format")));
        };
        Ok(Frame { captured_at: captured_at(about), picture, origin: None })
    }

    /// What it gives, for the log.
    pub fn describe(&self) -> String {
        let format = self.layout.map_or_else(|| "MJPEG".into(), |layout| format!("{layout:?}"));
        format!("it lists no whole frame rates and gives {format} {}×{}", self.size.0, self.size.1)
    }
}

/// nokhwa's condition: some size at a rate of one frame in 1/n seconds. Of sizes in steps one is as good as the others.
fn lists_whole_rates(device: &Device, fourcc: FourCC) -> bool {
    let sizes = device.enum_framesizes(fourcc).unwrap_or_default();
    let size = |size: &FrameSize| match &size.size {
        FrameSizeEnum::Discrete(size) => (size.width, size.height),
        FrameSizeEnum::Stepwise(size) => (size.min_width, size.min_height),
    };
    sizes.iter().map(size).any(|(width, height)| {
        device.enum_frameintervals(fourcc, width, height).unwrap_or_default().iter().any(|rate| match &rate.interval {
            FrameIntervalEnum::Discrete(interval) => interval.numerator == 1,
            FrameIntervalEnum::Stepwise(_) => true,
        })
    })
}

/// The driver's time stamp, where it is on the clock that counts from the boot; else now.
fn captured_at(about: &Metadata) -> SystemTime {
    let now = SystemTime::now();
    let Ok(uptime) = clock_gettime(ClockId::CLOCK_MONOTONIC) else { return now };
    let stamp = Duration::from(about.timestamp);
    match Duration::from(uptime).checked_sub(stamp) {
        Some(age) if about.flags.contains(Flags::TIMESTAMP_MONOTONIC) => now.checked_sub(age).unwrap_or(now),
        _ => now,
    }
}
