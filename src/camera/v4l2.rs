//! USB and other V4L2 cameras, through nokhwa; the only file that names it.
//!
//! Capture runs on a thread of its own, since a read of a camera that has stalled never comes
//! back: the supervisor then leaves that thread behind and opens the device anew.

use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, SystemTime};

use nokhwa::Camera;
use nokhwa::utils::{CameraFormat, CameraIndex, FrameFormat, RequestedFormat, RequestedFormatType, Resolution};
use tracing::info;

use super::{CameraError, Frame, FrameSource, Layout, Next, Picture, PixelFormat, jpeg};

/// What is asked of the camera.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub width: u32,
    pub height: u32,
    pub fps: u32,
    pub format: PixelFormat,
}

/// A camera by its path, `/dev/video0` or a link under `/dev/v4l/by-id`.
pub struct V4l2 {
    path: String,
    wanted: Wanted,
    grabbed: Option<Receiver<Result<Frame, CameraError>>>,
}

impl V4l2 {
    pub fn new(path: String, wanted: Wanted) -> Self {
        V4l2 { path, wanted, grabbed: None }
    }
}

impl FrameSource for V4l2 {
    fn open(&mut self) -> Result<(), CameraError> {
        self.close();
        let (sender, receiver) = sync_channel(1);
        let (path, wanted) = (self.path.clone(), self.wanted.clone());
        thread::Builder::new()
            .name("v4l2".into())
            .spawn(move || {
                if let Err(error) = grab(&path, &wanted, &sender) {
                    // Nobody listens any more where this fails, and then nobody needs the error.
                    let _ = sender.send(Err(error));
                }
            })
            .map_err(|e| CameraError::Thread { name: "v4l2", reason: e.to_string() })?;
        self.grabbed = Some(receiver);
        Ok(())
    }

    fn next(&mut self, wait: Duration) -> Result<Next, CameraError> {
        let gone = || CameraError::Read { path: self.path.clone(), reason: "the capture thread ended".into() };
        match self.grabbed.as_ref().ok_or_else(gone)?.recv_timeout(wait) {
            Ok(Ok(frame)) => Ok(Next::Frame(frame)),
            Ok(Err(error)) => Err(error),
            Err(RecvTimeoutError::Timeout) => Ok(Next::Pending),
            Err(RecvTimeoutError::Disconnected) => Err(gone()),
        }
    }

    fn close(&mut self) {
        // The capture thread notices at its next frame, and lets the device go.
        self.grabbed = None;
    }
}

/// Opens the camera and sends frames until nobody takes them.
fn grab(path: &str, wanted: &Wanted, frames: &SyncSender<Result<Frame, CameraError>>) -> Result<(), CameraError> {
    let mut camera = open(path, wanted)?;
    loop {
        let read = |e: nokhwa::NokhwaError| CameraError::Read { path: path.into(), reason: e.to_string() };
        let buffer = camera.frame().map_err(read)?;
        // The driver's own time stamp, where it gives one.
        let captured_at =
            buffer.capture_timestamp().map_or_else(SystemTime::now, |since| SystemTime::UNIX_EPOCH + since);
        let picture = picture(buffer.source_frame_format(), buffer.resolution(), buffer.buffer());
        let Some(picture) = picture else { continue };
        if frames.send(Ok(Frame { captured_at, picture, origin: None })).is_err() {
            return Ok(());
        }
    }
}

fn open(path: &str, wanted: &Wanted) -> Result<Camera, CameraError> {
    let failed = |reason: String| CameraError::Open { path: path.into(), reason };
    let index = device_index(path).map_err(failed)?;
    let any = RequestedFormat::with_formats(RequestedFormatType::None, READABLE);
    let mut camera = Camera::new(CameraIndex::Index(index), any).map_err(|e| failed(e.to_string()))?;
    let offered = camera.compatible_camera_formats().map_err(|e| failed(e.to_string()))?;
    let chosen = choose(&offered, wanted).ok_or_else(|| CameraError::Format {
        path: path.into(),
        wanted: match wanted.format {
            PixelFormat::Auto => String::new(),
            format => format!(" as {format}"),
        },
        offered: describe(&offered),
    })?;
    let exact = RequestedFormat::with_formats(RequestedFormatType::Exact(chosen), READABLE);
    camera.set_camera_requset(exact).map_err(|e| failed(e.to_string()))?;
    camera.open_stream().map_err(|e| failed(e.to_string()))?;
    info!(
        "{path}: {} gives {} {}×{} at {} frames a second",
        camera.info().human_name(),
        chosen.format(),
        chosen.width(),
        chosen.height(),
        chosen.frame_rate()
    );
    Ok(camera)
}

/// The number in `/dev/videoN` behind a path. Links are followed at each opening, since numbers
/// move when a camera is plugged in again.
fn device_index(path: &str) -> Result<u32, String> {
    let real = Path::new(path).canonicalize().map_err(|e| e.to_string())?;
    let name = real.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    name.strip_prefix("video")
        .and_then(|n| n.parse().ok())
        .ok_or_else(|| format!("{} is no /dev/videoN", real.display()))
}

/// What the decoder reads, best first where size and rate are the same: packed pixels cost less
/// than a JPEG to turn into RGB.
const READABLE: &[FrameFormat] = &[FrameFormat::YUYV, FrameFormat::RAWRGB, FrameFormat::RAWBGR, FrameFormat::MJPEG];

/// The offered format that comes nearest: first one that is fast enough, then the size, then the
/// rate, then the order of [`READABLE`].
fn choose(offered: &[CameraFormat], wanted: &Wanted) -> Option<CameraFormat> {
    let asked = |format: FrameFormat| match wanted.format {
        PixelFormat::Auto => READABLE.contains(&format),
        PixelFormat::Mjpeg => format == FrameFormat::MJPEG,
        PixelFormat::Yuyv => format == FrameFormat::YUYV,
        PixelFormat::Rgb => matches!(format, FrameFormat::RAWRGB | FrameFormat::RAWBGR),
    };
    offered.iter().filter(|f| asked(f.format())).copied().min_by_key(|f| {
        let too_slow = f.frame_rate() < wanted.fps.min(5);
        let size = f.width().abs_diff(wanted.width) + f.height().abs_diff(wanted.height);
        let rate = f.frame_rate().abs_diff(wanted.fps);
        let order = READABLE.iter().position(|r| *r == f.format());
        (too_slow, size, rate, order)
    })
}

/// The formats and sizes in a line, each once.
fn describe(offered: &[CameraFormat]) -> String {
    let mut all: Vec<String> = offered.iter().map(|f| format!("{} {}×{}", f.format(), f.width(), f.height())).collect();
    all.sort();
    all.dedup();
    all.join(", ")
}

/// Copies a buffer out; none where it is shorter than its format says.
fn picture(format: FrameFormat, size: Resolution, bytes: &[u8]) -> Option<Picture> {
    let layout = match format {
        FrameFormat::MJPEG => {
            // The driver hands over the whole buffer, with whatever lay behind the end marker.
            let length = match jpeg::extent(bytes) {
                jpeg::Extent::Whole(length) => length,
                // Sent on as it is: the decoder counts it as broken.
                jpeg::Extent::Short | jpeg::Extent::NotJpeg => bytes.len(),
            };
            return Some(Picture::Encoded(bytes[..length].to_vec()));
        }
        FrameFormat::YUYV => Layout::Yuyv,
        FrameFormat::RAWRGB => Layout::Rgb,
        FrameFormat::RAWBGR => Layout::Bgr,
        FrameFormat::NV12 | FrameFormat::GRAY => return None,
    };
    let (width, height) = (size.width(), size.height());
    let length = width as usize * height as usize * layout.bytes_per_pixel();
    let bytes = bytes.get(..length)?.to_vec();
    Some(Picture::Raw { width, height, layout, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format(format: FrameFormat, width: u32, height: u32, fps: u32) -> CameraFormat {
        CameraFormat::new(Resolution::new(width, height), format, fps)
    }

    #[test]
    fn the_nearest_format_is_chosen() {
        use FrameFormat::{GRAY, MJPEG, RAWBGR, YUYV};
        let webcam = [
            format(GRAY, 640, 480, 30),
            format(MJPEG, 1920, 1080, 30),
            format(MJPEG, 640, 480, 30),
            format(YUYV, 640, 480, 30),
            format(YUYV, 640, 480, 2),
            format(YUYV, 1280, 720, 10),
            format(RAWBGR, 320, 240, 15),
        ];
        let cases = [
            (640, 480, 30, PixelFormat::Auto, Some(format(YUYV, 640, 480, 30))),
            (640, 480, 30, PixelFormat::Mjpeg, Some(format(MJPEG, 640, 480, 30))),
            (1900, 1000, 30, PixelFormat::Auto, Some(format(MJPEG, 1920, 1080, 30))),
            (1280, 720, 30, PixelFormat::Yuyv, Some(format(YUYV, 1280, 720, 10))),
            (640, 480, 1, PixelFormat::Yuyv, Some(format(YUYV, 640, 480, 2))),
            (640, 480, 30, PixelFormat::Rgb, Some(format(RAWBGR, 320, 240, 15))),
        ];
        for (width, height, fps, pixels, expected) in cases {
            let wanted = Wanted { width, height, fps, format: pixels };
            assert_eq!(choose(&webcam, &wanted), expected, "{wanted:?}");
        }
        let wanted = Wanted { width: 640, height: 480, fps: 30, format: PixelFormat::Auto };
        assert_eq!(choose(&[format(GRAY, 640, 480, 30)], &wanted), None);
    }

    #[test]
    fn a_short_raw_buffer_is_no_picture_and_rubbish_behind_a_jpeg_is_dropped() {
        let size = Resolution::new(4, 2);
        assert!(picture(FrameFormat::YUYV, size, &[0; 15]).is_none());
        let Some(Picture::Raw { bytes, .. }) = picture(FrameFormat::YUYV, size, &[7; 20]) else {
            panic!("a whole buffer is a picture");
        };
        assert_eq!(bytes.len(), 16);
        let jpeg = [0xFF, 0xD8, 0xFF, 0xDA, 0, 2, 0x55, 0xFF, 0xD9, 0, 0, 0xFF, 0xD9];
        let Some(Picture::Encoded(bytes)) = picture(FrameFormat::MJPEG, size, &jpeg) else {
            panic!("a JPEG is a picture");
        };
        assert_eq!(bytes, jpeg[..9]);
    }

    #[test]
    fn a_path_that_is_no_camera_is_named() {
        assert!(device_index("/dev/null").unwrap_err().contains("/dev/null is no /dev/videoN"));
        assert!(device_index("/dev/v4l/by-id/none").is_err());
    }
}
