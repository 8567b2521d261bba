//! The subspace of the OOD detector: the principal directions of the training features, which are the right singular
//! vectors with the largest singular values of the matrix of L2-normalized rows, by randomized subspace iteration (Halko,
//! Martinsson and Tropp, 2011).

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::vision::head::dot;

/// Number of multiplications by XᵀX; each one separates the singular values further.
const ITERATIONS: usize = 4;
/// Fraction of its norm below which the orthogonal remainder of a direction counts as zero.
const DEPENDENT_BELOW: f32 = 1e-4;

/// Returns the `rank` principal directions of `rows` (`[width]` each) as `[rank, width]`, orthonormal rows; fewer than
/// `rank` if the rows span fewer dimensions. Rows are L2-normalized first; zero rows are skipped. `seed` determines the
/// random start.
pub fn principal_directions<'a>(
    rows: impl Iterator<Item = &'a [f32]>,
    width: usize,
    rank: usize,
    seed: u64,
) -> Vec<f32> {
    let units: Vec<Vec<f32>> = rows.filter_map(|row| normalized(row.to_vec())).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let rank = rank.min(width).min(units.len());
    let mut basis: Vec<Vec<f32>> = (0..rank).map(|_| (0..width).map(|_| random_sign(&mut rng)).collect()).collect();
    for _ in 0..ITERATIONS {
        basis = orthonormalize(multiply(&units, &basis));
    }
    basis.concat()
}

/// Returns each direction multiplied by XᵀX, where X has the rows `units`.
fn multiply(units: &[Vec<f32>], basis: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let mut out = vec![vec![0.0; units.first().map_or(0, Vec::len)]; basis.len()];
    for row in units {
        for (to, direction) in out.iter_mut().zip(basis) {
            axpy(dot(row, direction), row, to);
        }
    }
    out
}

/// Gram–Schmidt orthonormalization, done twice per direction to limit rounding errors. Directions that depend linearly on
/// earlier ones are dropped.
fn orthonormalize(directions: Vec<Vec<f32>>) -> Vec<Vec<f32>> {
    let mut basis: Vec<Vec<f32>> = Vec::with_capacity(directions.len());
    for mut direction in directions {
        let norm = dot(&direction, &direction).sqrt();
        for _ in 0..2 {
            for other in &basis {
                let projection = dot(&direction, other);
                axpy(-projection, other, &mut direction);
            }
        }
        if dot(&direction, &direction).sqrt() > DEPENDENT_BELOW * norm
            && let Some(direction) = normalized(direction)
        {
            basis.push(direction);
        }
    }
    basis
}

/// `y += a · x`
fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

/// Returns `row` divided by its L2 norm; `None` for a zero row.
fn normalized(mut row: Vec<f32>) -> Option<Vec<f32>> {
    let length = dot(&row, &row).sqrt();
    if length == 0.0 {
        return None;
    }
    row.iter_mut().for_each(|x| *x /= length);
    Some(row)
}

fn random_sign(rng: &mut ChaCha8Rng) -> f32 {
    if rng.next_u32() & 1 == 0 { -1.0 } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vision::OodDetector;

    #[test]
    fn finds_the_plane_that_contains_all_rows() {
        // Rows in the plane of (1, 1, 0, 0) and (0, 0, 1, −1), of different norms.
        let rows: Vec<Vec<f32>> = (1..20)
            .map(|i| {
                let (a, b) = ((i as f32).sin() * i as f32, (i as f32 * 1.7).cos());
                vec![a, a, b, -b]
            })
            .collect();
        let basis = principal_directions(rows.iter().map(Vec::as_slice), 4, 4, 1);
        assert_eq!(basis.len(), 2 * 4, "the rows span two dimensions");
        let plane = OodDetector::new(4, basis.clone(), 0.5).unwrap();
        assert!(dot(&basis[..4], &basis[4..]).abs() < 1e-5);
        assert!(plane.cosine(&[2.0, 2.0, 1.0, -1.0]) > 0.9999);
        assert!(plane.cosine(&[1.0, -1.0, 1.0, 1.0]) < 1e-3);
        assert_eq!(
            principal_directions(rows.iter().map(Vec::as_slice), 4, 4, 1),
            basis,
            "the same seed gives the same basis"
        );
    }

    #[test]
    fn finds_the_largest_singular_vector_and_returns_nothing_for_no_rows() {
        let rows: Vec<Vec<f32>> =
            (0..100).map(|i| if i % 10 == 0 { vec![0.0, 1.0, 0.0] } else { vec![1.0, 0.0, 0.1] }).collect();
        let basis = principal_directions(rows.iter().map(Vec::as_slice), 3, 1, 1);
        assert!(basis[0].abs() > 0.99, "{basis:?}");
        assert!(principal_directions(std::iter::empty(), 3, 2, 1).is_empty());
    }
}
