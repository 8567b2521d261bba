//! Frame sources: a [`FrameSource`] that one thread supervises, and the one-slot [`latest`] mailbox that hands the newest
//! frame to the vision stage.

pub mod latest;
pub mod replay;
pub mod rpicam;
mod supervise;
#[cfg(feature = "camera")]
pub mod v4l2;
#[cfg(feature = "camera")]
mod v4l2_fallback;

pub use supervise::{Pace, SupervisorOptions, supervise};

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::frame::Frame;

/// Pixel format that a camera is asked for (`camera.format`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PixelFormat {
    /// Any format that [`crate::frame`] can hold.
    Auto,
    /// Motion JPEG.
    Mjpeg,
    /// Packed 4:2:2, see [`crate::frame::Layout::Yuyv`].
    Yuyv,
    /// Packed RGB or BGR, three bytes a pixel.
    Rgb,
}

impl fmt::Display for PixelFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PixelFormat::Auto => "auto",
            PixelFormat::Mjpeg => "mjpeg",
            PixelFormat::Yuyv => "yuyv",
            PixelFormat::Rgb => "rgb",
        })
    }
}

/// The video to request from the camera; the nearest format that the camera offers is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptureOptions {
    /// Width, in pixels.
    pub width: u32,
    /// Height, in pixels.
    pub height: u32,
    /// Frame rate, in frames per second.
    pub fps: u32,
    /// Pixel format.
    pub format: PixelFormat,
}

/// The configured source of frames.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceOptions {
    /// A V4L2 camera.
    V4l2 {
        /// The device, `/dev/video0` or a link under `/dev/v4l/by-id`.
        device: String,
        /// The video to request.
        capture: CaptureOptions,
    },
    /// A Raspberry Pi camera, through a child process.
    Rpicam(rpicam::RpicamOptions),
    /// Images in place of a camera.
    Replay {
        /// A folder, a list, or one image; see [`replay::images`].
        path: PathBuf,
        /// Whether it starts again after the last image.
        looped: bool,
        /// The largest file, in bytes.
        file_bytes_max: u64,
    },
}

impl SourceOptions {
    /// Creates the source, which is opened later. A replay keeps `pace` itself.
    ///
    /// # Errors
    /// If there is no image to replay, or the program was built without V4L2.
    pub fn create(&self, pace: &Pace) -> Result<Box<dyn FrameSource>, CameraError> {
        match self {
            #[cfg(feature = "camera")]
            SourceOptions::V4l2 { device, capture } => Ok(Box::new(v4l2::V4l2::new(device.clone(), capture.clone()))),
            #[cfg(not(feature = "camera"))]
            SourceOptions::V4l2 { .. } => Err(CameraError::NotBuilt),
            SourceOptions::Rpicam(options) => Ok(Box::new(rpicam::Rpicam::new(options.clone()))),
            SourceOptions::Replay { path, looped, file_bytes_max } => {
                let images = replay::images(path)?;
                Ok(Box::new(replay::Replay::new(images, pace.clone(), *looped, *file_bytes_max)))
            }
        }
    }
}

/// Result of [`FrameSource::next`].
pub enum NextFrame {
    /// A frame.
    Frame(Frame),
    /// A frame that could not be read, with the reason; the source itself still works.
    Broken(String),
    /// No frame arrived within the timeout.
    Pending,
    /// The source has no more frames.
    Ended,
}

/// A camera, or a replay in place of one. [`supervise()`] drives it from a thread of its own.
pub trait FrameSource: Send {
    /// Opens the device, after closing it if it is open.
    ///
    /// # Errors
    ///
    /// [`CameraError`] if the device or the command cannot be opened.
    fn open(&mut self) -> Result<(), CameraError>;

    /// Waits for the next frame, at most `timeout`.
    ///
    /// # Errors
    ///
    /// [`CameraError`] if the device must be reopened.
    fn next(&mut self, timeout: Duration) -> Result<NextFrame, CameraError>;

    /// Closes the device, without waiting for a driver that hangs.
    fn close(&mut self);
}

/// An error of a frame source; it names the device, the command or the path.
#[derive(Debug, thiserror::Error)]
pub enum CameraError {
    /// The device cannot be opened or configured.
    #[error("{path}: cannot open the camera: {reason}")]
    Open {
        /// Path of the device.
        path: String,
        /// The cause.
        reason: String,
    },
    /// The device offers no format in which this program can read frames.
    #[error("{path}: the camera offers no supported pixel format{requested} (it offers: {offered})")]
    Format {
        /// Path of the device.
        path: String,
        /// The configured format, as a part of the message; may be empty.
        requested: String,
        /// The formats and sizes that the device offers.
        offered: String,
    },
    /// The device failed while it was read.
    #[error("{path}: the camera stopped: {reason}")]
    Read {
        /// Path of the device.
        path: String,
        /// The cause.
        reason: String,
    },
    /// The capture command cannot be started.
    #[error("{command}: cannot start: {reason}")]
    Spawn {
        /// The command.
        command: String,
        /// The cause.
        reason: String,
    },
    /// The capture command ended.
    #[error("{command}: ended{reason}")]
    Exited {
        /// The command.
        command: String,
        /// Exit status and last line of standard error, as a suffix of the message; may be empty.
        reason: String,
    },
    /// No frame for this many milliseconds.
    #[error("no frame for {0} ms")]
    Stalled(u128),
    /// The images to replay cannot be listed.
    #[error("{path}: {reason}")]
    Replay {
        /// Path of the folder, list or image.
        path: PathBuf,
        /// The cause.
        reason: String,
    },
    /// The source ended before its first frame.
    #[error("the source ended without a frame")]
    Ended,
    /// A frame cannot be read or decoded.
    #[error("broken frame: {0}")]
    Broken(String),
    /// A thread of the source cannot be started.
    #[error("cannot start the thread {name}: {reason}")]
    Thread {
        /// Name of the thread.
        name: &'static str,
        /// The cause.
        reason: String,
    },
    /// The program was built without V4L2.
    #[error("camera.source is \"v4l2\", but this program was built without the feature `camera`")]
    NotBuilt,
}
