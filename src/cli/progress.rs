//! Progress bars on standard error, shown only on a terminal.

use std::fmt::Write;
use std::sync::Mutex;

use bloomcast::train::run::Progress;
use indicatif::{MultiProgress, ProgressBar, ProgressState, ProgressStyle};

/// A progress bar that is replaced when the next phase begins.
#[derive(Default)]
pub struct Bars(Mutex<Option<(&'static str, ProgressBar)>>);

impl Bars {
    /// Shows the progress of a training run.
    pub fn train(&self, progress: Progress) {
        match progress {
            Progress::Read { done, total } => self.show("images", done as u64, total as u64),
            Progress::Compared { done, total } => self.show("compared", done as u64, total as u64),
            Progress::Scanned { done, total } => self.show("scanned", done as u64, total as u64),
            Progress::Features { done, total } => self.show("features", done as u64, total as u64),
            Progress::Warning(warning) => eprintln!("warning: {warning}"),
            Progress::Epoch { epoch, total } => {
                let (loss, val) = (epoch.train_loss, epoch.val);
                let message = format!("loss {loss:.4}, validation loss {:.4}, accuracy {:.4}", val.loss, val.accuracy);
                self.update("epochs", COUNTED, epoch.epoch as u64, total as u64, message);
            }
        }
    }

    /// Shows that `done` of `total` items of the phase `phase` are done.
    pub fn show(&self, phase: &'static str, done: u64, total: u64) {
        self.update(phase, COUNTED, done, total, String::new());
    }

    /// Shows that `done` of `total` bytes of the phase `phase` are done.
    #[cfg(feature = "fetch")]
    pub fn bytes(&self, phase: &'static str, done: u64, total: u64) {
        self.update(phase, "{bytes}/{total_bytes}  {binary_bytes_per_sec}  {eta} left", done, total, String::new());
    }

    fn update(&self, phase: &'static str, counters: &str, done: u64, total: u64, message: String) {
        let mut current = self.0.lock().expect("no code panics with the lock held");
        let bar = match current.take() {
            Some((current, bar)) if current == phase && bar.length() == Some(total) => bar,
            previous => {
                finish(previous);
                ProgressBar::new(total).with_style(style(phase, counters))
            }
        };
        bar.set_message(message);
        bar.set_position(bar.position().max(done));
        *current = Some((phase, bar));
    }
}

/// A progress bar for each device.
#[derive(Default)]
pub struct Devices {
    all: MultiProgress,
    bars: Mutex<Vec<ProgressBar>>,
}

impl Devices {
    /// Shows for each device its name, its state, and the number of received and of all chunks. Every call passes the same
    /// devices.
    pub fn show(&self, devices: &[(&str, (String, u32, u32))]) {
        let mut bars = self.bars.lock().expect("no code panics with the lock held");
        let width = devices.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        for (i, (name, (state, received, total))) in devices.iter().enumerate() {
            if bars.len() == i {
                let style = ProgressStyle::with_template("{prefix} {bar:30} {msg}").expect("the template is valid");
                let bar = ProgressBar::new(u64::from(*total)).with_style(style).with_prefix(format!("{name:width$}"));
                bars.push(self.all.add(bar));
            }
            bars[i].set_length(u64::from(*total).max(1));
            bars[i].set_position(u64::from(*received));
            bars[i].set_message(state.clone());
        }
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        self.bars.get_mut().expect("no code panics with the lock held").iter().for_each(ProgressBar::abandon);
    }
}

const COUNTED: &str = "{pos}/{len}  {rate}  {eta} left  {msg}";

fn style(phase: &str, counters: &str) -> ProgressStyle {
    let rate = |state: &ProgressState, to: &mut dyn Write| {
        // A closed terminal does not end the command.
        let _ = write!(to, "{:.1}/s", state.per_sec());
    };
    let template = format!("{phase:12} {{bar:30}} {counters}");
    ProgressStyle::with_template(&template).expect("the template is valid").with_key("rate", rate)
}

/// Leaves a bar on the screen and starts a new line.
fn finish(bar: Option<(&'static str, ProgressBar)>) {
    if let Some((_, bar)) = bar {
        bar.abandon();
        if !bar.is_hidden() {
            eprintln!();
        }
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        finish(self.0.get_mut().expect("no code panics with the lock held").take());
    }
}
