//! Output of the demo on the terminal.

use std::io::{self, Write};
use std::path::Path;

use humantime::format_rfc3339_millis;

use super::photographs::Photographs;
use super::{Event, Outcome};
use crate::bench::{StageReport, TimingStats};
use crate::vision::{Labels, StageTimes};
use crate::vision_stage::ClassifiedFrame;

/// Width of a full bar, characters.
const BAR: usize = 12;

/// Prints the broker, the model, the photographs, and the names of the events' columns.
///
/// # Errors
///
/// The error of the writer.
pub fn header(out: &mut dyn Write, port: u16, photographs: &Photographs, model: &str) -> io::Result<()> {
    writeln!(out, "broker      127.0.0.1:{port}, inside this process")?;
    writeln!(out, "model       {model}")?;
    writeln!(out, "replaying   {} photographs from {}", photographs.images.len(), photographs.folder.display())?;
    writeln!(out, "subscribe   mosquitto_sub -p {port} -v -t '#'\n")?;
    columns(out, "previous")
}

/// Prints the names of the columns of [`event`], or of [`event_with_truth`] if `last` is `truth`.
///
/// # Errors
///
/// The error of the writer.
pub fn columns(out: &mut dyn Write, last: &str) -> io::Result<()> {
    writeln!(out, "{:12}  {:14}  {:18}  {:>7}  {last}", "time", "class", "confidence", "latency")
}

/// Prints an event in one line: time, class, confidence, latency from the capture of the frame, previous class.
///
/// # Errors
///
/// The error of the writer.
pub fn event(out: &mut dyn Write, event: &Event) -> io::Result<()> {
    writeln!(out, "{}  {}", line(event), event.previous)
}

/// Prints an event in one line: time, class, confidence, latency from the capture of the frame, the truth.
///
/// # Errors
///
/// The error of the writer.
pub fn event_with_truth(out: &mut dyn Write, event: &Event, truth: &str) -> io::Result<()> {
    match event.class == truth {
        true => writeln!(out, "{}  right", line(event)),
        false => writeln!(out, "{}  wrong: {truth}", line(event)),
    }
}

/// Returns the columns that all events have; with the last one, 80 characters at most in the demo without photographs.
fn line(event: &Event) -> String {
    let time = format_rfc3339_millis(event.received_at).to_string();
    let latency = format!("{:.0} ms", event.latency().as_secs_f64() * 1e3);
    let percent = event.confidence * 100.0;
    format!("{}  {:14}  {} {percent:3.0} %  {latency:>7}", &time[11..23], event.class, bar(event.confidence))
}

/// Draws `fraction`, clamped to 0–1, as a bar.
fn bar(fraction: f64) -> String {
    let full = (fraction.clamp(0.0, 1.0) * BAR as f64).round() as usize;
    format!("{}{}", "█".repeat(full), "░".repeat(BAR - full))
}

/// Prints the counters, the classes, the accuracy and the latencies of the whole run.
///
/// # Errors
///
/// The error of the writer.
pub fn summary(out: &mut dyn Write, photographs: &Photographs, outcome: &Outcome, labels: &Labels) -> io::Result<()> {
    let counters = &outcome.counters;
    writeln!(
        out,
        "\n{} frames in {:.1} s, {} classified, {} overwritten by newer ones, {} broken; {} events",
        counters.captured.get(),
        outcome.elapsed.as_secs_f64(),
        counters.classified.get(),
        counters.dropped.get(),
        counters.broken.get(),
        outcome.events.len()
    )?;
    if !photographs.classes.is_empty() {
        let published: Vec<&str> = outcome.events.iter().map(|event| event.class.as_str()).collect();
        writeln!(out, "replayed    {}", photographs.classes.join(" → "))?;
        writeln!(out, "published   {}", published.join(" → "))?;
        let (correct, total) = correct(&outcome.classified, labels, |image| photographs.true_class(image));
        writeln!(
            out,
            "accuracy    {correct} of {total} photographs classified correctly ({:.1} %)",
            100.0 * correct as f64 / total.max(1) as f64
        )?;
    }
    let latency = TimingStats::from_times(outcome.events.iter().map(Event::latency).collect());
    let overhead = TimingStats::from_times(
        outcome.events.iter().filter_map(|event| event.overhead(&outcome.classified)).collect(),
    );
    if outcome.events.is_empty() {
        writeln!(out, "latency     no events: the model is not confident of any photograph")?;
    } else {
        writeln!(out, "latency     {}, from the capture to the subscriber", percentiles(&latency))?;
        writeln!(out, "            {}, without the time of the backbone", percentiles(&overhead))?;
    }
    writeln!(out)?;
    let stages: Vec<StageTimes> = outcome.classified.iter().map(|frame| frame.stages).collect();
    write!(out, "{}", StageReport::from_frames(&stages))
}

fn percentiles(figures: &TimingStats) -> String {
    format!("median {:.1} ms, p99 {:.1} ms", figures.median_ms, figures.p99_ms)
}

/// Returns the number of frames whose predicted class is the truth, and the number of frames with a truth. `truth` returns that of a
/// frame's origin. A frame rejected as unknown has the class `unknown`.
pub fn correct<'a>(
    classified: &'a [ClassifiedFrame],
    labels: &Labels,
    truth: impl Fn(&'a Path) -> Option<&'a str>,
) -> (usize, usize) {
    let (mut correct, mut total) = (0, 0);
    for frame in classified {
        let Some(expected) = frame.origin.as_deref().and_then(&truth) else { continue };
        total += 1;
        correct += usize::from(labels.name(frame.class) == expected);
    }
    (correct, total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bar_length_is_proportional_and_clamped() {
        assert_eq!(bar(0.0), "░".repeat(12));
        assert_eq!(bar(0.5), format!("{}{}", "█".repeat(6), "░".repeat(6)));
        assert_eq!(bar(7.0), "█".repeat(12));
    }
}
