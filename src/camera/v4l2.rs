//! USB and other V4L2 cameras, through nokhwa; the only file that names it. Those that it cannot open are in `unlisted`.
//!
//! Capture runs on a thread of its own, since a read of a camera that has stalled never comes back by
//! itself: nokhwa sets no time limit. A signal to that thread breaks the read off, and the device is let
//! go; without that it would stay busy for ever.

use std::os::unix::thread::JoinHandleExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use nix::sys::pthread::pthread_kill;
use nix::sys::signal::Signal;
use nokhwa::Camera;
use nokhwa::utils::{CameraFormat, CameraIndex, FrameFormat, RequestedFormat, RequestedFormatType};
use signal_hook::SigId;
use tracing::{info, warn};

use super::unlisted::Unlisted;
use super::{CameraError, FrameSource, Next, PixelFormat};
use crate::frame::{Frame, Layout, Picture, RawPicture, jpeg};

/// What is asked of the camera.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub width: u32,
    pub height: u32,
    pub fps: u32,
    pub format: PixelFormat,
}

/// How long a capture thread may take to end once it was woken, and how often it is woken.
const LET_GO: Duration = Duration::from_millis(200);
const WAKE: Duration = Duration::from_millis(10);

/// A camera by its path, `/dev/video0` or a link under `/dev/v4l/by-id`.
pub struct V4l2 {
    path: String,
    wanted: Wanted,
    capture: Option<Capture>,
    /// The handler of the signal that wakes a capture, from the first opening on.
    handler: Option<SigId>,
}

struct Capture {
    thread: JoinHandle<()>,
    grabbed: Receiver<Result<Frame, CameraError>>,
}

impl V4l2 {
    pub fn new(path: String, wanted: Wanted) -> Self {
        V4l2 { path, wanted, capture: None, handler: None }
    }
}

impl FrameSource for V4l2 {
    fn open(&mut self) -> Result<(), CameraError> {
        self.close();
        let failed = |e: std::io::Error| CameraError::Thread { name: "v4l2", reason: e.to_string() };
        if self.handler.is_none() {
            // Without a handler the signal would end the program. What it sets is of no interest.
            let handler = signal_hook::flag::register(Signal::SIGUSR1 as i32, Arc::new(AtomicBool::new(false)));
            self.handler = Some(handler.map_err(failed)?);
        }
        let (sender, grabbed) = sync_channel(1);
        let (path, wanted) = (self.path.clone(), self.wanted.clone());
        let capture = move || {
            if let Err(error) = grab(&path, &wanted, &sender) {
                // Nobody listens any more where this fails, and then nobody needs the error.
                let _ = sender.send(Err(error));
            }
        };
        let thread = thread::Builder::new().name("v4l2".into()).spawn(capture).map_err(failed)?;
        self.capture = Some(Capture { thread, grabbed });
        Ok(())
    }

    fn next(&mut self, wait: Duration) -> Result<Next, CameraError> {
        let gone = || CameraError::Read { path: self.path.clone(), reason: "the capture thread ended".into() };
        match self.capture.as_ref().ok_or_else(gone)?.grabbed.recv_timeout(wait) {
            Ok(Ok(frame)) => Ok(Next::Frame(frame)),
            Ok(Err(error)) => Err(error),
            Err(RecvTimeoutError::Timeout) => Ok(Next::Pending),
            Err(RecvTimeoutError::Disconnected) => Err(gone()),
        }
    }

    fn close(&mut self) {
        let Some(Capture { thread, grabbed }) = self.capture.take() else { return };
        // The thread ends at its next frame, or when the signal breaks its wait for one off.
        drop(grabbed);
        let began = Instant::now();
        while !thread.is_finished() && began.elapsed() < LET_GO {
            if pthread_kill(thread.as_pthread_t(), Signal::SIGUSR1).is_err() {
                break;
            }
            thread::sleep(WAKE);
        }
        if thread.is_finished() {
            // Its errors were sent, and a panic has printed its message.
            let _ = thread.join();
        } else {
            warn!("{}: the driver does not let the camera go", self.path);
        }
    }
}

/// Opens the camera and sends frames until nobody takes them.
fn grab(path: &str, wanted: &Wanted, frames: &SyncSender<Result<Frame, CameraError>>) -> Result<(), CameraError> {
    if let Some(mut camera) = Unlisted::open(path, wanted.format)? {
        info!("{path}: {}", camera.describe());
        while frames.send(Ok(camera.next()?)).is_ok() {}
        return Ok(());
    }
    let mut camera = open(path, wanted)?;
    while frames.send(Ok(next(path, &mut camera)?)).is_ok() {}
    Ok(())
}

fn next(path: &str, camera: &mut Camera) -> Result<Frame, CameraError> {
    let failed = |reason: String| CameraError::Read { path: path.into(), reason };
    let buffer = camera.frame().map_err(|e| failed(e.to_string()))?;
    // The driver's own time stamp, where it gives one.
    let captured_at = buffer.capture_timestamp().map_or_else(SystemTime::now, |since| SystemTime::UNIX_EPOCH + since);
    let size = buffer.resolution();
    let layout = match buffer.source_frame_format() {
        FrameFormat::MJPEG => None,
        FrameFormat::YUYV => Some(Layout::Yuyv),
        FrameFormat::RAWRGB => Some(Layout::Rgb),
        FrameFormat::RAWBGR => Some(Layout::Bgr),
        format @ (FrameFormat::NV12 | FrameFormat::GRAY) => return Err(failed(format!("a frame in {format}"))),
    };
    let picture = picture(layout, (size.width(), size.height()), buffer.buffer())
        .ok_or_else(|| failed(format!("a frame of {} bytes, too few for its format", buffer.buffer().len())))?;
    Ok(Frame { captured_at, picture, origin: None })
}

fn open(path: &str, wanted: &Wanted) -> Result<Camera, CameraError> {
    let failed = |reason: String| CameraError::Open { path: path.into(), reason };
    let index = device_index(path).map_err(failed)?;
    let any = RequestedFormat::with_formats(RequestedFormatType::None, ANY);
    let mut camera = Camera::new(CameraIndex::Index(index), any).map_err(|e| failed(e.to_string()))?;
    let offered = camera.compatible_camera_formats().map_err(|e| failed(e.to_string()))?;
    // What a camera lists it does not always take: the first that it takes is good.
    let mut refused = CameraError::Format {
        path: path.into(),
        wanted: match wanted.format {
            PixelFormat::Auto => String::new(),
            format => format!(" as {format}"),
        },
        offered: describe(&offered),
    };
    let mut taken = None;
    for format in nearest_first(&offered, wanted) {
        let exact = RequestedFormat::with_formats(RequestedFormatType::Exact(format), READABLE);
        match camera.set_camera_requset(exact) {
            Ok(_) => {
                taken = Some(format);
                break;
            }
            Err(error) => refused = failed(format!("{format}: {error}")),
        }
    }
    let chosen = taken.ok_or(refused)?;
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

/// For asking what there is, readable or not.
const ANY: &[FrameFormat] = &[
    FrameFormat::YUYV,
    FrameFormat::RAWRGB,
    FrameFormat::RAWBGR,
    FrameFormat::MJPEG,
    FrameFormat::NV12,
    FrameFormat::GRAY,
];

/// The offered formats that can be read, the nearest first: those that are fast enough, then by size,
/// then by rate, then in the order of [`READABLE`].
fn nearest_first(offered: &[CameraFormat], wanted: &Wanted) -> Vec<CameraFormat> {
    let asked = |format: FrameFormat| match wanted.format {
        PixelFormat::Auto => READABLE.contains(&format),
        PixelFormat::Mjpeg => format == FrameFormat::MJPEG,
        PixelFormat::Yuyv => format == FrameFormat::YUYV,
        PixelFormat::Rgb => matches!(format, FrameFormat::RAWRGB | FrameFormat::RAWBGR),
    };
    let mut formats: Vec<CameraFormat> = offered.iter().filter(|f| asked(f.format())).copied().collect();
    formats.sort_by_key(|f| {
        let too_slow = f.frame_rate() < wanted.fps.min(5);
        let size = f.width().abs_diff(wanted.width) + f.height().abs_diff(wanted.height);
        let rate = f.frame_rate().abs_diff(wanted.fps);
        let order = READABLE.iter().position(|r| *r == f.format());
        (too_slow, size, rate, order)
    });
    formats.dedup();
    formats
}

/// The formats and sizes in a line, each once.
fn describe(offered: &[CameraFormat]) -> String {
    let mut all: Vec<String> = offered.iter().map(|f| format!("{} {}×{}", f.format(), f.width(), f.height())).collect();
    all.sort();
    all.dedup();
    all.join(", ")
}

/// Copies a buffer out, by its layout or, without one, as MJPEG; none where it is shorter than its format says.
pub(super) fn picture(layout: Option<Layout>, (width, height): (u32, u32), bytes: &[u8]) -> Option<Picture> {
    let Some(layout) = layout else {
        // The driver hands over the whole buffer, with whatever lay behind the end marker.
        let length = match jpeg::extent(bytes) {
            jpeg::Extent::Whole(length) => length,
            // Sent on as it is: the decoder counts it as broken.
            jpeg::Extent::Short | jpeg::Extent::NotJpeg => bytes.len(),
        };
        return Some(Picture::Encoded(bytes[..length].to_vec()));
    };
    let length = width as usize * height as usize * layout.bytes_per_pixel();
    let bytes = bytes.get(..length)?.to_vec();
    Some(Picture::Raw(RawPicture::packed(width, height, layout, bytes)))
}

#[cfg(test)]
mod tests {
    use nokhwa::utils::Resolution;

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
            assert_eq!(nearest_first(&webcam, &wanted).first().copied(), expected, "{wanted:?}");
        }
        let wanted = Wanted { width: 640, height: 480, fps: 30, format: PixelFormat::Auto };
        assert_eq!(nearest_first(&[format(GRAY, 640, 480, 30)], &wanted), []);
    }

    #[test]
    fn a_short_raw_buffer_is_no_picture_and_rubbish_behind_a_jpeg_is_dropped() {
        let size = (4, 2);
        assert!(picture(Some(Layout::Yuyv), size, &[0; 15]).is_none());
        let Some(Picture::Raw(RawPicture { bytes, .. })) = picture(Some(Layout::Yuyv), size, &[7; 20]) else {
            panic!("a whole buffer is a picture");
        };
        assert_eq!(bytes.len(), 16);
        let jpeg = [0xFF, 0xD8, 0xFF, 0xDA, 0, 2, 0x55, 0xFF, 0xD9, 0, 0, 0xFF, 0xD9];
        let Some(Picture::Encoded(bytes)) = picture(None, size, &jpeg) else {
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
