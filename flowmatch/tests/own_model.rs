//! The example of a model of one's own learns what it is shown.
#![allow(clippy::unwrap_used)] // a test

#[path = "../examples/own_model.rs"]
mod own_model;

#[test]
fn the_example_draws_points_of_the_ring() {
    let points = own_model::ring(800, 512).unwrap();
    let radii: Vec<f32> = points.chunks(2).map(|p| (p[0] * p[0] + p[1] * p[1]).sqrt()).collect();
    let mean = |values: &mut dyn Iterator<Item = f32>| values.sum::<f32>() / radii.len() as f32;
    let (radius, off) = (mean(&mut radii.iter().copied()), mean(&mut radii.iter().map(|r| (r - 1.0).abs())));
    assert!((radius - 1.0).abs() < 0.1 && off < 0.15, "{radius} {off}");
    // All around, not in one place.
    let middle = [0, 1].map(|axis| mean(&mut points.chunks(2).map(|p| p[axis])).abs());
    assert!(middle.iter().all(|m| *m < 0.15), "{middle:?}");
}
