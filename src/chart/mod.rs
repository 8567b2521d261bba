//! SVG charts: line charts over epochs, reliability diagrams and histograms. All functions are pure and return HTML
//! fragments, to be styled by the CSS classes `grid`, `tick`, `caption`, `line`, `bar`, `best`, `ideal`, `keys` and `key`.
//! Labels and names are inserted as they are: text from users must be escaped before.

use std::fmt::Write;

/// Width and height of a chart, in px.
const WIDTH: f64 = 460.0;
const HEIGHT: f64 = 240.0;
/// Margins around the plot area, in px.
const LEFT: f64 = 48.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 34.0;
/// Distances from the plot area to the labels of the vertical and the horizontal axis, in px.
const Y_LABEL_GAP: f64 = 6.0;
const X_LABEL_GAP: f64 = 16.0;
/// Distance from the caption's baseline to the lower edge, in px.
const CAPTION_GAP: f64 = 4.0;
/// Space left free above the highest and below the lowest value of a line chart, as a fraction of the range.
const PADDING: f64 = 0.06;
/// Bars of a histogram.
const BARS: usize = 40;

/// A series of a line chart.
pub struct Line<'a> {
    /// Name in the legend.
    pub name: &'a str,
    /// CSS class.
    pub class: &'a str,
    /// `(epoch, value)`; points whose value is not finite are skipped.
    pub points: Vec<(f64, f64)>,
}

/// A plot area with axes.
struct Plot {
    svg: String,
    /// Range of the values on the horizontal axis.
    x: (f64, f64),
    /// Range of the values on the vertical axis.
    y: (f64, f64),
}

impl Plot {
    fn new(label: &str, x: (f64, f64), y: (f64, f64)) -> Self {
        let svg = format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{label}\">\n");
        let mut plot = Plot { svg, x, y };
        plot.axes();
        plot
    }

    /// Returns the horizontal position of a value, in px.
    fn x_px(&self, x: f64) -> f64 {
        LEFT + (x - self.x.0) / (self.x.1 - self.x.0) * (WIDTH - LEFT - RIGHT)
    }

    /// Returns the vertical position of a value, in px from the top.
    fn y_px(&self, y: f64) -> f64 {
        HEIGHT - BOTTOM - (y - self.y.0) / (self.y.1 - self.y.0) * (HEIGHT - TOP - BOTTOM)
    }

    fn axes(&mut self) {
        for y in ticks(self.y) {
            let px = self.y_px(y);
            let (right, label) = (WIDTH - RIGHT, LEFT - Y_LABEL_GAP);
            self.push(&format!("<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{px:.1}\" y2=\"{px:.1}\"/>"));
            self.push(&format!(
                "<text class=\"tick\" x=\"{label}\" y=\"{px:.1}\" dy=\"4\" text-anchor=\"end\">{}</text>",
                tick_label(y)
            ));
        }
        for x in ticks(self.x) {
            let (px, label) = (self.x_px(x), HEIGHT - BOTTOM + X_LABEL_GAP);
            self.push(&format!(
                "<text class=\"tick\" x=\"{px:.1}\" y=\"{label}\" text-anchor=\"middle\">{}</text>",
                tick_label(x)
            ));
        }
    }

    fn push(&mut self, element: &str) {
        self.svg.push_str(element);
        self.svg.push('\n');
    }

    fn caption(&mut self, text: &str) {
        let (x, y) = (LEFT + (WIDTH - LEFT - RIGHT) / 2.0, HEIGHT - CAPTION_GAP);
        self.push(&format!("<text class=\"caption\" x=\"{x}\" y=\"{y}\" text-anchor=\"middle\">{text}</text>"));
    }

    /// Draws a bar from `x.0` to `x.1` with a gap of 1 px on both sides.
    fn bar(&mut self, class: &str, x: (f64, f64), height: f64, title: &str) {
        let (left, right, top, bottom) =
            (self.x_px(x.0) + 1.0, self.x_px(x.1) - 1.0, self.y_px(height), self.y_px(self.y.0));
        let (width, height) = ((right - left).max(0.5), (bottom - top).max(0.0));
        self.push(&format!(
            "<rect class=\"{class}\" x=\"{left:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{height:.1}\"><title>{title}</title></rect>"
        ));
    }

    fn line(&mut self, class: &str, points: &[(f64, f64)]) {
        let mut path = String::new();
        for (x, y) in points.iter().filter(|(_, y)| y.is_finite()) {
            write!(path, "{:.1},{:.1} ", self.x_px(*x), self.y_px(*y)).expect("a String takes any text");
        }
        self.push(&format!("<polyline class=\"line {class}\" points=\"{}\"/>", path.trim_end()));
    }

    fn end(mut self) -> String {
        self.push("</svg>");
        self.svg
    }
}

/// Returns a line chart over epochs with a legend; a vertical line marks the epoch `best`. `label` describes the chart for
/// screen readers.
pub fn lines(label: &str, lines: &[Line<'_>], best: usize) -> String {
    let values = || lines.iter().flat_map(|line| line.points.iter().map(|(_, y)| *y)).filter(|y| y.is_finite());
    let (low, high) = (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max));
    let (low, high) = if low < high { (low, high) } else { (low.min(0.0), low.max(1.0)) };
    let padding = (high - low) * PADDING;
    let epochs = lines.iter().map(|line| line.points.len()).max().unwrap_or(1).max(2) as f64;
    let mut plot = Plot::new(label, (1.0, epochs), (low - padding, high + padding));
    let (x, top, bottom) = (plot.x_px(best as f64), TOP, HEIGHT - BOTTOM);
    plot.push(&format!(
        "<line class=\"best\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top}\" y2=\"{bottom}\"><title>best epoch: {best}</title></line>"
    ));
    for line in lines {
        plot.line(line.class, &line.points);
    }
    plot.caption("epoch");
    let names: Vec<String> =
        lines.iter().map(|line| format!("<span class=\"key {}\">{}</span>", line.class, line.name)).collect();
    format!("{}<p class=\"keys\">{} <span class=\"key best\">best epoch</span></p>", plot.end(), names.join(" "))
}

/// Returns a reliability diagram: the accuracy of each confidence bin as a bar, and the diagonal of perfect calibration.
/// `bins` divide the confidences 0–1 equally; each is the mean confidence, the accuracy (both 0–1) and the number of images.
/// `label` describes the chart for screen readers.
pub fn reliability(label: &str, bins: &[(f64, f64, usize)]) -> String {
    let mut plot = Plot::new(label, (0.0, 1.0), (0.0, 1.0));
    let width = 1.0 / bins.len() as f64;
    for (i, (confidence, accuracy, count)) in bins.iter().enumerate().filter(|(_, bin)| bin.2 > 0) {
        let title = format!("{count} images: confidence {confidence:.3}, accuracy {accuracy:.3}");
        plot.bar("bar", (i as f64 * width, (i + 1) as f64 * width), *accuracy, &title);
    }
    plot.line("ideal", &[(0.0, 0.0), (1.0, 1.0)]);
    plot.caption("confidence (vertical: accuracy)");
    plot.end()
}

/// Returns a histogram of similarities. A line marks `threshold`; bars below it have the CSS class
/// `wrong`. `label` describes the chart for screen readers.
pub fn histogram(label: &str, values: &[f32], threshold: f32) -> String {
    let least = values.iter().copied().fold(threshold, f32::min);
    let largest = values.iter().copied().fold(threshold, f32::max);
    let high = f64::from((largest * 50.0).ceil() / 50.0);
    let low = f64::from((least * 50.0).floor() / 50.0).min(high - 0.02);
    let width = (high - low) / BARS as f64;
    let mut counts = [0usize; BARS];
    for value in values {
        counts[(((f64::from(*value) - low) / width) as usize).min(BARS - 1)] += 1;
    }
    let most = counts.iter().copied().max().unwrap_or(0).max(1);
    let mut plot = Plot::new(label, (low, high), (0.0, most as f64 * 1.05));
    for (i, count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
        let (left, right) = (low + i as f64 * width, low + (i + 1) as f64 * width);
        let class = if f64::midpoint(left, right) < f64::from(threshold) { "bar wrong" } else { "bar" };
        plot.bar(class, (left, right), *count as f64, &format!("{count} images, {left:.3}–{right:.3}"));
    }
    let x = plot.x_px(f64::from(threshold));
    plot.push(&format!("<line class=\"best\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{}\"/>", HEIGHT - BOTTOM));
    plot.caption("similarity to the training images; unknown below the line");
    plot.end()
}

/// Returns round tick values within a range, with a step of 1, 2 or 5 times a power of ten.
fn ticks((low, high): (f64, f64)) -> Vec<f64> {
    let rough = (high - low) / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|n| n * power).into_iter().find(|step| *step >= rough).unwrap_or(rough);
    let (first, last) = ((low / step).ceil() as i64, (high / step + 1e-9).floor() as i64);
    (first..=last).map(|n| n as f64 * step).collect()
}

/// Formats with at most three decimals.
fn tick_label(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_few() {
        assert_eq!(
            ticks((0.0, 1.0)).into_iter().map(tick_label).collect::<Vec<_>>(),
            ["0", "0.2", "0.4", "0.6", "0.8", "1"]
        );
        assert_eq!(ticks((1.0, 60.0)).into_iter().map(tick_label).collect::<Vec<_>>(), ["20", "40", "60"]);
        for range in [(0.231, 0.249), (0.0, 3.0), (1.0, 2.0), (-5.0, 1e6)] {
            assert!((2..=10).contains(&ticks(range).len()), "{range:?}");
        }
    }

    #[test]
    fn charts_draw_finite_points_and_nonempty_bins() {
        let line = Line { name: "loss", class: "train", points: vec![(1.0, 0.5), (2.0, f64::NAN), (3.0, 0.25)] };
        let svg = lines("loss", &[line], 3);
        let points = svg.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
        assert_eq!(points.split(' ').count(), 2, "NaN is skipped: {points}");
        let bars = reliability("r", &[(0.1, 0.2, 4), (0.0, 0.0, 0), (0.9, 0.8, 6)]);
        assert_eq!(bars.matches("<rect").count(), 2);
        let bars = histogram("h", &[0.85, 0.95, 0.951, 1.0], 0.9);
        assert_eq!(bars.matches("bar wrong").count(), 1);
        assert!(!bars.contains("NaN") && !svg.contains("NaN"));
    }
}
