//! V4L2 cameras that list no integer frame rate: HDMI grabbers and bridges, whose size and rate follow their input, and
//! cameras at 29.97 frames a second. nokhwa cannot open them, so this module uses the v4l crate, on which nokhwa is built.

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

/// Buffers shared with the driver.
const BUFFERS: u32 = 4;

/// The formats that can be read, best first, by V4L2's four-character codes (`linux/videodev2.h`). A layout of `None` is
/// MJPEG.
const READABLE: [(&[u8; 4], PixelFormat, Option<Layout>); 4] = [
    (b"YUYV", PixelFormat::Yuyv, Some(Layout::Yuyv)),
    (b"RGB3", PixelFormat::Rgb, Some(Layout::Rgb)),
    (b"BGR3", PixelFormat::Rgb, Some(Layout::Bgr)),
    (b"MJPG", PixelFormat::Mjpeg, None),
];

/// An open camera that captures at its present size and rate.
pub struct FallbackCamera {
    stream: MmapStream<'static>,
    path: String,
    layout: Option<Layout>,
    /// Width and height, pixels.
    size: (u32, u32),
}

/// A camera that cannot be opened. The caller names the device.
#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("no supported pixel format: expected {expected}, the camera offers {offered}")]
    NotOffered { expected: String, offered: String },
    #[error("the driver did not change the pixel format: expected {expected}, got {got}")]
    NotSet { expected: String, got: FourCC },
}

impl FallbackCamera {
    /// Opens the camera at its present size and rate. Returns `None` if it lists an integer frame rate: nokhwa can open it
    /// then.
    ///
    /// # Errors
    ///
    /// [`CameraError::Open`] if the device cannot be opened or does not give the `requested` format.
    pub fn open(path: &str, requested: PixelFormat) -> Result<Option<Self>, CameraError> {
        Self::try_open(path, requested).map_err(|e| CameraError::Open { path: path.into(), reason: e.to_string() })
    }

    fn try_open(path: &str, requested: PixelFormat) -> Result<Option<Self>, OpenError> {
        let device = Device::with_path(path)?;
        let formats = device.enum_formats()?;
        if formats.iter().any(|format| lists_integer_rate(&device, format.fourcc)) {
            return Ok(None);
        }
        let mut format = device.format()?;
        let is_requested = |(_, kind, _): &&(_, PixelFormat, _)| requested == PixelFormat::Auto || requested == *kind;
        let readable =
            |fourcc: FourCC| READABLE.iter().filter(is_requested).find(|(code, ..)| fourcc == FourCC::new(code));
        let expected = || -> String {
            let codes = READABLE.iter().filter(is_requested).map(|(code, ..)| FourCC::new(code).to_string());
            codes.collect::<Vec<_>>().join(", ")
        };
        if readable(format.fourcc).is_none() {
            let is_offered = |(code, ..): &&(&[u8; 4], _, _)| formats.iter().any(|f| f.fourcc == FourCC::new(code));
            let Some((code, ..)) = READABLE.iter().filter(is_requested).find(is_offered) else {
                let offered: Vec<String> = formats.iter().map(|format| format.fourcc.to_string()).collect();
                return Err(OpenError::NotOffered { expected: expected(), offered: offered.join(", ") });
            };
            format.fourcc = FourCC::new(code);
            format = device.set_format(&format)?;
        }
        let Some((.., layout)) = readable(format.fourcc) else {
            return Err(OpenError::NotSet { expected: expected(), got: format.fourcc });
        };
        let stream = MmapStream::with_buffers(&device, Type::VideoCapture, BUFFERS)?;
        let (layout, size) = (*layout, (format.width, format.height));
        Ok(Some(FallbackCamera { stream, path: path.into(), layout, size }))
    }

    /// Waits for the next frame, without a timeout.
    ///
    /// # Errors
    ///
    /// [`CameraError::Read`] if the device fails or its buffer is too short.
    pub fn next(&mut self) -> Result<Frame, CameraError> {
        let failed = |reason: String| CameraError::Read { path: self.path.clone(), reason };
        let (bytes, metadata) = self.stream.next().map_err(|e| failed(e.to_string()))?;
        let length = bytes.len().min(metadata.bytesused as usize);
        let Some(picture) = picture(self.layout, self.size, &bytes[..length]) else {
            return Err(failed(format!("a frame of {length} bytes, too few for its format")));
        };
        Ok(Frame { captured_at: captured_at(metadata), picture, origin: None })
    }

    /// Returns the format and the size, for the log.
    pub fn describe(&self) -> String {
        let format = self.layout.map_or_else(|| "MJPEG".into(), |layout| format!("{layout:?}"));
        format!("the camera lists no integer frame rate and gives {format} {}×{}", self.size.0, self.size.1)
    }
}

/// Returns whether nokhwa can open the camera: at some size, it lists a frame interval of 1/n seconds. Of stepwise sizes,
/// the smallest is checked.
fn lists_integer_rate(device: &Device, fourcc: FourCC) -> bool {
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

/// Converts the driver's timestamp to wall-clock time if it is on the monotonic clock
/// (`V4L2_BUF_FLAG_TIMESTAMP_MONOTONIC`); returns the present time otherwise.
fn captured_at(metadata: &Metadata) -> SystemTime {
    let now = SystemTime::now();
    let Ok(monotonic) = clock_gettime(ClockId::CLOCK_MONOTONIC) else { return now };
    let timestamp = Duration::from(metadata.timestamp);
    match Duration::from(monotonic).checked_sub(timestamp) {
        Some(age) if metadata.flags.contains(Flags::TIMESTAMP_MONOTONIC) => now.checked_sub(age).unwrap_or(now),
        _ => now,
    }
}
