//! Charts as SVG: lines over epochs, how sure against how right, counts as bars.

use std::fmt::Write;

const WIDE: f64 = 460.0;
const HIGH: f64 = 240.0;
const LEFT: f64 = 48.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 34.0;

/// A line of a chart: its name, its class in the style sheet, and its points.
pub struct Line<'a> {
    pub name: &'a str,
    pub class: &'a str,
    pub points: Vec<(f64, f64)>,
}

/// An area with axes; maps values to pixels.
struct Plot {
    svg: String,
    x: (f64, f64),
    y: (f64, f64),
}

impl Plot {
    fn new(label: &str, x: (f64, f64), y: (f64, f64)) -> Self {
        let svg = format!("<svg viewBox=\"0 0 {WIDE} {HIGH}\" role=\"img\" aria-label=\"{label}\">\n");
        let mut plot = Plot { svg, x, y };
        plot.axes();
        plot
    }

    fn at_x(&self, x: f64) -> f64 {
        LEFT + (x - self.x.0) / (self.x.1 - self.x.0) * (WIDE - LEFT - RIGHT)
    }

    fn at_y(&self, y: f64) -> f64 {
        HIGH - BOTTOM - (y - self.y.0) / (self.y.1 - self.y.0) * (HIGH - TOP - BOTTOM)
    }

    fn axes(&mut self) {
        for y in ticks(self.y) {
            let at = self.at_y(y);
            let (right, text) = (WIDE - RIGHT, LEFT - 6.0);
            self.push(&format!("<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>"));
            self.push(&format!(
                "<text class=\"tick\" x=\"{text}\" y=\"{at:.1}\" dy=\"4\" text-anchor=\"end\">{}</text>",
                tick(y)
            ));
        }
        for x in ticks(self.x) {
            let (at, text) = (self.at_x(x), HIGH - BOTTOM + 16.0);
            self.push(&format!(
                "<text class=\"tick\" x=\"{at:.1}\" y=\"{text}\" text-anchor=\"middle\">{}</text>",
                tick(x)
            ));
        }
    }

    fn push(&mut self, element: &str) {
        self.svg.push_str(element);
        self.svg.push('\n');
    }

    fn caption(&mut self, text: &str) {
        let (x, y) = (LEFT + (WIDE - LEFT - RIGHT) / 2.0, HIGH - 4.0);
        self.push(&format!("<text class=\"caption\" x=\"{x}\" y=\"{y}\" text-anchor=\"middle\">{text}</text>"));
    }

    fn bar(&mut self, class: &str, x: (f64, f64), height: f64, title: &str) {
        let (left, right, top, bottom) =
            (self.at_x(x.0) + 1.0, self.at_x(x.1) - 1.0, self.at_y(height), self.at_y(self.y.0));
        let (wide, high) = ((right - left).max(0.5), (bottom - top).max(0.0));
        self.push(&format!(
            "<rect class=\"{class}\" x=\"{left:.1}\" y=\"{top:.1}\" width=\"{wide:.1}\" height=\"{high:.1}\"><title>{title}</title></rect>"
        ));
    }

    fn line(&mut self, class: &str, points: &[(f64, f64)]) {
        let mut path = String::new();
        for (x, y) in points.iter().filter(|(_, y)| y.is_finite()) {
            write!(path, "{:.1},{:.1} ", self.at_x(*x), self.at_y(*y)).expect("memory takes it");
        }
        self.push(&format!("<polyline class=\"line {class}\" points=\"{}\"/>", path.trim_end()));
    }

    fn end(mut self) -> String {
        self.push("</svg>");
        self.svg
    }
}

/// Lines over epochs; `best` is marked.
pub fn lines(label: &str, lines: &[Line<'_>], best: usize) -> String {
    let values = || lines.iter().flat_map(|line| line.points.iter().map(|(_, y)| *y)).filter(|y| y.is_finite());
    let (low, high) = (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max));
    let (low, high) = if low < high { (low, high) } else { (low.min(0.0), low.max(1.0)) };
    let room = (high - low) * 0.06;
    let epochs = lines.iter().map(|line| line.points.len()).max().unwrap_or(1).max(2) as f64;
    let mut plot = Plot::new(label, (1.0, epochs), (low - room, high + room));
    let (x, top, bottom) = (plot.at_x(best as f64), TOP, HIGH - BOTTOM);
    plot.push(&format!("<line class=\"best\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top}\" y2=\"{bottom}\"><title>best epoch: {best}</title></line>"));
    for line in lines {
        plot.line(line.class, &line.points);
    }
    plot.caption("epoch");
    let names: Vec<String> =
        lines.iter().map(|line| format!("<span class=\"key {}\">{}</span>", line.class, line.name)).collect();
    format!("{}<p class=\"keys\">{} <span class=\"key best\">best epoch</span></p>", plot.end(), names.join(" "))
}

/// How often the best class is right against how sure it is: a bar a bin, and the line where both are the same.
/// `bins`: mean confidence, share that is right, count.
pub fn reliability(label: &str, bins: &[(f64, f64, usize)]) -> String {
    let mut plot = Plot::new(label, (0.0, 1.0), (0.0, 1.0));
    let wide = 1.0 / bins.len() as f64;
    for (i, (confidence, right, count)) in bins.iter().enumerate().filter(|(_, bin)| bin.2 > 0) {
        let title = format!("{count} photographs: sure to {confidence:.3}, right in {right:.3}");
        plot.bar("bar", (i as f64 * wide, (i + 1) as f64 * wide), *right, &title);
    }
    plot.line("ideal", &[(0.0, 0.0), (1.0, 1.0)]);
    plot.caption("how sure (how often right, upwards)");
    plot.end()
}

/// Counts over values from `low` to 1; what lies below `threshold` in another colour.
pub fn histogram(label: &str, values: &[f32], threshold: f32) -> String {
    const BARS: usize = 40;
    let least = values.iter().copied().fold(threshold, f32::min);
    let low = f64::from((least * 50.0).floor() / 50.0).clamp(0.0, 0.98);
    let wide = (1.0 - low) / BARS as f64;
    let mut counts = [0usize; BARS];
    for value in values {
        counts[(((f64::from(*value) - low) / wide) as usize).min(BARS - 1)] += 1;
    }
    let most = counts.iter().copied().max().unwrap_or(0).max(1);
    let mut plot = Plot::new(label, (low, 1.0), (0.0, most as f64 * 1.05));
    for (i, count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
        let (left, right) = (low + i as f64 * wide, low + (i + 1) as f64 * wide);
        let class = if f64::midpoint(left, right) < f64::from(threshold) { "bar wrong" } else { "bar" };
        plot.bar(class, (left, right), *count as f64, &format!("{count} photographs, {left:.3}–{right:.3}"));
    }
    let x = plot.at_x(f64::from(threshold));
    plot.push(&format!("<line class=\"best\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{}\"/>", HIGH - BOTTOM));
    plot.caption("similarity to the flowers it learned from; unknown left of the line");
    plot.end()
}

/// Four to eight round numbers within a range.
fn ticks((low, high): (f64, f64)) -> Vec<f64> {
    let rough = (high - low) / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|n| n * power).into_iter().find(|step| *step >= rough).unwrap_or(rough);
    let first = (low / step).ceil() as i64;
    (first..).map(|n| n as f64 * step).take_while(|tick| *tick <= high + step * 1e-9).collect()
}

fn tick(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_few() {
        assert_eq!(ticks((0.0, 1.0)).into_iter().map(tick).collect::<Vec<_>>(), ["0", "0.2", "0.4", "0.6", "0.8", "1"]);
        assert_eq!(ticks((1.0, 60.0)).into_iter().map(tick).collect::<Vec<_>>(), ["20", "40", "60"]);
        for range in [(0.231, 0.249), (0.0, 3.0), (1.0, 2.0), (-5.0, 1e6)] {
            assert!((2..=10).contains(&ticks(range).len()), "{range:?}");
        }
    }

    #[test]
    fn charts_draw_what_they_are_given() {
        let line = Line { name: "loss", class: "train", points: vec![(1.0, 0.5), (2.0, f64::NAN), (3.0, 0.25)] };
        let svg = lines("loss", &[line], 3);
        let points = svg.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
        assert_eq!(points.split(' ').count(), 2, "a number that is none is left out: {points}");
        let bars = reliability("r", &[(0.1, 0.2, 4), (0.0, 0.0, 0), (0.9, 0.8, 6)]);
        assert_eq!(bars.matches("<rect").count(), 2);
        let bars = histogram("h", &[0.85, 0.95, 0.951, 1.0], 0.9);
        assert_eq!(bars.matches("bar wrong").count(), 1);
        assert!(!bars.contains("NaN") && !svg.contains("NaN"));
    }
}
