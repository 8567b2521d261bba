//! Raspberry Pi CSI cameras: `rpicam-vid` as a child process that writes motion JPEG to its standard output.
//!
//! `rpicam-vid -t 0 -n --codec mjpeg --width W --height H --framerate F --flush -o -`

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, SystemTime};

use super::{CameraError, FrameSource, NextFrame};
use crate::frame::jpeg_extent::{Extent, Scanner};
use crate::frame::{Frame, Picture};

/// The command to run and the video to request from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RpicamOptions {
    /// The program, `rpicam-vid` or one that takes the same arguments.
    pub command: String,
    /// Width, in pixels.
    pub width: u32,
    /// Height, in pixels.
    pub height: u32,
    /// Frame rate, in frames per second.
    pub fps: u32,
    /// The largest JPEG, in bytes; a larger one is an error.
    pub frame_bytes_max: usize,
}

/// The longest wait for the last line of standard error of a child that ended.
const STDERR_TIMEOUT: Duration = Duration::from_millis(500);

/// A camera behind an `rpicam-vid` child process.
pub struct Rpicam {
    options: RpicamOptions,
    running: Option<Running>,
}

struct Running {
    child: Child,
    frames: Receiver<Result<Frame, CameraError>>,
    /// Receives the last line of standard error after the child closed it.
    stderr_line: Receiver<String>,
}

impl Drop for Running {
    fn drop(&mut self) {
        // Also reaps a child that has already ended; `kill` then fails.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Rpicam {
    /// Creates a source that starts the command when it is opened.
    pub fn new(options: RpicamOptions) -> Self {
        Rpicam { options, running: None }
    }

    /// Ends the child and returns an error with its exit status and the last line of its standard error.
    fn exit_error(&mut self) -> CameraError {
        let mut reason = String::new();
        if let Some(mut running) = self.running.take() {
            // Its output is closed or unusable, so the child is killed if it still runs.
            let _ = running.child.kill();
            if let Ok(status) = running.child.wait() {
                reason = format!(" with {status}");
            }
            if let Ok(line) = running.stderr_line.recv_timeout(STDERR_TIMEOUT) {
                reason = format!("{reason}: {line}");
            }
        }
        CameraError::Exited { command: self.options.command.clone(), reason }
    }
}

impl FrameSource for Rpicam {
    fn open(&mut self) -> Result<(), CameraError> {
        self.close();
        let options = &self.options;
        let failed = |e: std::io::Error| CameraError::Spawn { command: options.command.clone(), reason: e.to_string() };
        let mut child = Command::new(&options.command)
            .args(["-t", "0", "-n", "--codec", "mjpeg", "--flush", "-o", "-"])
            .args(["--width", &options.width.to_string(), "--height", &options.height.to_string()])
            .args(["--framerate", &options.fps.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let stdout = child.stdout.take().expect("standard output is piped");
        let stderr = child.stderr.take().expect("standard error is piped");
        let (frame_sender, frames) = sync_channel(1);
        let (line_sender, stderr_line) = sync_channel(1);
        let frame_bytes_max = options.frame_bytes_max;
        self.running = Some(Running { child, frames, stderr_line });
        spawn("rpicam", move || read_frames(stdout, frame_bytes_max, &frame_sender))?;
        spawn("rpicam-errors", move || read_stderr(stderr, &line_sender))
    }

    fn next(&mut self, timeout: Duration) -> Result<NextFrame, CameraError> {
        let received = match &self.running {
            Some(running) => running.frames.recv_timeout(timeout),
            None => Err(RecvTimeoutError::Disconnected),
        };
        match received {
            Ok(frame) => Ok(NextFrame::Frame(frame?)),
            Err(RecvTimeoutError::Timeout) => Ok(NextFrame::Pending),
            Err(RecvTimeoutError::Disconnected) => Err(self.exit_error()),
        }
    }

    fn close(&mut self) {
        self.running = None;
    }
}

fn spawn(name: &'static str, work: impl FnOnce() + Send + 'static) -> Result<(), CameraError> {
    let spawned = thread::Builder::new().name(name.into()).spawn(work);
    spawned.map(drop).map_err(|e| CameraError::Thread { name, reason: e.to_string() })
}

/// Reads the child's standard error to its end, so that the pipe never fills, and sends the last line that is not blank.
fn read_stderr(stderr: ChildStderr, last_line: &SyncSender<String>) {
    let lines = BufReader::new(stderr).split(b'\n').map_while(Result::ok);
    let last = lines.filter(|line| !line.trim_ascii().is_empty()).last();
    if let Some(line) = last {
        // The receiver is gone if the child was killed by `close`.
        let _ = last_line.send(String::from_utf8_lossy(line.trim_ascii()).into_owned());
    }
}

/// Splits the stream into JPEGs and sends them, until the stream ends, a JPEG exceeds `frame_bytes_max` or the receiver is
/// gone.
fn read_frames(mut stream: ChildStdout, frame_bytes_max: usize, frames: &SyncSender<Result<Frame, CameraError>>) {
    let mut splitter = Splitter::default();
    let mut chunk = vec![0; 64 * 1024];
    loop {
        let read = match stream.read(&mut chunk) {
            Ok(0) | Err(_) => return,
            Ok(read) => read,
        };
        splitter.push(&chunk[..read], SystemTime::now());
        while let Some((captured_at, bytes)) = splitter.next() {
            let frame = Frame { captured_at, picture: Picture::Encoded(bytes), origin: None };
            if frames.send(Ok(frame)).is_err() {
                return;
            }
        }
        if splitter.pending() > frame_bytes_max {
            let reason = format!("a JPEG of more than the {frame_bytes_max} bytes allowed");
            // The receiver is gone if the source was closed.
            let _ = frames.send(Err(CameraError::Broken(reason)));
            return;
        }
    }
}

/// Splits a byte stream into whole JPEGs, each with the time at which its first byte arrived.
#[derive(Default)]
struct Splitter {
    buffer: Vec<u8>,
    scanner: Scanner,
    /// Arrival time of the first byte of `buffer`.
    started_at: Option<SystemTime>,
    /// Arrival time of the last chunk.
    last_chunk_at: Option<SystemTime>,
}

impl Splitter {
    fn push(&mut self, bytes: &[u8], now: SystemTime) {
        if self.buffer.is_empty() {
            self.started_at = Some(now);
        }
        self.last_chunk_at = Some(now);
        self.buffer.extend_from_slice(bytes);
    }

    fn next(&mut self) -> Option<(SystemTime, Vec<u8>)> {
        loop {
            match self.scanner.advance(&self.buffer) {
                Extent::Short => return None,
                Extent::Whole(length) => {
                    let rest = self.buffer.split_off(length);
                    let picture = std::mem::replace(&mut self.buffer, rest);
                    let started_at = self.restart()?;
                    return Some((started_at, picture));
                }
                Extent::NotJpeg => {
                    // Skips to the next start marker; the bytes before it are lost.
                    let start = self.buffer.windows(2).skip(1).position(|w| w == [0xFF, 0xD8]);
                    let skip = start.map_or(self.buffer.len().saturating_sub(1).max(1), |at| at + 1);
                    self.buffer.drain(..skip);
                    self.restart();
                }
            }
        }
    }

    /// Resets the scan for the next picture; returns the arrival time of the picture that was just cut off.
    fn restart(&mut self) -> Option<SystemTime> {
        self.scanner = Scanner::default();
        std::mem::replace(&mut self.started_at, self.last_chunk_at)
    }

    /// Returns the number of buffered bytes.
    fn pending(&self) -> usize {
        self.buffer.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PICTURE: &[u8] = &[0xFF, 0xD8, 0xFF, 0xDA, 0, 2, 0x11, 0xFF, 0x00, 0x22, 0xFF, 0xD9];

    fn at(s: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(s)
    }

    #[test]
    fn splits_a_stream_at_every_chunk_size_with_the_arrival_time_of_each_picture() {
        let stream = [PICTURE, PICTURE, PICTURE].concat();
        for size in 1..=stream.len() {
            let mut splitter = Splitter::default();
            let mut times = Vec::new();
            for (i, chunk) in stream.chunks(size).enumerate() {
                splitter.push(chunk, at(i as u64));
                while let Some((started_at, picture)) = splitter.next() {
                    assert_eq!(picture, PICTURE, "chunks of {size}");
                    times.push(started_at);
                }
            }
            let first_bytes = [0, PICTURE.len(), 2 * PICTURE.len()];
            // A picture that starts in the chunk in which the previous one ends gets the time of that chunk.
            let expected: Vec<_> = first_bytes.map(|byte| at((byte / size) as u64)).into();
            let matches = |(time, expected): (&SystemTime, &SystemTime)| {
                time == expected || *time == *expected + Duration::from_secs(1)
            };
            assert_eq!(times.len(), 3, "chunks of {size}");
            assert!(times.iter().zip(&expected).all(matches), "chunks of {size}: {times:?} {expected:?}");
        }
    }

    #[test]
    fn skips_bytes_between_pictures() {
        let mut splitter = Splitter::default();
        splitter.push(&[1, 2, 3, 0xFF], at(0));
        splitter.push(PICTURE, at(1));
        splitter.push(&[9, 9], at(1));
        splitter.push(PICTURE, at(2));
        let mut pictures = 0;
        while let Some((_, picture)) = splitter.next() {
            assert_eq!(picture, PICTURE);
            pictures += 1;
        }
        assert_eq!(pictures, 2);
        assert_eq!(splitter.pending(), 0);
    }

    #[test]
    fn reports_exit_status_and_stderr_of_a_child_that_ended_and_can_be_reopened() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("rpicam-vid");
        std::fs::write(&script, "#!/bin/sh\nprintf '\\377\\330\\377\\332\\000\\002a\\377\\331'\necho 'ERROR: no cameras available' >&2\nexit 3\n").unwrap();
        std::process::Command::new("chmod").arg("+x").arg(&script).status().unwrap();
        let command = script.to_str().unwrap().to_owned();
        let options = RpicamOptions { command, width: 640, height: 480, fps: 10, frame_bytes_max: 1 << 20 };
        let mut camera = Rpicam::new(options);
        for _ in 0..2 {
            camera.open().unwrap();
            let first = camera.next(Duration::from_secs(30)).unwrap();
            assert!(matches!(first, NextFrame::Frame(Frame { picture: Picture::Encoded(b), .. }) if b.len() == 9));
            let error = camera.next(Duration::from_secs(30)).err().unwrap().to_string();
            assert!(error.contains("exit status: 3: ERROR: no cameras available"), "{error}");
        }
    }

    #[test]
    fn the_error_names_a_command_that_does_not_exist() {
        let options = RpicamOptions { command: "rpicam-none".into(), width: 1, height: 1, fps: 1, frame_bytes_max: 1 };
        let error = Rpicam::new(options).open().unwrap_err().to_string();
        assert!(error.starts_with("rpicam-none: cannot start"), "{error}");
    }
}
