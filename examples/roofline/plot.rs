//! The roofline as a picture: rate over FLOPs per byte, both logarithmic; the machine's limits as lines, workloads as points.

use crate::Outcome;
use crate::support::roof::Limits;
use gatefold::Dtype;
use plotters::prelude::*;
use std::path::Path;

const SIZE: (u32, u32) = (1100, 700);
const COLORS: [(Dtype, RGBColor); 3] =
    [(Dtype::F32, RGBColor(31, 119, 180)), (Dtype::BF16, RGBColor(214, 39, 40)), (Dtype::F16, RGBColor(44, 160, 44))];

/// Draws into an SVG file.
pub fn draw(path: &Path, level: &str, limits: &Limits, outcomes: &[Outcome]) -> Result<(), String> {
    try_draw(path, level, limits, outcomes).map_err(|e| format!("--plot {}: {e}", path.display()))
}

fn try_draw(path: &Path, level: &str, limits: &Limits, outcomes: &[Outcome]) -> Result<(), Box<dyn std::error::Error>> {
    let points: Vec<_> = outcomes
        .iter()
        .filter(|o| o.work.flops() > 0.0)
        .map(|o| (o, o.work.flops() / o.bytes, o.work.flops() / o.median() / 1e9))
        .collect();
    let peak = limits.single.max(limits.pairs) / 1e9;
    let (left, right) = (0.25, points.iter().fold(1024.0f64, |most, (_, x, _)| most.max(2.0 * x)));
    let bottom = points.iter().fold(limits.memory / 1e9 * left, |least, (_, _, y)| least.min(0.5 * y));

    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(format!("{} threads, level {level}", limits.threads), ("sans-serif", 22))
        .margin(16)
        .x_label_area_size(46)
        .y_label_area_size(64)
        .build_cartesian_2d((left..right).log_scale(), (bottom..2.0 * peak).log_scale())?;
    chart.configure_mesh().x_desc("FLOP per byte").y_desc("GFLOP/s").light_line_style(WHITE).draw()?;

    let gray = RGBColor(90, 90, 90);
    let text = ("sans-serif", 14).into_font().color(&gray);
    let slopes = [("memory", limits.memory), ("third-level cache", limits.l3), ("second-level cache", limits.l2)];
    for (name, bytes) in slopes.map(|(name, bytes)| (name, bytes / 1e9)).into_iter().filter(|(_, bytes)| *bytes > 0.0) {
        let ridge = peak / bytes;
        chart.draw_series(LineSeries::new([(left, left * bytes), (ridge, peak)], gray.stroke_width(2)))?;
        let label = format!("{name}, {bytes:.0} GB/s");
        chart.draw_series([Text::new(label, (1.12 * left, left * bytes), text.clone())])?;
    }
    for (name, flops) in [("f32 multiply-adds", limits.single), ("bf16 pairs", limits.pairs)] {
        let flops = flops / 1e9;
        if flops > 0.0 {
            let ridge = flops / limits.l2.max(limits.memory) * 1e9;
            chart.draw_series(LineSeries::new([(ridge, flops), (right, flops)], gray.stroke_width(2)))?;
            let label = format!("{name}, {flops:.0} GFLOP/s");
            chart.draw_series([Text::new(label, (right / 12.0, 1.15 * flops), text.clone())])?;
        }
    }
    for (dtype, color) in COLORS {
        let of_type = points.iter().filter(|(o, ..)| o.dtype == dtype);
        let labels = ("sans-serif", 12).into_font().color(&color);
        let marks = of_type.map(|(o, x, y)| {
            EmptyElement::at((*x, *y))
                + Circle::new((0, 0), 4, color.filled())
                + Text::new(o.work.id, (6, -6), labels.clone())
        });
        chart.draw_series(marks)?.label(dtype.name()).legend(move |(x, y)| Circle::new((x + 8, y), 4, color.filled()));
    }
    chart
        .configure_series_labels()
        .border_style(gray)
        .background_style(WHITE)
        .position(SeriesLabelPosition::LowerRight)
        .draw()?;
    root.present()?;
    Ok(())
}
