//! USB and other V4L2 cameras, through nokhwa; the only module that imports it. `v4l2_fallback` opens those that nokhwa
//! cannot.
//!
//! Capture runs on a thread of its own: nokhwa reads without a timeout, so a read of a stalled camera never returns. A
//! signal to that thread interrupts the read, so that the thread closes the device; otherwise the device would stay busy.

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::path::{Path, PathBuf};
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

use super::v4l2_fallback::FallbackCamera;
use super::{CameraError, CaptureOptions, FrameSource, NextFrame, PixelFormat};
use crate::frame::{Frame, Layout, Picture, RawPicture, jpeg_extent};

/// The longest wait for the capture thread to end when the camera is closed.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(200);
/// Time between two signals to the capture thread during that wait.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(10);

/// A V4L2 camera.
pub struct V4l2 {
    path: String,
    options: CaptureOptions,
    capture: Option<Capture>,
    /// The handler of the signal that interrupts the capture thread; registered when the camera is first opened.
    handler: Option<SigId>,
}

struct Capture {
    thread: JoinHandle<()>,
    frames: Receiver<Result<Frame, CameraError>>,
}

impl V4l2 {
    /// Creates a source for the device at `path`, `/dev/video0` or a link under `/dev/v4l/by-id`.
    pub fn new(path: String, options: CaptureOptions) -> Self {
        V4l2 { path, options, capture: None, handler: None }
    }
}

impl FrameSource for V4l2 {
    fn open(&mut self) -> Result<(), CameraError> {
        self.close();
        let failed = |e: io::Error| CameraError::Thread { name: "v4l2", reason: e.to_string() };
        if self.handler.is_none() {
            // Without a handler the signal would end the process. The flag that it sets is not read.
            let handler = signal_hook::flag::register(Signal::SIGUSR1 as i32, Arc::new(AtomicBool::new(false)));
            self.handler = Some(handler.map_err(failed)?);
        }
        let (sender, frames) = sync_channel(1);
        let (path, options) = (self.path.clone(), self.options.clone());
        let capture = move || {
            if let Err(error) = run_capture(&path, &options, &sender) {
                // The receiver is gone if the camera was closed.
                let _ = sender.send(Err(error));
            }
        };
        let thread = thread::Builder::new().name("v4l2".into()).spawn(capture).map_err(failed)?;
        self.capture = Some(Capture { thread, frames });
        Ok(())
    }

    fn next(&mut self, timeout: Duration) -> Result<NextFrame, CameraError> {
        let ended = || CameraError::Read { path: self.path.clone(), reason: "the capture thread ended".into() };
        match self.capture.as_ref().ok_or_else(ended)?.frames.recv_timeout(timeout) {
            Ok(Ok(frame)) => Ok(NextFrame::Frame(frame)),
            Ok(Err(error)) => Err(error),
            Err(RecvTimeoutError::Timeout) => Ok(NextFrame::Pending),
            Err(RecvTimeoutError::Disconnected) => Err(ended()),
        }
    }

    fn close(&mut self) {
        let Some(Capture { thread, frames }) = self.capture.take() else { return };
        // The thread ends at its next frame, or when the signal interrupts its read.
        drop(frames);
        let started = Instant::now();
        while !thread.is_finished() && started.elapsed() < CLOSE_TIMEOUT {
            if pthread_kill(thread.as_pthread_t(), Signal::SIGUSR1).is_err() {
                break;
            }
            thread::sleep(SIGNAL_INTERVAL);
        }
        if thread.is_finished() {
            // Errors arrive through the channel, and a panic prints its own message.
            let _ = thread.join();
        } else {
            warn!("{}: the driver does not release the camera, its capture thread keeps running", self.path);
        }
    }
}

/// Opens the camera and sends its frames until the receiver is gone.
fn run_capture(
    path: &str,
    options: &CaptureOptions,
    frames: &SyncSender<Result<Frame, CameraError>>,
) -> Result<(), CameraError> {
    if let Some(mut camera) = FallbackCamera::open(path, options.format)? {
        info!("{path}: {}", camera.describe());
        while frames.send(Ok(camera.next()?)).is_ok() {}
        return Ok(());
    }
    let mut camera = open(path, options)?;
    while frames.send(Ok(next(path, &mut camera)?)).is_ok() {}
    Ok(())
}

/// Waits for the next frame, without a timeout.
fn next(path: &str, camera: &mut Camera) -> Result<Frame, CameraError> {
    let failed = |reason: String| CameraError::Read { path: path.into(), reason };
    let buffer = camera.frame().map_err(|e| failed(e.to_string()))?;
    // The driver's timestamp, if it gives one.
    let captured_at =
        buffer.capture_timestamp().map_or_else(SystemTime::now, |timestamp| SystemTime::UNIX_EPOCH + timestamp);
    let size = buffer.resolution();
    let layout = match buffer.source_frame_format() {
        FrameFormat::MJPEG => None,
        FrameFormat::YUYV => Some(Layout::Yuyv),
        FrameFormat::RAWRGB => Some(Layout::Rgb),
        FrameFormat::RAWBGR => Some(Layout::Bgr),
        format @ (FrameFormat::NV12 | FrameFormat::GRAY) => {
            return Err(failed(format!("unsupported pixel format {format}")));
        }
    };
    let picture = picture(layout, (size.width(), size.height()), buffer.buffer())
        .ok_or_else(|| failed(format!("a frame of {} bytes, too few for its format", buffer.buffer().len())))?;
    Ok(Frame { captured_at, picture, origin: None })
}

/// Opens the camera with nokhwa, in the nearest offered format that its driver accepts.
fn open(path: &str, options: &CaptureOptions) -> Result<Camera, CameraError> {
    let failed = |reason: String| CameraError::Open { path: path.into(), reason };
    let index = device_index(path).map_err(|e| failed(e.to_string()))?;
    let any = RequestedFormat::with_formats(RequestedFormatType::None, ANY);
    let mut camera = Camera::new(CameraIndex::Index(index), any).map_err(|e| failed(e.to_string()))?;
    let offered = camera.compatible_camera_formats().map_err(|e| failed(e.to_string()))?;
    // A driver may reject a format that it lists: the first one that it accepts is used.
    let mut rejection = CameraError::Format {
        path: path.into(),
        requested: match options.format {
            PixelFormat::Auto => String::new(),
            format => format!(" for {format}"),
        },
        offered: describe(&offered),
    };
    let mut accepted = None;
    for format in nearest_first(&offered, options) {
        let exact = RequestedFormat::with_formats(RequestedFormatType::Exact(format), READABLE);
        match camera.set_camera_requset(exact) {
            Ok(_) => {
                accepted = Some(format);
                break;
            }
            Err(error) => rejection = failed(format!("{format}: {error}")),
        }
    }
    let chosen = accepted.ok_or(rejection)?;
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

/// A path that is not a V4L2 device.
#[derive(Debug, thiserror::Error)]
enum DeviceIndexError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("expected /dev/videoN, got {0}")]
    NotVideoDevice(PathBuf),
}

/// Returns N of the `/dev/videoN` to which `path` resolves. Links are resolved at each opening, since the numbers change
/// when a camera is plugged in again.
fn device_index(path: &str) -> Result<u32, DeviceIndexError> {
    let device = Path::new(path).canonicalize()?;
    let name = device.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let index = name.strip_prefix("video").and_then(|number| number.parse().ok());
    index.ok_or(DeviceIndexError::NotVideoDevice(device))
}

/// The formats that the decoder reads, best first at the same size and rate: converting packed pixels to RGB costs less
/// than decoding a JPEG.
const READABLE: &[FrameFormat] = &[FrameFormat::YUYV, FrameFormat::RAWRGB, FrameFormat::RAWBGR, FrameFormat::MJPEG];

/// The formats that nokhwa lists, readable or not.
const ANY: &[FrameFormat] = &[
    FrameFormat::YUYV,
    FrameFormat::RAWRGB,
    FrameFormat::RAWBGR,
    FrameFormat::MJPEG,
    FrameFormat::NV12,
    FrameFormat::GRAY,
];

/// Returns the offered formats that can be read and match `options.format`, nearest first: fast enough ones first (at least
/// 5 frames a second, or `options.fps` if that is less), then by size, then by rate, then in the order of [`READABLE`].
fn nearest_first(offered: &[CameraFormat], options: &CaptureOptions) -> Vec<CameraFormat> {
    let matches = |format: FrameFormat| match options.format {
        PixelFormat::Auto => READABLE.contains(&format),
        PixelFormat::Mjpeg => format == FrameFormat::MJPEG,
        PixelFormat::Yuyv => format == FrameFormat::YUYV,
        PixelFormat::Rgb => matches!(format, FrameFormat::RAWRGB | FrameFormat::RAWBGR),
    };
    let mut formats: Vec<CameraFormat> = offered.iter().filter(|f| matches(f.format())).copied().collect();
    formats.sort_by_key(|f| {
        let too_slow = f.frame_rate() < options.fps.min(5);
        let size = f.width().abs_diff(options.width) + f.height().abs_diff(options.height);
        let rate = f.frame_rate().abs_diff(options.fps);
        let order = READABLE.iter().position(|r| *r == f.format());
        (too_slow, size, rate, order)
    });
    formats.dedup();
    formats
}

/// Lists the distinct formats and sizes, separated by commas.
fn describe(offered: &[CameraFormat]) -> String {
    let mut formats: Vec<String> =
        offered.iter().map(|f| format!("{} {}×{}", f.format(), f.width(), f.height())).collect();
    formats.sort();
    formats.dedup();
    formats.join(", ")
}

/// Copies a picture of `width × height` pixels out of a buffer; a layout of `None` is MJPEG. Returns `None` if the buffer
/// of a raw picture is too short.
pub(super) fn picture(layout: Option<Layout>, (width, height): (u32, u32), bytes: &[u8]) -> Option<Picture> {
    let Some(layout) = layout else {
        // The driver returns the whole buffer, with stale bytes after the end marker.
        let length = match jpeg_extent::extent(bytes) {
            jpeg_extent::Extent::Whole(length) => length,
            // Passed on unchanged: the decoder decides whether it is complete.
            jpeg_extent::Extent::Short | jpeg_extent::Extent::NotJpeg => bytes.len(),
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
    fn chooses_the_nearest_format() {
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
            let options = CaptureOptions { width, height, fps, format: pixels };
            assert_eq!(nearest_first(&webcam, &options).first().copied(), expected, "{options:?}");
        }
        let options = CaptureOptions { width: 640, height: 480, fps: 30, format: PixelFormat::Auto };
        assert_eq!(nearest_first(&[format(GRAY, 640, 480, 30)], &options), []);
    }

    #[test]
    fn rejects_a_short_raw_buffer_and_drops_bytes_after_a_jpeg() {
        let size = (4, 2);
        assert!(picture(Some(Layout::Yuyv), size, &[0; 15]).is_none());
        let Some(Picture::Raw(RawPicture { bytes, .. })) = picture(Some(Layout::Yuyv), size, &[7; 20]) else {
            panic!("expected a raw picture");
        };
        assert_eq!(bytes.len(), 16);
        let jpeg = [0xFF, 0xD8, 0xFF, 0xDA, 0, 2, 0x55, 0xFF, 0xD9, 0, 0, 0xFF, 0xD9];
        let Some(Picture::Encoded(bytes)) = picture(None, size, &jpeg) else {
            panic!("expected an encoded picture");
        };
        assert_eq!(bytes, jpeg[..9]);
    }

    #[test]
    fn the_error_names_a_path_that_is_not_a_video_device() {
        let error = device_index("/dev/null").unwrap_err().to_string();
        assert!(error.contains("expected /dev/videoN, got /dev/null"), "{error}");
        assert!(device_index("/dev/v4l/by-id/none").is_err());
    }
}
