//! How far a long command is: a bar on standard error, and only on a terminal.

use std::fmt::Write;
use std::sync::Mutex;

use bloomcast::train::run::Progress;
use indicatif::{MultiProgress, ProgressBar, ProgressState, ProgressStyle};

/// One bar at a time; it changes with what is done.
#[derive(Default)]
pub struct Bars(Mutex<Option<(&'static str, ProgressBar)>>);

impl Bars {
    /// Shows a step of the trainer.
    pub fn train(&self, progress: Progress) {
        match progress {
            Progress::Read { done, of } => self.show("photographs", done as u64, of as u64),
            Progress::Features { done, of } => self.show("features", done as u64, of as u64),
            Progress::Warning(warning) => eprintln!("warning: {warning}"),
            Progress::Epoch { epoch, of } => {
                let (loss, val) = (epoch.train_loss, epoch.val);
                let message = format!("loss {loss:.4}, on others {:.4}, accuracy {:.4}", val.loss, val.accuracy);
                self.at("epochs", COUNTED, epoch.epoch as u64, of as u64, message);
            }
        }
    }

    /// Shows that `done` of `of` are done.
    pub fn show(&self, what: &'static str, done: u64, of: u64) {
        self.at(what, COUNTED, done, of, String::new());
    }

    /// The same for bytes.
    #[cfg(feature = "fetch")]
    pub fn bytes(&self, what: &'static str, done: u64, of: u64) {
        self.at(what, "{bytes}/{total_bytes}  {binary_bytes_per_sec}  {eta} left", done, of, String::new());
    }

    fn at(&self, what: &'static str, figures: &str, done: u64, of: u64, message: String) {
        let mut current = self.0.lock().expect("nothing panics with the lock held");
        let bar = match current.take() {
            Some((shown, bar)) if shown == what && bar.length() == Some(of) => bar,
            before => {
                leave(before);
                ProgressBar::new(of).with_style(style(what, figures))
            }
        };
        bar.set_message(message);
        bar.set_position(bar.position().max(done));
        *current = Some((what, bar));
    }
}

/// A line a device, and only on a terminal.
#[derive(Default)]
pub struct Devices {
    all: MultiProgress,
    bars: Mutex<Vec<ProgressBar>>,
}

impl Devices {
    /// Shows what each device is at, and how many pieces of how many have arrived; always the same devices.
    pub fn show(&self, devices: &[(&str, (String, u32, u32))]) {
        let mut bars = self.bars.lock().expect("nothing panics with the lock held");
        let width = devices.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        for (i, (name, (doing, there, of))) in devices.iter().enumerate() {
            if bars.len() == i {
                let style = ProgressStyle::with_template("{prefix} {bar:30} {msg}").expect("the template is good");
                let bar = ProgressBar::new(u64::from(*of)).with_style(style).with_prefix(format!("{name:width$}"));
                bars.push(self.all.add(bar));
            }
            bars[i].set_length(u64::from(*of).max(1));
            bars[i].set_position(u64::from(*there));
            bars[i].set_message(doing.clone());
        }
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        self.bars.get_mut().expect("nothing panics with the lock held").iter().for_each(ProgressBar::abandon);
    }
}

const COUNTED: &str = "{pos}/{len}  {rate}  {eta} left  {msg}";

fn style(what: &str, figures: &str) -> ProgressStyle {
    let rate = |state: &ProgressState, to: &mut dyn Write| {
        // A terminal that is gone is no reason to stop.
        let _ = write!(to, "{:.1}/s", state.per_sec());
    };
    let template = format!("{what:12} {{bar:30}} {figures}");
    ProgressStyle::with_template(&template).expect("the template is good").with_key("rate", rate)
}

/// Lets a bar stand, and what comes next begin on a line of its own.
fn leave(bar: Option<(&'static str, ProgressBar)>) {
    if let Some((_, bar)) = bar {
        bar.abandon();
        if !bar.is_hidden() {
            eprintln!();
        }
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        leave(self.0.get_mut().expect("nothing panics with the lock held").take());
    }
}
