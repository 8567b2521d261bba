//! What the demo shows.

use std::io::{self, Write};

use humantime::format_rfc3339_millis;

use super::photographs::Photographs;
use super::{Event, Outcome};
use crate::bench::{Figures, StageReport};
use crate::vision::Stages;

/// Characters of a bar that is full.
const BAR: usize = 20;

pub fn opening(out: &mut dyn Write, port: u16, photographs: &Photographs, model: &str) -> io::Result<()> {
    writeln!(out, "broker      127.0.0.1:{port}, inside this process")?;
    writeln!(out, "model       {model}")?;
    writeln!(out, "replaying   {} photographs from {}", photographs.images.len(), photographs.folder.display())?;
    writeln!(out, "watch along mosquitto_sub -p {port} -v -t '#'")?;
    writeln!(out)
}

/// One line: when, what, how sure, how long after the picture was caught.
pub fn event(out: &mut dyn Write, event: &Event) -> io::Result<()> {
    let time = format_rfc3339_millis(event.received_at).to_string();
    writeln!(
        out,
        "{}  {:12} {} {:3.0} %   {:4.0} ms after the frame   (was {})",
        &time[11..23],
        event.class,
        bar(event.confidence),
        event.confidence * 100.0,
        event.latency().as_secs_f64() * 1e3,
        event.previous
    )
}

fn bar(share: f64) -> String {
    let full = (share.clamp(0.0, 1.0) * BAR as f64).round() as usize;
    format!("{}{}", "█".repeat(full), "░".repeat(BAR - full))
}

pub fn summary(out: &mut dyn Write, photographs: &Photographs, outcome: &Outcome, labels: &[String]) -> io::Result<()> {
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
        let told: Vec<&str> = outcome.events.iter().map(|event| event.class.as_str()).collect();
        writeln!(out, "replayed    {}", photographs.classes.join(" → "))?;
        writeln!(out, "told        {}", told.join(" → "))?;
        let (right, of) = right(photographs, outcome, labels);
        writeln!(
            out,
            "accuracy    {right} of {of} photographs named right ({:.1} %)",
            100.0 * right as f64 / of.max(1) as f64
        )?;
    }
    let latency = Figures::of(outcome.events.iter().map(Event::latency).collect());
    let overhead = Figures::of(outcome.events.iter().filter_map(|event| event.overhead(&outcome.seen)).collect());
    if outcome.events.is_empty() {
        writeln!(out, "latency     no event came: the photographs show nothing that the model is sure of")?;
    } else {
        writeln!(out, "latency     {}, from the frame to the subscriber", spread(&latency))?;
        writeln!(out, "            {}, without the backbone's own time", spread(&overhead))?;
    }
    writeln!(out)?;
    let stages: Vec<Stages> = outcome.seen.iter().map(|seen| seen.stages).collect();
    write!(out, "{}", StageReport::of(&stages))
}

fn spread(figures: &Figures) -> String {
    format!("median {:.1} ms, p99 {:.1} ms", figures.median_ms, figures.p99_ms)
}

/// Frames whose best class, and no rejection, is what their folder says; of how many.
fn right(photographs: &Photographs, outcome: &Outcome, labels: &[String]) -> (usize, usize) {
    let (mut right, mut of) = (0, 0);
    for seen in &outcome.seen {
        let Some(truth) = seen.origin.as_deref().and_then(|image| photographs.truth(image)) else { continue };
        of += 1;
        right += usize::from(seen.class.is_some_and(|class| labels[class] == truth));
    }
    (right, of)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_as_full_as_the_share() {
        assert_eq!(bar(0.0), "░".repeat(20));
        assert_eq!(bar(0.5), format!("{}{}", "█".repeat(10), "░".repeat(10)));
        assert_eq!(bar(7.0), "█".repeat(20));
    }
}
