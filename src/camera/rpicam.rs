//! Raspberry Pi CSI cameras: `rpicam-vid` as a child process that writes motion JPEG.
//!
//! `rpicam-vid -t 0 -n --codec mjpeg --width W --height H --framerate F --flush -o -`

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, SystemTime};

use super::{CameraError, FrameSource, Next};
use crate::frame::jpeg::{Extent, Scanner};
use crate::frame::{Frame, Picture};

/// The child and what its pictures are to look like.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The program, `rpicam-vid` or what takes the same arguments.
    pub command: String,
    pub width: u32,
    pub height: u32,
    pub fps: u32,
    /// A picture larger than this means that the stream is broken.
    pub frame_bytes_max: usize,
}

/// How long a dead child's last words are waited for.
const OBITUARY_WAIT: Duration = Duration::from_millis(500);

/// A command, and the child that runs it.
pub struct Rpicam {
    wanted: Wanted,
    running: Option<Running>,
}

struct Running {
    child: Child,
    frames: Receiver<Result<Frame, CameraError>>,
    last_words: Receiver<String>,
}

impl Drop for Running {
    fn drop(&mut self) {
        // A child that has ended already is reaped all the same.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Rpicam {
    pub fn new(wanted: Wanted) -> Self {
        Rpicam { wanted, running: None }
    }

    /// Why the stream ended: the exit status, and the last line the child complained with.
    fn obituary(&mut self) -> CameraError {
        let mut reason = String::new();
        if let Some(mut running) = self.running.take() {
            // Its output is closed or useless: what has not ended by itself is ended.
            let _ = running.child.kill();
            if let Ok(status) = running.child.wait() {
                reason = format!(" with {status}");
            }
            if let Ok(line) = running.last_words.recv_timeout(OBITUARY_WAIT) {
                reason = format!("{reason}: {line}");
            }
        }
        CameraError::Exited { command: self.wanted.command.clone(), reason }
    }
}

impl FrameSource for Rpicam {
    fn open(&mut self) -> Result<(), CameraError> {
        self.close();
        let wanted = &self.wanted;
        let failed = |e: std::io::Error| CameraError::Spawn { command: wanted.command.clone(), reason: e.to_string() };
        let mut child = Command::new(&wanted.command)
            .args(["-t", "0", "-n", "--codec", "mjpeg", "--flush", "-o", "-"])
            .args(["--width", &wanted.width.to_string(), "--height", &wanted.height.to_string()])
            .args(["--framerate", &wanted.fps.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let stdout = child.stdout.take().expect("standard output was asked for");
        let stderr = child.stderr.take().expect("standard error was asked for");
        let (frame_sender, frames) = sync_channel(1);
        let (words_sender, last_words) = sync_channel(1);
        self.running = Some(Running { child, frames, last_words });
        let frame_bytes_max = wanted.frame_bytes_max;
        spawn("rpicam", move || cut(stdout, frame_bytes_max, &frame_sender))?;
        spawn("rpicam-errors", move || listen(stderr, &words_sender))
    }

    fn next(&mut self, wait: Duration) -> Result<Next, CameraError> {
        let received = match &self.running {
            Some(running) => running.frames.recv_timeout(wait),
            None => Err(RecvTimeoutError::Disconnected),
        };
        match received {
            Ok(frame) => Ok(Next::Frame(frame?)),
            Err(RecvTimeoutError::Timeout) => Ok(Next::Pending),
            Err(RecvTimeoutError::Disconnected) => Err(self.obituary()),
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

/// Reads what the child complains about, so that its pipe never fills, and keeps the last line.
fn listen(stderr: ChildStderr, last_words: &SyncSender<String>) {
    let lines = BufReader::new(stderr).split(b'\n').map_while(Result::ok);
    let last = lines.filter(|line| !line.trim_ascii().is_empty()).last();
    if let Some(line) = last {
        // Nobody asks where the child was ended on purpose.
        let _ = last_words.send(String::from_utf8_lossy(line.trim_ascii()).into_owned());
    }
}

/// Cuts the stream into pictures until it ends, is no JPEG any more, or nobody takes them.
fn cut(mut stream: ChildStdout, frame_bytes_max: usize, frames: &SyncSender<Result<Frame, CameraError>>) {
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
            let reason = format!("a picture of more than the {frame_bytes_max} bytes allowed");
            // Nobody asks for the reason where nobody listens.
            let _ = frames.send(Err(CameraError::Broken(reason)));
            return;
        }
    }
}

/// Bytes in, whole JPEGs out, each with the moment its first byte came.
#[derive(Default)]
struct Splitter {
    buffer: Vec<u8>,
    scanner: Scanner,
    began: Option<SystemTime>,
    newest: Option<SystemTime>,
}

impl Splitter {
    fn push(&mut self, bytes: &[u8], now: SystemTime) {
        if self.buffer.is_empty() {
            self.began = Some(now);
        }
        self.newest = Some(now);
        self.buffer.extend_from_slice(bytes);
    }

    fn next(&mut self) -> Option<(SystemTime, Vec<u8>)> {
        loop {
            match self.scanner.advance(&self.buffer) {
                Extent::Short => return None,
                Extent::Whole(length) => {
                    let rest = self.buffer.split_off(length);
                    let picture = std::mem::replace(&mut self.buffer, rest);
                    let began = self.restart()?;
                    return Some((began, picture));
                }
                Extent::NotJpeg => {
                    // Skip to the next start marker; a picture broken in the middle is lost.
                    let start = self.buffer.windows(2).skip(1).position(|w| w == [0xFF, 0xD8]);
                    let skip = start.map_or(self.buffer.len().saturating_sub(1).max(1), |at| at + 1);
                    self.buffer.drain(..skip);
                    self.restart();
                }
            }
        }
    }

    /// Begins a new picture; gives the moment the last one began.
    fn restart(&mut self) -> Option<SystemTime> {
        self.scanner = Scanner::default();
        std::mem::replace(&mut self.began, self.newest)
    }

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
    fn pictures_are_cut_at_every_chunk_size_and_stamped_when_they_began() {
        let stream = [PICTURE, PICTURE, PICTURE].concat();
        for size in 1..=stream.len() {
            let mut splitter = Splitter::default();
            let mut got = Vec::new();
            for (i, chunk) in stream.chunks(size).enumerate() {
                splitter.push(chunk, at(i as u64));
                while let Some((began, picture)) = splitter.next() {
                    assert_eq!(picture, PICTURE, "chunks of {size}");
                    got.push(began);
                }
            }
            let first_bytes = [0, PICTURE.len(), 2 * PICTURE.len()];
            // A picture that begins in the same chunk as the last one ended is stamped with that chunk.
            let expected: Vec<_> = first_bytes.map(|byte| at((byte / size) as u64)).into();
            let late = |(g, e): (&SystemTime, &SystemTime)| g == e || *g == *e + Duration::from_secs(1);
            assert_eq!(got.len(), 3, "chunks of {size}");
            assert!(got.iter().zip(&expected).all(late), "chunks of {size}: {got:?} {expected:?}");
        }
    }

    #[test]
    fn rubbish_between_pictures_is_skipped() {
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
    fn a_child_that_dies_is_named_with_its_last_words_and_can_be_started_again() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("rpicam-vid");
        std::fs::write(&script, "#!/bin/sh\nprintf '\\377\\330\\377\\332\\000\\002a\\377\\331'\necho 'ERROR: no cameras available' >&2\nexit 3\n").unwrap();
        std::process::Command::new("chmod").arg("+x").arg(&script).status().unwrap();
        let command = script.to_str().unwrap().to_owned();
        let wanted = Wanted { command, width: 640, height: 480, fps: 10, frame_bytes_max: 1 << 20 };
        let mut camera = Rpicam::new(wanted);
        for _ in 0..2 {
            camera.open().unwrap();
            let first = camera.next(Duration::from_secs(30)).unwrap();
            assert!(matches!(first, Next::Frame(Frame { picture: Picture::Encoded(b), .. }) if b.len() == 9));
            let error = camera.next(Duration::from_secs(30)).err().unwrap().to_string();
            assert!(error.contains("exit status: 3: ERROR: no cameras available"), "{error}");
        }
    }

    #[test]
    fn a_command_that_is_not_there_is_named() {
        let wanted = Wanted { command: "rpicam-none".into(), width: 1, height: 1, fps: 1, frame_bytes_max: 1 };
        let error = Rpicam::new(wanted).open().unwrap_err().to_string();
        assert!(error.starts_with("rpicam-none: cannot start"), "{error}");
    }
}
