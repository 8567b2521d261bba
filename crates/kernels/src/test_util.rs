//! Helpers of the tests.

use std::time::{SystemTime, UNIX_EPOCH};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::Isa;

/// Random shapes and values.
pub struct Random(ChaCha8Rng);

impl Random {
    /// Prints its seed, so that a failure can be repeated with the environment variable `KERNELS_TEST_SEED`.
    pub fn from_printed_seed() -> Self {
        let given = std::env::var("KERNELS_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos() as u64);
        let seed = given.unwrap_or_else(now);
        println!("KERNELS_TEST_SEED={seed}");
        Random(ChaCha8Rng::seed_from_u64(seed))
    }

    /// Returns a number from `low` to `high`, both included.
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.0.next_u32() as usize % (high - low + 1)
    }

    pub fn flip(&mut self) -> bool {
        self.between(0, 1) == 1
    }

    /// Returns values between −1 and 1.
    pub fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.0.next_u32() as f32 / u32::MAX as f32 * 2.0 - 1.0).collect()
    }
}

pub fn supported_isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_supported())
}

/// Asserts that values differ by at most 1e-5 of the largest expected one (or of 1).
pub fn assert_close(found: &[f32], expected: &[f32], context: &str) {
    assert_eq!(found.len(), expected.len(), "{context}");
    let largest = expected.iter().fold(1.0_f32, |largest, value| largest.max(value.abs()));
    for (at, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() / largest <= 1e-5, "{context}: value {at} is {a}, expected {b}");
    }
}
