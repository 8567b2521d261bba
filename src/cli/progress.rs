//! How far a long command is: a bar on standard error, and only on a terminal.

use std::sync::Mutex;

use bloomcast::train::session::Progress;
use indicatif::{ProgressBar, ProgressStyle};

/// One bar at a time; it changes with what is done.
#[derive(Default)]
pub struct Bars(Mutex<Option<(&'static str, ProgressBar)>>);

impl Bars {
    /// Shows a step of the trainer.
    pub fn train(&self, progress: Progress) {
        match progress {
            Progress::Read { done, of } => {
                self.show("photographs", done as u64, of as u64);
            }
            Progress::Features { done, of } => {
                self.show("features", done as u64, of as u64);
            }
            Progress::Warning(warning) => eprintln!("warning: {warning}"),
            Progress::Epoch { epoch, of } => {
                let (loss, val) = (epoch.train_loss, epoch.val);
                let message = format!("loss {loss:.4}, on others {:.4}, accuracy {:.4}", val.loss, val.accuracy);
                self.show("epochs", epoch.epoch as u64, of as u64).set_message(message);
            }
        }
    }

    /// Shows that `done` of `of` are done; a bar that is full stays where it stands.
    pub fn show(&self, what: &'static str, done: u64, of: u64) -> ProgressBar {
        self.at(what, "{pos}/{len}  {per_sec:>9}  {eta} left  {msg}", done, of)
    }

    /// The same for bytes.
    #[cfg(feature = "fetch")]
    pub fn bytes(&self, what: &'static str, done: u64, of: u64) {
        self.at(what, "{bytes}/{total_bytes}  {binary_bytes_per_sec}  {eta} left", done, of);
    }

    fn at(&self, what: &'static str, figures: &str, done: u64, of: u64) -> ProgressBar {
        let mut current = self.0.lock().expect("nothing panics with the lock held");
        let bar = match &*current {
            Some((shown, bar)) if *shown == what && bar.length() == Some(of) => bar.clone(),
            _ => {
                let style = ProgressStyle::with_template(&format!("{what:12} {{bar:30}} {figures}"));
                let bar = ProgressBar::new(of).with_style(style.expect("the template is good"));
                *current = Some((what, bar.clone()));
                bar
            }
        };
        bar.set_position(bar.position().max(done));
        if done == of {
            bar.abandon();
        }
        bar
    }
}
