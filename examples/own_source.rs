//! Runs the daemon inside another program, with frames that the program makes itself: `own_source PORT` publishes to the broker
//! on 127.0.0.1:PORT. A real program would return the frames of its own camera library.

use std::error::Error;
use std::time::{Duration, SystemTime};

use bloomcast::camera::{CameraError, FrameSource, NextFrame};
use bloomcast::config::Config;
use bloomcast::daemon::Daemon;
use bloomcast::frame::{Frame, Layout, Picture, RawPicture};

const WIDTH: u32 = 320;
const HEIGHT: u32 = 240;

/// Ten frames, each of one grey level, brighter from frame to frame.
struct GreyFrames {
    sent: u8,
}

impl FrameSource for GreyFrames {
    fn open(&mut self) -> Result<(), CameraError> {
        Ok(())
    }

    fn next(&mut self, _timeout: Duration) -> Result<NextFrame, CameraError> {
        if self.sent == 10 {
            return Ok(NextFrame::Ended);
        }
        self.sent += 1;
        std::thread::sleep(Duration::from_millis(300));
        let pixels = vec![self.sent * 25; (WIDTH * HEIGHT) as usize * Layout::Rgb.bytes_per_pixel()];
        let picture = Picture::Raw(RawPicture::packed(WIDTH, HEIGHT, Layout::Rgb, pixels));
        Ok(NextFrame::Frame(Frame { captured_at: SystemTime::now(), picture, origin: None }))
    }

    fn close(&mut self) {}
}

fn main() -> Result<(), Box<dyn Error>> {
    let port = std::env::args().nth(1).ok_or("usage: own_source PORT")?;
    let settings = [format!("mqtt.port={port}"), "model.store=".into(), "device.name=example".into()];
    let daemon = Daemon::prepare(Config::from_settings(&settings)?)?.with_source(Box::new(GreyFrames { sent: 0 }));
    let labels = daemon.labels().clone();
    let on_classified = move |frame: bloomcast::vision_stage::ClassifiedFrame| {
        println!("{} in {:?}", labels.name(frame.class), frame.stages.frame());
    };
    let stopped = daemon.run(std::future::pending(), Box::new(on_classified))?;
    println!("{}", stopped.close());
    Ok(())
}
