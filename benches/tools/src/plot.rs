//! Memory against N as SVG, both axes logarithmic.

use std::fmt::Write as _;

/// A line of the plot.
#[derive(Clone, Debug)]
pub struct Series {
    /// What it is.
    pub label: String,
    /// A colour of CSS.
    pub colour: &'static str,
    /// Whether somebody else has measured it.
    pub is_reference: bool,
    /// N and MiB.
    pub points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 480.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 300.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 55.0;

/// A logarithmic axis over whole powers of ten.
struct Axis {
    low: i32,
    high: i32,
    from: f64,
    to: f64,
}

impl Axis {
    fn new(values: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let logs = values.filter(|v| *v > 0.0).map(f64::log10);
        let (low, high) = logs.fold((f64::MAX, f64::MIN), |(low, high), log| {
            (low.min(log), high.max(log))
        });
        let low = if low > high { 0 } else { low.floor() as i32 };
        let high = (high.ceil() as i32).max(low + 1);
        Self {
            low,
            high,
            from,
            to,
        }
    }

    fn place(&self, value: f64) -> f64 {
        let share = (value.log10() - f64::from(self.low)) / f64::from(self.high - self.low);
        self.from + share * (self.to - self.from)
    }

    /// The powers of ten, and whether they are labelled or only a line in between.
    fn ticks(&self) -> impl Iterator<Item = (f64, bool)> {
        (self.low..=self.high).flat_map(move |power| {
            let multiples = if power == self.high { 1..2 } else { 1..10 };
            multiples.map(move |m| (f64::from(m) * 10_f64.powi(power), m == 1))
        })
    }
}

/// Draws the series under a title.
pub fn svg(title: &str, series: &[Series]) -> String {
    let points = || series.iter().flat_map(|s| &s.points);
    let x = Axis::new(points().map(|p| p.0), LEFT, WIDTH - RIGHT);
    let y = Axis::new(points().map(|p| p.1), HEIGHT - BOTTOM, TOP);
    let mut out = String::new();
    draw(&mut out, title, series, &x, &y).map_or_else(|_| String::new(), |()| out)
}

fn draw(
    out: &mut String,
    title: &str,
    series: &[Series],
    x: &Axis,
    y: &Axis,
) -> Result<(), std::fmt::Error> {
    let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
    let title = escape(title);
    writeln!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">
<rect width="100%" height="100%" fill="#fff"/>
<text x="{LEFT}" y="24" font-size="15">{title}</text>"##
    )?;
    for (value, is_labelled) in x.ticks() {
        let place = x.place(value);
        let colour = if is_labelled { "#bbb" } else { "#eee" };
        writeln!(
            out,
            r#"<line x1="{place:.1}" y1="{TOP}" x2="{place:.1}" y2="{bottom}" stroke="{colour}"/>"#
        )?;
        if is_labelled {
            let below = bottom + 18.0;
            writeln!(
                out,
                r#"<text x="{place:.1}" y="{below}" text-anchor="middle">{value}</text>"#
            )?;
        }
    }
    for (value, is_labelled) in y.ticks() {
        let place = y.place(value);
        let colour = if is_labelled { "#bbb" } else { "#eee" };
        writeln!(
            out,
            r#"<line x1="{LEFT}" y1="{place:.1}" x2="{right}" y2="{place:.1}" stroke="{colour}"/>"#
        )?;
        if is_labelled {
            let (beside, lower) = (LEFT - 8.0, place + 4.0);
            writeln!(
                out,
                r#"<text x="{beside}" y="{lower:.1}" text-anchor="end">{value}</text>"#
            )?;
        }
    }
    let (middle, below) = (f64::midpoint(LEFT, right), HEIGHT - 14.0);
    writeln!(
        out,
        r#"<text x="{middle}" y="{below}" text-anchor="middle">N operators</text>
<text transform="translate(18 {}) rotate(-90)" text-anchor="middle">MiB in all</text>"#,
        f64::midpoint(TOP, bottom)
    )?;
    for (i, one) in series.iter().enumerate() {
        let dashes = if one.is_reference { "3 4" } else { "none" };
        let style = format!(
            r#"fill="none" stroke="{}" stroke-width="2" stroke-dasharray="{dashes}""#,
            one.colour
        );
        let places: Vec<_> = one
            .points
            .iter()
            .map(|(n, mib)| (x.place(*n), y.place(*mib)))
            .collect();
        let line = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}"));
        writeln!(
            out,
            r#"<polyline points="{}" {style}/>"#,
            line.collect::<Vec<_>>().join(" ")
        )?;
        for (cx, cy) in &places {
            writeln!(
                out,
                r#"<circle cx="{cx:.1}" cy="{cy:.1}" r="3" fill="{}"/>"#,
                one.colour
            )?;
        }
        let (from, to, at) = (right + 16.0, right + 42.0, TOP + 10.0 + 22.0 * i as f64);
        let (label_x, label_y) = (to + 8.0, at + 4.0);
        writeln!(
            out,
            r#"<line x1="{from}" y1="{at}" x2="{to}" y2="{at}" {style}/>
<text x="{label_x}" y="{label_y}">{}</text>"#,
            escape(&one.label)
        )?;
    }
    out.push_str("</svg>\n");
    Ok(())
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_where_they_belong() {
        let series = Series {
            label: "a < b".into(),
            colour: "red",
            is_reference: false,
            points: vec![(1.0, 10.0), (100.0, 1000.0)],
        };
        let svg = svg("T", &[series]);
        assert!(svg.contains(r#"points="70.0,425.0 560.0,50.0""#), "{svg}");
        assert!(svg.contains("a &lt; b") && svg.ends_with("</svg>\n"));
    }
}
