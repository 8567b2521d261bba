//! The directions that the training photographs' features span: the right singular vectors of the
//! matrix of unit rows with the largest singular values, by randomised subspace iteration (Halko,
//! Martinsson and Tropp, 2011).

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::vision::head::dot;

/// Multiplications by XᵀX; each sharpens the spectrum.
const ROUNDS: usize = 4;

/// `rows`: feature vectors of one width. Gives `[rank, width]`, orthonormal rows; fewer than `rank`
/// where the rows span less. Lengths do not count, and rows of length 0 are left out.
pub fn span<'a>(rows: impl Iterator<Item = &'a [f32]>, width: usize, rank: usize, seed: u64) -> Vec<f32> {
    let units: Vec<Vec<f32>> = rows.filter_map(|row| unit(row.to_vec())).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let rank = rank.min(width).min(units.len());
    let mut basis: Vec<Vec<f32>> = (0..rank).map(|_| (0..width).map(|_| sign(&mut rng)).collect()).collect();
    for _ in 0..ROUNDS {
        basis = orthonormal(multiply(&units, &basis));
    }
    basis.concat()
}

/// Each direction times XᵀX.
fn multiply(units: &[Vec<f32>], basis: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let mut out = vec![vec![0.0; units.first().map_or(0, Vec::len)]; basis.len()];
    for row in units {
        for (to, direction) in out.iter_mut().zip(basis) {
            add(to, dot(row, direction), row);
        }
    }
    out
}

/// Gram and Schmidt, each direction twice for the sake of rounding; what depends on those before it is
/// left out.
fn orthonormal(directions: Vec<Vec<f32>>) -> Vec<Vec<f32>> {
    let mut done: Vec<Vec<f32>> = Vec::with_capacity(directions.len());
    for mut direction in directions {
        let before = dot(&direction, &direction).sqrt();
        for _ in 0..2 {
            for other in &done {
                let along = dot(&direction, other);
                add(&mut direction, -along, other);
            }
        }
        if dot(&direction, &direction).sqrt() > 1e-4 * before
            && let Some(direction) = unit(direction)
        {
            done.push(direction);
        }
    }
    done
}

/// `to += factor × from`
fn add(to: &mut [f32], factor: f32, from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += factor * from;
    }
}

fn unit(mut row: Vec<f32>) -> Option<Vec<f32>> {
    let length = dot(&row, &row).sqrt();
    if length == 0.0 {
        return None;
    }
    row.iter_mut().for_each(|x| *x /= length);
    Some(row)
}

fn sign(rng: &mut ChaCha8Rng) -> f32 {
    if rng.next_u32() & 1 == 0 { -1.0 } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vision::OodDetector;

    #[test]
    fn the_plane_that_rows_lie_in_is_found() {
        // Rows in the plane of (1, 1, 0, 0) and (0, 0, 1, −1), of any length.
        let rows: Vec<Vec<f32>> = (1..20)
            .map(|i| {
                let (a, b) = ((i as f32).sin() * i as f32, (i as f32 * 1.7).cos());
                vec![a, a, b, -b]
            })
            .collect();
        let basis = span(rows.iter().map(Vec::as_slice), 4, 4, 1);
        assert_eq!(basis.len(), 2 * 4, "two directions are all there is");
        let plane = OodDetector::new(4, basis.clone(), 0.5).unwrap();
        assert!(dot(&basis[..4], &basis[4..]).abs() < 1e-5);
        assert!(plane.similarity(&[2.0, 2.0, 1.0, -1.0]) > 0.9999);
        assert!(plane.similarity(&[1.0, -1.0, 1.0, 1.0]) < 1e-3);
        assert_eq!(span(rows.iter().map(Vec::as_slice), 4, 4, 1), basis, "the seed decides");
    }

    #[test]
    fn the_strongest_directions_come_first_and_nothing_spans_nothing() {
        let rows: Vec<Vec<f32>> =
            (0..100).map(|i| if i % 10 == 0 { vec![0.0, 1.0, 0.0] } else { vec![1.0, 0.0, 0.1] }).collect();
        let basis = span(rows.iter().map(Vec::as_slice), 3, 1, 1);
        assert!(basis[0].abs() > 0.99, "{basis:?}");
        assert!(span(std::iter::empty(), 3, 2, 1).is_empty());
    }
}
