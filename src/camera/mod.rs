//! Where frames come from: a [`FrameSource`] behind one supervising thread, and the one-slot
//! [`latest`] mailbox that hands the newest frame to the next stage.

pub mod latest;
pub mod replay;
pub mod rpicam;
mod supervise;
#[cfg(feature = "camera")]
mod unlisted;
#[cfg(feature = "camera")]
pub mod v4l2;

pub use supervise::{Pace, Supervisor, watch};

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::frame::Frame;

/// What a camera may be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PixelFormat {
    Auto,
    Mjpeg,
    Yuyv,
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

/// What [`FrameSource::next`] came back with.
pub enum Next {
    Frame(Frame),
    /// A frame that could not be read, and why; the source itself is well.
    Broken(String),
    /// Nothing within the time given; ask again.
    Pending,
    /// The source has no more frames and never will.
    Ended,
}

/// A camera, or what stands in for one. [`watch`] drives it from a thread of its own.
pub trait FrameSource: Send {
    /// Opens the device, or opens it anew: whatever was open before is closed first.
    fn open(&mut self) -> Result<(), CameraError>;

    /// Waits for the next frame, at most `wait`. An error means that the device must be reopened.
    fn next(&mut self, wait: Duration) -> Result<Next, CameraError>;

    /// Lets the device go. Never blocks on it.
    fn close(&mut self);
}

/// Why there are no frames. Each names the device, the command or the path.
#[derive(Debug, thiserror::Error)]
pub enum CameraError {
    #[error("{path}: cannot open the camera: {reason}")]
    Open { path: String, reason: String },
    #[error("{path}: the camera offers no format this program reads{wanted} (it offers: {offered})")]
    Format { path: String, wanted: String, offered: String },
    #[error("{path}: the camera stopped: {reason}")]
    Read { path: String, reason: String },
    #[error("{command}: cannot start: {reason}")]
    Spawn { command: String, reason: String },
    #[error("{command}: ended{reason}")]
    Exited { command: String, reason: String },
    #[error("no frame for {0} ms")]
    Stalled(u128),
    #[error("{path}: {reason}")]
    Replay { path: PathBuf, reason: String },
    #[error("no frames at all")]
    Ended,
    #[error("the frame is broken: {0}")]
    Broken(String),
    #[error("cannot start the thread {name}: {reason}")]
    Thread { name: &'static str, reason: String },
    #[error("camera.source is \"v4l2\", but this program was built without the feature `camera`")]
    NotBuilt,
}
